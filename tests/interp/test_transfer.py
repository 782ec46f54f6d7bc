"""Transfer: maps that must be found exactly, doses that must stay, and the two ends of the normalised score."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from letters import Letters, towards_letters
from steerlab.adapters import SteeringVectors
from steerlab.errors import UsageError
from steerlab.interp.residual_maps import (
    RIDGES,
    applied,
    fit_map,
    fit_maps,
    matched_layers,
    orthogonal,
    solve,
)
from steerlab.interp.transfer import Donor, Recipient, transfer
from steerlab.models import LanguageModel, Site
from steerlab.plots.transfer import transfer as draw
from steerlab.rollouts import Evaluation, Sampling
from steerlab.rollouts.statistics import share_of_gain

Exact = Callable[..., LanguageModel]
Pick = Callable[..., pd.DataFrame]
Vectors = Callable[..., SteeringVectors]
EVALUATION = Evaluation(samples=8, sampling=Sampling(max_new_tokens=2), shots=0, base=False, greedy=False)
TEXTS = [
    f"{word} and {n} more of {word[::-1]}s, é{n * 7}" for n, word in enumerate(["plum", "fig", "date", "pear"] * 4)
]
TASK = Letters()


@pytest.fixture
def turned(exact: Exact) -> tuple[LanguageModel, LanguageModel, torch.Tensor]:
    """Two models that say the same, the residual stream of the second being that of the first, rotated: the gains of
    its norms are folded into what reads them, for a norm without gains does not notice a rotation."""
    model, other = exact("qwen2"), exact("qwen2")
    turn = orthogonal(model.d_model, model.d_model, torch.Generator().manual_seed(1))
    with torch.no_grad():
        backbone = other.backbone
        backbone.embed_tokens.weight.copy_(backbone.embed_tokens.weight @ turn.T)
        reading = [(backbone.norm, [other.hf.lm_head])]
        for block in other.blocks:
            attn, mlp = block.self_attn, block.mlp
            reading.append((block.input_layernorm, [attn.q_proj, attn.k_proj, attn.v_proj]))
            reading.append((block.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]))
            for writer in (attn.o_proj, mlp.down_proj):
                writer.weight.copy_(turn @ writer.weight)
        for norm, readers in reading:
            for reader in readers:
                reader.weight.copy_((reader.weight * norm.weight) @ turn.T)
            norm.weight.fill_(1.0)
    return model, other, turn


def test_procrustes_finds_a_rotation_and_a_vector_then_does_the_same(
    turned: tuple[LanguageModel, LanguageModel, torch.Tensor], vectors: Vectors
) -> None:
    model, other, turn = turned
    tokens = torch.tensor([[40, 41, 42, 43, 44, 99, 7]])
    with torch.no_grad():
        assert torch.allclose(model.logits(tokens), other.logits(tokens), atol=1e-5), (
            "they say the same, up to norms in fp32"
        )
    some = vectors(model)
    maps = fit_maps(model, other, TEXTS, {1: 1, 2: 2})
    for found in maps:
        assert torch.allclose(found.matrix, turn, atol=1e-6)
        assert found.dose == pytest.approx(1.0, abs=1e-6) and found.r2 == pytest.approx(1.0, abs=1e-9)
    moved = applied(some, maps)
    with torch.no_grad():
        with some.attach(model):
            wanted = model.logits(tokens)
        with moved.attach(other):
            got = other.logits(tokens)
        with some.attach(other):
            unmapped = other.logits(tokens)
    assert torch.allclose(got, wanted, atol=1e-5)
    assert (unmapped - wanted).abs().max() > 0.1, "as it is the vector does something else"


def test_a_model_maps_onto_itself_by_the_identity(exact: Exact, vectors: Vectors) -> None:
    model = exact()
    for method in ("procrustes", "ridge"):
        found = fit_map(model, model, TEXTS, 1, 1, method)
        assert torch.allclose(found.matrix, torch.eye(model.d_model, dtype=torch.float64), atol=1e-4), method
        assert found.dose == 1.0 and found.r2 == pytest.approx(1.0, abs=1e-6)
        before = vectors(model).select([1])
        after = found.apply(vectors(model))
        site = Site("resid_post", 1)
        assert torch.allclose(after.vectors[site], before.vectors[site], atol=1e-4)


def planted(noise: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, y = A x + means + noise, the text of every position, A (wider than tall and not orthogonal)."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(600, 12, generator=generator, dtype=torch.float64) * torch.arange(1, 13) + 5
    a = torch.randn(7, 12, generator=generator, dtype=torch.float64)
    y = x @ a.T - 3 + noise * torch.randn(600, 7, generator=generator, dtype=torch.float64)
    return x, y, torch.arange(600) // 30, a


def test_ridge_finds_a_planted_linear_map_where_procrustes_cannot() -> None:
    x, y, text, a = planted(0.0)
    found = solve(x, y, text, "ridge")
    assert found.ridge == RIDGES[0] and torch.allclose(found.matrix, a, atol=1e-5)
    assert found.r2 == pytest.approx(1.0, abs=1e-9) and found.n_positions == 480
    other = solve(x, y, text, "procrustes")
    assert other.r2 < 0.9 and torch.allclose(other.matrix @ other.matrix.T, torch.eye(7, dtype=torch.float64))
    noisy = solve(*planted(20.0)[:3], "ridge")
    assert noisy.ridge > RIDGES[0] and 0.3 < noisy.r2 < 0.95


def test_held_out_texts_tell_what_is_only_learnt_by_heart() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(60, 40, generator=generator, dtype=torch.float64) for _ in range(2))
    for method in ("ridge", "procrustes"):
        assert solve(x, y, torch.arange(60) // 3, method).r2 < 0.1, method


def test_between_widths_the_relative_dose_stays(exact: Exact, tiny_models: dict[str, LanguageModel]) -> None:
    donor = exact("llama")
    recipient = exact("gemma3")
    found = fit_map(donor, recipient, TEXTS, 1, 2, "ridge")
    vector = torch.randn(donor.d_model, generator=torch.Generator().manual_seed(0))
    moved = found.apply(SteeringVectors({Site("resid_post", 1): vector}))
    assert moved.sites == (Site("resid_post", 2),)
    assert float(moved.vectors[moved.sites[0]].detach().norm() / vector.norm()) == pytest.approx(found.dose, rel=1e-5)
    assert found.dose != pytest.approx(1.0, abs=0.01)
    control = found.randomised(torch.Generator().manual_seed(0))
    told = control.apply(SteeringVectors({Site("resid_post", 1): vector}))
    assert told.norms() == pytest.approx(moved.norms(), rel=1e-5)
    wide, tall = orthogonal(3, 5, torch.Generator()), orthogonal(5, 3, torch.Generator())
    assert torch.allclose(wide @ wide.T, torch.eye(3, dtype=torch.float64))
    assert torch.allclose(tall.T @ tall, torch.eye(3, dtype=torch.float64))


def test_layers_are_matched_by_depth() -> None:
    assert matched_layers(range(4), 4, 4) == {0: 0, 1: 1, 2: 2, 3: 3}
    assert matched_layers((0, 15, 29), 30, 18) == {0: 0, 15: 9, 29: 17}
    assert matched_layers((0,), 1, 5) == {0: 0}


def test_vectors_that_arrive_at_one_layer_are_summed(exact: Exact, vectors: Vectors) -> None:
    model = exact()
    maps = [replace(fit_map(model, model, TEXTS, layer, layer), layer_recipient=0) for layer in (1, 2)]
    some = vectors(model)
    moved = applied(some, maps)
    total = sum(vector.detach() for vector in some.vectors.values())
    assert torch.allclose(moved.vectors[Site("resid_post", 0)], total, atol=1e-4)
    with pytest.raises(UsageError, match="no map for the vector at"):
        applied(vectors(model, (1, 3)), maps)
    with pytest.raises(UsageError, match="no resid_post vector at layer 1"):
        maps[0].apply(vectors(model, (3,)))


def test_base_is_nought_and_own_is_one(exact: Exact, vectors: Vectors, pick: Pick) -> None:
    model = exact()
    own, other = towards_letters(model, 3, 8.0), vectors(model)
    donors = [Donor("same", model, (own,)), Donor("other", model, (other,))]
    found = transfer(donors, [Recipient("here", model, TASK, (own,)), Recipient("bare", model, TASK)], EVALUATION)
    table, here = found.table, pick(found.table, recipient="here")
    assert pick(here, map="base")["normalised"].tolist() == [0.0]
    for row in (*pick(here, map="own").to_dict("records"), *pick(here, donor="same", map="direct").to_dict("records")):
        assert row["normalised"] == row["normalised_low"] == row["normalised_high"] == 1.0
    assert set(pick(here, donor="other")["map"]) == {"direct", "random map", "random direction"}
    controls = pick(here, donor="same").set_index("map")["normalised"]
    assert controls["random map"] < 0.9 and controls["random direction"] < 0.9
    bare = pick(table, recipient="bare")
    assert bare["normalised"].isna().all() and set(bare["why"]) == {"the recipient has no vectors of its own"}
    assert len(found.maps) == 0 and "own" not in set(bare["map"])
    nothing = transfer(donors, [Recipient("here", model, TASK, (own * 0.0,))], EVALUATION).table
    assert nothing["normalised"].isna().all() and nothing["why"].str.contains("within its noise of 0").all()


def test_between_families_vectors_go_through_maps(exact: Exact, vectors: Vectors, pick: Pick) -> None:
    donor, recipient = exact("llama"), exact("gpt2")
    some = Donor("d", donor, (vectors(donor), vectors(donor) * 0.5))
    found = transfer([some], [Recipient("r", recipient, TASK)], EVALUATION, texts=TEXTS, how="ridge")
    assert set(found.maps["layer_donor"]) == {1, 2} and set(found.maps["method"]) == {"ridge"}
    assert set(pick(found.table, donor="d")["map"]) == {"ridge", "random map", "random direction"}
    assert set(pick(found.table, donor="d")["n_seeds"]) == {2}
    with pytest.raises(UsageError, match="0 texts to fit a map on"):
        transfer([some], [Recipient("r", recipient, TASK)], EVALUATION, how="procrustes")
    with pytest.raises(UsageError, match="each name once"):
        transfer([some, some], [Recipient("r", recipient, TASK)], EVALUATION)
    with pytest.raises(UsageError, match="unknown method"):
        fit_map(donor, donor, TEXTS, 0, 0, "rigde")


def test_a_share_of_a_gain_is_only_told_where_there_is_a_gain() -> None:
    draws = np.random.default_rng(0)
    low, high = (draws.random((2, 60)) * 0.2 + level for level in (0.1, 0.7))
    middle = (low + high) / 2
    found = share_of_gain(middle, [low], high)
    assert found.value == pytest.approx(0.5) and found.low == pytest.approx(0.5) and found.why == ""
    noisy = share_of_gain(middle + draws.normal(size=(2, 60)) * 0.2, [low, low - 0.3], high)
    assert noisy.low < noisy.value < noisy.high and 0.3 < noisy.value < 0.7
    assert share_of_gain(high, [low], low).why.endswith("within its noise of 0")
    below = share_of_gain(high, [high], low)
    assert below.why.endswith("below 0") and np.isnan(below.value) and np.isnan(below.low)
    with pytest.raises(UsageError, match="unequally many seeds"):
        share_of_gain(np.ones((3, 4)), [np.zeros((2, 4))], np.ones((1, 4)))


def test_the_figure_has_the_null_beside_the_grid(exact: Exact, vectors: Vectors) -> None:
    model = exact()
    own = towards_letters(model, 3, 8.0)
    donors = [Donor("one", model, (own,)), Donor("two", model, (vectors(model),))]
    table = transfer(donors, [Recipient("here", model, TASK, (own,))], EVALUATION).table
    raw, shares = draw(table, "value"), draw(table)
    assert [a.text for a in shares.layout.annotations][:2] == ["transferred", "random map"]
    assert list(shares.data[0].y) == ["one", "two"] and list(raw.data[0].y) == ["base", "one", "two", "own"]
    assert shares.data[0].z[0][0] == 1.0 and raw.data[0].z[0][0] == table.query("map == 'base'")["value"].iloc[0]
    with pytest.raises(UsageError, match="unknown quantity"):
        draw(table, "normalized")
