"""Figures and README tables come from records and from nothing else."""

import copy
import struct
import subprocess
from pathlib import Path

import pytest
from whisper_meft.errors import UserError
from whisper_meft.files import write_json

from benchmarks import plot, record, tables

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


def test_readme_is_what_the_results_give():
    """The README in the tree: run `python -m benchmarks.plot` after committing new results."""
    listing = ["git", "-C", str(record.ROOT), "ls-files", "benchmarks/results"]
    try:  # one's own runs, not committed, are no matter
        committed = subprocess.run(listing, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):  # no repository here
        committed = [str(path) for path in record.RESULTS.glob("*.json")]
    names = {Path(path).name for path in committed}
    records = [found for found in record.load_all() if found["file"] in names]
    text = plot.README.read_text(encoding="utf-8")
    assert records and "<!-- table: " in text
    assert tables.filled(text, records) == text


def test_a_table_is_written_between_its_markers():
    text = tables.filled(PAGE, [STEPS])
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
    assert tables.filled(text, [STEPS]) == text
    elsewhere = copy.deepcopy(STEPS)
    elsewhere["shapes"]["batch"] = 1
    other = tables.filled(PAGE, [elsewhere])  # the paper's figures are for batch 128
    assert "20.39" not in other and "paper" not in other and "| 4.00 | 3.88 | 1,234,567 | 1.37 |" in other


def test_other_tables():
    names = ("side_networks", "ops", "memory")
    page = "".join(f"<!-- table: {name} -->\n<!-- end of table -->\n" for name in names)
    text = tables.filled(page, [RUN, STEPS, MEMORY])
    assert text.count("| published full | 74.00 | 75.50 | 76.14 | 0.97 |") == 1
    assert "| lst fp8 | 74.00 | 75.50 |  |  |" in text
    assert "| LST | 9.0 MiB | 2.0 MiB | 0.50 |" in text
    row = "| ladder | ops:reference | 2.000 | 2.000 | 0.50 | 40% of bandwidth | 40% of bandwidth |"
    assert row in text and "| LST | ops" not in text
    assert tables.filled(page, []).count("(no results yet)") == 3


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
        tables.filled(page, [])


def test_command_draws_and_rewrites(results, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    readme = tmp_path / "README.md"
    readme.write_text(PAGE)
    where = ["--results", str(results), "--out", str(tmp_path / "out"), "--readme", str(readme)]
    assert plot.main([*where, "--check"]) == 1
    assert "out of date" in capsys.readouterr().err and readme.read_text() == PAGE
    assert plot.main(where) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "memory.png",
        "roofline.png",
        "speedup.png",
    ]
    for path in (tmp_path / "out").iterdir():
        content = path.read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", content[16:24])
        assert width > 500 and height > 150
    assert readme.read_text() == tables.filled(PAGE, record.load_all(results))
    assert plot.main([*where, "--check"]) == 0
    before = readme.stat().st_mtime_ns
    assert plot.main([*where, "--no-figures"]) == 0
    assert readme.stat().st_mtime_ns == before


def test_memory_is_drawn_from_what_there_is(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    titles = []
    from matplotlib.axes import Axes

    monkeypatch.setattr(Axes, "set_title", lambda self, title, **options: titles.append(title))
    gpu = copy.deepcopy(STEPS)
    gpu["environment"] |= {"device": "Some GPU", "device_type": "cuda"}
    for records in ([STEPS], [STEPS, MEMORY], [STEPS, MEMORY, gpu]):
        assert plot.memory(records, tmp_path / "memory.png")
    assert ["CPU" in titles[0], "counted" in titles[1], "Some GPU" in titles[2]] == [True] * 3


def test_without_records_there_is_nothing_to_draw(tmp_path, capsys):
    (tmp_path / "results").mkdir()
    readme = tmp_path / "README.md"
    readme.write_text(PAGE)
    where = ["--results", str(tmp_path / "results"), "--out", str(tmp_path / "out"), "--readme", str(readme)]
    assert plot.main(where) == 0
    assert "no records for roofline" in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_wrong_input_gets_one_line(results, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(PAGE)
    for where, sentence in (
        (["--results", str(tmp_path / "none")], "there is none"),
        (["--results", str(results), "--readme", str(tmp_path / "none.md")], "cannot read"),
    ):
        assert plot.main(["--no-figures", "--readme", str(readme), *where]) == 1
        error = capsys.readouterr().err
        assert sentence in error and error.count("\n") == 1
    (results / "c.json").write_text('{"name": "x"}')
    assert plot.main(["--no-figures", "--results", str(results), "--readme", str(readme)]) == 1
    assert "c.json is not a benchmark record" in capsys.readouterr().err
    assert readme.read_text() == PAGE
