"""Figures and the documentation's tables come from records and from nothing else."""

import copy
import re
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from whisper_meft.errors import UserError
from whisper_meft.files import write_json

from benchmarks import figures, pages, plot, record, summary, tables

GIB = 2**30


def step_row(method, ratio, peak, **changes):
    spread = {"median": 100.0 * ratio, "p20": 99.0 * ratio, "p80": 101.5 * ratio}
    row = {"method": method, "status": "ok", "step_ms": spread, "encoder_ms": spread, "ratio": ratio}
    row |= {"hugging_face_ms": spread, "ratio_to_hugging_face": 0.9 * ratio}
    row |= {"peak_bytes": int(peak * GIB), "counted_bytes": int(0.97 * peak * GIB), "loss": 1.8}
    row |= {"trainable": 1234567, "parameters": 90000000, "gradient_norm": 0.5, "head_gradient_norm": 2.0}
    return row | changes


def op_row(op, peer, direction, **changes):
    row = {"op": op, "case": op, "side": 96, "width": 768, "layers": 12, "peer": peer, "direction": direction}
    row |= {"median": 0.002, "p20": 0.0019, "p80": 0.0021, "rounds": 3, "bytes": 4e6, "flops": 8e7}
    row |= {"bandwidth_share": 0.4, "matmul_share": 0.3, "bound": "memory", "ratio_to_eager": 0.5}
    return row | {"peak": 3 * 2**20, "kept": 2 * 2**20} | changes


def make(name, figures, shapes, device="Some CPU", date="2026-01-02T03:04:05+00:00", kind="cpu"):
    where = {"commit": "0123456789abcdef", "dirty": False, "date": date, "device": device}
    where |= {"device_type": kind, "threads": 1, "torch": "2.13.0"}
    command = f"python -m benchmarks.{name} --output folder --some option"
    return {"name": name, "command": command, "shapes": shapes, "environment": where, "figures": figures}


STEP_SHAPES = {"model": "small", "batch": 128, "frames": 1500, "reduction_factor": 8, "dtype": "float32"}
STEP_SHAPES |= {"device": "cpu", "backend": "auto", "repeats": 3}
STEPS = make(
    "train_step",
    [
        step_row("full", 3.0, 70.0),
        step_row("lst", 1.2, 4.0),
        step_row("published_lst", 1.5, 20.0),
        {"method": "lora", "status": "out of memory", "counted_bytes": None},
    ],
    STEP_SHAPES,
)
PEERS = ("eager", "ops:reference")
RUN = make(
    "run",
    {
        "ceilings": {"copy_bandwidth": 1e10, "matmul_rate": 1e11},
        "memory_counter": "x",
        "base": None,
        "notes": {},
        "rows": [
            op_row(op, peer, direction, kept=(9 if peer == "eager" else 2) * 2**20)
            for op in ("ladder", "LST")
            for peer in PEERS
            for direction in ("forward", "backward", "both")
        ],
    },
    {"batch": 2, "frames": 1500, "layers": 12, "dtype": "float32"},
)
COUNTED = {
    "method": "published full",
    "batch": 128,
    "peak_gib": 74.0,
    "reserved_gib": 75.5,
    "paper_gib": 76.14,
}
MEMORY = make(
    "memory",
    [COUNTED, COUNTED | {"method": "lst fp8", "paper_gib": None}, COUNTED | {"batch": 64}],
    {"model": "small", "batch": 128, "frames": 1500, "dtype": "bfloat16"},
)
PAGE = "# Title\n\n- list\n\n  <!-- table: train_step -->\n  old\n  <!-- end of table -->\n\nafter\n"


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results"
    write_json(folder / "a.json", STEPS)
    write_json(folder / "b.json", RUN)
    return folder


def committed_records():
    """The records that are in the repository: one's own runs are no matter."""
    listing = ["git", "-C", str(record.ROOT), "ls-files", "benchmarks/results"]
    try:
        committed = subprocess.run(listing, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):  # no repository here
        committed = [str(path) for path in record.RESULTS.glob("*.json")]
    names = {Path(path).name for path in committed}
    records = [found for found in record.load_all() if found["file"] in names]
    assert records
    return records + record.load_all(plot.STUDY)


def test_pages_and_figures_are_what_the_results_give():
    """Those in the tree: run `python -m benchmarks.plot` after committing new results."""
    new = plot.written(committed_records(), pages.PAGES, plot.FIGURES)
    assert len(new) == len(figures.FIGURES) + len(pages.PAGES)
    for path, text in new.items():
        assert path.read_text(encoding="utf-8") == text, path
    for page in pages.PAGES:
        assert "<!-- table: " in page.read_text(encoding="utf-8")


