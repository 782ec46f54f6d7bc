"""Gradient energy: noise left out, equal to what differentiation of the expected reward gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from steerlab.adapters import Steering
from steerlab.errors import UsageError
from steerlab.interp.gradient_energy import gradient_energy, rank_correlation, unbiased_energy
from steerlab.models import LanguageModel
from steerlab.plots.gradient_energy import gradient_energy as draw
from steerlab.rollouts import Sampling
from steerlab.tasks import Judgement, Message, Problem, Prompt, Task, encode


@dataclass(frozen=True)
class EvenToken:
    """Pays 1 for a first letter with an even code: a reward whose expectation can be differentiated."""

    name: str = "even"
    opening: str = ""

    def problems(self, split: str) -> list[Problem]:
        return [Problem(i, "".join(chr(97 + (7 * i + j) % 26) for j in range(4)), "") for i in range(8)]

    def prompt(self, problem: Problem) -> Prompt:
        return Prompt((Message("user", problem.question),), "plain", self.opening)

    def judge(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[Judgement]:
        return [
            Judgement(float(bool(t) and ord(t[0]) % 2 == 0), False, None)
            for t in (self.opening + text for text in texts)
        ]

    def validate(self) -> list[tuple[Problem, Judgement]]:
        return []

    def few_shot(self, n: int, seed: int = 0) -> Task:
        return self  # has no examples to show

    def opened(self, words: str) -> Task:
        return replace(self, opening=words)


def exact_gradients(model: LanguageModel, task: EvenToken) -> torch.Tensor:
    """∂ P(reward) / ∂ s_l by problem, through the softmax of the one token that is drawn."""
    texts = [model.tokenizer.decode([i], skip_special_tokens=True) for i in range(model.d_vocab)]
    pays = torch.tensor([j.reward for j in task.judge([], texts)], dtype=torch.float64)
    adapter = Steering().init(model)
    found = []
    for problem in task.problems("train"):
        tokens = torch.tensor([encode(task.prompt(problem), model.tokenizer)])
        with adapter.attach(model):
            expected = model.logits(tokens)[0, -1].softmax(-1) @ pays
        found.append(torch.stack(torch.autograd.grad(expected, list(adapter.parameters()))))
    return torch.stack(found, 1)


def test_is_the_energy_of_the_expected_reward(exact: Callable[..., LanguageModel]) -> None:
    model, task = exact(), EvenToken()
    true = exact_gradients(model, task).double()
    found = gradient_energy(
        model, task, task.problems("train"), samples=1500, sampling=Sampling(max_new_tokens=1, temperature=1.0)
    )
    for layer, row in enumerate(found.to_dict("records")):
        expected = unbiased_energy(true[layer].numpy()).value
        assert row["energy"] == pytest.approx(expected, rel=0.25), layer
        assert row["low"] <= row["energy"] <= row["high"]
    assert draw(found).data


def test_noise_is_left_out() -> None:
    generator = np.random.default_rng(0)
    true = np.full(50, 0.1)
    draws = [true + generator.normal(size=(20, 50)) for _ in range(400)]
    energies = [unbiased_energy(draw).value for draw in draws]
    assert np.mean(energies) == pytest.approx(true @ true, abs=0.05)
    assert np.mean([np.square(draw.mean(0)).sum() for draw in draws]) > 4 * true @ true
    intervals = [unbiased_energy(draw) for draw in draws]
    assert np.mean([i.low <= true @ true <= i.high for i in intervals]) > 0.9


def test_rank_correlation() -> None:
    values = np.arange(12.0)
    same = rank_correlation(values, values**3)
    assert same.rho == pytest.approx(1)
    assert same.p < 0.01
    noise = rank_correlation(values, np.random.default_rng(1).normal(size=12))
    assert noise.low < 0 < noise.high
    with pytest.raises(UsageError, match="at least 4"):
        rank_correlation(values[:3], values[:3])


def test_bad_input(exact: Callable[..., LanguageModel]) -> None:
    model, task = exact(), EvenToken()
    with pytest.raises(UsageError, match="at least two"):
        gradient_energy(model, task, task.problems("train")[:1])
    with pytest.raises(UsageError, match="earn the same"):
        gradient_energy(
            model, task, task.problems("train")[:2], samples=2, sampling=Sampling(max_new_tokens=1, temperature=0.0)
        )
