"""What is measured: one long text, the model's real activations on it, and a file that hands them on.

1. `text` writes English prose of any length, the same for the same seed.
2. `capture` runs the model over its tokens by the engine's own capture path and keeps a few layers' tasks.
3. `save` and `load` carry them to the processes that measure, which then need no model.
4. `cut` takes the first T tokens: attention is causal, so they are what a prompt of T tokens gives.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lmtt.contributions import Settings, as_block, attention_task, neuron_task
from lmtt.kernels.types import Attention, AttentionTask, NeuronTask

if TYPE_CHECKING:
    from lmtt.engine import Engine

# --- the text ---------------------------------------------------------------------------------------------

WORDS: dict[str, str] = {
    "person": (
        "the harbour master|a retired surveyor|Imke|the youngest of the weavers|old Tobiasz|"
        "my aunt Rosalind|the night nurse|a boy from the lower village|Professor Adeyemi|the ferryman|"
        "two travelling clerks|the baker's widow|Captain Lindqvist|our neighbour Hana|the apprentice|"
        "a man with a paper umbrella|the librarian|Dolores"
    ),
    "place": (
        "the salt market|a valley north of Tarn|the reading room|the second platform|"
        "an orchard behind the mill|the customs house|Valparaíso|the narrow street by the canal|"
        "a clinic in Lublin|the upper meadow|the observatory|a warehouse that smelled of cloves|"
        "the old parliament|the island of Fårö|the eastern gate|a kitchen in Nairobi"
    ),
    "thing": (
        "a brass compass|the ledger|eleven letters|a jar of preserved lemons|the broken clock|"
        "a map of the drainage tunnels|somebody's violin|the spare key|a photograph of the bridge|"
        "three sacks of barley|a copper kettle|the census tables|a telegram|the blue notebook|"
        "a box of glass lenses|the contract"
    ),
    "does": (
        "carried|hid|described|sold|repaired|forgot|copied|counted|returned|painted|weighed|borrowed|"
        "examined|misplaced|wrapped|photographed|inherited|measured"
    ),
    "mood": (
        "without a word|rather slowly|as if it were nothing|with great care|"
        "for the third time that week|against all advice|before anyone could object|in a borrowed coat|"
        "by the light of a tram|half asleep|to the sound of hammering|with both hands|"
        "out of pure stubbornness"
    ),
    "time": (
        "in the spring of 1911|on a Tuesday|shortly after the flood|when the lamps were lit|that winter|"
        "at noon|during the strike|ten years later|the morning after the wedding|"
        "before the railway came|late in October|on the longest day of the year"
    ),
    "adjective": (
        "pale|unexpected|narrow|heavy|ordinary|crooked|patient|salty|half-finished|careful|distant|"
        "noisy|reliable|expensive|polite|damp|brittle|generous"
    ),
    "noun": (
        "rain|rumour|argument|silence|tide|engine|ceiling|orchestra|harvest|fog|staircase|calendar|"
        "question|river|machine|garden|theory|shadow"
    ),
    "science": (
        "the melting point of tin|a wave that meets a wall|the orbit of a small moon|"
        "the growth of yeast in cold water|the speed of sound in wet sand|a colony of swifts|"
        "the resistance of a copper wire|an enzyme that cuts starch|the pressure at forty metres|"
        "the error of a pendulum"
    ),
    "claim": (
        "is larger than most people guess|depends on the temperature far more than on the time|"
        "was measured twice and never agreed|doubles whenever the distance is halved|"
        "cannot be read from the table alone|follows from two simple assumptions|has no simple formula|"
        "changes little from year to year"
    ),
    "number": (
        "seven|forty-two|about 300|1,250|nineteen|0.75|sixty|2.5 million|a dozen|eighty-eight|5|"
        "one and a half"
    ),
    "unit": ("kilometres|crowns|litres|pages|degrees|votes|seconds|steps|bushels|letters|tonnes|hours"),
}
SENTENCES = (
    "{Time}, {person} {does} {thing} {mood}.",
    "{Person} had seen {thing} once before, at {place}, and did not like it.",
    "Nobody at {place} remembered who {does} {thing}, though {person} claimed to know.",
    "The {noun} was {adjective}, and the {noun} that followed was more {adjective} still.",
    "“If {person} ever comes back to {place},” said {person}, “give them {thing} and ask no questions.”",
    "{Science} {claim}; {person} wrote this down {mood}.",
    "It cost {number} {unit}, which {person} thought {adjective} but fair.",
    "Between {place} and {place} there are {number} {unit}, and every one of them is {adjective}.",
    "Why would {person} have {does} {thing}, when {number} {unit} would have been enough?",
    "First they {does} {thing}; then they {does} {thing}; and only {time} did {person} notice the {noun}.",
    "A {noun} is not a {noun}, as {person} liked to say, unless somebody has {does} it.",
    "The report lists {number} {unit} for {place}, {number} for {place}, and none at all for {place}.",
    "{Person} laughed.",
    "There was a {adjective} {noun} over {place} {time}.",
    "What {person} meant was this: {science} {claim}.",
    "Having {does} {thing} {mood}, {person} went home by way of {place}.",
    "The {adjective} {noun}, the {adjective} {noun}, the smell of {noun}: all of it was gone {time}.",
    "Let x be the number of {unit} and y that of {unit}; then x + y is {number}, and {person} owes the rest.",
    "def total(rows): return sum(row['{noun}'] for row in rows if row['{adjective}'])",
    "Dear {person}, I write to you from {place}, where the {noun} is {adjective} and the {noun} worse.",
    "In those days a {noun} could be had for {number} {unit}, and people were {adjective}.",
    "“No,” said {person}.",
)


def text(words: int, seed: int = 0) -> str:
    """At least `words` words of prose in paragraphs: a few dozen sentence forms over some hundred phrases."""
    rng = random.Random(seed)
    choices = {name: phrases.split("|") for name, phrases in WORDS.items()}

    def sentence() -> str:
        parts = rng.choice(SENTENCES).split("{")
        out = [parts[0]]
        for part in parts[1:]:
            name, rest = part.split("}", 1)
            phrase = rng.choice(choices[name.lower()])
            out.append((phrase[0].upper() + phrase[1:] if name[0].isupper() else phrase) + rest)
        return "".join(out)

    paragraphs: list[str] = []
    count = 0
    while count < words:
        paragraph = " ".join(sentence() for _ in range(rng.randint(2, 7)))
        paragraphs.append(paragraph)
        count += len(paragraph.split())
    return "\n\n".join(paragraphs)


def token_ids(engine: Engine, tokens: int) -> Tensor:
    """int64 [1, tokens]: the text in the model's own tokens; without a tokenizer, random ids."""
    if engine.tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(engine.info.d_vocab, (1, tokens), generator=generator)
    ids = engine.tokenizer(text(tokens), add_special_tokens=False).input_ids
    return torch.tensor(ids[:tokens])[None]


