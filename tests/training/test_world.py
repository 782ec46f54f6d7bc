"""Two processes train what one process trains, send no more than the adapter's gradient, and fall together."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from steerlab.errors import RunFailed, UsageError
from steerlab.execute import execute, resume
from steerlab.models import LanguageModel, fused
from steerlab.runs import Run
from steerlab.tasks.controls import RandomReward
from steerlab.training.world import ALONE, World

SCRIPT = Path(__file__).with_name("one_of_several.py")
EXACT = {"rel": 1e-6, "abs": 1e-9}


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("one_of_several", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    judge, measure = module.judge_one_by_one(), module.fused_without_measuring()
    yield module
    RandomReward.judge, fused.measured_choice = judge, measure


@pytest.fixture(scope="module")
def folder(tiny_llama: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("world")
    tiny_llama.hf.save_pretrained(made / "model")
    tiny_llama.tokenizer.save_pretrained(made / "model")
    sums = (f"{a}+{b}=,{a + b}" for a in range(5) for b in range(5))
    (made / "sums.csv").write_text("\n".join(["question,answer", *sums]))
    return made


def launch(mode: str, folder: Path, size: int = 2) -> list[dict[str, object]]:
    """What the processes of a launch end with, in order of rank; all must end."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), mode, str(folder)],
            env={**os.environ, **shared, "RANK": str(rank), "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        said = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    found = [folder / f"{mode}-{rank}.json" for rank in range(size)]
    assert all(path.exists() for path in found), "\n".join(said)
    return [json.loads(path.read_text()) for path in found]


@pytest.fixture(scope="module")
def alone(script: ModuleType, folder: Path) -> Run:
    return execute(script.experiment(folder), folder / "alone")


def same_vectors(one: Run, other: Run, within: float = 1e-6) -> None:
    expected, found = load_file(one.vectors_path), load_file(other.vectors_path)
    assert expected.keys() == found.keys()
    for name, vector in expected.items():
        assert vector.any()
        assert float((found[name] - vector).norm() / vector.norm()) < within, name


@pytest.mark.slow
def test_two_processes_train_what_one_does(script: ModuleType, folder: Path, alone: Run) -> None:
    ended = launch("whole", folder)
    together = Run.open(folder / "whole")
    assert [end["status"] for end in ended] == ["done", "done"]
    assert ended[0]["checkpoint"] == ended[1]["checkpoint"]
    gradient = load_file(folder / "gradient.safetensors")
    for name, expected in script.first_gradient(folder, ALONE).items():
        assert expected.any()
        assert torch.allclose(gradient[name], expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
    same_vectors(alone, together)
    one, two = alone.metrics(), together.metrics()
    for column in ("reward", "correct", "signal_share", "completion_tokens", "finished_share", "reward_ema"):
        assert one[column].tolist() == two[column].tolist()
    for column in ("loss", "grad_norm", "entropy_nats", "lr"):
        assert two[column].tolist() == pytest.approx(one[column].tolist(), **EXACT)
    assert alone.rollouts().to_dict("records") == together.rollouts().to_dict("records")
    assert alone.table("scores").equals(together.table("scores"))
    costs, n = together.manifest["cost"], alone.manifest["cost"]["trained_parameters"]
    assert 0 < costs["exchanged_bytes"] <= 3 * 2 * 4 * n and n == 4 * 32
    for name in ("steps", "tokens_prompt", "tokens_completion"):
        assert costs[name] == alone.manifest["cost"][name]
    assert together.manifest["engine"]["processes"] == 2 and together.path("report.html").exists()


@pytest.mark.slow
def test_weights_in_pieces_are_the_weights(folder: Path, alone: Run, tiny_llama: LanguageModel) -> None:
    """Shares of an odd number of prompts, so that the processes differ in passes and in micro-batches."""
    ended = launch("shard", folder)
    together = Run.open(folder / "shard")
    assert [end.get("status", end) for end in ended] == ["done", "done"]
    all_weights = sum(p.numel() for block in tiny_llama.blocks for p in block.parameters())
    assert sum(int(str(end["held"])) for end in ended) == all_weights
    same_vectors(alone, together, within=1e-5)  # weights in pieces have no kernels, which round otherwise
    assert alone.rollouts().to_dict("records") == together.rollouts().to_dict("records")
    assert alone.table("scores").equals(together.table("scores"))


def test_weights_in_pieces_need_several_processes(script: ModuleType, folder: Path) -> None:
    with pytest.raises(UsageError, match="torchrun"):
        execute(script.experiment(folder), folder / "single", shard=True)
    assert not (folder / "single").exists()


@pytest.mark.slow
def test_processes_fall_together_and_one_goes_on_alone(folder: Path, alone: Run) -> None:
    leader, other = launch("stop", folder)
    assert leader["error"] == "KeyboardInterrupt"
    assert other["error"] == "RunFailed" and "process 0 of 2: enough" in str(other["said"])
    assert "\n" not in str(other["said"])
    assert Run.open(folder / "stop").load_checkpoint()[0] == 1
    same_vectors(alone, resume(folder / "stop"))
    assert Run.open(folder / "stop").manifest["engine"]["processes"] == 2


def test_shares_are_neighbours_and_cover_everything() -> None:
    for size in (1, 2, 3, 7):
        for n in (0, 1, 6, 7, 16):
            parts = [World(rank, size).share(range(n)) for rank in range(size)]
            assert [x for part in parts for x in part] == list(range(n))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_one_process_exchanges_nothing() -> None:
    tensor = torch.ones(3)
    assert ALONE.leads and ALONE.sum_([tensor]) == 0 and torch.equal(tensor, torch.ones(3))
    assert ALONE.gather("a") == ALONE.to_leader("a") == ["a"]
    assert ALONE.from_leader(lambda: 5) == ALONE.leader_first(lambda: 5) == 5
    ALONE.barrier()
    with pytest.raises(ZeroDivisionError), ALONE.together():
        raise ZeroDivisionError


def test_the_environment_says_who_is_who(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert World.from_environment() == ALONE
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="RANK, MASTER_ADDR, MASTER_PORT"):
        World.from_environment()
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(UsageError, match="'many'"):
        World.from_environment()


def test_an_exchange_without_the_others_is_one_line() -> None:
    with pytest.raises(RunFailed) as caught:
        World(0, 2).gather(1)
    assert "\n" not in str(caught.value)
