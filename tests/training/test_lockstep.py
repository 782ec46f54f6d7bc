"""Runs at one pace are the runs that they would be alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from steerlab.adapters import LoRA, Scope, Steering
from steerlab.batches import RolloutBatch
from steerlab.errors import RunFailed
from steerlab.execute import lay_out
from steerlab.models import LanguageModel
from steerlab.recipes import rloo
from steerlab.rollouts import Policy
from steerlab.runs import Run
from steerlab.tasks import make
from steerlab.training import Experiment, StepDone, Trainer, memory, sources
from steerlab.training.lockstep import fit_together, joined
from steerlab.training.trainer import Trainer as Real

Make = Callable[..., Experiment]


@pytest.fixture
def of(tmp_path: Path) -> Make:
    """Experiments on one task; random rewards, because a random model is never right."""
    data = tmp_path / "sums.csv"
    data.write_text("\n".join(["question,answer", *(f"{a}+{b}=,{a + b}" for a in range(5) for b in range(5))]))
    task = make(str(data), control="random_reward", train=20, test=4)

    def of(*layers: int, **options: object) -> Experiment:
        sizes = {"steps": 3, "prompts": 4, "samples": 3, "max_new_tokens": 5, "dtype": "fp64"}
        return rloo(task, "tiny", layers=layers or None, **(sizes | options))  # type: ignore[arg-type]

    return of


def trainers(experiments: dict[str, Experiment], folder: Path, model: LanguageModel) -> list[Trainer]:
    runs = lay_out(experiments, folder, model)
    return [Trainer(e, Policy(model, e.adapter.init(model)), runs[name]) for name, e in experiments.items()]


def same(one: Path, other: Path, names: list[str]) -> None:
    for name in names:
        a, b = Run.open(one / name), Run.open(other / name)
        assert a.rollouts().equals(b.rollouts()), name
        (step_a, tensors_a, _), (step_b, tensors_b, _) = a.load_checkpoint() or (), b.load_checkpoint() or ()
        assert step_a == step_b == 3
        for key, tensor in tensors_a.items():
            assert torch.allclose(tensor, tensors_b[key], rtol=0, atol=1e-9), (name, key)
        assert any(t.any() for t in tensors_a.values())


def test_runs_together_are_the_runs_alone(of: Make, tmp_path: Path, tiny_llama_fp64: LanguageModel) -> None:
    experiments = {f"layer-{layer}": of(layer) for layer in range(4)} | {"all": of()}
    assert joined(experiments) == [list(experiments)]
    heard: list[StepDone] = []
    fit_together(trainers(experiments, tmp_path / "together", tiny_llama_fp64), heard.append)
    for trainer in trainers(experiments, tmp_path / "alone", tiny_llama_fp64):
        trainer.fit()
    same(tmp_path / "together", tmp_path / "alone", list(experiments))
    assert [(done.step, done.steps) for done in heard] == [(0, 3), (1, 3), (2, 3)]
    rewards = [Run.open(tmp_path / "alone" / name).metrics()["reward"][1] for name in experiments]
    assert heard[1].metrics["reward"] == pytest.approx(sum(rewards) / len(rewards))


def test_vectors_below_the_first_block_and_kept_states_of_some(
    of: Make, tmp_path: Path, tiny_llama_fp64: LanguageModel
) -> None:
    """A run that keeps nothing (its vectors act in block 0) beside one that does."""
    experiments = {f"layer-{layer}": of(layer, site="attn_out") for layer in (0, 3)}
    fit_together(trainers(experiments, tmp_path / "together", tiny_llama_fp64))
    for trainer in trainers(experiments, tmp_path / "alone", tiny_llama_fp64):
        trainer.fit()
    same(tmp_path / "together", tmp_path / "alone", list(experiments))


def test_a_run_that_fails_leaves_the_others_their_steps(
    of: Make, tmp_path: Path, tiny_llama_fp64: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiments = {f"layer-{layer}": of(layer) for layer in range(3)}
    update = Real.update

    def failing(self: Trainer, step: int, batch: RolloutBatch) -> dict[str, float]:
        if step == 1 and self.adapter.layers == (1,):  # type: ignore[attr-defined]
            raise RunFailed("broken at step 1")
        return update(self, step, batch)

    heard: list[StepDone] = []
    with monkeypatch.context() as patch:
        patch.setattr(Real, "update", failing)
        found = fit_together(trainers(experiments, tmp_path / "together", tiny_llama_fp64), heard.append)
    assert [str(failure) for failure in found] == ["None", "broken at step 1", "None"]
    assert [done.step for done in heard] == [0, 1, 2]
    step, _, _ = Run.open(tmp_path / "together" / "layer-1").load_checkpoint() or (None, None, None)
    assert step == 1
    for name, trainer in zip(experiments, trainers(experiments, tmp_path / "alone", tiny_llama_fp64), strict=True):
        if name != "layer-1":
            trainer.fit()
    same(tmp_path / "together", tmp_path / "alone", ["layer-0", "layer-2"])


def test_states_are_kept_of_no_more_runs_than_there_is_room_for(
    of: Make, tmp_path: Path, tiny_llama_fp64: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for the states of one run is not room for those of two decoded in one batch."""
    experiments = {f"layer-{layer}": of(layer) for layer in (2, 3)}
    sample, asked = Policy.sample, []

    def listening(self: Policy, *given: object, **named: object) -> object:
        asked.append(named["keep"])
        return sample(self, *given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Policy, "sample", listening)
    size = 2 * 4 * 3 * 5 * tiny_llama_fp64.d_model * 8
    for name, room, kept in (("narrow", size, False), ("wide", 2 * size, True)):
        monkeypatch.setattr(sources, "KEPT_BYTES", room)
        fit_together(trainers(experiments, tmp_path / name, tiny_llama_fp64))
        assert asked == [kept] * 3
        asked.clear()
    trainers(experiments, tmp_path / "alone", tiny_llama_fp64)[0].fit()
    assert asked == [True] * 3
    same(tmp_path / "narrow", tmp_path / "wide", list(experiments))


