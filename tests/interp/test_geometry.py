"""Lengths, angles and ranks against cases with known answers."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from steerlab.errors import UsageError
from steerlab.interp.geometry import cosine_matrix, norms, singular_values, spectrum, stable_rank
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
