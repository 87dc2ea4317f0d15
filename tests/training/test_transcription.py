"""`whisper-meft train --task transcribe`: what a run leaves behind, how it is scored, resuming, refusals."""

import csv
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from process_fixtures import two_processes
from recogniser_fixtures import make_recogniser, noise
from safetensors.torch import load_file
from training_fixtures import make_audio_folder, make_transcripts, train_command
from transformers import (
    AutoModelForSpeechSeq2Seq,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
    pipeline,
)
from whisper_meft import MeftForConditionalGeneration
from whisper_meft.commands.cli import main
from whisper_meft.commands.train import make_parser
from whisper_meft.data import load_examples
from whisper_meft.evaluation.transcriber import Transcriber
from whisper_meft.evaluation.transcripts import ErrorCounts, score_transcripts
from whisper_meft.memory import counting
from whisper_meft.options.inference import InferenceArguments
from whisper_meft.training import checkpoints
from whisper_meft.training import run as train
from whisper_meft.training.tasks import transcription
from whisper_meft.training.transcribing import TranscriptionTrainer

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """whisper/, english/ (English-only), train.csv of 24 clips and held_out.csv of 6."""
    folder = tmp_path_factory.mktemp("transcription")
    make_recogniser(folder / "whisper")
    make_audio_folder(folder / "train", per_class=8)
    make_audio_folder(folder / "held_out", per_class=2, seed=1)
    make_transcripts(folder / "train.csv", folder / "train")
    make_transcripts(folder / "held_out.csv", folder / "held_out", speakers=2)
    return folder


def command(work, output, **options) -> list[str]:
    options = {
        "task": "transcribe",
        "language": "nl",
        "num_train_epochs": 2,
        "eval_data": work / "held_out.csv",
        "per_device_eval_batch_size": 4,
        "generation_max_length": 12,
        **options,
    }
    options.setdefault("train_data", work / "train.csv")
    source, whisper = options.pop("train_data"), options.pop("model_name_or_path", work / "whisper")
    return train_command(whisper, source, output, **options)


def run(work, output, **options) -> int:
    return main(command(work, output, **options))


NOT_EVALUATED = {"eval_strategy": "no", "eval_data": None}


def results_of(folder) -> tuple[dict, dict]:
    return tuple(json.loads((folder / f"{name}_results.json").read_text()) for name in ("train", "eval"))


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def history_of(folder) -> list[dict]:
    newest = checkpoints.list_checkpoints(folder)[0]
    return json.loads((newest / "trainer_state.json").read_text())["log_history"]


# --- a whole run ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(work):
    """A run of 4 epochs."""
    out = work / "finished"
    assert run(work, out, num_train_epochs=4) == 0
    return out


