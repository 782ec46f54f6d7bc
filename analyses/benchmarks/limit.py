"""The arithmetic limit of an RL step on workload W: needed FLOPs ÷ the rate of matrix products of these shapes here.

Needed (DESIGN §7, 2 FLOPs per weight and row; L blocks, update from block b on, where b is the first that a trained
number changes): every prompt once through all blocks; decode step t with the rows longer than t through all blocks,
and the head for every drawn token; update: all prompts and all completions but their last tokens forward and backward
(frozen weights: dX only) through blocks b … L−1, in the trainer's micro-batches, and the head's way back on completion
tokens once (whoever draws a token has its logits, so nobody needs them again).

The rate: the seconds in which the products of these shapes, dtype and number of rows are done, all of a step's one
after the other with the model's own weights. That is once through all blocks and the head per decode step, so a weight
is as cold as it is in use; one hot matrix would be faster than anything that a step can reach. `limit_s` multiplies by
`torch.nn.functional.linear` (and dY @ W in the update); `fastest_limit_s` takes for decoding what is faster, that or
products with packed weights (steerlab/models/packed.py). Left out, hence no part of the limit: attention, norms,
activations, sampling, log-probabilities, the optimiser. Claim: a step takes at most a small multiple of it.

    uv run python analyses/benchmarks/limit.py --out analyses/benchmarks/results
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import tyro
import workload
from torch import Tensor, nn
from torch.nn.functional import linear
from workload import Row, Workload, median

from steerlab.models.head import CHUNK_TOKENS

if TYPE_CHECKING:
    from steerlab.batches import RolloutBatch
    from steerlab.models import LanguageModel

COLUMNS = ("dtype", "case", "limit_s", "fastest_limit_s", "prefill_s", "decode_s", "update_s", "gflop", "gflop_per_s")

Case = Literal["all", "middle", "last"]


@dataclass(frozen=True)
class Options(workload.Options):
    """cases: which layers are trained (rl_step.py)."""

    cases: tuple[Case, ...] = ("all", "middle", "last")


@dataclass(frozen=True)
class Limit:
    """Seconds of a step's products; `packed_decode_s` with packed weights, where this machine can."""

    prefill_s: float
    decode_s: float
    packed_decode_s: float | None
    update_s: float

    @property
    def total_s(self) -> float:
        return self.prefill_s + self.decode_s + self.update_s

    @property
    def fastest_s(self) -> float:
        decode_s = min(self.decode_s, self.packed_decode_s or self.decode_s)
        return self.prefill_s + decode_s + self.update_s


