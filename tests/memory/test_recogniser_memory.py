"""The counted memory of a recogniser's training step: as on real tensors, within bounds, by the command."""

import pytest
import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration
from whisper_meft import MeftConfig, UserError, get_meft_model
from whisper_meft.commands import cli
from whisper_meft.encoder import chunked
from whisper_meft.encoder.sizes import whisper_config
from whisper_meft.memory.counting import GIB, PHASES, count_step, estimate
from whisper_meft.model.backbone import quiet_transformers

from meft_kernels.reference import common

MELS, FRAMES, WIDTH, CLIPS, TOKENS = 16, 40, 32, 6, 7
METHODS = [
    *(("lst", {"placement": place}) for place in ("encoder", "decoder", "both")),
    *(("unipt", {"placement": place}) for place in ("encoder", "decoder", "both")),
    *(("sherl", {"placement": place}) for place in ("encoder", "decoder")),
    *(("full", {"target": target}) for target in ("encoder", "decoder", "both")),
    ("lora", {"target": "decoder", "r": 4}),
]


def tiny() -> WhisperConfig:
    return WhisperConfig(
        d_model=WIDTH,
        encoder_layers=3,
        encoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_layers=2,
        decoder_attention_heads=4,
        decoder_ffn_dim=40,
        num_mel_bins=MELS,
        max_source_positions=FRAMES,
        max_target_positions=16,
        vocab_size=120,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
    )


def count(method, options, fake, **settings):
    sizes = {"reduction_factor": 4} if "placement" in options else {}
    config = MeftConfig.from_dict({"method": method, **sizes, **options})

    def build():
        return get_meft_model(WhisperForConditionalGeneration._from_config(tiny()), config)

    def inputs():
        tokens = torch.zeros(CLIPS, TOKENS, dtype=torch.long)
        return {
            "input_features": torch.zeros(CLIPS, MELS, 2 * FRAMES),
            "labels": tokens,
            "decoder_input_ids": tokens.clone(),
        }

    with quiet_transformers():
        return count_step(build, inputs, hidden_size=WIDTH, fake=fake, **{"device_type": "cpu", **settings})


@pytest.mark.parametrize("method, options", METHODS, ids=str)
def test_fake_run_counts_what_a_real_run_does(method, options, monkeypatch):
    if method == "lora":
        pytest.importorskip("peft")
    fake, real = (count(method, options, fake) for fake in (True, False))
    # transformers makes a mask of tokens for fake tensors, and tells of real ones that they need none.
    mask = 12 * CLIPS * TOKENS**2
    for phase in PHASES:
        assert 0 <= fake.phases[phase].total - real.phases[phase].total <= mask, phase
    assert fake.left_alive == real.left_alive == 0


def test_a_head_that_trains_is_counted_in_parts_of_its_vocabulary(monkeypatch):
    monkeypatch.setitem(common.BLOCK_ELEMENTS, "cpu", 400)  # many of them
    monkeypatch.setattr(common, "DEFAULT_BLOCK_ELEMENTS", 400)
    assert count("full", {"target": "decoder"}, True, device_type="cuda", autocast=torch.bfloat16).peak > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "placement, most", [("decoder", 1.2), ("both", 5.0), ("encoder", 6.0)]
)  # beside full fine-tuning's 92
def test_128_clips_of_half_a_minute_fit(placement, most):
    found = estimate("small", "lst", 128, task="transcribe", tokens=64, placement=placement)
    assert found.peak <= most * GIB
    assert found.parameters == pytest.approx(242e6, rel=0.02)  # the whole Whisper


def test_parts_of_the_batch_make_the_same_loss_and_gradients(monkeypatch):
    """What bounds the memory changes no result: few clips at a time, and rungs that are computed again."""
    torch.manual_seed(0)
    base = WhisperForConditionalGeneration(tiny()).double()
    batch = {
        "input_features": torch.randn(CLIPS, MELS, 2 * FRAMES, dtype=torch.float64),
        "labels": torch.randint(4, 120, (CLIPS, TOKENS)),
    }
    from whisper_meft.decoder import chunked as decoder_chunked

    for method, options in METHODS[:8]:
        config = MeftConfig.from_dict({"method": method, "reduction_factor": 4, **options})
        model = get_meft_model(base, config).double().train()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        trained = [p for p in model.parameters() if p.requires_grad]
        found = []
        for limit in (2**60, 1):
            with monkeypatch.context() as patched:
                patched.setattr(chunked, "_WIDE_BYTES", limit)
                patched.setattr(decoder_chunked, "_KEPT_BYTES", limit)
                patched.setattr(decoder_chunked, "_LAYER_BYTES", {"cpu": limit})
                loss = model(**batch).loss
                grads = torch.autograd.grad(loss, trained, allow_unused=True)
                found.append((loss, torch.cat([g.flatten() for g in grads if g is not None])))
        (whole, wanted), (parts, got) = found
        torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)
        assert (got - wanted).norm() <= 1e-10 * wanted.norm(), (method, options)


