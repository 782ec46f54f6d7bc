"""Vectors survive the disk exactly; damaged or foreign files are refused in one line with nothing half-written."""

from __future__ import annotations

import dataclasses
import errno
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from steerlab.adapters import Scope, SteeringVectors
from steerlab.adapters.formats import Provenance, load, own, save
from steerlab.errors import UsageError
from steerlab.models import LanguageModel, Site, tiny


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny.model("llama", seed=0)


@pytest.fixture(scope="module")
def provenance(model: LanguageModel) -> Provenance:
    return Provenance.of(model, recipe="rloo", reward="minus_one_one", seed=3)


def _vectors(
    model: LanguageModel, scope: Scope | None = None, kinds: tuple[str, ...] = ("resid_post",)
) -> SteeringVectors:
    generator = torch.Generator().manual_seed(5)
    sites = [Site(kind, layer) for kind in kinds for layer in (0, model.n_layers - 1)]
    drawn = {site: torch.randn(model.width(site.kind), generator=generator) for site in sites}
    return SteeringVectors(drawn, scope or Scope.all())


def _equal(ours: SteeringVectors, theirs: SteeringVectors) -> bool:
    return (
        ours.scope == theirs.scope
        and ours.sites == theirs.sites
        and all(torch.equal(ours.vectors[site], theirs.vectors[site]) for site in ours.sites)
    )


@pytest.mark.parametrize(
    "scope",
    [Scope.all(), Scope.prompt(), Scope.positions(2, 7), Scope.predicting(0, 1), Scope.after(17)],
    ids=lambda s: s.kind,
)
def test_own_file_gives_back_every_bit(tmp_path: Path, model, provenance, scope: Scope) -> None:
    vectors = _vectors(model, scope, ("resid_post", "mlp_out", "mlp_neurons"))
    path = tmp_path / "v.safetensors"
    save(path, vectors, provenance)
    assert _equal(load(path, model), vectors)
    assert _equal(load(path), vectors)
    assert own.provenance(path) == provenance


def test_metadata_is_what_the_design_lists(tmp_path: Path, model, provenance) -> None:
    save(tmp_path / "v.safetensors", _vectors(model), provenance)
    with safe_open(tmp_path / "v.safetensors", "pt") as file:
        metadata, names = file.metadata(), set(file.keys())
    assert names == {"vectors.resid_post.0", f"vectors.resid_post.{model.n_layers - 1}"}
    assert metadata == {
        "format": "pt",
        "schema": "steerlab steering vectors",
        "schema_version": "1",
        "model": model.name,
        "weights_sha256": model.weights_sha256,
        "config_sha256": model.config_sha256,
        "token_scope": '{"kind": "all", "start": 0, "stop": null, "token": null}',
        "d_model": str(model.d_model),
        "n_layers": str(model.n_layers),
        "norm_placement": "pre",
        "recipe": "rloo",
        "reward": "minus_one_one",
        "seed": "3",
        "tensors_sha256": metadata["tensors_sha256"],
    }


def test_equal_vectors_give_equal_bytes(tmp_path: Path, model, provenance) -> None:
    files = [tmp_path / f"{i}.safetensors" for i in range(4)]
    for path in files:
        save(path, _vectors(model), provenance)
    assert len({path.read_bytes() for path in files}) == 1


def test_unknown_provenance_stays_unknown(tmp_path: Path, model) -> None:
    save(tmp_path / "v.safetensors", _vectors(model), Provenance.of(model))
    assert own.provenance(tmp_path / "v.safetensors") == Provenance.of(model)


def test_other_weights_are_refused_unless_allowed(tmp_path: Path, model, provenance) -> None:
    path, vectors = tmp_path / "v.safetensors", _vectors(model)
    save(path, vectors, provenance)
    other = tiny.model("llama", seed=1)
    with pytest.raises(UsageError, match=r"other weights .*--allow-other-weights"):
        load(path, other)
    assert _equal(load(path, other, allow_other_weights=True), vectors)


@pytest.mark.parametrize("field", ["d_model", "n_layers"])
def test_other_sizes_are_refused_even_when_weights_may_differ(tmp_path: Path, model, provenance, field: str) -> None:
    path = tmp_path / "v.safetensors"
    theirs = getattr(provenance, field) + 1
    save(path, _vectors(model), dataclasses.replace(provenance, **{field: theirs}))
    with pytest.raises(UsageError, match=f"with {field} {theirs}, but .* has {theirs - 1}"):
        load(path, model, allow_other_weights=True)


def test_layer_that_its_own_model_lacks_is_refused(tmp_path: Path, model, provenance) -> None:
    path = tmp_path / "v.safetensors"
    save(path, SteeringVectors({Site("resid_post", 99): torch.ones(model.d_model)}), provenance)
    with pytest.raises(UsageError, match="layer 99, its model only layers 0 to"):
        load(path)


def _flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def _cut_into_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _text(path: Path) -> None:
    path.write_text("not a model")


def _foreign(path: Path) -> None:
    save_file({"weight": torch.ones(3)}, path)


def _newer(path: Path) -> None:
    _rewrite(path, schema_version="2")


def _without_sizes(path: Path) -> None:
    _rewrite(path, d_model="many")


