"""The command line: words in, runs and lines out. Thin: it reads options, calls `execute`, and prints.

A mistake is one line on stderr and exit code 2, a run that failed 1, Ctrl-C 130. Faults of ours keep their traceback.
Commands are the functions of COMMANDS; their signatures are their options and their docstrings their help pages.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from steerlab.command_line import circuits, comparisons, patching, readouts, together
from steerlab.command_line.arguments import (
    RUN_OR_NOTHING,
    ModelOf,
    OtherWeights,
    RunFolder,
    RunOrVectors,
    Samples,
    Seed,
    TaskOptions,
    parse,
    say,
    summary,
    task_options,
)
from steerlab.command_line.sae import sae
from steerlab.command_line.terminal import console, tell, tell_names
from steerlab.errors import RunFailed, UsageError, unknown

if TYPE_CHECKING:
    from steerlab.runs import Run


class Stopped(Exception):
    """Ctrl-C, with what to say about it."""


def main(words: Sequence[str] | None = None) -> int:
    """Run the command in `words` (default: the process's arguments). Returns the exit code."""
    if os.environ.get("RANK", "0") != "0":  # under torchrun only the first process speaks
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    try:
        return dispatch(list(sys.argv[1:] if words is None else words))
    except SystemExit as left:  # tyro's --help
        return int(left.code or 0)
    except UsageError as error:
        return complain(error, 2)
    except RunFailed as error:
        return complain(error, 1)
    except Stopped as stopped:
        return complain(stopped, 130)
    except KeyboardInterrupt:
        return complain("stopped", 130)
    except BrokenPipeError:  # `steerlab tasks | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def complain(said: object, code: int) -> int:
    """One line on stderr."""
    sys.stderr.write(f"steerlab: {' '.join(str(said).split())}\n")
    return code


def dispatch(words: list[str]) -> int:
    """Find the command and call it with its options."""
    if not words or words[0] in ("-h", "--help", "help"):
        return overview()
    if words[0] == "--version":
        from importlib.metadata import version

        tell(version("steerlab"))
        return 0
    name, rest = words[0], words[1:]
    if name not in COMMANDS:
        raise unknown("command", name, COMMANDS)
    if name == "train":
        return train(rest)
    if name == "sae":
        return sae(rest)
    return int(parse(COMMANDS[name], rest, f"steerlab {name}") or 0)


def overview() -> int:
    """The page of `steerlab --help`."""
    tell("usage: steerlab COMMAND [OPTIONS]\n")
    tell("Train steering vectors on frozen language models with reinforcement learning, and read what they do.\n")
    tell_names([(name, summary(command)) for name, command in COMMANDS.items()])
    tell("\nsteerlab COMMAND --help shows the options. Start with: steerlab quickstart")
    return 0


def train(words: list[str]) -> int:
    """Train vectors (or a lens) by a recipe, evaluate them beside the baselines, write the report."""
    from steerlab.recipes import RECIPES

    if not words or words[0] in ("-h", "--help"):
        tell(f"usage: steerlab train RECIPE [--task NAME] [OPTIONS]\n\n{summary(train)}\n\nrecipes:")
        tell_names([(name, summary(recipe)) for name, recipe in RECIPES.items()])
        tell("\nsteerlab train RECIPE --help shows its options; --plan says first what a run would cost.")
        return 0
    from steerlab.command_line import order

    wanted = order.read(words)
    if wanted.plan:
        tell_names(wanted.plan_rows())
        return 0
    return carry_out(wanted.folder, wanted.carry_out)


def quickstart(
    out: Annotated[str, say("out")] = "runs/quickstart",
    seed: Seed = 0,
    scale: Annotated[
        Literal["tiny", "small"], tyro.conf.arg(help="tiny takes seconds and only shows that everything works.")
    ] = "small",
    model: Annotated[str, say("model")] = "smollm2-135m",
) -> int:
    """Train steering vectors on one-digit sums, measure the gain, write a report: minutes on two cores."""
    from dataclasses import replace

    from steerlab import execute
    from steerlab.recipes import rloo
    from steerlab.tasks import make

    task = make("chain_sum")
    experiment = rloo(task, model, seed=seed)
    if scale == "tiny":
        experiment = rloo(task, model, seed=seed, steps=3, prompts=4, samples=4, max_new_tokens=8)
        experiment = replace(experiment, evaluation=replace(experiment.answers, limit=8, samples=2))
    code = carry_out(out, lambda progress: execute.execute(experiment, out, reporter=progress))
    tell(f'\nnext:  steerlab generate {out} --prompt "What is 3 + 4?" --base\n       steerlab lens {out}')
    return code


def resume(
    folder: RunFolder,
    shard: Annotated[bool, say("shard")] = False,
    ray: Annotated[str, say("ray")] = "",
) -> int:
    """Go on with a stopped run or sweep, in its own dtype and threads; a finished one is shown."""
    from steerlab.command_line import order

    return carry_out(folder, lambda progress: order.resume(folder, shard, ray or None, progress))


def carry_out(folder: str, work: Callable[[Any], Run]) -> int:
    """Do `work` with a progress line, then show what came out. Ctrl-C says how to go on."""
    from steerlab.command_line import show
    from steerlab.command_line.order import is_sweep
    from steerlab.progress import Progress

    with stoppable(folder), Progress(console()) as progress:
        run = work(progress)
    if is_sweep(folder):
        show.layers(console(), run.table("layers"), run.table("scores"))
        tell(f"figure: {run.path('figures') / 'layers.html'}")
        return 0
    made = run.tables()
    if "scores" in made:
        show.scores(console(), run.table("scores"), run.table("completions"))
    if "lens_fit" in made:
        show.lens_fit(console(), run.table("lens_fit"))
    tell(f"report: {run.path('report.html')}")
    return 0


@contextlib.contextmanager
def stoppable(folder: str) -> Iterator[None]:
    """Turns Ctrl-C into the line that says where the run in `folder` stands."""
    try:
        yield
    except KeyboardInterrupt:
        from steerlab.command_line.order import stopped_where

        raise Stopped(stopped_where(folder)) from None


def evaluate(
    target: Annotated[str, tyro.conf.Positional, RUN_OR_NOTHING] = "",
    model: ModelOf = "",
    task: Annotated[str, tyro.conf.arg(help="Default: the task of the run. See `steerlab tasks`.")] = "",
    task_option: TaskOptions = (),
    split: Annotated[Literal["test", "train"], tyro.conf.arg(help="test: held-out problems.")] = "test",
    samples: Samples = 8,
    temperature: Annotated[float, say("temperature")] = 1.0,
    top_p: Annotated[float, say("top_p")] = 1.0,
    max_new_tokens: Annotated[int | None, tyro.conf.arg(help="In tokens; default: as in the run, else 32.")] = None,
    seeds: Annotated[tuple[int, ...], tyro.conf.arg(help="Seeds of the sampling, one or several.")] = (1000,),
    limit: Annotated[int | None, tyro.conf.arg(help="Only the first so many problems.")] = None,
    shots: Annotated[int, tyro.conf.arg(help="Solved examples for the few-shot baseline; 0 leaves it out.")] = 4,
    greedy: Annotated[bool, tyro.conf.arg(help="Leave out the greedy baseline.")] = True,
    dtype: Annotated[str, say("dtype")] = "auto",
    out: Annotated[str, tyro.conf.arg(help="Folder for the tables; default: the run's own.")] = "",
    allow_other_weights: OtherWeights = False,
) -> int:
    """Score a run, vectors or a base model on a task, beside the greedy and few-shot baselines.

    The tables go to the run's folder as scores@TASK and completions@TASK, or to --out.
    """
    from steerlab.command_line import show
    from steerlab.command_line.subjects import answer_about, subject
    from steerlab.progress import Progress
    from steerlab.rollouts import Evaluation, Sampling
    from steerlab.tasks import make

    if not seeds:
        raise UsageError("--seeds needs at least one number")
    chosen = make(task, **task_options(task_option)) if task else None
    if chosen is None and task_option:
        raise UsageError("--task-option needs --task; the run's own task has its options already")
    about = subject(target, model, dtype, allow_other_weights)
    before = about.experiment
    limit_tokens = max_new_tokens or (before.answers.sampling.max_new_tokens if before else 32)
    evaluation = Evaluation(
        split=split,
        samples=samples,
        sampling=Sampling(temperature, top_p, limit_tokens),
        seed=seeds[0],
        greedy=greedy,
        shots=shots,
        limit=limit,
    )
    with Progress(console()) as progress:
        found = answer_about(about, chosen, evaluation, seeds, out, progress)
    show.scores(console(), found.scores, found.completions)
    for path in found.written:
        tell(f"wrote {path}")
    return 0


def generate(
    run: RunOrVectors,
    prompt: Annotated[str, tyro.conf.arg(help="What to ask.")],
    scale: Annotated[float, tyro.conf.arg(help="Multiplies the vectors; 1 as trained, 0 none, -1 reversed.")] = 1.0,
    base: Annotated[bool, tyro.conf.arg(help="Show the base model's answers first.")] = False,
    samples: Annotated[int, tyro.conf.arg(help="Answers of each.")] = 1,
    temperature: Annotated[float, say("temperature")] = 1.0,
    max_new_tokens: Annotated[int, say("max_new_tokens")] = 64,
    seed: Seed = 0,
    style: Annotated[
        Literal["auto", "chat", "plain", "qwen_math", "r1"], tyro.conf.arg(help="Prompt style; auto: chat if it can.")
    ] = "auto",
    model: ModelOf = "",
    allow_other_weights: OtherWeights = False,
) -> int:
    """Let a steered model answer a prompt, beside the base model if you like."""
    from steerlab import execute
    from steerlab.command_line import show
    from steerlab.command_line.subjects import subject
    from steerlab.rollouts import Sampling
    from steerlab.tasks import Message, Prompt, encode

    if samples < 1:
        raise UsageError(f"samples is {samples}; it must be at least 1")
    sampling = Sampling(temperature, max_new_tokens=max_new_tokens)
    about = subject(run, model, allow_other_weights=allow_other_weights)
    assert about.adapter is not None  # a target was given
    chosen = style if style != "auto" else ("chat" if about.model.tokenizer.chat_template else "plain")
    tokens = encode(Prompt((Message("user", prompt),), chosen), about.model.tokenizer)
    asked = {"base": None} if base else {}
    asked |= {f"steered × {scale:g}": about.adapter * scale}
    for name, adapter in asked.items():
        for text in execute.generate(about.model, adapter, tokens, sampling, samples=samples, seed=seed):
            tell(f"[{name}] {show.clean(text.strip())}")
    return 0


def report(run: RunFolder) -> int:
    """Write report.html of a run again from its tables, and say where it is."""
    from steerlab.execute import write_report
    from steerlab.runs import Run

    tell(str(write_report(Run.open(run))))
    return 0


def models() -> int:
    """List the models that have a short name, and what else can be given."""
    from importlib.metadata import PackageNotFoundError, version

    from steerlab.models.origins import ALIASES

    def there(packages: tuple[str, ...], remedy: str) -> str:
        try:
            return f"installed ({packages[0]} {version(packages[0])})"
        except PackageNotFoundError:
            return f"not installed; {remedy}"

    tell_names([(name, there(origin.distributions, origin.remedy)) for name, origin in ALIASES.items()])
    tell_names([("owner/model", "a hub id"), ("FOLDER", "config.json, safetensors, tokenizer"), ("FILE.gguf", "")])
    return 0


def recipes() -> int:
    """List the training methods."""
    from steerlab.recipes import RECIPES

    tell_names([(name, summary(recipe)) for name, recipe in RECIPES.items()])
    return 0


def tasks(
    check: Annotated[str, tyro.conf.arg(help="Name of a task whose gold answers are to be scored.")] = "",
    task_option: TaskOptions = (),
    gym: Annotated[bool, tyro.conf.arg(help="Also list the data sets of reasoning-gym.")] = False,
) -> int:
    """List the tasks, or check that a task's gold answers score full marks (exit code 1 if not)."""
    from steerlab.tasks import TASKS, make
    from steerlab.tasks.benchmarks import BENCHMARKS
    from steerlab.tasks.gym import names

    if check:
        failing = make(check, **task_options(task_option)).validate()
        if not failing:
            tell(f"{check}: every gold answer scores full marks")
            return 0
        tell(f"{check}: {len(failing)} gold answers do not score")
        tell_names([(f"problem {p.id}", f"{p.answer!r}, read as {j.extracted!r} {j.note}") for p, j in failing])
        return 1
    benchmark = "benchmark; its data are given as path= or found in $STEERLAB_DATA"
    tell_names([(name, summary(task) or (benchmark if name in BENCHMARKS else "")) for name, task in TASKS.items()])
    tell_names([("FILE.jsonl, FILE.csv", "your own questions and answers"), ("NAME", "any reasoning-gym data set")])
    if gym:
        tell("\n".join(names()))
    return 0


COMMANDS: Mapping[str, Callable[..., int]] = {
    "quickstart": quickstart,
    "train": train,
    "resume": resume,
    "eval": evaluate,
    "generate": generate,
    "lens": readouts.lens,
    "tokens": readouts.tokens,
    "persistence": readouts.persistence,
    "adaptive": readouts.adaptive,
    "compose": together.compose,
    "transfer": together.transfer,
    "directions": comparisons.directions,
    "magnitudes": comparisons.magnitudes,
    "side-effects": comparisons.side_effects,
    "languages": readouts.languages,
    "geometry": readouts.geometry,
    "patch": patching.patch,
    "patch-effects": patching.patch_effects,
    "activation-patching": circuits.activation_patching,
    "path-patching": circuits.path_patching,
    "edges": circuits.edges,
    "attention": patching.attention,
    "attribution": patching.attribution,
    "sae": sae,
    "report": report,
    "models": models,
    "recipes": recipes,
    "tasks": tasks,
}

if __name__ == "__main__":
    sys.exit(main())
