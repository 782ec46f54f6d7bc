"""Statistics of latents and correctness: against scipy and by hand, calibrated on noise, found where planted."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from steerlab.errors import UsageError
from steerlab.saes.activity import Activity
from steerlab.saes.correctness import auroc, latent_correctness, probes, replication, shuffled, strata_of

N_PROBLEMS, SAMPLES, LATENTS = 40, 8, 30


def made(planted: float = 0.0, seed: int = 0, by_length: bool = False) -> Activity:
    """Problems of different difficulty. planted: how much likelier latent 0 fires on right answers. by_length: latent 1
    fires on long ones, which are right more often."""
    generator = np.random.default_rng(seed)
    problem = np.repeat(np.arange(N_PROBLEMS), SAMPLES)
    length = generator.integers(5, 60, size=len(problem))
    hard = np.repeat(generator.uniform(0.2, 0.8, size=N_PROBLEMS), SAMPLES)
    chance = np.clip(length / 60, 0.1, 0.9) if by_length else hard
    correct = generator.random(len(problem)) < chance
    rate = np.full((len(problem), LATENTS), 0.3)
    rate[:, 0] += planted * (correct - 0.5)
    rate[:, 1] = length / 70 if by_length else 0.1 + 0.8 * (hard > 0.5)  # of the problem, not of the answer
    fired = generator.random(rate.shape) < rate
    mean = (fired * generator.uniform(0.5, 1.5, size=rate.shape)).astype(np.float32)
    return Activity(fired, mean, mean[:, :8], correct, problem, length)


def test_by_scipy() -> None:
    """Shares, odds ratio and p of Fisher's test, the false discovery rate, a correlation."""
    found = made(0.4)
    table = latent_correctness(found, matched=("none",), shuffles=50).set_index("latent")
    for latent in (0, 3, 7):
        on, y = found.fired[:, latent], found.correct
        counts = [[int((on & y).sum()), int((~on & y).sum())], [int((on & ~y).sum()), int((~on & ~y).sum())]]
        row = table.loc[latent]
        assert row["p"] == pytest.approx(stats.fisher_exact(counts)[1])
        assert row["odds_ratio"] == pytest.approx(counts[0][0] * counts[1][1] / (counts[0][1] * counts[1][0]), rel=1e-5)
        assert row["difference"] == pytest.approx(on[y].mean() - on[~y].mean(), abs=1e-6)
        assert row["difference"] == pytest.approx(row["share_correct"] - row["share_incorrect"], abs=1e-6)
        assert row["correlation"] == pytest.approx(np.corrcoef(found.mean[:, latent], y)[0, 1], abs=1e-5)
        assert row["low"] <= row["difference"] <= row["high"]
    assert np.allclose(table["q"], stats.false_discovery_control(table["p"]))


def test_strata_by_hand() -> None:
    """Two strata: the weighted difference, the Mantel-Haenszel odds ratio, and the z of the test."""
    right = np.array([1, 1, 0, 0, 0, 1, 0, 0], dtype=bool)
    on = np.array([1, 0, 1, 0, 0, 1, 1, 0], dtype=bool)
    problem = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    found = Activity(on[:, None], on[:, None].astype(np.float32), np.zeros((8, 1), np.float32), right, problem, problem)
    row = latent_correctness(found, matched=("problem",), shuffles=20).iloc[0]
    weights = {0: 2 * 2 / 4, 1: 1 * 3 / 4}
    gaps = {0: 1 / 2 - 1 / 2, 1: 1 / 1 - 1 / 3}
    assert row["difference"] == pytest.approx(sum(weights[s] * gaps[s] for s in (0, 1)) / sum(weights.values()))
    up, down = 1 * 1 / 4 + 1 * 2 / 4, 1 * 1 / 4 + 0 * 1 / 4
    assert row["odds_ratio"] == pytest.approx(up / down)
    variance = 2 * 2 * 2 * 2 / (16 * 3) + 2 * 2 * 1 * 3 / (16 * 3)
    z = (1 - 2 * 2 / 4 + 1 - 2 * 1 / 4) / np.sqrt(variance)
    assert row["p"] == pytest.approx(2 * stats.norm.sf(z), rel=1e-6)