def test_runs_laid_out_together_keep_their_own_token_budgets(
    of: Make, tmp_path: Path, tiny_llama_fp64: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And share what was measured for the first."""
    monkeypatch.setattr(memory, "free_memory_bytes", lambda: 20_000_000)
    experiments = {"a": replace(of(1), token_budget=17), "b": of(2), "c": replace(of(3), token_budget=40)}
    runs = lay_out(experiments, tmp_path / "runs", tiny_llama_fp64)
    engines = [run.manifest["engine"] for run in runs.values()]
    rule = memory.budget_for(tiny_llama_fp64, experiments["b"].source.longest)
    assert [engine["token_budget"] for engine in engines] == [17, rule, 40]
    assert len({(engine["products"], engine["processes"]) for engine in engines}) == 1


def test_those_behind_catch_up(
    of: Make, tmp_path: Path, tiny_llama_fp64: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiments = {f"layer-{layer}": of(layer) for layer in range(3)}
    learn, done = Real.learn, []

    def stopping(self: Trainer, *given: object) -> None:
        if len(done) == 4:  # one run has done two steps, the others one
            raise KeyboardInterrupt
        done.append(self)
        learn(self, *given)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Real, "learn", stopping)
        with pytest.raises(KeyboardInterrupt):
            fit_together(trainers(experiments, tmp_path / "together", tiny_llama_fp64))
    found = [Run.open(tmp_path / "together" / name).load_checkpoint() for name in experiments]
    assert [checkpoint[0] for checkpoint in found if checkpoint] == [2, 1, 1]
    fit_together(trainers(experiments, tmp_path / "together", tiny_llama_fp64))
    for trainer in trainers(experiments, tmp_path / "alone", tiny_llama_fp64):
        trainer.fit()
    same(tmp_path / "together", tmp_path / "alone", list(experiments))


def test_only_what_can_share_a_batch_is_joined(of: Make) -> None:
    made = {"a": of(1), "b": of(2), "c": of(2, seed=1), "d": of(3, seed=1), "e": of(3, seed=1, samples=2)}
    assert joined(made) == [["a", "b"], ["c", "d"], ["e"]]
    other = Steering((1,), scope=Scope("prompt"))
    made = {"a": of(1), "b": replace(of(1), adapter=other), "c": of(1, temperature=0.5), "d": of(adapter=LoRA())}
    assert joined(made) == [["a"], ["b"], ["c"], ["d"]]
    assert joined({}) == []


@pytest.mark.parametrize(("max_rows", "sizes"), [(256, [7]), (36, [3, 3, 1]), (35, [2, 2, 2, 1]), (1, [1] * 7)])
def test_a_batch_has_no_more_rows_than_the_source_allows(of: Make, max_rows: int, sizes: list[int]) -> None:
    made = {str(i): of(i) for i in range(7)}
    narrow = {name: replace(e, source=replace(e.source, max_rows=max_rows)) for name, e in made.items()}  # type: ignore[type-var]
    assert [len(group) for group in joined(narrow)] == sizes
