"""Every code block of the README and of the documentation runs, so that none goes stale.

The blocks of a page run in order in one folder, the Python ones in one namespace. The folder holds a small
corpus and, under the name of a real one, a tiny Whisper. Comments directly above a block say what is special:

    <!-- file: NAME -->         the block is the content of a file that later blocks read
    <!-- given: NAME, NAME -->  names of ``GIVEN`` that the block uses without making them
    <!-- output -->             the block is what the one before prints; "..." stands for anything
    <!-- fails -->              the block ends with an error, which <!-- output --> may then show
    <!-- not run: REASON -->    the block is not run; options of commands are checked all the same

In commands, ``...`` stands for a backbone, training data and a folder for the result.
"""

import argparse
import contextlib
import importlib
import io
import re
import runpy
import shlex
import shutil
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from recogniser_fixtures import make_recogniser
from training_fixtures import RATE, tone
from transformers import WhisperForAudioClassification
from whisper_meft import LSTConfig, UserError, get_meft_model
from whisper_meft.commands.cli import COMMANDS
from whisper_meft.commands.cli import main as whisper_meft_main

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").is_file())
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "examples" / "study" / "README.md",
    ROOT / "examples" / "real_speech" / "README.md",
    ROOT / "examples" / "real_speech" / "TRANSCRIPTION.md",
    ROOT / "examples" / "real_speech" / "ATTENTION.md",
    ROOT / "examples" / "real_speech" / "NOISE.md",
    *sorted(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts),
]
MARKS = {"file", "given", "output", "fails", "not run"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


# --- blocks ---


@dataclass
class Block:
    """A fenced block: where it is, its language, its text, and the marks above it."""

    where: str
    language: str
    text: str
    marks: dict[str, str] = field(default_factory=dict)


def blocks_of(text: str, name: str) -> list[Block]:
    """The fenced blocks of a page but for Sphinx' directives.

    Raises:
        ValueError: an unknown mark, or a mark above something else.
    """
    found: list[Block] = []
    marks: dict[str, str] = {}
    lines = iter(enumerate(text.split("\n"), 1))
    for number, line in lines:
        mark = re.fullmatch(r"\s*<!-- ([a-z ]+?)(?:: (.*))? -->", line)
        fence = re.fullmatch(r"( *)(```+)(\S*).*", line)
        if mark and mark[1] in MARKS:
            marks[mark[1]] = mark[2] or ""
        elif fence:
            indent, ticks, language = fence.groups()
            content = []
            for _, inner in lines:
                if inner.strip() == ticks:
                    break
                content.append(inner.removeprefix(indent))
            if not language.startswith("{"):
                found.append(Block(f"{name}:{number}", language, "\n".join(content), marks))
            elif marks:
                raise ValueError(f"{name}:{number}: {', '.join(marks)} above a directive")
            marks = {}
        elif marks:
            raise ValueError(f"{name}:{number}: {', '.join(marks)} must stand directly above a block")
    return found


# --- what pages find in their folder ---


LABELS = {"northern": 2400.0, "southern": 300.0, "western": 900.0}


def _write_clips(folder: Path, per_class: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    for label, frequency in LABELS.items():
        (folder / label).mkdir(parents=True)
        for number in range(per_class):
            wave = tone(frequency, generator.uniform(0.4, 0.9), generator)
            soundfile.write(folder / label / f"{number}.wav", wave, RATE)


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory) -> Path:
    """The folder that each page gets a copy of."""
    folder = tmp_path_factory.mktemp("docs")
    # A published Whisper transcribes: it has a decoder and no classifier.
    make_recogniser(folder / "openai" / "whisper-small", max_target_positions=40)
    for seed, (split, clips) in enumerate({"train": 4, "dev": 2, "test": 2}.items()):
        _write_clips(folder / "corpus" / split, clips, seed)
    shutil.copytree(folder / "corpus" / "test" / "northern", folder / "recordings")
    wave, rate = soundfile.read(folder / "recordings" / "0.wav")
    soundfile.write(folder / "interview.mp3", wave, rate)
    generator = np.random.default_rng(9)  # four seconds, of which the tiny Whisper hears one at a time
    parts = [
        tone(LABELS[label], seconds, generator) for label, seconds in (("southern", 2.5), ("western", 1.5))
    ]
    soundfile.write(folder / "broadcast.flac", np.concatenate(parts), RATE)
    return folder


class Clips(torch.utils.data.Dataset):
    """Random features of the tiny Whisper's window, with labels."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict:
        generator = torch.Generator().manual_seed(index)
        return {"input_features": torch.randn(80, 100, generator=generator), "labels": index % 3}


def _published_checkpoint() -> str:
    from whisper_meft.model.published import to_published

    whisper = WhisperForAudioClassification.from_pretrained("openai/whisper-small")
    get_meft_model(whisper, LSTConfig()).save_pretrained("ours_of_old")
    to_published("ours_of_old", Path("published_checkpoint"))
    return "published_checkpoint"


def _spoken() -> tuple[torch.Tensor, torch.Tensor]:
    """Features and labels for the tiny Whisper that transcribes."""
    features = torch.stack([Clips()[i]["input_features"] for i in range(2)])
    return features, torch.tensor([[7, 8, 9], [8, 9, -100]])


def _sounds() -> Path:
    """Recordings of noise, and of a room that answers a click."""
    generator, response = np.random.default_rng(0), np.zeros(RATE // 4)
    response[[40, 900, 2000]] = 0.8, 0.3, -0.1
    for name, sound in {"noise": 0.1 * generator.standard_normal(RATE), "rooms": response}.items():
        (Path("sounds") / name).mkdir(parents=True)
        soundfile.write(Path("sounds") / name / "0.wav", sound, RATE)
    return Path("sounds")


GIVEN = {"clips": Clips, "published_checkpoint": _published_checkpoint, "spoken": _spoken, "sounds": _sounds}


# --- running ---


class Parsed(Exception):
    """A command line was understood; what it asks for is not done."""


@contextlib.contextmanager
def only_parsing():
    """Lets argparse's ``parse_args`` end the program once the arguments have been parsed."""
    original = argparse.ArgumentParser.parse_args

    def parse_args(self, *arguments, **options):
        original(self, *arguments, **options)
        raise Parsed

    argparse.ArgumentParser.parse_args = parse_args
    try:
        yield
    finally:
        argparse.ArgumentParser.parse_args = original


class Reader:
    """Runs the blocks of one page, as its reader would."""

    def __init__(self):
        self.namespace: dict = {"__name__": "__main__"}
        self.output = ""
        self.runs = 0

    def read(self, block: Block) -> None:
        if "file" in block.marks:
            path = Path(block.marks["file"])
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text + "\n", encoding="utf-8")
            return
        if "output" in block.marks:
            check_output(block, self.output)
            return
        for name in filter(None, block.marks.get("given", "").split(", ")):
            self.namespace[name] = GIVEN[name]()
        really = "not run" not in block.marks
        assert really or block.marks["not run"], f"{block.where}: a reason is needed for not running it"
        if block.language == "python":
            run = self.python
        elif block.language == "sh":
            run = self.shell
        else:
            kind = f"a block of {block.language or 'no language'}"
            assert not really, f"{block.where}: {kind} neither runs nor is it marked"
            return
        stream = io.StringIO()
        with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
            failed = run(block, really)
        self.output = stream.getvalue()
        expected = "fails" in block.marks
        said = f"{block.where}: every command should {'fail' if expected else 'succeed'}, got {failed}"
        assert not really or all(each == expected for each in failed), f"{said}\n{self.output}"

    def python(self, block: Block, really: bool) -> list[bool]:
        """Runs or compiles a block; whether it failed, as the one entry of a list."""
        code = compile(block.text, block.where, "exec")
        if not really:
            return []
        try:
            exec(code, self.namespace)
        except (UserError, ValueError, TypeError) as error:
            if "fails" not in block.marks:
                raise
            print(f"{type(error).__name__}: {error}")
            return [True]
        return [False]

    def shell(self, block: Block, really: bool) -> list[bool]:
        """Runs or checks the commands of a block; which of those that were run failed."""
        failed = []
        for line in re.sub(r"\\\n", " ", block.text).split("\n"):
            for part in line.split("&&"):
                words = shlex.split(part, comments=True)
                while words and re.match(r"[A-Z_]+=", words[0]):
                    words = words[1:]
                if not words:
                    continue
                try:
                    failed += self.command(words, really)
                except (Exception, SystemExit) as error:
                    raise AssertionError(f"{block.where}: {shlex.join(words)}: {error}") from error
        return failed

    def command(self, words: list[str], really: bool) -> list[bool]:
        """Runs or checks one command; whether it failed, if it was run."""
        program, *arguments = words
        if program == "whisper-meft" or words[1:3] == ["-m", "whisper_meft"]:
            return self.whisper_meft(arguments[2:] if program == "python" else arguments, really)
        if program == "python" and arguments[0] == "-m":
            self.module(arguments[1], arguments[2:])
        elif program == "python":
            check_script(*arguments)
        elif program in ("torchrun", "accelerate"):
            self.launched(words)
        elif program == "make":
            targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
            assert set(arguments) <= set(targets), f"make has {', '.join(targets)}"
        elif program == "pip":
            check_pip(arguments)
        else:
            assert program in ("git", "cd", "source"), f"{program}: what is to be checked of this?"
            assert not [word for word in arguments if word.startswith("-")], "options are not checked here"
        return []

    def whisper_meft(self, arguments: list[str], really: bool) -> list[bool]:
        arguments = self.filled(arguments)
        if really:
            return [whisper_meft_main(arguments) != 0]
        module = importlib.import_module(f"whisper_meft.commands.{COMMANDS[arguments[0]][0]}")
        module.make_parser().parse(arguments[1:])
        return []

    def filled(self, arguments: list[str]) -> list[str]:
        """The arguments with what ``...`` stands for, and with one epoch for however many there are."""
        self.runs += 1
        usual = {"model_name_or_path": "openai/whisper-small", "train_data": "corpus/train"}
        usual |= {"output_dir": f"run{self.runs}"}
        found = []
        for word, previous in zip(arguments, ["", *arguments]):
            if word == "...":
                given = [
                    (f"--{name}", value) for name, value in usual.items() if f"--{name}" not in arguments
                ]
                found += [part for pair in given for part in pair]
            else:
                found.append("1" if previous == "--num_train_epochs" else word)
        if arguments[0] == "train" and "--num_train_epochs" not in arguments:
            found += ["--num_train_epochs", "1"]
        return found

    def module(self, name: str, arguments: list[str]) -> None:
        """A module of this project with a command line, or pytest."""
        if name == "meft_kernels":
            runpy.run_module(name, run_name="__main__")
        elif name == "pytest":
            check_pytest(arguments)
        else:
            module = importlib.import_module(name)
            if hasattr(module, "__path__"):
                module = importlib.import_module(f"{name}.__main__")
            with only_parsing(), pytest.raises(Parsed):
                module.main(arguments)

    def launched(self, words: list[str]) -> None:
        """A launcher and what it starts: both sets of options are checked, nothing is started."""
        if words[0] == "torchrun":
            from torch.distributed.run import get_args_parser

            options = get_args_parser().parse_args(words[1:])
        else:
            from accelerate.commands.launch import launch_command_parser

            options = launch_command_parser().parse_args(words[2:])
        assert options.module and options.training_script == "whisper_meft"
        self.whisper_meft(options.training_script_args, False)


