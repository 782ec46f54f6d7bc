"""The same model with vectors added, as a TransformerLens bridge or an nnsight model: their tools, our vectors.

Both packages change what they wrap (TransformerLens replaces submodules and forces eager attention, nnsight takes every
`forward`), so each gets a `twin`: modules of its own over the same weights. The model itself is not touched.
TransformerLens sees the vectors as permanent hooks at its own names, in force before any hook of the user and kept by
`reset_hooks()`; nnsight as part of the twin's modules, so that `.output` and `.input` hold what the model goes on with.
A copy of each vector is taken when the bridge is made. Written for transformer-lens 3.9 and nnsight 0.8.1.

Left out: token scopes other than `all` (neither package says where a prompt ends), gates, quantised or sharded
weights. Neither package is imported before it is asked for; both patch globals when they are.
"""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from steerlab.errors import UsageError
from steerlab.models.sites import READ_ONLY, Place, Site

if TYPE_CHECKING:
    from nnsight import TransformersModel
    from transformer_lens.model_bridge import TransformerBridge

    from steerlab.models.handle import LanguageModel

# What TransformerLens calls our sites, inside `blocks.{layer}.`
HOOKS = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "q": "attn.hook_q",
    "k": "attn.hook_k",
    "v": "attn.hook_v",
    "z": "attn.hook_z",
    "pattern": "attn.hook_pattern",
    "mlp_neurons": "mlp.hook_post",
    "ln1": "ln1.hook_out",
    "ln2": "ln2.hook_out",
    "ln1_post": "ln1_post.hook_out",
    "ln2_post": "ln2_post.hook_out",
}
_OLMO2 = {"ln1_post": "ln1.hook_out", "ln2_post": "ln2.hook_out"}  # its only norms, which the bridge calls ln1 and ln2
# Where adding means the same in both: writing `hook_resid_mid` changes the MLP's input alone.
WRITABLE_HOOKS = tuple(kind for kind in HOOKS if kind not in ("resid_mid", "pattern"))
_INSTALL = {"transformer_lens": "transformer-lens>=3.9,<4", "nnsight": "nnsight==0.8.1"}


@runtime_checkable
class Scoped(Protocol):
    """Vectors with a token scope, as `SteeringVectors` are."""

    scope: Any
    vectors: Any


Vectors = Mapping[Site, Tensor] | Scoped


def to_transformer_lens(model: LanguageModel, vectors: Vectors | None = None) -> TransformerBridge:
    """A TransformerLens bridge of `model` in which `vectors` are added at every token.

    Its logit lens knows no soft cap (Gemma 2). After `enable_compatibility_mode()` it predicts the same, with residual
    states in coordinates of its own. Raises UsageError if the package is missing or does not know the architecture, or
    a vector does not fit, has another token scope, or stands at a site that the package does not write as we do.
    """
    added = _added(model, vectors)
    for site in added:
        if site.kind not in WRITABLE_HOOKS:
            raise UsageError(f"TransformerLens does not write {site} as we do; choose {', '.join(WRITABLE_HOOKS)}")
    _need("transformer_lens")
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    name = type(model.hf).__name__
    if name not in SUPPORTED_ARCHITECTURES:
        raise UsageError(f"TransformerLens does not know {name}; look at {model.name} through nnsight instead")
    own = twin(model)
    bridge = build_bridge_from_module(
        own, name, hf_config=own.config, tokenizer=copy.deepcopy(model.tokenizer), model_name=model.name
    )
    for site, vector in added.items():
        bridge.add_perma_hook(hook_name(model, site), _hook(vector))
    return bridge


def to_nnsight(model: LanguageModel, vectors: Vectors | None = None) -> TransformersModel:
    """An nnsight model of `model` in which `vectors` are added at every token, in `trace`, `generate` and plain calls.

    Raises UsageError if the package is missing, or a vector does not fit, has another token scope or is read only.
    """
    added = _added(model, vectors)
    _need("nnsight")
    from nnsight import TransformersModel

    own = twin(model)
    for site, vector in added.items():
        place = model.doors.place(site)
        _carry(own.get_submodule(module_path(model, site)), place, vector)
    return TransformersModel(own, tokenizer=copy.deepcopy(model.tokenizer))


