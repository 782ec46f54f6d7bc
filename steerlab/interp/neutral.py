"""Neutral text: prose that has nothing to do with any task, on which side effects of vectors are measured.

A file that the user names, WikiText-2 where the shared data has it (`$STEERLAB_DATA/english-text`), else a few hundred
words written for this package. Left out: downloads.
"""

from __future__ import annotations

import gzip
import os
import re
import zlib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from steerlab.errors import UsageError
from steerlab.interp.texts import Text
from steerlab.models import LanguageModel
from steerlab.tasks.benchmarks import DATA_VARIABLE

OWN = "own prose"
WIKITEXT = "english-text/wikitext-2-valid.txt.gz"


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
    if path is None and (root := os.environ.get(DATA_VARIABLE)) and (Path(root) / WIKITEXT).exists():
        path = Path(root) / WIKITEXT
    name, whole = (Path(path).name, _read(Path(path))) if path else (OWN, _own())
    least, n_tokens = min(least, n_tokens), min(n_tokens, model.context)
    blocks = (" ".join(block.split()) for block in re.split(r"\n\s*\n", "\n".join(whole.splitlines())))
    passages = [block for block in blocks if len(block) >= 4 * least]  # headings are shorter
    chosen = [passages[i * len(passages) // limit] for i in range(limit)] if len(passages) > limit else passages
    ids = [tuple(model.tokenizer.encode(text, add_special_tokens=False)[:n_tokens]) for text in chosen]
    found = tuple(Text(tokens, len(tokens)) for tokens in ids if len(tokens) >= least)
    if not found:
        raise UsageError(f"{name} has no paragraph of {least} tokens; name a file of plain prose")
    return Neutral(name, found)


def _own() -> str:
    return (files("steerlab.interp") / "neutral.txt").read_text(encoding="utf-8")


def _read(path: Path) -> str:
    try:
        content = path.read_bytes()
        return (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8")
    except (OSError, UnicodeDecodeError, EOFError, zlib.error) as error:
        raise UsageError(f"{path} cannot be read as text ({error}); name a text file, plain or .gz") from error
