"""The command line as a person meets it: mistakes are one line, runs are whole folders, a killed run ends the same."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from steerlab import held_out
from steerlab.__main__ import COMMANDS, main
from steerlab.adapters import SteeringVectors, formats
from steerlab.models import Site, tiny
from steerlab.runs import Run, tensors_sha256
from steerlab.training.sources import RolloutSource

ROOT = Path(__file__).resolve().parents[1]
Words = list[str]


@dataclasses.dataclass(frozen=True)
class Said:
    """What a command left behind."""

    code: int
    out: str
    err: str


Sl = Callable[..., Said]


@pytest.fixture
def sl(capsys: pytest.CaptureFixture[str]) -> Sl:
    """Runs the command line in this process."""

    def run(*words: str | Path) -> Said:
        capsys.readouterr()
        code = main([str(word) for word in words])
        return Said(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data file: judging it starts no worker process."""
    path = tmp_path_factory.mktemp("data") / "sums.csv"
    path.write_text("\n".join(["question,answer", *(f"{a}+{b}=,{a + b}" for a in range(5) for b in range(8))]))
    return path


@pytest.fixture
def recipe(tiny_folder: Path, sums: Path) -> Words:
    """`train` words for a run of a second; random rewards, because a random model is never right."""
    options = ["control=random_reward", "train=30", "test=4"]
    return [
        *("train", "rloo", "--task", str(sums), *(w for o in options for w in ("--task-option", o))),
        *("--model", str(tiny_folder), "--dtype", "fp32", "--steps", "3", "--prompts", "3", "--samples", "3"),
        *("--max-new-tokens", "4"),
    ]  # fmt: skip


def refused(said: Said, *parts: str, code: int = 2) -> None:
    """One line on stderr with these parts."""
    assert said.code == code, said
    assert said.err.count("\n") == 1, said.err
    assert said.err.startswith("steerlab: ")
    for part in parts:
        assert part in said.err


# ---- help


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_a_help_page(sl: Sl, name: str) -> None:
    said = sl(name, "--help")
    assert said.code == 0
    assert said.out.startswith(f"usage: steerlab {name}")
    assert len(said.out.splitlines()) > 5


def test_the_overview_has_every_command_in_one_sentence(sl: Sl) -> None:
    said = sl()
    assert said.code == 0
    for name in COMMANDS:
        assert any(line.split()[:1] == [name] and line.endswith(".") for line in said.out.splitlines()), name


def test_every_recipe_explains_its_options(sl: Sl) -> None:
    for line in sl("recipes").out.splitlines():
        page = sl("train", line.split()[0], "--help")
        assert page.code == 0
        assert "--model" in page.out
        assert "--plan" in page.out


def test_the_lists_name_what_there_is(sl: Sl) -> None:
    assert "rloo" in sl("recipes").out
    assert "smollm2-135m" in sl("models").out
    assert "chain_sum" in sl("tasks").out


# ---- mistakes


def test_unknown_names_offer_the_nearest(sl: Sl, recipe: Words, tmp_path: Path) -> None:
    refused(sl("trian"), "did you mean train")
    refused(sl("train", "rlo"), "did you mean rloo?")
    refused(sl("train", "rloo", "--task", "chain_sm"), "chain_sum")
    refused(sl(*recipe, "--stepz", "3"), "--steps")
    refused(sl("eval", "--modle", "x"), "--model")
    refused(sl("train", "rloo", "--task", "chain_sum", "--task-option", "max_digit=2"), "max_digits")
    refused(sl(*recipe[:4], "--model", "smolm2-135m", "--out", tmp_path / "x"), "did you mean smollm2-135m?")
    refused(sl(*recipe, "--site", "resid_pots", "--out", tmp_path / "x"), "resid_post")
    refused(sl(*recipe, "--dtype", "fp3", "--out", tmp_path / "x"), "fp32")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--steps", "abc"], "--steps"),
        (["--steps", "0"], "steps is 0"),
        (["--lr", "-1"], "learning rate"),
        (["--prompts", "0"], "prompts is 0"),
        (["--samples", "1"], "at least 2 samples"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--max-new-tokens", "600"], "context"),
        (["--layers", "0", "9"], "layers 0 to 3"),
        (["--advantage", "none"], "group_mean"),
        (["--task-option", "train"], "KEY=VALUE"),
        (["--task-option", "train=2000"], "given twice"),
        (["--task-option", "shots=30"], "31 train problems"),
        (["surplus"], "surplus"),
    ],
)
def test_bad_values_leave_nothing_behind(sl: Sl, recipe: Words, tmp_path: Path, words: Words, part: str) -> None:
    folder = tmp_path / "run"
    refused(sl(*recipe, "--out", folder, *words), part)
    assert not folder.exists()


