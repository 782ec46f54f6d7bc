"""Neutral text: prose that has nothing to do with any task, on which side effects of vectors are measured.

Passages of whatever text `corpus.Prose.find` finds.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from steerlab.corpus import Prose
from steerlab.errors import UsageError
from steerlab.interp.texts import Text
from steerlab.models import LanguageModel


@dataclass(frozen=True)
class Neutral:
    """name: what the texts are, to stand in every table that was made with them."""

    name: str
    texts: tuple[Text, ...]


def neutral(
    model: LanguageModel, path: str | Path | None = None, *, limit: int = 16, n_tokens: int = 128, least: int = 32
) -> Neutral:
    """At most `limit` passages, the first `n_tokens` tokens of every paragraph that has at least `least`; spread evenly
    over the file. path: a text file (or .gz) with paragraphs between empty lines; None: WikiText-2 where it is, else
    the package's own prose; "": that.

    Raises UsageError for a file that cannot be read as text or has no such paragraph.
    """
    if limit < 1 or n_tokens < 2 or least < 2:
        raise UsageError(f"{limit} texts of {least} to {n_tokens} tokens are no neutral text; take at least 1 of 2")
    prose = Prose.find(path)
    least, n_tokens = min(least, n_tokens), min(n_tokens, model.context)
    passages = [block for block in prose.paragraphs() if len(block) >= 4 * least]  # headings are shorter
    chosen = [passages[i * len(passages) // limit] for i in range(limit)] if len(passages) > limit else passages
    ids = [tuple(model.tokenizer.encode(text, add_special_tokens=False)[:n_tokens]) for text in chosen]
    found = tuple(Text(tokens, len(tokens)) for tokens in ids if len(tokens) >= least)
    if not found:
        raise UsageError(f"{prose.name} has no paragraph of {least} tokens; name a file of plain prose")
    return Neutral(prose.name, found)
