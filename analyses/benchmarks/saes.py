"""What a stream of activations and training on it cost, and how good an SAE of so many tokens is.

**Stream**: texts of `length` tokens of running text, residuals behind one layer, in memory and on disk (checksums and
reading back included), against forwards of the same batches that stop at the same layer and keep nothing. `ratio` =
seconds of those ÷ ours, that is, the share of their tokens per second; must 0.80.

**Training**: BatchTopK, k = 32, 16 times the width, our loop (learning curve included) against sae-lens' own
`SAETrainer.fit` on the same batches; seconds of the steps behind the first. `ratio` = theirs ÷ ours; must 0.95.

**Quality** (--tokens, 0 leaves it out): an SAE trained on so many tokens (texts begin again where there are less), on
held-out tokens: explained variance − that of 32 principal components must be 0.05, loss recovered 0.90.

    uv run python analyses/benchmarks/saes.py --dtypes bf16 --text FILE --out analyses/benchmarks/results
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import tyro
import workload
from workload import Dtype, Row, Workload

from steerlab.corpus import Prose
from steerlab.models import Site
from steerlab.models.forward import ending_after
from steerlab.saes.activations import Activations, fed_together, prose_texts, record
from steerlab.saes.load import package
from steerlab.saes.quality import sae_quality, spliced_losses
from steerlab.saes.streams import Stream
from steerlab.saes.training import SaeTraining, train
from steerlab.training import Texts

if TYPE_CHECKING:
    from steerlab.interp.texts import Text
    from steerlab.models import LanguageModel

COLUMNS = (
    *("dtype", "case", "ours", "rival", "ratio", "spread", "must", "tokens_per_s"),
    *("explained_variance", "pca_explained_variance", "l0", "dead_share", "loss_recovered", "n_tokens"),
)


@dataclass(frozen=True)
class Options(workload.Options):
    """layer: behind which the residual stream is read. texts: that are timed. steps: of training that are timed."""

    dtypes: tuple[Dtype, ...] = ("bf16",)
    repeats: int = 3
    text: str | None = None
    layer: int = 15
    length: int = 128
    texts: int = 128
    steps: int = 8
    tokens: int = 0


def timed(work: Any) -> float:
    """Seconds."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def streams(model: LanguageModel, texts: list[Text], wanted: Activations, repeats: int) -> Iterator[Row]:
    """Recording in memory and on disk, and the forwards that it consists of, in turns."""

    @torch.no_grad()
    def forwards() -> None:
        with ending_after(model, wanted.site.layer):
            for fed in fed_together(texts, range(len(texts)), wanted.batch_tokens, model.device):
                model.hidden(fed.tokens)

    def on_disk() -> None:
        with tempfile.TemporaryDirectory() as folder:
            record(model, texts, wanted, folder=folder)

    sides = [on_disk, forwards, lambda: record(model, texts, wanted)]
    _, *turns = workload.in_turns([lambda side=side: timed(side) for side in sides], repeats)
    disk, plain, memory = zip(*turns, strict=True)
    n_tokens = sum(len(text.tokens) for text in texts)
    for name, ours in (("stream in memory", memory), ("stream on disk", disk)):
        row = workload.compared(ours, plain)
        yield {"case": name, **row, "must": 0.80, "tokens_per_s": n_tokens / row["ours"]}


def training(stream: Stream, options: SaeTraining, repeats: int) -> Row:
    """Our loop and sae-lens' `fit`, in turns; seconds of all steps but the first."""

    def ours() -> float:
        ends: list[float] = []
        with tempfile.TemporaryDirectory() as folder:
            train(stream, options, Path(folder) / "run", on_step=lambda _: ends.append(time.perf_counter()))
        return ends[-1] - ends[0]

    _, *turns = workload.in_turns([ours, lambda: fit_of_sae_lens(stream, options)], repeats)
    row = workload.compared(*zip(*turns, strict=True))
    return {
        "case": f"training, {options.width(stream.width)} latents",
        **row,
        "must": 0.95,
        "tokens_per_s": (options.steps(stream) - 1) * options.batch / row["ours"],
    }


def fit_of_sae_lens(stream: Stream, options: SaeTraining) -> float:
    """sae-lens as its users have it."""
    lens, starts = package(), []
    from sae_lens.config import SAETrainerConfig

    def batches() -> Iterator[torch.Tensor]:
        for step in range(options.steps(stream) + 1):
            starts.append(time.perf_counter())
            yield stream.batch(step, options.batch)

    config = lens.BatchTopKTrainingSAEConfig(
        d_in=stream.width, d_sae=options.width(stream.width), k=options.k, aux_loss_coefficient=options.auxiliary
    )
    n = (options.steps(stream) + 1) * options.batch  # the last only marks the end of the one before
    trainer = lens.SAETrainer(
        SAETrainerConfig(
            total_training_samples=n, train_batch_size_samples=options.batch, lr=options.lr, lr_end=options.lr
        ),
        lens.BatchTopKTrainingSAE(config),
        batches(),
    )
    trainer.fit()
    return starts[-1] - starts[1]


def quality(
    model: LanguageModel, train_texts: list[Text], held_out: list[Text], wanted: Activations, options: SaeTraining
) -> Row:
    """End to end, on streams in memory."""
    start = time.perf_counter()
    needed = -(-(options.tokens or 0) // (len(train_texts[0].tokens) - wanted.skip))
    stream = record(model, train_texts[:needed], wanted)
    with tempfile.TemporaryDirectory() as folder:
        sae = train(stream, options, Path(folder) / "run")
    seconds = time.perf_counter() - start
    losses = spliced_losses(model, sae, held_out[::8], wanted)
    found = sae_quality(sae, record(model, held_out, wanted), stream, losses).iloc[0].to_dict()
    tokens = options.steps(stream) * options.batch
    more = {"case": f"quality after {tokens} tokens", "ours": seconds, "tokens_per_s": tokens / seconds}
    return found | more | {"distinct_tokens": len(stream)}


def measure(model: LanguageModel, _work: Workload, options: Options) -> list[Row]:
    """Rows of the table for one dtype."""
    tiny = options.scale == "tiny"
    layer, length, n = (1, 16, 8) if tiny else (options.layer, options.length, options.texts)
    wanted = Activations(Site("resid_post", layer))
    train_texts, held_out = prose_texts(model, Texts(Prose.find(options.text), length=length, counted=None))
    timed_on = [train_texts[i % len(train_texts)] for i in range(n)]
    batch, k = (16, 4) if tiny else (1_024, 32)
    how = SaeTraining(k=k, batch=batch, tokens=batch * options.steps)
    stream = record(model, timed_on, wanted)
    rows = [*streams(model, timed_on, wanted, options.repeats), training(stream, how, options.repeats)]
    if options.tokens:
        rows.append(quality(model, train_texts, held_out, wanted, replace(how, tokens=options.tokens)))
    return rows


def main(options: Options) -> list[Row]:
    """Prints a table and, with --out, writes JSON."""
    return workload.table(options, COLUMNS, "saes", lambda model, work: measure(model, work, options))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
