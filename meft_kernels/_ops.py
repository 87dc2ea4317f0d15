"""The namespace of the ops under ``torch.ops``: one for each copy of the package in a process.

A copy that the Kernel Hub serves has a namespace of its own, so that two versions, and an installed one
beside them, can be loaded together. The file's name and what it holds are those that kernel-builder writes,
which puts its own in the place of this one.
"""

import torch

ops = torch.ops.meft


def add_op_namespace_prefix(op_name: str) -> str:
    """An op by its full name, such as ``"meft::ladder"``."""
    return f"{ops.name}::{op_name}"
