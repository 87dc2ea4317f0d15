"""LST, UniPT and SHERL as users meet them: drop-in for the reference, streaming, and clear errors."""

import copy
import pickle
import subprocess
import sys
import warnings

import pytest
import torch

import meft_kernels
from meft_kernels import LST, SHERL, UniPT, reference

METHODS = {"LST": LST, "UniPT": UniPT, "SHERL": SHERL}
D, L = 32, 3
BOTH = pytest.mark.parametrize("method", METHODS)


def build(method, package=meft_kernels, hidden_size=D, num_layers=L, seed=0, **options):
    torch.manual_seed(seed)
    return getattr(package, method)(
        hidden_size=hidden_size, num_layers=num_layers, reduction_factor=4, **options
    )


def states(batch=2, frames=9, dtype=torch.float32, count=L + 1):
    generator = torch.Generator().manual_seed(3)
    return [
        (0.5 + torch.randn(batch, frames, D, generator=generator, dtype=torch.float64)).to(dtype)
        for _ in range(count)
    ]


def calls(side):
    return [side] if isinstance(side, reference.SHERL) else [side, side.pooled]


def output(side, hidden_states, lengths=None):
    """The call that training makes."""
    return calls(side)[-1](hidden_states, lengths)


NORM_LINEAR = ["norm.weight", "norm.bias", "linear.weight", "linear.bias"]
ADAPTER = [f"{part}.{kind}" for part in ("norm", "linear_1", "linear_2") for kind in ("weight", "bias")]
UP = [f"up.{name}" for name in NORM_LINEAR] + ["norm.weight", "norm.bias"]
GATED = [f"linear_{n}.{kind}" for n in (1, 2, 3) for kind in ("weight", "bias")]
KEYS = {
    "LST": [f"down.{i}.{name}" for i in range(4) for name in NORM_LINEAR]
    + [f"rungs.{i}.{name}" for i in range(3) for name in ["gate", *ADAPTER]]
    + UP,
    "UniPT": [f"down.{i}.{name}" for i in range(4) for name in NORM_LINEAR]
    + ["gate.weight", "gate.bias"]
    + [f"adapter.{name}" for name in ADAPTER]
    + UP,
    "SHERL": [f"down.{i}.{name}" for i in range(3) for name in GATED]
    + ["guide.weight", "guide.bias", "out.weight", "out.bias", "gate"],
}


@BOTH
def test_state_dict_keys_are_pinned(method):
    for package in (meft_kernels, reference):
        assert sorted(build(method, package).state_dict()) == sorted(KEYS[method])


@BOTH
def test_state_dict_interchanges_with_the_reference(method):
    fast, plain = build(method, seed=1), build(method, reference, seed=2)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    fast.load_state_dict(plain.state_dict())
    hidden_states, lengths = states(), torch.tensor([9, 4])
    for ours, theirs in zip(calls(fast), calls(plain)):
        a, b = ours(hidden_states, lengths), theirs(hidden_states, lengths)
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)
        upstream = torch.randn_like(a)
        fast.zero_grad(), plain.zero_grad()
        a.backward(upstream), b.backward(upstream)
        for (name, p), q in zip(fast.named_parameters(), plain.parameters()):
            if name == "gate.bias":
                continue  # zero here, rounding noise there
            torch.testing.assert_close(p.grad, q.grad, rtol=2e-4, atol=2e-5, msg=name)
    plain.load_state_dict(fast.state_dict())


@BOTH
def test_initialisation(method):
    side = build(method, hidden_size=256)
    for name, parameter in side.named_parameters():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all(), name
        elif parameter.ndim == 2 and parameter.numel() > 1000:
            assert abs(parameter.mean()) < 0.002 and abs(parameter.std() - 0.02) < 0.002, name
        elif parameter.ndim == 1:
            assert not parameter.any(), name


@BOTH
def test_streams_and_pulls_no_more_than_it_reads(method):
    side, hidden_states = build(method), states()
    pulled = []

    def stream():
        for index, hidden_state in enumerate(hidden_states):
            pulled.append(index)
            yield hidden_state

    assert torch.equal(side(stream()), side(hidden_states))
    assert pulled == list(range(side.last_layer + 1))
    assert side.last_layer == (L - 1 if method == "SHERL" else L)
    for same in (tuple(hidden_states), torch.stack(hidden_states), dict(enumerate(hidden_states)).values()):
        assert torch.equal(side(same), side(hidden_states))


