"""Texts: every row once per epoch, held-out ones never, and a step a function of seed and step alone."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import torch

from steerlab.batches import TokenBatch
from steerlab.corpus import Prose
from steerlab.errors import UsageError
from steerlab.models import LanguageModel
from steerlab.rollouts import Policy
from steerlab.runs import CostLedger
from steerlab.training import HeldOut, Texts
from steerlab.training.world import World

SPEC = Texts(rows=4, length=32, counted=8)


def drawn(model: LanguageModel, step: int, spec: Texts = SPEC, seed: int = 0, world: World = World()) -> TokenBatch:
    batch = spec.open(Policy(model), seed, CostLedger(), world).next(step).batch
    assert isinstance(batch, TokenBatch)
    return batch


def rows(batch: TokenBatch) -> list[tuple[int, ...]]:
    return [tuple(row) for row in batch.tokens.tolist()]


def test_rows_are_the_text(tiny_llama: LanguageModel) -> None:
    train, held_out = SPEC.cut(tiny_llama)
    whole = "\n".join(SPEC.prose.paragraphs())
    stream = [token for row in (*train, *held_out) for token in row.tolist()]
    assert whole.startswith(tiny_llama.tokenizer.decode(stream))
    assert len(held_out) == round(0.1 * (len(train) + len(held_out)))


def test_an_epoch_has_every_row_once_and_none_that_is_held_out(tiny_llama: LanguageModel) -> None:
    train, held_out = SPEC.cut(tiny_llama)
    steps = len(train) // SPEC.rows
    seen = [row for step in range(steps) for row in rows(drawn(tiny_llama, step))]
    assert len(set(seen)) == len(seen) == steps * SPEC.rows
    assert set(seen) <= {tuple(row.tolist()) for row in train}
    assert not set(seen) & {tuple(row.tolist()) for row in held_out}
    other = [row for step in range(steps) for row in rows(drawn(tiny_llama, step, seed=1))]
    assert other != seen


def test_a_step_is_a_function_of_seed_and_step(tiny_llama: LanguageModel) -> None:
    one, again, next_, other = (drawn(tiny_llama, *at) for at in ((3,), (3,), (4,), (3, SPEC, 1)))
    assert torch.equal(one.tokens, again.tokens) and torch.equal(one.counted, again.counted)
    assert not torch.equal(one.counted, next_.counted) and not torch.equal(one.counted, other.counted)
    assert (one.counted.sum(1) == 8).all() and one.n_tokens == 32 and one.n_fed == 128
    everywhere = drawn(tiny_llama, 3, Texts(rows=4, length=32, counted=None))
    assert everywhere.counted.all() and torch.equal(everywhere.tokens, one.tokens)


def test_shares_of_a_step_are_the_step(tiny_llama: LanguageModel) -> None:
    whole = drawn(tiny_llama, 2)
    parts = [drawn(tiny_llama, 2, world=World(rank, 3)) for rank in range(3)]
    assert torch.equal(torch.cat([part.tokens for part in parts]), whole.tokens)
    assert torch.equal(torch.cat([part.counted for part in parts]), whole.counted)
    with pytest.raises(UsageError, match="too few for 5 processes"):
        drawn(tiny_llama, 0, world=World(0, 5))


def test_micro_batches_are_the_batch(tiny_llama: LanguageModel) -> None:
    whole = drawn(tiny_llama, 0).over(7.0)
    for budget, sizes in ((1, [1, 1, 1, 1]), (64, [2, 2]), (100, [3, 1]), (1_000, [4])):
        parts = list(whole.micro_batches(budget))
        assert [len(part) for part in parts] == sizes and all(part.denominator == 7.0 for part in parts)
        assert torch.equal(torch.cat([part.tokens for part in parts]), whole.tokens)
        assert torch.equal(torch.cat([part.counted for part in parts]), whole.counted)
    assert len(whole.idle()) == 1


def test_held_out_texts_are_spread_over_the_end(tiny_llama: LanguageModel) -> None:
    _, held_out = SPEC.cut(tiny_llama)
    all_, some = (HeldOut(texts=n, counted=4).batch(SPEC, tiny_llama) for n in (None, 3))
    assert rows(all_) == [tuple(row.tolist()) for row in held_out] and (all_.counted.sum(1) == 4).all()
    assert len(some) == 3 and set(rows(some)) <= set(rows(all_))


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"rows": 0}, "rows"),
        ({"length": 1}, "rows of 1 tokens"),
        ({"counted": 0}, "counted is 0"),
        ({"counted": 200}, "counted is 200"),
        ({"held_out": 0.0}, "held_out"),
        ({"held_out": 1.0}, "held_out"),
        ({"length": 513, "counted": 1}, "exceed the context"),
        ({"length": 512, "prose": "short"}, "name a longer text"),
    ],
)
def test_bad_settings_are_refused(tiny_llama: LanguageModel, tmp_path: Path, options: dict, part: str) -> None:
    (tmp_path / "short").write_text("few words " * 60)
    if "prose" in options:
        options = options | {"prose": Prose.find(tmp_path / "short")}
    with pytest.raises(UsageError, match=part) as said:
        drawn(tiny_llama, 0, Texts(**options))
    assert "\n" not in str(said.value)


@pytest.mark.parametrize("options", [{"texts": 0}, {"counted": 0}])
def test_bad_evaluations_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        HeldOut(**options)


def test_a_text_that_changed_is_refused(tiny_llama: LanguageModel, tmp_path: Path) -> None:
    path = tmp_path / "mine.txt.gz"
    path.write_bytes(gzip.compress(b"a paragraph of words\n\n" * 40))
    spec = Texts(Prose.find(path), rows=1, length=16, counted=None)
    assert drawn(tiny_llama, 0, spec).n_tokens == 16
    path.write_bytes(gzip.compress(b"another paragraph\n\n" * 40))
    with pytest.raises(UsageError, match="has changed"):
        drawn(tiny_llama, 0, spec)
