"""Checking clips raises what using them would raise, in little memory, and for one clip at a time."""

import io
import tracemalloc

import numpy as np
import pytest
import soundfile
from datasets import Dataset
from training_fixtures import make_audio_folder, make_backbone, train_command
from transformers import WhisperFeatureExtractor
from whisper_meft import audio
from whisper_meft.commands.cli import main
from whisper_meft.data import Example, ExampleSet, SpeechDataset, check_audio, load_examples
from whisper_meft.errors import UserError

EXTRACTOR = WhisperFeatureExtractor(chunk_length=1)


def write(path, samples: int, rate: int = 16_000, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal(samples), rate, **how)
    return path


def strange_examples(folder) -> list[Example]:
    """Clips at the edge of what can be used, and beyond."""
    tiny = write(folder / "tiny.wav", 1, 48_000)
    long = write(folder / "long.wav", 96_000, 48_000)
    late = np.r_[np.full(40_000, 0.1), np.nan]
    cut = write(folder / "cut.flac", 64_000)
    cut.write_bytes(cut.read_bytes()[:-5_000])
    return [
        *(Example(write(folder / f"{rate}.wav", 1, rate)) for rate in (8_000, 16_000, 22_050, 96_000)),
        *(Example(write(folder / f"three at {rate}.wav", 3, rate)) for rate in (16_000, 48_000, 192_000)),
        Example(tiny),
        Example(long, start=1.0, stop=1.00002),
        Example(long, start=500, stop=501, unit="samples"),
        Example(long, start=500, stop=503, unit="samples"),
        Example(long, start=1.9999999),
        Example(long, start=3.0),
        Example({"array": late, "sampling_rate": 16_000}, name="late"),
        Example({"array": [0.5], "sampling_rate": 44_100}, name="one"),
        Example({"array": [], "sampling_rate": 16_000}, name="none"),
        Example({"array": np.zeros((1, 1)), "sampling_rate": 16_000}, name="one by one"),
        Example({"array": [2**20 + 1, 5], "sampling_rate": 16_000}, name="wide"),
        Example("a\0b.wav", name="zero byte"),
        Example("\ud800.wav", name="half a character"),
        Example(cut),
        Example(io.BytesIO(long.read_bytes()), name="open file"),
    ]


@pytest.mark.parametrize("max_frames", ["fidelity", "longest", 1])
def test_what_passes_the_check_can_be_used(tmp_path, max_frames):
    examples = ExampleSet(strange_examples(tmp_path))
    good, bad = check_audio(examples, progress=False, feature_extractor=EXTRACTOR)
    assert {name for name, _ in bad} > {str(tmp_path / "tiny.wav"), "late", "wide", "one", "zero byte"}
    assert len(good) + len(bad) == len(examples) and len(good) >= 6
    for _ in range(2):  # epochs
        for item in SpeechDataset(good, EXTRACTOR, None, max_frames):
            assert item["length"] >= 1 and np.isfinite(item["input_features"].numpy()).all()
    # What the window alone does not show is found as well.
    whole = dict(bad)
    assert "truncated" in whole[str(tmp_path / "cut.flac")] and "not finite" in whole["late"]


def test_precomputed_features_of_other_mel_bins_are_set_aside():
    rows = [np.zeros((bins, 4), np.float32).tolist() for bins in (80, 40, 80)]
    examples = load_examples(Dataset.from_dict({"input_features": rows, "labels": [0, 1, 0]}))
    good, bad = check_audio(examples, progress=False, feature_extractor=EXTRACTOR)
    assert len(good) == 2 and "has shape (40, 4), 80 mel bins are expected" in bad[0][1]
    assert len(list(SpeechDataset(good, EXTRACTOR))) == 2


