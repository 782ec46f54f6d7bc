"""The register of tasks by name, and `make`, which builds one from plain options (the command line's door).

Options that every task has (prompt style, rewards, controls, …) are handled here once; a task's constructor takes
only what is its own. Names are those of the register, of any reasoning-gym data set, or a path to a data file.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from steerlab.errors import UsageError, unknown
from steerlab.tasks import gym as gym_module
from steerlab.tasks.benchmarks import BENCHMARKS, benchmark
from steerlab.tasks.controls import FormatOnlyReward, RandomReward
from steerlab.tasks.gym import ONE_DIGIT_SUMS, Gym, GymScore, Parameter
from steerlab.tasks.ifeval import Follows
from steerlab.tasks.reading import SUFFIXES
from steerlab.tasks.records import Columns, Place, Records
from steerlab.tasks.task import ProblemSet, Rewards, Task, Verifier
from steerlab.tasks.verifiers import Boxed, FinalText, Function, LastNumber, MultipleChoice, Regex

VERIFIERS: Mapping[str, Callable[[], Verifier]] = {
    "last_number": LastNumber,
    "boxed": Boxed,
    "multiple_choice": MultipleChoice,
    "final_text": FinalText,
}


@dataclass(frozen=True)
class Common:
    """Options of every task. Empty means as the task has it; `verifier` is a name of VERIFIERS, "regex:PATTERN" or
    "file.py:function"; `control` is "", "random_reward", "format_only_reward" (bare form) or "format_found_reward"."""

    style: Literal["", "chat", "plain", "qwen_math", "r1"] = ""
    system: str = ""
    instruction: str = ""
    solution: str = ""
    opening: str = ""
    wrong: float = -1.0
    right: float = 1.0
    shots: int = 0
    shots_seed: int = 0
    verifier: str = ""
    control: Literal["", "random_reward", "format_only_reward", "format_found_reward"] = ""
    control_seed: int = 0
    control_p: float = 0.5


def gym(
    dataset: str = "chain_sum",
    parameters: Mapping[str, Parameter] | None = None,
    train: int = 100,
    test: int = 100,
    seed: int = 42,
    split_seed: int = 0,
    extract: Literal["auto", "number", "tag", "text"] = "auto",
) -> ProblemSet:
    """Any reasoning-gym data set; `parameters` are its own (for chain_sum without any: one digit, two terms)."""
    default = ONE_DIGIT_SUMS if dataset == "chain_sum" else ()
    chosen = {**dict(default), **{k: tuple(v) if isinstance(v, list) else v for k, v in (parameters or {}).items()}}
    settings = tuple(sorted(chosen.items()))
    source = Gym(dataset, settings, train, test, seed, split_seed)
    return ProblemSet(dataset, source, GymScore(dataset, settings, seed, extract))


def chain_sum(
    min_terms: int = 2,
    max_terms: int = 2,
    min_digits: int = 1,
    max_digits: int = 1,
    allow_negation: bool = False,
    train: int = 100,
    test: int = 100,
    seed: int = 42,
    split_seed: int = 0,
) -> ProblemSet:
    """Sums and differences. One digit and two terms make exactly 200 distinct ones: 100 to train, 100 held out."""
    chosen = {"min_terms": min_terms, "max_terms": max_terms, "min_digits": min_digits, "max_digits": max_digits}
    negation = {"allow_negation": True} if allow_negation else {}
    return gym("chain_sum", {**chosen, **negation}, train, test, seed, split_seed)


def records(
    path: str,
    question: str = "question",
    answer: str = "answer",
    test_path: str = "",
    train: int = 0,
    test: int = 0,
    split_seed: int = 0,
) -> ProblemSet:
    """Your own .jsonl or .csv; without `test_path` it is split by seed into train and held-out problems."""
    places, held = (Place(path),), (Place(test_path),) if test_path else ()
    columns = Columns((question,), (answer,))
    return ProblemSet(path, Records(places, held, columns, train, test, not held, split_seed), LastNumber())


def deepmind_mathematics(
    path: str = "",
    module: str = "*",
    train_split: str = "train-*",
    test_split: str = "interpolate",
    train: int = 0,
    test: int = 0,
    split_seed: int = 0,
) -> ProblemSet:
    """School mathematics by module ("arithmetic__*") and regime (train-easy, train-medium, …, extrapolate)."""
    of_module = ("module", module)
    train_where, test_where = (("split", train_split), of_module), (("split", test_split), of_module)
    return benchmark("deepmind_mathematics", path, train, test, split_seed, False, train_where, test_where)


def ifeval(
    path: str = "", mode: Literal["strict", "loose"] = "strict", train: int = 0, test: int = 0, split_seed: int = 0
) -> ProblemSet:
    """Instructions that a program can check, all of a prompt's followed."""
    return replace(benchmark("ifeval", path, train, test, split_seed, True), verifier=Follows(mode))