def test_the_backbone_beside_a_quantised_model_is_quantised_too(work, tmp_path):
    """A model that has hardly learnt anything hears what its backbone does."""
    options = {"backbone_quantization": "int8", "max_steps": 1, "learning_rate": 1e-6}
    assert run(work, tmp_path / "out", num_train_epochs=1, **options) == 0
    with open(tmp_path / "out" / "transcripts.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    _, scores = results_of(tmp_path / "out")
    assert [row["hypothesis"] for row in rows] == [row["zero_shot"] for row in rows]
    assert scores["cer"] == scores["zero_shot"]["cer"]


def test_a_run_learns_and_leaves_model_results_and_figures(work, finished):
    training, evaluation = results_of(finished)
    losses = [entry["eval_loss"] for entry in history_of(finished) if "eval_loss" in entry]
    assert len(losses) == 4 and losses[-1] < losses[0] - 0.2
    assert training["best_metric"] == pytest.approx(evaluation["loss"]) == pytest.approx(min(losses))
    assert training["task"] == "transcribe" and training["language"] == evaluation["language"] == "nl"
    assert "labels" not in training and training["train_examples"] == 24
    assert evaluation["count"] == evaluation["zero_shot"]["count"] == 6
    assert (
        set(evaluation["per_speaker"])
        == set(evaluation["zero_shot"]["per_speaker"])
        == {"speaker0", "speaker1"}
    )
    text = (finished / "evaluation.txt").read_text()
    assert "adapted" in text and "zero-shot" in text and "speaker1" in text
    assert (finished / "learning_curve.png").read_bytes()[:4] == b"\x89PNG"
    assert not (finished / "confusion_matrix.png").exists()
    heard = list(csv.DictReader((finished / "transcripts.csv").open()))
    assert [row["reference"] for row in heard] == ["high", "high", "low", "low", "middle", "middle"]
    assert all(row["hypothesis"] and row["zero_shot"] for row in heard)
    assert all(name.startswith("side_network.") for name in weights(finished))


def test_the_scores_are_those_of_the_saved_model_and_of_the_backbone(work, finished):
    _, evaluation = results_of(finished)
    said = load_examples(work / "held_out.csv", require_text=True)
    extractor = WhisperFeatureExtractor.from_pretrained(finished)
    tokenizer = WhisperTokenizer.from_pretrained(finished)
    for model, options, scored in (
        (MeftForConditionalGeneration.from_pretrained(finished), {}, evaluation),
        (
            WhisperForConditionalGeneration.from_pretrained(work / "whisper"),
            {"language": "nl"},
            evaluation["zero_shot"],
        ),
    ):
        transcriber = Transcriber(
            model, extractor, tokenizer, "cpu", 3, progress=False, max_length=12, **options
        )
        texts = [each.text for each in transcriber.transcribe(said)[0]]
        speakers = [each.speaker for each in said]
        expected = score_transcripts([each.text for each in said], texts, "nl", speakers).as_dict()
        assert {name: scored[name] for name in expected} == expected
    assert main(["evaluate", str(finished), "--data", str(work / "held_out.csv"), "--device", "cpu"]) == 0
    again = json.loads((finished / "evaluation" / "eval_results.json").read_text())
    assert again["zero_shot"]["count"] == 6


def test_hugging_face_finds_all_that_it_needs(work, finished, monkeypatch):
    processor = WhisperProcessor.from_pretrained(finished)
    wave = np.random.default_rng(0).standard_normal(12_000).astype(np.float32) / 10
    features = processor(wave, sampling_rate=16_000, return_tensors="pt").input_features
    model = AutoModelForSpeechSeq2Seq.from_pretrained(finished)
    generation = model.generation_config
    assert (generation.language, generation.task) == ("nl", "transcribe")
    expected = processor.batch_decode(model.generate(features, max_length=12), skip_special_tokens=True)
    heard = pipeline("automatic-speech-recognition", model=str(finished), device="cpu")
    found = heard(wave, generate_kwargs={"max_length": 12, "num_beams": 1})
    assert found["text"].strip() == expected[0].strip()


def test_the_parts_of_a_run_work_alone(work, tmp_path):
    arguments = command(work, tmp_path / "out", learning_rate=None)
    _, _, sources, training = groups = make_parser().parse(arguments[1:])
    settings = train.settle(groups[0], groups[1], training)
    assert training.learning_rate == 1e-3 and training.metric_for_best_model == "loss"
    examples = train.read_examples(sources, settings)
    model = train.build_model(train.load_base(settings), settings, examples)
    collator, training_set, evaluation_set = train.build_datasets(
        model, settings, examples, train.data.SpeechDataset
    )
    assert (len(training_set), len(evaluation_set)) == (24, 6)
    batch = collator([training_set[0], training_set[23]])
    assert batch["labels"].shape == batch["decoder_input_ids"].shape
    assert model(**batch).loss.isfinite()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"method": "unipt"},
        {"method": "sherl", "learning_rate": 1e-2},
        {"method": "unipt", "placement": "decoder"},
        {"placement": "both", "max_frames": 46},
        {"method": "lora", "target": "decoder", "reduction_factor": None, "r": 2},
        {"method": "full", "target": "both", "reduction_factor": None},
        {"method": "mezo", "reduction_factor": None},
    ],
)
def test_other_methods_and_placements(options, work, tmp_path):
    assert run(work, tmp_path / "out", max_steps=4, **NOT_EVALUATED, **options) == 0
    training = json.loads((tmp_path / "out" / "train_results.json").read_text())
    assert all(
        training["method"][name] == value
        for name, value in options.items()
        if value is not None and name in training["method"]
    )
    assert not training["gradients"]["never_moved"] or options["method"] in ("sherl", "full", "mezo")
    assert not (tmp_path / "out" / "eval_results.json").exists()