def sampled_layers(n_layers: int) -> tuple[int, ...]:
    """Three layers, early, middle and late: what is measured of each kernel."""
    return tuple(sorted({n_layers // 6, n_layers // 2, 5 * n_layers // 6}))


# --- activations ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FlashTraceWeights:
    """What FlashTrace wants beside the recorded states: it forms values from the stream again."""

    norm: Tensor  # [D], weight of the RMSNorm before attention
    norm_eps: float
    v: Tensor  # [H_kv * E, D]
    o: Tensor  # [D, H * E]


@dataclass(frozen=True)
class Case:
    """One layer's tasks, at screen 0."""

    layer: int
    attention: AttentionTask
    neurons: NeuronTask
    flashtrace: FlashTraceWeights | None  # None for layers that FlashTrace does not read

    @property
    def tokens(self) -> int:
        return self.attention.whole.shape[0]


@torch.no_grad()
def capture(engine: Engine, ids: Tensor, layers: Sequence[int]) -> Iterator[Case]:
    """Run `ids` [1, T] through the model as far as needed; one case for each of `layers`, in order."""
    # Here and not above: processes that measure a kernel do without transformers.
    from lmtt.structure.attention_hook import watching
    from lmtt.structure.capture import capture_layer
    from lmtt.structure.discover import discover_layer
    from lmtt.structure.replay import dry_run, find_layers

    _, stack = find_layers(engine.model)
    settings = Settings()
    with watching(engine.model):
        calls = dry_run(engine.model, ids)
        hidden = calls.hidden
        for index in range(max(layers) + 1):
            layer, call = stack[index], calls.calls[index]
            structure = discover_layer(layer, hidden, call.args, call.kwargs, index=index)
            hidden, captured = capture_layer(layer, structure, index, hidden, call.args, call.kwargs)
            if index not in layers:
                continue
            block = as_block(captured)
            yield Case(
                index,
                # As `lmtt.ops` has it: what screening leaves uncertain stays so.
                replace(attention_task(block, settings, screen=0.0, keep=None), max_certificate=1.0),
                neuron_task(block, block.mlps[0], settings, rows=slice(None), screen=0.0, k=settings.neurons),
                _flashtrace_weights(layer),
            )


def _flashtrace_weights(layer: Any) -> FlashTraceWeights | None:
    try:
        norm, attention = layer.input_layernorm, layer.self_attn
        return FlashTraceWeights(
            norm.weight, norm.variance_epsilon, attention.v_proj.weight, attention.o_proj.weight
        )
    except AttributeError:
        return None


def cut(case: Case, tokens: int) -> Case:
    """The first `tokens` of a case."""
    attention, task, neurons = case.attention.attention, case.attention, case.neurons

    def rows(x: Tensor | None) -> Tensor | None:  # [D] or [T, ...]
        return x if x is None or (x.dim() == 1 and len(x) != case.tokens) else x[:tokens].contiguous()

    def by_head(x: Tensor | None) -> Tensor | None:  # [H, T, ...]
        return None if x is None else x[:, :tokens].contiguous()

    def needed(x: Tensor | None) -> Tensor:
        assert x is not None
        return x

    mask = attention.mask
    attention = replace(
        attention,
        q=needed(by_head(attention.q)),
        k=needed(by_head(attention.k)),
        v=needed(by_head(attention.v)),
        lse=by_head(attention.lse),
        mask=None if mask is None else mask[:, :tokens, :tokens].contiguous(),
        row_scale=rows(attention.row_scale),
        gate=rows(attention.gate),
    )
    return replace(
        case,
        attention=replace(
            task,
            attention=attention,
            resid_pre=task.resid_pre[:tokens].contiguous(),
            whole=task.whole[:tokens].contiguous(),
            bias=rows(task.bias),
            others=tuple(needed(rows(x)) for x in task.others),
        ),
        neurons=replace(
            neurons,
            act=neurons.act[:tokens].contiguous(),
            base=neurons.base[:tokens].contiguous(),
            whole=neurons.whole[:tokens].contiguous(),
            bias=rows(neurons.bias),
            others=tuple(needed(rows(x)) for x in neurons.others),
            row_scale=rows(neurons.row_scale),
        ),
    )


def as_stored(case: Case) -> Case:
    """The same case with weights as linear layers store them, [out, in], which is how a trace has them."""
    attention, neurons = case.attention.attention, case.neurons
    heads, width, d_model = attention.w_o.shape
    w_o = attention.w_o.reshape(heads * width, d_model).t().contiguous().t()
    attention = replace(attention, w_o=w_o.unflatten(0, (heads, width)))
    return replace(
        case,
        attention=replace(case.attention, attention=attention),
        neurons=replace(neurons, w_down=neurons.w_down.t().contiguous().t()),
    )


def nothing_to_skip(task: AttentionTask) -> AttentionTask:
    """The same task with a zero in every 16 coordinates of `whole`, so that no part lies within all of them.

    Exact evaluation passes over blocks of coordinates in which |part| stays below |whole|, which are most on
    real activations; here it must read every one, and its instructions can be counted.
    """
    whole = task.whole.clone()
    whole[:, ::16] = 0
    return replace(task, whole=whole)


# --- files ------------------------------------------------------------------------------------------------


def save(case: Case, path: Path) -> None:
    """One safetensors file; numbers that are no tensors are in its header."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {"layer": case.layer}

    def put(prefix: str, record: Any) -> None:
        for field in fields(record):
            value = getattr(record, field.name)
            if isinstance(value, Tensor):
                tensors[prefix + field.name] = value.detach().clone(memory_format=torch.contiguous_format)
            elif isinstance(value, tuple):
                plain[f"{prefix}{field.name}.count"] = len(value)
                tensors.update({f"{prefix}{field.name}.{n}": x.clone() for n, x in enumerate(value)})
            elif not hasattr(value, "__dataclass_fields__"):
                plain[prefix + field.name] = value

    put("attention.", case.attention.attention)
    put("task.", case.attention)
    put("neurons.", case.neurons)
    if case.flashtrace is not None:
        put("flashtrace.", case.flashtrace)
    save_file(tensors, path, {"plain": json.dumps(plain)})


def load(path: Path, tokens: int) -> Case:
    """A saved case's first `tokens`."""
    with safe_open(path, "pt") as file:
        plain = json.loads(file.metadata()["plain"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict

    def take(prefix: str, record: type, **given: Any) -> Any:
        for field in fields(record):
            name = prefix + field.name
            if f"{name}.count" in plain:
                given[field.name] = tuple(tensors[f"{name}.{n}"] for n in range(plain[f"{name}.count"]))
            elif field.name not in given:
                given[field.name] = tensors[name] if name in tensors else plain[name]
        return record(**given)

    attention = take("attention.", Attention)
    known = any(name.startswith("flashtrace.") for name in tensors)
    case = Case(
        plain["layer"],
        take("task.", AttentionTask, attention=attention),
        take("neurons.", NeuronTask),
        take("flashtrace.", FlashTraceWeights) if known else None,
    )
    return cut(case, tokens)
