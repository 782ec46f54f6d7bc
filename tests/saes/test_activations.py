"""Every position once, the model's own values, one order, the same bytes after a kill; and what is refused."""

from __future__ import annotations

import shutil
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from steerlab.adapters import Scope, SteeringVectors
from steerlab.errors import RunFailed, UsageError
from steerlab.interp.texts import Text
from steerlab.models import LanguageModel, Site, tiny
from steerlab.saes import activations
from steerlab.saes.activations import Activations, fed_together, record, values
from steerlab.saes.streams import Stream

POST = Site("resid_post", 2)
TEXTS = [
    Text(tuple(torch.randint(5, 261, (n,), generator=torch.Generator().manual_seed(n)).tolist()), 1 + n // 3)
    for n in (9, 14, 1, 30, 14, 22, 5, 40, 9, 17)
]
SMALL = Activations(POST, buffer=50, batch_tokens=64)


def by_place(stream: Stream) -> dict[tuple[int, int], torch.Tensor]:
    rows = stream.rows(0, len(stream))
    places = list(zip(rows.text.tolist(), rows.position.tolist(), strict=True))
    assert len(set(places)) == len(places) == len(stream)  # each counted once
    return dict(zip(places, rows.activations, strict=True))


def order(stream: Stream) -> list[tuple[int, int]]:
    return list(by_place(stream))


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *(("llama", kind) for kind in ("resid_pre", "attn_out", "mlp_out", "z", "mlp_neurons")),
        *((family, "resid_post") for family in ("llama", "gemma3", "gpt2", "gpt_neo", "gpt_neox")),
    ],
)
def test_every_position_has_the_value_of_the_whole_forward(
    family: str, kind: str, tiny_models: dict[str, LanguageModel]
) -> None:
    model, site = tiny_models[family], Site(kind, 1)
    found = by_place(record(model, TEXTS, Activations(site, buffer=50, batch_tokens=64)))
    assert set(found) == {(i, p) for i, text in enumerate(TEXTS) for p in range(1, len(text.tokens))}
    for number in (0, 3, 7):
        with torch.no_grad():
            whole = model.cache(torch.tensor([TEXTS[number].tokens]), [site])[site][0]
        ours = torch.stack([found[number, p] for p in range(1, len(TEXTS[number].tokens))])
        torch.testing.assert_close(ours, whole[1:], rtol=1e-4, atol=1e-5)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.hf.modules())
    assert not any("forward" in vars(block) for block in model.blocks)


@pytest.mark.parametrize("scope", [Scope.all(), Scope.generated(), Scope.predicting(0, 1)])
def test_a_difference_is_what_two_whole_passes_differ_by(scope: Scope) -> None:
    model = tiny.model("llama", dtype=torch.float64)
    vectors = SteeringVectors({Site("resid_post", 1): torch.linspace(-1, 1, 32)}, scope)
    wanted = Activations(Site("attn_out", 3), "difference", skip=0, buffer=50, batch_tokens=64)
    found = by_place(record(model, TEXTS, wanted, vectors))
    for number, text in enumerate(TEXTS):
        tokens = torch.tensor([text.tokens])
        (fed,) = fed_together([text], [0], 1_000, model.device)
        with torch.no_grad():
            base = model.cache(tokens, [wanted.site])[wanted.site]
            with vectors.attach(model, layout=fed.layout):
                steered = model.cache(tokens, [wanted.site])[wanted.site]
        ours = torch.stack([found[number, p] for p in range(len(text.tokens))])
        torch.testing.assert_close(ours, (steered - base)[0].float(), rtol=1e-5, atol=1e-6)
        if scope.kind == "generated":
            assert not ours[: text.n_prompt].any()


def test_a_difference_of_bf16_states_is_taken_in_fp32() -> None:
    model = tiny.model("llama", dtype=torch.bfloat16)
    vectors = SteeringVectors({Site("resid_post", 1): torch.full((32,), 0.01)})
    (fed,) = fed_together(TEXTS, [3], 1_000, model.device)
    wanted = Activations(POST, "difference")
    with torch.no_grad():
        base = model.cache(fed.tokens, [POST])[POST].float()
        with vectors.attach(model):
            steered = model.cache(fed.tokens, [POST])[POST].float()
    found, own = activations.values(model, vectors, fed, wanted)
    assert torch.equal(own.float(), base)
    assert found.dtype == torch.float32 and torch.equal(found, steered - base)