def test_every_table_has_a_place():
    text = "".join(page.read_text(encoding="utf-8") for page in pages.PAGES)
    assert set(re.findall(r"<!-- table: (\S+) -->", text)) == set(pages.TABLES)


def test_a_table_is_written_between_its_markers():
    text = pages.filled(PAGE, [STEPS])
    lines = text.split("\n")
    assert lines[:4] == ["# Title", "", "- list", ""] and lines[-3:] == ["", "after", ""]
    assert "old" not in lines
    assert all(line.startswith("  ") or not line for line in lines[4:-3])
    rows = {
        line.split("|")[1].strip(): [c.strip() for c in line.split("|")[1:-1]]
        for line in lines
        if "|" in line
    }
    assert rows["lst"][1:8] == ["120.0", "1.20", "1.08", "2.50", "4.00", "3.88", "20.39"]
    assert rows["published_lst"][1:8] == ["150.0", "1.50", "1.35", "2.00", "20.00", "19.40", "20.39"]
    assert rows["full"][4] == "1.00" and rows["full"][7] == "76.14"
    assert rows["lora"][1] == "out of memory" and len(rows["lora"]) == len(rows["lst"])
    assert "Some CPU, 1 thread, torch 2.13.0; commit 012345678, 2026-01-02" in text
    assert "`python -m benchmarks.train_step --some option`" in text
    assert pages.filled(text, [STEPS]) == text
    elsewhere = copy.deepcopy(STEPS)
    elsewhere["shapes"]["batch"] = 1
    other = pages.filled(PAGE, [elsewhere])  # the paper's figures are for batch 128
    assert "20.39" not in other and "paper" not in other and "| 4.00 | 3.88 | 1,234,567 | 1.37 |" in other


def test_other_tables():
    names = ("side_networks", "ops", "memory")
    page = "".join(f"<!-- table: {name} -->\n<!-- end of table -->\n" for name in names)
    text = pages.filled(page, [RUN, STEPS, MEMORY])
    assert text.count("| published full | 74.00 | 75.50 | 76.14 | 0.97 |") == 1
    assert "| lst fp8 | 74.00 | 75.50 |  |  |" in text
    assert "| LST | 9.0 MiB | 2.0 MiB | 0.50 |" in text
    row = "| ladder | ops:reference | 2.000 | 2.000 | 0.50 | 40% of bandwidth | 40% of bandwidth |"
    assert row in text and "| LST | ops" not in text
    assert pages.filled(page, []).count("(no results yet)") == 3


def test_the_newest_record_of_each_setting_counts():
    old, new = (copy.deepcopy(STEPS) for _ in range(2))
    new["environment"]["date"], new["shapes"]["repeats"] = "2026-03-01T00:00:00+00:00", 9
    other = make("train_step", [], STEP_SHAPES | {"batch": 1})
    toy = make("train_step", [], STEP_SHAPES | {"model": "toy"})
    gpu = make("train_step", [], STEP_SHAPES, device="Some GPU", kind="cuda")
    found = tables.newest([old, other, toy, RUN, gpu, new], "train_step")
    assert found == [gpu, other, new]


def test_a_poorer_record_does_not_replace_a_fuller_one():
    """The newest of the fullest counts: valid rows with a time first, then valid rows."""
    untimed = [{k: v for k, v in row.items() if k != "ratio"} for row in STEPS["figures"][:3]]
    poorer = [
        make("train_step", untimed * 2, STEP_SHAPES | {"repeats": 0}),
        make("train_step", STEPS["figures"][:2], STEP_SHAPES),
        make("train_step", [row | {"status": "invalid: x"} for row in STEPS["figures"]], STEP_SHAPES),
    ]
    again = copy.deepcopy(STEPS)
    again["environment"]["date"] = "2026-03-01T00:00:00+00:00"
    for later in poorer:
        assert tables.newest([STEPS, later], "train_step") == [STEPS]
        assert tables.newest([later, STEPS], "train_step") == [STEPS]
        assert tables.newest([STEPS, again, later], "train_step") == [again]
    assert tables.newest(poorer[:1] + [poorer[2]], "train_step") == poorer[:1]
    part = MEMORY | {"figures": MEMORY["figures"][1:]}
    assert tables.newest([MEMORY, part], "memory") == [MEMORY]
    fewer = copy.deepcopy(RUN)
    fewer["figures"]["rows"] = [row for row in fewer["figures"]["rows"] if row["peer"] == "eager"]
    assert tables.newest([RUN, fewer], "run") == [RUN]


