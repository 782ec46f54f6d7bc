"""Token effects Δp: by how much a vector makes each token likelier as the next one, or less (arXiv 2509.06608 §6).

At every position that predicts a generated token, Δp(v) = p_steered(v) − p_base(v) over the whole vocabulary, both
on the same tokens. `token_effects` says per position which token was raised and lowered most, whether the raised one
was what the base model would have said anyway, and how unsure the base model was; `raised_tokens` says which tokens are
raised and lowered on average, at the first generated position and at the rest, with intervals over texts.

Left out: effects of one layer's vector through later layers one by one (see `persistence`), grouping of tokens (see
`patch_effects`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from steerlab import tables
from steerlab.adapters import Adapter
from steerlab.interp.logit_lens import token_text, token_texts
from steerlab.interp.residual_lens import check_k
from steerlab.interp.states import check_answers, hidden_under, logits_of
from steerlab.interp.texts import Text
from steerlab.models import LanguageModel
from steerlab.rollouts.statistics import bootstrap_interval

CHUNK_POSITIONS = 128
WHERE = ("first", "rest")


@dataclass(frozen=True)
class TokenEffects:
    """positions: table `token_effects`. tokens: table `raised_tokens`."""

    positions: pd.DataFrame
    tokens: pd.DataFrame


@torch.no_grad()
def token_effects(
    model: LanguageModel, texts: Sequence[Text], adapter: Adapter, *, k: int = 10, seed: int = 0
) -> TokenEffects:
    """Δp of `adapter` at every position of `texts` that predicts a generated token, the first of them apart.

    k: tokens of each end in the table of means. Raises UsageError for texts without a generated token, k < 1, or a
    text that does not fit the model.
    """
    check_answers(model, texts)
    check_k(model, k)
    exact = torch.promote_types(model.dtype, torch.float32)
    sums = torch.zeros(len(WHERE), len(texts), model.d_vocab, dtype=exact, device=model.device)
    parts: list[dict[str, np.ndarray]] = []
    for number, text in enumerate(texts):
        base, steered = (hidden_under(model, which, text)[text.n_prompt - 1 : -1] for which in (None, adapter))
        for start in range(0, len(base), CHUNK_POSITIONS):
            rows = slice(start, start + CHUNK_POSITIONS)
            p, q = (logits_of(model, states[rows]).softmax(-1) for states in (base, steered))
            parts.append({"text": np.full(len(p), number), "generated": np.arange(start, start + len(p)), **_of(p, q)})
            change = q - p
            sums[0, number] += change[0] if start == 0 else 0
            sums[1, number] += change[start == 0 :].sum(0)
    counts = np.array([[1] * len(texts), [len(text.tokens) - text.n_prompt - 1 for text in texts]])
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    for name in ("raised", "lowered"):
        columns[name] = token_texts(model.tokenizer, columns[f"{name}_id"])
    return TokenEffects(
        tables.check(pd.DataFrame(columns), "token_effects"),
        tables.check(pd.DataFrame(list(_means(model, sums.cpu().numpy(), counts, k, seed))), "raised_tokens"),
    )


def _of(p: Float[Tensor, "pos d_vocab"], q: Float[Tensor, "pos d_vocab"]) -> dict[str, np.ndarray]:
    """What is said of some positions: p the base's, q the steered model's probabilities."""
    up, down = (q - p).max(-1), (q - p).min(-1)
    log_p, log_q = p.clamp_min(torch.finfo(p.dtype).tiny).log(), q.clamp_min(torch.finfo(q.dtype).tiny).log()
    favourite, now = p.argmax(-1), q.argmax(-1)
    found = {
        "raised_id": up.indices,
        "raised_delta": up.values,
        "lowered_id": down.indices,
        "lowered_delta": down.values,
        "raised_was_base_argmax": up.indices == favourite,
        "raised_is_steered_argmax": up.indices == now,
        "argmax_changed": favourite != now,
        "entropy_base_nats": -torch.linalg.vecdot(p, log_p),
        "kl_nats": torch.linalg.vecdot(q, log_q - log_p).clamp(min=0),
    }
    return {name: values.cpu().numpy() for name, values in found.items()}


def _means(
    model: LanguageModel, sums: np.ndarray, counts: np.ndarray, k: int, seed: int
) -> Iterator[dict[str, object]]:
    """Rows of `raised_tokens`: the k tokens of either end by their mean over texts, at the first position and later."""
    for where, total, count in zip(WHERE, sums, counts, strict=True):
        has = count > 0
        if not has.any():
            continue
        of_text = total[has] / count[has, None]
        mean = of_text.mean(0)
        order = np.argsort(mean, kind="stable")
        for end, ids in (("raised", order[::-1][:k]), ("lowered", order[:k])):
            for rank, token in enumerate(ids.tolist()):
                interval = bootstrap_interval(of_text[:, token], seed=seed, bounds=(-1.0, 1.0))
                yield {
                    "where": where,
                    "end": end,
                    "rank": rank,
                    "token_id": token,
                    "token": token_text(model.tokenizer, token),
                    "delta": interval.value,
                    "low": interval.low,
                    "high": interval.high,
                    "n_texts": int(has.sum()),
                }
