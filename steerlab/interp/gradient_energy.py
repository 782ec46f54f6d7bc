"""Gradient energy ‖∂J/∂s_l‖²: how steeply the expected reward rises along some direction at layer l, before training.

J is the mean reward of the base model's answers, its gradient at zero vectors the policy gradient with a leave-one-out
baseline. The squared length of an estimated gradient is too long by its noise; products of the estimates of *different*
problems are not: energy_l = Σ_{p≠q} g_p·g_q / (P (P − 1)), with a jackknife interval over problems. One backward pass
per problem serves all layers. An independent report found it to predict the accuracy-by-layer curve (core.md §5.1).

Left out: a learning rate's part in that curve, energy along one given direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy import stats

from steerlab import tables
from steerlab.adapters import Steering
from steerlab.batches import RolloutBatch
from steerlab.errors import UsageError
from steerlab.models import LanguageModel
from steerlab.objectives import PolicyGradient
from steerlab.rollouts import Policy, Rows, Sampling
from steerlab.rollouts.statistics import Interval
from steerlab.tasks import Problem, Task, encode


def gradient_energy(
    model: LanguageModel,
    task: Task,
    problems: Sequence[Problem],
    *,
    layers: tuple[int, ...] | None = None,
    samples: int = 8,
    sampling: Sampling = Sampling(),
    seed: int = 0,
) -> pd.DataFrame:
    """Table `gradient_energy` of the layers (None: all), from `samples` answers to each of `problems`.

    Raises UsageError for fewer than two problems, or two samples, or if all answers to each problem earn the same, so
    that there is no gradient.
    """
    if len(problems) < 2 or samples < 2:
        raise UsageError(
            f"{len(problems)} problems with {samples} samples give no gradient to compare; take at least two of both"
        )
    adapter = Steering(layers).init(model)
    policy = Policy(model, adapter)
    parameters = list(adapter.parameters())
    gradients = torch.zeros(len(parameters), len(problems), model.d_model, dtype=torch.float64)
    batch = _answered(policy, task, problems, samples, sampling, seed)
    for number in range(len(problems)):
        # advantages are a group's own, so one problem by itself is what it is in the whole batch
        ready = PolicyGradient().prepare(batch.select(torch.nonzero(batch.group == number).flatten()))
        if len(ready):
            ready = replace(ready, denominator=float(samples))
            loss = PolicyGradient()(policy, ready).value
            for layer, gradient in enumerate(torch.autograd.grad(loss, parameters)):
                gradients[layer, number] = -gradient.double().cpu()
    if not gradients.any():
        raise UsageError("all answers to each problem earn the same, so no reward has a gradient; take an easier task")
    rows = []
    for layer, of_layer in zip(adapter.layers, gradients, strict=True):
        energy = unbiased_energy(of_layer.numpy())
        rows.append(
            {"layer": layer, "energy": energy.value, "low": energy.low, "high": energy.high}
            | {"with_noise": float(of_layer.mean(0).square().sum()), "n_problems": len(problems), "n_samples": samples}
        )
    return tables.check(pd.DataFrame(rows), "gradient_energy")


def unbiased_energy(gradients: Float[np.ndarray, "problem d_model"], level: float = 0.95) -> Interval:
    """‖E g‖² from independent estimates g_p, without the share of their noise; interval by the jackknife."""
    gram = gradients @ gradients.T
    n = len(gram)
    off = gram.sum() - np.trace(gram)
    value = off / (n * (n - 1))
    if n < 3:
        return Interval(float(value), -np.inf, np.inf)
    without = (off - 2 * (gram.sum(1) - np.diag(gram))) / ((n - 1) * (n - 2))
    error = np.sqrt((n - 1) * np.var(without))
    half = stats.t.ppf((1 + level) / 2, n - 1) * error
    return Interval(float(value), float(value - half), float(value + half))


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's ρ with a bootstrap interval over the pairs and the p-value of shuffled ones."""

    rho: float
    low: float
    high: float
    p: float


def rank_correlation(first: Float[np.ndarray, " n"], second: Float[np.ndarray, " n"], seed: int = 0) -> RankCorrelation:
    """Raises UsageError for fewer than four pairs."""
    if len(first) != len(second) or len(first) < 4:
        raise UsageError(f"{len(first)} and {len(second)} values give no rank correlation; take at least 4 of each")

    def rho(a: np.ndarray, b: np.ndarray) -> float:
        with np.errstate(invalid="ignore"):
            return float(np.corrcoef(stats.rankdata(a), stats.rankdata(b))[0, 1])

    generator = np.random.default_rng(seed)
    found = rho(first, second)
    draws = [generator.integers(len(first), size=len(first)) for _ in range(2_000)]
    drawn = np.array([rho(first[d], second[d]) for d in draws if len(set(d.tolist())) > 1])
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    shuffled = np.array([rho(first, generator.permutation(second)) for _ in range(5_000)])
    p = (1 + int((np.abs(shuffled) >= abs(found) - 1e-12).sum())) / (1 + len(shuffled))
    return RankCorrelation(found, float(low), float(high), p)


def _answered(
    policy: Policy, task: Task, problems: Sequence[Problem], samples: int, sampling: Sampling, seed: int
) -> RolloutBatch:
    """The base model's answers (the vectors are zero) and what they earn."""
    tokenizer = policy.model.tokenizer
    prompts = [tuple(encode(task.prompt(problem), tokenizer)) for problem in problems]
    rows = Rows.grid(list(range(len(problems))), samples)
    with torch.no_grad():
        done = policy.sample(prompts, rows, sampling, seed=seed)
    texts = tokenizer.batch_decode(
        [done.tokens[i, : done.lengths[i]].tolist() for i in range(len(rows))], skip_special_tokens=True
    )
    judged = task.judge([problems[i] for i in rows.prompt.tolist()], texts)
    return RolloutBatch(
        prompts=tuple(prompts),
        group=rows.prompt,
        completions=done.tokens,
        lengths=done.lengths,
        logprobs=done.logprobs,
        rewards=torch.tensor([j.reward for j in judged], dtype=torch.float32),
        correct=torch.tensor([j.correct for j in judged]),
        temperature=sampling.temperature,
    )
