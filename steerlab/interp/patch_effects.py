"""Token effects of a patch: what the part of a block that it is about does to each token (arXiv 2509.06608 §7, fig. 6).

On the same tokens, teacher-forced, at every position that predicts a generated token, a patched model beside its
reference (`Patch.reference`): the vector as it is where the patch cuts one part off from it, the same patch without
that part where it leaves the vector to one part alone. `kl_nats` = KL(reference ‖ patched), and Δp(v) has the sign with
which **a positive Δp always reads "the part raises v"**: p_reference − p_patched for what is cut off, p_patched −
p_reference for what is left. All probabilities are in fp64.

Three tables: per position (`patch_effects`), the tokens raised and lowered most on average (`patch_tokens`), and what
goes to groups of words (`patch_groups`, see `words`): Δp summed over a group. Is a group special, or does anything so
probable move so much? Its labels are shuffled among tokens that are about as likely (strata of the vocabulary by rank
of the base model's mean probability on the same texts: the 16 likeliest, the next 16, then 32, 64, …), so a draw has as
many tokens of each stratum as the group has, which may be among them. That is an exact permutation test of "within
strata labels do not matter"; `base_mass` beside `control_base_mass` says how well the likelihoods match. It asks of
words, not of texts: for those are the intervals.

Left out: what a patch does to answers (`patching`), effects at the first position apart (`token_effects`), correction
of the p-values for the number of groups and patches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from steerlab import tables
from steerlab.adapters import SteeringVectors
from steerlab.errors import UsageError
from steerlab.interp.answers import RESAMPLES
from steerlab.interp.logit_lens import token_texts
from steerlab.interp.patched import Patch, Patched
from steerlab.interp.residual_lens import check_k
from steerlab.interp.states import check_answers, passed_under
from steerlab.interp.texts import Text
from steerlab.interp.words import REST, Words, word_groups
from steerlab.models import LanguageModel
from steerlab.rollouts.statistics import bootstrap_interval

CHUNK_POSITIONS = 64
SMALLEST_STRATUM = 16
_TAILS = (0.025, 0.975)


@dataclass(frozen=True)
class PatchEffects:
    """positions: table `patch_effects`. tokens: `patch_tokens`. groups: `patch_groups`."""

    positions: pd.DataFrame
    tokens: pd.DataFrame
    groups: pd.DataFrame


@torch.no_grad()
def patch_effects(
    model: LanguageModel,
    vectors: SteeringVectors,
    texts: Sequence[Text],
    patches: Sequence[Patch],
    *,
    words: Words | None = None,
    k: int = 10,
    draws: int = 1_000,
    seed: int = 0,
) -> PatchEffects:
    """What the part that each patch is about does to each token of `texts`. vectors: of one layer.

    words: groups of your own, see `words.word_groups`. k: tokens of each end in the table of means. draws: shuffles of
    the control. Holds patches × texts × d_vocab numbers of 4 bytes. Raises UsageError as `Patched` and `word_groups`
    do, for no patch, k or draws < 1, and for texts without a generated token or that do not fit the model.
    """
    check_answers(model, texts)
    check_k(model, k)
    if draws < 1 or not patches:
        raise UsageError(f"{len(patches)} patches and {draws} draws; give at least one patch and one draw")
    every = list({patch.name: patch for patch in patches}.values())
    members = word_groups(model.tokenizer, model.d_vocab, words)
    adapters = {patch.name: Patched(vectors, patch) for patch in (*every, *(patch.reference for patch in every))}
    parts: list[pd.DataFrame] = []
    changes = np.zeros((len(every), len(texts), model.d_vocab), dtype=np.float32)
    base = np.zeros(model.d_vocab)
    for number, text in enumerate(texts):
        sums = torch.zeros(1 + len(every), model.d_vocab, dtype=torch.float64, device=model.device)
        parts += [part.assign(text=number) for part in _read(model, adapters, every, text, sums)]
        means = sums.cpu().numpy() / (len(text.tokens) - text.n_prompt)
        base += means[0] / len(texts)
        changes[:, number] = means[1:]
    facts = [{"layer": vectors.layers[0], "patch": patch.name, "reference": patch.reference.name} for patch in every]
    positions = _positions(model, facts, parts)
    tokens = [row | of for row, change in zip(facts, changes, strict=True) for of in _tokens(model, change, k, seed)]
    control = _Control(base, members, changes.mean(1, dtype=np.float64), draws, seed)
    groups = [row | of for n, row in enumerate(facts) for of in _groups(changes[n], n, base, members, control, seed)]
    return PatchEffects(
        positions,
        tables.check(pd.DataFrame(tokens), "patch_tokens"),
        tables.check(pd.DataFrame(groups), "patch_groups"),
    )


def _read(
    model: LanguageModel,
    adapters: dict[str, Patched],
    patches: Sequence[Patch],
    text: Text,
    sums: Float[Tensor, "base_and_patches d_vocab"],
) -> Iterator[pd.DataFrame]:
    """Rows of one text, chunk by chunk and patch by patch. Adds to `sums` over positions: p of the base, then Δp."""
    block = next(iter(adapters.values())).first_block
    states, plain = passed_under(model, None, text, [block - 1])
    predicting = slice(text.n_prompt - 1, -1)
    hidden = {
        name: passed_under(model, adapter, text, (), block=block, written=states[block - 1])[1][predicting]
        for name, adapter in adapters.items()
        if not adapter.patch.whole
    }
    plain = plain[predicting]
    hidden |= {name: plain for name, adapter in adapters.items() if adapter.patch.whole}
    for start in range(0, len(plain), CHUNK_POSITIONS):
        rows = slice(start, start + CHUNK_POSITIONS)
        sums[0] += _logprobs(model, plain[rows]).exp().sum(0)
        references = {patch.reference.name for patch in patches}
        known = {name: _logprobs(model, hidden[name][rows]) for name in sorted(references)}
        for number, patch in enumerate(patches):
            reference = known[patch.reference.name]
            patched = known[patch.name] if patch.name in known else _logprobs(model, hidden[patch.name][rows])
            p, q = reference.exp(), patched.exp()
            change = q - p if patch.steers else p - q
            sums[1 + number] += change.sum(0)
            kl = torch.linalg.vecdot(p, reference - patched).clamp(min=0)
            found = pd.DataFrame(_of(kl, change))
            yield found.assign(patch=number, generated=np.arange(start, start + len(found)), token_id=_own(text, rows))


def _logprobs(model: LanguageModel, hidden: Float[Tensor, "pos d_model"]) -> Float[Tensor, "pos d_vocab"]:
    return model.unembed(hidden).double().log_softmax(-1)


def _own(text: Text, rows: slice) -> Int[np.ndarray, " pos"]:
    """The text's own tokens at generated positions `rows`."""
    return np.array(text.tokens[text.n_prompt :][rows])


