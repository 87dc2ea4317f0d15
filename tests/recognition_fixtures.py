"""A tiny random Whisper that transcribes, and clips with tokens, shared by the tests of recognition."""

import torch
from modelling_fixtures import MELS, WINDOW, whisper_config
from transformers import GenerationConfig, WhisperForConditionalGeneration

TOKENS, VOCABULARY = 7, 20


def recogniser(seed=0, attn_implementation="sdpa", dtype=None, **changes) -> WhisperForConditionalGeneration:
    torch.manual_seed(seed)
    sizes = {"decoder_layers": 3, "max_target_positions": 16, "decoder_layerdrop": 0.5, **changes}
    base = WhisperForConditionalGeneration._from_config(
        whisper_config(**sizes), attn_implementation=attn_implementation
    )
    base.generation_config = GenerationConfig.from_model_config(base.config)
    base.generation_config.max_length = 12
    base.generation_config.no_timestamps_token_id = VOCABULARY - 1
    return base if dtype is None else base.to(dtype)


def clips(size=3, seed=0, dtype=torch.float32):
    """(input_features, labels), the labels of each clip but the first padded."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(size, MELS, 2 * WINDOW, generator=generator).to(dtype)
    labels = torch.randint(4, VOCABULARY - 1, (size, TOKENS), generator=generator)
    for i in range(1, size):
        labels[i, TOKENS - i :] = -100
    return features, labels


def logits(model, features, ids, **options):
    with torch.no_grad():
        return model(features, decoder_input_ids=ids, **options).logits


def ids_of(model, labels):
    return model.prepare_decoder_input_ids_from_labels(labels)


def ids_of_plain(base, labels):
    ids = labels.new_full(labels.shape, base.config.decoder_start_token_id)
    ids[:, 1:] = labels[:, :-1].masked_fill(labels[:, :-1] == -100, base.config.pad_token_id)
    return ids
