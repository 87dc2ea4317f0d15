"""Transcriber against Hugging Face's own generate, and what it refuses or answers by name."""

import copy
import json
import logging
import shutil

import pytest
import soundfile
import torch
from modelling_fixtures import randomise
from recogniser_fixtures import RATE, make_recogniser, noise
from tokens_fixtures import spelling_tokenizer
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperTokenizer
from whisper_meft import LSTConfig, SHERLConfig, UserError, get_meft_model
from whisper_meft.data import Collator, Example, ExampleSet, SpeechDataset
from whisper_meft.encoder.quantization import Int8Linear
from whisper_meft.evaluation.generating import Segment, _segments, generation_options
from whisper_meft.evaluation.transcriber import Transcriber, transcribe_batches
from whisper_meft.model.kinds import kind_of
from whisper_meft.options.generation import GenerationArguments
from whisper_meft.options.inference import InferenceArguments

SECONDS = (0.3, 1.7051, 1.0, 0.9, 0.52)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """whisper/, lst/ (trained weights at random) and clips 0.wav ... of SECONDS."""
    folder = tmp_path_factory.mktemp("transcriber")
    make_recogniser(folder / "whisper")
    whisper = WhisperForConditionalGeneration.from_pretrained(folder / "whisper")
    model = randomise(get_meft_model(whisper, LSTConfig(reduction_factor=4)), std=0.05)
    model.save_pretrained(folder / "lst")
    for index, seconds in enumerate(SECONDS):
        noise(folder / f"{index}.wav", seconds, seed=index)
    return folder


ALL = tuple(range(len(SECONDS)))


def clips(work, indices=ALL):
    return ExampleSet([Example(audio=str(work / f"{i}.wav")) for i in indices], "clips")


def load(work, name="whisper", batch_size=2, device="cpu", **options):
    arguments = InferenceArguments(batch_size=batch_size, device=device)
    return Transcriber.load(str(work / name), arguments, GenerationArguments(**options), progress=False)


def own(work, wave, **options):
    """Text and segments of Hugging Face's generate, as its documentation calls it."""
    whisper = WhisperForConditionalGeneration.from_pretrained(work / "whisper")
    extractor = WhisperFeatureExtractor.from_pretrained(work / "whisper")
    tokenizer = WhisperTokenizer.from_pretrained(work / "whisper")
    given = {"sampling_rate": RATE, "return_tensors": "pt", "return_attention_mask": True}
    if len(wave) > extractor.n_samples:
        given |= {"truncation": False, "padding": "longest"}
        options["return_timestamps"] = True
    inputs = extractor(wave, **given)
    tokens = whisper.generate(**inputs, **options)
    return tokenizer.batch_decode(tokens, skip_special_tokens=True)[0].strip()


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize(
    "options", [{"language": "dutch"}, {"num_beams": 2, "language": "nl"}, {"return_timestamps": True}]
)
def test_texts_are_those_of_generate(options, batch_size, work):
    found, bad = load(work, batch_size=batch_size, **options).transcribe(clips(work))
    assert not bad and len({each.text for each in found}) > 3
    for index, each in enumerate(found):
        wave = soundfile.read(work / f"{index}.wav", dtype="float32")[0]
        if index == 1:  # not a whole number of frames: nothing is dropped
            wave = torch.nn.functional.pad(torch.from_numpy(wave), (0, -len(wave) % 160)).numpy()
        assert each.text == own(work, wave, task="transcribe", **options), index


def test_seventy_seconds_of_thirty_are_heard_to_the_end(tmp_path):
    make_recogniser(tmp_path / "whisper", max_source_positions=1500)
    wave = soundfile.read(noise(tmp_path / "long.wav", 70, seed=1), dtype="float32")[0]
    examples = ExampleSet([Example(audio=str(tmp_path / "long.wav"))], "long")
    (found,), bad = load(tmp_path, language="nl").transcribe(examples)
    assert not bad and found.text == own(tmp_path, wave, language="nl")
    assert found.text.replace(" ", "") == "".join(each.text for each in found.segments).replace(" ", "")
    times = [time for each in found.segments for time in (each.start, each.end)]
    assert times == sorted(times) and times[-1] <= 70
    assert all(each.end > each.start for each in found.segments)


