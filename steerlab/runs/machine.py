"""What a run ran on: versions, processor, git revision, memory. No host name, no user name, no paths."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any


def environment() -> dict[str, Any]:
    """Versions, machine and git revision (None outside a repository of steerlab); no host or user names."""
    import torch

    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("steerlab", "torch", "transformers", "numpy", "pandas")},
        "git_revision": _git_revision(),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory_bytes(),
        "accelerator": torch.cuda.get_device_name() if cuda else None,
    }


def _git_revision() -> str | None:
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(here.parent), *arguments], capture_output=True, text=True, timeout=10, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # a site-packages folder inside somebody else's repository is not a revision of steerlab
    if git("ls-files", "--error-unmatch", here.name) is None:
        return None
    revision = git("rev-parse", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no", ".")
    return f"{revision}+changes" if revision and changed else revision


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_bytes() -> int | None:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def free_memory_bytes(gpu: int | None = None, root: Path = Path("/")) -> int | None:
    """Bytes that this process could still take: of the memory of GPU number `gpu`, else of the machine's, within the
    limits of its control groups. None where the system does not say. root: the folder that holds `proc` and `sys`.
    """
    if gpu is not None:
        import torch

        free, _ = torch.cuda.mem_get_info(gpu)
        return free + torch.cuda.memory_reserved(gpu) - torch.cuda.memory_allocated(gpu)
    with contextlib.suppress(OSError, ValueError):
        for line in (root / "proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(min([1024 * int(line.split()[1]), *_control_group_rooms(root)]))
    return None


def _control_group_rooms(root: Path) -> Iterator[int]:
    """Bytes that each limit on this process leaves, its own group's and those above it, of cgroup v2 and v1. A
    container may see its own group as the top, whatever path it is told. The kernel gives back what it has cached of
    files.
    """
    with contextlib.suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8", errors="replace").splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                top, files, cached = root / "sys/fs/cgroup", ("memory.max", "memory.current"), "inactive_file"
            elif "memory" in controllers.split(","):
                top, files = root / "sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
                cached = "total_inactive_file"
            else:
                continue
            own = top / path.lstrip("/")
            for folder in (own, *own.parents):
                if folder.is_relative_to(top):
                    with contextlib.suppress(OSError, ValueError):  # no such file, or no limit: `max`
                        limit, used = (int((folder / name).read_text()) for name in files)
                        yield max(0, limit - used + _counter(folder / "memory.stat", cached))


def _counter(file: Path, name: str) -> int:
    """The number behind `name` in a file of names and numbers, 0 if there is none."""
    with contextlib.suppress(OSError):
        for line in file.read_text(encoding="ascii").splitlines():
            if line.startswith(f"{name} "):
                return int(line.split()[1])
    return 0


# What an allocator says that raises no exception of its own kind.
_SAID = ("not enough memory", "can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def ran_out(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, in any of the ways in which torch says it."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):  # torch.cuda.OutOfMemoryError is the latter
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _SAID)


def give_back_memory() -> None:
    """Return freed memory to the system (glibc keeps it: a run's resident size would grow to twice what it needs)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
