"""The micro-batch follows the memory: how large it begins, that it stays so, and what happens when memory runs out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from steerlab.batches import RolloutBatch
from steerlab.errors import RunFailed
from steerlab.models import LanguageModel
from steerlab.models.head import CHUNK_TOKENS
from steerlab.recipes import rloo
from steerlab.rollouts import Policy
from steerlab.runs import Run
from steerlab.tasks import make
from steerlab.training import Experiment, StepDone, Trainer, memory


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    """Random rewards, so that groups have a signal."""
    data = tmp_path / "sums.csv"
    data.write_text("\n".join(["question,answer", *(f"{a}+{b}=,{a + b}" for a in range(5) for b in range(5))]))
    task = make(str(data), control="random_reward", train=20, test=4)
    return rloo(task, "tiny", steps=3, prompts=3, samples=4, max_new_tokens=5)


@dataclass
class Cramped(Policy):
    """A policy on a machine with room for so many tokens; forgets its limit when told to."""

    model: LanguageModel
    adapter: object
    room: int
    error: Exception

    def __post_init__(self) -> None:
        super().__init__(self.model, self.adapter)

    def logprobs(self, batch: RolloutBatch) -> Tensor:
        if sum(map(len, batch.prompts)) + batch.n_tokens > self.room:
            raise self.error
        return super().logprobs(batch)


def size_of_a_group(experiment: Experiment, model: LanguageModel) -> int:
    """Tokens of the largest group that a step can have."""
    from steerlab.tasks import encode

    task = experiment.source.task
    return max(len(encode(task.prompt(p), model.tokenizer)) for p in task.problems("train")) + 4 * 5


SAID = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried …"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
    MemoryError(),
]


@pytest.mark.parametrize("error", SAID, ids=["gpu", "cpu", "windows", "python"])
def test_half_as_many_tokens_when_memory_runs_out(
    experiment: Experiment, tiny_llama_fp64: LanguageModel, tmp_path: Path, error: Exception
) -> None:
    """The same bytes as a run that began with the smaller budget; and said once, and kept over a resume."""
    model, heard = tiny_llama_fp64, []
    room = size_of_a_group(experiment, model)

    def trained(budget: int, name: str, steps: int, policy: type[Policy] = Policy) -> Trainer:
        adapter = experiment.adapter.init(model)
        speaking = Cramped(model, adapter, room, error) if policy is Cramped else Policy(model, adapter)
        folder = tmp_path / name
        run = Run.open(folder) if folder.exists() else Run.create(folder)
        what = replace(experiment, token_budget=budget, steps=steps)
        made = Trainer(what, speaking, run, on_notice=heard.append)
        made.fit()
        return made

    cramped = trained(4 * room, "cramped", 2, Cramped)
    assert cramped.token_budget == room and len(heard) == 2
    assert all("\n" not in line and "memory ran out" in line for line in heard) and f"{room:,}" in heard[1]
    assert Run.open(tmp_path / "cramped").manifest["engine"]["token_budget"] == 4 * room
    resumed = trained(4 * room, "cramped", 3, Cramped)
    assert resumed.token_budget == room and len(heard) == 2, "the smaller budget was forgotten"
    whole = trained(room, "whole", 3)
    assert whole.adapter.snapshot().keys() == resumed.adapter.snapshot().keys()
    for name, vector in whole.adapter.snapshot().items():
        assert vector.any() and torch.equal(vector, resumed.adapter.snapshot()[name])
    _, tensors, state = Run.open(tmp_path / "cramped").load_checkpoint()
    assert state["token_budget"] == room
    assert all(torch.equal(t, tensors[n]) for n, t in Run.open(tmp_path / "whole").load_checkpoint()[1].items())


def test_not_even_one_completion(experiment: Experiment, tiny_llama: LanguageModel, tmp_path: Path) -> None:
    policy = Cramped(tiny_llama, experiment.adapter.init(tiny_llama), 3, MemoryError())
    with pytest.raises(RunFailed, match=r"single completion.*new tokens") as caught:
        Trainer(experiment, policy, Run.create(tmp_path / "run")).fit()
    assert "\n" not in str(caught.value)


def test_other_errors_are_not_swallowed(experiment: Experiment, tiny_llama: LanguageModel, tmp_path: Path) -> None:
    policy = Cramped(tiny_llama, experiment.adapter.init(tiny_llama), 3, RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes"):
        Trainer(experiment, policy, Run.create(tmp_path / "run")).fit()


def test_the_budget_is_chosen_once(
    experiment: Experiment, tiny_llama: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(steps: int, free: int | None, stop: bool = False) -> Trainer:
        def interrupt(done: StepDone) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(memory, "free_memory_bytes", lambda: free)
        folder = tmp_path / "run"
        run = Run.open(folder) if folder.exists() else Run.create(folder)
        policy = Policy(tiny_llama, experiment.adapter.init(tiny_llama))
        made = Trainer(replace(experiment, steps=steps), policy, run, interrupt if stop else None)
        if stop:
            with pytest.raises(KeyboardInterrupt):
                made.fit()
        else:
            made.fit()
        return made

    assert experiment.token_budget is None
    first = trained(3, 10_000_000, stop=True).token_budget
    assert 1 < first < memory.CAP_TOKENS
    engine = Run.open(tmp_path / "run").manifest["engine"]
    assert engine["token_budget"] == first and engine["processes"] == 1 and engine["products"] in ("plain", "packed")
    assert trained(3, 10_000_000_000).token_budget == first


def test_the_rule() -> None:
    each = memory.bytes_per_token(n_layers=30, d_model=576, d_kv=192, d_mlp=1536, itemsize=2)
    assert each == 30 * (8 * 576 + 2 * 192 + 4 * 1536) * 2
    d_vocab, head = 49_152, CHUNK_TOKENS * 49_152 * 12
    assert memory.budget(None, each, d_vocab) == memory.CAP_TOKENS == memory.budget(10**12, each, d_vocab)
    assert memory.budget(2 * (500 * each + head), each, d_vocab) == 500
    assert memory.budget(4 * (500 * each + head), each, d_vocab, processes=2) == 500
    assert memory.budget(0, each, d_vocab) == memory.budget(-5, each, d_vocab) == 1
    assert memory.update_bytes(1000, each, d_vocab) == 1000 * each + head


def test_what_counts_as_running_out() -> None:
    assert all(memory.ran_out(error) for error in SAID)
    assert not any(memory.ran_out(error) for error in (RuntimeError("size mismatch"), ValueError("out of memory")))
