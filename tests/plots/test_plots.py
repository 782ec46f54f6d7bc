"""Figures show what their tables say, are labelled, and take no markup from a model."""

from __future__ import annotations

import json

import pandas as pd
import plotly.graph_objects as go
import pytest
import torch

from steerlab.errors import UsageError
from steerlab.interp import geometry
from steerlab.models.sites import Site
from steerlab.plots import geometry as geometry_plots
from steerlab.plots.house import label, readable, visible
from steerlab.plots.logit_lens import logit_lens
from steerlab.plots.scores import scores
from steerlab.plots.training import learning_curve


def lens(tokens: list[str], sign: float = 1.0) -> pd.DataFrame:
    rows = [
        {"site": "resid_post", "layer": layer, "readout": "cosine", "end": "top", "rank": rank}
        | {"token_id": rank, "token": token, "score": sign * (1 - 0.1 * rank)}
        for layer in (0, 11)
        for rank, token in enumerate(tokens)
    ]
    return pd.DataFrame(rows)


def score_table() -> pd.DataFrame:
    row = {
        "model": "m",
        "task": "t",
        "split": "test",
        "temperature": 1.0,
        "n_problems": 9,
        "n_samples": 8,
        "n_seeds": 1,
    }
    values = {"steered": 0.7, "base": 0.1, "few_shot": 0.5, "my_own": 0.2}
    return pd.DataFrame(
        [
            {**row, "condition": name, "metric": metric, "value": value, "low": value - 0.05, "high": value + 0.1}
            for name, value in values.items()
            for metric in ("avg@8", "pass@8")
        ]
    )


def test_text_that_hides_or_reorders_is_spelled_out():
    assert readable(" a\n\t") == "␣a⏎⇥" and readable("") == "∅" and readable("\u00a0x") == "\u00a0x"
    assert visible("a\x00b\u202ec\ud800\u200d\n") == "a⟨U+0000⟩b⟨U+202E⟩c⟨U+D800⟩⟨U+200D⟩\n"
    assert label("<b>&</b>") == "&lt;b&gt;&amp;&lt;/b&gt;" and label("abcdef", limit=4) == "abc…"


def test_lens_figure_shows_tokens_in_layer_order():
    figure = logit_lens(lens([" the", "<b>", "%{x}"]))
    trace = figure.data[0]
    assert list(trace.y) == ["0", "11"] and list(trace.x) == ["1", "2", "3"]
    assert list(trace.text[0]) == ["␣the", "&lt;b&gt;", "%{x}"] and trace.zmin == pytest.approx(0.8)
    both = logit_lens(pd.concat([lens(["a"]), lens(["a"], -1).assign(layer=3)]))
    assert (both.data[0].zmin, both.data[0].zmax) == (-1, 1)
    with pytest.raises(UsageError, match="bottom"):
        logit_lens(lens(["a"]), end="bottom")


def test_geometry_figures():
    generator = torch.Generator().manual_seed(0)
    vectors = {Site("resid_post", layer): torch.randn(8, generator=generator) for layer in range(3)}
    vectors[Site("resid_post", 3)] = torch.zeros(8)
    bars = geometry_plots.norms(geometry.norms(vectors))
    assert list(bars.data[0].y) == geometry.norms(vectors)["norm"].tolist()
    heat = geometry_plots.cosines(geometry.cosine_matrix(vectors)).data[0]
    assert (heat.zmin, heat.zmax) == (-1, 1) and heat.z.shape == (4, 4) and heat.z[1, 1] == pytest.approx(1)
    assert pd.isna(heat.z[3]).all()
    two = geometry_plots.cosines(geometry.cosine_matrix({**vectors, Site("attn_out", 0): torch.ones(8)})).data[0]
    assert list(two.x)[:2] == ["attn_out.0", "resid_post.0"]
    spectrum = geometry_plots.singular_values(geometry.singular_values(vectors)).data[0]
    assert list(spectrum.x) == [1, 2, 3, 4]


def test_scores_put_base_first_and_steered_last_with_their_intervals():
    figure = scores(score_table())
    assert list(figure.layout.yaxis.ticktext) == ["base", "few shot", "my own", "steered"]
    assert len(figure.data) == 8 and sum(trace.showlegend for trace in figure.data) == 2
    trace = figure.data[0]
    assert trace.x[0] == pytest.approx(0.1) and trace.error_x.array[0] == pytest.approx(0.1)
    assert trace.error_x.arrayminus[0] == pytest.approx(0.05)
    several = pd.concat([score_table(), score_table().assign(model="n")])
    assert "m · base" in scores(several).layout.yaxis.ticktext


def test_learning_curve_of_one_run_and_of_seeds():
    one = pd.DataFrame({"step": [1, 0, 2], "reward": [0.5, 0.0, 1.0], "signal_share": [0.5, 1.0, None]})
    figure = learning_curve(one)
    assert list(figure.data[0].x) == [0, 1, 2] and len(figure.data) == 3
    assert len(learning_curve(one[["step", "reward"]]).data) == 2
    seeds = pd.concat(
        [one.assign(run=run, seed=seed, reward=one["reward"] + seed) for run in "ab" for seed in range(3)]
    )
    figure = learning_curve(seeds)
    assert len(figure.data) == 2 * 3 and "3 seeds" in figure.data[1].name
    low, high = zip(*figure.data[1].customdata, strict=True)
    assert [h - lo for h, lo in zip(high, low, strict=True)] == pytest.approx([2, 2, 2])


def test_every_axis_says_what_it_is():
    figures: list[go.Figure] = [scores(score_table()), logit_lens(lens(["a"]))]
    for figure in figures:
        layout = json.loads(figure.to_json())["layout"]
        assert layout["title"]["text"] and layout["template"]["layout"]["font"]["family"].startswith("system-ui")
    assert figures[0].layout.xaxis.title.text and figures[1].layout.yaxis.title.text == "layer"


def test_a_wrong_table_is_refused():
    for draw in (scores, logit_lens, learning_curve, geometry_plots.norms, geometry_plots.cosines):
        with pytest.raises(UsageError, match="missing"):
            draw(pd.DataFrame({"x": [1]}))
