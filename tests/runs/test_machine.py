"""What the machine says of itself: free memory within the limits of control groups, and what counts as running out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from steerlab.runs import free_memory_bytes, ran_out

GIB = 2**30


def write(root: Path, files: dict[str, object]) -> Path:
    """A machine with 8 GiB to spare, as its files tell it."""
    for name, content in {"proc/meminfo": f"MemTotal: 1 kB\nMemAvailable: {8 * GIB // 1024} kB\n", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{content}\n")
    return root


def v2(folder: str, limit: object, used: int, cached: int) -> dict[str, object]:
    at = f"sys/fs/cgroup/{folder}"
    stat = f"anon 7\ninactive_file {cached}\nworkingset_restore_file 5"
    return {f"{at}memory.max": limit, f"{at}memory.current": used, f"{at}memory.stat": stat}


def v1(folder: str, limit: int, used: int, cached: int) -> dict[str, object]:
    at = f"sys/fs/cgroup/memory/{folder}"
    stat = f"inactive_file 1\ntotal_inactive_file {cached}"
    return {f"{at}memory.limit_in_bytes": limit, f"{at}memory.usage_in_bytes": used, f"{at}memory.stat": stat}


UNLIMITED = 9223372036854771712  # what v1 says instead of `max`


@pytest.mark.parametrize(
    ("groups", "files", "free"),
    [
        ("0::/", v2("", 4 * GIB, 3 * GIB, 2 * GIB), 3 * GIB),  # in a container: it is the top; cache is given back
        ("0::/", v2("", "max", 3 * GIB, 0), 8 * GIB),
        ("0::/a/b", v2("a/b/", 4 * GIB, 3 * GIB, 0), GIB),  # a group below the top
        ("0::/a/b", {**v2("a/b/", "max", 1, 0), **v2("a/", 4 * GIB, 3 * GIB, 0)}, GIB),  # the limit is its parent's
        ("0::/../b", v2("", 4 * GIB, 3 * GIB, 0), GIB),
        ("0::/", v2("", 4 * GIB, 5 * GIB, 0), 0),
        ("0::/", v2("", 99 * GIB, 3 * GIB, 0), 8 * GIB),  # the machine itself has less
        ("9:cpu:/\n4:memory:/job\n0::/", v1("job/", 4 * GIB, 3 * GIB, 2 * GIB), 3 * GIB),
        ("4:memory:/job", {**v1("job/", UNLIMITED, 1, 0), **v1("", 4 * GIB, 3 * GIB, 0)}, GIB),
        ("4:cpu,memory:/docker/0a1b", v1("", 4 * GIB, 3 * GIB, 0), GIB),  # a path of the host's, not to be seen here
        ("4:cpu:/job", v1("job/", 4 * GIB, 3 * GIB, 0), 8 * GIB),
        ("", {}, 8 * GIB),
    ],
)
def test_free_memory_stays_within_the_control_groups(
    tmp_path: Path, groups: str, files: dict[str, object], free: int
) -> None:
    assert free_memory_bytes(root=write(tmp_path, {"proc/self/cgroup": groups, **files})) == free


def test_without_a_counter_of_cache_nothing_is_added(tmp_path: Path) -> None:
    root = write(tmp_path, {"proc/self/cgroup": "0::/", **v2("", 4 * GIB, 3 * GIB, GIB)})
    (root / "sys/fs/cgroup/memory.stat").unlink()
    assert free_memory_bytes(root=root) == GIB


def test_free_memory_here_is_a_size_or_unknown(tmp_path: Path) -> None:
    free = free_memory_bytes()
    assert free is None or 10**6 < free < 10**15
    assert free_memory_bytes(root=tmp_path) is None


def test_what_counts_as_running_out() -> None:
    said = "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried …"
    assert all(ran_out(error) for error in (MemoryError(), torch.OutOfMemoryError("CUDA"), RuntimeError(said)))
    assert not any(ran_out(error) for error in (RuntimeError("size mismatch"), ValueError("out of memory")))
