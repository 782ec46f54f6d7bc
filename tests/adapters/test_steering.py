"""Steering vectors: identities with the untouched model, a bias and separate runs; algebra; what is refused."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn

from steerlab.adapters import RowBank, Scope, Steering, SteeringVectors
from steerlab.errors import UsageError
from steerlab.models import LanguageModel, Site, tiny

EVERYWHERE = Scope.all()
TOKENS = torch.randint(5, 261, (3, 11), generator=torch.Generator().manual_seed(7))


@lru_cache
def exact(family: str = "llama") -> LanguageModel:
    return tiny.model(family, dtype=torch.float64)


def drawn(
    model: LanguageModel,
    seed: int,
    layers: tuple[int, ...] | None = None,
    site: str = "resid_post",
    scope: Scope = EVERYWHERE,
) -> SteeringVectors:
    """A set with random fp64 vectors of about the residual stream's size."""
    generator = torch.Generator().manual_seed(seed)
    sites = [Site(site, layer) for layer in (range(model.n_layers) if layers is None else layers)]
    width = model.width(site)
    return SteeringVectors(
        {s: 0.3 * torch.randn(width, generator=generator, dtype=torch.float64) for s in sites}, scope
    )


def n_hooks(model: LanguageModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.hf.modules())


def same(a: SteeringVectors, b: SteeringVectors) -> bool:
    return a.sites == b.sites and all(torch.equal(a.vectors[s], b.vectors[s]) for s in a.sites)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_zero_vectors_change_no_bit(family: str, tiny_models: dict[str, LanguageModel]) -> None:
    model = tiny_models[family]
    bare = model.logits(TOKENS)
    for kind in ("resid_post", "attn_out", "mlp_neurons", "q"):
        with Steering(site=kind).init(model).attach(model):
            assert torch.equal(model.logits(TOKENS), bare)
    zero = Steering().init(model)
    with RowBank([None, zero]).attach(model, rows=torch.tensor([0, 1, 0])):
        assert torch.equal(model.logits(TOKENS), bare)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_vector_is_added_to_its_site(family: str) -> None:
    model = exact(family)
    vectors = drawn(model, 1, layers=(1,))
    site = Site("resid_post", 1)
    before = model.cache(TOKENS, [site])[site]
    with vectors.attach(model):
        after = model.cache(TOKENS, [site])[site]
        moved = model.logits(TOKENS)
    assert torch.equal(after, before + vectors.vectors[site])
    assert (moved - model.logits(TOKENS)).abs().max() > 1e-2


def test_hook_is_a_bias_on_the_down_projection() -> None:
    model, twin = exact(), tiny.model("llama", dtype=torch.float64)
    vectors = drawn(model, 2)
    for site, vector in vectors.vectors.items():
        twin.blocks[site.layer].mlp.down_proj.bias = nn.Parameter(vector.detach().clone())
    with vectors.attach(model):
        hooked = model.logits(TOKENS)
    assert (hooked - twin.logits(TOKENS)).abs().max() < 1e-12


