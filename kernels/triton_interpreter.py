"""What Triton 3.6's interpreter needs before it can run these kernels, and run them in reasonable time.

NumPy 2.4 no longer makes an integer of a one-element array, and tl.dot multiplies bit patterns of bfloat16
numbers (which the interpreter keeps as 16-bit integers) instead of the numbers. And each call of a device
function replaces all of the language by its interpreted form again, which takes longer than the call: once a
launch is enough for the functions of one module. Only the interpreter is touched, and only where
TRITON_INTERPRET=1 asks for it.
"""

from __future__ import annotations

from typing import Any


def mend() -> None:
    """Make scalars usable as bounds of loops, products of bfloat16 right, and calls quick. Once is enough."""
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

    replace_language, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    replaced: set[str] = set()  # modules for whose functions that is done, in the launch that runs

    def replace_once(function: Any) -> Any:
        if function.__module__ in replaced:
            return interpreter._LangPatchScope()
        replaced.add(function.__module__)
        return replace_language(function)

    def launch_anew(self: Any, *args: Any, **options: Any) -> None:
        replaced.clear()
        launch(self, *args, **options)

    interpreter._patch_lang = replace_once
    interpreter.GridExecutor.__call__ = launch_anew
    interpreter.InterpreterBuilder.create_dot = dot_of_numbers
    interpreter._patch_lang_tensor = patch_and_mend
    interpreter.lmtt_mended = True
