"""`whisper-meft app`: what is refused before a page is served, and what is served."""

import importlib.util

import pytest
from page_fixtures import make_model
from recogniser_fixtures import make_recogniser
from whisper_meft.app import serving
from whisper_meft.commands import app
from whisper_meft.commands.cli import main

pytest.importorskip("gradio", reason="the app extra is not installed")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("app")
    make_model(folder)
    make_recogniser(folder / "whisper")
    return folder


@pytest.fixture
def pages(monkeypatch):
    """The arguments of pages that would be served."""
    found = []
    monkeypatch.setattr(serving, "serve", lambda *arguments: found.append(arguments))
    return found


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--port", "65536"], 2, "--port must be from 0 to 65535, got 65536"),
        (["--port", "-1"], 2, "--port must be from 0 to 65535, got -1"),
        (["--host", ""], 2, "--host is empty"),
        (["--max_minutes", "0"], 2, "--max_minutes must be above 0 and finite, got 0"),
        (["--max_minutes", "nan"], 2, "--max_minutes must be above 0 and finite, got nan"),
        (["--max_minutes", "inf"], 2, "--max_minutes must be above 0 and finite, got inf"),
        (["--max_megabytes", "0"], 2, "--max_megabytes must be at least 1, got 0"),
        (["--top", "0"], 2, "--top must be at least 1, got 0"),
        (["--reject_below", "2"], 2, "--reject_below must be a number from 0 to 1, or saved"),
        (["--reject_below", "saved"], 1, "has no threshold; give a number, or let `whisper-meft calibrate`"),
        (["--reject_label", "other"], 2, "--reject_label other is for --reject_below, which is not given"),
        (["--reject_below", "0.5", "--reject_label", "low"], 1, "'low' is a class of the model"),
        (["--language", "nl"], 1, "--language is for models that transcribe, and this one classifies"),
        (["--tokenizer_name", "x"], 2, "--tokenizer_name x is for models that transcribe, and this one clas"),
        (["--window", "first"], 2, "--window first is not for a page"),
        (["--host", "no.such.host.invalid"], 1, "--host: there is no address 'no.such.host.invalid'"),
    ],
)
def test_mistakes_are_one_line(options, status, message, work, capsys):
    assert main(["app", str(work / "tones"), *options]) == status
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and message in error[0]


def test_a_model_that_transcribes_has_no_threshold_and_windows_of_its_own(work, pages, capsys):
    for option in ("--window", "--hop"):
        assert main(["app", str(work / "whisper"), option, "7"]) == 2
        assert f"{option} is for models that classify, and this one transcribes" in capsys.readouterr().err
    for option, value in (("--reject_below", "0.5"), ("--top", "5")):
        assert main(["app", str(work / "whisper"), option, value]) == 2
        assert f"{option} is for models that classify" in capsys.readouterr().err
    assert main(["app", str(work / "whisper")]) == 0
    page = pages[0][0]()
    assert page.title == "whisper" and not page.analytics_enabled


def test_what_is_served(work, pages, capsys):
    options = ["--max_minutes", "2.5", "--max_megabytes", "7", "--title", "<b>Tones</b>", "--port", "80"]
    assert main(["app", str(work / "tones"), *options, "--host", "0.0.0.0"]) == 0
    (build, host, port, most, ready) = pages[0]
    assert (host, port, most) == ("0.0.0.0", 80, 7 * 2**20)
    page = build()
    texts = " ".join(str(block.value) for block in page.blocks.values() if hasattr(block, "value"))
    assert "At most 2.5 minutes and 7 MB" in texts and "3 classes: high, low, middle" in texts
    assert "&lt;b&gt;Tones" in texts and "<b>" not in texts and str(work) not in texts
    ready("http://127.0.0.1:80")
    assert capsys.readouterr().out == "the page is at http://127.0.0.1:80 (Ctrl-C ends it)\n"


def test_without_the_extra(work, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        app.importlib.util, "find_spec", lambda name, *more: None if name == "gradio" else find(name, *more)
    )
    assert main(["app", str(work / "tones")]) == 1
    assert (
        "the page needs gradio, of the app extra: pip install 'meft-kernels[app]'" in capsys.readouterr().err
    )
