"""Writing files so that a killed process leaves the old file or the new one, never half of one.

Every writer in steerlab goes through `atomic_write` or `atomic_path`. Left out: locking, remote storage.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from steerlab.errors import UsageError

_counter = itertools.count()


def cannot_write(path: Path, error: OSError) -> UsageError:
    reasons = {
        errno.ENOSPC: "the disk is full; free some space and run the same command again",
        errno.EDQUOT: "the disk quota is used up; free some space and run the same command again",
        errno.EROFS: "the file system is read-only; choose another folder",
        errno.EACCES: "permission denied; choose a folder you can write to",
        errno.EPERM: "permission denied; choose a folder you can write to",
        errno.ENOTDIR: "part of the path is a file, not a folder; choose another folder",
        errno.EEXIST: "part of the path is a file, not a folder; choose another folder",
        errno.EISDIR: "a folder of that name is in the way; move it or choose another name",
    }
    reason = reasons.get(error.errno or 0, f"{error.strerror or error}; choose another folder")
    return UsageError(f"cannot write {path}: {reason}")


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path with the same suffix in the same folder, which becomes `path` when the block ends well.

    For writers that want a file name. On an exception the temporary file is removed and `path` is as it was.
    Raises UsageError (one line, with the remedy) on a full disk or a folder that cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}-{next(_counter)}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    with contextlib.suppress(OSError):  # some file systems cannot sync a folder; the rename is atomic all the same
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def is_temporary(path: Path) -> bool:
    """Whether this is what a killed process left of a file it was writing."""
    return re.match(r"\.\d+-\d+\.", path.name) is not None


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Writes the whole file or nothing; text as UTF-8. Lone surrogates, which UTF-8 cannot hold, become U+FFFD.

    Raises UsageError (one line, with the remedy) on a full disk or a folder that cannot be written.
    """
    content = storable(data).encode("utf-8") if isinstance(data, str) else data
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def storable(text: str) -> str:
    """The text with lone surrogates, which neither UTF-8 nor Parquet can hold, replaced by U+FFFD."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def to_json(value: object) -> str:
    """The one JSON text of a value: sorted keys, no NaN, so equal content is equal bytes."""
    return json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
