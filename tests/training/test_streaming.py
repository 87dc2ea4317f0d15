"""`whisper-meft train --streaming`: what is learnt, going on in the right place, refusals, processes."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from process_fixtures import two_processes
from recogniser_fixtures import make_recogniser
from safetensors.torch import load_file
from streaming_fixtures import make_shards, shards_of_folder, sound, tar
from training_fixtures import RATE, TONES, make_audio_folder, make_backbone, train_command
from transformers import WhisperFeatureExtractor
from whisper_meft.augmentation.settings import Augmentation
from whisper_meft.commands.cli import main
from whisper_meft.data import SpeechDataset, load_examples, load_shards
from whisper_meft.data.augmenter import Augmenter
from whisper_meft.data.examples import Example
from whisper_meft.evaluation.classifier import Classifier
from whisper_meft.training.stream_data import read_labels
from whisper_meft.training.streaming import OneByOne, RecentNames, StreamedTraining

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """backbone/, shards/ of 24 clips in 3 tar files, test/ of 6, and finished/, a run of three epochs of six
    steps with a checkpoint after each seventh step."""
    folder = tmp_path_factory.mktemp("streaming")
    make_backbone(folder / "backbone")
    make_audio_folder(folder / "train", per_class=8)
    make_audio_folder(folder / "test", per_class=2, seed=1)
    shards_of_folder(folder / "train", folder / "shards", 3)
    options = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 7, "save_total_limit": 9}
    with recording() as seen:
        assert main(command(folder, folder / "finished", **options)) == 0
    (folder / "seen.json").write_text(json.dumps(seen))
    return folder


def command(work, output, data=None, **options) -> list[str]:
    options = {
        "streaming": True,
        "shuffle_buffer": 5,
        "eval_data": work / "test",
        "per_device_train_batch_size": 4,
        "lr_scheduler_type": "constant",
        "dataloader_num_workers": 0,
    } | options
    arguments = train_command(work / "backbone", data or work / "shards", output, **options)
    if isinstance(labels := options.get("labels"), list):
        arguments = [each for each in arguments if not each.startswith("--labels=")]
        arguments += ["--labels", *labels]
    return arguments


class recording:
    """The names of the clips of each batch that is trained on."""

    def __enter__(self) -> list[list[str]]:
        self.seen, self.take = [], StreamedTraining.take

        def take(streamed, batches):
            self.seen.extend(batch["source"].names for batch in batches)
            self.take(streamed, batches)

        StreamedTraining.take = take
        return self.seen

    def __exit__(self, *_):
        StreamedTraining.take = self.take


def results(folder) -> dict:
    return json.loads((folder / "train_results.json").read_text())


def flat(batches) -> list[str]:
    return [name for batch in batches for name in batch]


# --- a run ------------------------------------------------------------------------------------------------


def test_a_run_learns_and_says_what_it_did(work):
    found = results(work / "finished")
    assert (found["steps"], found["planned_steps"], found["epochs"]) == (18, 18, 3.0)
    assert found["train_examples"] == 24 and found["labels"] == sorted(TONES)
    scores = json.loads((work / "finished" / "eval_results.json").read_text())
    assert scores["accuracy"] > 0.8
    history = json.loads((work / "finished/checkpoint-14/trainer_state.json").read_text())["log_history"]
    epochs = [entry["epoch"] for entry in history if "loss" in entry]
    assert epochs == sorted(epochs) and epochs[-1] == pytest.approx(14 / 6, abs=1e-3)


def test_each_epoch_has_each_clip_once_in_another_order(work):
    seen = json.loads((work / "seen.json").read_text())
    everything = sorted(example.name for example in load_shards(str(work / "shards"), split="train"))
    epochs = [flat(seen[6 * number : 6 * (number + 1)]) for number in range(3)]
    assert all(sorted(epoch) == everything for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize("step, workers", [(7, 0), (14, 2)])
def test_going_on_is_as_if_nothing_had_happened(step, workers, work, tmp_path):
    """In the middle of an epoch, mixed clips waiting; also where other processes read."""
    out = tmp_path / "out"
    (out).mkdir()
    shutil.copytree(work / "finished" / f"checkpoint-{step}", out / f"checkpoint-{step}")
    options = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 7}
    options |= {"resume_from_checkpoint": True, "dataloader_num_workers": workers}
    with recording() as seen:
        assert main(command(work, out, **options)) == 0
    assert seen == json.loads((work / "seen.json").read_text())[step:]
    whole, resumed = (load_file(folder / "model.safetensors") for folder in (work / "finished", out))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert results(out)["epochs"] == 3.0 and results(out)["resumed_from_step"] == step


@pytest.mark.parametrize(
    "options, match",
    [
        ({"shuffle_buffer": 6}, "trained from a stream with shuffle_buffer 5 (now 6)"),
        (
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
            "with clips per batch 4 (now 2)",
        ),
        ({"streaming": False}, "was trained with --streaming: give it too"),
        ({"seed": 3}, "was trained with seed 1 (now 3)"),
    ],
)
def test_a_run_that_cannot_go_on_says_why(options, match, work, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    shutil.copytree(work / "finished/checkpoint-7", out / "checkpoint-7")
    options = {"num_train_epochs": 3, "resume_from_checkpoint": True, **options}
    assert main(command(work, out, **options)) == 1
    assert match in capsys.readouterr().err


def test_other_shards_are_another_run(work, tmp_path, capsys):
    out, shards = tmp_path / "out", tmp_path / "shards"
    out.mkdir()
    shutil.copytree(work / "finished/checkpoint-7", out / "checkpoint-7")
    shutil.copytree(work / "shards", shards)
    (shards / "train-002.tar").rename(shards / "train-003.tar")
    assert main(command(work, out, shards, resume_from_checkpoint=True)) == 1
    assert "from a stream with names of shards" in capsys.readouterr().err


def test_a_finished_run_is_left_as_it_is(work, capsys):
    options = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 7, "save_total_limit": 9}
    assert main(command(work, work / "finished", resume_from_checkpoint=True, **options)) == 0
    assert "is finished, at step 18, and left as it is" in capsys.readouterr().out


# --- labels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["list", "txt", "json"])
def test_labels_are_listed_or_in_a_file(kind, tmp_path):
    labels = ["middle", "low", "e\u0301"]
    if kind != "list":
        file = tmp_path / f"labels.{kind}"
        file.write_text(json.dumps(labels) if kind == "json" else "\n".join(labels) + "\n", encoding="utf-8")
        labels = [str(file)]
    assert read_labels(labels) == ["low", "middle", "\u00e9"]
    assert read_labels(["all"]) is None and read_labels(["10", "9"]) == ["9", "10"]


def test_labels_in_a_file_are_its_lines(tmp_path):
    file = tmp_path / "labels.txt"
    file.write_bytes("\ufeffone\u2028two\r\n\r\nthree\x85four\rfive\n".encode())
    assert read_labels([str(file)]) == ["five", "one\u2028two", "three\x85four"]


def test_labels_that_are_given_spare_the_first_pass(work, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(command(work, out, labels=["middle", "low", "high"], max_steps=2)) == 0
    printed = capsys.readouterr().out
    assert "first pass" not in printed
    assert "training on a stream of examples that were not counted in 3 shards of 3 classes" in printed
    assert results(out)["labels"] == sorted(TONES) and results(out)["train_examples"] is None
    assert (out / "checkpoint-2").is_dir()


def test_a_label_that_is_not_listed(work, tmp_path, capsys):
    given = {"labels": ["high", "low"], "eval_strategy": "no", "eval_data": None}
    assert main(command(work, tmp_path / "out", max_steps=3, **given)) == 1
    error = capsys.readouterr().err
    assert (
        "train-00" in error and "has the label 'middle', which is not one of the classes: high, low" in error
    )
    assert main(command(work, tmp_path / "out", **given)) == 1
    assert "labels: " in (error := capsys.readouterr().err)
    assert "has others than high, low: middle (8 examples)" in error


def test_class_weights_count(work, tmp_path, capsys):
    assert main(command(work, tmp_path / "out", class_weights="balanced", max_steps=1)) == 0
    printed = capsys.readouterr().out
    assert "a first pass over the labels" in printed and "weights in the loss (balanced): high: 1" in printed


# --- what is wrong ----------------------------------------------------------------------------------------


def test_broken_clips_are_left_out_and_named(work, tmp_path, capsys):
    members = [(f"{i}.wav", sound(i, 0.5) if i % 4 else b"no audio") for i in range(16)]
    members = [each for i, one in enumerate(members) for each in (one, (f"{i}.cls", b"ab"[i % 2 :][:1]))]
    tar(tmp_path / "shards" / "train-0.tar", members)
    options = {"eval_strategy": "no", "eval_data": None, "max_steps": 8}
    assert main(command(work, tmp_path / "out", tmp_path / "shards", **options)) == 0
    captured = capsys.readouterr()
    assert "4 examples were left out because their audio cannot be used" in captured.out
    assert "train-0.tar: 8: cannot be read as audio" in captured.out
    assert "train-0.tar: 8 is left out: cannot be read as audio" in captured.err
    assert len(results(tmp_path / "out")["left_out"]) == 4
    assert main(command(work, tmp_path / "strict", tmp_path / "shards", strict=True, **options)) == 1
    assert "cannot be read as audio" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, match",
    [
        ({"eval_data": None}, "no clips can be set aside from a stream: give --eval_data"),
        ({"sampling": "balanced"}, "sampling: balanced cannot be used with --streaming"),
        ({"cache_features": True}, "cannot be used with --streaming: the states of all clips"),
        ({"window": 1}, "window: 1 cannot be used with --streaming"),
        ({"max_train_samples": 5}, "max_train_samples: 5 cannot be used with --streaming: give --max_steps"),
        ({"dataloader_drop_last": True}, "dataloader_drop_last: True cannot be used with --streaming"),
        ({"bucket_by_length": True, "max_frames": "longest"}, "bucket_by_length: True cannot be used"),
        ({"labels": "high", "max_steps": 1}, "labels: at least two classes are needed, got high"),
        ({"labels": "nowhere.txt"}, "labels: cannot read nowhere.txt"),
        ({"train_split_name": "dev"}, "has no split 'dev'"),
    ],
)
def test_what_cannot_be_is_refused(options, match, work, tmp_path, capsys):
    assert main(command(work, tmp_path / "out", **options)) == 1
    error = capsys.readouterr().err
    assert match in error and error.count("\n") == 1


def test_a_folder_of_audio_is_refused(work, tmp_path, capsys):
    assert main(command(work, tmp_path / "out", work / "train")) == 1
    assert 'has the format "audiofolder", which is not streamed' in capsys.readouterr().err
    assert main(command(work, tmp_path / "out", shuffle_buffer=-1)) == 2
    assert "--shuffle_buffer must be 0 or more, got -1" in capsys.readouterr().err


def test_other_commands_refuse(work, tmp_path, capsys):
    arguments = [
        "cache",
        f"--train_data={work / 'shards'}",
        "--streaming",
        "--output_dir",
        str(tmp_path / "c"),
    ]
    assert main([*arguments, f"--model_name_or_path={work / 'backbone'}"]) == 1
    assert "streaming: only `whisper-meft train` can" in capsys.readouterr().err


def test_recent_names():
    names = RecentNames()
    assert list(names.add(["a", "b"])) == [0, 1] and list(names.add(["c"])) == [2]
    assert (names[0], names[2], len(names)) == ("a", "c", 3)
    names.add([str(i) for i in range(10_000)])
    assert names[2] == "clip 3 of the stream" and names[10_002] == "9999"


# --- other sources ----------------------------------------------------------------------------------------


def parquet(shards: Path, folder: Path) -> Path:
    """The examples of a folder of shards as a folder of as many Parquet files."""
    datasets = pytest.importorskip("datasets")
    folder.mkdir()
    found = load_shards(str(shards), split="train")
    for number in range(len(found)):
        rows = [
            {
                "audio": {"bytes": each.audio.read(), "path": f"{i}.wav"},
                "label": each.label,
                "text": each.label,
            }
            for i, each in enumerate(found.examples(number))
        ]
        part = datasets.Dataset.from_list(rows).cast_column("audio", datasets.Audio(decode=False))
        part.to_parquet(folder / f"train-{number:05}-of-{len(found):05}.parquet")
    return folder


def test_hugging_face_rows(work, tmp_path):
    source = parquet(work / "shards", tmp_path / "rows")
    with recording() as seen:
        options = {"num_train_epochs": 1, "dataloader_num_workers": 2}
        assert main(command(work, tmp_path / "out", source, **options)) == 0
    assert len(set(flat(seen))) == 24 and len(seen) == 6


def test_cuts(work, tmp_path):
    lhotse = pytest.importorskip("lhotse", reason="the extra lhotse is not installed")
    cuts = []
    for file in sorted((work / "train").rglob("*.wav")):
        cut = lhotse.Recording.from_file(file).to_cut()
        segment = {"id": file.stem, "recording_id": file.stem, "start": 0, "duration": cut.duration}
        cut.supervisions = [lhotse.SupervisionSegment(**segment, language=file.parent.name)]
        cuts.append(cut)
    for number in range(2):
        lhotse.CutSet.from_cuts(cuts[number::2]).to_file(tmp_path / f"cuts_train_{number}.jsonl.gz")
    with recording() as seen:
        assert main(command(work, tmp_path / "out", tmp_path, num_train_epochs=1)) == 0
    assert len(set(flat(seen))) == 24 and len(seen) == 6


def test_transcripts(tmp_path, work, capsys):
    make_recogniser(tmp_path / "whisper")
    source = parquet(work / "shards", tmp_path / "rows")
    options = {"task": "transcribe", "language": "nl", "model_name_or_path": tmp_path / "whisper"}
    options |= {"eval_strategy": "no", "eval_data": None, "num_train_epochs": 1}
    with recording() as seen:
        assert main(command(work, tmp_path / "out", source, **options)) == 0
    assert "training on a stream of transcripts, 24 examples in 3 shards" in capsys.readouterr().out
    assert len(set(flat(seen))) == 24
    assert main(command(work, tmp_path / "other", source, **options, labels=["a", "b"])) == 1


def test_shards_are_also_read_at_once(work, tmp_path):
    """Without --streaming, and as evaluation data."""
    options = {"streaming": None, "shuffle_buffer": None, "eval_data": work / "shards", "max_steps": 1}
    assert main(command(work, tmp_path / "out", **options)) == 0
    assert results(tmp_path / "out")["train_examples"] == 24
    assert len(load_examples(str(work / "shards"), split="train")) == 24


def test_scores_of_a_stream_are_those_of_the_list(work, tmp_path, capsys, monkeypatch):
    make_shards(tmp_path / "shards", [5, 3], labels="xy", seconds=0.4)
    members = [
        (f"{i}.wav", file.read_bytes()) for i, file in enumerate(sorted((work / "test").rglob("*.wav")))
    ]
    labels = [
        (f"{i}.cls", file.parent.name.encode())
        for i, file in enumerate(sorted((work / "test").rglob("*.wav")))
    ]
    members = [each for pair in zip(members, labels) for each in pair] + [("9.cls", b"low")]
    tar(tmp_path / "shards" / "train-009.tar", members)
    found = {}
    for name, options in (("list", []), ("stream", ["--streaming", "--batch_size", "1"])):
        arguments = [
            "evaluate",
            str(work / "finished"),
            "--data",
            str(tmp_path / "shards"),
            "--split",
            "train",
        ]
        arguments += ["--output_dir", str(tmp_path / name), *options, "--unknown_labels", "all"]
        assert main(arguments) == 0
        error = capsys.readouterr().err
        assert "1 of 15 examples were left out" in error and "train-009.tar: 9: is empty" in error
        found[name] = json.loads((tmp_path / name / "eval_results.json").read_text())
    assert found["stream"]["confusion_matrix"] == found["list"]["confusion_matrix"]
    assert found["stream"]["open_set"] == found["list"]["open_set"] is not None
    streamed = ["evaluate", str(work / "finished"), "--data", str(tmp_path / "shards"), "--streaming"]
    assert main(streamed) == 1
    assert "has the label 'x', which is not one of the classes" in capsys.readouterr().err
    heard = []
    monkeypatch.setattr(Classifier, "logits", lambda *_: heard.append(1))
    assert main([*streamed, "--unknown_labels", "x"]) == 1
    assert "has the label 'y', which is not one of the classes: high, low, mid" in capsys.readouterr().err
    assert not heard
    monkeypatch.undo()
    assert main([*streamed, "--unknown_labels", "x", "y", "--output_dir", str(tmp_path / "named")]) == 0
    assert "1 of 15 examples were left out" in capsys.readouterr().err
    named = json.loads((tmp_path / "named" / "eval_results.json").read_text())
    assert named["open_set"] == found["list"]["open_set"]
    assert main([*streamed, "--max_eval_samples", "3"]) == 2
    assert main([*streamed, "--labels", "low", "high", "hihg", "--output_dir", str(tmp_path / "some")]) == 0
    assert "has no usable examples of hihg, which labels names" in capsys.readouterr().err
    assert json.loads((tmp_path / "some" / "eval_results.json").read_text())["count"] == 4


def test_cut_clips_of_a_scored_stream_are_told_once(work, tmp_path, capsys):
    clips = [(f"{i}.wav", sound(i, 1.5 if i % 3 else 0.4)) for i in range(20)]
    labels = [(f"{i}.cls", b"high") for i in range(20)]
    tar(tmp_path / "x.tar", [each for pair in zip(clips, labels) for each in pair])
    scored = ["evaluate", str(work / "finished"), "--data", str(tmp_path / "x.tar"), "--streaming"]
    assert main([*scored, "--window", "first", "--batch_size", "1", "--output_dir", str(tmp_path)]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "longer than" in line]
    sentence = "13 of 20 clips of {} are longer than 1.0 s; only their first 1.0 s are used"
    assert said == [f"whisper-meft: warning: {sentence.format(tmp_path / 'x.tar')}"]


def test_cut_features_of_a_scored_stream_are_told_wherever_they_are(work, tmp_path, capsys):
    """How long they are only reading them tells, so it is said of each part of the stream."""
    datasets = pytest.importorskip("datasets")
    made = np.random.default_rng(0).standard_normal((18, 80, 200), dtype=np.float32)
    features = [each[:, : 60 if i < 9 else 200].tolist() for i, each in enumerate(made)]
    rows = datasets.Dataset.from_dict({"input_features": features, "label": ["high"] * 18})
    (tmp_path / "rows").mkdir()
    rows.to_parquet(tmp_path / "rows" / "train-00000-of-00001.parquet")
    scored = ["evaluate", str(work / "finished"), "--data", str(tmp_path / "rows"), "--streaming"]
    assert main([*scored, "--window", "first", "--batch_size", "1", "--output_dir", str(tmp_path)]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "longer than" in line]
    assert said and all("only the first 1.0 s are used" in line for line in said)


# --- several processes, and memory ------------------------------------------------------------------------

RECORDED = """
import json, os, sys
from whisper_meft.commands.cli import main
from whisper_meft.training.streaming import StreamedTraining

