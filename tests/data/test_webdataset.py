"""Tar shards: which members are an example, what they say of it, and what is wrong with some."""

import gzip
import json
import shutil
import tarfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from data_fixtures import found, index_of
from hypothesis import given, settings
from hypothesis import strategies as st
from streaming_fixtures import make_shards, sound, tar
from whisper_meft.data import check_audio, list_splits, load_examples, load_shards
from whisper_meft.data.webdataset import _divided
from whisper_meft.errors import UserError
from whisper_meft.feature_cache.key import clip_fingerprint


def as_json(**fields) -> bytes:
    return json.dumps(fields, ensure_ascii=False).encode()


@pytest.mark.parametrize("shards", [load_examples, load_shards])
def test_labels_and_speakers(shards, tmp_path):
    members = [
        ("a/0.wav", sound(0)),
        ("a/0.cls", b" nl\n"),
        ("a/0.json", as_json(speaker="ann", text="Ja.")),
        ("a/1.json", as_json(dialect="de", speaker_id=7)),
        ("a/1.WAV", sound(1)),
        ("b/1.flac", sound(2, kind="FLAC")),
        ("b/1.cls", b"3"),
        ("b/1.spk", b"cid"),
    ]
    tar(tmp_path / "x.tar", members)
    assert found(shards(str(tmp_path / "x.tar"))) == [(0, "nl", "ann"), (1, "de", "7"), (2, "3", "cid")]


def test_nan_in_json_is_missing(tmp_path):
    """As Python writes what pandas made of a column in which values are missing."""
    told = as_json(dialect="de", speaker=float("nan"))
    tar(tmp_path / "x.tar", [("0.wav", sound(0)), ("0.json", told)])
    assert found(load_examples(str(tmp_path / "x.tar"))) == [(0, "de", None)]


@pytest.mark.parametrize("shards", [load_examples, load_shards])
def test_times_and_channels_are_said_not_to_cut(shards, tmp_path, caplog):
    # The sound was cut out of a longer recording when it was packed: the times are of that.
    told = as_json(dialect="de", start=31.5, end_time_ms=32500, duration=1.0, offset_of="x", channel=1)
    tar(tmp_path / "x.tar", [m for i in range(3) for m in ((f"{i}.wav", sound(i)), (f"{i}.json", told))])
    examples = list(shards(str(tmp_path)))
    assert [index_of(example) for example in examples] == [0, 1, 2]
    assert {(example.start, example.stop) for example in examples} == {(None, None)}
    said = [record.message for record in caplog.records]
    said_of = "start, end_time_ms, channel"
    sentence = f"what its examples say of {said_of} is not used, sounds in shards are heard whole"
    assert len(said) == 1 and said[0].endswith(sentence) and str(tmp_path) in said[0]


def test_several_formats_of_sound(tmp_path):
    kinds = {"wav": "WAV", "flac": "FLAC", "mp3": "MP3", "ogg": "OGG"}
    members = []
    for number, (suffix, kind) in enumerate(kinds.items()):
        members += [(f"{number}.{suffix}", sound(number, 0.5, kind)), (f"{number}.cls", b"a")]
    tar(tmp_path / "x.tar", members)
    good, bad = check_audio(load_examples(str(tmp_path)), progress=False)
    assert len(good) == 4 and not bad and all(abs(each.seconds - 0.5) < 0.05 for each in good)


def test_transcripts(tmp_path):
    members = [("0.wav", sound(0)), ("0.txt", "Ja, één.".encode()), ("1.wav", sound(1))]
    members += [("1.json", as_json(sentence="Nee.", speaker="bea"))]
    tar(tmp_path / "x.tar", members)
    examples = load_examples(str(tmp_path), require_text=True)
    assert [example.text for example in examples] == ["Ja, één.", "Nee."]
    assert [example.speaker for example in examples] == [None, "bea"]


