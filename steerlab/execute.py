"""One experiment from start to report: train, evaluate beside the baselines, read the vectors, write the page.

A run that stopped at any point goes on from there with `resume`; a finished one is left as it is. Every stage writes
into the run's folder and nowhere else. Started by `torchrun` or `accelerate launch`, several processes share the
rollouts, the gradients and the evaluation; the first of them writes the run and speaks.
"""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from steerlab import held_out, tables
from steerlab.adapters import Adapter, SteeringVectors, formats
from steerlab.errors import UsageError
from steerlab.interp.geometry import cosine_matrix, norms, singular_values, stable_rank
from steerlab.interp.logit_lens import RESIDUAL_KINDS, logit_lens
from steerlab.models import LanguageModel, load
from steerlab.plots import geometry as plot_geometry
from steerlab.plots import logit_lens as plot_lens
from steerlab.plots import training as plot_training
from steerlab.progress import Reporter, Silent
from steerlab.report import from_run
from steerlab.rollouts import Policy, Rows, Sampling
from steerlab.runs import CostLedger, Run, atomic_write
from steerlab.training import Experiment, Trainer
from steerlab.training.sharding import ShardedPolicy, Shards
from steerlab.training.world import World

OF_THE_MACHINE = ("tokens_per_s", "wall_s", "time", "token_budget")


def execute(
    experiment: Experiment,
    folder: str | Path,
    *,
    model: LanguageModel | None = None,
    reporter: Reporter | None = None,
    shard: bool = False,
) -> Run:
    """Run `experiment` in `folder`, or go on with it if it is already there. `model` saves loading it again.

    shard: each of several processes keeps a share of the frozen weights (see `training/sharding.py`); the model's
    blocks stay in pieces afterwards. Raises UsageError for bad input before anything is written, RunFailed if
    training cannot go on.
    """
    world = World.from_environment()
    with world.together():
        heard = reporter if reporter and world.leads else Silent()
        return execute_in(world, experiment, folder, model, heard, shard)


def execute_in(
    world: World,
    experiment: Experiment,
    folder: str | Path,
    model: LanguageModel | None,
    reporter: Reporter,
    shard: bool,
) -> Run:
    """`execute` as one process of a world; they all return when the leader has written the report."""
    reporter.stage(f"loading {experiment.model}")
    model = model or world.leader_first(lambda: load(experiment.model, dtype=experiment.dtype))
    adapter = experiment.adapter.init(model, torch.Generator().manual_seed(experiment.seed))
    formats.file_name(adapter)  # one that could not be saved is refused before it is trained
    held_out.check(experiment, model, world)
    shards = Shards(model, world) if shard else None
    run = world.from_leader(lambda: begin(experiment, folder, model))
    if run.manifest["status"] == "done":
        return run
    same_machine(run, model)
    if world.leads:
        run.update(status="training")
    policy = Policy(model, adapter) if shards is None else ShardedPolicy(shards, adapter)
    trainer = Trainer(experiment, policy, run, reporter.step, CostLedger(), world, reporter.notice, shards)
    reporter.stage(f"training {adapter.n_parameters:,} parameters for {experiment.steps} steps")
    trainer.fit()
    if world.leads:
        save_adapter(run, model, experiment, adapter)
        run.update(status="evaluating")
    with trainer.ledger.time("evaluate_s"):
        found = held_out.evaluate(policy, experiment, reporter, world, shards)
        if world.leads:
            found.save(run)
    return world.from_leader(lambda: finish(run, model, adapter, trainer.ledger, reporter))


def finish(run: Run, model: LanguageModel, adapter: Adapter, ledger: CostLedger, reporter: Reporter) -> Run:
    """What is left once a run is trained and evaluated: its cost, its readings, its page. Returns the run, done."""
    ledger.peak_memory_bytes = peak_memory_bytes()
    run.update(cost=ledger.to_dict())
    reporter.stage("reading what was trained")
    read_run(run, model, adapter)
    write_report(run)
    run.update(status="done")
    return run


def resume(
    folder: str | Path,
    *,
    model: LanguageModel | None = None,
    reporter: Reporter | None = None,
    shard: bool = False,
) -> Run:
    """Go on with the run in `folder` in its own dtype and threads. A finished run is returned as it is.

    The number of processes, and whether they keep shares of the weights, may be other than before.
    """
    world = World.from_environment()
    with world.together():
        run = world.from_leader(lambda: Run.open(folder))
        experiment = training_of(run)
        if run.manifest["status"] == "done":
            return run
        torch.set_num_threads(run.manifest["threads"])
        model = model or world.leader_first(lambda: load(experiment.model, dtype=dtype_of(run)))
        heard = reporter if reporter and world.leads else Silent()
        return execute_in(world, experiment, folder, model, heard, shard)


def dtype_of(run: Run) -> torch.dtype:
    """The dtype that the run's model was in, as its manifest names it."""
    known = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float64)}
    return known[run.manifest["dtype"]]


def training_of(run: Run) -> Experiment:
    """The experiment of a training run. Raises UsageError for a folder that holds only an evaluation."""
    found = run.experiment
    if not isinstance(found, Experiment):
        raise UsageError(f"{run.folder} holds an evaluation, not a training run; give the folder of a training run")
    return found


