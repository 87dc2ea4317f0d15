"""The README's table: what is measured, a line each, with what loses named beside what wins."""

from collections.abc import Iterable

from .tables import markdown, newest, rows_of, setting
from .train_step import compared

HEADER = ("measured", "result", "where it loses")
SIDE_NETWORKS = ("lst", "unipt", "sherl")
NAMES = {"lst": "LST", "unipt": "UniPT", "sherl": "SHERL", "lora": "LoRA", "full": "full fine-tuning"}
# Records of the study, with the noise of the accents in each.
LEVELS = {"accents-30db": "30 dB", "accents-10db": "10 dB", "accents-0db": "0 dB"}


def _first(records: Iterable[dict], name: str) -> dict | None:
    return next(iter(newest(records, name)), None)


def _memory(records: list[dict]) -> list[str] | None:
    found = _first(records, "memory")
    if found is None:
        return None
    batch = found["shapes"]["batch"]
    size = {row["method"]: row["peak_gib"] for row in found["figures"] if row["batch"] == batch}
    ours = [name for name in SIDE_NETWORKS if f"{name} exact" in size]
    theirs = [name for name in ("full", "lora") if f"published {name}" in size]
    text = [f"{NAMES[name]} {size[f'{name} exact']:.2f}" for name in ours]
    text += [f"{NAMES[name]} {size[f'published {name}']:.2f}" for name in theirs]
    worse = [f"{NAMES[a]} above {NAMES[b]}" for a in ours for b in theirs if _above(size, a, b)]
    what = f"memory of a training step, GiB, counted for a GPU ({setting(found)})"
    return [what, "; ".join(text), ", ".join(worse)]


def _above(size: dict[str, float], ours: str, theirs: str) -> bool:
    return size[f"{ours} exact"] >= size[f"published {theirs}"]


def _step(records: list[dict]) -> list[str] | None:
    found = _first(records, "train_step")
    if found is None:
        return None
    faster = {row["method"]: ratio for row, ratio, _ in compared(found["figures"]) if ratio is not None}
    shown = [name for name in (*SIDE_NETWORKS, "lora") if name in faster]
    best = max((faster[name] for name in faster if name not in SIDE_NETWORKS), default=0)
    other = next((name for name in faster if name not in SIDE_NETWORKS and faster[name] == best), "")
    worse = [NAMES[name] for name in shown if name in SIDE_NETWORKS and faster[name] < best]
    what = f"speed of a training step on {_device(found)} ({setting(found)})"
    text = "; ".join(f"{NAMES[name]} {faster[name]:.2f} ×" for name in shown) + " as fast as full fine-tuning"
    lost = f"{', '.join(worse)} behind {other} alone ({best:.2f} ×)" if worse else ""
    return [what, text, lost]


def _device(found: dict) -> str:
    return "a GPU" if found["environment"]["device_type"] == "cuda" else "a CPU"


def _epoch(records: list[dict]) -> list[str] | None:
    measured = newest(records, "throughput")
    if not measured:
        return None
    # Recordings of people before synthetic clips.
    found = next((each for each in measured if each["shapes"].get("audio")), measured[0])
    seconds = {row["way"]: row["seconds"]["median"] for row in rows_of(found)}
    full, _, trimmed = list(seconds)[:3]
    shown = [way for way in seconds if way.endswith(("trimmed", "int8, compiled", "16 bits"))]
    text = "; ".join(f"{way.removeprefix('lst, ')} {seconds[full] / seconds[way]:.0f} ×" for way in shown)
    slow = [way for way in list(seconds)[3:] if seconds[way] > seconds[trimmed]]
    lost = [f"{way.removeprefix('lst, ')}: {seconds[trimmed] / seconds[way]:.2f} × trimmed" for way in slow]
    if "lst, from cache, 8 bits" in seconds:
        ratio = seconds["lst, from cache, 16 bits"] / seconds["lst, from cache, 8 bits"]
        lost += [f"a cache in 8 bits: {ratio:.2f} × one in 16"] if ratio < 1 else []
    heard = ", recordings of people" if found["shapes"].get("audio") else ""
    what = f"an epoch of LST on {_device(found)}, per clip (Whisper-{found['shapes']['model']}{heard})"
    return [what, f"{text} as fast as full fine-tuning, padded", "; ".join(lost)]


