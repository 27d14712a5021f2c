"""Generated text, and what it rests on.

1. transformers' own `generate` writes the output, greedily or sampled from a seed.
2. One pass over prompt and output attributes all of it: under a causal mask, what a token's state was made of
   is the same there as while it was being generated.
3. A generated token was predicted at the position before it. The rollout from there gives its shares of the
   prompt (direct) and of earlier output; all positions go down the layers together.
4. Earlier output rests on the prompt in turn. With S_p the shares of the prompt [G, P] and S_g those of the
   output [G, G], which only reach back,

       through = S_p + S_g · through,

   solved from the first generated token on. Bias and unattributed shares are carried along likewise, so
   through.sum(-1) + bias + unattributed = 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmtt.errors import InputError
from lmtt.graph.rollout import Rollouts, rollouts
from lmtt.graph.text import quoted, visible
from lmtt.spans import F64, Span, spans_of, summed

if TYPE_CHECKING:
    from lmtt.trace import Trace


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Greedy unless do_sample; the seed decides what is sampled."""

    max_new_tokens: int = 32
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def check(self) -> None:
        """Raise InputError for a value out of range."""
        if type(self.max_new_tokens) is not int or self.max_new_tokens < 1:
            raise InputError("max_new_tokens is out of range", expected="1 or more", got=self.max_new_tokens)
        if not 0 < self.temperature < float("inf"):
            raise InputError("temperature is out of range", expected="above 0", got=self.temperature)
        if self.top_k is not None and self.top_k < 1:
            raise InputError("top_k is out of range", expected="1 or more", got=self.top_k)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError("top_p is out of range", expected="0 < top_p <= 1", got=self.top_p)
        if type(self.seed) is not int or not 0 <= self.seed < 1 << 63:
            raise InputError("seed is out of range", expected="0 to 2^63 - 1", got=self.seed)


def generate_ids(model: Any, ids: Tensor, how: Sampling) -> list[int]:
    """The new tokens' ids, an end-of-sequence token included; ids [1, T]. The global generators stay put."""
    options: dict[str, Any] = {"do_sample": how.do_sample, "max_new_tokens": how.max_new_tokens}
    if how.do_sample:
        # Named even where they do nothing, so that a checkpoint's own defaults do not come in unasked.
        options |= {"temperature": how.temperature, "top_k": how.top_k or 0, "top_p": how.top_p or 1.0}
    ends = getattr(model.generation_config, "eos_token_id", None)
    if model.generation_config.pad_token_id is None and ends is not None:
        options["pad_token_id"] = ends[0] if isinstance(ends, list) else ends
    devices = [ids.device] if ids.is_cuda else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        torch.manual_seed(how.seed)
        output = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return [int(i) for i in output[0, ids.shape[1] :]]


@dataclass(frozen=True, eq=False)
class Generation:
    """Generated text with its attribution. `P` prompt tokens, `G` generated ones, `T` = P + G."""

    prompt: int  # P
    ids: NDArray[np.int64]  # [G]
    tokens: tuple[str, ...]  # [G]
    text: str  # the output alone
    traced: Trace | None  # of prompt and output together

    @property
    def trace(self) -> Trace:
        """The trace of prompt and output together. InputError if it was generated with trace=False."""
        if self.traced is None:
            raise InputError("the generated text was not traced", remedy="generate with trace=True")
        return self.traced

    @cached_property
    def _rollouts(self) -> Rollouts:
        return rollouts(self.trace.data, range(self.prompt - 1, self.prompt - 1 + len(self.ids)))

    @property
    def shares(self) -> F64:
        """[G, T]: what each prompt and earlier output token accounts for of each generated one."""
        return self._rollouts.tokens

    @property
    def bias(self) -> F64:
        """[G]; shares.sum(-1) + bias + unattributed == 1."""
        return self._rollouts.bias

    @property
    def unattributed(self) -> F64:
        """[G]"""
        return self._rollouts.unattributed

    @cached_property
    def through(self) -> PromptShares:
        """What each generated token rests on in the prompt, through the output in between."""
        first = self.prompt
        inherited = self.shares[:, first:]
        tokens = self.shares[:, :first].copy()
        bias, unattributed = self.bias.copy(), self.unattributed.copy()
        for n in range(1, len(self.ids)):
            tokens[n] += inherited[n, :n] @ tokens[:n]
            bias[n] += inherited[n, :n] @ bias[:n]
            unattributed[n] += inherited[n, :n] @ unattributed[:n]
        return PromptShares(tokens, bias, unattributed)

    def summary(self, by: str = "token", k: int = 6) -> list[str]:
        """Lines of plain text: the output, and which parts of the prompt it rests on, safe to print."""
        spans = self.prompt_spans(by)
        direct = summed(self.shares[:, : self.prompt].mean(0), spans)
        through = summed(self.through.tokens.mean(0), spans)
        lines = [
            f"output: {visible(self.text)}",
            "",
            f"what it rests on, mean over {len(self.ids)} tokens (through the output in between, direct)",
        ]
        order = np.argsort(-through, kind="stable")[:k]
        lines += [f"  {through[n]:6.1%} {direct[n]:6.1%}  {spans[n].label()}" for n in order]
        lost = self.through
        lines.append(f"  {lost.bias.mean():6.1%}         biases")
        lines.append(f"  {lost.unattributed.mean():6.1%}         unattributed")
        return lines

    def prompt_spans(self, by: str) -> list[Span]:
        """Groups of the prompt's tokens; one that runs on into the output ends with the prompt."""
        return [
            span if span.last <= self.prompt else span.until(self.prompt, self.trace.data)
            for span in spans_of(self.trace.data, by)
            if span.first < self.prompt
        ]

    def __repr__(self) -> str:
        return f"Generation({len(self.ids)} tokens after {self.prompt}: {quoted(self.text, 60)})"


@dataclass(frozen=True, eq=False)
class PromptShares:
    """tokens.sum(-1) + bias + unattributed == 1 for each of the G generated tokens."""

    tokens: F64  # [G, P]
    bias: F64  # [G]
    unattributed: F64  # [G]
