"""Texts to look at: token ids with the place where the prompt ends, made by a policy or given by the user.

What several conditions (base, steered, a random direction) are compared on is the same tokens, so that every difference
is paired by construction; whose tokens they are is the caller's choice and stays in the table's name for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from steerlab.adapters import Adapter, SteeringVectors
from steerlab.errors import UsageError
from steerlab.models import LanguageModel
from steerlab.rollouts import Policy, Rows, Sampling
from steerlab.tasks import Problem, Task, encode

Conditions = Mapping[str, Adapter | None]


@dataclass(frozen=True)
class Text:
    """tokens: prompt and what follows. n_prompt: how many of them are the prompt's, at least 1."""

    tokens: tuple[int, ...]
    n_prompt: int

    def __post_init__(self) -> None:
        if not 1 <= self.n_prompt <= len(self.tokens):
            raise UsageError(f"a text of {len(self.tokens)} tokens cannot have {self.n_prompt} of them in its prompt")


def of_strings(model: LanguageModel, texts: Iterable[str]) -> list[Text]:
    """Strings as they are, all prompt. Raises UsageError for one without tokens."""
    made = [tuple(model.tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    if not made or not all(made):
        raise UsageError("a text has no tokens; give at least one word")
    return [Text(tokens, len(tokens)) for tokens in made]


def sampled(
    policy: Policy, task: Task, problems: Sequence[Problem], sampling: Sampling, samples: int = 1, seed: int = 0
) -> list[Text]:
    """What `policy` answers to each problem, its stop token included."""
    if not problems:
        raise UsageError(f"no problems of task {task.name} to answer; name a split that has some")
    prompts = [encode(task.prompt(problem), policy.model.tokenizer) for problem in problems]
    rows = Rows.grid([problem.id for problem in problems], samples)
    done = policy.sample(prompts, rows, sampling, seed=seed)
    return [
        Text((*prompts[p], *done.tokens[i, : done.lengths[i]].tolist()), len(prompts[p]))
        for i, p in enumerate(rows.prompt.tolist())
    ]


def contrasts(vectors: SteeringVectors, scales: Sequence[float] = (-1.0,), seed: int = 0) -> dict[str, Adapter | None]:
    """What a set of vectors is read beside: the base, the set, its multiples, and random directions of its lengths."""
    found: dict[str, Adapter | None] = {"base": None, "steered": vectors}
    found |= {f"steered × {scale:g}".replace("-", "−"): vectors * scale for scale in scales}
    return found | {"random": vectors.randomise(torch.Generator().manual_seed(seed))}
