# ruff: noqa: E402 (the environment and the import hook must stand before the imports they act on)
"""What every test runs under: one torch thread, no network, shapes checked, tiny models made once."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, hence before everything else
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from pathlib import Path

from jaxtyping import install_import_hook

ROOT = Path(__file__).parent.parent
# The hook takes whole packages; numba cannot compile what it wraps, and runs measure how fast operators are.
LEFT_OUT = ("__init__", "attention_kernels", "kernels", "numbers", "operators", "vectors")
install_import_hook(
    [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sorted((ROOT / "steerlab").rglob("*.py"))
        if path.stem not in LEFT_OUT
    ],
    "beartype.beartype",
)

import socket
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from steerlab.models import LanguageModel, tiny


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """Connections leave only through Unix sockets and to this machine itself."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise RuntimeError(f"a test tried to reach {address}")
        connect(self, address)

    socket.socket.connect = guarded
    yield
    socket.socket.connect = connect


@pytest.fixture(scope="session")
def tiny_models() -> dict[str, LanguageModel]:
    """One fp32 model per family, shared by the whole session: leave them as they are."""
    return {family: tiny.model(family) for family in tiny.FAMILIES}


@pytest.fixture(scope="session")
def tiny_llama(tiny_models: dict[str, LanguageModel]) -> LanguageModel:
    return tiny_models["llama"]


@pytest.fixture(scope="session")
def tiny_gpt2(tiny_models: dict[str, LanguageModel]) -> LanguageModel:
    return tiny_models["gpt2"]


@pytest.fixture(scope="session")
def tiny_gemma3(tiny_models: dict[str, LanguageModel]) -> LanguageModel:
    return tiny_models["gemma3"]


@pytest.fixture(scope="session")
def tiny_llama_fp64() -> LanguageModel:
    return tiny.model("llama", dtype=torch.float64)


@pytest.fixture(scope="session")
def tiny_folder(tiny_llama: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as a person would have it: a folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_llama.hf.save_pretrained(folder)
    tiny_llama.tokenizer.save_pretrained(folder)
    return folder
