"""Kernels are the family's operators up to rounding, forwards and backwards; nothing of them is left behind."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from steerlab.adapters import Steering
from steerlab.batches import RolloutBatch
from steerlab.errors import UsageError
from steerlab.models import LanguageModel, Site, engine, fused, operators, tiny
from steerlab.models.attention import Rule
from steerlab.models.decoding import ByRow, Decoding, Sharing, UnitKeys
from steerlab.rollouts import Policy, Rows, Sampling

PROMPTS = [[40, 41, 42], [50, 51, 52, 53, 54]]
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def with_gradients(function: Callable[..., Tensor | tuple[Tensor, ...]], *given: Tensor) -> list[Tensor]:
    """What a function returns, and the gradient in every argument of a sum with random weights."""
    leaves = [x.detach().requires_grad_() for x in given]
    out = function(*leaves)
    outs = out if isinstance(out, tuple) else (out,)
    weights = [randn(*y.shape, seed=9 + i).to(y.dtype) for i, y in enumerate(outs)]
    return [*(y.detach() for y in outs), *torch.autograd.grad(outs, leaves, weights)]


def assert_close(found: list[Tensor], wanted: list[Tensor], dtype: torch.dtype) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == dtype and a.shape == b.shape
        assert (a.double() - b.double()).abs().max() <= ROUNDING[dtype] * b.double().abs().max()


def exact_norm(x: Tensor, weight: Tensor, offset: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * (weight + offset)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(dtype: torch.dtype, offset: float) -> None:
    x, weight = randn(2, 5, 24, dtype=dtype), randn(24, dtype=dtype, seed=1)
    found = with_gradients(lambda x: operators.rms_norm(x, weight, 1e-5, offset), x)
    assert_close(found, with_gradients(lambda x: exact_norm(x, weight.double(), offset), x.double()), dtype)
    apart = randn(4, 24, dtype=dtype)[::2]  # rows that do not follow each other
    assert_close(
        [operators.rms_norm(apart, weight, 1e-5, offset)], [exact_norm(apart.double(), weight.double(), offset)], dtype
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_gate(dtype: torch.dtype) -> None:
    gate, up = (8 * randn(3, 4, 20, dtype=dtype, seed=i) for i in (0, 1))

    def exact(gate: Tensor, up: Tensor) -> Tensor:
        return torch.nn.functional.silu(gate) * up

    found = with_gradients(operators.silu_gate, gate, up)
    assert_close(found, with_gradients(exact, gate.double(), up.double()), dtype)
    joined = randn(6, 1, 40, dtype=dtype)
    halves = joined.split(20, -1)  # as packed products give them
    for pair in (halves, (halves[0], halves[1].contiguous()), (halves[0].transpose(0, 1), halves[1].transpose(0, 1))):
        with torch.no_grad():
            assert_close([operators.silu_gate(*pair)], [exact(*(x.double() for x in pair))], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotary", [8, 4])
def test_rotate(dtype: torch.dtype, rotary: int) -> None:
    """Whole and partial rotary embeddings, of one stream and of many rows of one token."""

    def exact(query: Tensor, key: Tensor) -> tuple[Tensor, ...]:
        def turned(x: Tensor) -> Tensor:
            a, b = x[..., : rotary // 2], x[..., rotary // 2 : rotary]
            c, s = cos[:, None].double(), sin[:, None].double()
            return torch.cat([x[..., :rotary] * c + torch.cat([-b, a], -1) * s, x[..., rotary:]], -1)

        return turned(query), turned(key)

    for batch, length in ((1, 6), (5, 1)):
        query = randn(batch, length, 3 * 8, dtype=dtype).view(batch, length, 3, 8).transpose(1, 2)
        key = randn(batch, length, 40, dtype=dtype, seed=1)[..., 16:32].view(batch, length, 2, 8).transpose(1, 2)
        cos, sin = (randn(batch, length, rotary // 2, dtype=dtype, seed=s).repeat(1, 1, 2) for s in (2, 3))
        found = with_gradients(lambda q, k: operators.rotate(q, k, cos, sin), query, key)  # noqa: B023
        assert_close(found, with_gradients(exact, query.double(), key.double()), dtype)


def test_nothing_that_is_not_a_number_is_lost() -> None:
    x = torch.tensor([[1.0, math.nan, 2.0], [1.0, math.inf, 2.0], [1.0, 2.0, 3.0]], dtype=torch.bfloat16)
    ones = torch.ones_like(x)
    assert operators.silu_gate(x, ones).isnan().tolist() == [[False, True, False], [False] * 3, [False] * 3]
    norm = operators.rms_norm(x, ones[0], 1e-6)
    assert norm[0].isnan().all() and norm[1].isnan().any() and norm[2].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", [Rule(0.3), Rule(0.3, softcap=2.0), Rule(0.3, window=4), Rule(0.3, window=25)])
@pytest.mark.parametrize(("leave", "repeat", "d_value"), [(0, 2, 8), (5, 3, 40), (40, 1, 32), (30, 5, 8)])
def test_rows_attend_as_seats_do(dtype: torch.dtype, rule: Rule, leave: int, repeat: int, d_value: int) -> None:
    """Prompts of unequal length, query heads that share keys, rows that end: `ByRow` is `Decoding`."""
    prompt = [
        UnitKeys(randn(3, 2, 37, 8, dtype=dtype, seed=i), randn(3, 2, 37, d_value, dtype=dtype, seed=9)) for i in (0, 1)
    ]
    sharing = Sharing(torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([3, 16, 37]))
    plans = [kind(prompt, [sharing, sharing], 45) for kind in (Decoding, ByRow)]
    rows = 6
    for t in range(45):
        if t == leave:
            for plan in plans:
                plan.select(torch.tensor([0, 2, 5]))
            rows = 3
        query = randn(rows, 2 * repeat, 1, 8, dtype=dtype, seed=t)
        value = randn(rows, 2, 1, d_value, dtype=dtype, seed=50 + t)
        key = randn(rows, 1, 40, dtype=dtype, seed=90 + t)[..., 8:24].view(rows, 1, 2, 8).transpose(1, 2)
        for plan in plans:
            plan.advance()
        for layer in (0, 1):
            seats, by_row = (plan.attend(layer, query, key, value, rule) for plan in plans)
            assert_close([by_row], [seats], dtype)
    room = plans[1].own[0]
    assert room is not None and len(room[0]) == 6, "rows keep their places, whoever left before the first step"


def said(policy: Policy, kernels: fused.Kernels) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Tokens and log-probabilities that a policy samples, and the gradient of their teacher-forced sum."""
    policy.model.kernels = kernels
    try:
        rows = Rows.grid([0, 1], 3)
        out = policy.sample(PROMPTS, rows, Sampling(max_new_tokens=8), seed=0)
        batch = RolloutBatch(
            tuple(map(tuple, PROMPTS)), rows.prompt, out.tokens, out.lengths, out.logprobs, torch.zeros(6), out.finished
        )
        scores = policy.logprobs(batch)
        assert torch.allclose(scores.detach(), out.logprobs, rtol=0, atol=1e-5)
        assert policy.adapter is not None
        return out.tokens, out.logprobs, list(torch.autograd.grad(scores.sum(), list(policy.adapter.parameters())))
    finally:
        policy.model.kernels = "family"


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_fused_is_the_familys(family: str) -> None:
    """fp64, every family, biases and windows and soft caps included: the same tokens, numbers and gradients. (Families
    whose norms work in fp32 whatever the model's dtype agree to fp32.)"""
    model = tiny.model(family, dtype=torch.float64)
    policy = Policy(model, Steering().init(model))
    assert policy.adapter is not None
    for i, vector in enumerate(policy.adapter.parameters()):
        vector.data = 0.1 * randn(*vector.shape, seed=i).to(vector)
    (tokens, logprobs, slopes), (same, close, near) = (said(policy, kernels) for kernels in ("family", "fused"))
    assert torch.equal(tokens, same)
    assert torch.allclose(logprobs, close, rtol=0, atol=1e-5)
    for a, b in zip(slopes, near, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_what_has_a_kernel() -> None:
    """Llama: every norm, gate and the rotary embedding. Gemma: norms with an offset, no gate. GPT-2: nothing."""
    llama, gemma, gpt2 = (fused.Fused(tiny.model(family)) for family in ("llama", "gemma2", "gpt2"))
    model = tiny.model("llama")
    assert len(llama.norms) == 2 * model.n_layers + 1 and len(llama.gates) == model.n_layers and llama.source
    assert gemma.norms and not gemma.gates and gemma.source
    assert not gpt2.norms and not gpt2.gates and gpt2.source is None


def test_a_model_is_left_as_it_was_found_and_its_own_logits_are_the_familys() -> None:
    model = tiny.model("llama")
    tokens = torch.tensor(PROMPTS[1])[None]
    with torch.no_grad():
        plain = model.logits(tokens)
        model.kernels = "fused"
        with pytest.raises(RuntimeError, match="stop"), engine.reading(model):
            inside = model.logits(tokens)
            raise RuntimeError("stop")
        assert not torch.equal(inside, plain) and torch.allclose(inside, plain, atol=1e-4)
        assert torch.equal(model.logits(tokens), plain)
    assert not any("forward" in vars(module) for module in model.hf.modules())


def test_sites_are_read_and_written_as_before() -> None:
    model = tiny.model("llama")
    sites = [Site(kind, 1) for kind in ("ln1", "q", "k", "z", "mlp_in", "mlp_neurons", "resid_post")]

    def seen(model: LanguageModel) -> list[Tensor]:
        edits = {Site("ln1", 0): lambda x: 2 * x, Site("k", 1): lambda x: x + 1, Site("mlp_neurons", 0): lambda x: -x}
        with torch.no_grad(), model.intervene(edits):
            values = model.cache(torch.tensor(PROMPTS[1])[None], sites)
        return [values[site] for site in sites]

    plain = seen(model)
    with fused.fused_of(model).in_use():
        for a, b in zip(seen(model), plain, strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-4)


def test_tune_names_its_choice_and_a_run_can_ask_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama")
    choice = model.tune()
    assert choice["kernels"] in ("family", "fused") and choice["products"] in ("plain", "packed")
    assert (model.products, model.kernels) == (choice["products"], choice["kernels"])
    assert tiny.model("gpt2").tune()["kernels"] == "family"  # it has no RMS norms
    assert tiny.model("llama", dtype=torch.float64).tune() == engine.PLAIN
    engine.use(model, {"kernels": "fused", "token_budget": 3})
    assert (model.products, model.kernels) == ("plain", "fused")
    monkeypatch.setattr(fused, "able", lambda model: False)
    with pytest.raises(UsageError, match="begun with fused kernels, which this machine cannot do"):
        engine.use(model, {"kernels": "fused"})


def test_slower_kernels_are_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1_000_000))
    monkeypatch.setattr(fused.time, "perf_counter", lambda: next(clock) ** 2)  # every later trial takes longer
    assert fused.measured_choice(tiny.model("llama")) == "family"


def test_as_many_threads_as_torch_which_keeps_its_own() -> None:
    """In a process of its own: numba sets OpenMP's number of threads when it starts."""
    words = [
        "import torch; torch.set_num_threads(1)",
        "from steerlab.models import numbers, operators",
        "operators.rms_norm(torch.ones(3, 8), torch.ones(8), 1e-6)",
        "print(numbers.n_threads(), torch.get_num_threads())",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(words)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "1"]
