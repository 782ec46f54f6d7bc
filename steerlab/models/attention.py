"""Who attends to whom, for prompts that many completions share: one attention function, told by a plan.

Inside `attending(model, plan)` every attention module of the model hands its queries, keys and values to `plan`
instead of a cache and a mask. transformers' own interface carries them (it makes no mask for an attention function
that it does not know), so norms, rotary embeddings and projections stay the family's own. There are two plans: `Stream`
(many sequences as one row of tokens, with gradients: the update, the prefill) and `decoding.Decoding` (one new token
per row). A plan never pads a token: only inside attention are rows brought to equal length.

`Stream` keeps queries, keys and values for its backward pass and forms the attention pattern anew, in the way of
FlashAttention (Dao et al. 2022): memory grows with tokens, not with tokens × context. Query heads that share a key
head are rows of one product. Scores are rounded to the model's dtype and the softmax is taken in fp32 (or more), as
in transformers' eager attention. Leaves out: dropout (models are frozen, in eval mode) and second derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from steerlab.models.sites import architecture

if TYPE_CHECKING:
    from steerlab.models.handle import LanguageModel

NAME = "steerlab_plan"


@dataclass(frozen=True)
class Rule:
    """How one module attends. scale: of the scores. softcap: Gemma 2's. window: keys seen, None for all."""

    scale: float
    softcap: float | None = None
    window: int | None = None


@runtime_checkable
class Plan(Protocol):
    """Attention of one forward pass."""

    def attend(
        self,
        layer: int,
        query: Float[Tensor, "batch head new d_head"],
        key: Float[Tensor, "batch kv_head new d_head"],
        value: Float[Tensor, "batch kv_head new d_value"],
        rule: Rule,
    ) -> Float[Tensor, "batch head new d_value"]: ...


_PLAN: ContextVar[Plan] = ContextVar("plan")


def _planned(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _attention_mask: None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_rest: Any,  # transformers' interface: what a family passes to every implementation
) -> tuple[Tensor, None]:
    rule = Rule(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, sliding_window)
    layer: int = module.layer_idx  # type: ignore[assignment]
    return _PLAN.get().attend(layer, query, key, value, rule).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(NAME, _planned)


@contextmanager
def attending(model: LanguageModel, plan: Plan) -> Iterator[None]:
    """Inside the `with` the model's attention is `plan`'s."""
    config, before, token = model.hf.config, model.hf.config._attn_implementation, _PLAN.set(plan)
    config._attn_implementation = NAME
    own = architecture(model.family).own_attention
    modules: list[Any] = [] if own is None else [block.get_submodule(own) for block in model.blocks]
    for module in modules:
        module._attn = _family_attention(module)
    try:
        yield
    finally:
        for module in modules:
            del module._attn
        config._attn_implementation = before
        _PLAN.reset(token)


def _family_attention(module: Any) -> Any:
    """GPT-Neo knows no attention interface: the method that mixes values, in the form of one."""
    rule = Rule(1.0, window=module.config.window_size if module.attention_type == "local" else None)

    def attend(query: Tensor, key: Tensor, value: Tensor, _mask: object = None) -> tuple[Tensor, None]:
        return _PLAN.get().attend(module.layer_id, query, key, value, rule), None

    return attend


@dataclass(frozen=True)
class Segment:
    """Sequences of similar length that continue one prefix (or none), as slots of a stream.

    slots: which slot each place of the padded block reads; padding repeats a row's last slot. real: False on padding.
    places: where in the flat block each slot of `start … stop` is found. prefix: slots of the shared prompt.
    """

    slots: Int[Tensor, " place"]
    real: Bool[Tensor, " place"]
    places: Int[Tensor, " slot"]
    n_rows: int
    start: int
    stop: int
    prefix: tuple[int, int]

    @classmethod
    def of(cls, start: int, lengths: Sequence[int], prefix: tuple[int, int], device: torch.device) -> Segment:
        """Rows of the given lengths, one after the other from slot `start`."""
        sizes = torch.tensor(lengths)
        begins = start + sizes.cumsum(0) - sizes
        pos = torch.arange(int(sizes.max()))
        real = pos < sizes[:, None]
        slots = begins[:, None] + torch.minimum(pos, sizes[:, None] - 1)
        places = torch.nonzero(real.flatten()).flatten()
        stop = start + int(sizes.sum())
        return cls(
            slots.flatten().to(device), real.flatten().to(device), places.to(device), len(lengths), start, stop, prefix
        )

    @property
    def width(self) -> int:
        return len(self.slots) // self.n_rows


