"""Does it matter where inside a block the vector sits?

2509.06608 App. C trains a vector behind other submodules of a late block, to see which of them blocks its effect. Here
one vector is trained alone at each of five places of a middle block, which differ in who reads it:

    resid_pre    attention, MLP, and every later block
    ln1          this block's attention only (the output of its norm; a bias on q, k and v)
    attn_out     this block's MLP and every later block
    ln2          this block's MLP only (a bias on its gate and up projections)
    resid_post   every later block: the bank's own vectors

Left out as the same by algebra in a pre-norm block: mlp_out (resid_post), resid_mid (attn_out), and resid_post of the
block before (resid_pre). Claim: what later blocks read directly learns, what one branch reads does not. It does not
matter where (refuted) if the interval of the difference from resid_post includes 0 at every other place. Control: the
last of the places with random rewards, one seed.

Learning rates are the bank's by layer and were not tuned by place. A norm's outputs are much smaller than the residual
stream, so there the rate is smaller by the same factor, measured on the base model (`scaled`); `same` takes the number
as it is. Arithmetic at `small`: 4 places × 3 seeds and the control are 13 trainings per layer, 1 to 3 min each on one
core.

    uv run python analyses/small_vectors/steering_at_place.py --out runs/small_vectors
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import bank
import pandas as pd
import torch
import tyro

from steerlab import compare, tables
from steerlab.adapters import formats
from steerlab.models import LanguageModel, Site
from steerlab.plots.steering_at_place import steering_at_place as plot
from steerlab.progress import Progress
from steerlab.readings import Reading
from steerlab.recipes import rloo
from steerlab.rollouts.statistics import Interval, paired_difference, problem_scores
from steerlab.runs import Run
from steerlab.tasks import Task, encode, make
from steerlab.training import Experiment

Rate = Literal["scaled", "same"]
ALONE = "resid_post"  # where the bank's vectors are
NORMS = ("ln1", "ln2")


@dataclass(frozen=True)
class Options(bank.Options):
    """layers: of the bank, at `small`. sites: beside resid_post. norm_rates: at outputs of norms, a vector for each."""

    layers: tuple[int, ...] = (12, 15)
    sites: tuple[str, ...] = ("resid_pre", "ln1", "attn_out", "ln2")
    norm_rates: tuple[Rate, ...] = ("scaled",)


@dataclass(frozen=True)
class Cell:
    """One row of the table: trainings that differ in their seed only. size: of what the vector is added to."""

    condition: str
    site: Site
    rate: Rate
    lr: float
    size: float

    def name(self, seed: int) -> str:
        return f"{self.condition}-{self.site.kind}-{self.site.layer}-{self.rate}-seed{seed}"


def main(options: Options) -> pd.DataFrame:
    """Trains what is not there yet and prints the scores by place. Returns the table."""
    found = bank.trained(options)
    cells = laid_out(options, found)
    experiments = {
        cell.name(seed): experiment(options, found, cell, seed)
        for cell in cells
        if (cell.condition, cell.site.kind) != ("trained", ALONE)
        for seed in seeds_of(cell, found)
    }
    with Progress() as progress:
        made = compare.execute_all(experiments, options.out / "places", model=found.model, reporter=progress)
    runs = {
        cell: [made.get(cell.name(s)) or found.run(cell.site.layer, s) for s in seeds_of(cell, found)] for cell in cells
    }
    table = compared(found.model, runs)
    base = found.home.table("scores").query("condition == 'base'")
    reading = Reading({"steering_at_place": table, "scores": base}, {"steering_at_place": plot(table, base)})
    bank.keep(options, "steering_at_place", reading)
    print(table.drop(columns=["n_problems", "n_samples"]).to_string(index=False, float_format="%.3g"))
    print(base[["condition", "metric", "value", "low", "high"]].to_string(index=False, float_format="%.3f"))
    return table


def laid_out(options: Options, found: bank.Bank) -> list[Cell]:
    """Every cell, layer by layer, in the order of a block; the control last."""
    lr = bank.SIZES[options.scale].lr
    cells = []
    for layer in found.layers[:1] if options.scale == "tiny" else options.layers:
        own = lr[0] * (lr[1] / lr[0]) ** (layer / (found.model.n_layers - 1))
        sites = [Site(kind, layer) for kind in (*options.sites, ALONE)]
        sizes = typical_sizes(found.model, found.task, sites)
        stream = sizes[sites[-1]]
        for site in sites:
            inside = site.kind in NORMS
            for rate in options.norm_rates if inside else ("same",):
                factor = sizes[site] / stream if rate == "scaled" else 1.0
                size = sizes[site] if inside else stream  # a branch's output is added to the stream
                cells.append(Cell("trained", site, rate, float(f"{own * factor:.2g}") if inside else own, size))
        cells.append(replace(cells[-1], condition="random_reward"))
    return cells


def typical_sizes(model: LanguageModel, task: Task, sites: Sequence[Site], n: int = 16) -> dict[Site, float]:
    """Root mean square of each site's numbers in the base model: the median over the tokens of the first `n` train
    prompts, but the first of each, which is far larger than the others."""
    seen: dict[Site, list[torch.Tensor]] = {site: [] for site in sites}
    for problem in task.problems("train")[:n]:
        tokens = torch.tensor([encode(task.prompt(problem), model.tokenizer)], device=model.device)
        with torch.no_grad():
            for site, value in model.cache(tokens, sites).items():
                seen[site].append(value[0, 1:].float().pow(2).mean(-1).sqrt())
    return {site: float(torch.cat(parts).median()) for site, parts in seen.items()}


def seeds_of(cell: Cell, found: bank.Bank) -> tuple[int, ...]:
    return found.seeds if cell.condition == "trained" else found.seeds[:1]


def experiment(options: Options, found: bank.Bank, cell: Cell, seed: int) -> Experiment:
    """As the bank's vectors were trained, evaluated without the baselines, which the bank has."""
    size = bank.SIZES[options.scale]
    task = make("chain_sum", control="random_reward") if cell.condition == "random_reward" else found.task
    made = rloo(
        task,
        options.model,
        layers=(cell.site.layer,),
        site=cell.site.kind,
        steps=size.steps,
        prompts=size.prompts,
        samples=size.samples,
        lr=cell.lr,
        seed=seed,
    )
    return replace(made, evaluation=replace(found.evaluation, base=False, greedy=False, shots=0))


