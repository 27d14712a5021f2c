"""`lmtt doctor`: what this machine can run, and why not the rest; and how a model is understood."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib import metadata, util
from typing import Any

PACKAGES = ("torch", "transformers", "numpy", "safetensors", "gguf", "triton", "networkx", "panel", "bokeh")


def report(model: str | None = None, opaque: bool = False) -> Iterator[str]:
    """Lines about this machine; with a model, also its layers as they were discovered and proved.

    opaque : sublayers that cannot be taken apart are let in as one part (see `lmtt.load`).

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
        yield from structure(model, opaque)


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


def structure(model: Any, opaque: bool = False) -> Iterator[str]:
    """What a model is, and a picture of each kind of layer (see `lmtt.picture`)."""
    from lmtt.engine import Engine, load
    from lmtt.picture import draw

    engine = model if isinstance(model, Engine) else load(model, opaque=opaque)
    i = engine.info
    size = f"{i.n_layers} layers, d_model {i.d_model}, vocabulary {i.d_vocab}, {i.dtype}"
    yield f"{i.name} ({i.model_type}): {size}"
    yield from draw(engine)