def test_whole_speakers_are_set_aside_whatever_classes_the_data_has(work, tmp_path, capsys):
    rows = list(csv.DictReader((work / "train.csv").open()))
    with open(tmp_path / "said.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "label"])
        writer.writeheader()
        # Each class has one speaker: by classes nothing could be held out.
        writer.writerows({**row, "label": row["speaker"]} for row in rows)
    options = {"eval_data": None, "train_data": tmp_path / "said.csv", "max_steps": 1}
    assert run(work, tmp_path / "out", **options) == 0
    assert "6 of 24 training examples were set aside" in capsys.readouterr().out
    assert results_of(tmp_path / "out")[1]["count"] == 6


def test_the_best_epoch_by_word_errors(work, tmp_path, monkeypatch):
    rates = iter([0.5, 0.25, 0.75])  # one per epoch: the second is the best
    original = transcription.evaluate_transcripts

    def pretend(transcriber, examples, zero_shot=None):
        found = original(transcriber, examples, zero_shot)
        if zero_shot is None:
            errors = round(100 * next(rates))
            found = replace(found, scores=replace(found.scores, wer=ErrorCounts(100, errors, 0, 0)))
        return found

    monkeypatch.setattr(transcription, "evaluate_transcripts", pretend)
    out = tmp_path / "out"
    assert run(work, out, num_train_epochs=3, metric_for_best_model="wer", save_total_limit=3) == 0
    training, _ = results_of(out)
    assert training["best_metric"] == 0.25 and training["best_checkpoint"] == str(out / "checkpoint-6")
    best = weights(out / "checkpoint-6")
    assert all(torch.equal(tensor, best[name]) for name, tensor in weights(out).items())
    assert [entry["eval_wer"] for entry in history_of(out) if "eval_wer" in entry] == [0.5, 0.25, 0.75]


# --- the loss ---------------------------------------------------------------------------------------------


def test_the_loss_of_evaluation_is_the_mean_over_tokens_however_they_are_dealt_out(work, finished, tmp_path):
    rows = list(csv.DictReader((work / "held_out.csv").open()))
    texts = ["a", "a rather long one", "ab", "abc", "no", "yes indeed"]
    with open(tmp_path / "said.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({**row, "text": text} for row, text in zip(rows, texts))
    found = []
    for size in (1, 4, 6):
        out = tmp_path / str(size)
        options = {"eval_data": tmp_path / "said.csv", "per_device_eval_batch_size": size, "max_steps": 1}
        assert run(work, out, **options) == 0
        found.append(results_of(out)[1]["loss"])
    assert found == pytest.approx([found[0]] * 3, rel=1e-5)


def test_label_smoothing_is_the_models_own(work, tmp_path, monkeypatch):
    seen = []
    forward = MeftForConditionalGeneration.forward

    def watching(self, *args, **kwargs):
        outputs = forward(self, *args, **kwargs)
        seen.append((kwargs.get("label_smoothing"), outputs.logits))
        return outputs

    monkeypatch.setattr(MeftForConditionalGeneration, "forward", watching)
    losses = {}
    for share in (0.0, 0.3):
        seen.clear()
        out = tmp_path / str(share)
        assert run(work, out, max_steps=1, label_smoothing_factor=share) == 0
        assert seen and all(given == share and logits is None for given, logits in seen)
        losses[share] = json.loads((out / "train_results.json").read_text())["train_loss"]
    # Of 350 tokens that a random model finds equally likely, spreading changes the loss, and not by much.
    assert 0.01 < abs(losses[0.3] - losses[0.0]) < 3


def test_smoothed_loss_is_torchs(work, finished):
    model = MeftForConditionalGeneration.from_pretrained(finished).train()
    features = torch.randn(2, 80, 100)
    labels = torch.tensor([[5, 6, 7], [8, 9, -100]])
    logits = model(features, labels=labels, return_logits=True).logits
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=-100, label_smoothing=0.3
    )
    torch.testing.assert_close(model(features, labels=labels, label_smoothing=0.3).loss, expected)


def test_accumulated_batches_are_one_batch(work, tmp_path):
    """Transcripts of different lengths: a mean of means would be another gradient."""
    for name, size, parts in (("whole", 8, 1), ("parts", 2, 4)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts, "optim": "sgd"}
        assert run(work, tmp_path / name, max_steps=2, **NOT_EVALUATED, **options) == 0
    whole = weights(tmp_path / "whole")
    for name, tensor in weights(tmp_path / "parts").items():
        torch.testing.assert_close(tensor, whole[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_shorter_window_is_the_same_for_all_clips(work, tmp_path):
    options = {"max_frames": 46}
    _, _, sources, training = groups = make_parser().parse(command(work, tmp_path / "out", **options)[1:])
    settings = train.settle(groups[0], groups[1], training)
    examples = train.read_examples(sources, settings)
    dataset = settings.task.dataset(examples.training, train.data.SpeechDataset)
    full = train.data.SpeechDataset(examples.training, settings.extractor, tokens=settings.task.tokens)
    for index in (0, 10, 20):
        item = dataset[index]["input_features"]
        assert item.shape == (80, 92)
        assert torch.equal(item, full[index]["input_features"][:, :92])
    assert settings.task.collator()([dataset[0]])["input_features"].shape == (1, 80, 92)


def test_bf16(work, tmp_path):
    assert run(work, tmp_path / "out", max_steps=2, bf16=True, **NOT_EVALUATED) == 0


# --- clips and transcripts that cannot be used ------------------------------------------------------------


def test_clips_longer_than_the_window_are_left_out_by_name(work, tmp_path, capsys):
    noise(tmp_path / "long.wav", 1.5)
    rows = (work / "train.csv").read_text() + f"{tmp_path / 'long.wav'},much,speaker9\n"
    (tmp_path / "said.csv").write_text(rows)
    options = {"train_data": tmp_path / "said.csv", "max_steps": 1}
    assert run(work, tmp_path / "out", **options) == 0
    out = capsys.readouterr().out
    assert "1.50 s are longer than the window of 1 s" in out.splitlines()[-1] and "training on 24" in out
    assert len(results_of(tmp_path / "out")[0]["left_out"]) == 1
    assert run(work, tmp_path / "strict", strict=True, **options) == 1
    assert "long.wav" in capsys.readouterr().err
    assert run(work, tmp_path / "short", **options, max_frames=10) == 1
    assert "none of the 25 examples" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x" * 30, "has 31 tokens; with the prompt's 4 the decoder reads at most 24"),
        ("", "1 of 25 examples"),
        ("<|nl|>", "one of Whisper's own marks"),
    ],
)
def test_transcripts_that_cannot_be_learnt_are_named_before_any_work(text, said, work, tmp_path, capsys):
    rows = (work / "train.csv").read_text() + f"{tmp_path / 'none.wav'},{text},speaker9\n"
    (tmp_path / "said.csv").write_text(rows)
    assert run(work, tmp_path / "out", train_data=tmp_path / "said.csv") == 1
    error = capsys.readouterr().err
    assert said in error and "none.wav" in error
    assert not (tmp_path / "out").exists()


def test_what_generation_never_writes_is_said(work, tmp_path, capsys):
    header, first, *rows = (work / "train.csv").read_text().splitlines()
    path, text, speaker = first.split(",")
    (tmp_path / "said.csv").write_text("\n".join([header, f"{path},{text}; so: {text},{speaker}", *rows]))
    options = {"train_data": tmp_path / "said.csv", "max_steps": 1, **NOT_EVALUATED}
    assert run(work, tmp_path / "out", **options) == 0
    (line,) = (each for each in capsys.readouterr().out.splitlines() if "never written" in each)
    before, _, marks = line.partition(" say: ")
    assert before == "1 of them hold what is never written, as suppress_tokens of the generation config"
    assert sorted(marks.split(", ")) == ["':'", "';'"]


# --- options ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"language": None}, "language is needed to transcribe with a multilingual Whisper"),
        (
            {"language": "klingon"},
            "language must be one of this Whisper's, a code (nl) or a name (dutch), got",
        ),
        ({"method": "head", "reduction_factor": None}, "method must be one of"),
        ({"pooling": "statistics"}, "pooling is of classification"),
        ({"max_frames": "longest"}, "max_frames must be 'fidelity' or a number for recognition"),
        ({"max_frames": 51}, "max_frames must be"),
        ({"label_column_name": "dialect"}, "label_column_name: 'dialect' is of classes"),
        ({"labels": "a"}, "labels: ['a'] is of classes"),
        (
            {"head_learning_rate": 1e-3},
            "--head_learning_rate cannot be used with --task transcribe: there is",
        ),
        ({"preset": "recommended"}, "--preset cannot be used with --task transcribe"),
        ({"bucket_by_length": True}, "--bucket_by_length cannot be used with --task transcribe"),
        ({"max_frames_per_batch": 100}, "--max_frames_per_batch cannot be used with --task transcribe"),
        ({"cuda_graphs": True}, "--cuda_graphs cannot be used with --task transcribe"),
        ({"metric_for_best_model": "accuracy"}, "one of loss, wer, cer, normalized_wer, normalized_cer, got"),
        ({"metric_for_best_model": "wer", "predict_with_generate": False}, "wer needs transcripts"),
        (
            {"metric_for_best_model": "wer", "greater_is_better": True},
            "greater_is_better True is wrong of wer",
        ),
        ({"generation_max_length": 25}, "generation_max_length must be at most 24, the decoder's positions"),
        ({"generation_num_beams": 0}, "--generation_num_beams must be at least 1"),
        ({"placement": "everywhere"}, "--placement: invalid choice"),
        ({"task": "translate"}, "--task: invalid choice"),
    ],
)
def test_what_does_not_apply_is_refused_by_name(options, said, work, tmp_path, capsys):
    assert run(work, tmp_path / "out", **options) in (1, 2)
    error = capsys.readouterr().err
    assert said in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"language": "nl"}, "--language cannot be used with --task classify: it is of --task transcribe"),
        ({"predict_with_generate": True}, "--predict_with_generate cannot be used with --task classify"),
        ({"metric_for_best_model": "wer"}, "one of accuracy, mean_class_accuracy, macro_f1, loss, got wer"),
        ({"text_column_name": "said"}, "text_column_name: 'said' is of transcripts"),
        ({"tokenizer_name": "a"}, "tokenizer_name: 'a' is of transcripts"),
        ({"zero_shot": False}, "--zero_shot cannot be used with --task classify"),
    ],
)
def test_classification_refuses_what_is_of_transcripts(options, said, work, tmp_path, capsys):
    options = {"task": None, "language": None, "generation_max_length": None, **options}
    assert run(work, tmp_path / "out", **options) in (1, 2)
    assert said in capsys.readouterr().err