def compared(model: LanguageModel, runs: Mapping[Cell, Sequence[Run]]) -> pd.DataFrame:
    """The `steering_at_place` table: scores over seeds × problems, and what each place has beside resid_post of its
    layer, paired over both."""
    scores = {cell: problem_scores(compare.pooled_completions(of), "steered")[1] for cell, of in runs.items()}
    alone = {c.site.layer: s for c, s in scores.items() if (c.condition, c.site.kind) == ("trained", ALONE)}
    rows = []
    for cell, of in runs.items():
        (pooled,) = compare.scores({"": of}).query("metric.str.startswith('avg@')").to_dict("records")
        beside = alone[cell.site.layer]
        none = Interval(*[float("nan")] * 3)  # of itself
        difference = none if scores[cell] is beside else paired_difference(scores[cell], beside[: len(of)])
        lengths = [formats.load(run.vectors_path, model).norms()[cell.site] for run in of]
        length, by_seed = sum(lengths) / len(lengths), scores[cell].mean(axis=1)
        rows.append(
            {"condition": cell.condition, "site": cell.site.kind, "layer": cell.site.layer, "rate": cell.rate}
            | {"lr": cell.lr, "norm": length, "dose": length / (cell.size * model.d_model**0.5)}
            | {name: pooled[name] for name in ("metric", "value", "low", "high")}
            | {"least": by_seed.min(), "most": by_seed.max(), "difference": difference.value}
            | {"difference_low": difference.low, "difference_high": difference.high}
            | {name: pooled[name] for name in ("n_problems", "n_samples", "n_seeds")}
        )
    return tables.check(pd.DataFrame(rows), "steering_at_place")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
