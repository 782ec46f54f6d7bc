"""A LoRA as PEFT has it: a folder of `adapter_config.json` and `adapter_model.safetensors`, written and read.

Tensors are called `base_model.model.{module path}.lora_A.weight` and `….lora_B.weight`. PEFT's files do not say on
which weights they were trained; ours do, in the safetensors metadata, which PEFT passes over, and are checked when
read. rsLoRA is read as the plain LoRA that it equals (alpha · √rank). `lora_dropout` is read and has no effect: it acts
in training only, and steerlab trains without it.
Left out, and refused by name: DoRA and every other option that changes what the matrices mean; pickles.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from steerlab.adapters.formats.own import Provenance, origin_in, refuse_other_model, with_metadata
from steerlab.adapters.lora import LoRA, LoRAWeights, is_target
from steerlab.errors import UsageError
from steerlab.runs import atomic_path, tensors_sha256

if TYPE_CHECKING:
    from steerlab.models import LanguageModel

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
SCHEMA = "steerlab LoRA"
_PREFIX = "base_model.model."
_NAME = re.compile(r"(?P<path>.+)\.lora_(?P<letter>[AB])\.weight\Z")

# Options of PEFT that may have any value: they describe, or were used up when training began or ended.
_FREE = {
    "alora_invocation_string", "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform",
    "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "peft_type",
    "peft_version", "qalora_group_size", "r", "revision", "runtime_config", "target_modules", "task_type",
    "use_rslora", "velora_config",
}  # fmt: skip
# Other initialisations change the frozen weights, so their matrices belong to weights that are not the model's.
_INITIALISATIONS = (True, False, "gaussian", "eva", "orthogonal")


def save(folder: Path, weights: LoRAWeights, provenance: Provenance) -> None:
    """Writes both files or neither; equal arguments give equal bytes."""
    tensors = {f"{_PREFIX}{name}": tensor.detach().cpu().contiguous() for name, tensor in weights.named().items()}
    known = {name: str(value) for name, value in dataclasses.asdict(provenance).items() if value is not None}
    metadata = known | {"format": "pt", "schema": SCHEMA, "tensors_sha256": tensors_sha256(tensors)}
    config = json.dumps(configuration(weights, provenance.model), indent=2, sort_keys=True) + "\n"
    with atomic_path(folder / CONFIG) as config_file, atomic_path(folder / TENSORS) as tensors_file:
        config_file.write_bytes(config.encode())
        tensors_file.write_bytes(with_metadata(to_bytes(tensors), metadata))


def load(folder: Path, model: LanguageModel | None = None, allow_other_weights: bool = False) -> LoRAWeights:
    """The matrices, checked against `model` when given; files of PEFT name no weights, so only shapes are.

    Raises UsageError, in one line, for a folder that is not whole, an option that is not supported, and (unless
    `allow_other_weights`) weights other than those our own file names.
    """
    config = _config(folder / CONFIG)
    refuse_unsupported(folder / CONFIG, config)
    metadata, tensors = _tensors(folder / TENSORS)
    if metadata.get("schema") == SCHEMA:
        if metadata.get("tensors_sha256") != tensors_sha256(tensors):
            raise UsageError(f"{folder / TENSORS} fails its checksum: the tensors are not those saved; copy it again")
        if model is not None:
            refuse_other_model(folder, origin_in(folder / TENSORS, metadata), model, allow_other_weights)
    rank, alpha = config["r"], float(config["lora_alpha"])
    pairs = _pairs(folder / TENSORS, tensors, rank)
    spec = LoRA(rank, alpha * rank**0.5 if config.get("use_rslora") else alpha, *_selection(config, list(pairs)))
    weights = LoRAWeights(spec, pairs, transposed=bool(config.get("fan_in_fan_out")))
    if model is not None:
        weights.check(model)
    return weights


def provenance(folder: str | Path) -> Provenance:
    """Which model a folder that we wrote belongs to. Raises UsageError for one of PEFT's own."""
    path = Path(folder) / TENSORS
    metadata, _ = _tensors(path)
    if metadata.get("schema") != SCHEMA:
        raise UsageError(f"{folder} does not say which model it belongs to; add --model NAME")
    return origin_in(path, metadata)


