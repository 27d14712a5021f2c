"""Every error that is the caller's business: one line saying what, expected, got, remedy.

The command line turns any `LmttError` into that line and exit code 2; anything else that escapes is a
defect of ours and keeps its traceback.
"""

from __future__ import annotations


def one_line(what: str, *, expected: object = None, got: object = None, remedy: str | None = None) -> str:
    """Compose the single line that every error of this package consists of."""
    parts = [what]
    if expected is not None:
        parts.append(f"expected {expected}")
    if got is not None:
        parts.append(f"got {got}")
    line = ", ".join(parts)
    if remedy is not None:
        line += f"; {remedy}"
    return " ".join(line.split())


class LmttError(Exception):
    """Base of all errors that the caller can act on."""

    def __init__(
        self, what: str, *, expected: object = None, got: object = None, remedy: str | None = None
    ) -> None:
        super().__init__(one_line(what, expected=expected, got=got, remedy=remedy))


class InputError(LmttError, ValueError):
    """An argument is wrong: a prompt, a position, a threshold, a shape."""


class CheckpointError(LmttError):
    """A model cannot be found or read, or its weights are damaged."""


class StructureError(LmttError):
    """A model's layers are not sums onto a residual stream, or not ones that we understand."""


class ClosureError(StructureError):
    """The parts that were found do not add up to what the model computed."""


class BackendError(LmttError):
    """A backend was asked for that does not exist here or cannot do this."""


class RunError(LmttError):
    """A stored run is missing, damaged, of a newer format, or not a run at all."""


class ModelNeededError(LmttError):
    """The answer needs the model's weights and this trace was opened without them."""
