"""Token scopes: masks written out by hand, and cached generation = one full forward pass under every scope."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from steerlab.adapters import Layout, RowBank, Scope, SteeringVectors
from steerlab.errors import UsageError
from steerlab.models import LanguageModel, Site, tiny
from steerlab.rollouts import Policy, Rows, Sampling

PROMPTS = [[40, 41, 42, 43, 44, 45], [50, 51, 42], [60, 61, 62, 63]]


@lru_cache
def exact(family: str) -> LanguageModel:
    return tiny.model(family, dtype=torch.float64)


def drawn(model: LanguageModel, scope: Scope, seed: int = 0) -> SteeringVectors:
    generator = torch.Generator().manual_seed(seed)
    sites = [Site("resid_post", layer) for layer in range(model.n_layers)]
    return SteeringVectors({s: 0.5 * torch.randn(32, generator=generator, dtype=torch.float64) for s in sites}, scope)


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        (Scope.all(), ["111111..", "11111111"]),
        (Scope.prompt(), ["111000..", "11111000"]),
        (Scope.generated(), ["000111..", "00000111"]),
        (Scope.positions(0, 1), ["100000..", "10000000"]),
        (Scope.positions(2, 4), ["001100..", "00110000"]),
        (Scope.positions(4), ["000011..", "00001111"]),
        (Scope.predicting(0, 1), ["001000..", "00001000"]),
        (Scope.predicting(1, 3), ["000110..", "00000110"]),
        (Scope.predicting(2), ["000011..", "00000011"]),
        (Scope.after(9), ["001111..", "00000001"]),
    ],
    ids=lambda value: value.kind if isinstance(value, Scope) else "",
)
def test_masks_by_hand(scope: Scope, expected: list[str]) -> None:
    """A dot is where a sequence ends; the prompts have 3 and 5 tokens."""
    sequences = torch.tensor([[5, 9, 5, 5, 9, 5, 0, 0], [5, 5, 5, 5, 5, 5, 9, 5]])
    length = torch.tensor([3, 5])
    sequence, position = torch.meshgrid(torch.arange(2), torch.arange(8), indexing="ij")
    by_hand = torch.tensor([[c == "1" for c in row] for row in expected])
    there = torch.tensor([[c != "." for c in row] for row in expected])
    whole = scope.mask(Layout(sequences, length, sequence, position))
    assert torch.equal(whole & there, by_hand)
    for fed in (torch.tensor([7, 2]), torch.tensor([0, 3, 5])):  # any tokens, in any shape
        part = scope.mask(Layout(sequences, length, sequence[:, fed].reshape(1, -1), position[:, fed].reshape(1, -1)))
        assert torch.equal(part, whole[:, fed].reshape(1, -1))


def test_more_tokens_fed_than_laid_out_are_refused() -> None:
    """A mask one token short would otherwise be spread over the whole sequence."""
    model = exact("llama")
    tokens = torch.tensor([PROMPTS[0]])
    for short in (1, 2):
        layout = Layout.of_texts(tokens[:, :-short], 3)
        with pytest.raises(UsageError), drawn(model, Scope.prompt()).attach(model, layout=layout):
            model.logits(tokens)


def test_bad_scopes_are_refused() -> None:
    for make in (
        lambda: Scope.positions(-1),
        lambda: Scope.positions(3, 3),
        lambda: Scope.predicting(2, 1),
        lambda: Scope("after"),
        lambda: Scope("prompt", token=3),
    ):
        with pytest.raises(UsageError):
            make()


def test_a_scope_needs_a_layout() -> None:
    model = exact("llama")
    with pytest.raises(UsageError, match="prompt ends"), drawn(model, Scope.prompt()).attach(model):
        model.logits(torch.tensor([PROMPTS[0]]))


def naive_logprobs(
    model: LanguageModel, vectors: SteeringVectors, prompt: list[int], completion: list[int]
) -> torch.Tensor:
    """One forward pass over the whole text, nothing shared, cached or padded."""
    tokens = torch.tensor([prompt + completion])
    with torch.no_grad(), vectors.attach(model, layout=Layout.of_texts(tokens, len(prompt))):
        logits = model.logits(tokens)[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0]


SCOPES = [
    Scope.all(),
    Scope.prompt(),
    Scope.generated(),
    Scope.positions(1, 3),
    Scope.positions(5, 8),
    Scope.predicting(0, 1),
    Scope.predicting(2, 5),
    Scope.after(42),
]


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("scope", SCOPES, ids=lambda s: f"{s.kind}-{s.start}-{s.stop}")
def test_cached_generation_is_the_full_forward(family: str, scope: Scope) -> None:
    model = exact(family)
    vectors = drawn(model, scope)
    rows = Rows.grid([0, 1, 2], 2)
    out = Policy(model, vectors).sample(PROMPTS, rows, Sampling(max_new_tokens=8), seed=3)
    for i in range(len(rows)):
        n = int(out.lengths[i])
        naive = naive_logprobs(model, vectors, PROMPTS[rows.prompt[i]], out.tokens[i, :n].tolist())
        assert torch.allclose(out.logprobs[i, :n], naive, rtol=0, atol=1e-9)


def test_after_a_token_that_is_generated() -> None:
    model = exact("llama")
    rows = Rows.grid([0, 1, 2], 2)
    base = Policy(model).sample(PROMPTS, rows, Sampling(max_new_tokens=8), seed=3)
    vectors = drawn(model, Scope.after(int(base.tokens[0, 2])))
    out = Policy(model, vectors).sample(PROMPTS, rows, Sampling(max_new_tokens=8), seed=3)
    assert torch.equal(out.tokens[0, :4], base.tokens[0, :4]), "nothing changes before the token has been fed"
    assert not torch.equal(out.logprobs[0, 4:], base.logprobs[0, 4:])
    for i in range(len(rows)):
        n = int(out.lengths[i])
        naive = naive_logprobs(model, vectors, PROMPTS[rows.prompt[i]], out.tokens[i, :n].tolist())
        assert torch.allclose(out.logprobs[i, :n], naive, rtol=0, atol=1e-9)


@pytest.mark.parametrize("scope", SCOPES, ids=lambda s: f"{s.kind}-{s.start}-{s.stop}")
def test_row_bank_respects_scopes(scope: Scope) -> None:
    model = exact("llama")
    first, second = drawn(model, scope, 1), drawn(model, scope, 2)
    rows = Rows.grid([0, 1, 2], 2, members=3)
    out = Policy(model, RowBank([first, None, second])).sample(PROMPTS, rows, Sampling(max_new_tokens=6), seed=5)
    for member, vectors in enumerate((first, None, second)):
        alone = Policy(model, vectors).sample(PROMPTS, Rows.grid([0, 1, 2], 2), Sampling(max_new_tokens=6), seed=5)
        mine = rows.member == member
        assert torch.equal(out.lengths[mine], alone.lengths)
        width = alone.tokens.shape[1]
        assert torch.equal(out.tokens[mine, :width], alone.tokens)
        assert torch.allclose(out.logprobs[mine, :width], alone.logprobs, rtol=0, atol=1e-9)
