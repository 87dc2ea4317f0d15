"""What hidden states depend on: of a cache the backbone and how it is run, of a clip its source."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch

from ..audio import VERSION as READING
from ..data.augmenter import VERSION as AUGMENTING
from ..data.augmenter import Augmenter
from ..data.examples import Example
from ..data.transcripts import TranscriptTokens
from ..encoder.frozen import FrozenEncoder
from ..encoder.quantization import REVISION, weights_digest
from ..errors import UserError
from ..model.base import MeftBase

FORMAT = 2  # 1 had no checksums of indices and no config of the backbone

_SAMPLE_BYTES = 2**14

KEY_NAMES = {
    "format": "the format of the cache",
    "reading": "the version of how audio is read",
    "backbone": "the backbone's weights",
    "backbone_config": "the backbone's config",
    "backbone_dtype": "backbone_dtype",
    "backbone_quantization": "backbone_quantization",
    "autocast": "autocast (bf16, fp16)",
    "feature_extractor": "the feature extractor",
    "max_frames": "max_frames",
    "decoder": "the decoder's weights",
    "decoder_config": "the decoder's config",
    "prompt": "the prompt before a transcript (language and task)",
}

# Entries that hash weights.
WEIGHTS = ("backbone", "decoder")


def key_of(
    model: MeftBase,
    feature_extractor: Any,
    autocast: str | None = None,
    tokens: TranscriptTokens | None = None,
) -> dict[str, Any]:
    """What the states that ``model`` reads depend on beside the clips; plain JSON values.

    Args:
        model: see :func:`cache_key` for ``feature_extractor`` and ``autocast``.
        tokens: of the transcripts; needed for states of the decoder.

    Raises:
        UserError: see :func:`cache_key`; or ``tokens`` are needed.
    """
    max_frames = model.meft_config.max_frames
    if model.task == "transcription" and max_frames != "fidelity":
        max_frames = f"{max_frames} of every clip, padding heard"  # as none is for classification
    key = cache_key(model.encoder, feature_extractor, max_frames, autocast)
    if model.states_of == "encoder":
        return key
    if tokens is None:
        raise UserError("tokens are needed to cache states of the decoder, which are those of a transcript")
    decoder = model.decoder
    weights = {name: w for name, w in decoder.state_dict().items() if not name.startswith("proj_out.")}
    attention = decoder.layers[0].self_attn
    config = {
        "decoder_attention_heads": attention.num_heads,
        "attention_scaling": attention.scaling,
        "activation_function": str(decoder.config.activation_function),
        "scale_embedding": bool(decoder.config.scale_embedding),
        "layer_norm_eps": decoder.layer_norm.eps,
    }
    prompt = "".join(tokens.tokenizer.convert_ids_to_tokens(tokens.prompt))
    return {
        **key,
        "states": model.states_of,
        "decoder": weights_digest(weights),
        "decoder_config": config,
        "prompt": prompt,
    }


def cache_key(
    encoder: FrozenEncoder, feature_extractor: Any, max_frames: int | str, autocast: str | None = None
) -> dict[str, Any]:
    """What the encoder's states of a clip depend on beside the clip itself; plain JSON values.

    Args:
        encoder: the frozen backbone; all its weights are hashed, as they were before quantisation.
        feature_extractor: a ``WhisperFeatureExtractor``.
        max_frames: as in :class:`whisper_meft.MeftConfig`.
        autocast: number format that float32 weights are run in, or None.

    Raises:
        UserError: features that are different each time.
    """
    if getattr(feature_extractor, "dither", 0.0):
        raise UserError(
            f"features cannot be cached with dither={feature_extractor.dither} in the feature extractor: it "
            "makes them different in every epoch; set dither to 0"
        )
    ignored = ("feature_extractor_type", "processor_class", "return_attention_mask", "padding_side")
    options = {k: v for k, v in feature_extractor.to_dict().items() if k not in ignored}
    return {
        "format": FORMAT,
        "reading": READING,
        "backbone": encoder.original.digest if encoder.original else weights_digest(encoder.backbone_state()),
        "backbone_config": _beside_the_weights(encoder),
        "backbone_dtype": str(encoder.dtype).removeprefix("torch."),
        "backbone_quantization": encoder.quantization and f"{encoder.quantization}, revision {REVISION}",
        "autocast": autocast if encoder.dtype == torch.float32 and not encoder.quantization else None,
        "feature_extractor": json.loads(json.dumps(options, sort_keys=True, default=str)),
        "max_frames": max_frames,
    }


def _beside_the_weights(encoder: FrozenEncoder) -> dict[str, Any]:
    """What the encoder computes with that neither its weights nor their shapes show. Which attention kernel
    runs is not part of it: they differ by rounding, as devices do."""
    attention = encoder.layers[0].self_attn
    return {
        "encoder_attention_heads": attention.num_heads,
        "attention_scaling": attention.scaling,
        "activation_function": str(encoder.config.activation_function),
        "layer_norm_eps": encoder.layer_norm.eps,
    }


# Between what a fingerprint says of a clip's source, of how it was augmented, and of the tokens of its
# transcript.
_AUGMENTED, _AND_TOKENS = ", augmented ", ", tokens "


def copy_fingerprints(
    examples: Sequence[Example], augment: Augmenter | None = None, copies: int = 1
) -> list[str]:
    """What tells the sources of clips from others, as :func:`clip_fingerprint` does; with ``augment`` those
    of so many augmented copies of each, all clips of one copy and then all of the next.

    Raises:
        UserError: a source, or a recording that is mixed in, cannot be read.
    """
    sources = [clip_fingerprint(example) for example in examples]
    if augment is None:
        return sources
    digest = _augmentation_digest(augment)
    return [f"{source}{_AUGMENTED}{digest} {copy}" for copy in range(copies) for source in sources]


def _augmentation_digest(augment: Augmenter) -> str:
    """What clips become by it beside what they are: its settings and seed, and the recordings' sources."""
    told: dict[str, Any] = {"version": AUGMENTING, **augment.settings.as_dict(), "seed": augment.seed}
    for name, found in (("noises", augment.noises), ("rooms", augment.rooms)):
        if found is not None:
            told[name] = [clip_fingerprint(recording) for recording in found]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:32]


