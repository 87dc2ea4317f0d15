"""The documentation's tables, made from the records of runs, so that no figure is typed by hand."""

import re
from collections.abc import Callable, Iterable

from . import backbones, throughput, train_step
from .steps import CLASSES


def rows_of(found: dict) -> list[dict]:
    """The measurements of a record."""
    return found["figures"]["rows"] if isinstance(found["figures"], dict) else found["figures"]


def _content(found: dict) -> tuple[int, int]:
    """How much a record tells: the number of its valid rows that hold a time, then of all its valid rows."""
    valid = [row for row in rows_of(found) if row.get("status", "ok") == "ok"]
    return sum("ratio" in row or "median" in row for row in valid), len(valid)


def newest(records: Iterable[dict], name: str) -> list[dict]:
    """The records of that name; of those that measure the same on the same device one, GPUs first.

    That one is the newest of the fullest: a later run of some methods, or of memory alone, hides nothing.

    Args:
        records: as ``record.load_all`` gives them, oldest first.
    """
    kept = {}
    for found in records:
        if found["name"] == name and found["shapes"].get("model") != "toy":
            shapes = {k: v for k, v in found["shapes"].items() if k != "repeats"}
            what = sorted({str(row.get("op", "")) for row in rows_of(found)})
            key = found["environment"]["device"], str(sorted(shapes.items())), str(what)
            if key not in kept or _content(found) >= _content(kept[key]):
                kept.pop(key, None)
                kept[key] = found
    return sorted(kept.values(), key=lambda found: found["environment"]["device_type"] != "cuda")


def source(found: dict) -> str:
    """Where, when and by which command a record was measured, as one line of Markdown."""
    where = found["environment"]
    count = f"{where['threads']} thread" + "s" * (where["threads"] != 1)
    threads = f", {count}" if where["device_type"] == "cpu" else ""
    return f"{where['device']}{threads}, torch {where['torch']}; {_when(found)}"


def _when(found: dict) -> str:
    where = found["environment"]
    commit = (where["commit"] or "unknown")[:9] + (" with changes" if where["dirty"] else "")
    command = re.sub(r" --output[ =]\S+", "", found["command"])  # where it was written is no matter
    return f"commit {commit}, {where['date'][:10]}: `{command}`"


