"""An append-only file of JSON lines that survives a kill: a line is on disk when `append` returns, a torn one is cut.

Each record carries its `step`, so that a resumed run can drop what it will do again. Left out: rotation, compression.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from steerlab.errors import UsageError
from steerlab.runs.files import atomic_write, cannot_write


class RecordLog:
    """Records in the file `path`, which need not exist yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tail_checked = False

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Adds records; on disk when this returns. NaN and infinities are stored as null."""
        if not self._tail_checked:
            self._cut_torn_line()
            self._tail_checked = True
        lines = "".join(
            json.dumps({key: _number(value) for key, value in record.items()}, allow_nan=False) + "\n"
            for record in records
        )
        try:
            with self.path.open("ab") as file:
                file.write(lines.encode("ascii"))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            self._tail_checked = False
            raise cannot_write(self.path, error) from error

    def records(self) -> list[dict[str, Any]]:
        """All whole lines; a line torn by a kill is not a record. Raises UsageError for a damaged file."""
        if not self.path.exists():
            return []
        lines = self.path.read_bytes().split(b"\n")[:-1]  # what follows the last newline was torn by a kill
        try:
            return [json.loads(line) for line in lines if line]
        except ValueError as error:
            raise UsageError(f"{self.path} is damaged ({error}); remove the broken line") from error

    def truncate(self, step: int) -> None:
        """Drops the records with `record["step"] >= step`; atomic. A file that does not exist is not made."""
        if self.path.exists():
            kept = [record for record in self.records() if record.get("step", -1) < step]
            atomic_write(self.path, "".join(json.dumps(record, allow_nan=False) + "\n" for record in kept))

    def _cut_torn_line(self) -> None:
        if self.path.exists() and not (content := self.path.read_bytes()).endswith(b"\n"):
            atomic_write(self.path, content[: content.rfind(b"\n") + 1])


def _number(value: Any) -> Any:
    plain = value.item() if hasattr(value, "item") else value
    return None if isinstance(plain, float) and not math.isfinite(plain) else plain
