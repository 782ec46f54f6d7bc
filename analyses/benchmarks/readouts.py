"""What readouts cost: the residual lens beside TransformerLens, persistence beside the forwards that it consists of.

**Lens**: 16 prompts × 128 tokens of neutral prose, all layers, top-10 tokens, the rank of one token, entropy and KL to
the final answer. `ratio` = seconds of TransformerLens 3.9's bridge (run_with_cache, accumulated residuals, its final
norm and unembedding, then the same numbers by torch, one prompt at a time) ÷ ours; must 1.5. `head_share` = seconds
that the head's products alone take at the rate measured here ÷ ours; must 0.60. Extra memory: must 300 MiB (the
tables themselves, `table_mib`, are part of it).

**Persistence** (no control, so one steered pass per source): seconds ÷ those of 2 L forwards through the blocks on the
same texts, with texts of each source's own (must 0.80) and with shared ones (must 0.30).

    uv run python analyses/benchmarks/readouts.py --dtypes fp32 --repeats 3 --out analyses/benchmarks/results
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import tyro
import workload
from workload import MIB, Dtype, Row, Workload, peak_memory, reset_peak_memory

from steerlab.adapters import SteeringVectors
from steerlab.interp.neutral import neutral
from steerlab.interp.persistence import persistence
from steerlab.interp.residual_lens import residual_lens
from steerlab.interp.texts import Text
from steerlab.models import Site
from steerlab.models.bridges import to_transformer_lens
from steerlab.models.distributions import Vocabulary
from steerlab.runs import give_back_memory

if TYPE_CHECKING:
    from steerlab.models import LanguageModel

K = 10
COLUMNS = ("dtype", "case", "ours", "rival", "ratio", "spread", "must", "head_share", "extra_mib", "table_mib")


@dataclass(frozen=True)
class Options(workload.Options):
    """prompts, tokens: of the lens. sources: layers whose vectors persistence follows, every n-th for a shorter run."""

    dtypes: tuple[Dtype, ...] = ("fp32",)
    repeats: int = 3
    prompts: int = 16
    tokens: int = 128
    every: int = 1


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def texts_of(model: LanguageModel, options: Options) -> list[Text]:
    """Equally long pieces of the prose that ships with the package, repeated where it ends."""
    tiny = options.scale == "tiny"
    prompts, tokens = (2, 12) if tiny else (options.prompts, options.tokens)
    prose = [token for text in neutral(model).texts for token in text.tokens]
    while len(prose) < prompts * tokens:
        prose = prose * 2
    return [Text(tuple(prose[i * tokens : (i + 1) * tokens]), 1) for i in range(prompts)]


def lens(model: LanguageModel, options: Options) -> Row:
    """Ours and TransformerLens' in turns."""
    texts = texts_of(model, options)
    watched = texts[0].tokens[1]

    def ours() -> None:
        residual_lens(model, texts, {"base": None}, k=K, watch=(watched,))

    def theirs() -> None:
        for text in texts:
            lens_of_transformer_lens(bridge, torch.tensor([text.tokens]), watched)

    ours()  # weights are read from their file when they are first used
    give_back_memory()
    base = reset_peak_memory()
    found = residual_lens(model, texts, {"base": None}, k=K, watch=(watched,))
    extra = (peak_memory() - base) / MIB
    tables = sum(frame.memory_usage(deep=True).sum() for frame in (found.tokens, found.watched, found.spread)) / MIB
    del found
    bridge = to_transformer_lens(model)
    turns = workload.in_turns(
        (lambda: timed(ours), lambda: timed(theirs), lambda: head_seconds(model, texts)), options.repeats
    )
    _, *counted = turns
    mine, rival, head = zip(*counted, strict=True)
    return {
        "case": "lens",
        **workload.compared(mine, rival),
        "must": 1.5,
        "head_share": statistics.median(h / own for h, own in zip(head, mine, strict=True)),
        "extra_mib": extra,
        "table_mib": float(tables),
    }


def head_seconds(model: LanguageModel, texts: list[Text]) -> float:
    """What the head's products of all layers and positions take, in products of one text's rows: torch's own or those
    of a laid out copy (`models/distributions.py`), whichever are faster here."""
    rows, vocabulary = torch.randn(len(texts[0].tokens), model.d_model, dtype=model.dtype), Vocabulary(model)
    times = range(model.n_layers * len(texts))

    def laid_out() -> None:
        for _ in times:
            for _, product in vocabulary.products:
                product(rows)

    with torch.no_grad():
        return min(timed(laid_out), timed(lambda: [model.unembed(rows) for _ in times]))


@torch.no_grad()
def lens_of_transformer_lens(bridge: object, tokens: torch.Tensor, watched: int) -> None:
    """The same numbers with TransformerLens' own parts."""
    _, cache = bridge.run_with_cache(tokens, names_filter=lambda name: "hook_resid" in name)  # type: ignore[attr-defined]
    stack = cache.accumulated_resid(incl_mid=False, apply_ln=True)[1:, 0]  # the first is the embedding
    final = bridge.unembed(stack[-1]).log_softmax(-1)  # type: ignore[attr-defined]
    for states in stack:
        said = bridge.unembed(states).log_softmax(-1)  # type: ignore[attr-defined]
        said.topk(K, -1)
        (said > said[:, watched, None]).sum(-1)
        -(said.exp() * said).sum(-1)
        (final.exp() * (final - said)).sum(-1)


def followed(model: LanguageModel, options: Options, shared: bool) -> Row:
    """Persistence and the forwards that it is made of, in turns."""
    texts = texts_of(model, options)[:2]
    layers = range(0, model.n_layers, options.every)
    generator = torch.Generator().manual_seed(0)
    vectors = SteeringVectors({Site("resid_post", i): torch.randn(model.d_model, generator=generator) for i in layers})
    own: object = texts if shared else dict.fromkeys(layers, texts)

    def forwards() -> None:
        with torch.no_grad():
            for text in texts:
                tokens = torch.tensor([text.tokens])
                for _ in range(2 * len(layers)):
                    model.hidden(tokens)

    ours = lambda: persistence(model, vectors, own, control=False)  # type: ignore[arg-type] # noqa: E731
    _, *counted = workload.in_turns((lambda: timed(ours), lambda: timed(forwards)), options.repeats)
    mine, whole = zip(*counted, strict=True)
    shares = [a / b for a, b in zip(mine, whole, strict=True)]
    return {
        "case": "persistence, shared text" if shared else "persistence, own texts",
        "ours": statistics.median(mine),
        "rival": statistics.median(whole),
        "ratio": statistics.median(shares),
        "spread": [min(shares), max(shares)],
        "must": 0.30 if shared else 0.80,
    }


def measure(model: LanguageModel, _work: Workload, options: Options) -> list[Row]:
    """Rows of the table for one dtype."""
    return [lens(model, options), followed(model, options, shared=False), followed(model, options, shared=True)]


def main(options: Options) -> list[Row]:
    """Prints a table and, with --out, writes JSON."""
    return workload.table(options, COLUMNS, "readouts", lambda model, work: measure(model, work, options))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
