"""A tuned lens on disk is tuned-lens' own folder; damaged or foreign ones are refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from steerlab.adapters import Translators, TunedLens, formats
from steerlab.adapters.formats import Provenance, load_tuned_lens, tuned_lens
from steerlab.errors import UsageError
from steerlab.models import LanguageModel, tiny


@pytest.fixture
def lens(tiny_llama: LanguageModel) -> TunedLens:
    made = Translators((0, 2)).init(tiny_llama)
    draw = torch.Generator().manual_seed(0)
    made.restore({name: torch.randn(x.shape, generator=draw) for name, x in made.snapshot().items()})
    return made


@pytest.fixture
def folder(lens: TunedLens, tiny_llama: LanguageModel, tmp_path: Path) -> Path:
    origin = Provenance.of(tiny_llama, recipe="tuned_lens", seed=3, corpus="own prose abc")
    formats.save(tmp_path / "lens", lens, origin, tuned_lens.hash_of(tiny_llama.unembedding.weight))
    return tmp_path / "lens"


def test_it_comes_back_bit_for_bit(folder: Path, lens: TunedLens, tiny_llama: LanguageModel) -> None:
    again = load_tuned_lens(folder, tiny_llama)
    assert again.layers == lens.layers and again.n_layers == 4
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), lens.parameters(), strict=True))
    assert tuned_lens.provenance(folder).corpus == "own prose abc"
    assert formats.file_name(lens) == "tuned_lens"


def test_equal_lenses_are_equal_bytes(folder: Path, lens: TunedLens, tiny_llama: LanguageModel, tmp_path: Path) -> None:
    origin = Provenance.of(tiny_llama, recipe="tuned_lens", seed=3, corpus="own prose abc")
    formats.save(tmp_path / "again", lens, origin, tuned_lens.hash_of(tiny_llama.unembedding.weight))
    for name in ("config.json", "params.pt"):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_torch_alone_reads_it_as_tuned_lens_would(folder: Path, lens: TunedLens, tiny_llama: LanguageModel) -> None:
    """One linear module per hidden state below the last, the embeddings' first, each adding to what it reads."""
    config = json.loads((folder / "config.json").read_text())
    assert {"base_model_name_or_path", "d_model", "num_hidden_layers", "bias", "lens_type"} <= config.keys()
    modules = torch.nn.ModuleList(
        [torch.nn.Linear(config["d_model"], config["d_model"]) for _ in range(config["num_hidden_layers"])]
    )
    modules.load_state_dict(torch.load(folder / "params.pt", weights_only=True))
    tokens = torch.arange(30, 50)[None]
    own = tiny.model("llama").hf  # asked for hidden states, transformers leaves hooks behind
    hidden = own(tokens, output_hidden_states=True).hidden_states
    for i, h in enumerate(hidden[:-1]):
        theirs = h + modules[i](h)
        torch.testing.assert_close(theirs, h if i == 0 else lens(i - 1, h), rtol=1e-5, atol=1e-5)
    assert config["unembed_hash"] == tuned_lens.hash_of(tiny_llama.unembedding.weight.bfloat16().float())


def test_a_folder_of_tuned_lens_itself(tmp_path: Path, tiny_llama: LanguageModel) -> None:
    """Without our entry, and with a translator of the embeddings, which is not read; biases may be missing."""
    config = {"base_model_name_or_path": "x", "d_model": 32, "num_hidden_layers": 4, "bias": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    state = {f"{i}.weight": torch.full((32, 32), float(i + 1)) for i in range(4)}
    torch.save(state, tmp_path / "params.pt")
    lens = load_tuned_lens(tmp_path, tiny_llama)
    assert [float(weight.detach()[0, 0]) for weight, _ in lens.maps.values()] == [2.0, 3.0, 4.0]
    assert not any(bias.any() for _, bias in lens.maps.values())
    with pytest.raises(UsageError, match="add --model"):
        tuned_lens.provenance(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    torch.save({name: state[name] for name in list(state)[:3]}, tmp_path / "params.pt")
    with pytest.raises(UsageError, match="3 layers of width 32, tiny-llama-0 has 4"):
        load_tuned_lens(tmp_path, tiny_llama)


def test_what_is_refused(folder: Path, tmp_path: Path) -> None:
    def refused(match: str, **options: object) -> None:
        with pytest.raises(UsageError, match=match) as said:
            load_tuned_lens(folder, **options)
        assert "\n" not in str(said.value)

    refused("other weights", model=tiny.model("llama", seed=1))
    refused("other weights", model=tiny.model("gpt2"))
    assert load_tuned_lens(folder, tiny.model("llama", seed=1), allow_other_weights=True).layers == (0, 2)
    with pytest.raises(UsageError, match="nothing that steers"):
        formats.load_adapter(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    refused("do not belong together")
    (folder / "config.json").write_text(json.dumps(config | {"lens_type": "other"}))
    refused("no linear tuned lens")
    (folder / "config.json").write_text(json.dumps(config))
    state = torch.load(folder / "params.pt", weights_only=True)
    torch.save(state | {"1.bias": torch.full((32,), torch.nan)}, folder / "params.pt")
    refused("not finite")
    torch.save(state | {"1.bias": torch.ones(32)}, folder / "params.pt")
    refused("checksum")
    torch.save({"0.weight": print}, folder / "params.pt")
    refused("tensors alone")
    (folder / "params.pt").unlink()
    refused("does not exist")
    (folder / "config.json").write_text("{")
    refused("cannot be read")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        load_tuned_lens(tmp_path / "nothing")