def _backbone(records: list[dict]) -> list[str] | None:
    found = _first(records, "backbones")
    if found is None:
        return None
    rows = rows_of(found)
    first = rows[0]["seconds"]["median"]
    ratio = {row["kind"]: first / row["seconds"]["median"] for row in rows[1:]}
    won = [f"{kind} {each:.2f} ×" for kind, each in ratio.items() if each > 1.005]
    lost = [f"{kind} {each:.2f} ×" for kind, each in ratio.items() if each <= 1.005]
    what = f"the frozen encoder's forward on {_device(found)}"
    return [what, f"{'; '.join(won)} as fast as {rows[0]['kind']}", "; ".join(lost)]


def _real_backbone(records: list[dict]) -> list[str] | None:
    found = _first(records, "backbones_real")
    if found is None:
        return None
    first, *rows = rows_of(found)
    text = "; ".join(f"{row['kind']} {row['padded']['normed']:.1%}" for row in rows)
    ours = {row["kind"]: row["padded"]["normed"] for row in rows}
    quantized = [kind for kind in ("int8", "fp8", "nf4") if kind in ours]
    worse = [f"{kind} behind bfloat16" for kind in quantized if ours[kind] > ours["bfloat16"]]
    if "accuracy" in first:
        lost = [f"{row['kind']} {100 * (first['accuracy'] - row['accuracy']):.1f}" for row in rows]
        worse.append(f"points of accuracy: {', '.join(lost)}")
    what = f"error of the last normed state, {found['shapes']['model']} on recordings of people, padded"
    return [what, text, "; ".join(worse)]


def _ops(records: list[dict]) -> list[str] | None:
    won, lost = [], []
    for found in newest(records, "run"):
        for row in rows_of(found):
            ours = row["peer"] in ("ops:native", "ops:triton")
            alone = row["direction"] == "both" or row["op"] == "row_statistics"
            if not (ours and alone and row["ratio_to_eager"]) or row["op"] in ("LST", "UniPT", "SHERL"):
                continue
            if row["ratio_to_eager"] < 1:
                won.append(row["ratio_to_eager"])
            else:
                lost.append(f"{row['op']} from {row['width']} to {row['side']}: {row['ratio_to_eager']:.2f}")
    if not won:
        return None
    what = "time of each fused op, forward and backward, ÷ eager PyTorch"
    return [what, f"{min(won):.2f} to {max(won):.2f}", "; ".join(lost)]


def _accuracy(records: list[dict]) -> list[list[str]]:
    lines = []
    for name, level in LEVELS.items():
        found = _first(records, name)
        rows = {row["method"]: row for row in found["figures"] if row["status"] == "ok"} if found else {}
        if not rows.keys() >= NAMES.keys():
            continue
        mean = {method: 100 * rows[method]["accuracy"]["mean"] for method in NAMES}
        text = "; ".join(f"{NAMES[method]} {mean[method]:.1f}" for method in NAMES)
        lost = []
        for other in ("full", "lora"):
            gaps = {method: mean[other] - mean[method] for method in SIDE_NETWORKS}
            behind = [f"{NAMES[method]} {gap:.1f}" for method, gap in gaps.items() if gap > 0]
            lost += [f"{', '.join(behind)} points below {NAMES[other]}"] if behind else []
        epochs = found["shapes"]["num_train_epochs"]
        what = f"accuracy, %, on synthetic accents {level} above noise, {epochs:g} epochs"
        lines.append([what, text, "; ".join(lost)])
    return lines


def summary(records: list[dict]) -> list[str]:
    """One table over all records; a row for each kind of measurement that there is."""
    kinds = (_memory, _step, _epoch, _backbone, _real_backbone, _ops)
    lines = [line for line in (kind(records) for kind in kinds) if line] + _accuracy(records)
    lines = [[what, result, lost or "nowhere"] for what, result, lost in lines]
    return [markdown(HEADER, lines, text=3)] if lines else []