def _without_scope(path: Path) -> None:
    _rewrite(path, token_scope="{}}")


def _other_scope(path: Path) -> None:
    _rewrite(path, token_scope='{"kind": "sometimes"}')


def _rewrite(path: Path, **changes: str) -> None:
    """Other metadata over the same tensors."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] |= changes
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_flip_last_byte, "fails its checksum"),
        (_truncate, "not a whole safetensors file"),
        (_cut_into_header, "not a whole safetensors file"),
        (_empty, "not a whole safetensors file"),
        (_text, "not a whole safetensors file"),
        (_foreign, "holds no steering vectors of steerlab"),
        (_newer, "schema version 2, this steerlab reads 1; update"),
        (_without_sizes, "does not say which model"),
        (_without_scope, "no token scope that is known"),
        (_other_scope, "no token scope that is known"),
        (Path.unlink, "does not exist"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_damaged_and_foreign_files_are_refused_in_one_line(
    tmp_path: Path, model, provenance, damage: Callable[[Path], None], message: str
) -> None:
    path = tmp_path / "v.safetensors"
    save(path, _vectors(model), provenance)
    damage(path)
    with pytest.raises(UsageError, match=message) as caught:
        load(path, model)
    assert "\n" not in str(caught.value)


def test_npy_is_the_authors_array_both_ways(tmp_path: Path, model, provenance) -> None:
    vectors, path = _vectors(model), tmp_path / "v.npy"
    save(path, vectors, provenance)
    rows = np.load(path, allow_pickle=False)
    assert rows.shape == (model.n_layers, model.d_model) and rows.dtype == np.float32
    for layer in range(model.n_layers):
        expected = vectors.vectors.get(Site("resid_post", layer), torch.zeros(model.d_model))
        np.testing.assert_array_equal(rows[layer], expected.detach().numpy())
    assert _equal(load(path, model), vectors)


def test_npy_of_zeros_has_a_vector_at_every_layer(tmp_path: Path, model) -> None:
    np.save(tmp_path / "v.npy", np.zeros((model.n_layers, model.d_model), dtype=np.float16))
    loaded = load(tmp_path / "v.npy", model)
    assert loaded.layers == tuple(range(model.n_layers))
    assert all(vector.dtype == torch.float32 for vector in loaded.parameters())


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 3), dtype=np.float32), "belong to another model"),
        (np.zeros(3, dtype=np.float32), r"float32 of shape \(3,\)"),
        (np.zeros((2, 3), dtype=np.int64), "int64 of shape"),
        (np.zeros((0, 3), dtype=np.float32), "of shape"),
        (np.full((2, 3), np.nan), "not finite"),
        (np.full((2, 3), 1e300), "not finite"),
        (np.array([[{}]], dtype=object), "without pickles"),
    ],
)
def test_arrays_that_are_no_vectors_are_refused(tmp_path: Path, model, array: np.ndarray, message: str) -> None:
    np.save(tmp_path / "v.npy", array, allow_pickle=True)
    with np.errstate(over="ignore"), pytest.raises(UsageError, match=message):
        load(tmp_path / "v.npy", model)


def test_broken_npy_files_are_refused(tmp_path: Path, model) -> None:
    path = tmp_path / "v.npy"
    with pytest.raises(UsageError, match="does not exist"):
        load(path, model)
    np.save(path, np.zeros((model.n_layers, model.d_model)))
    whole = path.read_bytes()
    for content in (whole[:-8], whole[:20], b"", b"text"):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=r"not a whole \.npy array"):
            load(path, model)
    archive = tmp_path / "v.npz"
    np.savez(archive, a=np.zeros((2, 2)))
    archive.rename(path)
    with pytest.raises(UsageError, match="archive of arrays"):
        load(path, model)


def test_npy_refuses_what_it_cannot_say(tmp_path: Path, model, provenance) -> None:
    path = tmp_path / "v.npy"
    with pytest.raises(UsageError, match="resid_post only, not mlp_out"):
        save(path, _vectors(model, kinds=("mlp_out",)), provenance)
    with pytest.raises(UsageError, match="token scope 'prompt'"):
        save(path, _vectors(model, Scope.prompt()), provenance)
    with pytest.raises(UsageError, match="does not fit"):
        save(path, _vectors(model), dataclasses.replace(provenance, n_layers=1))
    assert not list(tmp_path.iterdir())


def test_unknown_suffix_is_refused_with_the_known_ones(tmp_path: Path, model, provenance) -> None:
    with pytest.raises(UsageError, match=r"use \.safetensors or \.npy"):
        save(tmp_path / "v.pt", _vectors(model), provenance)
    with pytest.raises(UsageError, match=r"use \.safetensors or \.npy"):
        load(tmp_path / "v.pkl", model)


@pytest.mark.parametrize("suffix", [".safetensors", ".npy"])
def test_full_disk_leaves_the_old_file(tmp_path: Path, model, provenance, monkeypatch, suffix: str) -> None:
    path = tmp_path / f"v{suffix}"
    save(path, _vectors(model), provenance)
    before = path.read_bytes()

    def full(self: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UsageError, match="disk is full"):
        save(path, _vectors(model) * 2.0, provenance)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
