"""A model whose vector reaches only part of the next block: path patching that generates (arXiv 2509.06608 §7).

The vector of layer i is the sender. Block i + 1 reads two streams, x as the model wrote it and x + s; a `Patch` says
which of its values come from the first. What it writes goes on through the rest of the model, so a patched model can be
sampled from, evaluated and read like any other: `Patched` is an adapter.

    patch              attention sees   residual stream and MLP see   beside
    no_patch           x + s            x + s
    skip_attention     x                x + s
    skip_mlp           x + s            x + s; MLP: x and its attention
    skip_layer         x                x                             s added to what the block writes
    base               x                x
    skip_head(h)       x + s, head h x  x + s
    steer_head(h)      x, head h x + s  x + s

and so for the projections q, k, v (k and v by group of heads that share them) and for groups of the MLP's neurons.
`reaches` lets a patched attention be seen by the MLP only, or by the residual stream only.

Exact while decoding: each run of the block keeps keys and values of its own. Sample through `Policy`; transformers'
caches know one run per block and are refused. Costs one more run of one block (two where `reaches` is not "all").
Left out: vectors at other sites, several vectors at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from steerlab.adapters import Layout, SteeringVectors
from steerlab.adapters.steering import Placement
from steerlab.errors import UsageError, unknown
from steerlab.models import LanguageModel, Site
from steerlab.models.attention import kept_apart
from steerlab.models.swap import swapped

Reaches = Literal["all", "residual", "mlp"]
BEFORE_MLP = ("q", "k", "v", "z", "attn_out")


@dataclass(frozen=True)
class Clean:
    """Values that come from the run without the vector: of a site of the block, all of them or some `parts` of `of`
    equal ones (None: of the site's heads). others: all but these."""

    site: str
    parts: tuple[int, ...] | None = None
    of: int | None = None
    others: bool = False

    def mask(self, model: LanguageModel) -> Bool[Tensor, " width"] | None:
        """True where the values are clean; None: everywhere. Raises UsageError for a part that there is not."""
        if self.parts is None:
            return None
        width = model.width(self.site)
        n = width // model.d_head if self.of is None else self.of
        wrong = [part for part in self.parts if not 0 <= part < n]
        if wrong:
            what = "group" if self.of is not None else "head" if self.site in ("q", "z") else "group of heads"
            raise UsageError(f"{what} {wrong[0]} of {self.site} does not exist; {model.name} has 0 to {n - 1}")
        named = torch.zeros(n, dtype=torch.bool, device=model.device)
        named[list(self.parts)] = True
        if self.others:
            named = ~named
        edges = torch.arange(width, device=model.device) * n // width
        return named[edges]


@dataclass(frozen=True)
class Patch:
    """name: as results call it. clean: what comes from the run without the vector; whole: the block's input does, so
    there is no vector. reaches: who sees an attention that was patched. family, part: `skip_head`, 3; "line" for what
    is not one of many."""

    name: str
    clean: tuple[Clean, ...] = ()
    whole: bool = False
    reaches: Reaches = "all"
    family: str = "line"
    part: int = 0

    @classmethod
    def of(cls, family: str, part: int, clean: Clean) -> Patch:
        """One of many."""
        return cls(f"{family}({part})", (clean,), family=family, part=part)

    @property
    def steers(self) -> bool:
        """Whether it leaves the vector to one part alone, rather than cutting it off from one."""
        return any(clean.others for clean in self.clean)

    @property
    def reference(self) -> Patch:
        """What differs from this patch by the part that it is about: the same with that part clean too where only the
        part sees the vector (of a head: `skip_attention`), else the vector as it is."""
        if not self.steers:
            return no_patch()
        site = self.clean[0].site
        of = {"z": skip_attention, "mlp_neurons": skip_mlp}.get(site)
        whole = Patch(f"skip_every_{site}", (Clean(site),)) if of is None else of()
        return whole.seen_by(self.reaches)

    def seen_by(self, reaches: Reaches) -> Patch:
        """The same, seen by the residual stream or by the MLP only. Raises UsageError where attention is not patched,
        or the MLP is too."""
        if reaches == "all":
            return replace(self, reaches=reaches)
        if not self.clean or any(clean.site not in BEFORE_MLP for clean in self.clean):
            raise UsageError(f"{self.name} does not patch attention alone; only then can the {reaches} path be chosen")
        return replace(self, name=f"{self.name}, {reaches} path", reaches=reaches)


def no_patch() -> Patch:
    """The vector as it is."""
    return Patch("no_patch")


def base() -> Patch:
    """No vector."""
    return Patch("base", whole=True)


def skip_attention() -> Patch:
    """Attention does not see the vector."""
    return Patch("skip_attention", (Clean("attn_out"),))


def skip_mlp() -> Patch:
    """The MLP does not see the vector, nor what it did to attention."""
    return Patch("skip_mlp", (Clean("mlp_out"),))


def skip_layer() -> Patch:
    """Neither sees it: the vector is added to what the block writes."""
    return Patch("skip_layer", (Clean("attn_out"), Clean("mlp_out")))


SITES = {"head": "z", "q": "q", "k": "k", "v": "v"}  # k and v: by group of heads that share them


def skip(kind: str, part: int) -> Patch:
    """One head, or one head's (group's) queries, keys or values do not see the vector. Raises UsageError for a kind
    that is not in `SITES`."""
    return Patch.of(f"skip_{_known(kind)}", part, Clean(SITES[kind], (part,)))


def steer(kind: str, part: int) -> Patch:
    """Of attention, only one head (or its queries, keys or values) sees the vector."""
    return Patch.of(f"steer_{_known(kind)}", part, Clean(SITES[kind], (part,), others=True))


def skip_neurons(group: int, groups: int) -> Patch:
    """One of `groups` equal groups of the MLP's neurons does not see the vector."""
    return Patch.of("skip_neurons", group, Clean("mlp_neurons", (group,), groups))


def steer_neurons(group: int, groups: int) -> Patch:
    """Of the MLP, only one of `groups` equal groups of neurons sees the vector."""
    return Patch.of("steer_neurons", group, Clean("mlp_neurons", (group,), groups, others=True))


def _known(kind: str) -> str:
    if kind not in SITES:
        raise unknown("kind of head", kind, tuple(SITES))
    return kind


LINES: tuple[Callable[[], Patch], ...] = (no_patch, skip_attention, skip_mlp, skip_layer, base)


class Patched:
    """One vector at `resid_post` of a layer that has a block behind it, and a patch of that block: an adapter."""

    def __init__(self, vectors: SteeringVectors, patch: Patch) -> None:
        if len(vectors.sites) != 1 or vectors.sites[0].kind != "resid_post":
            named = ", ".join(map(str, vectors.sites))
            raise UsageError(f"a patch follows one vector at resid_post, not {named}; select one layer")
        self.vectors, self.patch, self.layer = vectors, patch, vectors.layers[0]

    def __repr__(self) -> str:
        return f"Patched({self.vectors.sites[0]}, {self.patch.name})"

    @property
    def first_block(self) -> int:
        return self.layer + 1

    @property
    def keeps_inputs(self) -> bool:
        return False

    @property
    def n_parameters(self) -> int:
        return self.vectors.n_parameters

    def parameters(self) -> Iterator[nn.Parameter]:
        yield from self.vectors.parameters()

    def snapshot(self) -> dict[str, Tensor]:
        return self.vectors.snapshot()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.vectors.restore(state)

    @contextmanager
    def attach(
        self, model: LanguageModel, rows: Int[Tensor, " batch"] | None = None, layout: Layout | None = None
    ) -> Iterator[Placement]:
        """Use the vector and the patch inside the `with`. Raises UsageError for a vector of the last layer, a head that
        the model does not have, or a vector that does not fit."""
        self.vectors.check(model)
        if self.first_block == model.n_layers:
            raise UsageError(
                f"the vector of layer {self.layer} has no block behind it to patch; choose a layer below the last of "
                f"{model.name} (0 to {model.n_layers - 2})"
            )
        scope = self.vectors.scope
        placement = Placement(scope, (self.first_block,), None if rows is None else rows[:, None], layout)
        shift = placement.adding(self.vectors.vectors[self.vectors.sites[0]])
        runs = _Runs(model, self.first_block, self.patch, shift)
        with model.intervene(runs.edits), swapped([(model.blocks[self.first_block], runs.forward)]):
            yield placement


class _Runs:
    """The receiving block, run once per stream; what one run leaves for another is in `kept`, by site."""

    def __init__(self, model: LanguageModel, layer: int, patch: Patch, shift: Callable[[Tensor], Tensor]) -> None:
        self.block_forward: Callable[..., Any] = model.blocks[layer].forward
        self.patch, self.shift, self.spare = patch, shift, model.n_layers
        self.now: Literal["clean", "steered", "patched"] = "clean"
        self.kept: dict[str, Tensor] = {}
        self.edits = {Site(of.site, layer): self._edit(of, of.mask(model)) for of in patch.clean}
        self.mixed: dict[str, Tensor] = {}
        if patch.reaches != "all":
            seen = Site("attn_out", layer)
            before = self.edits.get(seen)
            self.edits[seen] = self._noting(before)

    def _edit(self, of: Clean, mask: Tensor | None) -> Callable[[Tensor], Tensor]:
        def edit(x: Tensor) -> Tensor:
            if self.now == "clean":
                self.kept[of.site] = x
            if self.now != "patched":
                return x
            return self.kept[of.site] if mask is None else torch.where(mask, self.kept[of.site], x)

        return edit

    def _noting(self, before: Callable[[Tensor], Tensor] | None) -> Callable[[Tensor], Tensor]:
        """Also note what attention writes to the stream, patched or not."""

        def edit(x: Tensor) -> Tensor:
            x = x if before is None else before(x)
            self.mixed[self.now] = x
            return x

        return edit

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The block's own forward in the place of a module's."""
        if any(map(_is_cache, (*args, *kwargs.values()))):
            raise UsageError(
                "a patched block runs twice, which transformers' caches do not know; sample through Policy"
            )
        if self.patch.whole:
            return self.block_forward(hidden_states, *args, **kwargs)
        moved = self.shift(hidden_states)
        if not self.patch.clean:
            return self.block_forward(moved, *args, **kwargs)

        def run(now: Literal["clean", "steered", "patched"], x: Tensor, slot: int | None) -> Any:
            self.now = now
            with nullcontext() if slot is None else kept_apart(slot):
                return self.block_forward(x, *args, **kwargs)

        run("clean", hidden_states, self.spare)
        if self.patch.reaches == "all":
            return self._done(run("patched", moved, None))
        whole = run("steered", moved, self.spare + 1)
        part = run("patched", moved, None)
        other = self.mixed["patched"] - self.mixed["steered"]
        joined = _plus(whole, other) if self.patch.reaches == "residual" else _plus(part, -other)
        return self._done(joined)

    def _done(self, out: Any) -> Any:
        self.kept.clear()
        self.mixed.clear()
        return out


def _is_cache(value: object) -> bool:
    from transformers import Cache

    return isinstance(value, Cache)


def _plus(out: Any, x: Tensor) -> Any:
    """What a block writes, and `x`."""
    return out + x if isinstance(out, Tensor) else (out[0] + x, *out[1:])


def sweep(model: LanguageModel, kind: str, *, groups: int = 8) -> Sequence[Patch]:
    """Skip and steer of every head, of every head's (group's) queries, keys or values, or of `groups` groups of
    neurons. kind: head, q, k, v or neurons."""
    if kind == "neurons":
        return [patch(group, groups) for patch in (skip_neurons, steer_neurons) for group in range(groups)]
    n = model.n_kv_heads if _known(kind) in ("k", "v") else model.n_heads
    return [patch(kind, part) for patch in (skip, steer) for part in range(n)]


_ONE_OF_MANY = re.compile(r"(skip|steer)_(head|q|k|v|neurons)\((\d+)\)")
_PATHS: Mapping[str, Reaches] = {"residual path": "residual", "mlp path": "mlp"}


def named(name: str, *, groups: int = 8) -> Patch:
    """The patch of that `Patch.name`: `skip_mlp`, `steer_head(3)`, `skip_v(0), residual path`.

    groups: of neurons, which names do not say. Raises UsageError for a name that no patch has; whether the model has
    the part is seen when it is used.
    """
    plain, comma, path = name.partition(", ")
    lines, one = {line().name: line for line in LINES}, _ONE_OF_MANY.fullmatch(plain)
    if (comma and path not in _PATHS) or (one is None and plain not in lines):
        kinds = [f"{verb}_{kind}(0)" for kind in (*SITES, "neurons") for verb in ("skip", "steer")]
        raise unknown("patch", name, (*lines, *kinds))
    if one is None:
        patch = lines[plain]()
    elif one[2] == "neurons":
        patch = {"skip": skip_neurons, "steer": steer_neurons}[one[1]](int(one[3]), groups)
    else:
        patch = {"skip": skip, "steer": steer}[one[1]](one[2], int(one[3]))
    return patch.seen_by(_PATHS[path]) if comma else patch
