"""What patching costs: an exact sweep over all heads beside TransformerLens' own loop, and patches that generate.

**Sweep**: every head of every layer, its output put from a clean into a corrupted run at all positions, scored by a
logit difference at the last token, `--prompts` sequences of equal length at once. `ratio` = seconds of TransformerLens
3.9's `get_act_patch_attn_head_out_all_pos` on its bridge ÷ ours; must 2.2, aim 2.7 (what suffix-only passes with one
token's head can give). `apart`: largest difference between the two, relative to the clean − corrupted difference of
logits; must 1e-4. `shared` sequences agree on all but their last few tokens, as chat prompts do: T / (T − p) more.

**Generative patches**: 32 completions of 24 tokens under a vector with one head skipped, ÷ the same under the vector as
it is; must 1.10.

    uv run python analyses/benchmarks/patching.py --dtypes fp32 --repeats 2 --out analyses/benchmarks/results
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING

import torch
import tyro
import workload
from workload import Dtype, Row, Workload

from steerlab.adapters import Adapter, SteeringVectors
from steerlab.interp.activation_patching import Pair, Place, activation_patching, heads, logit_difference
from steerlab.interp.neutral import neutral
from steerlab.interp.patched import Patched, no_patch, skip
from steerlab.models import Site
from steerlab.models.bridges import to_transformer_lens
from steerlab.rollouts import Policy, Rows, Sampling

if TYPE_CHECKING:
    from steerlab.models import LanguageModel

COLUMNS = ("dtype", "case", "ours", "rival", "ratio", "spread", "must", "apart", "tokens", "common")
CHANGED = 6  # tokens at the end of shared sequences


@dataclass(frozen=True)
class Options(workload.Options):
    """prompts, tokens: of the sweep. every: n-th layer only, for a shorter run (both sides alike)."""

    dtypes: tuple[Dtype, ...] = ("fp32",)
    repeats: int = 2
    prompts: int = 32
    tokens: int = 16
    every: int = 1


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def pair_of(model: LanguageModel, options: Options, shared: bool) -> Pair:
    """Pieces of prose, and others in their place: other throughout, or at the end only."""
    tiny = options.scale == "tiny"
    prompts, tokens = (2, 8) if tiny else (options.prompts, options.tokens)
    prose = [token for text in neutral(model).texts for token in text.tokens]
    while len(prose) < 2 * prompts * tokens:
        prose = prose * 2
    clean, other = torch.tensor(prose[: 2 * prompts * tokens]).view(2, prompts, tokens)
    corrupted = other.clone()
    if shared:
        corrupted[:, : tokens - min(CHANGED, tokens // 2)] = clean[:, : tokens - min(CHANGED, tokens // 2)]
    else:
        corrupted[:, 0] = (clean[:, 0] + 1) % model.d_vocab
    return Pair(clean, corrupted)


def swept(model: LanguageModel, options: Options, shared: bool) -> Row:
    """Ours and TransformerLens' in turns."""
    pair = pair_of(model, options, shared)
    layers = range(0, model.n_layers, options.every)
    places = [place for place in heads(model) if place.layer in layers]
    with torch.no_grad():
        likeliest = [model.unembed(model.hidden(tokens)[:, -1]).argmax(-1) for tokens in (pair.clean, pair.corrupted)]
    metric = logit_difference(likeliest[0], (likeliest[1] + (likeliest[0] == likeliest[1]).long()) % model.d_vocab)
    bridge = to_transformer_lens(model)
    found: dict[str, torch.Tensor] = {}
    scale = 1.0

    def ours() -> None:
        nonlocal scale
        table = activation_patching(model, pair, places, metric)
        found["ours"] = torch.tensor(table["value"].to_numpy())
        scale = max(abs(float(table["clean"].iloc[0] - table["corrupted"].iloc[0])), 1.0)

    def theirs() -> None:
        found["theirs"] = loop_of_transformer_lens(bridge, pair, places, metric)

    _, *turns = workload.in_turns((lambda: timed(ours), lambda: timed(theirs)), options.repeats)
    mine, rival = zip(*turns, strict=True)
    return {
        "case": "head sweep, shared prefix" if shared else "head sweep",
        **workload.compared(mine, rival),
        "must": 2.2,
        "apart": float((found["ours"] - found["theirs"]).abs().max()) / scale,
        "tokens": pair.clean.shape[1],
        "common": pair.common,
        "places": len(places),
    }


@torch.no_grad()
def loop_of_transformer_lens(
    bridge: object, pair: Pair, places: list[Place], metric: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """The values that its own loop gives, at the same places."""
    import pandas as pd
    from transformer_lens import patching

    _, cache = bridge.run_with_cache(pair.clean)  # type: ignore[attr-defined]
    index = pd.DataFrame([(place.layer, place.head) for place in places], columns=["layer", "head"])
    with redirect_stderr(StringIO()):  # its progress bar
        values = patching.generic_activation_patch(
            bridge,  # type: ignore[arg-type]
            pair.corrupted,
            cache,
            patching_metric=lambda logits: metric(logits[:, -1]).mean(),
            patch_setter=patching.layer_head_vector_patch_setter,
            activation_name="z",
            index_df=index,
        )
    return values.double()


def generated(model: LanguageModel, work: Workload, options: Options) -> Row:
    """Completions under a patched vector and under the vector as it is, in turns."""
    layer = model.n_layers // 2
    drawn = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
    vectors = SteeringVectors({Site("resid_post", layer): 0.05 * drawn})
    tiny = options.scale == "tiny"
    rows = Rows.grid(range(2 if tiny else 4), 2 if tiny else 8)
    prompts, sampling = [tuple(p[:48]) for p in work.prompts[:4]], Sampling(max_new_tokens=4 if tiny else 24)

    def side(adapter: Adapter) -> Callable[[], float]:
        return lambda: timed(lambda: Policy(model, adapter).sample(prompts, rows, sampling, seed=0))

    sides = side(Patched(vectors, skip("head", 0))), side(Patched(vectors, no_patch())), side(vectors)
    _, *turns = workload.in_turns(sides, max(options.repeats, 1 if tiny else 5))
    patched, plain, steered = zip(*turns, strict=True)
    shares = [a / b for a, b in zip(patched, steered, strict=True)]
    return {
        "case": "generation, one head skipped",
        "ours": statistics.median(patched),
        "rival": statistics.median(steered),
        "ratio": statistics.median(shares),
        "spread": [min(shares), max(shares)],
        "must": 1.10,
        "no_patch": statistics.median(plain),
    }


def measure(model: LanguageModel, work: Workload, options: Options) -> list[Row]:
    """Rows of the table for one dtype."""
    return [swept(model, options, shared=False), swept(model, options, shared=True), generated(model, work, options)]


def main(options: Options) -> list[Row]:
    """Prints a table and, with --out, writes JSON."""
    return workload.table(options, COLUMNS, "patching", lambda model, work: measure(model, work, options))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
