"""Training a recogniser from a feature cache: what it reads, that it gives what audio gives, and that another
transcript's or language's states are never read."""

import copy
import re

import pytest
import torch
from modelling_fixtures import CONFIGS, randomise
from recogniser_fixtures import make_recogniser
from tokens_fixtures import spelling_tokenizer
from training_fixtures import make_audio_folder, make_backbone, make_transcripts
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration
from whisper_meft import (
    AdapterConfig,
    BitFitConfig,
    FullConfig,
    HeadConfig,
    LoRAConfig,
    data,
    get_meft_model,
)
from whisper_meft.commands.cli import main
from whisper_meft.data import ExampleSet, TranscriptTokens
from whisper_meft.errors import UserError
from whisper_meft.feature_cache.dataset import CachedCollator, CachedDataset
from whisper_meft.feature_cache.filling import prepare_cache
from whisper_meft.feature_cache.key import key_of
from whisper_meft.feature_cache.store import FeatureCache
from whisper_meft.model.backbone import load_backbone, set_labels

VOCABULARY, WINDOW, WIDTH = 400, 50, 32
WORDS = ["Ja.", "Nee, nooit!", "Goedemorgen", "hè?", "Zeker wel", "Dag"]
# Every method in every placement that it has.
EVERYWHERE = pytest.mark.parametrize(
    ("method", "placement"),
    [*((m, p) for m in CONFIGS for p in ("encoder", "decoder")), ("lst", "both"), ("unipt", "both")],
)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A backbone of 3 + 2 layers with a window of 1 s, 6 clips with transcripts, extractor and tokens."""
    folder = tmp_path_factory.mktemp("recogniser")
    backbone = make_backbone(folder / "backbone", encoder_layers=3)  # for its config and its extractor
    examples = data.load_examples(str(make_audio_folder(folder / "audio", 2)))
    examples = with_texts(examples, WORDS)
    extractor = WhisperFeatureExtractor.from_pretrained(backbone)
    return folder, examples, extractor, TranscriptTokens(spelling_tokenizer("dutch"), longest=24)


def with_texts(examples, words):
    said = [copy.copy(example) for example in examples]
    for example, text in zip(said, words):
        object.__setattr__(example, "text", text)
    return ExampleSet(said, examples.description)


def whisper(dtype=None, seed=0, **changes) -> WhisperForConditionalGeneration:
    torch.manual_seed(seed)
    sizes = {
        "d_model": WIDTH,
        "encoder_layers": 3,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
        "decoder_layers": 2,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 48,
        "num_mel_bins": 80,
        "max_source_positions": WINDOW,
        "max_target_positions": 24,
        "vocab_size": VOCABULARY,
        "pad_token_id": 256,
        "bos_token_id": 256,
        "eos_token_id": 256,
        "decoder_start_token_id": 257,
        "dropout": 0.5,
        "init_std": 0.3,
        **changes,
    }
    base = WhisperForConditionalGeneration(WhisperConfig(**sizes))
    return base if dtype is None else base.to(dtype)


def model_of(method="lst", placement="decoder", base=None, dtype=None, **options):
    config = CONFIGS[method](reduction_factor=2, placement=placement, **options)
    return randomise(get_meft_model(whisper(dtype) if base is None else base, config), std=0.1).train()


def online_batch(work, examples=None, dtype=torch.float32):
    _, all_examples, extractor, tokens = work
    dataset = data.SpeechDataset(examples or all_examples, extractor, tokens=tokens)
    batch = data.Collator(extractor, pad_token_id=tokens.end)([dataset[i] for i in range(len(dataset))])
    return batch | {"input_features": batch["input_features"].to(dtype)}


def cached_batch(work, model, folder, storage="exact", examples=None):
    _, all_examples, extractor, tokens = work
    examples = examples or all_examples
    cache = prepare_cache(folder, model, extractor, [examples], storage, progress=False, tokens=tokens)
    dataset = CachedDataset(examples, cache, model, tokens=tokens)
    return CachedCollator(tokens.end)([dataset[i] for i in range(len(dataset))])


def gradients(model, batch):
    model.zero_grad()
    output = model(**batch, return_logits=True)
    output.loss.backward()
    named = [(n, p.grad) for n, p in model.named_parameters() if p.requires_grad]
    return output, torch.cat([g.flatten() for n, g in named if n not in model.meft_config.without_gradient])


# ---------------------------------------------------------------- the same from a cache as from audio


@EVERYWHERE
@pytest.mark.parametrize("max_frames", ["fidelity", 48])
def test_an_exact_cache_gives_the_loss_and_the_gradients_of_audio(
    method, placement, max_frames, work, tmp_path
):
    model = model_of(method, placement, max_frames=max_frames)
    expected, wanted = gradients(model, online_batch(work))
    batch = cached_batch(work, model, tmp_path / "c")
    assert "input_features" not in batch and batch["labels"].shape == batch["decoder_input_ids"].shape
    output, found = gradients(model, batch)
    counted = batch["labels"] != -100
    torch.testing.assert_close(output.logits[counted], expected.logits[counted], rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(output.loss, expected.loss, rtol=2e-5, atol=2e-5)
    assert (found - wanted).norm() <= 1e-4 * wanted.norm()
    # Other states do give something else.
    other = batch | {"hidden_states": batch["hidden_states"].flip(0)}
    changed = model(**other, return_logits=True).logits
    assert not torch.allclose(changed[counted], expected.logits[counted], rtol=1e-2, atol=1e-2)


@EVERYWHERE
def test_in_double_precision_it_is_the_same_but_for_the_last_digits(method, placement, work, tmp_path):
    model = model_of(method, placement, dtype=torch.float64, backbone_dtype="float64").double()
    expected, wanted = gradients(model, online_batch(work, dtype=torch.float64))
    output, found = gradients(model, cached_batch(work, model, tmp_path / "c"))
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-12, atol=0)
    assert (found - wanted).norm() <= 1e-10 * wanted.norm()


@pytest.mark.parametrize("placement", ["encoder", "decoder"])
def test_sherl_gives_the_very_bits(placement, work, tmp_path):
    """As in classification: LST and UniPT take stored statistics of h_L, whose rounding is another."""
    model = model_of("sherl", placement)
    one = ExampleSet(list(work[1])[:1], "one")
    expected, wanted = gradients(model, online_batch(work, one))
    output, found = gradients(model, cached_batch(work, model, tmp_path / "c", examples=one))
    assert torch.equal(output.loss, expected.loss) and torch.equal(found, wanted)


@pytest.mark.parametrize(("storage", "tolerance"), [("bfloat16", 0.02), ("int8", 0.03), ("fp8", 0.1)])
@EVERYWHERE
def test_rounded_states_give_nearly_the_same(method, placement, storage, tolerance, work, tmp_path):
    model = model_of(method, placement)
    expected, wanted = gradients(model, online_batch(work))
    output, found = gradients(model, cached_batch(work, model, tmp_path / "c", storage))
    counted = online_batch(work)["labels"] != -100
    error = (output.logits - expected.logits)[counted].norm()
    assert 0 < error <= tolerance * expected.logits[counted].norm()
    assert (found - wanted).norm() <= 3 * tolerance * wanted.norm()


def test_autocast_and_a_half_precision_backbone(work, tmp_path):
    for placement in ("encoder", "decoder", "both"):
        model = model_of("lst", placement, backbone_dtype="bfloat16")
        expected, _ = gradients(model, online_batch(work))
        batch = cached_batch(work, model, tmp_path / placement, None)
        assert batch["hidden_states"].dtype == torch.bfloat16
        output, _ = gradients(model, batch)
        torch.testing.assert_close(output.loss, expected.loss, rtol=2e-2, atol=2e-2)
        model = model_of("lst", placement)
        folder, tokens = tmp_path / f"{placement}-autocast", work[3]
        how = {"autocast": "bfloat16", "progress": False, "tokens": tokens}
        cache = prepare_cache(folder, model, work[2], [work[1]], "exact", **how)
        dataset = CachedDataset(work[1], cache, model, tokens=tokens)
        batch = CachedCollator(tokens.end)([dataset[i] for i in range(len(dataset))])
        online = online_batch(work)
        with torch.autocast("cpu", torch.bfloat16):
            found, expected = model(**batch).loss, model(**online).loss
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


@EVERYWHERE
def test_a_batch_neighbour_changes_nothing(method, placement, work, tmp_path):
    model = model_of(method, placement, dtype=torch.float64, backbone_dtype="float64").double()
    whole = cached_batch(work, model, tmp_path / "c")
    counts = (whole["labels"] != -100).sum(1)
    assert len(set(counts.tolist())) > 2
    alone = 0
    for i, example in enumerate(work[1]):
        batch = cached_batch(work, model, tmp_path / "c", None, ExampleSet([example], "one"))
        alone = alone + counts[i] * model(**batch).loss
    torch.testing.assert_close(alone / counts.sum(), model(**whole).loss, rtol=1e-9, atol=1e-10)


# ---------------------------------------------------------------- what is read and kept


@pytest.mark.parametrize(
    ("method", "placement", "options", "part", "layers"),
    [
        ("lst", "encoder", {}, "encoder", (0, 1, 2, 3)),
        ("lst", "encoder", {"layers": [2]}, "encoder", (0, 2, 3)),  # h_3 is what is corrected
        ("unipt", "encoder", {"layers": [1, 3]}, "encoder", (0, 1, 3)),
        ("sherl", "encoder", {}, "encoder", (0, 1, 2)),
        ("lst", "both", {}, "encoder", (0, 1, 2, 3)),
        ("unipt", "both", {}, "encoder", (0, 1, 2, 3)),
        ("lst", "decoder", {}, "decoder", (0, 1, 2)),
        ("unipt", "decoder", {"layers": [1]}, "decoder", (0, 1, 2)),
        ("sherl", "decoder", {}, "encoder", (3,)),
    ],
)
def test_what_each_placement_reads(method, placement, options, part, layers, work, tmp_path):
    model = model_of(method, placement, **options)
    assert (model.states_of, model.states_read) == (part, layers)
    batch = cached_batch(work, model, tmp_path / "c")
    tokens = batch["labels"].shape[1]
    along = tokens if part == "decoder" else WINDOW
    assert batch["hidden_states"].shape == (6, len(layers), along, WIDTH)
    expected, wanted = gradients(model, online_batch(work))
    output, found = gradients(model, batch)
    torch.testing.assert_close(output.loss, expected.loss, rtol=2e-5, atol=2e-5)
    assert (found - wanted).norm() <= 1e-4 * wanted.norm()
    if part == "decoder":  # trimmed to each clip's own
        cache, said = FeatureCache(tmp_path / "c"), [len(work[3](e)["labels"]) for e in work[1]]
        assert batch["hidden_state_lengths"].tolist() == said and len(set(said)) > 3
        assert cache.bytes_on_disk < 6 * len(layers) * tokens * WIDTH * 4


@pytest.mark.parametrize(
    "config",
    [
        FullConfig(target="decoder"),
        BitFitConfig(target="decoder"),
        AdapterConfig(target="decoder", adapter_dim=8),
        LoRAConfig(target="decoder", r=4),
    ],
    ids=lambda config: config.method,
)
def test_what_trains_inside_the_decoder_reads_the_last_state_of_the_encoder(config, work, tmp_path):
    model = get_meft_model(whisper(dropout=0.0), config).train()
    assert (model.states_of, model.states_read) == ("encoder", (3,))
    expected, wanted = gradients(model, online_batch(work))
    output, found = gradients(model, cached_batch(work, model, tmp_path / "c"))
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-6, atol=0)
    assert wanted.norm() > 0 and (found - wanted).norm() <= 1e-5 * wanted.norm()
    for target in ("encoder", "both"):
        other = get_meft_model(whisper(), type(config)(target=target))
        with pytest.raises(UserError, match=f"ahead for {config.method} of the encoder, .* target='decoder'"):
            prepare_cache(tmp_path / target, other, work[2], [work[1]], progress=False, tokens=work[3])


def test_no_layer_runs_that_need_not(work, tmp_path):
    for placement, encoder, decoder in (("encoder", 0, 2), ("both", 0, 2), ("decoder", 0, 0)):
        model = model_of("lst", placement)
        batch = cached_batch(work, model, tmp_path / placement)
        ran = {"encoder": 0, "decoder": 0}

        def count(module, *_, ran=ran):
            ran[module.part] += 1

        for part in ran:
            for layer in getattr(model, part).layers:
                layer.fc1.part = part
                layer.fc1.register_forward_hook(count)
        with torch.no_grad():
            model(**batch)
        assert ran["encoder"] == encoder and (ran["decoder"] > 0) == (decoder > 0)


def test_a_cache_of_the_whole_window_serves_classification_too(work, tmp_path):
    folder, examples, extractor, _ = work
    backbone = whisper()
    backbone.save_pretrained(tmp_path / "backbone")
    classifier = load_backbone(tmp_path / "backbone")
    set_labels(classifier, ["high", "low", "middle"])
    unlabelled = with_texts(examples, [None] * 6)
    reads_less = get_meft_model(classifier, HeadConfig())
    model = model_of("lst", "encoder", base=backbone)
    cached_batch(work, model, tmp_path / "c")
    cache = prepare_cache(tmp_path / "c", reads_less, extractor, [unlabelled], progress=False)
    assert len(cache) == 6 and len(list((tmp_path / "c").glob("shard-*.json"))) == 1  # nothing was added
    # With a number of frames a classifier leaves padding out and a recogniser hears it.
    keys = [key_of(each, extractor)["max_frames"] for each in (reads_less, model)]
    assert keys == ["fidelity", "fidelity"]
    shorter = get_meft_model(classifier, HeadConfig(max_frames=48)), model_of("lst", "encoder", max_frames=48)
    keys = [key_of(each, extractor)["max_frames"] for each in shorter]
    assert keys == [48, "48 of every clip, padding heard"]


def test_sound_behind_max_frames_is_named(work, tmp_path):
    model = model_of("lst", "decoder", max_frames=10)
    with pytest.raises(
        UserError, match=r"wav: a clip has sound up to frame \d+ of its log-mel, max_frames 10"
    ):
        cached_batch(work, model, tmp_path / "c")


# ---------------------------------------------------------------- nothing stale is read


def test_another_transcript_is_computed_anew_and_never_read_from_the_old_one(work, tmp_path):
    _, examples, extractor, tokens = work
    model = model_of()
    cached_batch(work, model, tmp_path / "c")
    changed = with_texts(examples, ["Ja!", *WORDS[1:]])
    cache = FeatureCache(tmp_path / "c")
    with pytest.raises(UserError, match="lacks 1 of 6 clips with their present transcripts of .*0.wav: fill"):
        CachedDataset(changed, cache, model, tokens=tokens)
    batch = cached_batch(work, model, tmp_path / "c", None, changed)
    assert len(FeatureCache(tmp_path / "c")) == 7
    torch.testing.assert_close(
        model(**batch).loss, model(**online_batch(work, changed)).loss, rtol=2e-5, atol=2e-5
    )
    # The first transcript is still there, and known without decoding the audio again.
    assert len(CachedDataset(examples, FeatureCache(tmp_path / "c"), model, tokens=tokens)) == 6


def test_states_of_the_encoder_do_not_depend_on_the_transcript(work, tmp_path):
    model = model_of("lst", "encoder")
    before = cached_batch(work, model, tmp_path / "c")
    changed = with_texts(work[1], WORDS[::-1])
    after = cached_batch(work, model, tmp_path / "c", None, changed)
    assert torch.equal(before["hidden_states"], after["hidden_states"])
    assert not torch.equal(before["labels"], after["labels"])
    assert len(list((tmp_path / "c").glob("shard-*.json"))) == 1


def test_a_cache_of_another_decoder_language_or_part_is_refused_by_name(work, tmp_path):
    folder, examples, extractor, tokens = work
    model = model_of()
    cache = prepare_cache(tmp_path / "c", model, extractor, [examples], progress=False, tokens=tokens)
    other = model_of()
    with torch.no_grad():
        other.decoder.layers[1].encoder_attn.q_proj.bias[3] += 1e-3
    heads = model_of(base=whisper(decoder_attention_heads=4))
    german = TranscriptTokens(spelling_tokenizer("german"), longest=24)
    translated = TranscriptTokens(spelling_tokenizer("dutch", task="translate"), longest=24)
    cases = [
        (other, tokens, "stale: the decoder's weights are others;"),
        (heads, tokens, "the decoder's config's decoder_attention_heads was 2, now it is 4"),
        (model, german, r"prompt .* was <\|startoftranscript\|><\|nl\|>.*, now it is .*<\|de\|>"),
        (model, translated, r"prompt .* was .*<\|transcribe\|>.*, now it is .*<\|translate\|>"),
        (model_of("lst", "encoder"), tokens, "holds states of the decoder, those of the encoder are needed"),
        (model_of(max_frames=48), tokens, "max_frames was fidelity, now it is 48"),
        (model_of(backbone_dtype="bfloat16"), tokens, "backbone_dtype was float32, now it is bfloat16"),
        (model, None, "tokens are needed to cache states of the decoder"),
    ]
    for each, given, message in cases:
        with pytest.raises(UserError, match=message):
            prepare_cache(tmp_path / "c", each, extractor, [examples], progress=False, tokens=given)
    with pytest.raises(UserError, match="lacks 6 of 6 clips with their present transcripts"):
        CachedDataset(examples, cache, model, tokens=german)  # as whoever skips prepare_cache would
    with pytest.raises(UserError, match="tokens are needed for states of the decoder"):
        CachedDataset(examples, cache, model)
    with pytest.raises(UserError, match="holds states of the decoder, those of the encoder are needed"):
        CachedDataset(examples, cache, model_of("lst", "encoder"), tokens=tokens)
    with pytest.raises(UserError, match="label2id is for classes and tokens for transcripts"):
        CachedDataset(examples, cache, model, {"high": 0}, tokens)
    encoder_cache = prepare_cache(
        tmp_path / "e", model_of("lst", "encoder"), extractor, [examples], progress=False
    )
    with pytest.raises(UserError, match="holds states of the encoder, those of the decoder are needed"):
        prepare_cache(tmp_path / "e", model, extractor, [examples], progress=False, tokens=tokens)
    with pytest.raises(UserError, match="have no transcript"):
        nothing = with_texts(examples, [None] * 6)
        CachedDataset(nothing, encoder_cache, model_of("lst", "encoder"), tokens=tokens)


def test_transcripts_that_cannot_be_used_are_named_before_any_work(work, tmp_path):
    _, examples, extractor, tokens = work
    too_long = with_texts(examples, [*WORDS[:5], "x" * 30])
    with pytest.raises(
        UserError, match="1.wav has 30 tokens; with the prompt's 4 the decoder reads at most 24"
    ):
        prepare_cache(tmp_path / "c", model_of(), extractor, [too_long], progress=False, tokens=tokens)
    assert not list((tmp_path / "c").glob("shard-*"))


# ---------------------------------------------------------------- bad arguments of forward

SHORTER = {"hidden_states": torch.zeros(6, 4, 49, 32), "hidden_state_statistics": None}


@pytest.mark.parametrize(
    ("placement", "change", "message"),
    [
        ("decoder", {"hidden_states": torch.zeros(3)}, r"hidden_states must be .* \(batch, 3, tokens, 32\)"),
        ("decoder", {"hidden_states": torch.zeros(())}, r"hidden_states must be .* \(batch, 3, tokens, 32\)"),
        ("encoder", {"hidden_states": [1]}, "hidden_states must be a torch.Tensor"),
        ("both", {"hidden_states": torch.zeros(6, 3, 50, 32)}, "the layers 0, 1, 2, 3 in this order"),
        ("encoder", SHORTER, "hidden_states must have 50 frames, the backbone's whole window, got 49"),
        ("encoder", {"hidden_state_lengths": torch.tensor([50] * 5 + [30])}, "must all be 50 .* got 30"),
        (
            "decoder",
            {"hidden_state_lengths": torch.tensor([3] * 6)},
            "labels must be -100 behind hidden_state_l",
        ),
        ("decoder", {"hidden_state_lengths": torch.ones(5)}, "hidden_state_lengths must be 6 integers"),
        (
            "decoder",
            {"labels": torch.full((6, 3), 5), "decoder_input_ids": None},
            "must have the 3 tokens of",
        ),
        (
            "decoder",
            {"labels": torch.full((5, 3), 5)},
            r"labels must be token numbers of shape \(6, tokens\)",
        ),
        ("decoder", {"labels": None, "decoder_input_ids": None}, "labels or decoder_input_ids are needed"),
        (
            "decoder",
            {"decoder_attention_mask": torch.ones(6, 3)},
            "decoder_attention_mask must be None beside",
        ),
        ("decoder", {"hidden_state_scales": torch.zeros(6, 3, 2, 32)}, "hidden_state_scales only go with"),
        (
            "encoder",
            {"hidden_state_statistics": torch.zeros(6, 4, 50, 1)},
            "hidden_state_statistics must have",
        ),
        (
            "encoder",
            {"input_features": torch.zeros(6, 80, 100)},
            "one of input_features, encoder_outputs and h",
        ),
        ("encoder", {"encoder_outputs": (torch.zeros(6, 50, 32),)}, "one of input_features, encoder_outputs"),
    ],
)
def test_bad_inputs_are_named(placement, change, message, work, tmp_path):
    model = model_of("lst", placement)
    batch = cached_batch(work, model, tmp_path / "c")
    with pytest.raises(UserError, match=message):
        model(**{**batch, **change})


@EVERYWHERE
def test_it_learns_from_a_cache_and_the_backbone_keeps_every_bit(method, placement, work, tmp_path):
    base = whisper()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = get_meft_model(base, CONFIGS[method](reduction_factor=2, placement=placement))
    batch = cached_batch(work, model, tmp_path / "c")
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        losses.append(model(**batch).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.05
    assert all(torch.equal(before[name], tensor) for name, tensor in base.state_dict().items())
    model.eval().generate(online_batch(work)["input_features"], max_new_tokens=3)


# ---------------------------------------------------------------- whisper-meft cache --task transcribe


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """whisper/, with a tokenizer, and train.csv of 6 clips with transcripts."""
    folder = tmp_path_factory.mktemp("command")
    make_recogniser(folder / "whisper")
    make_transcripts(folder / "train.csv", make_audio_folder(folder / "train", 2))
    return folder


def cache_command(folders, output, **options):
    options = {
        "model_name_or_path": folders / "whisper",
        "train_data": folders / "train.csv",
        "output_dir": output,
        "task": "transcribe",
        "language": "nl",
        "reduction_factor": 2,
        "disable_tqdm": True,
        "eval_data": folders / "train.csv",
        **options,
    }
    return ["cache", *(f"--{name}={value}" for name, value in options.items() if value is not None)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"placement": "decoder"}, r"holds 6 clips, layers [\d, ]+ of the decoder as bfloat16"),
        ({"placement": "encoder"}, r"holds 6 clips, layers 0, 1[\d, ]* as bfloat16"),
        ({"method": "unipt", "placement": "both"}, r"holds 6 clips, layers 0, 1[\d, ]* as bfloat16"),
        (
            {"method": "full", "target": "decoder", "reduction_factor": None},
            r"6 clips, layers \d as bfloat16",
        ),
    ],
)
def test_the_command_fills_what_training_reads(options, said, folders, tmp_path, capsys):
    assert main(cache_command(folders, tmp_path / "c", **options)) == 0
    printed = capsys.readouterr().out
    assert re.search(said, printed), printed
    assert main(cache_command(folders, tmp_path / "c", **options)) == 0
    assert "all 6 clips are there" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"language": None}, "language is needed to transcribe with a multilingual Whisper"),
        ({"language": "klingon"}, "language must be one of this Whisper's"),
        ({"task": "classify"}, "language: 'nl' is of transcripts: give --task transcribe"),
        ({"method": "full", "reduction_factor": None}, "method: full trains inside the encoder"),
        ({"placement": "both", "method": "sherl"}, "placement must be 'encoder' or 'decoder' for sherl"),
    ],
)
def test_the_command_refuses_in_one_line(options, message, folders, tmp_path, capsys):
    assert main(cache_command(folders, tmp_path / "c", **options)) != 0
    error = capsys.readouterr().err
    assert message in error and error.startswith("whisper-meft: error: ") and error.count("\n") == 1


def test_the_command_keeps_languages_apart(folders, tmp_path, capsys):
    assert main(cache_command(folders, tmp_path / "c", placement="decoder")) == 0
    assert main(cache_command(folders, tmp_path / "c", placement="decoder", language="german")) != 0
    assert "is stale: the prompt before a transcript (language and task) was" in capsys.readouterr().err
