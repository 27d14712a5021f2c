"""Weights of GGUF files: those that transformers reads, bit for bit, one at a time and from any thread."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lmtt.checkpoint import gguf_weights
from lmtt.checkpoint.gguf_blocks import decode_blocks, decoder
from lmtt.checkpoint.gguf_lend import fast_reader
from lmtt.checkpoint.gguf_source import open_gguf
from lmtt.checkpoint.gguf_weights import GgufWeights
from lmtt.checkpoint.load import resolve
from lmtt.errors import CheckpointError

E, VOCAB, CONTEXT, LAYERS = 256, 48, 32, 2
K_SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}

Stored = tuple[str, tuple[int, ...], str]  # name, shape (outermost first), type


def layers(*tensors: Stored) -> Iterator[Stored]:
    for layer in range(LAYERS):
        yield from ((f"blk.{layer}.{name}", shape, kind) for name, shape, kind in tensors)


def llama() -> tuple[dict[str, float], list[Stored]]:
    """Grouped heads, permuted rows, every native type, one unused tensor."""
    return {
        "block_count": LAYERS,
        "context_length": CONTEXT,
        "embedding_length": E,
        "feed_forward_length": 512,
        "attention.head_count": 8,
        "attention.head_count_kv": 2,
        "rope.dimension_count": 32,
        "rope.freq_base": 10000.0,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "vocab_size": VOCAB,
    }, [
        ("token_embd.weight", (VOCAB, E), "Q6_K"),
        ("output.weight", (VOCAB, E), "BF16"),
        ("output_norm.weight", (E,), "F32"),
        ("rope_freqs.weight", (16,), "F32"),
        *layers(
            ("attn_norm.weight", (E,), "F32"),
            ("attn_q.weight", (E, E), "Q4_K"),
            ("attn_k.weight", (64, E), "Q4_0"),
            ("attn_v.weight", (64, E), "Q5_K"),
            ("attn_output.weight", (E, E), "Q5_0"),
            ("ffn_norm.weight", (E,), "F32"),
            ("ffn_gate.weight", (512, E), "Q5_1"),
            ("ffn_up.weight", (512, E), "Q8_0"),
            ("ffn_down.weight", (E, 512), "Q4_1"),
        ),
    ]


def gpt2() -> tuple[dict[str, float], list[Stored]]:
    """Transposed matrices, biases, and an output matrix that its processor stores by itself."""
    norm = [("norm.weight", (E,), "F32"), ("norm.bias", (E,), "F32")]
    return {
        "block_count": LAYERS,
        "context_length": 1024,
        "embedding_length": E,
        "feed_forward_length": 4 * E,
        "attention.head_count": 4,
        "attention.layer_norm_epsilon": 1e-5,
    }, [
        ("token_embd.weight", (VOCAB, E), "F16"),
        ("position_embd.weight", (1024, E), "F16"),
        ("output.weight", (VOCAB, E), "Q8_0"),
        *(("output_" + name, shape, kind) for name, shape, kind in norm),
        *layers(
            *(("attn_" + name, shape, kind) for name, shape, kind in norm),
            *(("ffn_" + name, shape, kind) for name, shape, kind in norm),
            ("attn_qkv.weight", (3 * E, E), "Q4_K"),
            ("attn_qkv.bias", (3 * E,), "F32"),
            ("attn_output.weight", (E, E), "Q4_0"),
            ("attn_output.bias", (E,), "F32"),
            ("ffn_up.weight", (4 * E, E), "Q3_K"),
            ("ffn_up.bias", (4 * E,), "F32"),
            ("ffn_down.weight", (E, 4 * E), "Q2_K"),
            ("ffn_down.bias", (E,), "F32"),
        ),
    ]


def gemma2() -> tuple[dict[str, float], list[Stored]]:
    """Norms stored as 1 + w, tied embeddings."""
    norms = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
    return {
        "block_count": LAYERS,
        "context_length": CONTEXT,
        "embedding_length": E,
        "feed_forward_length": 512,
        "attention.key_length": 64,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "rope.freq_base": 10000.0,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.sliding_window": 8,
        "vocab_size": VOCAB,
    }, [
        ("token_embd.weight", (VOCAB, E), "Q8_0"),
        ("output_norm.weight", (E,), "F32"),
        *layers(
            *((f"{norm}.weight", (E,), "F32") for norm in norms),
            ("attn_q.weight", (E, E), "Q4_K"),
            ("attn_k.weight", (128, E), "Q6_K"),
            ("attn_v.weight", (128, E), "Q6_K"),
            ("attn_output.weight", (E, E), "Q5_K"),
            ("ffn_gate.weight", (512, E), "Q4_0"),
            ("ffn_up.weight", (512, E), "Q4_0"),
            ("ffn_down.weight", (E, 512), "Q4_1"),
        ),
    ]


def qwen2moe() -> tuple[dict[str, float], list[Stored]]:
    """Experts: two stored tensors become one parameter. Widths that no metadata say are the config's own."""
    hidden, expert, shared = 64, 1408, 5632
    return {
        "block_count": LAYERS,
        "context_length": CONTEXT,
        "embedding_length": hidden,
        "feed_forward_length": shared,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "rope.freq_base": 10000.0,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "vocab_size": VOCAB,
        "expert_count": 3,
        "expert_used_count": 2,
    }, [
        ("token_embd.weight", (VOCAB, hidden), "F32"),
        ("output.weight", (VOCAB, hidden), "Q8_0"),
        ("output_norm.weight", (hidden,), "F32"),
        *layers(
            ("attn_norm.weight", (hidden,), "F32"),
            ("ffn_norm.weight", (hidden,), "F32"),
            ("attn_q.weight", (hidden, hidden), "Q8_0"),
            ("attn_q.bias", (hidden,), "F32"),
            ("attn_k.weight", (hidden // 2, hidden), "Q8_0"),
            ("attn_k.bias", (hidden // 2,), "F32"),
            ("attn_v.weight", (hidden // 2, hidden), "Q8_0"),
            ("attn_v.bias", (hidden // 2,), "F32"),
            ("attn_output.weight", (hidden, hidden), "Q5_0"),
            ("ffn_gate_inp.weight", (3, hidden), "F32"),
            ("ffn_gate_inp_shexp.weight", (hidden,), "F32"),
            ("ffn_gate_exps.weight", (3, expert, hidden), "Q4_0"),
            ("ffn_up_exps.weight", (3, expert, hidden), "Q4_1"),
            ("ffn_down_exps.weight", (3, hidden, expert), "Q5_1"),
            ("ffn_gate_shexp.weight", (shared, hidden), "Q4_0"),
            ("ffn_up_shexp.weight", (shared, hidden), "Q4_0"),
            ("ffn_down_shexp.weight", (hidden, shared), "Q4_0"),
        ),
    ]


ARCHITECTURES = {f.__name__: f for f in (llama, gpt2, gemma2, qwen2moe)}


def stored(shape: tuple[int, ...], kind: str, draw: np.random.Generator) -> NDArray[np.uint8]:
    """Random blocks with sensible scales, [..., bytes of a row]."""
    values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    if kind in K_SCALES:  # which the package cannot write
        blocks = draw.integers(0, 256, (*shape[:-1], shape[-1] // values, size), dtype=np.uint8)
        for at in K_SCALES[kind]:
            scale = draw.uniform(0.001, 0.01, blocks.shape[:-1]).astype(np.float16)
            blocks[..., at : at + 2] = scale[..., None].view(np.uint8)
        return blocks.reshape(*shape[:-1], -1)
    floats = draw.standard_normal(shape).astype(np.float32)
    return np.ascontiguousarray(gguf.quantize(floats, gguf.GGMLQuantizationType[kind])).view(np.uint8)


def write(path: Path, architecture: str) -> Path:
    facts, tensors = ARCHITECTURES[architecture]()
    draw = np.random.default_rng(3)
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in facts.items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{architecture}.{key}", value)
    writer.add_array("tokenizer.ggml.tokens", [f"t{n}" for n in range(VOCAB)])
    for name, shape, kind in tensors:
        writer.add_tensor(name, stored(shape, kind, draw), raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module", params=ARCHITECTURES)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp(request.param) / "model.gguf", request.param)


def from_transformers(path: Path, dtype: torch.dtype) -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=dtype, output_loading_info=True
    )
    assert not info["missing_keys"], info
    return model


def open_weights(path: Path, model: Any) -> GgufWeights:
    return open_gguf(path, model.config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_are_those_that_transformers_reads(path: Path, dtype: torch.dtype) -> None:
    want = from_transformers(path, dtype)
    with fast_reader():
        got = from_transformers(path, dtype)
    assert got.config.to_dict() == want.config.to_dict()
    ours, theirs = got.state_dict(), want.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert tensor.dtype == ours[name].dtype
        assert tensor.isfinite().all(), name
        assert torch.equal(ours[name], tensor), name

    weights = open_weights(path, want)
    tied = {"lm_head.weight"} if want.config.tie_word_embeddings else set()
    names = sorted(weights.tensors, reverse=True)
    assert set(names) == set(dict(want.named_parameters(remove_duplicate=False))) - tied
    with ThreadPoolExecutor(4) as pool:  # and in any order, from any thread
        for name, tensor in zip(names, pool.map(lambda name: weights.load(name, dtype), names), strict=True):
            assert torch.equal(tensor, theirs[name]), name
    for name, info in weights.tensors.items():
        assert info.shape == tuple(theirs[name].shape)
        if info.plain:
            assert info.dtype.itemsize * theirs[name].numel() == info.nbytes
        if info.rows:  # a range of the first axis, alone
            size, rows = info.nbytes // info.shape[0], range(1, info.shape[0])
            raw = torch.empty(size * len(rows), dtype=torch.uint8)
            weights.read_into(name, memoryview(raw.numpy()), size)
            out = torch.empty(len(rows), *info.shape[1:], dtype=dtype)
            weights.decode(name, raw, out, rows)
            assert torch.equal(out, theirs[name][1:]), name
    experts = [name for name, info in weights.tensors.items() if len(info.shape) == 3]
    assert all(weights.tensors[name].rows for name in experts)
    assert len(experts) == (2 * LAYERS if "qwen" in want.config.model_type else 0)


def test_rows_that_move_are_decoded_some_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    want = from_transformers(path := write(tmp_path / "m.gguf", "llama"), torch.float32)
    weights, name = open_weights(path, want), "model.layers.0.self_attn.q_proj.weight"
    row = weights.tensors[name].nbytes // E
    for rows in (1, 5, E - 1, E + 1):  # one by one, a last piece that is shorter, all at once
        monkeypatch.setattr(gguf_weights, "MOVED_BYTES", rows * row)
        assert torch.equal(weights.load(name, torch.float32), want.state_dict()[name]), rows


def test_what_is_decoded_straight_and_what_is_not_used(tmp_path: Path) -> None:
    weights = open_weights(
        path := write(tmp_path / "m.gguf", "llama"), from_transformers(path, torch.float32)
    )
    assert weights.unused == ("rope_freqs.weight",)
    assert not weights.tensors["model.layers.1.self_attn.q_proj.weight"].rows  # they are permuted
    assert weights.tensors["model.layers.1.mlp.down_proj.weight"].rows
    moved = {name for name, weight in weights.weights.items() if weight.order is not None}
    assert moved == {f"model.layers.{n}.self_attn.{p}_proj.weight" for n in range(LAYERS) for p in "qk"}
    order = weights.weights["model.layers.0.self_attn.q_proj.weight"].order
    assert order is not None
    assert sorted(order) == list(range(E))
    assert order[1] == 2  # halves of a head, stored in turn
    assert weights.tensors["model.embed_tokens.weight"].nbytes == VOCAB * E // 256 * 210
    assert weights.tensors["lm_head.weight"].plain


def test_only_matrices_whose_rows_move_are_taken_for_such(path: Path) -> None:
    """A transposed matrix, a shifted norm and merged experts are no permutations of rows."""
    if path.parent.name.startswith("llama"):
        pytest.skip("its own test is above")
    weights = open_weights(path, from_transformers(path, torch.float32))
    assert all(weight.order is None for weight in weights.weights.values())


def test_experts_of_a_file_are_read_when_a_prompt_is_routed_to_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lmtt
    from lmtt.run.layout import pack
    from lmtt.streaming.weights import StreamedWeights

    file = write(tmp_path / "m.gguf", "qwen2moe")
    want = pack(lmtt.load(str(file)).trace(input_ids=[3, 3]).data)
    monkeypatch.setattr(StreamedWeights, "would_stay", lambda _self, _tokens: False)
    engine = lmtt.load(str(file), memory="300MiB")
    got = pack(engine.trace(input_ids=[3, 3]).data)
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)
    weights = engine._weights
    assert isinstance(weights, StreamedWeights)
    sizes = {name: info.nbytes for name, info in weights._source.tensors.items()}
    experts = sum(sizes[t] for layer in weights._experts for e in layer for t in e.tensors)
    ahead = sum(sizes[t] for unit in weights._ahead for t in unit.tensors)
    assert experts > 0
    assert weights.bytes_read == ahead + experts * 2 // 3  # one token, two of three experts in each layer


def test_a_file_that_shrinks_after_it_was_opened(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", "llama")
    weights = open_weights(path, from_transformers(path, torch.float32))
    last = max(weights.tensors, key=lambda name: weights.tensors[name].position)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 100)
    with pytest.raises(CheckpointError, match=r"m\.gguf ended while it was read \(blk\.\d\.\S+\)"):
        weights.load(last, torch.float32)
    weights.close()
    weights.close()


def test_a_file_that_lacks_a_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts, tensors = llama()
    config = from_transformers(write(tmp_path / "m.gguf", "llama"), torch.float32).config
    less = [tensor for tensor in tensors if tensor[0] != "blk.1.ffn_up.weight"]
    monkeypatch.setitem(ARCHITECTURES, "llama", lambda: (facts, less))
    with pytest.raises(CheckpointError, match=r"lacks 1 weights, model\.layers\.1\.mlp\.up_proj\.weight"):
        open_gguf(write(tmp_path / "less.gguf", "llama"), config)


@pytest.mark.parametrize("kind", ["Q4_K", "Q2_K", "IQ4_NL"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_blocks_of_any_type_and_dtype(kind: str, dtype: torch.dtype) -> None:
    """Also those that only the package decodes, in more than one piece."""
    values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    one = (
        stored((1, values), kind, np.random.default_rng(1))
        if kind in K_SCALES
        else np.arange(size, dtype=np.uint8)
    )
    blocks = np.tile(one.reshape(-1), (1 << 20) // values + 3)
    want = torch.from_numpy(gguf.dequantize(blocks.reshape(1, -1), gguf.GGMLQuantizationType[kind]))
    assert want.isfinite().all()
    got = decode_blocks(kind, blocks, dtype)
    assert torch.equal(got, want.reshape(-1).to(dtype))
    if kind != "Q4_K":
        assert decoder(kind) == "gguf-py"


@pytest.mark.model
@pytest.mark.slow
def test_the_demo_model_s_logits_are_transformers_own() -> None:
    source = resolve(None)
    path = Path(source.folder) / str(source.gguf)
    want = from_transformers(path, torch.float32)
    with fast_reader():
        got = from_transformers(path, torch.float32)
    ids = torch.randint(3, 40000, (1, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(got(ids).logits, want(ids).logits)
