"""The decode engine: many completions of a few prompts, each prompt computed once.

Prompts are padded on the left and prefilled once per (prompt, set of vectors); their keys and values are then
given to every row. Rows that have ended leave the batch as soon as an eighth of it has. Randomness belongs to rows
(see `streams`), so none of this changes what is sampled, up to floating point.
Left out, for the engine to come: CUDA graphs, sharing below the first differing layer, keeping hidden states.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from steerlab.adapters import Attached, Layout
from steerlab.errors import RunFailed, UsageError
from steerlab.models import LanguageModel
from steerlab.models.kv_cache import ReservedCache
from steerlab.rollouts.sampling import Sampling, draw
from steerlab.rollouts.streams import uniforms

Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Rows:
    """Which completions are wanted, one entry per row.

    prompt: index into the prompts. problem, sample: names of the row's random stream. member: set of a row bank.
    limit: most tokens of each row (1 or more), None for `Sampling.max_new_tokens` everywhere.
    """

    prompt: Int[Tensor, " row"]
    problem: Int[Tensor, " row"]
    sample: Int[Tensor, " row"]
    member: Int[Tensor, " row"]
    limit: Int[Tensor, " row"] | None = None

    @classmethod
    def grid(cls, problems: Sequence[int], samples: int, members: int = 1) -> Rows:
        """`samples` completions of every problem under every member; rows of one problem are neighbours."""
        prompt, member, sample = torch.meshgrid(
            torch.arange(len(problems)), torch.arange(members), torch.arange(samples), indexing="ij"
        )
        return cls(prompt.flatten(), torch.tensor(list(problems))[prompt.flatten()], sample.flatten(), member.flatten())

    def __len__(self) -> int:
        return len(self.prompt)

    def chunks(self, n: int) -> Iterator[Rows]:
        for start in range(0, len(self), n):
            part = slice(start, start + n)
            limit = None if self.limit is None else self.limit[part]
            yield Rows(self.prompt[part], self.problem[part], self.sample[part], self.member[part], limit)


@dataclass(frozen=True)
class Completions:
    """tokens: padded on the right with 0. lengths: the stop token included. finished: ended by a stop token."""

    tokens: Int[Tensor, "row pos"]
    lengths: Int[Tensor, " row"]
    logprobs: Float[Tensor, "row pos"]
    finished: Bool[Tensor, " row"]

    @classmethod
    def join(cls, parts: Sequence[Completions]) -> Completions:
        """Rows of several parts, one after the other, at the width of the longest."""
        width = max(int(p.lengths.max()) for p in parts)

        def stack(tensors: list[Tensor]) -> Tensor:
            return torch.cat([torch.nn.functional.pad(t, (0, max(0, width - t.shape[1])))[:, :width] for t in tensors])

        return cls(
            stack([p.tokens for p in parts]),
            torch.cat([p.lengths for p in parts]),
            stack([p.logprobs for p in parts]),
            torch.cat([p.finished for p in parts]),
        )


def left_padded(prompts: Prompts, pad: int = 0) -> tuple[Int[Tensor, "prompt slot"], Bool[Tensor, "prompt slot"]]:
    """Prompts as one block, padded on the left, and its mask."""
    width = max(len(p) for p in prompts)
    tokens = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prompts])
    return tokens, mask


def stop_tokens(model: LanguageModel, sampling: Sampling) -> Int[Tensor, " stop"]:
    """The model's end tokens and those named in `sampling.stop`. Raises UsageError for text that is no single token."""
    ids = {model.tokenizer.eos_token_id} - {None}
    declared = model.hf.generation_config.eos_token_id
    ids.update(declared if isinstance(declared, list) else {declared} - {None})
    for text in sampling.stop:
        token = model.tokenizer.encode(text, add_special_tokens=False)
        if len(token) != 1:
            raise UsageError(f"stop {text!r} is {len(token)} tokens for {model.name}; name a single token")
        ids.add(token[0])
    return torch.tensor(sorted(ids), dtype=torch.long)


def check_fit(model: LanguageModel, prompts: Prompts, sampling: Sampling) -> None:
    """Raise UsageError unless every prompt has tokens and fits the model's context with its completion."""
    if not all(map(len, prompts)):
        raise UsageError("a prompt is empty (no tokens); give every problem a question")
    longest = max(len(p) for p in prompts)
    if longest + sampling.max_new_tokens > model.context:
        raise UsageError(
            f"prompt of {longest} tokens + {sampling.max_new_tokens} new ones exceed the context of {model.name} "
            f"({model.context}); shorten the prompt or lower max_new_tokens"
        )


@torch.no_grad()
def sample(
    model: LanguageModel,
    attached: Attached | None,
    prompts: Prompts,
    rows: Rows,
    sampling: Sampling,
    *,
    seed: int,
    step: int = 0,
    max_rows: int = 256,
) -> Completions:
    """Completions of `rows`, at most `max_rows` at a time. `attached` is the adapter in use, None for the base model.

    Raises UsageError when a prompt is empty or does not fit the model's context with its completion, RunFailed when
    the model's probabilities are not finite.
    """
    check_fit(model, prompts, sampling)
    if max_rows < 1:
        raise UsageError(f"max_rows is {max_rows}; it must be at least 1")
    stops = stop_tokens(model, sampling).to(model.device)
    parts = [
        _Decoding(model, attached, prompts, part, sampling, stops, seed, step).run() for part in rows.chunks(max_rows)
    ]
    joined = Completions.join(parts)
    if not bool(torch.isfinite(joined.logprobs).all()):
        raise RunFailed(
            f"{model.name} gave probabilities that are not finite (sampling for step {step}); the vectors or the dtype "
            "are out of range: lower the learning rate or use dtype fp32 in a new run"
        )
    return joined


