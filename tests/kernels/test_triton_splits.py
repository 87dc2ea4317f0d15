"""How long sums are cut into parts: waves on a fixed number of multiprocessors, by what would be launched."""

import pytest
import torch

pytest.importorskip("triton")

from meft_kernels.triton_kernels import adapter, guidance, host, relu_attention

ROWS = (15000, 192000)  # 10 and 128 clips of 30 seconds


@pytest.fixture
def launches(monkeypatch):
    """(kernel, grid, arguments) of launches, which do nothing."""
    seen = []

    def launch(kernel, grid, *arguments, **_):
        seen.append((kernel, grid, arguments))

    for module in (adapter, guidance, relu_attention):
        monkeypatch.setattr(module, "launch", launch)
    return seen


def waves(grid, resident=1):
    return grid[0] * grid[1] / (host.MULTIPROCESSORS * resident)


@pytest.mark.parametrize("pieces", [0, 1, 63, 64, 65, 1000])
@pytest.mark.parametrize("programs", [1, 4, 1000])
def test_parts_cover_every_piece_once(pieces, programs):
    size, parts = host.split(pieces, programs)
    assert size >= 1 and (parts - 1) * size < max(pieces, 1) and size * parts >= pieces
    assert parts <= 2 * host.WAVES * host.MULTIPROCESSORS


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("m, n", [(96, 768), (256, 96), (48, 384), (160, 1280)])
def test_weight_gradients_by_the_library(rows, m, n, monkeypatch):
    groups = []

    def matmul(a, b, dtype):
        groups.append(a.shape[0] if a.ndim == 3 else 0)
        return torch.zeros(*a.shape[:-1], b.shape[-1])

    monkeypatch.setattr(host, "matmul", matmul)
    host.split_product(torch.empty(rows, m), torch.empty(rows, n), torch.float32)
    tiles = -(-m // 128) * -(-n // 128)
    assert 1.5 <= waves((max(groups), tiles)) <= 4
    assert 4 * max(groups) * m * n <= 2**24 * 1.6  # bytes of partial sums


@pytest.mark.parametrize("rows", ROWS)
def test_weight_gradients_of_the_adapter(rows, launches):
    grad = torch.empty(rows, 96, dtype=torch.float16)
    adapter.weight_gradients(grad, grad, torch.empty(256, 96), torch.empty(256), torch.empty(96, 256))
    [(_, grid, arguments)] = launches
    parts = arguments[5]
    assert 2 <= waves(grid) <= 4 and parts.shape[0] == grid[1]
    assert parts.nbytes <= 2**24


@pytest.mark.parametrize("rows", ROWS)
def test_weight_gradient_of_guidance(rows, launches):
    features = [torch.empty(rows, 96, dtype=torch.float16) for _ in range(11)]
    guidance.backward(features[0], torch.empty(1, 96), torch.empty(1), features)
    [(_, grid, arguments)] = launches
    assert 2 <= waves((*grid, 1), guidance.RESIDENT) <= 4
    assert grid[0] * arguments[-1] * 4 >= rows > (grid[0] - 1) * arguments[-1] * 4


@pytest.mark.parametrize("layers", [1, 12])
def test_sums_over_frames_are_cut_alike_for_any_number_of_clips(layers, launches):
    row = relu_attention._row("sum", torch.empty(0, 96))
    parts = set()
    for clips in (1, 10, 128):
        slab = torch.empty(layers, clips, 1500, 96, dtype=torch.float16, device="meta")
        relu_attention._sums(slab, None, None, row)
        _, grid, arguments = launches[-1]
        parts.add((grid[1], arguments[-1]))
        assert grid[0] == layers * clips and grid[1] * arguments[-1] >= 1500 > (grid[1] - 1) * arguments[-1]
        assert clips < 10 or waves(grid) >= 1.5
    assert len(parts) == 1
