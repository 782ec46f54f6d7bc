"""Our own file: safetensors with tensors `vectors.{site}.{layer}`, where they come from, and a checksum.

All metadata values are strings, as safetensors demands. Equal vectors and provenance give equal bytes: safetensors
itself writes its metadata in random order, so the header is written again, sorted.

Left out: gates and `scale` of other adapters; the checksum guards against damage, not against forgery.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from steerlab.adapters.scopes import Kind, Scope
from steerlab.adapters.steering import SteeringVectors
from steerlab.errors import UsageError
from steerlab.models import Site
from steerlab.runs import atomic_write, tensors_sha256

if TYPE_CHECKING:
    from steerlab.models import LanguageModel

SCHEMA_VERSION = 1
_PREFIX = "vectors."


@dataclass(frozen=True)
class Provenance:
    """Which model an adapter belongs to and how it was trained; empty text and None where it is not known. corpus:
    the text that it was trained on, if any."""

    model: str
    weights_sha256: str
    config_sha256: str
    d_model: int
    n_layers: int
    norm_placement: str
    recipe: str = ""
    reward: str = ""
    seed: int | None = None
    corpus: str | None = None
    corpus_sha256: str | None = None

    @classmethod
    def of(
        cls,
        model: LanguageModel,
        recipe: str = "",
        reward: str = "",
        seed: int | None = None,
        corpus: str | None = None,
        corpus_sha256: str | None = None,
    ) -> Provenance:
        """Provenance of what was trained on `model`."""
        return cls(
            model=model.name,
            weights_sha256=model.weights_sha256,
            config_sha256=model.config_sha256,
            d_model=model.d_model,
            n_layers=model.n_layers,
            norm_placement=model.norm_placement,
            recipe=recipe,
            reward=reward,
            seed=seed,
            corpus=corpus,
            corpus_sha256=corpus_sha256,
        )


def save(path: Path, vectors: SteeringVectors, provenance: Provenance) -> None:
    """Writes the whole file or nothing; equal arguments give equal bytes."""
    tensors = {f"{_PREFIX}{site.kind}.{site.layer}": v.detach().cpu() for site, v in vectors.vectors.items()}
    known = {name: str(value) for name, value in dataclasses.asdict(provenance).items() if value is not None}
    metadata = known | {
        "format": "pt",  # what other readers of safetensors look for
        "schema": "steerlab steering vectors",
        "schema_version": str(SCHEMA_VERSION),
        "token_scope": json.dumps(dataclasses.asdict(vectors.scope), sort_keys=True),
        "tensors_sha256": tensors_sha256(tensors),
    }
    atomic_write(path, with_metadata(to_bytes(tensors), metadata))


def load(path: Path, model: LanguageModel | None = None, allow_other_weights: bool = False) -> SteeringVectors:
    """The vectors, after checking the file against its checksum and against `model` when given.

    Raises UsageError, in one line, for a file that is missing, damaged or not ours, a layer that its own model does
    not have, and a model of other sizes or (unless `allow_other_weights`) other weights.
    """
    metadata, tensors = _read(path)
    origin = origin_in(path, metadata)
    scope = _scope(path, metadata)
    vectors = {_site(path, name, origin.n_layers): tensor for name, tensor in tensors.items()}
    if model is not None:
        refuse_other_model(path, origin, model, allow_other_weights)
    return SteeringVectors(vectors, scope)


def provenance(path: str | Path) -> Provenance:
    """Where the vectors of a file come from. Raises UsageError as `load` does."""
    metadata, _ = _read(Path(path))
    return origin_in(Path(path), metadata)


def with_metadata(blob: bytes, metadata: Mapping[str, str]) -> bytes:
    """The same safetensors file with this metadata, keys in order. Layout: 8 bytes of length, JSON header, tensors."""
    end = 8 + int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8:end]) | {"__metadata__": metadata}
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors stay aligned to 8 bytes
    return len(text).to_bytes(8, "little") + text + blob[end:]


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors, after the checksum."""
    if not path.is_file():
        raise UsageError(f"{path} does not exist or is not a file; give a .safetensors file written by steerlab")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise UsageError(f"{path} is not a whole safetensors file ({error}); copy it again from its source") from error
    if metadata.get("schema") != "steerlab steering vectors":
        raise UsageError(f"{path} holds no steering vectors of steerlab; give vectors.safetensors of a run")
    if metadata.get("schema_version") != str(SCHEMA_VERSION):
        version = metadata.get("schema_version", "none")
        raise UsageError(f"{path} has schema version {version}, this steerlab reads {SCHEMA_VERSION}; update steerlab")
    if metadata.get("tensors_sha256") != tensors_sha256(tensors):
        raise UsageError(f"{path} fails its checksum: the tensors are not those that were saved; copy it again")
    return metadata, tensors


def origin_in(path: Path, metadata: Mapping[str, str]) -> Provenance:
    """The provenance that a file's metadata states. Raises UsageError where it is missing or no provenance."""
    values: dict[str, Any] = {f.name: metadata[f.name] for f in dataclasses.fields(Provenance) if f.name in metadata}
    try:
        for name in {"d_model", "n_layers", "seed"} & values.keys():
            values[name] = int(values[name])
        return Provenance(**values)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{path} does not say which model it belongs to ({error}); save the vectors again") from error


def _scope(path: Path, metadata: Mapping[str, str]) -> Scope:
    try:
        fields = json.loads(metadata["token_scope"])
        if fields["kind"] not in get_args(Kind):
            raise ValueError(fields["kind"])
        return Scope(**fields)
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path} names no token scope that is known; update steerlab") from error


def _site(path: Path, name: str, n_layers: int) -> Site:
    try:
        if not name.startswith(_PREFIX):
            raise ValueError(name)
        site = Site.parse(name.removeprefix(_PREFIX))
    except ValueError as error:
        raise UsageError(f"{path} holds a tensor {name!r} that is no steering vector; update steerlab") from error
    if not 0 <= site.layer < n_layers:
        raise UsageError(f"{path} has a vector at layer {site.layer}, its model only layers 0 to {n_layers - 1}")
    return site


def refuse_other_model(path: Path, origin: Provenance, model: LanguageModel, allow_other_weights: bool) -> None:
    """Raise UsageError for a model of other sizes or (unless `allow_other_weights`) other weights than `origin`."""
    for name, theirs, ours in [
        ("d_model", origin.d_model, model.d_model),
        ("n_layers", origin.n_layers, model.n_layers),
    ]:
        if theirs != ours:
            raise UsageError(
                f"{path} was trained on {origin.model} with {name} {theirs}, but {model.name} has {ours}; "
                f"load {origin.model} instead"
            )
    if origin.weights_sha256 != model.weights_sha256 and not allow_other_weights:
        raise UsageError(
            f"{path} was trained on other weights ({origin.model}, {origin.weights_sha256[:12]}) than {model.name} "
            f"({model.weights_sha256[:12]}); load those, or pass --allow-other-weights"
        )
