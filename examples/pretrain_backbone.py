"""Pretrains the small Whisper-architecture encoder that ships with the project, on synthetic speech.

The encoder learns to name the phoneme that sounds in each 20 ms frame. Audio and labels come from espeak-ng
(``pip install meft-kernels[whisper,speech]``): half of the clips are English in eight accents, half are
made-up words in sixteen other languages, all with random tone control and noise.

    python examples/pretrain_backbone.py --output_dir python/whisper_meft/assets/phoneme-tiny

No sentence, and no test speaker, of the accent corpus of ``whisper_meft.synthetic`` is used: the English
sentences are of the "pretrain" set and the speakers are TRAIN_SPEAKERS. The accents of that corpus are among
the eight. Quality is the accuracy per frame on speakers (TEST_SPEAKERS) and sentences that training never
met. Nothing is selected on it: the recipe runs to its end and the last weights are kept.
"""

import argparse
import copy
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soxr
import torch
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForAudioClassification
from whisper_meft.errors import UserError
from whisper_meft.files import replacing, write_json
from whisper_meft.synthetic.speech import (
    ACCENTS,
    SAMPLING_RATE,
    TEST_SPEAKERS,
    TRAIN_SPEAKERS,
    Manner,
    Synthesiser,
    Utterance,
    cut,
    degrade,
    manners,
)

SECONDS = 2  # what the encoder reads at once: 200 mel frames, 100 encoder frames
ENGLISH = (*ACCENTS, "en", "en-gb-x-rp", "en-gb-x-gbcwmd", "en-us-nyc")
# fmt: off
OTHERS = ("de", "nl", "sv", "da", "fr", "es", "it", "pt", "ro", "pl", "cs", "hu", "fi", "tr", "sw", "cy")
# Consonants and vowels of made-up words, spelt so that every one of these languages can read them aloud.
ONSETS = ("b", "d", "f", "g", "h", "j", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z",
          "br", "dr", "fl", "gr", "kl", "pl", "sk", "st", "tr", "ch", "sh")
NUCLEI = (*"aeiou", *"aeiou", "ai", "au", "ei", "ou", "ie")
CODAS = ("", "", "", *"nrlstmk", "rt", "ns", "st")
# fmt: on
FRAME = SAMPLING_RATE // 50  # samples between two encoder frames
IGNORED = -100


def made_up_words(rng: np.random.Generator, count: int = 7) -> str:
    """``count`` words of one to three syllables that no language means to have."""

    def syllable() -> str:
        return "".join(part[rng.integers(len(part))] for part in (ONSETS, NUCLEI, CODAS))

    return " ".join("".join(syllable() for _ in range(rng.integers(1, 4))) for _ in range(count))


