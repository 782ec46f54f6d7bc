"""Persistence against full forward passes, and what must hold whatever the model."""

from __future__ import annotations

import math
from collections.abc import Callable

import pandas as pd
import pytest
import torch

from steerlab.adapters import Scope, SteeringVectors
from steerlab.errors import UsageError
from steerlab.interp.persistence import persistence
from steerlab.interp.texts import Text
from steerlab.models import Site, tiny
from steerlab.models.handle import LanguageModel

Exact = Callable[..., LanguageModel]
Pick = Callable[..., pd.DataFrame]
Vectors = Callable[..., SteeringVectors]


def full(model: LanguageModel, steered: SteeringVectors, source: int, text: Text) -> dict[int, torch.Tensor]:
    """Δ by two whole forward passes."""
    tokens = torch.tensor([text.tokens])
    sites = [Site("resid_post", layer) for layer in range(model.n_layers)]
    with torch.no_grad():
        base = model.cache(tokens, sites)
        with steered.select([source]).attach(model):
            moved = model.cache(tokens, sites)
    return {site.layer: (moved[site] - base[site])[0] for site in sites}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_it_is_the_difference_of_two_passes(
    family: str, exact: Exact, vectors: Vectors, texts: list[Text], pick: Pick
) -> None:
    model = exact(family)
    steered = vectors(model)
    found = persistence(model, steered, texts, control=False)
    cosine = torch.nn.functional.cosine_similarity
    for source in (1, 2):
        changes = [full(model, steered, source, text) for text in texts]
        assert all(not change[layer].any() for change in changes for layer in range(source))
        for layer in range(source, model.n_layers):
            of = pick(found.table, source=source, layer=layer).set_index("quantity")["value"]
            mean = [c[layer].mean(0) for c in changes]
            dd = sum(float(cosine(c[layer], m, dim=-1).mean()) for c, m in zip(changes, mean, strict=True)) / 2
            assert of["diff_diff"] == pytest.approx(dd, abs=1e-9)
            assert of["length"] == pytest.approx(sum(float(c[layer].norm(dim=-1).mean()) for c in changes) / 2)
            own = steered.vectors.get(Site("resid_post", layer))
            if own is None:
                assert math.isnan(of["diff_vector"])
            else:
                s = own.detach().double()
                dv = sum(float(cosine(c[layer], s, dim=-1).mean()) for c in changes) / 2
                assert of["diff_vector"] == pytest.approx(dv, abs=1e-6)
        tokens = sum(len(text.tokens) for text in texts)
        effect = sum(change[model.n_layers - 1].sum(0) for change in changes) / tokens
        assert torch.allclose(found.effects[source], effect, atol=1e-9)


def test_at_its_own_layer_an_effect_is_the_vector(exact: Exact, vectors: Vectors, texts: list[Text]) -> None:
    model = exact()
    table = persistence(model, vectors(model), texts).table
    own = table.query("source == layer and quantity in ('diff_vector', 'diff_diff') and condition == 'trained'")
    assert own["value"].to_numpy() == pytest.approx(1.0, abs=1e-6) and len(own) == 4
    assert set(table["condition"]) == {"trained", "random"}
    random = table.query("source == layer and quantity == 'diff_vector' and condition == 'random'")
    assert (random["value"].abs() < 0.9).all()
    one = persistence(model, vectors(model), texts[:1], control=False).table.query("quantity == 'length'")
    assert one["low"].to_numpy() == pytest.approx(one["value"].to_numpy())
    assert one["high"].to_numpy() == pytest.approx(one["value"].to_numpy())
    lengths = table.query("source == layer and quantity == 'length'").pivot_table(
        index="source", columns="condition", values="value"
    )
    assert lengths["random"].to_numpy() == pytest.approx(lengths["trained"].to_numpy(), rel=1e-5)


def test_every_source_its_own_texts(exact: Exact, vectors: Vectors, texts: list[Text], pick: Pick) -> None:
    model = exact()
    steered = vectors(model)
    own = persistence(model, steered, {1: texts[:1], 2: texts[1:]}, control=False).table
    first = persistence(model, steered.select([1]), texts[:1], control=False).table
    part = pick(own, source=1, quantity="diff_diff")["value"]
    assert part.to_numpy() == pytest.approx(pick(first, quantity="diff_diff")["value"].to_numpy(), abs=1e-12)
    with pytest.raises(UsageError, match=r"layers \[2\]"):
        persistence(model, steered, {1: texts})


def test_zero_vectors_are_named_and_left_out(exact: Exact, vectors: Vectors, texts: list[Text]) -> None:
    model = exact()
    some = vectors(model, (1,)) + vectors(model, (2,)) * 0.0
    found = persistence(model, some, texts, control=False)
    assert set(found.table["source"]) == {1} and found.table.attrs["zero"] == ["resid_post.2"]
    with pytest.raises(UsageError, match="every vector is zero"):
        persistence(model, some * 0.0, texts)


def test_outside_its_scope_there_is_nothing_to_average(exact: Exact, vectors: Vectors, texts: list[Text]) -> None:
    model = exact()
    found = persistence(model, vectors(model, scope=Scope.generated()), texts, control=False).table
    own = found.query("source == layer and quantity == 'diff_diff'")
    assert own["value"].to_numpy() == pytest.approx(1.0, abs=1e-6)


def test_other_sites_are_refused(exact: Exact, texts: list[Text]) -> None:
    model = exact()
    with pytest.raises(UsageError, match="resid_post"):
        persistence(model, SteeringVectors({Site("attn_out", 1): torch.ones(32)}), texts)
