"""Edge attribution against exact path patching, and what has to add up."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from steerlab.adapters import LoRA, SteeringVectors
from steerlab.errors import UsageError
from steerlab.interp.activation_patching import Pair, logit_difference
from steerlab.interp.agreement import agreement, drawn, exact_edges
from steerlab.interp.edge_attribution import edge_attribution
from steerlab.models import LanguageModel, Site, tiny

Exact = Callable[..., LanguageModel]
Vectors = Callable[..., SteeringVectors]
CLEAN = torch.tensor([[40, 41, 42, 43, 44, 45], [60, 61, 62, 63, 64, 65]])
OTHER = torch.tensor([[40, 41, 52, 43, 54, 45], [60, 61, 62, 73, 64, 66]])
METRIC = logit_difference(torch.tensor([7, 8]), torch.tensor([9, 10]))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_exact_for_small_changes(family: str, exact: Exact, vectors: Vectors) -> None:
    """Every kind of edge, in every family, is what path patching says of a very small vector."""
    model = exact(family)
    pair = Pair(CLEAN, CLEAN, 1e-3 * vectors(model, layers=(0,)))
    edges = edge_attribution(model, pair, METRIC, steps=0)
    assert set(edges["sender"]) == {"vector", "head", "mlp"}, "the embedding does not change"
    some = edges.sort_values("effect", key=np.abs, ascending=False)
    some = some.groupby(["sender", "receiver"]).head(2)
    assert set(some["receiver"]) == {"q", "k", "v", "mlp", "logits"}
    both = exact_edges(model, pair, some, METRIC).merge(some, on=list(some.columns[:6]), suffixes=("", "_edge"))
    moved = both["value"] - both["corrupted"]
    assert len(both) == len(some) and np.abs(moved - both["effect"]).max() < 0.03 * np.abs(moved).max()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt_neox"])
def test_what_starts_adds_up(family: str, exact: Exact, vectors: Vectors) -> None:
    """All that embeddings and vectors say is the change of the metric, the better the more steps there are."""
    model = exact(family)
    pairs = [Pair(CLEAN, OTHER, vectors(model))]
    if family == "llama":
        pairs += [Pair(CLEAN, OTHER), Pair(CLEAN, CLEAN, vectors(model))]
    for pair in pairs:
        rest = [edge_attribution(model, pair, METRIC, steps=steps).attrs["unexplained"] for steps in (1, 16)]
        assert rest[1] < 0.2 * rest[0] and rest[1] < 0.03


def test_a_head_hears_what_attention_hears(exact: Exact) -> None:
    """Queries, keys and values of all heads: the slope where attention reads the stream, by finite differences."""
    model, layer = exact("gpt2"), 2
    pair = Pair(CLEAN, OTHER)
    table = edge_attribution(model, pair, METRIC, steps=0)
    part = table.loc[(table["sender"] == "mlp") & (table["sender_layer"] == 0) & (table["receiver_layer"] == layer)]
    said = part.loc[part["receiver"].isin(("q", "k", "v")), "effect"].sum()
    site = Site("mlp_out", 0)
    with torch.no_grad():
        change = model.cache(CLEAN, [site])[site] - model.cache(OTHER, [site])[site]
        ends = []
        for step in (1e-5, -1e-5):
            with model.intervene({Site("attn_in", layer): lambda x, step=step: x + step * change}):
                ends.append(float(METRIC(model.logits(OTHER)[:, -1]).mean()))
    assert said == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-3)


def test_agreement(exact: Exact) -> None:
    model, pair = exact("gpt2"), Pair(CLEAN, OTHER)
    edges = edge_attribution(model, pair, METRIC, steps=4)
    some = drawn(edges, 40)
    assert len(some) == 40 and len(set(some.index)) == 40
    assert some["effect"].abs().max() == edges["effect"].abs().max()
    exactly = exact_edges(model, pair, some, METRIC)
    shuffled = edges.assign(effect=np.random.default_rng(0).permutation(edges["effect"]))
    table = agreement(exactly, {"edges": edges, "shuffled": shuffled}).set_index("estimate")
    assert set(table["n"]) == {40} and table.loc["edges", "spearman"] > 0.6 > table.loc["shuffled", "high"]
    assert table.loc["edges", "error"] < 1 and table.loc["edges", "low"] <= table.loc["edges", "spearman"]
    same = agreement(exactly, {"same": exactly.assign(effect=exactly["value"] - exactly["corrupted"])}).iloc[0]
    assert same["error"] == 0 and same["spearman"] == pytest.approx(1) and same["bias"] == pytest.approx(1)


def test_bad_input_is_one_line(exact: Exact, vectors: Vectors) -> None:
    model, pair = exact(), Pair(CLEAN, OTHER)
    table = edge_attribution(model, pair, METRIC, steps=0)
    places = table.rename(columns={"sender": "other"})
    for says, call in (
        ("steps is -1", lambda: edge_attribution(model, pair, METRIC, steps=-1)),
        ("of resid_post", lambda: edge_attribution(model, Pair(CLEAN, CLEAN, LoRA().init(model)), METRIC)),
        ("no columns", lambda: agreement(table, {"estimate": places})),
        ("at least 3", lambda: agreement(table.iloc[:2], {"estimate": table})),
    ):
        with pytest.raises(UsageError, match=says) as caught:
            call()
        assert "\n" not in str(caught.value)