def setting(found: dict) -> str:
    """The sizes of a training step in words."""
    shapes = found["shapes"]
    dtype = f", {shapes['dtype']}" if found["name"] == "train_step" else ""  # a count has several
    return f"Whisper-{shapes['model']}, batch {shapes['batch']}, {shapes['frames']} frames{dtype}"


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]], text: int = 1) -> str:
    """A Markdown table; the first ``text`` columns are text, the others are numbers."""
    header = list(header)
    lines = [header, ["---"] * text + ["---:"] * (len(header) - text), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# --- the tables ---------------------------------------------------------------------------------------------


def train_steps(records: list[dict]) -> list[str]:
    """Whole training steps, one table for each device and setting; the paper's column where it is the paper's
    setting."""
    header = ["method", "step, ms", "÷ encoder inference", "÷ Hugging Face's", "× full", "peak GiB"]
    header += ["counted GiB", "paper GiB", "trainable", "%", "gradient norm"]
    blocks = []
    for found in newest(records, "train_step"):
        shapes, rows = found["shapes"], []
        for row, faster, less in train_step.compared(found["figures"]):
            cells = train_step.cells(row, faster, less)
            if len(cells) == 2:
                rows.append([*cells, *[""] * (len(header) - 2)])
            else:
                method, ms, _, ratio, to_theirs, faster, peak, counted, _, *rest = cells
                rows.append([method, ms, ratio, to_theirs, faster, peak, counted, *rest])
        lines = [header, *rows]
        if (shapes["model"], shapes["batch"], shapes["frames"]) != ("small", 128, 1500):
            lines = [[*line[:7], *line[8:]] for line in lines]
        title = (
            f"Whisper-{shapes['model']}, batch {shapes['batch']}, {shapes['frames']} frames, "
            f"{shapes['dtype']}, reduction factor {shapes['reduction_factor']}, {CLASSES} classes. "
        )
        blocks.append(f"{title}{source(found)}\n\n{markdown(lines[0], lines[1:])}")
    return blocks


def memory(records: list[dict]) -> list[str]:
    """Counted memory of a training step on a GPU, beside the paper's figures."""
    header = ("method", "in use, GiB", "reserved, GiB", "paper, GiB", "in use ÷ paper")
    blocks = []
    for found in newest(records, "memory"):
        shapes, where, rows = found["shapes"], found["environment"], []
        for row in found["figures"]:
            if row["batch"] == shapes["batch"]:
                paper = row["paper_gib"]
                compared = ["", ""] if paper is None else [f"{paper:.2f}", f"{row['peak_gib'] / paper:.2f}"]
                rows.append(
                    [row["method"], f"{row['peak_gib']:.2f}", f"{row['reserved_gib']:.2f}", *compared]
                )
        title = (
            f"Whisper-{shapes['model']}, batch {shapes['batch']}, {shapes['frames']} frames, counted for "
            f"CUDA without a GPU. torch {where['torch']}; {_when(found)}"
        )
        blocks.append(f"{title}\n\n{markdown(header, rows)}")
    return blocks


def micro_batches(records: list[dict]) -> list[str]:
    """Counted memory in use at equal micro-batches, all methods alike."""
    blocks = []
    for found in newest(records, "memory"):
        by: dict[str, dict[int, float]] = {}
        for row in found["figures"]:
            by.setdefault(row["method"], {})[row["batch"]] = row["peak_gib"]
        batches = sorted({batch for peaks in by.values() for batch in peaks}, reverse=True)
        if len(batches) > 1:
            header = ("in use, GiB, at micro-batch", *map(str, batches))
            rows = [
                [method, *(f"{peaks[batch]:.2f}" if batch in peaks else "" for batch in batches)]
                for method, peaks in by.items()
            ]
            blocks.append(f"{_when(found)}\n\n{markdown(header, rows)}")
    return blocks


def side_networks(records: list[dict]) -> list[str]:
    """Side networks alone: what they keep for the backward and their time, against the eager reference."""
    header = ("", "reference keeps", "ops keep", "time, ops ÷ reference")
    blocks = []
    for found in newest(records, "run"):
        by: dict[str, dict[str, dict]] = {}
        for row in found["figures"]["rows"]:
            if row["op"] in ("LST", "UniPT", "SHERL") and row["direction"] == "both":
                by.setdefault(row["op"], {})[row["peer"]] = row
        rows = []
        for op, peers in by.items():
            eager = peers.get("eager")
            for peer, row in peers.items():
                if eager and peer.startswith("ops:") and "@" not in peer:
                    name = op if sum(p.startswith("ops:") for p in peers) == 1 else f"{op}, {peer[4:]}"
                    kept = [f"{each['kept'] / 2**20:.1f} MiB" for each in (eager, row)]
                    rows.append([name, *kept, f"{row['ratio_to_eager']:.2f}"])
        if rows:
            blocks.append(f"{_shapes_of_ops(found)}{source(found)}\n\n{markdown(header, rows)}")
    return blocks


def ops(records: list[dict]) -> list[str]:
    """Every op, forward and backward, with its share of what the machine can do."""
    header = ("op", "peer", "forward, ms", "backward, ms", "both ÷ eager", "share forward", "share backward")
    blocks = []
    for found in newest(records, "run"):
        by: dict[tuple[str, str], dict[str, dict]] = {}
        widths = {(row["width"], row["side"]) for row in found["figures"]["rows"]}
        for row in found["figures"]["rows"]:
            if row["op"] not in ("LST", "UniPT", "SHERL"):
                op = row["op"] if len(widths) == 1 else f"{row['op']}, {row['width']} to {row['side']}"
                by.setdefault((op, row["peer"]), {})[row["direction"]] = row
        rows = []
        for (op, peer), directions in by.items():
            times, shares = [], []
            for direction in ("forward", "backward"):
                row = directions.get(direction)
                times.append(f"{1e3 * row['median']:.3f}" if row else "")
                shares.append(share(row) if row else "")
            both = directions.get("both") or directions["forward"]
            ratio = both["ratio_to_eager"]
            rows.append([op, peer, *times, "" if ratio is None else f"{ratio:.2f}", *shares])
        if rows:
            blocks.append(f"{_shapes_of_ops(found)}{source(found)}\n\n{markdown(header, rows)}")
    return blocks


def share(row: dict) -> str:
    """How near a row of ``benchmarks.run`` is to what bounds it: the copy bandwidth or the products' rate."""
    if row["bound"] == "compute":
        return f"{row['matmul_share']:.0%} of products"
    return f"{row['bandwidth_share']:.0%} of bandwidth"


def _shapes_of_ops(found: dict) -> str:
    shapes, rows = found["shapes"], found["figures"]["rows"]
    widths = sorted({(row["width"], row["side"]) for row in rows})
    sizes = ", ".join(f"{width} to {side}" for width, side in widths)
    return (
        f"Batch {shapes['batch']}, {shapes['frames']} frames, {shapes['layers']} layers, widths {sizes}, "
        f"{shapes['dtype']}. "
    )


def resident(records: list[dict]) -> list[str]:
    """Peak resident set of a whole process that trains one step on a CPU."""
    blocks = []
    for found in newest(records, "resident"):
        shapes = found["shapes"]
        title = f"Whisper-{shapes['model']}, {shapes['method'].upper()}, batch {shapes['batch']}, "
        title += f"{shapes['dtype']}. "
        rows = [[row["stage"], f"{row['peak_bytes'] / 2**30:.3f}"] for row in found["figures"]]
        blocks.append(f"{title}{source(found)}\n\n{markdown(('after', 'peak resident, GiB'), rows)}")
    return blocks


def saved_activations(records: list[dict]) -> list[str]:
    """Training on exact hidden states and on 8-bit copies: final loss, accuracy and the gradients' cosine."""
    blocks = []
    for found in newest(records, "saved_activations"):
        entries = found["figures"]["summary"]
        rounded = [kind for kind in ("int8", "fp8") if f"{kind}_loss" in entries[0]]
        kinds = ["exact", *rounded]
        header = [""]
        for what, columns in (("loss", kinds), ("accuracy", kinds), ("least cosine of a gradient", rounded)):
            header += [f"{what}, {columns[0]}", *columns[1:]]
        rows = []
        for entry in entries:
            cells = [f"{entry[f'{kind}_loss']:.3f}" for kind in kinds]
            for kind in kinds:
                spread = entry[f"{kind}_accuracy_spread"] / 2
                cells.append(f"{entry[f'{kind}_accuracy']:.1%} ± {spread:.1%}")
            # Records of one kind alone name none.
            cosines = [entry.get(f"{kind}_least_cosine", entry.get("least_cosine")) for kind in rounded]
            rows.append([entry["method"].upper(), *cells, *(f"{cosine:.5f}" for cosine in cosines)])
        blocks.append(f"{source(found)}\n\n{markdown(header, rows)}")
    return blocks


def speeds(records: list[dict]) -> list[str]:
    """What an epoch costs per clip, padded, trimmed, lighter and cached; a table for each size of Whisper."""
    blocks = []
    for found in newest(records, "throughput"):
        shapes = found["shapes"]
        trained = ", pretrained" if shapes.get("pretrained") else ""
        clips = "recordings" if shapes.get("audio") else "clips"
        title = (
            f"Whisper-{shapes['model']}{trained}, {shapes['method'].upper()}, {shapes['clips']} {clips} of "
            f"{found['figures']['mean_seconds']:.1f} s in the mean, batches of {shapes['batch']}, float32, "
            f"{shapes.get('backend', 'reference')} backend. "
        )
        table = markdown(throughput.HEADER, throughput.cells(found["figures"]["rows"]))
        blocks.append(f"{title}{source(found)}\n\n{table}")
    return blocks


def other_backbones(records: list[dict]) -> list[str]:
    """The frozen backbone in other number formats and compiled: speed, bytes, features and accuracy."""
    blocks = []
    for found in newest(records, "backbones"):
        shapes = found["shapes"]
        title = (
            f"Whisper-{shapes['model']}'s encoder, {shapes['batch']} clips of 6 s; the last two columns are "
            f"of the demo's task, {shapes['seeds']} seeds. "
        )
        table = markdown(backbones.HEADER, backbones.cells(found["figures"]["rows"]))
        blocks.append(f"{title}{source(found)}\n\n{table}")
    return blocks


def _load(found: dict) -> str:
    """How busy the machine was, where a record says so."""
    load = found["figures"].get("load")
    return "" if load is None else f"load {load:.1f} on {found['environment']['cores']} cores; "


def real_backbones(records: list[dict]) -> list[str]:
    """The frozen backbone in other number formats on pretrained weights and recordings."""
    blocks = []
    for found in newest(records, "backbones_real"):
        shapes = found["shapes"]
        title = f"{shapes['model']}, {shapes['clips']} recordings; {_load(found)}{source(found)}"
        rows = found["figures"]["rows"]
        table = [backbones.REAL_HEADER, *backbones.real_cells(rows)]
        if "accuracy" not in rows[0]:  # measured without a task
            table = [line[:-2] for line in table]
        blocks.append(f"{title}\n\n{markdown(table[0], table[1:])}")
    return blocks


def backbone_parts(records: list[dict]) -> list[str]:
    """Where the error of a rounded backbone comes from, on pretrained weights and recordings."""
    blocks = []
    for found in newest(records, "backbones_parts"):
        shapes = found["shapes"]
        title = f"{shapes['model']}, {shapes['clips']} trimmed recordings; {source(found)}"
        table = markdown(backbones.PARTS_HEADER, backbones.parts_cells(found["figures"]["rows"]))
        blocks.append(f"{title}\n\n{table}")
    return blocks


def real_states(records: list[dict]) -> list[str]:
    """Ops and side networks on recorded hidden states beside random ones: time over eager PyTorch's; those
    that lose are named under the table."""
    header = ("op", "random, ms", "÷ eager", "recorded, ms", "÷ eager", "recorded ÷ random")
    blocks = []
    for found in newest(records, "run_states"):
        rows = [row for row in rows_of(found) if row["peer"] in ("ops:native", "ops:triton")]
        rows = [row for row in rows if row["direction"] == "both" or row["op"] == "row_statistics"]
        cells, lost = [], []
        for op in dict.fromkeys(row["op"] for row in rows):
            by = {row["inputs"]: row for row in rows if row["op"] == op}
            if by.keys() != {"random", "real"}:
                continue
            cell = [op]
            for row in by.values():
                ratio = row["ratio_to_eager"]
                cell += [f"{1e3 * row['median']:.2f}", "" if ratio is None else f"{ratio:.2f}"]
                if ratio is not None and ratio >= 1:
                    lost.append(f"{op} on {row['inputs']} inputs {ratio:.2f}")
            cells.append([*cell, f"{by['real']['median'] / by['random']['median']:.2f}"])
        text = f"{_shapes_of_ops(found)}{_load(found)}{source(found)}\n\n{markdown(header, cells)}"
        blocks.append(f"{text}\n\nBehind eager PyTorch: {', '.join(lost) or 'none'}.")
    return blocks


TABLES: dict[str, Callable[[list[dict]], list[str]]] = {
    "train_step": train_steps,
    "memory": memory,
    "micro_batches": micro_batches,
    "side_networks": side_networks,
    "ops": ops,
    "saved_activations": saved_activations,
    "resident": resident,
    "throughput": speeds,
    "backbones": other_backbones,
    "backbones_real": real_backbones,
    "backbones_parts": backbone_parts,
    "states": real_states,
}
