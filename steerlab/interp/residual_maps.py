"""Linear maps between the residual streams of two models, fitted on shared text: what carries vectors across.

States are compared where both tokenizers have a boundary, that is where both models have read exactly the same
characters; the first such place of a text, whose state is often far longer than all others, is left out. Means are
removed, so a map says how *differences* of states go over, and a vector is a difference. `procrustes` is the best
orthogonal matrix (with orthonormal rows or columns where widths differ; Schönemann 1966), `ridge` the best linear one,
its penalty chosen on texts held out for that. R² is told on other texts again.

A map changes directions only. A vector is rescaled so that its *relative dose* stays: its length over the median length
of the states at its layer is the same before and after. Layers are matched by relative depth. Left out: maps that see
several positions or layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from steerlab.adapters import SteeringVectors
from steerlab.errors import UsageError, unknown
from steerlab.interp.states import check_texts, states_under
from steerlab.interp.texts import Text
from steerlab.models import LanguageModel, Site

METHODS = ("procrustes", "ridge")
RIDGES = tuple(10.0**power for power in range(-8, 3))
LAYERS_AT_ONCE = 8  # states of so many layers of both models are in memory together


@dataclass(frozen=True)
class Fitted:
    """matrix: what a donor's state, less its mean, is multiplied by. r2: on held-out texts (of an orthogonal matrix
    with the one factor that fits best). ridge: the penalty in mean variances of a donor coordinate, NaN if none."""

    matrix: Float[Tensor, "d_recipient d_donor"]
    r2: float
    ridge: float
    n_positions: int


@dataclass(frozen=True)
class LinearMap:
    """From the residual stream after block `layer_donor` to that after `layer_recipient` of another model. dose: the
    recipient's median length of a state over the donor's; the other fields as in `Fitted`."""

    method: str
    layer_donor: int
    layer_recipient: int
    matrix: Float[Tensor, "d_recipient d_donor"]
    dose: float
    r2: float
    ridge: float
    n_positions: int

    def apply(self, vectors: SteeringVectors) -> SteeringVectors:
        """The vector of `layer_donor`, brought over at the same relative dose. Raises UsageError if there is none."""
        site = Site("resid_post", self.layer_donor)
        if site not in vectors.vectors:
            raise UsageError(f"no resid_post vector at layer {self.layer_donor}; this set has {list(vectors.layers)}")
        vector = vectors.vectors[site].detach().double().cpu()
        if len(vector) != self.matrix.shape[1]:
            raise UsageError(f"the vector has {len(vector)} numbers, the map is from {self.matrix.shape[1]}")
        turned = self.matrix @ vector
        length = turned.norm()
        if length > 0:
            turned = turned * (vector.norm() * self.dose / length)
        moved = turned.to(vectors.vectors[site].dtype)
        return SteeringVectors({Site("resid_post", self.layer_recipient): moved}, vectors.scope)

    def randomised(self, generator: torch.Generator) -> LinearMap:
        """A random orthogonal map of the same shape and dose: the control of what is said of this one."""
        missing = float("nan")
        turn = orthogonal(self.matrix.shape[0], self.matrix.shape[1], generator)
        return replace(self, method="random", matrix=turn, r2=missing, ridge=missing, n_positions=0)


def applied(vectors: SteeringVectors, maps: Iterable[LinearMap]) -> SteeringVectors:
    """All vectors of a set, each by the map of its layer; those that arrive at one layer are summed. Raises UsageError
    for a vector without a map, or at another site than resid_post."""
    by_layer = {one.layer_donor: one for one in maps}
    for site in vectors.sites:
        if site.kind != "resid_post" or site.layer not in by_layer:
            raise UsageError(f"there is no map for the vector at {site}; maps are of resid_post at {sorted(by_layer)}")
    first, *others = (by_layer[layer].apply(vectors) for layer in vectors.layers)
    for other in others:
        first = first + other
    return first


def matched_layers(layers: Iterable[int], n_donor: int, n_recipient: int) -> dict[int, int]:
    """The layer of the recipient at the same relative depth, by layer of the donor: first to first, last to last."""
    return {layer: round(layer * (n_recipient - 1) / max(1, n_donor - 1)) for layer in layers}


def orthogonal(d_out: int, d_in: int, generator: torch.Generator) -> Float[Tensor, "d_out d_in"]:
    """A random matrix with orthonormal rows or columns (both where it is square), uniformly distributed."""
    tall = torch.randn(max(d_out, d_in), min(d_out, d_in), generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(tall)
    q = q * torch.sign(torch.diagonal(r))  # else the distribution depends on the sign convention of QR
    return q if d_out >= d_in else q.T


def fit_map(
    donor: LanguageModel,
    recipient: LanguageModel,
    texts: Sequence[str],
    layer_donor: int,
    layer_recipient: int,
    method: str = "procrustes",
    seed: int = 0,
) -> LinearMap:
    """The map from one layer to another. See `fit_maps`."""
    return fit_maps(donor, recipient, texts, {layer_donor: layer_recipient}, method, seed=seed)[0]


@torch.no_grad()
def fit_maps(
    donor: LanguageModel,
    recipient: LanguageModel,
    texts: Sequence[str],
    layers: Mapping[int, int],
    method: str = "procrustes",
    *,
    seed: int = 0,
) -> list[LinearMap]:
    """One map per entry of `layers` (donor's → recipient's), all on the same positions. seed: who is held out.

    Raises UsageError for an unknown method, less than three texts that both models can be compared on, or a tokenizer
    that does not say where its tokens stand.
    """
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    places = [place for text in texts if len((place := _Aligned.of(donor, recipient, text)).at_donor)]
    if len(places) < 3:
        raise UsageError(f"{len(places)} texts to fit a map on; give at least 3, of several words each (better 100)")
    for model, of in ((donor, [p.donor for p in places]), (recipient, [p.recipient for p in places])):
        check_texts(model, of)
    text = torch.cat([torch.full_like(place.at_donor, n) for n, place in enumerate(places)])
    found, waiting = [], iter(layers.items())
    while pairs := list(islice(waiting, LAYERS_AT_ONCE)):
        x = _states(donor, [(p.donor, p.at_donor) for p in places], [a for a, _ in pairs])
        y = _states(recipient, [(p.recipient, p.at_recipient) for p in places], [b for _, b in pairs])
        for a, b in pairs:
            fit = solve(x[a], y[b], text, method, seed)
            dose = float(y[b].norm(dim=-1).median() / x[a].norm(dim=-1).median())
            found.append(LinearMap(method, a, b, fit.matrix, dose, fit.r2, fit.ridge, fit.n_positions))
    return found


def solve(
    x: Float[Tensor, "pos d_donor"],
    y: Float[Tensor, "pos d_recipient"],
    text: Int[Tensor, " pos"],
    method: str,
    seed: int = 0,
) -> Fitted:
    """The matrix that takes centred `x` to centred `y`; `text` names the text of every position. A fifth of the texts
    is held out for R², another fifth for the penalty (then fitted on as well)."""
    x, y = x.double(), y.double()
    names = torch.unique(text)
    order = names[torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))]
    fifth = max(1, len(names) // 5)
    test, choose = (torch.isin(text, part) for part in (order[:fifth], order[fifth : 2 * fifth]))
    fit, both = ~(test | choose), ~test
    ridge = float("nan")
    if method == "ridge":
        small = _Ridge.of(x[fit], y[fit])
        errors = [float((small.predict(x[choose], penalty) - y[choose]).square().sum()) for penalty in RIDGES]
        ridge = RIDGES[errors.index(min(errors))]
        whole = _Ridge.of(x[both], y[both])
        matrix, told = whole.matrix(ridge), whole.predict(x[test], ridge)
    else:
        mean_x, mean_y = x[both].mean(0), y[both].mean(0)
        centred = x[both] - mean_x
        u, s, vh = torch.linalg.svd((y[both] - mean_y).T @ centred, full_matrices=False)
        matrix = u @ vh
        told = (x[test] - mean_x) @ matrix.T * (s.sum() / (centred @ matrix.T).square().sum()) + mean_y
    variance = (y[test] - y[both].mean(0)).square().sum()
    return Fitted(matrix, float(1 - (told - y[test]).square().sum() / variance), ridge, int(both.sum()))


@dataclass(frozen=True)
class _Ridge:
    """Ridge regression of y on x at every penalty: the eigenvectors of the donor's covariance are found once."""

    mean_x: Float[Tensor, " d_donor"]
    mean_y: Float[Tensor, " d_recipient"]
    basis: Float[Tensor, "d_donor d_donor"]
    spectrum: Float[Tensor, " d_donor"]
    cross: Float[Tensor, "d_donor d_recipient"]

    @classmethod
    def of(cls, x: Float[Tensor, "pos d_donor"], y: Float[Tensor, "pos d_recipient"]) -> _Ridge:
        mean_x, mean_y = x.mean(0), y.mean(0)
        centred = x - mean_x
        spectrum, basis = torch.linalg.eigh(centred.T @ centred)
        return cls(mean_x, mean_y, basis, spectrum.clamp(min=0), basis.T @ centred.T @ (y - mean_y))

    def matrix(self, penalty: float) -> Float[Tensor, "d_recipient d_donor"]:
        shrunk = self.cross / (self.spectrum + penalty * self.spectrum.mean())[:, None]
        return (self.basis @ shrunk).T

    def predict(self, x: Float[Tensor, "pos d_donor"], penalty: float) -> Float[Tensor, "pos d_recipient"]:
        return (x - self.mean_x) @ self.matrix(penalty).T + self.mean_y


