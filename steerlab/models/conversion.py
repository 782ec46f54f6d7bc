"""GGUF to safetensors, once: dequantised by transformers, kept in the cache folder with a manifest.

What a conversion promises: it stands in its place complete or not at all, and what is loaded from it is what was
written (sizes at every load; digests again whenever a file's size or time of change is not the one last verified).
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from steerlab.errors import UsageError
from steerlab.models.weights import cache_root, hash_bytes, remembered
from steerlab.runs import atomic_write
from steerlab.runs.files import cannot_write

_FORMAT = 1  # raise when what is written changes: older conversions are then made again


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Transformers without progress bars and remarks; its settings come back afterwards."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def converted(parts: list[Path], label: str) -> Path:
    """Folder with the safetensors form of a GGUF file (given in parts, in order), made now if there is no sound one."""
    digest = remembered(hash_bytes, parts)
    folder = cache_root() / "models" / f"{label}-{digest[:16]}"
    if _sound(folder, digest):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
            gguf = parts[0] if len(parts) == 1 else _joined(parts, Path(scratch) / "joined.gguf")
            building = Path(scratch) / "model"
            _convert(gguf, building)
            _write_manifest(building, digest)
            _move(building, folder, digest)
    except OSError as error:
        raise cannot_write(folder, error) from error
    return folder


def _joined(parts: list[Path], whole: Path) -> Path:
    with whole.open("wb") as out:
        for part in parts:
            with part.open("rb") as file:
                shutil.copyfileobj(file, out)
    return whole


def _sound(folder: Path, digest: str) -> bool:
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError):
        return False
    if manifest.get("format") != _FORMAT or manifest.get("gguf_sha256") != digest:
        return False
    for name, stated in manifest["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != stated["bytes"]:
            return False
        if remembered(hash_bytes, [path]) != stated["sha256"]:
            return False
    return True


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantise with transformers and save.

    Raises UsageError for a file it cannot read and OSError when it cannot write.
    """
    with gguf.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UsageError(f"{gguf} is not a GGUF file; fetch it again")
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    with quiet(), contextlib.redirect_stderr(io.StringIO()):  # its progress bar has no switch
        try:
            read: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
            # the configuration is handed on: every reading of the header takes seconds
            read["config"] = AutoConfig.from_pretrained(**read)
            model: Any = AutoModelForCausalLM.from_pretrained(**read, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(**read)
        except Exception as error:  # noqa: BLE001 (its readers raise anything on a damaged file)
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UsageError(f"{gguf} is truncated, or not a model that transformers reads ({reason})") from None
        del model.config.quantization_config  # the weights are plain now; otherwise they are saved as GGUF's
        model.hf_quantizer, model.is_quantized = None, False
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _write_manifest(folder: Path, digest: str) -> None:
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": hash_bytes([path])} for path in sorted(folder.iterdir())
    }
    manifest = {"format": _FORMAT, "gguf_sha256": digest, "files": files}
    atomic_write(folder / "manifest.json", json.dumps(manifest, indent=1))


def _move(building: Path, folder: Path, digest: str) -> None:
    """Put a finished conversion in its place, unless another process was faster; what stands there gives way."""
    if _sound(folder, digest):
        return
    if folder.exists():
        folder.replace(building.with_name("broken"))
    building.replace(folder)
