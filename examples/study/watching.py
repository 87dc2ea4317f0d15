"""What becomes of a SHERL while it trains: a Trainer that writes it down."""

from typing import Any

import torch
from torch import Tensor
from whisper_meft.files import read_json, write_json
from whisper_meft.training.trainer import MeftTrainer

import meft_kernels
from meft_kernels import ops
from meft_kernels.reference.common import GATE_TEMPERATURE
from meft_kernels.reference.modules import gated_down_params

# Steps that are looked at, before their parameters move.
STEPS = (0, 24, 96, 192)


class Watched(MeftTrainer):
    """Writes ``watched.json`` into the run's folder: what :func:`figures` gives at some of the steps."""

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any) -> Tensor:
        step, side = self.state.global_step, model.side_network
        if step not in STEPS or not isinstance(side, meft_kernels.SHERL):
            return super().training_step(model, inputs, *args)
        states = inputs["hidden_states"].to(model.encoder.dtype)
        with torch.no_grad():
            found = {"step": step, **figures(model, states)}
        loss = super().training_step(model, inputs, *args)
        found |= {"loss": float(loss.detach())}
        for part, module in (("side", side), ("head", model.projector)):
            squares = [p.grad.square().sum() for p in module.parameters()]
            found[f"{part}_gradient"] = float(torch.stack(squares).sum().sqrt())
        path = f"{self.args.output_dir}/watched.json"
        earlier = [] if step == STEPS[0] else read_json(path)
        write_json(path, [each for each in earlier if each["step"] < step] + [found])
        return loss


def figures(model: torch.nn.Module, states: Tensor) -> dict[str, float]:
    """How a SHERL treats a batch.

    Args:
        model: a :class:`whisper_meft.MeftModel`. states: (B, L, T, D) hidden states h_0 to h_{L-1}.

    Returns:
        ``guided``: share of frames to which a shallow layer adds something; ``gate``: tanh(gate / 0.1);
        ``input``: root mean square of the last layer's new input over that of its usual one; ``constant``:
        share of the new input's energy that is the same in all frames of all clips; ``spread``: standard
        deviation over the clips of the mean over time that the head reads, over that of the backbone alone.
    """
    side, encoder = model.side_network, model.encoder
    usual, merged = side.merge(states.unbind(1))
    deepest = ops.gated_down(usual, *gated_down_params(side.down[-1]))
    given = side.widen(usual, merged)

    def spread(of: Tensor) -> float:
        return float(encoder.last_layer(of, None).mean(1).std(0).mean())

    return {
        "guided": float((merged != deepest).any(-1).float().mean()),
        "gate": float(torch.tanh(side.gate / GATE_TEMPERATURE)),
        "input": float((given.square().mean() / usual.square().mean()).sqrt()),
        "constant": float(given.mean((0, 1)).square().mean() / given.square().mean()),
        "spread": spread(given) / spread(usual),
    }
