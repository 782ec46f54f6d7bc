"""Site names and the module each one is, per architecture.

A `Site` is a kind and a layer, `Site("resid_post", 26)`. The words mean what TransformerLens' hooks of the same name
mean:

- `resid_pre`, `resid_mid`, `resid_post`: the residual stream before the block, between attention and MLP, after the
  block. `resid_mid` is read as resid_pre + attn_out and written by changing attn_out (transformers keeps the residual
  before the second norm); parallel blocks (GPT-NeoX) have none.
- `attn_in`, `mlp_in`: what the branch reads from the residual stream, before its input norm; writing it leaves the
  residual stream itself alone.
- `attn_out`, `mlp_out`: what the branch writes to the residual stream, after the post-norm where there is one.
- `q`, `k`, `v`: outputs of the projections, heads concatenated, before QK-norm and before the rotary embedding.
- `z`: input of the attention's output projection, heads concatenated. `mlp_neurons`: input of the down-projection.
- `pattern`: attention probabilities `(batch, head, query, key)`; read only.
- `ln1`, `ln2`: outputs (gain included) of the norms in front of attention and MLP; `ln1_post`, `ln2_post`: of those
  behind.

Leaves out: embeddings, the final norm (use `LanguageModel.hidden`), mixtures of experts, cross-attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from steerlab.errors import UsageError, unknown

KINDS = (
    "resid_pre", "resid_mid", "resid_post", "attn_in", "attn_out", "mlp_in", "mlp_out",
    "q", "k", "v", "z", "pattern", "mlp_neurons", "ln1", "ln2", "ln1_post", "ln2_post",
)  # fmt: skip
READ_ONLY = ("pattern",)
NormPlacement = Literal["pre", "post", "parallel"]


@dataclass(frozen=True, order=True)
class Site:
    """A named place in one block; `layer` counts blocks from 0 and is never negative."""

    kind: str
    layer: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown("site", self.kind, KINDS)
        if self.layer < 0:
            raise UsageError(f"layer {self.layer} of site {self.kind}: layers count from 0")

    def __str__(self) -> str:
        return f"{self.kind}.{self.layer}"

    @classmethod
    def parse(cls, text: str) -> Site:
        """`Site.parse("resid_post.26")`; raises UsageError on anything else."""
        kind, _, layer = text.rpartition(".")
        if not kind or not layer.isdecimal():
            raise UsageError(f"{text!r} is not a site; write kind.layer, as in resid_post.26")
        return cls(kind, int(layer))


@dataclass(frozen=True)
class Place:
    """Where a kind lives inside a block: a module's input or output, whole or a slice of its last axis.

    The last axis is cut into `groups` equal parts and columns `start:stop` of each are meant (GPT-NeoX interleaves q, k
    and v per head: one group per head). `item` is the index when the output is a tuple, `keyword` the name when the
    input is passed by name. With `adds_input` the value is the block's input plus what stands here (resid_mid).
    """

    module: str
    side: Literal["in", "out"]
    item: int = 0
    keyword: str | None = None
    groups: int = 1
    start: int = 0
    stop: int | None = None
    adds_input: bool = False

    def read(self, x: Tensor, block_input: Tensor | None) -> Tensor:
        if self.adds_input:
            assert block_input is not None
            return block_input + x
        if self.stop is None:
            return x
        return x.unflatten(-1, (self.groups, -1))[..., self.start : self.stop].flatten(-2)

    def write(self, x: Tensor, seen: Tensor, new: Tensor) -> Tensor:
        """`x` with the value `seen` at this place replaced by `new`; out of place, so that gradients survive."""
        if self.adds_input:
            return x + (new - seen)  # exact where new == seen; x + block_input would not round back to x
        if self.stop is None:
            return new
        parts = x.unflatten(-1, (self.groups, -1))
        middle = new.unflatten(-1, (self.groups, -1))
        return torch.cat([parts[..., : self.start], middle, parts[..., self.stop :]], dim=-1).flatten(-2)


@dataclass(frozen=True)
class Architecture:
    """Module paths of one family. `qkv` holds three paths, or one when the projections are fused.

    gated: gate and up projections, where they read the same input in two modules.
    own_attention: the module that mixes values, in a family that does not use transformers' attention interface.
    tuples: the family's blocks return tuples.
    """

    blocks: str
    final_norm: str
    attn: str
    qkv: tuple[str, ...]
    z: str
    down: str
    ln1: str | None
    ln2: str | None
    ln1_post: str | None = None
    ln2_post: str | None = None
    interleaved: bool = False
    mlp: str = "mlp"
    gated: tuple[str, ...] = ()
    own_attention: str | None = None
    tuples: bool = False


@dataclass(frozen=True)
class Sizes:
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int

    def width(self, kind: str) -> int:
        """Size of a site's last axis; `pattern` has none (its last axis is the key position)."""
        if kind == "pattern":
            raise UsageError("site pattern has no fixed width: its last axis is the key position")
        heads = {"q": self.n_heads, "z": self.n_heads, "k": self.n_kv_heads, "v": self.n_kv_heads}
        if kind in heads:
            return heads[kind] * self.d_head
        return self.d_mlp if kind == "mlp_neurons" else self.d_model