class Products:
    """A step's matrix products and nothing else. first_block: where the update begins. fed, predicted: rows of each
    pass through blocks and head in the update; needed: tokens, prompts once even if a group is cut in two."""

    def __init__(self, model: LanguageModel, work: Workload, first_block: int, token_budget: int) -> None:
        self.model, self.work, self.first_block = model, work, first_block
        self.blocks = [[m for m in block.modules() if isinstance(m, nn.Linear)] for block in model.blocks]
        self.prompt_tokens, self.alive = work.prompt_tokens, work.alive()
        micro = [(sum(map(len, m.prompts)), m.lengths.tolist()) for m in _batch(work).micro_batches(token_budget)]
        self.fed = [prompts + sum(lengths) - len(lengths) for prompts, lengths in micro]
        self.predicted = [rows for _, lengths in micro for rows in _pieces(sum(lengths), CHUNK_TOKENS)]
        self.needed = self.prompt_tokens + sum(work.lengths) - len(work.lengths)
        most = max(self.prompt_tokens, *self.fed, *self.predicted, *self.alive)
        widths = {width for block in self.blocks for m in block for width in m.weight.shape}
        generator = torch.Generator().manual_seed(0)
        self.inputs = {
            width: torch.randn(most, width, generator=generator).to(model.dtype)
            for width in widths | {model.d_model, model.d_vocab}
        }

    @property
    def block_weights(self) -> int:
        """Weights of all blocks that a token is multiplied by."""
        return sum(m.weight.numel() for block in self.blocks for m in block)

    def flops(self) -> dict[str, float]:
        """What is needed, by part of the step."""
        blocks, head = 2.0 * self.block_weights, 2.0 * self.model.unembedding.weight.numel()
        share = (len(self.blocks) - self.first_block) / len(self.blocks)
        return {
            "prefill": self.prompt_tokens * blocks,
            "decode": sum(self.alive[1:]) * blocks + sum(self.alive) * head,
            "update": 2 * self.needed * share * blocks + sum(self.predicted) * head,
        }

    @torch.no_grad()
    def measure(self) -> Limit:
        """All of it once. Call it once to warm up."""
        packed = None
        if self.model.products == "packed":
            from steerlab.models.packed import products

            with products(self.model):
                packed = _seconds(lambda: self.decode(lambda module, x: module(x)))
        return Limit(
            prefill_s=_seconds(lambda: self.through_blocks(self.prompt_tokens, _plain)),
            decode_s=_seconds(lambda: self.decode(_plain)),
            packed_decode_s=packed,
            update_s=_seconds(self.update),
        )

    def through_blocks(self, rows: int, product: Callable[[nn.Linear, Tensor], Tensor], first: int = 0) -> None:
        inputs = {width: x[:rows] for width, x in self.inputs.items()}  # one object for projections of one input
        for block in self.blocks[first:]:
            for module in block:
                product(module, inputs[module.weight.shape[1]])

    def decode(self, product: Callable[[nn.Linear, Tensor], Tensor]) -> None:
        head = self.model.unembedding
        for t, rows in enumerate(self.alive):
            if t:
                self.through_blocks(rows, product)
            product(head, self.inputs[self.model.d_model][:rows])

    def update(self) -> None:
        head = self.model.unembedding.weight
        for rows in self.fed:
            self.through_blocks(rows, _plain, self.first_block)
        for rows in self.predicted:
            self.inputs[self.model.d_vocab][:rows] @ head
        for rows in self.fed:
            for block in reversed(self.blocks[self.first_block :]):
                for module in reversed(block):
                    self.inputs[module.weight.shape[0]][:rows] @ module.weight


def _batch(work: Workload) -> RolloutBatch:
    """The workload's shape as the update gets it, to be cut into micro-batches."""
    from steerlab.batches import RolloutBatch

    lengths = torch.tensor(work.lengths)
    shape = len(lengths), int(lengths.max())
    group = torch.arange(len(work.groups)).repeat_interleave(work.group_size)
    rewards = torch.tensor(work.rewards)
    return RolloutBatch(
        work.prompts, group, torch.zeros(shape).long(), lengths, torch.zeros(shape), rewards, rewards > 0
    )


def _plain(module: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, module.weight, module.bias)


def _pieces(total: int, most: int) -> Iterator[int]:
    """`total` rows, at most so many at a time."""
    for start in range(0, total, most):
        yield min(most, total - start)


def _seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def first_block(case: str, n_layers: int) -> int:
    """Where the update of steering vectors begins: behind the lowest layer that has one."""
    return {"all": 0, "middle": n_layers // 2, "last": n_layers - 1}[case] + 1


def facts(products: Products, measured: Sequence[Limit]) -> Row:
    """Medians of several measurements, as columns of a row."""
    flops, total_s = products.flops(), median(measured, "total_s")
    return {
        "limit_s": total_s,
        "limit_spread_s": [min(m.total_s for m in measured), max(m.total_s for m in measured)],
        "fastest_limit_s": median(measured, "fastest_s"),
        "prefill_s": median(measured, "prefill_s"),
        "decode_s": median(measured, "decode_s"),
        "packed_decode_s": median(measured, "packed_decode_s") if measured[0].packed_decode_s is not None else None,
        "update_s": median(measured, "update_s"),
        "gflop": sum(flops.values()) / 1e9,
        "gflop_by_part": {name: amount / 1e9 for name, amount in flops.items()},
        "gflop_per_s": sum(flops.values()) / 1e9 / total_s,
    }


def main(options: Options) -> list[Row]:
    """Prints a table and, with --out, writes JSON."""
    from steerlab.training.memory import budget_for

    def row(model: LanguageModel, work: Workload, case: Case) -> Row:
        products = Products(model, work, first_block(case, model.n_layers), budget_for(model, max(work.lengths)))
        _, *turns = workload.in_turns([products.measure], options.repeats)
        return {"case": case, **facts(products, [measured for (measured,) in turns])}

    return workload.table(
        options, COLUMNS, "limit", lambda model, work: [row(model, work, case) for case in options.cases]
    )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
