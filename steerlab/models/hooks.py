"""`cache()` and `intervene()`: the only two doors into a forward pass.

Torch hooks on the modules of `models/sites.py`. Each module side that is in use carries one torch hook, put there when
a context opens and taken away when the last context that needs it closes; an unused model has no hooks at all. At one
place all writes run first, in the order in which their contexts were opened, then all reads: a cache holds what the
model goes on with. Values are passed as they are, with their graph: wrap the call in `torch.no_grad()` where no
gradient is wanted.

Leaves out: editing attention probabilities, which fused attention kernels never form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steerlab.errors import UsageError
from steerlab.models.sites import READ_ONLY, Place, Site

if TYPE_CHECKING:
    from steerlab.models.handle import LanguageModel

Edit = Callable[[Tensor], Tensor]
Keep = Callable[[Tensor], None]
Mask = Int[Tensor, "batch total_pos"] | Bool[Tensor, "batch total_pos"]
_BLOCK_INPUT = Place("", "in")


class _Point:
    """One side of one module: the edits and reads that are in force there, behind a single torch hook."""

    def __init__(self, module: nn.Module, place: Place, block_inputs: dict[int, Tensor], layer: int) -> None:
        self.notes: list[tuple[Place, Keep]] = []  # before any edit
        self.edits: list[tuple[Place, Edit, Site]] = []
        self.reads: list[tuple[Place, Keep]] = []
        self.block_inputs, self.layer = block_inputs, layer
        self.item, self.keyword = place.item, place.keyword
        self.handle = self._register(module, place)

    def _register(self, module: nn.Module, place: Place) -> RemovableHandle:
        if place.side == "out":
            return module.register_forward_hook(self._after)
        if place.keyword is None:
            return module.register_forward_pre_hook(self._before)
        return module.register_forward_pre_hook(self._before_keyword, with_kwargs=True)

    def _run(self, x: Tensor) -> Tensor:
        block_input = self.block_inputs.get(self.layer) if self.block_inputs else None
        for place, keep in self.notes:
            keep(place.read(x, block_input))
        for place, edit, site in self.edits:
            seen = place.read(x, block_input)
            new = edit(seen)
            if new is seen:
                continue
            if new.shape != seen.shape or new.dtype != seen.dtype:
                got, expected = f"{tuple(new.shape)} {new.dtype}", f"{tuple(seen.shape)} {seen.dtype}"
                raise ValueError(f"the edit at {site} returned {got}, expected {expected}")
            x = place.write(x, seen, new)
        for place, keep in self.reads:
            keep(place.read(x, block_input))
        return x

    def _before(self, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        new = self._run(args[0])
        return None if new is args[0] else (new, *args[1:])

    def _before_keyword(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        assert self.keyword is not None
        return args, kwargs | {self.keyword: self._run(kwargs[self.keyword])}

    def _after(self, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, Tensor):  # transformers 5; 4.x blocks and GPT-Neo return tuples
            new = self._run(output)
            return None if new is output else new
        new = self._run(output[self.item])
        return None if new is output[self.item] else (*output[: self.item], new, *output[self.item + 1 :])


class Doors:
    """What is open at the moment in one model: its points, by layer, module path and side."""

    def __init__(self, blocks: list[nn.Module], places: Mapping[str, Place]) -> None:
        self.blocks, self.places = blocks, places
        self._points: dict[tuple[int, str, str, int], _Point] = {}
        self._block_inputs: dict[int, Tensor] = {}

    def place(self, site: Site) -> Place:
        """The site's place; raises UsageError where this model has no such layer or kind."""
        if site.layer >= len(self.blocks):
            raise UsageError(f"site {site}: the model has layers 0…{len(self.blocks) - 1}; choose one of them")
        if site.kind not in self.places:
            raise UsageError(f"site {site}: this architecture has none; it has {', '.join(sorted(self.places))}")
        return self.places[site.kind]

    @contextmanager
    def open(
        self,
        edits: Iterable[tuple[Site, Edit]],
        reads: Iterable[tuple[Site, Keep]] = (),
        notes: Iterable[tuple[Site, Keep]] = (),
    ) -> Iterator[None]:
        """Put edits and reads in force until the context closes, whatever happens inside; notes read before edits."""
        writing = [(self.place(site), site, edit) for site, edit in edits]
        reading = [(self.place(site), site.layer, keep) for site, keep in reads]
        with ExitStack() as stack:
            for place, site, edit in writing:
                self._hold_block_input(place, site.layer, stack)
                self._enter(place, site.layer, stack, edit=(place, edit, site))
            for place, layer, keep in reading:
                self._hold_block_input(place, layer, stack)
                self._enter(place, layer, stack, read=(place, keep))
            for site, keep in notes:
                self._enter(self.place(site), site.layer, stack, note=(self.place(site), keep))
            yield

    def _hold_block_input(self, place: Place, layer: int, stack: ExitStack) -> None:
        """resid_mid needs the block's input as the model goes on with it: a read there, after all edits."""
        if place.adds_input:
            stack.callback(self._block_inputs.pop, layer, None)
            keep = _keep_in(self._block_inputs, layer)
            self._enter(_BLOCK_INPUT, layer, stack, read=(_BLOCK_INPUT, keep))

    def _enter(
        self,
        place: Place,
        layer: int,
        stack: ExitStack,
        edit: tuple[Place, Edit, Site] | None = None,
        read: tuple[Place, Keep] | None = None,
        note: tuple[Place, Keep] | None = None,
    ) -> None:
        key = (layer, place.module, place.side, place.item)
        if key not in self._points:
            module = self.blocks[layer].get_submodule(place.module)
            self._points[key] = _Point(module, place, self._block_inputs, layer)
        point = self._points[key]
        if edit is not None:
            point.edits.append(edit)
        if read is not None:
            point.reads.append(read)
        if note is not None:
            point.notes.append(note)
        stack.callback(self._leave, key, edit, read, note)

    def _leave(
        self,
        key: tuple[int, str, str, int],
        edit: tuple[Place, Edit, Site] | None,
        read: tuple[Place, Keep] | None,
        note: tuple[Place, Keep] | None,
    ) -> None:
        point = self._points[key]
        if edit is not None:  # by identity: the same function may be in force twice
            point.edits = [entry for entry in point.edits if entry is not edit]
        if read is not None:
            point.reads = [entry for entry in point.reads if entry is not read]
        if note is not None:
            point.notes = [entry for entry in point.notes if entry is not note]
        if not point.edits and not point.reads and not point.notes:
            point.handle.remove()
            del self._points[key]


