"""Every analysis script runs at scale `tiny` on a tiny model and gives the table it promises."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pytest
import torch

import steerlab
from steerlab import tables
from steerlab.rollouts import Policy, Rows, Sampling
from steerlab.runs import Run

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


@pytest.fixture(scope="module", autouse=True)
def warm(tiny_folder: Path) -> None:
    """What a machine or a process pays for once, whichever script comes first: kernels are compiled and kept on disk
    (about 15 s), reasoning-gym's worker starts, packages are imported."""
    from steerlab import compare, execute, sweep  # noqa: F401
    from steerlab.report import from_run  # noqa: F401

    steerlab.make_task("chain_sum").problems("train")
    for dtype in (torch.float32, torch.float64):
        model = steerlab.load_model(str(tiny_folder), dtype=dtype)
        model.tune()
        Policy(model, None).sample([[40, 41]], Rows.grid([0], 2), Sampling(max_new_tokens=2), seed=0)


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the benchmarks, importable and with nothing of it left behind."""
    folder = ROOT / "analyses" / "benchmarks"
    names = {path.stem for path in folder.glob("*.py")}
    monkeypatch.syspath_prepend(str(folder))
    threads = torch.get_num_threads()
    yield folder
    torch.set_num_threads(threads)
    for name in names:
        sys.modules.pop(name, None)


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


@pytest.fixture(scope="module")
def small_vectors(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What every script of that folder is given. The bank that all of them read is trained here, six runs."""
    folder = str(ROOT / "analyses" / "small_vectors")
    sys.path.insert(0, folder)
    given = {"out": tmp_path_factory.mktemp("small_vectors"), "scale": "tiny", "model": str(tiny_folder)}
    bank = importlib.import_module("bank")
    bank.trained(bank.Options(**given))
    yield given
    sys.path.remove(folder)
    sys.modules.pop("bank", None)


@pytest.mark.slow
def test_layer_curve(small_vectors: dict[str, Any]) -> None:
    module = script("small_vectors/layer_curve")
    table = module.main(module.Options(**small_vectors))
    tables.check(table, "gradient_energy")
    assert list(table["layer"]) == [0, 1]
    assert table["least"].le(table["most"]).all()


@pytest.mark.slow
def test_last_layer(small_vectors: dict[str, Any]) -> None:
    module = script("small_vectors/last_layer")
    table = module.main(module.Options(**small_vectors))
    tables.check(table, "substitution")
    assert set(table["n_seeds"]) == {2}
    assert len(table) == 14


@pytest.mark.slow
def test_persistence(small_vectors: dict[str, Any]) -> None:
    module = script("small_vectors/persistence")
    table = module.main(module.Options(**small_vectors))
    assert set(table["condition"]) == {"trained", "random"}
    assert table["value"].between(-1, 1).all()


@pytest.mark.slow
def test_adaptive(small_vectors: dict[str, Any]) -> None:
    module = script("small_vectors/adaptive")
    table = module.main(module.Options(**small_vectors))
    assert set(table["condition"]) == {"trained", "random_reward"}
    assert table.groupby("condition")["magnitude_share"].sum().round(6).eq(1).all()


@pytest.mark.slow
def test_steering_at_place(small_vectors: dict[str, Any]) -> None:
    module = script("small_vectors/steering_at_place")
    options = module.Options(**small_vectors, sites=("ln2",), norm_rates=("scaled", "same"))
    table = module.main(options)
    tables.check(table, "steering_at_place")
    assert list(table["site"]) == ["ln2", "ln2", "resid_post", "resid_post"]
    assert list(table["condition"]) == ["trained"] * 3 + ["random_reward"] and list(table["n_seeds"]) == [2] * 3 + [1]
    assert list(table["rate"]) == ["scaled", "same", "same", "same"]
    assert table["lr"].to_numpy() == pytest.approx([table["lr"][0], 0.1, 0.1, 0.1]) and table["lr"][0] != 0.1
    own = (table["site"] == "resid_post") & (table["condition"] == "trained")
    assert (table["difference"].isna() == own).all()
    assert table["dose"].gt(0).any() and table["least"].le(table["most"]).all()
    assert (small_vectors["out"] / "steering_at_place" / "figures" / "steering_at_place.html").exists()
    assert module.main(options).equals(table), "a finished study is read, not run again"


