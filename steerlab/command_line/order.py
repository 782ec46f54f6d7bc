"""What a line of `steerlab train` asks for: one run or a sweep over layers, where and how, or only what it would cost.

Also how either is taken up again, and what is said of it when Ctrl-C has stopped it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerlab.command_line.arguments import options_of, parse
from steerlab.errors import UsageError, unknown
from steerlab.runs import Run, RunStore

if TYPE_CHECKING:
    from steerlab.progress import Reporter
    from steerlab.training import Experiment


@dataclass(frozen=True)
class Order:
    """folder: of the run or the sweep. swept: arguments of `Sweep.of` for a sweep, None for one run. ray: address of a
    cluster, None for none."""

    experiment: Experiment
    folder: str
    swept: dict[str, Any] | None
    ray: str | None
    shard: bool
    plan: bool

    def carry_out(self, reporter: Reporter) -> Run:
        """Do it. Returns the run, or the sweep's own folder."""
        if self.swept is None:
            from steerlab import execute

            return execute.execute(self.experiment, self.folder, reporter=reporter, shard=self.shard)
        from steerlab.sweep import sweep_layers

        return sweep_layers(self.experiment, self.folder, **self.swept, reporter=reporter, ray=self.ray)

    def plan_rows(self) -> list[tuple[str, str]]:
        """What it would cost, in two columns."""
        from steerlab.plan import plan, plan_sweep, shape_of

        if self.swept is None:
            return plan(self.experiment).rows()
        from steerlab.sweep import Sweep

        Sweep(self.experiment, (0,), lr=self.swept["lr"])
        shape = shape_of(self.experiment.model, self.experiment.dtype)
        made = Sweep.of(self.experiment, shape.n_layers, **self.swept).experiments(shape.n_layers)
        return plan_sweep(list(made.values()), shape).rows()


def read(words: Sequence[str]) -> Order:
    """The order in `words`: the name of a recipe and its options. Raises UsageError for what does not fit."""
    from steerlab.recipes import RECIPES

    name, rest = words[0], words[1:]
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    options: Any = parse(options_of(RECIPES[name], name), rest, f"steerlab train {name}")
    swept = swept_of(options)
    experiment = options.experiment()
    if swept is not None and options.lr_last is not None:
        swept["lr"] = (experiment.updater.lr, options.lr_last)
    about = next(iter(experiment.source.facts().values()))
    label = "".join(c if c.isalnum() or c in "-_" else "-" for c in Path(about).stem)
    folder = options.out or f"runs/{name}-{label}-{'sweep' if swept is not None else f'seed{experiment.seed}'}"
    ray = vars(options).get("ray") or None
    return Order(experiment, folder, swept, ray, options.shard, options.plan)


def is_sweep(folder: str) -> bool:
    """Whether a folder holds a sweep rather than one run."""
    return (Path(folder) / "sweep" / "manifest.json").exists()


def resume(folder: str, shard: bool, ray: str | None, reporter: Reporter) -> Run:
    """Go on with the run or the sweep in `folder`."""
    if is_sweep(folder):
        from steerlab import sweep

        return sweep.resume(folder, reporter=reporter, ray=ray)
    if ray:
        raise UsageError("--ray is for a sweep; this is one run")
    from steerlab import execute

    return execute.resume(folder, reporter=reporter, shard=shard)


def stopped_where(folder: str) -> str:
    """What to say when Ctrl-C has stopped the work in `folder`."""
    if is_sweep(folder):
        done = sum(run.manifest["status"] == "done" for run in RunStore(folder))
        return f"stopped with {done} runs done; resume with: steerlab resume {folder}"
    if not (Path(folder) / "manifest.json").exists():
        return "stopped before anything was written"
    found = Run.open(folder).load_checkpoint()
    return f"stopped at step {found[0] if found else 0}; resume with: steerlab resume {folder}"


def swept_of(options: Any) -> dict[str, Any] | None:
    """What `--layers each` and the options that go with it say; None without it."""
    given = vars(options)  # a recipe that takes no layers has no such options
    said: tuple[int | str, ...] = given.get("layers") or ()
    numbers = tuple(word for word in said if isinstance(word, int))
    if "each" not in said:
        for name in ("seeds", "lr_last", "ray"):
            if given.get(name) not in ((), None, ""):
                raise UsageError(f"--{name.replace('_', '-')} belongs to a sweep; add --layers each, or leave it out")
        if "all" in said and numbers:
            raise UsageError(f"--layers {' '.join(map(str, said))} is not clear; give numbers, or all, or each")
        return None
    if options.shard:
        raise UsageError("--shard is for one run of several processes; a sweep (--layers each) cannot have it")
    return {
        "layers": numbers or None,
        "seeds": options.seeds or None,
        "all_layers": "all" in said,
        "lr": None,
    }
