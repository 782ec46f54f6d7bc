"""What a run would cost, before it runs: passes, tokens, FLOPs, hours, bytes. Every number is a maximum or an estimate.

Unit F = 2 · (weights in the blocks) per token, h = head weights / block weights (DESIGN §7). With the weights frozen, a
token costs

    rollout  1 + h                 a prompt once per group, without the head
    update   1 + b + 2h            b = share of the blocks above the lowest trained one; a prompt 1 + b, once per group

plus attention, 4 · heads · d_head · (positions seen) per token and block forward, twice that backward. Tokens are
counted as if every completion ran to its limit and every group had a signal. Hours divide by the speed of one matrix
product of the model's MLP shape, measured here and now, times the share of it that a whole step was seen to reach.
Micro-batches are as large as a run begun here and now would make them (`training/memory.py`).
Sizes come from the configuration alone, so a model that is not on this machine's disk can be planned from a folder
with its config.json (and tokenizer files). Left out: reading weights, judging, drawing problems, several devices.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from steerlab.adapters import Steering
from steerlab.errors import UsageError
from steerlab.models import LanguageModel, load
from steerlab.models.origins import detect_dtype
from steerlab.models.sites import architecture, sizes
from steerlab.progress import duration
from steerlab.rollouts import Condition
from steerlab.runs import free_memory_bytes
from steerlab.tasks import Problem, Task, encode
from steerlab.training import Experiment, Rollouts, memory

# Share of the speed of a bare matrix product that a whole step reaches on 2 CPU cores; 0.15 to 0.3 were seen.
EFFICIENCY = 0.2
MEASURE_S = 0.15
CHARACTERS_PER_TOKEN = 3.0  # where there is no tokenizer
RUNTIME_BYTES = 600_000_000  # Python, torch and transformers
PAGE_BYTES = 12_000_000  # report.html and figures/, which carry plotly.js
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


@dataclass(frozen=True)
class Shape:
    """Sizes of a model, known without its weights. `tokenizer` is None where there is none to count with."""

    name: str
    n_layers: int
    d_model: int
    d_attention: int
    d_kv: int
    d_mlp: int
    d_vocab: int
    block_weights: int
    all_weights: int
    dtype: torch.dtype
    tokenizer: Any

    @property
    def flops_per_token(self) -> float:
        """F."""
        return 2.0 * self.block_weights

    @property
    def head_share(self) -> float:
        """h."""
        return self.d_vocab * self.d_model / self.block_weights

    @classmethod
    def of(cls, hf: Any, tokenizer: Any, name: str, dtype: torch.dtype) -> Shape:
        """Of a Hugging Face model, which may be without storage (device meta)."""
        arch = architecture(hf.config.model_type)
        blocks = list(hf.base_model.get_submodule(arch.blocks))
        found = sizes(arch, hf.config, blocks)
        return cls(
            name=name,
            n_layers=found.n_layers,
            d_model=found.d_model,
            d_attention=found.n_heads * found.d_head,
            d_kv=found.n_kv_heads * found.d_head,
            d_mlp=found.d_mlp,
            d_vocab=hf.get_output_embeddings().weight.shape[0],
            block_weights=sum(p.numel() for block in blocks for p in block.parameters() if p.ndim > 1),
            all_weights=sum(p.numel() for p in hf.parameters()),
            dtype=dtype,
            tokenizer=tokenizer,
        )


def shape_of(name: str, dtype: str) -> Shape:
    """Sizes of the model `name` from its configuration; aliases and .gguf files are loaded. Raises UsageError."""
    is_hub_id = name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith(".gguf")
    if not Path(name).expanduser().is_dir() and not is_hub_id:
        model: LanguageModel = load(name, dtype=dtype)  # type: ignore[arg-type]
        return Shape.of(model.hf, model.tokenizer, name, model.dtype)
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source = str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UsageError(
            f"cannot read the configuration of {name} ({reason}); to plan without the weights give a folder that holds "
            "its config.json"
        ) from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError):
        tokenizer = None
    architecture(config.model_type)
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(config)
    kind = _DTYPES[dtype] if dtype in _DTYPES else detect_dtype(torch.device("cpu"))
    return Shape.of(hf, tokenizer, name, kind)


@dataclass(frozen=True)
class Work:
    """A number of forward passes, tokens and FLOPs."""

    passes: int = 0
    prompt_tokens: float = 0.0
    completions: int = 0
    completion_tokens: int = 0
    flops: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.passes + other.passes,
            self.prompt_tokens + other.prompt_tokens,
            self.completions + other.completions,
            self.completion_tokens + other.completion_tokens,
            self.flops + other.flops,
        )

    def __mul__(self, times: int) -> Work:
        return Work(
            self.passes * times,
            self.prompt_tokens * times,
            self.completions * times,
            self.completion_tokens * times,
            self.flops * times,
        )


def sampling_work(shape: Shape, prompts: int, prompt: float, samples: int, limit: int, max_rows: int) -> Work:
    """Sampling `samples` completions of at most `limit` tokens for `prompts` prompts of `prompt` tokens each."""
    rows = prompts * samples
    fed, drawn = prompts * prompt, rows * limit
    seen = fed * prompt / 2 + drawn * (prompt + limit / 2)
    flops = shape.flops_per_token * (fed + drawn * (1 + shape.head_share)) + attention(shape, seen)
    return Work(math.ceil(rows / max_rows) * limit, fed, rows, drawn, flops)


def update_work(shape: Shape, source: Rollouts, prompt: float, lowest: int, below_block: bool, budget: int) -> Work:
    """One update on the completions of one step: forward and backward through the blocks above the lowest trained
    vector (what those below wrote is kept from sampling), prompts once per group."""
    limit, fed = source.sampling.max_new_tokens, source.prompts * prompt
    tokens = source.prompts * source.samples * limit
    above = (shape.n_layers - lowest - (0 if below_block else 1)) / shape.n_layers
    unit = shape.flops_per_token
    seen = fed * prompt / 2 + tokens * (prompt + limit / 2)
    flops = unit * (2 * above * (fed + tokens) + 2 * shape.head_share * tokens)
    flops += attention(shape, seen) * 3 * above
    groups = max(1, int(budget // (source.samples * limit + prompt)))
    return Work(2 * math.ceil(source.prompts / groups), flops=flops)


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
    """Speed of a (rows × d_model) · (d_model × d_mlp) product in the model's dtype on this machine."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    left = torch.ones(max(1, rows), shape.d_model, dtype=shape.dtype, device=device)
    right = torch.ones(shape.d_model, shape.d_mlp, dtype=shape.dtype, device=device)
    _ = float((left @ right)[0, 0])
    spent: list[float] = []
    while sum(spent) < MEASURE_S:
        begin = time.perf_counter()
        _ = float((left @ right)[0, 0])
        spent.append(time.perf_counter() - begin)
    return 2.0 * left.shape[0] * shape.d_model * shape.d_mlp / statistics.median(spent)


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
        return self.weight_bytes + trained + max(self.decode_bytes, self.update_bytes) + RUNTIME_BYTES

    @property
    def chosen(self) -> str:
        """Where the token budget comes from."""
        if self.experiment.token_budget is not None:
            return "as asked for"
        return "the most by default" if self.token_budget == memory.CAP_TOKENS else "for the memory free here and now"

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
            ("updates", f"at most {self.updates.passes:,} forward passes and half as many backward, "
             f"{self.updates.flops:.3g} FLOP; micro-batches of {self.token_budget:,} tokens, {self.chosen}"),
            ("evaluation", told(self.evaluation)),
            ("prompt tokens", how),
            ("hours", f"about {self.hours:.3g} ({duration(3600 * self.hours)}) if completions run to their limit; at "
             f"{EFFICIENCY:.0%} of {speeds} GFLOP/s of a bare matrix product here and now (0.15 to 0.3 were seen)"),
            ("memory", f"about {size(self.peak_bytes)} at the peak: weights {size(self.weight_bytes)}, sampling "
             f"{size(self.decode_bytes)} or update {size(self.update_bytes)}, vectors with gradients and optimiser "
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
    source, evaluation = experiment.source, experiment.evaluation
    if not isinstance(source, Rollouts):
        raise UsageError(f"no plan for a source of kind {type(source).__name__}; leave out --plan")
    if not isinstance(experiment.adapter, Steering):
        raise UsageError(f"no plan for an adapter of kind {type(experiment.adapter).__name__}; leave out --plan")
    shape = shape or shape_of(experiment.model, experiment.dtype)
    layers = experiment.adapter.layers
    if layers is not None and not all(0 <= layer < shape.n_layers for layer in layers):
        raise UsageError(f"layers {list(layers)} do not all exist; {shape.name} has layers 0 to {shape.n_layers - 1}")
    mean, longest = prompt_tokens(shape, source.task, source.task.problems("train"))
    rows, limit = source.prompts * source.samples, source.sampling.max_new_tokens
    decoded = min(rows, source.max_rows)
    budget = token_budget(shape, experiment)
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
        token_budget=budget,
        counted=shape.tokenizer is not None,
    )


