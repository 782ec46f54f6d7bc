"""The objective against REINFORCE written out in plain torch, and against TRL's `dapo` loss."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from steerlab.adapters import Scope, SteeringVectors
from steerlab.batches import RolloutBatch
from steerlab.models import LanguageModel, Site, tiny
from steerlab.objectives import GroupMean, GroupNormalised, Loss, Objective, PolicyGradient, policy_gradient_loss
from steerlab.rollouts import Policy, Rows, Sampling

EVERYWHERE = Scope.all()
PROMPTS = [[40, 41, 42, 43, 44, 45, 46], [50], [60, 61, 62, 63]]
REWARDS = [1.0, -1.0, 1.0, -1.0, -1.0, -1.0, -1.0, -1.0, -1.0, 1.0, 1.0, 1.0]  # the second group has no signal
# Transformers' RMS norms round to fp32 on the way back, also in fp64 models; GPT-2's layer norm does not.
FAMILIES = [("gpt2", 1e-9), ("gpt_neox", 1e-9), ("llama", 1e-6), ("gemma3", 1e-6), ("olmo2", 1e-6)]


def drawn(model: LanguageModel, scope: Scope = EVERYWHERE, dtype: torch.dtype = torch.float64) -> SteeringVectors:
    generator = torch.Generator().manual_seed(0)
    sites = [Site("resid_post", layer) for layer in range(model.n_layers)]
    return SteeringVectors({s: 0.3 * torch.randn(32, generator=generator, dtype=dtype) for s in sites}, scope)


def sampled(policy: Policy, rewards: list[float] = REWARDS) -> RolloutBatch:
    sampling = Sampling(temperature=0.9, max_new_tokens=9, stop=tuple("abcdefghijklmnopqrstuvwxyz"))
    rows = Rows.grid([0, 1, 2], 4)
    out = policy.sample(PROMPTS, rows, sampling, seed=1)
    return RolloutBatch(
        prompts=tuple(map(tuple, PROMPTS)),
        group=rows.prompt,
        completions=out.tokens,
        lengths=out.lengths,
        logprobs=out.logprobs,
        rewards=torch.tensor(rewards, dtype=torch.float64),
        correct=torch.tensor(rewards) > 0,
        temperature=0.9,
    )


def gradients(vectors: SteeringVectors) -> torch.Tensor:
    found = torch.stack([p.grad for p in vectors.parameters()])
    for p in vectors.parameters():
        p.grad = None
    return found


def naive(model: LanguageModel, vectors: SteeringVectors, batch: RolloutBatch) -> torch.Tensor:
    """core.md §2 word by word: every row its own prompt and completion in full, logits, log_softmax."""
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(batch)):
        group = batch.rewards[batch.group == batch.group[i]].double()
        k = len(group)
        advantage = batch.rewards[i].double() - (group.sum() - batch.rewards[i].double()) / (k - 1)
        prompt, said = torch.tensor(batch.prompts[batch.group[i]]), batch.completions[i, : batch.lengths[i]]
        shifts = {s: (lambda x, v=v: x + v.to(x.dtype)) for s, v in vectors.vectors.items()}
        with model.intervene(shifts):
            logits = model.hf(torch.cat([prompt, said])[None]).logits[0, len(prompt) - 1 : -1]
        logprobs = (logits / batch.temperature).log_softmax(-1).gather(-1, said[:, None])
        total = total + advantage * logprobs.sum()
    return -total / batch.lengths.sum()


def update(policy: Policy, batch: RolloutBatch, budget: int = 10**6) -> float:
    """What the trainer does: all micro-batches' losses, gradients added up."""
    value = 0.0
    for micro in batch.micro_batches(budget):
        loss = PolicyGradient()(policy, micro)
        loss.value.backward()
        value += float(loss.value.detach())
    return value


@pytest.mark.parametrize(("family", "rtol"), FAMILIES)
def test_shared_prompts_are_plain_reinforce(family: str, rtol: float) -> None:
    model = tiny.model(family, dtype=torch.float64)
    vectors = drawn(model)
    batch = sampled(Policy(model, vectors))
    value = update(Policy(model, vectors), PolicyGradient().prepare(batch))
    ours = gradients(vectors)
    expected = naive(model, vectors, batch)
    expected.backward()
    theirs = gradients(vectors)
    assert value == pytest.approx(float(expected.detach()), rel=1e-7)
    assert theirs.abs().max() > 1e-3
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).abs().max() < rtol * other.abs().max()


@pytest.mark.parametrize("budget", [1, 40, 70, 120])
def test_micro_batches_change_nothing(budget: int) -> None:
    model = tiny.model("gpt2", dtype=torch.float64)
    vectors = drawn(model)
    batch = PolicyGradient().prepare(sampled(Policy(model, vectors)))
    whole = update(Policy(model, vectors), batch)
    expected = gradients(vectors)
    assert update(Policy(model, vectors), batch, budget) == pytest.approx(whole, rel=1e-12)
    assert torch.allclose(gradients(vectors), expected, rtol=1e-9, atol=1e-12)
    assert len(list(batch.micro_batches(1))) == len(batch)


