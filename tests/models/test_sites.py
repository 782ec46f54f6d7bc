"""Every family: each site is where the glossary says, with the width it states."""

from __future__ import annotations

import pytest
import torch

from steerlab.errors import UsageError
from steerlab.models import LanguageModel, Site, tiny
from steerlab.models.sites import KINDS

EVERYWHERE = {"resid_pre", "resid_post", "attn_in", "attn_out", "mlp_in", "mlp_out", "q", "k", "v", "z", "pattern"}
TOKENS = torch.tensor([[70, 80, 90, 100, 110, 120, 130], [71, 81, 91, 101, 111, 121, 131]])


def test_a_site_parses_and_sorts() -> None:
    assert Site.parse("resid_post.26") == Site("resid_post", 26)
    assert str(Site("ln2_post", 3)) == "ln2_post.3"
    assert sorted([Site("z", 10), Site("z", 9), Site("q", 11)]) == [Site("q", 11), Site("z", 9), Site("z", 10)]


@pytest.mark.parametrize("text", ["resid_post", "resid_post.", "resid_post.-1", "resid_post.1.5", ".3", "resid_pots.3"])
def test_other_text_is_no_site(text: str) -> None:
    with pytest.raises(UsageError):
        Site.parse(text)


def test_a_misspelt_kind_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="resid_post"):
        Site("resid_pots", 0)
    with pytest.raises(UsageError, match="count from 0"):
        Site("resid_post", -1)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_site_has_its_shape(tiny_models: dict[str, LanguageModel], family: str) -> None:
    model = tiny_models[family]
    assert EVERYWHERE | {"mlp_neurons"} <= set(model.site_kinds) <= set(KINDS)
    sites = [Site(kind, layer) for kind in model.site_kinds for layer in range(model.n_layers)]
    values = model.cache(TOKENS, sites)
    assert list(values) == sites
    batch, pos = TOKENS.shape
    for site, value in values.items():
        if site.kind == "pattern":
            assert value.shape == (batch, model.n_heads, pos, pos)
            assert torch.allclose(value.sum(-1), torch.ones(batch, model.n_heads, pos), atol=1e-5)
            assert value.triu(1).abs().max() == 0
        else:
            assert value.shape == (batch, pos, model.width(site.kind)), site
    assert model.width("q") == model.width("z") == model.n_heads * model.d_head
    assert model.width("k") == model.width("v") == model.n_kv_heads * model.d_head


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_parts_of_a_block_add_up(tiny_models: dict[str, LanguageModel], family: str) -> None:
    model = tiny_models[family]
    for layer in range(model.n_layers):
        kinds = [kind for kind in model.site_kinds if kind != "pattern"]
        at = {site.kind: value for site, value in model.cache(TOKENS, [Site(kind, layer) for kind in kinds]).items()}
        same = torch.testing.assert_close
        same(at["resid_pre"] + at["attn_out"] + at["mlp_out"], at["resid_post"], atol=1e-5, rtol=1e-5)
        assert torch.equal(at["attn_in"], at["resid_pre"])
        if model.norm_placement == "parallel":
            assert torch.equal(at["mlp_in"], at["resid_pre"])
        else:
            assert torch.equal(at["mlp_in"], at["resid_mid"])
        block = model.blocks[layer]
        if "ln1_post" in at:
            assert torch.equal(at["ln1_post"], at["attn_out"])
            assert torch.equal(at["ln2_post"], at["mlp_out"])
        else:
            z, neurons = _writers(block)
            same(z(at["z"]), at["attn_out"], atol=1e-5, rtol=1e-5)
            same(neurons(at["mlp_neurons"]), at["mlp_out"], atol=1e-5, rtol=1e-5)


def _writers(block: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules that turn z into attn_out and mlp_neurons into mlp_out."""
    names = ("o_proj", "down_proj", "c_proj", "out_proj", "dense", "dense_4h_to_h")
    return [module for path, module in block.named_modules() if path.rpartition(".")[2] in names]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_z_is_the_pattern_times_v(tiny_models: dict[str, LanguageModel], family: str) -> None:
    model = tiny_models[family]
    at = {site.kind: value for site, value in model.cache(TOKENS, [Site(k, 1) for k in ("pattern", "v", "z")]).items()}
    v = at["v"].unflatten(-1, (model.n_kv_heads, model.d_head)).transpose(1, 2)
    v = v.repeat_interleave(model.n_heads // model.n_kv_heads, dim=1)
    z = (at["pattern"] @ v).transpose(1, 2).flatten(-2)
    torch.testing.assert_close(z, at["z"], atol=1e-5, rtol=1e-5)


def test_families_differ_where_they_should(tiny_models: dict[str, LanguageModel]) -> None:
    placement = {family: model.norm_placement for family, model in tiny_models.items()}
    post = {"gemma2", "gemma3", "olmo2"}
    assert {family for family, kind in placement.items() if kind == "post"} == post
    assert {family for family, kind in placement.items() if kind == "parallel"} == {"gpt_neox"}
    assert "ln1" not in tiny_models["olmo2"].site_kinds
    assert {"ln1", "ln1_post"} <= set(tiny_models["gemma2"].site_kinds)
    assert {f for f, model in tiny_models.items() if model.n_kv_heads == model.n_heads} == {
        "gpt2",
        "gpt_neo",
        "gpt_neox",
    }


def test_a_parallel_block_has_no_resid_mid(tiny_models: dict[str, LanguageModel]) -> None:
    with pytest.raises(UsageError, match=r"resid_mid\.0: this architecture has none"):
        tiny_models["gpt_neox"].cache(TOKENS, [Site("resid_mid", 0)])


def test_a_sequential_gpt_neox_has_resid_mid() -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        use_parallel_residual=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        model = LanguageModel(GPTNeoXForCausalLM(config), tiny.tokenizer(), name="sequential")
    assert model.norm_placement == "pre"
    assert "resid_mid" in model.site_kinds


def test_a_family_without_a_row_is_refused() -> None:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, ffn_dim=8, word_embed_proj_dim=8
    )
    with torch.random.fork_rng(devices=[]):
        hf = OPTForCausalLM(config)
    with pytest.raises(UsageError, match="unknown model family 'opt'"):
        LanguageModel(hf, tiny.tokenizer(), name="opt")


def test_a_model_that_does_not_fit_its_row_is_refused_at_load() -> None:
    """A block that scales its residual (as Granite does) is no Llama, whatever its modules are called."""
    hf = tiny.model("llama").hf
    hf.model.layers[2].register_forward_hook(lambda module, args, output: output * 1.5)
    with pytest.raises(RuntimeError, match="block 2: resid_pre"):
        LanguageModel(hf, tiny.tokenizer(), name="scaled")
