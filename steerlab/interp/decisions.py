"""Where a set of vectors decides: the places of texts at which steered and base model would say different tokens.

Patching wants two runs over the same tokens and one number at their end. Here the clean run is the steered one, the
corrupted run the base model's, each text ends where the vectors move the next token most (by KL, among the generated
positions at which the likeliest token changes, if there is one), and the number is the logit of what the steered model
would say − the logit of what the base model would: above 0 in the clean run, below 0 in the corrupted one wherever the
likeliest token changes. Texts of different lengths are padded behind their ends, which causal attention does not see.

Left out: several places of one text, sampled tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from steerlab.adapters import SteeringVectors
from steerlab.errors import UsageError
from steerlab.interp.activation_patching import Metric, Pair, logit_difference
from steerlab.interp.logit_lens import token_texts
from steerlab.interp.states import check_texts, hidden_under, logits_of
from steerlab.interp.texts import Text
from steerlab.models import LanguageModel


@dataclass(frozen=True)
class Decisions:
    """pair: steered and base run over texts cut at their decision. right, wrong: what steered and base model would say
    there. changed: whether the likeliest token changes. kl_nats: KL(steered ‖ base) there. texts: index of each text
    among those that were given."""

    pair: Pair
    right: Int[Tensor, " batch"]
    wrong: Int[Tensor, " batch"]
    changed: Bool[Tensor, " batch"]
    kl_nats: Float[Tensor, " batch"]

    @property
    def metric(self) -> Metric:
        """logit[what the steered model would say] − logit[what the base model would]."""
        return logit_difference(self.right, self.wrong)

    def table(self, model: LanguageModel) -> pd.DataFrame:
        """What is decided, to look at: a row per text."""
        read = {"position": self.pair.end, "changed": self.changed, "kl_nats": self.kl_nats}
        told = {name: of.cpu().numpy() for name, of in read.items()}
        says = {"steered": self.right, "base": self.wrong}
        return pd.DataFrame(told | {n: token_texts(model.tokenizer, of.cpu().numpy()) for n, of in says.items()})


@torch.no_grad()
def decisions(model: LanguageModel, vectors: SteeringVectors, texts: Sequence[Text]) -> Decisions:
    """The place of each text at which `vectors` decide most. Where none of its likeliest tokens changes, the place of
    largest KL is taken, and the base model's likeliest other token is the wrong one.

    Raises UsageError for no text, a text that does not fit the model, or one without a generated token.
    """
    check_texts(model, texts)
    if any(len(text.tokens) <= text.n_prompt for text in texts):
        raise UsageError("a text has no generated token, so nothing is decided; give prompts with completions")
    found = [_decision(model, vectors, text) for text in texts]
    last, right, wrong, changed, kl = (torch.tensor(column, device=model.device) for column in zip(*found, strict=True))
    tokens = torch.zeros(len(texts), int(last.max()) + 1, dtype=torch.long, device=model.device)
    for row, (text, end) in enumerate(zip(texts, last.tolist(), strict=True)):
        tokens[row, : end + 1] = torch.tensor(text.tokens[: end + 1])
    prompts = torch.tensor([text.n_prompt for text in texts], device=model.device)
    return Decisions(Pair(tokens, tokens, vectors, None, prompts, last), right, wrong, changed, kl)


def _decision(model: LanguageModel, vectors: SteeringVectors, text: Text) -> tuple[int, int, int, bool, float]:
    """Position, right and wrong token, whether the likeliest changes, KL."""
    steered, base = _logprobs(model, vectors, text)
    kl = torch.linalg.vecdot(steered.exp(), steered - base)
    right, wrong = steered.argmax(-1), base.argmax(-1)
    changed = right != wrong
    at = int(torch.where(changed, kl, -1.0).argmax()) if changed.any() else int(kl.argmax())
    other = base[at].index_fill(0, right[at], -torch.inf).argmax()
    return (
        text.n_prompt - 1 + at,
        int(right[at]),
        int(wrong[at] if changed[at] else other),
        bool(changed[at]),
        float(kl[at].clamp_min(0)),
    )


def _logprobs(model: LanguageModel, vectors: SteeringVectors, text: Text) -> Iterator[Float[Tensor, "new d_vocab"]]:
    """Steered and base, where generated tokens are predicted."""
    for adapter in (vectors, None):
        hidden = hidden_under(model, adapter, text)[text.n_prompt - 1 : -1]
        yield logits_of(model, hidden).log_softmax(-1)
