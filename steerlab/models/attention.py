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
_KEPT_AT: ContextVar[int | None] = ContextVar("kept_at", default=None)


@contextmanager
def kept_apart(layer: int) -> Iterator[None]:
    """Inside the `with` plans keep keys and values as those of `layer`, whatever module they come from: one beyond the
    model's own where a block runs a second time."""
    token = _KEPT_AT.set(layer)
    try:
        yield
    finally:
        _KEPT_AT.reset(token)


def _attend(layer: int, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
    apart = _KEPT_AT.get()
    return _PLAN.get().attend(layer if apart is None else apart, query, key, value, rule)


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
    return _attend(layer, query, key, value, rule).transpose(1, 2), None


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
        return _attend(module.layer_id, query, key, value, rule), None

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


SPAN = 128  # queries of a row at a time: keys behind them are not multiplied


class Stream:
    """Segments in one row of tokens; gradients flow to keys and values of shared prefixes from every row.

    keep: called with (layer, keys, values), each (kv_head, slot, d), where a prefill wants them. fused: softmax by
    kernels (`fused.able`), where there is no soft cap.
    """

    def __init__(
        self,
        blocks: Sequence[Segment],
        keep: Callable[[int, Tensor, Tensor], None] | None = None,
        fused: bool = False,
    ) -> None:
        self.blocks, self.keep, self.fused = tuple(blocks), keep, fused

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        if self.keep is not None:
            self.keep(layer, key[0], value[0])
        heads, kv_heads = query.shape[1], key.shape[1]
        grouped = query[0].unflatten(0, (kv_heads, heads // kv_heads))
        fused = self.fused and rule.softcap is None
        mixed: Tensor = _StreamAttention.apply(grouped, key[0], value[0], self.blocks, rule, fused)  # type: ignore[assignment]
        return mixed.flatten(0, 1)[None]


class _StreamAttention(torch.autograd.Function):
    """query (kv_head, repeat, slot, d), key and value (kv_head, slot, d) → (kv_head, repeat, slot, d)."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, blocks: tuple[Segment, ...], rule: Rule, fused: bool
    ) -> Tensor:
        out = query.new_empty(*query.shape[:3], value.shape[-1])
        for block in blocks:
            out[:, :, block.start : block.stop] = _Block(block, rule, fused, query, key, value).mixed()
        ctx.save_for_backward(query, key, value)
        ctx.blocks, ctx.rule, ctx.fused = blocks, rule, fused
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        d_query, d_key, d_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for block in ctx.blocks:
            taken = _Block(block, ctx.rule, ctx.fused, query, key, value)
            taken.add_gradients(grads[0], d_query, d_key, d_value)
        return d_query, d_key, d_value, None, None, None


class _Block:
    """One block at work, some queries of every row at a time; k = kv heads, r = rows, h = query heads per kv head,
    c = padded row length, p = prefix, q = queries at a time."""

    def __init__(self, rows: Segment, rule: Rule, fused: bool, query: Tensor, key: Tensor, value: Tensor) -> None:
        self.rows, self.rule, self.fused = rows, rule, fused
        self.k, self.h, self.d = query.shape[0], query.shape[1], query.shape[3]
        self.r, self.c = rows.n_rows, rows.width
        self.query = self.padded(query)
        self.key, self.value = self.padded_keys(key), self.padded_keys(value)
        first, last = rows.prefix
        self.p = last - first
        self.prefix_key, self.prefix_value = key[:, first:last], value[:, first:last]

    def padded(self, x: Tensor) -> Tensor:
        """(k, h, slot, d) → (k, r, h, c, d)."""
        return x.index_select(2, self.rows.slots).unflatten(2, (self.r, self.c)).transpose(1, 2).contiguous()

    def padded_keys(self, x: Tensor) -> Tensor:
        """(k, slot, d) → (k·r, c, d)."""
        return x.index_select(1, self.rows.slots).view(self.k * self.r, self.c, -1)

    def unpadded(self, x: Tensor) -> Tensor:
        """(k, r, h, c, d) → (k, h, slots of the block, d)."""
        rows = x.transpose(1, 2).reshape(self.k, self.h, self.r * self.c, -1)
        return rows.index_select(2, self.rows.places)

    def spans(self) -> Iterator[tuple[int, int]]:
        """Queries first … last − 1 of every row."""
        for first in range(0, self.c, SPAN):
            yield first, min(first + SPAN, self.c)

    def some(self, x: Tensor, span: tuple[int, int]) -> Tensor:
        """(k, r, h, c, d) → (k, r·h·q, d), the queries of one span."""
        return x[:, :, :, slice(*span)].reshape(self.k, -1, x.shape[-1])

    def products(self, x: Tensor, prefix: Tensor, own: Tensor) -> Tensor:
        """x · [prefix; own]ᵀ per row: (k, r·h·q, p + keys)."""
        scores = x.new_empty(*x.shape[:2], self.p + own.shape[1])
        if self.p:
            scores[..., : self.p] = torch.bmm(x, prefix.transpose(1, 2))
        by_row = torch.bmm(x.view(self.k * self.r, -1, x.shape[-1]), own.transpose(1, 2))
        scores[..., self.p :] = by_row.view(*x.shape[:2], -1)
        return scores

    def pattern(self, span: tuple[int, int]) -> Tensor:
        """Softmax of the masked scores; in at least fp32, but rounded where a kernel does it."""
        first, last = span
        asked, keys = self.some(self.query, span), self.key[:, :last]
        if self.fused:
            from steerlab.models import operators

            scores = self.products(asked, self.prefix_key, keys)
            return operators.causal_softmax_(scores, self.p + first, last - first, self.rule.window, self.rule.scale)
        scores = self.products(asked * self.rule.scale, self.prefix_key, keys)
        if self.rule.softcap is not None:
            scores = torch.tanh(scores / self.rule.softcap) * self.rule.softcap
        hidden = _hidden(self.p + first, last - first, self.rule.window, scores.device)
        by_position = scores.view(-1, last - first, self.p + last)
        by_position.masked_fill_(hidden, torch.finfo(scores.dtype).min)
        return torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32))

    def mixed(self) -> Tensor:
        """Values mixed by the pattern: (k, h, slots of the block, d)."""
        out = self.value.new_empty(self.k, self.r, self.h, self.c, self.value.shape[-1])
        for span in self.spans():
            low = self.pattern(span).to(self.value.dtype)
            self.put(out, span, self.weighted(low, self.prefix_value, self.value[:, : span[1]]))
        return self.unpadded(out)

    def put(self, out: Tensor, span: tuple[int, int], x: Tensor) -> None:
        """The inverse of `some`, into `out`."""
        out[:, :, :, slice(*span)] = x.view(self.k, self.r, self.h, span[1] - span[0], -1)

    def weighted(self, weights: Tensor, prefix: Tensor, own: Tensor) -> Tensor:
        """weights · [prefix; own] per row."""
        by_row = weights[..., self.p :].reshape(self.k * self.r, -1, own.shape[1])
        out = torch.bmm(by_row, own).view(self.k, -1, own.shape[-1])
        return out.baddbmm_(weights[..., : self.p], prefix) if self.p else out

    def add_gradients(self, grad: Tensor, d_query: Tensor, d_key: Tensor, d_value: Tensor) -> None:
        """Backward of `mixed` into the three gradients of the stream."""
        d_mixed = self.padded(grad).mul_(self.rows.real.view(1, self.r, 1, self.c, 1))
        d_asked, d_own_key, d_own_value = (torch.zeros_like(x) for x in (self.query, self.key, self.value))
        for span in self.spans():
            pattern, slope = self.pattern(span), self.some(d_mixed, span)
            keys, values = self.key[:, : span[1]], self.value[:, : span[1]]
            self.spread(pattern.to(slope.dtype), slope, d_own_value, d_value)
            d_scores = self.d_scores(span, pattern, self.products(slope, self.prefix_value, values))
            self.put(d_asked, span, self.weighted(d_scores, self.prefix_key, keys))
            self.spread(d_scores, self.some(self.query, span), d_own_key, d_key)
        at = slice(self.rows.start, self.rows.stop)
        d_query[:, :, at] = self.unpadded(d_asked)
        for own, total in ((d_own_key, d_key), (d_own_value, d_value)):
            total[:, at] += own.view(self.k, self.r * self.c, -1).index_select(1, self.rows.places)

    def d_scores(self, span: tuple[int, int], pattern: Tensor, d_pattern: Tensor) -> Tensor:
        """Gradient of the products of queries and keys, in their dtype; `d_pattern` may be overwritten."""
        if self.fused:
            from steerlab.models import operators

            scale = self.rule.scale
            return operators.causal_softmax_back_(d_pattern, pattern, self.p + span[0], span[1] - span[0], scale)
        d_scores = (d_pattern - (d_pattern * pattern).sum(-1, keepdim=True)).mul_(pattern)
        if self.rule.softcap is not None:
            asked = self.some(self.query, span) * self.rule.scale
            raw = self.products(asked, self.prefix_key, self.key[:, : span[1]])
            d_scores *= 1 - torch.tanh(raw / self.rule.softcap) ** 2
        return d_scores.mul_(self.rule.scale).to(d_pattern.dtype)

    def spread(self, weights: Tensor, x: Tensor, own: Tensor, total: Tensor) -> None:
        """Adds weightsᵀ · x to the rows' keys in `own` (k·r, c, d), and to the prefix's in `total` (k, slot, d)."""
        by_row = weights[..., self.p :].reshape(self.k * self.r, -1, weights.shape[-1] - self.p).transpose(1, 2)
        own[:, : by_row.shape[1]] += torch.bmm(by_row, x.view(self.k * self.r, -1, x.shape[-1]))
        if self.p:
            first, last = self.rows.prefix
            total[:, first:last].baddbmm_(weights[..., : self.p].transpose(1, 2), x)


@lru_cache(maxsize=8)  # a mask of a long context takes megabytes
def _hidden(prefix: int, width: int, window: int | None, device: torch.device) -> Bool[Tensor, "pos key"]:
    """True where a row's position must not look: keys of its own future, keys before its window."""
    query = prefix + torch.arange(width, device=device)[:, None]
    key = torch.arange(prefix + width, device=device)
    later = key > query
    return later if window is None else later | (query - key >= window)