@pytest.mark.slow
def test_diff_sae(small_vectors: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    module = script("small_vectors/diff_sae")
    again = module.main(module.Options(**small_vectors))
    assert set(again["labels"]) == {"as they are", "shuffled"} and set(again["seed"]) == {0, 1}
    run = Run.open(small_vectors["out"] / "diff_sae" / "found")
    assert {"sae_quality", "latent_correctness", "latent_replication", "correctness_probes"} == set(run.tables())
    assert re.search(r"layer 1: (supported|open|refuted)", capsys.readouterr().out)
    found = again.assign(replicated=1.0, most=0.2)
    assert module.verdict(found) == "supported" and module.verdict(found.assign(replicated=0.1)) == "refuted"
    assert module.verdict(found.assign(replicated=[1.0, 1.0, 0.1, 0.1])) == "open"


@pytest.mark.slow
def test_edges(small_vectors: dict[str, Any]) -> None:
    module = script("small_vectors/edges")
    table = module.main(module.Options(**small_vectors))
    assert set(table["of"]) == {"heads", "edges"} and set(table["seed"]) == {0, 1}
    assert set(table["estimate"]) == {"0 steps", "5 steps", "another vector"}
    assert min(table["error"]) >= 0 and max(table["error"]) < math.inf
    assert (small_vectors["out"] / "edges" / "tables" / "agreement.parquet").exists()


@pytest.mark.slow
def test_patching(small_vectors: dict[str, Any]) -> None:
    module = script("small_vectors/patching")
    table = module.main(module.Options(**small_vectors))
    tables.check(table, "patching")
    assert set(table["metric"]) == {"kl_nats", "logit_diff", "avg@1"} and set(table["n_seeds"]) == {2}
    assert {"skip_head", "steer_head", "line"} == set(table["family"])
    assert (small_vectors["out"] / "patching-0" / "figures" / "patching_avg.html").exists()


@pytest.mark.slow
def test_composition(small_vectors: dict[str, Any]) -> None:
    module = script("small_vectors/composition")
    table = module.main(module.Options(**small_vectors))
    tables.check(table, "composition")
    assert set(table["condition"]) == {"trained", "random"} and set(table["n_seeds"]) == {2}
    assert (small_vectors["out"] / "composition" / "figures" / "composition_gain.html").exists()


@pytest.mark.slow
def test_transfer(small_vectors: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    module = script("small_vectors/transfer")
    table = module.main(module.Options(**small_vectors))
    tables.check(table, "transfer")
    assert set(table["recipient"]) == {"one digit", "plain"} and len(table) == 2 * (2 + 2 * 3)
    assert "second family: left out" in capsys.readouterr().out
    assert (small_vectors["out"] / "transfer" / "figures" / "transfer_value.html").exists()


@pytest.mark.slow
def test_directions(small_vectors: dict[str, Any]) -> None:
    module = script("small_vectors/directions")
    table = module.main(module.Options(**small_vectors))
    assert list(dict.fromkeys(table["other"])) == ["mean_difference", "pca", "linear_probe", "random"]
    assert set(table["comparison"]) == {"equal length", "best scale", "equal KL"} and len(table) == 12
    known = table.dropna(subset=["value"])
    assert (known["low"] <= known["value"]).all() and (known["value"] <= known["high"]).all() and len(known) >= 8
    run = Run.open(small_vectors["out"] / "directions")
    assert {"comparison", "directions", "magnitudes", "at_equal_kl"} == set(run.tables())
    for name in ("directions", "magnitudes", "at_equal_kl"):
        tables.check(run.table(name), name)


@pytest.mark.slow
def test_languages(small_vectors: dict[str, Any]) -> None:
    """The tiny vocabulary has no English words, so the verdict is tried on numbers made up."""
    module = script("small_vectors/languages")
    table = module.main(module.Options(**small_vectors))
    assert table.empty and list(table.columns) == module.COLUMNS
    assert {"languages", "language_gaps"} <= set(Run.open(small_vectors["out"] / "languages-0").tables())
    row = {"from_layer": 0, "to_layer": 2, "readout": "logprob", "n_english": 9, "n_other": 9}
    gaps = [
        row | {"condition": "trained", "value": -1.0, "low": -1.2, "high": -0.8},
        row | {"condition": "random", "value": 0.0, "low_draws": -0.1, "high_draws": 0.1},
    ]
    last = [gap | {"from_layer": 3, "to_layer": 3} for gap in (gaps[0] | {"value": -0.1}, gaps[1])]
    found = module.told(pd.DataFrame(gaps + last), 0, 3)
    assert [(r["layers"], r["verdict"]) for r in found] == [("0-2", "supported"), ("3-3", "control")]
    wide = [gaps[0], gaps[1] | {"low_draws": -1.5}]
    assert module.told(pd.DataFrame(wide + last), 0, 3)[0]["verdict"] == "refuted"


@pytest.mark.slow
def test_geometry(small_vectors: dict[str, Any]) -> None:
    module = script("small_vectors/geometry")
    table = module.main(module.bank.Options(**small_vectors))
    assert table.groupby("trained")["layer"].agg(list).to_dict() == {"alone": [0, 1], "together": [0, 1, 2, 3]}
    assert set(table["verdict"]) <= {"supported", "refuted", "no direction"} and set(table["pairs"]) <= {0, 1}
    assert ((table["pairs"] == 0) == (table["verdict"] == "no direction")).all()
    assert "relative_dose" in Run.open(small_vectors["out"] / "geometry-alone").tables()


def test_batch_invariance(benchmarks: Path, tiny_folder: Path, tmp_path: Path) -> None:
    module = script("benchmarks/batch_invariance")
    options = module.Options(tmp_path, scale="tiny", dtypes=("fp64",), splits=(3,), model=str(tiny_folder))
    (row,) = module.main(options)
    assert row["completions"] == row["tokens"] == 0
    assert row["logprob_gap_max_nats"] < 1e-9
    assert json.loads((tmp_path / "batch_invariance.json").read_text())["rows"] == [row]


@pytest.mark.slow
def test_readouts(benchmarks: Path, tmp_path: Path) -> None:
    """In a process of its own: TransformerLens patches globals."""
    call = [sys.executable, str(benchmarks / "readouts.py"), "--scale", "tiny", "--repeats", "1", "--threads", "1"]
    subprocess.run([*call, "--out", str(tmp_path)], check=True, capture_output=True, text=True)
    rows = json.loads((tmp_path / "readouts.json").read_text())["rows"]
    assert [row["case"] for row in rows] == ["lens", "persistence, own texts", "persistence, shared text"]
    assert all(row["ours"] > 0 and row["rival"] > 0 for row in rows)


@pytest.mark.slow
def test_saes(benchmarks: Path, tmp_path: Path) -> None:
    """In a process of its own: sae-lens needs TransformerLens, which patches globals."""
    call = [sys.executable, str(benchmarks / "saes.py"), "--scale", "tiny", "--repeats", "1", "--threads", "1"]
    more = ["--dtypes", "fp32", "--steps", "3", "--tokens", "64", "--out", str(tmp_path)]
    subprocess.run([*call, *more], check=True, capture_output=True, text=True)
    rows = json.loads((tmp_path / "saes.json").read_text())["rows"]
    names = ["stream in memory", "stream on disk", "training, 512 latents", "quality after 64 tokens"]
    assert [row["case"] for row in rows] == names
    assert all(row["ours"] > 0 and row["rival"] > 0 for row in rows[:3])
    assert rows[3]["n_loss_tokens"] > 0 and rows[3]["d_sae"] == 512


def test_the_workload_is_what_it_says() -> None:
    module = script("benchmarks/workload")
    work = module.load()
    assert [len(group.tokens) for group in work.groups] == [60, 80, 100, 140]
    assert sum(work.lengths) == 1280 and min(work.lengths) >= 16 and max(work.lengths) <= 64
    assert all(len(set(group.rewards)) == 2 for group in work.groups)


def test_sizes_of_the_workload_are_what_they_say() -> None:
    work = script("benchmarks/workload").load()
    assert sum(work.alive()) == sum(work.lengths) and work.alive()[0] == 32 and work.prompt_tokens == 380
    assert sum(work.with_prompts(8).lengths) == sum(work.with_samples(16).lengths) == 2560
    assert [len(tokens) for tokens in work.with_prompt_tokens(8).prompts] == [8] * 4
    assert set(work.with_lengths(48).lengths) == {48}


@pytest.mark.parametrize("name", ["exchange", "layers", "limit", "rl_step", "rollout", "scaling"])
def test_benchmarks_explain_themselves(
    benchmarks: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(benchmarks / f"{name}.py"), run_name="__main__")
    assert ended.value.code == 0
    assert "--repeats" in capsys.readouterr().out


@pytest.mark.slow
def test_the_rival_explains_itself(benchmarks: Path) -> None:
    done = subprocess.run([sys.executable, "trl_baseline.py", "--help"], cwd=benchmarks, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--micro-batch" in done.stdout


def test_limit(benchmarks: Path, tmp_path: Path) -> None:
    module = script("benchmarks/limit")
    rows = module.main(module.Options(tmp_path, scale="tiny", dtypes=("fp32",), repeats=1, threads=1))
    assert [row["case"] for row in rows] == ["all", "middle", "last"]
    assert json.loads((tmp_path / "limit.json").read_text())["rows"] == json.loads(json.dumps(rows))
    per_block, head = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64), 2 * 32 * 261
    # Prompts of 3 and 5 tokens, completions of 2, 4, 3 and 4: 17 fed tokens in the update, 9 of them in decoding.
    expected = 8 * 4 * per_block + 9 * 4 * per_block + 13 * head
    parts = [row["gflop_by_part"] for row in rows]
    assert [1e9 * (part["prefill"] + part["decode"]) for part in parts] == pytest.approx([expected] * 3)
    assert [1e9 * part["update"] for part in parts] == pytest.approx(
        [2 * 17 * n * per_block + 13 * head for n in (3, 1, 0)]
    )


def test_rl_step(benchmarks: Path) -> None:
    """steerlab's side; the rival needs the real model and half a minute."""
    module, workload = script("benchmarks/rl_step"), sys.modules["workload"]
    model, work = workload.subject("tiny", "fp32")
    step = module.make_step(model, work, (2,))
    first, second = step(), step()
    assert first.completion_tokens == second.completion_tokens == 13 and first.prompt_tokens == 8
    assert first.update_peak_bytes >= first.update_base_bytes > 0 == second.update_base_bytes
    assert first.wall_s == pytest.approx(first.rollout_s + first.update_s)


def test_rollout(benchmarks: Path, tmp_path: Path) -> None:
    module = script("benchmarks/rollout")
    rows = module.main(module.Options(tmp_path, scale="tiny", dtypes=("fp32",), repeats=1, threads=1))
    assert [row["case"] for row in rows] == ["ragged", "decode"]
    assert all(row["ratio"] > 0 and row["spread"][0] == row["spread"][1] == row["ratio"] for row in rows)
    assert json.loads((tmp_path / "rollout.json").read_text())["rows"] == rows


def test_scaling(benchmarks: Path, tmp_path: Path) -> None:
    module = script("benchmarks/scaling")
    sizes = {"rows": (4, 8), "tokens": (3, 6), "cases": ("samples", "group", "tokens")}
    rows = module.main(module.Options(tmp_path, scale="tiny", dtypes=("fp32",), repeats=1, threads=1, **sizes))
    assert [row["completion_tokens"] for row in rows] == [[13, 26], [13, 26], [12, 24]]
    assert [row["prompt_tokens"] for row in rows] == [[8, 16], [8, 8], [8, 8]]
    assert rows[0]["flop_slope"] == pytest.approx(1) and rows[1]["flop_slope"] < 1
    assert [row["holds"] for row in rows] == [0.9 <= rows[0]["slope"] <= 1.05, None, 0.9 <= rows[2]["slope"] <= 1.05]
    assert all(math.isfinite(row["slope"]) for row in rows) and (tmp_path / "scaling.json").exists()


def test_layers(benchmarks: Path, tmp_path: Path) -> None:
    module = script("benchmarks/layers")
    rows = module.main(module.Options(tmp_path, scale="tiny", dtypes=("fp32",), layers=(0, 3, 9), repeats=1, threads=1))
    assert [row["case"] for row in rows] == ["all", "layer 0", "layer 3"]  # a tiny model has no layer 9
    assert rows[0]["ratio"] == rows[0]["share_of_all"] == 1 and rows[2]["predicted"] < rows[1]["predicted"] == 1
    assert rows[0]["verdict"] is None and rows[1]["verdict"] == module.verdict(rows[1]["step_ratio"])
    assert rows[2]["ratio"] == pytest.approx(rows[2]["share_of_all"] / rows[2]["predicted"])
    assert [module.verdict(ratio) for ratio in (0.84, 0.86, 0.91, 1.09, 1.14, 1.16)] == [
        *("missed", "must met", "aim met"),
        *("aim met", "must met", "missed"),
    ]
    # DESIGN §7: one middle layer and the last of SmolLM2, h = 0.27.
    assert module.update_in_f(30, 14, 0.265) == pytest.approx(1.53)
    assert module.update_in_f(30, 29, 0.265) == pytest.approx(0.53)


@pytest.mark.slow
def test_exchange(benchmarks: Path, tmp_path: Path) -> None:
    module = script("benchmarks/exchange")
    (row,) = module.main(module.Options(tmp_path, scale="tiny", dtypes=("fp32",), repeats=1, threads=1))
    assert row["exchanged_bytes"] == 4 * 32 * 4 and row["bound_bytes"] == 2 * 4 * 32 * 4
    assert (tmp_path / "exchange.json").exists()
