"""The commands that patch single places and paths of the whole model where vectors decide what is said."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from steerlab.command_line.arguments import (
    Exactly,
    Folder,
    Layers,
    ModelOf,
    OtherWeights,
    Problems,
    RunOrVectors,
    Seed,
    TaskOf,
)
from steerlab.command_line.readouts import keep, place
from steerlab.command_line.terminal import console
from steerlab.errors import UsageError

if TYPE_CHECKING:
    from steerlab.command_line.subjects import Subject
    from steerlab.interp.decisions import Decisions
    from steerlab.interp.path_patching import Sender


def activation_patching(
    run: RunOrVectors,
    layers: Layers = None,
    kinds: Annotated[
        tuple[str, ...], tyro.conf.arg(help="Sites to patch, one block at a time; z, q, k, v by head.", metavar="SITE")
    ] = ("z", "attn_out", "mlp_out"),
    task: TaskOf = "",
    problems: Problems = 8,
    seed: Seed = 0,
    model: ModelOf = "",
    dtype: Exactly = "fp32",
    out: Folder = "",
    allow_other_weights: OtherWeights = False,
) -> int:
    """Put one head or MLP of the steered run into the base run: how much of the effect comes back.

    Each answer is cut where the vectors move its next token most; see `steerlab.interp.decisions`.
    """
    from steerlab import readings
    from steerlab.command_line import show_paths
    from steerlab.command_line.subjects import subject

    about = subject(run, model, dtype, allow_other_weights)
    folder = place(about, out)
    found = readings.activation_patching(about.model, _decisions(about, layers, task, problems, seed), kinds)
    show_paths.activation_patching(console(), found.tables["activation_patching"])
    return keep(found, folder)


def path_patching(
    run: RunOrVectors,
    sender: Annotated[
        str, tyro.conf.arg(help="vector, embedding, head.LAYER.HEAD, attention.LAYER or mlp.LAYER.", metavar="NAME")
    ] = "vector",
    through: Annotated[
        Literal["direct", "mlps"], tyro.conf.arg(help="Direct paths, or also those that MLPs make of them.")
    ] = "direct",
    layers: Layers = None,
    task: TaskOf = "",
    problems: Problems = 8,
    seed: Seed = 0,
    model: ModelOf = "",
    dtype: Exactly = "fp32",
    out: Folder = "",
    allow_other_weights: OtherWeights = False,
) -> int:
    """Show which heads and MLPs hear what one sender says, and what that does to the next token.

    The vector as a sender is one layer's: name it with --layers where the run has several.
    """
    from steerlab import readings
    from steerlab.command_line import show_paths
    from steerlab.command_line.subjects import subject

    about = subject(run, model, dtype, allow_other_weights)
    of = named(sender, about.of_layers(layers).layers)
    folder = place(about, out)
    found = readings.path_patching(about.model, _decisions(about, layers, task, problems, seed), of, through=through)
    show_paths.path_patching(console(), found.tables["path_patching"])
    return keep(found, folder)


def edges(
    run: RunOrVectors,
    layers: Layers = None,
    steps: Annotated[int, tyro.conf.arg(help="Of integrated gradients; 0: gradients of the base run alone.")] = 5,
    links: Annotated[int, tyro.conf.arg(help="The strongest ones are drawn, as far as they lead on.")] = 60,
    check: Annotated[int, tyro.conf.arg(help="Edges that are also patched exactly; 0: none.")] = 60,
    task: TaskOf = "",
    problems: Problems = 8,
    seed: Seed = 0,
    model: ModelOf = "",
    dtype: Exactly = "fp32",
    out: Folder = "",
    allow_other_weights: OtherWeights = False,
) -> int:
    """Estimate all paths from vectors to logits at once; draw the strongest, check some exactly.

    The graph is also written as JSON that circuit-tracer's viewer reads.
    """
    from steerlab import readings
    from steerlab.command_line import show_paths
    from steerlab.command_line.subjects import subject

    about = subject(run, model, dtype, allow_other_weights)
    folder = place(about, out)
    decided = _decisions(about, layers, task, problems, seed)
    found = readings.edges(about.model, decided, steps=steps, links=links, check=check, seed=seed)
    show_paths.edges(console(), found.tables["path_links"], found.tables["edges"])
    if "agreement" in found.tables:
        show_paths.agreement(console(), found.tables["agreement"])
    return keep(found, folder)


def named(text: str, layers: tuple[int, ...]) -> Sender:
    """The sender called `text`; a vector is that of `layers`, which must be one. Raises UsageError for no such name."""
    from steerlab.interp.path_patching import Sender

    kind, *numbers = text.split(".")
    wanted = {"vector": 0, "embedding": 0, "head": 2, "attention": 1, "mlp": 1}
    if wanted.get(kind) != len(numbers) or not all(number.isdecimal() for number in numbers):
        raise UsageError(
            f"{text!r} is not a sender; write vector, embedding, head.LAYER.HEAD, attention.LAYER or mlp.LAYER"
        )
    if kind == "vector":
        if len(layers) != 1:
            raise UsageError(f"the vector as a sender is one layer's, there are {len(layers)}; add --layers LAYER")
        return Sender("vector", *layers)
    return Sender(kind, *map(int, numbers))


def _decisions(about: Subject, layers: tuple[int, ...] | None, task: str, problems: int, seed: int) -> Decisions:
    """Where the vectors decide, in what they answer themselves."""
    from steerlab import readings
    from steerlab.command_line.subjects import asked_about
    from steerlab.interp.decisions import decisions

    vectors = about.of_layers(layers)
    asked, evaluation = asked_about(about, task)
    texts = readings.own_texts(about.model, vectors, asked, evaluation, problems, seed)
    return decisions(about.model, vectors, texts)
