"""Geometry of a set of steering vectors: lengths, angles, singular values, stable rank (paper 7 draws the same four).

All in float64, since the numbers are few. A zero vector has a length and no direction: its cosines are missing, never
a division by zero. Left out: comparison of two sets (see `compare`), permutation tests.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Protocol, runtime_checkable

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from steerlab import tables
from steerlab.errors import UsageError
from steerlab.models.sites import Site


@runtime_checkable
class HasVectors(Protocol):
    """Anything that keeps its vectors by site, such as `SteeringVectors`."""

    @property
    def vectors(self) -> Mapping[Site, Tensor]: ...


Vectors = Mapping[Site, Tensor] | HasVectors


def by_site(vectors: Vectors) -> dict[Site, Float[Tensor, " width"]]:
    """The vectors as detached float64 on the CPU, in the order of their sites.

    Raises UsageError if there is none, one is not a vector, or one has entries that are not finite.
    """
    found = vectors if isinstance(vectors, Mapping) else vectors.vectors
    if not found:
        raise UsageError("there are no vectors to look at; train some, or name a file that has some")
    plain = {site: found[site].detach().to("cpu", torch.float64) for site in sorted(found)}
    for site, vector in plain.items():
        if vector.ndim != 1:
            raise UsageError(f"{site} has shape {tuple(vector.shape)}; a steering vector has one axis")
        if not torch.isfinite(vector).all():
            raise UsageError(f"the vector at {site} is not finite; use the last good checkpoint")
    return plain


def norms(vectors: Vectors) -> pd.DataFrame:
    """Euclidean length of every vector: table `norms`."""
    rows = [
        {"site": site.kind, "layer": site.layer, "norm": vector.norm().item()}
        for site, vector in by_site(vectors).items()
    ]
    return tables.check(pd.DataFrame(rows), "norms")


def cosine_matrix(vectors: Vectors) -> pd.DataFrame:
    """Cosine of every ordered pair of vectors of equal width: table `cosines`. Missing where one vector is zero."""
    plain = by_site(vectors)
    unit = {
        site: vector / vector.norm() if vector.any() else torch.full_like(vector, torch.nan)
        for site, vector in plain.items()
    }
    rows = []
    for i, first in unit.items():
        for j, second in unit.items():
            if plain[i].shape != plain[j].shape:
                continue
            cosine = torch.dot(first, second).clamp(-1, 1).item()
            rows.append({"site_i": i.kind, "layer_i": i.layer, "site_j": j.kind, "layer_j": j.layer, "cosine": cosine})
    return tables.check(pd.DataFrame(rows), "cosines")


def singular_values(vectors: Vectors) -> pd.DataFrame:
    """Singular values of the vectors of each site kind, stacked as rows: table `singular_values`."""
    rows = [
        {"site": kind, "index": index, "singular_value": value}
        for kind, stack in _stacks(vectors)
        for index, value in enumerate(torch.linalg.svdvals(stack).tolist())
    ]
    return tables.check(pd.DataFrame(rows), "singular_values")


def spectrum(norms: pd.DataFrame, cosines: pd.DataFrame) -> pd.DataFrame:
    """Table `singular_values` from the tables `norms` and `cosines` alone: roots of the Gram matrix's eigenvalues.

    For readers of a finished run, who need not load its vectors. Agrees with `singular_values` to about 1e-7 of σ₁.
    """
    tables.check(norms, "norms")
    tables.check(cosines, "cosines")
    rows = []
    for kind in sorted(set(norms["site"])):
        lengths = norms.loc[norms["site"] == kind].set_index("layer")["norm"].sort_index()
        pairs = cosines.loc[(cosines["site_i"] == kind) & (cosines["site_j"] == kind)].set_index(["layer_i", "layer_j"])
        every = pd.MultiIndex.from_product([lengths.index, lengths.index])
        # a missing cosine belongs to a zero vector, whose row of the Gram matrix is zero
        cosine = torch.tensor(pairs["cosine"].reindex(every).fillna(0.0).tolist(), dtype=torch.float64)
        length = torch.tensor(lengths.tolist(), dtype=torch.float64)
        gram = cosine.reshape(len(length), len(length)) * torch.outer(length, length)
        values = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0).sqrt().tolist()
        rows += [{"site": kind, "index": index, "singular_value": value} for index, value in enumerate(values)]
    return tables.check(pd.DataFrame(rows), "singular_values")


def stable_rank(vectors: Vectors) -> pd.DataFrame:
    """Σσ²/σ₁² of the vectors of each site kind, stacked as rows: table `stable_rank`.

    1 means all layers share one direction, the number of vectors that they are orthogonal and equally long. Missing
    if all vectors are zero.
    """
    rows = []
    for kind, stack in _stacks(vectors):
        largest = torch.linalg.matrix_norm(stack, ord=2).square().item()
        rank = stack.square().sum().item() / largest if largest > 0 else float("nan")
        rows.append({"site": kind, "n_vectors": len(stack), "stable_rank": rank})
    return tables.check(pd.DataFrame(rows), "stable_rank")


def _stacks(vectors: Vectors) -> Iterator[tuple[str, Float[Tensor, "layer width"]]]:
    for kind, group in groupby(by_site(vectors).items(), key=lambda item: item[0].kind):
        yield kind, torch.stack([vector for _, vector in group])
