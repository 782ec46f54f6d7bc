"""The tuned lens (Belrose et al. 2023, arXiv 2303.08112): translators that make every layer say what the model says.

The defaults are for the embedded model on one or two CPU cores; analyses/README.md has the rates that were tried. The
paper's own setting is 250 steps of 2^18 tokens of the Pile, SGD with Nesterov momentum 0.9, rate 1 falling to 0, clip
1.
"""

from __future__ import annotations

from steerlab.adapters import Translators
from steerlab.corpus import Prose
from steerlab.objectives import LensDivergence
from steerlab.training import AdamW, Experiment, HeldOut, Texts


def tuned_lens(
    model: str = "smollm2-135m",
    *,
    text: str | None = None,
    steps: int = 100,
    rows: int = 16,
    length: int = 128,
    counted: int = 16,
    lr: float | None = None,
    seed: int = 0,
    dtype: str = "auto",
) -> Experiment:
    """Tuned lens: one affine translator per layer, trained by KL from the model's own output on running text.

    `text` is a file of prose; without it WikiText-2 below `$STEERLAB_DATA` is read, else the package's own few hundred
    words, which only show that it works. A step reads `rows` rows of `length` tokens and learns at `counted` of each.
    """
    trained = Translators()
    return Experiment(
        recipe="tuned_lens",
        model=model,
        adapter=trained,
        source=Texts(Prose.find(text), rows, length, min(counted, length)),
        objective=LensDivergence(),
        updater=AdamW(lr=trained.learning_rate if lr is None else lr),
        evaluation=HeldOut(),
        steps=steps,
        seed=seed,
        dtype=dtype,
    )
