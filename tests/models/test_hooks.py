"""Reading and writing: identities that need no tolerance, gradients, and what is left behind (nothing)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from steerlab.errors import UsageError
from steerlab.models import LanguageModel, Site, tiny
from steerlab.models.sites import READ_ONLY

TOKENS = torch.tensor([[70, 80, 90, 100, 110, 120, 130, 140, 150]])


def writable(model: LanguageModel, layer: int) -> list[Site]:
    return [Site(kind, layer) for kind in model.site_kinds if kind not in READ_ONLY]


def n_hooks(model: LanguageModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.hf.modules())


RAMP = torch.arange(1.0, 1 + TOKENS.shape[1])[:, None]  # one shift for all keys would cancel in an unrotated softmax


def vector(model: LanguageModel, site: Site, seed: int = 0) -> Tensor:
    return torch.randn(model.width(site.kind), generator=torch.Generator().manual_seed(seed)).to(model.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_identity_and_zero_change_no_bit(family: str, dtype: torch.dtype) -> None:
    model = tiny.model(family, dtype=dtype)
    plain = model.logits(TOKENS)
    assert torch.equal(plain, model.hf(TOKENS).logits)
    sites = [site for layer in range(model.n_layers) for site in writable(model, layer)]
    with model.intervene(dict.fromkeys(sites, lambda x: x)):
        assert torch.equal(model.logits(TOKENS), plain)
    with model.intervene({site: lambda x: x + torch.zeros_like(x) for site in sites}):
        assert torch.equal(model.logits(TOKENS), plain)
        assert torch.equal(model.hf(TOKENS).logits, plain)
    assert n_hooks(model) == 0


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_write_is_read_back_and_changes_the_logits(tiny_models: dict[str, LanguageModel], family: str) -> None:
    model = tiny_models[family]
    plain = model.logits(TOKENS)
    for site in writable(model, 1):
        before = model.cache(TOKENS, [site])[site]
        add = vector(model, site) * RAMP
        with model.intervene({site: lambda x, add=add: x + add}):
            after = model.cache(TOKENS, [site])[site]
            changed = model.logits(TOKENS)
        torch.testing.assert_close(after, before + add, atol=1e-5, rtol=1e-5)
        assert (changed - plain).abs().max() > 1e-3, site


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_resid_post_is_the_next_layers_resid_pre(tiny_models: dict[str, LanguageModel], family: str) -> None:
    model = tiny_models[family]
    add = vector(model, Site("resid_post", 1))
    with model.intervene({Site("resid_post", 1): lambda x: x + add}):
        one = model.logits(TOKENS)
    with model.intervene({Site("resid_pre", 2): lambda x: x + add}):
        assert torch.equal(model.logits(TOKENS), one)


@pytest.mark.parametrize("family", [family for family in tiny.FAMILIES if family != "gpt_neox"])
def test_a_resid_mid_write_is_an_attn_out_write(family: str) -> None:
    model = tiny.model(family, dtype=torch.float64)
    add = vector(model, Site("resid_mid", 1))
    with model.intervene({Site("resid_mid", 1): lambda x: x + add}):
        one = model.logits(TOKENS)
    with model.intervene({Site("attn_out", 1): lambda x: x + add}):
        torch.testing.assert_close(model.logits(TOKENS), one, atol=1e-6 if family == "gpt_neo" else 1e-12, rtol=0)


def test_resid_mid_sees_edits_of_resid_pre_from_any_context(tiny_llama: LanguageModel) -> None:
    seen: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        seen.append(x)
        return x

    mid, pre, attn = Site("resid_mid", 1), Site("resid_pre", 1), Site("attn_out", 1)
    with tiny_llama.intervene({mid: keep}), tiny_llama.intervene({pre: lambda x: x * 2}):
        values = tiny_llama.cache(TOKENS, [pre, mid, attn, Site("mlp_in", 1)])
    assert torch.equal(seen[0], values[pre] + values[attn])
    assert torch.equal(values[mid], values[Site("mlp_in", 1)])


def test_writing_what_a_branch_reads_leaves_the_residual_alone(tiny_llama: LanguageModel) -> None:
    attn_in, pre = Site("attn_in", 1), Site("resid_pre", 1)
    plain = tiny_llama.cache(TOKENS, [pre, Site("resid_mid", 1)])
    with tiny_llama.intervene({attn_in: torch.zeros_like}):
        edited = tiny_llama.cache(TOKENS, [pre, Site("resid_mid", 1), attn_in])
    assert torch.equal(edited[pre], plain[pre])
    assert edited[attn_in].abs().max() == 0
    assert torch.equal(edited[Site("resid_mid", 1)], edited[pre])  # zero queries, keys and values write zero


@pytest.mark.parametrize("family", ["gpt2", "phi3", "gpt_neox"])
def test_a_slice_of_a_fused_projection_leaves_the_others_alone(
    tiny_models: dict[str, LanguageModel], family: str
) -> None:
    model = tiny_models[family]
    sites = [Site(kind, 1) for kind in "qkv"]
    plain = model.cache(TOKENS, sites)
    for site in sites:
        with model.intervene({site: torch.zeros_like}):
            edited = model.cache(TOKENS, sites)
        assert edited[site].abs().max() == 0
        assert all(torch.equal(edited[other], plain[other]) for other in sites if other != site)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_cached_decoding_equals_the_full_forward(family: str) -> None:
    """Longer than the sliding windows of the tiny models; fp64, GPT-Neo's attention scores are fp32 in transformers."""
    model = tiny.model(family, dtype=torch.float64)
    tokens = torch.randint(5, model.d_vocab, (2, 40), generator=torch.Generator().manual_seed(1))
    sites = writable(model, 1)
    adds = {site: 0.3 * vector(model, site) for site in sites}
    edits = {site: lambda x, add=add: x + add for site, add in adds.items()}
    with model.intervene(edits):
        full = model.hidden(tokens)
        kv = DynamicCache(config=model.hf.config)
        parts = [model.hidden(tokens[:, :30], kv=kv)]
        parts += [model.hidden(tokens[:, i : i + 1], kv=kv) for i in range(30, 40)]
    torch.testing.assert_close(torch.cat(parts, 1), full, atol=1e-5 if family == "gpt_neo" else 1e-9, rtol=0)


