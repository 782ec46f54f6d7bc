"""How many tokens the update takes at a time: a budget from free memory, and half of it when memory runs out after all.

    budget = min(cap, (SHARE · free − head chunk) / bytes per token),   at least 1

free: memory that this process could still take (of a machine shared by n processes, an n-th); the GPU's where the model
is on one. bytes per token: what a backward pass through every block keeps, an estimate that leaves out the allocator's
waste, hence the share; KEPT_INPUTS times as much under an adapter that keeps what the modules read. The cap, none on a
GPU, keeps small models small on a CPU: CAP_TOKENS and LONG_ROWS completions of full length. Products of 640 rows
run at nearly their best rate on 2 cores; but every micro-batch that has rows of a group computes its prompt again, so
long completions need more, to have company. (Updates of workload W, 2 cores, bf16, budgets of 640 and by the rule:
completions of 256 tokens 22 and 15 s, of 512 tokens 42 and 34 s.) What is free differs from day to day, and rounding
with it, so the budget of a run is fixed when it begins.
"""

from __future__ import annotations

import math

from steerlab.models import LanguageModel
from steerlab.models.head import CHUNK_TOKENS
from steerlab.runs import free_memory_bytes

CAP_TOKENS = 640
LONG_ROWS = 4
SHARE = 0.5
KEPT_INPUTS = 1.4  # a LoRA of every linear module keeps 0.92 (Llama) to 1.35 times (Gemma 3) the rule, measured


def bytes_per_token(
    n_layers: int, d_model: int, d_kv: int, d_mlp: int, itemsize: int, keeps_inputs: bool = False
) -> int:
    """What a backward pass keeps of one token: per block about 8 vectors of the residual stream, keys, values, and 4
    vectors of the MLP's width. keeps_inputs: see `Adapter.keeps_inputs`."""
    each = n_layers * (8 * d_model + 2 * d_kv + 4 * d_mlp) * itemsize
    return math.ceil(KEPT_INPUTS * each) if keeps_inputs else each


def update_bytes(tokens: int, per_token: int, d_vocab: int) -> int:
    """What a micro-batch of so many tokens takes, the logits of one chunk of the head included (fp32, three copies)."""
    return tokens * per_token + min(CHUNK_TOKENS, tokens) * d_vocab * 12


def cap(longest: int) -> int:
    """Most tokens at a time on a CPU. longest: tokens of a completion of full length."""
    return CAP_TOKENS + LONG_ROWS * longest


def budget(free: int | None, per_token: int, d_vocab: int, processes: int = 1, cap: int | None = CAP_TOKENS) -> int:
    """Tokens per micro-batch by the rule above; `cap` where nobody knows what is free. cap None: no limit."""
    if free is None:
        return CAP_TOKENS if cap is None else cap
    room = int((SHARE * free / processes - CHUNK_TOKENS * d_vocab * 12) // per_token)
    return max(1, room if cap is None else min(cap, room))


def budget_for(model: LanguageModel, longest: int, processes: int = 1, keeps_inputs: bool = False) -> int:
    """The rule for a model in memory, here and now. longest: tokens of a completion of full length. processes: how many
    share this machine's memory. keeps_inputs: see `Adapter.keeps_inputs`."""
    sizes = model.sizes
    d_kv = sizes.n_kv_heads * sizes.d_head
    each = bytes_per_token(sizes.n_layers, sizes.d_model, d_kv, sizes.d_mlp, model.dtype.itemsize, keeps_inputs)
    if model.device.type == "cuda":
        return budget(free_memory_bytes(model.device.index), each, model.d_vocab, cap=None)
    return budget(free_memory_bytes(), each, model.d_vocab, processes, cap(longest))