@dataclass(frozen=True)
class _Aligned:
    """One text as both models read it, and the positions at which both have read equally far."""

    donor: Text
    recipient: Text
    at_donor: Int[Tensor, " pos"]
    at_recipient: Int[Tensor, " pos"]

    @classmethod
    def of(cls, donor: LanguageModel, recipient: LanguageModel, text: str) -> _Aligned:
        (ids_a, ends_a), (ids_b, ends_b) = (_read(model.tokenizer, text) for model in (donor, recipient))
        shared = sorted(ends_a.keys() & ends_b.keys())[1:]
        if not shared:  # also a text without tokens, which no `Text` can be
            nothing = torch.zeros(0, dtype=torch.long)
            return cls(Text((0,), 1), Text((0,), 1), nothing, nothing)
        at = (torch.tensor([ends[end] for end in shared]) for ends in (ends_a, ends_b))
        return cls(Text(ids_a, len(ids_a)), Text(ids_b, len(ids_b)), *at)


def _read(tokenizer: Any, text: str) -> tuple[tuple[int, ...], dict[int, int]]:
    """Token ids as the tokenizer begins a text by itself, and the last position that ends at each character."""
    if not tokenizer.is_fast:
        raise UsageError("a tokenizer does not say where its tokens stand in a text; use a model with a fast tokenizer")
    read = tokenizer(text, return_offsets_mapping=True)
    ends = {end: position for position, (start, end) in enumerate(read.offset_mapping) if end > start}
    return tuple(read.input_ids), ends


def _states(
    model: LanguageModel, texts: Sequence[tuple[Text, Int[Tensor, " _"]]], layers: Sequence[int]
) -> dict[int, Float[Tensor, "pos d_model"]]:
    """States after blocks, at the positions that each text names, one text behind the other."""
    exact = torch.promote_types(model.dtype, torch.float32)
    parts: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    for text, at in texts:
        for layer, states in states_under(model, None, text, set(layers)).items():
            parts[layer].append(states[at.to(states.device)].to("cpu", exact))
    return {layer: torch.cat(part) for layer, part in parts.items()}