def test_times_lie_within_the_clip(work):
    found, _ = load(work, return_timestamps=True).transcribe(clips(work))
    for each, seconds in zip(found, SECONDS):
        times = [time for segment in each.segments for time in (segment.start, segment.end)]
        assert times and times == sorted(times) and times[0] >= 0 and times[-1] <= seconds


class Spelling:
    def decode(self, tokens, skip_special_tokens):
        return " " + "".join(map(chr, tokens))


@pytest.mark.parametrize(
    ("parts", "seconds", "expected"),
    [
        ([(0, 1, "a"), (1, 2.5, "b")], 2.0, [(0, 1, "a"), (1, 2, "b")]),
        ([(0, 2, "a"), (2, 4, "b"), (5, 6, "c")], 2.0, [(0, 2, "a b c")]),  # no time is left
        ([(0, 1, "a"), (0.5, 1.5, "b")], 2.0, [(0, 1, "a"), (1, 1.5, "b")]),  # one after the other
        ([(0, 0, "a"), (0, 1, "b")], 2.0, [(0, 1, "a b")]),
        ([(0, 0, "a")], 2.0, [(0, 2, "a")]),
        ([(0, 1, ""), (1, 2, "b")], 2.0, [(1, 2, "b")]),
        ([(0, 5, "a")], 4.1, [(0, 4.1, "a")]),
        ([(0, 5, "a")], 4.0996, [(0, 4.099, "a")]),  # in whole milliseconds, and not behind the end
        ([], 2.0, []),
    ],
)
def test_segments_are_put_in_order(parts, seconds, expected):
    given = [{"start": a, "end": b, "tokens": list(map(ord, text))} for a, b, text in parts]
    assert _segments(given, Spelling(), seconds) == [Segment(*each) for each in expected]


def test_a_text_that_breaks_off_is_named(work, caplog):
    with caplog.at_level(logging.WARNING):
        found, _ = load(work, language="nl", max_new_tokens=3).transcribe(clips(work, [0, 1, 2]))
    assert not any(each.complete for each in found)
    assert "3 of 3 transcripts break off" in caplog.text and "0.wav" in caplog.text


def test_an_untrained_model_is_its_backbone_and_zero_shot_always_is(work):
    plain = load(work, language="nl").transcribe(clips(work))[0]
    trained = load(work, "lst", language="nl")
    found = trained.transcribe(clips(work))[0]
    assert trained.adapted and [each.text for each in found] != [each.text for each in plain]
    assert trained.zero_shot().transcribe(clips(work))[0] == plain


def test_zero_shot_is_quantised_as_the_model_is(work):
    """So that what is shown beside it is what was learnt: without that, the model is its backbone."""
    arguments = InferenceArguments(device="cpu", backbone_quantization="int8")
    trained = Transcriber.load(str(work / "lst"), arguments, progress=False)
    alone = trained.zero_shot().model
    assert isinstance(alone.model.encoder.layers[1].fc1, Int8Linear)
    features = torch.randn(2, alone.config.num_mel_bins, 2 * alone.config.max_source_positions)
    with torch.no_grad(), trained.model.disable_adapter():
        *_, last = trained.model.encoder.stream(features)
        own, theirs = trained.model.encoder.layer_norm(last), alone.model.encoder(features).last_hidden_state
    torch.testing.assert_close(own, theirs, rtol=1e-3, atol=1e-3)


def test_the_saved_language_holds_until_another_is_asked_for(work, tmp_path):
    whisper = WhisperForConditionalGeneration.from_pretrained(work / "whisper")
    model = get_meft_model(whisper, SHERLConfig(reduction_factor=4))
    model.generation_config.language, model.generation_config.task = "Dutch", "transcribe"
    model.save_pretrained(tmp_path / "sherl", save_backbone=True)
    extractor = WhisperFeatureExtractor.from_pretrained(work / "whisper")
    extractor.save_pretrained(tmp_path / "sherl")
    WhisperTokenizer.from_pretrained(work / "whisper").save_pretrained(tmp_path / "sherl")
    spoken = load(tmp_path, "sherl")
    assert spoken.language == "nl" and spoken.options["language"] == "nl"
    assert load(tmp_path, "sherl", language="de").language == "de"
    assert load(tmp_path, "sherl", task="translate").language == "en"
    assert load(work).language is None
    assert spoken.transcribe(clips(work))[0] == load(work, language="nl").transcribe(clips(work))[0]


