"""The documentation's figures, drawn from the records of runs; each is None without the records it needs."""

import math
from collections.abc import Callable, Sequence

from .published import PAPER_GIB
from .svg import COLOURS, Picture
from .tables import newest, setting
from .train_step import GIBIBYTE, compared

WIDTH, LEFT, TOP, STEP = 860, 116, 74, 28

# --- memory and speed beside full fine-tuning and LoRA ------------------------------------------------------

# Row -> its name in the count of memory and in the training steps.
ROWS = {
    "full fine-tuning": ("published full", "full"),
    "LoRA": ("published lora", "lora"),
    "UniPT": ("unipt exact", "unipt"),
    "LST": ("lst exact", "lst"),
    "SHERL": ("sherl exact", "sherl"),
}
OURS = ("UniPT", "LST", "SHERL")
LONGEST = 230  # pixels of the longest bar


def _panel(picture: Picture, left: int, title: str, note: str, values: dict[str, float], form: str) -> None:
    picture.text(left - LEFT + 16, 30, title, "title")
    picture.text(left - LEFT + 16, 50, note, "note")
    for index, name in enumerate(ROWS):
        y = TOP + STEP * index
        picture.text(left - 8, y + 13, name, anchor="end")
        if name in values:
            length = LONGEST * values[name] / max(values.values())
            picture.bar(left, y, length, 18, "blue" if name in OURS else "grey")
            picture.text(left + length + 6, y + 13, form.format(values[name]))


def cost(records: list[dict]) -> str | None:
    """The README's figure."""
    counts, steps = newest(records, "memory"), newest(records, "train_step")
    if not (counts and steps):
        return None
    count, step = counts[0], steps[0]
    batch = count["shapes"]["batch"]
    sizes = {row["method"]: row["peak_gib"] for row in count["figures"] if row["batch"] == batch}
    faster = {row["method"]: ratio for row, ratio, _ in compared(step["figures"]) if ratio is not None}
    memory = {name: sizes[row] for name, (row, _) in ROWS.items() if row in sizes}
    speed = {name: faster[row] for name, (_, row) in ROWS.items() if row in faster}
    if not (memory and speed):
        return None
    device = "on a GPU" if step["environment"]["device_type"] == "cuda" else "on one CPU thread"
    picture = Picture(WIDTH, TOP + STEP * len(ROWS) + 14)
    note = f"{setting(count)}; counted, no GPU was used"
    _panel(picture, LEFT, "Memory of a training step, GiB", note, memory, "{:.1f}")
    note = f"{setting(step)}; {device}"
    _panel(picture, LEFT + 400, "Speed, full fine-tuning being 1", note, speed, "{:.2f} ×")
    both = [name for name in ROWS if name in memory and name in speed]
    text = "; ".join(f"{name} {memory[name]:.1f} GiB and {speed[name]:.2f} times as fast" for name in both)
    return picture.render("Memory and speed of a training step", text)


# --- bars for every method ----------------------------------------------------------------------------------


def _where(found: dict) -> str:
    return f"{found['environment']['device']}, {found['environment']['date'][:10]}"


def _bars(title: str, note: str, kinds: Sequence[str], values: dict[str, Sequence[float | None]]) -> str:
    """A group of bars for each name, with one for each kind that has a value."""
    thickness = 18 if len(kinds) == 1 else 12
    step = thickness * len(kinds) + 10
    left, top = 150, 96 if len(kinds) > 1 else TOP
    picture = Picture(WIDTH, top + step * len(values) + 14)
    picture.text(24, 30, title, "title")
    picture.text(24, 50, note, "note")
    for index, kind in enumerate(kinds if len(kinds) > 1 else ()):
        picture.bar(24 + 110 * index, 66, 12, 12, COLOURS[index])
        picture.text(42 + 110 * index, 76, kind, "note")
    longest = max(value for group in values.values() for value in group if value is not None)
    for row, (name, group) in enumerate(values.items()):
        picture.text(left - 8, top + step * row + step / 2, name, anchor="end")
        known = [(index, value) for index, value in enumerate(group) if value is not None]
        first = top + step * row + thickness * (len(kinds) - len(known)) / 2
        for place, (index, value) in enumerate(known):
            y, length = first + thickness * place, 600 * value / longest
            picture.bar(left, y, length, thickness - 1, COLOURS[index])
            picture.text(left + length + 6, y + thickness / 2 + 4, f"{value:.2f}", "note")
    shown = "; ".join(
        f"{name} {', '.join(f'{v:.2f}' for v in g if v is not None)}" for name, g in values.items()
    )
    return picture.render(title, f"{', '.join(kinds)}: {shown}")


def speedup(records: list[dict]) -> str | None:
    """Each method's step over the encoder's inference."""
    found = next(iter(newest(records, "train_step")), None)
    rows = [row for row in found["figures"] if row["status"] == "ok" and "ratio" in row] if found else []
    if not rows:
        return None
    title = "Time of a training step, the frozen encoder's inference forward being 1"
    values = {row["method"]: (row["ratio"],) for row in rows}
    return _bars(title, f"{setting(found)}; {_where(found)}", ("ratio",), values)


