"""How far estimated effects are from exact ones: what attribution and edge attribution are worth on a model.

An effect is the change of the metric from the corrupted run. Exact are tables of activation or path patching; estimated
are those of attribution patching or of edges. Rows are matched by what is patched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats

from steerlab import tables
from steerlab.errors import UsageError
from steerlab.interp.activation_patching import Metric, Pair
from steerlab.interp.path_patching import Receiver, Sender, path_patching
from steerlab.models import LanguageModel

PLACE = ["kind", "layer", "head", "position"]
EDGE = ["sender", "sender_layer", "sender_head", "receiver", "receiver_layer", "receiver_head"]


def agreement(
    exact: pd.DataFrame, estimates: Mapping[str, pd.DataFrame], *, seed: int = 0, resamples: int = 1_000
) -> pd.DataFrame:
    """Table `agreement`: a row per estimate, over what both tables have; the interval of the rank correlation by
    bootstrap over that.

    Raises UsageError for tables of other things, or fewer than three effects in common.
    """
    by = PLACE if "kind" in exact.columns else EDGE
    rows = []
    for name, table in estimates.items():
        if not set(by) <= set(table.columns):
            raise UsageError(f"{name} has no columns {', '.join(by)}; compare edges with edges and places with places")
        both = _effects(exact, by).merge(_effects(table, by), on=by, suffixes=("_exact", "_estimated"))
        if len(both) < 3:
            raise UsageError(f"{name} and the exact table have {len(both)} effects in common; give at least 3")
        told = _compared(both["effect_exact"].to_numpy(), both["effect_estimated"].to_numpy(), seed, resamples)
        rows.append({"estimate": name, **told, "n": len(both)})
    return tables.check(pd.DataFrame(rows), "agreement")


def exact_edges(model: LanguageModel, pair: Pair, edges: pd.DataFrame, metric: Metric) -> pd.DataFrame:
    """Table `path_patching` of the edges of a table `edges`: one first pass per sender, one more per edge."""
    frames = []
    by_sender: dict[Sender, list[Receiver]] = {}
    for kind, layer, head, *receiver in edges[EDGE].itertuples(index=False, name=None):
        by_sender.setdefault(Sender(kind, max(layer, 0), head), []).append(Receiver(*receiver))
    for sender, heard in by_sender.items():
        frames.append(path_patching(model, pair, sender, heard, metric))
    return tables.check(pd.concat(frames, ignore_index=True), "path_patching")


def drawn(edges: pd.DataFrame, n: int, seed: int = 0) -> pd.DataFrame:
    """`n` edges to compare: half of them the largest, half drawn from the rest."""
    order = np.argsort(-np.abs(edges["effect"].to_numpy()), kind="stable")
    most, rest = order[: (n + 1) // 2], order[(n + 1) // 2 :]
    more = np.random.default_rng(seed).choice(rest, size=min(n // 2, len(rest)), replace=False)
    return edges.iloc[[*most, *more]]


def _effects(table: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    effect = table["effect"] if "effect" in table.columns else table["value"] - table["corrupted"]
    return table[list(by)].assign(effect=effect)


def _compared(
    exact: Float[np.ndarray, " n"], estimated: Float[np.ndarray, " n"], seed: int, resamples: int
) -> dict[str, float]:
    generator = np.random.default_rng(seed)
    draws = [
        _rank_correlation(exact[of], estimated[of])
        for of in generator.integers(len(exact), size=(resamples, len(exact)))
    ]
    low, high = np.nanquantile(draws, [0.025, 0.975]) if np.isfinite(draws).any() else (np.nan, np.nan)
    size, power = np.abs(exact).sum(), np.square(exact).sum()
    varied = exact.std() > 0 and estimated.std() > 0
    return {
        "spearman": _rank_correlation(exact, estimated),
        "low": float(low),
        "high": float(high),
        "pearson": float(np.corrcoef(exact, estimated)[0, 1]) if varied else np.nan,
        "error": float(np.abs(estimated - exact).sum() / size) if size else np.nan,
        "bias": float(exact @ estimated / power) if power else np.nan,
    }


def _rank_correlation(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"]) -> float:
    """Missing where one of them does not vary."""
    if a.std() == 0 or b.std() == 0:
        return float("nan")
    return float(np.corrcoef(stats.rankdata(a), stats.rankdata(b))[0, 1])
