"""Whether a backward may write gradients over what was kept for it."""

import torch

from .ops.second_derivative import in_transform

# Whether the graph that runs backwards now is kept for another time; where torch does not tell, it may be.
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def may_dispose() -> bool:
    """Inside the backward of a Function that alone holds what it kept: whether nobody reads that again."""
    return not (torch.compiler.is_compiling() or in_transform() or _keeps_graph())