def test_an_english_only_model_takes_no_language(work, tmp_path, capsys):
    english = make_recogniser(tmp_path / "english", multilingual=False)
    options = {"model_name_or_path": english, "max_steps": 1}
    assert run(work, tmp_path / "dutch", language="dutch", **options) == 1
    assert (
        "language: 'dutch' cannot be transcribed by this model, which is English-only"
        in capsys.readouterr().err
    )
    for language in (None, "english"):
        out = tmp_path / f"out-{language}"
        assert run(work, out, language=language, **options) == 0
        assert "English-only" in capsys.readouterr().out
        generation = json.loads((out / "generation_config.json").read_text())
        assert generation.get("language") is None and generation.get("task") is None
        assert results_of(out)[1]["normalizer"] == "english"


def test_the_published_english_only_models_know_all_languages_tokens(work, tmp_path, capsys):
    """Their tokenizer has them; the generation config says what they are."""
    english = make_recogniser(tmp_path / "english")
    path = english / "generation_config.json"
    values = json.loads(path.read_text()) | {"is_multilingual": False}
    path.write_text(json.dumps({k: v for k, v in values.items() if k not in ("lang_to_id", "task_to_id")}))
    assert run(work, tmp_path / "out", language="nl", model_name_or_path=english) == 1
    assert "English-only" in capsys.readouterr().err
    assert run(work, tmp_path / "out", language=None, model_name_or_path=english, max_steps=1) == 0