seen, take = [], StreamedTraining.take
def noted(streamed, batches):
    seen.extend(batch["source"].names for batch in batches)
    take(streamed, batches)
StreamedTraining.take = noted
status = main(sys.argv[2:])
with open(f"{sys.argv[1]}-{os.environ['RANK']}.json", "w") as file:
    json.dump(seen, file)
sys.exit(status)
"""


@pytest.mark.slow
def test_two_processes_share_the_clips_and_go_on(work, tmp_path):
    """Of uneven shards each epoch has each clip once, with two processes of two readers each."""
    shards = make_shards(tmp_path / "shards", [3, 20, 9], seconds=0.3)
    script = tmp_path / "recorded.py"
    script.write_text(RECORDED)

    def run(name, out, **options) -> list[list[list[str]]]:
        options = {"eval_strategy": "no", "save_strategy": "steps", "save_steps": 3, **options}
        options |= {"dataloader_num_workers": 2, "eval_data": None}
        two_processes(script, tmp_path / name, *command(work, out, shards, **options))
        return [json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for rank in range(2)]

    whole = run("whole", tmp_path / "out", num_train_epochs=2)
    everything = sorted(example.name for example in load_shards(str(shards), split="train"))
    assert [len(batches) for batches in whole] == [8, 8]
    for epoch in range(2):
        found = [name for batches in whole for name in flat(batches[4 * epoch : 4 * (epoch + 1)])]
        assert sorted(found) == everything
    (tmp_path / "again").mkdir()
    shutil.copytree(tmp_path / "out" / "checkpoint-6", tmp_path / "again" / "checkpoint-6")
    resumed = run("resumed", tmp_path / "again", num_train_epochs=2, resume_from_checkpoint=True)
    assert resumed == [batches[6:] for batches in whole]
    models = [load_file(tmp_path / name / "model.safetensors") for name in ("out", "again")]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_each_pass_augments_anew(work):
    """By the number of the pass alone, so that a run which is gone on with augments as one that was not."""
    extractor = WhisperFeatureExtractor(chunk_length=2)
    (example, *_) = load_shards(str(work / "shards"), split="train")
    changed = Augmenter(Augmentation({"gain": 1.0, "noise": 1.0}), seed=1, sampling_rate=RATE)
    plain, augmented = (
        OneByOne(partial(SpeechDataset, feature_extractor=extractor, augment=each), Example(b""))
        for each in (None, changed)
    )
    first, again, second = (augmented(example, number)["input_features"] for number in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, second)
    unchanged = plain(example, 0)["input_features"]
    assert torch.equal(unchanged, plain(example, 1)["input_features"]) and not torch.equal(first, unchanged)


def test_a_stream_is_augmented_in_a_run(work, tmp_path, monkeypatch):
    passes = []
    monkeypatch.setattr(
        Augmenter, "wave", lambda self, wave, name, version, *_: passes.append(version) or wave
    )
    assert main(command(work, tmp_path / "out", augment="gain", num_train_epochs=2)) == 0
    assert passes == ["0"] * 24 + ["1"] * 24


MEMORY = """
import resource, sys
from torch.utils.data import DataLoader
from transformers import WhisperFeatureExtractor
from whisper_meft.data import Collator, SpeechDataset, load_shards
from whisper_meft.data.examples import Example
from whisper_meft.data.streaming import Dealing, Stream, StreamedBatches, count_labels
from whisper_meft.training.streaming import OneByOne