@pytest.mark.parametrize(
    "name, rate, how",
    [
        ("a.flac", 16_000, {}),
        ("a.wav", 48_000, {}),
        ("a.ogg", 8_000, {}),
        ("a.mp3", 16_000, {"bitrate_mode": "CONSTANT", "compression_level": 0.9}),
    ],
)
def test_a_long_file_is_checked_and_used_in_the_memory_of_its_window(tmp_path, name, rate, how, monkeypatch):
    minutes = 4
    monkeypatch.setattr("whisper_meft.audio.decoding.BLOCK", 1 << 16)
    with soundfile.SoundFile(tmp_path / name, "w", rate, 1, **how) as file:
        for _ in range(minutes):
            file.write(np.zeros(60 * rate, np.float32))
    examples = ExampleSet([Example(tmp_path / name)])
    tracemalloc.start()
    try:
        (checked,), _ = check_audio(examples, progress=False, feature_extractor=EXTRACTOR)
        late = Example(tmp_path / name, start=200.0, stop=230.0)
        for example in (checked, late):
            assert SpeechDataset(ExampleSet([example]), EXTRACTOR)[0]["length"] == 50
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert abs(checked.seconds - 60 * minutes) < 0.2
    assert peak < 4 * 2**20 < 4 * 60 * minutes * rate


def test_samples_and_decoders_of_a_window_are_not_converted_whole(monkeypatch):
    array = np.zeros(16_000 * 600, np.int16)
    tracemalloc.start()
    try:
        wave, seconds = audio.read_window(array, longest=1.0)
        peak = tracemalloc.get_traced_memory()[1]
        assert len(wave) == 16_000 and seconds == 1.0
        assert audio.read_window(array, longest=1.0, whole=True)[1] == 600.0
    finally:
        tracemalloc.stop()
    assert peak < 2**20


def test_memory_that_one_file_needs_is_that_files(tmp_path, monkeypatch):
    paths = [write(tmp_path / f"{name}.wav", 8_000) for name in ("a", "huge", "b")]
    read = soundfile.SoundFile.read

    def limited(self, *arguments, **options):
        if b"huge" in self.name:
            raise MemoryError
        return read(self, *arguments, **options)

    monkeypatch.setattr(soundfile.SoundFile, "read", limited)
    good, bad = check_audio(ExampleSet([Example(path) for path in paths]), progress=False)
    assert [example.audio for example in good] == [paths[0], paths[2]]
    assert bad == [(str(paths[1]), "needs more memory than there is")]
    with pytest.raises(UserError, match="huge.wav needs more memory"):
        SpeechDataset(ExampleSet([Example(paths[1])]), EXTRACTOR)[0]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A backbone, data with a clip of one sample at 48 kHz in each part, and a model trained on it."""
    folder = tmp_path_factory.mktemp("vanishing")
    make_backbone(folder / "backbone")
    for part in ("train", "validation"):
        make_audio_folder(folder / "data" / part, per_class=4)
        write(folder / "data" / part / "low" / "vanishes.wav", 1, 48_000)
    assert main(train_command(folder / "backbone", folder / "data", folder / "model", max_steps=2)) == 0
    return folder


def test_training_leaves_a_clip_that_vanishes_out_and_names_it(work, tmp_path, capsys):
    assert main(train_command(work / "backbone", work / "data", tmp_path / "out", max_steps=2)) == 0
    out = capsys.readouterr().out
    assert "2 of 26 examples were left out" in out and "low/vanishes.wav: is too short" in out


def test_the_other_commands_leave_a_clip_that_vanishes_out_and_name_it(work, tmp_path, capsys):
    data = str(work / "data")
    assert (
        main(["evaluate", str(work / "model"), f"--data={data}/validation", f"--output_dir={tmp_path / 'e'}"])
        == 0
    )
    assert "low/vanishes.wav: is too short" in capsys.readouterr().err
    assert main(["predict", str(work / "model"), f"{data}/validation/low"]) == 1
    captured = capsys.readouterr()
    assert captured.out.count(".wav") == 4 and "vanishes.wav: is too short" in captured.err
    source = [f"--model_name_or_path={work / 'backbone'}", f"--train_data={data}"]
    assert main(["cache", *source, "--method=lst", f"--output_dir={tmp_path / 'cache'}"]) == 0
    assert "low/vanishes.wav: is too short" in capsys.readouterr().out
    more = ["--methods=head", "--num_train_epochs=2", "--batch_size=4", "--seeds=1", "--learning_rates=1e-2"]
    options = [f"--test_data={data}/validation", f"--output_dir={tmp_path / 'compare'}", *more]
    assert main(["compare", *source, *options]) == 0
    assert capsys.readouterr().out.count("low/vanishes.wav: is too short") == 3