def test_which_positions_are_kept(tiny_llama: LanguageModel) -> None:
    found = order(record(tiny_llama, TEXTS, Activations(POST, skip=4, generated_only=True)))
    assert set(found) == {(i, p) for i, t in enumerate(TEXTS) for p in range(max(4, t.n_prompt), len(t.tokens))}


def _longer(x: torch.Tensor) -> torch.Tensor:
    """The last position of the text of 30 tokens and the fifth of that of 40 become sinks."""
    changed = x.clone()
    if x.shape[1] in (30, 40):
        changed[0, 29 if x.shape[1] == 30 else 5] *= 100
    return changed


def test_sinks_are_left_out_wherever_they_are(tiny_llama: LanguageModel, tmp_path: Path) -> None:
    plain = order(record(tiny_llama, TEXTS, SMALL))
    alone = Activations(POST, buffer=50, batch_tokens=1)
    with tiny_llama.intervene({POST: _longer}):
        found = record(tiny_llama, TEXTS, alone, folder=tmp_path / "s", shard_tokens=16)
        everything = record(tiny_llama, TEXTS, Activations(POST, buffer=50, batch_tokens=1, sink=None))
    assert order(found) == [place for place in plain if place not in {(3, 29), (7, 5)}]
    assert order(everything) == plain
    assert found.origin is not None and found.origin.n_tokens == len(found) + 2


def test_the_order_is_shuffled_within_buffers_and_depends_on_nothing_else(
    tiny_llama: LanguageModel, tmp_path: Path
) -> None:
    first = order(record(tiny_llama, TEXTS, SMALL))
    starts = [first.index(place) for place in sorted(first)]
    assert starts != sorted(starts)
    assert {text for text, _ in first[:50]} == {0, 1, 3}  # 8 + 13 + 0 + 29 tokens, then the next does not fit
    other_batches = record(tiny_llama, TEXTS, Activations(POST, buffer=50, batch_tokens=1))
    assert order(other_batches) == first
    for shard in (7, 64, 10_000):
        on_disk = record(tiny_llama, TEXTS, SMALL, folder=tmp_path / str(shard), shard_tokens=shard)
        assert order(on_disk) == first
        assert max(map(len, on_disk.parts)) == min(shard, len(first))
    assert order(record(tiny_llama, TEXTS, Activations(POST, buffer=50, seed=1))) != first


def test_a_killed_stream_goes_on_to_the_same_bytes(
    tiny_llama: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    record(tiny_llama, TEXTS, SMALL, folder=whole, shard_tokens=16)
    for kill_after in (1, 3):  # the second time it has been resumed once
        left = iter(range(kill_after))

        def stopping(*arguments: Any, left: Iterator[int] = left) -> Any:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return values(*arguments)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(activations, "values", stopping)
            record(tiny_llama, TEXTS, SMALL, folder=killed, shard_tokens=16)
        with pytest.raises(UsageError, match=r"killed (is not complete yet|holds no activations)"):
            Stream.open(killed)
    stream = record(tiny_llama, TEXTS, SMALL, folder=killed, shard_tokens=16)
    assert len(stream) == 151
    names = sorted(path.name for path in whole.iterdir())
    assert names == sorted(path.name for path in killed.iterdir()) and len(names) == 11
    assert all((whole / name).read_bytes() == (killed / name).read_bytes() for name in names)


def test_a_finished_stream_is_read_and_not_computed(
    tiny_llama: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = record(tiny_llama, TEXTS, SMALL, folder=tmp_path / "s")
    monkeypatch.setattr(activations, "values", None)
    again = record(tiny_llama, TEXTS, SMALL, folder=tmp_path / "s")
    assert again.origin == first.origin and again.origin is not None and again.origin.hf_hook_name == "model.layers.2"
    assert torch.equal(again.rows(0, 151).activations, first.rows(0, 151).activations)


def test_batches_follow_each_other_and_begin_again() -> None:
    stream = Stream.of(torch.arange(10.0)[:, None].bfloat16())
    assert stream.batch(0, 4).dtype == torch.float32
    assert [stream.batch(step, 4).flatten().tolist() for step in (0, 1, 2)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 0, 1],
    ]
    assert stream.batch(0, 23).flatten().tolist() == [*range(10), *range(10), 0, 1, 2]


def test_bf16_is_kept_as_it_is(tmp_path: Path) -> None:
    model = tiny.model("llama", dtype=torch.bfloat16)
    stream = record(model, TEXTS, Activations(POST, dtype="bf16"), folder=tmp_path / "s")
    assert stream.parts[0].activations.dtype == torch.bfloat16


def test_too_little_disk_is_said_before_anything_is_written(
    tiny_llama: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**30, 2**30, 2**20))
    with pytest.raises(UsageError, match=r"151 activations take 0\.06 GiB and .* has 0\.00 GiB free"):
        record(tiny_llama, TEXTS, SMALL, folder=tmp_path / "deep" / "s")
    assert not list(tmp_path.iterdir())


