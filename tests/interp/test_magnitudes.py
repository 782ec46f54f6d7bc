"""Scale 0 is the base model, scale 1 the vectors, all of them in one decode batch; what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import pytest
import torch

from steerlab.adapters import SteeringVectors
from steerlab.errors import UsageError
from steerlab.interp.magnitudes import magnitudes
from steerlab.models import LanguageModel
from steerlab.rollouts import Condition, Evaluation, Policy, Sampling, evaluate, summarise
from steerlab.tasks import Task

Exact = Callable[..., LanguageModel]
Pick = Callable[..., pd.DataFrame]
Vectors = Callable[..., SteeringVectors]
EVALUATION = Evaluation(samples=3, sampling=Sampling(max_new_tokens=6), seed=5, limit=4)
SAID = ["problem", "sample", "text", "n_tokens", "correct"]


def alone(model: LanguageModel, task: Task, adapter: SteeringVectors | None) -> pd.DataFrame:
    asked = {"alone": Condition(adapter, task, EVALUATION.sampling, EVALUATION.samples)}
    return evaluate(model, EVALUATION.problems(task), asked, seed=EVALUATION.seed)


def test_scale_0_is_the_base_to_the_bit(exact: Exact, vectors: Vectors, letters: Task) -> None:
    model = exact()
    steered = vectors(model)
    base = alone(model, letters, None)
    found = magnitudes(model, letters, steered, EVALUATION, (-1.0, 0.0, 1.0))
    own = found.completions.query("condition == 'base'").reset_index(drop=True)
    assert own[SAID].equals(base[SAID])
    assert alone(model, letters, steered * 0.0)[SAID].equals(base[SAID])
    with torch.no_grad(), (steered * 0.0).attach(model):
        still = model.logits(torch.tensor([[40, 41, 42]]))
    assert torch.equal(still, model.logits(torch.tensor([[40, 41, 42]])).detach())
    at_zero = found.table.query("scale == 0").drop(columns="condition")
    assert len(at_zero) == 2 and at_zero.iloc[0].equals(at_zero.iloc[1])


def test_every_scale_is_what_it_is_alone(
    exact: Exact, vectors: Vectors, letters: Task, pick: Pick, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = exact()
    steered, other = vectors(model), vectors(model, (1, 3))
    batches: list[int] = []
    original = Policy.sample

    def counted(self: Policy, prompts: object, rows: object, *args: object, **names: object) -> object:
        batches.append(len(rows))
        return original(self, prompts, rows, *args, **names)

    monkeypatch.setattr(Policy, "sample", counted)
    found = magnitudes(model, letters, steered, EVALUATION, (2.0, -1.0, 1.0), beside={"other": other}, seed=3)
    assert batches == [3 * 3 * 4 * 3], "one decode batch: sets × scales × problems × samples"
    assert list(found.table["scale"]) == [-1, 1, 2] * 3
    assert list(dict.fromkeys(found.table["condition"])) == ["trained", "random", "other"]
    random = steered.randomise(torch.Generator().manual_seed(3))
    for condition, made in (("trained", steered), ("random", random), ("other", other)):
        for scale in (-1.0, 1.0, 2.0):
            told = alone(model, letters, made * scale)
            here = pick(found.completions, condition=f"{condition} × {scale:g}").reset_index(drop=True)
            assert here[SAID].equals(told[SAID])
            score = summarise(told, model="m", temperature=1.0, metrics=("avg@k",)).iloc[0]
            row = pick(found.table, condition=condition, scale=scale).iloc[0]
            assert (row[["metric", "value", "low", "high"]] == score[["metric", "value", "low", "high"]]).all()
            assert row["n_problems"] == 4 and row["n_samples"] == 3


def test_large_scales_change_what_is_said(exact: Exact, vectors: Vectors, letters: Task) -> None:
    model = exact()
    said = magnitudes(model, letters, vectors(model), EVALUATION, (0.0, 4.0)).completions
    by_condition = {str(name): part["text"].tolist() for name, part in said.groupby("condition")}
    assert len({tuple(texts) for texts in by_condition.values()}) == 3


@pytest.mark.parametrize("scales", [(), (1.0, 1.0), (1.0, float("nan")), (float("inf"),)])
def test_scales_that_are_none_are_refused(
    tiny_llama: LanguageModel, vectors: Vectors, letters: Task, scales: tuple[float, ...]
) -> None:
    with pytest.raises(UsageError, match="scales"):
        magnitudes(tiny_llama, letters, vectors(tiny_llama), EVALUATION, scales)


def test_vectors_that_cannot_be_scaled_are_refused(tiny_llama: LanguageModel, vectors: Vectors, letters: Task) -> None:
    steered = vectors(tiny_llama)
    with pytest.raises(UsageError, match="trained vectors are all zero"):
        magnitudes(tiny_llama, letters, steered * 0.0, EVALUATION)
    with pytest.raises(UsageError, match="pca vectors are all zero"):
        magnitudes(tiny_llama, letters, steered, EVALUATION, beside={"pca": steered * 0.0})
    with pytest.raises(UsageError, match="random is a condition already"):
        magnitudes(tiny_llama, letters, steered, EVALUATION, beside={"random": steered})
