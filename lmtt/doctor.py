"""`lmtt doctor`: what this machine can run, and why not the rest; and how a model is understood."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib import metadata, util
from itertools import groupby
from typing import Any

PACKAGES = ("torch", "transformers", "numpy", "safetensors", "gguf", "triton", "networkx", "panel", "bokeh")


def report(model: str | None = None) -> Iterator[str]:
    """Lines about this machine; with a model, also its layers as they were discovered and proved.

    Raises `LmttError` if the model cannot be read or its parts do not add up.
    """
    from lmtt import __version__

    yield f"lmtt {__version__}, Python {platform.python_version()} on {platform.machine()}"
    yield "packages: " + ", ".join(f"{name} {_version(name)}" for name in PACKAGES)
    yield from _devices()
    yield from _backends()
    yield _demo()
    if model is not None:
        yield ""
        yield from structure(model)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _devices() -> Iterator[str]:
    import torch

    yield f"cpu: {torch.get_num_threads()} threads, torch uses {torch.backends.cpu.get_cpu_capability()}"
    if not torch.cuda.is_available():
        built = torch.version.cuda
        yield "cuda: no, " + ("no device is visible" if built else "this torch is built without CUDA")
        return
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = device.total_memory / 2**30
        yield f"cuda:{index}: {device.name}, {memory:.0f} GiB, sm_{device.major}{device.minor}"


def _backends() -> Iterator[str]:
    from lmtt.kernels import registry

    for name, reason in registry.availability().items():
        yield f"backend {name}: " + ("yes" if reason is None else f"no, {reason}")
    if util.find_spec("lmtt._C") is not None:
        from lmtt import _C

        info: dict[str, Any] = _C.info()
        yield "native extension: " + (", ".join(f"{key} {value}" for key, value in info.items()) or "yes")


def _demo() -> str:
    from lmtt.checkpoint.load import resolve
    from lmtt.errors import CheckpointError

    try:
        return f"demo model: {resolve(None).gguf}"
    except CheckpointError as error:
        return f"demo model: no, {error}"


def structure(model: Any) -> Iterator[str]:
    """One picture for each run of layers that are alike."""
    from lmtt.engine import Engine, load

    engine = model if isinstance(model, Engine) else load(model)
    i = engine.info
    yield f"{i.name} ({i.model_type}): {i.n_layers} layers, d_model {i.d_model}, vocabulary {i.d_vocab}"
    heads = f"{i.n_heads} heads of {i.d_head}, {i.n_key_value_heads} key/value heads"
    yield f"  {heads}, d_mlp {i.d_mlp}, {i.dtype}"
    proved = engine.structures()
    for known, group in groupby(enumerate(proved), key=lambda item: item[1].structure):
        members = list(group)
        first, last = members[0][0], members[-1][0]
        yield f"layers {first} to {last}" if last > first else f"layer {first}"
        yield "  resid_pre"
        for number in range(known.stages):
            for write in known.writes:
                if write.stage == number:
                    worst = max((m.error(write.kind) for _, m in members), default=0.0)
                    yield f"    + {_describe(write)}   closes to {worst:.1e}"
            name = "resid_post" if number == known.stages - 1 else "resid_mid"
            yield f"  = {name}   closes to {max(m.error(name) for _, m in members):.1e}"
        if known.attention_source is not None:
            yield f"  attention seen through: {known.attention_source} ({known.attention_module})"


def _describe(write: Any) -> str:
    text = f"{write.kind} by {write.module}"
    if write.post_norm:
        text += f", then {write.post_norm} held at its statistics"
    if write.scale != 1:
        text += f", times {write.scale:g}"
    if write.gated:
        text += ", gated"
    return text + (f" ({write.note})" if write.note else "")
