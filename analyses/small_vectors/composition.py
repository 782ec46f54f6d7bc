"""Do vectors that were trained alone add up when they are used together?

Claim (2509.06608 App. D): pairs of isolated vectors are constructive for Qwen2.5-Math-7B and often harmful for
Llama-3.1-8B. There 406 and 528 models, six benchmarks, three seeds: about 13 million completions. Here, scaled down: 6
layers of the embedded SmolLM2-135M on one-digit sums, three training seeds. Constructive at this scale if pairs gain
over the better of their two vectors on average, and more than pairs of random directions do; refuted if they do not.
Also asked: does greedy composition reach what vectors trained together reach, and do persistence or distance say which
pairs get along (no, if the interval of r holds 0)?

Completions at `small`, each of (sets × seeds × problems × samples): trained pairs and single vectors of 6 layers 21,
random ones at most 6 + 6, sum, random sum and vectors trained together 3; 36 × 3 × 100 × 2 = 21,600, and 200 of the
base model. Greedy tries 6 + 5 + … layers on the training problems: with three accepted 18 × 3 × 100 × 2 = 10,800, and
1,800 of the path held out.
Layers have the bank's own learning rates, which were not tuned by layer: a poor partner may be a badly trained one.

    uv run python analyses/small_vectors/composition.py --out runs/small_vectors
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import bank
import pandas as pd
import tyro

from steerlab import readings
from steerlab.progress import Progress
from steerlab.runs import Run


@dataclass(frozen=True)
class Options(bank.Options):
    """layers: whose vectors are combined, at `small`. samples: of each problem under each set. control: pairs of random
    directions. texts: answers of each vector on which its persistence is measured."""

    layers: tuple[int, ...] = (4, 12, 15, 18, 21, 28)
    samples: int = 2
    control: int = 6
    texts: int = 8


def main(options: Options) -> pd.DataFrame:
    """Combines the bank's vectors and prints what came out; tables and figures are in DIR/composition."""
    found = bank.trained(options)
    tiny = options.scale == "tiny"
    evaluation = replace(found.evaluation, samples=1 if tiny else options.samples)
    with Progress() as progress:
        progress.stage("combining vectors")
        told = readings.composition(
            found.model,
            found.task,
            [found.isolated(seed).select(found.layers if tiny else options.layers) for seed in found.seeds],
            evaluation,
            together=[found.vectors(None, seed) for seed in found.seeds],
            control=1 if tiny else options.control,
            texts=0 if tiny else options.texts,
            done=progress.answered,
        )
    facts = {"model": found.model.name, "weights_sha256": found.model.weights_sha256, "task": found.task.name}
    told.save(Run.create(options.out / "composition", kind="reading", status="done", **facts))
    pairs, sets = told.tables["composition"], told.tables["composition_sets"]
    shown = ["condition", "layer_i", "layer_j", "value", "gain", "gain_low", "gain_high", "relative", "why"]
    print(pairs[shown].to_string(index=False, float_format="%.3f"))
    print(sets[["condition", "layers", "split", "value", "low", "high"]].to_string(index=False, float_format="%.3f"))
    off = pairs.loc[pairs["layer_i"] < pairs["layer_j"]].groupby("condition", sort=False)
    told_of = off.agg(
        mean_gain=("gain", "mean"),
        pairs=("gain", "size"),
        above_0=("gain_low", lambda low: (low > 0).sum()),
        below_0=("gain_high", lambda high: (high < 0).sum()),
        crossed=("relative", lambda share: (share > 0.99).sum()),
        share_known=("relative", lambda share: share.notna().mean()),
    )
    print(told_of.to_string(float_format="%.3f"))
    if "composition_agreement" in told.tables:
        print(told.tables["composition_agreement"].to_string(index=False, float_format="%.3f"))
    return pairs


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
