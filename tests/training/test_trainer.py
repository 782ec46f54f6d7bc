"""The loop: it learns, it does not learn from noise, it resumes to the same bytes, it stops on a broken loss."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from letters import Letters
from steerlab.adapters import Steering
from steerlab.batches import RolloutBatch
from steerlab.errors import RunFailed
from steerlab.models import LanguageModel
from steerlab.objectives import Learner, Loss, PolicyGradient
from steerlab.rollouts import Evaluation, Policy, Sampling
from steerlab.runs import Run
from steerlab.tasks import Judgement, Problem, encode
from steerlab.training import AdamW, Experiment, Rollouts, StepDone, Trainer

COINS = random.Random(0)
TIMES = ["wall_s", "tokens_per_s"]


@dataclass(frozen=True)
class Paid(Letters):
    """With `noise` the reward is a coin that knows nothing of the text; `hopeless`: nothing is right."""

    noise: bool = False
    hopeless: bool = False

    def problems(self, split: str) -> list[Problem]:
        return [Problem(i, "go" * i, "a") for i in range(6)]

    def judge(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[Judgement]:
        if self.hopeless:
            return [Judgement(0.0, False, None) for _ in texts]
        found = super().judge(problems, texts)
        return [replace(j, reward=float(COINS.choice((0, 1)))) for j in found] if self.noise else found


def experiment(
    steps: int, task: Letters = Paid(), layers: tuple[int, ...] | None = None, lr: float = 0.05
) -> Experiment:
    return Experiment(
        recipe="rloo",
        model="tiny",
        adapter=Steering(layers),
        source=Rollouts(task, prompts=4, samples=8, sampling=Sampling(max_new_tokens=2)),
        objective=PolicyGradient(),
        updater=AdamW(lr=lr),
        evaluation=Evaluation(),
        steps=steps,
    )


def trainer(
    model: LanguageModel, what: Experiment, folder: Path, on_step: Callable[[StepDone], None] | None = None
) -> Trainer:
    run = Run.open(folder) if (folder / "manifest.json").exists() else Run.create(folder)
    return Trainer(what, Policy(model, what.adapter.init(model)), run, on_step)


def outcome(folder: Path) -> tuple[object, ...]:
    """All that must not depend on interruptions: the checkpoint without its seconds, and the metrics without theirs."""
    step, tensors, state = Run.open(folder).load_checkpoint()
    bytes_ = {name: (t.dtype, t.numpy().tobytes()) for name, t in tensors.items()}
    cost = {name: amount for name, amount in state["cost"].items() if not name.endswith("_s")}
    metrics = Run.open(folder).metrics().drop(columns=TIMES).fillna(-1.0)  # NaN is not equal to itself
    return step, bytes_, state["reward_ema"], cost, metrics.to_dict("records")


@pytest.mark.parametrize("layers", [(3,), None], ids=["last layer", "all layers"])
def test_learns(tiny_llama: LanguageModel, tmp_path: Path, layers: tuple[int, ...] | None) -> None:
    heard: list[StepDone] = []
    trainer(tiny_llama, experiment(60, layers=layers), tmp_path / "run", heard.append).fit()
    correct = [e.metrics["correct"] for e in heard]
    assert [e.step for e in heard] == list(range(60))
    assert sum(correct[:3]) / 3 < 0.3
    assert sum(correct[-5:]) / 5 >= 0.9, correct


def test_does_not_learn_from_noise(tiny_llama: LanguageModel, tmp_path: Path) -> None:
    """The same steps and rate that take the rewarded model above 0.9."""
    found = {}
    for name, task in (("noise", Paid(noise=True)), ("letters", Paid())):
        heard: list[StepDone] = []
        trainer(tiny_llama, experiment(30, task, lr=0.02), tmp_path / name, heard.append).fit()
        found[name] = sum(e.metrics["correct"] for e in heard[-5:]) / 5
    assert found["noise"] < 0.5 and found["letters"] >= 0.9, found


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def straight(tiny_llama: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    folder = tmp_path_factory.mktemp("straight") / "run"
    trainer(tiny_llama, experiment(5), folder).fit()
    return outcome(folder)


@pytest.mark.parametrize("at", [0, 1, 3, 4])
def test_killed_after_a_step(tiny_llama: LanguageModel, tmp_path: Path, straight: tuple[object, ...], at: int) -> None:
    def kill(event: StepDone) -> None:
        if event.step == at:
            raise Killed

    with pytest.raises(Killed):
        trainer(tiny_llama, experiment(5), tmp_path / "run", kill).fit()
    heard: list[int] = []
    trainer(tiny_llama, experiment(5), tmp_path / "run", lambda e: heard.append(e.step)).fit()
    assert heard == list(range(at + 1, 5))
    assert outcome(tmp_path / "run") == straight


@pytest.mark.parametrize("where", ["judge", "update", "log", "save_checkpoint"])
@pytest.mark.parametrize("at", [0, 2])
def test_killed_inside_a_step(
    tiny_llama: LanguageModel,
    tmp_path: Path,
    straight: tuple[object, ...],
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    at: int,
) -> None:
    """Also between the log line and the checkpoint, and after the parameters have moved."""
    owner = {"judge": Letters, "update": Trainer, "log": Run, "save_checkpoint": Run}[where]
    original, calls = getattr(owner, where), []

    def killing(self: object, *args: object) -> object:
        calls.append(where)
        if len(calls) == at + 1:
            if where == "update":
                original(self, *args)
            raise Killed
        return original(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(owner, where, killing)
        with pytest.raises(Killed):
            trainer(tiny_llama, experiment(5), tmp_path / "run").fit()
    trainer(tiny_llama, experiment(5), tmp_path / "run").fit()
    assert outcome(tmp_path / "run") == straight


def test_finished_runs_stay_finished(tiny_llama: LanguageModel, tmp_path: Path) -> None:
    first = trainer(tiny_llama, experiment(2), tmp_path / "run").fit()
    before = outcome(tmp_path / "run")
    second = trainer(tiny_llama, experiment(2), tmp_path / "run", lambda event: pytest.fail("trained again")).fit()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert outcome(tmp_path / "run") == before


def test_micro_batches_hardly_matter(tmp_path: Path) -> None:
    from steerlab.models import tiny

    model, moved = tiny.model("llama", dtype=torch.float64), []
    for budget in (1, 10**6):
        folder = tmp_path / str(budget)
        adapter = trainer(model, replace(experiment(1), token_budget=budget), folder).fit()
        moved.append((torch.stack(list(adapter.parameters())), Run.open(folder).metrics()))
    assert torch.allclose(moved[0][0], moved[1][0], atol=1e-5)
    for column in ("loss", "grad_norm", "reward"):
        assert float(moved[0][1][column].iloc[0]) == pytest.approx(float(moved[1][1][column].iloc[0]), rel=1e-5)


@dataclass(frozen=True)
class Broken(PolicyGradient):
    """An objective whose loss (or only its gradient) breaks at one step."""

    at: int = 2
    only_gradient: bool = False
    prepared: list[int] = field(default_factory=list)

    def prepare(self, batch: RolloutBatch) -> RolloutBatch:
        self.prepared.append(1)
        return super().prepare(batch)

    def __call__(self, policy: Learner, batch: RolloutBatch) -> Loss:
        loss = super().__call__(policy, batch)
        if len(self.prepared) != self.at + 1:
            return loss
        if self.only_gradient:  # the square root's slope at zero is infinite, its value is not
            return Loss(loss.value + (loss.value - loss.value.detach()).abs().sqrt(), loss.metrics)
        return Loss(loss.value * torch.nan, loss.metrics)


@pytest.mark.parametrize("only_gradient", [False, True])
def test_a_broken_loss_stops_and_keeps_the_checkpoint(
    tiny_llama: LanguageModel, tmp_path: Path, only_gradient: bool
) -> None:
    what = replace(experiment(5), objective=Broken(at=2, only_gradient=only_gradient))
    failing = trainer(tiny_llama, what, tmp_path / "run")
    with pytest.raises(RunFailed, match=r"step 2 .*resid_post\.") as caught:
        failing.fit()
    assert "\n" not in str(caught.value)
    step, tensors, _ = Run.open(tmp_path / "run").load_checkpoint()
    assert step == 2 and len(Run.open(tmp_path / "run").metrics()) == 2
    assert all(torch.isfinite(t).all() for t in tensors.values())
    for name, tensor in failing.adapter.snapshot().items():
        assert torch.equal(tensor, tensors[f"adapter/{name}"]), "the bad gradient reached the vectors"
    trainer(tiny_llama, experiment(5), tmp_path / "run").fit()
    assert Run.open(tmp_path / "run").load_checkpoint()[0] == 5


def test_broken_at_the_first_step(tiny_llama: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="step 0"):
        trainer(tiny_llama, replace(experiment(2), objective=Broken(at=0)), tmp_path / "run").fit()
    assert Run.open(tmp_path / "run").load_checkpoint() is None


def test_an_update_that_overflows_stops_and_keeps_the_checkpoint(tiny_llama: LanguageModel, tmp_path: Path) -> None:
    """Gradients of zero over a moment of zero, with nothing added to it."""
    what = experiment(3, Paid(hopeless=True))
    trainer(tiny_llama, replace(what, steps=1), tmp_path / "run").fit()
    zero = trainer(tiny_llama, replace(what, updater=AdamW(eps=0.0)), tmp_path / "run")
    with pytest.raises(RunFailed, match=r"update of step 1 overflowed at vectors\.resid_post\.0.*step 1 stays"):
        zero.fit()
    step, tensors, _ = Run.open(tmp_path / "run").load_checkpoint()
    assert step == 1 and not any(t.isnan().any() for t in tensors.values())


def test_no_group_has_a_signal(tiny_llama: LanguageModel, tmp_path: Path) -> None:
    adapter = trainer(tiny_llama, experiment(3, Paid(hopeless=True)), tmp_path / "run").fit()
    assert not any(p.any() for p in adapter.parameters())
    metrics = Run.open(tmp_path / "run").metrics()
    assert metrics["loss"].tolist() == metrics["grad_norm"].tolist() == metrics["signal_share"].tolist() == [0.0] * 3


def test_counters(tiny_llama: LanguageModel, tmp_path: Path) -> None:
    made = trainer(tiny_llama, experiment(3), tmp_path / "run")
    adapter = made.fit()
    metrics = Run.open(tmp_path / "run").metrics()
    _, _, state = Run.open(tmp_path / "run").load_checkpoint()
    cost = state["cost"]
    assert cost["steps"] == 3 and cost["trained_parameters"] == adapter.n_parameters == 4 * 32
    assert cost["exchanged_bytes"] == 0
    assert cost["optimiser_bytes"] == 2 * 4 * adapter.n_parameters + 4 * 4
    assert cost["tokens_prompt"] == sum(len("go" * (i % 6)) for i in range(12)) + 12 * (
        len(encode(Paid().prompt(Paid().problems("train")[0]), tiny_llama.tokenizer))
    )
    assert cost["tokens_completion"] == pytest.approx(32 * metrics["completion_tokens"].sum())
    assert min(cost["rollout_s"], cost["reward_s"], cost["update_s"]) > 0
    assert metrics["reward_ema"].iloc[0] == metrics["reward"].iloc[0]
    expected = 9 / 11 * metrics["reward_ema"].iloc[1] + 2 / 11 * metrics["reward"].iloc[2]
    assert metrics["reward_ema"].iloc[2] == pytest.approx(expected)
    assert (metrics["drift_nats"] < 1e-3).all()


def test_the_halves_of_fit_are_fit(tiny_llama: LanguageModel, tmp_path: Path, straight: tuple[object, ...]) -> None:
    """Whoever samples for several runs at once drives the trainer by hand."""
    made = trainer(tiny_llama, experiment(5), tmp_path / "run")
    assert made.begin() == 0
    for step in range(5):
        request = made.source.request(step)
        made.learn(step, made.source.receive(step, request, request.sample(made.policy)))
    assert outcome(tmp_path / "run") == straight


def test_the_model_is_left_alone(tiny_llama: LanguageModel, tmp_path: Path) -> None:
    tokens = torch.arange(20)[None]
    before = tiny_llama.logits(tokens)
    trainer(tiny_llama, experiment(2), tmp_path / "run").fit()
    assert torch.equal(tiny_llama.logits(tokens), before)
    assert all(p.grad is None and not p.requires_grad for p in tiny_llama.hf.parameters())


def test_a_policy_without_an_adapter_is_refused(tiny_llama: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="adapter"):
        Trainer(experiment(1), Policy(tiny_llama), Run.create(tmp_path / "run")).fit()