@pytest.mark.parametrize("name, value", [("batch", 1), ("frames", 300), ("dtype", "bfloat16")])
def test_records_of_other_shapes_stand_side_by_side(name, value):
    """With the very same rows: the shape alone tells them apart."""
    other = make("train_step", STEPS["figures"], STEP_SHAPES | {name: value})
    assert tables.newest([STEPS, other], "train_step") == [STEPS, other]


def test_the_two_parts_of_the_ops_are_two_tables():
    """A run of some ops does not hide the earlier run of the others."""
    others = copy.deepcopy(RUN)
    for row in others["figures"]["rows"]:
        row["op"] = "guidance"
    assert tables.newest([RUN, others], "run") == [RUN, others]


def test_each_width_of_an_op_has_its_row():
    both = copy.deepcopy(RUN)
    both["figures"]["rows"] += [row | {"side": 384, "median": 0.008} for row in RUN["figures"]["rows"]]
    (text,) = tables.ops([both])
    for side, milliseconds in ((96, "2.000"), (384, "8.000")):
        assert f"| ladder, 768 to {side} | eager | {milliseconds} |" in text


@pytest.mark.parametrize(
    "page, sentence",
    [
        ("<!-- table: nope -->\n<!-- end of table -->", "table must be one of train_step, .*, got 'nope'"),
        ("<!-- table: ops -->\n| 1 |\n", "must be followed by"),
    ],
)
def test_wrong_markers(page, sentence):
    with pytest.raises(UserError, match=sentence):
        pages.filled(page, [])


def test_command_draws_and_rewrites(results, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(PAGE)
    where = ["--results", str(results), "--figures", str(tmp_path / "out"), "--pages", str(readme)]
    where += ["--study", str(tmp_path / "study")]
    assert plot.main([*where, "--check"]) == 1
    assert "out of date" in capsys.readouterr().err and readme.read_text() == PAGE
    assert plot.main(where) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "memory.svg",
        "roofline.svg",
        "speedup.svg",
    ]
    assert readme.read_text() == pages.filled(PAGE, record.load_all(results))
    assert plot.main([*where, "--check"]) == 0
    before = readme.stat().st_mtime_ns
    assert plot.main(where) == 0
    assert readme.stat().st_mtime_ns == before
    (tmp_path / "out" / "memory.svg").write_text("of yesterday")
    assert plot.main([*where, "--check"]) == 1
    assert "memory.svg" in capsys.readouterr().err


SVG = "{http://www.w3.org/2000/svg}"


def drawn(text):
    """The bars of a picture as (colour, x, y, width, height), and its texts; nothing runs out of it."""
    root = ElementTree.fromstring(text)
    bars, texts = [], [element.text for element in root.iter(f"{SVG}text")]
    right, bottom = map(float, root.get("viewBox").split()[2:])
    for bar in root.iter(f"{SVG}rect"):
        x, y, width, height = (float(bar.get(side)) for side in ("x", "y", "width", "height"))
        assert 0 <= x <= x + width <= right and 0 <= y <= y + height <= bottom
        bars.append((bar.get("class"), x, y, width, height))
    for element in root.iter(f"{SVG}text"):
        assert 0 < float(element.get("x")) < right and 0 < float(element.get("y")) < bottom
    assert "prefers-color-scheme: dark" in text and root.find(f"{SVG}desc").text
    return [bar for bar in bars if bar[0] != "card"], texts


def test_memory_is_drawn_from_what_there_is():
    gpu = copy.deepcopy(STEPS)
    gpu["environment"] |= {"device": "Some GPU", "device_type": "cuda"}
    notes, counts = [], []
    for records in ([STEPS], [STEPS, MEMORY], [STEPS, MEMORY, gpu]):
        bars, texts = drawn(figures.memory(records))
        notes.append(texts[1])
        counts.append(len(bars))
    assert ["CPU" in notes[0], "counted for CUDA" in notes[1], "Some GPU" in notes[2]] == [True] * 3
    # A square for each kind in the legend, then bars: three methods by three kinds; two by two, of which the
    # paper has one.
    assert counts == [3 + 9, 2 + 3, 3 + 9]
    assert figures.memory([RUN]) is None