def test_a_missing_option_is_named(sl: Sl) -> None:
    refused(sl("train", "rloo"), "--task")
    refused(sl("generate", "somewhere"), "--prompt")
    refused(sl("resume"), "FOLDER")


def test_a_folder_that_is_no_run(sl: Sl, recipe: Words, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for words in (["resume"], ["report"], ["lens"], ["eval"], ["generate", "--prompt", "x"]):
        refused(sl(words[0], tmp_path, *words[1:]), "is not a run")
    refused(sl(*recipe, "--out", tmp_path), "is not a run")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("parent", ["file", "proc"])
def test_a_folder_that_cannot_be_written(sl: Sl, recipe: Words, tmp_path: Path, parent: str) -> None:
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "run" if parent == "file" else Path("/proc/steerlab-run")
    refused(sl(*recipe, "--out", folder), "cannot write")


def test_a_full_disk_at_the_start_leaves_nothing(
    sl: Sl, recipe: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", full_disk)
    refused(sl(*recipe, "--out", tmp_path / "run"), "disk is full")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_on_the_way_can_be_resumed(
    sl: Sl, recipe: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = RolloutSource.next

    def filling(self: RolloutSource, step: int) -> object:
        if step == 2:
            monkeypatch.setattr(os, "fsync", full_disk)
        return drawn(self, step)

    with monkeypatch.context():
        monkeypatch.setattr(RolloutSource, "next", filling)
        refused(sl(*recipe, "--out", tmp_path / "run"), "disk is full")
    monkeypatch.undo()
    assert not list((tmp_path / "run").rglob(".*"))
    assert sl("resume", tmp_path / "run").code == 0
    assert list(Run.open(tmp_path / "run").metrics()["step"]) == [0, 1, 2]


def full_disk(_: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_run_that_cannot_go_on_is_exit_code_one(
    sl: Sl, recipe: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = RolloutSource.next

    def spoilt(self: RolloutSource, step: int) -> object:
        found = drawn(self, step)
        if step == 1:
            found.batch.rewards[0] = float("nan")
        return found

    monkeypatch.setattr(RolloutSource, "next", spoilt)
    refused(sl(*recipe, "--out", tmp_path / "run"), "step 1", code=1)


def test_no_other_weights_unless_allowed(sl: Sl, tiny_folder: Path, tmp_path: Path) -> None:
    vectors = SteeringVectors({Site("resid_post", 1): torch.ones(32)})
    origin = formats.Provenance("other", "0" * 64, "0" * 64, 32, 4, "pre")
    formats.save(tmp_path / "v.safetensors", vectors, origin)
    words = ("lens", tmp_path / "v.safetensors", "--model", tiny_folder)
    refused(sl(*words), "--allow-other-weights")
    assert sl(*words, "--allow-other-weights").code == 0


# ---- a run, whole


@pytest.fixture(scope="module")
def quick(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's run on the tiny model."""
    folder = tmp_path_factory.mktemp("runs") / "quick"
    assert main(["quickstart", "--scale", "tiny", "--model", str(tiny_folder), "--out", str(folder)]) == 0
    return folder


def test_the_quickstart_makes_all_files(quick: Path) -> None:
    names = {path.relative_to(quick).as_posix() for path in quick.rglob("*") if path.is_file()}
    tables = ("scores", "completions", "curve", "norms", "cosines", "logit_lens")
    assert names >= {
        "manifest.json", "metrics.jsonl", "vectors.safetensors", "report.html",
        *(f"tables/{name}.parquet" for name in tables), "figures/scores.html", "figures/learning_curve.html",
    }  # fmt: skip
    assert not [name for name in names if Path(name).name.startswith(".")]
    assert json.loads((quick / "manifest.json").read_text())["status"] == "done"
    assert {"base", "steered", "greedy", "few_shot"} <= set(Run.open(quick).table("scores")["condition"])


def test_the_quickstart_again_only_shows_the_run(sl: Sl, quick: Path, tiny_folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in quick.rglob("*")}
    said = sl("quickstart", "--scale", "tiny", "--model", tiny_folder, "--out", quick)
    assert said.code == 0
    assert f"report: {quick / 'report.html'}" in said.out
    assert f"steerlab lens {quick}" in said.out
    assert "gain of steered over base" in said.out
    assert {path: path.stat().st_mtime_ns for path in quick.rglob("*")} == before


def test_another_configuration_in_the_same_folder_is_refused(sl: Sl, quick: Path, tiny_folder: Path) -> None:
    said = sl("quickstart", "--scale", "tiny", "--model", tiny_folder, "--out", quick, "--seed", "1")
    refused(said, "another configuration")


def test_the_report_is_written_again(sl: Sl, quick: Path) -> None:
    (quick / "report.html").unlink()
    said = sl("report", quick)
    assert said.out.strip() == str(quick / "report.html")
    assert (quick / "report.html").stat().st_size > 100_000


def test_the_lens_shows_every_layer_and_writes_only_when_asked(sl: Sl, quick: Path, tmp_path: Path) -> None:
    before = sorted(quick.rglob("*"))
    said = sl("lens", quick, "--k", "3")
    assert said.code == 0
    assert sorted(quick.rglob("*")) == before
    first_cells = [cells[1].strip() for row in said.out.splitlines() if len(cells := re.split("[│|]", row)) > 2]
    assert {"0", "1", "2", "3"} <= set(first_cells)
    refused(sl("lens", quick, "--out", tmp_path / "lens.txt"), ".csv")
    assert sl("lens", quick, "--out", tmp_path / "lens.csv").code == 0
    assert (tmp_path / "lens.csv").read_text().startswith("site,layer,readout,end,rank")


@pytest.fixture
def steered(quick: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be read."""
    return Path(shutil.copytree(quick, tmp_path / "steered"))


def test_the_stream_is_read_into_the_run_and_its_report(sl: Sl, steered: Path) -> None:
    said = sl("lens", steered, "--stream", "--problems", "2", "--watch", "a", "--k", "3")
    assert said.code == 0 and "KL from the model's own output" in said.out and "random" in said.out
    run = Run.open(steered)
    assert {"residual_lens", "lens_spread", "lens_watched"} <= set(run.tables())
    assert {"residual_lens_steered", "lens_kl", "lens_watched"} <= set(run.figures())
    lens = run.table("residual_lens")
    assert set(lens["condition"]) == {"base", "steered", "steered × −1", "random"}
    assert lens["text"].nunique() == 2 and lens["layer"].nunique() == 4 and lens["rank"].max() == 2
    assert "Logit lens of the residual stream" in (steered / "report.html").read_text()
    own = sl("lens", steered, "--stream", "--prompt", "1 + 2", "--prompt", "two")
    assert own.code == 0 and Run.open(steered).table("residual_lens")["text"].nunique() == 2


def test_the_stream_is_read_through_a_tuned_lens(sl: Sl, steered: Path, tiny_folder: Path, tmp_path: Path) -> None:
    lens = tmp_path / "lens"
    short = ["--text", "", "--steps", "2", "--rows", "2", "--length", "32", "--counted", "8"]
    assert sl("train", "tuned_lens", "--model", tiny_folder, *short, "--dtype", "fp32", "--out", lens).code == 0
    for number, tuned in enumerate((lens, lens / "tuned_lens")):
        out = tmp_path / f"read{number}"
        assert sl("lens", steered, "--stream", "--prompt", "1 + 2", "--tuned", tuned, "--out", out).code == 0
        assert set(Run.open(out).table("lens_spread")["lens"]) == {"tuned"}
        assert "tuned lens" in (out / "figures" / "lens_kl.html").read_text()
    refused(sl("lens", steered, "--stream", "--prompt", "x", "--tuned", tmp_path), "does not exist")
    refused(sl("lens", steered, "--tuned", lens), "add --stream")


def test_token_effects_are_read_into_the_run_and_its_report(sl: Sl, steered: Path) -> None:
    said = sl("tokens", steered, "--problems", "3", "--k", "4")
    assert said.code == 0 and "the token raised most was the base model's likeliest already" in said.out
    run = Run.open(steered)
    means = run.table("raised_tokens")
    assert set(means["where"]) == {"first", "rest"} and len(means) == 2 * 2 * 4
    assert run.table("token_effects")["text"].nunique() == 3
    assert "Token effects" in (steered / "report.html").read_text()


def test_persistence_is_read_into_the_run_and_its_report(sl: Sl, steered: Path) -> None:
    said = sl("persistence", steered, "--problems", "2", "--layers", "1", "2")
    assert said.code == 0 and "at the last layer" in said.out
    run = Run.open(steered)
    assert set(run.table("persistence")["source"]) == {1, 2}
    assert {"persistence_diff_vector", "persistence_length"} <= set(run.figures())
    assert "<h2>Persistence" in (steered / "report.html").read_text()


def test_magnitudes_are_read_into_the_run_and_its_report(sl: Sl, steered: Path) -> None:
    said = sl("magnitudes", steered, "--problems", "2", "--samples", "2", "--scales", "-1", "0", "1")
    assert said.code == 0 and "avg@2 with 95 % intervals, 2 problems" in said.out
    table = Run.open(steered).table("magnitudes")
    assert table.groupby("condition", sort=False)["scale"].apply(list).to_dict() == {
        "trained": [-1, 0, 1],
        "random": [-1, 0, 1],
    }
    assert "Scale of the vectors" in (steered / "report.html").read_text()


def test_patches_are_read_into_the_run_and_its_report(sl: Sl, steered: Path) -> None:
    refused = sl("patch", steered, "--problems", "2")
    assert refused.code == 2 and "select one layer" in refused.err
    said = sl("patch", steered, "--layer", "1", "--problems", "2", "--metric", "logit_diff")
    assert said.code == 0 and "block 2 does not see the vector" in said.out
    said = sl(
        "patch", steered, "--layer", "1", "--problems", "2", "--samples", "1", "--metric", "accuracy", "--kind", "k"
    )
    run = Run.open(steered)
    assert {"patching_logit_diff", "patching_avg"} <= set(run.tables())
    assert {"skip_head", "steer_head"} <= set(run.table("patching_logit_diff")["family"])
    assert {"patching_logit_diff", "patching_logit_diff_random", "patching_avg"} <= set(run.figures())
    assert "Patching the next block" in (steered / "report.html").read_text()
    assert sl("patch").code == 2


def test_token_effects_of_patches_are_read_into_the_run_and_its_report(sl: Sl, steered: Path, tmp_path: Path) -> None:
    words = tmp_path / "words.json"
    words.write_text('{"<i>letters</i>": ["a", "b", "c"]}')
    short = ("--layer", "1", "--problems", "3", "--draws", "20", "--k", "2")
    said = sl("patch-effects", steered, *short, "--patches", "skip_mlp", "steer_head(0)", "--words", words)
    assert said.code == 0 and "steer head(0)" in said.out and "<i>letters</i>" in said.out
    run = Run.open(steered)
    assert set(run.table("patch_effects")["reference"]) == {"no_patch", "skip_attention"}
    assert set(run.table("patch_groups")["word_group"]) == {"<i>letters</i>", "other"}
    assert len(run.table("patch_tokens")) == 2 * 2 * 2 * 2 and {"patch_effects", "patch_groups"} <= set(run.figures())
    page = (steered / "report.html").read_text()
    assert "<h2>Token effects of patches" in page and "--much:1.000" in page and "<i>letters" not in page
    assert "Of 2 pairs of a patch and a group of words" in page and "(of a random direction" in page
    assert sl("patch-effects", steered, *short).code == 0
    assert set(run.table("patch_effects")["patch"]) == {"skip_attention", "skip_mlp", "skip_layer"}
    refused(sl("patch-effects", steered, *short, "--patches", "skip_hed(0)"), "did you mean skip_head(0)")
    refused(sl("patch-effects", steered, "--problems", "2"), "select one layer")
    refused(sl("patch-effects", steered, *short, "--words", "missing.json"), "cannot be read as JSON")


def test_attention_and_attribution_are_read_into_the_run_and_its_report(sl: Sl, steered: Path) -> None:
    said = sl("attention", steered, "--problems", "2", "--layers", "1")
    assert said.code == 0 and "total variation" in said.out and "patterns held at the base's" in said.out
    said = sl("attribution", steered, "--problems", "2", "--layers", "1")
    assert said.code == 0 and "logits added to the next token" in said.out
    run = Run.open(steered)
    assert {"attention", "frozen_attention", "attribution"} <= set(run.tables())
    assert {"attention", "attribution", "attribution_heads"} <= set(run.figures())
    page = (steered / "report.html").read_text()
    assert "Direct logit attribution" in page and "<h2>Attention" in page


def test_circuits_are_read_into_the_run_and_its_report(sl: Sl, steered: Path) -> None:
    one = ("--problems", "2", "--layers", "1")
    said = sl("activation-patching", steered, *one, "--kinds", "z", "mlp_out")
    assert said.code == 0 and "put into the base run" in said.out
    said = sl("path-patching", steered, *one)
    assert said.code == 0 and "what vector says" in said.out and "do not add up" in said.out
    said = sl("path-patching", steered, *one, "--sender", "head.2.0", "--through", "mlps")
    assert said.code == 0 and "what head says" in said.out
    said = sl("edges", steered, *one, "--steps", "2", "--check", "6")
    assert said.code == 0 and "strongest links" in said.out and "exactly patched edges" in said.out
    run = Run.open(steered)
    assert {"activation_patching", "path_patching", "edges", "path_links", "agreement", "decisions"} <= set(
        run.tables()
    )
    assert {"activation_patching_heads", "activation_patching_blocks", "path_patching", "path_graph"} <= set(
        run.figures()
    )
    assert {"nodes", "links", "metadata"} <= json.loads((steered / "graphs" / "paths.json").read_text()).keys()
    page = (steered / "report.html").read_text()
    assert all(f"<h2>{title}" in page for title in ("Activation patching", "Path patching", "Paths to the logits"))
    for words, says in (
        (("path-patching", steered, *one, "--sender", "head.2"), "is not a sender"),
        (("path-patching", steered, "--problems", "2"), "add --layers LAYER"),
        (("activation-patching", steered, *one, "--kinds", "nonsense"), "unknown site"),
        (("edges", steered, *one, "--links", "0"), "n_links of at least 1"),
    ):
        refused = sl(*words)
        assert refused.code == 2 and says in refused.err


def test_side_effects_are_read_into_the_run_and_its_report(
    sl: Sl, steered: Path, sums: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("STEERLAB_DATA", raising=False)
    short = ("--problems", "2", "--samples", "2", "--texts", "3", "--scales", "2")
    said = sl("side-effects", steered, *short, "--equal-kl", "--other-task", sums)
    assert said.code == 0 and "own prose" in said.out and "equally far from the base" in said.out
    run = Run.open(steered)
    assert set(run.table("side_effects")["condition"]) == {"base", "steered", "steered × 2", "random"}
    assert set(run.table("at_equal_kl")["condition"]) == {"base", "trained", "random"}
    page = (steered / "report.html").read_text()
    assert "Side effects" in page and "Scores at equal distance from the base" in page
    refused(sl("side-effects", steered, "--text", "missing.txt"), "cannot be read as text")
    refused(sl("side-effects", steered, "--other-option", "a=1"), "--other-task")


def test_directions_are_read_into_the_run_and_its_report(sl: Sl, steered: Path, sums: Path) -> None:
    run = Run.open(steered)
    answers = run.table("completions")
    marked = (answers["condition"] == "base") & (answers["sample"] == 0)  # a tiny model is never right
    run.save_table("completions", answers.assign(correct=marked))
    said = sl("directions", steered, "--kept", "--layers", "1", "2")
    assert said.code == 0 and "held-out AUROC" in said.out
    table = run.table("directions")
    assert set(table["layer"]) == {1, 2} and len(table) == 6
    assert "Directions without training" in (steered / "report.html").read_text()
    run.save_table("completions", answers.assign(correct=False))
    refused(sl("directions", steered, "--kept"), "is right")
    refused(sl("directions", steered / "vectors.safetensors", "--kept", "--out", steered / "new"), "leave out --kept")


def test_vectors_alone_are_read_into_a_folder_of_their_own(
    sl: Sl, steered: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    file, out = steered / "vectors.safetensors", tmp_path / "read"
    refused(sl("tokens", file, "--model", tiny_folder), "--out FOLDER")
    refused(sl("tokens", file, "--model", tiny_folder, "--out", out), "--task NAME")
    words = ("persistence", file, "--model", tiny_folder, "--prompt", "1 + 2", "--out", tmp_path / "other")
    assert sl(*words).code == 0
    assert set(Run.open(tmp_path / "other").tables()) == {"persistence"}


def test_what_cannot_be_read_is_said_in_one_line(sl: Sl, steered: Path) -> None:
    refused(sl("lens", steered, "--watch", "a"), "add --stream")
    refused(sl("lens", steered, "--stream", "--watch", "two words and more"), "one token at a time")
    refused(sl("tokens", steered, "--problems", "0"), "at least 1")
    refused(sl("persistence", steered, "--layers", "9"), "9")


@pytest.fixture(scope="module")
def parts(tiny_folder: Path, sums: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep: three layers, and all layers at once."""
    folder = tmp_path_factory.mktemp("runs") / "parts"
    options = ["control=random_reward", "train=12", "test=4"]
    words = ["train", "rloo", "--task", str(sums), *(w for o in options for w in ("--task-option", o))]
    words += ["--model", str(tiny_folder), "--dtype", "fp32", "--steps", "2", "--prompts", "2", "--samples", "3"]
    words += ["--max-new-tokens", "3", "--layers", "1", "2", "3", "each", "all"]
    assert main([*words, "--out", str(folder)]) == 0
    return folder


def test_vectors_of_a_sweep_are_combined(sl: Sl, parts: Path, tmp_path: Path) -> None:
    words = ("--samples", "2", "--control", "1", "--texts", "1")
    said = sl("compose", parts, *words)
    assert said.code == 0 and "pairs that gain most" in said.out and "mean gain of a pair" in said.out, said
    run = Run.open(parts / "sweep")
    assert {"composition", "composition_sets", "composition_agreement", "layers"} <= set(run.tables())
    assert {"composition_gain", "composition_value", "composition_sets"} <= set(run.figures())
    pairs = run.table("composition")
    assert len(pairs.query("condition == 'trained'")) == 6 and set(pairs["n_seeds"]) == {1}
    assert {"base", "sum", "random sum", "together", "greedy"} == set(run.table("composition_sets")["condition"])
    assert "<h2>Composition" in Path(sl("report", parts / "sweep").out.strip()).read_text()
    runs = [parts / f"layer-0{layer}-seed0" for layer in (1, 2)]
    refused(sl("compose", *runs), "--out FOLDER")
    assert sl("compose", *runs, *words, "--out", tmp_path / "pair").code == 0
    two = Run.open(tmp_path / "pair")
    assert set(two.tables()) == {"composition", "composition_sets"}
    refused(sl("compose", runs[0], "--out", tmp_path / "one"), "at least two layers")
    refused(sl("compose", runs[0], runs[0], "--out", tmp_path / "same"), "both sets have a vector")
    refused(sl("compose", parts / "all-layers-seed0", "--out", tmp_path / "all"), "--layers each")
    refused(sl("compose", tmp_path / "nothing"), "nothing")


def test_vectors_are_put_elsewhere(sl: Sl, parts: Path, tmp_path: Path) -> None:
    donor, other = parts / "layer-02-seed0", parts / "layer-03-seed0"
    said = sl("transfer", donor, other, "--samples", "2")
    assert said.code == 0 and "random direction" in said.out, said
    run = Run.open(donor)
    table = run.table("transfer")
    assert set(table["recipient"]) == {"layer-02-seed0", "layer-03-seed0"} and len(table) == 2 * (2 + 2 * 3)
    assert "transfer_value" in run.figures() and "<h2>Transfer" in (donor / "report.html").read_text()
    gpt2 = tmp_path / "gpt2"
    small = tiny.model("gpt2")
    small.hf.save_pretrained(gpt2)
    small.tokenizer.save_pretrained(gpt2)
    said = sl("transfer", donor, "--to", gpt2, "--how", "ridge", "--samples", "2", "--out", tmp_path / "moved")
    assert said.code == 0 and "held-out R²" in said.out and "no vectors of its own" in said.out, said
    moved = Run.open(tmp_path / "moved")
    assert set(moved.table("transfer")["map"]) == {"base", "ridge", "random map", "random direction"}
    assert moved.table("transfer_maps")["layer_recipient"].tolist() == [2]
    refused(sl("transfer", donor, "--texts", tmp_path / "none.txt", "--out", tmp_path / "x"), "a text on every line")
    refused(sl("transfer", donor, "--to", "smolm2-135m", "--out", tmp_path / "y"), "did you mean smollm2-135m?")
    refused(sl("transfer", donor, "--task-option", "train=3", "--out", tmp_path / "z"), "needs --task")
    refused(sl("transfer", donor / "vectors.safetensors", "--out", tmp_path / "v"), "training run")


def test_generate_puts_base_and_steered_side_by_side(sl: Sl, quick: Path) -> None:
    words = ("generate", quick, "--prompt", "1 + 2 =", "--max-new-tokens", "6", "--samples", "2")
    said = sl(*words, "--base", "--scale", "0")
    assert said.code == 0
    base = said.out.partition("[steered × 0]")[0].replace("[base]", "").split("\n")[0]
    assert said.out.count("[base]") == said.out.count("[steered × 0]") == 2
    assert f"[steered × 0]{base}" in said.out, "zero vectors change nothing"
    assert sl(*words).out == sl(*words).out
    refused(sl(*words, "--samples", "0"), "samples is 0")


def test_eval_writes_beside_the_runs_own_tables(sl: Sl, quick: Path, sums: Path, tmp_path: Path) -> None:
    own = (quick / "tables" / "scores.parquet").read_bytes()
    options = ("--task", sums, "--samples", "2", "--limit", "3", "--max-new-tokens", "4", "--shots", "2")
    said = sl("eval", quick, *options, "--seeds", "1", "2", "3")
    assert said.code == 0, said
    scores = Run.open(quick).table("scores@sums.csv")
    assert dict(scores.groupby("condition")["n_seeds"].max()) == {"base": 3, "steered": 3, "greedy": 1, "few_shot": 1}
    assert (quick / "tables" / "scores.parquet").read_bytes() == own
    assert sl("eval", quick, *options, "--out", tmp_path / "eval").code == 0
    assert Run.open(tmp_path / "eval").tables() == ["completions", "scores"]
    refused(sl("resume", tmp_path / "eval"), "evaluation")


def test_eval_of_a_base_model_needs_a_model_and_a_task(sl: Sl, tiny_folder: Path, sums: Path) -> None:
    refused(sl("eval", "--task", sums), "--model")
    refused(sl("eval", "--model", tiny_folder), "--task")
    options = ("--samples", "2", "--limit", "2", "--max-new-tokens", "4", "--shots", "0", "--no-greedy")
    said = sl("eval", "--model", tiny_folder, "--task", sums, *options)
    assert said.code == 0
    assert "base" in said.out
    assert "wrote" not in said.out


def test_tasks_check_names_the_wrong_gold_answers(sl: Sl, sums: Path, tmp_path: Path) -> None:
    assert sl("tasks", "--check", sums).code == 0
    (tmp_path / "wrong.csv").write_text("question,answer\na,1\nb,none\nc,3\nd,4\n")
    said = sl("tasks", "--check", tmp_path / "wrong.csv")
    assert said.code == 1
    assert "problem 1" in said.out
    assert "'none'" in said.out


def test_plan_says_the_cost_and_writes_nothing(sl: Sl, recipe: Words, tmp_path: Path) -> None:
    said = sl(*recipe, "--plan", "--out", tmp_path / "run")
    assert said.code == 0
    assert not (tmp_path / "run").exists()
    assert {"rollouts", "updates", "evaluation", "hours", "memory", "disk"} <= {
        line.split()[0] for line in said.out.splitlines()
    }


# ---- stopping and going on


def test_ctrl_c_says_how_to_go_on(sl: Sl, recipe: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = RolloutSource.next

    def interrupted(self: RolloutSource, step: int) -> object:
        if step == 2:
            raise KeyboardInterrupt
        return drawn(self, step)

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(RolloutSource, "next", interrupted)
        said = sl(*recipe, "--out", folder)
    refused(said, f"stopped at step 2; resume with: steerlab resume {folder}", code=130)
    assert sl("resume", folder).code == 0
    assert sl(*recipe, "--out", tmp_path / "whole").code == 0
    assert outcome(folder) == outcome(tmp_path / "whole")


def test_ctrl_c_before_anything_is_written(
    sl: Sl, recipe: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(held_out, "check", interrupted)
    refused(sl(*recipe, "--out", tmp_path / "run"), "before anything was written", code=130)
    assert not (tmp_path / "run").exists()


def test_a_killed_run_ends_with_the_same_bytes(sl: Sl, recipe: Words, tmp_path: Path) -> None:
    """kill -9 between or inside steps, then resume: vectors, optimiser, counters and tables as if nothing had been."""
    words = list(recipe)
    words[words.index("--steps") + 1] = "12"
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    metrics = killed / "metrics.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "steerlab", *words, "--out", str(killed)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        while process.poll() is None and (not metrics.exists() or metrics.read_bytes().count(b"\n") < 4):
            time.sleep(0.002)
        assert process.poll() is None, process.communicate()[0].decode()[-2000:]
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.communicate()
    assert 4 <= metrics.read_bytes().count(b"\n") < 12
    assert not (killed / "vectors.safetensors").exists()
    assert sl("resume", killed).code == 0
    assert sl(*words, "--out", whole).code == 0
    assert torch.cat([v.flatten() for v in load_file(whole / "vectors.safetensors").values()]).abs().sum() > 0
    assert outcome(killed) == outcome(whole)


def outcome(folder: Path) -> dict[str, object]:
    """What must not depend on when a run was stopped: bytes of vectors and tables, what the checkpoint holds."""
    run = Run.open(folder)
    checkpoint = run.load_checkpoint()
    assert checkpoint is not None
    step, tensors, state = checkpoint
    counted = {name: state["cost"][name] for name in ("steps", "tokens_prompt", "tokens_completion", "exchanged_bytes")}
    return {
        "vectors": run.vectors_path.read_bytes(),
        "checkpoint": (step, tensors_sha256(tensors), state["reward_ema"], counted),
        **{name: (folder / "tables" / f"{name}.parquet").read_bytes() for name in run.tables()},
    }


def test_languages_are_read_into_the_run_and_its_report(sl: Sl, steered: Path) -> None:
    said = sl("languages", steered, "--problems", "2", "--layers", "1", "3", "--draws", "1")
    assert said.code == 0 and "no gap: the vocabulary has no English tokens" in said.out  # one token per byte
    run = Run.open(steered)
    assert {"vocabulary_classes", "languages", "language_gaps"} <= set(run.tables())
    assert set(run.table("languages")["from_layer"]) == {1, 3}
    assert "<h2>Languages" in (steered / "report.html").read_text()
    refused(sl("languages", steered, "--draws", "0"), "at least 1 random direction")


def test_geometry_of_one_run_has_its_dose_and_of_several_their_cosines(sl: Sl, steered: Path, tmp_path: Path) -> None:
    said = sl("geometry", steered, "--problems", "2")
    assert said.code == 0 and "stable rank of the 4 resid_post vectors" in said.out
    run = Run.open(steered)
    assert {"norms", "cosines", "singular_values", "stable_rank", "relative_dose"} <= set(run.tables())
    assert "Beside what its block writes on 2 texts" in (steered / "report.html").read_text()
    other = Path(shutil.copytree(steered, tmp_path / "other"))
    said = sl("geometry", steered, other)
    assert said.code == 0 and "steered · other" in said.out
    table = Run.open(steered).table("cosines_between")
    assert table["cosine"].tolist() == pytest.approx([1] * 4) and set(table["run_j"]) == {"other"}
    assert "<h2>Cosines between runs" in (steered / "report.html").read_text()
    refused(sl("geometry"), "nothing to measure")
    refused(sl("geometry", steered, steered), "named twice")
    refused(sl("geometry", steered, other, "--prompt", "x"), "one run")
    refused(sl("geometry", steered, tmp_path), "manifest.json")
