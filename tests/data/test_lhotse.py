"""Lhotse's cuts, read through lhotse."""

import builtins

import numpy as np
import pytest
from data_fixtures import found, write
from whisper_meft.data import (
    Example,
    ExampleSet,
    list_splits,
    load_examples,
    load_shards,
    split_by_speaker,
    warn_on_shared_audio,
)
from whisper_meft.data.digest import digest_of
from whisper_meft.errors import UserError
from whisper_meft.feature_cache.key import clip_fingerprint

lhotse = pytest.importorskip("lhotse", reason="the extra lhotse is not installed")


def cut_of(path, language=None, **fields):
    recording = lhotse.Recording.from_file(path)
    cut = recording.to_cut()
    cut.id = path.stem
    segment = {"id": f"{path.stem}-0", "recording_id": recording.id, "start": 0.0, "duration": cut.duration}
    cut.supervisions = [lhotse.SupervisionSegment(**segment, language=language, **fields)]
    return cut


@pytest.fixture
def cuts(tmp_path):
    """Six cuts, of which every other one is Dutch."""
    return [
        cut_of(
            write(tmp_path / "audio" / f"{i}.wav", i, seconds=0.4),
            "nl" if i % 2 else "de",
            speaker=f"s{i % 3}",
            text="ja",
            custom={"region": "north"},
        )
        for i in range(6)
    ]


def save(cuts, path):
    path.parent.mkdir(exist_ok=True)
    lhotse.CutSet.from_cuts(cuts).to_file(path)
    return str(path)


@pytest.mark.parametrize("name", ["cuts.jsonl", "cuts.jsonl.gz", "other.jsonl.gz"])
def test_cuts(name, cuts, tmp_path):
    source = save(cuts, tmp_path / name)
    expected = [(i, "nl" if i % 2 else "de", f"s{i % 3}") for i in range(6)]
    assert found(load_shards(source)) == expected
    assert found(load_examples(source)) == expected
    first = next(iter(load_shards(source)))
    assert first.name == f"{source}: 0" and first.seconds == pytest.approx(0.4)


def test_fields_are_named(cuts, tmp_path):
    source = save(cuts, tmp_path / "cuts.jsonl")
    assert {e.label for e in load_shards(source, label_column_name="region")} == {"north"}
    assert [e.text for e in load_shards(source, require_text=True)] == ["ja"] * 6
    with pytest.raises(UserError, match="cuts.jsonl: 0 has no column 'town'"):
        list(load_shards(source, label_column_name="town"))


def test_part_of_a_recording_and_mixed_sound(cuts, tmp_path):
    source = save([cuts[3].truncate(offset=0.1, duration=0.2), cuts[1].mix(cuts[1])], tmp_path / "cuts.jsonl")
    part, mixed = load_examples(source)
    wave, rate = part.decode()
    assert (len(wave), rate, part.seconds) == (3200, 16_000, pytest.approx(0.2))
    assert np.allclose(wave, 0.04) and np.allclose(mixed.decode()[0], 0.04)


def test_what_tells_sets_of_cuts_apart(cuts, tmp_path):
    def digest(cuts, folder: str) -> str:
        return digest_of(load_examples(save(cuts, tmp_path / folder / "cuts.jsonl")))

    before = digest(cuts[:2], "one")
    assert digest(cuts[:2], "two, moved") == before
    later = cuts[1].truncate(offset=0.1, duration=0.2, preserve_id=True)
    shorter = cuts[1].truncate(duration=0.2, preserve_id=True)
    of_another = lhotse.utils.fastcopy(cuts[1], recording=cuts[3].recording)
    renamed = cuts[1].with_id("a")
    mixed = cuts[1].mix(cuts[3], preserve_id="left")
    others = [digest([cuts[0], each], "one") for each in (later, shorter, of_another, renamed, mixed)]
    assert len({before, *others}) == 6


def test_cuts_of_a_recording_whose_speakers_are_not_known_stay_together(tmp_path):
    files = [write(tmp_path / f"{i}.wav", i, seconds=1.0) for i in range(8)]
    noise = cut_of(write(tmp_path / "noise.wav", 9, seconds=0.2)).drop_supervisions()
    pieces = []
    for i, file in enumerate(files):
        whole = cut_of(file, "nl" if i % 2 else "de")
        for change in (whole, whole.perturb_speed(1.1)):
            for start in (0, 0.2, 0.4, 0.6):
                piece = change.truncate(offset=start, duration=0.2)
                pieces += [piece, noise.mix(piece)]
    examples = load_examples(save(pieces, tmp_path / "cuts.jsonl"))
    training, validation = split_by_speaker(examples, 0.25, 1)
    heard = [{each.spans[0].recording for each in part} for part in (training, validation)]
    assert len(heard[1]) == 2 and not heard[0] & heard[1] and heard[0] | heard[1] == {*map(str, files)}