class Corpus:
    """Clips with a phoneme name per encoder frame, made on demand."""

    def __init__(self, engine: Synthesiser, extractor: WhisperFeatureExtractor):
        self.engine, self.extractor = engine, extractor

    def draw(
        self,
        voices: tuple[str, ...],
        source: Iterator[Manner],
        clips: int,
        rng: np.random.Generator,
        note: str,
        warped: bool = False,
    ) -> tuple[torch.Tensor, list[list[str]]]:
        """(clips, 80, 200) float16 log-mel features and, for each clip, 100 phoneme names."""
        audio, names, features = [], [], []
        for i, manner in zip(tqdm(range(clips), desc=note, unit="clip"), source):
            voice = voices[rng.integers(len(voices))]
            text = manner.sentence if voice in ENGLISH else made_up_words(rng)
            spoken = self.engine.speak(
                text, voice, manner.speaker, manner.rate, manner.pitch, manner.pitch_range
            )
            if warped:
                spoken = stretch(spoken, rng.uniform(0.85, 1.15))
            # every fifth clip is shorter, so that the encoder has seen padding
            clip, start = cut(spoken, SECONDS if i % 5 else rng.uniform(0.8, SECONDS), rng)
            audio.append(degrade(clip, rng, (12.0, 30.0)))
            filled = -(-len(clip) // FRAME)
            names.append(spoken.frame_names(filled, start) + ["_"] * (100 - filled))
            if len(audio) == 256 or i == clips - 1:
                batch = self.extractor(audio, sampling_rate=SAMPLING_RATE, return_tensors="pt")
                features.append(batch["input_features"].half())
                audio = []
        return torch.cat(features), names


def stretch(spoken: Utterance, factor: float) -> Utterance:
    """The utterance in 1/factor of its time, with resonances and pitch times ``factor``: another speaker."""
    audio = soxr.resample(spoken.audio, SAMPLING_RATE * factor, SAMPLING_RATE)
    return Utterance(audio, [(name, time / factor) for name, time in spoken.phonemes])


def inventory(names: list[list[str]], least: int) -> list[str]:
    """The phoneme names that at least ``least`` frames carry; all pauses are one, ``_``."""
    flat, counts = np.unique([merge(n) for clip in names for n in clip], return_counts=True)
    return [str(name) for name, count in zip(flat, counts) if count >= least]


def merge(name: str) -> str:
    return "_" if name.startswith("_") else name


def encode(names: list[list[str]], phonemes: list[str]) -> torch.Tensor:
    """(clips, 100) int64 label ids; IGNORED for names outside the inventory."""
    ids = {name: i for i, name in enumerate(phonemes)}
    return torch.tensor([[ids.get(merge(n), IGNORED) for n in clip] for clip in names])


def build_model(phonemes: int) -> tuple[WhisperForAudioClassification, nn.Linear]:
    # Whisper's sinusoidal positions have a standard deviation of 0.7; with the usual init_std of 0.02 the
    # convolutions' output would drown in them and training would start from the position alone.
    config = WhisperConfig(
        num_mel_bins=80,
        d_model=128,
        encoder_layers=4,
        encoder_attention_heads=4,
        encoder_ffn_dim=512,
        max_source_positions=SECONDS * 50,
        init_std=0.07,
        classifier_proj_size=64,
        # what follows describes a decoder that does not exist: classification has none
        decoder_layers=1,
        decoder_attention_heads=1,
        decoder_ffn_dim=1,
        max_target_positions=1,
        vocab_size=1,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=0,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return WhisperForAudioClassification(config), nn.Linear(config.d_model, phonemes)


def hide(features: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Blanks one band of up to 12 mel bins and one stretch of up to 12 frames per clip."""
    features = features.clone()
    clips, bins, frames = features.shape
    for length in (bins, frames):
        width = torch.randint(0, 13, (clips, 1), generator=generator)
        begin = (torch.rand(clips, 1, generator=generator) * (length - width)).long()
        position = torch.arange(length)
        covered = (position >= begin) & (position < begin + width)
        covered = covered[:, :, None] if length == bins else covered[:, None, :]
        features.masked_fill_(covered, 0.0)
    return features


def train(model, head, features, labels, options) -> None:
    parameters = [p for p in [*model.encoder.parameters(), *head.parameters()] if p.requires_grad]
    steps = options.epochs * (len(features) // options.batch_size)
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.learning_rate, total_steps=steps, pct_start=0.1
    )
    generator = torch.Generator().manual_seed(options.seed)
    model.train()
    bar = tqdm(total=steps, desc="training", unit="step")
    for _ in range(options.epochs):
        order = torch.randperm(len(features), generator=generator)
        for i in range(len(features) // options.batch_size):
            batch = order[i * options.batch_size : (i + 1) * options.batch_size]
            inputs = hide(features[batch].float(), generator)
            logits = head(model.encoder(inputs).last_hidden_state)
            loss = nn.functional.cross_entropy(
                logits.flatten(0, 1), labels[batch].flatten(), ignore_index=IGNORED
            )
            if not torch.isfinite(loss):
                raise UserError(f"the loss is {loss.item()} at step {bar.n}: lower --learning_rate")
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    bar.close()


@torch.no_grad()
def frame_accuracy(model, head, features, labels, pause: int) -> dict[str, float]:
    """Share of frames named right, over all frames and over those that are no pause, beside always guessing
    the most frequent name."""
    model.eval()
    guesses = torch.cat(
        [head(model.encoder(part.float()).last_hidden_state).argmax(-1) for part in features.split(128)]
    )
    known = labels != IGNORED
    sounds = known & (labels != pause)
    right = guesses == labels
    return {
        "frames": int(known.sum()),
        "accuracy": round(float(right[known].float().mean()), 4),
        "accuracy_without_pauses": round(float(right[sounds].float().mean()), 4),
        "always_the_most_frequent_name": round(float(labels[known].bincount().max() / known.sum()), 4),
    }


def save(output: Path, model, head, phonemes: list[str], extractor, report: dict) -> None:
    model = copy.deepcopy(model).half()
    model.config.init_std = 0.02  # for heads that are put on it later
    # without the head, whose size the user chooses: from_pretrained(folder, num_labels=...) makes a new one
    encoder = {key: value for key, value in model.state_dict().items() if key.startswith("encoder.")}
    model.save_pretrained(output, state_dict=encoder)
    extractor.save_pretrained(output)
    with replacing(output / "phonemes.safetensors") as path:
        save_file({k: v.half().contiguous() for k, v in head.state_dict().items()}, path)
    write_json(output / "phonemes.json", phonemes)
    write_json(output / "training.json", report)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=14000, help="training clips of 2 s")
    parser.add_argument("--held_out_clips", type=int, default=480)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    begin = time.time()
    torch.manual_seed(options.seed)
    extractor = WhisperFeatureExtractor(feature_size=80, chunk_length=SECONDS)
    rng = np.random.default_rng(options.seed)
    # One stream of sentences serves both parts, so none is in both.
    stream = manners("pretrain", TRAIN_SPEAKERS, rng)
    with Synthesiser() as engine:
        corpus = Corpus(engine, extractor)
        both = [voice for pair in zip(ENGLISH * 2, OTHERS) for voice in pair]
        features, names = corpus.draw(tuple(both), stream, options.clips, rng, "training clips", warped=True)
        phonemes = inventory(names, least=len(names) * 100 // 20_000)
        held_out = {}
        for part, voices in (
            ("accents of the demo", ACCENTS),
            ("English", ENGLISH),
            ("other languages", OTHERS),
        ):
            source = with_speakers(stream, TEST_SPEAKERS)
            drawn, drawn_names = corpus.draw(voices, source, options.held_out_clips, rng, part)
            held_out[part] = drawn, encode(drawn_names, phonemes)
    made = time.time()
    labels = encode(names, phonemes)
    model, head = build_model(len(phonemes))
    train(model, head, features, labels, options)
    pause = phonemes.index("_")
    report = {
        "settings": {k: v for k, v in vars(options).items() if k != "output_dir"},
        "phonemes": len(phonemes),
        "encoder_parameters": sum(p.numel() for p in model.encoder.parameters()),
        "seconds": {"synthesis": round(made - begin), "training": round(time.time() - made)},
        "held_out": {part: frame_accuracy(model, head, *data, pause) for part, data in held_out.items()},
        "training_clips": frame_accuracy(model, head, features[:480], labels[:480], pause),
    }
    print(json.dumps(report, indent=2))
    save(options.output_dir, model, head, phonemes, extractor, report)


def with_speakers(stream: Iterator[Manner], speakers: tuple[str, ...]) -> Iterator[Manner]:
    """The same stream of manners, spoken by others."""
    for i, manner in enumerate(stream):
        yield Manner(
            manner.sentence, speakers[i % len(speakers)], manner.rate, manner.pitch, manner.pitch_range
        )


if __name__ == "__main__":
    main()
