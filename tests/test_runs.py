"""The run folder: atomic, deterministic, refusing what is not its own."""

from __future__ import annotations

import dataclasses
import enum
import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch

from steerlab.errors import UsageError
from steerlab.runs import (
    CostLedger,
    Run,
    RunStore,
    atomic_path,
    atomic_write,
    decode,
    encode,
    environment,
    tensors_sha256,
)
from steerlab.runs import files as files_module
from steerlab.tasks import make as make_task


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass(frozen=True)
class Part:
    rate: float
    layers: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Whole:
    part: Part
    colour: Colour = Colour.RED
    table: dict = dataclasses.field(default_factory=dict)


@pytest.fixture(autouse=True)
def room(monkeypatch):
    """A module inside steerlab that defines the classes above, since nothing else can be named in a run."""
    module = types.ModuleType("steerlab.room_of_test_runs")
    for kind in (Colour, Part, Whole):
        monkeypatch.setattr(kind, "__module__", module.__name__)
        setattr(module, kind.__name__, kind)
    module.system = os.system
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def whole() -> Whole:
    return Whole(Part(0.006, (1, 2)), table={3: (1, [2.5, None]), "a": {"x"}, Path("p/q"): frozenset({1})})


def test_codec_round_trips_through_json_text():
    value = {"whole": whole(), "inf": float("inf"), "nested": [(1,), {"k": True}], "dollar": {"$type": "text"}}
    text = json.dumps(encode(value), sort_keys=True, allow_nan=False)
    assert decode(json.loads(text)) == value
    assert (
        encode(np.float32(0.5)) == 0.5
        and encode(np.int64(3)) == 3
        and encode(CostLedger) == {"$name": "steerlab.runs.cost:CostLedger"}
    )


@pytest.mark.parametrize(
    "value",
    [
        {"$type": "os:system"},
        {"$name": "subprocess:Popen"},
        {"$name": "steerlab.room_of_test_runs:system"},
        {"$name": "steerlab_evil.x:y"},
        {"$name": "steerlab.runs.files:os.system"},
        {"$type": "steerlab.runs.nothing:X"},
        {"$type": "steerlab.room_of_test_runs:Nothing"},
        {"$type": "steerlab.runs.files:atomic_write"},
        {"$type": "steerlab.room_of_test_runs:Part", "rate": 1.0, "rat": 2.0},
        {"$type": "steerlab.room_of_test_runs:Part"},
        {"$enum": "steerlab.room_of_test_runs:Colour", "name": "GREEN"},
        {"$enum": "steerlab.room_of_test_runs:Part", "name": "RED"},
    ],
)
def test_codec_refuses_in_one_line(value):
    with pytest.raises(UsageError) as caught:
        decode(value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [lambda x: x, object(), os.system, Path.cwd, torch.ones(2)])
def test_codec_refuses_to_write_what_it_could_not_read(value):
    with pytest.raises(UsageError):
        encode(value)


def test_atomic_write_replaces_or_leaves(tmp_path):
    path = tmp_path / "deep" / "a.json"
    atomic_write(path, "é \ud800")
    assert path.read_text("utf-8") == "é \ufffd"
    with pytest.raises(ZeroDivisionError), atomic_path(path) as temporary:
        assert temporary.suffix == ".json" and temporary.parent == path.parent
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text("utf-8") == "é \ufffd" and list(path.parent.iterdir()) == [path]


