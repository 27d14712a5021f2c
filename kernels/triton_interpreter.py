"""Two things that Triton 3.6's interpreter needs before it can run these kernels.

NumPy 2.4 no longer makes an integer of a one-element array, and tl.dot multiplies bit patterns of bfloat16
numbers (which the interpreter keeps as 16-bit integers) instead of the numbers. Only the interpreter is
touched, and only where TRITON_INTERPRET=1 asks for it.
"""

from __future__ import annotations

from typing import Any


def mend() -> None:
    """Make scalars usable as bounds of loops, and products of bfloat16 right. Harmless when done twice."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    if getattr(interpreter, "lmtt_mended", False):
        return
    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    dot = interpreter.InterpreterBuilder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        wide = interpreter._convert_float(handle.data, tl.bfloat16, tl.float32, None).view(np.float32)
        return interpreter.TensorHandle(wide, tl.float32)

    def dot_of_numbers(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), *rest)

    interpreter.InterpreterBuilder.create_dot = dot_of_numbers
    interpreter._patch_lang_tensor = patch_and_mend
    interpreter.lmtt_mended = True
