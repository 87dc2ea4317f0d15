"""Transcripts from every layout that holds them, and what is refused."""

import pickle

import datasets
import numpy as np
import pytest
from data_fixtures import RATE, index_of, table, wave, write
from tokens_fixtures import spelling_tokenizer
from transformers import WhisperFeatureExtractor
from whisper_meft.data import (
    Collator,
    Example,
    ExampleSet,
    SpeechDataset,
    TranscriptTokens,
    list_splits,
    load_examples,
    split_by_speaker,
)
from whisper_meft.errors import UserError
from whisper_meft.once import warn_once


def said(source, **options) -> list[tuple]:
    return [
        (index_of(example), example.text, example.speaker)
        for example in load_examples(source, require_text=True, **options)
    ]


@pytest.fixture
def clips(tmp_path):
    for i, name in enumerate("abc"):
        write(tmp_path / f"{name}.wav", i)
    return tmp_path


@pytest.mark.parametrize("column", ["text", "sentence", "transcription", "Transcript", "raw_text"])
def test_manifest(clips, column):
    path = table(clips / "all.csv", f"path,{column},speaker", 'a.wav,"Ja, ja.",s0', "b.wav, Nee ,s1")
    assert said(path) == [(0, "Ja, ja.", "s0"), (1, "Nee", "s1")]


def test_a_manifest_without_labels_needs_none_and_labels_are_kept(clips):
    path = table(clips / "all.tsv", "path\tlanguage\tsentence", 'a.wav\tnl\t"Hij zei "ja".', "b.wav\tde\tNee")
    examples = load_examples(path, require_text=True)
    assert [(e.label, e.text) for e in examples] == [("nl", '"Hij zei "ja".'), ("de", "Nee")]
    assert [e.text for e in load_examples(path)] == [None, None]


@pytest.mark.parametrize("column", ["language", "locale", "Lang"])
def test_transcripts_of_several_languages_are_told_of(column, clips, caplog):
    rows = ["a.wav\tnl-NL\tJa", "b.wav\tde\tNein", "c.wav\tnl_BE\tNee"]
    path = table(clips / "all.tsv", f"path\t{column}\tsentence", *rows)
    audio = [{"array": wave(i).tolist(), "sampling_rate": RATE} for i in range(2)]
    data = {"audio": audio, column: ["nl", "de"], "sentence": ["ja", "nein"]}
    for source, found in ((path, "nl 2, de 1"), (datasets.Dataset.from_dict(data), "nl 1, de 1")):
        warn_once.cache_clear()
        caplog.clear()
        load_examples(source)
        assert not caplog.text  # they are classes
        load_examples(source, require_text=True)
        assert f"column '{column}' tells 2 languages apart ({found})" in caplog.text
    caplog.clear()
    load_examples(table(clips / "one.tsv", f"path\t{column}\tsentence", *rows[::2]), require_text=True)
    assert not caplog.text


def test_json_lines_and_a_named_column(clips):
    lines = '{"audio_filepath": "a.wav", "gold": "eins"}', '{"audio_filepath": "b.wav", "gold": "zwei"}'
    path = table(clips / "train.jsonl", *lines)
    assert said(path, text_column_name="gold") == [(0, "eins", None), (1, "zwei", None)]
    with pytest.raises(UserError, match="no text column.*audio_filepath, gold.*text_column_name"):
        load_examples(path, require_text=True)
    with pytest.raises(UserError, match="text_column_name='gold'.*require_text"):
        load_examples(path, text_column_name="gold")


def test_letters_are_composed(clips):
    path = table(clips / "all.csv", "path,text", "a.wav,e\u0301te\u0301")
    assert said(path) == [(0, "\u00e9t\u00e9", None)]


def test_empty_transcripts_are_refused_by_name(clips):
    path = table(clips / "all.csv", "path,text", "a.wav,ja", "b.wav,", "c.wav, ")
    with pytest.raises(UserError, match=r"2 of 3 examples of .* have no transcript: .*b\.wav, .*c\.wav"):
        load_examples(path, require_text=True)


