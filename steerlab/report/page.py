"""Report: sections of (table, figure, sentence) → one HTML page that opens offline and runs nothing it was not given.

Strings written by a model or a data set are data three times over: what could hide or reorder text is spelled out
(`plots.house.visible`), jinja escapes the rest, and figures travel as JSON without `<`, `>` or `&`. The page's content
security policy then allows exactly two scripts, by hash (plotly.js, once, and the few lines that draw), and no
request. Left out: editing, themes, figures in dark colours.
"""

from __future__ import annotations

import base64
import hashlib
import html
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from steerlab.plots.house import visible

_DRAW = """
for (const source of document.querySelectorAll('script[type="application/json"]')) {
  const {data, layout} = JSON.parse(source.textContent);
  const config = {responsive: true, displaylogo: false, modeBarButtonsToRemove: ['select2d', 'lasso2d', 'autoScale2d']};
  Plotly.newPlot(source.previousElementSibling, data, layout, config);
}
"""


@dataclass(frozen=True)
class Table:
    """Cells as text. numeric: columns aligned right."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: frozenset[int] = frozenset()
    caption: str = ""


@dataclass(frozen=True)
class Side:
    """One completion of a comparison."""

    condition: str
    text: str
    reward: float
    correct: bool
    extracted: str | None
    n_tokens: int
    finished: bool


@dataclass(frozen=True)
class Comparison:
    """One problem answered before and after."""

    question: str
    answer: str
    sides: tuple[Side, ...]


@dataclass(frozen=True)
class Passage:
    """A text whose tokens are coloured. tokens: text, colour from -1 (orange) over 0 (none) to 1 (blue), what to say
    when the pointer rests on it. legend: what the ends of the colours are, low to high. See `report/tokens.py`."""

    title: str
    tokens: tuple[tuple[str, float, str], ...]
    legend: tuple[str, str]


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it. folded: (summary, table) pairs the reader may open."""

    title: str
    sentence: str = ""
    figures: tuple[go.Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    folded: tuple[tuple[str, Table], ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    passages: tuple[Passage, ...] = ()
    note: str = ""

    @property
    def anchor(self) -> str:
        return "-".join("".join(c if c.isalnum() else " " for c in self.title.lower()).split())


@dataclass
class Report:
    """A page in the making: a title, one headline sentence, sections in reading order."""

    title: str
    headline: str = ""
    facts: tuple[tuple[str, str], ...] = ()
    sections: list[Section] = field(default_factory=list)

    def add(self, section: Section | None) -> None:
        """Appends the section; None, a section whose data is absent, is passed over."""
        if section is not None:
            self.sections.append(section)

    def html(self) -> str:
        """The whole page. Equal reports give equal bytes."""
        library = get_plotlyjs() if any(section.figures for section in self.sections) else ""
        scripts = [library, _DRAW] if library else []
        return _template().render(
            report=self, policy=_policy(scripts), scripts=[Markup(script) for script in scripts], figure=_figure
        )


def _policy(scripts: list[str]) -> str:
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{value}'" for value in hashes) or "'none'"
    # plotly.js sets styles on its own elements, and saves pictures through data: and blob:
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:"


@dataclass(frozen=True)
class _Figure:
    caption: str
    height: int
    shape: str
    json: Markup


def _figure(figure: go.Figure) -> _Figure:
    """The figure for the page: its title becomes a caption that wraps, its JSON cannot end a script."""
    shown = go.Figure(figure)
    layout: Any = shown.layout
    caption, top = html.unescape(layout.title.text or ""), layout.margin.t
    shown.update_layout(title_text="", margin_t=max(24, (top or 60) - 36))
    text = shown.to_json(engine="json") or "{}"  # ASCII with \\u escapes, unlike orjson, which refuses surrogates
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return _Figure(caption, int(layout.height or 400), _shape(shown), Markup(text))


def _shape(figure: go.Figure) -> str:
    """`wide` if cells hold words, or more than two panels stand side by side, and need their room on a phone; `square`
    if both axes have one scale, else nothing."""
    layout: Any = figure.layout
    axes: Any = figure.select_xaxes()
    beside = {axis.domain for axis in axes}
    if len(beside) > 2 or any(trace.type == "heatmap" and trace.texttemplate for trace in figure.data):
        return "wide"
    return "square" if layout.yaxis.scaleanchor else ""


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["visible"] = visible
    return environment.get_template("page.html.jinja")
