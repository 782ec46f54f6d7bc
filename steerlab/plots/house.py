"""The look of every figure: one template, colours that colour-blind readers can tell apart, and text made safe to show.

Colours are Okabe & Ito (2008), darkened where needed for contrast on white. Plotly reads `<b>`, `<a>` and `<br>` in any
string as markup, so every string that a model wrote goes through `label`. Left out: dark figures.
"""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterable
from typing import Any

import plotly.graph_objects as go

INK, MUTED, GRID = "#1f2933", "#5b6673", "#e6e9ee"
COLOURS = ("#0072b2", "#d55e00", "#008f68", "#a6568c", "#b07c00", "#3a9bd1", "#6b7280", "#8c3b00")
SEQUENTIAL = ((0.0, "#f7fafd"), (0.25, "#dcebf6"), (0.5, "#b8d6ec"), (0.75, "#8dbfe0"), (1.0, "#5ea5d3"))
DIVERGING = ((0.0, "#b2501a"), (0.25, "#ecab7f"), (0.5, "#fbfbfb"), (0.75, "#86b9dd"), (1.0, "#0b67a3"))
COLOURBAR = {
    "thickness": 11,
    "outlinewidth": 0,
    "title": {"side": "right", "font": {"size": 12, "color": MUTED}},
    "tickfont": {"size": 11},
}
CONDITION_COLOURS = {
    "base": "#6b7280",
    "greedy": "#b07c00",
    "few_shot": "#008f68",
    "random_reward": "#a6568c",
    "format_reward": "#d55e00",
    "steered": "#0072b2",
    "random": "#a6568c",
    "steered × −1": "#d55e00",
}
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
MONO = "ui-monospace, 'SF Mono', Menlo, Consolas, 'DejaVu Sans Mono', monospace"

_axis = {
    "gridcolor": GRID,
    "zeroline": False,
    "linecolor": "#c4cad3",
    "showline": True,
    "ticks": "outside",
    "tickcolor": "#c4cad3",
    "ticklen": 4,
    "title": {"font": {"size": 13, "color": MUTED}, "standoff": 10},
    "tickfont": {"size": 12},
    "automargin": True,
}
HOUSE = go.layout.Template(
    layout={
        "font": {"family": FONT, "size": 13, "color": INK},
        "title": {"font": {"size": 15}, "x": 0, "xref": "paper", "xanchor": "left", "yref": "container", "y": 0.97},
        "paper_bgcolor": "#ffffff",
        "plot_bgcolor": "#ffffff",
        "colorway": COLOURS,
        "xaxis": _axis,
        "yaxis": _axis,
        "margin": {"l": 60, "r": 24, "t": 84, "b": 52},
        "hoverlabel": {"font": {"family": FONT, "size": 12}, "bgcolor": "#ffffff", "bordercolor": "#c4cad3"},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "font": {"size": 12}},
        "colorscale": {"sequential": SEQUENTIAL, "diverging": DIVERGING},
    }
)


def figure(title: str, *, height: int) -> go.Figure:
    """An empty figure in the house style; `height` in CSS pixels, width follows the page."""
    made = go.Figure()
    return made.update_layout(template=HOUSE, title_text=label(title), height=height)


def band(x: Iterable[Any], low: Iterable[Any], high: Iterable[Any], colour: str) -> dict[str, Any]:
    """What `add_scatter` needs for a pale band from `low` to `high`; `colour` as `#rrggbb`."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    there, upper, lower = list(x), list(high), list(low)
    return {
        "x": [*there, *reversed(there)],
        "y": [*upper, *reversed(lower)],
        "mode": "lines",  # plotly marks the corners of short ones otherwise
        "fill": "toself",
        "fillcolor": f"rgba({red},{green},{blue},0.18)",
        "line": {"width": 0},
        "hoverinfo": "skip",
        "showlegend": False,
    }


def condition_colour(condition: str) -> str:
    """The colour of a condition, the same in every figure; unknown conditions share a dark orange-brown."""
    return CONDITION_COLOURS.get(condition, COLOURS[-1])


def words(condition: str) -> str:
    """A condition as a person writes it: `few_shot` → `few shot`."""
    return condition.replace("_", " ")


def visible(text: str) -> str:
    """The text with everything that could hide or reorder it spelled out: control and format characters, surrogates.

    Spaces and line breaks stay. `a\\u202eb` → `a⟨U+202E⟩b`.
    """
    return "".join(_spelled(character) for character in text)


def readable(token: str) -> str:
    """A token as one line: spaces as ␣, line breaks as ⏎, tabs as ⇥, the invisible spelled out, nothing as ∅."""
    shown = token.replace("\r\n", "⏎").translate({32: "␣", 10: "⏎", 13: "⏎", 9: "⇥"})
    return visible(shown) or "∅"


def label(text: str, *, limit: int | None = None) -> str:
    """Text that plotly shows as it is: shortened to `limit` characters, then markup escaped."""
    text = visible(text)
    if limit is not None and len(text) > limit:
        text = text[: limit - 1] + "…"
    return html.escape(text, quote=False)


def _spelled(character: str) -> str:
    if character in "\n\t":
        return character
    # Cc control, Cf format (right-to-left marks, zero-width), Cs surrogate, Co private, Cn unassigned, Zl and Zp breaks
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
        return f"⟨U+{ord(character):04X}⟩"
    return character
