"""A tiny model that reads text: byte-level tokens, chat markers, a template with a system turn of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from lmtt.engine import Engine

VOCABULARY = 260
TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe good.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{{ m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="session")
def tiny_engine() -> Engine:
    import lmtt
    from lmtt.testing_models import tiny_model

    model = tiny_model("llama", vocab_size=VOCABULARY, max_position_embeddings=256)
    model.generation_config.eos_token_id = None  # random weights may end a text at once
    return lmtt.load(model, tokenizer=byte_tokenizer())
