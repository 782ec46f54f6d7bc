"""Which paths of the next block carry a vector's effect?

Claim (2509.06608 §7): the penultimate layer's vector needs no attention (Skip-Attn is like no patch) but needs the MLP
(Skip-Layer, where the block does not see the vector, loses much), clearly so for Qwen2.5-Math-7B, less for Llama. There
six benchmarks, accuracy of generations from the patched model. Here, scaled down: the bank's vectors of two layers,
three seeds pooled, every head skipped and steered; accuracy of generations, and KL and logit difference on the steered
model's own answers beside random directions of equal length. "Attention can be skipped" is refuted for a layer if the
interval of what skip_attention keeps lies below 1, "the MLP cannot" if that of what skip_layer keeps reaches 1; open
where the vector itself gains nothing. A head matters alone if skipping it keeps less than 1 or steering it keeps more
than skipping all attention, by intervals.

Completions at `small`: (4 lines + 18 patches) × 3 seeds × 100 problems × `samples`, and the base model's, per layer.

    uv run python analyses/small_vectors/patching.py --out runs/small_vectors
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import bank
import pandas as pd
import tyro

from steerlab import readings
from steerlab.interp.patched import sweep
from steerlab.interp.patching import patched_answers, patched_texts
from steerlab.progress import Progress
from steerlab.runs import Run

SHOWN = ["sender", "patch", "value", "low", "high", "kept", "kept_low", "kept_high"]


@dataclass(frozen=True)
class Options(bank.Options):
    """layers: whose vectors are followed, at `small`. samples: of each problem. texts: of each seed, for KL."""

    layers: tuple[int, ...] = (15, 28)
    samples: int = 1
    texts: int = 8


def main(options: Options) -> pd.DataFrame:
    """Patches the block behind each layer's vectors and prints what is kept; tables, figures: in DIR/patching-LAYER."""
    found, exact = bank.trained(options), bank.trained(options, exact=True).model
    found.model.tune()
    tiny = options.scale == "tiny"
    evaluation = replace(found.evaluation, samples=1 if tiny else options.samples)
    told = []
    for layer in found.layers[:1] if tiny else options.layers:
        seeds = [found.vectors(layer, seed) for seed in found.seeds]
        patches = sweep(found.model, "head")
        with Progress() as progress:
            progress.stage(f"layer {layer}: reading and answering under {len(patches)} patches")
            texts = [
                readings.own_texts(found.model, of, found.task, evaluation, 2 if tiny else options.texts)
                for of in seeds
            ]
            on_texts = patched_texts(exact, seeds, texts, patches)
            answers = patched_answers(found.model, found.task, seeds, patches, evaluation, done=progress.answered)
        parts = [part for _, part in on_texts.groupby("metric", sort=False)]
        run = Run.create(options.out / f"patching-{layer}", kind="reading", status="done", model=options.model)
        for part in (*parts, answers):
            readings.patching(part).save(run)
            print(f"layer {layer}, {part['metric'].iloc[0]}")
            print(part[SHOWN].to_string(index=False, float_format="%.3f"))
        told += [on_texts, answers]
    return pd.concat(told, ignore_index=True)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