class _Decoding:
    """State of one batch while it is being decoded; `alive[i]` is the row that batch row i writes to."""

    def __init__(
        self,
        model: LanguageModel,
        attached: Attached | None,
        prompts: Prompts,
        rows: Rows,
        sampling: Sampling,
        stops: Tensor,
        seed: int,
        step: int,
    ) -> None:
        self.model, self.attached, self.sampling, self.stops = model, attached, sampling, stops
        n, limit, device = len(rows), sampling.max_new_tokens, model.device
        noise = uniforms(seed, step, rows.problem.numpy(), rows.sample.numpy(), limit)
        self.noise = torch.from_numpy(noise).to(device)
        units, self.unit = torch.unique(torch.stack([rows.prompt, rows.member], 1), dim=0, return_inverse=True)
        self.prompts = [prompts[i] for i in units[:, 0].tolist()]
        self.member = units[:, 1].to(device)
        self.out_tokens = torch.zeros(n, limit, dtype=torch.long, device=device)
        self.out_logprobs = torch.zeros(n, limit, dtype=torch.promote_types(model.dtype, torch.float32), device=device)
        own = torch.full((n,), limit) if rows.limit is None else rows.limit.clamp(max=limit)
        self.lengths = own.to(device)
        self.running = torch.ones(n, dtype=torch.bool, device=device)
        self.finished = torch.zeros(n, dtype=torch.bool, device=device)

    def prefill(self) -> Float[Tensor, "row d_model"]:
        """Hidden state of each row's last prompt token; leaves keys and values of every row in the cache."""
        tokens, mask = (t.to(self.model.device) for t in left_padded(self.prompts))
        self.slots = tokens.shape[1]
        self.kv = ReservedCache(self.model.n_layers, self.slots + self.sampling.max_new_tokens)
        padded = not bool(mask.all())
        self.place(self.member, tokens, mask)
        hidden = self.model.hidden(
            tokens,
            mask=mask if padded else None,
            positions=(mask.long().cumsum(1) - 1).clamp(min=0),
            kv=self.kv,
        )
        spread = self.unit.to(self.model.device)
        self.kv.take_rows(spread)
        self.alive = torch.arange(len(spread), device=self.model.device)
        self.member, self.n_prompt = self.member[spread], mask.sum(1)[spread]
        self.tokens = torch.cat([tokens[spread], self.out_tokens], 1)
        self.mask = torch.cat([mask[spread], torch.ones_like(self.out_tokens, dtype=torch.bool)], 1)
        self.padded = padded
        return hidden[:, -1][spread]

    def place(self, member: Tensor, tokens: Tensor, mask: Tensor) -> None:
        if self.attached is not None:
            self.attached.place(member, Layout(tokens, mask, self.slots))

    def run(self) -> Completions:
        hidden = self.prefill()
        for t in range(self.sampling.max_new_tokens):
            token, logprob = draw(self.model.unembed(hidden), self.noise[self.alive, t], self.sampling)
            self.record(t, token, logprob)
            running = self.running[self.alive]
            n_running = int(running.sum())
            if n_running == 0 or t + 1 == self.sampling.max_new_tokens:
                break
            self.tokens[:, self.slots + t] = token
            if len(running) - n_running >= max(1, len(running) // 8):
                self.compact(torch.nonzero(running).flatten())
            hidden = self.advance(t)
        width = int(self.lengths.max())
        return Completions(
            self.out_tokens[:, :width].cpu(),
            self.lengths.cpu(),
            self.out_logprobs[:, :width].cpu(),
            self.finished.cpu(),
        )

    def record(self, t: int, token: Int[Tensor, " row"], logprob: Float[Tensor, " row"]) -> None:
        """Write token `t` of the rows still running, and note which of them it ends."""
        on = self.running[self.alive]
        rows, drawn = self.alive[on], token[on]
        self.out_tokens[rows, t], self.out_logprobs[rows, t] = drawn, logprob[on]
        stopped = torch.isin(drawn, self.stops)
        self.finished[rows] = stopped
        self.lengths[rows[stopped]] = t + 1
        self.running[rows] = ~stopped & (self.lengths[rows] > t + 1)

    def compact(self, kept: Int[Tensor, " kept"]) -> None:
        """Only these batch rows go on."""
        self.kv.take_rows(kept)
        self.alive, self.member, self.n_prompt = self.alive[kept], self.member[kept], self.n_prompt[kept]
        self.tokens, self.mask = self.tokens[kept], self.mask[kept]

    def advance(self, t: int) -> Float[Tensor, "row d_model"]:
        """Feed generated token `t` of every row."""
        upto = self.slots + t + 1
        self.place(self.member, self.tokens[:, :upto], self.mask[:, :upto])
        return self.model.hidden(
            self.tokens[:, upto - 1 : upto],
            mask=self.mask[:, :upto] if self.padded else None,
            positions=(self.n_prompt + t)[:, None],
            kv=self.kv,
        )[:, -1]