def test_one_clip_with_two_transcripts_is_refused(clips, caplog):
    path = table(clips / "all.csv", "path,label,text", "a.wav,x,ja", "a.wav,x,nee")
    with pytest.raises(UserError, match="line 3: .*a.wav is given twice, as 'ja' and as 'nee'"):
        load_examples(path, require_text=True)
    path = table(clips / "all.csv", "path,label,text", "a.wav,x,ja", "a.wav,y,ja")
    with pytest.raises(UserError, match="given twice: the rows differ in 'label'"):
        load_examples(path, require_text=True)
    path = table(clips / "all.csv", "path,label,text", "a.wav,x,ja", "a.wav,x,ja")
    assert said(path) == [(0, "ja", None)] and "1 rows twice" in caplog.text


def test_a_folder_of_tables(clips):
    table(clips / "train.csv", "path,text", "a.wav,ja", "b.wav,nee")
    table(clips / "test.csv", "path,text", "c.wav,misschien")
    assert list_splits(clips, require_text=True) == ["test", "train"]
    assert said(clips, split="test") == [(2, "misschien", None)]


def test_common_voice(tmp_path):
    for i, name in enumerate(("train", "dev", "test")):
        write(tmp_path / "nl" / "clips" / f"{i}.wav", i)
        header = "client_id\tpath\tsentence_id\tsentence\taccents\tlocale"
        table(tmp_path / "nl" / f"{name}.tsv", header, f"s{i}\t{i}.wav\tx\tZin {i}.\t\tnl")
    for source in (tmp_path / "nl", tmp_path):
        assert said(source, split="validation") == [(1, "Zin 1.", "s1")]


def test_segments_of_one_recording(tmp_path):
    write(tmp_path / "talk.wav", 4, seconds=1)
    path = table(tmp_path / "x.csv", "path,start,end,text", "talk.wav,0,0.5,one", "talk.wav,0.5,1,two")
    examples = load_examples(path, require_text=True)
    assert [(e.start, e.stop, e.text) for e in examples] == [(0, 0.5, "one"), (0.5, 1, "two")]


def test_kaldi(clips):
    table(clips / "wav.scp", *(f"u{i} {clips}/{name}.wav" for i, name in enumerate("abc")))
    table(clips / "utt2spk", "u0 s0", "u1 s0", "u2 s1")
    with pytest.raises(UserError, match="no file 'text' of transcripts.*utt2spk, wav.scp"):
        load_examples(clips, require_text=True)
    table(clips / "text", "u0 ja  ja", "u1 nee", "u2")
    with pytest.raises(UserError, match="1 of 3 examples .* have no transcript: .*c.wav"):
        load_examples(clips, require_text=True)
    table(clips / "text", "u0 ja  ja", "u1 nee", "u2 och")
    assert said(clips) == [(0, "ja  ja", "s0"), (1, "nee", "s0"), (2, "och", "s1")]
    table(clips / "segments", "p0 u0 0 0.1", "p1 u0 0.1 -1")
    table(clips / "text.clean", "p0 a", "p1 b")
    assert [e.text for e in load_examples(clips, require_text=True, text_column_name="text.clean")] == [
        "a",
        "b",
    ]


@pytest.fixture
def librispeech(tmp_path):
    for i, (split, chapter) in enumerate((("train-clean-5", "19/198"), ("dev-clean", "84/121"))):
        folder = tmp_path / split / chapter
        stem = chapter.replace("/", "-")
        write(folder / f"{stem}-0000.flac", 2 * i)
        write(folder / f"{stem}-0001.flac", 2 * i + 1)
        table(folder / f"{stem}.trans.txt", f"{stem}-0000 HE SAID", f"{stem}-0001 NO {i}")
    return tmp_path


