"""The C++ CPU kernels: every op on the shared table, threads, odd inputs, and how a build is found."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from meft_kernels import native, native_sources, ops, use_backend
from meft_kernels.testing import (
    CASES,
    Case,
    assert_as_good_as_torch,
    outputs_and_gradients,
    relative_error,
)

ROOT = Path(__file__).parents[2]
SERVED = [op for op in ops.OP_NAMES if native.LOADED and native.has(op)]
OP_CASES = [case for case in CASES if case.op in SERVED]
ONE_EACH = list({(case.op, case.pool > 1): case for case in reversed(OP_CASES)}.values())
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
needs_build = pytest.mark.skipif(not native.LOADED, reason=native.REASON)


def by_name(case):
    return case.name


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs Python code in a process of its own, from this checkout."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
    )


# --- values and gradients -----------------------------------------------------------------------------------


@needs_build
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", OP_CASES, ids=by_name)
def test_as_good_as_torch(case, dtype, poisoned_memory):
    with use_backend("native"):
        assert_as_good_as_torch(case, dtype)


# Odd widths, one frame, one clip, more rows than a block takes.
ODD = [
    {"batch": 1, "frames": 1, "width": 17, "side": 5, "adapter_dim": 3, "layers": 2},
    {"batch": 3, "frames": 129, "width": 33, "side": 31, "adapter_dim": 65, "layers": 5},
    {"batch": 2, "frames": 700, "width": 40, "side": 16, "adapter_dim": 8, "layers": 2},
]


@needs_build
@pytest.mark.parametrize("shape", ODD, ids=lambda s: f"B{s['batch']}-T{s['frames']}-D{s['width']}")
@pytest.mark.parametrize("case", ONE_EACH, ids=lambda case: case.op)
def test_odd_shapes(case, shape, poisoned_memory):
    with use_backend("native"):
        assert_as_good_as_torch(replace(case, **shape), torch.float32)


@needs_build
@pytest.mark.parametrize("width", [768, 1280, 5120])
def test_long_sums_keep_their_digits(width):
    """The error is PyTorch's own, not that of a sum of ``width`` terms one after the other."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(size, generator=generator) for size in ((1, 400, width), (16, width)))
    norm_weight, bias, norm_bias = torch.linspace(0.5, 1.5, width), torch.zeros(16), torch.zeros(width)

    def linear(dtype):
        normed = torch.nn.functional.layer_norm(x.to(dtype), (width,), norm_weight.to(dtype))
        return torch.nn.functional.linear(normed, weight.to(dtype))

    def error(out):
        return (out - linear(torch.float64)).square().mean().sqrt()

    with use_backend("native"):
        found = ops.norm_linear(x, norm_weight, norm_bias, weight, bias)
    assert error(found) < 1.1 * error(linear(torch.float32))


@needs_build
@pytest.mark.parametrize("op", ["norm_linear", "adapter", "ladder", "gated_up"])
def test_gradients_over_many_rows_keep_their_digits(op):
    """Sums over 40000 rows err no more than PyTorch's, which takes them in longer pieces."""
    case = Case(op, batch=2, frames=20000, width=40, side=24, adapter_dim=16)
    inputs = case.inputs(torch.float32)
    upstream = torch.randn(case.definition()(**inputs).shape, generator=torch.Generator().manual_seed(0))
    truth = outputs_and_gradients(case.definition(), inputs, upstream, torch.float64)
    plain = outputs_and_gradients(case.definition(), inputs, upstream)
    with use_backend("native"):
        found = outputs_and_gradients(case.function(), inputs, upstream)
    for name in {"weight", "weight_2", "down_weight"} & truth.keys():
        assert relative_error(found[name], truth[name]) < relative_error(plain[name], truth[name]), name


def _same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def _results(case, inputs: dict, backend: str = "native") -> dict:
    shape = case.definition()(**inputs).shape
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(torch.float32)
    with use_backend(backend):
        return outputs_and_gradients(case.function(), inputs, upstream)


@needs_build
@pytest.mark.parametrize("case", [case for case in OP_CASES if case.op in native.KEEPING], ids=by_name)
def test_a_kept_projection_changes_no_bit(case, monkeypatch):
    inputs = case.inputs(torch.float32)
    kept = _results(case, inputs)
    monkeypatch.setattr(native, "KEEPING", frozenset())
    _same(_results(case, inputs), kept)


