"""The tuned lens from the command to the folder: it learns at every layer; a stopped run ends with the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from steerlab import execute
from steerlab.__main__ import main
from steerlab.adapters import Steering, Translators
from steerlab.adapters.formats import load_tuned_lens
from steerlab.errors import UsageError
from steerlab.interp.lens_fit import distances
from steerlab.models import LanguageModel, load
from steerlab.recipes import rloo, tuned_lens
from steerlab.rollouts import Evaluation, Policy
from steerlab.runs import CostLedger, Run, decode, encode
from steerlab.tasks import make
from steerlab.training import Experiment, HeldOut, StepDone

SAME = ("tuned_lens/config.json", "tuned_lens/params.pt", "tables/lens_fit.parquet", "tables/curve.parquet")


class Impatient(execute.Silent):
    """Stops the run after its second step."""

    def step(self, done: StepDone) -> None:
        if done.step == 1:
            raise KeyboardInterrupt


def small(model: str, steps: int = 4) -> Experiment:
    made = tuned_lens(model, text="", steps=steps, rows=4, length=32, counted=8, dtype="fp32", seed=3)
    return replace(made, evaluation=HeldOut(texts=6, counted=16))


@pytest.fixture
def experiment(tiny_folder: Path) -> Experiment:
    return small(str(tiny_folder))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_it_learns_at_every_layer(family: str, tiny_models: dict[str, LanguageModel], tmp_path: Path) -> None:
    """Held-out KL falls at every layer, beyond its interval."""
    model = tiny_models[family]
    run = execute.execute(small(model.name, steps=60), tmp_path / "run", model=model)
    fit = run.table("lens_fit")
    tuned = fit.loc[fit["lens"] == "tuned"]
    assert list(tuned["layer"]) == [0, 1, 2]
    assert (tuned["gain_low"] > 0).all() and (tuned["gain_nats"] > 0.1).all()
    plain = fit.loc[fit["lens"] == "plain"]
    np.testing.assert_allclose(plain["kl_nats"].to_numpy() - tuned["kl_nats"].to_numpy(), tuned["gain_nats"])


def test_a_run_has_its_lens_its_tables_and_its_page(experiment: Experiment, tmp_path: Path) -> None:
    run = execute.execute(experiment, tmp_path / "run")
    assert Run.open(run.folder).experiment == experiment and run.manifest["status"] == "done"
    assert run.manifest["corpus"] == "own prose" and len(run.manifest["corpus_sha256"]) == 64
    assert set(run.tables()) == {"curve", "lens_fit"} and set(run.figures()) == {"learning_curve", "lens_fit"}
    page = run.path("report.html").read_text(encoding="utf-8")
    assert "Fit of the tuned lens" in page and "Learning curve" in page and "nothing is claimed" not in page
    assert "tuned_lens on" in page and "own prose" in page
    config = json.loads((run.path("tuned_lens") / "config.json").read_text())
    assert config["steerlab"]["recipe"] == "tuned_lens" and config["steerlab"]["corpus"] == "own prose"
    model = load(experiment.model, dtype="fp32")
    lens = load_tuned_lens(run.path("tuned_lens"), model)
    assert lens.layers == (0, 1, 2) and all(weight.any() and bias.any() for weight, bias in lens.maps.values())


def test_the_first_loss_is_the_plain_lens(experiment: Experiment, tiny_folder: Path, tmp_path: Path) -> None:
    """Nothing has been trained yet: what the loop reports is what the plain lens is off, on the same positions."""
    run = execute.execute(replace(experiment, steps=1), tmp_path / "run")
    model = load(str(tiny_folder), dtype="fp32")
    batch = experiment.source.open(Policy(model), 3, CostLedger()).next(0).batch
    plain, tuned = distances(model, Translators().init(model), batch)
    assert np.array_equal(plain, tuned)
    assert run.metrics()["loss"].iloc[0] == pytest.approx(plain.mean(), rel=1e-4)


def test_a_stopped_run_ends_with_the_same_bytes(experiment: Experiment, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        execute.execute(experiment, stopped, reporter=Impatient())
    assert execute.adapter_path(Run.open(stopped)) is None
    execute.execute(experiment, whole)
    execute.resume(stopped)
    for name in SAME:
        assert (whole / name).read_bytes() == (stopped / name).read_bytes(), name


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bytes(tiny_folder: Path, tmp_path: Path) -> None:
    words = [
        *("train", "tuned_lens", "--text", "", "--model", str(tiny_folder), "--dtype", "fp32", "--steps", "200"),
        *("--rows", "2", "--length", "16", "--counted", "4"),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "steerlab", *words, "--out", str(tmp_path / "killed")],
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    metrics = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert Run.open(tmp_path / "killed").manifest["status"] == "training"
    assert main(["resume", str(tmp_path / "killed")]) == 0
    assert main([*words, "--out", str(tmp_path / "whole")]) == 0
    for name in SAME:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name


def test_commands(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(tmp_path / "run")
    options = ["--model", str(tiny_folder), "--text", "", "--steps", "2", "--length", "32", "--rows", "2"]
    words = ["train", "tuned_lens", *options, "--counted", "8", "--out", run]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "loss" in said and "reward" not in said and "own prose" in said and "gain" in said
    assert main(["report", run]) == 0 and main(["resume", run]) == 0
    capsys.readouterr()

    def refused(*words: str) -> str:
        assert main(list(words)) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1, said
        return said

    assert "tuned lens" in refused("lens", run)
    assert "tuned lens" in refused("eval", run)
    assert "tuned lens" in refused("generate", run, "--prompt", "x")
    assert "no plan" in refused(*words, "--plan")
    new = ["train", "tuned_lens", *options[:2], "--out", str(tmp_path / "new")]
    assert "cannot be read as text" in refused(*new, "--text", str(tmp_path / "nowhere.txt"))
    assert "exceed the context" in refused(*new, "--text", "", "--length", "600")
    assert "learning rate" in refused(*new, "--text", "", "--lr", "-1")
    assert "--task" in refused(*new, "--task", "chain_sum")
    assert not (tmp_path / "new").exists()


def test_json_round_trip(experiment: Experiment) -> None:
    assert decode(json.loads(json.dumps(encode(experiment)))) == experiment


def test_parts_that_do_not_belong_together(experiment: Experiment, tmp_path: Path) -> None:
    task = make("chain_sum")
    for wrong, match in (
        (replace(experiment, adapter=Steering()), "Translators|Steering"),
        (replace(experiment, evaluation=Evaluation()), "answers a task"),
        (replace(rloo(task, experiment.model), evaluation=HeldOut()), "source of texts"),
    ):
        with pytest.raises(UsageError, match=match):
            execute.execute(wrong, tmp_path / "run")
    with pytest.raises(UsageError, match="answers a task"):
        _ = experiment.task
    with pytest.raises(UsageError, match="answers a task"):
        _ = experiment.answers


def test_memory_that_runs_out_is_halved(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of text are cut up as completions are."""
    heard: list[str] = []
    reads = Policy.lens_divergences

    def greedy(self: Policy, batch: object) -> torch.Tensor:
        if len(batch) > 1:
            raise MemoryError("not enough memory")
        return reads(self, batch)

    class Listening(execute.Silent):
        def notice(self, text: str) -> None:
            heard.append(text)

    monkeypatch.setattr(Policy, "lens_divergences", greedy)
    run = execute.execute(experiment, tmp_path / "run", reporter=Listening())
    assert heard and run.manifest["status"] == "done"
    assert run.metrics()["token_budget"].iloc[-1] < 64
