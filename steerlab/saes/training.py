"""Training a sparse autoencoder on a stream, through sae-lens' classes and trainer.

sae-lens' `SAETrainer.step` does all of a step: loss, dead latents, Adam, schedules. Ours is the loop around it, as its
own `fit` has it, with a learning curve, checkpoints and another source of batches; and two things before the first
step: activations are scaled to length √width by the stream's own mean (folded into the weights at the end, as
sae-lens does), and the decoder's bias begins at their mean, which hundreds of steps do not reach.

A folder is a run (`runs`): manifest, metrics, `sae/` (what sae-lens calls an inference model), tables. A training that
was killed goes on at its last checkpoint, which has all of sae-lens' trainer; batches are a function of the step, so
the weights come out the same bit for bit on the same machine with the same number of threads.

k: TopK fires k latents at every token, BatchTopK and Matryoshka k on average over a batch (a threshold afterwards),
JumpReLU is drawn to k by Gemma Scope 2's quadratic penalty. Gated has an L1 penalty and no k.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from steerlab import tables
from steerlab.errors import RunFailed, UsageError
from steerlab.runs import Run, encode
from steerlab.saes.load import OURS, Sae, package
from steerlab.saes.streams import Stream
from steerlab.training import StepDone

Architecture = Literal["topk", "batchtopk", "jumprelu", "gated", "matryoshka"]
FOLDER = "sae"
MOVING = 0.1  # weight of a step in the moving mean of the loss
MEASURED = 32_768  # activations whose mean length and mean are taken
THRESHOLD_STEPS = 20  # the threshold of BatchTopK forgets at least this often


@dataclass(frozen=True)
class SaeTraining:
    """How an SAE is trained.

    d_sae: latents; None: `expansion` times the width. k: see the module. penalty: weight of what makes JumpReLU and
    Gated sparse. levels: widths of Matryoshka's inner SAEs, as shares of d_sae. tokens: trained on; None: the whole
    stream once. warm_up, decay: share of the steps in which the learning rate rises to lr and falls to 0. dead_after:
    tokens without firing that make a latent dead; auxiliary: weight of the loss that revives dead ones (TopK,
    BatchTopK, Matryoshka). log_every, checkpoint_every: steps.
    """

    architecture: Architecture = "batchtopk"
    expansion: int = 16
    d_sae: int | None = None
    k: int = 32
    penalty: float = 1.0
    levels: tuple[float, ...] = (1 / 16, 1 / 4)
    lr: float = 1e-3
    batch: int = 1_024
    tokens: int | None = None
    warm_up: float = 0.05
    decay: float = 0.2
    dead_after: int = 200_000
    auxiliary: float = 1 / 32
    log_every: int = 10
    checkpoint_every: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("expansion", "k", "batch", "log_every", "checkpoint_every", "dead_after"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; choose at least 1")
        if not (self.warm_up >= 0 and self.decay >= 0 and self.warm_up + self.decay <= 1):
            raise UsageError(
                f"warm_up {self.warm_up} and decay {self.decay} are shares of the steps; at most 1 together"
            )
        if not all(0 < level < 1 for level in self.levels) or sorted(set(self.levels)) != list(self.levels):
            raise UsageError(f"levels {self.levels} must rise and lie between 0 and 1")

    def width(self, d_in: int) -> int:
        """Latents. Raises UsageError for fewer than k."""
        d_sae = self.expansion * d_in if self.d_sae is None else self.d_sae
        if d_sae < self.k:
            raise UsageError(f"{d_sae} latents cannot have {self.k} of them fire; raise d_sae or lower k")
        return d_sae

    def steps(self, stream: Stream) -> int:
        """Updates, each of a whole batch. Raises UsageError for less than one."""
        tokens = len(stream) if self.tokens is None else self.tokens
        if tokens < self.batch:
            raise UsageError(f"{tokens} tokens make no batch of {self.batch}; name more tokens or a smaller batch")
        return tokens // self.batch


def train(
    stream: Stream,
    options: SaeTraining,
    folder: str | Path,
    *,
    device: str = "cpu",
    on_step: Callable[[StepDone], None] | None = None,
) -> Sae:
    """Train an SAE on `stream` in `folder`, or go on there, or load what is done.

    `tables/sae_training` is its learning curve. Raises UsageError for a folder with something else, or options that do
    not fit the stream; RunFailed if the loss is no number.
    """
    lens, steps = package(), options.steps(stream)
    options.width(stream.width)
    facts = {"options": options, "origin": stream.origin, "rows": len(stream), "width": stream.width}
    run = Run.create(folder, facts, kind="sae", status="created")
    if run.manifest["status"] != "done":
        trainer = _trainer(lens, stream, options, steps, device)
        start = _resume(trainer, run)
        run.update(status="running")
        _fit(trainer, stream, options, run, range(start, steps), on_step)
        _finish(trainer, run)
    inner = lens.SAE.load_from_disk(run.path(FOLDER), device=device)
    inner.requires_grad_(False).eval()
    wanted = None if stream.origin is None else stream.origin.wanted
    return Sae(inner, wanted and wanted.site, wanted.kind if wanted else "residual")


def _trainer(lens: Any, stream: Stream, options: SaeTraining, steps: int, device: str) -> Any:
    """sae-lens' trainer, ready for step 0."""
    from sae_lens.config import SAETrainerConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        sae = lens.TrainingSAE.from_dict(_configuration(options, stream.width, steps, device))
    for name, value in _metadata(stream).items():
        sae.cfg.metadata[name] = value
    config = SAETrainerConfig(
        total_training_samples=steps * options.batch,
        train_batch_size_samples=options.batch,
        lr=options.lr,
        lr_end=options.lr,
        lr_warm_up_steps=int(options.warm_up * steps),
        lr_decay_steps=int(options.decay * steps),
        device=device,
        dead_feature_window=max(1, options.dead_after // options.batch),
    )
    trainer = lens.SAETrainer(config, sae, iter(()))
    sample = stream.batch(0, min(MEASURED, len(stream)))
    scale = stream.width**0.5 / float(sample.norm(dim=1).double().mean())
    trainer.activation_scaler.scaling_factor = scale
    sae.b_dec.data.copy_(sample.double().mean(0) * scale)
    return trainer


def _configuration(options: SaeTraining, width: int, steps: int, device: str) -> dict[str, Any]:
    """As `TrainingSAE.from_dict` takes it."""
    d_sae = options.width(width)
    common = {
        "d_in": width,
        "d_sae": d_sae,
        "dtype": "float32",
        "device": device,
        "normalize_activations": "expected_average_only_in",
    }
    batch_top_k = {
        "k": float(options.k),
        "aux_loss_coefficient": options.auxiliary,
        "topk_threshold_lr": min(1.0, max(0.01, THRESHOLD_STEPS / steps)),
    }
    warm_up = {"l0_warm_up_steps": int(options.warm_up * steps)}
    own: dict[Architecture, dict[str, Any]] = {
        "topk": {"architecture": "topk", "k": options.k, "aux_loss_coefficient": options.auxiliary},
        "batchtopk": {"architecture": "batchtopk", **batch_top_k},
        "matryoshka": {
            "architecture": "matryoshka_batchtopk",
            "matryoshka_widths": [*(max(1, round(level * d_sae)) for level in options.levels), d_sae],
            **batch_top_k,
        },
        "jumprelu": {
            "architecture": "jumprelu",
            "jumprelu_sparsity_loss_mode": "quadratic",
            "target_l0": float(options.k),
            "l0_coefficient": options.penalty,
            **warm_up,
        },
        "gated": {
            "architecture": "gated",
            "l1_coefficient": options.penalty,
            "l1_warm_up_steps": warm_up["l0_warm_up_steps"],
        },
    }
    return common | own[options.architecture]


def _metadata(stream: Stream) -> dict[str, Any]:
    """What sae-lens' metadata says of the place and the model, and what ours adds."""
    if stream.origin is None:
        return {}
    origin = stream.origin
    return {
        "model_name": origin.model,
        "hook_name": origin.hook_name or origin.hf_hook_name,
        "hf_hook_name": origin.hf_hook_name,
        "context_size": origin.longest,
        "prepend_bos": False,
        OURS: {
            "site": str(origin.wanted.site),
            "kind": origin.wanted.kind,
            "weights_sha256": origin.weights_sha256,
            "origin": encode(origin),
        },
    }


def _fit(
    trainer: Any,
    stream: Stream,
    options: SaeTraining,
    run: Run,
    steps: range,
    on_step: Callable[[StepDone], None] | None,
) -> None:
    """sae-lens' `fit`, from one step to the last."""
    moving: float | None = None
    for step in steps:
        began = time.perf_counter()
        trainer.maybe_reset_sparsity()
        out = trainer.step(stream.batch(step, options.batch))
        trainer.n_training_steps += 1
        loss = float(out.loss.detach())
        if not math.isfinite(loss):
            raise RunFailed(f"the loss of step {step} is no number; lower lr, and go on from the last checkpoint")
        wall_s = time.perf_counter() - began
        metrics = {"loss": loss, "wall_s": wall_s, "tokens_per_s": options.batch / wall_s}
        if step % options.log_every == 0 or step == steps.stop - 1:
            lr = trainer.optimizer.param_groups[0]["lr"]
            run.log(
                {"step": step, "tokens": (step + 1) * options.batch, "lr": lr, **metrics, **_measured(trainer, out)}
            )
        if on_step is not None:
            moving = loss if moving is None else (1 - MOVING) * moving + MOVING * loss
            on_step(StepDone(step, steps.stop, metrics | {"loss_ema": moving}))
        if (step + 1) % options.checkpoint_every == 0 and step + 1 < steps.stop:
            _keep(trainer, run, step + 1)


@torch.no_grad()
def _measured(trainer: Any, out: Any) -> dict[str, float]:
    """Of the batch that was just trained on."""
    return {
        "explained_variance": explained_variance(out.sae_in, out.sae_out),
        "l0": float((out.feature_acts != 0).sum(-1).float().mean()),
        "dead_share": float(trainer.dead_neurons.float().mean()),
    }


def explained_variance(x: Float[Tensor, "row width"], reconstructed: Float[Tensor, "row width"]) -> float:
    """1 − squared error / variance, both summed over all coordinates."""
    return 1 - float((x - reconstructed).square().sum() / (x - x.mean(0)).square().sum())


def _finish(trainer: Any, run: Run) -> None:
    """The end of sae-lens' `fit`: the scale goes into the weights; then the SAE and its curve are kept."""
    sae = trainer.sae
    sae.fold_activation_norm_scaling_factor(trainer.activation_scaler.scaling_factor)
    trainer.activation_scaler.scaling_factor = None
    trainer.set_final_sae_metadata()
    _write_whole(run.path(FOLDER), sae.save_inference_model)
    curve = run.metrics().drop(columns="wall_s")
    run.save_table("sae_training", tables.check(curve, "sae_training"))
    run.update(status="done", checkpoint=None)
    _drop_checkpoints(run, None)


def _keep(trainer: Any, run: Run, step: int) -> None:
    """A checkpoint as sae-lens writes it, named in the manifest once it is whole; older ones go."""

    def write(path: Path) -> None:
        trainer.sae.save_model(path)
        trainer.save_trainer_state(path)

    name = f"checkpoint-{step:07d}"
    _write_whole(run.path(name), write)
    run.update(checkpoint={"step": step, "folder": name})
    _drop_checkpoints(run, name)


def _resume(trainer: Any, run: Run) -> int:
    """Bring the trainer to the last checkpoint. Returns the step to go on with."""
    found = run.manifest.get("checkpoint")
    step = found["step"] if found else 0
    if found:
        path = run.path(found["folder"])
        try:
            trainer.load_trainer_state(path)
            trainer.sae.load_weights_from_checkpoint(path)
        except Exception as error:  # whatever torch or safetensors say of damaged files
            raise UsageError(f"{path} is damaged; remove {run.folder} to train anew") from error
    run.truncate(step)
    return step


def _drop_checkpoints(run: Run, kept: str | None) -> None:
    for path in run.folder.glob("checkpoint-*"):
        if path.name != kept:
            shutil.rmtree(path)


def _write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """A folder that is there whole or not at all."""
    part = path.with_name(f".part.{path.name}")
    for old in (part, path):
        shutil.rmtree(old, ignore_errors=True)
    write(part)
    part.rename(path)
