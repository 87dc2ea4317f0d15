"""Triton kernels, one file per op: jit functions and launchers with the signatures of ``reference.<op>``.

Importing this package imports Triton; ``ops`` does so only when the backend is asked for. Set
``TRITON_INTERPRET=1`` before the first import to run the kernels on the CPU.
"""

import os


def _mend_interpreter() -> None:
    """Triton 3.6's interpreter, as those before it, makes an int of an array of shape (1,), which NumPy
    refuses from 2.5 on; later ones do not. Before 3.6 there is no scope that undoes what it changes."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor, *scope) -> None:
        patch(tensor, *scope)
        change = scope[0].set_attr if scope else setattr
        change(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_and_mend


if os.environ.get("TRITON_INTERPRET") == "1":
    _mend_interpreter()
