"""A batch of rollouts as one row of tokens: every prompt once, behind it its group's completions, no padding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from steerlab.adapters import Layout
from steerlab.batches import Kept, RolloutBatch
from steerlab.models.attention import Segment

ROWS_TOGETHER = 4  # completions of similar length that attention brings to one length


@dataclass(frozen=True)
class Packed:
    """tokens: all but the last of each completion. segments: who attends to whom. layout: where tokens stand.
    predicting: slot whose output predicts each completion token, row by row. order: rows as they stand in `tokens`."""

    tokens: Int[Tensor, "one slot"]
    segments: tuple[Segment, ...]
    layout: Layout
    predicting: Int[Tensor, " token"]
    order: tuple[tuple[int, ...], ...]
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, batch: RolloutBatch, device: torch.device) -> Packed:
        lengths = batch.lengths.tolist()
        order, segments = [], []
        tokens: list[int] = []
        sequence: list[int] = []
        position: list[int] = []
        predicting: list[list[int]] = [[] for _ in lengths]
        completions = batch.completions.tolist()
        for g, prompt in enumerate(batch.prompts):
            rows = sorted(torch.nonzero(batch.group == g).flatten().tolist(), key=lambda row: -lengths[row])
            order.append(tuple(rows))
            start = len(tokens)
            tokens += prompt
            sequence += [rows[0] if rows else 0] * len(prompt)
            position += range(len(prompt))
            prefix = (start, len(tokens))
            segments.append(Segment.of(start, (len(prompt),), (0, 0), device))
            fed = [row for row in rows if lengths[row] > 1]
            for first in range(0, len(fed), ROWS_TOGETHER):
                together = fed[first : first + ROWS_TOGETHER]
                segments.append(Segment.of(len(tokens), [lengths[row] - 1 for row in together], prefix, device))
                for row in together:
                    n = lengths[row] - 1
                    predicting[row] = list(range(len(tokens), len(tokens) + n))
                    tokens += completions[row][:n]
                    sequence += [row] * n
                    position += range(len(prompt), len(prompt) + n)
            for row in rows:
                if lengths[row]:  # an empty completion has no token to predict
                    predicting[row] = [prefix[1] - 1, *predicting[row]]
        flat = [slot for row in predicting for slot in row]
        return cls(
            tokens=torch.tensor([tokens], device=device),
            segments=tuple(segments),
            layout=Layout(
                _sequences(batch).to(device),
                torch.tensor([len(batch.prompts[g]) for g in batch.group.tolist()], device=device),
                torch.tensor([sequence], device=device),
                torch.tensor([position], device=device),
            ),
            predicting=torch.tensor(flat, dtype=torch.long, device=device),
            order=tuple(order),
            lengths=tuple(lengths),
        )

    def gather(self, kept: Kept) -> Float[Tensor, "one slot d_model"]:
        """Kept states in the order of `tokens`."""
        parts = []
        for g, rows in enumerate(self.order):
            parts.append(kept.prompts[g])
            parts += [kept.completions[row, : max(self.lengths[row] - 1, 0)] for row in rows]
        return torch.cat(parts).to(self.tokens.device)[None]


def _sequences(batch: RolloutBatch) -> Int[Tensor, "row slot"]:
    """Prompt and completion of every row, zeros behind."""
    rows = [
        [*batch.prompts[g], *tokens[:n]]
        for g, tokens, n in zip(batch.group.tolist(), batch.completions.tolist(), batch.lengths.tolist(), strict=True)
    ]
    width = max(map(len, rows), default=0)
    return torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.long)
