"""The documentation is complete: pages, links, and the parts that are made from the code."""

import dataclasses
import re
import sys
from pathlib import Path

import pytest
import whisper_meft
from whisper_meft.commands.cli import COMMANDS

import meft_kernels
from meft_kernels import ops
from meft_kernels.tune.table import TABLE

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").is_file())
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS / "extensions"))

import docstrings  # noqa: E402
import pages  # noqa: E402

OPS = (*ops.OP_NAMES, "eight_bit")


def text_of(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def test_the_readme_is_short():
    assert len(text_of("README.md").split("\n")) <= 150


def test_links_of_the_readme_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", text_of("README.md"))
    local = [link for link in links if not link.startswith("https://")]
    assert len(local) > 10
    assert [link for link in local if not (ROOT / link).exists()] == []


# --- parts made from the code ---


def test_every_op_has_its_page():
    assert {path.stem for path in (DOCS / "kernels").glob("*.md")} == {"index", *OPS}
    for op in OPS:
        page = text_of(f"docs/kernels/{op}.md")
        for part in ("maths", "floors", "blocks"):
            assert f"```{{generated}} {part} {op}\n" in page
        assert f".. autofunction:: meft_kernels.ops.{op}\n" in page
        assert f"[{op}]({op}.md)" in text_of("docs/kernels/index.md")


def test_block_sizes_of_every_kernel_are_on_one_page():
    shown = [line.split("|")[1].strip(" `") for op in OPS for line in pages.blocks(op).split("\n")[2:]]
    assert sorted(shown) == sorted(row.kernel for row in TABLE)


def test_a_floor_is_the_larger_of_both_bounds():
    lines = pages.floors("relu_attention").split("\n")[4:]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert [row[0] for row in cells] == ["48", "96", "192", "384"]
    r, megabytes, gflop, h100, h200 = cells[1][:5]
    # Two products of 128 x 1500 x 1500 x 96 for each of 12 layers bound it on both cards.
    assert float(gflop.replace(",", "")) == pytest.approx(2 * 2 * 128 * 1500**2 * 96 * 12 / 1e9, rel=1e-3)
    assert h100 == h200 == "1.341 C"
    statistics = pages.floors("row_statistics").split("\n")
    assert len(statistics) == 5 and statistics[4].count("M") == 2
    assert "| encode | 737 |  | 0.220 M | 0.154 M |" in pages.floors("eight_bit")


def test_maths_is_the_docstring():
    text = pages.maths("ladder")
    assert "```text\nz = folded projection of x (see norm_linear);   u = sigmoid(gate / 0.1)\n" in text
    assert "\n\nThe gate multiplies the previous side state." in text
    assert "`fold`" in pages.maths("norm_linear") or "fold" in pages.maths("norm_linear")


def test_every_command_is_described_with_all_that_its_help_shows():
    page = text_of("docs/reference/command-line.md")
    described = re.findall(r"^## (\w+)\n\n```{generated} options (\w+)$", page, re.MULTILINE)
    assert described == [(name, name) for name in COMMANDS]
    text = pages.options("convert")
    assert "`SRC`\n: folder to read" in text and "`--to_published" in text
    assert re.search(r"`--method \{lst,unipt,sherl\}`\n: method of the checkpoint", text)
    assert "\\*" in pages.options("cache")  # max_*_samples is no emphasis
    training = pages.options("train")
    assert "`--reduction_factor" in training and "`--hub_model_id" not in training


def test_every_public_name_is_in_the_reference():
    for package, page in ((whisper_meft, "whisper_meft"), (meft_kernels, "meft_kernels")):
        text = text_of(f"docs/reference/{page}.md")
        for name in package.__all__:
            assert f":: {package.__name__}.{name}" in text or name == "ops", name


# --- docstrings ---


def test_arguments_on_one_line_are_split():
    lines = [
        "Does it.",
        "",
        "Args:",
        "    x: (..., D). norm_weight, norm_bias: (D,). weight: (r, D): of the Linear.",
        "        More of it: here.",
        "    gate … bias: (1,). Default: none.",
        "",
        "Returns:",
        "    One thing. other: no argument.",
    ]
    assert docstrings.split_arguments(lines) == [
        *lines[:3],
        "    x: (..., D).",
        "    norm_weight, norm_bias: (D,).",
        "    weight: (r, D): of the Linear.",
        *lines[4:],
    ]


def test_formulas_become_literal_blocks():
    lines = ["Text:", "", "    a = b * c", "", "    d = e", "", "More.", "", "Args:", "    x: (B,).", ""]
    found = docstrings.mark_formulas(lines)
    assert found == [*lines[:2], "::", "", *lines[2:]]


def test_options_of_a_dataclass_are_arguments():
    @dataclasses.dataclass
    class Options:
        width: int = dataclasses.field(default=8, metadata={"help": "How wide."})
        names: list = dataclasses.field(default_factory=lambda: ["a"], metadata={"help": "Which."})
        needed: int = dataclasses.field(default=dataclasses.MISSING, kw_only=True, metadata={"help": "It."})
        plain: int = 3

    lines = ["Options of it.", "", "Raises:", "    UserError: always."]
    docstrings.prepare(None, "class", "Options", Options, None, lines)
    assert lines == [
        "Options of it.",
        "",
        "",
        "Args:",
        "    width: How wide. Default: ``8``.",
        "    names: Which. Default: ``['a']``.",
        "    needed: It.",
        "",
        "Raises:",
        "    UserError: always.",
    ]


def test_names_that_pages_refer_to_are_in_the_reference():
    """Sphinx itself passes over references into the packages' modules, since docstrings have many."""
    texts = {
        path: path.read_text(encoding="utf-8") for path in DOCS.rglob("*.md") if "_build" not in path.parts
    }
    described = set(re.findall(r"^\.\. auto\w+:: (\S+)$", "\n".join(texts.values()), re.MULTILINE))
    wanted = set(re.findall(r"\{(?:class|func|meth)\}`([^`]+)`", "\n".join(texts.values())))
    assert wanted and wanted <= described
