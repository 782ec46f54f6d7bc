"""Do latents that come with correct answers make them? Zero, clamp or add latents while the model answers.

`LatentEdit` is an adapter: at the SAE's site, at every token, x becomes x + (f' − f) W_dec with f the activations of
some latents and f' what they are set to, so what the SAE does not explain stays as it is, and an edit of latents that
do not fire changes nothing. With vectors it is attached after them and sees what they did.

`latents_causal` answers problems under an edit and under the same edit of random latents that fire about as often.
Left out: edits of SAEs of differences other than `add`, which know no base run while the model generates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from steerlab import tables
from steerlab.adapters import Adapter, Layout
from steerlab.adapters.adapter import Attached, Everywhere
from steerlab.errors import UsageError, unknown
from steerlab.interp.answers import scored
from steerlab.models import LanguageModel
from steerlab.rollouts import Evaluation
from steerlab.rollouts.evaluate import Done
from steerlab.rollouts.policy import in_use
from steerlab.rollouts.statistics import bootstrap_interval, paired_difference
from steerlab.saes.load import Sae
from steerlab.tasks import Task

How = Literal["zero", "clamp", "add"]
HOWS: tuple[How, ...] = ("zero", "clamp", "add")


class LatentEdit:
    """how: `zero` latents, `clamp` them to `value`, or `add` value × what they write. adapter: in use beneath it.

    Raises UsageError for no latent, one that the SAE does not have, another `how`, or an edit that an SAE of
    differences does not allow.
    """

    def __init__(
        self, sae: Sae, latents: Sequence[int], how: How = "zero", value: float = 0.0, adapter: Adapter | None = None
    ) -> None:
        if how not in HOWS:
            raise unknown("edit", how, HOWS)
        if sae.site is None:
            raise UsageError("the SAE does not say at which site of the model it belongs; load it with site=…")
        if sae.kind == "difference" and how != "add":
            raise UsageError(
                "an SAE of differences needs the base run beside it, which sampling has not; use how='add'"
            )
        wrong = [latent for latent in latents if not 0 <= latent < sae.d_sae]
        if wrong or not len(latents):
            raise UsageError(f"latents {list(latents)[:5]} are not all among 0 to {sae.d_sae - 1}; give some that are")
        self.sae, self.how, self.value, self.adapter = sae, how, value, adapter
        self.latents = torch.tensor(sorted(set(latents)))

    def __repr__(self) -> str:
        return f"LatentEdit({self.how} {len(self.latents)} latents at {self.sae.site})"

    @property
    def first_block(self) -> int:
        assert self.sae.site is not None
        own = self.sae.site.layer + (self.sae.site.kind == "resid_post")
        return own if self.adapter is None else min(own, self.adapter.first_block)

    @property
    def keeps_inputs(self) -> bool:
        return False

    @property
    def n_parameters(self) -> int:
        return 0

    def parameters(self) -> Iterator[nn.Parameter]:
        yield from ()

    def snapshot(self) -> dict[str, Tensor]:
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        if state:
            raise UsageError("an edit of latents has no state to restore; give an empty one")

    @contextmanager
    def attach(
        self, model: LanguageModel, rows: Int[Tensor, " batch"] | None = None, layout: Layout | None = None
    ) -> Iterator[Attached]:
        """Use the edit, and what is beneath it, inside the `with`."""
        assert self.sae.site is not None
        if self.adapter is None:
            with model.intervene({self.sae.site: self._edit}):
                yield Everywhere((self.first_block,))
            return
        with self.adapter.attach(model, rows, layout) as attached, model.intervene({self.sae.site: self._edit}):
            yield attached

    def _edit(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        written = self.sae.directions[self.latents]
        if self.how == "add":
            return x + (self.value * written.sum(0)).to(x)
        now = self.sae.encode(x.float())[..., self.latents]
        wanted = torch.zeros_like(now) if self.how == "zero" else torch.full_like(now, self.value)
        moved = (wanted - now) @ written.to(now)
        return torch.where(moved.any(-1, keepdim=True), x + moved.to(x), x)


def alike(
    rate: Float[np.ndarray, " latent"], latents: Sequence[int], draws: int, seed: int = 0
) -> list[Int[np.ndarray, " some"]]:
    """For each draw as many other latents, each from the ten that fire about as often as its model. rate: how often
    each latent fires. Raises UsageError where there are not enough others."""
    named = np.asarray(latents)
    others = np.setdiff1d(np.flatnonzero(rate > 0), named)
    if len(others) < 2 * len(named):
        raise UsageError(f"only {len(others)} other latents fire, too few to draw {len(named)} alike; give fewer")
    generator, found = np.random.default_rng(seed), []
    for _ in range(draws):
        free, drawn = others.copy(), []
        for latent in generator.permutation(named):
            near = free[np.argsort(np.abs(rate[free] - rate[latent]), kind="stable")[:10]]
            drawn.append(int(generator.choice(near)))
            free = free[free != drawn[-1]]
        found.append(np.array(drawn))
    return found


def latents_causal(
    model: LanguageModel,
    task: Task,
    sae: Sae,
    latents: Sequence[int],
    rate: Float[np.ndarray, " latent"],
    evaluation: Evaluation,
    *,
    how: How = "zero",
    value: float = 0.0,
    adapter: Adapter | None = None,
    draws: int = 3,
    seed: int = 0,
    done: Done | None = None,
) -> pd.DataFrame:
    """Table `latents_causal`: avg@k of the model (under `adapter`) as it is, with the edit, and with the same edit of
    random latents alike; differences to as it is over the same problems and random streams, and of the edit to the
    random ones. rate: how often each latent fires, to draw others alike (`latent_effects` has it).

    Raises UsageError as `LatentEdit` and `alike` do.
    """
    edits = {"edited": [LatentEdit(sae, latents, how, value, adapter)]}
    edits |= {
        f"random-{n}": [LatentEdit(sae, drawn.tolist(), how, value, adapter)]
        for n, drawn in enumerate(alike(rate, latents, draws, seed))
    }
    asked: dict[str, Sequence[Adapter | None]] = {"as it is": [adapter], **edits}
    for (edit,) in edits.values():
        with in_use(edit, model):  # what does not fit is refused before anything is sampled
            pass
    found = scored(model, task, asked, evaluation, done)
    randoms = np.mean([found[name] for name in found if name.startswith("random-")], axis=0) if draws else None
    rows = []
    for name, grid in found.items():
        interval = bootstrap_interval(grid, seed=seed, bounds=(0.0, 1.0))
        change = paired_difference(grid, found["as it is"], seed=seed)
        beside = paired_difference(grid, randoms, seed=seed) if name == "edited" and randoms is not None else None
        rows.append(
            {"condition": name, "how": how, "n_latents": len(set(latents)), "metric": f"avg@{evaluation.samples}"}
            | {"value": interval.value, "low": interval.low, "high": interval.high}
            | {"change": change.value}
            | {"change_low": change.low if name in edits else 0.0, "change_high": change.high if name in edits else 0.0}
            | {"beyond_random": np.nan if beside is None else beside.value}
            | {"beyond_low": np.nan if beside is None else beside.low}
            | {"beyond_high": np.nan if beside is None else beside.high, "n_problems": grid.shape[-1]}
        )
    return tables.check(pd.DataFrame(rows), "latents_causal")
