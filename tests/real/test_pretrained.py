"""Pretrained Whisper and, where there are some, recordings: see "On pretrained Whisper" in CONTRIBUTING.md.

What computes the same as PyTorch is held against Hugging Face's modules in float64, with the error that those
make themselves in float32 as the yardstick.
"""

import os
from pathlib import Path

import pytest
import torch
from torch import nn
from training_fixtures import make_audio_folder, make_manifest
from transformers import WhisperFeatureExtractor
from whisper_meft import FrozenEncoder, LSTConfig, MeftConfig, MeftModel, get_meft_model
from whisper_meft.data import Collator, SpeechDataset, check_audio, load_examples
from whisper_meft.feature_cache.dataset import CachedCollator, CachedDataset
from whisper_meft.feature_cache.filling import prepare_cache
from whisper_meft.model.backbone import load_backbone, set_labels

from meft_kernels import use_backend

pytestmark = pytest.mark.real

CLIPS = 3
LABELS = {"a": 0, "b": 1, "c": 2}
SECONDS = 4  # of each clip in training steps
SIDE_NETWORKS = ("lst", "unipt", "sherl")


@pytest.fixture(scope="module")
def folder():
    return os.environ["MEFT_WHISPER"]


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """Three clips of a label each: the shortest and the longest of ``MEFT_SPEECH`` and one between."""
    here = tmp_path_factory.mktemp("speech")
    spoken = os.environ.get("MEFT_SPEECH")
    if spoken:
        files = [p for p in Path(spoken).rglob("*") if p.suffix.lower() in (".wav", ".flac", ".mp3", ".ogg")]
        assert len(files) >= CLIPS, f"MEFT_SPEECH must name a folder with {CLIPS} recordings, got {spoken}"
        files.sort(key=lambda path: (path.stat().st_size, path.name))
        chosen = files[:: max(1, (len(files) - 1) // (CLIPS - 1))][:CLIPS]
        rows = []
        for path, label in zip(chosen, LABELS):  # by names that say nothing, such as one of a split
            (here / f"{label}{path.suffix}").symlink_to(path.resolve())
            rows.append(f"{label}{path.suffix},{label}")
        (here / "clips.csv").write_text("\n".join(["path,label", *rows]) + "\n")
        return load_examples(here / "clips.csv")
    make_manifest(here / "clips.csv", make_audio_folder(here / "audio", 1), 1)
    text = (here / "clips.csv").read_text()
    for tone, label in zip(("high", "low", "middle"), LABELS):
        text = text.replace(f",{tone},", f",{label},")
    (here / "clips.csv").write_text(text)
    return load_examples(here / "clips.csv")


@pytest.fixture(scope="module")
def clips(folder, examples):
    """Log-mel padded to the window (N, mel bins, frames), and the frames of each clip (N,)."""
    extractor = WhisperFeatureExtractor.from_pretrained(folder)
    items = list(SpeechDataset(examples, extractor, None, "fidelity"))
    features = torch.stack([item["input_features"] for item in items])
    return features, torch.tensor([item["length"] for item in items])


@pytest.fixture(scope="module")
def short(clips):
    """As ``clips``, of a few seconds and no longer than the longest."""
    lengths = clips[1].clamp(max=50 * SECONDS)
    return clips[0][..., : 2 * int(lengths.max())].contiguous(), lengths


@torch.no_grad()
def plain_states(encoder, mel):
    """h_0 to h_L of one clip (mel bins, frames) through Hugging Face's modules, with its final norm."""
    states = nn.functional.gelu(encoder.conv1(mel[None].to(encoder.conv1.weight.dtype)))
    states = nn.functional.gelu(encoder.conv2(states)).mT
    states = states + encoder.embed_positions.weight[: states.shape[1]]
    found = [states]
    for layer in encoder.layers:
        output = layer(states, None)
        states = output if isinstance(output, torch.Tensor) else output[0]
        found.append(states)
    return [*found[:-1], encoder.layer_norm(found[-1])]


def off(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("padded", [True, False])
def test_the_encoder_is_hugging_faces(folder, clips, padded):
    features, lengths = clips
    single, double = (
        load_backbone(folder, dtype=dtype).encoder.eval() for dtype in (torch.float32, torch.float64)
    )
    encoder = FrozenEncoder(single)
    clip = int(lengths.argmin())
    frames = features.shape[-1] if padded else 2 * int(lengths[clip])
    mel = features[clip, :, :frames]
    exact, theirs = plain_states(double, mel), plain_states(single, mel)
    if padded:  # and those are what the encoder as a whole gives
        whole = single(mel[None], output_hidden_states=True).hidden_states
        for state, expected in zip(whole, theirs, strict=True):
            torch.testing.assert_close(state, expected)
    for backend in ("reference", "auto"):
        with use_backend(backend):
            if padded:
                states = encoder.stream(features[clip : clip + 1], final_norm=True)
                found = [state[0] for state in states]
            else:  # among its neighbours
                mels = features[..., : 2 * int(lengths.max())]
                found = [s[clip, : lengths[clip]] for s in encoder.stream(mels, lengths, final_norm=True)]
        for layer, (state, of_theirs, expected) in enumerate(zip(found, theirs, exact, strict=True)):
            bound = 3 * off(of_theirs[0], expected[0]) + 1e-6
            assert off(state, expected[0]) <= bound, (backend, layer)


def step(folder, method, short, dtype=torch.float32, backend="auto", states=None, **options):
    """Loss and gradients by name of one training step, in float32 or float64, from the same start; with
    ``states`` (B, S, T, D) from those in place of the encoder's own."""
    options |= {"reduction_factor": 8} if method in SIDE_NETWORKS else {}
    options |= {"lora_dropout": 0.0} if method in ("lora", "lora_plus", "adalora") else {}
    base = load_backbone(folder, dtype=torch.float32)
    set_labels(base, list(LABELS))
    torch.manual_seed(0)
    for linear in (base.projector, base.classifier):
        nn.init.normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)
    config = MeftConfig.from_dict({"method": method, "max_frames": "longest", **options})
    model = get_meft_model(base, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # away from zeros behind which nothing has a gradient
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad and not parameter.any():
                parameter.normal_(std=0.02, generator=generator)
    model.to(dtype)
    features, lengths = short
    mask = (torch.arange(features.shape[-1]) < 2 * lengths[:, None]).long()
    if method == "mezo":  # has no gradient, and refuses to be asked for one
        model.eval()
    inputs = {"input_features": features.to(dtype), "attention_mask": mask}
    if states is not None:
        inputs = {"hidden_states": states.to(dtype), "hidden_state_lengths": lengths}
    with use_backend(backend):
        loss = model(**inputs, labels=torch.arange(CLIPS)).loss
        if method != "mezo":
            loss.backward()
    named = sorted(model.named_parameters())
    return loss.double(), {name: p.grad.flatten().double() for name, p in named if p.grad is not None}


def joined(grads):
    return torch.cat(list(grads.values()))


@torch.no_grad()
def own_states(folder, short):
    """(B, S, T, D), what the encoder as it is used gives in float32."""
    encoder = FrozenEncoder(load_backbone(folder, dtype=torch.float32).encoder.eval())
    return torch.stack([state.clone() for state in encoder.stream(*short)], 1)


@pytest.mark.parametrize("method", sorted(MeftConfig.methods()))
def test_a_step_is_finite_and_its_gradient_right(folder, short, method):
    if method in ("lora", "lora_plus", "adalora"):
        pytest.importorskip("peft")
    # UniPT's gradient jumps where rounding takes a score across 0: its bounds are for the very same states.
    states = own_states(folder, short) if method == "unipt" else None
    exact, expected = step(folder, method, short, torch.float64, "reference", states)
    loss, found = step(folder, method, short)
    assert loss.isfinite() and off(loss, exact) < 1e-4
    if method == "mezo":
        return
    found, expected = joined(found), joined(expected)
    assert found.isfinite().all() and found.norm() > 0
    theirs = joined(step(folder, method, short, backend="reference", states=states)[1])
    assert off(found, expected) <= 3 * off(theirs, expected) + 1e-5


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("method", SIDE_NETWORKS)
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_gradients_from_eight_bits_point_where_exact_ones_do(folder, clips, short, method, padded, kind):
    heard = (clips[0], torch.full_like(clips[1], clips[0].shape[-1] // 2)) if padded else short
    (loss, exact), (same, rounded) = (
        step(folder, method, heard, saved_activations=keep) for keep in ("exact", kind)
    )
    assert same == loss
    # A cosine needs more than one element: the gates of a network are judged together.
    for grads in (exact, rounded):
        gates = [grads.pop(name) for name in list(grads) if grads[name].numel() == 1]
        grads |= {"gates": torch.cat(gates)} if gates else {}
    cosines = {
        name: nn.functional.cosine_similarity(grad, rounded[name], dim=0).item()
        for name, grad in exact.items()
        if grad.any()
    }
    least = min(cosines, key=cosines.get)
    print(f"{method}, {kind}, padded {padded}: least cosine {cosines[least]:.5f}, of {least}")
    assert any(not torch.equal(rounded[name], grad) for name, grad in exact.items())
    if (kind, method, padded) == ("fp8", "sherl", True) and 0.99 <= cosines[least] < 0.999:
        pytest.xfail(f"few frames decide {least}: {cosines[least]:.5f} with fp8, see docs/memory.md")
    assert cosines[least] >= 0.999, least


def test_saved_loaded_and_cached(folder, examples, tmp_path):
    checked, _ = check_audio(examples, progress=False)
    extractor = WhisperFeatureExtractor.from_pretrained(folder)
    base = load_backbone(folder, dtype=torch.float32)
    set_labels(base, list(LABELS))
    torch.manual_seed(0)
    model = get_meft_model(base, LSTConfig(max_frames="longest")).eval()
    model.save_pretrained(tmp_path / "model")
    online = SpeechDataset(checked, extractor, None, "longest")
    batch = Collator(extractor, "longest")([online[index] for index in range(CLIPS)])
    with torch.no_grad():
        expected = model(**batch).logits
        loaded = MeftModel.from_pretrained(tmp_path / "model")
        assert torch.equal(loaded(**batch).logits, expected)
        for saved, bound in (("exact", 1e-3), ("int8", 5e-3), ("fp8", 2e-2)):
            cache = prepare_cache(tmp_path / saved, model, extractor, [checked], saved, progress=False)
            dataset = CachedDataset(checked, cache, model, LABELS)
            batch = CachedCollator()([dataset[index] for index in range(CLIPS)])
            batch.pop("labels")
            found = model(None, **batch).logits
            assert (found - expected).norm() <= bound * expected.norm()


@pytest.mark.parametrize("padded", [True, False])
def test_int8_is_near(folder, clips, padded):
    features, lengths = clips
    of_clips = None if padded else lengths
    mels = features if padded else features[..., : 2 * int(lengths.max())]
    last = []
    for kind in (None, "int8"):
        encoder = FrozenEncoder(load_backbone(folder, dtype=torch.float32).encoder, None, kind)
        *_, state = encoder.stream(mels, of_clips, final_norm=True)
        last.append(state)
    valid = (
        torch.arange(state.shape[1]) < (lengths if not padded else torch.tensor(state.shape[1]))[..., None]
    )
    exact, found = (state[valid.expand(state.shape[:2])] for state in last)
    rows = (found - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert rows.median() < 0.035 and off(found, exact.double()) < 0.06
