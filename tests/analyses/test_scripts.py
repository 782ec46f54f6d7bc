"""Every analysis script runs at scale `tiny` on a tiny model and gives the table it promises."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from steerlab import tables

ROOT = Path(__file__).resolve().parents[2]


def script(name: str) -> ModuleType:
    """The script as a module, with its folder importable as when it is run."""
    path = ROOT / "analyses" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_quickstart_seeds(tiny_folder: Path, tmp_path: Path) -> None:
    module = script("bias_only/quickstart_seeds")
    options = module.Options(tmp_path / "study", scale="tiny", seeds=2, model=str(tiny_folder))
    table = module.main(options)
    tables.check(table.drop(columns="cell"), "scores")
    cells = set(table["cell"].dropna())
    assert cells == {"rloo", "rloo-0", "rloo-1", *module.CONTROLS}
    assert {"base", "greedy", "few_shot", "few_shot_equation", "steered"} == set(table["condition"])
    assert set(table.query("cell == 'rloo'")["n_seeds"]) == {2}
    again = module.main(options)
    assert again.equals(table), "a finished study is read, not run again"


@pytest.mark.slow
def test_layer_and_rate(tiny_folder: Path, tmp_path: Path) -> None:
    module = script("bias_only/layer_and_rate")
    table = module.main(module.Options(tmp_path / "study", scale="tiny", model=str(tiny_folder)))
    assert set(table["cell"]) == {"layer_all-lr_0.01", "layer_1-lr_0.01"}
    assert table["signal_share"].between(0, 1).all()


@pytest.mark.slow
def test_harder_rungs(tiny_folder: Path, tmp_path: Path) -> None:
    module = script("bias_only/harder_rungs")
    table = module.main(module.Options(tmp_path / "study", scale="tiny", model=str(tiny_folder)))
    assert set(table["cell"]) == {"two_digits", "two_digits-random_reward"}


def test_batch_invariance(tiny_folder: Path, tmp_path: Path) -> None:
    module = script("benchmarks/batch_invariance")
    options = module.Options(tmp_path, scale="tiny", dtypes=("fp64",), splits=(3,), model=str(tiny_folder))
    (row,) = module.main(options)
    assert row["completions"] == row["tokens"] == 0
    assert row["logprob_gap_max_nats"] < 1e-9
    assert json.loads((tmp_path / "batch_invariance.json").read_text())["rows"] == [row]


def test_the_workload_is_what_it_says() -> None:
    module = script("benchmarks/workload")
    work = module.load()
    assert [len(group.tokens) for group in work.groups] == [60, 80, 100, 140]
    assert sum(work.lengths) == 1280 and min(work.lengths) >= 16 and max(work.lengths) <= 64
    assert all(len(set(group.rewards)) == 2 for group in work.groups)
