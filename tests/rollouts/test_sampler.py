"""The decode engine: what is sampled does not depend on sharing, padding, batch split, company or compaction."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import pytest
import torch

from steerlab.adapters import RowBank, SteeringVectors
from steerlab.errors import RunFailed, UsageError
from steerlab.models import LanguageModel, Site, tiny
from steerlab.rollouts import Completions, Policy, Rows, Sampling, sample
from steerlab.rollouts import sampler as engine
from steerlab.rollouts.sampler import stop_tokens

PROMPTS = [[40, 41, 42, 43, 44, 45, 46], [50], [60, 61, 62, 63]]
# About one token in eight ends a row, so rows finish at many different lengths.
SAMPLING = Sampling(max_new_tokens=12, stop=tuple("abcdefghijklmnopqrstuvwxyzABCDEF"))
ATOL = 1e-9


@lru_cache
def exact(family: str = "llama") -> LanguageModel:
    return tiny.model(family, dtype=torch.float64)


def drawn(model: LanguageModel, seed: int = 0) -> SteeringVectors:
    generator = torch.Generator().manual_seed(seed)
    sites = [Site("resid_post", layer) for layer in range(model.n_layers)]
    return SteeringVectors({s: 0.3 * torch.randn(32, generator=generator, dtype=torch.float64) for s in sites})


def assert_same(a: Completions, b: Completions, atol: float = ATOL) -> None:
    assert torch.equal(a.lengths, b.lengths)
    assert torch.equal(a.tokens, b.tokens)
    assert torch.equal(a.finished, b.finished)
    assert torch.allclose(a.logprobs, b.logprobs, rtol=0, atol=atol)


def part(whole: Completions, rows: torch.Tensor) -> Completions:
    width = int(whole.lengths[rows].max())
    return Completions(
        whole.tokens[rows, :width], whole.lengths[rows], whole.logprobs[rows, :width], whole.finished[rows]
    )


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_shared_prompts_are_duplicated_prompts(family: str) -> None:
    model = exact(family)
    rows = Rows.grid([0, 1, 2], 4)
    own = Rows(torch.arange(len(rows)), rows.problem, rows.sample, rows.member)
    policy = Policy(model, drawn(model))
    shared = policy.sample(PROMPTS, rows, SAMPLING, seed=1)
    copied = policy.sample([PROMPTS[i] for i in rows.prompt], own, SAMPLING, seed=1)
    assert_same(shared, copied)
    assert len(set(shared.lengths.tolist())) > 2, "all rows end together, so this shows little"


@pytest.mark.parametrize("max_rows", [1, 3, 7])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "gpt2"])
def test_same_tokens_however_the_batch_is_split(family: str, max_rows: int) -> None:
    model = exact(family)
    rows = Rows.grid([5, 6, 7], 4)
    policy = Policy(model, drawn(model))
    whole = policy.sample(PROMPTS, rows, SAMPLING, seed=1)
    split = policy.sample(PROMPTS, rows, SAMPLING, seed=1, max_rows=max_rows)
    assert_same(whole, split)


def test_each_row_alone_and_in_any_order() -> None:
    model = exact()
    rows = Rows.grid([5, 6, 7], 3)
    whole = sample(model, None, PROMPTS, rows, SAMPLING, seed=1)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    shuffled = Rows(rows.prompt[order], rows.problem[order], rows.sample[order], rows.member[order])
    assert_same(sample(model, None, PROMPTS, shuffled, SAMPLING, seed=1), part(whole, order))
    for i in range(len(rows)):
        one = torch.tensor([i])
        mine = Rows(torch.tensor([0]), rows.problem[one], rows.sample[one], rows.member[one])
        assert_same(sample(model, None, [PROMPTS[rows.prompt[i]]], mine, SAMPLING, seed=1), part(whole, one))


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "gpt_neox"])
def test_compaction_changes_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = exact(family)
    policy, rows = Policy(model, RowBank([None, drawn(model)])), Rows.grid([0, 1, 2], 4, members=2)
    compacted = policy.sample(PROMPTS, rows, SAMPLING, seed=2)
    calls = []
    monkeypatch.setattr(engine._Decoding, "compact", lambda self, kept: calls.append(len(kept)))
    assert_same(policy.sample(PROMPTS, rows, SAMPLING, seed=2), compacted)
    assert calls, "no row ever left the batch, so this shows nothing"


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_row_bank_is_each_member_alone(family: str) -> None:
    model = exact(family)
    sets = [drawn(model, 1), None, drawn(model, 2)]
    rows = Rows.grid([0, 1, 2], 2, members=3)
    banked = Policy(model, RowBank(sets)).sample(PROMPTS, rows, SAMPLING, seed=3)
    for member, vectors in enumerate(sets):
        alone = Policy(model, vectors).sample(PROMPTS, Rows.grid([0, 1, 2], 2), SAMPLING, seed=3)
        assert_same(part(banked, torch.nonzero(rows.member == member)[:, 0]), alone)


def test_grid_names_every_row() -> None:
    rows = Rows.grid([11, 12], 3, members=2)
    assert rows.prompt.tolist() == [0] * 6 + [1] * 6
    assert rows.problem.tolist() == [11] * 6 + [12] * 6
    assert rows.member.tolist() == [0, 0, 0, 1, 1, 1] * 2
    assert rows.sample.tolist() == [0, 1, 2] * 4
    assert [len(c) for c in rows.chunks(5)] == [5, 5, 2]


def test_seed_step_problem_and_sample_each_change_the_draw() -> None:
    model = exact()

    def tokens(problem: int = 0, sample_: int = 0, **names: int) -> list[int]:
        row = Rows(torch.tensor([0]), torch.tensor([problem]), torch.tensor([sample_]), torch.tensor([0]))
        out = sample(model, None, PROMPTS, row, Sampling(max_new_tokens=12), **{"seed": 0, **names})
        return out.tokens[0].tolist()

    variants = [tokens(), tokens(problem=1), tokens(sample_=1), tokens(seed=1), tokens(step=1)]
    assert len({tuple(v) for v in variants}) == 5
    assert tokens() == tokens()


def test_greedy_is_the_argmax_of_full_forwards() -> None:
    model = exact()
    out = sample(model, None, PROMPTS, Rows.grid([0, 1, 2], 2), Sampling(temperature=0.0, max_new_tokens=6), seed=0)
    for i, prompt in enumerate(PROMPTS):
        tokens = list(prompt)
        for t in range(int(out.lengths[2 * i])):
            tokens.append(int(model.logits(torch.tensor([tokens]))[0, -1].argmax()))
            assert out.tokens[2 * i, t] == out.tokens[2 * i + 1, t] == tokens[-1]


def test_stop_tokens_end_rows_and_count() -> None:
    model = exact()
    out = sample(model, None, PROMPTS, Rows.grid([0, 1, 2], 16), SAMPLING, seed=1)
    stops = set(stop_tokens(model, SAMPLING).tolist())
    assert model.tokenizer.eos_token_id in stops and len(stops) == 33
    assert {True, False} == set(out.finished.tolist())
    for i in range(len(out.lengths)):
        n = int(out.lengths[i])
        said = out.tokens[i, :n].tolist()
        assert not stops & set(said[:-1])
        assert (said[-1] in stops) == bool(out.finished[i])
        assert out.finished[i] or n == SAMPLING.max_new_tokens
        assert not out.tokens[i, n:].any() and not out.logprobs[i, n:].any()
        assert (out.logprobs[i, :n] < 0).all()


def test_all_rows_end_at_the_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    model = exact()
    monkeypatch.setattr(engine, "stop_tokens", lambda model, sampling: torch.arange(model.d_vocab))
    for max_rows in (1, 4, 99):
        out = sample(model, None, PROMPTS, Rows.grid([0, 1, 2], 2), Sampling(), seed=0, max_rows=max_rows)
        assert out.tokens.shape == (6, 1) and out.lengths.tolist() == [1] * 6 and out.finished.all()


def test_one_row() -> None:
    out = sample(exact(), None, [[7]], Rows.grid([3], 1), Sampling(max_new_tokens=1), seed=0)
    assert out.tokens.shape == (1, 1)


def test_row_limits() -> None:
    """Rows told to stop early say what they would have said, only less of it."""
    model = exact()
    rows = Rows.grid([0, 1, 2], 2)
    free = sample(model, None, PROMPTS, rows, Sampling(max_new_tokens=9), seed=4)
    limit = torch.tensor([1, 9, 3, 4, 20, 2])
    held = Rows(rows.prompt, rows.problem, rows.sample, rows.member, limit)
    for max_rows in (2, 99):
        out = sample(model, None, PROMPTS, held, Sampling(max_new_tokens=9), seed=4, max_rows=max_rows)
        assert torch.equal(out.lengths, torch.minimum(free.lengths, limit))
        for i, n in enumerate(out.lengths.tolist()):
            assert torch.equal(out.tokens[i, :n], free.tokens[i, :n]) and not out.tokens[i, n:].any()


def test_sampling_makes_no_graph_and_leaves_no_hooks() -> None:
    model = exact()
    out = Policy(model, drawn(model)).sample(PROMPTS, Rows.grid([0, 1, 2], 2), SAMPLING, seed=0)
    assert not out.logprobs.requires_grad
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.hf.modules())


def test_probabilities_that_are_not_finite_stop_the_run() -> None:
    """Otherwise they would be sampled from in silence, and a batch without a reward would hide them from the loss."""
    model = exact()
    broken = SteeringVectors({Site("resid_post", 0): torch.full((32,), torch.nan)})
    with pytest.raises(RunFailed, match="step 7"):
        Policy(model, broken).sample(PROMPTS, Rows.grid([0, 1, 2], 2), SAMPLING, seed=0, step=7)


def test_a_row_bank_says_which_member_is_broken() -> None:
    model = exact()
    broken = SteeringVectors({Site("resid_post", 0): torch.full((32,), torch.nan)})
    rows = Rows.grid([8, 9, 10], 2, members=4)
    bank = RowBank([drawn(model), None, broken, drawn(model, 1)])
    with pytest.raises(RunFailed, match=r"problem 8, member 2 of the row bank\)") as caught:
        Policy(model, bank).sample(PROMPTS, rows, SAMPLING, seed=0)
    assert "\n" not in str(caught.value)


OUT_OF_MEMORY = {
    "python": MemoryError,
    "gpu": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": lambda: RuntimeError("[enforce fail at alloc_cpu.cpp] . DefaultCPUAllocator: can't allocate memory: you"),
}


def cramp(monkeypatch: pytest.MonkeyPatch, room: int, error: Callable[[], Exception]) -> list[int]:
    """Decoding, on a machine with room for `room` rows; notes how many rows each attempt has."""
    advance, tried, failed = engine._Decoding.advance, [], []

    def advanced(self: engine._Decoding) -> torch.Tensor:
        t = int(self.drawn)
        if t == 1:
            assert not any(ref() is not None for ref in failed), "a failed attempt still holds its memory"
            tried.append(len(self.names))
        if t == 2 and len(self.names) > room:
            failed.append(weakref.ref(self))
            raise error()
        return advance(self)

    monkeypatch.setattr(engine._Decoding, "advance", advanced)
    return tried


@pytest.mark.parametrize("error", OUT_OF_MEMORY.values(), ids=OUT_OF_MEMORY)
def test_half_as_many_rows_when_memory_runs_out(
    error: Callable[[], Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = exact()
    policy, rows = Policy(model, RowBank([drawn(model), None])), Rows.grid([5, 6, 7], 4, members=2)
    whole = policy.sample(PROMPTS, rows, SAMPLING, seed=1, keep=True)
    tried = cramp(monkeypatch, 3, error)
    cramped = policy.sample(PROMPTS, rows, SAMPLING, seed=1, keep=True, max_rows=16)
    assert tried == [16, 8, 4, *[2] * 12]
    assert_same(cramped, whole)
    was_fed = torch.arange(whole.written.shape[1]) < whole.lengths[:, None] - 1
    assert torch.allclose(cramped.written[was_fed], whole.written[was_fed], rtol=0, atol=ATOL)
    assert cramped.prompt_written.keys() == whole.prompt_written.keys()


def test_not_even_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    cramp(monkeypatch, 0, MemoryError)
    with pytest.raises(RunFailed, match=r"single completion.*max_new_tokens \(now 12\).*max_rows \(now 5\)") as caught:
        sample(exact(), None, PROMPTS, Rows.grid([0, 1, 2], 2), SAMPLING, seed=0, max_rows=5)
    assert "\n" not in str(caught.value)


def test_other_errors_of_decoding_are_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = cramp(monkeypatch, 0, lambda: RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes"):
        sample(exact(), None, PROMPTS, Rows.grid([0, 1, 2], 2), SAMPLING, seed=0)
    assert tried == [6]


def test_one_part_is_not_copied() -> None:
    out = sample(exact(), None, PROMPTS, Rows.grid([0, 1, 2], 2), SAMPLING, seed=0)
    assert Completions.join([out]) is out


def test_a_row_that_may_say_nothing_is_refused() -> None:
    rows = Rows.grid([0, 1, 2], 1)
    with pytest.raises(UsageError, match="is -1; every row needs at least 1"):
        sample(exact(), None, PROMPTS, replace(rows, limit=torch.tensor([3, 0, -1])), SAMPLING, seed=0)


def test_impossible_requests_are_refused_in_one_line() -> None:
    model = exact()
    for prompts, sampling, max_rows in (
        ([[5] * 505], Sampling(max_new_tokens=8), 8),  # context
        ([[5], []], Sampling(), 8),  # an empty prompt
        ([[]], Sampling(), 8),
        ([[5]], Sampling(stop=("ab",)), 8),  # two tokens
        ([[5]], Sampling(), 0),
    ):
        with pytest.raises(UsageError) as caught:
            sample(model, None, prompts, Rows.grid(range(len(prompts)), 2), sampling, seed=0, max_rows=max_rows)
        assert "\n" not in str(caught.value)
    assert sample(model, None, [[5] * 504], Rows.grid([0], 1), Sampling(max_new_tokens=8), seed=0).lengths[0] <= 8