def test_rows_without_signal_change_nothing() -> None:
    model = tiny.model("gpt2", dtype=torch.float64)
    vectors = drawn(model)
    policy = Policy(model, vectors)
    batch = sampled(policy)
    dropped = PolicyGradient().prepare(batch)
    assert len(dropped) == 8 and len(dropped.prompts) == 2
    assert dropped.denominator == batch.n_tokens, "groups without a signal count in the denominator"
    advantages = torch.cat([PolicyGradient().advantage(batch.rewards[batch.group == g]) for g in range(3)])
    kept = replace(batch, advantages=advantages, denominator=float(batch.n_tokens))
    value = update(policy, dropped)
    expected = gradients(vectors)
    assert update(policy, kept) == pytest.approx(value, rel=1e-9)
    assert torch.allclose(gradients(vectors), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scope", [Scope.prompt(), Scope.generated(), Scope.predicting(0, 2)], ids=lambda s: s.kind)
def test_scopes_get_their_gradient(scope: Scope) -> None:
    """Against finite differences, the judge that shares no code."""
    model = tiny.model("gpt2", dtype=torch.float64)
    vectors = drawn(model, scope)
    policy = Policy(model, vectors)
    batch = PolicyGradient().prepare(sampled(policy))
    update(policy, batch)
    got = gradients(vectors)
    direction = torch.randn(got.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values = []
    with torch.no_grad():
        for step in (1e-5, -2e-5):
            for p, d in zip(vectors.parameters(), direction, strict=True):
                p += step * d
            values.append(float(PolicyGradient()(policy, batch).value))
    slope = (values[0] - values[1]) / 2e-5
    assert float((got * direction).sum()) == pytest.approx(slope, rel=1e-6)


def test_no_signal_at_all() -> None:
    model = tiny.model("llama")
    policy = Policy(model, drawn(model, dtype=torch.float32))
    for advantage in (PolicyGradient(), PolicyGradient(GroupMean()), PolicyGradient(GroupNormalised())):
        ready = advantage.prepare(sampled(policy, [0.1] * 12))
        assert len(ready) == 0 and list(ready.micro_batches(100)) == []


def test_pure_function() -> None:
    logprobs = torch.tensor([[-1.0, -2.0, -9.0], [-0.5, -0.25, -0.125]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    got = policy_gradient_loss(logprobs, torch.tensor([2.0, -1.0]), mask, 10.0)
    assert float(got) == pytest.approx(-(2 * -3.0 + 0.875) / 10)


def test_every_token_weighs_the_same_whatever_its_row() -> None:
    """The denominator is global: a group's share of the gradient grows with its tokens."""
    logprobs = torch.zeros(2, 6, requires_grad=True)
    mask = torch.arange(6) < torch.tensor([[1], [6]])
    policy_gradient_loss(logprobs, torch.tensor([1.0, 1.0]), mask, 7.0).backward()
    assert torch.allclose(logprobs.grad, -mask.float() / 7)


def test_drift_is_zero_on_policy_and_measured_off_policy() -> None:
    model = tiny.model("gpt2", dtype=torch.float64)
    vectors = drawn(model)
    batch = PolicyGradient().prepare(sampled(Policy(model, vectors)))
    on = PolicyGradient()(Policy(model, vectors), batch)
    assert isinstance(on, Loss) and on.metrics["drift_nats"] < 1e-9
    off = PolicyGradient()(Policy(model, 1.1 * vectors), batch)
    assert off.metrics["drift_nats"] > 1e-3


def test_unprepared_batches_are_refused() -> None:
    model = tiny.model("llama")
    policy = Policy(model, drawn(model, dtype=torch.float32))
    assert isinstance(PolicyGradient(), Objective)
    with pytest.raises(ValueError, match="prepare"):
        PolicyGradient()(policy, sampled(policy))


@pytest.mark.slow
def test_gradient_of_trls_dapo_loss(tmp_path: Path) -> None:
    model = tiny.model("llama")
    vectors = drawn(model, dtype=torch.float32)
    policy = Policy(model, vectors)
    batch = replace(sampled(policy), temperature=1.0)
    ready = PolicyGradient().prepare(batch)
    update(policy, ready)
    ours = gradients(vectors)

    width = max(map(len, PROMPTS))
    prompt_mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS])
    prompt_ids = torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS])
    advantages = torch.cat([PolicyGradient().advantage(batch.rewards[batch.group == g]) for g in range(3)])
    model.hf.save_pretrained(tmp_path / "model")
    save_file(
        {
            "prompt_ids": prompt_ids[batch.group].contiguous(),
            "prompt_mask": prompt_mask[batch.group].contiguous(),
            "completion_ids": batch.completions.contiguous(),
            "completion_mask": batch.mask.long(),
            "advantages": advantages.float(),
            **{f"vectors.{site}": v.detach() for site, v in vectors.vectors.items()},
        },
        tmp_path / "inputs.safetensors",
    )
    script = Path(__file__).with_name("trl_dapo_gradient.py")
    paths = [str(tmp_path / name) for name in ("model", "inputs.safetensors", "outputs.safetensors")]
    ran = subprocess.run(
        [sys.executable, str(script), *paths], capture_output=True, text=True, timeout=300, check=False
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    theirs = load_file(tmp_path / "outputs.safetensors")
    expected = torch.stack([theirs[f"gradients.{site}"] for site in vectors.vectors])
    # TRL's value is of the ratio, which is 1 on policy, ours of the log-probability; their gradients are the same.
    assert float(theirs["loss"]) == pytest.approx(
        -float(advantages @ batch.lengths.double()) / batch.n_tokens, abs=1e-6
    )
    assert expected.abs().max() > 1e-3
    assert (ours - expected).abs().max() < 1e-6
