"""A sweep over layers: its runs, its tables and figure, going on after a stop, what it refuses, the command line."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from steerlab import execute, sweep, tables
from steerlab.__main__ import main
from steerlab.adapters import LoRA, RowBank, SteeringVectors
from steerlab.errors import RunFailed, UsageError
from steerlab.models import load
from steerlab.plots import layers as plot_layers
from steerlab.recipes import rloo
from steerlab.rollouts import Policy
from steerlab.runs import Run, RunStore
from steerlab.tasks import make
from steerlab.training import Experiment, StepDone, Trainer

Words = list[str]


@pytest.fixture
def words(tiny_folder: Path, tmp_path: Path) -> Words:
    """Options of a sweep of seconds; random rewards, because a random model is never right."""
    data = tmp_path / "sums.csv"
    data.write_text("\n".join(["question,answer", *(f"{a}+{b}=,{a + b}" for a in range(5) for b in range(5))]))
    sizes = "--steps 2 --prompts 3 --samples 3 --max-new-tokens 4 --dtype fp64"
    told = f"--task {data} --task-option control=random_reward --task-option train=20 --task-option test=3"
    return [*told.split(), "--model", str(tiny_folder), *sizes.split(), "--out", str(tmp_path / "sweep")]


@pytest.fixture
def experiment(tiny_folder: Path, tmp_path: Path) -> Experiment:
    data = tmp_path / "sums.csv"
    data.write_text("\n".join(["question,answer", *(f"{a}+{b}=,{a + b}" for a in range(5) for b in range(5))]))
    task = make(str(data), control="random_reward", train=20, test=4)
    sizes = {"steps": 2, "prompts": 3, "samples": 3, "max_new_tokens": 4}
    made = rloo(task, str(tiny_folder), dtype="fp64", **sizes)  # type: ignore[arg-type]
    return replace(made, evaluation=replace(made.evaluation, samples=2, shots=0))


def vectors(folder: Path) -> dict[str, bytes]:
    return {run.folder.name: run.vectors_path.read_bytes() for run in RunStore(folder) if run.vectors_path.exists()}


def test_a_sweep_is_its_runs(experiment: Experiment, tmp_path: Path) -> None:
    """Every run of a sweep is the run that it would be alone, with its own scores and report."""
    home = sweep.sweep_layers(experiment, tmp_path / "s", layers=(0, 3), seeds=(0, 1), all_layers=True)
    names = [f"{kind}-seed{seed}" for seed in (0, 1) for kind in ("layer-00", "layer-03", "all-layers")]
    assert {run.folder.name for run in RunStore(tmp_path / "s")} == {*names, "sweep"}
    alone = execute.execute(Run.open(tmp_path / "s" / "layer-03-seed1").experiment, tmp_path / "alone")
    run = Run.open(tmp_path / "s" / "layer-03-seed1")
    assert run.manifest["status"] == "done" and run.path("report.html").exists()
    assert run.rollouts().equals(alone.rollouts())
    by = ["condition", "problem", "sample"]  # a random reward depends on what else is judged in the same call
    mine, theirs = (
        r.table("completions").sort_values(by, ignore_index=True).drop(columns="reward") for r in (run, alone)
    )
    pd.testing.assert_frame_equal(mine, theirs)
    pd.testing.assert_frame_equal(
        *(r.table("scores").sort_values(["condition", "metric"], ignore_index=True) for r in (run, alone))
    )
    found = tables.check(home.table("layers"), "layers")
    assert len(found) == 2 * 2 * 2 and set(found["metric"]) == {"avg@2", "pass@2"}
    assert set(home.table("scores")["condition"]) == {"base", "greedy", "all_layers"}
    pooled = home.table("scores").query("condition == 'all_layers'")
    assert set(pooled["n_seeds"]) == {2}
    assert {trace.name.split(" ")[0] for trace in home.figure("layers").data if trace.name} == {
        "one", "base", "greedy", "all"
    }  # fmt: skip
    assert home.manifest["cost"]["steps"] == 6 * 2
    together = [Run.open(tmp_path / "s" / name).manifest["cost"]["evaluate_s"] for name in names[:3]]
    assert len(set(together)) == 1, "evaluation is shared evenly; writing a run's report is not evaluation"
    assert sweep.sweep_layers(
        experiment, tmp_path / "s", layers=(0, 3), seeds=(0, 1), all_layers=True
    ).manifest == home.manifest  # fmt: skip


class Impatient(execute.Silent):
    """Stops after so many steps, or when the second group is evaluated."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def step(self, done: StepDone) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("steps", [1, 3])
