"""`LanguageModel`: a Hugging Face causal language model with its own numerics, its sizes and its verified sites.

The model is frozen (no parameter asks for a gradient) and in eval mode. `hidden` is the backbone, `unembed` the head:
decoding and training call them apart, so that the head runs only where it is needed. Sampling belongs to `rollouts`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from steerlab.errors import UsageError
from steerlab.models import engine, forward, hooks
from steerlab.models.hooks import Doors, Edit, Mask
from steerlab.models.sites import Site, architecture, check_meaning, norm_placement, places, sizes
from steerlab.models.weights import hash_tensors

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

    from steerlab.models.fused import Fused, Kernels
    from steerlab.models.graphs import Steps
    from steerlab.models.packed import PackedWeights, Products

_NOT_CONTENT = ("dtype", "torch_dtype", "transformers_version", "_name_or_path", "use_cache", "architectures")


class LanguageModel:
    """`LanguageModel(hf, tokenizer, name="mine")` wraps a model already in memory; `models.load` reads one.

    Raises UsageError for a family without a row in `models/sites.py` and for a model without an unembedding matrix,
    RuntimeError when a probing forward shows that the row does not fit the model.
    """

    def __init__(
        self,
        hf: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        weights_sha256: str | None = None,
    ) -> None:
        arch = architecture(hf.config.model_type)
        if hf.get_output_embeddings() is None:
            kind = type(hf).__name__
            raise UsageError(f"{name} ({kind}) has no unembedding matrix; load it with AutoModelForCausalLM instead")
        self.hf: Any = hf.requires_grad_(False).eval()
        self.tokenizer: Any = tokenizer
        self.name = name
        self.family: str = hf.config.model_type
        self.backbone: Any = hf.base_model
        self.blocks: list[nn.Module] = list(self.backbone.get_submodule(arch.blocks))
        self.final_norm: nn.Module = self.backbone.get_submodule(arch.final_norm)
        self.unembedding: nn.Linear = self.hf.get_output_embeddings()
        self.norm_placement = norm_placement(arch, hf.config)
        self.logit_softcap: float | None = hf.config.to_dict().get("final_logit_softcapping")
        self.sizes = sizes(arch, hf.config, self.blocks)
        self.doors = Doors(self.blocks, places(arch, self.sizes, self.norm_placement == "parallel"))
        self._weights_sha256 = weights_sha256
        self.products: Products = "plain"
        self.packed: PackedWeights | None = None
        self.kernels: Kernels = "family"
        self.fused: Fused | None = None
        self.steps: Steps = "eager"
        check_meaning(hooks.probe(self), self.sizes, self.doors.places)

    def __repr__(self) -> str:
        shape = f"{self.n_layers} layers, d_model {self.d_model}"
        return f"LanguageModel({self.name!r}, {self.family}, {shape}, {self.dtype})"

    @property
    def n_layers(self) -> int:
        return self.sizes.n_layers

    @property
    def d_model(self) -> int:
        return self.sizes.d_model

    @property
    def n_heads(self) -> int:
        return self.sizes.n_heads

    @property
    def n_kv_heads(self) -> int:
        return self.sizes.n_kv_heads

    @property
    def d_head(self) -> int:
        return self.sizes.d_head

    @property
    def d_mlp(self) -> int:
        return self.sizes.d_mlp

    @property
    def d_vocab(self) -> int:
        return self.unembedding.weight.shape[0]

    @property
    def context(self) -> int:
        """Longest sequence, in tokens, that the model was made for."""
        return self.hf.config.max_position_embeddings

    @property
    def dtype(self) -> torch.dtype:
        return self.unembedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.unembedding.weight.device

    @property
    def site_kinds(self) -> tuple[str, ...]:
        """The kinds of site this model has."""
        return tuple(self.doors.places)

    @property
    def weights_sha256(self) -> str:
        """Digest of the weights as stored, whatever dtype they run in; of a model made in memory, of its parameters."""
        if self._weights_sha256 is None:
            self._weights_sha256 = hash_tensors(dict(self.hf.named_parameters()))
        return self._weights_sha256

    @property
    def config_sha256(self) -> str:
        """Digest of the configuration without the entries that do not describe the model (dtype, versions, paths)."""
        content = {key: value for key, value in self.hf.config.to_dict().items() if key not in _NOT_CONTENT}
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()

    def width(self, kind: str) -> int:
        """Size of the last axis of sites of this kind; UsageError for a kind the model does not have."""
        self.doors.place(Site(kind, 0))
        return self.sizes.width(kind)

    def hidden(
        self,
        tokens: Int[Tensor, "batch pos"],
        *,
        mask: Mask | None = None,
        positions: Int[Tensor, "batch pos"] | None = None,
        kv: Cache | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """Last hidden state after the final norm; `kv` is extended in place, `mask` covers cached and new positions."""
        return self.backbone(
            input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=kv, use_cache=kv is not None
        ).last_hidden_state

    def unembed(self, hidden: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_vocab"]:
        """Logits of hidden states that `hidden` returned, Gemma's soft cap included."""
        logits = self.unembedding(hidden)
        if self.logit_softcap is None:
            return logits
        return torch.tanh(logits / self.logit_softcap) * self.logit_softcap

    def forward_from(
        self,
        block: int,
        written: Float[Tensor, "batch pos d_model"],
        *,
        mask: Mask | None = None,
        positions: Int[Tensor, "batch pos"] | None = None,
        kv: Cache | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """See `forward.forward_from`."""
        return forward.forward_from(self, block, written, mask=mask, positions=positions, kv=kv)

    def logits(self, tokens: Int[Tensor, "batch pos"], mask: Mask | None = None) -> Float[Tensor, "batch pos d_vocab"]:
        """The same bits as the Hugging Face model's own logits."""
        return self.unembed(self.hidden(tokens, mask=mask))

    def cache(
        self, tokens: Int[Tensor, "batch pos"], sites: Iterable[Site], mask: Mask | None = None
    ) -> dict[Site, Tensor]:
        """See `hooks.cache`."""
        return hooks.cache(self, tokens, sites, mask)

    def tune(self) -> dict[str, str]:
        """Measure how this machine computes fastest and go on that way, in `Policy` (sampling, log-probabilities,
        training); hidden states and logits asked for here stay the family's own bits. See `models/engine.py`."""
        return engine.tune(self)

    def intervene(self, edits: Mapping[Site, Edit]) -> AbstractContextManager[None]:
        """See `hooks.intervene`."""
        return hooks.intervene(self, edits)
