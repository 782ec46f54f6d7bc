"""Do first-order estimates of places and edges say what exact patching says, where a trained vector decides?

Attribution patching (Nanda 2023) and edge attribution (Syed et al. 2023) are used in place of exact patching because
they are cheap; integrated gradients (Hanna et al. 2024) are said to repair them. Here: the bank's vectors of two
layers, three seeds, `texts` answers each, cut where the vector moves the next token most (`interp/decisions.py`);
every head above the vector patched exactly, and `edges` edges by path patching, half of them the largest, half drawn
from the rest.

An estimate is good enough to rank by if the interval of its rank correlation over what was patched lies above 0.9 for
every seed, refuted if it lies below in any; its `error` is told beside it. Control: the estimate of another seed's
vector (same layer) must agree less, or what is ranked is the model and not the vector.

    uv run python analyses/small_vectors/edges.py --bank-layers 15 28 --layers 28 15 --out runs/small_vectors
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import bank
import pandas as pd
import tyro
from bank import Bank

from steerlab import readings
from steerlab.interp.activation_patching import activation_patching, heads
from steerlab.interp.agreement import agreement, drawn, exact_edges
from steerlab.interp.attribution_patching import attribution_patching
from steerlab.interp.decisions import Decisions, decisions
from steerlab.interp.edge_attribution import edge_attribution
from steerlab.runs import Run

STEPS = 5


@dataclass(frozen=True)
class Options(bank.Options):
    """layers: whose vectors are followed, at `small`. texts: of each seed. edges: that are patched exactly."""

    layers: tuple[int, ...] = (15, 28)
    texts: int = 8
    edges: int = 60


def compared(
    found: Bank, options: Options, decided: Decisions, other: Decisions, layer: int, seed: int
) -> Iterator[pd.DataFrame]:
    """Estimates beside exact patching, heads and edges; of `other`, another vector's, as a control."""
    model, pair, metric = found.model, decided.pair, decided.metric
    places = [place for place in heads(model) if place.layer > layer]
    exact = activation_patching(model, pair, places, metric)
    estimates = {
        f"{steps} steps": attribution_patching(model, pair, places, metric, steps=steps) for steps in (0, STEPS)
    }
    estimates["another vector"] = attribution_patching(model, other.pair, places, other.metric)
    yield agreement(exact, estimates, seed=seed).assign(of="heads")
    by_steps = {f"{steps} steps": edge_attribution(model, pair, metric, steps=steps) for steps in (0, STEPS)}
    some = drawn(by_steps["0 steps"], options.edges, seed)
    exact = exact_edges(model, pair, some, metric)
    by_steps["another vector"] = edge_attribution(model, other.pair, other.metric, steps=0)
    yield agreement(exact, by_steps, seed=seed).assign(of="edges")


def main(options: Options) -> pd.DataFrame:
    """Prints a row per layer, seed and estimate; tables in DIR/edges."""
    found = bank.trained(options, exact=True)
    tiny = options.scale == "tiny"
    evaluation = replace(found.evaluation, samples=1)
    options = replace(options, texts=2, edges=6) if tiny else options
    told = []
    for layer in found.layers[:1] if tiny else options.layers:
        by_seed = []
        for seed in found.seeds:
            vectors = found.vectors(layer, seed)
            texts = readings.own_texts(found.model, vectors, found.task, evaluation, options.texts, seed)
            by_seed.append(decisions(found.model, vectors, texts))
        for n, seed in enumerate(found.seeds):
            for part in compared(found, options, by_seed[n], by_seed[n - 1], layer, seed):
                told.append(part.assign(layer=layer, seed=seed))
                print(told[-1].to_string(index=False, float_format="%.3f"), flush=True)
    table = pd.concat(told, ignore_index=True)
    Run.create(options.out / "edges", kind="analysis", status="done", model=options.model).save_table(
        "agreement", table
    )
    return table


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