def test_a_language_and_a_task_that_are_forced_by_tokens_hold_too(work, tmp_path):
    shutil.copytree(work / "whisper", tmp_path / "whisper")
    path = tmp_path / "whisper" / "generation_config.json"
    tokenizer = WhisperTokenizer.from_pretrained(tmp_path / "whisper")
    forced = tokenizer.get_decoder_prompt_ids(language="nl", task="translate")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"forced_decoder_ids": forced}))
    wave = soundfile.read(work / "0.wav", dtype="float32")[0]
    spoken = load(tmp_path)
    assert spoken.options == {"language": "nl", "task": "translate"}
    assert spoken.transcribe(clips(work, [0]))[0][0].text == own(tmp_path, wave)
    assert load(tmp_path, language="de").options == {"language": "de", "task": "transcribe"}
    get_meft_model(spoken.model, LSTConfig(reduction_factor=4)).save_pretrained(tmp_path / "lst")
    assert load(tmp_path, "lst").options == spoken.options
    # The tokens of published ones: the language is guessed.
    path.write_text(json.dumps(json.loads(path.read_text()) | {"forced_decoder_ids": [[1, None], forced[1]]}))
    assert load(tmp_path).options == {"task": "translate"}


def test_half_precision_hears_too(work):
    arguments = InferenceArguments(device="cpu", backbone_dtype="bfloat16")
    plain = Transcriber.load(str(work / "whisper"), arguments, progress=False)
    assert plain.model.dtype == torch.bfloat16 and all(plain.transcribe(clips(work))[0])
    trained = Transcriber.load(str(work / "lst"), arguments, progress=False)
    assert all(trained.transcribe(clips(work))[0])
    assert trained.zero_shot().model.dtype == torch.bfloat16


# ---------------------------------------------------------------- what is answered by name


def test_sound_behind_max_frames_is_an_error_of_its_clip(work, tmp_path):
    whisper = WhisperForConditionalGeneration.from_pretrained(work / "whisper")
    get_meft_model(whisper, LSTConfig(reduction_factor=4, max_frames=30)).save_pretrained(tmp_path / "short")
    # An extractor whose window is shorter than the encoder's, as one may be saved with such a model.
    found, bad = load(tmp_path, "short", batch_size=4, language="nl").transcribe(clips(work))
    assert [each is not None for each in found] == [True, False, False, False, True]
    assert [name for name, _ in bad] == [str(work / f"{i}.wav") for i in (1, 2, 3)]
    assert all("max_frames 30" in reason for _, reason in bad)


def test_an_output_that_is_no_number_is_an_error_of_its_clip(work):
    transcriber = load(work, batch_size=6, language="nl")
    encoder = transcriber.model.model.encoder
    before = encoder.forward

    def spoilt(input_features, **options):
        output = before(input_features, **options)
        loud = input_features.mean(dim=(1, 2)) > transcriber.limit
        output.last_hidden_state[loud] = torch.nan
        return output

    loudness = [
        float(each["input_features"].mean())
        for each in SpeechDataset(clips(work, [0, 2, 3, 4]), transcriber.feature_extractor)
    ]
    transcriber.limit = sorted(loudness)[-2]
    encoder.forward = spoilt
    found, bad = transcriber.transcribe(clips(work, [0, 2, 3, 4]))
    assert len(bad) == 1 and "NaN or infinite" in bad[0][1]
    assert found.index(None) == loudness.index(max(loudness)) and sum(each is None for each in found) == 1


# ---------------------------------------------------------------- what is refused


