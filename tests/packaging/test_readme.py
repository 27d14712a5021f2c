"""The README's code is run as it stands, and what it names exists."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lmtt.cli import main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.model
def test_python_blocks_run(tmp_path: Path) -> None:
    found = blocks("python")
    assert found
    for block in found:
        done = subprocess.run(
            [sys.executable, "-c", block], capture_output=True, text=True, cwd=tmp_path, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "Paris" in done.stdout


@pytest.mark.model
def test_lmtt_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    commands = [line for block in blocks("bash") for line in block.splitlines() if "bin/lmtt" in line]
    assert len(commands) >= 3
    for command in commands:
        _, *arguments = shlex.split(command, comments=True)
        assert main(arguments) == 0, command


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make (\S+)", "\n".join(blocks("bash")), flags=re.MULTILINE)
    assert {"demo", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_links_and_pictures_exist() -> None:
    for path in [*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("docs/*.md")]:
        for link in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
            if not link.startswith("http"):
                assert (path.parent / link).exists(), f"{path.name} links to {link}, which is not there"


def test_no_paths_of_the_machine_it_was_written_on() -> None:
    places = (f"{Path.home()}/", f"{ROOT}/")
    tracked = subprocess.run(
        ["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=False
    ).stdout
    for name in tracked.split():
        path = ROOT / name
        if path.suffix in {".md", ".py", ".toml", ".cpp", ".h", ".sh", ".txt"} and path.is_file():
            found = [place for place in places if place in path.read_text()]
            assert not found, f"{name} names {found}"