def begin(experiment: Experiment, folder: str | Path, model: LanguageModel, stored: object = None) -> Run:
    """The run's folder, new or found again. A folder that could not be begun is not left behind empty.

    stored: what the manifest keeps in place of the experiment, where that is part of something larger.
    """
    there = Path(folder).exists()
    try:
        return Run.create(
            folder,
            experiment if stored is None else stored,
            model=model.name,
            weights_sha256=model.weights_sha256,
            dtype=str(model.dtype).removeprefix("torch."),
            threads=torch.get_num_threads(),
            seed=experiment.seed,
            recipe=experiment.recipe,
            **experiment.source.facts(),
            status="created",
        )
    except UsageError:
        if not there:
            with contextlib.suppress(OSError):
                Path(folder).rmdir()
        raise


def lay_out(experiments: Mapping[str, Experiment], folder: str | Path, model: LanguageModel) -> dict[str, Run]:
    """The run folders of several experiments below `folder`, new or found again, and how their work is done: decided
    here, so that nothing depends on which process or machine then does which of them. How matrix products are done is
    measured once for all; micro-batches are each experiment's own.
    """
    runs: dict[str, Run] = {}
    for name, experiment in experiments.items():
        run = begin(experiment, Path(folder) / name, model)
        if run.manifest["status"] != "done":
            same_machine(run, model)
        if "engine" not in run.manifest:
            adapter = experiment.adapter.init(model, torch.Generator().manual_seed(experiment.seed))
            first = next(iter(runs.values()), run)
            Trainer(experiment, Policy(model, adapter), run).settle(like=first.manifest.get("engine"))
        runs[name] = run
    return runs


def same_machine(run: Run, model: LanguageModel) -> None:
    """Refuse to go on with a run under another dtype, thread count or other weights: the bytes would differ."""
    now = {
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "weights_sha256": model.weights_sha256,
    }
    for name, value in now.items():
        if run.manifest[name] != value:
            raise UsageError(
                f"{run.folder} was begun with {name} {run.manifest[name]}, now it is {value}; "
                "use `steerlab resume`, which restores it, or choose a new folder"
            )


def save_adapter(run: Run, model: LanguageModel, experiment: Experiment, adapter: Adapter) -> None:
    """What was trained, with its provenance: vectors.safetensors, or a folder (of a LoRA, of a tuned lens)."""
    facts = experiment.source.facts()
    origin = formats.Provenance.of(
        model,
        recipe=experiment.recipe,
        reward=facts.get("reward", ""),
        seed=experiment.seed,
        corpus=facts.get("corpus"),
        corpus_sha256=facts.get("corpus_sha256"),
    )
    unembed_hash = formats.tuned_lens.hash_of(model.unembedding.weight)
    formats.save(run.path(formats.file_name(adapter)), adapter, origin, unembed_hash)


def adapter_path(run: Run) -> Path | None:
    """Where the run saved what it trained; None before it has."""
    places = (run.path(name) for name in formats.FILE_NAMES.values())
    return next((place for place in places if place.exists()), None)


def read_run(run: Run, model: LanguageModel, adapter: Adapter) -> None:
    """The learning curve and, of an adapter that is made of vectors, what they say; as tables and figures."""
    curve = tables.check(run.metrics().drop(columns=list(OF_THE_MACHINE), errors="ignore"), "curve")
    run.save_table("curve", curve)
    draw = plot_training.learning_curve if "reward" in curve else plot_training.loss_curve
    run.save_figure("learning_curve", draw(curve))
    if isinstance(adapter, SteeringVectors):
        read_vectors(run, model, adapter)


def read_vectors(run: Run, model: LanguageModel, vectors: SteeringVectors) -> None:
    """Norms, cosines, singular values and, of vectors in the residual stream, the logit lens."""
    found = {
        "norms": norms(vectors),
        "cosines": cosine_matrix(vectors),
        "singular_values": singular_values(vectors),
        "stable_rank": stable_rank(vectors),
    }
    if any(site.kind in RESIDUAL_KINDS for site in vectors.sites):
        lens = found["logit_lens"] = logit_lens(vectors, model.unembedding.weight, model.tokenizer)
        if len(lens):
            run.save_figure("logit_lens", plot_lens.logit_lens(lens))
    for name, table in found.items():
        run.save_table(name, tables.check(table, name))
    run.save_figure("norms", plot_geometry.norms(found["norms"]))
    run.save_figure("cosines", plot_geometry.cosines(found["cosines"]))


def write_report(run: Run) -> Path:
    """report.html of a run from what its folder holds. Returns the path."""
    path = run.path("report.html")
    atomic_write(path, from_run(run))
    return path


def generate(
    model: LanguageModel,
    adapter: Adapter | None,
    prompt: list[int],
    sampling: Sampling,
    *,
    samples: int,
    seed: int,
) -> list[str]:
    """Completions of one tokenised prompt, with or without an adapter."""
    out = Policy(model, adapter).sample([prompt], Rows.grid([0], samples), sampling, seed=seed)
    tokens = [out.tokens[i, : out.lengths[i]].tolist() for i in range(samples)]
    return model.tokenizer.batch_decode(tokens, skip_special_tokens=True)


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