_LLAMA = Architecture(
    blocks="layers",
    final_norm="norm",
    attn="self_attn",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    z="self_attn.o_proj",
    down="mlp.down_proj",
    ln1="input_layernorm",
    ln2="post_attention_layernorm",
    gated=("mlp.gate_proj", "mlp.up_proj"),
)
_GEMMA = replace(
    _LLAMA,
    ln2="pre_feedforward_layernorm",
    ln1_post="post_attention_layernorm",
    ln2_post="post_feedforward_layernorm",
)
_GPT2 = Architecture(
    blocks="h",
    final_norm="ln_f",
    attn="attn",
    qkv=("attn.c_attn",),
    z="attn.c_proj",
    down="mlp.c_proj",
    ln1="ln_1",
    ln2="ln_2",
)

ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "olmo2": replace(
        _LLAMA, ln1=None, ln2=None, ln1_post="post_attention_layernorm", ln2_post="post_feedforward_layernorm"
    ),
    "phi3": replace(_LLAMA, qkv=("self_attn.qkv_proj",), gated=()),
    "gpt2": _GPT2,
    "gpt_neo": replace(
        _GPT2,
        qkv=("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj"),
        z="attn.attention.out_proj",
        own_attention="attn.attention",
        tuples=True,
    ),
    "gpt_neox": replace(
        _LLAMA,
        final_norm="final_layer_norm",
        attn="attention",
        qkv=("attention.query_key_value",),
        z="attention.dense",
        down="mlp.dense_4h_to_h",
        gated=(),
        interleaved=True,
    ),
}


def architecture(model_type: str) -> Architecture:
    """The table's row for a Hugging Face `model_type`; raises UsageError for a family that is not in it."""
    if model_type not in ARCHITECTURES:
        raise unknown("model family", model_type, ARCHITECTURES)
    return ARCHITECTURES[model_type]


def norm_placement(arch: Architecture, config: Any) -> NormPlacement:
    if config.model_type == "gpt_neox" and config.use_parallel_residual:
        return "parallel"
    return "pre" if arch.ln1_post is None else "post"


def sizes(arch: Architecture, config: Any, blocks: list[nn.Module]) -> Sizes:
    """Sizes read off the first block's weights, so that they hold whatever a config leaves implicit."""
    n_heads = config.num_attention_heads
    return Sizes(
        n_layers=len(blocks),
        d_model=config.hidden_size,
        n_heads=n_heads,
        n_kv_heads=config.to_dict().get("num_key_value_heads") or n_heads,
        d_head=_in_width(blocks[0].get_submodule(arch.z)) // n_heads,
        d_mlp=_in_width(blocks[0].get_submodule(arch.down)),
    )


def _in_width(module: nn.Module) -> int:
    if isinstance(module, nn.Linear):
        return module.in_features
    weight = module.get_parameter("weight")  # GPT-2's Conv1D stores (in, out)
    return weight.shape[0]


def places(arch: Architecture, sizes: Sizes, parallel: bool) -> dict[str, Place]:
    """Every kind this architecture has, with its place."""
    attn_out = Place(arch.ln1_post or arch.attn, "out")
    found = {
        "resid_pre": Place("", "in"),
        "resid_post": Place("", "out"),
        "attn_in": Place(arch.ln1, "in") if arch.ln1 else Place(arch.attn, "in", keyword="hidden_states"),
        "attn_out": attn_out,
        "mlp_in": Place(arch.ln2 or arch.mlp, "in"),
        "mlp_out": Place(arch.ln2_post or arch.mlp, "out"),
        "z": Place(arch.z, "in"),
        "mlp_neurons": Place(arch.down, "in"),
        "pattern": Place(arch.attn, "out", item=1),
    }
    if not parallel:
        found["resid_mid"] = replace(attn_out, adds_input=True)
    for kind, path in (("ln1", arch.ln1), ("ln2", arch.ln2), ("ln1_post", arch.ln1_post), ("ln2_post", arch.ln2_post)):
        if path is not None:
            found[kind] = Place(path, "out")
    if len(arch.qkv) == 3:
        return found | {kind: Place(path, "out") for kind, path in zip("qkv", arch.qkv, strict=True)}
    groups = sizes.n_heads if arch.interleaved else 1
    start = 0
    for kind in "qkv":
        stop = start + sizes.width(kind) // groups
        found[kind] = Place(arch.qkv[0], "out", groups=groups, start=start, stop=stop)
        start = stop
    return found


def check_meaning(
    values: Mapping[Site, Float[Tensor, "batch pos width"]], sizes: Sizes, kinds: Mapping[str, Place]
) -> None:
    """Raise RuntimeError unless the values of a probing forward have the right shapes and add up.

    Adding up: resid_post = resid_pre + attn_out + mlp_out in every block, and the next block starts where this one
    ends.
    """
    for site, value in values.items():
        if value.shape[-1] != sizes.width(site.kind):
            raise RuntimeError(f"site {site} has width {value.shape[-1]}, expected {sizes.width(site.kind)}")
    for layer in range(sizes.n_layers):
        for kind in kinds:
            if kind not in READ_ONLY and Site(kind, layer) not in values:
                raise RuntimeError(f"site {kind}.{layer} did not fire in a probing forward")
        pre, attn, mlp, post = (
            values[Site(kind, layer)] for kind in ("resid_pre", "attn_out", "mlp_out", "resid_post")
        )
        scale = torch.stack([pre, attn, mlp, post]).abs().max()
        if (pre + attn + mlp - post).abs().max() > 4 * torch.finfo(post.dtype).eps * scale:
            raise RuntimeError(f"block {layer}: resid_pre + attn_out + mlp_out is not resid_post")
        if layer + 1 < sizes.n_layers and not torch.equal(post, values[Site("resid_pre", layer + 1)]):
            raise RuntimeError(f"block {layer + 1} does not read what block {layer} wrote")
