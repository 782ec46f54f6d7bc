"""The papers' authors' file: a NumPy array (n_layers, d_model), added at `resid_post` of every layer, at all tokens.

Layers without a vector are rows of zeros, and rows of zeros are not read back as vectors. The file does not say which
model it belongs to; `load` can only compare shapes.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float

from steerlab.adapters.formats.own import Provenance
from steerlab.adapters.scopes import Scope
from steerlab.adapters.steering import SteeringVectors
from steerlab.errors import UsageError
from steerlab.models import Site
from steerlab.runs import atomic_write

if TYPE_CHECKING:
    from steerlab.models import LanguageModel

SITE = "resid_post"


def save(path: Path, vectors: SteeringVectors, provenance: Provenance) -> None:
    """Writes the whole file or nothing. Raises UsageError for other sites or token scopes, which it cannot hold."""
    other = [str(site) for site in vectors.vectors if site.kind != SITE]
    if other:
        raise UsageError(f"a .npy file holds vectors at {SITE} only, not {', '.join(other)}; save as .safetensors")
    if vectors.scope != Scope.all():
        raise UsageError(f"a .npy file cannot say token scope {vectors.scope.kind!r}; save as .safetensors")
    rows = np.zeros((provenance.n_layers, provenance.d_model), dtype=np.float32)
    for site, vector in vectors.vectors.items():
        if site.layer >= provenance.n_layers or vector.shape != (provenance.d_model,):
            raise UsageError(
                f"the vector at {site} does not fit {provenance.n_layers} layers of width {provenance.d_model}; "
                "save with the provenance of the model it was trained on"
            )
        rows[site.layer] = vector.detach().float().cpu().numpy()
    content = io.BytesIO()
    np.save(content, rows, allow_pickle=False)
    atomic_write(path, content.getvalue())


def load(
    path: Path,
    model: LanguageModel | None = None,
    allow_other_weights: bool = False,  # noqa: ARG001 - the file names no weights
) -> SteeringVectors:
    """Every row that is not zero as a vector (all rows, if all are zero).

    Raises UsageError for anything but a finite float array of shape (n_layers, d_model) of `model`, when given.
    """
    rows = _read(path)
    if model is not None and rows.shape != (model.n_layers, model.d_model):
        raise UsageError(
            f"{path} has shape {rows.shape}, but {model.name} needs ({model.n_layers}, {model.d_model}); "
            "these vectors belong to another model"
        )
    trained = np.flatnonzero(rows.any(axis=1))
    layers = trained if trained.size else np.arange(rows.shape[0])
    return SteeringVectors({Site(SITE, int(layer)): torch.from_numpy(rows[layer].copy()) for layer in layers})


def _read(path: Path) -> Float[np.ndarray, "layer d_model"]:
    try:
        # Mapped, so that a header that promises more than the file holds fails instead of allocating it.
        array = np.load(path, allow_pickle=False, mmap_mode="r")
    except FileNotFoundError as error:
        raise UsageError(f"{path} does not exist; give a .npy file of shape (n_layers, d_model)") from error
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(f"{path} is not a whole .npy array without pickles; save it again with numpy.save") from error
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.size == 0 or array.dtype.kind != "f":
        found = f"{array.dtype} of shape {array.shape}" if isinstance(array, np.ndarray) else "an archive of arrays"
        raise UsageError(f"{path} holds {found}; steering vectors are floats of shape (n_layers, d_model)")
    rows = np.array(array, dtype=np.float32)
    if not np.isfinite(rows).all():
        raise UsageError(f"{path} holds values that are not finite in float32; repair it before loading")
    return rows
