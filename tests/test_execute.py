"""A run of another adapter than vectors: saved in its own format, evaluated beside the base, read only if it can be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from steerlab import execute
from steerlab.__main__ import main
from steerlab.adapters import LoRA, Steering
from steerlab.adapters.formats import load_adapter
from steerlab.command_line.subjects import subject
from steerlab.errors import UsageError
from steerlab.models import load
from steerlab.recipes import rloo
from steerlab.runs import Run
from steerlab.tasks import make
from steerlab.training import Experiment, StepDone

SPEC = LoRA(rank=2, targets=("down_proj", "q_proj"), layers=(1, 3))


class Impatient(execute.Silent):
    """Stops the run after its first step."""

    def step(self, done: StepDone) -> None:
        raise KeyboardInterrupt


@pytest.fixture
def experiment(tiny_folder: Path, tmp_path: Path) -> Experiment:
    """A run of a second; random rewards, because a random model is never right."""
    data = tmp_path / "sums.csv"
    data.write_text("\n".join(["question,answer", *(f"{a}+{b}=,{a + b}" for a in range(5) for b in range(5))]))
    task = make(str(data), control="random_reward", train=20, test=4)
    made = rloo(
        task, str(tiny_folder), adapter=SPEC, steps=3, prompts=3, samples=3, max_new_tokens=4, dtype="fp32", seed=5
    )
    return replace(made, evaluation=replace(made.evaluation, samples=2, shots=0))


def test_a_lora_run_has_its_folder_and_no_readout_of_vectors(experiment: Experiment, tmp_path: Path) -> None:
    run = execute.execute(experiment, tmp_path / "run")
    assert Run.open(run.folder).experiment == experiment and run.manifest["status"] == "done"
    assert {p.name for p in run.path("adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert not run.vectors_path.exists()
    assert set(run.tables()) == {"completions", "curve", "scores"}
    assert {"base", "greedy", "steered"} == set(run.table("scores")["condition"])
    assert "Logit lens" not in run.path("report.html").read_text(encoding="utf-8")
    model = load(experiment.model, dtype="fp32")
    weights = load_adapter(run.path("adapter"), model)
    assert weights.spec == SPEC and all(up.any() for _, up in weights.pairs.values())
    start = SPEC.init(model, torch.Generator().manual_seed(5))
    assert all((a - b).abs().max() < 0.1 for a, b in zip(weights.parameters(), start.parameters(), strict=True))


def test_vectors_inside_a_branch_have_no_lens(experiment: Experiment, tmp_path: Path) -> None:
    inside = replace(
        experiment, adapter=Steering(layers=(1, 2), site="ln2"), updater=replace(experiment.updater, lr=0.01)
    )
    run = execute.execute(inside, tmp_path / "run")
    assert run.manifest["status"] == "done" and run.table("norms")["norm"].gt(0).all()
    assert "logit_lens" not in run.tables() and "cosines" in run.tables()
    assert "Logit lens" not in run.path("report.html").read_text(encoding="utf-8")


def test_a_stopped_lora_run_ends_with_the_same_bytes(experiment: Experiment, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        execute.execute(experiment, stopped, reporter=Impatient())
    assert execute.adapter_path(Run.open(stopped)) is None
    for run in (execute.execute(experiment, whole), execute.resume(stopped)):
        assert execute.adapter_path(run) == run.path("adapter")
    for name in ("adapter/adapter_config.json", "adapter/adapter_model.safetensors", "tables/completions.parquet"):
        assert (whole / name).read_bytes() == (stopped / name).read_bytes(), name


def test_commands_on_a_lora(experiment: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = execute.execute(experiment, tmp_path / "run")
    found = subject(str(run.folder))
    assert found.adapter is not None and found.experiment == experiment
    assert subject(str(run.path("adapter"))).model.weights_sha256 == found.model.weights_sha256
    with pytest.raises(UsageError, match="no steering vectors to read"):
        _ = found.vectors
    assert main(["generate", str(run.folder), "--prompt", "1+1=", "--scale", "0.5", "--max-new-tokens", "2"]) == 0
    assert main(["eval", str(run.folder), "--samples", "1", "--limit", "2", "--shots", "0"]) == 0
    capsys.readouterr()
    assert main(["lens", str(run.folder)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_recipe_takes_layers_or_an_adapter(experiment: Experiment) -> None:
    task = experiment.source.task
    specs = (
        None,
        Steering(layers=(1,), site="ln2"),
        SPEC,
        LoRA(rank=1),
        LoRA(rank=1, alpha=1.0, targets=("down_proj",)),
    )
    assert [rloo(task, adapter=spec).updater.lr for spec in specs] == [1e-2, 1e-2, 1e-3, 1e-3, 3e-2]
    assert rloo(task, adapter=SPEC, lr=0.5).updater.lr == 0.5
    with pytest.raises(UsageError, match="inside it"):
        rloo(task, adapter=SPEC, layers=(1,))
