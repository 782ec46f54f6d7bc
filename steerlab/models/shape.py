"""Sizes of a model from its configuration alone, for whoever asks what it would cost: no weights need be on this disk.

Left out: models that are several files of their own kind (an alias or a .gguf file is loaded, and measured).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from steerlab.errors import UsageError
from steerlab.models.handle import LanguageModel
from steerlab.models.origins import detect_dtype, load
from steerlab.models.sites import architecture, sizes

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


@dataclass(frozen=True)
class Shape:
    """Sizes of a model, known without its weights. `tokenizer` is None where there is none to count with."""

    name: str
    n_layers: int
    d_model: int
    d_attention: int
    d_kv: int
    d_mlp: int
    d_vocab: int
    block_weights: int
    all_weights: int
    dtype: torch.dtype
    tokenizer: Any

    @property
    def flops_per_token(self) -> float:
        """F."""
        return 2.0 * self.block_weights

    @property
    def head_share(self) -> float:
        """h."""
        return self.d_vocab * self.d_model / self.block_weights

    @classmethod
    def of(cls, hf: Any, tokenizer: Any, name: str, dtype: torch.dtype) -> Shape:
        """Of a Hugging Face model, which may be without storage (device meta)."""
        arch = architecture(hf.config.model_type)
        blocks = list(hf.base_model.get_submodule(arch.blocks))
        found = sizes(arch, hf.config, blocks)
        return cls(
            name=name,
            n_layers=found.n_layers,
            d_model=found.d_model,
            d_attention=found.n_heads * found.d_head,
            d_kv=found.n_kv_heads * found.d_head,
            d_mlp=found.d_mlp,
            d_vocab=hf.get_output_embeddings().weight.shape[0],
            block_weights=sum(p.numel() for block in blocks for p in block.parameters() if p.ndim > 1),
            all_weights=sum(p.numel() for p in hf.parameters()),
            dtype=dtype,
            tokenizer=tokenizer,
        )


def shape_of(name: str, dtype: str) -> Shape:
    """Sizes of the model `name` from its configuration; aliases and .gguf files are loaded. Raises UsageError."""
    is_hub_id = name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith(".gguf")
    if not Path(name).expanduser().is_dir() and not is_hub_id:
        model: LanguageModel = load(name, dtype=dtype)  # type: ignore[arg-type]
        return Shape.of(model.hf, model.tokenizer, name, model.dtype)
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source = str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UsageError(
            f"cannot read the configuration of {name} ({reason}); to plan without the weights give a folder that holds "
            "its config.json"
        ) from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError):
        tokenizer = None
    architecture(config.model_type)
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(config)
    kind = _DTYPES[dtype] if dtype in _DTYPES else detect_dtype(torch.device("cpu"))
    return Shape.of(hf, tokenizer, name, kind)
