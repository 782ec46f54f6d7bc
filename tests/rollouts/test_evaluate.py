"""Evaluation: conditions sharing a decode batch = each alone, the completions table, what may share a batch."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
import torch

from letters import Letters
from steerlab import tables
from steerlab.adapters import Scope, SteeringVectors
from steerlab.errors import UsageError
from steerlab.models import LanguageModel, Site
from steerlab.rollouts import Condition, Evaluation, Policy, Sampling, evaluate

EVERYWHERE = Scope.all()


TASK = Letters(train=(0, 10, 20), test=(0, 10, 20, 30, 40))
SAMPLING = Sampling(max_new_tokens=6)


def drawn(model: LanguageModel, seed: int, scope: Scope = EVERYWHERE) -> SteeringVectors:
    generator = torch.Generator().manual_seed(seed)
    sites = [Site("resid_post", layer) for layer in range(model.n_layers)]
    return SteeringVectors({s: 0.3 * torch.randn(32, generator=generator, dtype=torch.float64) for s in sites}, scope)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of rows of every call of the sampler."""
    seen: list[int] = []
    original = Policy.sample

    def counted(self: Policy, prompts: object, rows: object, *args: object, **names: object) -> object:
        seen.append(len(rows))
        return original(self, prompts, rows, *args, **names)

    monkeypatch.setattr(Policy, "sample", counted)
    return seen


def of(table: pd.DataFrame, condition: str) -> pd.DataFrame:
    return table[table["condition"] == condition].reset_index(drop=True)


def test_together_is_each_alone(tiny_llama_fp64: LanguageModel, calls: list[int]) -> None:
    model, problems = tiny_llama_fp64, TASK.problems("test")
    conditions = {
        "base": Condition(None, TASK, SAMPLING, 3),
        "steered": Condition(drawn(model, 1), TASK, SAMPLING, 3),
        "other": Condition(drawn(model, 2), TASK, SAMPLING, 3),
    }
    together = evaluate(model, problems, conditions, seed=4)
    assert calls == [45]
    for name, condition in conditions.items():
        alone = evaluate(model, problems, {name: condition}, seed=4, max_rows=4)
        pd.testing.assert_frame_equal(of(together, name), alone)
    assert set(of(together, "base")["text"]) != set(of(together, "steered")["text"])


def test_table(tiny_llama_fp64: LanguageModel) -> None:
    model = tiny_llama_fp64
    evaluation = Evaluation(samples=2, sampling=SAMPLING, shots=2)
    problems = evaluation.problems(TASK)
    conditions = {**evaluation.baselines(TASK), "steered": evaluation.steered(TASK, drawn(model, 1))}
    heard: list[tuple[str, int]] = []
    table = evaluate(model, problems, conditions, split="test", seed=9, done=lambda name, n: heard.append((name, n)))
    tables.check(table, "completions")
    assert table.groupby("condition").size().to_dict() == {"base": 10, "steered": 10, "greedy": 5, "few_shot": 5}
    assert dict(heard) == {"base": 10, "steered": 10, "greedy": 5, "few_shot": 5}
    assert not table.duplicated(["condition", "problem", "sample"]).any()
    assert set(table["problem"]) == {p.id for p in problems}
    assert table.groupby("condition")["temperature"].unique().map(list).to_dict() == {
        "base": [1.0],
        "steered": [1.0],
        "greedy": [0.0],
        "few_shot": [0.0],
    }
    for row in table.itertuples():
        (problem,) = (p for p in problems if p.id == row.problem)
        assert (row.question, row.answer) == (problem.question, problem.answer)
        assert row.correct == TASK.judge([problem], [row.text])[0].correct
        assert row.n_tokens == 6 or (row.finished and row.n_tokens < 6)
        assert "<|" not in row.text


def test_who_shares_a_batch(tiny_llama_fp64: LanguageModel, calls: list[int]) -> None:
    model = tiny_llama_fp64
    conditions = {
        "greedy": Condition(None, TASK, replace(SAMPLING, temperature=0.0), 1),
        "steered": Condition(drawn(model, 1), TASK, SAMPLING, 2),
        "prompt only": Condition(drawn(model, 1, Scope.prompt()), TASK, SAMPLING, 2),
        "base": Condition(None, TASK, SAMPLING, 2),
        "few": Condition(None, TASK.few_shot(1), SAMPLING, 2),
        "also prompt only": Condition(drawn(model, 2, Scope.prompt()), TASK, SAMPLING, 2),
    }
    table = evaluate(model, TASK.problems("test"), conditions, seed=1)
    assert sorted(calls) == [5, 10, 20, 20]
    assert set(table["condition"]) == set(conditions)
    first = table[table["sample"] == 0]
    assert len(of(first, "prompt only")) == 5


def test_zero_vectors_say_what_the_base_model_says(tiny_llama_fp64: LanguageModel) -> None:
    model = tiny_llama_fp64
    conditions = {
        "base": Condition(None, TASK, SAMPLING, 2),
        "steered": Condition(0.0 * drawn(model, 1), TASK, SAMPLING, 2),
    }
    table = evaluate(model, TASK.problems("test"), conditions, seed=1)
    pd.testing.assert_frame_equal(
        of(table, "base").drop(columns="condition"), of(table, "steered").drop(columns="condition")
    )


def test_settings() -> None:
    assert len(Evaluation(limit=2).problems(TASK)) == 2
    assert len(Evaluation(split="train").problems(TASK)) == 3
    assert set(Evaluation(greedy=False, shots=0).baselines(TASK)) == {"base"}
    with pytest.raises(UsageError, match="test"):
        Evaluation().problems(Letters(test=()))
    for wrong in ({"samples": 0}, {"max_rows": 0}, {"limit": 0}):
        with pytest.raises(UsageError):
            Evaluation(**wrong)
