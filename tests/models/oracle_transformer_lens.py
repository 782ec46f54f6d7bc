"""Run in a process of its own (TransformerLens patches globals): prints {family: {what: largest difference}}.

`what` is a kind (values read), `write kind` (logits after adding to it) or `logits`.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import sys

import torch

from steerlab.models import LanguageModel, Site, bridges, tiny

LAYER = 1


def differences(model: LanguageModel, tokens: torch.Tensor) -> dict[str, float]:
    ours = model.cache(tokens, [Site(kind, LAYER) for kind in model.site_kinds if kind in bridges.HOOKS])
    bridge = bridges.to_transformer_lens(model)
    logits, theirs = bridge.run_with_cache(tokens)
    found = {"logits": (logits - model.logits(tokens)).abs().max().item()}
    for site, value in ours.items():
        other = theirs[bridges.hook_name(model, site)]
        if site.kind != "pattern" and other.ndim == 4:  # (batch, pos, head, d_head)
            other = other.flatten(-2)
        assert other.shape == value.shape, site
        found[site.kind] = (other - value).abs().max().item()
    for site in [site for site in ours if site.kind in bridges.WRITABLE_HOOKS]:
        shift = torch.linspace(-1, 1, model.width(site.kind))
        with model.intervene({site: lambda x, shift=shift: x + shift}):
            changed = model.logits(tokens)
        hook = (bridges.hook_name(model, site), lambda x, hook, shift=shift: x + shift.view(x.shape[2:]))
        other = bridge.run_with_hooks(tokens, fwd_hooks=[hook])
        found[f"write {site.kind}"] = (other - changed).abs().max().item()
    return found


def main() -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    tokens = torch.randint(5, 261, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
        found = {family: differences(tiny.model(family), tokens) for family in tiny.FAMILIES}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