@pytest.mark.parametrize("kept", [None, ("eos_token_id", "pad_token_id", "max_length")])
def test_what_a_generation_config_lacks_is_saved_and_loaded(kept, work, tmp_path):
    """A folder without the file, or with an older one."""
    older = make_recogniser(tmp_path / "older")
    path = older / "generation_config.json"
    values = json.loads(path.read_text())
    path.unlink()
    if kept is not None:
        path.write_text(json.dumps({name: values[name] for name in kept}))
    options = {"model_name_or_path": older, "max_steps": 1, **NOT_EVALUATED}
    assert run(work, tmp_path / "out", **options) == 0
    again = Transcriber.load(str(tmp_path / "out"), InferenceArguments(device="cpu"), progress=False)
    assert again.options == {"language": "nl", "task": "transcribe"}
    for name in ("lang_to_id", "task_to_id", "no_timestamps_token_id", "decoder_start_token_id"):
        assert getattr(again.model.generation_config, name) == values[name]


def test_spellings_of_the_english_normaliser_are_saved(work, tmp_path):
    """So that scoring the saved model later forgives what the run's own scores do."""
    english, out = make_recogniser(tmp_path / "english", multilingual=False), tmp_path / "out"
    (english / "normalizer.json").write_text(json.dumps({"colour": "color"}))
    options = {"model_name_or_path": english, "language": None, "max_steps": 1, **NOT_EVALUATED}
    assert run(work, out, **options) == 0
    saved = Transcriber.load(str(out), InferenceArguments(device="cpu"), progress=False).tokenizer
    assert saved.english_spelling_normalizer == {"colour": "color"}
    (out / "normalizer.json").unlink()  # as where transformers saved the tokenizer
    saved = Transcriber.load(str(out), InferenceArguments(device="cpu"), progress=False).tokenizer
    assert saved.english_spelling_normalizer == {"colour": "color"}
    (english / "normalizer.json").unlink()
    assert run(work, out, **options, overwrite_output_dir=True) == 0
    assert not (out / "normalizer.json").exists()


