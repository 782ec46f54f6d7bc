"""The processes that train one adapter together (`torchrun`, `accelerate launch`), and what they tell each other.

Data-parallel: every process holds the frozen model and does its share of a step's prompts. Of gradients only those of
the adapter cross the wire, as one flat fp32 vector: an all-reduce sends 2·(n−1)/n times its bytes per process, below
2·L·d·4 for steering vectors. Everything else is a few numbers per step, and the completions' texts, which go to the
leader for the run's log (a few bytes per token that took a forward pass to make). Objects travel pickled, between
processes of one launch only. One process alone exchanges nothing and needs no torch.distributed.

When a process raises, it says why in the launch's store and closes its connections: the others, waiting in an
exchange, raise RunFailed in one line in place of waiting for ever. Left out: joining and leaving while a run goes on.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from steerlab.errors import RunFailed, UsageError

T = TypeVar("T")
PATIENCE = timedelta(hours=2)  # others may be judging, or evaluating the harder problems
FAILED = "steerlab/failed"
STOPPED = "training stopped in all processes, because one did ({})"


@dataclass(frozen=True)
class World:
    """rank: which process this is, 0 … size − 1. local_size: how many of them share this machine. store: the launch's
    own key-value store, where there is one."""

    rank: int = 0
    size: int = 1
    local_size: int = 1
    store: Any = None

    @classmethod
    def from_environment(cls) -> World:
        """The world that the launcher's environment variables describe; a process started by hand is alone.

        Joins the other processes on the first call (gloo between CPUs, NCCL between GPUs, one GPU per process) and
        returns the same world after that. Raises UsageError if a variable is missing or there are too few GPUs.
        """
        size = _number("WORLD_SIZE", 1)
        if size <= 1:
            return cls()
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise UsageError(f"WORLD_SIZE is {size} but {', '.join(missing)} is not set; start it with torchrun")
        rank, local_size = _number("RANK", 0), _number("LOCAL_WORLD_SIZE", size)
        return cls(rank, size, local_size, _meet(_number("LOCAL_RANK", rank % local_size)))

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes the run and speaks to the person."""
        return self.rank == 0

    def share(self, things: Sequence[T]) -> Sequence[T]:
        """This process's part: neighbours stay together, and the parts in order of rank are the whole."""
        n = len(things)
        return things[self.rank * n // self.size : (self.rank + 1) * n // self.size]

    def sum_(self, tensors: Sequence[Tensor]) -> int:
        """Put the sum over all processes into the tensors (of one dtype and device), in one exchange.

        Returns the bytes that this process sends when the sum goes round a ring.
        """
        if self.size == 1 or not tensors:
            return 0
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        self._exchange(lambda: dist.all_reduce(flat))
        for tensor, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))
        return 2 * (self.size - 1) * flat.nbytes // self.size

    def gather(self, thing: T) -> list[T]:
        """What every process has, in order of rank; everywhere the same list."""
        if self.size == 1:
            return [thing]
        found: list[Any] = [None] * self.size
        self._exchange(lambda: dist.all_gather_object(found, thing))
        return found

    def to_leader(self, thing: T) -> list[T]:
        """The same for what only the leader needs; the others get an empty list."""
        if self.size == 1:
            return [thing]
        found: list[Any] | None = [None] * self.size if self.leads else None
        self._exchange(lambda: dist.gather_object(thing, found, dst=0))
        return found or []

    def from_leader(self, make: Callable[[], T]) -> T:
        """What the leader makes, in every process; the others do not call `make`."""
        if self.size == 1:
            return make()
        box: list[Any] = [make() if self.leads else None]
        self._exchange(lambda: dist.broadcast_object_list(box, src=0))
        return box[0]

    def leader_first(self, make: Callable[[], T]) -> T:
        """What each process makes for itself, the leader before the others (it fills a cache that they then find)."""
        if not self.leads:
            self.barrier()
        made = make()
        if self.leads:
            self.barrier()
        return made

    def barrier(self) -> None:
        """Wait for all."""
        self.gather(None)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A process that raises inside the `with` brings the others down too, each with one line."""
        try:
            yield
        except BaseException as error:
            if self.size == 1 or not dist.is_initialized():
                raise
            first = self._first_failure(error)
            leave()
            if isinstance(error, RuntimeError) and first is not None:  # torch lost the others outside `_exchange`
                raise RunFailed(STOPPED.format(first)) from error
            raise

    def _first_failure(self, error: BaseException) -> str | None:
        """What another process has already said of its failure; None if this one is the first, which is then said."""
        reason = " ".join(str(error).split()) or type(error).__name__
        with contextlib.suppress(RuntimeError):  # the store is gone with the process that kept it
            if self.store is not None:
                if self.store.check([FAILED]):
                    return self.store.get(FAILED).decode()
                self.store.set(FAILED, f"process {self.rank} of {self.size}: {reason}")
        return None

    def _exchange(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except (RuntimeError, ValueError) as error:  # ValueError: this process has left the others
            said = f"process {self.rank} lost the others ({str(error).partition(chr(10))[0][:120]})"
            with contextlib.suppress(RuntimeError):
                if self.store is not None and self.store.check([FAILED]):
                    said = self.store.get(FAILED).decode()
            raise RunFailed(STOPPED.format(said)) from error


ALONE = World()


@functools.cache
def _meet(local_rank: int) -> Any:
    """Meet the other processes, once; returns the store (None if somebody else has brought them together)."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus:
        if local_rank >= gpus:
            raise UsageError(f"process {local_rank} of this machine has no GPU of its own ({gpus} here); start fewer")
        torch.cuda.set_device(local_rank)
    if dist.is_initialized():
        return None
    store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE, world_size=size, rank=rank, store=store)
    atexit.register(leave)
    return store


def leave() -> None:
    """Close this process's connections to the others, if it has any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _number(name: str, default: int) -> int:
    """An environment variable that a launcher sets."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UsageError(f"{name} is {text!r} in the environment; it must be a number, or unset to train alone")
    return int(text)