def test_options_that_no_model_takes(work, tmp_path):
    with pytest.raises(UserError, match=r"code \(nl\) or a name \(dutch\).*'klingon'"):
        load(work, language="klingon")
    with pytest.raises(UserError, match="max_new_tokens must be at most 20"):
        load(work, max_new_tokens=21)
    make_recogniser(tmp_path / "english", multilingual=False)
    with pytest.raises(UserError, match="language='nl' .* model is English-only"):
        load(tmp_path, "english", language="nl")
    assert "language" not in load(tmp_path, "english", language="English").options
    with pytest.raises(UserError, match="task='translate' is none of this model's"):
        load(tmp_path, "english", task="translate")
    path = tmp_path / "english" / "generation_config.json"
    before = path.read_text()
    for name in ("language", "task"):
        path.write_text(json.dumps(json.loads(before) | {name: "en"}))
        with pytest.raises(UserError, match=f"has {name}='en' and no .*_to_id .*: take {name} out"):
            load(tmp_path, "english")
    path.write_text(before)
    english = load(tmp_path, "english", task="transcribe")
    assert english.language == "en" and english.transcribe(clips(work, [0, 1]))[0][0].text
    generation = copy.deepcopy(load(work).model.generation_config)
    del generation.lang_to_id["<|yue|>"]
    english.model.generation_config = generation
    with pytest.raises(UserError, match="'cantonese' is none of this model's 99 languages"):
        generation_options(english.model, language="cantonese")
    del generation.lang_to_id, generation.is_multilingual  # as of older ones, which may know any
    with pytest.raises(UserError, match="language='en' cannot be told to this model, .* no lang_to_id"):
        generation_options(english.model, language="en")


def test_options_of_trained_models_are_not_for_a_plain_whisper(work):
    for name, value in {"backbone": "x", "backbone_quantization": "int8", "backbone_compile": True}.items():
        with pytest.raises(UserError, match=f"--{name} is for trained models"):
            Transcriber.load(str(work / "whisper"), InferenceArguments(device="cpu", **{name: value}))


def test_a_tokenizer_that_is_not_the_models(work, tmp_path):
    spelling_tokenizer().save_pretrained(tmp_path)
    other = WhisperTokenizer.from_pretrained(tmp_path)
    transcriber = load(work)
    other.eos_token = "<|nospeech|>"
    with pytest.raises(UserError, match="the tokenizer ends a text with token"):
        Transcriber(transcriber.model, transcriber.feature_extractor, other)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no tokenizer.json"):
        arguments = InferenceArguments(device="cpu", tokenizer_name=str(tmp_path / "empty"))
        Transcriber.load(str(work / "whisper"), arguments)


def test_a_model_without_timestamps_hears_no_long_clip(work):
    transcriber = load(work, language="nl")
    transcriber.model.generation_config.__dict__.pop("no_timestamps_token_id")
    found, bad = transcriber.transcribe(clips(work, [0, 1]))
    assert found[0] and found[1] is None and "no_timestamps_token_id" in bad[0][1]
    with pytest.raises(UserError, match="no_timestamps_token_id"):  # before anything is heard
        generation_options(transcriber.model, return_timestamps=True)


# ---------------------------------------------------------------- for a training run


def test_batches_of_a_training_run(work):
    transcriber = load(work, "lst", language="nl")
    examples = clips(work, [0, 2, 3, 4])
    dataset = SpeechDataset(examples, transcriber.feature_extractor)
    batches = torch.utils.data.DataLoader(dataset, 3, collate_fn=Collator(transcriber.feature_extractor))
    expected = [each.text for each in transcriber.transcribe(examples)[0]]
    model = transcriber.model.train()
    texts = transcribe_batches(model, batches, transcriber.tokenizer, language="dutch")
    assert model.training and texts == expected
    features = next(iter(batches))["input_features"]
    model(features, labels=torch.full((len(features), 5), 100)).loss.backward()  # a step can follow
    with pytest.raises(UserError, match="klingon"):
        transcribe_batches(model, batches, transcriber.tokenizer, language="klingon")


def test_kinds(work, tmp_path):
    assert kind_of(work / "whisper") == "whisper" and kind_of(work / "lst") == "transcription"
    assert kind_of("phoneme-tiny") == kind_of(tmp_path) == "classification"
    with pytest.raises(UserError, match="no folder nobody/nothing, nor can it be had from the model hub"):
        kind_of("nobody/nothing")
