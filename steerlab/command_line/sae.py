"""`steerlab sae ACTION`: sparse autoencoders on what a model computes, or on what vectors change there.

A folder gets `activations` and `held_out` (streams, which can be gone on with) and `training`, a run whose `sae` is the
directory that sae-lens reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from steerlab.command_line import latents
from steerlab.command_line.arguments import (
    RUN_OR_NOTHING,
    Exactly,
    ModelOf,
    OtherWeights,
    Seed,
    TaskOf,
    parse,
    say,
    summary,
)
from steerlab.command_line.terminal import console, tell, tell_names
from steerlab.errors import UsageError, unknown

if TYPE_CHECKING:
    import pandas as pd

    from steerlab.command_line.subjects import Subject
    from steerlab.interp.texts import Text
    from steerlab.runs import Run
    from steerlab.saes.streams import Activations

HELD_OUT = 0.1  # share of the texts
LOSS_TEXTS = 64  # held-out texts that the SAE is spliced into


def sae(words: Sequence[str]) -> int:
    """Train sparse autoencoders on activations or on what vectors change; read and edit their latents."""
    if not words or words[0] in ("-h", "--help"):
        tell(f"usage: steerlab sae ACTION [OPTIONS]\n\n{summary(sae)}\n\nactions:")
        tell_names([(name, summary(action)) for name, action in ACTIONS.items()])
        tell("\nsteerlab sae ACTION --help shows its options. Needs: pip install steerlab[saes]")
        return 0
    name, rest = words[0], words[1:]
    if name not in ACTIONS:
        raise unknown("action of steerlab sae", name, ACTIONS)
    return int(parse(ACTIONS[name], rest, f"steerlab sae {name}") or 0)


def train(
    run: Annotated[str, tyro.conf.Positional, RUN_OR_NOTHING] = "",
    site: Annotated[
        str, tyro.conf.arg(help="Where, as in resid_post.15; default: behind the middle block.", metavar="SITE")
    ] = "",
    kind: Annotated[
        Literal["residual", "difference"], tyro.conf.arg(help="The values, or steered − base on the same tokens.")
    ] = "residual",
    architecture: Annotated[
        Literal["topk", "batchtopk", "jumprelu", "gated", "matryoshka"], tyro.conf.arg(help="Which of sae-lens'.")
    ] = "batchtopk",
    expansion: Annotated[int, tyro.conf.arg(help="Latents per dimension of the site.")] = 16,
    k: Annotated[int, tyro.conf.arg(help="Latents that fire per token; gated has none.")] = 32,
    tokens: Annotated[
        int | None, tyro.conf.arg(help="To train on; texts begin again where there are less. Default: all, once.")
    ] = None,
    text: Annotated[str, say("text")] = "",
    length: Annotated[int, say("length")] = 128,
    problems: Annotated[
        int, tyro.conf.arg(help="Read what the steered model answers to so many problems, in place of prose.")
    ] = 0,
    task: TaskOf = "",
    lr: Annotated[float, tyro.conf.arg(help="Peak learning rate.")] = 1e-3,
    batch: Annotated[int, tyro.conf.arg(help="Tokens per step.")] = 1_024,
    seed: Seed = 0,
    model: ModelOf = "",
    dtype: Exactly = "fp32",
    out: Annotated[str, tyro.conf.arg(help="Folder; goes on with what is there.", metavar="FOLDER")] = "runs/sae",
    allow_other_weights: OtherWeights = False,
) -> int:
    """Train a sparse autoencoder on a stream of activations, and measure it on held-out tokens.

    Stopped by Ctrl-C or killed, the same command goes on where it was.
    """
    from steerlab.command_line.subjects import subject
    from steerlab.progress import Progress
    from steerlab.runs import Run
    from steerlab.saes import activations, quality, training
    from steerlab.saes.load import package

    package()
    about = subject(run, model, dtype, allow_other_weights)
    wanted = _wanted(about, site, kind, seed)
    options = training.SaeTraining(architecture, expansion, k=k, lr=lr, batch=batch, tokens=tokens, seed=seed)
    with Progress(console()) as progress:
        progress.stage(f"recording {kind} {wanted.site}")
        hear = lambda done, of: progress.notice(f"  {done:,} of {of:,} tokens")  # noqa: E731
        texts, held_out = _texts(about, text, length, problems, task, seed)
        if tokens is not None:
            texts = _first(texts, wanted, tokens)
        stream = activations.record(about.model, texts, wanted, about.adapter, Path(out) / "activations", hear=hear)
        beside = activations.record(about.model, held_out, wanted, about.adapter, Path(out) / "held_out")
        progress.stage(f"training on {len(stream):,} tokens")
        made = training.train(stream, options, Path(out) / "training", on_step=progress.step)
    losses = quality.spliced_losses(about.model, made, held_out[:LOSS_TEXTS], wanted, about.adapter)
    return _keep(Run.open(Path(out) / "training"), quality.sae_quality(made, beside, stream, losses))


def _keep(run: Run, found: pd.DataFrame) -> int:
    """Tables and figures into the run; a few numbers on the terminal."""
    from steerlab.execute import write_report
    from steerlab.plots import saes as plots
    from steerlab.readings import Reading

    figures = {
        "sae_training": plots.sae_training(run.table("sae_training")),
        "sae_quality": plots.sae_quality(found),
    }
    Reading({"sae_quality": found}, figures).save(run)
    row = found.iloc[0].to_dict()
    tell_names(
        [
            ("explained variance", f"{row['explained_variance']:.3f} of {row['n_tokens']:,} held-out tokens"),
            (f"{row['pca_components']} principal components", f"{row['pca_explained_variance']:.3f}"),
            ("latents per token", f"{row['l0']:.1f} of {row['d_sae']:,}; {row['dead_share']:.1%} never fire there"),
            ("loss recovered", f"{row['loss_recovered']:.3f} ({row['n_loss_tokens']:,} tokens)"),
        ]
    )
    tell(f"report: {write_report(run)}\nsae-lens directory: {run.path('sae')}")
    return 0


def _wanted(about: Subject, site: str, kind: Literal["residual", "difference"], seed: int) -> Activations:
    from steerlab.models import Site
    from steerlab.saes.streams import Activations

    place = Site.parse(site) if site else Site("resid_post", about.model.n_layers // 2)
    return Activations(place, kind, seed=seed)


def _texts(
    about: Subject, text: str, length: int, problems: int, task: str, seed: int
) -> tuple[list[Text], list[Text]]:
    """To train on, and held out: the last part."""
    from steerlab.command_line.subjects import texts_about
    from steerlab.corpus import Prose
    from steerlab.saes.activations import prose_texts
    from steerlab.training import Texts

    if not problems:
        source = Texts(Prose.find(text or None), length=length, counted=None, held_out=HELD_OUT)
        return prose_texts(about.model, source)
    if problems < 2:
        raise UsageError("--problems is 1; at least 2 are needed, one of them held out")
    answers = texts_about(about, (), task, problems, seed)
    n = max(1, round(HELD_OUT * len(answers)))
    return answers[:-n], answers[-n:]


def _first(texts: list[Text], wanted: Activations, tokens: int) -> list[Text]:
    """As many texts as have so many tokens to record, or all."""
    from steerlab.saes.activations import kept

    found, n = [], 0
    for text in texts:
        if n >= tokens:
            break
        found.append(text)
        n += len(kept(text, wanted))
    return found


ACTIONS: Mapping[str, Callable[..., int]] = {
    "train": train,
    "score": latents.score,
    "latents": latents.latents,
    "causal": latents.causal,
}
