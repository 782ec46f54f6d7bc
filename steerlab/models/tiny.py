"""Seeded models of two to four layers, one per supported family, and a byte tokenizer: for tests, offline, in
milliseconds.

Weights are drawn so that every branch writes a share of the residual stream and logits have a standard deviation near
two: a model at Hugging Face's own initialisation has flat logits, and tests on it pass whatever the code does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steerlab.errors import unknown
from steerlab.models.handle import LanguageModel
from steerlab.models.weights import hash_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SPECIAL = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_CONTEXT = 512
_WINDOW = 24  # shorter than most test prompts, so that sliding windows matter

_COMMON = {"vocab_size": 256 + len(_SPECIAL), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
_MODERN = _COMMON | {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": _CONTEXT,
}
_ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _MODERN | {"tie_word_embeddings": True},
    "qwen2": _MODERN,
    "qwen3": _MODERN | {"head_dim": 16},
    "mistral": _MODERN | {"sliding_window": None},
    "gemma2": _MODERN | {"head_dim": 16, "sliding_window": _WINDOW, "layer_types": _ALTERNATING},
    "gemma3": _MODERN | {"head_dim": 16, "sliding_window": _WINDOW, "layer_types": _ALTERNATING},
    "olmo2": _MODERN,
    "phi3": _MODERN | {"sliding_window": None},
    "gpt2": _COMMON | {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": _CONTEXT},
    "gpt_neo": _COMMON
    | {
        "hidden_size": 32,
        "num_layers": 4,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 2]],
        "window_size": _WINDOW,
        "max_position_embeddings": _CONTEXT,
    },
    "gpt_neox": {key: value for key, value in _MODERN.items() if key != "num_key_value_heads"},
}
FAMILIES = tuple(_CONFIGS)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, five special tokens, a chat template; 261 tokens in all."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*_SPECIAL, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL])
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|pad|>", eos_token="<|end|>")
    fast.chat_template = _CHAT_TEMPLATE
    return fast


def model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """A fresh tiny model of `family`; equal seeds give equal weights, whatever the dtype and torch's random state."""
    if family not in _CONFIGS:
        raise unknown("tiny family", family, FAMILIES)
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type = "gemma3_text" if family == "gemma3" else family
    config = AutoConfig.for_model(model_type, **_CONFIGS[family])
    with torch.random.fork_rng(devices=[]):  # Hugging Face draws an initialisation that is overwritten here
        hf = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _fill(hf, config.hidden_size, seed)
    digest = hash_tensors(dict(hf.named_parameters()))
    return LanguageModel(hf.to(dtype), tokenizer(), name=f"tiny-{family}-{seed}", weights_sha256=digest)


def _fill(hf: Any, d_model: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    embeddings = {hf.get_input_embeddings().weight, hf.get_output_embeddings().weight}

    def normal(parameter: Tensor, std: float) -> Tensor:
        return torch.randn(parameter.shape, generator=generator) * std

    with torch.no_grad():
        for parameter in hf.parameters():
            if parameter in embeddings:
                parameter.copy_(normal(parameter, 2 * d_model**-0.5))
            elif parameter.ndim == 2:
                parameter.copy_(normal(parameter, min(parameter.shape) ** -0.5))
            else:  # norm gains sit at one (Gemma: zero), biases at zero
                parameter.add_(normal(parameter, 0.1))