def plan_sweep(experiments: Sequence[Experiment], shape: Shape) -> Plan:
    """Runs that differ in the layers of their vectors and in their seeds: each by itself, but the baselines once.

    Runs that share decode batches take fewer forward passes than this says, of more rows each.
    """
    first, n = plan(experiments[0], shape), len(experiments)
    evaluation = replace(experiments[0].evaluation, base=False, greedy=False, shots=0)
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
    one = update_work(shape, source, mean, min(layers), adapter.site != "resid_post", budget)
    return len(layers) * site_width(shape, adapter.site), one * experiment.steps


def site_width(shape: Shape, site: str) -> int:
    """Numbers in one vector at this kind of site."""
    widths = {"q": shape.d_attention, "z": shape.d_attention, "k": shape.d_kv, "v": shape.d_kv}
    return {**widths, "mlp_neurons": shape.d_mlp}.get(site, shape.d_model)


def evaluation_work(shape: Shape, experiment: Experiment) -> Work:
    """The baselines and the steered model on the evaluation's problems."""
    task, evaluation = experiment.source.task, experiment.evaluation
    problems = evaluation.problems(task)
    asked = [*evaluation.baselines(task).values(), Condition(None, task, evaluation.sampling, evaluation.samples)]
    total, n = Work(), len(problems)
    for c in asked:
        mean, _ = prompt_tokens(shape, c.task, problems)
        limit = c.sampling.max_new_tokens
        total += sampling_work(shape, n, mean, c.samples, limit, evaluation.max_rows)
    return total