def check_output(block: Block, output: str) -> None:
    """Every line of the block is in the output, in this order."""
    patterns = [".*".join(map(re.escape, line.strip().split("..."))) for line in block.text.split("\n")]
    rest = [line.strip() for line in output.split("\n")]
    for pattern in patterns:
        while rest and not re.fullmatch(pattern, rest[0]):
            rest.pop(0)
        assert rest, f"{block.where}: the output has no line like {pattern!r} there:\n{output}"
        rest.pop(0)


def check_script(path: str, *arguments: str) -> None:
    """The options of a Python file of this repository."""
    assert (ROOT / path).is_file()
    if path == "setup.py":  # setuptools' own options, which are no argparse's
        assert set(arguments) <= {"build_ext", "--inplace", "--force"}
        return
    with only_parsing(), pytest.raises(Parsed):
        runpy.run_path(str(ROOT / path))["main"](list(arguments))


def check_pip(arguments: list[str]) -> None:
    """Requirements are ours with extras that exist, or other projects'."""
    from pip._internal.commands import create_command

    assert arguments[0] == "install"
    _, requirements = create_command("install").parser.parse_args(arguments[1:])
    assert requirements
    for requirement in requirements:
        name, _, extras = requirement.rstrip("]").partition("[")
        if name in (".", PROJECT["name"]):
            asked = set(filter(None, extras.split(",")))
            assert asked <= set(PROJECT["optional-dependencies"]), f"{requirement}: no such extra"


