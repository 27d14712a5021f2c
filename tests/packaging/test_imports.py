"""What importing costs and what it drags in; that folder names do not leak as top-level modules."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import lmtt

ROOT = Path(__file__).parents[2]


def _run(code: str, **env: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **env},
        cwd="/",
    )
    return result.stdout.strip()


def test_import_is_light_and_fast() -> None:
    code = (
        "import sys, time; t = time.perf_counter(); import lmtt, lmtt.cli; d = time.perf_counter() - t;"
        "print(d, *[m for m in ('torch', 'transformers', 'triton', 'panel', 'numpy') if m in sys.modules])"
    )
    seconds, *heavy = _run(code).split()
    assert not heavy, f"import lmtt imports {heavy}"
    assert float(seconds) < 0.2


def test_every_public_name_resolves() -> None:
    for name in lmtt.__all__:
        assert getattr(lmtt, name) is not None
    assert set(dir(lmtt)) == set(lmtt.__all__)


def test_folders_are_no_top_level_modules() -> None:
    code = "import importlib.util as u; print(u.find_spec('kernels'), u.find_spec('viz'))"
    assert _run(code, PYTHONSAFEPATH="1") == "None None"


def test_nothing_that_shadows_at_the_root() -> None:
    assert not (ROOT / "conftest.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))
    assert "import" not in (ROOT / "kernels" / "__init__.py").read_text().replace("important", "")
    assert "import" not in (ROOT / "viz" / "__init__.py").read_text().replace("important", "")


def test_no_pickle_anywhere() -> None:
    banned = ("import pickle", "torch.load(", "cloudpickle", "allow_pickle=True", "eval(compile", "exec(")
    for folder in ("lmtt", "kernels", "viz"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text()
            assert not [word for word in banned if word in text], path
