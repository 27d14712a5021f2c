"""A function mode that also hooks modules, and takes its hooks away again however the run ends."""

from __future__ import annotations

from typing import Any

from torch.overrides import TorchFunctionMode


class Watch(TorchFunctionMode):
    """Subclasses register hooks in `hook_modules`; they are there only while the mode is on."""

    def __init__(self) -> None:
        super().__init__()
        self.hooks: list[Any] = []  # what `register_*_hook` returned

    def hook_modules(self) -> None:
        """Register hooks and append them to `hooks`."""
        raise NotImplementedError

    def __enter__(self) -> Any:
        try:
            self.hook_modules()
        except BaseException:
            self._unhook()
            raise
        super().__enter__()  # type: ignore[no-untyped-call] # torch ships no types here
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)  # type: ignore[no-untyped-call] # likewise
        self._unhook()

    def _unhook(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()
