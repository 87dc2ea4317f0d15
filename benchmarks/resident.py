"""``python -m benchmarks.resident``: the whole process of one training step on a CPU, imports included.

The step runs in a fresh process that imports what a user's script would, with glibc's threshold for giving
freed blocks back fixed (it would rise with every block freed, and such blocks would then be kept). What is
reported is the process's peak resident set after each stage.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

# A user's script and nothing more: what this file imports must not count.
SCRIPT = """
import json, sys

def peak():
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))

import torch
from transformers import WhisperForAudioClassification
from whisper_meft import MeftConfig
from whisper_meft.model.module import get_meft_model
from whisper_meft.encoder.sizes import whisper_config

options = json.loads(sys.argv[1])
torch.set_num_threads(options["threads"])
torch.manual_seed(0)
peaks = {"imports": peak()}
base = WhisperForAudioClassification._from_config(
    whisper_config(options["model"], num_labels=6), dtype=getattr(torch, options["dtype"])
)
config = MeftConfig.from_dict({"method": options["method"], **options["options"]})
model = get_meft_model(base, config)
del base
optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
frames = 2 * model.encoder.max_source_positions
features = torch.randn(options["batch"], model.encoder.num_mel_bins, frames)
labels = torch.arange(options["batch"]) % 6
peaks["model"] = peak()
loss = model(features, labels=labels).loss
peaks["forward"] = peak()
loss.backward()
peaks["backward"] = peak()
optimizer.step()
peaks["step"] = peak()
if not torch.isfinite(loss):
    raise SystemExit("the loss is not finite")
print(json.dumps(peaks))
"""


def measure(options: dict) -> dict[str, int]:
    """Peak resident bytes of the process after imports, model, forward, backward and step.

    Raises:
        RuntimeError: the process failed; the message is its last line.
    """
    from . import record

    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    paths = [str(record.ROOT), str(record.ROOT / "python"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, "-c", SCRIPT, json.dumps(options)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(said[-1])
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.resident", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--model", default="small", help="tiny, base, small, medium, large, ...")
    parser.add_argument("--method", default="lst")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16", help="of the frozen weights")
    parser.add_argument("--reduction_factor", type=int, default=8)
    parser.add_argument("--saved_activations", default="exact")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", help="folder of the record (default: benchmarks/results)")
    parser.add_argument("--no-record", action="store_true", help="print only")
    given = parser.parse_args(argv)
    if not os.path.exists("/proc/self/status"):
        parser.error("the resident set is read from /proc, which this system does not have")
    if given.batch < 1 or given.threads < 1:
        parser.error("--batch and --threads must be at least 1")
    from whisper_meft.encoder.dtypes import parse_dtype
    from whisper_meft.encoder.sizes import whisper_config
    from whisper_meft.errors import UserError
    from whisper_meft.files import check_writable

    from . import record

    chosen = {"reduction_factor": given.reduction_factor, "saved_activations": given.saved_activations}
    shapes = {name: getattr(given, name) for name in ("model", "method", "batch", "dtype", "threads")}
    try:
        if not given.no_record:
            check_writable((Path(given.output) if given.output else record.RESULTS) / "resident.json")
        whisper_config(given.model)
        parse_dtype(given.dtype)
        peaks = measure(shapes | {"options": chosen})
    except (UserError, RuntimeError) as error:
        print(f"benchmarks.resident: {error}", file=sys.stderr)
        return 1
    for stage, nbytes in peaks.items():
        print(f"{nbytes / 2**30:8.3f} GiB  after {stage}")
    if not given.no_record:
        command = " ".join(["python -m benchmarks.resident", *(sys.argv[1:] if argv is None else argv)])
        figures = [{"stage": stage, "peak_bytes": nbytes} for stage, nbytes in peaks.items()]
        print(
            record.write(
                "resident",
                figures,
                command=command,
                shapes=shapes | chosen,
                device="cpu",
                directory=given.output,
            )
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
