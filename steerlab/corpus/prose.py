"""Prose to read or to train on: which text it is, its digest, and its paragraphs.

A file that the user names, WikiText-2 where the shared data has it (`$STEERLAB_DATA/english-text`), else a few hundred
words written for this package. What was found is named once and for all (`Prose.find`), so that an experiment that
holds it reads the same text wherever and whenever it goes on. Left out: downloads, collections of many files.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import zlib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from steerlab.errors import UsageError

DATA_VARIABLE = "STEERLAB_DATA"
OWN = "own prose"
WIKITEXT = "english-text/wikitext-2-valid.txt.gz"


@dataclass(frozen=True)
class Prose:
    """path: of a text file (or .gz) with paragraphs between empty lines; "" is the package's own prose. sha256: of its
    text, which `text` then insists on; "" for whatever is there."""

    path: str = ""
    sha256: str = ""

    @classmethod
    def find(cls, path: str | Path | None = None) -> Prose:
        """The text that a person means, with its digest. path: a file; None: WikiText-2 where it is, else the package's
        own prose; "": that. Raises UsageError for a file that cannot be read as text."""
        if path is None and (root := os.environ.get(DATA_VARIABLE)) and (Path(root) / WIKITEXT).exists():
            path = Path(root) / WIKITEXT
        found = cls(str(Path(path).absolute()) if path else "")
        return cls(found.path, hashlib.sha256(found.text().encode()).hexdigest())

    @property
    def name(self) -> str:
        """What to call it in tables."""
        return Path(self.path).name if self.path else OWN

    def text(self) -> str:
        """All of it. Raises UsageError if it cannot be read as text, or is not what `sha256` says."""
        whole = _read(Path(self.path)) if self.path else (files("steerlab.corpus") / "prose.txt").read_text("utf-8")
        if self.sha256 and hashlib.sha256(whole.encode()).hexdigest() != self.sha256:
            raise UsageError(f"the text of {self.path or OWN} has changed since; restore it, or choose a new folder")
        return whole

    def paragraphs(self) -> list[str]:
        """What stands between empty lines, each on one line with single spaces."""
        blocks = re.split(r"\n\s*\n", "\n".join(self.text().splitlines()))
        return [words for block in blocks if (words := " ".join(block.split()))]


def _read(path: Path) -> str:
    try:
        content = path.read_bytes()
        return (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8")
    except (OSError, UnicodeDecodeError, EOFError, zlib.error) as error:
        raise UsageError(f"{path} cannot be read as text ({error}); name a text file, plain or .gz") from error
