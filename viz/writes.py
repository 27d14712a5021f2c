"""A mend for Panel: no message to a browser is left lying.

Panel 1.9 writes what cannot be written at once in a task of its own, and marks a document for which such a
task is on its way. A task that ends takes the mark away, also if another message was added while it waited
for the socket: the task of that message then finds no mark and returns, and the browser hears of the change
at the next one only. Now and then a click had no answer. So the mark is set again before each task
looks for it.
"""

from __future__ import annotations

from typing import Any

from panel.io import document

_MENDED = "_lmtt_mended"


def mend() -> None:
    """For all servers of this process; a Panel without that task is left as it is."""
    original = getattr(document, "_dispatch_msgs", None)
    marks = getattr(document, "_WRITE_BLOCK", None)
    if original is None or marks is None or hasattr(original, _MENDED):
        return

    async def dispatch(doc: Any) -> None:
        marks[doc] = True
        await original(doc)

    setattr(dispatch, _MENDED, True)
    document._dispatch_msgs = dispatch
