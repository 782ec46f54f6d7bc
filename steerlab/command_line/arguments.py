"""From the words of a command line to a call: one-line errors for tyro, options of a recipe, options of a task.

tyro does the parsing and the help pages. What it says of a mistake is a drawing of several lines; here it becomes one
line with the nearest names. A recipe's options are the parameters of its function, so a new recipe needs nothing here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import json
import textwrap
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import tyro

from steerlab.errors import UsageError, unknown

CONFIG = (tyro.conf.FlagCreatePairsOff,)

MEANINGS: Mapping[str, str] = {
    "task": "A name of `steerlab tasks`, a reasoning-gym data set, or a path to a .jsonl or .csv file.",
    "task_option": "KEY=VALUE for the task, may be repeated, e.g. max_digits=2, train=500, control=random_reward.",
    "model": "An alias of `steerlab models`, a hub id (owner/model), a folder, or a .gguf file.",
    "model_of": "A model, as for `steerlab train`; default: the one that the vectors were trained on.",
    "layers": "Blocks that get a vector, counted from 0; None for all of them. `each`: one run per layer (per named "
    "layer, if some are named), `each all`: and one with all of them, to compare.",
    "layers_read": "Only the vectors of these blocks, counted from 0; default: of all.",
    "task_of": "Whose problems the steered model answers; default: the task of the run. See `steerlab tasks`.",
    "problems": "Held-out problems whose answers are read, one sample each.",
    "prompt": "A text of your own to read instead, may be repeated.",
    "site": "Where the vector is added, e.g. resid_post, attn_out, mlp_out.",
    "adapter": "What is trained: steering vectors, a LoRA of rank 8 on every linear module, or vectors whose strength "
    "depends on the token (rank 1 on every down-projection); others from Python.",
    "advantage": "How the rewards of a group become credit.",
    "steps": "Training steps, one update each.",
    "prompts": "Problems per step.",
    "samples": "Completions per problem.",
    "max_new_tokens": "Longest completion, in tokens.",
    "temperature": "Sampling temperature; 0 is greedy.",
    "top_p": "Sample from the smallest set of tokens with this much probability.",
    "lr": "Peak learning rate; None: the adapter's own (steering 1e-2, adaptive 3e-2, else 1e-3).",
    "text": "A file of prose (.txt or .gz) to learn from; default: WikiText-2 below $STEERLAB_DATA, else the package's "
    "own few hundred words.",
    "rows": "Texts per step.",
    "length": "Of a text, in tokens.",
    "counted": "Positions of a text at which the loss is taken, drawn anew in each step.",
    "seed": "Seed of every random draw.",
    "seeds": "With --layers each: several seeds, one run of every layer under each; default: --seed alone.",
    "lr_last": "With --layers each: peak learning rate of the model's last layer, --lr being that of its first, "
    "geometric in between; default: the same everywhere.",
    "ray": "Of a sweep (--layers each): do the runs on a Ray cluster: HOST:PORT, `auto` for the one that is there, or "
    "`local` for one on this machine.",
    "dtype": "auto (bf16 where the machine has it in hardware, else fp32), fp32, bf16 or fp64.",
    "dtype_read": "What the model computes in while it is read: differences of bf16 states are noisy, hence fp32; "
    "auto: as it was trained.",
    "out": "Folder of the run; must be new, empty, or hold the same run, which is then continued.",
    "shard": "Under torchrun: every process keeps only its share of the frozen weights (slower, less memory).",
    "plan": "Say what the run would cost (passes, tokens, FLOPs, hours, bytes) and stop.",
}


KINDS: Mapping[str, str] = {
    "task": "NAME", "task_option": "KEY=VALUE", "model": "NAME", "model_of": "NAME", "site": "NAME", "dtype": "NAME",
    "dtype_read": "NAME",
    "out": "FOLDER", "ray": "ADDRESS", "text": "FILE", "task_of": "NAME", "prompt": "TEXT",
}  # fmt: skip


def say(name: str) -> Any:
    """The help text, and the word for its value, that every command gives an option of this name."""
    return tyro.conf.arg(help=MEANINGS.get(name, name.replace("_", " ")), metavar=KINDS.get(name))


RunFolder = Annotated[str, tyro.conf.Positional, tyro.conf.arg(help="Folder of a run.", metavar="FOLDER")]
RunOrVectors = Annotated[
    str,
    tyro.conf.Positional,
    tyro.conf.arg(help="Folder of a run, or a .safetensors or .npy file of vectors.", metavar="RUN"),
]
RUN_OR_NOTHING = tyro.conf.arg(help="A run or a file of vectors; nothing for a base model.", metavar="RUN")
OtherWeights = Annotated[bool, tyro.conf.arg(help="Use the vectors though they were trained on other weights.")]
TaskOptions = Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], say("task_option")]
TaskOf = Annotated[str, say("task_of")]
Problems = Annotated[int, say("problems")]
Samples = Annotated[int, say("samples")]
Prompts = Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], say("prompt")]
Layers = Annotated[tuple[int, ...] | None, say("layers_read")]
Seed = Annotated[int, say("seed")]
ModelOf = Annotated[str, say("model_of")]
Exactly = Annotated[str, say("dtype_read")]
Folder = Annotated[str, tyro.conf.arg(help="Folder for tables and figures; default: the run's own.", metavar="FOLDER")]


def parse(call: Callable[..., Any], words: Sequence[str], prog: str) -> Any:
    """Calls `call` (a function or dataclass) with the options in `words`. `--help` prints its page and exits.

    Raises UsageError in one line for what does not fit.
    """
    options = option_names(call)
    for word in words:
        name = word.partition("=")[0].partition(".")[0]
        if name.startswith("--") and name.replace("_", "-") not in options:
            raise unknown(f"option of {prog}", name, options)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            read = tyro.cli(form_of(call), prog=prog, args=list(words), config=CONFIG)
    except SystemExit as left:
        if left.code:
            raise UsageError(f"{one_line(said.getvalue())}; see {prog} --help") from None
        raise
    return read if isinstance(call, type) else call(**vars(read))


def form_of(call: Callable[..., Any]) -> type:
    """A dataclass with the parameters of a function, so that nothing runs inside tyro; a dataclass as it is."""
    if isinstance(call, type):
        return call
    hints = typing.get_type_hints(call, include_extras=True)
    fields: list[Any] = [
        (p.name, hints[p.name], *(() if p.default is inspect.Parameter.empty else (p.default,)))
        for p in inspect.signature(call).parameters.values()
    ]
    made = dataclasses.make_dataclass(f"{call.__name__}_options", fields, frozen=True)
    made.__doc__ = inspect.getdoc(call)
    return made


def option_names(call: Callable[..., Any]) -> list[str]:
    """All options a command knows, as they are typed. A switch that is on has only its `--no-` form."""
    found = ["--help"]
    for parameter in inspect.signature(call).parameters.values():
        off = "no-" if parameter.default is True else ""
        found.append(f"--{off}{parameter.name.replace('_', '-')}")
    return found


def one_line(drawn: str) -> str:
    """The message inside tyro's box, without its title and without the pointer to the help page.

    Where the output cannot show box characters tyro draws with dashes alone.
    """
    rows = [row.strip("│ ") for row in drawn.splitlines()[1:]]
    parts: list[list[str]] = [[]]
    for row in rows:
        if row and set(row) <= set("─-╭╮╰╯"):
            parts.append([])
        elif row:
            parts[-1].append(row)
    said = next((part for part in parts if part), ["these arguments do not fit"])
    if said[0].startswith("Missing from"):
        said = said[:2]  # the first of the missing options, without its help text
    return " ".join(" ".join(said).split()).rstrip(".")


def task_options(pairs: Sequence[str]) -> dict[str, Any]:
    """`("max_digits=2", "style=plain")` → {"max_digits": 2, "style": "plain"}; values are JSON where they can be."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise UsageError(f"task option {pair!r} is not KEY=VALUE; write e.g. --task-option max_digits=2")
        if name in found:
            raise UsageError(f"task option {name} is given twice; keep one")
        try:
            found[name.replace("-", "_")] = json.loads(text)
        except ValueError:
            found[name.replace("-", "_")] = {"True": True, "False": False}.get(text, text)
    return found


