"""SAEs of sae-lens are read at our site and encode as they do there; others are refused."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from steerlab.errors import UsageError
from steerlab.models import LanguageModel, Site
from steerlab.saes.hook_names import hf_name, lens_name, site_of
from steerlab.saes.load import load, package
from steerlab.saes.streams import Stream
from steerlab.saes.training import SaeTraining, train

Saved = Callable[..., Path]


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    """A folder as sae-lens writes it, with some metadata."""

    def made(architecture: str = "jumprelu", d_in: int = 32, **metadata: Any) -> Path:
        lens = package()
        config = {"architecture": architecture, "d_in": d_in, "d_sae": 48}
        if metadata.get("hook_name", "").endswith("hook_z"):
            config["reshape_activations"] = "hook_z"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                sae = lens.SAE.from_dict(config | {"metadata": metadata} | ({"k": 5} if architecture == "topk" else {}))
        sae.save_model(tmp_path / "sae")
        return tmp_path / "sae"

    return made


@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated"])
def test_encodings_are_those_of_sae_lens(architecture: str, saved: Saved, tiny_llama: LanguageModel) -> None:
    folder = saved(architecture, hook_name="blocks.1.hook_resid_post", model_name="tiny-llama-0")
    ours, theirs = load(folder, tiny_llama), package().SAE.load_from_disk(folder)
    x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))
    assert (ours.site, ours.kind, ours.architecture) == (Site("resid_post", 1), "residual", architecture)
    torch.testing.assert_close(ours.encode(x), theirs.encode(x), rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.decode(ours.encode(x)), theirs.decode(theirs.encode(x)), rtol=0, atol=1e-5)
    assert not ours.encode(x).requires_grad and ours.directions.shape == (48, 32)


@pytest.mark.parametrize(
    ("names", "site"),
    [
        ({"hook_name": "blocks.0.hook_resid_pre"}, Site("resid_pre", 0)),
        ({"hook_name": "blocks.3.hook_mlp_out"}, Site("mlp_out", 3)),
        ({"hook_name": "blocks.2.hook_out"}, Site("resid_post", 2)),
        ({"hook_name": "blocks.2.hook_resid_pre", "hf_hook_name": "model.layers.1"}, Site("resid_pre", 2)),
        ({"hook_name": "model.layers.2.self_attn"}, Site("attn_out", 2)),
        ({"hf_hook_name": "model.language_model.layers.2.output"}, Site("resid_post", 2)),
        ({"hook_name": "blocks.1.attn.hook_z"}, Site("z", 1)),
    ],
)
def test_a_site_is_resolved(names: dict[str, str], site: Site, saved: Saved, tiny_llama: LanguageModel) -> None:
    sae = load(saved(**names, model_name="somebody/Tiny-Llama-0"), tiny_llama)
    assert sae.site == site
    assert sae.encode(torch.randn(3, tiny_llama.width(site.kind))).shape == (3, 48)


def test_names_of_sites_and_back(tiny_models: dict[str, LanguageModel]) -> None:
    for family in ("llama", "gemma3", "gpt2", "gpt_neox"):
        model = tiny_models[family]
        for kind in ("resid_post", "attn_out", "mlp_out"):
            site = Site(kind, 1)
            assert site_of(model, lens_name(model, site), hf_name(model, site)) == site, family
    llama, gpt2 = tiny_models["llama"], tiny_models["gpt2"]
    assert hf_name(llama, Site("resid_pre", 2)) == "model.layers.1"
    assert hf_name(gpt2, Site("q", 1)) is None and hf_name(llama, Site("resid_mid", 1)) is None
    assert lens_name(llama, Site("mlp_in", 1)) is None


POST = {"hook_name": "blocks.1.hook_resid_post"}


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ({**POST, "model_name": "gpt2"}, "was trained on gpt2, not on tiny-llama-0; load that model"),
        ({**POST, "d_in": 24}, r"width 24, tiny-llama-0 has 32 at resid_post\.1"),
        ({"hook_name": "blocks.9.hook_resid_post"}, r"belongs at blocks\.9\.hook_resid_post, which tiny-llama-0"),
        ({"hook_name": "blocks.1.ln2.hook_normalized"}, "which tiny-llama-0 .* does not have"),
        ({}, "does not say where in a model it belongs"),
        ({**POST, "hf_hook_name": "model.layers.2"}, "names several places"),
        ({**POST, "hook_name_out": "blocks.1.hook_mlp_out"}, "is a transcoder"),
        ({**POST, "hook_head_index": 3}, "reads head 3 alone"),
        ({**POST, "model_from_pretrained_kwargs": {"center_writing_weights": True}}, "had centred"),
        ({**POST, "steerlab": {"site": "resid_post.1", "weights_sha256": "0"}}, "not on tiny-llama-0"),
    ],
)
def test_what_does_not_fit_is_refused(
    made: dict[str, Any], words: str, saved: Saved, tiny_llama: LanguageModel
) -> None:
    folder = saved(**made)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of sae-lens, how to load the model
        with pytest.raises(UsageError, match=words) as caught:
            load(folder, tiny_llama)
    assert "\n" not in str(caught.value)


def test_a_person_may_know_better(saved: Saved, tiny_llama: LanguageModel) -> None:
    folder = saved(model_name="hub/other")
    assert load(folder, tiny_llama, site=Site("mlp_out", 2), allow_other_weights=True).site == Site("mlp_out", 2)
    with pytest.raises(UsageError, match="layers 0…3"):
        load(folder, tiny_llama, site=Site("mlp_out", 7), allow_other_weights=True)


def test_our_own_are_known_by_their_weights(
    recorded: Stream, tmp_path: Path, tiny_llama: LanguageModel, tiny_models: dict[str, LanguageModel]
) -> None:
    sae = train(recorded, SaeTraining(d_sae=48, k=4, batch=64, tokens=128), tmp_path / "run")
    ours = load(tmp_path / "run" / "sae", tiny_llama)
    assert (ours.site, ours.kind) == (sae.site, sae.kind) and torch.equal(ours.directions, sae.directions)
    with pytest.raises(UsageError, match="was trained on tiny-llama-0, not on tiny-mistral-0"):
        load(tmp_path / "run" / "sae", tiny_models["mistral"])


def test_what_is_not_there_or_damaged(saved: Saved, tiny_llama: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no cfg\.json; give a folder"):
        load(tmp_path / "nowhere", tiny_llama)
    folder = saved(**POST)
    content = (folder / "sae_weights.safetensors").read_bytes()
    (folder / "sae_weights.safetensors").write_bytes(content[:100])
    with pytest.raises(UsageError, match="is no SAE that sae-lens can load"):
        load(folder, tiny_llama)
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "sae_weights.safetensors").write_bytes(content)
    (folder / "cfg.json").write_text(json.dumps(config | {"architecture": "mine"}))
    with pytest.raises(UsageError, match="is no SAE that sae-lens can load"):
        load(folder, tiny_llama)
    with pytest.raises(UsageError, match=r"no-such-release x cannot be had \(.*not found"):
        load("no-such-release", tiny_llama, sae_id="x")


def test_importing_the_package_leaves_the_log_alone(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    level, filters = logging.getLogger("transformers").level, list(warnings.filters)
    package()
    assert logging.getLogger("transformers").level == level and warnings.filters == filters
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    with pytest.raises(UsageError, match=r"pip install steerlab\[saes\]"):
        package()
