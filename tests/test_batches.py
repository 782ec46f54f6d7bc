"""RolloutBatch: masks, selection and micro-batches."""

from __future__ import annotations

import pytest
import torch

from steerlab.batches import RolloutBatch

LENGTHS = [3, 1, 5, 2, 4, 4, 1, 1]
GROUP = [0, 0, 1, 1, 2, 2, 3, 3]
PROMPTS = ((1, 2), (3,), (4, 5, 6), (7,))


def batch() -> RolloutBatch:
    lengths, width = torch.tensor(LENGTHS), max(LENGTHS)
    mask = torch.arange(width) < lengths[:, None]
    tokens = (10 * torch.arange(8)[:, None] + torch.arange(width)) * mask
    return RolloutBatch(
        prompts=PROMPTS,
        group=torch.tensor(GROUP),
        completions=tokens,
        lengths=lengths,
        logprobs=-(tokens.float() + 1) * mask,
        rewards=torch.arange(8.0),
        correct=torch.arange(8) % 2 == 0,
        advantages=torch.arange(8.0) - 3.5,
        denominator=21.0,
    )


def contents(b: RolloutBatch) -> set[tuple[object, ...]]:
    """What each row says, padding and order left out."""
    return {
        (
            b.prompts[b.group[i]],
            tuple(b.completions[i, : b.lengths[i]].tolist()),
            tuple(b.logprobs[i, : b.lengths[i]].tolist()),
            float(b.rewards[i]),
            bool(b.correct[i]),
            float(b.advantages[i]) if b.advantages is not None else None,
        )
        for i in range(len(b))
    }


def test_counts_and_mask() -> None:
    whole = batch()
    assert len(whole) == 8 and whole.n_tokens == 21
    assert whole.mask.sum(1).tolist() == LENGTHS


def test_select_keeps_the_pairing_and_drops_padding() -> None:
    whole = batch()
    part = whole.select(torch.tensor([5, 0, 6]))
    assert contents(part) <= contents(whole) and len(part) == 3
    assert part.completions.shape[1] == part.logprobs.shape[1] == 4
    assert part.prompts == ((1, 2), (4, 5, 6), (7,))
    assert [part.prompts[g] for g in part.group] == [(4, 5, 6), (1, 2), (7,)]
    assert part.denominator == whole.denominator, "the denominator belongs to the whole batch"
    assert part.advantages.tolist() == [1.5, -3.5, 2.5]


def test_select_nothing() -> None:
    none = batch().select(torch.tensor([], dtype=torch.long))
    assert len(none) == 0 and none.prompts == () and list(none.micro_batches(100)) == []


@pytest.mark.parametrize("budget", [1, 8, 12, 20, 40, 10_000])
def test_micro_batches_are_a_partition_within_the_budget(budget: int) -> None:
    whole = batch()
    parts = list(whole.micro_batches(budget))
    assert sum(len(p) for p in parts) == 8
    assert set().union(*map(contents, parts)) == contents(whole)
    for part in parts:
        size = part.n_tokens + sum(map(len, part.prompts))
        assert size <= budget or len(part) == 1
        if budget >= 12:  # a group fits: it stays together
            for prompt in part.prompts:
                assert sum(part.prompts[g] == prompt for g in part.group) == 2
    longest = [int(p.lengths.max()) for p in parts]
    assert longest == sorted(longest, reverse=True)