def test_librispeech(librispeech):
    assert list_splits(librispeech, require_text=True) == ["dev-clean", "train-clean-5"]
    assert said(librispeech, split="validation") == [(2, "HE SAID", "84"), (3, "NO 1", "84")]
    assert said(librispeech / "train-clean-5") == [(0, "HE SAID", "19"), (1, "NO 0", "19")]
    with pytest.raises(UserError, match="which has transcripts and no labels"):
        load_examples(librispeech, data_format="librispeech", split="train")


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_transcripts_are_cut_at_the_ends_of_lines_alone(tmp_path, mark, end):
    spoken, chapter, kaldi = f"ONE{mark}TWO", tmp_path / "libri" / "19" / "198", tmp_path / "kaldi"
    chapter.mkdir(parents=True)
    for name in "ab":
        (chapter / f"{name}.flac").touch()
    lines = f"a {spoken}", f"b {mark}X"
    table(chapter / "19-198.trans.txt", *lines, end=end)
    table(kaldi / "wav.scp", "a a.wav", "b b.wav", end=end)
    table(kaldi / "text", *lines, end=end)
    for source in (tmp_path / "libri", kaldi):
        assert [e.text for e in load_examples(source, require_text=True)] == [spoken, "X"]


def test_librispeech_audio_and_transcripts_belong_together(librispeech):
    folder = librispeech / "dev-clean" / "84" / "121"
    write(folder / "84-121-0002.flac", 0)
    with pytest.raises(UserError, match="audio without a transcript: 84-121-0002"):
        load_examples(librispeech, split="validation", require_text=True)
    (folder / "84-121-0002.flac").unlink()
    (folder / "84-121-0001.flac").unlink()
    with pytest.raises(UserError, match="transcripts without audio: 84-121-0001"):
        load_examples(librispeech, split="validation", require_text=True)


def test_folders_of_audio_have_none(tmp_path):
    write(tmp_path / "x" / "a.wav", 0)
    with pytest.raises(UserError, match="folder of audio without transcripts: give a manifest"):
        load_examples(tmp_path, require_text=True)


@pytest.mark.parametrize("column", ["text", "sentence", "transcription"])
def test_huggingface(column):
    audio = [{"array": wave(i), "sampling_rate": RATE} for i in range(2)]
    rows = {"audio": [{"array": each["array"].tolist(), "sampling_rate": RATE} for each in audio]}
    data = datasets.Dataset.from_dict({**rows, column: ["ja", " nee "], "language": ["nl", "nl"]})
    examples = load_examples(data, require_text=True)
    assert [(e.text, e.label) for e in examples] == [("ja", "nl"), ("nee", "nl")]
    assert np.allclose(examples[1].decode()[0], wave(1))
    with pytest.raises(UserError, match="1 of 2 examples"):
        load_examples(data.remove_columns(column).add_column(column, ["ja", None]), require_text=True)
    with pytest.raises(UserError, match="no text column"):
        load_examples(data.remove_columns(column), require_text=True)
    with pytest.raises(UserError, match=f"the text column '{column}' is of type int64"):
        load_examples(data.remove_columns(column).add_column(column, [1, 2]), require_text=True)


def test_huggingface_paths(clips):
    rows = {"path": [str(clips / f"{n}.wav") for n in "ab"], "sentence": ["ja", "nee"]}
    assert said(datasets.Dataset.from_dict(rows)) == [(0, "ja", None), (1, "nee", None)]


# --- tokens ---


def example(text, name="a.wav"):
    return Example(name, text=text)


def test_tokens_follow_the_prompt_and_the_prompt_is_not_in_the_loss():
    tokenizer = spelling_tokenizer("dutch")
    tokens = TranscriptTokens(tokenizer)
    assert tokenizer.convert_ids_to_tokens(tokens.prompt) == [
        "<|startoftranscript|>",
        "<|nl|>",
        "<|transcribe|>",
        "<|notimestamps|>",
    ]
    item = tokens(example("ja é"))
    text = tokenizer("ja é", add_special_tokens=False).input_ids
    assert tokenizer.decode(text) == "ja é" and len(text) == 5
    assert item["decoder_input_ids"] == tokens.prompt + text
    assert item["labels"] == [-100] * 3 + text + [tokenizer.eos_token_id]


def test_tokens_of_an_english_only_model():
    tokenizer = spelling_tokenizer(None, None, multilingual=False)
    tokens = TranscriptTokens(tokenizer)
    assert tokenizer.convert_ids_to_tokens(tokens.prompt) == ["<|startoftranscript|>", "<|notimestamps|>"]
    assert tokens(example("a"))["labels"][:1] == [-100]
    with pytest.raises(UserError, match="no token for language='dutch': an English-only model"):
        tokenizer.language = "dutch"
        TranscriptTokens(tokenizer)


