"""Figure of a `scores` table: conditions side by side as points with their intervals."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from steerlab import tables
from steerlab.plots.house import CONDITION_COLOURS, condition_colour, figure, label, words

_SYMBOLS = ("circle", "diamond-open", "square-open", "triangle-up-open")
_MEANINGS = {"avg": "avg@k (mean of k samples)", "pass": "pass@k (any of k samples correct)"}


def scores(df: pd.DataFrame) -> go.Figure:
    """A row per condition (and per model, task and split where several), a symbol per metric, 95 % intervals as bars.

    Base stands first and steered last, so that the eye ends on what was trained. pass@1 is avg@1 and is not repeated.
    """
    tables.check(df, "scores")
    varying = [name for name in ("model", "task", "split") if len(set(df[name])) > 1]
    known = list(CONDITION_COLOURS)
    place = {name: index for index, name in enumerate(known[:-1])} | {"steered": len(known) + 1}
    frame = df.loc[df["metric"] != "pass@1"] if "avg@1" in set(df["metric"]) else df
    frame = frame.assign(
        order=frame["condition"].map(lambda name: place.get(name, len(known))),
        row=[_row(record, varying) for record in frame.to_dict("records")],
        kind=[metric.partition("@")[0] for metric in frame["metric"]],
    ).sort_values([*varying, "order"], kind="stable")
    rows, kinds = list(dict.fromkeys(frame["row"])), list(dict.fromkeys(frame["kind"]))
    made = figure("Score by condition, with 95 % intervals", height=130 + (34 + 10 * (len(kinds) - 1)) * len(rows))
    for index, kind in enumerate(kinds):
        shift = (index - (len(kinds) - 1) / 2) * 0.3
        for number, record in enumerate(frame.loc[frame["kind"] == kind].to_dict("records")):
            colour = condition_colour(str(record["condition"]))
            made.add_scatter(
                x=[record["value"]],
                y=[rows.index(record["row"]) + shift],
                error_x={
                    "type": "data",
                    "array": [record["high"] - record["value"]],
                    "arrayminus": [record["value"] - record["low"]],
                    "thickness": 2.2,
                    "width": 5,
                },
                name=label(_MEANINGS.get(str(kind), str(kind))),
                mode="markers",
                marker={"color": colour, "size": 10, "symbol": _SYMBOLS[index % len(_SYMBOLS)]},
                hovertemplate=_hover(record),
                legendgroup=kind,
                showlegend=len(kinds) > 1 and number == 0,
            )
    made.update_xaxes(title_text="score (share of problems)", tickformat=".0%", range=[-0.02, 1.02])
    return made.update_yaxes(
        tickvals=list(range(len(rows))), ticktext=rows, range=[len(rows) - 0.4, -0.6], showgrid=False, ticks=""
    )


def _hover(record: dict[Hashable, Any]) -> str:
    interval = f"{record['value']:.1%} [{record['low']:.1%}, {record['high']:.1%}]"
    size = f"{record['n_problems']} problems × {record['n_samples']} samples × {record['n_seeds']} seeds"
    return f"{record['row']}<br>{label(record['metric'])} {interval}<br>{size}<extra></extra>"


def _row(record: dict[Hashable, Any], varying: list[str]) -> str:
    return label(" · ".join([*(str(record[name]) for name in varying), words(str(record["condition"]))]))
