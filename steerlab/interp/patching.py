"""What is left of a vector's effect when part of the next block does not see it (arXiv 2509.06608 §7).

Two ways to ask of the same `Patch`es: let the patched model answer problems (`patched_answers`), or read texts under it
(`patched_texts`). Of every patch its score and the share of the vector's effect that is `kept`: 0 as the base model, 1
as the vector unpatched; missing where the effect itself is within its noise of 0.

On texts, at the positions that predict generated tokens: `kl_nats`, KL(unpatched ‖ patched), kept = 1 − KL / that of
the base; `logit_diff`, logit of the text's next token − logit of the token other than it that the base model holds
likeliest. A random direction of the vector's length is patched alike, as a control. Sums are in fp64. Everything begins
at the patched block, from what the base model wrote there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from steerlab import tables
from steerlab.adapters import Adapter, SteeringVectors
from steerlab.errors import UsageError
from steerlab.interp.answers import RESAMPLES, scored
from steerlab.interp.patched import LINES, Patch, Patched
from steerlab.interp.states import check_texts, passed_under
from steerlab.interp.texts import Text
from steerlab.models import LanguageModel
from steerlab.rollouts import Evaluation
from steerlab.rollouts.evaluate import Done
from steerlab.rollouts.statistics import bootstrap_interval, share_of_gain
from steerlab.tasks import Task

Metric = Literal["kl_nats", "logit_diff"]
Grid = Float[np.ndarray, "seed unit"]  # a patch's score by training seed and problem or text


def patched_answers(
    model: LanguageModel,
    task: Task,
    vectors: SteeringVectors | Sequence[SteeringVectors],
    patches: Sequence[Patch],
    evaluation: Evaluation,
    *,
    done: Done | None = None,
) -> pd.DataFrame:
    """Table `patching` with avg@k: the patched models answer the problems, all from the same random streams. The lines
    (`patched.LINES`) are always among the patches. vectors: of one layer, one set or one per training seed.

    Raises UsageError as `Patched` does, and for seeds with vectors at different layers.
    """
    seeds, every = _seeds(vectors), _with_lines(patches)
    sets = {patch.name: [Patched(of, patch) for of in seeds] for patch in every if not patch.whole}
    for tried in sets.values():
        with tried[0].attach(model):  # what does not fit is refused before anything is sampled
            pass
    bases = {patch.name: [None] for patch in every if patch.whole}
    found: dict[str, Grid] = scored(model, task, {**bases, **sets}, evaluation, done)
    grids = {name: (of, of) for name, of in found.items()}
    return told("trained", seeds[0].layers[0], every, f"avg@{evaluation.samples}", grids)


@torch.no_grad()
def patched_texts(
    model: LanguageModel,
    vectors: SteeringVectors | Sequence[SteeringVectors],
    texts: Sequence[Text] | Sequence[Sequence[Text]],
    patches: Sequence[Patch],
    *,
    metrics: Sequence[Metric] = ("kl_nats", "logit_diff"),
    control: bool = True,
    seed: int = 0,
) -> pd.DataFrame:
    """Table `patching` with `metrics`, on texts (with several training seeds, on each one's own, equally many).

    Raises UsageError as `Patched` does, for seeds with vectors at different layers, and for no text.
    """
    seeds, every = _seeds(vectors), _with_lines(patches)
    by_seed = _texts_of(texts, len(seeds))
    for read in by_seed:
        check_texts(model, read)
    senders: dict[str, Sequence[SteeringVectors]] = {"trained": seeds}
    if control:
        senders["random"] = [of.randomise(torch.Generator().manual_seed(seed + n)) for n, of in enumerate(seeds)]
    frames = []
    for sender, sets in senders.items():
        read = [list(_read(model, of, every, text)) for of, own in zip(sets, by_seed, strict=True) for text in own]
        for metric in metrics:
            grids = {
                patch.name: grids_of([said[n] for said in read], metric, len(sets)) for n, patch in enumerate(every)
            }
            frames.append(told(sender, sets[0].layers[0], every, metric, grids))
    return pd.concat(frames, ignore_index=True)


def grids_of(said: Sequence[Said], metric: Metric, seeds: int) -> tuple[Grid, Grid]:
    """Values by seed and text, and what grows with the effect kept."""
    both = np.array([_KEPT[metric](of) for of in said]).reshape(seeds, -1, 2)
    return both[..., 0], both[..., 1]


def _seeds(vectors: SteeringVectors | Sequence[SteeringVectors]) -> tuple[SteeringVectors, ...]:
    """One set per training seed. Raises UsageError for none, or for different layers."""
    seeds = (vectors,) if isinstance(vectors, SteeringVectors) else tuple(vectors)
    if not seeds:
        raise UsageError("no vectors to patch; give at least one set")
    layers = sorted({of.layers for of in seeds})
    if len(layers) > 1:
        raise UsageError(f"the seeds' vectors are at different layers, {layers[0]} and {layers[1]}; select one layer")
    return seeds


def _with_lines(patches: Sequence[Patch]) -> list[Patch]:
    """Every patch once, what they are compared with first."""
    lines = [line() for line in LINES]
    return list({patch.name: patch for patch in (*lines, *patches)}.values())


def _texts_of(texts: Sequence[Text] | Sequence[Sequence[Text]], seeds: int) -> list[Sequence[Text]]:
    """By seed. Raises UsageError where they are not equally many."""
    own = [list(part) for part in texts if not isinstance(part, Text)]
    shared = [part for part in texts if isinstance(part, Text)]
    found: list[Sequence[Text]] = [shared] * seeds if shared or not own else list(own)
    if len(found) != seeds or len({len(part) for part in found}) > 1:
        raise UsageError(f"{seeds} training seeds need texts for each, equally many; give one list, or one per seed")
    return found


Said = tuple[float, float, float]  # of a text: KL(unpatched ‖ patched), that of the base, difference of logits


class Scale:
    """What is measured of logits at a text's generated positions, between those of the base and of the vector as it
    is; all in fp64."""

    def __init__(
        self, text: Text, plain: Float[Tensor, "new d_vocab"], unpatched: Float[Tensor, "new d_vocab"]
    ) -> None:
        self.answer = torch.tensor(text.tokens[text.n_prompt :], device=plain.device)[:, None]
        self.rival = plain.scatter(-1, self.answer, -torch.inf).argmax(-1, keepdim=True)
        logprobs = unpatched.log_softmax(-1)
        self.p = logprobs.exp()
        self.entropy = -torch.linalg.vecdot(self.p, logprobs)
        self.to_base = self.kl_to(plain)

    def kl_to(self, logits: Float[Tensor, "new d_vocab"]) -> float:
        """Mean KL(unpatched ‖ of these logits)."""
        return float((logits.logsumexp(-1) - torch.linalg.vecdot(self.p, logits) - self.entropy).mean())

    def of(self, logits: Float[Tensor, "new d_vocab"]) -> Said:
        difference = logits.gather(-1, self.answer) - logits.gather(-1, self.rival)
        return self.kl_to(logits), self.to_base, float(difference.mean())


def _read(model: LanguageModel, vectors: SteeringVectors, patches: Sequence[Patch], text: Text) -> Iterator[Said]:
    """What each patch does to one text, means over its generated positions."""
    block = vectors.layers[0] + 1
    states, hidden = passed_under(model, None, text, [block - 1])

    def under(adapter: Adapter) -> Tensor:
        _, moved = passed_under(model, adapter, text, (), block=block, written=states[block - 1])
        return predicting(model, moved, text)

    plain = predicting(model, hidden, text)
    scale = Scale(text, plain, under(Patched(vectors, LINES[0]())))
    for patch in patches:
        yield scale.of(plain if patch.whole else under(Patched(vectors, patch)))


def predicting(model: LanguageModel, hidden: Float[Tensor, "pos d_model"], text: Text) -> Float[Tensor, "new d_vocab"]:
    """Logits where generated tokens are predicted, in fp64."""
    return model.unembed(hidden[text.n_prompt - 1 : -1]).double()


_KEPT: Mapping[str, Callable[[Said], tuple[float, float]]] = {  # a text's value, and what grows with the effect kept
    "kl_nats": lambda said: (max(said[0], 0.0), said[1] - said[0]),
    "logit_diff": lambda said: (said[2], said[2]),
}


def told(
    sender: str, layer: int, patches: Sequence[Patch], metric: str, found: Mapping[str, tuple[Grid, Grid]]
) -> pd.DataFrame:
    """A row per patch of a table `patching`. found: by name, the values and what grows with the effect kept."""
    floor, ceiling = found["base"][1], found["no_patch"][1]
    rows = []
    for patch in patches:
        value, grown = found[patch.name]
        bounds = (0.0, 1.0) if metric.startswith("avg@") else (float(value.min()), float(value.max()))
        interval = bootstrap_interval(value, resamples=RESAMPLES, bounds=bounds)
        kept = share_of_gain(grown, [floor], ceiling)
        rows.append(
            {"sender": sender, "layer": layer, "patch": patch.name}
            | {"family": patch.family, "part": patch.part, "metric": metric}
            | {"value": interval.value, "low": interval.low, "high": interval.high}
            | {"kept": kept.value, "kept_low": kept.low, "kept_high": kept.high}
            | {"n": ceiling.shape[1], "n_seeds": len(ceiling)}
        )
    return tables.check(pd.DataFrame(rows), "patching")
