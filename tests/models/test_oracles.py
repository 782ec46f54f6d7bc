"""TransformerLens and nnsight see the same activations at the same names.

Both support every family of `models/sites.py`. What they do not have: TransformerLens builds `attn_in` and `mlp_in`
only on request and per head, and its `hook_resid_mid` is the MLP's input, so writing it is our `mlp_in`; GPT-NeoX has
no resid_mid. nnsight offers modules, not names: its blocks, attentions, MLPs and post-norms are compared.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from steerlab.models import tiny

pytestmark = pytest.mark.slow
READ = {"resid_pre", "resid_post", "attn_out", "mlp_out"}
READ_IN_LENS = READ | {"resid_mid", "q", "k", "v", "z", "pattern", "mlp_neurons"}
WRITTEN_IN_LENS = {f"write {kind}" for kind in READ | {"q", "k", "v", "z", "mlp_neurons"}}


def run(script: str, home: Path) -> dict[str, dict[str, float]]:
    """Largest differences by family, as the script prints them; its caches stay in `home`."""
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(script))],
        cwd=home, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def check(found: dict[str, dict[str, float]], wanted: set[str]) -> None:
    assert set(found) == set(tiny.FAMILIES)
    for family, differences in found.items():
        missing = wanted - set(differences) - ({"resid_mid"} if family == "gpt_neox" else set())
        assert not missing, (family, missing)
        assert max(differences.values()) < 1e-4, (family, differences)


def test_transformer_lens_agrees(tmp_path: Path) -> None:
    check(run("oracle_transformer_lens.py", tmp_path), READ_IN_LENS | WRITTEN_IN_LENS | {"logits"})


def test_nnsight_agrees(tmp_path: Path) -> None:
    check(run("oracle_nnsight.py", tmp_path), READ)