def test_pooled_is_the_mean_over_valid_frames():
    for method in ("LST", "UniPT"):
        side, hidden_states = build(method, dtype=torch.float64), states(dtype=torch.float64)
        lengths = torch.tensor([9, 4], dtype=torch.int32)
        full = side(hidden_states, lengths)
        expected = torch.stack([full[0].mean(0), full[1, :4].mean(0)])
        torch.testing.assert_close(side.pooled(hidden_states, lengths), expected)
        torch.testing.assert_close(side.pooled(hidden_states), side(hidden_states).mean(1))


@BOTH
def test_padding_frames_do_not_matter(method):
    side, hidden_states = build(method), states()
    lengths = torch.tensor([9, 4])
    alone = output(side, [h[1:, :4] for h in hidden_states])
    spoiled = [h.clone() for h in hidden_states]
    for h in spoiled:
        h[1, 4:] = torch.nan
    together = output(side, spoiled, lengths)[1:]
    torch.testing.assert_close(together[:, :4] if method == "SHERL" else together, alone)


@pytest.mark.parametrize("method", ["LST", "UniPT"])
def test_layers_taps_a_subset(method):
    side, hidden_states = build(method, layers=[2]), states()
    assert side.last_layer == 2 and len(side.down) == 2
    assert torch.equal(side(hidden_states), side(hidden_states[:3]))
    same = build(method, num_layers=1)
    same.load_state_dict(side.state_dict())
    assert torch.equal(side(hidden_states), same([hidden_states[0], hidden_states[2]]))
    everything = build(method, layers=[3, 1, 2])
    assert torch.equal(everything(hidden_states), build(method)(hidden_states))
    assert "layers=[2]" in repr(side)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_input_types_beside_fp32_parameters(method, dtype):
    side = build(method)
    exact = output(side, states(dtype=torch.float32))
    out = output(side, states(dtype=dtype))
    assert out.dtype == dtype
    assert (out.double() - exact.double()).norm() < 0.02 * exact.double().norm()
    out.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in side.parameters())


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_parameters(method, dtype):
    side = build(method).to(dtype)
    for given in (dtype, torch.float32):
        side.zero_grad()
        out = output(side, states(dtype=given))
        out.sum().backward()
        assert out.dtype == given and all(p.grad.dtype == dtype for p in side.parameters())


@BOTH
def test_module_gradcheck(method):
    side = build(method, hidden_size=D, dtype=torch.float64)
    with torch.no_grad():
        for parameter in side.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    hidden_states, lengths = states(frames=3, dtype=torch.float64), torch.tensor([3, 2])
    names, parameters = zip(*side.named_parameters())

    def call(*values):
        class Train(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.side = side

            def forward(self):
                return output(self.side, hidden_states, lengths)

        return torch.func.functional_call(Train(), {f"side.{n}": v for n, v in zip(names, values)}, ())

    assert torch.autograd.gradcheck(call, parameters, fast_mode=True)


@BOTH
def test_no_gradient_reaches_frozen_states_and_every_parameter_gets_one(method):
    side, hidden_states = build(method), states()
    output(side, hidden_states, torch.tensor([9, 4])).sum().backward()
    assert all(h.grad is None for h in hidden_states)
    assert all(p.grad is not None for p in side.parameters())


@BOTH
def test_copies(method):
    side, hidden_states = build(method), states()
    expected = side(hidden_states)
    for other in (copy.deepcopy(side), pickle.loads(pickle.dumps(side))):
        assert torch.equal(other(hidden_states), expected)
        assert type(other) is METHODS[method]


@BOTH
def test_functional_call_and_func_grad(method):
    side, hidden_states = build(method), states()
    doubled = {name: 2 * p.detach() for name, p in side.named_parameters()}
    other = copy.deepcopy(side)
    other.load_state_dict(doubled)
    assert torch.equal(torch.func.functional_call(side, doubled, (hidden_states,)), other(hidden_states))

    def loss(parameters):
        return torch.func.functional_call(side, parameters, (hidden_states,)).square().sum()

    grads = torch.func.grad(loss)(doubled)
    other(hidden_states).square().sum().backward()
    for name, parameter in other.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad)


@BOTH
def test_compiles_as_one_graph_and_follows_shapes(method):
    torch._dynamo.reset()
    side = build(method, num_layers=2)
    compiled = torch.compile(output, fullgraph=True, backend="aot_eager")
    counter = torch._dynamo.utils.counters["stats"]
    before = counter["unique_graphs"]
    for batch, frames in [(2, 9), (3, 11), (4, 7), (5, 13), (7, 6)]:
        hidden_states = states(batch, frames, count=3)
        lengths = torch.arange(1, batch + 1).clamp(max=frames)
        expected, got = output(side, hidden_states, lengths), compiled(side, hidden_states, lengths)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
        upstream = torch.randn_like(got)
        want = torch.autograd.grad(expected, list(side.parameters()), upstream)
        for a, b in zip(torch.autograd.grad(got, list(side.parameters()), upstream), want):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(side, hidden_states, lengths), expected, rtol=1e-5, atol=1e-6)
    # The first shape is specialised, the second makes both axes dynamic; then nothing compiles again.
    # Without gradients it is another graph.
    assert counter["unique_graphs"] - before <= 4


