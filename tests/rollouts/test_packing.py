"""One row of tokens for a batch: what predicts what."""

from __future__ import annotations

import torch

from steerlab.batches import RolloutBatch
from steerlab.models import LanguageModel
from steerlab.rollouts import Policy
from steerlab.rollouts.packing import Packed


def batch(*lengths: int) -> RolloutBatch:
    """Completions of two prompts in turns."""
    n = len(lengths)
    return RolloutBatch(
        prompts=((5, 6, 7), (8, 9)),
        group=torch.arange(n) % 2,
        completions=torch.arange(n * max(lengths)).view(n, -1) + 20,
        lengths=torch.tensor(lengths),
        logprobs=torch.zeros(n, max(lengths)),
        rewards=torch.zeros(n),
        correct=torch.zeros(n, dtype=torch.bool),
    )


def test_every_completion_token_has_the_slot_that_predicts_it() -> None:
    packed = Packed.of(batch(2, 1, 3), torch.device("cpu"))
    # prompt 5 6 7, then row 2 without its last token, then row 0 without its last; prompt 8 9, row 1 feeds nothing
    assert packed.tokens.tolist() == [[5, 6, 7, 26, 27, 20, 8, 9]]
    assert packed.predicting.tolist() == [2, 5, 7, 2, 3, 4]


def test_an_empty_completion_predicts_nothing(tiny_llama: LanguageModel) -> None:
    with_empty = batch(2, 0, 3, 1)
    assert len(Packed.of(with_empty, torch.device("cpu")).predicting) == 6
    with torch.no_grad():
        found = Policy(tiny_llama).logprobs(with_empty)
        expected = Policy(tiny_llama).logprobs(with_empty.select(torch.tensor([0, 2, 3])))
    assert not found[1].any()
    assert torch.allclose(found[[0, 2, 3]], expected, atol=1e-5)
