"""LoRA: no bit changes while B is zero; it is a change of the weights; gradients are PEFT's; what is refused."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from steerlab.adapters import Adapter, AdapterSpec, Attached, LoRA, LoRAWeights, Steering
from steerlab.adapters.lora import linear_modules
from steerlab.errors import UsageError
from steerlab.models import LanguageModel, Site, tiny
from steerlab.runs import decode, encode

TOKENS = torch.randint(5, 261, (3, 11), generator=torch.Generator().manual_seed(7))
DEFAULT = LoRA()


@lru_cache
def exact(family: str = "llama") -> LanguageModel:
    return tiny.model(family, dtype=torch.float64)


def drawn(model: LanguageModel, spec: LoRA = DEFAULT, seed: int = 1, dtype: torch.dtype = torch.float64) -> LoRAWeights:
    """A LoRA with random A and B that moves logits by about their own size."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {
        path: tuple(torch.randn(p.shape, generator=generator, dtype=dtype) / p.shape[1] ** 0.5 / 2 for p in pair)
        for path, pair in spec.init(model).pairs.items()
    }
    return LoRAWeights(spec, pairs)


def n_hooks(model: LanguageModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.hf.modules())


def peft_twin(model: LanguageModel, weights: LoRAWeights) -> Any:
    """PEFT's own LoRA with the same matrices on a copy of the model."""
    from peft import LoraConfig, get_peft_model

    spec = weights.spec
    config = LoraConfig(
        r=spec.rank, lora_alpha=spec.alpha, target_modules=list(weights.pairs), fan_in_fan_out=model.family == "gpt2"
    )
    twin = get_peft_model(tiny.model(model.family.removesuffix("_text"), dtype=model.dtype).hf, config).to(model.dtype)
    state = {f"base_model.model.{n}".replace(".weight", ".default.weight"): p for n, p in weights.snapshot().items()}
    missing = twin.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    return twin


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_zero_b_changes_no_bit(family: str, tiny_models: dict[str, LanguageModel]) -> None:
    for model in (tiny_models[family], tiny.model(family, dtype=torch.bfloat16)):
        bare = model.logits(TOKENS)
        weights = LoRA(rank=4).init(model)
        assert all(p.dtype == torch.float32 for p in weights.parameters())
        with weights.attach(model):
            assert torch.equal(model.logits(TOKENS), bare)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_it_is_a_change_of_the_weights(family: str) -> None:
    model, twin = exact(family), tiny.model(family, dtype=torch.float64)
    weights = drawn(model, LoRA(rank=3, alpha=5.0))
    for path, (down, up) in weights.pairs.items():
        change = 5 / 3 * (up @ down).detach()
        weight = twin.hf.get_submodule(path).weight
        weight.data += change if weight.shape == change.shape and family != "gpt2" else change.T
    with weights.attach(model):
        moved = model.logits(TOKENS)
    assert (moved - twin.logits(TOKENS)).abs().max() < (1e-4 if family == "gpt_neo" else 1e-9)  # fp32 inside GPT-Neo
    assert (moved - model.logits(TOKENS)).abs().max() > 1e-1


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks transformers for it
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "phi3", "gpt_neox"])
def test_logits_and_gradients_are_pefts(family: str) -> None:
    model = exact(family)
    weights = drawn(model, LoRA(rank=4, alpha=6.0))
    twin = peft_twin(model, weights)
    pull = torch.randn(3, 11, 261, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with weights.attach(model):
        ours = model.logits(TOKENS)
        (ours * pull).sum().backward()
    theirs = twin(TOKENS).logits
    (theirs * pull).sum().backward()
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-10)
    named = dict(twin.named_parameters())
    assert sum(p.requires_grad for p in named.values()) == len(list(weights.parameters()))
    for name, parameter in weights.named().items():
        expected = named[f"base_model.model.{name}".replace(".weight", ".default.weight")].grad
        assert torch.allclose(parameter.grad, expected, rtol=1e-8, atol=1e-8), name
        assert parameter.grad.abs().max() > 1e-3, name
    assert all(p.grad is None for p in model.hf.parameters()), "a frozen weight got a gradient"