def test_members_are_named(tmp_path):
    members = [("0.left.wav", sound(0)), ("0.right.wav", sound(1)), ("0.txt", b"nl"), ("0.who", b"ann")]
    tar(tmp_path / "x.tar", members)
    named = {"label_column_name": "txt", "speaker_column_name": "who"}
    for suffix, index in (("left.wav", 0), ("right.wav", 1)):
        examples = load_examples(str(tmp_path), audio_column_name=suffix, **named)
        assert found(examples) == [(index, "nl", "ann")]
    with pytest.raises(UserError, match=r"x.tar: 0 has several sounds \(left.wav, right.wav\): name one"):
        load_examples(str(tmp_path), **named)
    with pytest.raises(UserError, match="x.tar: 0 has no member 'mid.wav'"):
        load_examples(str(tmp_path), audio_column_name="mid.wav", **named)
    with pytest.raises(UserError, match="x.tar: 0 has no column 'kind'"):
        load_examples(str(tmp_path), audio_column_name="left.wav", label_column_name="kind")


def test_a_transcript_is_no_label(tmp_path):
    tar(tmp_path / "x.tar", [("0.wav", sound(0)), ("0.txt", b"yes"), ("0.json", as_json(age=3))])
    match = "x.tar: 0 has no label that is known by its name: it has wav, txt, json, in json age; name one"
    with pytest.raises(UserError, match=match):
        load_examples(str(tmp_path))


@pytest.mark.parametrize("suffix, mode", [("tar", "w"), ("tar.gz", "w:gz"), ("tgz", "w:gz")])
def test_patterns_and_compression(suffix, mode, tmp_path):
    for shard in range(12):
        tar(tmp_path / f"d-{shard:02}.{suffix}", [("0.wav", sound(shard)), ("0.cls", b"a")], mode)
    for source in (f"{tmp_path}/d-{{00..11}}.{suffix}", str(tmp_path)):
        if "{" in source:
            pytest.importorskip("webdataset")
        shards = load_shards(source)
        assert len(shards) == 12 and [index_of(example) for example in shards] == list(range(12))
    lazily = not isinstance(next(iter(shards)).audio, bytes)
    assert lazily == (suffix == "tar")


def test_splits_by_name_and_by_folder(tmp_path):
    make_shards(tmp_path / "names", [2, 1])
    make_shards(tmp_path / "names", [3], prefix="dev")
    make_shards(tmp_path / "folders/train", [2], prefix="")
    make_shards(tmp_path / "folders/valid", [1], prefix="shard")
    make_shards(tmp_path / "none", [2], prefix="corpus")
    for streaming in (False, True):
        assert sorted(list_splits(str(tmp_path / "names"), streaming=streaming)) == ["dev", "train"]
        assert sorted(list_splits(str(tmp_path / "folders"), streaming=streaming)) == ["train", "valid"]
        assert list_splits(str(tmp_path / "none"), streaming=streaming) == []
    assert len(load_examples(str(tmp_path / "names"), split="train")) == 3
    assert len(list(load_shards(str(tmp_path / "names"), split="validation"))) == 3
    with pytest.raises(UserError, match="has several splits"):
        load_shards(str(tmp_path / "names"))


def test_shards_beside_those_of_splits_are_in_none_of_them(tmp_path, caplog):
    for prefix, size in (("train", 2), ("test", 3), ("extra", 4)):
        make_shards(tmp_path / "x", [size], prefix=prefix)
    source = str(tmp_path / "x")
    for streaming in (False, True):
        assert sorted(list_splits(source, streaming=streaming)) == ["extra", "test", "train"]
    sizes = {"train": 2, "test": 3, "extra": 4}
    assert {split: len(load_examples(source, split=split)) for split in sizes} == sizes
    assert {split: len(list(load_shards(source, split=split))) for split in sizes} == sizes
    told = f"{source} holds 'extra' beside the splits test, train: each is a split of its own"
    assert sum(message.startswith(told) for message in caplog.messages) == 1
    make_shards(tmp_path / "y", [1], prefix="test_of_time")
    make_shards(tmp_path / "y", [2], prefix="other")
    assert list_splits(str(tmp_path / "y")) == [] and len(load_examples(str(tmp_path / "y"))) == 3


@pytest.mark.parametrize("shards", [load_examples, load_shards])
def test_shards_that_are_called_like_languages_and_like_splits(shards, tmp_path, caplog):
    """Those of trn, dev and tst were read as one data set."""
    for folder, names in (("long", "trn dev tst"), ("short", "tr cv"), ("more", "tr cv nl")):
        for prefix in names.split():
            make_shards(tmp_path / folder, [1, 1], prefix=prefix)
    with pytest.raises(UserError, match="long: dev, trn, tst may be splits or languages: call splits by"):
        shards(str(tmp_path / "long"))
    assert len(list(shards(str(tmp_path / "more")))) == 6 and not caplog.text
    assert len(list(shards(str(tmp_path / "short")))) == 4
    assert "short: cv, tr are read together, as languages are called so; call splits train" in caplog.text


