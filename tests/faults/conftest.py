"""A tiny checkpoint, and commands on it in processes that have imported torch already.

`forked(function)` runs a function in a fork of this process and says how it ended, so that hundreds of
processes that are killed cost seconds. Only the CPU and one thread: no other thread survives a fork.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers

from lmtt.streaming.weights import StreamedWeights
from lmtt.testing_models import CONFIGS

PROMPT = "the cat sat"
LIMIT = "160MiB"
LONGEST = 60  # seconds; a process that hangs dies of SIGALRM


class Ended(NamedTuple):
    """How a process ended: `code` is negative if it died of that signal."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of four layers in several shards, with a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("faults")
    kind, options = CONFIGS["llama"]
    torch.manual_seed(0)
    config: Any = getattr(transformers, kind)(**{**options, "num_hidden_layers": 4})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(path, max_shard_size="20KB")
    size = model.get_input_embeddings().weight.shape[0]
    letters = "abcdefghijklmnopqrstuvwxyz"
    names = ["<unk>", "Ġ", *letters][:size]
    tokenizer = Tokenizer(
        models.BPE(vocab={name: n for n, name in enumerate(names)}, merges=[], unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(path)
    return path


@pytest.fixture
def trace_command(folder: Path) -> Callable[..., list[str]]:
    """The arguments of a streamed trace into a run directory."""

    def make(run: Path, *more: str) -> list[str]:
        return [
            "trace", str(folder), "--prompt", PROMPT, "--memory", LIMIT, "--out", str(run), *more,
        ]  # fmt: skip

    return make


@pytest.fixture
def always_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of 100 KB fits any limit that a process can live in; here none of them stays in memory."""
    monkeypatch.setattr(StreamedWeights, "would_stay", lambda _self, _tokens: False)


@pytest.fixture(scope="session")
def one_thread() -> Iterator[None]:
    """The model's products depend on the number of threads in the last bits, and forks have one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def forked(tmp_path: Path, one_thread: None) -> Callable[[Callable[[], int | None]], Ended]:
    """Run a function in a fork of this process."""

    def run(function: Callable[[], int | None]) -> Ended:
        files = [tmp_path / "stdout", tmp_path / "stderr"]
        child = os.fork()
        if child == 0:
            code = 1
            try:
                for number, path in enumerate(files, 1):
                    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
                sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - pytest's stands for another file
                sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
                for number in (signal.SIGINT, signal.SIGTERM):
                    signal.signal(number, signal.default_int_handler)
                signal.alarm(LONGEST)
                code = function() or 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        return Ended(os.waitstatus_to_exitcode(status), *(path.read_text() for path in files))

    return run
