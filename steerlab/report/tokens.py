"""Texts with a colour behind every token: the more of a number, the stronger.

What a token says and what is said of it stay data: the page's template spells out what could hide or reorder text and
escapes the rest, and each token is isolated, so that a right-to-left one cannot move its neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from steerlab.errors import UsageError
from steerlab.report.page import Passage

LONGEST = 48  # characters of a token that are shown


def coloured(
    title: str, tokens: Sequence[str], values: Sequence[float], titles: Sequence[str], *, top: float, unit: str = ""
) -> Passage:
    """A passage whose tokens are coloured by `values`: blue from 0 to `top` and beyond, orange below 0.

    titles: what each token says when the pointer rests on it. Line breaks are kept behind a ⏎, numbers that are missing
    have no colour. Raises UsageError for unequally many of them, or a `top` that is not above 0.
    """
    if len({len(tokens), len(values), len(titles)}) > 1:
        raise UsageError(
            f"{len(tokens)} tokens, {len(values)} values and {len(titles)} titles; give one of each a token"
        )
    if not 0 < top < math.inf:
        raise UsageError(f"a colour scale that ends at {top} has no colours; give the value of the strongest")
    colours = [0.0 if math.isnan(value) else max(-1.0, min(1.0, value / top)) for value in values]
    low = f"−{top:.3g}" if any(colour < 0 for colour in colours) else "0"
    shown = tuple(zip(map(_shown, tokens), colours, titles, strict=True))
    return Passage(title, shown, (low, f"{top:.3g} {unit}".strip()))


def _shown(token: str) -> str:
    """Shortened, its line breaks marked."""
    short = token if len(token) <= LONGEST else f"{token[: LONGEST - 1]}…"
    return short.replace("\r\n", "\n").replace("\n", "⏎\n").replace("\t", "⇥\t")