def decode_bytes(shape: Shape, rows: int, positions: int) -> float:
    """Keys and values of one decode batch and its logits (in fp32, with the copies that sampling makes)."""
    cache = rows * positions * 2 * shape.d_kv * (shape.n_layers + 1) * shape.dtype.itemsize
    return float(cache + rows * shape.d_vocab * (shape.dtype.itemsize + 3 * 4))


def bytes_per_token(shape: Shape) -> int:
    """What a backward pass must keep of one token."""
    return memory.bytes_per_token(shape.n_layers, shape.d_model, shape.d_kv, shape.d_mlp, shape.dtype.itemsize)


def update_bytes(shape: Shape, tokens: int) -> float:
    """What a micro-batch of so many tokens takes."""
    return float(memory.update_bytes(tokens, bytes_per_token(shape), shape.d_vocab))


def token_budget(shape: Shape, experiment: Experiment) -> int:
    """Tokens per micro-batch: the experiment's own number, or what would fit beside the weights here and now."""
    if experiment.token_budget is not None:
        return experiment.token_budget
    free = free_memory_bytes(torch.cuda.current_device() if torch.cuda.is_available() else None)
    left = None if free is None else free - shape.all_weights * shape.dtype.itemsize
    return memory.budget(left, bytes_per_token(shape), shape.d_vocab)