def test_a_stopped_sweep_goes_on(experiment: Experiment, tmp_path: Path, steps: int) -> None:
    narrow = replace(experiment, source=replace(experiment.source, max_rows=18))  # type: ignore[type-var]
    given = {"layers": (0, 1, 2)}
    whole = sweep.sweep_layers(narrow, tmp_path / "whole", **given)  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        sweep.sweep_layers(narrow, tmp_path / "stopped", reporter=Impatient(steps), **given)  # type: ignore[arg-type]
    home = sweep.resume(tmp_path / "stopped")
    assert home.manifest["status"] == "done" and sweep.resume(tmp_path / "stopped").manifest == home.manifest
    assert vectors(tmp_path / "whole") == vectors(tmp_path / "stopped")
    pd.testing.assert_frame_equal(home.table("layers"), whole.table("layers"))


class Listening(execute.Silent):
    def __init__(self) -> None:
        self.heard: list[str] = []

    def notice(self, text: str) -> None:
        self.heard.append(text)


def broken(where: str, layers: set[int], patch: pytest.MonkeyPatch) -> None:
    """Have the runs of some layers fail: in their own update, or in sampling or evaluation that others share."""
    gradients, sample, answer = Trainer.gradients, Policy.sample, sweep.answer

    def concerned(adapter: object) -> bool:
        members = adapter.sets if isinstance(adapter, RowBank) else (adapter,)
        return any(layers & set(member.layers) for member in members if isinstance(member, SteeringVectors))

    def refuse(failing: bool) -> None:
        if failing:
            raise RunFailed(f"no good numbers in {where}; lower the learning rate")

    def in_update(self: Trainer, *given: Any) -> Any:
        refuse(where == "update" and concerned(self.adapter))
        return gradients(self, *given)

    def in_sampling(self: Policy, *given: Any, **named: Any) -> Any:
        refuse(where == "sampling" and concerned(self.adapter))
        return sample(self, *given, **named)

    def in_evaluation(model: Any, task: Any, evaluation: Any, conditions: Any, *given: Any) -> Any:
        refuse(where == "evaluation" and any(concerned(c.adapter) for c in conditions.values()))
        return answer(model, task, evaluation, conditions, *given)

    patch.setattr(Trainer, "gradients", in_update)
    patch.setattr(Policy, "sample", in_sampling)
    patch.setattr(sweep, "answer", in_evaluation)