def check_pytest(arguments: list[str]) -> None:
    """Files exist, and marks are known."""
    for word, following in zip(arguments, [*arguments[1:], ""]):
        if word == "-m":
            markers = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
            markers = markers["tool"]["pytest"]["ini_options"]["markers"]
            assert any(marker.startswith(f"{following}:") for marker in markers)
        elif word.endswith(".py"):
            assert list(ROOT.glob(word)), f"no {word}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_blocks_of_a_page_run(page, surroundings, tmp_path, monkeypatch):
    blocks = blocks_of(page.read_text(encoding="utf-8"), str(page.relative_to(ROOT)))
    if not blocks:
        return
    shutil.copytree(surroundings, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.syspath_prepend(str(ROOT))
    reader = Reader()
    for block in blocks:
        reader.read(block)


# --- what such a test must notice ---


@pytest.mark.parametrize(
    ("page", "sentence"),
    [
        ("```\nx\n```", "no language"),
        ("```text\nx\n```", "neither runs nor"),
        ("<!-- not run -->\n```python\nx\n```", "a reason is needed"),
        ("<!-- not run: slow -->\n\n```python\nx\n```", "directly above a block"),
        ("<!-- given: clips -->\n```{toctree}\n```", "above a directive"),
        ("```python\nfrom whisper_meft import NoSuchConfig\n```", "NoSuchConfig"),
        ("<!-- not run: slow -->\n```python\nf(a=1, ...)\n```", "positional argument"),
        ("<!-- fails -->\n```python\n1 + 1\n```", "should fail"),
        ("```sh\nwhisper-meft nonsense\n```", "should succeed"),
        (
            "<!-- not run: slow -->\n```sh\nwhisper-meft train ... --no_such 1\n```",
            "unknown option --no_such",
        ),
        (
            "```sh\ntorchrun --nproc_per_node 2 -m whisper_meft train ... --no_such 1\n```",
            "unknown option --no_such",
        ),
        ("```sh\ntorchrun --no_such 2 -m whisper_meft train ...\n```", "torchrun"),
        ("```sh\nmake no_such\n```", "make has demo, test"),
        ("```sh\npip install '.[no_such]'\n```", "no such extra"),
        ("```sh\npython -m benchmarks.plot --no-such\n```", "benchmarks.plot"),
        ("```sh\npython -m pytest tests/test_no_such.py\n```", "no tests/test_no_such.py"),
        ("```sh\nno_such_program\n```", "what is to be checked"),
        ("```python\nprint(1)\n```\n<!-- output -->\n```text\n2\n```", "no line like '2'"),
    ],
)
def test_a_stale_block_is_noticed(page, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reader = Reader()
    with pytest.raises((AssertionError, ValueError, ImportError, SyntaxError), match=sentence):
        for block in blocks_of(page, "page.md"):
            reader.read(block)


def test_what_a_block_prints_is_compared_line_by_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = '```python\nprint("a 1\\n\\nb 2\\nc 3")\n```\n<!-- output -->\n```text\na ...\nc 3\n```'
    reader = Reader()
    for block in blocks_of(page, "page.md"):
        reader.read(block)
    with pytest.raises(AssertionError, match="no line like 'b"):  # after c, not before it
        check_output(Block("page.md:9", "text", "c 3\nb 2"), reader.output)
