"""The micro-batch follows the memory: how large it begins, that it stays so, and what happens when memory runs out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from steerlab.adapters import AdapterSpec, LoRA, Steering
from steerlab.batches import RolloutBatch
from steerlab.errors import RunFailed, UsageError
from steerlab.models import LanguageModel, packed, tiny
from steerlab.models.head import CHUNK_TOKENS
from steerlab.recipes import rloo
from steerlab.rollouts import Policy
from steerlab.runs import Run, ran_out
from steerlab.tasks import make
from steerlab.training import Experiment, StepDone, Trainer, memory
from steerlab.training.world import World


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

    cramped = trained(1_000_000, "cramped", 2, Cramped)
    small, n_said = cramped.token_budget, len(heard)
    assert small <= room and 1 <= n_said <= 3, "it is halved from what was tried, not from what was allowed"
    assert all("\n" not in line and "memory ran out in the update:" in line for line in heard)
    assert f"{small:,}" in heard[-1]
    assert Run.open(tmp_path / "cramped").manifest["engine"]["token_budget"] == 1_000_000
    assert Run.open(tmp_path / "cramped").metrics()["token_budget"].tolist() == [small] * 2
    resumed = trained(1_000_000, "cramped", 3, Cramped)
    assert resumed.token_budget == small and len(heard) == n_said, "the smaller budget was forgotten"
    whole = trained(small, "whole", 3)
    assert whole.adapter.snapshot().keys() == resumed.adapter.snapshot().keys()
    for name, vector in whole.adapter.snapshot().items():
        assert vector.any() and torch.equal(vector, resumed.adapter.snapshot()[name])
    _, tensors, state = Run.open(tmp_path / "cramped").load_checkpoint()
    assert state["token_budget"] == small
    assert all(torch.equal(t, tensors[n]) for n, t in Run.open(tmp_path / "whole").load_checkpoint()[1].items())


def test_not_even_one_completion(experiment: Experiment, tiny_llama: LanguageModel, tmp_path: Path) -> None:
    policy = Cramped(tiny_llama, experiment.adapter.init(tiny_llama), 3, MemoryError())
    with pytest.raises(RunFailed, match=r"single completion.*new tokens") as caught:
        Trainer(experiment, policy, Run.create(tmp_path / "run")).fit()
    assert "\n" not in str(caught.value)


class WithACrampedOne(World):
    """A process beside one whose memory ran out."""

    def gather(self, thing: Any) -> list[Any]:
        if isinstance(thing, tuple) and len(thing) == 3:  # loss, metrics, token budget
            return [thing, (0.0, {}, 7)]
        return [thing]


def test_the_leader_says_that_another_process_ran_out(
    experiment: Experiment, tiny_llama: LanguageModel, tmp_path: Path
) -> None:
    heard: list[str] = []
    policy = Policy(tiny_llama, experiment.adapter.init(tiny_llama))
    run = Run.create(tmp_path / "run")
    made = Trainer(experiment, policy, run, world=WithACrampedOne(), on_notice=heard.append)
    made.fit()
    assert heard == ["memory ran out in the update of another process: at most 7 tokens at a time from now on"]
    assert made.token_budget == 7


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


def test_the_budget_is_of_what_the_packed_copy_leaves(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the copy, once there, does not have to fit a second time; nor when the run goes on."""
    model = tiny.model("llama")
    size, copies = packed.packed_bytes(model), []
    made_by = packed.PackedWeights.__init__

    def making(self: packed.PackedWeights, of: LanguageModel) -> None:
        copies.append(of)
        made_by(self, of)

    def free() -> int:
        return 4 * size - (0 if model.packed is None else size)

    monkeypatch.setattr(packed, "free_memory_bytes", free)
    monkeypatch.setattr(memory, "free_memory_bytes", free)
    monkeypatch.setattr(packed.PackedWeights, "__init__", making)
    monkeypatch.setattr(packed.time, "perf_counter", Clock(model))
    for _ in range(2):
        run = Run.open(tmp_path / "run") if (tmp_path / "run").exists() else Run.create(tmp_path / "run")
        trainer = Trainer(experiment, Policy(model, experiment.adapter.init(model)), run)
        trainer.settle()
        assert model.products == "packed" and len(copies) == 1
        assert trainer.engine["token_budget"] == memory.budget(3 * size, rule(model), model.d_vocab, cap=memory.cap(6))