def hook_name(model: LanguageModel, site: Site) -> str:
    """TransformerLens' name of a site. Raises UsageError where it has none."""
    hooks = HOOKS | _OLMO2 if model.family == "olmo2" else HOOKS
    if site.kind not in hooks:
        raise UsageError(f"TransformerLens has no hook at {site}; it has {', '.join(hooks)}")
    return f"blocks.{site.layer}.{hooks[site.kind]}"


def module_path(model: LanguageModel, site: Site) -> str:
    """The path, within the Hugging Face model, of the module whose input or output a site is: what nnsight's
    `model.get` takes. Raises UsageError for a site the model does not have."""
    place, block = model.doors.place(site), model.blocks[site.layer]
    path = next(name for name, module in model.hf.named_modules() if module is block)
    return f"{path}.{place.module}" if place.module else path


def twin(model: LanguageModel) -> Any:
    """A Hugging Face model of the same class over the same memory of parameters and buffers. Modules, hooks and
    gradients are its own, and nothing that is in force on `model` at the moment is in force there."""
    hf = model.hf
    with torch.device("meta"):
        made = type(hf)(copy.deepcopy(hf.config))
    made.load_state_dict(hf.state_dict(), assign=True)
    for name, buffer in hf.named_buffers():  # those that are no part of the state, such as rotary frequencies
        path, _, leaf = name.rpartition(".")
        setattr(made.get_submodule(path), leaf, buffer)
    made.tie_weights()
    made.generation_config = copy.deepcopy(hf.generation_config)
    return made.eval()


def _need(package: str) -> None:
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise UsageError(f"{package} is not installed; pip install '{_INSTALL[package]}'") from None


def _added(model: LanguageModel, vectors: Vectors | None) -> dict[Site, Tensor]:
    """Copies of the vectors, in the order of their sites. Raises UsageError for those that cannot be bridged."""
    if vectors is None:
        return {}
    found = vectors if isinstance(vectors, Mapping) else _everywhere(vectors)
    if not found:
        raise UsageError("no vectors to add; give None for the model as it is")
    for site, vector in found.items():
        if site.kind in READ_ONLY:
            raise UsageError(f"site {site} is read only; no vector can be added there")
        if vector.shape != (model.width(site.kind),):
            raise UsageError(
                f"the vector at {site} has shape {tuple(vector.shape)}, {model.name} needs ({model.width(site.kind)},)"
            )
        model.doors.place(site)
    return {site: found[site].detach().clone() for site in sorted(found)}


def _everywhere(vectors: Scoped) -> Mapping[Site, Tensor]:
    if not isinstance(vectors, Scoped):
        raise UsageError(f"{type(vectors).__name__} cannot be bridged; give steering vectors, or {{Site: vector}}")
    if vectors.scope.kind != "all":
        raise UsageError(
            f"token scope '{vectors.scope.kind}' cannot be bridged, where a prompt ends is not known there; "
            "only scope 'all' can (pass vectors.vectors to have them added at every token)"
        )
    return vectors.vectors


def _hook(vector: Tensor) -> Callable[..., Tensor]:
    def add(x: Tensor, hook: Any) -> Tensor:  # noqa: ARG001 (TransformerLens passes it by name)
        return x + vector.to(x).view(x.shape[2:])  # heads may have an axis of their own

    return add


def _carry(module: nn.Module, place: Place, vector: Tensor) -> None:
    """Make a module add the vector at its input or output, where nnsight sees the sum.

    nnsight reads around `forward`: an output must be changed inside it, an input before it.
    """

    def add(x: Tensor) -> Tensor:
        if place.stop is None:
            return x + vector.to(x)
        seen = place.read(x, None)
        return place.write(x, seen, seen + vector.to(x))

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if place.keyword is None:
            return (add(args[0]), *args[1:]), kwargs
        return args, kwargs | {place.keyword: add(kwargs[place.keyword])}

    if place.side == "in":
        module.register_forward_pre_hook(before, with_kwargs=True)
        return
    inner = module.forward

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        out = inner(*args, **kwargs)
        if isinstance(out, Tensor):
            return add(out)
        return (*out[: place.item], add(out[place.item]), *out[place.item + 1 :])

    module.forward = forward
