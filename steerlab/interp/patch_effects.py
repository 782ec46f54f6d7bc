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
words, not of texts: for those are the intervals. A few likely tokens decide a group's mass, so the test of it sees only
large effects; the share of its tokens with a mean Δp above 0, each counting alike (`raised_share`), is tested the same
way and sees whether the group moves as a whole. Neither says that the vector is special: related words lie close to
each other, so any direction moves some group as a whole. For that a random direction of the vector's length goes the
same way, as `sender` random.

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
    control: bool = True,
    seed: int = 0,
) -> PatchEffects:
    """What the part that each patch is about does to each token of `texts`. vectors: of one layer.

    words: groups of your own, see `words.word_groups`. k: tokens of each end in the table of means. draws: shuffles of
    the groups. control: also a random direction of the vector's length. Holds patches × texts × d_vocab numbers of 4
    bytes. Raises UsageError as `Patched` and `word_groups` do, for no patch, k or draws < 1, and for texts without a
    generated token or that do not fit the model.
    """
    check_answers(model, texts)
    check_k(model, k)
    if draws < 1 or not patches:
        raise UsageError(f"{len(patches)} patches and {draws} draws; give at least one patch and one draw")
    every = list({patch.name: patch for patch in patches}.values())
    members = word_groups(model.tokenizer, model.d_vocab, words)
    senders = {"trained": vectors}
    if control:
        senders["random"] = vectors.randomise(torch.Generator().manual_seed(seed))
    found = [_of_sender(model, name, of, texts, every, members, k, draws, seed) for name, of in senders.items()]
    return PatchEffects(
        tables.check(pd.concat([of.positions for of in found], ignore_index=True), "patch_effects"),
        tables.check(pd.concat([of.tokens for of in found], ignore_index=True), "patch_tokens"),
        tables.check(pd.concat([of.groups for of in found], ignore_index=True), "patch_groups"),
    )


def _of_sender(
    model: LanguageModel,
    sender: str,
    vectors: SteeringVectors,
    texts: Sequence[Text],
    patches: Sequence[Patch],
    members: dict[str, Int[np.ndarray, " token"]],
    k: int,
    draws: int,
    seed: int,
) -> PatchEffects:
    """The three tables of one set of vectors."""
    adapters = {patch.name: Patched(vectors, patch) for patch in (*patches, *(patch.reference for patch in patches))}
    parts: list[pd.DataFrame] = []
    changes = np.zeros((len(patches), len(texts), model.d_vocab), dtype=np.float32)
    base = np.zeros(model.d_vocab)
    for number, text in enumerate(texts):
        sums = torch.zeros(1 + len(patches), model.d_vocab, dtype=torch.float64, device=model.device)
        parts += [part.assign(text=number) for part in _read(model, adapters, patches, text, sums)]
        means = sums.cpu().numpy() / (len(text.tokens) - text.n_prompt)
        base += means[0] / len(texts)
        changes[:, number] = means[1:]
    facts: list[dict[str, object]] = [
        {"sender": sender, "layer": vectors.layers[0], "patch": patch.name, "reference": patch.reference.name}
        for patch in patches
    ]
    tokens = [row | of for row, change in zip(facts, changes, strict=True) for of in _tokens(model, change, k, seed)]
    by_patch = _groups(changes, base, members, draws, seed)
    groups = [row | of for row, found in zip(facts, by_patch, strict=True) for of in found]
    return PatchEffects(_positions(model, facts, parts), pd.DataFrame(tokens), pd.DataFrame(groups))


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
        references = dict.fromkeys(patch.reference.name for patch in patches)
        known = {name: _logprobs(model, hidden[name][rows]) for name in references}
        p_of = {name: logprobs.exp() for name, logprobs in known.items()}
        for number, patch in enumerate(patches):
            reference, p = known[patch.reference.name], p_of[patch.reference.name]
            patched = known[patch.name] if patch.name in known else _logprobs(model, hidden[patch.name][rows])
            q = patched.exp()
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
    return pd.concat([told, found.drop(columns=["patch", "token_id"])], axis=1)


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
    changes: Float[np.ndarray, "patch text d_vocab"],
    base: Float[np.ndarray, " d_vocab"],
    members: dict[str, Int[np.ndarray, " token"]],
    draws: int,
    seed: int,
) -> Iterator[list[dict[str, object]]]:
    """Of each patch, the rows of its groups; of the rest, whose mass the groups' decide, without a control."""
    means = changes.mean(1, dtype=np.float64)
    of_token = np.vstack([base, means, means > 0])
    drawn = shuffled(base, {name: ids for name, ids in members.items() if name != REST}, of_token, draws, seed)
    unknown = np.full((len(of_token), 1), np.nan)
    for number, change in enumerate(changes):
        rows: list[dict[str, object]] = []
        for name, ids in members.items():
            sums, beside = of_token[:, ids].sum(1), drawn.get(name, unknown)
            mass, raised = 1 + number, 1 + len(changes) + number
            low, high = np.quantile(beside[mass], _TAILS)
            rows.append({
                "word_group": name, "n_tokens": len(ids), "base_mass": sums[0],
                **_told("mass", change[:, ids].sum(1, dtype=np.float64), seed), "per_token": sums[mass] / len(ids),
                "control": beside[mass].mean(), "control_low": low, "control_high": high,
                "control_base_mass": beside[0].mean(), "p": permutation_p(sums[mass], beside[mass]),
                "raised_share": sums[raised] / len(ids), "control_raised_share": beside[raised].mean() / len(ids),
                "raised_p": permutation_p(sums[raised], beside[raised]), "n_texts": len(change), "n_draws": draws,
            })  # fmt: skip
        yield rows


def shuffled(
    base: Float[np.ndarray, " d_vocab"],
    members: dict[str, Int[np.ndarray, " token"]],
    of_token: Float[np.ndarray, "row d_vocab"],
    draws: int,
    seed: int,
) -> dict[str, Float[np.ndarray, "row draw"]]:
    """Sums of each row over as many tokens as each group has, drawn anew each time from the group's strata of `base`
    (module header)."""
    ranked = np.argsort(-base, kind="stable")
    ends = SMALLEST_STRATUM * 2 ** np.arange(len(base).bit_length())
    strata = np.split(ranked, ends[ends < len(base)])
    number_of = np.empty(len(base), dtype=np.int64)
    for number, stratum in enumerate(strata):
        number_of[stratum] = number
    generator, found = np.random.default_rng(seed), {}
    for name, ids in members.items():
        counts = np.bincount(number_of[ids], minlength=len(strata)).tolist()
        asked = [(stratum, n) for stratum, n in zip(strata, counts, strict=True) if n]
        sums = []
        for _ in range(draws):
            drawn = [generator.choice(stratum, n, replace=False, shuffle=False) for stratum, n in asked]
            sums.append(of_token[:, np.concatenate(drawn)].sum(1))
        found[name] = np.stack(sums, axis=1)
    return found


def permutation_p(own: float, drawn: Float[np.ndarray, " draw"]) -> float:
    """Two-sided, the data as they are counted as one of the draws (Phipson & Smyth 2010); missing for missing draws."""
    if np.isnan(drawn).any():
        return float("nan")
    near = 1e-12  # equal sums in another order
    beyond = min(int((drawn >= own - near).sum()), int((drawn <= own + near).sum()))
    return min(1.0, 2 * (1 + beyond) / (1 + len(drawn)))
