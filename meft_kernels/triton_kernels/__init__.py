"""Triton kernels, one file per op: jit functions and launchers with the signatures of ``reference.<op>``.

Importing this package imports Triton; ``ops`` does so only when the backend is asked for. Set
``TRITON_INTERPRET=1`` before the first import to run the kernels on the CPU.
"""
