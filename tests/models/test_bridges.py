"""A steered model looks the same through TransformerLens, through nnsight and through us, and is not touched by it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from steerlab.adapters import Scope, SteeringVectors
from steerlab.errors import UsageError
from steerlab.models import LanguageModel, Site
from steerlab.models.bridges import HOOKS, hook_name, module_path, to_nnsight, to_transformer_lens, twin

FAMILIES = {"llama", "qwen2", "gemma2", "gemma3", "gpt2", "gpt_neo"}
EXACT = {"twin", "lens generates", "trace generates"}
POST = Site("resid_post", 1)


@pytest.mark.slow
def test_all_three_see_the_same_steered_model(tmp_path: Path) -> None:
    """In a process of its own; that the model itself stays as it was is asserted there."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("oracle_bridges.py"))],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    unknown, strange = found.pop("refused")
    assert "does not know Mine" in unknown and "Tensor cannot be bridged" in strange
    assert set(found) == FAMILIES
    for family, differences in found.items():
        assert differences.pop("moved") > 1, family
        assert {what: differences.pop(what) for what in EXACT} == dict.fromkeys(EXACT, 0), family
        assert {"lens logits", "lens of the stream", "trace logits", "trace states"} <= set(differences)
        assert max(differences.values()) < 1e-4, (family, differences)


def test_a_twin_shares_weights_and_nothing_else(tiny_models: dict[str, LanguageModel]) -> None:
    tokens = torch.arange(5, 35)[None]
    for family, model in tiny_models.items():
        other = twin(model)
        ours, theirs = dict(model.hf.named_parameters()), dict(other.named_parameters())
        assert ours.keys() == theirs.keys(), family  # tied weights are tied there too
        assert all(theirs[name].data_ptr() == ours[name].data_ptr() for name in ours)
        assert not set(map(id, ours.values())) & set(map(id, theirs.values()))
        assert not set(map(id, model.hf.modules())) & set(map(id, other.modules()))
        assert not any(tensor.is_meta for tensor in (*other.parameters(), *other.buffers()))
        loss = other(tokens).logits.sum()
        assert torch.equal(other(tokens).logits, model.logits(tokens)), family
        loss.backward()
        assert theirs[next(iter(theirs))].grad is not None
        assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.hf.parameters())


def test_the_twin_of_a_steered_model_is_the_model(tiny_llama: LanguageModel) -> None:
    tokens = torch.arange(5, 15)[None]
    with SteeringVectors({POST: torch.ones(32)}).attach(tiny_llama):
        steered, other = tiny_llama.logits(tokens), twin(tiny_llama)
    base = tiny_llama.logits(tokens)
    assert not torch.equal(steered, base)
    assert torch.equal(other(tokens).logits, base)


@pytest.mark.parametrize("bridge", [to_transformer_lens, to_nnsight])
@pytest.mark.parametrize(
    ("vectors", "words"),
    [
        (SteeringVectors({POST: torch.ones(32)}, Scope.generated()), "token scope 'generated' cannot be bridged"),
        ({POST: torch.ones(31)}, r"has shape \(31,\), tiny-llama-0 needs \(32,\)"),
        ({Site("resid_post", 4): torch.ones(32)}, "layers 0…3"),
        ({Site("ln1_post", 1): torch.ones(32)}, "this architecture has none"),
        ({Site("pattern", 1): torch.ones(32)}, "read only"),
        ({}, "no vectors to add"),
    ],
)
def test_what_cannot_be_bridged(
    bridge, vectors, words: str, tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said before a package is imported, which takes seconds and patches globals."""
    for package in ("transformer_lens", "nnsight"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=words):
        bridge(tiny_llama, vectors)


@pytest.mark.parametrize("kind", ["resid_mid", "attn_in", "mlp_in"])
def test_what_transformer_lens_writes_otherwise(kind: str, tiny_llama: LanguageModel) -> None:
    with pytest.raises(UsageError, match=f"does not write {kind}.1 as we do"):
        to_transformer_lens(tiny_llama, {Site(kind, 1): torch.ones(32)})


@pytest.mark.parametrize(("bridge", "package"), [(to_transformer_lens, "transformer_lens"), (to_nnsight, "nnsight")])
def test_a_package_that_is_missing(
    bridge, package: str, tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=f"{package} is not installed; pip install"):
        bridge(tiny_llama)


def test_names(tiny_models: dict[str, LanguageModel]) -> None:
    llama, olmo2, gpt2 = (tiny_models[family] for family in ("llama", "olmo2", "gpt2"))
    assert hook_name(llama, Site("z", 3)) == "blocks.3.attn.hook_z"
    assert hook_name(olmo2, Site("ln1_post", 2)) == "blocks.2.ln1.hook_out" != HOOKS["ln1_post"]
    assert module_path(llama, POST) == "model.layers.1"
    assert module_path(gpt2, Site("attn_out", 0)) == "transformer.h.0.attn"
    with pytest.raises(UsageError, match="has no hook at attn_in"):
        hook_name(llama, Site("attn_in", 1))
    with pytest.raises(UsageError, match="layers 0…3"):
        module_path(llama, Site("resid_post", 4))
