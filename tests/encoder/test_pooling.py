"""Statistics over time, and the running standardisation of what the head reads."""

import pytest
import torch
from whisper_meft.encoder.pooling import RunningStandardisation, StatisticsOf, mean_and_deviation

from meft_kernels import HiddenState


def reference(states: torch.Tensor, frames: int) -> torch.Tensor:
    """Of one clip (T, D), in float64."""
    valid = states[:frames].double()
    centred = valid - valid.mean(1, keepdim=True)
    normed = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
    return torch.cat([normed.mean(0), (normed.var(0, correction=0) + 1e-6).sqrt()])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padded", [False, True])
def test_mean_and_deviation(dtype, padded, monkeypatch):
    monkeypatch.setattr("whisper_meft.encoder.pooling._ELEMENTS", 200)  # parts of two clips
    generator = torch.Generator().manual_seed(0)
    states = (torch.randn(5, 7, 13, generator=generator, dtype=torch.float64) + 3).to(dtype)
    states[..., 4] *= 500  # a channel that carries most of the energy, as real ones have
    lengths = torch.tensor([7, 1, 4, 6, 2]) if padded else None
    if padded:
        for clip, frames in zip(states, lengths):
            clip[frames:] = float("nan")
    found = mean_and_deviation(states, lengths)
    assert found.shape == (5, 26) and found.dtype == (
        torch.float64 if dtype == torch.float64 else torch.float32
    )
    frames = lengths if padded else [7] * 5
    expected = torch.stack([reference(clip, int(n)) for clip, n in zip(states, frames)])
    torch.testing.assert_close(
        found.double(), expected, atol=1e-4 if dtype != torch.float64 else 1e-12, rtol=1e-4
    )
    assert mean_and_deviation(states[:0], None if lengths is None else lengths[:0]).shape == (0, 26)


def test_one_state_is_taken_and_all_pass():
    states = [torch.randn(2, 3, 4) for _ in range(3)]
    stream = [states[0], HiddenState(states[1], torch.zeros(2, 3), torch.ones(2, 3)), None, states[2]]
    taken = StatisticsOf(1)
    passed = taken.watch(stream, None)
    assert next(passed) is states[0] and next(passed) is stream[1]  # whoever stops here has it taken
    assert list(StatisticsOf(3).watch(stream, None)) == stream
    taken.watch(stream, None)
    torch.testing.assert_close(taken.taken(), mean_and_deviation(states[1], None))


def test_running_standardisation_is_that_of_all_clips():
    values = torch.randn(300, 6, dtype=torch.float64) * torch.tensor([1.0, 5, 0.1, 1, 1, 0]) + 10
    module = RunningStandardisation(6, dtype=torch.float64)
    torch.testing.assert_close(module.eval()(values), values / (1 + 1e-6) ** 0.5)
    module.train()
    for part in values.split(7):  # the last has 6, and batches of one do
        out = module(part)
    assert torch.isfinite(out).all()
    torch.testing.assert_close(module.mean, values.mean(0))
    torch.testing.assert_close(module.variance, values.var(0, correction=0), atol=1e-12, rtol=1e-9)
    whole = module.eval()(values)
    torch.testing.assert_close(whole[3:4], module(values[3:4]))
    assert module.clips == 300
    torch.testing.assert_close(
        whole[:, :5].std(0, correction=0), torch.ones(5, dtype=torch.float64), rtol=1e-3, atol=0
    )


def test_old_clips_are_forgotten():
    module = RunningStandardisation(1).train()
    for value in (0.0, 4.0):
        for _ in range(400):
            module(torch.full((8, 1), value) + torch.randn(8, 1))
    assert module.mean.item() == pytest.approx(4, abs=0.3) and module.variance.item() == pytest.approx(
        1, rel=0.3
    )


def test_a_gradient_passes_and_goes_into_no_statistic():
    module = RunningStandardisation(3).train()
    values = torch.randn(4, 3, requires_grad=True)
    module(values).sum().backward()
    scale = (module.variance + 1e-6).rsqrt()
    torch.testing.assert_close(values.grad, scale.expand(4, 3))
    assert not list(module.parameters())