@dataclasses.dataclass(frozen=True)
class Choice:
    """A parameter that is one of several parts: what may be typed, and what each word stands for."""

    parts: Mapping[str, Any]

    def word(self, part: Any) -> str:
        return next(word for word, value in self.parts.items() if value == part)


# What a command line may say of a parameter beyond what a recipe takes.
SWEPT: Mapping[str, Any] = {"layers": tuple[int | Literal["each", "all"], ...] | None}


def choices() -> dict[Any, Choice]:
    """Protocols whose implementations a person chooses by name."""
    from steerlab.adapters import AdapterSpec, LoRA
    from steerlab.objectives import Advantage, GroupMean, GroupNormalised, LeaveOneOut

    return {
        AdapterSpec | None: Choice(
            {"steering": None, "lora": LoRA(), "adaptive": LoRA(rank=1, alpha=1.0, targets=("down_proj",))}
        ),
        Advantage: Choice(
            {"leave_one_out": LeaveOneOut(), "group_mean": GroupMean(), "group_normalised": GroupNormalised()}
        ),
    }


def options_of(recipe: Callable[..., Any], name: str) -> type:
    """A frozen dataclass whose fields are the recipe's parameters, and those of `steerlab train`: of a task where the
    recipe takes one, of a sweep where it takes layers.

    Its method `experiment()` makes the task and calls the recipe.
    """
    kinds, known, parameters = typing.get_type_hints(recipe), choices(), inspect.signature(recipe).parameters
    fields: list[Any] = []
    if "task" in parameters:
        fields += [
            ("task", Annotated[str, say("task")]),
            ("task_option", Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], say("task_option")], ()),
        ]
    for parameter in parameters.values():
        if parameter.name == "task":
            continue
        kind, default = kinds[parameter.name], parameter.default
        if kind in known:
            default = known[kind].word(default)
            kind = Literal[tuple(known[kind].parts)]  # type: ignore[valid-type]
        kind = SWEPT.get(parameter.name, kind)
        required = parameter.default is inspect.Parameter.empty
        fields.append((parameter.name, Annotated[kind, say(parameter.name)], *(() if required else (default,))))
    if SWEPT.keys() & parameters.keys():
        fields += [
            ("seeds", Annotated[tuple[int, ...], say("seeds")], ()),
            ("lr_last", Annotated[float | None, say("lr_last")], None),
            ("ray", Annotated[str, say("ray")], ""),
        ]
    fields += [
        ("out", Annotated[str, say("out")], ""),
        ("plan", Annotated[bool, say("plan")], False),
        ("shard", Annotated[bool, say("shard")], False),
    ]

    def experiment(self: Any) -> Any:
        from steerlab.tasks import make

        asked = (make(self.task, **task_options(self.task_option)),) if "task" in parameters else ()
        chosen = {p: getattr(self, p) for p in parameters if p != "task"}
        chosen |= {p: None for p in SWEPT if any(isinstance(word, str) for word in chosen.get(p) or ())}
        return recipe(*asked, **{p: known[kinds[p]].parts[v] if kinds[p] in known else v for p, v in chosen.items()})

    made = dataclasses.make_dataclass(f"{name}_options", fields, frozen=True, namespace={"experiment": experiment})
    made.__doc__ = inspect.getdoc(recipe)
    return made


def summary(thing: object) -> str:
    """First paragraph of a docstring, in one line."""
    return (inspect.getdoc(thing) or "").partition("\n\n")[0].replace("\n", " ")


def two_columns(rows: Sequence[tuple[str, str]], width: int) -> str:
    """Names and their meanings, the meanings wrapped beside the names; `width` in characters."""
    column = max(len(name) for name, _ in rows) + 4
    lines = []
    for name, meaning in rows:
        first, *rest = textwrap.wrap(meaning, max(40, width - column)) or [""]
        lines += [f"  {name}".ljust(column) + first, *(" " * column + more for more in rest)]
    return "\n".join(line.rstrip() for line in lines)