@pytest.mark.slow
@BOTH
def test_compiles_with_inductor(method):
    torch._dynamo.reset()
    side, hidden_states = build(method, num_layers=2), states(count=3)
    compiled = torch.compile(output, fullgraph=True)
    torch.testing.assert_close(compiled(side, hidden_states), output(side, hidden_states))


@BOTH
def test_fake_tensors(method):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        side = build(method, hidden_size=768, num_layers=12)
        hidden_states = [torch.empty(128, 1500, 768, dtype=torch.bfloat16) for _ in range(13)]
        out = output(side, hidden_states, torch.full((128,), 700))
        assert out.shape == ((128, 1500, 768) if method == "SHERL" else (128, 768))
        out.sum().backward()
        assert all(p.grad.shape == p.shape for p in side.parameters())


@BOTH
def test_meta_tensors(method):
    side = build(method, device="meta")
    hidden_states = [torch.empty(2, 9, D, device="meta") for _ in range(L + 1)]
    side(hidden_states).sum().backward()
    if method == "SHERL":
        given = (lambda x, part: x, lambda x, grad, part: grad, (1, 1))
        side.widen_into(*side.merge(hidden_states), *given).sum().backward()
    assert all(p.grad.shape == p.shape for p in side.parameters())


@BOTH
def test_a_replica_of_data_parallel(method):
    """Which has no parameters, but tensors in their place: as ``torch.nn.parallel.replicate`` makes it."""
    side, hidden_states = build(method), states()
    parts = list(side.modules())
    copies = {part: part._replicate_for_data_parallel() for part in parts}
    for part, copy_of_it in copies.items():
        for name, child in part.named_children():
            setattr(copy_of_it, name, copies[child])
        for name, parameter in part.named_parameters(recurse=False):
            setattr(copy_of_it, name, parameter.clone())
    expected, found = output(side, hidden_states), output(copies[side], hidden_states)
    assert torch.equal(found, expected)
    found.square().sum().backward()
    assert all(p.grad is not None for p in side.parameters())


