"""The plan of a run: its sizes are those of the model, its work the table of DESIGN §7, and it needs no weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from steerlab import plan as planning
from steerlab.errors import UsageError
from steerlab.models import LanguageModel, packed
from steerlab.models.shape import Shape, shape_of
from steerlab.plan import Work, kept_bytes, plan, sampling_work, update_work
from steerlab.recipes import rloo
from steerlab.rollouts import Sampling
from steerlab.tasks import Task, make
from steerlab.training import Experiment, Rollouts, memory


@pytest.fixture
def config_folder(tiny_llama: LanguageModel, tmp_path: Path) -> Path:
    """Configuration and tokenizer, no weights."""
    tiny_llama.hf.config.save_pretrained(tmp_path / "config")
    tiny_llama.tokenizer.save_pretrained(tmp_path / "config")
    return tmp_path / "config"


@pytest.fixture
def sums(tmp_path: Path) -> Task:
    lines = ["question,answer", *(f"{a}+{b}=,{a + b}" for a in range(5) for b in range(8))]
    (tmp_path / "sums.csv").write_text("\n".join(lines))
    return make(str(tmp_path / "sums.csv"), train=30, test=10)


@pytest.fixture
def experiment(config_folder: Path, sums: Task) -> Experiment:
    made = rloo(sums, str(config_folder), steps=3, prompts=4, samples=2, max_new_tokens=6, dtype="fp32")
    return replace(made, evaluation=replace(made.evaluation, samples=5, limit=None, shots=0, greedy=True))


def bare(head_share: float) -> Shape:
    """A shape of 1000 block weights without attention worth counting."""
    return Shape("bare", 10, 1, 0, 0, 1, round(1000 * head_share), 1000, 2000, torch.float32, None)


@pytest.mark.parametrize(("head_share", "costs"), [(0.27, (2.54, 1.54, 0.54)), (0.18, (2.36, 1.36, 0.36))])
def test_a_token_costs_what_the_table_says(head_share: float, costs: tuple[float, ...]) -> None:
    """DESIGN §7 to two decimals (all layers, one in the middle, the last), less h for logits that sampling has had, for
    a model so deep that one block does not count."""
    shape = replace(bare(head_share), n_layers=10**6)
    source = Rollouts(make("chain_sum"), 1, 1000, Sampling(max_new_tokens=10))
    for lowest, wanted in zip((0, 5 * 10**5, 10**6 - 1), costs, strict=True):
        work = update_work(shape, source, prompt=0.0, first_block=lowest + 1, budget=2048)
        assert work.flops / (10_000 * shape.flops_per_token) == pytest.approx(wanted - head_share, abs=1e-3)


def test_prompts_are_fed_once_per_group_and_without_the_head() -> None:
    shape = bare(0.5)
    one, many = (sampling_work(shape, 2, 7.0, samples, 3, max_rows=256) for samples in (1, 8))
    assert one.prompt_tokens == many.prompt_tokens == 14
    assert many.completion_tokens == 2 * 8 * 3
    assert many.flops == shape.flops_per_token * (14 + 48 * 1.5)


def test_passes_grow_with_decode_batches() -> None:
    assert sampling_work(bare(0.5), 8, 7.0, 8, 3, max_rows=64).passes == 3
    assert sampling_work(bare(0.5), 8, 7.0, 8, 3, max_rows=32).passes == 6


@pytest.mark.parametrize(
    ("samples", "limit", "prompt", "parts"),
    [(16, 512, 300.0, 128), (8, 24, 100.0, 4), (8, 24, 10.4, 3), (1, 1000, 7.0, 8)],
)
def test_updates_take_the_engines_micro_batches(samples: int, limit: int, prompt: float, parts: int) -> None:
    """Of 640 tokens: a completion each; two groups each; three groups each; a completion that is longer than that."""
    source = Rollouts(make("chain_sum"), 8, samples, Sampling(max_new_tokens=limit))
    assert update_work(bare(0.5), source, prompt, first_block=1, budget=640).passes == parts


def test_the_update_feeds_a_prompt_with_every_piece_of_its_group() -> None:
    """8 pieces and 1, of a group of 8."""
    source, shape = Rollouts(make("chain_sum"), 1, 8, Sampling(max_new_tokens=10)), bare(0.5)
    many, one = (update_work(shape, source, 6.0, first_block=0, budget=budget) for budget in (16, 10**6))
    assert (many.passes, one.passes) == (8, 1)
    assert many.flops - one.flops == shape.flops_per_token * 2 * 7 * 6


def test_states_too_many_to_keep_cost_a_forward_through_all_blocks() -> None:
    source, shape = Rollouts(make("chain_sum"), 2, 8, Sampling(max_new_tokens=10)), bare(0.0)
    wide = replace(shape, d_model=planning.KEPT_BYTES // (2 * 2 * 8 * 10 * 4))
    assert kept_bytes(wide, source, first_block=1) == 2 * wide.d_model * 2 * 8 * 10 * 4 <= planning.KEPT_BYTES
    assert kept_bytes(wide, source, first_block=0) == wide.d_model * 2 * 8 * 10 * 4
    wider = replace(wide, d_model=wide.d_model + 1)
    assert kept_bytes(wider, source, first_block=1) == 0
    kept, not_kept = (
        update_work(each, source, 0.0, first_block=8, budget=640).flops - heads * each.head_share * 160 * 2000
        for each, heads in ((wide, 1), (wider, 2))
    )
    assert kept == pytest.approx(160 * 2000 * (0.2 + 0.2)) and not_kept == pytest.approx(160 * 2000 * (1 + 0.2))


def test_a_cpu_holds_keys_and_values_in_fp32(tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = replace(Shape.of(tiny_llama.hf, None, "tiny", torch.bfloat16), d_vocab=0)

    def held(dtype: torch.dtype) -> float:
        return planning.decode_bytes(replace(shape, dtype=dtype), rows=3, positions=10)

    for cuda, expected in ((False, (4, 4, 8)), (True, (2, 4, 8))):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        unit = 3 * 10 * 2 * shape.d_kv * (shape.n_layers + 1)
        assert tuple(held(d) / unit for d in (torch.bfloat16, torch.float32, torch.float64)) == expected


def test_the_packed_copy_is_counted_where_it_would_be_made(
    tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape, free = Shape.of(tiny_llama.hf, None, "tiny", torch.float32), [None]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(planning, "free_memory_bytes", lambda gpu: free[0])
    copy = packed.packed_bytes(tiny_llama)
    assert planning.packed_bytes(shape) == copy
    assert planning.packed_bytes(replace(shape, dtype=torch.float64)) == 0
    weights = 4 * shape.all_weights
    for free[0], expected in ((weights + 4 * copy, copy), (weights + 4 * copy - 4, 0)):
        assert planning.packed_bytes(shape) == expected
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    free[0] = None
    assert planning.packed_bytes(shape) == 0


def test_attention_is_counted(tiny_llama: LanguageModel) -> None:
    shape = Shape.of(tiny_llama.hf, None, "tiny", torch.float32)
    alone = replace(shape, d_attention=0)
    more = sampling_work(shape, 1, 0.0, 1, 10, 1).flops - sampling_work(alone, 1, 0.0, 1, 10, 1).flops
    assert more == 4 * shape.n_layers * shape.d_attention * 50


def test_work_adds_and_multiplies() -> None:
    work = Work(1, 2.0, 3, 4, 5.0)
    assert work + work + work == work * 3


def test_sizes_without_weights_are_those_of_the_model(tiny_models: dict[str, LanguageModel], tmp_path: Path) -> None:
    for family, model in tiny_models.items():
        model.hf.config.save_pretrained(tmp_path / family)
        shape = shape_of(str(tmp_path / family), "fp32")
        assert shape == replace(Shape.of(model.hf, None, shape.name, torch.float32), tokenizer=shape.tokenizer)
        assert (shape.n_layers, shape.d_model, shape.d_vocab) == (model.n_layers, model.d_model, model.d_vocab)
        assert shape.all_weights == sum(p.numel() for p in model.hf.parameters())


def test_a_plan_counts_what_a_run_will_do(experiment: Experiment) -> None:
    made = plan(experiment)
    assert made.counted
    assert made.n_trained == 4 * 32
    assert made.rollouts.completions == 3 * 4 * 2
    assert made.rollouts.completion_tokens == 3 * 4 * 2 * 6
    assert made.evaluation.completions == 10 * (5 + 5 + 1)  # base and steered sampled, base greedy
    assert 0 < made.hours < 1
    assert made.kept_bytes == 2 * 4 * 2 * 6 * 32 * 4
    stays = made.weight_bytes + made.packed_bytes + made.kept_bytes
    assert made.peak_bytes > stays + max(made.decode_bytes, made.update_bytes)


def test_a_plan_is_read_in_two_columns(experiment: Experiment) -> None:
    said = dict(plan(experiment).rows())
    assert set(said) == {
        "model", "trained", "rollouts", "updates", "evaluation", "prompt tokens", "hours", "memory", "disk",
    }  # fmt: skip
    assert "24 completions" in said["rollouts"]
    assert "3 steps of 4 prompts × 2 samples × at most 6 tokens" in said["trained"]


def test_a_plan_says_its_micro_batches(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    most = memory.cap(experiment.source.longest)
    assert most == memory.CAP_TOKENS + memory.LONG_ROWS * 6
    assert f"micro-batches of {most} tokens, the most by default" in dict(plan(experiment).rows())["updates"]
    asked = replace(experiment, token_budget=77)
    assert "micro-batches of 77 tokens, as asked for" in dict(plan(asked).rows())["updates"]
    monkeypatch.setattr(planning, "free_memory_bytes", lambda gpu: 10_000_000)
    cramped = plan(experiment)
    assert 1 <= cramped.token_budget < memory.CAP_TOKENS and "free here and now" in dict(cramped.rows())["updates"]


def test_without_a_tokenizer_prompt_tokens_are_guessed_and_said_so(experiment: Experiment, config_folder: Path) -> None:
    for file in config_folder.glob("*token*"):
        file.unlink()
    made = plan(experiment)
    assert not made.counted
    assert "no tokenizer" in dict(made.rows())["prompt tokens"]


def test_higher_layers_cost_less(experiment: Experiment) -> None:
    last = replace(experiment, adapter=replace(experiment.adapter, layers=(3,)))
    assert plan(last).updates.flops < plan(experiment).updates.flops
    assert plan(last).n_trained == 32


def test_layers_that_do_not_exist_are_refused(experiment: Experiment) -> None:
    with pytest.raises(UsageError, match="layers 0 to 3"):
        plan(replace(experiment, adapter=replace(experiment.adapter, layers=(4,))))


def test_a_hub_model_that_is_not_here_is_one_line(experiment: Experiment) -> None:
    with pytest.raises(UsageError, match=r"config\.json") as refused:
        plan(replace(experiment, model="nobody/nothing-1b"))
    assert "\n" not in str(refused.value)


def test_the_measured_speed_is_a_speed(tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "MEASURE_S", 0.01)
    assert planning.measured_flops_per_s(Shape.of(tiny_llama.hf, None, "tiny", torch.float32), 8) > 0


def test_the_speed_is_of_weights_that_are_not_in_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    product, used = torch.nn.functional.linear, set()

    def noted(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        used.add(weight.data_ptr())
        return product(x, weight)

    monkeypatch.setattr(torch.nn.functional, "linear", noted)
    shape = replace(bare(0.5), d_model=8, d_mlp=8, block_weights=640)
    assert planning.measured_flops_per_s(shape, 4) > 0
    assert len(used) == 11


def test_bytes_are_said_in_their_unit() -> None:
    assert [planning.size(n) for n in (12, 1200, 3.4e6, 5e9)] == ["12 B", "1.2 kB", "3.4 MB", "5 GB"]
