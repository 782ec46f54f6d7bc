"""What next-token distributions say, of many hidden states at once: likeliest tokens, chosen tokens, entropy, KL.

The vocabulary is gone through in blocks small enough to stay in a processor's cache; each is multiplied once for every
row and leaves behind a few sums (those of softmax, kept in proportion to the largest logit so far), so nothing of size
rows × vocabulary is ever held. On a CPU weights are laid out once per call for the products (`packed.py`), and what
becomes of a block is one kernel (`kernels.read_logits`); elsewhere it is torch, the same sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from steerlab.models import packed

if TYPE_CHECKING:
    from steerlab.models.handle import LanguageModel

VOCABULARY = 1024  # tokens of a block
POSITIONS = 128  # rows of a product


@dataclass(frozen=True)
class Said:
    """Of every row. kl_nats: of the final distribution from this one. ranks: how many tokens are likelier."""

    top_ids: Int[Tensor, "*row k"]
    top_logprobs: Float[Tensor, "*row k"]
    ranks: Int[Tensor, "*row watched"]
    watched_logprobs: Float[Tensor, "*row watched"]
    entropy_nats: Float[Tensor, " *row"]
    kl_nats: Float[Tensor, " *row"]


@dataclass(frozen=True)
class Known:
    """Of rows, by the blocks seen so far: the largest logit, Σe, Σe·logit and Σe'·logit, where e = exp(logit − largest)
    and e' is that of the final distribution; the k largest logits and their ids; how many exceed the watched ones."""

    sums: Float[Tensor, "row 4"]
    best: Float[Tensor, "row k"]
    best_ids: Int[Tensor, "row k"]
    seen: Float[Tensor, "row watched"]
    above: Int[Tensor, "row watched"]

    @classmethod
    def nothing(cls, seen: Float[Tensor, "row watched"], k: int) -> Known:
        """No block seen yet."""
        sums = seen.new_zeros(len(seen), 4)
        sums[:, 0] = -torch.inf
        best = seen.new_full((len(seen), k), -torch.inf)
        return cls(sums, best, torch.zeros_like(best, dtype=torch.long), seen, torch.zeros_like(seen, dtype=torch.long))


@dataclass(frozen=True)
class Final:
    """The final distribution's share in one block: e' of its tokens, and by what its earlier sums shrink there."""

    share: Float[Tensor, "row token"]
    shift: Float[Tensor, " row"]


Absorb = Callable[[Tensor, int, Known, Final, Tensor, bool], None]


def absorb(
    logits: Float[Tensor, "row token"],
    first: int,
    known: Known,
    final: Final,
    watch: Int[Tensor, " watched"],
    is_final: bool,
) -> None:
    """Add a block, from token `first` on, to what is known of the rows; `final` is written if these are its rows."""
    x, before, width = logits.to(known.sums.dtype), known.sums[:, 0].clone(), logits.shape[1]
    top = torch.maximum(before, x.amax(-1))
    e, shrunk = (x - top[:, None]).exp(), (before - top).exp()
    if is_final:
        final.share[:, :width].copy_(e)
        final.shift.copy_(shrunk)
    fresh = torch.stack([e.sum(-1), (e * x).sum(-1), (final.share[:, :width] * x).sum(-1)], -1)
    known.sums[:, 0] = top
    known.sums[:, 1:] *= torch.stack([shrunk, shrunk, final.shift], -1)
    known.sums[:, 1:] += fresh
    others = torch.arange(first, first + width, device=x.device) != watch[:, None]
    for w, other in enumerate(others):
        known.above[:, w] += ((x > known.seen[:, w, None]) & other).sum(-1)
    values, ids = x.topk(min(known.best.shape[1], width), -1)
    joined, joined_ids = torch.cat([known.best, values], 1), torch.cat([known.best_ids, ids + first], 1)
    best, places = joined.topk(known.best.shape[1], -1)
    known.best.copy_(best)
    known.best_ids.copy_(joined_ids.gather(1, places))


def absorber(device: torch.device) -> Absorb:
    """`absorb`, on a CPU as one kernel."""
    if device.type != "cpu":
        return absorb
    from steerlab.models import numbers, operators

    numbers.use_threads()
    return operators.absorb


class Vocabulary:
    """A model's head, ready to read many hidden states. Weights that change meanwhile are not seen."""

    def __init__(self, model: LanguageModel) -> None:
        self.model, head = model, model.unembedding
        self.products: list[tuple[int, Callable[[Tensor], Tensor]]] = []
        able = packed.able(model)
        for first in range(0, model.d_vocab, VOCABULARY):
            part = slice(first, first + VOCABULARY)
            weight, bias = head.weight[part].detach(), None if head.bias is None else head.bias[part].detach()
            self.products.append((first, packed.product(weight, bias, POSITIONS) if able else plain(weight, bias)))

    def read(self, hidden: Sequence[Float[Tensor, "pos d_model"]], k: int, watch: Int[Tensor, " watched"]) -> Said:
        """Of hidden states after the final norm, (layer, pos); the last of them are the model's own, to which the KL is
        taken."""
        starts = range(0, len(hidden[-1]), POSITIONS)
        parts = [self._read([states[start : start + POSITIONS] for states in hidden], k, watch) for start in starts]
        return Said(*(torch.cat([getattr(part, name) for part in parts], 1) for name in Said.__dataclass_fields__))

    def _read(self, hidden: Sequence[Tensor], k: int, watch: Tensor) -> Said:
        head, last = self.model.unembedding, hidden[-1]
        exact = torch.promote_types(last.dtype, torch.float32)
        watched = plain(head.weight[watch], None if head.bias is None else head.bias[watch])
        known = [Known.nothing(self._capped(watched(states)).to(exact), k) for states in hidden]
        final = Final(last.new_empty(len(last), VOCABULARY, dtype=exact), last.new_empty(len(last), dtype=exact))
        add = absorber(last.device)
        for first, product in self.products:
            add(self._capped(product(last)), first, known[-1], final, watch, True)
            for states, of in zip(hidden[:-1], known[:-1], strict=True):
                add(self._capped(product(states)), first, of, final, watch, False)
        return said(known)

    def _capped(self, logits: Tensor) -> Tensor:
        cap = self.model.logit_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap


def plain(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """torch's own product."""
    return lambda x: torch.nn.functional.linear(x, weight, bias)


def said(known: Sequence[Known]) -> Said:
    """When every block has been seen; the last are the final distribution's."""
    top, total, along, crossed = torch.stack([of.sums for of in known]).unbind(-1)
    whole, mean = top + total.log(), along / total
    kl = (mean - whole)[-1] + whole - crossed / total[-1]
    return Said(
        torch.stack([of.best_ids for of in known]),
        torch.stack([of.best for of in known]) - whole[..., None],
        torch.stack([of.above for of in known]),
        torch.stack([of.seen for of in known]) - whole[..., None],
        (whole - mean).clamp(min=0),
        kl.clamp(min=0),
    )