@BOTH
def test_saves_one_small_state_per_layer(method):
    """Beside the hidden states themselves, what is kept for the backward is one (B, T, r) per layer."""
    side = build(method, num_layers=4)
    batch, frames = 8, 64
    hidden_states = states(batch, frames, torch.bfloat16, count=5)
    given = {h.untyped_storage().data_ptr() for h in hidden_states}
    given |= {p.untyped_storage().data_ptr() for p in side.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = output(side, hidden_states)
    one_state = batch * frames * side.side_size * 2
    statistics = 2 * 4 * batch * frames * 5
    folded = sum(p.numel() * 4 * 3 for p in side.parameters())
    states_kept = {"LST": 5, "UniPT": 5 + 2, "SHERL": 4 + 1}[method]
    assert sum(kept.values()) <= states_kept * one_state + statistics + folded
    del out


@pytest.mark.parametrize("method", ["LST", "UniPT"])
def test_folded_projections_are_all_there(method):
    side, hidden_states = build(method), states()
    folded = side.fold()
    assert torch.equal(side.pooled(hidden_states, None, folded), side.pooled(hidden_states))
    for wrong in (folded[:-1], folded + folded[:1], []):
        with pytest.raises(ValueError, match=f"folded must be the 4 pairs that fold gives, got {len(wrong)}"):
            side.pooled(hidden_states, None, wrong)


def parts(side):
    """All that a network is made of, but lists."""
    return {n: p for n, p in side.named_modules() if n and not isinstance(p, torch.nn.ModuleList)}


PACKAGES = pytest.mark.parametrize("package", [meft_kernels, reference])


@BOTH
@PACKAGES
@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_run_or_are_told_of(method, package, register):
    side, hidden_states = build(method, package, num_layers=1), states(count=2)
    for name, part in parts(side).items():
        ran = []
        handle = getattr(part, register)(lambda *_, ran=ran: ran.append(1))
        for call in calls(side):
            ran.clear()
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                call(hidden_states)
            sentence = f"forward hooks of a {type(part).__name__} in a side network do not run: "
            assert ran or sentence in str([each.message for each in told]), name
        handle.remove()
    for call in calls(side):
        call(hidden_states)


class Wrapped(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


@BOTH
@PACKAGES
def test_layers_of_another_class_are_refused(method, package):
    hidden_states = states(count=2)
    for name, part in parts(build(method, package, num_layers=1)).items():
        if not isinstance(part, torch.nn.Linear):
            continue
        side = build(method, package, num_layers=1)
        side.set_submodule(name, Wrapped(part.in_features, part.out_features))
        with pytest.raises(TypeError, match=r"must be a torch\.nn\.Linear, got Wrapped"):
            output(side, hidden_states)


@BOTH
def test_weights_may_be_computed(method):
    """By a parametrization; the old functions of torch.nn.utils do it by hooks, and are refused."""
    side, hidden_states = build(method, num_layers=1), states(count=2)
    layer = next(part for part in side.modules() if isinstance(part, torch.nn.Linear))
    before = output(side, hidden_states)
    torch.nn.utils.parametrizations.weight_norm(layer)
    torch.testing.assert_close(output(side, hidden_states), before)
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(3)
    scaled = build(method, num_layers=1)
    with torch.no_grad():
        next(part for part in scaled.modules() if isinstance(part, torch.nn.Linear)).weight.mul_(3)
    out = output(side, hidden_states)
    torch.testing.assert_close(out, output(scaled, hidden_states))
    out.square().sum().backward()
    assert layer.parametrizations.weight.original0.grad is not None
    torch._dynamo.reset()
    compiled = torch.compile(output, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(side, hidden_states), out)
    other = build(method, num_layers=1)
    torch.nn.utils.spectral_norm(next(p for p in other.modules() if isinstance(p, torch.nn.Linear)))
    with pytest.raises(ValueError, match="Linear in a side network must not be computed by SpectralNorm"):
        output(other, hidden_states)


BAD_SIZES = [
    ({"hidden_size": 0}, "hidden_size must be a positive integer, got 0"),
    ({"num_layers": -1}, "num_layers must be a positive integer, got -1"),
    ({"reduction_factor": 2.5}, "reduction_factor must be a positive integer, got 2.5"),
    ({"reduction_factor": True}, "reduction_factor must be a positive integer, got True"),
    ({"reduction_factor": 33}, r"reduction_factor must be at most hidden_size \(32\), got 33"),
]


@BOTH
@pytest.mark.parametrize(("options", "message"), BAD_SIZES)
def test_bad_sizes(method, options, message):
    with pytest.raises(ValueError, match=message):
        METHODS[method](**{"hidden_size": D, "num_layers": L, **options})


def test_bad_layers_and_adapter():
    for layers in ([], [0], [4], [1, 1], "12", 3, [1.0], [True]):
        with pytest.raises(ValueError, match="layers must"):
            LST(hidden_size=D, num_layers=L, layers=layers)
    with pytest.raises(ValueError, match="adapter_dim must be a positive integer"):
        LST(hidden_size=D, num_layers=L, adapter_dim=0)


def _with(index, value):
    hidden_states = states()
    hidden_states[index] = value
    return hidden_states


BAD_STATES = [
    (lambda: states()[0], TypeError, "iterable of tensors"),
    (lambda: states(count=2), ValueError, "hidden_states must hold 4 tensors.*got 2"),
    (lambda: states(count=5), ValueError, "hidden_states must hold 4 tensors.*got 5"),
    (lambda: iter(states(count=2)), ValueError, "ended after 2 tensors"),
    (lambda: iter([]), ValueError, "ended after 0 tensors"),
    (lambda: _with(1, None), TypeError, r"hidden_states\[1\] must be a tensor.*NoneType"),
    (lambda: _with(0, torch.zeros(2, 9, D, dtype=torch.int64)), TypeError, "float16.*got torch.int64"),
    (lambda: _with(0, torch.zeros(2, 9, D + 1)), ValueError, r"shape \(B, T, 32\), got \(2, 9, 33\)"),
    (lambda: _with(0, torch.zeros(9, D)), ValueError, r"shape \(B, T, 32\), got \(9, 32\)"),
    (lambda: _with(0, torch.zeros(2, 0, D)), ValueError, "at least one frame"),
    (lambda: _with(2, torch.zeros(2, 8, D)), ValueError, r"hidden_states\[2\] must match"),
    (lambda: _with(2, torch.zeros(2, 9, D).half()), ValueError, r"hidden_states\[2\] must match"),
    (lambda: _with(0, torch.zeros(2, 9, D, device="meta")), ValueError, "is on meta but the parameters"),
]


@BOTH
@pytest.mark.parametrize(("make", "error", "message"), BAD_STATES)
def test_bad_hidden_states(method, make, error, message):
    with pytest.raises(error, match=message):
        build(method)(make())


@BOTH
@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        ([9, 9], TypeError, "int32 or int64 tensor.*got list"),
        (torch.tensor([9.0, 9.0]), TypeError, "got torch.float32"),
        (torch.tensor([9]), ValueError, r"shape \(2,\), one per utterance, got \(1,\)"),
        (torch.tensor([0, 9]), ValueError, "between 1 and the 9 frames given, got 0 to 9"),
        (torch.tensor([5, 10]), ValueError, "between 1 and the 9 frames given, got 5 to 10"),
    ],
)
def test_bad_lengths(method, lengths, error, message):
    with pytest.raises(error, match=message):
        build(method)(states(), lengths)


