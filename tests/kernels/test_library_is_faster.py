"""Which kernels `auto` takes on CUDA by type and side width, asked without a GPU."""

import pytest
import torch

from meft_kernels.ops import backends, registration, self_check
from meft_kernels.ops.autograd import is_fused
from meft_kernels.ops.registration import HOST_CODE, HostCode, host_code
from meft_kernels.reference import stand_in

pytestmark = pytest.mark.skipif(not backends.HAS_TRITON, reason="needs Triton")
HALF = [torch.float16, torch.bfloat16]
OPS = sorted({code.op for code in HOST_CODE.values()} - registration.WITHOUT_TRITON)


@pytest.fixture
def named(monkeypatch):
    """Every op's functions replaced by ones that give their names."""
    for name, code in HOST_CODE.items():
        monkeypatch.setitem(HOST_CODE, name, HostCode(code.op, lambda *_: "library", lambda *_: "fused"))


def taken(name: str, dtype: torch.dtype, width: int, capability=(9, 0), backend: str = "auto") -> str:
    with stand_in.standing_for("cuda", capability):
        return host_code(name, backend, "cuda")(torch.empty(1, 2, width, dtype=dtype))


@pytest.mark.parametrize("name", ["relu_attention", "relu_attention_bwd"])
def test_attention_in_fp32_is_the_librarys_where_the_fused_kernel_cannot_win(name, named):
    for dtype in HALF:
        assert {taken(name, dtype, width) for width in (24, 96, 384)} == {"fused"}
    for capability, least in {(9, 0): 75, (8, 0): 37, (10, 0): 38, (8, 6): 140, (8, 9): 140}.items():
        assert taken(name, torch.float32, least - 1, capability) == "fused"
        assert taken(name, torch.float32, least, capability) == "library"


def test_an_explicit_choice_is_kept(named):
    for name in ("relu_attention", "relu_attention_bwd"):
        assert taken(name, torch.float32, 96, backend="triton") == "fused"
        assert taken(name, torch.float32, 96, backend="reference") == "library"


@pytest.mark.parametrize("op", [op for op in OPS if op != "relu_attention"])
def test_other_ops_stay_fused(op, named):
    names = [name for name, code in HOST_CODE.items() if code.op == op]
    assert names
    for name in names:
        assert {taken(name, dtype, 96) for dtype in (torch.float32, *HALF)} == {"fused"}


@pytest.mark.parametrize("dtype, expected", [(torch.float32, "library"), (torch.bfloat16, "fused")])
def test_what_is_registered_for_cuda_chooses_alike(dtype, expected, monkeypatch):
    """And does not check a kernel that it does not take."""
    checked = []

    def choose(op, names, arguments, plain, fused):
        checked.append(op)
        return fused

    monkeypatch.setattr(self_check, "choose", choose)
    schema = "relu_attention(Tensor anchor, Tensor gate_weight) -> Tensor"
    run = registration._checked(schema, "relu_attention", lambda *_: "library", lambda *_: "fused")
    with stand_in.standing_for("cuda", (9, 0)):
        assert run(torch.empty(1, 2, 96, dtype=dtype), torch.empty(1, 96)) == expected
    assert checked == ([] if expected == "library" else ["relu_attention"])


@pytest.mark.parametrize("dtype, keeps", [(torch.float32, False), (torch.float16, True)])
def test_features_are_not_copied_for_the_library(dtype, keeps):
    with stand_in.standing_for("cuda", (9, 0)):
        assert is_fused("relu_attention", "auto", torch.empty(1, 2, 96, dtype=dtype)) == keeps
        assert is_fused("relu_attention", "triton", torch.empty(1, 2, 96, dtype=dtype))
