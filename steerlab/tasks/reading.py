"""Rows of a data file (.jsonl, .json, .csv, each also .gz, .parquet) or of a hub data set, with errors that name file
and line.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from steerlab.errors import UsageError

Row = Mapping[str, Any]
Rows = tuple[tuple[str, Row], ...]  # where the row stands ("file line 3"), and its fields
SUFFIXES = (".jsonl", ".json", ".csv", ".jsonl.gz", ".json.gz", ".csv.gz", ".parquet")
HUB = "hub:"


def rows(path: str) -> Rows:
    """All rows of a file or of "hub:REPOSITORY[:CONFIG][:SPLIT]". UsageError: missing, empty, not UTF-8, not the
    format.
    """
    return _hub_rows(path) if path.startswith(HUB) else _file_rows(path, stamp(path))


def stamp(path: str) -> tuple[int, int]:
    """Time of change (ns) and size (bytes) of a file, by which what was read from it may be cached; (0, 0) for the
    hub.
    """
    if path.startswith(HUB):
        return 0, 0
    try:
        state = Path(path).stat()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}; give the path of a data file") from error
    return state.st_mtime_ns, state.st_size


@lru_cache(maxsize=16)
def _file_rows(path: str, _stamp: tuple[int, int]) -> Rows:
    name = path.lower().removesuffix(".gz")
    readers: dict[str, Callable[[str], Rows]] = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
    for suffix, read in readers.items():
        if name.endswith(suffix):
            found = read(path)
            if not found:
                raise UsageError(f"{path} is empty; a data file needs at least one problem")
            return found
    raise UsageError(f"{path} is not a data file that can be read; its name must end in one of {', '.join(SUFFIXES)}")


def _text(path: str) -> str:
    try:
        data = Path(path).read_bytes()
        if path.lower().endswith(".gz"):
            data = gzip.decompress(data)
    except (OSError, EOFError) as error:
        raise UsageError(f"cannot read {path}: {error}; is it a whole, readable file?") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{path} line {line} is not UTF-8; save the file as UTF-8") from error


def _jsonl(path: str) -> Rows:
    found = []
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(f"{where} is not JSON ({error.msg}); each line must be one JSON object") from error
        found.append((where, _object(where, row)))
    return tuple(found)


def _json(path: str) -> Rows:
    try:
        value = json.loads(_text(path) or "[]")
    except json.JSONDecodeError as error:
        raise UsageError(f"{path} line {error.lineno} is not JSON ({error.msg}); correct it or use .jsonl") from error
    if not isinstance(value, list):
        raise UsageError(f"{path} holds one {type(value).__name__}; a .json data file must be a list of objects")
    return tuple((f"{path} entry {i}", _object(f"{path} entry {i}", row)) for i, row in enumerate(value, 1))


def _object(where: str, row: Any) -> Row:
    if not isinstance(row, dict):
        raise UsageError(f"{where} is not a JSON object; each problem must be one, with a question and an answer")
    return row


def _csv(path: str) -> Rows:
    reader = csv.DictReader(io.StringIO(_text(path), newline=""))
    found = []
    try:
        for row in reader:
            where = f"{path} line {reader.line_num}"
            if None in row or None in row.values():
                raise UsageError(f"{where} has not as many cells as the header; quote cells that contain commas")
            found.append((where, row))
    except csv.Error as error:
        raise UsageError(f"{path} line {reader.line_num} is not CSV ({error}); correct it") from error
    return tuple(found)


def _parquet(path: str) -> Rows:
    import pandas as pd

    try:
        frame = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is not a parquet file ({str(error)[:80]}); is it whole?") from error
    return tuple((f"{path} row {i}", row) for i, row in enumerate(frame.to_dict("records"), 1))


@lru_cache(maxsize=16)
def _hub_rows(place: str) -> Rows:
    """A data set by the package `datasets`; "hub:repository:config:split", split "train" unless given."""
    repository, config, split = [*place.removeprefix(HUB).split(":"), "", ""][:3]
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise UsageError(
            f"{place} needs the package datasets; pip install datasets, or give a file as path="
        ) from error
    try:
        found = load_dataset(repository, config or None, split=split or "train")
    except (DatasetsError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        offline = os.environ.get("HF_HUB_OFFLINE") == "1"
        remedy = "HF_HUB_OFFLINE=1 is set" if offline else "check the name and the network"
        raise UsageError(f"{place} could not be loaded ({reason}); {remedy}, or give a file as path=") from error
    return tuple((f"{place} row {i}", dict(row)) for i, row in enumerate(found, 1))
