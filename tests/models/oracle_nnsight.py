"""Run in a process of its own (nnsight patches globals): prints {family: {kind: largest difference}}.

nnsight reads this file to compile its traces, so it must be a file.
"""

from __future__ import annotations

import json
import logging
import sys

import torch

from steerlab.models import LanguageModel, Site, bridges, tiny

LAYER = 1


def differences(model: LanguageModel, tokens: torch.Tensor) -> dict[str, float]:
    """Modules inside the block are named here anew, so that this does not repeat what `models/sites.py` believes."""
    ours = model.cache(tokens, [Site(kind, LAYER) for kind in ("resid_pre", "resid_post", "mlp_out", "attn_out")])
    traced = bridges.to_nnsight(model)
    block = traced.get(bridges.module_path(model, Site("resid_post", LAYER)))
    names = [name for name, _ in model.blocks[LAYER].named_children()]
    attn = block.get(next(name for name in ("self_attn", "attn", "attention") if name in names))
    norms = "post_feedforward_layernorm" in names
    with traced.trace(tokens):
        before = block.input.save()
        if norms:
            wrote = block.post_attention_layernorm.output.save()
            mlp = block.post_feedforward_layernorm.output.save()
        else:
            wrote = attn.output[0].save()
            mlp = block.mlp.output.save()
        after = block.output.save()
    after = after if isinstance(after, torch.Tensor) else after[0]
    theirs = {"resid_pre": before, "resid_post": after, "mlp_out": mlp, "attn_out": wrote}
    return {kind: (theirs[kind] - ours[Site(kind, LAYER)]).abs().max().item() for kind in theirs}


def main() -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    tokens = torch.randint(5, 261, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = {family: differences(tiny.model(family), tokens) for family in tiny.FAMILIES}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
