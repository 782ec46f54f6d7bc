"""The run folder.

    manifest.json  metrics.jsonl  rollouts.jsonl  checkpoint.safetensors  vectors.safetensors (or adapter/)
    tables/*.parquet  figures/*  report.html

The manifest holds the experiment (see `codec`), the environment and whatever the caller states. A checkpoint is ONE
safetensors file, tensors and JSON state together, so it is atomic; equal content gives equal bytes. Left out: locking
(two processes must not write one run). torch is imported only by checkpoints, pandas and pyarrow only by tables.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerlab.errors import UsageError
from steerlab.runs.codec import decode, encode
from steerlab.runs.files import atomic_path, atomic_write, is_temporary, storable, to_json
from steerlab.runs.log import RecordLog
from steerlab.runs.machine import environment

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

FORMAT = "steerlab run"
FORMAT_VERSION = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+@-]*\Z")


class Run:
    """One execution on disk. Made by `Run.create` or `Run.open`; nothing is kept in memory but the manifest."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        self._metrics = RecordLog(folder / "metrics.jsonl")
        self._rollouts = RecordLog(folder / "rollouts.jsonl")

    @classmethod
    def create(cls, folder: str | Path, experiment: Any = None, **manifest: Any) -> Run:
        """A new run, or the run that is already there if it has the same experiment.

        `manifest` are further entries (model, weights_sha256, seed, …), stored with `encode`; a reopened run keeps
        its own. Raises UsageError if the folder holds another experiment or anything else than a run.
        """
        folder = Path(folder)
        wanted = encode(experiment)
        if (folder / "manifest.json").exists():
            run = cls.open(folder)
            # a field that a later version added, left at its default, makes no other experiment
            if run.manifest.get("experiment") != wanted and encode(run.experiment) != wanted:
                raise UsageError(
                    f"{folder} already holds a run of another configuration; choose another folder or remove this one"
                )
            return run
        if folder.is_file() or (folder.is_dir() and any(not is_temporary(p) for p in folder.iterdir())):
            raise UsageError(f"{folder} exists and is not a run; choose a new or empty folder")
        entries = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "environment": environment(),
            **encode(manifest),
            "experiment": wanted,
        }
        run = cls(folder, entries)
        run.update()
        return run

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """The run in this folder. Raises UsageError if there is none or its manifest cannot be read."""
        folder = Path(folder)
        try:
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UsageError(f"{folder} is not a run (no manifest.json); give a folder that steerlab wrote") from error
        except (OSError, ValueError) as error:
            raise UsageError(f"the manifest of {folder} cannot be read ({error}); restore it or start anew") from error
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise UsageError(f"{folder} is not a steerlab run; give a folder that steerlab wrote")
        if manifest.get("format_version") != FORMAT_VERSION:
            raise UsageError(
                f"{folder} was written in run format {manifest.get('format_version')}, this steerlab reads "
                f"{FORMAT_VERSION}; use the version named in its manifest"
            )
        return cls(folder, manifest)

    @property
    def experiment(self) -> Any:
        """The experiment, rebuilt. Raises UsageError if this version of steerlab does not know its parts."""
        return decode(self.manifest.get("experiment"))

    @property
    def vectors_path(self) -> Path:
        return self.folder / "vectors.safetensors"

    def path(self, name: str) -> Path:
        """Path of a file in the run folder. Raises UsageError for a name that leaves it."""
        return self.folder / _checked(name)

    def update(self, **manifest: Any) -> None:
        """Sets entries of the manifest and writes it (atomic)."""
        self.manifest = {**self.manifest, **encode(manifest)}
        atomic_write(self.folder / "manifest.json", to_json(self.manifest))

    def log(self, record: Mapping[str, Any]) -> None:
        """Appends one record to metrics.jsonl; on disk when this returns. NaN and infinities are stored as null."""
        self._metrics.append([record])

    def log_rollouts(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Appends what was sampled in a step to rollouts.jsonl: one record per completion."""
        self._rollouts.append(records)

    def metrics(self) -> pd.DataFrame:
        """metrics.jsonl as a table, one row per record; a line torn by a kill is not a record."""
        import pandas as pd

        return pd.DataFrame(self._metrics.records())

    def rollouts(self) -> pd.DataFrame:
        """rollouts.jsonl as a table, one row per training completion."""
        import pandas as pd

        return pd.DataFrame(self._rollouts.records())

    def truncate(self, step: int) -> None:
        """Drops the records with `record["step"] >= step` (they will be made again by a resume); atomic."""
        self._metrics.truncate(step)
        self._rollouts.truncate(step)

    def save_table(self, name: str, df: pd.DataFrame) -> Path:
        """Writes tables/{name}.parquet without the index; equal frames give equal bytes. Atomic."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = self.folder / "tables" / f"{_checked(name)}.parquet"
        try:
            table = pa.Table.from_pandas(df, preserve_index=False)
        except UnicodeEncodeError:
            mended = df.map(lambda value: storable(value) if isinstance(value, str) else value)
            table = pa.Table.from_pandas(mended, preserve_index=False)
        with atomic_path(path) as temporary:
            pq.write_table(table, temporary, compression="zstd")
        return path

    def table(self, name: str) -> pd.DataFrame:
        """A saved table. Raises UsageError if it is missing (the tables that exist are named) or damaged."""
        import pandas as pd
        import pyarrow as pa

        path = self.folder / "tables" / f"{_checked(name)}.parquet"
        if not path.exists():
            there = ", ".join(self.tables()) or "none yet"
            raise UsageError(f"{self.folder} has no table {name!r} (tables: {there}); run the command that writes it")
        try:
            return pd.read_parquet(path, engine="pyarrow")
        except (OSError, pa.ArrowException) as error:
            raise UsageError(f"{path} is damaged; remove it and write it again") from error

    def tables(self) -> list[str]:
        return sorted(path.stem for path in (self.folder / "tables").glob("[!.]*.parquet"))

    def save_figure(self, name: str, figure: go.Figure) -> Path:
        """Writes figures/{name}.json and a page figures/{name}.html; the pages share one figures/plotly.min.js."""
        from plotly.offline import get_plotlyjs

        folder = self.folder / "figures"
        path = folder / f"{_checked(name)}.json"
        atomic_write(path, figure.to_json() or "{}")
        library = folder / "plotly.min.js"
        if not library.exists():
            atomic_write(library, get_plotlyjs())
        page = figure.to_html(include_plotlyjs="directory", div_id=f"figure-{name}", full_html=True)
        atomic_write(path.with_suffix(".html"), page)
        return path

    def save_graph(self, name: str, graph: Mapping[str, Any]) -> Path:
        """Writes graphs/{name}.json, nodes and links for another tool's viewer. Atomic."""
        path = self.folder / "graphs" / f"{_checked(name)}.json"
        atomic_write(path, json.dumps(graph, indent=1, allow_nan=False))
        return path

    def figure(self, name: str) -> go.Figure:
        """A saved figure. Raises UsageError if it is missing; the figures that exist are named."""
        import plotly.io as pio

        path = self.folder / "figures" / f"{_checked(name)}.json"
        if not path.exists():
            there = ", ".join(self.figures()) or "none yet"
            raise UsageError(f"{self.folder} has no figure {name!r} (figures: {there}); run the command that draws it")
        return pio.from_json(path.read_text(encoding="utf-8"))

    def figures(self) -> list[str]:
        return sorted(path.stem for path in (self.folder / "figures").glob("[!.]*.json"))

    def save_checkpoint(self, step: int, tensors: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """Writes torch tensors and JSON-able state as checkpoint.safetensors, atomically, replacing the last one.

        `step` is the next step to run. Equal content gives equal bytes: one metadata entry with sorted keys, because
        the order of several is not fixed by the safetensors writer.
        """
        from safetensors.torch import save

        ready = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in sorted(tensors.items())}
        note = {"step": step, "state": encode(state), "sha256": tensors_sha256(ready), "format_version": FORMAT_VERSION}
        text = json.dumps(note, sort_keys=True, allow_nan=False)
        atomic_write(self.folder / "checkpoint.safetensors", save(ready, metadata={"steerlab": text}))

    def load_checkpoint(self) -> tuple[int, dict[str, Any], Any] | None:
        """(next step, tensors, state) of the last checkpoint, or None. Raises UsageError if the file is damaged."""
        from safetensors import SafetensorError, safe_open

        path = self.folder / "checkpoint.safetensors"
        if not path.exists():
            return None
        damaged = UsageError(f"{path} is damaged; restore it from a copy, or remove it to start the run anew")
        try:
            with safe_open(path, framework="pt") as file:
                note = json.loads((file.metadata() or {})["steerlab"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise damaged from error
        if note.get("sha256") != tensors_sha256(tensors):
            raise damaged
        return note["step"], tensors, decode(note["state"])


class RunStore:
    """The runs directly inside one folder."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def runs(self) -> list[Run]:
        """All runs, by folder name; folders that are not runs are passed over."""
        return [Run.open(path.parent) for path in sorted(self.root.glob("*/manifest.json")) if _is_run(path)]

    def __iter__(self) -> Iterator[Run]:
        return iter(self.runs())

    def run(self, name: str) -> Run:
        """The run in the subfolder `name`. Raises UsageError if there is none."""
        return Run.open(self.root / _checked(name))


def tensors_sha256(tensors: Mapping[str, Any]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of torch tensors, in the order of their names."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _is_run(manifest: Path) -> bool:
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT


def _checked(name: str) -> str:
    if not _NAME.match(name):
        raise UsageError(f"{name!r} cannot be a file name in a run; use letters, digits and . _ + @ -")
    return name
