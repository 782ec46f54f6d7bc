"""Teacher-forced log-probabilities = those recorded while sampling = those of one plain forward pass per row."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import pytest
import torch

from steerlab.adapters import Layout, RowBank, Scope, SteeringVectors
from steerlab.batches import RolloutBatch, Slopes
from steerlab.models import LanguageModel, Site, tiny
from steerlab.rollouts import Completions, Policy, Rows, Sampling

# The longest is longer than the tiny models' sliding window of 24.
EVERYWHERE = Scope.all()
PROMPTS = [list(range(40, 70)), [50], [60, 61, 62, 63]]
SAMPLING = Sampling(temperature=0.8, max_new_tokens=10, stop=tuple("abcdefghijklmnopqrstuvwxyzABCDEF"))


@lru_cache
def tiny_model(family: str, dtype: torch.dtype) -> LanguageModel:
    return tiny.model(family, dtype=dtype)


def drawn(model: LanguageModel, scope: Scope = EVERYWHERE, seed: int = 0) -> SteeringVectors:
    generator = torch.Generator().manual_seed(seed)
    sites = [Site("resid_post", layer) for layer in range(model.n_layers)]
    return SteeringVectors(
        {s: 0.3 * torch.randn(32, generator=generator, dtype=torch.float64).to(model.dtype) for s in sites}, scope
    )


def as_batch(prompts: list[list[int]], rows: Rows, out: Completions, temperature: float) -> RolloutBatch:
    return RolloutBatch(
        prompts=tuple(map(tuple, prompts)),
        group=rows.prompt,
        completions=out.tokens,
        lengths=out.lengths,
        logprobs=out.logprobs,
        rewards=torch.zeros(len(rows)),
        correct=torch.zeros(len(rows), dtype=torch.bool),
        temperature=temperature,
    )


def sampled(policy: Policy, sampling: Sampling = SAMPLING, samples: int = 3) -> RolloutBatch:
    rows = Rows.grid([0, 1, 2], samples)
    return as_batch(PROMPTS, rows, policy.sample(PROMPTS, rows, sampling, seed=1), sampling.temperature)


def tolerance(family: str, dtype: torch.dtype) -> float:
    """fp64 means fp64 except where transformers' eager attention rounds to fp32."""
    return 1e-9 if dtype == torch.float64 and family not in ("gemma2", "gpt_neo") else 1e-4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_recorded_is_teacher_forced(family: str, dtype: torch.dtype) -> None:
    if (family, dtype) == ("gemma2", torch.float64):
        pytest.skip("transformers' eager mask overflows in fp64; see the fp32 case")
    model = tiny_model(family, dtype)
    for vectors in (None, drawn(model)):
        policy = Policy(model, vectors)
        batch = sampled(policy)
        again = policy.logprobs(batch)
        assert again.requires_grad == (vectors is not None)
        assert torch.allclose(again.detach(), batch.logprobs, rtol=0, atol=tolerance(family, dtype))
        assert not again[~batch.mask].any()


PLACES = ("resid_pre", "attn_in", "ln1", "attn_out", "resid_mid", "mlp_in", "ln2", "mlp_out", "resid_post")


@pytest.mark.parametrize("kind", PLACES)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_vector_at_any_place_of_a_block(family: str, kind: str) -> None:
    """Sampled with a cache, teacher-forced from the block on and in one plain pass: the same; the gradient is that of
    the plain pass."""
    model = tiny_model(family, torch.float64)
    place = Site(kind, 2)
    generator = torch.Generator().manual_seed(0)
    vectors = SteeringVectors({place: 0.3 * torch.randn(32, generator=generator, dtype=torch.float64)})
    policy = Policy(model, vectors)
    rows = Rows.grid([0, 1, 2], 3)
    out = policy.sample(PROMPTS, rows, SAMPLING, seed=1, keep=True)
    batch = replace(
        as_batch(PROMPTS, rows, out, SAMPLING.temperature), kept=out.kept(vectors.first_block, len(PROMPTS))
    )
    assert batch.kept is not None and batch.kept.block == 2 + (kind == "resid_post")
    again, found = policy.logprobs(batch), plain(policy, batch)
    assert torch.allclose(again.detach(), batch.logprobs, rtol=0, atol=1e-9)
    assert torch.allclose(found.detach(), batch.logprobs, rtol=0, atol=1e-9)
    (ours,), (theirs,) = (torch.autograd.grad(x.sum(), list(vectors.parameters())) for x in (again, found))
    assert theirs.any() and torch.allclose(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["mistral", "phi3", "gemma3"])
