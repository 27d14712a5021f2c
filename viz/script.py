"""The JavaScript as one module: browsers that open a file, and Panel's components, cannot follow imports."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

MODULES = ("route", "svg", "scene", "view")  # each imports only from those before it

_IMPORT = re.compile(r'^import \{[^}]*\} from "\./(\w+)\.mjs";\n', re.MULTILINE)


@cache
def source(name: str) -> str:
    """A file of this folder."""
    return Path(__file__).with_name(name).read_text("utf-8")


@cache
def bundle(last: str) -> str:
    """All modules one after the other, then the file `last`; their imports of each other are dropped.

    Only `last` keeps its exports. Names at the top of the modules must differ: the bundle would not run else.
    """
    parts = []
    for position, name in enumerate(MODULES):
        text = source(f"{name}.mjs")
        imported = set(_IMPORT.findall(text))
        assert imported <= set(MODULES[:position]), f"{name}.mjs imports what comes after it: {imported}"
        parts.append(re.sub(r"^export ", "", _IMPORT.sub("", text), flags=re.MULTILINE))
    return "".join(parts) + _IMPORT.sub("", source(last))
