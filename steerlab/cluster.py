"""Runs on a Ray cluster: groups of runs that do not know of each other, one Ray task each.

The driver lays all runs out first (folder, weights, dtype, threads, how sums are done), so a run is the same work
wherever it is done, and groups are what they are without Ray: results do not depend on how many workers there were.
Equal processors give equal bytes; others may round otherwise. A task takes as many cores as the driver uses threads,
and a GPU where the driver has one.

A task whose worker is lost is run again, at most RETRIES times, and goes on from its runs' checkpoints if the machine
it then gets sees the runs' folders (a shared file system). Where a machine does not, the task works in a folder of its
own, starts again if it is lost, and sends the files of its runs back at the end.

Workers use the environment that their machine has. Ray is an extra, imported here and nowhere else. Left out: starting
clusters of several machines, tasks of several GPUs, the memory of tasks: where a machine has cores for more of them
than its memory holds, start Ray there with fewer (`ray start --num-cpus`).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from steerlab.errors import RunFailed, UsageError
from steerlab.execute import dtype_of
from steerlab.models import LanguageModel, load
from steerlab.progress import Reporter
from steerlab.runs import Run, atomic_write
from steerlab.training import Experiment

RETRIES = 3
CONNECT_S = 10
STORE_BYTES = 200_000_000  # object store of a local Ray: it holds the few tables and texts that travel
Work = Callable[[Mapping[str, Experiment], Path, LanguageModel], None]
Files = dict[str, bytes]


def on_cluster(
    address: str,
    work: Work,
    groups: Sequence[Mapping[str, Experiment]],
    folder: str | Path,
    reporter: Reporter,
) -> None:
    """`work(experiments, folder, model)` for every group of runs laid out below `folder` that are not all done.

    address: HOST:PORT, `auto` for the cluster that Ray finds by itself, `local` for one on this machine, started here
    and stopped at the end. Raises the first task's UsageError or RunFailed; the other tasks are then stopped.
    """
    home = Path(folder).absolute()
    found = [{name: Run.open(home / name) for name in group} for group in groups]
    todo = [i for i, runs in enumerate(found) if any(run.manifest["status"] != "done" for run in runs.values())]
    if not todo:
        return
    threads = found[todo[0]][next(iter(groups[todo[0]]))].manifest["threads"]
    with connected(address) as ray:
        enough(ray, threads)
        gpus = 1 if torch.cuda.is_available() else 0
        task = ray.remote(_task).options(num_cpus=threads, num_gpus=gpus, max_retries=RETRIES)
        waiting: dict[Any, int] = {}
        for i in todo:
            manifests = {name: run.manifest for name, run in found[i].items()}
            waiting[task.remote(work, groups[i], str(home), manifests)] = i
        reporter.stage(f"{len(todo)} tasks on Ray ({address}), {threads} threads each")
        try:
            for number in range(len(todo)):
                (ready, *_), _ = ray.wait(list(waiting))
                names = ", ".join(groups[waiting.pop(ready)])
                for name, content in _answer(ray, ready, names).items():
                    atomic_write(home / name, content)
                reporter.stage(f"{names} done ({number + 1} of {len(todo)})")
        finally:
            for ref in waiting:
                ray.cancel(ref, force=True)


def _answer(ray: Any, ready: Any, names: str) -> Files:
    """What a task sent back. Raises its UsageError or RunFailed; RunFailed if its workers were lost too often."""
    try:
        failed, files = ray.get(ready)
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.OutOfMemoryError) as error:
        said = str(error).strip().partition("\n")[0]
        raise RunFailed(f"the worker of {names} was lost {RETRIES + 1} times ({said}); run the same again") from error
    if failed is not None:
        raise failed
    return files


def _task(
    work: Work, experiments: Mapping[str, Experiment], folder: str, manifests: Mapping[str, Mapping[str, Any]]
) -> tuple[Exception | None, Files]:
    """One group, in a worker. Errors meant for a person are returned, so that Ray does not wrap them."""
    runs = {name: Run(Path(folder) / name, dict(manifest)) for name, manifest in manifests.items()}
    first = next(iter(runs.values()))
    torch.set_num_threads(first.manifest["threads"])
    try:
        model = _model(next(iter(experiments.values())).model, dtype_of(first))
        if all(_here(run) for run in runs.values()):
            work(experiments, Path(folder), model)
            return None, {}
        with tempfile.TemporaryDirectory(prefix="steerlab-") as elsewhere:
            for name, run in runs.items():
                Run(Path(elsewhere) / name, run.manifest).update()
            work(experiments, Path(elsewhere), model)
            paths = [path for path in Path(elsewhere).rglob("*") if path.is_file()]
            return None, {path.relative_to(elsewhere).as_posix(): path.read_bytes() for path in paths}
    except (UsageError, RunFailed) as error:
        return error, {}


def _here(run: Run) -> bool:
    """Whether this machine sees the run's folder as the driver does."""
    try:
        found = Run.open(run.folder).manifest
    except UsageError:
        return False
    return all(found.get(name) == run.manifest.get(name) for name in ("experiment", "engine", "weights_sha256"))


@functools.lru_cache(maxsize=1)
def _model(name: str, dtype: torch.dtype) -> LanguageModel:
    """A worker keeps its model from task to task."""
    return load(name, dtype=dtype)


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """Ray, connected to `address` inside the `with`. A connection that is there already is used and stays. None: none.

    Raises UsageError without Ray, or if there is no cluster at the address.
    """
    if address is None:
        yield None
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Under `uv run`, Ray would have every worker build an environment of its own from a copy of the working folder.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else Ray warns of what it will do one day
    try:
        import ray
    except ImportError:
        raise UsageError("Ray is not installed; run: pip install 'steerlab[ray]'") from None
    if ray.is_initialized():
        yield ray
        return
    start: dict[str, Any] = {"include_dashboard": False, "object_store_memory": STORE_BYTES}
    try:
        host, _, port = address.rpartition(":")
        if port.isdecimal() and "/" not in host:  # Ray itself would try for a minute, and talk about it
            socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            **(start if address == "local" else {}),
        )
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        said = str(error).strip().partition("\n")[0][:160]
        raise UsageError(f"no Ray cluster at {address!r} ({said}); start one with `ray start --head`") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def enough(ray: Any, threads: int) -> None:
    """UsageError if no machine of the cluster has the cores for one task, which would wait for ever."""
    most = max((node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]), default=0)
    if most < threads:
        raise UsageError(
            f"a task needs {threads} cores, as many as this process uses threads, and the largest machine of the "
            f"cluster has {most:g}; set OMP_NUM_THREADS to no more than that and start anew"
        )