def test_gradient_is_that_of_the_bias() -> None:
    model, twin = exact(), tiny.model("llama", dtype=torch.float64)
    vectors = drawn(model, 2)
    biases = [nn.Parameter(v.detach().clone()) for v in vectors.parameters()]
    for block, bias in zip(twin.blocks, biases, strict=True):
        block.mlp.down_proj.bias = bias
    weights = torch.randn(3, 11, 261, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with vectors.attach(model):
        (model.logits(TOKENS) * weights).sum().backward()
    (twin.logits(TOKENS) * weights).sum().backward()
    for vector, bias in zip(vectors.parameters(), biases, strict=True):
        assert torch.allclose(vector.grad, bias.grad, rtol=1e-9, atol=1e-9)


def test_bf16_model_keeps_an_fp32_master_and_sums_its_gradient_in_fp32() -> None:
    model = tiny.model("llama", dtype=torch.bfloat16)
    vectors = Steering(layers=(3,)).init(model)
    assert all(v.dtype == torch.float32 for v in vectors.parameters())
    seen: list[Tensor] = []

    def keep_gradient(x: Tensor) -> Tensor:
        x.register_hook(seen.append)
        return x

    tokens = torch.randint(5, 261, (8, 200), generator=torch.Generator().manual_seed(1))
    with vectors.attach(model), model.intervene({Site("resid_post", 3): keep_gradient}):
        (model.hidden(tokens).float() ** 2).sum().backward()
    (vector,) = vectors.parameters()
    assert vector.grad is not None and vector.grad.dtype == torch.float32
    expected = seen[0].double().sum((0, 1))
    assert torch.allclose(
        vector.grad.double(), expected, rtol=1e-4, atol=1e-4 * float(seen[0].double().abs().sum(1).max()) / 200
    )


def test_attach_leaves_nothing_behind() -> None:
    model, other = exact("llama"), exact("gemma3")
    bare, bare_other = model.logits(TOKENS), other.logits(TOKENS)
    a, b, c = drawn(model, 3), drawn(model, 4, layers=(0, 2)), drawn(other, 5)
    assert n_hooks(model) == n_hooks(other) == 0
    with a.attach(model):
        once = model.logits(TOKENS)
        with c.attach(other), b.attach(model):
            both = model.logits(TOKENS)
            steered_other = other.logits(TOKENS)
        assert torch.equal(model.logits(TOKENS), once)
    with (a + b).attach(model):
        assert torch.allclose(model.logits(TOKENS), both, rtol=0, atol=1e-12)
    with c.attach(other):
        assert torch.equal(other.logits(TOKENS), steered_other)
    for _ in range(3):
        with a.attach(model), a.attach(model):
            twice = model.logits(TOKENS)
    with (2.0 * a).attach(model):
        assert torch.allclose(model.logits(TOKENS), twice, rtol=0, atol=1e-12)
    with pytest.raises(ZeroDivisionError), a.attach(model), RowBank([b]).attach(model):
        raise ZeroDivisionError
    with pytest.raises(UsageError), a.attach(model), RowBank([b]).attach(model):
        model.logits(TOKENS)  # a bank without rows fails inside the forward pass
    assert n_hooks(model) == n_hooks(other) == 0
    assert torch.equal(model.logits(TOKENS), bare)
    assert torch.equal(other.logits(TOKENS), bare_other)


def test_algebra() -> None:
    model = exact()
    a, b = drawn(model, 1), drawn(model, 2)
    before = a.snapshot()
    assert same(a + b, b + a)
    assert same(a - a, 0.0 * a)
    negative = -a
    assert same(-negative, a)
    assert same(2.0 * a, a * 2.0) and same(a * 2.0, a + a)
    assert same(a - b, a + (-b))
    assert all(abs(norm - 1) < 1e-12 for norm in a.normalise().norms().values())
    assert a.norms() == {s: pytest.approx(float(v.detach().norm())) for s, v in a.vectors.items()}
    assert all(torch.equal(before[name], tensor) for name, tensor in a.snapshot().items()), "arguments were changed"
    assert all(p.is_leaf and p.requires_grad for p in (a + b).parameters())
    total = (a + b).vectors[Site("resid_post", 0)]
    with torch.no_grad():
        total.zero_()
    assert a.vectors[Site("resid_post", 0)].any(), "a result shares memory with its argument"


def test_select_and_merge() -> None:
    model = exact()
    a = drawn(model, 1)
    low, high = a.select([0, 1]), a.select([2, 3])
    assert low.layers == (0, 1) and high.layers == (2, 3)
    assert same(low.merge(high), a) and same(high.merge(low), a) and same(low + high, a)
    with pytest.raises(UsageError, match=r"resid_post\.1"):
        a.select([0, 1]).merge(a.select([1, 2]))
    with pytest.raises(UsageError, match=r"\[7\]"):
        a.select([0, 7])
    with pytest.raises(UsageError, match="empty"):
        a.select([])
    with pytest.raises(UsageError, match="zero"):
        (0.0 * a).normalise()
    with pytest.raises(UsageError, match="scope"):
        a.select([1]).merge(drawn(model, 1, layers=(0,), scope=Scope.prompt()))
    with pytest.raises(UsageError, match="scope"):
        a + drawn(model, 1, scope=Scope.generated())


def test_init_is_zero_for_the_layers_and_site_asked_for() -> None:
    model = exact()
    vectors = Steering(layers=(1, 3), site="q").init(model)
    assert vectors.sites == (Site("q", 1), Site("q", 3))
    assert vectors.n_parameters == 2 * model.width("q")
    assert not any(v.any() for v in vectors.parameters())
    assert Steering().init(model).layers == tuple(range(model.n_layers))
    with pytest.raises(UsageError, match="0 to 3"):
        Steering(layers=(4,)).init(model)
    with pytest.raises(UsageError):
        Steering(layers=(-1,)).init(model)
    with pytest.raises(UsageError, match="site"):
        Steering(site="resid_pst").init(model)


def test_vectors_of_another_model_are_refused() -> None:
    model = exact()
    wide = SteeringVectors({Site("resid_post", 0): torch.zeros(33)})
    deep = SteeringVectors({Site("resid_post", 9): torch.zeros(32)})
    for wrong in (wide, deep):
        with pytest.raises(UsageError), wrong.attach(model):
            pass
        with pytest.raises(UsageError), RowBank([None, wrong]).attach(model):
            pass
    assert n_hooks(model) == 0


def test_snapshot_and_restore() -> None:
    model = exact()
    a, b = drawn(model, 1), drawn(model, 2)
    state = a.snapshot()
    parameters = list(a.parameters())
    a.restore(b.snapshot())
    assert same(a, b)
    assert all(x is y for x, y in zip(parameters, a.parameters(), strict=True)), "restore works in place"
    a.restore(state)
    assert same(a, drawn(model, 1))
    with pytest.raises(UsageError):
        a.restore(drawn(model, 1, layers=(0,)).snapshot())


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_row_bank_is_separate_runs(family: str) -> None:
    model = exact(family)
    sets = [None, drawn(model, 1), drawn(model, 2, layers=(1,)), drawn(model, 3, layers=(0, 2), site="attn_out")]
    tokens = torch.randint(5, 261, (6, 9), generator=torch.Generator().manual_seed(2))
    rows = torch.tensor([3, 0, 1, 2, 1, 0])
    with RowBank(sets).attach(model, rows=rows):
        banked = model.logits(tokens)
    for i, member in enumerate(rows.tolist()):
        chosen = sets[member]
        if chosen is None:
            alone = model.logits(tokens[i : i + 1])
        else:
            with chosen.attach(model):
                alone = model.logits(tokens[i : i + 1])
        atol = 1e-4 if family == "gpt_neo" else 1e-9  # transformers' GPT-Neo attends in fp32 inside an fp64 model
        assert torch.allclose(banked[i], alone[0], rtol=0, atol=atol), (family, i)


def test_gradient_through_a_row_bank() -> None:
    model = exact()
    sets = [drawn(model, 1), None, drawn(model, 2, layers=(1, 2))]
    rows = torch.tensor([0, 2, 1, 0])
    tokens = torch.randint(5, 261, (4, 9), generator=torch.Generator().manual_seed(2))
    weights = torch.randn(4, 9, 261, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    bank = RowBank(sets)
    with bank.attach(model, rows=rows):
        (model.logits(tokens) * weights).sum().backward()
    for i, member in ((0, sets[0]), (2, sets[2])):
        twin = SteeringVectors(member.vectors)
        mine = rows == i
        with twin.attach(model):
            (model.logits(tokens[mine]) * weights[mine]).sum().backward()
        for ours, theirs in zip(member.parameters(), twin.parameters(), strict=True):
            assert torch.allclose(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)


def test_row_bank_state_and_refusals() -> None:
    model = exact()
    a, b = drawn(model, 1), drawn(model, 2, layers=(2,))
    bank = RowBank([a, None, b])
    assert bank.n_parameters == a.n_parameters + b.n_parameters
    assert len(list(bank.parameters())) == len(bank.snapshot()) == 5
    state = bank.snapshot()
    a.restore((0.0 * a).snapshot())
    bank.restore(state)
    assert same(a, drawn(model, 1))
    with pytest.raises(UsageError, match="at least one"):
        RowBank([None])
    with pytest.raises(UsageError, match="scope"):
        RowBank([a, drawn(model, 1, scope=Scope.prompt())])