def test_times_are_not_asked_for_where_training_had_none(work, tmp_path):
    timed = make_recogniser(tmp_path / "timed")
    path = timed / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"return_timestamps": True}))
    options = {"model_name_or_path": timed, "max_steps": 1, **NOT_EVALUATED}
    assert run(work, tmp_path / "out", **options) == 0
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert not saved.get("return_timestamps")


def test_an_english_only_model_keeps_no_language_that_it_was_saved_with(work, tmp_path):
    english = make_recogniser(tmp_path / "english")
    WhisperTokenizer.from_pretrained(english, language="english", task="transcribe").save_pretrained(english)
    path = english / "generation_config.json"
    values = json.loads(path.read_text()) | {"language": "en", "task": "transcribe", "is_multilingual": False}
    path.write_text(json.dumps(values))
    assert run(work, tmp_path / "out", language=None, model_name_or_path=english, max_steps=1) == 0
    tokenizer = WhisperTokenizer.from_pretrained(tmp_path / "out")
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    said = tokenizer.convert_ids_to_tokens(tokenizer.prefix_tokens)
    assert said == ["<|startoftranscript|>", "<|notimestamps|>"]
    assert generation.get("language") is None and generation.get("task") is None


def test_another_models_tokenizer_is_told(work, tmp_path, capsys):
    mixed = tmp_path / "mixed"
    shutil.copytree(work / "whisper", mixed)
    make_recogniser(tmp_path / "english", multilingual=False)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "english" / name, mixed / name)
    assert run(work, tmp_path / "out", model_name_or_path=mixed) == 1
    assert "language must be one of this Whisper's" in capsys.readouterr().err
    (mixed / "tokenizer.json").unlink()
    assert run(work, tmp_path / "out", model_name_or_path=mixed) == 1
    assert "holds no tokenizer" in capsys.readouterr().err
    options = {"model_name_or_path": mixed, "tokenizer_name": work / "whisper", "max_steps": 1}
    assert run(work, tmp_path / "out", **options, **NOT_EVALUATED) == 0
    assert run(work, tmp_path / "none", **options | {"tokenizer_name": work / "train"}) == 1
    assert "tokenizer_name: " in capsys.readouterr().err


def test_from_a_file(work, tmp_path):
    (tmp_path / "options.json").write_text(
        json.dumps(
            {
                "task": "transcribe",
                "language": "dutch",
                "model_name_or_path": str(work / "whisper"),
                "train_data": str(work / "train.csv"),
                "output_dir": str(tmp_path / "out"),
                "max_steps": 1,
                "eval_strategy": "no",
                "disable_tqdm": True,
            }
        )
    )
    assert main(["train", str(tmp_path / "options.json")]) == 0
    assert MeftForConditionalGeneration.from_pretrained(tmp_path / "out").generation_config.language == "nl"