@pytest.mark.parametrize("where", ["update", "sampling", "evaluation"])
def test_a_layer_that_fails_keeps_no_other_from_its_end(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    narrow = replace(experiment, source=replace(experiment.source, max_rows=18))  # type: ignore[type-var]
    whole = sweep.sweep_layers(narrow, tmp_path / "whole", layers=(0, 1, 2))  # in groups of two
    listening = Listening()
    with monkeypatch.context() as patch:
        broken(where, {1}, patch)
        home = sweep.sweep_layers(narrow, tmp_path / "s", layers=(0, 1, 2), reporter=listening)
    assert listening.heard == [
        f"layer-01-seed0 failed and is left out: no good numbers in {where}; lower the learning rate"
    ]
    status = {run.folder.name: run.manifest["status"] for run in RunStore(tmp_path / "s")}
    assert status == {"layer-00-seed0": "done", "layer-01-seed0": "failed", "layer-02-seed0": "done", "sweep": "failed"}
    found, expected = home.table("layers"), whole.table("layers")
    failed = found["layer"] == 1
    assert failed.sum() == 2 and found.loc[failed, ["value", "low", "high"]].isna().all(axis=None)
    pd.testing.assert_frame_equal(found[~failed], expected[~failed])
    assert (home.path("figures") / "layers.html").exists()
    again = sweep.resume(tmp_path / "s")
    pd.testing.assert_frame_equal(again.table("layers"), expected)
    assert again.manifest["status"] == "done"
    assert "failure" not in Run.open(tmp_path / "s" / "layer-01-seed0").manifest


def test_a_sweep_of_which_nothing_is_left_is_its_first_failure(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        broken("update", {1, 2}, patch)
        with pytest.raises(RunFailed, match="no good numbers in update"):
            sweep.sweep_layers(experiment, tmp_path / "s", layers=(1, 2), all_layers=True)
    home = sweep.resume(tmp_path / "s")
    assert home.manifest["status"] == "done" and not home.table("layers")["value"].isna().any()
    assert "all_layers" in set(home.table("scores")["condition"])


def test_learning_rates_rise_with_depth(experiment: Experiment) -> None:
    made = sweep.Sweep.of(experiment, 3, lr=(1e-2, 1.0)).experiments(3)
    assert [e.updater.lr for e in made.values()] == pytest.approx([1e-2, 1e-1, 1.0])
    assert {e.updater.lr for e in sweep.Sweep.of(experiment, 3).experiments(3).values()} == {experiment.updater.lr}
    assert [e.adapter.layers for e in made.values()] == [(0,), (1,), (2,)]  # type: ignore[attr-defined]


def test_what_a_sweep_refuses(experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "s"
    with pytest.raises(UsageError, match=r"one steering vector each, not LoRA"):
        sweep.sweep_layers(replace(experiment, adapter=LoRA()), folder)
    with pytest.raises(UsageError, match=r"layers \[4\] do not exist"):
        sweep.sweep_layers(experiment, folder, layers=(1, 4))
    with pytest.raises(UsageError, match=r"seeds \[1, 1\]"):
        sweep.sweep_layers(experiment, folder, seeds=(1, 1))
    with pytest.raises(UsageError, match="must be positive"):
        sweep.sweep_layers(experiment, folder, lr=(0.0, 1.0))
    with pytest.raises(UsageError, match=r"learning rate is 1e\+38"):  # torch would say something of an overflow
        sweep.sweep_layers(experiment, folder, lr=(0.1, 1e38))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="torchrun"):
        sweep.sweep_layers(experiment, folder)
    assert not folder.exists()


def test_the_command_line(words: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "rloo", *words, "--layers", "each", "1", "2", "all"]) == 0
    said = capsys.readouterr().out
    assert "layer-01-seed0, layer-02-seed0, all-layers-seed0 (1 of 1)" in said
    assert "figure: " in said and "layers.html" in said and "all layers" in said
    home = Run.open(tmp_path / "sweep" / "sweep")
    assert sorted(set(home.table("layers")["layer"])) == [1, 2]
    assert (home.path("figures") / "layers.html").exists()
    assert main(["resume", str(tmp_path / "sweep")]) == 0
    assert "avg@8" in capsys.readouterr().out


def test_a_plan_of_a_sweep(words: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "rloo", *words, "--plan"]) == 0
    one = capsys.readouterr().out
    assert main(["train", "rloo", *words, "--layers", "each", "--seeds", "0", "1", "--plan"]) == 0
    said = capsys.readouterr().out
    assert "8 runs, 256 parameters" in said and "8 runs" not in one
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("--layers each --adapter lora", "not LoRA"),
        ("--layers each 9", "layers [9] do not exist"),
        ("--layers each 9 --plan", "layers [9] do not exist"),
        ("--layers each --shard", "--shard is for one run"),
        ("--layers each --seeds 1 1", "each once"),
        ("--layers all 1", "is not clear"),
        ("--layers every", "layers"),
        ("--seeds 1 2", "--seeds belongs to a sweep"),
        ("--lr-last 1", "--lr-last belongs to a sweep"),
        ("--ray local", "--ray belongs to a sweep"),
    ],
)
def test_one_line_for_bad_input(
    words: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: str, says: str
) -> None:
    assert main(["train", "rloo", *words, *more.split()]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1
    assert not (tmp_path / "sweep").exists()


def test_ctrl_c_says_how_to_go_on(
    words: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "conclude", stop)
    assert main(["train", "rloo", *words, "--layers", "each", "0"]) == 130
    assert f"stopped with 1 runs done; resume with: steerlab resume {tmp_path / 'sweep'}" in capsys.readouterr().err


def test_the_figure_of_one_and_of_several_seeds() -> None:
    rows = [
        {"layer": layer, "seed": seed, "metric": "avg@4", "value": 0.1 * layer + 0.02 * seed, "low": 0.0, "high": 0.9}
        | {"n_problems": 5, "n_samples": 4}
        for layer in range(3)
        for seed in range(2)
    ]
    both = plot_layers.layers(pd.DataFrame(rows))
    band, line = both.data
    assert list(line.y) == pytest.approx([0.01, 0.11, 0.21])
    assert list(band.y) == pytest.approx([0.02, 0.12, 0.22, 0.2, 0.1, 0.0])
    one = plot_layers.layers(pd.DataFrame(rows[::2]))
    assert list(one.data[0].y) == [0.9] * 3 + [0.0] * 3
    failed = {**rows[0], "layer": 3, "value": math.nan, "low": math.nan, "high": math.nan}
    assert list(plot_layers.layers(pd.DataFrame([*rows[::2], failed])).data[0].y) == list(one.data[0].y)
    with pytest.raises(UsageError, match="not a 'layers' table"):
        plot_layers.layers(pd.DataFrame({"layer": [1]}))


def test_a_model_at_hand_need_not_be_loaded(experiment: Experiment, tmp_path: Path) -> None:
    model = load(experiment.model, dtype="fp64")
    without = replace(experiment, evaluation=replace(experiment.evaluation, base=False, greedy=False))
    home = sweep.sweep_layers(without, tmp_path / "s", layers=(2,), model=model)
    assert home.table("scores").empty and len(home.table("layers")) == 2
