"""RLOO on steering vectors: the training of both steering papers (2505.18706, 2509.06608); on any adapter if asked.

The defaults are for the embedded model on two CPU cores; `analyses/bias_only/layer_and_rate.py` is the study behind
them. The papers' own setting is 128 prompts × 16 samples, 314 steps, lr 1e-3 (7B models), rewards ±1 on DeepScaleR.
"""

from __future__ import annotations

from dataclasses import replace

from steerlab.adapters import AdapterSpec, Steering
from steerlab.errors import UsageError
from steerlab.objectives import Advantage, LeaveOneOut, PolicyGradient
from steerlab.rollouts import Evaluation, Sampling
from steerlab.tasks import Task
from steerlab.training import AdamW, Experiment, Rollouts


def rloo(
    task: Task,
    model: str = "smollm2-135m",
    *,
    layers: tuple[int, ...] | None = None,
    site: str = "resid_post",
    adapter: AdapterSpec | None = None,
    advantage: Advantage = LeaveOneOut(),
    steps: int = 50,
    prompts: int = 16,
    samples: int = 8,
    max_new_tokens: int = 24,
    temperature: float = 1.2,
    lr: float | None = None,
    seed: int = 0,
    dtype: str = "auto",
) -> Experiment:
    """REINFORCE with a leave-one-out baseline; one update per batch, no KL, no clipping.

    `temperature` is that of the training rollouts; evaluation samples at 1. `layers` and `site` are the short form of
    `adapter=Steering(layers, site)`. `lr` None is the adapter's own: 1e-2 for steering vectors.
    """
    if adapter is not None and (layers is not None or site != "resid_post"):
        raise UsageError("layers and site describe steering vectors; with an adapter, say the layers inside it")
    trained = Steering(layers, site) if adapter is None else adapter
    sampling = Sampling(max_new_tokens=max_new_tokens)
    return Experiment(
        recipe="rloo",
        model=model,
        adapter=trained,
        source=Rollouts(task, prompts, samples, replace(sampling, temperature=temperature)),
        objective=PolicyGradient(advantage),
        updater=AdamW(lr=trained.learning_rate if lr is None else lr),
        evaluation=Evaluation(sampling=sampling),
        steps=steps,
        seed=seed,
        dtype=dtype,
    )
