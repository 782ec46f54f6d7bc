"""Runs as Ray tasks are the runs without Ray; a lost worker's task is done again; errors are one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from steerlab import cluster
from steerlab.errors import UsageError


def test_without_ray_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install 'steerlab\[ray\]'"), cluster.connected("local"):
        pass


@pytest.mark.parametrize("address", ["127.0.0.1:1", "localhost:1"])
def test_an_address_without_a_cluster(address: str) -> None:
    pytest.importorskip("ray", reason="Ray is not installed (pip install 'steerlab[ray]')")
    with pytest.raises(UsageError, match=f"no Ray cluster at '{address}'"), cluster.connected(address):
        pass


@pytest.fixture(scope="module")
def said(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What on_ray.py found: one local Ray for all of it, on two cores."""
    if find_spec("ray") is None:
        pytest.skip("Ray is not installed (pip install 'steerlab[ray]')")
    folder = tmp_path_factory.mktemp("ray")
    data = folder / "sums.csv"
    data.write_text("\n".join(["question,answer", *(f"{a}+{b}=,{a + b}" for a in range(5) for b in range(5))]))
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("on_ray.py")), str(folder), str(tiny_folder), str(data)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_sweep_on_ray_is_the_sweep_without(said: dict[str, Any]) -> None:
    assert said["sweep"] and said["table"]
    assert said["stages"][-3].startswith("2 tasks on Ray (local), 1 threads each")
    assert sorted(said["stages"][-2:], key=lambda text: text[-7:]) == said["stages"][-2:]
    assert said["stages"][-1].endswith("done (2 of 2)")


@pytest.mark.slow
def test_a_grid_on_ray_is_the_grid_without(said: dict[str, Any]) -> None:
    assert said["grid"]


@pytest.mark.slow
def test_the_task_of_a_lost_worker_goes_on_from_the_checkpoint(said: dict[str, Any]) -> None:
    assert said["died"] and said["dying"]
    assert said["steps"] == ["a0", "a1", "b0", "b1"]


@pytest.mark.slow
def test_a_machine_that_does_not_see_the_folder_sends_the_files_back(said: dict[str, Any]) -> None:
    assert said["nothing_written"]
    assert {"a/manifest.json", "a/vectors.safetensors", "a/tables/scores.parquet"} <= set(said["elsewhere"])


@pytest.mark.slow
def test_errors_are_one_line(said: dict[str, Any]) -> None:
    assert said["refused"] == "nothing fits"
    assert "a task needs 1000 cores" in said["enough"] and "\n" not in said["enough"]
