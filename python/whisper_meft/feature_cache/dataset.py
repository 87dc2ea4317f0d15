"""Batches from a feature cache, in the place of audio."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..data.augmenter import Augmenter
from ..data.dataset import labels_of
from ..data.epochs import SharedEpoch, drawn
from ..data.examples import ExampleSet, check_known_labels, check_transcribed
from ..data.transcripts import TranscriptTokens
from ..errors import UserError
from ..model.base import MeftBase
from .key import copy_fingerprints, token_fingerprint
from .store import FeatureCache


class CachedDataset(Dataset):
    """Examples as hidden states from a cache, in the place of :class:`whisper_meft.data.SpeechDataset`.

    Args:
        examples: labelled, unless ``label2id`` is None; transcribed, if ``tokens`` is given.
        cache: holds all of them. model: whose states they are. label2id: class ids by name.
        tokens: makes items of the transcripts, for recognition.
        augment: of training clips, if the cache has them augmented. copies: versions of each that it has;
            epochs (:meth:`set_epoch`) take them in turn, and a clip that comes again in one, by a key
            ``(index, again)``, has the next.

    Items are dicts of ``hidden_states`` (S, T, D), ``hidden_state_statistics`` (S, T, 2), where those are
    8-bit codes ``hidden_state_scales`` (S, 2, D), ``length`` (int, T) and ``labels`` (int). With ``tokens``,
    ``labels`` and ``decoder_input_ids`` are int64 ``(tokens,)``; states of the decoder are those of them.

    Raises:
        UserError: the cache lacks a clip, or has it of another file or, for states of the decoder, with
            another transcript only, or holds other states; unknown or missing labels or transcripts.
    """

    def __init__(
        self,
        examples: ExampleSet,
        cache: FeatureCache,
        model: MeftBase,
        label2id: dict[str, int] | None = None,
        tokens: TranscriptTokens | None = None,
        augment: Augmenter | None = None,
        copies: int = 1,
    ):
        if label2id is not None and tokens is not None:
            raise UserError("label2id is for classes and tokens for transcripts: give one of them")
        if label2id is not None:
            check_known_labels(examples, list(label2id))
        elif tokens is not None:
            check_transcribed(examples)
        cache.check_states_of(model.states_of)
        of_tokens = model.states_of == "decoder"
        if of_tokens and tokens is None:
            raise UserError("tokens are needed for states of the decoder, which are those of a transcript")
        prints = copy_fingerprints(examples, augment, copies)
        if of_tokens:
            said = [tokens(example)["decoder_input_ids"] for example in examples]
            prints = [token_fingerprint(each, said[i % len(said)]) for i, each in enumerate(prints)]
        found = [cache.find(examples[i % len(examples)], each) for i, each in enumerate(prints)]
        missing = [examples[i % len(examples)].name for i, clip in enumerate(found) if clip is None]
        if missing:
            what = "clips with their present transcripts" if of_tokens else "clips"
            if augment is not None:
                what = f"augmented {what}"
            raise UserError(
                f"the cache in {cache.folder} lacks {len(missing)} of {len(found)} {what} of "
                f"{examples.description}, the first is {missing[0]}: fill it with whisper-meft cache"
            )
        self.examples, self.cache, self.label2id = examples, cache, label2id
        self.copies = [found[start : start + len(examples)] for start in range(0, len(found), len(examples))]
        self._epoch = None if augment is None else SharedEpoch()
        self.tokens = tokens
        self.layers = model.states_read

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def lengths(self) -> list[int]:
        """Encoder frames of every item (or tokens, of the decoder's states), of its longest copy, for
        batching by length."""
        return [max(clip.frames for clip in versions) for versions in zip(*self.copies)]

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose copies items are, also in processes that read already."""
        if self._epoch is not None:
            self._epoch.set(epoch)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        index, again = drawn(key)
        copy = 0 if self._epoch is None else (self._epoch.get() + again) % len(self.copies)
        clip = self.cache.read(self.copies[copy][index], self.layers)
        item = {
            "hidden_states": clip.states,
            "hidden_state_statistics": clip.statistics,
            "length": clip.states.shape[1],
        }
        if clip.scales is not None:
            item["hidden_state_scales"] = clip.scales
        if self.label2id is not None:
            item["labels"] = self.label2id[self.examples[index].label]
        if self.tokens is not None:
            made = self.tokens(self.examples[index])
            item |= {name: torch.tensor(ids) for name, ids in made.items()}
        return item


@dataclass
class CachedCollator:
    """Stacks items of :class:`CachedDataset`; picklable.

    Returns a dict of ``hidden_states`` (B, S, T, D), 0 past a clip's end, laid out so that one layer's are
    contiguous, ``hidden_state_statistics`` (B, S, T, 2), ``hidden_state_lengths`` (B,) int64 and, where the
    items have them, ``hidden_state_scales`` (B, S, 2, D) and ``labels`` (B,) int64; of transcripts
    ``decoder_input_ids`` and ``labels`` (B, U) int64, as of :class:`whisper_meft.data.Collator`.

    Args:
        pad_token_id: pads ``decoder_input_ids`` (``TranscriptTokens.end``).
    """

    pad_token_id: int = 50257

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        longest = max(item["length"] for item in items)

        def stack(key: str, padding: Sequence[float]) -> Tensor:
            layers, _, width = items[0][key].shape
            out = torch.empty(layers, len(items), longest, width, dtype=items[0][key].dtype)
            for b, item in enumerate(items):
                out[:, b, : item["length"]] = item[key]
                out[:, b, item["length"] :] = torch.tensor(padding, dtype=out.dtype)
            return out.transpose(0, 1)

        batch = {
            "hidden_states": stack("hidden_states", [0.0]),
            "hidden_state_statistics": stack("hidden_state_statistics", [0.0, 1.0]),
            "hidden_state_lengths": torch.tensor([item["length"] for item in items]),
        }
        if "hidden_state_scales" in items[0]:
            batch["hidden_state_scales"] = torch.stack([item["hidden_state_scales"] for item in items])
        return batch | labels_of(items, self.pad_token_id)