def test_report_runs():
    result = subprocess.run(
        [sys.executable, "-m", "meft_kernels"], capture_output=True, text=True, check=True, cwd=_root()
    )
    for word in ("torch", "triton", "cuda", *meft_kernels.ops.OP_NAMES, "reference"):
        assert word in result.stdout


def test_import_needs_no_triton():
    code = "import sys; sys.modules['triton'] = None; import meft_kernels; print(meft_kernels.LST(8, 1))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=_root())
    assert result.returncode == 0 and "LST" in result.stdout, result.stderr


def _root():
    from pathlib import Path

    return Path(__file__).parents[2]


def sherl_gradients(side, states, direction):
    """Of the trained tensors by name, for a fixed direction of the output."""
    side.zero_grad()
    (side(states) * direction).sum().backward()
    return {name: p.grad.flatten().clone() for name, p in side.named_parameters() if p.numel() > 1}


def test_other_starts_of_sherl_are_well_conditioned():
    """Perturbed hidden states turn the published start's gradient and hardly that of the others (float64)."""
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(4, 200, 64, generator=generator, dtype=torch.float64) for _ in range(5)]
    noise = [torch.randn(h.shape, generator=generator, dtype=torch.float64) for h in states]
    perturbed = [h + 2e-3 * n for h, n in zip(states, noise)]
    direction = torch.randn(4, 200, 64, generator=generator, dtype=torch.float64)
    least = {}
    for start in ("published", "even"):
        torch.manual_seed(0)
        side = reference.SHERL(64, 5, 4, dtype=torch.float64, start=start)
        pairs = [sherl_gradients(side, each, direction) for each in (states, perturbed)]
        cosines = {n: torch.cosine_similarity(pairs[0][n], pairs[1][n], dim=0).item() for n in pairs[0]}
        least[start] = min(cosine for name, cosine in cosines.items() if "down" in name)
    assert least["published"] < 0.9 and 1 - least["even"] < 0.05 * (1 - least["published"]), least


@pytest.mark.parametrize("package", [meft_kernels, reference])
def test_starts_of_sherl_differ_in_what_they_say(package):
    sides = {}
    for start in reference.SHERL_STARTS:
        torch.manual_seed(0)
        sides[start] = package.SHERL(16, 3, 2, start=start).state_dict()
    published, even, zero = sides.values()
    assert [n for n in published if not torch.equal(published[n], even[n])] == ["guide.bias"]
    differ = {"guide.bias", "gate", "out.weight"}
    assert {n for n in published if not torch.equal(published[n], zero[n])} == differ
    states = [torch.randn(2, 5, 16) for _ in range(3)]
    side = package.SHERL(16, 3, 2, start="zero_shot")
    out = side(states)
    assert torch.equal(out, states[2])
    out.square().sum().backward()
    assert side.out.weight.grad.norm() > 0  # from which all others follow
    with pytest.raises(ValueError, match="start must be 'published' or 'even' or 'zero_shot', got 'zero'"):
        package.SHERL(16, 3, 2, start="zero")


@pytest.mark.parametrize("package", [meft_kernels, reference])
def test_a_start_of_sherl_may_be_set_later(package):
    side = package.SHERL(16, 3, 2)
    for start in reference.SHERL_STARTS[::-1]:
        side.start = start
        torch.manual_seed(0)
        side.reset_parameters()
        other = package.SHERL(16, 3, 2, start=start)
        torch.manual_seed(0)
        other.reset_parameters()
        expected = other.state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in side.state_dict().items())
        assert copy.deepcopy(side).start == start
    with pytest.raises(ValueError, match="start must be 'published' or 'even' or 'zero_shot', got 'zero'"):
        side.start = "zero"
    assert side.start == reference.SHERL_STARTS[0]