def _benchmark_task(name: str) -> Callable[..., ProblemSet]:
    def make_benchmark(
        path: str = "", train: int = 0, test: int = 0, split_seed: int = 0, split: bool = False
    ) -> ProblemSet:
        return benchmark(name, path, train, test, split_seed, split)

    return make_benchmark


TASKS: dict[str, Callable[..., ProblemSet]] = {
    "gym": gym,
    "records": records,
    **{name: _benchmark_task(name) for name in BENCHMARKS},
    "chain_sum": chain_sum,
    "deepmind_mathematics": deepmind_mathematics,
    "ifeval": ifeval,
}


def make(name: str, **options: Any) -> Task:
    """The task `name` with its options and those of `Common`. UsageError: unknown task or option, or a bad value.

    `make("chain_sum")`, `make("svamp", path="…/svamp")`, `make("mine.csv", question="q", shots=4)`,
    `make("leg_counting", max_animals=4)`: parameters of a reasoning-gym data set are given as options.
    """
    common_names = {f.name for f in fields(Common)}
    shared = {k: v for k, v in options.items() if k in common_names}
    _check_kinds(name, shared, Common)
    own = {k: v for k, v in options.items() if k not in common_names}
    return _finished(_constructed(name, own, common_names), Common(**shared))


def _constructed(name: str, own: dict[str, Any], common_names: set[str]) -> ProblemSet:
    if name not in TASKS and name.lower().endswith(SUFFIXES):
        own, constructor = {"path": name, **own}, records
    elif name in TASKS:
        constructor = TASKS[name]
    elif name in gym_module.names():
        taken = set(inspect.signature(gym).parameters)
        parameters = {k: own.pop(k) for k in list(own) if k not in taken and k in gym_module.parameter_names(name)}
        own, constructor = {"dataset": name, "parameters": parameters, **own}, gym
    else:
        raise unknown("task", name, [*TASKS, *gym_module.names()])
    accepted = inspect.signature(constructor).parameters
    for option in own:
        if option not in accepted:
            known = [*accepted, *common_names]
            if constructor is gym and name != "gym":
                known += gym_module.parameter_names(name)
            raise unknown(f"option of task {name}", option, known)
    missing = [p.name for p in accepted.values() if p.default is p.empty and p.name not in own]
    if missing:
        raise UsageError(f"task {name} needs {missing[0]}=; give it")
    _check_kinds(name, own, constructor)
    return constructor(**own)


def _check_kinds(task: str, options: Mapping[str, Any], owner: Callable[..., Any]) -> None:
    """Refuses a text for a number, and a word that is none of a Literal's, by the annotations of `owner`."""
    hints = get_type_hints(owner)
    for option, value in options.items():
        hint = hints[option]
        if get_origin(hint) is Literal:
            if value not in get_args(hint):
                raise unknown(option, str(value), map(str, get_args(hint)))
        elif hint in (int, float, str, bool):
            fits = isinstance(value, (int, float) if hint is float else hint)
            if not fits or (isinstance(value, bool) and hint is not bool):
                raise UsageError(f"option {option} of task {task} is {value!r}; give it as {hint.__name__}")


def _finished(task: ProblemSet, common: Common) -> Task:
    style = common.style or task.layout.style
    layout = replace(
        task.layout,
        style=style,
        system=common.system or task.layout.system,
        instruction=common.instruction or task.layout.instruction,
        solution=common.solution or task.layout.solution,
        opening=common.opening or task.layout.opening,
    )
    verifier = _verifier(common.verifier) if common.verifier else task.verifier
    if style == "r1" and isinstance(verifier, Boxed):
        verifier = replace(verifier, tag=True)
    made = replace(task, layout=layout, verifier=verifier, rewards=Rewards(common.wrong, common.right))
    if common.shots:
        made = made.few_shot(common.shots, common.shots_seed)
    match common.control:
        case "":
            return made
        case "random_reward":
            return RandomReward(made, common.control_seed, common.control_p)
        case "format_only_reward":
            return FormatOnlyReward(made, "bare")
        case "format_found_reward":
            return FormatOnlyReward(made, "found")


def _verifier(text: str) -> Verifier:
    if text in VERIFIERS:
        return VERIFIERS[text]()
    if text.startswith("regex:"):
        return Regex(text.removeprefix("regex:"))
    if ".py:" in text:
        return Function(text)
    raise unknown("verifier", text, [*VERIFIERS, "regex:PATTERN", "file.py:function"])
