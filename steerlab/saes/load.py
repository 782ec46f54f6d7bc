"""A sparse autoencoder of sae-lens at a site of ours: from a folder that it or we wrote, or one of its releases.

sae-lens (and TransformerLens, which it needs) is imported when an SAE is asked for, never before; what the import does
to warnings and to transformers' log is undone. Encoding and decoding are sae-lens' own.

Left out: transcoders, single heads, and SAEs of a stream that TransformerLens has centred; they are refused.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from steerlab.errors import UsageError
from steerlab.models import LanguageModel, Site
from steerlab.saes.hook_names import site_of
from steerlab.saes.streams import Kind

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
OURS = "steerlab"  # what we add to sae-lens' metadata


def package() -> Any:
    """The module `sae_lens`. Raises UsageError if it is not installed."""
    log = logging.getLogger("transformers")
    level = log.level
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of TransformerLens, about itself
            return importlib.import_module("sae_lens")
    except ModuleNotFoundError as error:
        if error.name != "sae_lens":
            raise
        raise UsageError("sae_lens is not installed; pip install steerlab[saes]") from None
    finally:
        log.setLevel(level)


@dataclass(frozen=True)
class Sae:
    """inner: sae-lens' own, frozen. site: None where no model is involved. kind: of what it was trained on."""

    inner: Any
    site: Site | None
    kind: Kind = "residual"

    @property
    def d_sae(self) -> int:
        return self.inner.cfg.d_sae

    @property
    def width(self) -> int:
        return self.inner.cfg.d_in

    @property
    def architecture(self) -> str:
        """As it was trained: a batch-top-k SAE is stored as a JumpReLU one."""
        trained = self.inner.cfg.metadata.training_architecture or self.inner.cfg.architecture()
        return "matryoshka" if trained == "matryoshka_batchtopk" else trained

    @property
    def directions(self) -> Float[Tensor, "d_sae width"]:
        """What each latent writes."""
        return self.inner.W_dec.detach()

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch d_sae"]:
        """How strongly each latent fires."""
        return self.inner.encode(x.to(self.inner.device))

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch width"]:
        return self.inner.decode(latents)


def load(
    source: str | Path,
    model: LanguageModel | None,
    *,
    sae_id: str = "",
    site: Site | None = None,
    allow_other_weights: bool = False,
    device: str = "cpu",
) -> Sae:
    """The SAE in a folder, or `sae_id` of a release of sae-lens or a repository of the hub.

    model: what it is checked against; None for one trained on activations that no model computed. site: where it
    belongs, for one that does not say. Raises UsageError for what is not there or damaged, and for an SAE of another
    model (unless `allow_other_weights`), width or site.
    """
    inner = _released(str(source), sae_id, device) if sae_id else _stored(Path(source), device)
    inner.turn_off_forward_pass_hook_z_reshaping()  # our z has its heads side by side
    inner.requires_grad_(False).eval()
    note = inner.cfg.metadata[OURS] or {}
    name = f"{source} {sae_id}".strip()
    if model is None:
        return Sae(inner, site, note.get("kind", "residual"))
    _refuse_strange(name, inner.cfg)
    _refuse_other_model(name, inner.cfg.metadata, note, model, allow_other_weights)
    if site is None and note.get("site"):
        site = Site.parse(note["site"])
    if site is None:
        site = site_of(model, inner.cfg.metadata.hook_name, inner.cfg.metadata.hf_hook_name)
    width = model.width(site.kind)
    model.doors.place(site)
    if inner.cfg.d_in != width:
        raise UsageError(
            f"{name} reads activations of width {inner.cfg.d_in}, {model.name} has {width} at {site}; load the model "
            "that it was trained on"
        )
    return Sae(inner, site, note.get("kind", "residual"))


def _stored(folder: Path, device: str) -> Any:
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise UsageError(f"{folder} has no {file}; give a folder that sae-lens or steerlab wrote, or add an SAE id")
    lens = package()
    try:
        return lens.SAE.load_from_disk(folder, device=device)
    except Exception as error:  # whatever sae-lens, safetensors or torch say of a damaged folder
        raise UsageError(f"{folder} is no SAE that sae-lens can load ({_one_line(error)}); copy it again") from error


def _released(release: str, sae_id: str, device: str) -> Any:
    lens = package()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # how its own wrappers would load the model
            return lens.SAE.from_pretrained(release, sae_id, device=device)
    except Exception as error:  # of the hub, the network, or a name that sae-lens does not know
        raise UsageError(
            f"{release} {sae_id} cannot be had ({_one_line(error)}); check the names, or give a folder"
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__


def _refuse_strange(name: str, cfg: Any) -> None:
    """Raise UsageError for what is no SAE of a place as our models have it."""
    about = cfg.metadata
    if about.hook_name_out and about.hook_name_out != about.hook_name:
        raise UsageError(
            f"{name} is a transcoder ({about.hook_name} to {about.hook_name_out}); give an SAE of one place"
        )
    if about.hook_head_index is not None:
        raise UsageError(f"{name} reads head {about.hook_head_index} alone; give an SAE of all heads")
    if (about.model_from_pretrained_kwargs or {}).get("center_writing_weights"):
        raise UsageError(f"{name} was trained on a stream that TransformerLens had centred; ours is not; give another")


def _refuse_other_model(
    name: str, about: Any, note: dict[str, Any], model: LanguageModel, allow_other_weights: bool
) -> None:
    """Raise UsageError for an SAE of other weights, or where no digest says so, of a model of another name."""
    trained_on, digest = about.model_name, note.get("weights_sha256")
    same = model.weights_sha256 == digest if digest else _bare(trained_on) in ("", _bare(model.name))
    if not same and not allow_other_weights:
        raise UsageError(
            f"{name} was trained on {trained_on or 'other weights'}, not on {model.name}; load that model, or pass "
            "allow_other_weights if they are the same"
        )


def _bare(name: str | None) -> str:
    """A model's name without who published it."""
    return (name or "").rstrip("/").rpartition("/")[2].lower()
