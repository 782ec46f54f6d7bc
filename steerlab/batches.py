"""What a source hands to an objective: plain tensors with names and shapes, no behaviour of their own.

A `RolloutBatch` keeps each prompt once and says which prompt every row continues, so that everything
downstream can compute a prompt once per group. A `TokenBatch` is running text. `Batch` is what the loop asks of
either. Pair and activation batches arrive with the methods that need them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@runtime_checkable
class Batch(Protocol):
    """What the training loop asks of a batch, whatever is in it."""

    @property
    def denominator(self) -> float | None:
        """What the loss sum is divided by, fixed over the whole batch; None until an objective has prepared it."""
        ...

    @property
    def n_fed(self) -> int:
        """Tokens that a forward pass over it reads."""
        ...

    def __len__(self) -> int:
        """Rows."""
        ...

    def over(self, denominator: float | None) -> Batch:
        """The same with this denominator."""
        ...

    def micro_batches(self, token_budget: int) -> Iterator[Batch]:
        """Pieces that read at most `token_budget` tokens each, or are one row."""
        ...

    def idle(self) -> Batch:
        """One row whose loss is a number of no meaning: for a pass that is made for others' sake."""
        ...


@dataclass(frozen=True)
class Kept:
    """What block `block`−1 wrote at every fed token, kept from sampling, so that an update can begin at `block`.

    prompts: of each prompt. completions: of each row; the last token of a row is never fed.
    """

    block: int
    prompts: tuple[Float[Tensor, "_ d_model"], ...]
    completions: Float[Tensor, "row fed d_model"]


@dataclass(frozen=True)
class Slopes:
    """Derivative of each drawn token's log-probability with respect to the final hidden state that predicts it.

    drawn_under: which numbers the adapter had (see `Policy.numbers`); under others the slopes are of no use.
    """

    values: Float[Tensor, "row pos d_model"]
    drawn_under: object


@dataclass(frozen=True)
class RolloutBatch:
    """Completions of a few prompts with their rewards.

    prompts: token ids of each prompt, one entry per group.
    group: which prompt a row continues.
    completions: token ids, padded on the right; the stop token, where one was drawn, is the last token.
    lengths: tokens per completion, the stop token included.
    logprobs: natural-log probability of each token under the policy that drew it (0 on padding).
    rewards, correct: what the task said of each completion.
    temperature: what the logits were divided by when sampling.
    advantages: credit of each row; None until an objective has prepared the batch.
    denominator: what the loss sum is divided by, fixed over the whole batch; None until prepared.
    kept: hidden states from sampling where the update need not begin at the bottom. slopes: of the head, from sampling,
    where the update need not apply it.
    """

    prompts: tuple[tuple[int, ...], ...]
    group: Int[Tensor, " row"]
    completions: Int[Tensor, "row pos"]
    lengths: Int[Tensor, " row"]
    logprobs: Float[Tensor, "row pos"]
    rewards: Float[Tensor, " row"]
    correct: Bool[Tensor, " row"]
    temperature: float = 1.0
    advantages: Float[Tensor, " row"] | None = None
    denominator: float | None = None
    kept: Kept | None = None
    slopes: Slopes | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def n_tokens(self) -> int:
        """Completion tokens in the batch, padding excluded."""
        return int(self.lengths.sum())

    @property
    def n_fed(self) -> int:
        """Prompts, each once, and completions."""
        return sum(map(len, self.prompts)) + self.n_tokens

    def over(self, denominator: float | None) -> RolloutBatch:
        return replace(self, denominator=denominator)

    def idle(self) -> RolloutBatch:
        return replace(self.select(torch.tensor([0])), advantages=torch.zeros(1), denominator=1.0)

    @property
    def mask(self) -> Bool[Tensor, "row pos"]:
        """True on completion tokens, False on padding."""
        return torch.arange(self.completions.shape[1]) < self.lengths[:, None]

    def select(self, rows: Int[Tensor, " kept"]) -> RolloutBatch:
        """The given rows, the prompts they continue, and no wider padding than they need."""
        used, group = torch.unique(self.group[rows], return_inverse=True)
        width = int(self.lengths[rows].max()) if len(rows) else 0
        kept = self.kept and Kept(
            self.kept.block,
            tuple(self.kept.prompts[i] for i in used.tolist()),
            self.kept.completions[rows.to(self.kept.completions.device), : max(width - 1, 0)],
        )
        slopes = self.slopes and Slopes(
            self.slopes.values[rows.to(self.slopes.values.device), :width], self.slopes.drawn_under
        )
        return replace(
            self,
            prompts=tuple(self.prompts[i] for i in used.tolist()),
            group=group,
            completions=self.completions[rows, :width],
            lengths=self.lengths[rows],
            logprobs=self.logprobs[rows, :width],
            rewards=self.rewards[rows],
            correct=self.correct[rows],
            advantages=None if self.advantages is None else self.advantages[rows],
            kept=kept,
            slopes=slopes,
        )

    def micro_batches(self, token_budget: int) -> Iterator[RolloutBatch]:
        """Pieces of groups, longest completions first, each micro-batch within `token_budget` tokens.

        A group stays together as long as it fits, so that its prompt is computed once; one row is always let through.
        """
        pieces = [piece for g in range(len(self.prompts)) for piece in self._pieces(g, token_budget)]
        pieces.sort(key=lambda rows: -int(self.lengths[rows[0]]))
        taken: list[Tensor] = []
        total = 0
        for piece in pieces:
            size = len(self.prompts[int(self.group[piece[0]])]) + int(self.lengths[piece].sum())
            if taken and total + size > token_budget:
                yield self.select(torch.cat(taken))
                taken, total = [], 0
            taken, total = [*taken, piece], total + size
        if taken:
            yield self.select(torch.cat(taken))

    def _pieces(self, group: int, token_budget: int) -> Iterator[Int[Tensor, " row"]]:
        """Rows of one group, longest first, in pieces that fit the budget together with the prompt."""
        rows = torch.nonzero(self.group == group).flatten()
        rows = rows[self.lengths[rows].sort(descending=True, stable=True).indices]
        room = token_budget - len(self.prompts[group])
        while len(rows):
            n = max(1, int((self.lengths[rows].cumsum(0) <= room).sum()))
            yield rows[:n]
            rows = rows[n:]


@dataclass(frozen=True)
class TokenBatch:
    """Rows of running text, of equal length.

    tokens: token ids. counted: the positions at which the loss is taken; the others are context.
    denominator: what the loss sum is divided by, fixed over the whole batch; None until prepared.
    """

    tokens: Int[Tensor, "row pos"]
    counted: Bool[Tensor, "row pos"]
    denominator: float | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def n_tokens(self) -> int:
        """Positions that count."""
        return int(self.counted.sum())

    @property
    def n_fed(self) -> int:
        return self.tokens.numel()

    def over(self, denominator: float | None) -> TokenBatch:
        return replace(self, denominator=denominator)

    def select(self, rows: Int[Tensor, " kept"] | slice) -> TokenBatch:
        """The given rows."""
        return replace(self, tokens=self.tokens[rows], counted=self.counted[rows])

    def micro_batches(self, token_budget: int) -> Iterator[TokenBatch]:
        """Neighbouring rows, as many as fit `token_budget`; one row is always let through."""
        together = max(1, token_budget // max(1, self.tokens.shape[1]))
        for start in range(0, len(self), together):
            yield self.select(slice(start, start + together))

    def idle(self) -> TokenBatch:
        return self.select(slice(0, 1)).over(1.0)
