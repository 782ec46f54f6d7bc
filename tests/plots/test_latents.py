"""Figures of latents show their tables, and the report says what they say."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from steerlab import tables
from steerlab.errors import UsageError
from steerlab.plots import latents as plots
from steerlab.report import latents as report
from steerlab.saes.activity import Activity
from steerlab.saes.correctness import latent_correctness, probes, replication


@pytest.fixture(scope="module")
def found() -> Activity:
    """20 problems, 6 answers each; latent 2 fires on right ones."""
    generator = np.random.default_rng(0)
    problem = np.repeat(np.arange(20), 6)
    correct = generator.random(120) < 0.5
    fired = generator.random((120, 12)) < 0.4
    fired[:, 2] = correct ^ (generator.random(120) < 0.1)
    return Activity(fired, fired.astype(np.float32), fired[:, :4].astype(np.float32), correct, problem, problem + 5)


def test_correctness(found: Activity) -> None:
    table = latent_correctness(found, shuffles=50)
    bars = plots.latent_correctness(table, "problem", n=5)
    assert [len(bar.x) for bar in bars.data] == [5, 5] and bars.data[0].x[0] == "2"
    assert bars.data[0].y[0] > 0.8 > 0.3 > bars.data[1].y[0]
    volcano = plots.latent_volcano(table, "none")
    assert sum(len(trace.x) for trace in volcano.data) == 12 and len(volcano.data[0].x) >= 1
    with pytest.raises(UsageError, match="it has none"):
        plots.latent_volcano(table.loc[table["matched"] == "none"], "length")
    section = report.correctness_section(table, replication(found, n=2, splits=4), probes(found))
    assert "120" not in section.title and "20 problems" in section.sentence and "AUROC" in section.sentence
    assert section.folded[0][1].rows[0][0] == "2"


def test_effects_and_decomposition() -> None:
    rows = [
        {"sender": sender, "latent": n, "cosine": 0.1 * n, "response": 0.2 * n, "base": 0.0, "change": size * n}
        | {"low": size * n - 0.1, "high": size * n + 0.1, "base_rate": 0.0, "rate": 0.5, "n_texts": 4}
        for sender, size in (("trained", 1.0), ("random", 0.1))
        for n in range(5)
    ]
    table = tables.check(pd.DataFrame(rows), "latent_effects")
    figure = plots.latent_effects(table)
    assert [trace.name for trace in figure.data] == ["random", "trained"] and list(figure.data[1].y) == [0, 1, 2, 3, 4]
    elsewhere = plots.latent_effects(table.assign(cosine=np.nan, response=np.nan))
    assert "without the vector" in elsewhere.layout.xaxis.title.text
    parts = pd.DataFrame(
        [
            {"sender": sender, "n": n, "latent": n, "weight": 1.0, "error": start / n}
            for sender, start in (("trained", 0.5), ("random-0", 0.9), ("random-1", 0.8))
            for n in (1, 2)
        ]
    )
    drawn = plots.decomposition(parts)
    assert list(drawn.data[-1].y) == [0.5, 0.25] and np.allclose(drawn.data[1].y, [0.85, 0.425])
    section = report.effects_section(table, parts)
    assert "latent 4 changes most, by +4.000" in section.sentence and "25% of the vector" in section.sentence


def test_causal() -> None:
    rows = [
        {"condition": name, "how": "zero", "n_latents": 3, "metric": "avg@4", "value": value, "low": value - 0.1}
        | {"high": value + 0.1, "change": value - 0.5, "change_low": value - 0.6, "change_high": value - 0.4}
        | {"beyond_random": beyond, "beyond_low": beyond, "beyond_high": beyond, "n_problems": 9}
        for name, value, beyond in (("as it is", 0.5, np.nan), ("edited", 0.2, -0.25), ("random-0", 0.45, np.nan))
    ]
    table = tables.check(pd.DataFrame(rows), "latents_causal")
    assert list(plots.latents_causal(table).data[0].y) == [0.5, 0.2, 0.45]
    section = report.causal_section(table)
    assert "a change of -0.300" in section.sentence and "fire about as often -0.250" in section.sentence
