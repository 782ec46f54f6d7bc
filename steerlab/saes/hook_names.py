"""What sae-lens' metadata calls a site (`hook_name` of TransformerLens, `hf_hook_name` of transformers), and back.

`hf_hook_name` is the path of the module whose output the site is; a site that is a module's input, or part of an
output, has none. What block l − 1 writes and what block l reads are one place with two names.
"""

from __future__ import annotations

from collections.abc import Iterator

from steerlab.errors import UsageError
from steerlab.models import LanguageModel, Site
from steerlab.models.bridges import hook_name, module_path

_KINDS = ("resid_post", "resid_pre", "attn_out", "mlp_out", "z", "mlp_neurons", "mlp_in", "q", "k", "v")
_ALSO = {"resid_post": "hook_out", "resid_pre": "hook_in", "mlp_in": "hook_mlp_in"}  # within `blocks.{layer}.`


def lens_name(model: LanguageModel, site: Site) -> str | None:
    """TransformerLens' name, None where it has none. Raises UsageError for a site the model does not have."""
    model.doors.place(site)
    try:
        return hook_name(model, site)
    except UsageError:
        return None


def hf_name(model: LanguageModel, site: Site) -> str | None:
    """Path of the module whose output this is, None where there is none. Raises UsageError as `lens_name`."""
    place = model.doors.place(site)
    if site.kind == "resid_pre" and site.layer:
        return module_path(model, Site("resid_post", site.layer - 1))
    whole = place.side == "out" and place.stop is None and place.item == 0 and not place.adds_input
    return module_path(model, site) if whole else None


def site_of(model: LanguageModel, *names: str | None) -> Site:
    """The site that all of the names mean. Raises UsageError for no name, one that the model does not have, or names
    of several places."""
    given = [name for name in names if name]
    if not given:
        raise UsageError("this SAE does not say where in a model it belongs; pass the site, as in resid_post.15")
    known = dict(_names(model))
    found = []
    for name in given:
        plain = name.removesuffix(".output").replace("language_model.", "")
        if plain not in known:
            raise UsageError(
                f"this SAE belongs at {name}, which {model.name} ({model.family}, {model.n_layers} layers) does not "
                "have; load the model that it was trained on"
            )
        found.append(known[plain])
    if len({_one(site) for site in found}) > 1:
        raise UsageError(f"this SAE names several places ({', '.join(given)}); pass the site, as in resid_post.15")
    return found[0]


def _one(site: Site) -> Site:
    """One name for one place."""
    return Site("resid_post", site.layer - 1) if site.kind == "resid_pre" and site.layer else site


def _names(model: LanguageModel) -> Iterator[tuple[str, Site]]:
    """Every name with its site; of two sites with one name the one in front in _KINDS comes last."""
    for kind in reversed([kind for kind in _KINDS if kind in model.site_kinds]):
        for layer in range(model.n_layers):
            site = Site(kind, layer)
            names = (hf_name(model, site), lens_name(model, site))
            yield from ((name, site) for name in names if name is not None)
            if kind in _ALSO:
                yield f"blocks.{layer}.{_ALSO[kind]}", site
