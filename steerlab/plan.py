"""What a run would cost, before it runs: passes, tokens, FLOPs, hours, bytes. Every number is a maximum or an estimate.

Unit F = 2 · (weights in the blocks) per token, h = head weights / block weights (DESIGN §7). With the weights frozen, a
token costs

    rollout  1 + h                 a prompt once per group, without the head
    update   2b + h                b = share of the blocks above the lowest trained vector, h for the slopes that are
                                   formed while sampling; 1 + b + 2h where that is too much to keep. A prompt without
                                   the head, once per micro-batch that holds some of its group

plus attention, 4 · heads · d_head · (positions seen) per token and block forward, twice that backward. Tokens are
counted as if every completion ran to its limit and every group had a signal. Hours divide by the speed of matrix
products of the model's MLP shape, measured here and now, times the share of it that a whole step was seen to reach.
Micro-batches are cut by the engine itself and as large as a run begun here and now would make them.
Sizes come from the configuration alone, so a model that is not on this machine's disk can be planned from a folder
with its config.json (and tokenizer files). Left out: reading weights, judging, drawing problems, several devices.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

import torch

from steerlab.adapters import Steering
from steerlab.batches import RolloutBatch
from steerlab.errors import UsageError
from steerlab.models import packed
from steerlab.models.head import CHUNK_TOKENS
from steerlab.models.shape import Shape, shape_of
from steerlab.progress import duration
from steerlab.rollouts import Condition
from steerlab.runs import free_memory_bytes
from steerlab.tasks import Problem, Task, encode
from steerlab.training import Experiment, Rollouts, memory
from steerlab.training.sources import KEPT_BYTES

# Of the speed of matrix products whose weights are not in a cache, what a whole RL step reached on 2 CPU cores:
# 0.57 to 0.70 in bf16, more in fp32 (analyses/benchmarks/README.md, table of rl_step.py, share of limit).
EFFICIENCY = 0.6
MEASURE_S = 0.15
COLD_BYTES = 128_000_000  # of weights used in turn, more than a cache holds; a smaller model has fewer
CHARACTERS_PER_TOKEN = 3.0  # where there is no tokenizer
RUNTIME_BYTES = 600_000_000  # Python, torch and transformers
PAGE_BYTES = 12_000_000  # report.html and figures/, which carry plotly.js


@dataclass(frozen=True)
class Work:
    """A number of forward passes, tokens and FLOPs."""

    passes: int = 0
    prompt_tokens: float = 0.0
    completions: int = 0
    completion_tokens: int = 0
    flops: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, times: int) -> Work:
        return Work(*(amount * times for amount in astuple(self)))


def sampling_work(shape: Shape, prompts: int, prompt: float, samples: int, limit: int, max_rows: int) -> Work:
    """Sampling `samples` completions of at most `limit` tokens for `prompts` prompts of `prompt` tokens each."""
    rows = prompts * samples
    fed, drawn = prompts * prompt, rows * limit
    seen = fed * prompt / 2 + drawn * (prompt + limit / 2)
    flops = shape.flops_per_token * (fed + drawn * (1 + shape.head_share)) + attention(shape, seen)
    return Work(math.ceil(rows / max_rows) * limit, fed, rows, drawn, flops)


def update_work(shape: Shape, source: Rollouts, prompt: float, first_block: int, budget: int) -> Work:
    """One update on the completions of one step, in micro-batches of `budget` tokens (`passes` of them): backward from
    block `first_block` on, forward too if what the blocks below wrote is kept from sampling, else from the bottom; the
    slopes kept from sampling are counted here."""
    limit, parts = source.sampling.max_new_tokens, micro_batches(source, prompt, budget)
    fed, tokens = prompt * sum(len(part.prompts) for part in parts), source.prompts * source.samples * limit
    backward = (shape.n_layers - first_block) / shape.n_layers
    keeps = kept_bytes(shape, source, first_block) > 0
    forward, heads = (backward, 1) if keeps else (1.0, 2)
    seen = fed * prompt / 2 + tokens * (prompt + limit / 2)
    flops = shape.flops_per_token * ((forward + backward) * (fed + tokens) + heads * shape.head_share * tokens)
    return Work(len(parts), flops=flops + attention(shape, seen) * (forward + 2 * backward))


def micro_batches(source: Rollouts, prompt: float, budget: int) -> list[RolloutBatch]:
    """The engine's micro-batches of one step (without texts): prompts of `prompt` tokens, completions to their limit,
    a signal in every group."""
    rows = source.prompts * source.samples
    whole = RolloutBatch(
        prompts=((0,) * round(prompt),) * source.prompts,
        group=torch.arange(source.prompts).repeat_interleave(source.samples),
        completions=torch.zeros(rows, 0, dtype=torch.long),
        lengths=torch.full((rows,), source.sampling.max_new_tokens),
        logprobs=torch.zeros(rows, 0),
        rewards=torch.zeros(rows),
        correct=torch.zeros(rows, dtype=torch.bool),
    )
    return list(whole.micro_batches(budget))


def attention(shape: Shape, seen: float) -> float:
    """FLOPs of scores and mixing, forward, for tokens that see `seen` positions in total."""
    return 4.0 * shape.n_layers * shape.d_attention * seen


def prompt_tokens(shape: Shape, task: Task, problems: list[Problem]) -> tuple[float, int]:
    """Mean and largest number of prompt tokens."""
    if shape.tokenizer is None:
        counts = [
            round(sum(len(m.content) for m in task.prompt(p).messages) / CHARACTERS_PER_TOKEN) + 16 for p in problems
        ]
    else:
        counts = [len(encode(task.prompt(p), shape.tokenizer)) for p in problems]
    return sum(counts) / len(counts), max(counts)


def measured_flops_per_s(shape: Shape, rows: int) -> float:
    """Speed of (rows × d_model) · (d_model × d_mlp) products in the model's dtype on this machine, each with another
    weight, as in a step: one and the same would come from the cache."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x = torch.ones(max(1, rows), shape.d_model, dtype=shape.dtype, device=device)
    n = 1 + min(COLD_BYTES // shape.dtype.itemsize, shape.block_weights) // (shape.d_mlp * shape.d_model)
    weights = torch.ones(n, shape.d_mlp, shape.d_model, dtype=shape.dtype, device=device)
    spent: list[float] = []
    while sum(spent[1:]) < MEASURE_S:  # the first is a warm-up
        begin = time.perf_counter()
        _ = float(torch.nn.functional.linear(x, weights[len(spent) % n])[0, 0])
        spent.append(time.perf_counter() - begin)
    return 2.0 * len(x) * shape.d_model * shape.d_mlp / statistics.median(spent[1:])


@dataclass(frozen=True)
class Plan:
    """rollouts, updates, evaluation: all steps together. Speeds in FLOPs per second as measured, bytes by what they are
    for; token_budget: tokens per micro-batch; `counted`: whether the model's tokenizer counted the prompts.
    runs: how many it is all for."""

    shape: Shape
    experiment: Experiment
    n_trained: int
    rollouts: Work
    updates: Work
    evaluation: Work
    decode_flops_per_s: float
    update_flops_per_s: float
    decode_bytes: float
    update_bytes: float
    packed_bytes: int
    kept_bytes: int
    token_budget: int
    counted: bool
    runs: int = 1

    @property
    def hours(self) -> float:
        """Expected, of training and evaluation."""
        sampled = (self.rollouts.flops + self.evaluation.flops) / self.decode_flops_per_s
        return (sampled + self.updates.flops / self.update_flops_per_s) / EFFICIENCY / 3600

    @property
    def weight_bytes(self) -> int:
        return self.shape.all_weights * self.shape.dtype.itemsize

    @property
    def peak_bytes(self) -> float:
        trained = 16 * self.n_trained  # fp32: vectors, gradients, two moments
        stays = self.weight_bytes + self.packed_bytes + self.kept_bytes + trained + RUNTIME_BYTES
        return stays + max(self.decode_bytes, self.update_bytes)

    @property
    def chosen(self) -> str:
        """Where the token budget comes from."""
        if self.experiment.token_budget is not None:
            return "as asked for"
        most = memory.cap(self.experiment.source.longest)
        return "the most by default" if self.token_budget == most else "for the memory free here and now"

    def rows(self) -> list[tuple[str, str]]:
        """What a person reads, in two columns."""
        shape, source = self.shape, self.experiment.source
        assert isinstance(source, Rollouts)
        how = "counted" if self.counted else f"about, at {CHARACTERS_PER_TOKEN:g} characters per token: no tokenizer"
        runs, pages = f"{self.runs} runs, " if self.runs > 1 else "", self.runs * PAGE_BYTES
        speeds = f"{self.decode_flops_per_s / 1e9:.0f} (sampling) and {self.update_flops_per_s / 1e9:.0f} (update)"
        return [
            ("model", f"{shape.name}, {shape.all_weights / 1e6:,.0f} M weights, {str(shape.dtype)[6:]}; "
             f"F = {shape.flops_per_token / 1e9:.3g} GFLOP per token, h = {shape.head_share:.2f}"),
            ("trained", f"{runs}{self.n_trained:,} parameters, {self.experiment.steps} steps of {source.prompts} "
             f"prompts × {source.samples} samples × at most {source.sampling.max_new_tokens} tokens"),
            ("rollouts", told(self.rollouts)),
            ("updates", f"at most {self.updates.passes:,} forward passes and as many backward, "
             f"{self.updates.flops:.3g} FLOP; micro-batches of {self.token_budget:,} tokens, {self.chosen}"),
            ("evaluation", told(self.evaluation)),
            ("prompt tokens", how),
            ("hours", f"about {self.hours:.3g} ({duration(3600 * self.hours)}) if completions run to their limit; at "
             f"{EFFICIENCY:.0%} of {speeds} GFLOP/s of matrix products here and now (share measured in bf16 on a CPU)"),
            ("memory", f"about {size(self.peak_bytes)} at the peak: weights {size(self.weight_bytes)}, packed again "
             f"{size(self.packed_bytes)}, sampling {size(self.decode_bytes)} or update {size(self.update_bytes)}, "
             f"kept between them {size(self.kept_bytes)}, vectors with gradients and optimiser "
             f"{size(16 * self.n_trained)}, Python and torch {size(RUNTIME_BYTES)}"),
            ("disk", f"about {size(16 * self.n_trained + pages)}: checkpoint {size(12 * self.n_trained)} "
             f"(rewritten every step), vectors {size(4 * self.n_trained)}, report and figures {size(pages)}"),
        ]  # fmt: skip


def told(work: Work) -> str:
    """Work in one line."""
    return (
        f"{work.passes:,} forward passes, {work.completions:,} completions, {work.prompt_tokens:,.0f} prompt tokens + "
        f"at most {work.completion_tokens:,} completion tokens, {work.flops:.3g} FLOP"
    )


def size(n_bytes: float | int) -> str:
    """Bytes in the decimal unit that suits them."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:.3g} {unit}"
    return f"{n_bytes:.0f} B"


def plan(experiment: Experiment, shape: Shape | None = None) -> Plan:
    """The plan of an experiment; loads no weights unless the model's name is an alias or a .gguf file (or `shape` is
    given, then none).

    Raises UsageError for a source that is not `Rollouts`, an adapter that is not `Steering`, and for anything wrong
    with the model or the task.
    """
    source = experiment.source
    if not isinstance(source, Rollouts):
        raise UsageError(f"no plan for a source of kind {type(source).__name__}; leave out --plan")
    if not isinstance(experiment.adapter, Steering):
        raise UsageError(f"no plan for an adapter of kind {type(experiment.adapter).__name__}; leave out --plan")
    shape, evaluation = shape or shape_of(experiment.model, experiment.dtype), experiment.answers
    layers = experiment.adapter.layers
    if layers is not None and not all(0 <= layer < shape.n_layers for layer in layers):
        raise UsageError(f"layers {list(layers)} do not all exist; {shape.name} has layers 0 to {shape.n_layers - 1}")
    mean, longest = prompt_tokens(shape, source.task, source.task.problems("train"))
    rows, limit = source.prompts * source.samples, source.sampling.max_new_tokens
    decoded = min(rows, source.max_rows)
    copy = packed_bytes(shape)
    budget = experiment.token_budget or token_budget(shape, copy, limit)
    n_trained, updates = trained_and_updates(shape, experiment, budget)
    return Plan(
        shape=shape,
        experiment=experiment,
        n_trained=n_trained,
        rollouts=sampling_work(shape, source.prompts, mean, source.samples, limit, source.max_rows) * experiment.steps,
        updates=updates,
        evaluation=evaluation_work(shape, experiment),
        decode_flops_per_s=measured_flops_per_s(shape, decoded),
        update_flops_per_s=measured_flops_per_s(shape, budget),
        decode_bytes=decode_bytes(shape, max(decoded, min(evaluation.max_rows, rows)), longest + limit),
        update_bytes=update_bytes(shape, max(limit + longest, min(budget, rows * limit + source.prompts * longest))),
        packed_bytes=copy,
        kept_bytes=kept_bytes(shape, source, first_block(experiment.adapter)),
        token_budget=budget,
        counted=shape.tokenizer is not None,
    )


def plan_sweep(experiments: Sequence[Experiment], shape: Shape) -> Plan:
    """Runs that differ in the layers of their vectors and in their seeds: each by itself, but the baselines once.

    Runs that share decode batches take fewer forward passes than this says, of more rows each.
    """
    first, n = plan(experiments[0], shape), len(experiments)
    evaluation = replace(experiments[0].answers, base=False, greedy=False, shots=0)
    steered = evaluation_work(shape, replace(experiments[0], evaluation=evaluation))
    trained = [trained_and_updates(shape, experiment, first.token_budget) for experiment in experiments]
    return replace(
        first,
        n_trained=sum(parameters for parameters, _ in trained),
        rollouts=first.rollouts * n,
        updates=sum((work for _, work in trained), Work()),
        evaluation=first.evaluation + steered * (n - 1),
        runs=n,
    )


def trained_and_updates(shape: Shape, experiment: Experiment, budget: int) -> tuple[int, Work]:
    """Numbers that are trained, and all updates of a run with micro-batches of `budget` tokens."""
    source, adapter = experiment.source, experiment.adapter
    assert isinstance(source, Rollouts) and isinstance(adapter, Steering)
    layers = range(shape.n_layers) if adapter.layers is None else adapter.layers
    mean, _ = prompt_tokens(shape, source.task, source.task.problems("train"))
    one = update_work(shape, source, mean, first_block(adapter), budget)
    return len(layers) * site_width(shape, adapter.site), one * experiment.steps


def first_block(adapter: Steering) -> int:
    """What the block before this one writes depends on no vector."""
    return min(adapter.layers or (0,)) + (adapter.site == "resid_post")


def site_width(shape: Shape, site: str) -> int:
    """Numbers in one vector at this kind of site."""
    widths = {"q": shape.d_attention, "z": shape.d_attention, "k": shape.d_kv, "v": shape.d_kv}
    return {**widths, "mlp_neurons": shape.d_mlp}.get(site, shape.d_model)


def evaluation_work(shape: Shape, experiment: Experiment) -> Work:
    """The baselines and the steered model on the evaluation's problems."""
    task, evaluation = experiment.task, experiment.answers
    problems = evaluation.problems(task)
    asked = [*evaluation.baselines(task).values(), Condition(None, task, evaluation.sampling, evaluation.samples)]
    total, n = Work(), len(problems)
    for c in asked:
        mean, _ = prompt_tokens(shape, c.task, problems)
        limit = c.sampling.max_new_tokens
        total += sampling_work(shape, n, mean, c.samples, limit, evaluation.max_rows)
    return total


