"""A small pool of worker processes with a hard time limit for each request; safe from threads, processes and after a
fork.

Workers are plain child processes that speak JSON lines (no pickles, and no re-import of the caller's `__main__`, as
multiprocessing would do). One that overruns is killed and replaced. Left out: queues across machines.
"""

from __future__ import annotations

import atexit
import json
import os
import queue
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from steerlab.errors import RunFailed, UsageError

Request = dict[str, Any]
Answer = dict[str, Any]
START_S = 180.0  # importing sympy or reasoning-gym takes seconds, on a busy machine many
_REMEMBERED = 50_000
_PER_WORKER = {"math": 256}  # requests that make a further worker worth its start; other kinds are quicker or rare
_PER_OTHER_WORKER = 2_000
_SCRIPT = Path(__file__).with_name("worker.py")


class Worker:
    """One child process. `ask` is not safe from two threads at once: the pool lends a worker to one."""

    def __init__(self, kind: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_SCRIPT), kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is for the parent to decide
        )
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()
        started = self._receive(START_S)
        if started is None or "missing" in started:
            self.kill()
            if started is not None:
                raise UsageError(f"this task needs {started['missing']}, which is not installed; install it with pip")
            raise RunFailed(f"the {kind} worker process did not start; is there memory left?")

    def ask(self, request: Request, limit_s: float) -> Answer | None:
        """The answer, or None if the time ran out or the process died (it is then killed)."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({**request, "limit_s": limit_s}).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            self.kill()
            return None
        answer = self._receive(limit_s)
        if answer is None:
            self.kill()
        return answer

    def kill(self) -> None:
        """Ends the process at once."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:  # an unsent request in the buffer of a dead process
                    continue

    def _read(self) -> None:
        assert self._process.stdout is not None
        try:
            for line in self._process.stdout:
                self._lines.put(line)
        except ValueError:  # closed by kill()
            return
        finally:
            self._lines.put(b"")

    def _receive(self, limit_s: float) -> Answer | None:
        try:
            line = self._lines.get(timeout=limit_s)
        except queue.Empty:
            return None
        return json.loads(line) if line else None


class Pool:
    """Workers of one kind, started when needed and reused by all tasks and threads of this process."""

    def __init__(self, kind: str, most: int) -> None:
        self.kind = kind
        self._most = most
        self._idle: list[Worker] = []
        self._lock = threading.Lock()
        self._slots = threading.BoundedSemaphore(most)
        self._answers: OrderedDict[str, Answer | None] = OrderedDict()

    def ask(self, request: Request, limit_s: float) -> Answer | None:
        """One answer, or None where `limit_s` seconds were not enough."""
        with self._slots:
            with self._lock:
                worker = self._idle.pop() if self._idle else None
            worker = worker or Worker(self.kind)
            answer = worker.ask(request, limit_s)
            if answer is not None:
                with self._lock:
                    self._idle.append(worker)
        return answer

    def ask_all(self, requests: Sequence[Request], limit_s: float, remember: bool = True) -> list[Answer | None]:
        """Answers in order. Equal requests are asked once; with `remember` never again in this process."""
        keys = [json.dumps(r, sort_keys=True) for r in requests]
        with self._lock:
            known = {k: self._answers[k] for k in keys if k in self._answers} if remember else {}
        fresh = {k: r for k, r in zip(keys, requests, strict=True) if k not in known}
        n_threads = min(self._most, 1 + len(fresh) // _PER_WORKER.get(self.kind, _PER_OTHER_WORKER))
        if n_threads == 1:
            found = [self.ask(r, limit_s) for r in fresh.values()]
        else:
            with ThreadPoolExecutor(n_threads) as threads:
                found = list(threads.map(lambda r: self.ask(r, limit_s), fresh.values()))
        known.update(zip(fresh, found, strict=True))
        if remember:
            with self._lock:
                self._answers.update((k, known[k]) for k in fresh)
                while len(self._answers) > _REMEMBERED:
                    self._answers.popitem(last=False)
        return [known[k] for k in keys]

    def close(self) -> None:
        """Ends the idle workers."""
        with self._lock:
            idle, self._idle = self._idle, []
        for worker in idle:
            worker.kill()


_pools: dict[str, Pool] = {}
_inherited: list[dict[str, Pool]] = []
_pools_lock = threading.Lock()


def pool(kind: str) -> Pool:
    """This process's pool for "math", "gym", "regex", "function" or "ifeval"."""
    with _pools_lock:
        if kind not in _pools:
            _pools[kind] = Pool(kind, max(1, min(4, os.cpu_count() or 1)))
        return _pools[kind]


@atexit.register
def _close_all() -> None:
    for each in _pools.values():
        each.close()


def _after_fork() -> None:
    """A forked child must neither use its parent's pipes nor end its workers: it forgets them and starts its own."""
    global _pools, _pools_lock
    _inherited.append(_pools)
    _pools, _pools_lock = {}, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
