"""`steerlab sae`: one command from texts to a directory that sae-lens reads, with its figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from steerlab.__main__ import main
from steerlab.adapters import SteeringVectors, formats
from steerlab.adapters.formats.own import Provenance
from steerlab.models import LanguageModel, Site
from steerlab.runs import Run
from steerlab.saes.load import load

SMALL = ("--text", "", "--length", "32", "--expansion", "2", "--k", "4", "--batch", "64")


@pytest.fixture
def vectors(tiny_llama: LanguageModel, tmp_path: Path) -> Path:
    path = tmp_path / "vectors.safetensors"
    formats.save(path, SteeringVectors({Site("resid_post", 1): torch.ones(32)}), Provenance.of(tiny_llama))
    return path


def test_an_sae_from_a_model_alone(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_llama: LanguageModel
) -> None:
    words = ["sae", "train", "--model", str(tiny_folder), *SMALL, "--tokens", "640", "--out", str(tmp_path / "s")]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "held-out tokens" in said and "loss recovered" in said and "step 10/10" in said
    run = Run.open(tmp_path / "s" / "training")
    assert run.tables() == ["sae_quality", "sae_training"] and run.figures() == run.tables()
    assert load(run.path("sae"), tiny_llama, allow_other_weights=True).site == Site("resid_post", 2)
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    assert "principal components explain" in page and "Training the sparse autoencoder" in page
    assert "nothing is claimed" not in page and "Losses in nats per token" in page
    before = (run.path("sae") / "sae_weights.safetensors").read_bytes()
    assert main(words) == 0  # what is done is not done again
    assert (run.path("sae") / "sae_weights.safetensors").read_bytes() == before
    assert "step" not in capsys.readouterr().out.replace("steps", "")


def test_an_sae_of_the_difference_that_vectors_make(
    vectors: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "sae",
        "train",
        str(vectors),
        "--model",
        str(tiny_folder),
        "--kind",
        "difference",
        "--site",
        "resid_post.3",
    ]
    more = ["--allow-other-weights", "--tokens", "320", "--out", str(tmp_path / "s")]
    assert main([*words, *SMALL, *more]) == 0, capsys.readouterr().err
    (row,) = Run.open(tmp_path / "s" / "training").table("sae_quality").to_dict("records")
    assert (row["kind"], row["site"], row["d_sae"]) == ("difference", "resid_post.3", 64)
    assert row["n_loss_tokens"] > 0 and row["loss_model"] != row["loss_zero"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("strain",), "unknown action of steerlab sae 'strain'; did you mean train?"),
        (("train",), "nothing to work on"),
        (("train", "--kind", "difference", "--model", "MODEL"), "a difference needs an adapter"),
        (("train", "--site", "middle", "--model", "MODEL"), "is not a site"),
        (("train", "--tokens", "10", "--model", "MODEL"), "10 tokens make no batch of 1024"),
        (("train", "--problems", "1", "--model", "MODEL"), "at least 2 are needed"),
    ],
)
def test_mistakes_are_one_line(
    words: tuple[str, ...], said: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = [str(tiny_folder) if word == "MODEL" else word for word in words]
    assert main(["sae", *typed, *(("--text", "", "--out", str(tmp_path / "s")) if words[0] == "train" else ())]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_latents_are_scored_read_and_edited(
    vectors: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    about = ("--model", str(tiny_folder), "--allow-other-weights")
    out = str(tmp_path / "s")
    made = ["sae", "train", *about[:2], *SMALL, "--tokens", "640", "--out", out]
    assert main(made) == 0
    sums = tmp_path / "letters.jsonl"
    sums.write_text("\n".join(json.dumps({"question": f"say {n}", "answer": str(n % 3)}) for n in range(8)))
    asked = ("--sae", f"{out}/training/sae", "--task", str(sums), "--out", str(tmp_path / "o"))
    refused = main(["sae", "causal", str(vectors), *about, *asked])
    assert refused == 2 and "steerlab sae score" in capsys.readouterr().err
    assert main(["sae", "latents", str(vectors), *about, *asked, "--problems", "3"]) == 0
    assert "change of mean activations" in capsys.readouterr().out
    edit = ("--latents", "1", "2", "--problems", "3", "--samples", "1", "--draws", "1", "--how", "add", "--value", "2")
    assert main(["sae", "causal", str(vectors), *about, *asked, *edit]) == 0
    assert "random-0" in capsys.readouterr().out
    run = Run.open(tmp_path / "o")
    assert {"latent_effects", "latents_causal"} <= set(run.tables()) and run.figures() == [
        "latent_effects",
        "latents_causal",
    ]
    assert main(["sae", "score", str(vectors), *about, "--task", str(sums), "--out", str(tmp_path / "o")]) == 2
    assert "add --sae FOLDER" in capsys.readouterr().err