# --- memory and the feature cache -------------------------------------------------------------------------


def test_auto_batch_counts_the_longest_transcript(work, tmp_path, monkeypatch, capsys):
    asked = []

    def pretend(limit, **options):
        asked.append(options)
        return 4, None

    monkeypatch.setattr(counting, "largest_batch", pretend)
    options = {"auto_batch": True, "per_device_train_batch_size": 6, "max_steps": 2, "max_frames": 46}
    assert run(work, tmp_path / "out", **options, **NOT_EVALUATED) == 0
    assert "a batch of 6 is computed as 2 times 3 clips" in capsys.readouterr().out
    # Four tokens of the prompt, a space, six letters: the label of the last is the end.
    assert asked[0]["task"] == "transcribe" and asked[0]["tokens"] == 11 and asked[0]["frames"] == 46
    # And it can be counted.
    monkeypatch.undo()
    arguments = {name: value for name, value in asked[0].items() if name != "most"}
    assert (
        counting.estimate(batch_size=2, **arguments).peak > counting.estimate(batch_size=1, **arguments).peak
    )


def test_too_little_memory_is_answered_with_what_fits(work, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(TranscriptionTrainer, "training_step", full)
    assert run(work, tmp_path / "out", per_device_train_batch_size=6, **NOT_EVALUATED) == 1
    error = capsys.readouterr().err
    assert "--per_device_train_batch_size 3 --gradient_accumulation_steps 2" in error


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"placement": "decoder"},
        {"placement": "both", "max_frames": 46},
        {"method": "sherl"},
        {"method": "sherl", "placement": "decoder"},
        {"method": "bitfit", "target": "decoder", "reduction_factor": None},
    ],
)
def test_training_from_the_cache_equals_training_from_audio(options, work, tmp_path):
    options = {"max_steps": 4, "per_device_train_batch_size": 6, "optim": "sgd", **options}
    assert run(work, tmp_path / "audio", **options) == 0
    cached = {**options, "cache_features": True, "cache_storage": "exact"}
    assert run(work, tmp_path / "cached", **cached) == 0
    from_audio, from_cache = weights(tmp_path / "audio"), weights(tmp_path / "cached")
    assert from_audio.keys() == from_cache.keys()
    for name, tensor in from_audio.items():
        torch.testing.assert_close(from_cache[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    audio, cache = results_of(tmp_path / "audio"), results_of(tmp_path / "cached")
    assert cache[1]["loss"] == pytest.approx(audio[1]["loss"], rel=1e-4)
    assert cache[1]["zero_shot"] == audio[1]["zero_shot"]
    assert cache[0]["feature_cache"] and not audio[0]["feature_cache"]


def test_methods_inside_the_encoder_have_no_cache(work, tmp_path, capsys):
    options = {"method": "bitfit", "reduction_factor": None, "cache_features": True}
    assert run(work, tmp_path / "out", **options) == 1
    assert "cache_features: bitfit trains inside the encoder" in capsys.readouterr().err


# --- resuming ---------------------------------------------------------------------------------------------


RESUMABLE = {
    **NOT_EVALUATED,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 5,
    "lr_scheduler_type": "constant",
}


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(work, tmp_path, capsys):
    assert run(work, tmp_path / "whole", **RESUMABLE, max_steps=7) == 0
    assert run(work, tmp_path / "out", **RESUMABLE, max_steps=4) == 0
    again = {**RESUMABLE, "max_steps": 7, "resume_from_checkpoint": True}
    assert run(work, tmp_path / "out", **again, language="de") == 1
    assert "checkpoint-4 has language='nl', but now it is 'de'" in capsys.readouterr().err
    assert run(work, tmp_path / "out", **again) == 0
    assert f"resuming from {tmp_path / 'out' / 'checkpoint-4'}" in capsys.readouterr().out
    whole = weights(tmp_path / "whole")
    for name, tensor in weights(tmp_path / "out").items():
        torch.testing.assert_close(tensor, whole[name], msg=name)


def test_a_finished_run_is_left_as_it_is(work, finished, capsys):
    before = (finished / "eval_results.json").read_bytes(), weights(finished)
    assert run(work, finished, num_train_epochs=4, resume_from_checkpoint=True) == 0
    out = capsys.readouterr().out
    assert "is finished, at step 12" in out and "zero-shot" in out
    assert (finished / "eval_results.json").read_bytes() == before[0]
    assert all(torch.equal(tensor, before[1][name]) for name, tensor in weights(finished).items())


def test_overwriting_removes_the_earlier_runs_tokenizer_too(work, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    assert run(work, tmp_path / "out", max_steps=1, overwrite_output_dir=True, **NOT_EVALUATED) == 0
    assert {path.name for path in (tmp_path / "out").glob("checkpoint-*")} == {"checkpoint-1"}
    assert not (tmp_path / "out" / "eval_results.json").exists()


def test_nan_features_stop_training_and_name_step_and_file(work, tmp_path, capsys, monkeypatch):
    original = train.data.SpeechDataset.__getitem__

    def spoil(self, index):
        item = original(self, index)
        if self.examples[index].name.endswith("low3.wav"):
            item["input_features"] = item["input_features"] * float("nan")
        return item

    monkeypatch.setattr(train.data.SpeechDataset, "__getitem__", spoil)
    assert run(work, tmp_path / "out", num_train_epochs=2) == 1
    error = capsys.readouterr().err
    assert "the features are NaN or infinite at step" in error and "low3.wav" in error


# --- several processes ------------------------------------------------------------------------------------


def test_two_processes_train_as_one_and_share_the_transcribing(work, tmp_path):
    options = {
        "max_steps": 3,
        "metric_for_best_model": "cer",
        "eval_strategy": "steps",
        "save_strategy": "steps",
    }
    options |= {"eval_steps": 3, "save_steps": 3, "per_device_train_batch_size": 4}
    ranks = two_processes("-m", "whisper_meft", *command(work, tmp_path / "two", **options))
    assert [each.stdout.count("training on 24 transcripts") for each in ranks] == [1, 0]
    # DDP's complaint about unused parameters
    assert not any("used in computing the loss" in each.stderr for each in ranks)
    # The same clips in a step as of one process with the double batch.
    assert run(work, tmp_path / "one", **{**options, "per_device_train_batch_size": 8}) == 0
    one, two = results_of(tmp_path / "one"), results_of(tmp_path / "two")
    assert two[1]["count"] == 6 and two[0]["best_metric"] == pytest.approx(two[1]["cer"]["rate"])
    assert two[1]["zero_shot"] == one[1]["zero_shot"]
    assert issubclass(TranscriptionTrainer, train.MeftTrainer)


SHARING = """
import os
import sys
from types import SimpleNamespace

from accelerate import PartialState
from whisper_meft.data import check_audio, load_examples
from whisper_meft.data.streaming import ShardedExamples
from whisper_meft.errors import UserError
from whisper_meft.options.inference import InferenceArguments
from whisper_meft.training.stream_data import first_pass
from whisper_meft.training.transcribing import SharedTranscriber


class Shards(ShardedExamples):
    description, names = "some", ("0.tar", "1.tar")

    def labels(self, shard):
        return [("a clip", None if shard else "a label")]


state = PartialState(cpu=True)
examples, _ = check_audio(load_examples(sys.argv[2], require_text=True), progress=False)
transcriber = SharedTranscriber.load(sys.argv[1], InferenceArguments(device="cpu"), progress=False)
state.wait_for_everyone()
if state.process_index == 1:
    os.remove(examples[1].audio)
arguments = SimpleNamespace(process_index=state.process_index, world_size=2, disable_tqdm=True)
for work in (lambda: transcriber.transcribe(examples), lambda: first_pass(Shards(), True, None, arguments)):
    try:
        work()
    except UserError as error:
        print("refused:", error)
"""


def test_what_fails_in_one_of_two_processes_that_share_work_fails_in_both(work, tmp_path):
    make_audio_folder(tmp_path / "clips", per_class=1)
    clips = make_transcripts(tmp_path / "clips.csv", tmp_path / "clips")
    (tmp_path / "run.py").write_text(SHARING)
    ranks = two_processes(tmp_path / "run.py", work / "whisper", clips)
    for each in ranks:
        heard, counted = (line for line in each.stdout.splitlines() if line.startswith("refused: "))
        assert "low0.wav" in heard and counted == "refused: a clip has no label"
