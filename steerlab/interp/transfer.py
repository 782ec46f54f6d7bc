"""Transfer: what vectors trained on one model or task do in another (arXiv 2509.06608 §9).

A grid of donors × recipients with the score

    normalised = (acc(donor → recipient) − acc(base)) / (acc(recipient's own) − acc(base)),

0 as the recipient without vectors, 1 as with its own; missing, with the reason, where own − base is within its noise.
Where widths and depths are equal, vectors are put in as they are; elsewhere through linear maps of the residual streams
(`residual_maps`). Beside every donor two controls: a random orthogonal map in the place of the map, and random
directions of equal lengths in the recipient. The recipient's own tokenizer and template write its prompts.

Left out: maps between other sites than residual streams, transfer of a part of the layers (`select` them first).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd
import torch

from steerlab import tables
from steerlab.adapters import SteeringVectors
from steerlab.errors import UsageError
from steerlab.interp.answers import RESAMPLES, Scores, Seeds, described, scored
from steerlab.interp.residual_maps import LinearMap, applied, fit_maps, matched_layers, orthogonal
from steerlab.models import LanguageModel
from steerlab.rollouts import Evaluation
from steerlab.rollouts.evaluate import Done
from steerlab.rollouts.statistics import share_of_gain
from steerlab.tasks import Task

How = Literal["auto", "procrustes", "ridge"]


@dataclass(frozen=True)
class Donor:
    """vectors: trained on `model`; one set, or one per training seed."""

    name: str
    model: LanguageModel
    vectors: tuple[SteeringVectors, ...]


@dataclass(frozen=True)
class Recipient:
    """own: vectors trained on this model and task, one set per training seed; none where there are none."""

    name: str
    model: LanguageModel
    task: Task
    own: tuple[SteeringVectors, ...] = ()


@dataclass(frozen=True)
class Transfer:
    """table: `transfer`. maps: `transfer_maps`, empty where every donor went in as it is."""

    table: pd.DataFrame
    maps: pd.DataFrame


def transfer(
    donors: Sequence[Donor],
    recipients: Sequence[Recipient],
    evaluation: Evaluation,
    *,
    texts: Sequence[str] = (),
    how: How = "auto",
    seed: int = 0,
    done: Done | None = None,
) -> Transfer:
    """Every donor's vectors in every recipient. texts: shared text on which maps are fitted. how: `auto` puts vectors
    in as they are where shapes are equal and else fits by Procrustes; the others always fit, also for equal shapes.

    Raises UsageError where there is nothing to transfer, two have one name, or a map is needed and there are too few
    texts.
    """
    for kind, names in (("donor", [d.name for d in donors]), ("recipient", [r.name for r in recipients])):
        if not names or len(set(names)) < len(names):
            raise UsageError(f"{kind}s {names} must be at least one, each name once")
    rows: list[dict[str, object]] = []
    maps: dict[tuple[str, str], list[LinearMap]] = {}
    for recipient in recipients:
        sets: dict[tuple[str, str], Seeds] = {("", "base"): [None]}
        if recipient.own:
            sets["", "own"] = recipient.own
        for donor in donors:
            sets |= _moved(donor, recipient, how, texts, maps, seed)
        names = {f"{map_} {donor}": (donor, map_) for donor, map_ in sets}
        asked = {name: sets[key] for name, key in names.items()}
        found = scored(recipient.model, recipient.task, asked, evaluation, done)
        by_key = {key: found[name] for name, key in names.items()}
        for (donor_name, map_), score in by_key.items():
            row: dict[str, object] = {"donor": donor_name, "recipient": recipient.name, "map": map_}
            rows.append(row | described(score, evaluation) | _normalised(score, by_key))
    fitted = [_map_row(pair, fit) for pair, fits in maps.items() for fit in fits]
    told = pd.DataFrame(fitted) if fitted else tables.empty("transfer_maps")
    return Transfer(tables.check(pd.DataFrame(rows), "transfer"), tables.check(told, "transfer_maps"))


def _moved(
    donor: Donor,
    recipient: Recipient,
    how: How,
    texts: Sequence[str],
    maps: dict[tuple[str, str], list[LinearMap]],
    seed: int,
) -> dict[tuple[str, str], Seeds]:
    """The donor's vectors as the recipient gets them, and the controls; maps that were fitted are added to `maps`."""
    generator = torch.Generator().manual_seed(seed)
    there = recipient.model
    used = sorted({layer for of in donor.vectors for layer in of.layers})
    pair = (donor.model.name, there.name)
    if how == "auto" and (donor.model.n_layers, donor.model.d_model) == (there.n_layers, there.d_model):
        name, moved = "direct", list(donor.vectors)
        turned = _turned(donor.vectors, generator)
    else:
        name = method = "procrustes" if how == "auto" else how
        fits = maps.setdefault(pair, [])
        new = [layer for layer in used if layer not in {fit.layer_donor for fit in fits}]
        if new:
            layers = matched_layers(new, donor.model.n_layers, there.n_layers)
            fits += fit_maps(donor.model, there, texts, layers, method, seed=seed)
        moved = [applied(of, fits) for of in donor.vectors]
        turned = [applied(of, [fit.randomised(generator) for fit in fits]) for of in donor.vectors]
    found: dict[tuple[str, str], Seeds] = {(donor.name, name): moved, (donor.name, "random map"): turned}
    found[donor.name, "random direction"] = [of.randomise(generator) for of in moved]
    return found


def _turned(vectors: Sequence[SteeringVectors], generator: torch.Generator) -> list[SteeringVectors]:
    """Every vector by the same random rotation: angles among layers and seeds stay."""
    widths = sorted({len(vector) for of in vectors for vector in of.parameters()})
    turns = {width: orthogonal(width, width, generator) for width in widths}
    return [
        SteeringVectors({s: (turns[len(v)] @ v.detach().double().cpu()).to(v) for s, v in of.vectors.items()}, of.scope)
        for of in vectors
    ]


def _normalised(score: Scores, scores: dict[tuple[str, str], Scores]) -> dict[str, object]:
    missing = float("nan")
    if ("", "own") not in scores:
        value = low = high = missing
        why = "the recipient has no vectors of its own"
    else:
        part = share_of_gain(score, [scores["", "base"]], scores["", "own"], resamples=RESAMPLES)
        value, low, high, why = part.value, part.low, part.high, part.why
    return {"normalised": value, "normalised_low": low, "normalised_high": high, "why": why}


def _map_row(pair: tuple[str, str], fit: LinearMap) -> dict[str, object]:
    return {
        "donor": pair[0],
        "recipient": pair[1],
        "method": fit.method,
        "layer_donor": fit.layer_donor,
        "layer_recipient": fit.layer_recipient,
        "r2": fit.r2,
        "ridge": fit.ridge,
        "dose": fit.dose,
        "n_positions": fit.n_positions,
    }
