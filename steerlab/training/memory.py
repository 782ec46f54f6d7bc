"""How many tokens the update takes at a time: a budget from free memory, and half of it when memory runs out after all.

    budget = min(CAP_TOKENS, (SHARE · free − head chunk) / bytes per token),   at least 1

free: memory that this process could still take (of a machine shared by n processes, an n-th); the GPU's where the model
is on one. bytes per token: what a backward pass through every block keeps, an estimate that leaves out the allocator's
waste, hence the share. The cap keeps small models small: products of 640 rows run at nearly their best rate on 2 cores,
and more tokens at a time took the same time. What is free differs from day to day, and rounding with it, so the budget
of a run is fixed when it begins.
"""

from __future__ import annotations

import torch

from steerlab.models import LanguageModel
from steerlab.models.head import CHUNK_TOKENS
from steerlab.runs import free_memory_bytes

CAP_TOKENS = 640
SHARE = 0.5

# What an allocator says that raises no exception of its own kind.
_SAID = ("not enough memory", "can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def bytes_per_token(n_layers: int, d_model: int, d_kv: int, d_mlp: int, itemsize: int) -> int:
    """What a backward pass keeps of one token: per block about 8 vectors of the residual stream, keys, values, and 4
    vectors of the MLP's width."""
    return n_layers * (8 * d_model + 2 * d_kv + 4 * d_mlp) * itemsize


def update_bytes(tokens: int, per_token: int, d_vocab: int) -> int:
    """What a micro-batch of so many tokens takes, the logits of one chunk of the head included (fp32, three copies)."""
    return tokens * per_token + min(CHUNK_TOKENS, tokens) * d_vocab * 12


def budget(free: int | None, per_token: int, d_vocab: int, processes: int = 1) -> int:
    """Tokens per micro-batch by the rule above; the cap where nobody knows what is free."""
    if free is None:
        return CAP_TOKENS
    room = SHARE * free / processes - CHUNK_TOKENS * d_vocab * 12
    return max(1, min(CAP_TOKENS, int(room // per_token)))


def budget_for(model: LanguageModel, processes: int = 1) -> int:
    """The rule for a model in memory, here and now. `processes`: how many share this machine's memory."""
    sizes = model.sizes
    each = bytes_per_token(
        sizes.n_layers, sizes.d_model, sizes.n_kv_heads * sizes.d_head, sizes.d_mlp, model.dtype.itemsize
    )
    if model.device.type == "cuda":
        return budget(free_memory_bytes(model.device.index), each, model.d_vocab)
    return budget(free_memory_bytes(), each, model.d_vocab, processes)


def ran_out(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, in any of the ways in which torch says it."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):  # torch.cuda.OutOfMemoryError is the latter
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _SAID)
