"""Logit lens of steering vectors: which tokens a vector points to in the unembedding (paper 7; nostalgebraist 2020).

For a vector s and the unembedding W_U, three readouts: `dot` = W_U s, `cosine` = dot / (‖rows of W_U‖ ‖s‖), `softmax` =
softmax(W_U s). As in the authors' code no final norm is applied; `through_norm` applies one to the vector first.
The vocabulary is read in chunks and the top k merged, so scores of all layers × the vocabulary are never held.

Left out: logit soft-capping (monotone, so ranks are the same), clustering of the tokens by a language model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Protocol, runtime_checkable

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.convert_slow_tokenizer import bytes_to_unicode

from steerlab import tables
from steerlab.errors import UsageError, unknown
from steerlab.interp.geometry import Vectors, by_site
from steerlab.models.sites import Site

READOUTS = ("dot", "cosine", "softmax")
# Sites whose vectors live in the basis that the unembedding reads; q of width d_model by accident does not.
RESIDUAL_KINDS = (
    "resid_pre", "resid_mid", "resid_post", "attn_in", "mlp_in", "attn_out", "mlp_out", "ln1_post", "ln2_post",
)  # fmt: skip


@runtime_checkable
class Tokenizer(Protocol):
    """What the lens needs of a Hugging Face tokenizer."""

    def decode(self, token_ids: list[int], /) -> str: ...

    def convert_ids_to_tokens(self, ids: int, /) -> str | None: ...


@dataclass(frozen=True)
class _Extremes:
    """The k most extreme scores of each vector seen so far, best first, ties to the lower token id."""

    scores: Float[Tensor, "vector k"]
    ids: Int[Tensor, "vector k"]

    def merge(self, scores: Float[Tensor, "vector chunk"], first_id: int, k: int, descending: bool) -> _Extremes:
        ids = torch.arange(first_id, first_id + scores.shape[1], device=scores.device).expand(len(scores), -1)
        # earlier chunks have lower ids and stand first, so a stable sort settles ties
        scores, ids = torch.cat([self.scores, scores], dim=1), torch.cat([self.ids, ids], dim=1)
        order = scores.argsort(dim=1, descending=descending, stable=True)[:, :k]
        return _Extremes(scores.gather(1, order), ids.gather(1, order))


def logit_lens(
    vectors: Vectors,
    unembedding: Float[Tensor, "d_vocab d_model"],
    tokenizer: Tokenizer,
    k: int = 10,
    readouts: tuple[str, ...] = READOUTS,
    *,
    through_norm: Callable[[Tensor], Tensor] | None = None,
    chunk: int = 8192,
) -> pd.DataFrame:
    """The k tokens at both ends of the vocabulary for every vector and readout: table `logit_lens`.

    Sites outside the residual stream are left out and listed in `attrs["skipped"]`; zero vectors, which point nowhere,
    in `attrs["zero"]`. Raises UsageError for an unknown readout, k < 1, a vector of another width than the
    unembedding, or no vector in the residual stream at all.
    """
    for readout in readouts:
        if readout not in READOUTS:
            raise unknown("readout", readout, READOUTS)
    d_vocab, d_model = unembedding.shape
    if not 1 <= k <= d_vocab:
        raise UsageError(f"k={k} tokens of a vocabulary of {d_vocab}; choose a k between 1 and {d_vocab}")
    found = by_site(vectors)
    residual = _in_residual_stream(found, d_model)
    alive = {site: vector.float() for site, vector in residual.items() if vector.any()}
    frame = tables.empty("logit_lens")
    if alive:
        with torch.no_grad():
            stack = torch.stack(list(alive.values())).to(unembedding.device)
            if through_norm is not None:
                stack = through_norm(stack).float()
            ends = _extremes(stack, unembedding, k, readouts, chunk)
        frame = pd.DataFrame(_rows(tuple(alive), ends, tokenizer))
    frame.attrs["zero"] = [str(site) for site in residual if site not in alive]
    frame.attrs["skipped"] = [str(site) for site in found if site not in residual]
    return tables.check(frame, "logit_lens")


def dot_readout(
    vector: Float[Tensor, " d_model"], unembedding: Float[Tensor, "d_vocab d_model"]
) -> Float[Tensor, " d_vocab"]:
    """W_U s for one vector, the whole vocabulary: what the chunked lens must agree with."""
    return unembedding.float() @ vector.to(unembedding.device).float()


def _in_residual_stream(found: Mapping[Site, Tensor], d_model: int) -> dict[Site, Tensor]:
    residual = {site: vector for site, vector in found.items() if site.kind in RESIDUAL_KINDS}
    if not residual:
        kinds = ", ".join(sorted({site.kind for site in found}))
        raise UsageError(f"the unembedding reads the residual stream, and {kinds} is not in it; use resid_post vectors")
    for site, vector in residual.items():
        if len(vector) != d_model:
            raise UsageError(
                f"the vector at {site} has {len(vector)} numbers, the model's d_model is {d_model}; "
                "use the model these vectors were trained on"
            )
    return residual


def _extremes(
    stack: Float[Tensor, "vector d_model"],
    unembedding: Float[Tensor, "d_vocab d_model"],
    k: int,
    readouts: tuple[str, ...],
    chunk: int,
) -> dict[tuple[str, str], _Extremes]:
    """The ends of each readout; softmax shares the order of dot and needs only the log of its denominator."""
    device = stack.device
    none = _Extremes(stack.new_zeros(len(stack), 0), torch.zeros(len(stack), 0, dtype=torch.long, device=device))
    kinds = [kind for kind in ("dot", "cosine") if kind in readouts or (kind == "dot" and "softmax" in readouts)]
    ends = {(kind, end): none for kind in kinds for end in ("top", "bottom")}
    log_total = stack.new_full((len(stack), 1), -torch.inf)
    unit = stack / stack.norm(dim=1, keepdim=True)
    for start in range(0, len(unembedding), chunk):
        rows = unembedding[start : start + chunk].float()
        dot = stack @ rows.T
        log_total = torch.logaddexp(log_total, dot.logsumexp(dim=1, keepdim=True))
        scores = {"dot": dot}
        if "cosine" in kinds:
            # a zero row (an unused token) has no direction either: its cosine is 0, the value of its dot
            length = rows.norm(dim=1).clamp_min(torch.finfo(rows.dtype).tiny)
            scores["cosine"] = (unit @ rows.T) / length
        for kind, end in ends:
            ends[kind, end] = ends[kind, end].merge(scores[kind], start, k, descending=end == "top")
    for end in ("top", "bottom"):
        if "softmax" in readouts:
            logits = ends["dot", end]
            ends["softmax", end] = _Extremes((logits.scores - log_total).exp(), logits.ids)
        if "dot" not in readouts:
            ends.pop(("dot", end), None)
    return ends


def _rows(
    sites: tuple[Site, ...], ends: Mapping[tuple[str, str], _Extremes], tokenizer: Tokenizer
) -> list[dict[str, object]]:
    names: dict[int, str] = {}
    rows: list[dict[str, object]] = []
    for index, site in enumerate(sites):
        for readout in READOUTS:
            for end in ("top", "bottom"):
                if (readout, end) not in ends:
                    continue
                extremes = ends[readout, end]
                pairs = zip(extremes.ids[index].tolist(), extremes.scores[index].tolist(), strict=True)
                for rank, (token_id, score) in enumerate(pairs):
                    if token_id not in names:
                        names[token_id] = token_text(tokenizer, token_id)
                    rows.append(
                        {"site": site.kind, "layer": site.layer, "readout": readout, "end": end, "rank": rank}
                        | {"token_id": token_id, "token": names[token_id], "score": score}
                    )
    return rows


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """Text of one token decoded alone, its leading space kept; `<0xE2>` where its bytes alone are no text.

    Rows that pad the unembedding beyond the tokenizer's vocabulary are called `<id 50000>`.
    """
    piece = tokenizer.convert_ids_to_tokens(token_id)
    if piece is None:
        return f"<id {token_id}>"
    text = tokenizer.decode([token_id])
    if not text:
        return piece
    if "\ufffd" in text and "\ufffd" not in piece:
        alphabet = _bytes_of_letters()  # GPT-2's way to write any byte as a letter
        known = all(letter in alphabet for letter in piece)
        return "".join(f"<0x{alphabet[letter]:02X}>" for letter in piece) if known else piece
    # sentencepiece tokenizers drop the space in front of a text's first word
    return f" {text}" if piece.startswith("▁") and not text.startswith(" ") else text


def token_texts(tokenizer: Tokenizer, ids: Int[np.ndarray, " token"]) -> np.ndarray:
    """`token_text` of many ids, each looked up once."""
    distinct, places = np.unique(ids, return_inverse=True)
    return np.array([token_text(tokenizer, int(i)) for i in distinct], dtype=object)[places]


@cache
def _bytes_of_letters() -> dict[str, int]:
    return {letter: byte for byte, letter in bytes_to_unicode().items()}