@needs_build
@pytest.mark.parametrize("op", sorted(native.KEEPING))
@pytest.mark.parametrize(
    "dtype, options, backend, expected",
    [
        (torch.float32, {}, "native", 1),
        (torch.float32, {}, "auto", 1),
        (torch.float32, {}, "reference", 0),
        (torch.float32, {"saved_activations": "fp8"}, "native", 0),
        (torch.bfloat16, {}, "native", 0),
    ],
    ids=str,
)
def test_a_projection_is_kept_in_fp32_alone(op, dtype, options, backend, expected):
    case = replace(next(case for case in ONE_EACH if case.op == op), batch=2, frames=31, width=50, side=20)
    values = {n: v.detach() for n, v in case.inputs(dtype).items()}
    if op == "ladder":
        function = ops.folded_ladder
        norm = [values.pop(f"down_{name}") for name in ("norm_weight", "norm_bias", "weight", "bias")]
        values["weight"], values["bias"] = ops.fold(*norm)
    else:
        function = ops.gated_down
    given = {v.untyped_storage().data_ptr() for v in values.values()}
    values["weight_1"].requires_grad_()
    kept = {}

    def pack(tensor):
        if tensor.shape == (2, 31, 20) and tensor.untyped_storage().data_ptr() not in given:
            kept[tensor.data_ptr()] = tensor.dtype
        return tensor

    with use_backend(backend), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function(**values, **options)
    assert list(kept.values()) == [torch.float32] * expected
    assert out.grad_fn is not None


@needs_build
@pytest.mark.parametrize("case", ONE_EACH, ids=lambda case: case.op)
def test_strided_inputs(case):
    """A transposed or a cut-out tensor gives what its contiguous copy gives."""
    inputs = case.inputs(torch.float32)

    def strided(value):
        if isinstance(value, list):
            return [strided(item) for item in value]
        if not isinstance(value, torch.Tensor) or value.ndim < 2:
            return value
        wide = torch.full((*value.shape[:-1], value.shape[-1] * 2 + 1), torch.nan)
        wide[..., 1::2] = value
        return wide[..., 1::2]

    _same(_results(case, {name: strided(value) for name, value in inputs.items()}), _results(case, inputs))


@needs_build
@pytest.mark.parametrize("case", ONE_EACH, ids=lambda case: case.op)
def test_threads(case):
    """For each number of threads the same bits every time, and the same values to rounding for all."""
    case = replace(case, batch=3, frames=257)
    inputs = case.inputs(torch.float32)
    before = torch.get_num_threads()
    found = {}
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            found[threads] = _results(case, inputs)
            _same(_results(case, inputs), found[threads])
    finally:
        torch.set_num_threads(before)
    for threads in (2, 7):
        for name, value in found[threads].items():
            torch.testing.assert_close(value, found[1][name], rtol=2e-4, atol=2e-4, msg=f"{threads}: {name}")


@needs_build
def test_empty_and_float64_go_to_the_reference():
    for case in ONE_EACH:
        for shape in ({"batch": 0}, {"frames": 0}):
            if case.op in ("pooled_upsample", "relu_attention", "linear_attention") and "frames" in shape:
                continue
            inputs = replace(case, **shape, masked=False).inputs(torch.float32)
            with use_backend("native"):
                out = case.function()(**inputs)
            with use_backend("reference"):
                assert out.shape == case.function()(**inputs).shape
        inputs = case.inputs(torch.float64)
        with use_backend("native"):
            out = case.function()(**inputs)
        with use_backend("reference"):
            assert torch.equal(out, case.function()(**inputs))


@needs_build
def test_gradient_of_x_on_request():
    """Hidden states are frozen in training; whoever asks for their gradient gets it."""
    for case in ONE_EACH:
        if not case.frozen or case.op == "row_statistics":
            continue
        inputs = case.inputs(torch.float32)
        upstream = torch.randn(case.definition()(**inputs).shape)
        leaf = inputs["x"].clone().requires_grad_()
        with use_backend("native"):
            (found,) = torch.autograd.grad(case.function()(**{**inputs, "x": leaf}), leaf, upstream)
        wide = {n: v.double() if isinstance(v, torch.Tensor) else v for n, v in inputs.items()}
        leaf = wide["x"].requires_grad_()
        (truth,) = torch.autograd.grad(case.definition()(**wide), leaf, upstream.double())
        assert relative_error(found, truth) < 1e-5, case.op