extractor = WhisperFeatureExtractor(chunk_length=1)
shards = load_shards(sys.argv[1], split="train")
sizes, counts = count_labels(shards, range(len(shards)))
stream = Stream(shards, sorted(counts), tuple(sizes.values()), counts)
label2id = {label: index for index, label in enumerate(stream.labels)}
def make(part):
    return SpeechDataset(part, extractor, label2id, "longest")
items, collate = OneByOne(make, Example(b"", stream.labels[0])), Collator(extractor, "longest")
batches = StreamedBatches(stream, Dealing(8, shuffle_buffer=40), items, collate)
names = set()
loader = DataLoader(batches, batch_size=None, collate_fn=lambda each: each)
for batch, _ in zip(loader, range(stream.size // 8)):
    names.update(hash(name) for name in batch["source"].names)
assert len(names) == stream.size // 8 * 8
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["webdataset", "huggingface"])
def test_memory_does_not_grow_with_the_data(kind, tmp_path):
    """Ten times the data: peak resident memory within 5 %, of which holding the clips would be 15."""
    peaks = []
    for name, count in (("few", 2), ("many", 20)):
        source = make_shards(tmp_path / f"{name} tars", [50] * count, seconds=1.5)
        if kind == "huggingface":
            source = parquet(source, tmp_path / name)
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, str(source)], env=ENVIRONMENT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.split()[-1]))
    assert peaks[1] <= 1.05 * peaks[0], peaks