def test_with_a_cache_only_new_positions_pass_a_site(tiny_llama: LanguageModel) -> None:
    seen: list[int] = []

    def count(x: Tensor) -> Tensor:
        seen.append(x.shape[1])
        return x

    kv = DynamicCache(config=tiny_llama.hf.config)
    with tiny_llama.intervene({Site("z", 0): count}):
        tiny_llama.hidden(TOKENS[:, :5], kv=kv)
        tiny_llama.hidden(TOKENS[:, 5:6], kv=kv)
    assert seen == [5, 1]


def test_edits_compose_in_the_order_of_their_contexts(tiny_llama: LanguageModel) -> None:
    site = Site("resid_post", 1)
    plain = tiny_llama.cache(TOKENS, [site])[site]
    with tiny_llama.intervene({site: lambda x: x + 1}), tiny_llama.intervene({site: lambda x: x * 2}):
        assert torch.equal(tiny_llama.cache(TOKENS, [site])[site], (plain + 1) * 2)
    with tiny_llama.intervene({site: lambda x: x * 2}), tiny_llama.intervene({site: lambda x: x + 1}):
        assert torch.equal(tiny_llama.cache(TOKENS, [site])[site], plain * 2 + 1)


def test_contexts_may_close_in_any_order(tiny_llama: LanguageModel) -> None:
    site = Site("resid_post", 1)
    plain = tiny_llama.cache(TOKENS, [site])[site]
    double, add = tiny_llama.intervene({site: lambda x: x * 2}), tiny_llama.intervene({site: lambda x: x + 1})
    double.__enter__()
    add.__enter__()
    double.__exit__(None, None, None)
    assert torch.equal(tiny_llama.cache(TOKENS, [site])[site], plain + 1)
    add.__exit__(None, None, None)
    assert n_hooks(tiny_llama) == 0


def test_the_same_edit_twice_acts_twice(tiny_llama: LanguageModel) -> None:
    site = Site("resid_post", 1)
    plain = tiny_llama.cache(TOKENS, [site])[site]
    edits = {site: lambda x: x + 1}
    with tiny_llama.intervene(edits), tiny_llama.intervene(edits):
        assert torch.equal(tiny_llama.cache(TOKENS, [site])[site], plain + 1 + 1)


def test_exceptions_leave_the_model_as_it_was(tiny_llama: LanguageModel) -> None:
    plain = tiny_llama.logits(TOKENS)
    sites = [site for layer in range(tiny_llama.n_layers) for site in writable(tiny_llama, layer)]

    def broken(x: Tensor) -> Tensor:
        raise KeyError("inside the forward pass")

    with pytest.raises(KeyError), tiny_llama.intervene(dict.fromkeys(sites, broken)):
        tiny_llama.logits(TOKENS)
    with pytest.raises(KeyError), tiny_llama.intervene({sites[0]: broken}):
        tiny_llama.cache(TOKENS, [Site("pattern", 0), Site("resid_mid", 0)])
    with pytest.raises(ZeroDivisionError), tiny_llama.intervene({site: lambda x: x + 1 for site in sites}):
        raise ZeroDivisionError
    assert n_hooks(tiny_llama) == 0
    assert tiny_llama.hf.config._attn_implementation == "sdpa"
    assert torch.equal(tiny_llama.logits(TOKENS), plain)


