"""Run in a process of its own (TransformerLens patches globals): prints {family: {what: largest difference}}.

`what` is a kind (values read), `write kind` (logits after adding to it) or `logits`. Every family's twin is a fresh
tiny model of the same seed, because the bridge replaces submodules of what it is given.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import sys

import torch

from steerlab.models import LanguageModel, Site, tiny

LAYER = 1
CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "gpt_neo": "GPTNeoForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
}
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
OLMO2 = {"ln1_post": "ln1.hook_out", "ln2_post": "ln2.hook_out"}  # its only norms, which the bridge calls ln1 and ln2
WRITTEN = ("resid_pre", "resid_post", "attn_out", "mlp_out", "z", "mlp_neurons", "ln1")


def differences(model: LanguageModel, twin: LanguageModel, architecture: str, tokens: torch.Tensor) -> dict[str, float]:
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    ours = model.cache(tokens, [Site(kind, LAYER) for kind in model.site_kinds if kind in HOOKS])
    bridge = build_bridge_from_module(twin.hf, architecture, hf_config=twin.hf.config, tokenizer=twin.tokenizer)
    logits, theirs = bridge.run_with_cache(tokens)
    found = {"logits": (logits - model.logits(tokens)).abs().max().item()}
    hooks = HOOKS | OLMO2 if model.family == "olmo2" else HOOKS
    for site, value in ours.items():
        other = theirs[f"blocks.{LAYER}.{hooks[site.kind]}"]
        if site.kind != "pattern" and other.ndim == 4:  # (batch, pos, head, d_head)
            other = other.flatten(-2)
        assert other.shape == value.shape, site
        found[site.kind] = (other - value).abs().max().item()
    for site in [site for site in ours if site.kind in WRITTEN]:
        shift = torch.linspace(-1, 1, model.width(site.kind))
        with model.intervene({site: lambda x, shift=shift: x + shift}):
            changed = model.logits(tokens)
        name = f"blocks.{LAYER}.{hooks[site.kind]}"
        other = bridge.run_with_hooks(
            tokens, fwd_hooks=[(name, lambda x, hook, shift=shift: x + shift.view(x.shape[2:]))]
        )
        found[f"write {site.kind}"] = (other - changed).abs().max().item()
    return found


def main() -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    tokens = torch.randint(5, 261, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
        found = {
            family: differences(tiny.model(family), tiny.model(family), architecture, tokens)
            for family, architecture in CLASSES.items()
        }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