def test_windows_shorter_than_the_prompt(family: str) -> None:
    model = tiny.model(family, dtype=torch.float64)
    if family != "gemma3":
        model.hf.config.sliding_window = 8
    policy = Policy(model, drawn(model))
    batch = sampled(policy)
    assert torch.allclose(policy.logprobs(batch).detach(), batch.logprobs, rtol=0, atol=1e-9)
    assert torch.allclose(plain(policy, batch), batch.logprobs, rtol=0, atol=1e-9)


def plain(policy: Policy, batch: RolloutBatch) -> torch.Tensor:
    """One forward pass per row over prompt and completion: no cache, no padding, no sharing."""
    found = torch.zeros_like(batch.logprobs)
    for i in range(len(batch)):
        prompt, n = batch.prompts[batch.group[i]], int(batch.lengths[i])
        said = batch.completions[i, :n]
        tokens = torch.cat([torch.tensor(prompt), said])[None]
        with policy.adapter.attach(policy.model, layout=Layout.of_texts(tokens, len(prompt))):
            logits = policy.model.logits(tokens)[0, len(prompt) - 1 : -1]
        found[i, :n] = (logits / batch.temperature).log_softmax(-1).gather(-1, said[:, None])[:, 0]
    return found


@pytest.mark.parametrize("family", [f for f in tiny.FAMILIES if f != "gemma2"])
def test_teacher_forced_is_one_plain_pass(family: str) -> None:
    model = tiny_model(family, torch.float64)
    policy = Policy(model, drawn(model))
    batch = sampled(policy)
    expected = plain(policy, batch)
    assert torch.allclose(policy.logprobs(batch).detach(), expected, rtol=0, atol=tolerance(family, torch.float64))


@pytest.mark.parametrize(
    "scope",
    [
        Scope.prompt(),
        Scope.generated(),
        Scope.positions(2, 33),
        Scope.predicting(0, 1),
        Scope.predicting(3),
        Scope.after(61),
    ],
    ids=lambda s: f"{s.kind}-{s.start}-{s.stop}",
)
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_scopes(family: str, scope: Scope) -> None:
    model = tiny_model(family, torch.float64)
    policy = Policy(model, drawn(model, scope))
    batch = sampled(policy)
    again = policy.logprobs(batch).detach()
    assert torch.allclose(again, batch.logprobs, rtol=0, atol=1e-9)
    assert torch.allclose(again, plain(policy, batch), rtol=0, atol=1e-9)


def test_recorded_under_top_p_is_the_uncut_probability() -> None:
    model = tiny_model("llama", torch.float64)
    policy = Policy(model, drawn(model))
    batch = sampled(policy, Sampling(top_p=0.6, max_new_tokens=6))
    assert torch.allclose(policy.logprobs(batch).detach(), batch.logprobs, rtol=0, atol=1e-9)


def test_one_token_completions_and_one_row() -> None:
    model = tiny_model("llama", torch.float64)
    policy = Policy(model, drawn(model))
    batch = sampled(policy, Sampling(max_new_tokens=1))
    assert batch.completions.shape[1] == 1
    assert torch.allclose(policy.logprobs(batch).detach(), batch.logprobs, rtol=0, atol=1e-9)
    single = sampled(policy).select(torch.tensor([4]))
    assert torch.allclose(policy.logprobs(single).detach(), single.logprobs, rtol=0, atol=1e-9)


def test_a_selection_says_the_same_as_the_whole() -> None:
    model = tiny_model("gpt2", torch.float64)
    policy = Policy(model, drawn(model))
    batch = sampled(policy)
    whole = policy.logprobs(batch).detach()
    chosen = torch.tensor([7, 1, 3])
    part = batch.select(chosen)
    width = part.completions.shape[1]
    assert torch.allclose(policy.logprobs(part).detach(), whole[chosen, :width], rtol=0, atol=1e-9)


def test_reference() -> None:
    model = tiny_model("llama", torch.float64)
    mine, other = drawn(model, seed=1), drawn(model, seed=2)
    batch = sampled(Policy(model, mine))
    to_base = Policy(model, mine).reference_logprobs(batch)
    to_other = Policy(model, mine, other).reference_logprobs(batch)
    assert not to_base.requires_grad and not to_other.requires_grad
    assert torch.equal(to_base, Policy(model).logprobs(batch))
    assert torch.equal(to_other, Policy(model, other).logprobs(batch).detach())
    assert torch.equal(
        Policy(model, mine, mine).reference_logprobs(batch), Policy(model, mine).logprobs(batch).detach()
    )
    assert (to_base - to_other).abs().max() > 1e-2