def test_models_do_not_see_each_other() -> None:
    one, other = tiny.model("llama"), tiny.model("llama", seed=1)
    plain = other.logits(TOKENS)
    with one.intervene({Site("resid_post", 1): lambda x: x + 1}):
        assert torch.equal(other.logits(TOKENS), plain)
        with other.intervene({Site("resid_post", 0): torch.zeros_like}):
            assert not torch.equal(other.logits(TOKENS), plain)
        assert torch.equal(other.logits(TOKENS), plain)


def test_bad_sites_and_bad_edits_are_refused(tiny_llama: LanguageModel) -> None:
    refused = [(Site("resid_post", 4), "layers 0…3"), (Site("ln1_post", 0), "none"), (Site("pattern", 0), "read only")]
    for site, message in refused:
        with pytest.raises(UsageError, match=message), tiny_llama.intervene({site: lambda x: x}):
            pass
    for edit in (lambda x: x[:, :1], lambda x: x.double()):
        with (
            pytest.raises(ValueError, match=r"resid_post\.1 returned"),
            tiny_llama.intervene({Site("resid_post", 1): edit}),
        ):
            tiny_llama.logits(TOKENS)
    assert n_hooks(tiny_llama) == 0


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_gradients_reach_a_vector_at_every_site(tiny_models: dict[str, LanguageModel], family: str) -> None:
    model = tiny_models[family]
    sites = writable(model, 1)
    vectors = {site: torch.zeros(model.width(site.kind), requires_grad=True) for site in sites}
    with model.intervene({site: lambda x, site=site: x + vectors[site] * RAMP for site in sites}):
        model.logits(TOKENS)[0, -1, 7].backward()
    for site, value in vectors.items():
        assert value.grad is not None
        assert value.grad.abs().max() > 0, site
    assert all(parameter.grad is None for parameter in model.hf.parameters())


@pytest.mark.parametrize("kind", ["resid_pre", "resid_mid", "q", "v", "z", "mlp_neurons", "attn_in", "ln2"])
def test_gradients_equal_finite_differences(kind: str) -> None:
    """GPT-2, whose norms compute in the dtype of their input: in fp64 the differences are exact to 1e-7."""
    model = tiny.model("gpt2", dtype=torch.float64)
    site, direction = Site(kind, 1), vector(model, Site(kind, 1))

    def loss(step: Tensor) -> Tensor:
        with model.intervene({site: lambda x: x + step * direction}):
            return torch.log_softmax(model.logits(TOKENS), -1)[0, :, 7].sum()

    at = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(loss(at), at)
    with torch.no_grad():
        measured = (loss(at + 1e-4) - loss(at - 1e-4)) / 2e-4
    torch.testing.assert_close(slope, measured, atol=1e-6, rtol=1e-6)


def test_a_cache_keeps_its_graph(tiny_llama: LanguageModel) -> None:
    add = torch.zeros(tiny_llama.d_model, requires_grad=True)
    last = Site("resid_post", 3)
    with tiny_llama.intervene({Site("resid_post", 0): lambda x: x + add}):
        tiny_llama.cache(TOKENS, [last])[last].square().sum().backward()
    assert add.grad is not None
    assert add.grad.abs().max() > 0


def test_padding_on_the_left_is_invisible(tiny_models: dict[str, LanguageModel]) -> None:
    model = tiny_models["llama"]
    site = Site("resid_post", 3)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), TOKENS], 1)
    mask = (torch.arange(padded.shape[1]) >= 3).long()[None]
    alone, behind = model.cache(TOKENS, [site])[site], model.cache(padded, [site], mask=mask)[site][:, 3:]
    torch.testing.assert_close(behind, alone, atol=1e-4, rtol=1e-4)  # rotary positions are relative


def test_a_resid_post_vector_is_a_down_projection_bias() -> None:
    model = tiny.model("llama", dtype=torch.float64)
    add = vector(model, Site("resid_post", 2))
    with model.intervene({Site("resid_post", 2): lambda x: x + add}):
        hooked = model.logits(TOKENS)
    model.hf.model.layers[2].mlp.down_proj.bias = torch.nn.Parameter(add, requires_grad=False)
    torch.testing.assert_close(model.logits(TOKENS), hooked, atol=1e-12, rtol=0)
