"""Known directions are found, k is kept, what is written is sae-lens' own, and a kill changes no bit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from planted import Planted
from steerlab import tables
from steerlab.errors import RunFailed, UsageError
from steerlab.runs import Run
from steerlab.saes import training
from steerlab.saes.load import Sae, package
from steerlab.saes.streams import Stream
from steerlab.saes.training import Architecture, SaeTraining, train
from steerlab.training import StepDone

ARCHITECTURES: tuple[Architecture, ...] = ("topk", "batchtopk", "jumprelu", "gated", "matryoshka")
SHORT = SaeTraining(d_sae=40, k=4, batch=100, tokens=1_000, checkpoint_every=4, log_every=3)


def found_share(sae: Sae, planted: Planted) -> float:
    """Mean over true directions of the largest cosine with a decoder direction."""
    ours = torch.nn.functional.normalize(sae.directions, dim=1)
    return float((planted.directions @ ours.T).max(1).values.mean())


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_planted_directions_are_found(architecture: Architecture, planted: Planted, tmp_path: Path) -> None:
    options = SaeTraining(architecture, d_sae=96, k=3, batch=256, tokens=90_000, lr=5e-3, dead_after=10_000)
    sae = train(planted.train, options, tmp_path / "run")
    assert found_share(sae, planted) >= 0.9
    untrained = torch.nn.functional.normalize(torch.randn(96, 32, generator=torch.Generator().manual_seed(1)), dim=1)
    assert float((planted.directions @ untrained.T).max(1).values.mean()) < 0.6
    x = planted.held_out.rows(0, 4_000).activations
    assert training.explained_variance(x, sae.decode(sae.encode(x))) > 0.75  # k is exceeded at times


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_written_is_an_sae_of_sae_lens(architecture: Architecture, recorded: Stream, tmp_path: Path) -> None:
    heard: list[StepDone] = []
    options = SaeTraining(architecture, d_sae=48, k=4, batch=64, tokens=640, log_every=3)
    sae = train(recorded, options, tmp_path / "run", on_step=heard.append)
    theirs = package().SAE.load_from_disk(tmp_path / "run" / "sae")
    x = recorded.rows(0, 100).activations
    torch.testing.assert_close(sae.encode(x), theirs.encode(x), rtol=0, atol=1e-5)
    torch.testing.assert_close(sae.decode(sae.encode(x)), theirs(x), rtol=0, atol=1e-5)
    stored = {"batchtopk": "jumprelu", "matryoshka": "jumprelu"}.get(architecture, architecture)
    assert (theirs.cfg.architecture(), sae.architecture) == (stored, architecture)
    about = theirs.cfg.metadata
    assert (about.hook_name, about.hf_hook_name) == ("blocks.2.hook_resid_post", "model.layers.2")
    assert about.model_name == "tiny-llama-0" and about.steerlab["site"] == "resid_post.2"
    assert (sae.d_sae, sae.width, str(sae.site)) == (48, 32, "resid_post.2")
    if architecture in ("topk", "batchtopk", "matryoshka"):  # sae-lens folds their lengths into the encoder
        torch.testing.assert_close(sae.directions.norm(dim=1), torch.ones(48))
    curve = tables.check(Run.open(tmp_path / "run").table("sae_training"), "sae_training")
    assert curve["step"].tolist() == [0, 3, 6, 9] and curve["tokens"].tolist() == [64, 256, 448, 640]
    assert [done.step for done in heard] == list(range(10)) and heard[-1].steps == 10
    assert not list((tmp_path / "run").glob("checkpoint*"))


def test_k_is_kept(planted: Planted, tmp_path: Path) -> None:
    x = planted.held_out.rows(0, 2_000).activations
    exactly = train(planted.train, SHORT_TOPK, tmp_path / "topk")
    assert set((exactly.encode(x) > 0).sum(1).tolist()) == {5}
    run = Run.open(tmp_path / "topk")
    assert set(run.table("sae_training")["l0"]) == {5.0}
    options = SaeTraining(d_sae=96, k=5, batch=256, tokens=30_000, lr=5e-3)
    about = train(planted.train, options, tmp_path / "batchtopk")
    assert set(Run.open(tmp_path / "batchtopk").table("sae_training")["l0"]) == {5.0}
    assert float((about.encode(x) > 0).sum(1).float().mean()) == pytest.approx(5, rel=0.15)


SHORT_TOPK = SaeTraining("topk", d_sae=96, k=5, batch=256, tokens=10_000, lr=5e-3)


@pytest.mark.parametrize("architecture", ["jumprelu", "gated"])
def test_a_penalty_makes_it_sparse(architecture: Architecture, planted: Planted, tmp_path: Path) -> None:
    options = SaeTraining(architecture, d_sae=96, k=5, batch=256, tokens=60_000, lr=5e-3, penalty=0.5)
    train(planted.train, options, tmp_path / "run")
    l0 = Run.open(tmp_path / "run").table("sae_training")["l0"]
    assert l0.iloc[0] > 30 and l0.iloc[-1] < 15


@pytest.mark.parametrize("architecture", ["batchtopk", "jumprelu"])
def test_a_killed_training_goes_on_to_the_same_bits(
    architecture: Architecture, planted: Planted, tmp_path: Path
) -> None:
    options = SaeTraining(architecture, d_sae=40, k=4, batch=100, tokens=1_000, checkpoint_every=4, log_every=3)

    def stop(done: StepDone) -> None:
        if done.step == 6:
            raise KeyboardInterrupt

    whole = train(planted.train, options, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(planted.train, options, tmp_path / "killed", on_step=stop)
    heard: list[int] = []
    resumed = train(planted.train, options, tmp_path / "killed", on_step=lambda done: heard.append(done.step))
    assert heard == [4, 5, 6, 7, 8, 9]
    ours, theirs = (sae.inner.state_dict() for sae in (whole, resumed))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    tables_ = [Run.open(tmp_path / name).table("sae_training") for name in ("whole", "killed")]
    assert tables_[0].drop(columns="tokens_per_s").equals(tables_[1].drop(columns="tokens_per_s"))


def test_a_finished_training_is_loaded(planted: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = train(planted.train, SHORT, tmp_path / "run")
    monkeypatch.setattr(training, "_fit", None)
    again = train(planted.train, SHORT, tmp_path / "run")
    assert torch.equal(first.directions, again.directions)
    with pytest.raises(UsageError, match="already holds a run of another configuration"):
        train(planted.train, SaeTraining(d_sae=41, k=4, batch=100, tokens=1_000), tmp_path / "run")


def test_a_damaged_checkpoint_is_one_line(planted: Planted, tmp_path: Path) -> None:
    def stop(done: StepDone) -> None:
        if done.step == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(planted.train, SHORT, tmp_path / "run", on_step=stop)
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    (checkpoint / "trainer_state.pt").write_bytes(b"PK")
    with pytest.raises(UsageError, match="checkpoint-0000004 is damaged; remove"):
        train(planted.train, SHORT, tmp_path / "run")


def test_training_leaves_global_random_numbers_alone(planted: Planted, tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    a = train(planted.train, SHORT, tmp_path / "a")
    assert torch.equal(torch.rand(3), expected)
    b = train(planted.train, SaeTraining(d_sae=40, k=4, batch=100, tokens=1_000, seed=1), tmp_path / "b")
    assert not torch.equal(a.directions, b.directions)


def test_a_loss_that_is_no_number(planted: Planted, tmp_path: Path) -> None:
    options = SaeTraining(d_sae=40, k=4, batch=100, tokens=1_000, lr=1e30, warm_up=0.0)
    with pytest.raises(RunFailed, match=r"the loss of step \d is no number; lower lr"):
        train(planted.train, options, tmp_path / "run")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"batch": 0}, "batch is 0"),
        ({"warm_up": 0.6, "decay": 0.6}, "shares of the steps"),
        ({"levels": (0.5, 0.2)}, "must rise"),
        ({"d_sae": 3}, "3 latents cannot have 4"),
        ({"tokens": 50}, "50 tokens make no batch of 100"),
    ],
)
def test_options_that_do_not_fit(changed: dict[str, Any], words: str, planted: Planted, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words):
        train(planted.train, SaeTraining(**{"k": 4, "batch": 100, **changed}), tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_the_package_may_be_missing(planted: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    with pytest.raises(UsageError, match=r"sae_lens is not installed; pip install steerlab\[saes\]"):
        train(planted.train, SHORT, tmp_path / "run")
    assert not (tmp_path / "run").exists()