def grads_of(policy: Policy, batch: RolloutBatch) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Log-probabilities and the gradient of a weighted sum of them."""
    weights = torch.randn(batch.logprobs.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    parameters = list(policy.adapter.parameters())
    for parameter in parameters:
        parameter.grad = None
    said = policy.logprobs(batch)
    (said * weights).sum().backward()
    return said.detach(), [p.grad.clone() for p in parameters]


LAYERS = {"all": (0, 1, 2, 3), "from 1": (1, 3), "one": (2,), "last": (3,)}


@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "gpt_neo", "gpt_neox"])
def test_begun_where_training_begins_is_the_whole(family: str, layers: tuple[int, ...]) -> None:
    model = tiny_model(family, torch.float64)
    policy = Policy(model, drawn(model).select(layers))
    rows = Rows.grid([0, 1, 2], 3)
    out = policy.sample(PROMPTS, rows, SAMPLING, seed=1, max_rows=5, keep=True)
    kept = out.kept(policy.adapter.first_block, len(PROMPTS))
    assert kept is not None and kept.block == layers[0] + 1
    whole = as_batch(PROMPTS, rows, out, SAMPLING.temperature)
    begun = replace(whole, kept=kept)
    (a, a_grads), (b, b_grads) = grads_of(policy, whole), grads_of(policy, begun)
    assert torch.allclose(a, b, rtol=0, atol=1e-9)
    for x, y in zip(a_grads, b_grads, strict=True):
        assert torch.allclose(x, y, rtol=0, atol=1e-8)
    chosen = torch.tensor([8, 1, 3])
    part, _ = grads_of(policy, begun.select(chosen))
    assert torch.allclose(part, grads_of(policy, whole.select(chosen))[0], rtol=0, atol=1e-9)
    assert torch.allclose(policy.reference_logprobs(begun), policy.reference_logprobs(whole), rtol=0, atol=1e-9)


def test_kept_states_are_not_used_above_an_adapter() -> None:
    """Kept below layer 3, but layer 1 is trained too: the pass begins at the bottom."""
    model = tiny_model("llama", torch.float64)
    rows = Rows.grid([0, 1, 2], 2)
    out = Policy(model, drawn(model).select((3,))).sample(PROMPTS, rows, SAMPLING, seed=1, keep=True)
    batch = as_batch(PROMPTS, rows, out, SAMPLING.temperature)
    wide = Policy(model, drawn(model).select((1, 3)))
    begun = replace(batch, kept=out.kept(4, len(PROMPTS)))
    assert torch.equal(wide.logprobs(begun), wide.logprobs(batch))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_shared_prompts_have_the_loss_and_gradients_of_duplicated_ones(family: str) -> None:
    model = tiny_model(family, torch.float64)
    policy = Policy(model, drawn(model))
    shared = sampled(policy)
    copied = replace(
        shared, prompts=tuple(shared.prompts[g] for g in shared.group.tolist()), group=torch.arange(len(shared))
    )
    (a, a_grads), (b, b_grads) = grads_of(policy, shared), grads_of(policy, copied)
    assert torch.allclose(a, b, rtol=0, atol=1e-9)
    # transformers' RMS norms work in fp32 inside an fp64 model, so their gradients are rounded there
    atol = 1e-8 if family in ("gpt2", "gpt_neo", "gpt_neox") else 1e-5
    for x, y in zip(a_grads, b_grads, strict=True):
        assert torch.allclose(x, y, rtol=0, atol=atol)


FAMILIES_WITH_SLOPES = [family for family in tiny.FAMILIES if family != "gemma2"]  # which caps its logits


@pytest.mark.parametrize("kernels", ["family", "fused"])
@pytest.mark.parametrize("max_rows", [256, 4])
@pytest.mark.parametrize("family", FAMILIES_WITH_SLOPES)
def test_slopes_from_sampling_are_those_of_the_head(
    family: str, max_rows: int, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(family, torch.float64)
    monkeypatch.setattr(model, "kernels", kernels)
    policy, rows = Policy(model, drawn(model)), Rows.grid([0, 1, 2], 3)
    out = policy.sample(PROMPTS, rows, SAMPLING, seed=1, max_rows=max_rows, keep=True)
    plain = as_batch(PROMPTS, rows, out, SAMPLING.temperature)
    assert out.slopes is not None and out.slopes.shape == (*out.tokens.shape, model.d_model)
    credit = torch.randn(out.tokens.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def gradients(batch: RolloutBatch) -> tuple[torch.Tensor, list[torch.Tensor]]:
        for parameter in policy.adapter.parameters():
            parameter.grad = None
        said = policy.logprobs(batch)
        (said * credit)[batch.mask].sum().backward()
        return said.detach(), [parameter.grad for parameter in policy.adapter.parameters()]

    wanted, recorded = gradients(plain), gradients(replace(plain, slopes=Slopes(out.slopes, policy.numbers)))
    assert torch.equal(recorded[0], plain.logprobs)
    assert torch.allclose(recorded[0], wanted[0], rtol=0, atol=tolerance(family, torch.float64))
    for ours, theirs in zip(recorded[1], wanted[1], strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=tolerance(family, torch.float64))


def test_slopes_of_a_selection() -> None:
    model = tiny_model("llama", torch.float64)
    policy, rows = Policy(model, drawn(model)), Rows.grid([0, 1, 2], 3)
    out = policy.sample(PROMPTS, rows, SAMPLING, seed=1, keep=True)
    batch = replace(as_batch(PROMPTS, rows, out, SAMPLING.temperature), slopes=Slopes(out.slopes, policy.numbers))
    chosen = torch.tensor([7, 1])
    part = batch.select(chosen)
    assert part.slopes is not None and part.slopes.drawn_under == policy.numbers
    assert torch.equal(part.slopes.values, out.slopes[chosen, : part.completions.shape[1]])


def test_slopes_are_of_no_use_after_an_update() -> None:
    model = tiny_model("llama", torch.float64)
    policy, rows = Policy(model, drawn(model)), Rows.grid([0, 1, 2], 3)
    out = policy.sample(PROMPTS, rows, SAMPLING, seed=1, keep=True)
    plain = as_batch(PROMPTS, rows, out, SAMPLING.temperature)
    batch = replace(plain, slopes=Slopes(out.slopes, policy.numbers))
    with torch.no_grad():
        next(iter(policy.adapter.parameters())).add_(0.5)
    assert not torch.allclose(policy.logprobs(batch).detach(), batch.logprobs, rtol=0, atol=1e-3)
    assert torch.equal(policy.logprobs(batch), policy.logprobs(plain))
    other = Policy(model, policy.adapter, reference=drawn(model, seed=3))
    assert torch.equal(other.reference_logprobs(batch), other.reference_logprobs(plain))


@pytest.mark.parametrize("sampling", [replace(SAMPLING, temperature=0.0), replace(SAMPLING, top_p=0.5)])
def test_no_slopes_of_what_is_not_drawn_from_the_policy(sampling: Sampling) -> None:
    model = tiny_model("llama", torch.float64)
    out = Policy(model, drawn(model)).sample(PROMPTS, Rows.grid([0, 1, 2], 2), sampling, seed=1, keep=True)
    assert out.slopes is None
    capped = tiny_model("gemma2", torch.float64)
    assert (
        Policy(capped, drawn(capped)).sample(PROMPTS, Rows.grid([0, 1, 2], 2), SAMPLING, seed=1, keep=True).slopes
        is None
    )


def test_members_of_a_bank_keep_their_own_states() -> None:
    """Sampled together, each member's update begins at its own block and says what it says alone."""
    model = tiny_model("llama", torch.float64)
    first, second, third = (drawn(model, seed=seed).select((layer,)) for seed, layer in ((1, 2), (2, 0), (3, 3)))
    sets = [first, None, second, third]
    rows = Rows.grid([0, 1, 2], 2, members=len(sets))
    out = Policy(model, RowBank(sets)).sample(PROMPTS, rows, SAMPLING, seed=1, keep=True)
    for member, vectors in enumerate(sets):
        if vectors is None:
            continue
        mine = torch.nonzero(rows.member == member).flatten()
        batch = as_batch(PROMPTS, rows, out, SAMPLING.temperature)
        begun = replace(batch, kept=out.kept(vectors.first_block, len(PROMPTS), member)).select(mine)
        alone = Policy(model, vectors)
        assert torch.allclose(alone.logprobs(begun), alone.logprobs(batch.select(mine)), rtol=0, atol=1e-9)
        assert torch.allclose(alone.logprobs(begun).detach(), begun.logprobs, rtol=0, atol=1e-9)
