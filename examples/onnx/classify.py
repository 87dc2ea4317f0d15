"""Which class recordings are of, by an exported model: numpy, soundfile and onnxruntime, no PyTorch.

whisper-meft export my_model exported
python examples/onnx/classify.py exported recording.wav
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import soundfile


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="what `whisper-meft export` wrote")
    parser.add_argument("recordings", nargs="+", help="WAV, FLAC and whatever else libsndfile reads")
    given = parser.parse_args(arguments)
    try:
        about = json.loads((given.folder / "model.json").read_text(encoding="utf-8"))
    except OSError as error:
        sys.exit(
            f"{given.folder} is not what `whisper-meft export` wrote: {error.strerror}: {error.filename}"
        )
    if about["input"] != "waveform":
        sys.exit(f"{given.folder} takes {about['input']}: export it with --graph_input waveform")
    session = onnxruntime.InferenceSession(str(given.folder / "model.onnx"))
    for recording in given.recordings:
        try:
            channels, rate = soundfile.read(recording, dtype="float32", always_2d=True)
        except soundfile.SoundFileError as error:
            sys.exit(f"{recording} cannot be read: {error}")
        if rate != about["sampling_rate"]:
            sys.exit(f"{recording} has {rate} samples a second, resample it to {about['sampling_rate']}")
        if not len(channels):
            sys.exit(f"{recording} holds no samples")
        if not np.isfinite(channels).all():
            sys.exit(f"{recording} holds samples that are NaN or infinite")
        if len(channels) > about["max_samples"]:
            print(
                f"{recording}: heard are the first {about['max_samples'] / rate:g} seconds", file=sys.stderr
            )
        waveform = channels.mean(axis=1)[None]  # (1, samples): a batch of one clip
        samples = np.array([waveform.shape[1]])  # what lies behind in a longer batch is not heard
        probabilities, _ = session.run(None, {"waveform": waveform, "samples": samples})
        named = zip(about["labels"], probabilities[0], strict=True)
        ranked = sorted(named, key=lambda pair: -pair[1])
        print(recording, *(f"{label} {probability:.6f}" for label, probability in ranked), sep="  ")


if __name__ == "__main__":
    main()
