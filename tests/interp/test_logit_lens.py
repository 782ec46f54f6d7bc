"""The chunked lens against the whole readout, and what it says of odd vectors and tokens."""

from __future__ import annotations

import pytest
import torch

from steerlab.errors import UsageError
from steerlab.interp.logit_lens import dot_readout, logit_lens, token_text
from steerlab.models.sites import Site

D_VOCAB, D_MODEL = 101, 16


class Letters:
    """Token i is "t<i>"; 7 is half a character, 8 begins with sentencepiece's space, 100 is padding."""

    def convert_ids_to_tokens(self, ids: int) -> str | None:
        return None if ids == 100 else {7: "â", 8: "▁the"}.get(ids, f"t{ids}")

    def decode(self, token_ids: list[int]) -> str:
        (i,) = token_ids
        return {7: "\ufffd", 8: "the"}.get(i, f"t{i}")


def made(dtype=torch.float32) -> tuple[dict[Site, torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    unembedding = torch.randn(D_VOCAB, D_MODEL, generator=generator).to(dtype)
    return {Site("resid_post", i): torch.randn(D_MODEL, generator=generator) for i in range(3)}, unembedding


@pytest.mark.parametrize("chunk", [3, 50, 10_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_whole_readout(chunk, dtype):
    vectors, unembedding = made(dtype)
    table = logit_lens(vectors, unembedding, Letters(), k=7, chunk=chunk)
    assert len(table) == 3 * 3 * 2 * 7
    for site, vector in vectors.items():
        dot = dot_readout(vector, unembedding)
        torch.testing.assert_close(dot, unembedding.float() @ vector)
        whole = {
            "dot": dot,
            "cosine": torch.nn.functional.cosine_similarity(unembedding.float(), vector[None], dim=1),
            "softmax": dot.softmax(0),
        }
        for readout, scores in whole.items():
            for end in ("top", "bottom"):
                part = table[(table["layer"] == site.layer) & (table["readout"] == readout) & (table["end"] == end)]
                order = scores.argsort(descending=end == "top")[:7]
                assert part["token_id"].tolist() == order.tolist() and part["rank"].tolist() == list(range(7))
                assert part["score"].tolist() == pytest.approx(scores[order].tolist(), rel=1e-4, abs=1e-6)


def test_ties_go_to_the_lower_id_whatever_the_chunk():
    unembedding = torch.ones(D_VOCAB, D_MODEL)
    for chunk in (1, 7, 200):
        table = logit_lens({Site("resid_post", 0): torch.ones(D_MODEL)}, unembedding, Letters(), k=4, chunk=chunk)
        assert table.groupby(["readout", "end"])["token_id"].agg(list).tolist() == [[0, 1, 2, 3]] * 6


def test_negating_a_vector_swaps_the_ends():
    vectors, unembedding = made()
    one = logit_lens(vectors, unembedding, Letters(), readouts=("dot",))
    other = logit_lens({site: -vector for site, vector in vectors.items()}, unembedding, Letters(), readouts=("dot",))
    assert one.query("end == 'top'")["token_id"].tolist() == other.query("end == 'bottom'")["token_id"].tolist()
    assert set(one["readout"]) == {"dot"}


def test_a_vector_along_a_row_reads_that_token():
    _, unembedding = made()
    table = logit_lens({Site("resid_post", 5): 3 * unembedding[42]}, unembedding, Letters(), k=1)
    first = table.query("readout == 'cosine' and end == 'top'")
    assert first["token"].item() == "t42" and first["score"].item() == pytest.approx(1)


def test_zero_and_foreign_vectors_are_named_not_divided():
    vectors, unembedding = made()
    vectors |= {Site("resid_post", 9): torch.zeros(D_MODEL), Site("q", 0): torch.ones(D_MODEL)}
    unembedding[3] = 0
    table = logit_lens(vectors, unembedding, Letters())
    assert table.attrs == {"zero": ["resid_post.9"], "skipped": ["q.0"]}
    assert set(table["layer"]) == {0, 1, 2} and table["score"].notna().all()
    nothing = logit_lens({Site("resid_post", 0): torch.zeros(D_MODEL)}, unembedding, Letters())
    assert nothing.empty and nothing.attrs["zero"] == ["resid_post.0"]


def test_through_norm():
    vectors, unembedding = made()
    norm = torch.nn.LayerNorm(D_MODEL)
    table = logit_lens(vectors, unembedding, Letters(), k=3, readouts=("dot",), through_norm=norm)
    expected = logit_lens({s: norm(v) for s, v in vectors.items()}, unembedding, Letters(), k=3, readouts=("dot",))
    assert table["token_id"].tolist() == expected["token_id"].tolist()


def test_usage_errors():
    vectors, unembedding = made()
    with pytest.raises(UsageError, match="did you mean cosine"):
        logit_lens(vectors, unembedding, Letters(), readouts=("cosin",))
    with pytest.raises(UsageError, match="not in it"):
        logit_lens({Site("q", 0): torch.ones(D_MODEL)}, unembedding, Letters())
    with pytest.raises(UsageError, match="d_model is 16"):
        logit_lens({Site("resid_post", 0): torch.ones(D_MODEL + 1)}, unembedding, Letters())
    with pytest.raises(UsageError, match="k=0"):
        logit_lens(vectors, unembedding, Letters(), k=0)


def test_token_text():
    assert [token_text(Letters(), i) for i in (5, 7, 8, 100)] == ["t5", "<0xE2>", " the", "<id 100>"]