def test_bars_are_as_long_as_the_ratios():
    bars, texts = drawn(figures.speedup([STEPS]))
    longest = max(width for *_, width, _ in bars)
    assert [round(width / longest, 3) for *_, width, _ in bars] == [1.0, 0.4, 0.5]
    names = ["full", "lst", "published_lst", "lora"]
    assert [text for text in texts if text in names] == names[:3]
    assert figures.speedup([RUN]) is None


def test_the_roofline_shows_every_op_and_no_network():
    text = figures.roofline([RUN])
    bars, texts = drawn(text)
    dots = list(ElementTree.fromstring(text).iter(f"{SVG}circle"))
    assert len(dots) == 2 * len(PEERS) and len(bars) == len(PEERS)  # forward and legend; backward
    assert texts.count("ladder") == 1 and "LST" not in texts
    assert {"eager", "ops:reference", "10"} <= set(texts)
    assert figures.roofline([STEPS]) is None


def test_without_records_there_is_nothing_to_draw(tmp_path, capsys):
    (tmp_path / "results").mkdir()
    readme = tmp_path / "README.md"
    readme.write_text(PAGE)
    where = [
        "--results",
        str(tmp_path / "results"),
        "--figures",
        str(tmp_path / "out"),
        "--pages",
        str(readme),
    ]
    where += ["--study", str(tmp_path / "study")]
    assert plot.main(where) == 0
    assert "0 records" in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_the_cost_figure_shows_what_was_measured():
    rows = [
        COUNTED | {"method": "published full", "peak_gib": 80.0},
        COUNTED | {"method": "lst exact", "peak_gib": 4.0},
    ]
    bars, texts = drawn(figures.cost([STEPS, MEMORY | {"figures": rows}]))
    longest = figures.LONGEST
    # full fine-tuning and LST in GiB, then in speed: 3.0 against 1.2 times the encoder
    lengths = [("grey", longest), ("blue", longest * 4 / 80), ("grey", longest * 0.4), ("blue", longest)]
    assert [(kind, width) for kind, _, _, width, _ in bars] == lengths
    shown = ["80.0", "4.0", "1.00 ×", "2.50 ×"]
    assert [text for text in texts if text in shown] == shown
    assert figures.cost([STEPS]) is None and figures.cost([MEMORY]) is None


def test_the_summary_names_what_loses():
    (table,) = summary.summary(
        [STEPS, RUN, MEMORY | {"figures": [COUNTED | {"method": "lst exact"}, COUNTED]}]
    )
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.split("\n")]
    memory, step = (next(line for line in lines if line[0].startswith(what)) for what in ("memory", "speed"))
    assert memory[1:] == ["LST 74.00; full fine-tuning 74.00", "LST above full fine-tuning"]
    assert step[1:] == ["LST 2.50 × as fast as full fine-tuning", "nowhere"]
    slow = copy.deepcopy(RUN)
    for row in slow["figures"]["rows"]:
        row["peer"] = row["peer"].replace("ops:reference", "ops:native")
    slow["figures"]["rows"] += [
        row | {"side": 384, "ratio_to_eager": 1.25} for row in slow["figures"]["rows"]
    ]
    (table,) = summary.summary([slow])
    assert table.endswith("| 0.50 to 0.50 | ladder from 768 to 384: 1.25 |")
    assert summary.summary([]) == []


def test_the_summary_compares_accuracies():
    means = {"full": 0.9, "lora": 0.7, "lst": 0.8, "unipt": 0.6, "sherl": 0.95}
    rows = [{"method": name, "status": "ok", "accuracy": {"mean": mean}} for name, mean in means.items()]
    (table,) = summary.summary([make("accents-0db", rows, {"num_train_epochs": 6.0})])
    assert table.endswith(
        "| accuracy, %, on synthetic accents 0 dB above noise, 6 epochs "
        "| LST 80.0; UniPT 60.0; SHERL 95.0; LoRA 70.0; full fine-tuning 90.0 "
        "| LST 10.0, UniPT 30.0 points below full fine-tuning; UniPT 10.0 points below LoRA |"
    )


def test_wrong_input_gets_one_line(results, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(PAGE)
    for where, sentence in (
        (["--results", str(tmp_path / "none")], "there is none"),
        (["--results", str(results), "--pages", str(tmp_path / "none.md")], "cannot read"),
    ):
        assert plot.main(["--pages", str(readme), *where]) == 1
        error = capsys.readouterr().err
        assert sentence in error and error.count("\n") == 1
    (results / "c.json").write_text('{"name": "x"}')
    assert plot.main(["--results", str(results), "--pages", str(readme)]) == 1
    assert "c.json is not a benchmark record" in capsys.readouterr().err
    assert readme.read_text() == PAGE