def token_fingerprint(source: str, decoder_input_ids: Sequence[int]) -> str:
    """What tells the states of a transcript's tokens from others; ``source``: :func:`clip_fingerprint`."""
    numbers = " ".join(str(int(token)) for token in decoder_input_ids)
    return f"{source}{_AND_TOKENS}{hashlib.sha256(numbers.encode()).hexdigest()[:32]}"


def source_of(fingerprint: str) -> str:
    """What a fingerprint says of the clip's source, however it was augmented, whatever its transcript."""
    return fingerprint.partition(_AND_TOKENS)[0].partition(_AUGMENTED)[0]


def clip_fingerprint(example: Example) -> str:
    """What tells a clip's source from another of the same name: size, time of change and some of the bytes of
    its file, or a hash of its content where it comes from elsewhere; and which part of it is meant.

    Raises:
        UserError: the source cannot be read.
    """
    source = example.value()
    told = ("audio", "label", "speaker", "text", "name", "seconds", "window", "inside", "spans")
    part = " ".join(str(getattr(example, each.name)) for each in fields(example) if each.name not in told)
    if example.window is not None:
        part += f" window {example.window}"
    if isinstance(source, dict):
        part += f" at {source.get('sampling_rate')} Hz"
        source = next((source[k] for k in ("bytes", "array", "raw", "path") if source.get(k) is not None), "")
    if isinstance(source, str | os.PathLike):
        try:
            return f"{_about_file(source)}, {part}"
        except OSError as error:
            raise UserError(f"{example.name}: cannot read the file: {error.strerror}") from error
    if not isinstance(source, bytes):
        values = np.ascontiguousarray(source)
        part += f" {values.dtype} {values.shape}"
        source = values.tobytes()
    return f"{hashlib.sha256(source).hexdigest()}, {part}"


def _about_file(path: str | os.PathLike) -> str:
    # Unpacked archives give many files one time, and clips cut to one length one size.
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        about = os.fstat(file.fileno())
        for place in (0, about.st_size // 2, max(0, about.st_size - _SAMPLE_BYTES)):
            file.seek(place)
            digest.update(file.read(_SAMPLE_BYTES))
    return f"{about.st_size} bytes of {about.st_mtime_ns}, {digest.hexdigest()[:32]}"