@needs_build
def test_after_fork_and_in_loader_workers():
    """Children of a process that has used the kernels can use them."""
    code = """
import torch
from meft_kernels import ops, use_backend
torch.set_num_threads(2)

def value():
    torch.manual_seed(0)
    x = torch.randn(4, 300, 64)
    with use_backend("native"):
        return torch.stack(ops.row_statistics(x)).sum()

class Clips(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, index):
        return value()

first = value()
loader = torch.utils.data.DataLoader(Clips(), num_workers=2, multiprocessing_context="fork")
for item in loader:
    assert torch.allclose(item, first), (item, first)
print("same")
"""
    found = run(code)
    assert found.stdout.strip() == "same", found.stderr


# --- which build --------------------------------------------------------------------------------------------


@needs_build
def test_level_is_that_of_torch():
    """Also where the environment lowers it; `test_other_processors` runs this file with lower ones."""
    level = torch.backends.cpu.get_cpu_capability().lower()
    assert level == os.environ.get("ATEN_CPU_CAPABILITY", level)
    assert native.REASON.endswith(f" built for {level}")


def test_no_build_is_said_and_served_by_the_reference(tmp_path, monkeypatch):
    loaded, reason = native.load_from(tmp_path)
    assert not loaded and "not built" in reason
    monkeypatch.setattr(native, "LOADED", False)
    monkeypatch.setattr(native, "REASON", reason)
    with pytest.raises(RuntimeError, match="'native' has no kernels in this installation: .* not built"):
        with use_backend("native"):
            pass


def test_a_build_for_another_torch_is_left_alone(tmp_path):
    (tmp_path / "_native_avx2_torch_1_2_3.so").write_bytes(b"not a library")
    with pytest.warns(RuntimeWarning, match="built for torch 1.2.3, and this is torch") as warned:
        loaded, reason = native.load_from(tmp_path)
    assert not loaded and len(warned) == 1 and torch.__version__.partition("+")[0] in reason


def test_a_damaged_build_is_left_alone(tmp_path):
    for level in ("avx512", "avx2", "default"):
        name = native.file_name(level, torch.__version__.partition("+")[0])
        (tmp_path / name).write_bytes(b"not a library")
    with pytest.warns(RuntimeWarning, match="cannot be loaded"):
        assert not native.load_from(tmp_path)[0]


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A folder that looks like a checkout with a library for this processor and this torch."""
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "bindings.cpp").write_text("int kernel() { return 1; }")
    (tmp_path / native_sources.SCHEMAS).parent.mkdir(parents=True)
    (tmp_path / native_sources.SCHEMAS).write_text("schemas")
    name = native.file_name(native._level(), torch.__version__.partition("+")[0])
    (tmp_path / "meft_kernels" / name).write_text("no library: " + native_sources.written(tmp_path))
    return tmp_path


def test_a_build_of_these_sources_is_loaded(checkout):
    with pytest.warns(RuntimeWarning, match="cannot be loaded"):  # so it was tried
        native.load_from(checkout / "meft_kernels")


@pytest.mark.parametrize("changed", ["csrc/bindings.cpp", "csrc/new.h", native_sources.SCHEMAS])
def test_a_build_of_other_sources_is_left_alone(checkout, changed):
    (checkout / changed).write_text("changed")
    with pytest.warns(RuntimeWarning, match="built from other sources .* build_ext --inplace"):
        loaded, reason = native.load_from(checkout / "meft_kernels")
    assert not loaded and "other sources" in reason


def test_a_build_from_before_sources_were_told_is_left_alone(checkout):
    (library,) = (checkout / "meft_kernels").glob("*.so")
    library.write_text("says nothing")
    with pytest.warns(RuntimeWarning, match="built from other sources"):
        assert not native.load_from(checkout / "meft_kernels")[0]


def test_a_link_to_nowhere_and_an_editors_lock_end_no_import(checkout):
    (checkout / "csrc" / ".#bindings.cpp").symlink_to("nowhere")
    with pytest.warns(RuntimeWarning, match="cannot be loaded"):
        native.load_from(checkout / "meft_kernels")
    (library,) = (checkout / "meft_kernels").glob("*.so")
    library.unlink()
    library.symlink_to("nowhere")
    with pytest.warns(RuntimeWarning, match="cannot be loaded: .*No such file"):
        assert not native.load_from(checkout / "meft_kernels")[0]


@needs_build
def test_the_library_says_its_sources():
    name = native.file_name(native._level(), torch.__version__.partition("+")[0])
    assert native_sources.of_library(ROOT / "meft_kernels" / name) == native_sources.digest(ROOT)


def test_status_names_the_backend_of_every_op():
    status = ops.backend_status()
    for op in ops.OP_NAMES:
        assert (status[op][0] == "native") == (op in SERVED and not torch.cuda.is_available())