def test_sizes_with_a_decoder():
    small, large = whisper_config("small", decoder=True), whisper_config("large-v3", decoder=True)
    assert (small.decoder_layers, small.decoder_attention_heads, small.vocab_size) == (12, 12, 51865)
    assert (large.decoder_layers, large.decoder_ffn_dim, large.vocab_size) == (32, 5120, 51866)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"task": "translate"}, "task must be classify or transcribe, got 'translate'"),
        ({"tokens": 0}, "tokens must be a positive integer, got 0"),
        ({"tokens": 449}, "tokens must be at most 448, the decoder's, got 449"),
        ({"method": "head"}, "method must be one of .* for recognition, got 'head'"),
    ],
)
def test_errors_name_the_argument(arguments, message):
    with pytest.raises(UserError, match=message):
        estimate("tiny", **{"batch_size": 1, "task": "transcribe", **arguments})


def test_command_counts_a_recogniser(capsys):
    command = ["memory", "--model", "tiny", "--batch", "2", "--task", "transcribe", "--tokens", "9"]
    assert cli.main([*command, "--placement", "decoder"]) == 0
    text = capsys.readouterr().out
    counted = estimate("tiny", "lst", 2, task="transcribe", tokens=9, placement="decoder")
    assert text.startswith("lst, decoder on tiny, batch 2, 9 tokens: ")
    assert f"{counted.peak / GIB:.2f} GiB  most in use at once" in text


def test_command_sets_methods_beside_each_other(capsys):
    pytest.importorskip("peft")
    command = ["memory", "--model", "tiny", "--batch", "2", "--task", "transcribe", "--max_frames", "200"]
    methods = "lst,lst:placement=decoder,lora:r=8+target=decoder"
    assert cli.main([*command, "--reduction_factor", "4", "--methods", methods]) == 0
    first, *rows = capsys.readouterr().out.splitlines()
    assert first.startswith("tiny, batch 2, 64 tokens: GiB in use at once")
    assert [row.split("  ")[1] for row in rows] == ["lst, encoder", "lst, decoder", "lora, decoder, r=8"]
    peaks = [float(row.split()[-3]) for row in rows]
    assert 0 < peaks[1] < peaks[2] and all(float(row.split()[-2]) >= 0 for row in rows)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tokens", "9"], "--tokens goes with --task transcribe"),
        (["--task", "transcribe", "--tokens", "0"], "--tokens must be a positive integer, got 0"),
        (["--methods", "lst,mesh"], "--methods: 'mesh' is none of "),
        (["--methods", ","], "--methods: '' is none of "),
        (["--methods", "full", "--reduction_factor", "4"], "--reduction_factor is an option of none of full"),
        (["--task", "transcribe", "--num_labels", "2"], "--num_labels goes with --task classify"),
        (["--num_labels", "0"], "--num_labels must be a positive integer, got 0"),
        (["--methods", "lst", "--method", "lora"], "--method lora is for one method"),
        (["--methods", "lst", "--method", "lst"], "--method lst is for one method"),
        (["--methods", "lst", "--gpu_memory", "8GiB"], "--gpu_memory is for one method"),
    ],
)
def test_command_errors_take_one_line(arguments, message, capsys):
    assert cli.main(["memory", "--model", "tiny", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1


@pytest.mark.parametrize("which", [[], ["--methods", "lst"]])
def test_command_prints_no_heading_of_what_cannot_be_counted(which, capsys):
    command = ["memory", "--model", "tiny", "--task", "transcribe", "--tokens", "449"]
    assert cli.main([*command, *which]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and "tokens must be at most 448, the decoder's, got 449" in captured.err