class Clock:
    """By it, packed products take no time."""

    def __init__(self, model: LanguageModel) -> None:
        self.module, self.now = model.blocks[0].get_submodule("mlp.down_proj"), 0.0

    def __call__(self) -> float:
        self.now += 0.0 if "forward" in vars(self.module) else 1.0
        return self.now


def test_a_run_begun_packed_is_refused_where_it_cannot_be_done(
    experiment: Experiment, tiny_llama_fp64: LanguageModel, tmp_path: Path
) -> None:
    run = Run.create(tmp_path / "run")
    run.update(engine={"token_budget": 64, "processes": 1, "products": "packed"})
    trainer = Trainer(experiment, Policy(tiny_llama_fp64, experiment.adapter.init(tiny_llama_fp64)), run)
    try:
        with pytest.raises(UsageError, match=r"packed products.*choose a new folder"):
            trainer.begin()
    finally:
        tiny_llama_fp64.products = "plain"


def rule(model: LanguageModel) -> int:
    sizes, itemsize = model.sizes, model.dtype.itemsize
    return memory.bytes_per_token(sizes.n_layers, sizes.d_model, sizes.n_kv_heads * sizes.d_head, sizes.d_mlp, itemsize)


def kept_per_token(model: LanguageModel, adapter: Any, n_tokens: int = 48) -> float:
    """Bytes per token that a forward pass keeps for its backward pass, weights and logits of the head left out."""
    batch = RolloutBatch(
        prompts=((5, 6, 7, 8),),
        group=torch.zeros(4, dtype=torch.long),
        completions=torch.arange(4 * n_tokens).view(4, -1) % 200 + 5,
        lengths=torch.full((4,), n_tokens),
        logprobs=torch.zeros(4, n_tokens),
        rewards=torch.zeros(4),
        correct=torch.zeros(4, dtype=torch.bool),
    )
    weights = {p.untyped_storage().data_ptr() for p in model.hf.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if model.d_vocab not in tensor.shape and tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        Policy(model, adapter).logprobs(batch)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / (4 + 4 * n_tokens)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "qwen3", "gpt2"])
@pytest.mark.parametrize("spec", [Steering(), LoRA(rank=1)], ids=["vectors", "lora"])
def test_no_adapter_keeps_more_than_the_rule_says(
    tiny_models: dict[str, LanguageModel], family: str, spec: AdapterSpec
) -> None:
    model = tiny_models[family]
    adapter = spec.init(model)
    factor = memory.KEPT_INPUTS if adapter.keeps_inputs else 1
    assert kept_per_token(model, adapter) <= factor * rule(model)


def test_adapters_that_keep_inputs_get_fewer_tokens_at_a_time(
    tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_memory_bytes", lambda: 10_000_000)
    fewer = memory.budget_for(tiny_llama, 6, keeps_inputs=True)
    assert fewer == pytest.approx(memory.budget_for(tiny_llama, 6) / memory.KEPT_INPUTS, abs=1)


def test_the_rule() -> None:
    each = memory.bytes_per_token(n_layers=30, d_model=576, d_kv=192, d_mlp=1536, itemsize=2)
    assert each == 30 * (8 * 576 + 2 * 192 + 4 * 1536) * 2
    d_vocab, head = 49_152, CHUNK_TOKENS * 49_152 * 12
    assert memory.budget(None, each, d_vocab) == memory.CAP_TOKENS == memory.budget(10**12, each, d_vocab)
    assert memory.budget(None, each, d_vocab, cap=memory.cap(512)) == 640 + 4 * 512
    assert memory.budget(2 * (500 * each + head), each, d_vocab) == 500
    assert memory.budget(4 * (500 * each + head), each, d_vocab, processes=2) == 500
    assert memory.budget(0, each, d_vocab) == memory.budget(-5, each, d_vocab) == 1
    assert memory.budget(2 * (5000 * each + head), each, d_vocab, cap=None) == 5000
    assert memory.update_bytes(1000, each, d_vocab) == 1000 * each + head


def test_what_counts_as_running_out() -> None:
    assert all(ran_out(error) for error in SAID)
    assert not any(ran_out(error) for error in (RuntimeError("size mismatch"), ValueError("out of memory")))