def decode_bytes(shape: Shape, rows: int, positions: int) -> float:
    """Keys and values of one decode batch (of a CPU in at least fp32), its logits (in fp32, with the copies that
    sampling makes), and what waits there for the head's slopes."""
    itemsize = shape.dtype.itemsize if torch.cuda.is_available() else max(4, shape.dtype.itemsize)
    cache = rows * positions * 2 * shape.d_kv * (shape.n_layers + 1) * itemsize
    waiting = (CHUNK_TOKENS + rows) * shape.d_vocab * shape.dtype.itemsize
    return float(cache + waiting + rows * shape.d_vocab * (shape.dtype.itemsize + 3 * 4))


def bytes_per_token(shape: Shape) -> int:
    """What a backward pass must keep of one token."""
    return memory.bytes_per_token(shape.n_layers, shape.d_model, shape.d_kv, shape.d_mlp, shape.dtype.itemsize)


def update_bytes(shape: Shape, tokens: int) -> float:
    """What a micro-batch of so many tokens takes."""
    return float(memory.update_bytes(tokens, bytes_per_token(shape), shape.d_vocab))


def kept_bytes(shape: Shape, source: Rollouts, first_block: int) -> int:
    """Slopes of a step kept from sampling, and hidden states for an update that begins at `first_block` (none for one
    that begins at the bottom); 0 where both would be too much."""
    n_tokens = source.prompts * source.samples * source.sampling.max_new_tokens
    states = n_tokens * shape.d_model * shape.dtype.itemsize
    if 2 * states > KEPT_BYTES:
        return 0
    return 2 * states if first_block > 0 else states


def left_bytes(shape: Shape) -> int | None:
    """What the weights would leave of the memory free here and now; None where nobody knows."""
    free = free_memory_bytes(torch.cuda.current_device() if torch.cuda.is_available() else None)
    return None if free is None else free - shape.all_weights * shape.dtype.itemsize


def packed_bytes(shape: Shape) -> int:
    """The packed copy of block weights and head that decoding may use; 0 where it would not be made."""
    copy, left = (shape.block_weights + shape.d_vocab * shape.d_model) * shape.dtype.itemsize, left_bytes(shape)
    fits = left is None or copy <= packed.SHARE * left
    return copy if fits and shape.dtype in packed.DTYPES and not torch.cuda.is_available() else 0


def token_budget(shape: Shape, beside: int, longest: int) -> int:
    """Tokens per micro-batch that would fit beside the weights and `beside` more bytes, here and now. longest: tokens
    of a completion of full length."""
    left, cap = left_bytes(shape), None if torch.cuda.is_available() else memory.cap(longest)
    each = bytes_per_token(shape)
    return memory.budget(None if left is None else left - beside, each, shape.d_vocab, cap=cap)
