"""Tiny models are repeatable and not flat; their tokenizer loses nothing."""

from __future__ import annotations

import pytest
import torch

from steerlab.errors import UsageError
from steerlab.models import LanguageModel, tiny


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_logits_are_not_flat(tiny_models: dict[str, LanguageModel], family: str) -> None:
    tokens = torch.randint(5, 261, (4, 32), generator=torch.Generator().manual_seed(0))
    logits = tiny_models[family].logits(tokens)
    assert 1 < logits.std() < 4
    assert torch.softmax(logits, -1).max(-1).values.mean() < 0.9


def test_the_seed_decides_and_torchs_own_state_is_left_alone() -> None:
    state = torch.get_rng_state()
    one = tiny.model("qwen3", seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert tiny.model("qwen3", seed=5).weights_sha256 == one.weights_sha256
    assert tiny.model("qwen3", seed=6).weights_sha256 != one.weights_sha256


@pytest.mark.parametrize("text", ["", "3 + 4 = 7", " two  spaces\n\ttab", "Grüße, 世界 🙂", "<|pad|> inside"])
def test_the_tokenizer_is_lossless(text: str) -> None:
    tokenizer = tiny.tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    if "<|" not in text:
        assert len(ids) == len(text.encode())


def test_the_chat_template_marks_turns() -> None:
    tokenizer = tiny.tokenizer()
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|system|>Be brief.<|end|><|user|>1+1?<|end|><|assistant|>"
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert tokenizer("<|user|>1")["input_ids"] == [
        tokenizer.convert_tokens_to_ids("<|user|>"),
        *tokenizer("1")["input_ids"],
    ]


def test_an_unknown_family_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean gemma"):
        tiny.model("gemma")
