"""The house rules that a machine can hold: sizes, arrows, names, tools, and that the README tells the truth."""

from __future__ import annotations

import ast
import json
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*(ROOT / "steerlab").rglob("*.py"), *(ROOT / "analyses").rglob("*.py")])
FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "helper", "base", "types", "core", "misc"}
LAZY = ("transformer_lens", "nnsight", "sae_lens", "trl", "datasets", "reasoning_gym", "plotly", "ray", "streamlit")
MACHINE_PATH = re.compile(r"(?<![\w./])/(?:work|root|home/\w+|opt/venv[\w-]*|tmp/t)/")
MAX_LINES, MAX_FUNCTION_LINES, MAX_MEDIAN_LINES, MAX_BYTES = 400, 60, 160, 1_000_000


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def _passes(*command: str) -> None:
    done = _run(*command)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-2000:]}"


def _committed() -> list[Path]:
    """Files that are, or would be, committed. Where git cannot say (an unpacked archive): all that we write."""
    if shutil.which("git") and (ROOT / ".git").exists():
        listed = _run("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z").stdout.split("\0")
        return sorted(path for name in set(listed) - {""} if (path := ROOT / name).is_file())
    rooms = ("steerlab", "analyses", "notebooks", "dashboards", "tests", ".ci")
    return sorted(p for room in rooms for p in (ROOT / room).rglob("*") if p.is_file() and "__pycache__" not in p.parts)


def _functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_files_and_functions_stay_small() -> None:
    too_long = []
    for path in SOURCES:
        n_lines = len(path.read_text(encoding="utf-8").splitlines())
        if n_lines > MAX_LINES:
            too_long.append(f"{path.relative_to(ROOT)}: {n_lines} lines")
        for function in _functions(path):
            length = (function.end_lineno or function.lineno) - function.lineno + 1
            if length > MAX_FUNCTION_LINES:
                too_long.append(f"{path.relative_to(ROOT)}:{function.lineno} {function.name}: {length} lines")
    assert not too_long, "\n".join(too_long)


def test_the_median_module_is_short(record_property: pytest.RecordProperty) -> None:
    lengths = [len(p.read_text(encoding="utf-8").splitlines()) for p in SOURCES if p.name != "__init__.py"]
    median = statistics.median(lengths)
    record_property("median_module_lines", median)
    print(f"median module: {median:.0f} lines of {len(lengths)} modules")
    assert median <= MAX_MEDIAN_LINES


def test_every_module_says_what_it_is() -> None:
    silent = [
        p for p in SOURCES if p.read_text(encoding="utf-8").strip() and not ast.get_docstring(ast.parse(p.read_text()))
    ]
    assert not [str(p.relative_to(ROOT)) for p in silent]


def test_no_room_for_things_without_a_room() -> None:
    named = [p.relative_to(ROOT) for p in _committed() if p.suffix == ".py"]
    wrong = [str(p) for p in named if FORBIDDEN_NAMES & {part.removesuffix(".py") for part in p.parts}]
    assert not wrong


def test_arrows_point_one_way() -> None:
    _passes(sys.executable, "-c", "from importlinter.cli import lint_imports_command as lint; lint(['--no-cache'])")


def test_ruff_finds_nothing() -> None:
    _passes(sys.executable, "-m", "ruff", "check", "--no-cache", ".")


def test_ruff_would_format_nothing() -> None:
    _passes(sys.executable, "-m", "ruff", "format", "--check", "--no-cache", ".")


@pytest.mark.slow
def test_pyright_finds_nothing() -> None:
    _passes(sys.executable, "-m", "pyright", "--pythonpath", sys.executable)


def _plan(readme: str) -> set[str]:
    """Paths under steerlab/ that the README's floor plan lists; rooms end in a slash."""
    blocks = re.findall(r"^```\w*\n(steerlab/.*?)^```", readme, flags=re.MULTILINE | re.DOTALL)
    assert blocks, "README.md has no fenced block that begins with steerlab/"
    listed, rooms = set(), ["steerlab/"]
    for line in blocks[0].splitlines()[1:]:
        if line[:1].strip() and line[0] not in "├└│":
            break  # another root, such as analyses/
        found = re.match(r"((?:│   |    )*)(?:├── |└── )(\S+)", line)
        if found is None:
            continue  # a description that runs on
        depth = len(found[1]) // 4 + 1
        rooms = [*rooms[:depth], found[2]]
        listed.add("".join(rooms))
    return listed


def test_the_floor_plan_is_the_tree() -> None:
    """Every room is listed; a room that lists one file lists all (but `__init__.py`, which opens every room)."""
    listed = _plan((ROOT / "README.md").read_text(encoding="utf-8"))
    modules = [p.relative_to(ROOT) for p in (ROOT / "steerlab").rglob("*.py")]
    rooms = {f"{p.parent.as_posix()}/" for p in modules} - {"steerlab/"}
    files = {p.as_posix() for p in modules if p.name != "__init__.py" or p.parent.name == "steerlab"}
    opened = {f"{Path(name).parent.as_posix()}/" for name in listed if name.endswith(".py")}
    expected = rooms | {name for name in files if f"{Path(name).parent.as_posix()}/" in opened}
    assert listed - expected == set(), "listed, but not in the tree"
    assert expected - listed == set(), "in the tree, but not listed"


def test_ci_runs_the_command_of_the_readme() -> None:
    command = (ROOT / ".ci" / "run").read_text(encoding="utf-8").rstrip().splitlines()[-1]
    assert command in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_recipe_has_a_row_in_the_analyses() -> None:
    from steerlab.recipes import RECIPES

    lines = (ROOT / "analyses" / "README.md").read_text(encoding="utf-8").splitlines()
    rows = {cells[1].strip().strip("`") for line in lines if len(cells := line.split("|")) > 2}
    assert not set(RECIPES) - rows


def test_notebooks_are_stored_without_outputs() -> None:
    for path in (p for p in _committed() if p.suffix == ".ipynb"):
        cells = [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
        assert not any(cell["outputs"] or cell["execution_count"] for cell in cells), path


def test_nothing_committed_is_large_or_names_this_machine() -> None:
    wrong = []
    for path in _committed():
        content = path.read_bytes()
        if len(content) > MAX_BYTES:
            wrong.append(f"{path.relative_to(ROOT)}: {len(content):,} bytes")
        if b"\0" not in content[:8192] and (found := MACHINE_PATH.search(content.decode("utf-8"))):
            wrong.append(f"{path.relative_to(ROOT)}: names {found[0]}")
    assert not wrong, "\n".join(wrong)


def test_only_the_command_line_prints() -> None:
    printing = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in SOURCES
        if path.is_relative_to(ROOT / "steerlab") and path != ROOT / "steerlab" / "command_line" / "terminal.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not printing


def test_import_is_quick_and_leaves_heavy_packages_alone() -> None:
    """CPU seconds, so that a busy machine does not matter; torch and transformers are paid for beforehand."""
    code = (
        "import sys, time, torch, transformers\n"
        "start = time.process_time()\n"
        "import steerlab\n"
        f"print(time.process_time() - start, *[name for name in {LAZY!r} if name in sys.modules])"
    )
    done = _run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    seconds, *eager = done.stdout.split()
    assert not eager
    assert float(seconds) <= 3.0