def test_cannot_write_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="not a folder"):
        atomic_write(tmp_path / "file" / "x", "")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match="folder of that name"):
        atomic_write(tmp_path / "folder", "")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files_module.os, "fsync", full)
    with pytest.raises(UsageError, match="disk is full"):
        atomic_write(tmp_path / "y", "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_a_field_that_a_later_version_added_makes_no_other_experiment(tmp_path):
    wanted = make_task("chain_sum")
    run = Run.create(tmp_path / "run", wanted)
    del run.manifest["experiment"]["layout"]["opening"]  # as a version wrote it that did not know the field
    run.update()
    assert Run.create(tmp_path / "run", wanted).experiment == wanted
    with pytest.raises(UsageError, match="another configuration"):
        Run.create(tmp_path / "run", wanted.opened("7"))


def test_create_open_update(tmp_path):
    run = Run.create(tmp_path / "run", whole(), seed=3, model="tiny")
    run.update(vectors_sha256="00")
    again = Run.open(tmp_path / "run")
    assert again.experiment == whole() and again.manifest["seed"] == 3 and again.manifest["vectors_sha256"] == "00"
    assert again.manifest["environment"]["versions"]["torch"] == torch.__version__.split("+")[0]
    assert Run.create(tmp_path / "run", whole()).manifest == again.manifest
    with pytest.raises(UsageError, match="another configuration"):
        Run.create(tmp_path / "run", Whole(Part(0.02)))


def test_what_is_not_a_run(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    for make in (Run.create, Run.open):
        with pytest.raises(UsageError, match="not a run"):
            make(tmp_path / "other")
    (tmp_path / "other" / "manifest.json").write_text('{"name": "web app"}')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "manifest.json").write_text('{"form')
    for name in ("other", "broken", "absent"):
        with pytest.raises(UsageError):
            Run.open(tmp_path / name)
    good = Run.create(tmp_path / "good")
    store = RunStore(tmp_path)
    assert [run.folder.name for run in store] == ["good"] and store.run("good").manifest == good.manifest
    for name in ("../x", "", "a/b", ".hidden"):
        with pytest.raises(UsageError):
            good.path(name)
        with pytest.raises(UsageError):
            store.run(name)


def test_metrics_append_and_truncate(tmp_path):
    run = Run.create(tmp_path / "run")
    assert run.metrics().empty
    for step in range(5):
        run.log({"step": step, "reward": np.float32(step), "loss": float("nan")})
    path = run.folder / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step": 5, "rew')
    assert Run.open(run.folder).metrics()["step"].tolist() == [0, 1, 2, 3, 4]
    again = Run.open(run.folder)
    again.log({"step": 5, "reward": 0.5})
    assert again.metrics()["step"].tolist() == [0, 1, 2, 3, 4, 5] and again.metrics()["loss"].isna().all()
    again.truncate(3)
    assert again.metrics()["step"].tolist() == [0, 1, 2]


def test_metrics_survive_kill(tmp_path):
    """kill -9 between and inside appends: every record that `log` returned from is read back."""
    program = (
        "import sys\nfrom steerlab.runs import Run\nrun = Run.open(sys.argv[1])\n"
        "for step in range(10**6):\n run.log({'step': step})\n print(step, flush=True)\n"
    )
    run = Run.create(tmp_path / "run")
    child = subprocess.Popen([sys.executable, "-c", program, str(run.folder)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for _ in range(20):
        last = int(child.stdout.readline())
    child.send_signal(signal.SIGKILL)
    rest = child.stdout.read().split()
    child.wait()
    child.stdout.close()
    last = max([last, *map(int, rest)])
    steps = run.metrics()["step"].tolist()
    assert steps == list(range(len(steps))) and last < len(steps) <= last + 2


def test_tables_are_the_same_bytes(tmp_path):
    df = pd.DataFrame({"text": ["a\x00<script>", None], "x": [0.5, float("nan")], "n": [1, 2], "b": [True, False]})
    one, two = Run.create(tmp_path / "one"), Run.create(tmp_path / "two")
    first = one.save_table("scores", df).read_bytes()
    assert two.save_table("scores", df.set_index(pd.Index([7, 9]))).read_bytes() == first
    pd.testing.assert_frame_equal(one.table("scores"), df)
    assert one.tables() == ["scores"]
    one.save_table("odd", pd.DataFrame({"text": pd.Series(["\ud83d"], dtype=object)}))
    assert one.table("odd")["text"].tolist() == ["\ufffd"]
    with pytest.raises(UsageError, match="scores"):
        one.table("score")
    (one.folder / "tables" / "bad.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(UsageError, match="damaged"):
        one.table("bad")


def test_figures(tmp_path):
    run = Run.create(tmp_path / "run")
    figure = go.Figure(go.Bar(x=["</script><script>alert(1)</script>"], y=[1]))
    run.save_figure("norms", figure)
    page = (run.folder / "figures" / "norms.html").read_text("utf-8")
    assert "alert(1)</script>" not in page and "plotly.min.js" in page and "cdn" not in page.lower()
    assert run.figures() == ["norms"] and run.figure("norms") == figure


def test_checkpoint_is_one_deterministic_file(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "b": torch.randn(3, 4, generator=generator).t(),
        "a": torch.randn(5, generator=generator).bfloat16(),
        "n": torch.tensor(7),
        "rng": generator.get_state(),
        "none": torch.zeros(0, 2),
    }
    state = {"cost": CostLedger(rollout_s=1.5), "text": "é", "counters": (1, 2)}
    run, other = Run.create(tmp_path / "run"), Run.create(tmp_path / "other")
    assert run.load_checkpoint() is None
    run.save_checkpoint(4, tensors, state)
    other.save_checkpoint(4, dict(reversed(tensors.items())), dict(reversed(state.items())))
    path = run.folder / "checkpoint.safetensors"
    assert path.read_bytes() == (other.folder / "checkpoint.safetensors").read_bytes()
    loaded = run.load_checkpoint()
    assert loaded is not None and loaded[0] == 4 and loaded[2] == state
    assert all(torch.equal(loaded[1][name], tensors[name]) for name in tensors) and loaded[1].keys() == tensors.keys()

    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(UsageError, match="damaged"):
        run.load_checkpoint()
    path.write_bytes(bytes(content[:-3]))
    with pytest.raises(UsageError, match="damaged"):
        run.load_checkpoint()


def test_sha_sees_shape_and_dtype():
    flat = torch.zeros(4)
    assert len({tensors_sha256({"x": t}) for t in (flat, flat.reshape(2, 2), flat.int(), flat.double()[:2])}) == 4


def test_ledger():
    ledger = CostLedger()
    with pytest.raises(ZeroDivisionError), ledger.time("rollout_s"):
        raise ZeroDivisionError
    ledger.add(tokens_completion=40, steps=1)
    assert ledger.rollout_s > 0 and CostLedger.from_dict(ledger.to_dict()) == ledger
    with pytest.raises(UsageError, match="rollout_s"):
        ledger.add(rollouts_s=1)


def test_import_is_cheap_and_environment_says_no_names():
    code = "import sys, steerlab.runs; sys.exit(bool({'torch', 'pandas', 'plotly', 'pyarrow'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)
    found = environment()
    assert found["threads"] >= 1 and os.uname().nodename not in json.dumps(found)


def test_a_folder_with_only_a_killed_writers_leftover_can_be_begun(tmp_path):
    (tmp_path / ".123-0.manifest.json").write_text("{")
    assert Run.create(tmp_path, None).folder == tmp_path


def test_training_completions_are_kept_and_truncated_with_the_metrics(tmp_path):
    run = Run.create(tmp_path / "run", None)
    for step in range(3):
        run.log_rollouts({"step": step, "sample": i, "text": f"{step}\u202e{i}"} for i in range(2))
        run.log({"step": step})
    run.truncate(2)
    assert run.rollouts()["step"].tolist() == [0, 0, 1, 1] and run.metrics()["step"].tolist() == [0, 1]
