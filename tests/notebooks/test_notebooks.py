"""Every notebook runs from a clean kernel, on a tiny model, and is stored as it was written: no outputs, no traces of a
machine, no long functions."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FIRST = 'MODEL = os.environ.get("STEERLAB_NOTEBOOK_MODEL", "smollm2-135m")'
PLACE = re.compile(r"(?<![\w./])/(?:home|root|Users|tmp|work|opt|mnt|var)/|[A-Z]:\\\\")
FIGURE = "application/vnd.plotly.v1+json"
LONGEST_FUNCTION = 10
DRAWS = re.compile(r"\bfigure\(|\.figures?[\[(]|\bplot_\w+(?:\.\w+)?\(")

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path, kind: str = "code") -> list[dict[str, Any]]:
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def test_there_are_notebooks() -> None:
    assert [path.stem[:3] for path in NOTEBOOKS] == [f"{i:02d}_" for i in range(1, len(NOTEBOOKS) + 1)]


@each
def test_it_is_stored_as_it_was_written(path: Path) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    assert not any(cell["outputs"] or cell["execution_count"] is not None for cell in cells(path))
    assert not any(set(cell["metadata"]) - {"tags"} for cell in content["cells"]), "a viewer left something behind"
    assert set(content["metadata"]) == {"kernelspec", "language_info"}
    assert not PLACE.search(path.read_text(encoding="utf-8"))


@each
def test_its_first_cell_names_the_model(path: Path) -> None:
    assert FIRST in source(cells(path)[0]).splitlines()


@each
def test_it_is_easy_to_read(path: Path) -> None:
    """Short functions; a cell that draws ends in its figure; the text says what one sees and what would surprise."""
    for cell in cells(path):
        tree = ast.parse(source(cell))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno is not None and node.end_lineno - node.lineno < LONGEST_FUNCTION, node.name
        if DRAWS.search(source(cell)):
            assert isinstance(tree.body[-1], ast.Expr), f"does not end in a figure:\n{source(cell)}"
    told = "\n".join(source(cell) for cell in cells(path, "markdown"))
    assert told.count("What one sees.") >= 2 and told.count("A surprise would be") >= 2


@each
@pytest.mark.slow
def test_it_runs_from_a_clean_kernel(path: Path, tiny_folder: Path, tmp_path: Path) -> None:
    done = execute(path, tmp_path, tiny_folder)
    drawing = [cell for cell in done if DRAWS.search(source(cell))]
    assert drawing, "a notebook without a figure"
    for cell in drawing:
        assert any(FIGURE in output.get("data", {}) for output in cell["outputs"]), source(cell)


def execute(path: Path, folder: Path, model: Path) -> list[dict[str, Any]]:
    """The code cells after running, with what they gave. The kernel works in `folder` and keeps its own files there."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "STEERLAB_NOTEBOOK_MODEL": str(model),
        "STEERLAB_NOTEBOOK_RUN": "",
        "OMP_NUM_THREADS": "1",
        "IPYTHONDIR": str(folder),
        "JUPYTER_RUNTIME_DIR": str(folder),
        "JUPYTER_CONFIG_DIR": str(folder),
        "TMPDIR": str(folder),
    }
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("in_a_kernel.py")), str(path), str(folder / path.name)],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    return cells(folder / path.name)