def test_a_tar_file_beside_audio_is_passed_over(tmp_path):
    from data_fixtures import write

    write(tmp_path / "a" / "0.wav", 0)
    write(tmp_path / "b" / "1.wav", 1)
    make_shards(tmp_path, [3])
    assert found(load_examples(str(tmp_path))) == [(0, "a", None), (1, "b", None)]


def test_neighbours_with_other_keys_are_other_examples(tmp_path):
    """As the webdataset package has it: a key that comes again later is another example."""
    members = [("0.wav", sound(0)), ("0.cls", b"a"), ("1.wav", sound(1)), ("1.cls", b"b")]
    members += [("0.cls", b"c"), ("0.wav", sound(2))]
    tar(tmp_path / "x.tar", members)
    assert found(load_examples(str(tmp_path))) == [(0, "a", None), (1, "b", None), (2, "c", None)]


def test_what_is_no_member_of_an_example(tmp_path):
    members = [("__meta__/x.json", b"{}"), ("README", b"hello"), ("._0.wav", b"junk"), (".cls", b"z")]
    members += [("./0.wav", sound(0)), ("./0.cls", b"a")]
    path = tar(tmp_path / "x.tar", members)
    with tarfile.open(path, "a") as archive:
        for name, kind in (("folder.wav", tarfile.DIRTYPE), ("1.wav", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    assert found(load_examples(str(tmp_path))) == [(0, "a", None)]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "a.b", "d/a", "d.e/a", "é", "d/x-1"]), st.sampled_from(["cls", "x.txt"])
        ),
        min_size=1,
        max_size=6,
        unique=True,
    )
)
def test_keys_are_those_of_the_webdataset_package(members):
    wds = pytest.importorskip("webdataset")
    for key, suffix in members:
        base, rest = wds.tariterators.base_plus_ext(f"{key}.{suffix}")
        assert _divided(f"{key}.{suffix}") == (base, ".", rest)


def test_a_shard_gives_the_examples_of_the_webdataset_package(tmp_path):
    wds = pytest.importorskip("webdataset")
    make_shards(tmp_path, [5])
    path = str(tmp_path / "train-000.tar")
    theirs = list(wds.tariterators.tarfile_samples([{"url": path}]))
    ours = list(load_shards(path))
    assert [f"{path}: {sample['__key__']}" for sample in theirs] == [example.name for example in ours]
    assert [sample["wav"] for sample in theirs] == [example.audio.read() for example in ours]
    assert [sample["cls"].decode() for sample in theirs] == [example.label for example in ours]


@pytest.fixture
def served(tmp_path):
    """The address of a server of tmp_path/served."""
    pytest.importorskip("webdataset")
    if shutil.which("curl") is None:
        pytest.skip("the webdataset package opens addresses with curl")
    (tmp_path / "served").mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path / "served"))

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_addresses(served, tmp_path):
    make_shards(tmp_path / "served", [3, 40])
    shards = load_shards(f"{served}/train-{{000..001}}.tar")
    assert [index for index, _, _ in found(shards)] == list(range(43))
    assert isinstance(next(shards.examples(1)).audio, bytes)  # and the rest is not fetched
    with pytest.raises(
        UserError, match="train-7.tar cannot be read as a tar file: what fetches it ended with status 22"
    ):
        list(load_shards(f"{served}/train-7.tar"))


def test_an_address_that_breaks_off(served, tmp_path):
    make_shards(tmp_path / "served", [3])
    path = tmp_path / "served" / "train-000.tar"
    path.write_bytes(path.read_bytes()[: 512 * 15])
    with pytest.raises(UserError, match="train-000.tar cannot be read as a tar file"):
        list(load_shards(f"{served}/train-000.tar"))


# --- what is wrong ----------------------------------------------------------------------------------------


