"""Rollouts as a source: which problems, which streams, and that batch, metrics and texts say the same."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from letters import Letters
from steerlab.adapters import Steering
from steerlab.errors import UsageError
from steerlab.models import LanguageModel, tiny
from steerlab.rollouts import Completions, Policy, Rows, Sampling
from steerlab.runs import CostLedger
from steerlab.tasks import encode
from steerlab.training import Rollouts, sources
from steerlab.training.world import World

TASK = Letters(train=(0, 3, 6, 9, 12), wrong=-1.0)


class Spy(Policy):
    """Remembers the rows it was asked for."""

    rows: Rows
    out: Completions

    def sample(self, prompts: object, rows: Rows, *args: object, **names: object) -> Completions:
        self.rows = rows
        self.out = super().sample(prompts, rows, *args, **names)
        return self.out


def test_epochs_cover_every_problem_once(tiny_llama: LanguageModel) -> None:
    source = Rollouts(TASK, prompts=2, samples=2).open(Policy(tiny_llama), 0, CostLedger())
    seen = [i for step in range(10) for i in source.chosen(step)]
    for epoch in range(4):
        assert sorted(seen[5 * epoch : 5 * epoch + 5]) == [0, 1, 2, 3, 4]
    assert len({tuple(seen[5 * e : 5 * e + 5]) for e in range(4)}) > 1, "every epoch in the same order"
    other = Rollouts(TASK, prompts=2, samples=2).open(Policy(tiny_llama), 1, CostLedger())
    assert [i for step in range(10) for i in other.chosen(step)] != seen


@pytest.mark.parametrize("ids", [(0, 1), (0, 2), (5, 5 + 2), (0, 2, 4, 6)])
def test_problems_that_come_twice_get_streams_of_their_own(tiny_llama: LanguageModel, ids: tuple[int, ...]) -> None:
    policy = Spy(tiny_llama)
    Rollouts(Letters(ids), prompts=9, samples=2, sampling=Sampling(max_new_tokens=1)).open(
        policy, 0, CostLedger()
    ).next(0)
    streams = Counter(zip(policy.rows.problem.tolist(), policy.rows.sample.tolist(), strict=True))
    assert len(streams) == 18


def test_batch_metrics_and_texts(tiny_llama: LanguageModel) -> None:
    ledger, task, policy = CostLedger(), TASK, Spy(tiny_llama)
    source = Rollouts(task, prompts=3, samples=4, sampling=Sampling(temperature=0.8, max_new_tokens=5)).open(
        policy, 3, ledger
    )
    drawn = source.next(2)
    batch = drawn.batch
    chosen = [task.problems("train")[i] for i in source.chosen(2)]
    assert batch.prompts == tuple(tuple(encode(task.prompt(p), tiny_llama.tokenizer)) for p in chosen)
    assert batch.group.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert batch.temperature == 0.8
    assert torch.equal(batch.completions, policy.out.tokens) and torch.equal(batch.logprobs, policy.out.logprobs)
    for i, record in enumerate(drawn.texts):
        text = tiny_llama.tokenizer.decode(batch.completions[i, : batch.lengths[i]], skip_special_tokens=True)
        (judged,) = task.judge([chosen[i // 4]], [text])
        assert record["text"] == text and record["problem"] == chosen[i // 4].id and record["step"] == 2
        assert record["reward"] == float(batch.rewards[i]) == judged.reward
        assert record["correct"] == bool(batch.correct[i]) == judged.correct
    rewards = batch.rewards.view(3, 4)
    assert drawn.metrics["reward"] == pytest.approx(float(rewards.mean()))
    assert drawn.metrics["correct"] == pytest.approx(float(batch.correct.float().mean()))
    assert drawn.metrics["signal_share"] == pytest.approx(sum(len(set(r)) > 1 for r in rewards.tolist()) / 3)
    assert drawn.metrics["completion_tokens"] == pytest.approx(batch.n_tokens / 12)
    assert drawn.metrics["entropy_nats"] == pytest.approx(-float(batch.logprobs.sum()) / batch.n_tokens)
    assert ledger.reward_s > 0 and ledger.rollout_s > 0
    assert drawn.tally.completion_tokens == batch.n_tokens
    assert drawn.tally.prompt_tokens == sum(map(len, batch.prompts))
    again = Rollouts(task, prompts=3, samples=4, sampling=Sampling(temperature=0.8, max_new_tokens=5), max_rows=5)
    repeated = again.open(Policy(tiny_llama), 3, CostLedger()).next(2).batch
    assert torch.equal(repeated.completions, batch.completions)


def test_a_step_in_two_halves_is_the_step(tiny_llama: LanguageModel) -> None:
    """What was asked for may be answered by anyone: here by the policy itself, without the source."""
    policy = Policy(tiny_llama)
    source = Rollouts(TASK, prompts=3, samples=2, sampling=Sampling(max_new_tokens=4)).open(policy, 1, CostLedger())
    request, whole = source.request(5), source.next(5)
    halves = source.receive(5, request, request.sample(policy))
    assert torch.equal(halves.batch.completions, whole.batch.completions)
    assert torch.equal(halves.batch.rewards, whole.batch.rewards)
    assert (halves.tally, halves.texts) == (whole.tally, whole.texts)


@pytest.mark.parametrize("prompts", [5, 7, 9])
def test_shares_of_a_step_are_the_step(tiny_llama: LanguageModel, prompts: int) -> None:
    """Also where problems come twice in a step (5 problems): the streams are those of one process."""
    spec = Rollouts(TASK, prompts=prompts, samples=2, sampling=Sampling(max_new_tokens=3))
    policy = Policy(tiny_llama)
    whole = spec.open(policy, 0, CostLedger()).next(1)
    parts = [spec.open(policy, 0, CostLedger(), World(rank, 3)).next(1) for rank in range(3)]
    assert [text for part in parts for text in part.texts] == whole.texts
    assert tuple(prompt for part in parts for prompt in part.batch.prompts) == whole.batch.prompts
    total = parts[0].tally + parts[1].tally + parts[2].tally
    assert total.metrics == pytest.approx(whole.metrics, rel=1e-6)
    assert total.completion_tokens == whole.tally.completion_tokens
    with pytest.raises(UsageError, match="processes"):
        spec.open(policy, 0, CostLedger(), World(0, prompts + 1))


def test_bad_settings_are_refused(tiny_llama: LanguageModel) -> None:
    for options in ({"prompts": 0}, {"samples": 0}, {"max_rows": 0}, {"sampling": Sampling(temperature=0.0)}):
        with pytest.raises(UsageError):
            Rollouts(TASK, **options)
    with pytest.raises(UsageError, match="train"):
        Rollouts(Letters(())).open(Policy(tiny_llama), 0, CostLedger())
    with pytest.raises(UsageError, match="context"):  # before any step, not hours into a run
        Rollouts(TASK, sampling=Sampling(max_new_tokens=10_000)).open(Policy(tiny_llama), 0, CostLedger())


def test_too_many_states_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether states are kept is a rule of the run, and says nothing else of what is sampled."""
    model = tiny.model("llama")
    policy = Policy(model, Steering((2,)).init(model))
    spec = Rollouts(TASK, prompts=2, samples=2, sampling=Sampling(max_new_tokens=4))
    kept = spec.open(policy, 0, CostLedger()).next(0).batch
    monkeypatch.setattr(sources, "KEPT_BYTES", 2 * 2 * 2 * 4 * 32 * 4 - 1)
    bare = spec.open(policy, 0, CostLedger()).next(0).batch
    assert kept.kept is not None and kept.kept.block == 3 and bare.kept is None
    assert kept.slopes is not None and kept.slopes.drawn_under == policy.numbers and bare.slopes is None
    assert torch.equal(kept.completions, bare.completions)
