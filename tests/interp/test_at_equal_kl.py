"""The scale that has a given KL has it; scores there are those of the scaled vectors; what has no such scale."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import pytest

from steerlab.adapters import SteeringVectors
from steerlab.errors import UsageError
from steerlab.interp.at_equal_kl import OutOfReach, at_equal_kl, scale_at_kl
from steerlab.interp.neutral import Neutral
from steerlab.interp.side_effects import side_effects
from steerlab.interp.texts import Text
from steerlab.models import LanguageModel
from steerlab.rollouts import Condition, Evaluation, Sampling, evaluate
from steerlab.tasks import Task

Pick = Callable[..., pd.DataFrame]
Vectors = Callable[..., SteeringVectors]
EVALUATION = Evaluation(samples=2, sampling=Sampling(max_new_tokens=4), limit=4)


def kl(model: LanguageModel, vectors: SteeringVectors, texts: list[Text]) -> float:
    found = side_effects(model, {"it": vectors}, Neutral("mine", tuple(texts)))
    return float(found.set_index("quantity").loc["kl_steered_base", "value"])


@pytest.mark.parametrize("target", [1e-4, 0.05, 0.7])
@pytest.mark.parametrize("factor", [0.01, 1.0, 50.0])
def test_the_target_is_met(
    tiny_llama: LanguageModel, vectors: Vectors, texts: list[Text], target: float, factor: float
) -> None:
    steered = vectors(tiny_llama) * factor
    found = scale_at_kl(tiny_llama, steered, texts, target, tolerance=0.01, highest=1e4)
    assert kl(tiny_llama, steered * found.scale, texts) == pytest.approx(target, rel=0.01)
    assert found.kl.value == pytest.approx(target, rel=0.01) and found.kl.low <= found.kl.value <= found.kl.high


def test_a_target_that_is_met_already_is_left_at_scale_1(
    tiny_llama: LanguageModel, vectors: Vectors, texts: list[Text]
) -> None:
    steered = vectors(tiny_llama)
    assert scale_at_kl(tiny_llama, steered, texts, kl(tiny_llama, steered, texts)).scale == 1.0


def test_sets_are_scored_where_they_are_equally_far(
    tiny_llama: LanguageModel, vectors: Vectors, texts: list[Text], letters: Task, pick: Pick
) -> None:
    first, second = vectors(tiny_llama), vectors(tiny_llama, (3,)) * 0.1
    mine = Neutral("mine", tuple(texts))
    table = at_equal_kl(tiny_llama, {"first": first, "second": second}, mine, letters, EVALUATION).table
    assert list(table["condition"]) == ["base", "first", "second"]
    own = kl(tiny_llama, first, texts)
    assert pick(table, condition="first").iloc[0][["target_nats", "scale", "kl_nats"]].tolist() == [own, 1.0, own]
    row = pick(table, condition="second").iloc[0]
    assert row["kl_nats"] == pytest.approx(own, rel=0.02) and row["scale"] > 1
    asked = {"it": Condition(second * row["scale"], letters, EVALUATION.sampling, 2), "base": None}
    asked["base"] = Condition(None, letters, EVALUATION.sampling, 2)
    alone = evaluate(tiny_llama, EVALUATION.problems(letters), asked, seed=EVALUATION.seed)
    means = alone.groupby("condition")["correct"].mean()
    assert row["value"] == pytest.approx(means["it"])
    assert row["gain"] == pytest.approx(means["it"] - means["base"])
    base = pick(table, condition="base").iloc[0]
    assert base["kl_nats"] == base["scale"] == 0 and base["value"] == pytest.approx(means["base"])


def test_what_is_out_of_reach_is_missing(
    tiny_llama: LanguageModel, vectors: Vectors, texts: list[Text], letters: Task, pick: Pick
) -> None:
    near = vectors(tiny_llama) * 1e-3
    with pytest.raises(OutOfReach, match="at scale 2"):
        scale_at_kl(tiny_llama, near, texts, 1.0, highest=2.0)
    sets, mine = {"far": vectors(tiny_llama), "near": near}, Neutral("mine", tuple(texts))
    table = at_equal_kl(tiny_llama, sets, mine, letters, EVALUATION, targets_nats=(0.01, 0.1), highest=8.0).table
    missing = pick(table, condition="near")
    assert missing[["scale", "kl_nats", "value", "gain"]].isna().all().all() and len(missing) == 2
    assert pick(table, condition="far")["value"].notna().all()


def test_what_has_no_scale_is_refused(
    tiny_llama: LanguageModel, vectors: Vectors, texts: list[Text], letters: Task
) -> None:
    steered = vectors(tiny_llama)
    for target in (0.0, -1.0, float("nan")):
        with pytest.raises(UsageError, match="above 0"):
            scale_at_kl(tiny_llama, steered, texts, target)
    with pytest.raises(UsageError, match="zero vectors"):
        scale_at_kl(tiny_llama, steered * 0.0, texts, 0.1)
    with pytest.raises(UsageError, match="at least one set"):
        at_equal_kl(tiny_llama, {}, Neutral("mine", tuple(texts)), letters, EVALUATION)
