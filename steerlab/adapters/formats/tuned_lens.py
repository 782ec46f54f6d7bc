"""A tuned lens as the package tuned-lens (0.2) has it: a folder of `config.json` and `params.pt`, written and read.

`params.pt` is a plain state dict, `{i}.weight` as (out, in) and `{i}.bias`, of the change: x + Linear(x). Their i
counts hidden states, 0 being the embeddings, so what our block l writes is their l + 1, and the last block has none.
They want one for the embeddings too, and one for every layer: what is not there is written as zeros, the plain lens. A
translator of the embeddings is not read. Their loader ignores, with a remark, our entry `steerlab` in the
configuration: which weights the lens is of, what it was trained on, and a checksum, which are checked when read.

`unembed_hash` is theirs: SHA-256 of NumPy's abridged print of the head's weight at one decimal, which survives another
dtype. Their lens has no soft cap (Gemma): there it reads other numbers than ours.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from steerlab.adapters.formats.own import Provenance, origin_in, refuse_other_model
from steerlab.adapters.translators import TunedLens
from steerlab.errors import UsageError
from steerlab.runs import atomic_path, tensors_sha256

if TYPE_CHECKING:
    from steerlab.models import LanguageModel

CONFIG, TENSORS = "config.json", "params.pt"
LENS_TYPE = "linear_tuned_lens"
_OURS = "steerlab"


def save(folder: Path, lens: TunedLens, provenance: Provenance, unembed_hash: str | None = None) -> None:
    """Writes both files or neither; equal arguments give equal bytes. unembed_hash: see `hash_of`."""
    given = {layer + 1: tuple(part.detach().cpu() for part in pair) for layer, pair in lens.maps.items()}
    weight = torch.zeros(lens.d_model, lens.d_model)
    tensors = {}
    for i in range(lens.n_layers):
        tensors[f"{i}.weight"], tensors[f"{i}.bias"] = given.get(i, (weight, weight[0].clone()))
    known = {name: str(value) for name, value in dataclasses.asdict(provenance).items() if value is not None}
    config = {
        "base_model_name_or_path": provenance.model,
        "d_model": lens.d_model,
        "num_hidden_layers": lens.n_layers,
        "bias": True,
        "base_model_revision": None,
        "unembed_hash": unembed_hash,
        "lens_type": LENS_TYPE,
        _OURS: known | {"tensors_sha256": tensors_sha256(tensors)},
    }
    content = io.BytesIO()  # in a file torch would write the file's name, which is another every time
    torch.save(tensors, content)
    with atomic_path(folder / CONFIG) as config_file, atomic_path(folder / TENSORS) as tensors_file:
        config_file.write_bytes((json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
        tensors_file.write_bytes(content.getvalue())


def load(folder: Path, model: LanguageModel | None = None, allow_other_weights: bool = False) -> TunedLens:
    """The translators that are not zero (all, if all are), checked against `model` when given; a folder of tuned-lens
    itself names no weights, so only sizes are.

    Raises UsageError, in one line, for a folder that is missing, damaged or of another kind, and for a model of other
    sizes or (unless `allow_other_weights`) other weights.
    """
    config = _config(folder / CONFIG)
    tensors = _tensors(folder / TENSORS)
    n_layers, width = config.get("num_hidden_layers"), config.get("d_model")
    if config.get("lens_type", LENS_TYPE) != LENS_TYPE or not (isinstance(n_layers, int) and isinstance(width, int)):
        raise UsageError(f"{folder / CONFIG} describes no linear tuned lens; give a folder that tuned-lens wrote")
    maps = _maps(folder / TENSORS, tensors, n_layers, width)
    if isinstance(ours := config.get(_OURS), dict):
        if ours.get("tensors_sha256") != tensors_sha256(tensors):
            raise UsageError(f"{folder} fails its checksum: the tensors are not those saved; copy it again")
        if model is not None:
            refuse_other_model(folder, origin_in(folder / CONFIG, ours), model, allow_other_weights)
    trained = {layer: pair for layer, pair in maps.items() if any(part.any() for part in pair)}
    lens = TunedLens(trained or maps, n_layers)
    if model is not None:
        lens.check(model)
    return lens


def provenance(folder: str | Path) -> Provenance:
    """Which model a folder that we wrote belongs to. Raises UsageError for one of tuned-lens' own."""
    path = Path(folder) / CONFIG
    ours = _config(path).get(_OURS)
    if not isinstance(ours, dict):
        raise UsageError(f"{folder} does not say which weights it belongs to; add --model NAME")
    return origin_in(path, ours)


def hash_of(unembedding: Float[Tensor, "d_vocab d_model"]) -> str:
    """tuned-lens' digest of a head's weight; see the module's header."""
    matrix = unembedding.detach().float().cpu().numpy()
    with np.printoptions(threshold=1000, edgeitems=3, linewidth=75, suppress=False):  # NumPy's own, whatever was set
        return hashlib.sha256(np.array_str(matrix, precision=1).encode()).hexdigest()


def _maps(
    path: Path, tensors: Mapping[str, Tensor], n_layers: int, width: int
) -> dict[int, tuple[Float[Tensor, "d_model d_model"], Float[Tensor, " d_model"]]]:
    """Our layer → (W, b). Raises UsageError for anything but the tensors that the configuration promises."""
    expected = {f"{i}.weight": (width, width) for i in range(n_layers)}
    biases = {f"{i}.bias": (width,) for i in range(n_layers)}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes not in (expected, expected | biases):
        raise UsageError(
            f"{path} is not {n_layers} translators of width {width}, as its {CONFIG} says; the two files do not belong "
            "together"
        )
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise UsageError(f"{path} holds values that are not finite; train the lens again")
    none = torch.zeros(width)
    return {i - 1: (tensors[f"{i}.weight"], tensors.get(f"{i}.bias", none)) for i in range(1, n_layers)}


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(f"{path} does not exist; give a folder written by tuned-lens or steerlab") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error}); copy it again from its source") from error
    if not isinstance(config, dict):
        raise UsageError(f"{path} is no configuration of a tuned lens; copy it again from its source")
    return config


def _tensors(path: Path) -> dict[str, Tensor]:
    """The state dict; never a pickle of anything else."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UsageError(f"{path} does not exist; copy the whole folder again") from error
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        said = str(error).partition("\n")[0][:120]
        raise UsageError(f"{path} is no file of tensors alone ({said}); copy it again from its source") from error
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise UsageError(f"{path} is no state dict of translators; give a folder that tuned-lens wrote")
    return found