def test_what_is_planted_is_found_in_every_way() -> None:
    found = made(0.45)
    table = latent_correctness(found, shuffles=200)
    for way, part in table.groupby("matched", sort=False):
        assert part["latent"].iloc[0] == 0 and part["q"].iloc[0] < 1e-3 and part["family_p"].iloc[0] < 0.01, way
        assert part["low"].iloc[0] > 0 and part["difference"].iloc[0] == pytest.approx(0.45, abs=0.15)


def test_what_comes_with_problems_or_length_is_explained_away() -> None:
    easy = latent_correctness(made(), shuffles=20).set_index(["matched", "latent"])
    assert easy.loc[("none", 1), "p"] < 1e-3 and easy.loc[("problem", 1), "p"] > 0.05
    long = latent_correctness(made(by_length=True), shuffles=20).set_index(["matched", "latent"])
    assert long.loc[("none", 1), "p"] < 1e-3
    assert long.loc[("length", 1), "p"] > long.loc[("none", 1), "p"] * 10
    assert abs(long.loc[("length", 1), "difference"]) < 0.5 * abs(long.loc[("none", 1), "difference"])


def test_noise_is_called_noise() -> None:
    """p below 0.05 as often as it should be, few discoveries, and a family-wise p that is seldom small."""
    ps, families = [], []
    for seed in range(12):
        found = made(seed=seed)
        table = latent_correctness(found, matched=("problem",), shuffles=100, seed=seed)
        ps.append(float((table["p"] < 0.05).mean()))
        families.append(float(table["family_p"].min()))
    assert 0.02 < np.mean(ps) < 0.09
    assert np.mean(np.array(families) < 0.1) <= 0.4


def test_a_latent_that_always_fires_says_nothing() -> None:
    """Nor does it, by rounding, stand out in every shuffle."""
    found = made(0.45)
    found.fired[:, 5] = True
    table = latent_correctness(found, shuffles=100).set_index(["matched", "latent"])
    for way in ("none", "length", "problem"):
        assert table.loc[(way, 5), "p"] == pytest.approx(1) and table.loc[(way, 5), "family_p"] == pytest.approx(1)
        assert table.loc[(way, 0), "family_p"] < 0.05


def test_shuffles_stay_within_strata() -> None:
    found = made()
    strata = strata_of(found, "problem")
    mixed = shuffled(found.correct, strata, np.random.default_rng(0))
    assert (np.bincount(strata, mixed) == np.bincount(strata, found.correct)).all() and (mixed != found.correct).any()


def test_replication_and_its_control() -> None:
    table = replication(made(0.5), n=1, splits=8).set_index("labels")
    assert table.loc["as they are", "replicated"] > 0.8 > 0.4 > table.loc["shuffled", "replicated"]
    noise = replication(made(), n=10, splits=8).set_index("labels")
    assert noise["replicated"].max() < 0.2


def test_probes_and_their_controls() -> None:
    table = probes(made(0.6)).set_index("features")
    assert table.loc["latents", "low"] > 0.55 and abs(table.loc["latents, labels shuffled", "auroc"] - 0.5) < 0.12
    assert table.loc["latents", "n_used"] < LATENTS and abs(table.loc["length", "auroc"] - 0.5) < 0.12
    assert probes(made(by_length=True)).set_index("features").loc["length", "low"] > 0.6


def test_auroc_by_hand() -> None:
    assert auroc(np.array([3.0, 1.0, 2.0, 2.0]), np.array([True, False, True, False])) == pytest.approx(3.5 / 4)
    assert np.isnan(auroc(np.array([1.0]), np.array([True])))


def test_bad_input_is_one_line() -> None:
    found = made()
    silent = Activity(np.zeros_like(found.fired), found.mean, found.dense, found.correct, found.problem, found.length)
    alone = Activity(found.fired, found.mean, found.dense, found.correct, np.arange(len(found.correct)), found.length)
    for says, call in (
        ("all right, or all", lambda: found.select(np.flatnonzero(found.correct))),
        ("no latent fires", lambda: latent_correctness(silent)),
        ("no problem has both", lambda: latent_correctness(alone, matched=("problem",))),
        ("give at least 4", lambda: replication(found.select(np.arange(16)))),
        ("cannot make 50 folds", lambda: probes(found, folds=50)),
    ):
        with pytest.raises(UsageError, match=says) as caught:
            call()
        assert "\n" not in str(caught.value)