def test_any_leading_axes_are_alike() -> None:
    model = exact()
    weights = drawn(model, LoRA(rank=2, targets=("q_proj",), layers=(0,)))
    module = model.hf.get_submodule("model.layers.0.self_attn.q_proj")
    x = torch.randn(2, 3, 5, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    found = []
    with weights.attach(model):
        for shaped in (x, x.flatten(0, 1), x.reshape(1, 30, 32), x.reshape(30, 32), x.transpose(0, 1)):
            out = module(shaped)
            assert out.shape == shaped.shape
            grads = torch.autograd.grad((out**3).sum(), [*weights.parameters(), x])
            found.append((out.detach().reshape(-1, 32).sort(0).values, *grads))
        assert module(x[0, 0, 0]).shape == (32,)
    for other in found[1:]:
        for ours, theirs in zip(found[0], other, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-10)


def test_gradients_of_a_bf16_model_are_fp32_sums() -> None:
    model = tiny.model("llama", dtype=torch.bfloat16)
    weights = drawn(model, LoRA(rank=4, targets=("down_proj",), layers=(3,)), dtype=torch.float32)
    ((down, up),) = weights.pairs.values()
    seen: dict[str, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        seen["x"] = x.detach()
        return x

    def keep_gradient(y: Tensor) -> Tensor:
        y.register_hook(lambda grad: seen.__setitem__("grad", grad))
        return y

    edits = {Site("mlp_neurons", 3): keep, Site("mlp_out", 3): keep_gradient}
    tokens = torch.randint(5, 261, (8, 200), generator=torch.Generator().manual_seed(1))
    with weights.attach(model), model.intervene(edits):
        (model.hidden(tokens).float() ** 2).sum().backward()
    x, grad = (seen[name].double().flatten(0, -2) for name in ("x", "grad"))
    inner = (seen["x"].flatten(0, -2) @ down.to(torch.bfloat16).T).double()
    for parameter, expected in (
        (up, weights.scale * grad.T @ inner),
        (down, weights.scale * (grad @ up.double()).T @ x),
    ):
        assert parameter.grad.dtype == torch.float32
        assert (parameter.grad.double() - expected).norm() < 1e-5 * expected.norm()


def test_sites_see_the_changed_module_whichever_was_there_first() -> None:
    model = exact()
    weights = drawn(model, LoRA(rank=2, targets=("q_proj", "down_proj"), layers=(1,)))
    sites = [Site("q", 1), Site("mlp_out", 1), Site("resid_post", 1)]
    with weights.attach(model):
        inside = model.cache(TOKENS, sites)
    kept: dict[Site, Tensor] = {}

    def keeping(site: Site):
        def keep(x: Tensor) -> Tensor:
            kept[site] = x
            return x

        return keep

    with model.intervene({site: keeping(site) for site in sites}), weights.attach(model):
        model.logits(TOKENS)
    bare = model.cache(TOKENS, sites)
    for site in sites:
        assert torch.equal(kept[site], inside[site])
        assert (inside[site] - bare[site]).abs().max() > 1e-3


def test_attach_leaves_nothing_behind() -> None:
    model = exact()
    bare, weights, vectors = model.logits(TOKENS), drawn(model), Steering().init(model)
    with weights.attach(model) as attached:
        assert isinstance(attached, Attached)
        attached.place(None, None)
        once = model.logits(TOKENS)
        with vectors.attach(model), weights.attach(model):
            twice = model.logits(TOKENS)
        assert torch.equal(model.logits(TOKENS), once)
    with (2.0 * weights).attach(model):
        assert torch.allclose(model.logits(TOKENS), twice, rtol=0, atol=1e-10)
    with pytest.raises(ZeroDivisionError), weights.attach(model):
        raise ZeroDivisionError
    with pytest.raises(UsageError), weights.attach(exact("gpt2")):
        raise AssertionError("it does not fit")
    assert n_hooks(model) == n_hooks(exact("gpt2")) == 0
    assert torch.equal(model.logits(TOKENS), bare)


def test_rank_one_on_a_down_projection_is_a_vector_of_varying_strength() -> None:
    model = exact()
    weights = drawn(model, LoRA(rank=1, alpha=1.0, targets=("down_proj",), layers=(2,)))
    ((down, up),) = weights.pairs.values()
    before = model.cache(TOKENS, [Site("mlp_neurons", 2), Site("resid_post", 2)])
    with weights.attach(model):
        after = model.cache(TOKENS, [Site("resid_post", 2)])[Site("resid_post", 2)]
    strength = before[Site("mlp_neurons", 2)] @ down[0]
    assert torch.allclose(after - before[Site("resid_post", 2)], strength[..., None] * up[:, 0], rtol=0, atol=1e-12)


def test_init_is_a_function_of_the_generator() -> None:
    model = exact()
    first, again, other = (LoRA().init(model, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert first.snapshot().keys() == again.snapshot().keys()
    assert all(torch.equal(tensor, again.snapshot()[name]) for name, tensor in first.snapshot().items())
    for path, (down, up) in first.pairs.items():
        assert not torch.equal(down, other.pairs[path][0]) and not up.any()
        bound = 1 / math.sqrt(down.shape[1])  # Kaiming-uniform with a = √5
        assert 0.9 * bound < down.abs().max() <= bound
    assert all(
        torch.equal(a, b) for a, b in zip(LoRA().init(model).parameters(), LoRA().init(model).parameters(), strict=True)
    )


def test_snapshot_and_restore() -> None:
    model = exact()
    weights, other = drawn(model, seed=1), drawn(model, seed=2)
    state = weights.snapshot()
    assert list(state)[:2] == [f"model.layers.0.mlp.down_proj.lora_{letter}.weight" for letter in "AB"]
    assert (
        weights.n_parameters == sum(p.numel() for p in weights.parameters()) == sum(t.numel() for t in state.values())
    )
    kept = list(weights.parameters())
    weights.restore(other.snapshot())
    assert all(a is b for a, b in zip(kept, weights.parameters(), strict=True)), "parameters must stay those optimised"
    assert torch.equal(weights.snapshot()[next(iter(state))], other.snapshot()[next(iter(state))])
    weights.restore(state)
    assert all(torch.equal(state[name], tensor) for name, tensor in weights.snapshot().items())
    with pytest.raises(UsageError, match="another spec"):
        weights.restore(drawn(model, LoRA(layers=(0,))).snapshot())


@pytest.mark.parametrize(
    ("family", "spec", "expected"),
    [
        ("llama", LoRA(targets=("q_proj", "v_proj"), layers=(1, 3)), 4),
        ("llama", LoRA(), 4 * 7),
        ("llama", LoRA(targets=("model.layers.2.mlp.down_proj",)), 1),
        ("gpt2", LoRA(), 4 * 4),
        ("gpt2", LoRA(targets=("c_proj",)), 4 * 2),
        ("gpt2", LoRA(targets=("mlp.c_proj",), layers=(0,)), 1),
        ("phi3", LoRA(targets=("qkv_proj", "gate_up_proj")), 4 * 2),
        ("gpt_neox", LoRA(targets=("query_key_value",)), 4),
    ],
)
def test_targets_are_named_as_in_peft(family: str, spec: LoRA, expected: int) -> None:
    model = exact(family)
    found = spec.modules(model)
    assert len(found) == expected
    weights = spec.init(model)
    assert weights.first_block == min(module.layer for module in found)
    assert {"lm_head", "embed_out"}.isdisjoint(module.path for module in linear_modules(model))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (lambda: LoRA(rank=0), "rank is 0"),
        (lambda: LoRA(targets="q_proj"), r'write \("q_proj",\)'),
        (lambda: LoRA(targets=()), "no targets"),
        (lambda: LoRA(targets=("q_prj",)).init(exact()), "did you mean q_proj"),
        (lambda: LoRA(targets=("lm_head",)).init(exact()), "unknown LoRA target"),
        (lambda: LoRA(targets=("c_attn",)).init(exact()), "unknown LoRA target"),
        (lambda: LoRA(layers=(4,)).init(exact()), "0 to 3"),
        (lambda: LoRA(targets=("model.layers.2.mlp.down_proj",), layers=(1,)).init(exact()), "no module of layers"),
        (lambda: LoRAWeights(LoRA(), {}), "at least one module"),
        (lambda: drawn(exact()).check(exact("gpt2")), "belongs to another model"),
        (lambda: drawn(exact("qwen2")).check(exact("qwen3")), "belongs to another model"),
    ],
)
def test_refusals_are_one_line(spec: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        spec()
    assert "\n" not in str(caught.value)


def test_it_is_an_adapter_and_its_spec_is_data() -> None:
    assert isinstance(LoRA(), AdapterSpec) and isinstance(Steering(), AdapterSpec)
    assert isinstance(drawn(exact()), Adapter)
    for spec in (LoRA(), LoRA(4, 8.0, ("q_proj", "v_proj"), (1, 2))):
        assert decode(encode(spec)) == spec