@pytest.mark.parametrize(
    ("language", "task"), [("english", "transcribe"), ("english", None), (None, "transcribe")]
)
def test_a_published_english_only_tokenizer_takes_no_language_though_it_has_its_token(language, task):
    tokenizer = spelling_tokenizer(language, task, unused=50_000)
    assert tokenizer.eos_token_id == 50_256  # as that of whisper-base.en
    with pytest.raises(UserError, match=f"language={language!r} and task={task!r} set.*: set both to None"):
        TranscriptTokens(tokenizer)
    tokenizer.language = tokenizer.task = None
    prompt = TranscriptTokens(tokenizer).prompt
    assert tokenizer.convert_ids_to_tokens(prompt) == ["<|startoftranscript|>", "<|notimestamps|>"]
    # Of the multilingual ones it is the next.
    assert len(TranscriptTokens(spelling_tokenizer(unused=50_001)).prompt) == 4


def test_transcripts_that_the_decoder_cannot_say_are_refused_by_name():
    tokens = TranscriptTokens(spelling_tokenizer(), longest=8)
    assert len(tokens(example("abcd"))["labels"]) == 8
    with pytest.raises(
        UserError, match="transcript of long.wav has 5 tokens; with the prompt's 4 .* at most 8"
    ):
        tokens.check(ExampleSet([example("abcd"), example("abcde", "long.wav")]))
    with pytest.raises(UserError, match=r"transcript of a.wav holds <\|endoftext\|>"):
        tokens(example("<|endoftext|>"))
    with pytest.raises(UserError, match="1 of 1 examples .* have no transcript: a.wav"):
        tokens.check(ExampleSet([example(None)]))


def test_batches_of_transcripts(clips):
    path = table(clips / "all.csv", "path,text", "a.wav,hi", "b.wav,hello")
    examples = load_examples(path, require_text=True)
    extractor = WhisperFeatureExtractor()
    tokens = pickle.loads(pickle.dumps(TranscriptTokens(spelling_tokenizer())))
    dataset = SpeechDataset(examples, extractor, max_frames="longest", tokens=tokens)
    batch = Collator(extractor, "longest", tokens.end)([dataset[0], dataset[1]])
    short, long = tokens(examples[0]), tokens(examples[1])
    assert batch["decoder_input_ids"].tolist() == [
        short["decoder_input_ids"] + [tokens.end] * 3,
        long["decoder_input_ids"],
    ]
    assert batch["labels"].tolist() == [short["labels"] + [-100] * 3, long["labels"]]
    with pytest.raises(UserError, match="give one of them"):
        SpeechDataset(examples, extractor, {"nl": 0}, tokens=tokens)
    with pytest.raises(UserError, match="have no transcript"):
        SpeechDataset(load_examples(path, require_labels=False), extractor, tokens=tokens)


def test_whole_speakers_are_held_out_without_labels():
    said = ExampleSet(Example(f"{i}.wav", speaker=f"s{i // 4}", text="ja") for i in range(40))
    train, validation = split_by_speaker(said, 0.1)
    assert len(validation) == 4 and len(train) == 36 and not train.speakers() & validation.speakers()
    with pytest.raises(UserError, match="40 of 40 examples .* have no label"):
        split_by_speaker(ExampleSet(Example(f"{i}.wav", speaker=f"s{i // 4}") for i in range(40)))
    with pytest.raises(UserError, match="a single speaker"):
        split_by_speaker(ExampleSet(Example(f"{i}.wav", speaker="s", text="ja") for i in range(4)))


def test_a_leading_space_is_a_token_of_its_transcript():
    plain, spaced = (TranscriptTokens(spelling_tokenizer(), leading_space=space) for space in (False, True))
    example = Example("a.wav", text="hi")
    space = spelling_tokenizer()(" ", add_special_tokens=False).input_ids
    prompt = plain.prompt
    told = plain(example)["decoder_input_ids"][len(prompt) :]
    assert spaced(example)["decoder_input_ids"] == prompt + space + told
    assert spaced(example)["labels"] == [-100] * (len(prompt) - 1) + space + told + [spaced.end]
    assert spaced(Example("a.wav", text=" hi")) == spaced(example)
