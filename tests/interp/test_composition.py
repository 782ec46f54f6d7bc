"""Composition: what a pair is when one of it is nothing, what `relative` is at its ends, and what greedy never does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from letters import Letters, towards_letters
from steerlab.adapters import SteeringVectors
from steerlab.errors import UsageError
from steerlab.interp import answers
from steerlab.interp.composition import agreement, composition
from steerlab.interp.persistence import persistence
from steerlab.interp.texts import Text
from steerlab.models import LanguageModel
from steerlab.plots.composition import composition as heat
from steerlab.plots.composition import composition_sets
from steerlab.rollouts import Condition, Evaluation, Sampling, evaluate

Exact = Callable[..., LanguageModel]
Pick = Callable[..., pd.DataFrame]
Vectors = Callable[..., SteeringVectors]
EVALUATION = Evaluation(samples=2, sampling=Sampling(max_new_tokens=3), shots=0, base=False, greedy=False)
TASK = Letters()


@pytest.fixture
def good(exact: Exact) -> tuple[LanguageModel, SteeringVectors]:
    """A model and vectors at three layers, of which the middle one helps little."""
    model = exact()
    parts = [towards_letters(model, layer, scale) for layer, scale in ((1, 3.0), (2, 0.5), (3, 4.0))]
    return model, parts[0].merge(parts[1]).merge(parts[2])


def test_every_number_is_what_evaluating_that_set_gives(
    good: tuple[LanguageModel, SteeringVectors], pick: Pick
) -> None:
    model, vectors = good
    found = composition(model, TASK, vectors, EVALUATION, control=1)
    for i, j in ((1, 1), (1, 3), (2, 3)):
        alone = Condition(vectors.select({i, j}), TASK, EVALUATION.sampling, EVALUATION.samples)
        table = evaluate(model, TASK.problems("test"), {"x": alone}, seed=EVALUATION.seed)
        (row,) = pick(found.pairs, condition="trained", layer_i=i, layer_j=j).to_dict("records")
        assert row["value"] == pytest.approx(table["correct"].mean(), abs=1e-12)
    trained = pick(found.pairs, condition="trained").set_index(["layer_i", "layer_j"])
    assert len(trained) == 6 and set(found.pairs["metric"]) == {"avg@2"}
    better = max(trained.loc[(1, 1), "value"], trained.loc[(3, 3), "value"])
    assert trained.loc[(1, 3), "gain"] == pytest.approx(trained.loc[(1, 3), "value"] - better)
    assert len(pick(found.pairs, condition="random")) == 3  # one pair, and its two vectors alone


def test_a_zero_partner_changes_no_completion(good: tuple[LanguageModel, SteeringVectors], pick: Pick) -> None:
    model, vectors = good
    some = vectors.select([1, 3]) + vectors.select([2]) * 0.0
    conditions = {
        str(layers): Condition(some.select(layers), TASK, EVALUATION.sampling, 2) for layers in ((1,), (1, 2), (2,))
    }
    conditions["base"] = Condition(None, TASK, EVALUATION.sampling, 2)
    table = evaluate(model, TASK.problems("test"), conditions, seed=0)
    texts = {str(name): part["text"].tolist() for name, part in table.groupby("condition")}
    assert texts["(1,)"] == texts["(1, 2)"] != texts["base"] == texts["(2,)"]
    pairs = pick(composition(model, TASK, some, EVALUATION, control=0).pairs, condition="trained")
    pairs = pairs.set_index(["layer_i", "layer_j"])
    assert pairs.loc[(1, 2), "value"] == pairs.loc[(1, 1), "value"]
    assert pairs.loc[(1, 2), "gain"] == 0.0


def test_relative_is_one_where_the_pair_reaches_all_and_nought_where_it_adds_nothing(
    good: tuple[LanguageModel, SteeringVectors], pick: Pick
) -> None:
    model, _ = good
    half = towards_letters(model, 3, 1.5).merge(towards_letters(model, 2, 1.5)).merge(towards_letters(model, 1, 0.0))
    whole = towards_letters(model, 3, 1.5).merge(towards_letters(model, 2, 1.5))
    asked = replace(EVALUATION, samples=8)
    found = composition(model, TASK, half, asked, together=whole, control=0).pairs.set_index(["layer_i", "layer_j"])
    assert found.loc[(2, 3), "relative"] == found.loc[(2, 3), "relative_low"] == 1.0 and found.loc[(2, 3), "why"] == ""
    assert found.loc[(1, 3), "relative"] == 0.0 and found.loc[(1, 3), "relative_high"] == 0.0
    assert found.loc[(1, 1), "why"] == "a single vector" and np.isnan(found.loc[(1, 1), "relative"])
    nothing = composition(model, TASK, half, asked, together=half.select([3]), control=0).pairs
    of = pick(nothing, layer_i=1, layer_j=3).iloc[0]
    assert np.isnan(of["relative"]) and "within its noise of 0" in of["why"]
    without = composition(model, TASK, half, asked, control=0).pairs
    assert set(pick(without, layer_i=1, layer_j=3)["why"]) == {"no vectors that were trained together"}


def test_greedy_never_ends_below_its_start(good: tuple[LanguageModel, SteeringVectors], pick: Pick) -> None:
    model, vectors = good
    for given in (vectors, vectors * -1.0):
        sets = composition(model, TASK, given, EVALUATION, control=0).sets
        path = pick(sets, condition="greedy", split="train").sort_values("n_vectors")
        values = path["value"].tolist()
        assert values == sorted(values) and len(set(values)) == len(values)
        assert path["n_vectors"].tolist() == list(range(len(path)))
        held = pick(sets, condition="greedy", split="test")
        assert held["layers"].tolist() == path["layers"].tolist()
        base = pick(sets, condition="base").iloc[0]
        assert held.iloc[0]["value"] == base["value"]
    assert len(pick(composition(model, TASK, vectors, EVALUATION).sets, condition="greedy", split="train")) > 1


def test_seeds_are_pooled_and_chunks_change_nothing(
    good: tuple[LanguageModel, SteeringVectors], vectors: Vectors, pick: Pick, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, first = good
    second = vectors(model, (1, 2, 3))
    both = composition(model, TASK, [first, second], EVALUATION, control=0)
    each = [composition(model, TASK, one, EVALUATION, control=0).pairs["value"] for one in (first, second)]
    assert both.pairs["value"].to_numpy() == pytest.approx(((each[0] + each[1]) / 2).to_numpy())
    assert set(both.pairs["n_seeds"]) == {2}
    sizes: list[int] = []

    def counted(model: LanguageModel, problems: object, conditions: dict, **options: object) -> pd.DataFrame:
        sizes.append(len(conditions))
        return evaluate(model, problems, conditions, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(answers, "evaluate", counted)
    sets = {str(n): [of, of * 0.5, None] for n, of in enumerate((first, second))}
    small = answers.scored(model, TASK, sets, EVALUATION, members=2)
    whole = answers.scored(model, TASK, sets, EVALUATION)
    assert sizes == [2, 2, 2, 6]
    assert all(np.array_equal(small[name], whole[name]) for name in sets)


def pair_table(layers: Sequence[int], value: Callable[[int, int], float]) -> pd.DataFrame:
    rows = [
        {"condition": "trained", "layer_i": i, "layer_j": j, "metric": "avg@2", "value": value(i, j), "low": 0.0}
        | {"high": 1.0, "gain": value(i, j), "gain_low": 0.0, "gain_high": 1.0, "relative": float("nan")}
        | {"relative_low": 0.0, "relative_high": 0.0, "why": "x", "n_problems": 4, "n_samples": 2, "n_seeds": 1}
        for i in layers
        for j in layers
        if i <= j
    ]
    return pd.DataFrame(rows)


def followed_table(layers: Sequence[int], value: Callable[[int, int], float]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"condition": condition, "source": i, "layer": j, "quantity": quantity, "n_texts": 3}
            | dict.fromkeys(("value", "low", "high"), value(i, j) if condition == "trained" else 0.5)
            for condition in ("trained", "random")
            for quantity in ("diff_vector", "diff_diff", "length")
            for i in layers
            for j in layers
            if i <= j
        ]
    )


def test_agreement_finds_a_planted_relation_and_none_where_there_is_none(pick: Pick) -> None:
    layers, draws = range(8), np.random.default_rng(0)
    noise = draws.normal(size=(8, 8))
    told = agreement(
        pair_table(layers, lambda i, j: 0.5 - 0.05 * (j - i)),
        followed_table(layers, lambda i, j: float(noise[i, j])),
        resamples=400,
    )
    (distance,) = pick(told, predictor="distance", outcome="value").to_dict("records")
    assert distance["r"] == pytest.approx(-1.0) and distance["p"] < 0.01 and distance["n_pairs"] == 28
    assert distance["low"] == pytest.approx(-1.0) and distance["high"] == pytest.approx(-1.0)
    (none,) = pick(told, predictor="diff_diff", outcome="gain").to_dict("records")
    assert abs(none["r"]) < 0.4 and none["p"] > 0.05 and none["low"] < 0 < none["high"]
    assert pick(told, outcome="relative")["r"].isna().all() and set(pick(told, outcome="relative")["n_pairs"]) == {0}


def test_agreement_is_pearsons_r(exact: Exact, vectors: Vectors, texts: list[Text], pick: Pick) -> None:
    model = exact()
    some = vectors(model, (0, 1, 2, 3))
    followed = persistence(model, some, texts, control=False).table
    pairs = pair_table(range(4), lambda i, j: (i * 7 + j * 3) % 5 / 5)
    told = agreement(pairs, followed, resamples=20)
    of = pick(followed, quantity="diff_vector").set_index(["source", "layer"])["value"]
    both = [(of[i, j], (i * 7 + j * 3) % 5 / 5) for i in range(4) for j in range(i + 1, 4)]
    (row,) = pick(told, predictor="diff_vector", outcome="value").to_dict("records")
    assert row["r"] == pytest.approx(np.corrcoef(np.array(both).T)[0, 1])
    assert np.isnan(row["low"]) and 0 < row["p"] <= 1, "four layers are too few for an interval"
    with pytest.raises(UsageError, match="three layers"):
        agreement(pairs, followed.loc[followed["source"] < 2])


def test_what_cannot_be_combined_is_refused(exact: Exact, vectors: Vectors) -> None:
    model = exact()
    with pytest.raises(UsageError, match="at least two layers"):
        composition(model, TASK, vectors(model, (1,)), EVALUATION)
    with pytest.raises(UsageError, match=r"layers \[1\], the first at \[1, 2\]|layers \[1, 3\]"):
        composition(model, TASK, [vectors(model, (1, 2)), vectors(model, (1, 3))], EVALUATION)
    with pytest.raises(UsageError, match="told on the test split"):
        composition(model, TASK, vectors(model), EVALUATION, selection=EVALUATION)
    with pytest.raises(UsageError, match="equally many"):
        composition(model, TASK, vectors(model), EVALUATION, together=[vectors(model)] * 3)


def test_figures_show_singles_on_the_diagonal_and_crosses(pick: Pick) -> None:
    pairs = pair_table((0, 5, 9), lambda i, j: 0.4 if i == j else -0.2)
    pairs.loc[(pairs["layer_i"] == 0) & (pairs["layer_j"] == 9), "relative"] = 1.0
    drawn = heat(pd.concat([pairs, pairs.assign(condition="random", relative=float("nan"))]))
    grid, crosses = drawn.data[0], drawn.data[1]
    assert [grid.text[n][n] for n in range(3)] == ["40"] * 3 and (grid.zmin, grid.zmax) == (-0.2, 0.2)
    assert list(crosses.x) == ["9"] and list(crosses.y) == ["0"] and len(drawn.data[3].x) == 0
    assert np.isnan(grid.z[2][0]) and heat(pairs, "value").data[0].zmin == 0
    with pytest.raises(UsageError, match="unknown quantity"):
        heat(pairs, "gian")
    with pytest.raises(UsageError, match="missing"):
        composition_sets(pairs)
