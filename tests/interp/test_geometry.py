"""Lengths, angles and ranks against cases with known answers."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from steerlab.errors import UsageError
from steerlab.interp.geometry import (
    cosine_matrix,
    cosines_between,
    norms,
    random_range,
    relative_dose,
    singular_values,
    spectrum,
    stable_rank,
)
from steerlab.interp.texts import Text
from steerlab.models import LanguageModel
from steerlab.models.sites import Site


def vectors(n: int = 4, width: int = 6) -> dict[Site, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {Site("resid_post", layer): torch.randn(width, generator=generator) for layer in reversed(range(n))}


def test_norms_in_the_order_of_layers_and_scale():
    some = vectors()
    table = norms(some)
    assert table["layer"].tolist() == [0, 1, 2, 3]
    twice = norms(SimpleNamespace(vectors={site: -2 * torch.nn.Parameter(v) for site, v in some.items()}))
    pd.testing.assert_series_equal(twice["norm"], 2 * table["norm"])


def test_cosines_are_symmetric_with_one_on_the_diagonal_and_do_not_see_length():
    some = vectors()
    table = cosine_matrix(some)
    matrix = table.pivot(index="layer_i", columns="layer_j", values="cosine").to_numpy()
    assert (matrix == matrix.T).all() and matrix.diagonal() == pytest.approx(1, abs=1e-12) and abs(matrix).max() <= 1
    scaled = cosine_matrix({site: (site.layer + 1) * vector for site, vector in some.items()})
    pd.testing.assert_frame_equal(scaled, table)


def test_zero_vectors_have_no_direction():
    some = {**vectors(), Site("resid_post", 9): torch.zeros(6)}
    table = cosine_matrix(some)
    zero = (table["layer_i"] == 9) | (table["layer_j"] == 9)
    assert table.loc[zero, "cosine"].isna().all() and table.loc[~zero, "cosine"].notna().all()
    assert norms(some)["norm"].iloc[-1] == 0
    nothing = stable_rank({Site("resid_post", 0): torch.zeros(6)})
    assert math.isnan(nothing["stable_rank"].item())


@pytest.mark.parametrize(
    ("stack", "rank"), [(torch.eye(5), 5), (torch.ones(5, 3), 1), (torch.diag(torch.tensor([2.0, 1])), 1.25)]
)
def test_stable_rank(stack, rank):
    table = stable_rank({Site("resid_post", layer): row for layer, row in enumerate(stack)})
    assert table["stable_rank"].item() == pytest.approx(rank) and table["n_vectors"].item() == len(stack)


def test_stable_rank_is_made_of_the_singular_values_per_site():
    some = {**vectors(), Site("mlp_neurons", 1): torch.ones(11), Site("mlp_neurons", 2): torch.ones(11)}
    squares = singular_values(some).groupby("site")["singular_value"].agg(lambda s: (s**2).sum() / s.max() ** 2)
    assert stable_rank(some).set_index("site")["stable_rank"].to_dict() == pytest.approx(squares.to_dict())
    pairs = cosine_matrix(some)
    assert len(pairs) == 16 + 4 and (pairs["site_i"] == pairs["site_j"]).all()


def test_the_spectrum_follows_from_lengths_and_angles():
    some = {**vectors(), Site("resid_post", 9): torch.zeros(6), Site("attn_out", 1): torch.ones(6)}
    found, direct = spectrum(norms(some), cosine_matrix(some)), singular_values(some)
    assert found[["site", "index"]].to_numpy().tolist() == direct[["site", "index"]].to_numpy().tolist()
    assert found["singular_value"].tolist() == pytest.approx(direct["singular_value"].tolist(), abs=1e-6)


def test_what_is_no_vector():
    with pytest.raises(UsageError, match="not finite"):
        norms({Site("resid_post", 0): torch.tensor([1.0, float("nan")])})
    with pytest.raises(UsageError, match="one axis"):
        norms({Site("resid_post", 0): torch.ones(2, 2)})
    with pytest.raises(UsageError, match="no vectors"):
        norms({})


def test_a_run_points_where_it_points_and_minus_it_the_other_way():
    some = vectors()
    table = cosines_between(
        {"a": some, "b": {s: 3 * v for s, v in some.items()}, "c": {s: -v for s, v in some.items()}}
    )
    cosine = table.set_index(["run_i", "run_j", "layer"])["cosine"]
    for layer in range(4):
        assert cosine["a", "b", layer] == pytest.approx(1, abs=1e-6)
        assert cosine["a", "c", layer] == pytest.approx(-1, abs=1e-12)
    assert cosines_between({"a": some, "again": some})["cosine"].tolist() == pytest.approx([1] * 4, abs=1e-12)


def test_sets_are_compared_where_both_have_a_vector():
    site = Site("resid_post", 1)
    some = {**vectors(), Site("attn_out", 1): torch.ones(6)}
    assert len(cosines_between({"a": some, "b": {site: some[site]}})) == 1
    zero = cosines_between({"a": some, "b": {site: torch.zeros(6)}})
    assert math.isnan(zero["cosine"].item()) and zero["high_random"].notna().all()
    with pytest.raises(UsageError, match="same place"):
        cosines_between({"a": some, "b": {Site("resid_post", 9): torch.ones(6)}})
    with pytest.raises(UsageError, match="at least two"):
        cosines_between({"a": some})


@pytest.mark.parametrize("width", [3, 64])
def test_the_random_range_is_that_of_random_directions(width):
    low, high = random_range(width)
    pairs = torch.randn(2, 20_000, width, generator=torch.Generator().manual_seed(1))
    cosines = torch.nn.functional.cosine_similarity(pairs[0], pairs[1], dim=-1)
    share = float(((cosines > low) & (cosines < high)).float().mean())
    assert share == pytest.approx(0.95, abs=0.006)  # four standard errors


def test_the_random_range_of_one_number_and_of_many():
    assert random_range(1, 100) == (-1, 1)
    low, high = random_range(1024)
    assert (-low, high) == pytest.approx((1.96 / 32, 1.96 / 32), rel=0.02)
    with pytest.raises(UsageError, match="at least 1"):
        random_range(0)


def test_the_dose_is_the_vector_beside_the_stream_without_it(tiny_llama_fp64: LanguageModel, texts: list[Text]):
    model = tiny_llama_fp64
    sites = [Site("resid_post", layer) for layer in (1, 3)]
    some = {site: torch.full((32,), 0.5 * (1 + site.layer)) for site in sites}
    table = relative_dose(model, some, texts).set_index("layer")
    for site in sites:
        found = []
        for text in texts:
            states = model.cache(torch.tensor([text.tokens]), [site])[site][0, 1:]
            found.append(float(some[site].double().norm() / states.norm(dim=-1).mean()))
        assert table.loc[site.layer, "value"] == pytest.approx(sum(found) / len(found))
        assert min(found) - 1e-9 <= table.loc[site.layer, "low"] < table.loc[site.layer, "high"] <= max(found) + 1e-9
    twice = relative_dose(model, {site: -2 * vector for site, vector in some.items()}, texts).set_index("layer")
    for column in ("value", "low", "high"):
        assert twice[column].tolist() == pytest.approx((2 * table[column]).tolist())
    nothing = relative_dose(model, {sites[0]: torch.zeros(32), Site("mlp_neurons", 0): torch.ones(64)}, texts)
    assert nothing[["value", "low", "high"]].to_numpy().tolist() == [[0, 0, 0]]
    assert nothing.attrs["skipped"] == ["mlp_neurons.0"]
    assert relative_dose(model, some, texts[:1])["low"].isna().all()
    assert relative_dose(model, some, [Text((40,), 1)])["value"].gt(0).all()


def test_what_has_no_dose(tiny_llama_fp64: LanguageModel, texts: list[Text]):
    with pytest.raises(UsageError, match="as wide as the residual stream"):
        relative_dose(tiny_llama_fp64, {Site("mlp_neurons", 0): torch.ones(64)}, texts)
    with pytest.raises(UsageError, match="layers 0 to 3"):
        relative_dose(tiny_llama_fp64, {Site("resid_post", 7): torch.ones(32)}, texts)
    with pytest.raises(UsageError, match="nothing to read"):
        relative_dose(tiny_llama_fp64, vectors(width=32), [])