def configuration(weights: LoRAWeights, model: str) -> dict[str, Any]:
    """adapter_config.json. Modules are named as in the spec where PEFT then finds the same ones, else in full."""
    spec = weights.spec
    alpha = int(spec.alpha) if float(spec.alpha).is_integer() else spec.alpha
    named = not isinstance(spec.targets, str) and not any(p.isdecimal() for t in spec.targets for p in t.split("."))
    return {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": model,
        "bias": "none",
        "fan_in_fan_out": weights.transposed,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": list(spec.layers) if named and spec.layers is not None else None,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": spec.rank,
        "rank_pattern": {},
        "revision": None,
        "target_modules": sorted(spec.targets if named else weights.pairs),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def refuse_unsupported(path: Path, config: Mapping[str, Any]) -> None:
    """Raise UsageError for an adapter that is not a LoRA of linear modules, naming the option."""
    if config.get("peft_type") != "LORA":
        raise UsageError(f"{path} is a PEFT adapter of type {config.get('peft_type')}; only LORA can be read")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise UsageError(f"{path} has r {rank} and lora_alpha {alpha}; both must be numbers, r at least 1")
    start = config.get("init_lora_weights", True)
    if start not in _INITIALISATIONS:
        raise UsageError(
            f"{path} has init_lora_weights {start!r}, which changed the frozen weights too; save it with PEFT's "
            "path_initial_model_for_weight_conversion and load that"
        )
    other = config.keys() - _FREE - {"init_lora_weights"}
    used = sorted(name for name in other if config[name] not in (None, False, {}, [], "", "none"))
    if used:
        told = ", ".join(f"{name} = {config[name]!r}" for name in used)
        raise UsageError(f"{path} uses {told}, which is not supported; train a plain LoRA")


def _selection(config: Mapping[str, Any], paths: list[str]) -> tuple[tuple[str, ...], tuple[int, ...] | None]:
    """Targets and layers of the spec: as the configuration has them if they are names, else every path in full."""
    names, layers, full = config.get("target_modules"), config.get("layers_to_transform"), tuple(sorted(paths))
    if not isinstance(names, list) or config.get("exclude_modules") or config.get("layers_pattern"):
        return full, None
    if not all(any(is_target(path, name) for name in names) for path in paths):
        return full, None
    chosen = [layers] if isinstance(layers, int) else layers
    return tuple(sorted(names)), tuple(chosen) if chosen else None


def _pairs(path: Path, tensors: Mapping[str, Tensor], rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Module path → (A, B)."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _NAME.match(name.removeprefix(_PREFIX))
        if match is None or tensor.ndim != 2 or not any(part.isdecimal() for part in match["path"].split(".")):
            raise UsageError(f"{path} holds {name}, which is no LoRA matrix of a linear module of a block; train such")
        found.setdefault(match["path"], {})[match["letter"]] = tensor
    if not found:
        raise UsageError(f"{path} holds no tensors; save the adapter again")
    for module, pair in found.items():
        if pair.keys() != {"A", "B"} or pair["A"].shape[0] != rank or pair["B"].shape[1] != rank:
            raise UsageError(
                f"{path} has no whole pair of rank {rank} for {module}; the two files do not belong together"
            )
    return {module: (pair["A"], pair["B"]) for module, pair in found.items()}


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(f"{path} does not exist; give a folder written by PEFT or steerlab") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error}); copy it again from its source") from error
    if not isinstance(config, dict):
        raise UsageError(f"{path} is no PEFT configuration; copy it again from its source")
    return config


def _tensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors."""
    if not path.is_file():
        pickled = path.with_name("adapter_model.bin").exists()
        remedy = "a pickle is not read; save it again with safe_serialization=True" if pickled else "copy it again"
        raise UsageError(f"{path} does not exist; {remedy}")
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {}), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UsageError(f"{path} is not a whole safetensors file ({error}); copy it again from its source") from error
