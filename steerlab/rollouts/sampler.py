"""The decode engine: many completions of a few prompts, each prompt computed once.

Prompts are read once per set of vectors (see `prefill`); every row then attends to its prompt's one copy of keys and
values and to its own (see `models.decoding`). Rows that have ended leave the batch as soon as an eighth of it has.
Randomness belongs to rows (see `streams`), so none of this changes what is sampled, up to floating point.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from steerlab.adapters import Attached, Layout
from steerlab.batches import Kept
from steerlab.errors import RunFailed, UsageError
from steerlab.models import LanguageModel, graphs, hooks
from steerlab.models.forward import planned
from steerlab.models.head import CHUNK_TOKENS, logit_slopes
from steerlab.rollouts.prefill import Reader, Unit
from steerlab.rollouts.sampling import Sampling, draw
from steerlab.rollouts.streams import uniforms
from steerlab.runs import give_back_memory, ran_out

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
    """tokens: padded on the right with 0. lengths: the stop token included. finished: ended by a stop token. written,
    prompt_written, slopes: what was kept for an update; see `batches`."""

    tokens: Int[Tensor, "row pos"]
    lengths: Int[Tensor, " row"]
    logprobs: Float[Tensor, "row pos"]
    finished: Bool[Tensor, " row"]
    written: Float[Tensor, "row fed d_model"] | None = None
    prompt_written: Mapping[Unit, Float[Tensor, "_ d_model"]] = field(default_factory=dict)
    slopes: Float[Tensor, "row pos d_model"] | None = None

    def kept(self, block: int, prompts: int, member: int = 0) -> Kept | None:
        """What was kept for an update of one member that begins at `block`, prompts in order; None if nothing was."""
        if self.written is None or block == 0:
            return None
        return Kept(block, tuple(self.prompt_written[i, member] for i in range(prompts)), self.written)

    @classmethod
    def join(cls, parts: Sequence[Completions]) -> Completions:
        """Rows of several parts, one after the other, at the width of the longest. One part is returned as it is."""
        if len(parts) == 1:
            return parts[0]
        width = max(int(p.lengths.max()) for p in parts)
        fed = max(width - 1, 1)  # the last token of a row is never fed

        def stack(tensors: list[Tensor], width: int = width) -> Tensor:
            return torch.cat([_widened(t, width) for t in tensors])

        return cls(
            stack([p.tokens for p in parts]),
            torch.cat([p.lengths for p in parts]),
            stack([p.logprobs for p in parts]),
            torch.cat([p.finished for p in parts]),
            None if parts[0].written is None else stack([p.written for p in parts if p.written is not None], fed),
            {unit: states for p in parts for unit, states in p.prompt_written.items()},
            None if parts[0].slopes is None else stack([p.slopes for p in parts if p.slopes is not None]),
        )


def _widened(x: Tensor, width: int) -> Tensor:
    """`x` with zeros behind its second axis."""
    missing = max(0, width - x.shape[1])
    return torch.nn.functional.pad(x, (*[0, 0] * (x.ndim - 2), 0, missing))[:, :width]


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
    keep: bool = False,
) -> Completions:
    """Completions of `rows`, at most `max_rows` at a time. `attached` is the adapter in use, None for the base model.
    keep: also what each member's last unchanged block wrote, and the head's slopes. Where memory runs out, half as many
    rows are decoded at a time from there on.

    Raises UsageError when a prompt is empty or does not fit the model's context with its completion, or a row may have
    no token; RunFailed when the model's probabilities are not finite or memory does not suffice for one row.
    """
    check_fit(model, prompts, sampling)
    if max_rows < 1:
        raise UsageError(f"max_rows is {max_rows}; it must be at least 1")
    if rows.limit is not None and bool((rows.limit < 1).any()):
        raise UsageError(f"a limit of Rows is {int(rows.limit.min())}; every row needs at least 1 token")
    stops = stop_tokens(model, sampling).to(model.device)
    parts: list[Completions] = []
    waiting = list(rows.chunks(max_rows))
    while waiting:
        try:
            parts.append(_Decoding(model, attached, prompts, waiting[0], sampling, stops, seed, step, keep).run())
        except (MemoryError, RuntimeError) as error:
            if not ran_out(error):
                raise
            if len(waiting[0]) == 1:
                said = str(error).partition("\n")[0][:120]
                raise RunFailed(
                    f"memory ran out while decoding a single completion ({said}); lower max_new_tokens (now "
                    f"{sampling.max_new_tokens}) or max_rows (now {max_rows}), or free some"
                ) from error
        else:
            del waiting[0]
            continue
        waiting = halved(waiting)  # outside the handler, whose traceback keeps what was in memory
    joined = Completions.join(parts)
    refuse_non_finite(model, attached, rows, joined, step)
    return joined


def halved(waiting: Sequence[Rows]) -> list[Rows]:
    """The same rows in chunks half as large as the first; memory that was freed is given back."""
    give_back_memory()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    half = (len(waiting[0]) + 1) // 2
    return [part for whole in waiting for part in whole.chunks(half)]


def refuse_non_finite(
    model: LanguageModel, attached: Attached | None, rows: Rows, completions: Completions, step: int
) -> None:
    """Raise RunFailed, naming the first problem and the members of a row bank, if a log-probability is not finite."""
    bad = ~torch.isfinite(completions.logprobs).all(1)
    if not bool(bad.any()):
        return
    where = f"sampling for step {step}, problem {int(rows.problem[bad][0])}"
    if attached is not None and len(attached.first_blocks) > 1:
        where += f", member {', '.join(map(str, rows.member[bad].unique().tolist()))} of the row bank"
    raise RunFailed(
        f"{model.name} gave probabilities that are not finite ({where}); the vectors or the dtype are out of range: "
        "lower the learning rate or use dtype fp32 in a new run"
    )


class _Decoding:
    """State of one batch while it is being decoded; `alive[i]` is the row that batch row i writes to. All of it is
    changed in place while rows stay, so that a step can be captured (`models/graphs.py`).
    """

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
        keep: bool,
    ) -> None:
        self.model, self.attached, self.sampling, self.stops = model, attached, sampling, stops
        n, limit, device = len(rows), sampling.max_new_tokens, model.device
        self.noise = torch.from_numpy(uniforms(seed, step, rows.problem.numpy(), rows.sample.numpy(), limit)).to(device)
        self.names: list[Unit] = list(zip(rows.prompt.tolist(), rows.member.tolist(), strict=True))
        self.reader = Reader(model, attached, prompts, keep)
        self.member = rows.member.to(device)
        self.out_tokens = torch.zeros(n, limit, dtype=torch.long, device=device)
        self.out_logprobs = torch.zeros(n, limit, dtype=torch.promote_types(model.dtype, torch.float32), device=device)
        own = torch.full((n,), limit) if rows.limit is None else rows.limit.clamp(max=limit)
        self.lengths = own.to(device)
        self.running = torch.ones(n, dtype=torch.bool, device=device)
        self.finished = torch.zeros(n, dtype=torch.bool, device=device)
        self.drawn = torch.zeros(1, dtype=torch.long, device=device)  # tokens of every row so far
        prompt_length = torch.tensor([len(prompts[p]) for p, _ in self.names], device=device)
        width = int(prompt_length.max()) + limit
        sequences = torch.tensor(
            [[*prompts[p], *[0] * (width - len(prompts[p]))] for p, _ in self.names], device=device
        )
        self.alive = torch.arange(n, device=device)
        self.layout = Layout(sequences, prompt_length, self.alive[:, None], prompt_length[:, None])
        kept = torch.tensor([self.reader.kept(member) for _, member in self.names], device=device)
        shape = n, limit, model.d_model
        self.written = torch.empty(shape, dtype=model.dtype, device=device) if kept.any() else None
        # What is drawn greedily or from a nucleus teaches nothing; a soft cap would want logits from before it.
        sloping = keep and sampling.temperature > 0 and sampling.top_p == 1 and model.logit_softcap is None
        self.slopes = torch.zeros(shape, dtype=model.dtype, device=device) if sloping else None
        self.pending: list[tuple[Tensor, Tensor]] = []
        self.gathered = model.unembedding.weight.new_empty(CHUNK_TOKENS + n, model.d_vocab) if sloping else None
        self.seams = {int(seam): kept == seam for seam in torch.unique(kept) if seam > 0}
        self.keep_only(self.alive)

    def keep_only(self, rows: Int[Tensor, " row"]) -> None:
        """`rows` are the batch from now on."""
        self.alive = rows
        self.keeping = {seam: torch.nonzero(of_seam[rows]).flatten() for seam, of_seam in self.seams.items()}

    def prefill(self) -> Float[Tensor, "row d_model"]:
        """Hidden state of each row's last prompt token; leaves the prompts' keys and values in the plan."""
        self.prompt_states = self.reader.read(sorted(set(self.names)))
        self.plan = self.prompt_states.plan(self.names, self.sampling.max_new_tokens, self.model)
        return torch.stack([self.prompt_states.last[name] for name in self.names])

    def run(self) -> Completions:
        self.next_token(self.prefill())
        repeated = graphs.Captured if self.model.steps == "captured" else graphs.Eager
        look = 1 if self.model.device.type == "cpu" else 8  # asking a GPU how many rows still run makes it wait
        again: graphs.Repeated | None = None
        limit = self.sampling.max_new_tokens
        for t in range(1, limit):
            if (t - 1) % look == 0:
                running = self.running[self.alive]
                n_running = int(running.sum())
                if n_running == 0:
                    break
                if len(running) - n_running >= max(1, len(running) // repeated.leave):
                    self.compact(torch.nonzero(running).flatten())
                    again = None
            if again is None:
                again = (repeated if limit - t >= repeated.least else graphs.Eager)(self.step)
            else:
                again()
        self.project()
        width = int(self.lengths.max())
        return Completions(
            self.out_tokens[:, :width].cpu(),
            self.lengths.cpu(),
            self.out_logprobs[:, :width].cpu(),
            self.finished.cpu(),
            None if self.written is None else self.written[:, : max(width - 1, 1)],
            self.prompt_states.written,
            None if self.slopes is None else self.slopes[:, :width],
        )

    def compact(self, kept: Int[Tensor, " kept"]) -> None:
        """Only these batch rows go on."""
        self.plan.select(kept)
        self.keep_only(self.alive[kept])

    def step(self) -> None:
        """Feed every row its last token and draw the next."""
        self.next_token(self.advance())

    def next_token(self, hidden: Float[Tensor, "row d_model"]) -> None:
        """The next token of the rows still running, and which of them it ends."""
        rows, t = self.alive, self.drawn
        logits = self.model.unembed(hidden)
        token, logprob = draw(logits, self.noise[rows, t], self.sampling)
        if self.slopes is not None:
            self.note_slopes(logits, token)
        on = self.running[rows]
        self.out_tokens[rows, t] = torch.where(on, token, 0)
        self.out_logprobs[rows, t] = torch.where(on, logprob, 0)
        stopped = on & torch.isin(token, self.stops)
        self.finished[rows] |= stopped
        self.lengths[rows] = torch.where(stopped, t + 1, self.lengths[rows])
        self.running[rows] = on & ~stopped & (self.lengths[rows] > t + 1)
        self.drawn += 1

    def advance(self) -> Float[Tensor, "row d_model"]:
        """Feed the token of every row that was drawn last."""
        rows, t = self.alive, self.drawn - 1
        tokens = self.out_tokens[rows, t][:, None]
        position = (self.layout.prompt_length[rows] + t)[:, None]
        self.layout.sequences[rows[:, None], position] = tokens
        if self.attached is not None:
            self.attached.place(
                self.member[rows][:, None], replace(self.layout, sequence=rows[:, None], position=position)
            )
        self.plan.advance()
        keeping = {seam: partial(self.keep, mine) for seam, mine in self.keeping.items()}
        with hooks.written(self.model, keeping):
            return planned(self.model, self.plan, tokens, position)[:, -1]

    def note_slopes(self, logits: Float[Tensor, "row d_vocab"], token: Int[Tensor, " row"]) -> None:
        """Have the slopes of the tokens that were just drawn; `logits` may be overwritten. On a CPU many rows are
        projected at once (torch lays the weights out anew at every product), in a captured step its own."""
        temperature, fused = self.sampling.temperature, self.model.kernels == "fused"
        _, slope = logit_slopes(logits, token, temperature, None, fused)
        assert slope is not None and self.gathered is not None
        n = sum(len(rows) for rows, _ in self.pending)
        self.gathered[n : n + len(token)] = slope
        self.pending.append((self.alive, self.drawn.expand(len(token)).clone()))
        if self.model.steps == "captured" or n + len(token) >= CHUNK_TOKENS:
            self.project()

    def project(self) -> None:
        """Put the slopes that are pending in their places."""
        if self.slopes is None or self.gathered is None or not self.pending:
            return
        rows, places = (torch.cat(parts) for parts in zip(*self.pending, strict=True))
        self.slopes[rows, places] = (
            self.gathered[: len(rows)] @ self.model.unembedding.weight / self.sampling.temperature
        )
        self.pending = []

    def keep(self, mine: Int[Tensor, " mine"], states: Float[Tensor, "row one d_model"]) -> None:
        """Keep what a block wrote at the token that is fed, for the batch rows `mine`."""
        assert self.written is not None
        self.written[self.alive[mine], self.drawn - 1] = states[mine, 0]