def test_commands_are_not_run(tmp_path):
    pytest.importorskip("webdataset")
    done = tmp_path / "done"
    for source in (
        f"pipe:touch {done} x.tar",
        f"pipe:touch {done}; cat {{0..1}}.tar",
        f"a.tar::pipe:touch {done}.tar",
    ):
        with pytest.raises(UserError, match="would run a command|there is no shard"):
            load_shards(source)
    assert not done.exists()
    with pytest.raises(UserError, match="is of no kind that is read: paths and http"):
        load_shards("gopher://host/x.tar")


def test_missing_shards(tmp_path):
    with pytest.raises(UserError, match="there is no shard .*x.tar"):
        load_shards(str(tmp_path / "x.tar"))
    pytest.importorskip("webdataset")
    make_shards(tmp_path, [1])
    with pytest.raises(UserError, match=r"there is no shard .*train-001.tar"):
        load_shards(f"{tmp_path}/train-{{000..001}}.tar")


@pytest.mark.parametrize(
    "content, match",
    [
        (b"", "cannot be read as a tar file"),
        (b"<html>Not found</html>" * 100, "cannot be read as a tar file"),
        (gzip.compress(b"x" * 2000), "cannot be read as a tar file"),
        (b"\0" * 10240, "holds no examples"),
    ],
    # Of its bytes a name would have the time in a gzip header, and be another in each process that tests.
    ids=["empty", "a page", "gzip", "zeros"],
)
@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_files_that_are_none(content, match, suffix, tmp_path):
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(gzip.compress(content) if suffix == "tar.gz" and content[:1] == b"\0" else content)
    with pytest.raises(UserError, match=f"x.{suffix} {match}"):
        list(load_shards(str(path)))


@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
@pytest.mark.parametrize("blocks", [1, 1.5, 15, 16, 17, 18.2, 30, 31])
def test_a_shard_that_was_cut(blocks, suffix, tmp_path):
    """Anywhere, also between two members, where there is nothing to be seen."""
    members = [
        (name, content) for i in range(3) for name, content in ((f"{i}.cls", b"a"), (f"{i}.wav", sound(i)))
    ]
    content = tar(tmp_path / "whole.tar", members).read_bytes()[: int(512 * blocks)]
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(gzip.compress(content) if suffix == "tar.gz" else content)
    with pytest.raises(UserError, match=f"x.{suffix} cannot be read as a tar file"):
        list(load_shards(str(path)))


def test_members_that_are_wrong(tmp_path):
    wrong = {
        "twice": ([("0.wav", sound(0)), ("0.wav", sound(1))], "holds the member 0.wav twice"),
        "json": ([("0.wav", sound(0)), ("0.json", b"{")], "0: its json member is not JSON"),
        "list": ([("0.wav", sound(0)), ("0.json", b"[1]")], "must hold an object, got list"),
        "type": (
            [("0.wav", sound(0)), ("0.json", as_json(label=["a"]))],
            "label must be text or a whole number",
        ),
        "text": ([("0.wav", sound(0)), ("0.cls", b"\xff\xfe")], "cls is not text in UTF-8"),
        "empty": ([("0.wav", sound(0)), ("0.cls", b" ")], "0 has no label"),
    }
    for name, (members, match) in wrong.items():
        path = tar(tmp_path / f"{name}.tar", members)
        with pytest.raises(UserError, match=match):
            list(load_shards(str(path)))


def test_an_example_without_sound_is_left_out_by_name(tmp_path):
    tar(tmp_path / "x.tar", [("0.cls", b"a"), ("1.wav", sound(1)), ("1.cls", b"b")])
    good, bad = check_audio(load_examples(str(tmp_path)), progress=False)
    assert found(good) == [(1, "b", None)]
    assert bad == [(f"{tmp_path}/x.tar: 0", "is empty (0 bytes)")]


def test_a_shard_that_vanishes(tmp_path):
    make_shards(tmp_path, [2])
    examples = load_examples(str(tmp_path), split="train")
    (tmp_path / "train-000.tar").unlink()
    with pytest.raises(UserError, match="train-000.tar: 00000"):
        examples[0].decode()


def test_a_clip_is_known_again_by_a_feature_cache(tmp_path):
    make_shards(tmp_path, [2])
    first, again = ([clip_fingerprint(each) for each in load_examples(str(tmp_path))] for _ in range(2))
    assert first == again and len(set(first)) == 2
