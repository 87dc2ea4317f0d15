"""The networks of the loaded kernel against their readable reference, on the device at hand.

Run in the kernel's folder, with ``LOCAL_KERNELS=OWNER/NAME=.`` before it is on the hub.
"""

import kernels
import pytest
import torch

kernel = kernels.get_kernel("OWNER/NAME", version=0)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.kernels_ci
@pytest.mark.parametrize("network", ["LST", "UniPT", "SHERL"])
def test_network_equals_its_reference(network):
    torch.manual_seed(0)
    fused = getattr(kernel, network)(96, 3, 4, device=DEVICE)
    with torch.no_grad():  # away from an initialisation with zeros
        for parameter in fused.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    exact = getattr(kernel.reference, network)(96, 3, 4, device=DEVICE, dtype=torch.float64)
    exact.load_state_dict(fused.state_dict())
    states = [0.5 + torch.randn(2, 21, 96, device=DEVICE) for _ in range(4)]

    def results(side, states):
        out = side(states) if network == "SHERL" else side.pooled(states)
        upstream = torch.linspace(-1, 1, out.numel(), device=DEVICE).reshape(out.shape)
        return out, *torch.autograd.grad(out, list(side.parameters()), upstream.to(out.dtype))

    names = ["out", *(name for name, _ in fused.named_parameters())]
    for name, got, truth in zip(names, results(fused, states), results(exact, [s.double() for s in states])):
        if name != "gate.bias":  # zero in exact arithmetic
            torch.testing.assert_close(got.double(), truth, rtol=2e-3, atol=2e-4, msg=name)
