"""Activation patching: against whole passes in every family, and its first-order estimate."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from steerlab.adapters import Scope, SteeringVectors
from steerlab.errors import UsageError
from steerlab.interp.activation_patching import (
    Pair,
    Place,
    activation_patching,
    blocks,
    head_positions,
    heads,
    logit_difference,
)
from steerlab.interp.attribution_patching import attribution_patching
from steerlab.models import LanguageModel, Site, tiny
from steerlab.plots.activation_patching import activation_patching as plot

Exact = Callable[..., LanguageModel]
Vectors = Callable[..., SteeringVectors]
CLEAN = torch.tensor([[40, 41, 42, 43, 44, 45], [60, 61, 62, 63, 64, 65]])
OTHER = torch.tensor([[50, 51, 42, 43, 54, 45], [70, 61, 62, 73, 64, 65]])
LATE = torch.tensor([[40, 41, 42, 53, 44, 45], [60, 61, 62, 73, 74, 65]])  # the same in the first three positions
METRIC = logit_difference(torch.tensor([7, 8]), torch.tensor([9, 10]))


def the_long_way(model: LanguageModel, pair: Pair, place: Place) -> float:
    """Whole passes, the whole head."""
    site, d = Site(place.kind, place.layer), model.d_head
    part = slice(None) if place.head is None else slice(place.head * d, (place.head + 1) * d)
    where = slice(None) if place.position is None else slice(place.position, place.position + 1)

    def logits(tokens: torch.Tensor, adapter: object, edits: dict) -> torch.Tensor:
        with torch.no_grad(), model.intervene(edits):
            if adapter is None:
                return model.logits(tokens)[:, -1]
            with adapter.attach(model):  # type: ignore[attr-defined]
                return model.logits(tokens)[:, -1]

    kept: dict[Site, torch.Tensor] = {}
    logits(pair.clean, pair.clean_adapter, {site: lambda x: kept.setdefault(site, x)})

    def edit(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[:, where, part] = kept[site][:, where, part]
        return x

    return float(METRIC(logits(pair.corrupted, pair.corrupted_adapter, {site: edit})).mean())


@pytest.mark.parametrize("corrupted", [OTHER, LATE], ids=["nothing shared", "prefix shared"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_whole_passes_say_the_same(family: str, corrupted: torch.Tensor, exact: Exact) -> None:
    model = exact(family)
    pair = Pair(CLEAN, corrupted)
    assert pair.common == (3 if corrupted is LATE else 0)
    places = [
        Place("z", 0, 1), Place("z", 2, 0), Place("k", 1, 0), Place("resid_pre", 2, None, 3), Place("attn_out", 3),
        Place("mlp_out", 1, None, 4), Place("z", 3, 1, 5), Place("resid_pre", 1, None, 0),
    ]  # fmt: skip
    table = activation_patching(model, pair, places, METRIC)
    for place, value in zip(places, table["value"], strict=True):
        assert value == pytest.approx(the_long_way(model, pair, place), abs=1e-9), place


def test_vectors_are_a_run(exact: Exact, vectors: Vectors) -> None:
    """Clean: steered; corrupted: the base model on the same tokens; and the other way round."""
    model = exact("llama")
    steered = vectors(model, layers=(1,))
    for pair in (Pair(CLEAN, CLEAN, steered, None), Pair(CLEAN, CLEAN, None, steered)):
        places = [Place("resid_pre", 2), Place("z", 2, 1), Place("mlp_out", 0), Place("resid_post", 3)]
        table = activation_patching(model, pair, places, METRIC)
        for place, value in zip(places, table["value"], strict=True):
            assert value == pytest.approx(the_long_way(model, pair, place), abs=1e-9), place
        assert table["value"].iloc[0] == pytest.approx(table["clean"].iloc[0], abs=1e-9), "all that is above the vector"
        assert table["value"].iloc[2] == pytest.approx(table["corrupted"].iloc[2], abs=1e-9), "nothing below it"


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_patching_everything_is_the_other_run(family: str, exact: Exact) -> None:
    model = exact(family)
    table = activation_patching(model, Pair(CLEAN, OTHER), [Place("resid_post", 3), Place("resid_pre", 0)], METRIC)
    assert np.allclose(table["value"], table["clean"]) and np.allclose(table["recovered"].dropna(), 1)


def test_first_order_is_right_for_small_changes(exact: Exact, vectors: Vectors) -> None:
    """The error falls with the square of the change."""
    model = exact("gpt2")
    places, errors = heads(model), []
    for scale in (1e-2, 1e-3):
        pair = Pair(CLEAN, CLEAN, scale * vectors(model, layers=(0,)), None)
        exactly, estimated = (of(model, pair, places, METRIC) for of in (activation_patching, attribution_patching))
        moved, told = (table["value"] - table["corrupted"] for table in (exactly, estimated))
        errors.append(float((moved - told).abs().max() / moved.abs().max()))
        assert np.allclose(exactly["clean"], estimated["clean"])
    assert errors[0] < 0.02 and errors[1] < 0.2 * errors[0]


def test_figure(exact: Exact) -> None:
    model, pair = exact(), Pair(CLEAN, OTHER)
    by_head = plot(activation_patching(model, pair, heads(model), METRIC))
    assert by_head.data[0].z.shape == (4, model.n_heads)
    by_position = plot(activation_patching(model, pair, blocks(model, 6), METRIC))
    assert [trace.z.shape for trace in by_position.data] == [(4, 6)] * 3
    whole = activation_patching(
        model, pair, [Place(kind, n) for kind in ("attn_out", "mlp_out") for n in range(4)], METRIC
    )
    lines = plot(whole)
    assert [len(trace.x) for trace in lines.data] == [4, 4]
    known = whole["recovered"].notna().all()
    shown = whole["recovered"] if known else whole["value"] - whole["corrupted"]
    assert np.allclose(np.concatenate([trace.y for trace in lines.data]), shown)
    with pytest.raises(UsageError, match="select one position"):
        plot(activation_patching(model, pair, head_positions(model, 2), METRIC))


def test_every_index_fits(exact: Exact) -> None:
    model, late = exact("llama"), Pair(CLEAN, LATE)
    for index in (blocks(model, 6), head_positions(model, 6)):
        assert len(activation_patching(model, late, index[:9], METRIC)) == 9
        assert len(attribution_patching(model, late, index, METRIC)) == len(index)


def test_first_order_by_finite_differences(exact: Exact) -> None:
    """∂metric/∂z of one head, from the estimate of a run that differs by very little."""
    model = exact("gpt2")  # which takes roots in fp64
    site, d = Site("z", 2), model.d_head
    place = Place("z", 2, 1)
    estimated = attribution_patching(model, Pair(CLEAN, OTHER), [place], METRIC).iloc[0]
    with torch.no_grad():
        clean = model.cache(CLEAN, [site])[site]
        corrupted = model.cache(OTHER, [site])[site]
        step = torch.zeros_like(clean)
        step[..., d : 2 * d] = 1e-5 * (clean - corrupted)[..., d : 2 * d]
        with model.intervene({site: lambda x: x + step}):
            moved = METRIC(model.logits(OTHER)[:, -1])
        before = METRIC(model.logits(OTHER)[:, -1])
    slope = float((moved - before).mean() / 1e-5)
    assert estimated["value"] - estimated["corrupted"] == pytest.approx(slope, rel=1e-4)


def test_bad_input_is_one_line(exact: Exact) -> None:
    model = exact()

    def refused(says: str, ask: Callable[[], object]) -> None:
        with pytest.raises(UsageError, match=says) as caught:
            ask()
        assert "\n" not in str(caught.value)

    pair = Pair(CLEAN, OTHER)
    refused("equal length", lambda: Pair(CLEAN, OTHER[:, :-1]))
    refused("at least one place", lambda: activation_patching(model, pair, [], METRIC))
    refused("head 99", lambda: activation_patching(model, pair, [Place("z", 0, 99)], METRIC))
    refused("position 6", lambda: activation_patching(model, pair, [Place("z", 0, 0, 6)], METRIC))
    refused("layers 0…3", lambda: activation_patching(model, pair, [Place("z", 9)], METRIC))


def test_integrated_gradients_are_nearer(exact: Exact) -> None:
    """Of whole residual states, whose effects the way between the runs passes through, and add up along it."""
    model = exact("gpt2")
    pair, place = Pair(CLEAN, OTHER), [Place("resid_pre", 0)]
    exactly = activation_patching(model, pair, place, METRIC)["value"].iloc[0]
    told = [attribution_patching(model, pair, place, METRIC, steps=steps)["value"].iloc[0] for steps in (0, 4, 64)]
    errors = [abs(value - exactly) for value in told]
    assert errors[2] < 0.1 * errors[0] and errors[1] < errors[0] and errors[2] < 1e-3 * abs(exactly)
    with pytest.raises(UsageError, match="steps is -1"):
        attribution_patching(model, pair, place, METRIC, steps=-1)


def test_padding_behind_the_ends_is_not_seen(exact: Exact, vectors: Vectors) -> None:
    """Sequences of different lengths in one pair, under vectors of part of the tokens, are what each is alone."""
    model = exact("llama")
    steered = vectors(model, layers=(1,))
    steered.scope = Scope("generated")
    last, prompts = torch.tensor([5, 3]), torch.tensor([3, 2])
    places = [Place("z", 2, 0), Place("resid_pre", 2), Place("mlp_out", 3)]
    both = activation_patching(model, Pair(CLEAN, CLEAN, steered, None, prompts, last), places, METRIC)
    metrics = [logit_difference(torch.tensor([right]), torch.tensor([right + 2])) for right in (7, 8)]
    alone = [
        activation_patching(
            model, Pair(tokens[None, : end + 1], tokens[None, : end + 1], steered, None, int(n)), places, metric
        )
        for tokens, end, n, metric in zip(CLEAN, last.tolist(), prompts, metrics, strict=True)
    ]
    assert np.allclose(both["value"], (alone[0]["value"] + alone[1]["value"]) / 2, atol=1e-9)
    assert abs(both["clean"].iloc[0] - both["corrupted"].iloc[0]) > 1e-3
