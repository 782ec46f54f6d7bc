"""Geometry of steering vectors: lengths, angles, singular values, stable rank of a set (paper 7 draws the same four);
angles between sets (runs, seeds); the dose, which is how long a vector is beside the stream it is added to.

All in float64, since the numbers are few. A zero vector has a length and no direction: its cosines are missing, never
a division by zero. Left out: permutation tests, angles between subspaces.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, groupby
from typing import Protocol, runtime_checkable

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from steerlab import tables
from steerlab.errors import UsageError
from steerlab.interp.states import check_texts, states_under
from steerlab.interp.texts import Text
from steerlab.models import LanguageModel
from steerlab.models.sites import Site
from steerlab.rollouts.statistics import resampled_means


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


def cosines_between(sets: Mapping[str, Vectors], *, draws: int = 100_000, seed: int = 0) -> pd.DataFrame:
    """Cosines of the vectors of two sets at the same site, every pair of sets: table `cosines_between`.

    Beside each stands the middle 95 % of the cosines of random directions of that width, from `draws` of them (about
    ± 1.96 / √width). Missing where a vector is zero. Raises UsageError for fewer than two sets, or two that have no
    site of equal width in common.
    """
    if len(sets) < 2:
        raise UsageError(f"{len(sets)} set of vectors has nothing to be compared with; name at least two")
    plain = {name: by_site(vectors) for name, vectors in sets.items()}
    ranges: dict[int, tuple[float, float]] = {}
    rows = []
    for (i, first), (j, second) in combinations(plain.items(), 2):
        common = [site for site in first if site in second and first[site].shape == second[site].shape]
        if not common:
            raise UsageError(f"{i} and {j} have no vectors at the same place and of the same width; compare others")
        for site in common:
            lengths = first[site].norm() * second[site].norm()
            cosine = (torch.dot(first[site], second[site]) / lengths).clamp(-1, 1).item() if lengths > 0 else math.nan
            width = len(first[site])
            if width not in ranges:
                ranges[width] = random_range(width, draws, seed)
            low, high = ranges[width]
            rows.append(
                {"run_i": i, "run_j": j, "site": site.kind, "layer": site.layer, "cosine": cosine}
                | {"low_random": low, "high_random": high}
            )
    return tables.check(pd.DataFrame(rows), "cosines_between")


def random_range(width: int, draws: int = 100_000, seed: int = 0) -> tuple[float, float]:
    """The middle 95 % of the cosine of two random directions of `width` numbers, by sampling.

    One of the two may as well be the first axis, so a draw is x₁ / ‖x‖ of normal numbers x: one normal number and
    one χ² of the other `width` − 1.
    """
    if width < 1 or draws < 1:
        raise UsageError(f"width {width} and draws {draws} must be at least 1")
    generator = np.random.default_rng(seed)
    first = generator.standard_normal(draws)
    rest = generator.chisquare(width - 1, draws) if width > 1 else 0.0
    low, high = np.quantile(first / np.sqrt(first**2 + rest), [0.025, 0.975])
    return float(low), float(high)


@torch.no_grad()
def relative_dose(model: LanguageModel, vectors: Vectors, texts: Sequence[Text], *, seed: int = 0) -> pd.DataFrame:
    """‖s_l‖ / mean_t ‖h_l‖, mean over `texts` with a bootstrap interval over them: table `relative_dose`.

    h_l: what block l writes at every token but a text's first, with no vector anywhere. The first token is left out
    because many models park attention there in a state tens of times as long as all others, which would drown the
    mean; a text of one token keeps it. Vectors of another width than the stream are left out and listed in
    `attrs["skipped"]`. Raises UsageError for no text, a layer that the model does not have, or no vector of that width.
    """
    check_texts(model, texts)
    found = by_site(vectors)
    wide = {site: vector for site, vector in found.items() if len(vector) == model.d_model}
    if not wide:
        raise UsageError(f"no vector is as wide as the residual stream ({model.d_model}); use resid_post vectors")
    if beyond := sorted({site.layer for site in wide if site.layer >= model.n_layers}):
        raise UsageError(f"{model.name} has layers 0 to {model.n_layers - 1}, not {beyond}; use the vectors' own model")
    layers = sorted({site.layer for site in wide})
    lengths: dict[int, list[float]] = {layer: [] for layer in layers}
    for text in texts:
        for layer, states in states_under(model, None, text, layers).items():
            lengths[layer].append(states[min(1, len(states) - 1) :].double().norm(dim=-1).mean().item())
    rows = []
    for site, vector in wide.items():
        stream, norm = np.array(lengths[site.layer]), vector.norm().item()
        low, high = np.quantile(resampled_means(1 / stream[:, None], seed=seed), [0.025, 0.975])
        if len(texts) == 1:
            low = high = math.nan
        rows.append(
            {"site": site.kind, "layer": site.layer, "norm": norm, "stream": float(stream.mean())}
            | {"value": norm * float((1 / stream).mean()), "low": norm * float(low), "high": norm * float(high)}
            | {"n_texts": len(texts)}
        )
    table = pd.DataFrame(rows)
    table.attrs["skipped"] = [str(site) for site in found if site not in wide]
    return tables.check(table, "relative_dose")


def _stacks(vectors: Vectors) -> Iterator[tuple[str, Float[Tensor, "layer width"]]]:
    for kind, group in groupby(by_site(vectors).items(), key=lambda item: item[0].kind):
        yield kind, torch.stack([vector for _, vector in group])
