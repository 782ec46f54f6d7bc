"""The handle adds nothing of its own to a forward pass and tells models apart."""

from __future__ import annotations

import pytest
import torch

from steerlab.errors import UsageError
from steerlab.models import LanguageModel, tiny

TOKENS = torch.tensor([[70, 80, 90, 100], [71, 81, 91, 101]])


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_logits_are_the_hf_models_own(tiny_models: dict[str, LanguageModel], family: str) -> None:
    model = tiny_models[family]
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    assert torch.equal(model.logits(TOKENS), model.hf(TOKENS).logits)
    assert torch.equal(model.logits(TOKENS, mask=mask), model.hf(TOKENS, attention_mask=mask).logits)
    assert torch.equal(model.logits(TOKENS, mask=mask.bool()), model.logits(TOKENS, mask=mask))
    positions = torch.arange(4)[None].expand(2, -1)
    assert torch.equal(model.unembed(model.hidden(TOKENS, positions=positions)), model.logits(TOKENS))
    assert model.hidden(TOKENS).shape == (2, 4, model.d_model)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_sizes_are_the_configs(tiny_models: dict[str, LanguageModel], family: str) -> None:
    model = tiny_models[family]
    assert (model.n_layers, model.d_model, model.n_heads) == (4, 32, 4)
    assert len(model.blocks) == 4
    assert model.d_vocab == len(model.tokenizer) == model.hf.config.vocab_size
    assert model.context == 512
    assert model.d_mlp == (128 if family in ("gpt2", "gpt_neo") else 64)
    assert model.d_head == (16 if family in ("qwen3", "gemma2", "gemma3") else 8)
    assert (model.logit_softcap is not None) == (family == "gemma2")
    assert not model.hf.training
    assert not any(parameter.requires_grad for parameter in model.hf.parameters())


def test_the_final_norm_is_the_last_thing_before_hidden(tiny_models: dict[str, LanguageModel]) -> None:
    from steerlab.models import Site

    for model in tiny_models.values():
        last = Site("resid_post", 3)
        assert torch.equal(model.final_norm(model.cache(TOKENS, [last])[last]), model.hidden(TOKENS))


def test_weights_have_one_digest_in_every_dtype() -> None:
    digests = {tiny.model("llama", dtype=dtype).weights_sha256 for dtype in (torch.float32, torch.bfloat16)}
    assert len(digests) == 1
    assert tiny.model("llama", seed=1).weights_sha256 not in digests


def test_a_wrapped_model_is_digested_from_its_parameters(tiny_llama: LanguageModel) -> None:
    wrapped = LanguageModel(tiny.model("llama").hf, tiny_llama.tokenizer, name="mine")
    assert wrapped.weights_sha256 == tiny_llama.weights_sha256
    changed = tiny.model("llama").hf
    changed.model.norm.weight += 1e-3
    assert LanguageModel(changed, tiny_llama.tokenizer, name="mine").weights_sha256 != tiny_llama.weights_sha256


def test_configurations_have_digests(tiny_models: dict[str, LanguageModel]) -> None:
    assert len({model.config_sha256 for model in tiny_models.values()}) == len(tiny.FAMILIES)
    assert tiny.model("llama", seed=3, dtype=torch.bfloat16).config_sha256 == tiny_models["llama"].config_sha256


def test_a_model_without_a_head_is_refused_in_one_line(tiny_llama: LanguageModel) -> None:
    with pytest.raises(UsageError, match=r"LlamaModel.* has no unembedding matrix") as caught:
        LanguageModel(tiny_llama.backbone, tiny_llama.tokenizer, name="headless")
    assert "\n" not in str(caught.value)