class Stream:
    """Segments in one row of tokens; gradients flow to keys and values of shared prefixes from every row.

    keep: called with (layer, keys, values), each (kv_head, slot, d), where a prefill wants them.
    """

    def __init__(self, blocks: Sequence[Segment], keep: Callable[[int, Tensor, Tensor], None] | None = None) -> None:
        self.blocks, self.keep = tuple(blocks), keep

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        if self.keep is not None:
            self.keep(layer, key[0], value[0])
        heads, kv_heads = query.shape[1], key.shape[1]
        grouped = query[0].unflatten(0, (kv_heads, heads // kv_heads))
        mixed: Tensor = _StreamAttention.apply(grouped, key[0], value[0], self.blocks, rule)  # type: ignore[assignment]
        return mixed.flatten(0, 1)[None]


class _StreamAttention(torch.autograd.Function):
    """query (kv_head, repeat, slot, d), key and value (kv_head, slot, d) → (kv_head, repeat, slot, d)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, blocks: tuple[Segment, ...], rule: Rule) -> Tensor:
        out = query.new_empty(*query.shape[:3], value.shape[-1])
        for block in blocks:
            taken = _Block(block, rule, query, key, value)
            out[:, :, block.start : block.stop] = taken.unpadded(taken.mixed(taken.pattern()))
        ctx.save_for_backward(query, key, value)
        ctx.blocks, ctx.rule = blocks, rule
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        d_query, d_key, d_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for block in ctx.blocks:
            taken = _Block(block, ctx.rule, query, key, value)
            taken.add_gradients(grads[0], d_query, d_key, d_value)
        return d_query, d_key, d_value, None, None


class _Block:
    """One block at work; k = kv heads, r = rows, h = query heads per kv head, c = padded row length, p = prefix."""

    def __init__(self, rows: Segment, rule: Rule, query: Tensor, key: Tensor, value: Tensor) -> None:
        self.rows, self.rule = rows, rule
        self.k, self.h, self.d = query.shape[0], query.shape[1], query.shape[3]
        self.r, self.c = rows.n_rows, rows.width
        self.query = self.padded(query)
        self.key, self.value = self.padded_keys(key), self.padded_keys(value)
        first, last = rows.prefix
        self.p = last - first
        self.prefix_key, self.prefix_value = key[:, first:last], value[:, first:last]

    def padded(self, x: Tensor) -> Tensor:
        """(k, h, slot, d) → (k, r·h·c, d)."""
        taken = x.index_select(2, self.rows.slots).unflatten(2, (self.r, self.c))
        return taken.transpose(1, 2).reshape(self.k, -1, x.shape[-1])

    def padded_keys(self, x: Tensor) -> Tensor:
        """(k, slot, d) → (k·r, c, d)."""
        return x.index_select(1, self.rows.slots).view(self.k * self.r, self.c, -1)

    def unpadded(self, x: Tensor) -> Tensor:
        """(k, r·h·c, d) → (k, h, slots of the block, d)."""
        rows = x.view(self.k, self.r, self.h, self.c, -1).transpose(1, 2).reshape(self.k, self.h, self.r * self.c, -1)
        return rows.index_select(2, self.rows.places)

    def products(self, x: Tensor, prefix: Tensor, own: Tensor) -> Tensor:
        """x · [prefix; own]ᵀ per row: (k, r·h·c, p + c)."""
        scores = x.new_empty(*x.shape[:2], self.p + self.c)
        if self.p:
            scores[..., : self.p] = torch.bmm(x, prefix.transpose(1, 2))
        by_row = torch.bmm(x.view(self.k * self.r, self.h * self.c, -1), own.transpose(1, 2))
        scores[..., self.p :] = by_row.view(*x.shape[:2], self.c)
        return scores

    def pattern(self) -> Tensor:
        """Softmax of the masked scores, in at least fp32."""
        scores = self.products(self.query * self.rule.scale, self.prefix_key, self.key)
        if self.rule.softcap is not None:
            scores = torch.tanh(scores / self.rule.softcap) * self.rule.softcap
        hidden = _hidden(self.p, self.c, self.rule.window, scores.device)
        by_position = scores.view(-1, self.c, self.p + self.c)
        by_position.masked_fill_(hidden, torch.finfo(scores.dtype).min)
        return torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32))

    def mixed(self, pattern: Tensor) -> Tensor:
        """Values mixed by the pattern: (k, r·h·c, d)."""
        return self.weighted(pattern.to(self.value.dtype), self.prefix_value, self.value)

    def weighted(self, weights: Tensor, prefix: Tensor, own: Tensor) -> Tensor:
        """weights · [prefix; own] per row."""
        by_row = weights[..., self.p :].reshape(self.k * self.r, self.h * self.c, self.c)
        out = torch.bmm(by_row, own).view(self.k, -1, own.shape[-1])
        return out.baddbmm_(weights[..., : self.p], prefix) if self.p else out

    def add_gradients(self, grad: Tensor, d_query: Tensor, d_key: Tensor, d_value: Tensor) -> None:
        """Backward of `mixed(pattern())` into the three gradients of the stream."""
        pattern = self.pattern()
        d_mixed = self.padded(grad)
        d_mixed.view(self.k, self.r, self.h, self.c, -1).mul_(self.rows.real.view(1, self.r, 1, self.c, 1))
        low = pattern.to(d_mixed.dtype)
        d_pattern = self.products(d_mixed, self.prefix_value, self.value)
        self.spread(low, d_mixed, d_value)
        d_scores = (d_pattern - (d_pattern * pattern).sum(-1, keepdim=True)).mul_(pattern)
        if self.rule.softcap is not None:
            raw = self.products(self.query * self.rule.scale, self.prefix_key, self.key)
            d_scores *= 1 - torch.tanh(raw / self.rule.softcap) ** 2
        low = d_scores.mul_(self.rule.scale).to(d_mixed.dtype)
        at = slice(self.rows.start, self.rows.stop)
        d_query[:, :, at] = self.unpadded(self.weighted(low, self.prefix_key, self.key))
        self.spread(low, self.query, d_key)

    def spread(self, weights: Tensor, x: Tensor, out: Tensor) -> None:
        """Adds weightsᵀ · x to the keys' slots of `out` (kv_head, slot, d)."""
        by_row = weights[..., self.p :].reshape(self.k * self.r, self.h * self.c, self.c).transpose(1, 2)
        own = torch.bmm(by_row, x.view(self.k * self.r, self.h * self.c, -1)).view(self.k, self.r * self.c, -1)
        out[:, self.rows.start : self.rows.stop] += own.index_select(1, self.rows.places)
        if self.p:
            first, last = self.rows.prefix
            out[:, first:last].baddbmm_(weights[..., : self.p].transpose(1, 2), x)


@lru_cache(maxsize=8)  # a mask of a long context takes megabytes
def _hidden(prefix: int, width: int, window: int | None, device: torch.device) -> Bool[Tensor, "pos key"]:
    """True where a row's position must not look: keys of its own future, keys before its window."""
    query = prefix + torch.arange(width, device=device)[:, None]
    key = torch.arange(prefix + width, device=device)
    later = key > query
    return later if window is None else later | (query - key >= window)
