"""What a training run says of its speed."""

import json
import time
from types import SimpleNamespace

import pytest
import torch
from training_fixtures import make_audio_folder, make_backbone, train_command
from whisper_meft import data
from whisper_meft.commands import cli
from whisper_meft.training.throughput import Throughput, as_text


def clock(monkeypatch):
    now = SimpleNamespace(time=0.0)
    monkeypatch.setattr(time, "perf_counter", lambda: now.time)
    return now


def one_step(meter, now, wait, work, *batches):
    def fetch():
        now.time += wait
        return list(batches), None

    fetched = meter.fetch(fetch)
    assert fetched == (list(batches), None)
    now.time += work
    meter.on_step_end(None, None, None)
    now.time += 100  # evaluation, say


def of(*index):
    return {"labels": torch.zeros(len(index)), "index": torch.tensor(index)}


def test_only_steps_count_and_waiting_is_told_apart(monkeypatch):
    now = clock(monkeypatch)
    meter = Throughput([1.0, 2.0, 4.0])
    assert meter.summary() == {} and meter.take() == {}
    one_step(meter, now, 1.0, 3.0, of(0, 2), of(1))
    first = {"utterances_per_second": 3 / 4, "audio_hours_per_hour": 7 / 4, "waiting_for_data": 1 / 4}
    assert meter.take() == pytest.approx(first)
    one_step(meter, now, 0.0, 2.0, of(2))
    second = {"utterances_per_second": 0.5, "audio_hours_per_hour": 2.0, "waiting_for_data": 0.0}
    assert meter.take() == pytest.approx(second) and meter.take() == {}
    whole = {"utterances_per_second": 4 / 6, "audio_hours_per_hour": 11 / 6, "waiting_for_data": 1 / 6}
    assert meter.summary() == pytest.approx(whole)
    now.time += 5  # the iterator has ended: nothing was fetched
    meter.fetch(lambda: ([], None))
    assert meter.summary() == pytest.approx(whole)
    # Another process did the same at the same time.
    twice = {"utterances_per_second": 8 / 6, "audio_hours_per_hour": 22 / 6, "waiting_for_data": 1 / 6}
    assert meter.summary(lambda values: 2 * values) == pytest.approx(twice)
    expected = "0.6667 utterances/s, 1.833 hours of audio per hour, 16.7% of the time spent waiting for data"
    assert as_text(whole) == expected


@pytest.mark.parametrize("seconds", [None, [1.0, None, 4.0]])
def test_audio_of_unknown_length_is_not_guessed(seconds, monkeypatch):
    now = clock(monkeypatch)
    meter = Throughput(seconds)
    one_step(meter, now, 1.0, 1.0, of(0, 2))
    assert meter.summary()["audio_hours_per_hour"] is None and meter.summary()["utterances_per_second"] == 1
    assert "audio" not in as_text(meter.summary())
    meter = Throughput([1.0, 2.0])
    one_step(meter, now, 1.0, 1.0, {"labels": torch.zeros(4)})  # not said which
    assert meter.summary()["audio_hours_per_hour"] is None


@pytest.mark.parametrize("max_frames", ["fidelity", "30"])
def test_train_says_and_records_how_fast_it_was(max_frames, tmp_path, capsys, monkeypatch):
    backbone, audio = make_backbone(tmp_path / "backbone"), make_audio_folder(tmp_path / "audio", 4)
    read = data.SpeechDataset.__getitem__

    def slowly(self, index):
        time.sleep(0.02)
        return read(self, index)

    monkeypatch.setattr(data.SpeechDataset, "__getitem__", slowly)
    options = {"max_frames": max_frames, "num_train_epochs": 2, "logging_steps": 1, "eval_strategy": "no"}
    assert cli.main(train_command(backbone, audio, tmp_path / "out", **options)) == 0
    said = capsys.readouterr().out
    assert "hours of audio per hour" in said and "learning rate 3.00e-03  " in said
    rates = json.loads((tmp_path / "out" / "train_results.json").read_text())["throughput"]
    assert 0 < rates["waiting_for_data"] < 1 and rates["utterances_per_second"] > 0
    # Clips of 0.4 to 0.9 s, cut to 0.6 s where only so much is computed.
    mean = rates["audio_hours_per_hour"] / rates["utterances_per_second"]
    assert 0.4 < mean < (0.6 if max_frames == "30" else 0.9)
    history = json.loads(next((tmp_path / "out").glob("checkpoint-*/trainer_state.json")).read_text())
    logged = [entry for entry in history["log_history"] if "loss" in entry]
    assert logged and all(entry["utterances_per_second"] > 0 for entry in logged)