def _of(kl: Float[Tensor, " pos"], change: Float[Tensor, "pos d_vocab"]) -> dict[str, np.ndarray]:
    up, down = change.max(-1), change.min(-1)
    found = {
        "kl_nats": kl, "raised_id": up.indices, "raised_delta": up.values, "lowered_id": down.indices,
        "lowered_delta": down.values,
    }  # fmt: skip
    return {name: values.cpu().numpy() for name, values in found.items()}


def _positions(model: LanguageModel, facts: Sequence[dict[str, object]], parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Rows by patch, text and position, tokens as text."""
    found = pd.concat(parts).sort_values(["patch", "text", "generated"], kind="stable", ignore_index=True)
    told = pd.DataFrame(facts).loc[found["patch"]].reset_index(drop=True)
    for name in ("token", "raised", "lowered"):
        found[name] = token_texts(model.tokenizer, found[f"{name}_id"].to_numpy())
    return tables.check(pd.concat([told, found.drop(columns=["patch", "token_id"])], axis=1), "patch_effects")


def _tokens(
    model: LanguageModel, change: Float[np.ndarray, "text d_vocab"], k: int, seed: int
) -> Iterator[dict[str, object]]:
    """The k tokens of either end by their mean over texts."""
    order = np.argsort(change.mean(0, dtype=np.float64), kind="stable")
    for end, ids in (("raised", order[::-1][:k]), ("lowered", order[:k])):
        names = token_texts(model.tokenizer, ids)
        for rank, (token, name) in enumerate(zip(ids.tolist(), names, strict=True)):
            mean = _told("delta", change[:, token].astype(np.float64), seed)
            yield {"end": end, "rank": rank, "token_id": token, "token": name, **mean, "n_texts": len(change)}


def _told(name: str, of_text: Float[np.ndarray, " text"], seed: int) -> dict[str, float]:
    """A mean over texts and its interval."""
    interval = bootstrap_interval(of_text, seed=seed, resamples=RESAMPLES, bounds=(-1.0, 1.0))
    return {name: interval.value, "low": interval.low, "high": interval.high}


def _groups(
    change: Float[np.ndarray, "text d_vocab"],
    number: int,
    base: Float[np.ndarray, " d_vocab"],
    members: dict[str, Int[np.ndarray, " token"]],
    control: _Control,
    seed: int,
) -> Iterator[dict[str, object]]:
    """Rows of one patch; for the rest, whose mass the groups' decide, there is no control."""
    for name, ids in members.items():
        mass = _told("mass", change[:, ids].sum(1, dtype=np.float64), seed)
        yield {
            "word_group": name, "n_tokens": len(ids), "base_mass": base[ids].sum(), **mass,
            "per_token": mass["mass"] / len(ids), **control.told(name, number),
            "n_texts": len(change),
        }  # fmt: skip


class _Control:
    """What groups would have if their labels were shuffled within strata of the base model's probability."""

    def __init__(
        self,
        base: Float[np.ndarray, " d_vocab"],
        members: dict[str, Int[np.ndarray, " token"]],
        means: Float[np.ndarray, "patch d_vocab"],
        draws: int,
        seed: int,
    ) -> None:
        self.draws = draws
        ranked = np.argsort(-base, kind="stable")
        ends = SMALLEST_STRATUM * 2 ** np.arange(max(1, len(base).bit_length()))
        strata = np.split(ranked, ends[ends < len(base)])
        number_of = np.empty(len(base), dtype=np.int64)
        for number, stratum in enumerate(strata):
            number_of[stratum] = number
        both = np.vstack([base, means])  # row 0: the drawn tokens' own probability
        self.own = {name: means[:, ids].sum(1) for name, ids in members.items()}
        self.drawn: dict[str, Float[np.ndarray, "base_and_patches draw"]] = {}
        generator = np.random.default_rng(seed)
        for name in (name for name in members if name != REST):
            counts = np.bincount(number_of[members[name]], minlength=len(strata)).tolist()
            asked = [(stratum, n) for stratum, n in zip(strata, counts, strict=True) if n]
            drawn = []
            for _ in range(draws):
                ids = [generator.choice(stratum, n, replace=False, shuffle=False) for stratum, n in asked]
                drawn.append(both[:, np.concatenate(ids)].sum(1))
            self.drawn[name] = np.stack(drawn, axis=1)

    def told(self, name: str, patch: int) -> dict[str, float]:
        """Columns of `patch_groups` for one group under one patch; missing for a group that was not shuffled."""
        nothing = float("nan")
        columns = ("control", "control_low", "control_high", "control_base_mass", "p")
        if name not in self.drawn:
            return dict.fromkeys(columns, nothing) | {"n_draws": self.draws}
        base, masses, own = self.drawn[name][0], self.drawn[name][1 + patch], self.own[name][patch]
        near = 1e-12  # equal sums in another order
        above, below = (masses >= own - near).sum(), (masses <= own + near).sum()
        p = min(1.0, 2 * (1 + min(above, below)) / (1 + self.draws))
        low, high = np.quantile(masses, _TAILS)
        values = (masses.mean(), low, high, base.mean(), p)
        return dict(zip(columns, map(float, values), strict=True)) | {"n_draws": self.draws}
