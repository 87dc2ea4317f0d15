"""The sizes of the published Whisper encoders, so that nothing has to be downloaded to know them."""

import copy
from typing import NamedTuple

from transformers import WhisperConfig

from ..errors import UserError


class EncoderSizes(NamedTuple):
    """Width, layers, attention heads, inner width of the feed-forward block and mel bins of an encoder."""

    width: int
    layers: int
    heads: int
    inner: int
    mels: int = 80


WHISPER_SIZES = {
    "tiny": EncoderSizes(384, 4, 6, 1536),
    "base": EncoderSizes(512, 6, 8, 2048),
    "small": EncoderSizes(768, 12, 12, 3072),
    "medium": EncoderSizes(1024, 24, 16, 4096),
    "large": EncoderSizes(1280, 32, 20, 5120),
    "large-v2": EncoderSizes(1280, 32, 20, 5120),
    "large-v3": EncoderSizes(1280, 32, 20, 5120, mels=128),
}


# Tokens of the multilingual models; large-v3 has one language more.
VOCABULARY = 51865


def whisper_config(
    model: str | WhisperConfig,
    num_labels: int | None = None,
    frames: int | None = None,
    decoder: bool = False,
) -> WhisperConfig:
    """The config of a published Whisper: of its encoder with a small decoder, which a classifier does not
    build, or of the whole.

    Args:
        model: a name in ``WHISPER_SIZES``, also with ``whisper-`` or ``openai/whisper-`` before it, or a
            config to be copied.
        num_labels: classes of the head. frames: encoder frames of the window; default 1500 or the config's.
        decoder: whether a name stands for the multilingual model with its decoder, as large as the encoder.

    Raises:
        UserError: no such name, or ``frames`` is not positive.
    """
    if frames is not None and (isinstance(frames, bool) or not isinstance(frames, int) or frames < 1):
        raise UserError(f"frames must be a positive integer, got {frames!r}")
    if isinstance(model, WhisperConfig):
        config = copy.deepcopy(model)
    else:
        name = str(model).removeprefix("openai/").removeprefix("whisper-")
        if name not in WHISPER_SIZES:
            raise UserError(f"model must be one of {', '.join(WHISPER_SIZES)}, got {model!r}")
        sizes = WHISPER_SIZES[name]
        config = WhisperConfig(
            d_model=sizes.width,
            encoder_layers=sizes.layers,
            encoder_attention_heads=sizes.heads,
            encoder_ffn_dim=sizes.inner,
            num_mel_bins=sizes.mels,
            decoder_layers=1,
        )
        if decoder:
            config.decoder_layers, config.decoder_attention_heads = sizes.layers, sizes.heads
            config.decoder_ffn_dim = sizes.inner
            config.vocab_size = VOCABULARY + (name == "large-v3")
    if frames is not None:
        config.max_source_positions = frames
    if num_labels is not None:
        config.num_labels = num_labels
    return config
