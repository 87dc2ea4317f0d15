"""What Triton's launchers share on the host."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from meft_kernels.triton_kernels import host


def test_a_weight_is_prepared_once_per_step_but_a_parameter_each_time():
    calls = []

    def make():
        calls.append(1)
        return (torch.zeros(1),)

    parameter = torch.randn(4, 3, requires_grad=True)
    alias = parameter.view_as(parameter)
    first = host.once_per_step(alias, torch.bfloat16, 8, make)
    assert host.once_per_step(alias, torch.bfloat16, 8, make) is first and len(calls) == 1
    host.once_per_step(alias, torch.bfloat16, 16, make)
    host.once_per_step(alias, torch.float16, 8, make)
    assert len(calls) == 3
    for _ in range(2):  # its data may have changed
        host.once_per_step(parameter, torch.bfloat16, 8, make)
    assert len(calls) == 5
    for _ in range(2):  # what is made may be the weight itself
        host.once_per_step(alias, torch.float32, 8, make)
    assert len(calls) == 7
    assert host.once_per_step(alias, torch.bfloat16, "another", lambda: "something else") == "something else"
    made = weakref.ref(first[0])
    del alias, first
    gc.collect()
    assert made() is None


def test_stacking_copies_only_what_is_apart():
    slab = torch.randn(3, 2, 5, 8)
    parts = list(slab.unbind(0))
    assert host.stacked(parts).data_ptr() == slab.data_ptr()
    for others in (parts[::-1], parts[::2], [p.clone() for p in parts], [p.mT for p in parts]):
        stacked = host.stacked(others)
        assert stacked.data_ptr() != others[0].data_ptr() and torch.equal(stacked, torch.stack(others))
    shifted = torch.randn(1 + slab.numel())[1:].view(slab.shape)  # no multiple of 16 bytes
    assert host.stacked(list(shifted.unbind(0))).data_ptr() % 16 == 0


def test_only_another_device_than_the_current_one_is_made_current(monkeypatch):
    entered = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device.index))
    for index in (0, 1):
        host.on_device(SimpleNamespace(is_cuda=True, device=torch.device("cuda", index)))
    host.on_device(torch.zeros(1))
    assert entered == [0]
