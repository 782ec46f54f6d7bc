"""PEFT reads our folder and gives the same logits; we read PEFT's; what we cannot hold is refused in one line."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from steerlab.adapters import LoRA, LoRAWeights, formats
from steerlab.adapters.formats import Provenance, file_name, load_adapter, peft, save
from steerlab.errors import UsageError
from steerlab.models import LanguageModel, tiny

# PEFT asks transformers for something that it renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

TOKENS = torch.randint(5, 261, (2, 9), generator=torch.Generator().manual_seed(7))
SPECS = {
    "llama": [LoRA(4, 8.0), LoRA(2, 3.5, ("q_proj", "down_proj")), LoRA(2, 1.0, ("v_proj", "mlp.up_proj"), (1, 3))],
    "gpt2": [LoRA(4, 8.0), LoRA(3, 6.0, ("c_attn", "mlp.c_proj"), (0, 2)), LoRA(2, 2.0, layers=(1,))],
    "gpt_neox": [LoRA(2, 4.0, ("query_key_value", "dense_4h_to_h"))],
    "gemma3": [LoRA(2, 4.0, layers=(0, 3))],
}


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny.model("llama", seed=0)


def drawn(model: LanguageModel, spec: LoRA, seed: int = 1) -> LoRAWeights:
    weights = spec.init(model, torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in weights.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return weights


def logits(model: LanguageModel, weights: LoRAWeights) -> torch.Tensor:
    with torch.no_grad(), weights.attach(model):
        return model.logits(TOKENS)


def trained_by_peft(model: LanguageModel, folder: Path, **options: Any) -> torch.Tensor:
    """A folder as PEFT writes it, with B not zero, and that model's logits."""
    config = LoraConfig(task_type="CAUSAL_LM", **options)
    twin = get_peft_model(tiny.model(model.family, dtype=model.dtype).hf, config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        twin.save_pretrained(folder)
        return twin(TOKENS).logits


def same(a: LoRAWeights, b: LoRAWeights) -> bool:
    ours, theirs = a.snapshot(), b.snapshot()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(("family", "spec"), [(family, spec) for family, specs in SPECS.items() for spec in specs])
def test_peft_reads_our_folder(tmp_path: Path, family: str, spec: LoRA) -> None:
    model = tiny.model(family, dtype=torch.float64)
    weights = drawn(model, spec)
    save(tmp_path / "a", weights, Provenance.of(model))
    twin = PeftModel.from_pretrained(tiny.model(family, dtype=torch.float64).hf, tmp_path / "a")
    adapted = {n for n, _ in twin.named_parameters() if "lora_" in n}
    assert adapted == {f"base_model.model.{n}".replace(".weight", ".default.weight") for n in weights.snapshot()}
    assert torch.allclose(logits(model, weights), twin(TOKENS).logits, rtol=0, atol=1e-10)
    again = load_adapter(tmp_path / "a", model)
    assert same(again, weights) and torch.equal(logits(model, again), logits(model, weights))
    assert again.spec.init(model).snapshot().keys() == weights.snapshot().keys(), "the spec names other modules"
    assert again.transposed is weights.transposed is (family == "gpt2")


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"r": 4}),
        ("llama", {"r": 4, "lora_alpha": 3, "target_modules": "all-linear"}),
        ("llama", {"r": 2, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1, 2]}),
        (
            "llama",
            {"r": 2, "target_modules": ["q_proj", "v_proj"], "layers_to_transform": 2, "layers_pattern": "layers"},
        ),
        ("llama", {"r": 2, "target_modules": r".*\.[02]\..*up_proj"}),
        ("llama", {"r": 2, "target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]}),
        ("llama", {"r": 4, "lora_alpha": 6, "use_rslora": True}),
        ("llama", {"r": 4, "lora_dropout": 0.1, "init_lora_weights": "gaussian"}),
        ("gpt2", {"r": 4, "fan_in_fan_out": True}),
        ("gpt2", {"r": 4, "target_modules": "all-linear", "fan_in_fan_out": True}),
    ],
    ids=str,
)
def test_we_read_pefts_folder(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    model = tiny.model(family)
    expected = trained_by_peft(model, tmp_path, **options)
    weights = load_adapter(tmp_path, model)
    assert torch.allclose(logits(model, weights), expected, rtol=1e-5, atol=1e-4)
    assert weights.spec.init(model).snapshot().keys() == weights.snapshot().keys()
    assert all(p.dtype == torch.float32 for p in weights.parameters())


def test_our_files_are_those_of_peft(tmp_path: Path, model) -> None:
    trained_by_peft(model, tmp_path / "theirs", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    save(tmp_path / "ours", drawn(model, LoRA(4, 8.0, ("q_proj", "v_proj"))), Provenance.of(model))
    assert {p.name for p in (tmp_path / "ours").iterdir()} == {peft.CONFIG, peft.TENSORS}
    ours, theirs = (load_file(tmp_path / who / peft.TENSORS) for who in ("ours", "theirs"))
    assert {n: (t.shape, t.dtype) for n, t in ours.items()} == {n: (t.shape, t.dtype) for n, t in theirs.items()}
    config, oracle = (json.loads((tmp_path / who / peft.CONFIG).read_text()) for who in ("ours", "theirs"))
    oracle["target_modules"] = sorted(oracle["target_modules"])
    oracle["base_model_name_or_path"] = model.name
    assert config == {name: oracle[name] for name in config}


def test_equal_weights_give_equal_bytes(tmp_path: Path, model) -> None:
    for name in "abc":
        save(tmp_path / name, drawn(model, LoRA(2)), Provenance.of(model, recipe="rloo", seed=3))
    for file in (peft.CONFIG, peft.TENSORS):
        assert len({(tmp_path / name / file).read_bytes() for name in "abc"}) == 1


def test_other_weights_are_refused_unless_allowed(tmp_path: Path, model) -> None:
    weights, origin = drawn(model, LoRA(2)), Provenance.of(model, recipe="rloo", reward="r", seed=3)
    save(tmp_path / "a", weights, origin)
    assert formats.provenance(tmp_path / "a") == origin
    other = tiny.model("llama", seed=1)
    with pytest.raises(UsageError, match=r"other weights .*--allow-other-weights"):
        load_adapter(tmp_path / "a", other)
    assert same(load_adapter(tmp_path / "a", other, allow_other_weights=True), weights)
    assert same(load_adapter(tmp_path / "a"), weights)
    with pytest.raises(UsageError, match="another model"):
        load_adapter(tmp_path / "a", tiny.model("qwen3"), allow_other_weights=True)


def _config(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / peft.CONFIG).read_text())
        (folder / peft.CONFIG).write_text(json.dumps(config | changes))

    return damage


def _tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        save_file(change(load_file(folder / peft.TENSORS)), folder / peft.TENSORS)

    return damage


def _pickled(folder: Path) -> None:
    (folder / peft.TENSORS).rename(folder / "adapter_model.bin")


def _truncated(folder: Path) -> None:
    (folder / peft.TENSORS).write_bytes((folder / peft.TENSORS).read_bytes()[:-5])


def _flipped(folder: Path) -> None:
    content = bytearray((folder / peft.TENSORS).read_bytes())
    content[-1] ^= 1
    (folder / peft.TENSORS).write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_config(use_dora=True), "use_dora = True, which is not supported"),
        (_config(bias="all"), "bias = 'all'"),
        (_config(lora_bias=True), "lora_bias"),
        (_config(modules_to_save=["lm_head"]), "modules_to_save"),
        (_config(rank_pattern={"q_proj": 2}), "rank_pattern"),
        (_config(alpha_pattern={"q_proj": 2}), "alpha_pattern"),
        (_config(target_parameters=["experts"]), "target_parameters"),
        (_config(option_of_tomorrow={"a": 1}), "option_of_tomorrow"),
        (_config(init_lora_weights="pissa"), "'pissa', which changed the frozen weights"),
        (_config(peft_type="IA3"), "of type IA3; only LORA"),
        (_config(r=0), "r 0 and lora_alpha"),
        (_config(lora_alpha=None), "both must be numbers"),
        (_config(r=3), "no whole pair of rank 3"),
        (_tensors(lambda t: dict(list(t.items())[1:])), "no whole pair of rank 2"),
        (_tensors(lambda t: t | {"base_model.model.lm_head.lora_A.weight": torch.ones(2, 2)}), "holds .*lm_head"),
        (_tensors(lambda t: t | {"base_model.model.a.0.q.lora_magnitude_vector": torch.ones(2)}), "magnitude"),
        (_tensors(lambda t: {}), "holds no tensors"),
        (_pickled, "a pickle is not read"),
        (_truncated, "not a whole safetensors file"),
        (_flipped, "fails its checksum"),
        (lambda folder: (folder / peft.CONFIG).write_text("[]"), "no PEFT configuration"),
        (lambda folder: (folder / peft.CONFIG).write_text("{"), "cannot be read"),
        (lambda folder: (folder / peft.CONFIG).unlink(), "does not exist"),
    ],
)
def test_what_is_not_a_plain_lora_is_refused_in_one_line(
    tmp_path: Path, model, damage: Callable[[Path], None], message: str
) -> None:
    folder = tmp_path / "a"
    save(folder, drawn(model, LoRA(2)), Provenance.of(model))
    damage(folder)
    with pytest.raises(UsageError, match=message) as caught:
        load_adapter(folder, model)
    assert "\n" not in str(caught.value)


def test_a_folder_of_peft_names_no_weights(tmp_path: Path, model) -> None:
    save(tmp_path / "a", drawn(model, LoRA(2)), Provenance.of(model))
    _tensors(dict)(tmp_path / "a")
    load_adapter(tmp_path / "a", tiny.model("llama", seed=1))
    with pytest.raises(UsageError, match="add --model NAME"):
        formats.provenance(tmp_path / "a")


def test_full_disk_leaves_the_old_folder(tmp_path: Path, model, monkeypatch) -> None:
    save(tmp_path / "a", drawn(model, LoRA(2)), Provenance.of(model))
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    write = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        if peft.TENSORS in self.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UsageError, match="disk is full"):
        save(tmp_path / "a", drawn(model, LoRA(3), seed=2), Provenance.of(model))
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == before


def test_an_adapter_without_a_format_is_refused(tmp_path: Path, model) -> None:
    from steerlab.adapters import RowBank, Steering

    bank = RowBank([Steering().init(model)])
    with pytest.raises(UsageError, match="RowBank has no file format"):
        file_name(bank)
    with pytest.raises(UsageError, match="RowBank has no file format"):
        save(tmp_path / "a", bank, Provenance.of(model))
    assert not list(tmp_path.iterdir())
