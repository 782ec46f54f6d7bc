"""Are there features of what steering changes that come with correct answers?

Claim (2509.06608 §8): an SAE of steered − base activations has features that fire far more often on right completions
than on wrong ones; the one with the largest difference of frequencies is shown, without a test, a control for length or
problem, or a second set of problems. Here: BatchTopK SAEs (width 4 d_model, k 32) of the differences that the bank's
sets at all layers make at two layers, three seeds, on the steered model's own answers to the held-out problems. Latents
are compared within problems; found in half of the problems they are sought in the other half, also when the labels they
were found with were shuffled (the control), twenty halvings.

Supported for a layer if in every seed at least half of the 20 latents found are found again, and more than in any
halving of the control; refuted if in no seed; open otherwise. Told beside it: how many differ before length and problem
are matched (Fisher's test, as a reader of the paper would do), and how well latents predict unseen problems' answers.

    uv run python analyses/small_vectors/diff_sae.py --bank-layers 15 28 --out runs/small_vectors
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import bank
import pandas as pd
import torch
import tyro
from bank import Bank

from steerlab.adapters import SteeringVectors
from steerlab.interp.contrast import Contrast, of_completions
from steerlab.models import Site
from steerlab.progress import Progress
from steerlab.readings import Reading
from steerlab.rollouts import Condition, evaluate
from steerlab.runs import Run
from steerlab.saes.activations import record
from steerlab.saes.activity import activity
from steerlab.saes.correctness import latent_correctness, probes, replication
from steerlab.saes.quality import sae_quality
from steerlab.saes.streams import Activations
from steerlab.saes.training import SaeTraining, train

HELD_OUT = 0.1  # of the completions, for the quality of the SAE


@dataclass(frozen=True)
class Options(bank.Options):
    """layers: whose differences are read, at `small`. answers: of each held-out problem. expansion, k, tokens: of the
    SAEs; answers are short, so their differences come several times."""

    layers: tuple[int, ...] = (15, 28)
    answers: int = 40
    expansion: int = 4
    k: int = 32
    tokens: int = 200_000


def answered(found: Bank, vectors: SteeringVectors, answers: int, seed: int, tiny: bool) -> Contrast:
    """Right and wrong answers of the steered model."""
    evaluation = found.evaluation
    if tiny:  # right answers are rare
        sampling = replace(evaluation.sampling, max_new_tokens=8)
        evaluation = replace(evaluation, split="train", limit=20, sampling=sampling)
    problems = evaluation.problems(found.task)
    with Progress() as progress:
        progress.stage(f"seed {seed}: {answers} answers to each of {len(problems)} problems")
        asked = {"steered": Condition(vectors, found.task, evaluation.sampling, answers)}
        table = evaluate(found.model, problems, asked, split=evaluation.split, seed=seed, done=progress.answered)
    return of_completions(found.model, found.task, table, "steered")


def read(options: Options, exact: Bank, vectors: SteeringVectors, texts: Contrast, layer: int, seed: int) -> Reading:
    """One SAE: trained on the differences, measured, and its latents beside the answers."""
    small = options.scale == "small"
    wanted = Activations(Site("resid_post", layer), "difference", generated_only=True, seed=seed)
    order = torch.randperm(len(texts.texts), generator=torch.Generator().manual_seed(seed)).tolist()
    mixed = [texts.texts[i] for i in order]
    n = max(1, int(HELD_OUT * len(mixed)))
    held_out, stream = (record(exact.model, part, wanted, vectors) for part in (mixed[:n], mixed[n:]))
    shape = SaeTraining(expansion=options.expansion, k=options.k, tokens=options.tokens, seed=seed, dead_after=50_000)
    shape = shape if small else replace(shape, batch=16, k=4, tokens=None)
    with Progress() as progress:
        progress.stage(f"seed {seed}, layer {layer}: an SAE of {len(stream):,} differences")
        sae = train(stream, shape, options.out / "diff_sae" / f"sae-{layer}-{seed}", on_step=progress.step)
    acts = activity(exact.model, sae, texts, vectors)
    return Reading(
        {
            "sae_quality": sae_quality(sae, held_out, stream),
            "latent_correctness": latent_correctness(acts, seed=seed),
            "latent_replication": replication(acts, seed=seed),
            "correctness_probes": probes(acts, seed=seed, folds=5 if small else 2),
        },
        {},
    )


def main(options: Options) -> pd.DataFrame:
    """Prints what each SAE says and a verdict per layer; tables in DIR/diff_sae."""
    found, exact = bank.trained(options), bank.trained(options, exact=True)
    found.model.tune()
    layers = found.layers[-1:] if options.scale == "tiny" else options.layers
    run = Run.create(options.out / "diff_sae" / "found", kind="analysis", status="done", model=options.model)
    parts: dict[str, list[pd.DataFrame]] = {}
    for seed in found.seeds:
        vectors = found.vectors(None, seed)
        texts = answered(found, vectors, options.answers, seed, options.scale == "tiny")
        for layer in layers:
            for name, table in read(options, exact, vectors, texts, layer, seed).tables.items():
                parts.setdefault(name, []).append(table.assign(layer=layer, seed=seed))
                shown = table.groupby("matched", sort=False).head(3) if name == "latent_correctness" else table
                print(f"layer {layer}, seed {seed}: {name}")
                print(shown.to_string(index=False, float_format="%.3g"), flush=True)
    for name, tables in parts.items():
        run.save_table(name, pd.concat(tables, ignore_index=True))
    again = pd.concat(parts["latent_replication"], ignore_index=True)
    for layer in layers:
        print(f"layer {layer}: {verdict(again.loc[again['layer'] == layer])}")
    return again


def verdict(again: pd.DataFrame) -> str:
    """By the rule of the module, of one layer."""
    holds = []
    for _, part in again.groupby("seed"):
        rows = part.set_index("labels")
        share, control = rows.loc["as they are", "replicated"], rows.loc["shuffled", "most"]
        holds.append(bool(share >= 0.5 and share > control))
    return "supported" if all(holds) else "open" if any(holds) else "refuted"


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