def test_cuts_that_overlap_are_warned_about(tmp_path, caplog):
    def loaded(*cuts):
        return load_examples(save(cuts, tmp_path / f"cuts{len(list(tmp_path.iterdir()))}.jsonl"))

    recorded = write(tmp_path / "a.wav", 3, seconds=1.0)
    whole = cut_of(recorded, "nl")
    training = loaded(whole.truncate(duration=0.5), cut_of(write(tmp_path / "b.wav", 4, seconds=1.0), "nl"))
    later = loaded(whole.truncate(offset=0.5), cut_of(write(tmp_path / "c.wav", 4, seconds=1.0), "nl"))
    assert warn_on_shared_audio(training, later) == [] and not caplog.text
    between = loaded(whole.truncate(offset=0.4, duration=0.2))
    assert warn_on_shared_audio(training, between) == [between[0].name]
    assert "1 utterances of" in caplog.text and "overlap in time" in caplog.text
    # Faster by a quarter, 0.4 s is where 0.5 s was, and 0.3 s is not.
    faster = whole.perturb_speed(1.25)
    after, before = (loaded(faster.truncate(offset=start)) for start in (0.4, 0.3))
    assert warn_on_shared_audio(training, after) == [] and len(warn_on_shared_audio(training, before)) == 1
    files = ExampleSet([Example(str(recorded), start=0.4, stop=0.6), Example(str(recorded), start=0.6)])
    assert warn_on_shared_audio(training, files) == [files[0].name]


def test_several_supervisions(cuts, tmp_path):
    joined = cuts[1].append(cuts[3])
    source = save([joined], tmp_path / "cuts.jsonl")
    (example,) = load_examples(source)
    assert (example.label, example.speaker) == ("nl", None)
    assert load_examples(source, require_text=True)[0].text == "ja ja"
    source = save([cuts[1].append(cuts[2])], tmp_path / "cuts.jsonl")
    with pytest.raises(UserError, match="has several labels in its supervisions: de, nl"):
        load_examples(source)


def test_a_folder_of_splits(cuts, tmp_path):
    save(cuts[:4], tmp_path / "lists" / "cuts_train.jsonl.gz")
    save(cuts[4:], tmp_path / "lists" / "cuts_dev.jsonl.gz")
    source = str(tmp_path / "lists")
    assert sorted(list_splits(source)) == ["cuts_dev", "cuts_train"]
    assert len(load_examples(source, split="train")) == 4
    assert len(list(load_shards(source, split="validation"))) == 2


def test_cuts_beside_those_of_splits_are_in_none_of_them(cuts, tmp_path, caplog):
    source = str(tmp_path / "lists")
    for name, part in (("train", cuts[:3]), ("test", cuts[3:4]), ("musan", cuts[4:])):
        save(part, tmp_path / "lists" / f"cuts_{name}.jsonl.gz")
    assert sorted(list_splits(source)) == ["cuts_musan", "cuts_test", "cuts_train"]
    assert len(load_examples(source, split="train")) == 3
    assert "holds 'cuts_musan' beside the splits cuts_test, cuts_train" in caplog.text


def test_recordings_elsewhere(cuts, tmp_path):
    moved = [cut.with_recording_path_prefix("") for cut in cuts]
    for cut in moved:
        cut.recording.sources[0].source = f"{cut.id}.wav"
    source = save(moved, tmp_path / "cuts.jsonl")
    assert found(load_examples(source, data_root=str(tmp_path / "audio")))[5] == (5, "nl", "s2")


def test_what_is_wrong(cuts, tmp_path):
    cuts[2].supervisions = []
    with pytest.raises(UserError, match="cuts.jsonl: 2 has no label that is known by its name"):
        load_examples(save(cuts, tmp_path / "cuts.jsonl"))
    (tmp_path / "cuts.jsonl").write_text('{"type": "MonoCut", "id": 3}\n')
    with pytest.raises(UserError, match="cuts.jsonl cannot be read as Lhotse cuts"):
        load_examples(str(tmp_path / "cuts.jsonl"))
    cuts[0].recording = None
    source = save(cuts[:2], tmp_path / "cuts2.jsonl")
    with pytest.raises(UserError, match="cuts2.jsonl: 0.*has no recording"):
        load_examples(source)[0].decode()
    (tmp_path / "audio" / "1.wav").unlink()
    with pytest.raises(UserError, match="cuts2.jsonl: 1"):
        load_examples(source)[1].decode()


def test_without_the_package(cuts, tmp_path, monkeypatch):
    source = save(cuts, tmp_path / "cuts.jsonl")
    real = builtins.__import__

    def missing(name, *args):
        if name == "lhotse" or name.startswith("lhotse."):
            raise ModuleNotFoundError("No module named 'lhotse'", name="lhotse")
        return real(name, *args)

    monkeypatch.setattr("importlib.import_module", lambda name: missing(name))
    with pytest.raises(UserError, match="reading Lhotse cuts needs the lhotse package: pip install lhotse"):
        load_examples(source)


def test_a_clip_is_known_again_by_a_feature_cache(cuts, tmp_path):
    source = save(cuts, tmp_path / "cuts.jsonl")
    first, again = ([clip_fingerprint(each) for each in load_examples(source)] for _ in range(2))
    assert first == again and len(set(first)) == 6
