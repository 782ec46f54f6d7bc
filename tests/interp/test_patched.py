"""Patched blocks: identities of arXiv 2509.06608 §7, each patch the long way, and while decoding, in every family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from steerlab.adapters import Adapter, Layout, Scope, SteeringVectors
from steerlab.errors import UsageError
from steerlab.interp import patched as p
from steerlab.interp.patched import Clean, Patch, Patched
from steerlab.models import LanguageModel, Site, tiny
from steerlab.rollouts import Policy, Rows, Sampling

Exact = Callable[..., LanguageModel]
Vectors = Callable[..., SteeringVectors]
TOKENS = torch.tensor([[40, 41, 42, 43, 44, 45, 46, 47]])
LAYER = 1
NEAR = 1e-10


def logits(model: LanguageModel, adapter: Adapter | None = None) -> Tensor:
    if adapter is None:
        return model.logits(TOKENS)[0]
    with torch.no_grad(), adapter.attach(model):
        return model.logits(TOKENS)[0]


@pytest.fixture(params=tiny.FAMILIES)
def model(request: pytest.FixtureRequest, exact: Exact) -> LanguageModel:
    return exact(request.param)


@pytest.fixture
def vector(model: LanguageModel, vectors: Vectors) -> SteeringVectors:
    return vectors(model, layers=(LAYER,))


def every(kind: str, model: LanguageModel, others: bool) -> Patch:
    """All heads at once."""
    n = model.n_kv_heads if kind in "kv" else model.n_heads
    return Patch("every", (Clean(p.SITES[kind], tuple(range(n)), others=others),))


def test_identities(model: LanguageModel, vector: SteeringVectors) -> None:
    steered, plain = logits(model, vector), logits(model)
    assert float((steered - plain).abs().max()) > 1e-3

    def same(patch: Patch, wanted: Tensor) -> None:
        assert torch.allclose(logits(model, Patched(vector, patch)), wanted, atol=NEAR), patch.name

    same(p.no_patch(), steered)
    same(p.base(), plain)
    moved = SteeringVectors({Site("resid_post", LAYER + 1): vector.vectors[vector.sites[0]]})
    same(p.skip_layer(), logits(model, moved))
    skipped = logits(model, Patched(vector, p.skip_attention()))
    for kind in p.SITES:
        same(every(kind, model, others=True), steered)
    same(every("head", model, others=False), skipped)
    assert torch.equal(logits(model), plain), "the model is as it was"


def test_each_patch_the_long_way(model: LanguageModel, vector: SteeringVectors) -> None:
    """With caches and interventions, one site at a time."""
    place, receiver = vector.sites[0], LAYER + 1
    at = lambda kind: Site(kind, receiver)  # noqa: E731
    sites = [at(kind) for kind in ("q", "k", "v", "z", "attn_out", "mlp_out", "mlp_neurons")]
    with torch.no_grad():
        clean = model.cache(TOKENS, sites)
        add = {place: lambda x: x + vector.vectors[place].to(x)}
        d = model.d_head

        def by_hand(kind: str, part: slice) -> Tensor:
            def edit(x: Tensor) -> Tensor:
                x = x.clone()
                x[..., part] = clean[at(kind)][..., part]
                return x

            with model.intervene(add | {at(kind): edit}):
                return model.logits(TOKENS)[0]

        width = model.d_mlp // 4
        for patch, kind, part in (
            (p.skip("head", 1), "z", slice(d, 2 * d)),
            (p.skip("q", 0), "q", slice(0, d)),
            (p.skip("k", model.n_kv_heads - 1), "k", slice((model.n_kv_heads - 1) * d, model.n_kv_heads * d)),
            (p.skip("v", 0), "v", slice(0, d)),
            (p.skip_neurons(2, 4), "mlp_neurons", slice(2 * width, 3 * width)),
            (p.skip_attention(), "attn_out", slice(None)),
            (p.skip_mlp(), "mlp_out", slice(None)),
        ):
            assert torch.allclose(logits(model, Patched(vector, patch)), by_hand(kind, part), atol=NEAR), patch.name


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neo"])
def test_who_sees_a_patched_head(family: str, exact: Exact, vectors: Vectors) -> None:
    model = exact(family)
    vector = vectors(model, layers=(LAYER,))
    place, receiver = vector.sites[0], LAYER + 1
    attn, mlp, z = (Site(kind, receiver) for kind in ("attn_out", "mlp_out", "z"))
    add = {place: lambda x: x + vector.vectors[place].to(x)}
    head = slice(0, model.d_head)
    with torch.no_grad():
        clean = model.cache(TOKENS, [z])[z]

        def cut(x: Tensor) -> Tensor:
            x = x.clone()
            x[..., head] = clean[..., head]
            return x

        with model.intervene(add):
            whole = model.cache(TOKENS, [attn, mlp])
        with model.intervene(add | {z: cut}):
            part = model.cache(TOKENS, [attn, mlp])
        for reaches, seen in (("residual", {attn: part, mlp: whole}), ("mlp", {attn: whole, mlp: part})):
            with model.intervene(add | {site: (lambda _x, v=of[site]: v) for site, of in seen.items()}):
                wanted = model.logits(TOKENS)[0]
            got = logits(model, Patched(vector, p.skip("head", 0).seen_by(reaches)))  # type: ignore[arg-type]
            assert torch.allclose(got, wanted, atol=NEAR)


PATCHES = [
    p.no_patch(),
    p.base(),
    p.skip_attention(),
    p.skip_mlp(),
    p.skip_layer(),
    p.skip("head", 1),
    p.steer("head", 0),
    p.skip("q", 1),
    p.skip("k", 0),
    p.steer("v", 0),
    p.skip_neurons(1, 4),
    p.skip("head", 0).seen_by("mlp"),
    p.skip("k", 0).seen_by("residual"),
]


@pytest.mark.parametrize("scope", [Scope.all(), Scope.generated()], ids=["all", "generated"])
def test_decoding_is_the_full_forward(model: LanguageModel, vectors: Vectors, scope: Scope) -> None:
    """Log-probabilities recorded while sampling, prompts of two lengths, are those of the whole text fed at once."""
    vector = vectors(model, layers=(LAYER,), scope=scope)
    prompts, rows = [(40, 41, 42), (50, 51, 52, 53, 54)], Rows.grid([0, 1], 2)
    for patch in PATCHES:
        adapter = Patched(vector, patch)
        drawn = Policy(model, adapter).sample(prompts, rows, Sampling(max_new_tokens=5), seed=0)
        for row in range(len(rows)):
            prompt = prompts[int(rows.prompt[row])]
            answer = drawn.tokens[row, : int(drawn.lengths[row])]
            tokens = torch.cat([torch.tensor(prompt), answer])[None]
            layout = Layout.of_texts(tokens, len(prompt))
            with torch.no_grad(), adapter.attach(model, layout=layout):
                whole = model.logits(tokens)[0].log_softmax(-1)
            wanted = whole[len(prompt) - 1 : -1].gather(1, answer[:, None])[:, 0]
            assert torch.allclose(drawn.logprobs[row, : len(answer)], wanted, atol=1e-9), patch.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_with_kernels(dtype: torch.dtype, vectors: Vectors) -> None:
    """The same, with the kernels that a CPU decodes with."""
    model = tiny.model("llama", dtype=dtype)
    vector = vectors(model, layers=(LAYER,))
    plain = {}
    for kernels in ("family", "fused"):
        model.kernels = kernels  # type: ignore[assignment]
        for patch in (p.skip("head", 1), p.skip("k", 0)):
            out = Policy(model, Patched(vector, patch)).sample(
                [(40, 41, 42)], Rows.grid([0], 2), Sampling(max_new_tokens=4), seed=0
            )
            before = plain.setdefault(patch.name, out)
            if torch.equal(before.tokens, out.tokens):
                assert torch.allclose(before.logprobs, out.logprobs, atol=1e-4 if dtype == torch.float32 else 0.1)


def test_sweeps(exact: Exact) -> None:
    model = exact("llama")
    assert [patch.name for patch in p.sweep(model, "k")] == [
        *(f"skip_k({g})" for g in range(model.n_kv_heads)),
        *(f"steer_k({g})" for g in range(model.n_kv_heads)),
    ]
    assert len(p.sweep(model, "head")) == 2 * model.n_heads
    assert len(p.sweep(model, "neurons", groups=3)) == 6


def test_groups_of_neurons_are_all_of_them(exact: Exact) -> None:
    model = exact("llama")
    masks = [patch.clean[0].mask(model) for patch in p.sweep(model, "neurons", groups=5)[:5]]
    total = sum(mask.long() for mask in masks if mask is not None)
    assert torch.equal(torch.as_tensor(total), torch.ones(model.d_mlp, dtype=torch.long))


def test_bad_input_is_one_line(exact: Exact, vectors: Vectors) -> None:
    model = exact("llama")
    vector = vectors(model, layers=(LAYER,))

    def refused(says: str, adapter: Callable[[], Adapter]) -> None:
        with pytest.raises(UsageError, match=says) as caught, adapter().attach(model):
            pass
        assert "\n" not in str(caught.value)

    refused("no block behind it", lambda: Patched(vectors(model, layers=(3,)), p.base()))
    refused("select one layer", lambda: Patched(vectors(model), p.base()))
    refused("head 9 of z does not exist", lambda: Patched(vector, p.skip("head", 9)))
    refused("group of heads 9 of k", lambda: Patched(vector, p.skip("k", 9)))
    refused("unknown kind of head", lambda: Patched(vector, p.skip("mlp", 0)))
    refused("does not patch attention alone", lambda: Patched(vector, p.skip_mlp().seen_by("mlp")))
    with pytest.raises(UsageError, match="sample through Policy"), Patched(vector, p.skip("head", 0)).attach(model):
        model.hf.generate(TOKENS, max_new_tokens=2, do_sample=False)


def test_replaced_names(vectors: Vectors, exact: Exact) -> None:
    patch = p.skip("head", 0).seen_by("mlp")
    assert patch.name == "skip_head(0), mlp path" and replace(patch, name="x").reaches == "mlp"
    assert "skip_head(0)" in repr(Patched(vectors(exact(), layers=(LAYER,)), patch))


@pytest.mark.parametrize("kind", [*p.SITES, "neurons"])
def test_a_patch_is_found_by_its_name(kind: str, exact: Exact) -> None:
    patches = [line() for line in p.LINES] + list(p.sweep(exact(), kind, groups=4))
    patches += [patch.seen_by("mlp") for patch in patches if kind != "neurons" and patch.family != "line"]
    assert [p.named(patch.name, groups=4) for patch in patches] == patches
    for name in ("skip_heads(1)", "skip_head", "skip_head(-1)", "steer_head(1), other path", "", "clean"):
        with pytest.raises(UsageError, match="unknown patch") as caught:
            p.named(name)
        assert "skip_attention" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="does not patch attention alone"):
        p.named("skip_mlp, mlp path")


@pytest.mark.parametrize("kind", [*p.SITES, "neurons"])
def test_the_reference_is_the_patch_without_its_part(kind: str, exact: Exact, vectors: Vectors) -> None:
    model = exact()
    vector = vectors(model, layers=(LAYER,))
    cut, left = (of[0] for of in (p.sweep(model, kind, groups=4), p.sweep(model, kind, groups=4)[::-1]))
    assert (cut.steers, cut.reference) == (False, p.no_patch()) and left.steers
    assert {line().reference for line in p.LINES} == {p.no_patch()}
    n = {"neurons": 4, "k": model.n_kv_heads, "v": model.n_kv_heads}.get(kind, model.n_heads)
    site = left.clean[0].site
    none = Patch("none", (Clean(site, tuple(range(n)), 4 if kind == "neurons" else None),))
    wanted = logits(model, Patched(vector, none))
    assert torch.allclose(logits(model, Patched(vector, left.reference)), wanted, atol=NEAR, rtol=0)
    assert left.reference.name == {"head": "skip_attention", "neurons": "skip_mlp"}.get(kind, f"skip_every_{kind}")
    if kind != "neurons":
        assert left.seen_by("mlp").reference == left.reference.seen_by("mlp")
