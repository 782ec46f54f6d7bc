"""Run in a process of its own (both packages patch globals): prints {family: {what: largest difference}} and, under
`refused`, messages.

What the bridges of a steered model show, against our own steered model. nnsight reads this file to compile its traces,
so it must be a file.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import sys

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from steerlab.adapters import SteeringVectors
from steerlab.errors import UsageError
from steerlab.interp.residual_lens import residual_lens
from steerlab.interp.states import states_under
from steerlab.interp.texts import Text
from steerlab.models import LanguageModel, Site, bridges, tiny

FAMILIES = ("llama", "qwen2", "gemma2", "gemma3", "gpt2", "gpt_neo")
N_NEW = 6


def apart(ours: Tensor, theirs: Tensor) -> float:
    return (ours - theirs).abs().max().item()


def whole_lens(model: LanguageModel, text: Text, vectors: SteeringVectors) -> Tensor:
    """Our lens as log-probabilities (layer, position, vocabulary)."""
    table = residual_lens(model, [text], {"steered": vectors}, k=model.d_vocab).tokens
    said = torch.full((model.n_layers, len(text.tokens), model.d_vocab), torch.nan)
    places = tuple(torch.tensor(table[column].to_numpy()) for column in ("layer", "position", "token_id"))
    said[places] = torch.tensor(table["logprob"].to_numpy(), dtype=said.dtype)
    return said


def same_shape(model: LanguageModel) -> dict[str, object]:
    """What must not change, bit for bit."""
    return {
        "modules": [id(module) for module in model.hf.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m)) for m in model.hf.modules()],
        "weights": [(id(p), p.data_ptr(), p._version, p.requires_grad, p.grad) for p in model.hf.parameters()],
        "attention": model.hf.config._attn_implementation,
        "padding": model.tokenizer.padding_side,
    }


def in_transformer_lens(
    model: LanguageModel, vectors: SteeringVectors, text: Text, ours: Tensor, written: Tensor
) -> dict[str, float]:
    tokens = torch.tensor([text.tokens])
    bridge = bridges.to_transformer_lens(model, vectors)
    bridge.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_resid_post", lambda x, hook: 0 * x)])
    bridge.reset_hooks()
    logits, cache = bridge.run_with_cache(tokens)
    accumulated = cache.accumulated_resid(apply_ln=True)[1:, 0]  # the first is the embedding
    z = bridge.unembed(accumulated)
    cap = model.logit_softcap
    lens = (z if cap is None else cap * (z / cap).tanh()).log_softmax(-1)
    seen = torch.stack([cache["resid_post", layer][0] for layer in range(model.n_layers)])
    states = states_under(model, vectors, text, range(model.n_layers))
    new = bridge.generate(tokens, max_new_tokens=N_NEW, do_sample=False, stop_at_eos=False, verbose=False)
    found = {
        "lens logits": apart(logits, ours),
        "lens states": apart(seen, torch.stack(list(states.values()))),
        "lens of the stream": apart(lens, whole_lens(model, text, vectors)),
        "lens generates": apart(new, written),
        "lens of none": apart(bridges.to_transformer_lens(model)(tokens), model.logits(tokens)),
    }
    bridge.enable_compatibility_mode()  # rewrites weights, which must be its own from there on
    return found | {"lens in compatibility": apart(bridge(tokens).log_softmax(-1), ours.log_softmax(-1))}


def in_nnsight(
    model: LanguageModel, vectors: SteeringVectors, text: Text, ours: Tensor, written: Tensor
) -> dict[str, float]:
    tokens = torch.tensor([text.tokens])
    traced = bridges.to_nnsight(model, vectors)
    blocks = [traced.get(bridges.module_path(model, Site("resid_post", layer))) for layer in range(model.n_layers)]
    with traced.trace(tokens):
        outputs = []
        for block in blocks:
            outputs.append(block.output)
        outputs.save()
        logits = traced.output.logits.save()
    seen = torch.stack([out[0] if isinstance(out, Tensor) else out[0][0] for out in outputs])
    states = states_under(model, vectors, text, range(model.n_layers))
    with traced.generate(tokens, max_new_tokens=N_NEW, do_sample=False, eos_token_id=None) as tracer:
        new = tracer.result.save()
    return {
        "trace logits": apart(logits, ours),
        "trace states": apart(seen, torch.stack(list(states.values()))),
        "trace generates": apart(new, written),
    }


def differences(family: str) -> dict[str, float]:
    model, generator = tiny.model(family), torch.Generator().manual_seed(0)
    sites = [Site("resid_pre", 0), Site("attn_out", 1), Site("resid_post", 1), Site("resid_post", 2)]
    vectors = SteeringVectors({site: torch.randn(model.d_model, generator=generator) for site in sites})
    text = Text(tuple(torch.randint(5, 261, (40,), generator=generator).tolist()), 40)
    tokens = torch.tensor([text.tokens])
    before, shape = model.logits(tokens), same_shape(model)
    with vectors.attach(model):
        ours, written = model.logits(tokens), tokens
        for _ in range(N_NEW):
            written = torch.cat([written, model.logits(written)[:, -1:].argmax(-1)], 1)
    found = {"moved": apart(ours, before)}
    # Bridges are made while the model is steered: what is in force on it must not be in force twice.
    with vectors.attach(model):
        twin = bridges.twin(model)
    found["twin"] = apart(twin(tokens).logits, before)
    found |= in_transformer_lens(model, vectors, text, ours, written)
    found |= in_nnsight(model, vectors, text, ours, written)
    shared = {name: tensor.data_ptr() for name, tensor in twin.state_dict().items()}
    assert shared == {name: tensor.data_ptr() for name, tensor in model.hf.state_dict().items()}
    assert same_shape(model) == shape
    assert torch.equal(model.logits(tokens), before)
    return found


def refused() -> list[str]:
    """What both say to what they cannot do, without types checked."""
    model, messages = tiny.model("llama"), []

    class Mine(LlamaForCausalLM):
        pass

    own = LanguageModel(Mine(model.hf.config), model.tokenizer, name="mine")
    for call in (lambda: bridges.to_transformer_lens(own), lambda: bridges.to_nnsight(model, torch.ones(32))):
        try:
            call()
        except UsageError as error:
            messages.append(str(error))
    return messages


def main() -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
        found = {family: differences(family) for family in FAMILIES}
        found["refused"] = refused()
        importlib.import_module("steerlab.execute")  # what is imported after nnsight meets its patches
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
