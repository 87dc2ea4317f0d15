"""Labels and file names from outside act neither on a terminal nor on a page; JSON and CSV are true."""

import csv
import io
import json
import shutil

import pytest
from whisper_meft.commands.cli import Terminal, main
from whisper_meft.comparison.report import table
from whisper_meft.errors import UserError, markdown, one_line, printable

from tests.training_fixtures import make_audio_folder, make_backbone, train_command

LABELS = ["\x1b[31mred\x1b[0m", "a\n# heading\n---\n<script>alert(1)<", "right\u202eleft|`*_x"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain — ěščř 中文 🙂 ع\u200cع", "plain — ěščř 中文 🙂 ع\u200cع"),
        ("a\nb\tc\rd", "a\\nb\\tc\\rd"),
        ("\x1b]0;title\x07\x7f\x9b1m", "\\x1b]0;title\\x07\\x7f\\x9b1m"),
        ("\u202eabc\u2069\u2028\u200f", "\\u202eabc\\u2069\\u2028\\u200f"),
        ("\U000e0041", "\\U000e0041"),
        (3, "3"),
    ],
)
def test_what_would_act_is_shown(text, shown):
    assert printable(text) == shown


def test_a_page_shows_text_as_it_is():
    assert markdown("<b>&*x*`y`[z](u)|#\n---") == r"&lt;b&gt;&amp;\*x\*\`y\`\[z\](u)\|\#\\n---"
    rows = {"lst": {"status": "failed", "reason": "no | \x1b[2J\n# <b>"}}
    assert (
        table({"methods": rows})
        .splitlines()[-1]
        .startswith(r"| lst | failed: no \| \\x1b\[2J\\n\# &lt;b&gt;")
    )


def test_messages_are_one_line_without_escapes():
    assert one_line(UserError("label 'a\x1b[2J\nb' is unknown")) == "label 'a\\x1b[2J b' is unknown"
    assert one_line(OSError("cannot open x\x9b2J")) == "cannot open x\\x9b2J"


def test_a_terminal_gets_line_ends_and_cursor_moves_alone():
    stream = io.StringIO()
    terminal = Terminal(stream)
    for text in ("one\n", "\x1b[A", "\n\x1b[A\x1b[A", "\rhalf", "\x1b[Ax", "\x1b[2J"):
        terminal.write(text)
    assert stream.getvalue() == "one\n\x1b[A\n\x1b[A\x1b[A\rhalf\\x1b[Ax\\x1b[2J"
    assert terminal.isatty() is False


def test_a_run_with_hostile_names(tmp_path, capsys):
    backbone = make_backbone(tmp_path / "base")
    plain = make_audio_folder(tmp_path / "plain", per_class=3)
    for label, folder in zip(LABELS, sorted(plain.iterdir())):
        shutil.copytree(folder, tmp_path / "audio" / label.replace("/", " "))
    out = tmp_path / "out"
    command = train_command(backbone, tmp_path / "audio", out, max_steps=2)
    assert main(command) == 0, capsys.readouterr().err
    labels = sorted(LABELS)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert sorted(config["id2label"].values()) == labels

    bad = tmp_path / "bad\x1b[2J\nname.wav"
    bad.write_bytes(b"nothing")
    clip = tmp_path / "good\x1b[2J\nname.wav"
    shutil.copy(next(plain.rglob("*.wav")), clip)
    trained = capsys.readouterr()
    assert main(["predict", str(out), str(clip), str(bad)]) == 1
    predicted = capsys.readouterr()
    assert len(predicted.out.splitlines()) == 2 and "good\\x1b[2J\\nname.wav" in predicted.out
    assert "bad\\x1b[2J\\nname.wav" in predicted.err
    assert main(["evaluate", str(out), "--data", str(tmp_path / "audio")]) == 0
    evaluated = capsys.readouterr()
    for text in (*trained, *predicted, *evaluated, (out / "evaluation.txt").read_text(encoding="utf-8")):
        assert not any(character in text for character in "\x1b\u202e\x9b")
        assert not any(line.startswith(("# ", "---", "<script")) for line in text.splitlines())

    readme = (out / "README.md").read_text(encoding="utf-8")
    assert "<script" not in readme and readme.count("\n---\n") == 1 and "\x1b" not in readme
    assert [line for line in readme.splitlines() if line.startswith("# ")] == ["# LST side network"]

    assert main(["predict", str(out), str(clip), "--output", str(tmp_path / "answers.csv")]) == 0
    with open(tmp_path / "answers.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert sorted(rows[0][2:]) == labels and rows[1][0] == str(clip)