def memory(records: list[dict]) -> str | None:
    """Peak memory of each method's step, measured, counted and the paper's.

    Drawn from a training-step table measured on a GPU, else from a count, else from a table of a CPU.
    """
    steps, counts = (newest(records, name) for name in ("train_step", "memory"))
    if counts and not (steps and steps[0]["environment"]["device_type"] == "cuda"):
        found, kinds, where = counts[0], ("counted", "paper"), "counted for CUDA without a GPU"
        rows = [row for row in found["figures"] if row["batch"] == found["shapes"]["batch"]]
        sizes = {row["method"]: (row["peak_gib"], row["paper_gib"]) for row in rows}
    elif steps:
        found, kinds, where = steps[0], ("measured", "counted", "paper"), _where(steps[0])
        shapes, sizes = found["shapes"], {}
        papers = (shapes["model"], shapes["batch"], shapes["frames"]) == ("small", 128, 1500)
        for row in found["figures"]:
            if row["status"] == "ok":
                paper = PAPER_GIB.get(row["method"].removeprefix("published_")) if papers else None
                own = [n and n / GIBIBYTE for n in (row["peak_bytes"], row["counted_bytes"])]
                sizes[row["method"]] = (*own, paper)
    else:
        return None
    return _bars("Peak memory of a training step, GiB", f"{setting(found)}; {where}", kinds, sizes)


# --- ops under the machine's ceilings -----------------------------------------------------------------------


def roofline(records: list[dict]) -> str | None:
    """Every op's rate over its arithmetic intensity, under the measured ceilings."""
    found = next(iter(newest(records, "run")), None)
    if found is None:
        return None
    top = found["figures"]["ceilings"]
    bandwidth, rate = top["copy_bandwidth"], top["matmul_rate"]
    rows = [r for r in found["figures"]["rows"] if r["direction"] in ("forward", "backward")]
    rows = [r for r in rows if r["flops"] and r["bytes"] and r["op"] not in ("LST", "UniPT", "SHERL")]
    rows = [r for r in rows if r["peer"] == "eager" or r["peer"].startswith("ops:")]
    peers = dict(zip(dict.fromkeys(r["peer"] for r in rows), ("grey", "blue", "orange", "green")))
    points = [(r["flops"] / r["bytes"], r["flops"] / r["median"], r) for r in rows]
    picture = Picture(WIDTH, 520)
    across = [x for x, _, _ in points] + [rate / bandwidth]
    up = [y for _, y, _ in points] + [rate]
    place_x = _log_axis(min(across) / 2, max(across) * 3, 90, WIDTH - 24)
    place_y = _log_axis(min(up) / 2, rate * 2, 460, 110)
    picture.text(24, 30, "Ops under the machine's copy bandwidth and rate of products", "title")
    picture.text(24, 50, _where(found), "note")
    _axes(picture, place_x, place_y, (min(across) / 2, max(across) * 3), (min(up) / 2, rate * 2))
    bend = place_x(rate / bandwidth), place_y(rate)
    start = max(min(across) / 2, min(up) / 2 / bandwidth)
    picture.line((place_x(start), place_y(start * bandwidth)), bend, (WIDTH - 24, bend[1]))
    for index, (peer, colour) in enumerate(peers.items()):
        picture.dot(30 + 130 * index, 72, colour)
        picture.text(40 + 130 * index, 76, peer, "note")
    picture.text(40 + 130 * len(peers), 76, "dots: forward, squares: backward", "note")
    labelled = list(peers)[-1] if peers else None
    for x, y, row in points:
        mark = picture.dot if row["direction"] == "forward" else picture.square
        mark(place_x(x), place_y(y), peers[row["peer"]])
    wanted = [(place_x(x), place_y(y), r["op"]) for x, y, r in points if r["peer"] == labelled]
    _labels(picture, wanted)
    shown = "; ".join(f"{r['op']} {r['direction']}, {r['peer']}: {y:.2e} FLOP/s" for _, y, r in points)
    return picture.render("Ops under the machine's ceilings", shown)


def _log_axis(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Where a value lies between two pixels, by its logarithm."""
    return lambda value: start + (end - start) * math.log(value / low) / math.log(high / low)


def _axes(picture: Picture, place_x, place_y, across: tuple, up: tuple) -> None:
    """Grid lines at powers of ten, with their values."""
    left, right, bottom, top = place_x(across[0]), place_x(across[1]), place_y(up[0]), place_y(up[1])
    for power in range(math.ceil(math.log10(across[0])), math.floor(math.log10(across[1])) + 1):
        x = place_x(10.0**power)
        picture.line((x, bottom), (x, top), kind="grid")
        picture.text(x, bottom + 18, f"{10.0**power:g}", "note", "middle")
    for power in range(math.ceil(math.log10(up[0])), math.floor(math.log10(up[1])) + 1):
        y = place_y(10.0**power)
        picture.line((left, y), (right, y), kind="grid")
        picture.text(left - 8, y + 4, f"{10.0 ** (power - 9):g}", "note", "end")
    picture.text((left + right) / 2, bottom + 38, "FLOP per byte moved", "note", "middle")
    picture.text(24, top - 8, "GFLOP per second", "note")


def _labels(picture: Picture, wanted: list[tuple[float, float, str]]) -> None:
    """One label for each name, at its highest point and moved out of the way of others."""
    highest: dict[str, tuple[float, float]] = {}
    for x, y, name in wanted:
        if name not in highest or y < highest[name][1]:
            highest[name] = (x, y)
    taken: list[tuple[float, float]] = []
    for name, (x, y) in sorted(highest.items(), key=lambda item: item[1][1]):
        y += 4
        while any(abs(x - other_x) < 110 and abs(y - other_y) < 12 for other_x, other_y in taken):
            y += 4
        taken.append((x, y))
        picture.text(x + 8, y, name, "note")


FIGURES: dict[str, Callable[[list[dict]], str | None]] = {
    "cost": cost,
    "memory": memory,
    "speedup": speedup,
    "roofline": roofline,
}