def test_a_damaged_shard_is_one_line(tiny_llama: LanguageModel, tmp_path: Path) -> None:
    record(tiny_llama, TEXTS, SMALL, folder=tmp_path / "s", shard_tokens=50)
    shard = tmp_path / "s" / "activations-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UsageError, match=r"activations-00001.safetensors fails its checksum"):
        Stream.open(tmp_path / "s")
    with pytest.raises(UsageError, match="fails its checksum"):
        record(tiny_llama, TEXTS, SMALL, folder=tmp_path / "s", shard_tokens=50)
    shard.unlink()
    with pytest.raises(UsageError, match="is missing"):
        Stream.open(tmp_path / "s")


def test_another_stream_is_not_mixed_in(tiny_llama: LanguageModel, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    record(tiny_llama, TEXTS, SMALL, folder=folder)
    for texts, wanted, model in [
        (TEXTS[1:], SMALL, tiny_llama),
        (TEXTS, Activations(POST, seed=1, buffer=50), tiny_llama),
        (TEXTS, SMALL, tiny.model("llama", seed=1)),
    ]:
        with pytest.raises(UsageError, match="another model, adapter, text or configuration"):
            record(model, texts, wanted, folder=folder)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match="holds no activations; choose a new or empty folder"):
        record(tiny_llama, TEXTS, SMALL, folder=tmp_path / "other")
    with pytest.raises(UsageError, match=r"no manifest\.json"):
        Stream.open(tmp_path / "other")


def test_what_is_not_finite_is_refused_with_its_place() -> None:
    model = tiny.model("llama")
    with model.intervene({POST: _broken}), pytest.raises(RunFailed, match=r"text 7, position 33\)"):
        record(model, TEXTS, SMALL)


def _broken(x: torch.Tensor) -> torch.Tensor:
    changed = x.clone()
    if x.shape[1] == 40:
        changed[0, 33, 5] = torch.nan
    return changed


@pytest.mark.parametrize(
    ("wanted", "adapter", "words"),
    [
        ((Site("resid_post", 4),), None, "layers 0…3"),
        ((Site("ln1_post", 1),), None, "this architecture has none"),
        ((Site("pattern", 1),), None, "no fixed width"),
        ((POST, "difference"), None, "needs an adapter"),
        ((Site("attn_out", 1), "difference"), 1, "first acts behind attn_out.1"),
        ((POST, "residual", 40), None, "no position is left with skip 40"),
    ],
)
def test_what_cannot_be_recorded(
    wanted: tuple[object, ...], adapter: int | None, words: str, tiny_llama: LanguageModel
) -> None:
    vectors = None if adapter is None else SteeringVectors({Site("resid_post", adapter): torch.ones(32)})
    with pytest.raises(UsageError, match=words):
        record(tiny_llama, TEXTS, Activations(*wanted), vectors)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="counts"):
        Activations(POST, skip=-1)
    with pytest.raises(UsageError, match="above 1"):
        Activations(POST, sink=1.0)
    with pytest.raises(UsageError, match="buffer is 0"):
        Activations(POST, buffer=0)
