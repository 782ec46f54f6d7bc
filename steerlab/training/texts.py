"""`Texts`: batches of running text. A corpus is tokenised as one stream and cut into rows of equal length.

Which rows a step takes is a function of the seed and the step alone (shuffled epochs), and so is which of their
positions count: neighbouring tokens of one text are alike, so a few positions of many rows say more than all positions
of few. The last part of the corpus is held out for evaluation and never trained on.
Left out: a token between documents, rows that begin where a document does, corpora larger than memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int

from steerlab.batches import TokenBatch
from steerlab.corpus import Prose
from steerlab.errors import UsageError
from steerlab.models import LanguageModel
from steerlab.rollouts import Policy
from steerlab.runs import CostLedger
from steerlab.training.sources import Drawn, Tally, epochs
from steerlab.training.world import ALONE, World

Rows = Int[np.ndarray, "_ pos"]


@dataclass(frozen=True)
class Texts:
    """prose: the corpus. rows: of a step. length: of a row, in tokens. counted: positions of a row that count, drawn
    anew each time; None for all. held_out: share of the rows, from the end of the corpus, that is not trained on."""

    prose: Prose = Prose()
    rows: int = 8
    length: int = 128
    counted: int | None = 32
    held_out: float = 0.1

    def __post_init__(self) -> None:
        if self.rows < 1 or self.length < 2:
            raise UsageError(f"{self.rows} rows of {self.length} tokens are no text; take at least 1 of 2")
        if self.counted is not None and not 1 <= self.counted <= self.length:
            raise UsageError(f"counted is {self.counted}; of {self.length} positions 1 to {self.length} can count")
        if not 0 < self.held_out < 1:
            raise UsageError(f"held_out is {self.held_out}; it is a share of the text, above 0 and below 1")

    def facts(self) -> dict[str, str]:
        return {"corpus": self.prose.name, "corpus_sha256": self.prose.sha256}

    @property
    def longest(self) -> int:
        return self.length

    @property
    def watched(self) -> str:
        return "loss"

    def cut(self, model: LanguageModel) -> tuple[Rows, Rows]:
        """All rows: to train on, and held out. Raises UsageError for too little text, or rows longer than the model's
        context."""
        if self.length > model.context:
            raise UsageError(f"rows of {self.length} tokens exceed the context of {model.name} ({model.context})")
        paragraphs = self.prose.paragraphs()
        ids = [model.tokenizer.encode(f"{words}\n", add_special_tokens=False) for words in paragraphs]
        stream = np.array([token for paragraph in ids for token in paragraph], dtype=np.int64)
        n = len(stream) // self.length
        n_held_out = max(1, round(self.held_out * n))
        if n - n_held_out < 1:
            raise UsageError(
                f"{self.prose.name} has {len(stream)} tokens, too few for a row of {self.length} to train on and one "
                "held out; name a longer text or shorten the rows"
            )
        rows = stream[: n * self.length].reshape(n, self.length)
        return rows[:-n_held_out], rows[-n_held_out:]

    def batch(self, rows: Rows, counted: int | None, seeds: Sequence[Sequence[int]]) -> TokenBatch:
        """The given rows with `counted` positions of each, drawn from the row's own seed."""
        mask = np.ones(rows.shape, dtype=bool)
        if counted is not None and counted < self.length:
            for row, seed in zip(mask, seeds, strict=True):
                row[np.random.default_rng(list(seed)).permutation(self.length)[counted:]] = False
        return TokenBatch(torch.from_numpy(rows), torch.from_numpy(mask))

    def open(self, policy: Policy, seed: int, ledger: CostLedger, world: World = ALONE) -> TextSource:
        """The source of one run; in a world of several processes, of this process's share of every step's rows.

        Raises UsageError as `cut` does, and if a process would have no row.
        """
        return TextSource(self, policy, seed, ledger, world)


class TextSource:
    """`Texts` at work with one model."""

    def __init__(self, spec: Texts, policy: Policy, seed: int, ledger: CostLedger, world: World = ALONE) -> None:
        self.spec, self.seed, self.ledger, self.world = spec, seed, ledger, world
        if spec.rows < world.size:
            raise UsageError(f"{spec.rows} rows per step are too few for {world.size} processes; start fewer")
        self.rows, _ = spec.cut(policy.model)

    def next(self, step: int) -> Drawn:
        """This process's share of the rows of a step."""
        chosen = list(enumerate(epochs(len(self.rows), self.spec.rows, self.seed, step)))
        mine = self.world.share(chosen)
        seeds = [(self.seed, step, place) for place, _ in mine]
        batch = self.spec.batch(self.rows[[row for _, row in mine]], self.spec.counted, seeds)
        return Drawn(batch, Tally({}, prompt_tokens=batch.n_fed, completion_tokens=0))


@dataclass(frozen=True)
class HeldOut:
    """Evaluation on held-out texts. texts: how many rows, evenly spaced over the held-out part; None for all. counted:
    positions of each that count, None for all. seed: of which ones."""

    texts: int | None = 64
    counted: int | None = 32
    seed: int = 1_000

    def __post_init__(self) -> None:
        for name, value in (("texts", self.texts), ("counted", self.counted)):
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}; evaluation needs at least 1")

    def batch(self, source: Texts, model: LanguageModel) -> TokenBatch:
        """The texts to evaluate on. Raises UsageError as `Texts.cut` does."""
        _, rows = source.cut(model)
        n = len(rows) if self.texts is None else min(self.texts, len(rows))
        chosen = [i * len(rows) // n for i in range(n)]
        return source.batch(rows[chosen], self.counted, [(self.seed, i) for i in chosen])
