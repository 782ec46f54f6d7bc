"""Run in a process of its own (nnsight patches globals): prints {family: {kind: largest difference}}.

nnsight reads this file to compile its traces, so it must be a file.
"""

from __future__ import annotations

import json
import logging
import sys

import torch
from nnsight import TransformersModel

from steerlab.models import LanguageModel, Site, tiny

LAYER = 1


def differences(model: LanguageModel, twin: LanguageModel, tokens: torch.Tensor) -> dict[str, float]:
    ours = model.cache(tokens, [Site(kind, LAYER) for kind in ("resid_pre", "resid_post", "mlp_out", "attn_out")])
    traced = TransformersModel(twin.hf, tokenizer=twin.tokenizer)
    path = next(name for name, module in twin.hf.named_modules() if module is twin.blocks[LAYER])
    block = traced.get(path)
    names = [name for name, _ in twin.blocks[LAYER].named_children()]
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
        found = {family: differences(tiny.model(family), tiny.model(family), tokens) for family in tiny.FAMILIES}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