def _keep_in(store: dict[Any, Tensor], key: Any) -> Keep:
    def keep(value: Tensor) -> None:
        store[key] = value

    return keep


@contextmanager
def intervene(model: LanguageModel, edits: Mapping[Site, Edit]) -> Iterator[None]:
    """Inside the context every forward pass of `model` carries `edits`.

    Each function receives its site's value, `(batch, pos, width)`, and returns one of the same shape and dtype; with a
    KV cache `pos` runs over the new positions only. An identity changes no bit. Edits of one site in nested contexts
    compose, outermost first. Raises UsageError for a site the model does not have or that is read only.
    """
    for site in edits:
        if site.kind in READ_ONLY:
            raise UsageError(f"site {site} is read only; edit q, k, v or z instead")
    with model.doors.open(edits.items()):
        yield


@contextmanager
def written(model: LanguageModel, keep: Mapping[int, Keep]) -> Iterator[None]:
    """Inside the context `keep[block]` is called with what block `block`−1 writes, before any edit there: what
    `forward.beginning_at(model, block, …)` takes."""
    notes = [(Site("resid_post", block - 1), function) for block, function in keep.items()]
    with model.doors.open((), notes=notes):
        yield


def cache(
    model: LanguageModel,
    tokens: Int[Tensor, "batch pos"],
    sites: Iterable[Site],
    mask: Mask | None = None,
) -> dict[Site, Tensor]:
    """Values of `sites` in one forward pass over `tokens`, under whatever interventions are in force.

    Asking for a `pattern` runs this pass with eager attention, whose rounding differs from the fused kernel's.
    """
    wanted = list(sites)
    values: dict[Site, Tensor] = {}
    with ExitStack() as stack:
        if any(site.kind == "pattern" for site in wanted):
            stack.enter_context(_eager_attention(model))
        stack.enter_context(model.doors.open((), [(site, _keep_in(values, site)) for site in wanted]))
        model.hidden(tokens, mask=mask)
    return {site: values[site] for site in wanted}


@contextmanager
def _eager_attention(model: LanguageModel) -> Iterator[None]:
    before = model.hf.config._attn_implementation
    if before == "eager":
        yield
        return
    model.hf.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.hf.set_attn_implementation(before)


def probe(model: LanguageModel) -> dict[Site, Tensor]:
    """Every writable site's value in a forward pass over three tokens, for the check at load."""
    sites = [
        Site(kind, layer) for layer in range(model.n_layers) for kind in model.doors.places if kind not in READ_ONLY
    ]
    tokens = torch.arange(3, device=model.device)[None]
    with torch.no_grad():
        return cache(model, tokens, sites, mask=torch.ones_like(tokens))
