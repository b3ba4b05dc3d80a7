"""Configurations compose and refuse nonsense; step metrics; the CPU engine's log-probabilities."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf

from conftest import ROOT
from models import sharp_model
from parallel_r1.attention import dense_mask
from parallel_r1.structure import annotate
from parallel_r1.tags import TagIds, tag_ids
from parallel_r1.training.compose import CONFIGS, ConfigError, compose
from parallel_r1.training.fidelity import parallel_config
from parallel_r1.training.metrics import mismatch_metrics, mismatch_warning, rollout_metrics
from parallel_r1.training.sft_dataset import TraceDataset

TAGS = TagIds(1000, 1001, 1002, 1003, 1004, 1005)


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml") if path.stem != "agent_loops"))
def test_every_configuration_composes(name: str) -> None:
    config = compose(name)
    assert config.trainer.project_name == "parallel-r1"
    assert parallel_config(config).variant == "unseen"


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("quickstart_rl", "foo=1", "foo"),
        ("quickstart_rl", "+parallel_r1.reward.recipee=x", "unknown key parallel_r1.reward.recipee"),
        ("quickstart_rl", "parallel_r1.reward.recipe=acuracy", "unknown reward recipe 'acuracy'"),
        ("quickstart_rl", "not an override", "not an override"),
        ("nothing", "", "no configuration 'nothing'"),
        ("quickstart_rl", "actor_rollout_ref.rollout.temperature=0.7", "processed_logprobs"),
        ("quickstart_rl", "actor_rollout_ref.rollout.full_determinism=true", "full_determinism"),
        ("quickstart_rl", "actor_rollout_ref.rollout.max_num_batched_tokens=4096", "max_num_batched_tokens=98304"),
        ("quickstart_rl", "parallel_r1.rollout.mode=sequential", "mode=forked, variant=seen"),
        ("quickstart_sft", "model.override_config.attn_implementation=sdpa", "needs attn_implementation"),
        ("quickstart_rl", "parallel_r1.rollout.num_paths=[3,2]", "the first number is the least"),
    ],
)
def test_configuration_errors_are_one_line(name: str, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        compose(name, [override] if override else [])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_command_line_error_has_no_traceback() -> None:
    command = [sys.executable, "-m", "parallel_r1.training.rl", "quickstart_rl", "foo=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and "foo" in done.stderr


@pytest.mark.parametrize(("module", "key"), [("rl", "actor_rollout_ref.model.path"), ("sft", "model.path")])
def test_a_missing_model_path_is_one_line(module: str, key: str) -> None:
    command = [sys.executable, "-m", f"parallel_r1.training.{module}", f"quickstart_{module}", f"{key}=/no/such/model"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert key in done.stderr and "/no/such/model" in done.stderr


def test_importing_the_package_pulls_in_neither_torch_nor_vllm() -> None:
    program = (
        "import sys, parallel_r1, parallel_r1.structure, parallel_r1.rollout.fork_join, parallel_r1.rewards.reward;"
    )
    program += "print({'torch', 'vllm', 'verl', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "set()", done.stdout + done.stderr


def test_mismatch_is_split_by_region() -> None:
    po, pc, p, ep, s, es = TAGS
    ids = np.array([po, p, 1, ep, p, 2, ep, pc, s, 3, es, 4])
    mask = np.array([1, 0, 1, 1, 0, 1, 1, 0, 0, 1, 1, 1])
    engine, trainer = np.zeros(12), np.zeros(12)
    engine[4] = 99.0  # inserted: never counted
    engine[5] = 0.5  # second path: another context
    engine[9] = -0.25  # summary
    found = mismatch_metrics([(ids, mask, engine, trainer)], TAGS)
    assert found["mismatch/path_max"] == 0.5 and found["mismatch/path_mean"] == 0.5 / 4
    assert found["mismatch/first_path_max"] == 0
    assert found["mismatch/summary_max"] == 0.25 and found["mismatch/summary_mean"] == 0.125
    assert found["mismatch/trunk_max"] == found["mismatch/after_max"] == 0
    assert found["mismatch/all_max"] == 0.5 and found["mismatch/all_mean"] == 0.75 / 8
    assert mismatch_metrics([], TAGS) == {}
    assert mismatch_warning(found, 0.2) is None
    assert "path 0.125, summary 0.125 nats" in mismatch_warning(found, 0.1)
    assert "trunk nan" in mismatch_warning({"mismatch/trunk_mean": float("nan")}, 0.1)


def test_rollout_metrics_are_counted_by_hand() -> None:
    base = {"valid": 1.0, "violations": [], "truncated": 0.0, "forced_closers": 0.0, "failed_paths": 1.0}
    base |= {"data_source": "sums", "terms": {"case": 1.0, "length": 0.2}}
    infos = [
        base
        | {"acc": 1.0, "has_block": 1.0, "grade": "ok", "position": 0.2, "tokens": 10, "critical_tokens": 6}
        | {"paths_per_block": [2, 3]},
        base
        | {"acc": 0.0, "has_block": 0.0, "grade": "wrong", "position": None, "tokens": 10, "critical_tokens": 10}
        | {"paths_per_block": [], "valid": 0.0, "violations": ["unclosed <Path> at character 3"], "truncated": 1.0}
        | {"data_source": "products", "terms": {"case": -1.0}},
    ]
    found = rollout_metrics(infos, [1.2, -1.0])
    assert found["reward/score"] == pytest.approx(0.1) and found["reward/accuracy"] == 0.5
    assert found["parallel/ratio"] == 0.5 and found["parallel/position"] == 0.2
    assert found["parallel/paths_per_block"] == 2.5 and found["parallel/critical_share"] == 0.8
    assert found["reward_terms/case"] == 0 and found["reward_terms/length"] == pytest.approx(0.1)
    assert found["reward/accuracy/sums"] == 1 and found["reward/accuracy/products"] == 0
    assert found["grade/timeout"] == found["grade/ungraded"] == 0
    assert found["grade/ok"] == found["grade/wrong"] == 0.5 and found["violation/unclosed <Path>"] == 0.5
    assert (
        found["rollout/failed_paths"] == 2
        and found["rollout/truncated_ratio"] == 0.5
        and found["parallel/valid_ratio"] == 0.5
    )


@pytest.mark.parametrize("tokens", [8, 2500])  # one chunk; several, recomputed for the backward pass
def test_token_statistics_equal_a_plain_log_softmax(tokens: int) -> None:
    from parallel_r1.engine.fsdp import token_statistics

    torch.manual_seed(0)
    logits = torch.randn(tokens, 11, requires_grad=True)
    labels, temperature = torch.randint(0, 11, (tokens,)), torch.rand(tokens) + 0.5
    log_probs, entropy = token_statistics(logits, labels, temperature, entropy=True)
    plain = (logits / temperature[:, None]).log_softmax(-1)
    expected, expected_entropy = plain.gather(1, labels[:, None])[:, 0], -(plain.exp() * plain).sum(-1)
    assert torch.allclose(log_probs, expected, atol=1e-6) and torch.allclose(entropy, expected_entropy, atol=1e-5)
    direction = torch.randn(tokens)
    ours = torch.autograd.grad(log_probs @ direction, logits)[0]
    theirs = torch.autograd.grad(expected @ direction, logits)[0]
    assert torch.allclose(ours, theirs, atol=1e-6)
    assert token_statistics(logits.bfloat16(), labels, temperature, entropy=False)[0].dtype == torch.float32


@pytest.fixture
def gloo(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def make_engine(model: Path, kind: str = "turns", **options: Any) -> Any:
    """verl's engine as the registry makes it on a CPU, initialised."""
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
    from verl.workers.engine.base import EngineRegistry

    override = {"attn_implementation": "parallel_r1", "model_config": {"parallel_r1_structure": kind}}
    model_options = {"use_remove_padding": True, "enable_gradient_checkpointing": False}
    model_options |= {name: options.pop(name) for name in list(options) if name in model_options}
    engine = EngineRegistry.new(
        model_type="language_model",
        backend="fsdp2",
        model_config=HFModelConfig(
            path=str(model), external_lib="parallel_r1.engine.fsdp", override_config=override, **model_options
        ),
        engine_config=FSDPEngineConfig(
            strategy="fsdp2", use_torch_compile=False, mixed_precision={"param_dtype": "fp32"}, **options
        ),
        optimizer_config=FSDPOptimizerConfig(lr=1e-3, total_training_steps=10),
        checkpoint_config=CheckpointConfig(),
    )
    engine.initialize()
    return engine


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch, gloo: None) -> None:
    monkeypatch.setenv("VERL_PLATFORM", "cpu")


def engine_batch(rows: list[list[int]], **options: Any) -> Any:
    from verl.utils import tensordict_utils as tu

    def nested(values: list[torch.Tensor]) -> torch.Tensor:
        return torch.nested.as_nested_tensor(values, layout=torch.jagged)

    ids = [torch.tensor(row) for row in rows]
    columns = {"input_ids": nested(ids), "position_ids": nested([torch.arange(len(row)) for row in rows])}
    columns["loss_mask"] = nested([torch.ones(len(row), dtype=torch.long) for row in rows])
    defaults = {"use_remove_padding": True, "temperature": 1.0, "global_batch_size": len(rows)}
    defaults |= {"use_dynamic_bsz": False, "micro_batch_size_per_gpu": 1, "calculate_entropy": False}
    return tu.get_tensordict(columns, defaults | options)


def infer(engine: Any, rows: list[list[int]], **options: Any) -> list[torch.Tensor]:
    with engine.eval_mode():
        output = engine.infer_batch(engine_batch(rows, **options))
    return list(output["model_output"]["log_probs"].unbind())


@pytest.mark.slow
def test_engine_log_probs_do_not_depend_on_packing(cpu: None, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from test_attention import sequences

    path = sharp_model(tmp_path / "model")
    tags = tag_ids(AutoTokenizer.from_pretrained(path))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")
    rows = sequences(tags, model.config.vocab_size)
    expected = []
    for row in rows:
        structure = annotate(row, tags)
        with torch.no_grad():
            logits = model(
                torch.tensor([row]),
                attention_mask=dense_mask(structure)[None, None],
                position_ids=torch.from_numpy(structure.position_ids)[None],
            ).logits[0]
        expected.append(logits.log_softmax(-1)[:-1].gather(1, torch.tensor(row[1:])[:, None])[:, 0])
    engine = make_engine(path)
    for options in (
        {"micro_batch_size_per_gpu": 1},
        {"micro_batch_size_per_gpu": 3},
        {"use_dynamic_bsz": True, "max_token_len_per_gpu": len(rows[0]) + len(rows[1]) + 1},
    ):
        found = infer(engine, rows, **options)
        for ours, theirs in zip(found, expected, strict=True):
            assert (ours[:-1] - theirs).abs().max() < 1e-5, options
    reference = infer(make_engine(path, forward_only=True), rows, micro_batch_size_per_gpu=3)
    assert all((a[:-1] - b).abs().max() < 1e-5 for a, b in zip(reference, expected, strict=True))
    control = infer(make_engine(path, kind="causal"), rows, micro_batch_size_per_gpu=3)
    assert max((a[:-1] - b).abs().max() for a, b in zip(control, expected, strict=True)) > 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_remove_padding": False}, "use_remove_padding=false"),
        ({"pad_to_length": True}, "pad_to_length"),
        ({"ulysses_sequence_parallel_size": 2}, "ulysses_sequence_parallel_size > 1"),
        ({"kind": "some"}, "must be causal, turns or everywhere"),
    ],
)
def test_engine_refuses_what_it_does_not_support(
    cpu: None, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    path = sharp_model(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        make_engine(path, **options)


# ---- variants and fidelity


def test_variant_and_fidelity_set_the_keys_of_verl() -> None:
    def structure(name: str, *overrides: str) -> str:
        config = compose(name, overrides)
        model = config.model if "model" in config else config.actor_rollout_ref.model
        return model.override_config.model_config.parallel_r1_structure

    for name in ("sft", "rl"):
        assert structure(name) == "turns"
        assert structure(name, "parallel_r1.fidelity=paper") == "everywhere"
        assert structure(name, "parallel_r1.variant=seen") == "causal"
    assert compose("sft", ["parallel_r1.fidelity=paper"]).data.train_inserted is True
    assert compose("sft").data.train_inserted is False
    assert compose("rl", ["parallel_r1.fidelity=paper"]).parallel_r1.rollout.stop_after_blocks is True
    assert compose("rl").parallel_r1.rollout.stop_after_blocks is False


def test_the_structured_engine_is_switched_on_where_training_is_structured(tiny_model: Path) -> None:
    from parallel_r1.training import fidelity

    def engine(*overrides: str) -> dict[str, Any]:
        config = compose("quickstart_rl", [f"actor_rollout_ref.model.path={tiny_model}", *overrides])
        fidelity.apply_to_engine(config, fidelity.parallel_config(config))
        return config.actor_rollout_ref.rollout.engine_kwargs.vllm

    found = engine()
    assert found.hf_overrides.architectures == ["StructuredQwen3ForCausalLM"]
    assert found.compilation_config.cudagraph_mode == "PIECEWISE"
    assert found.worker_extension_cls.endswith("CPUWorkerExtension")  # what was there stays
    for overrides in (["parallel_r1.fidelity=paper"], ["parallel_r1.variant=seen"]):
        assert "hf_overrides" not in engine(*overrides)


# ---- cold-start traces


def traces(tmp_path: Path, *responses: str) -> Path:
    path = tmp_path / "traces.parquet"
    prompt = [{"role": "user", "content": "Use <Parallel><Path>a</Path><Path>b</Path></Parallel>. What is 1+2?"}]
    pd.DataFrame({"prompt": [prompt] * len(responses), "response": list(responses)}).to_parquet(path)
    return path


BLOCK = "<Parallel><Path>1+2</Path><Path>2+1</Path></Parallel>\n<Summary>3</Summary>\nFinal Answer: 3"


def dataset(path: Path, model: Path, **config: Any) -> TraceDataset:
    from transformers import AutoTokenizer

    options = OmegaConf.create({"max_length": 200, **config})
    return TraceDataset(str(path), AutoTokenizer.from_pretrained(model), options)


def test_over_long_and_invalid_rows_are_counted_not_cut(tmp_path: Path, tiny_model: Path) -> None:
    bad = BLOCK.replace("</Summary>", "")
    path = traces(tmp_path, BLOCK, "Final Answer: 3", bad, bad, "1+" * 300)
    with pytest.warns(RuntimeWarning, match="2 of 5 rows of .* kept; left out: 2 unclosed <Summary>; 1 longer than"):
        data = dataset(path, tiny_model)
    assert len(data) == 2 and sum(data.dropped.values()) == 3
    with pytest.raises(ValueError, match="0 of 5 rows"), pytest.warns(RuntimeWarning):
        dataset(path, tiny_model, max_length=10)


def test_inserted_tokens_and_the_prompt_carry_no_loss(tmp_path: Path, tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    path = traces(tmp_path, BLOCK)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    row, paper = dataset(path, tiny_model)[0], dataset(path, tiny_model, train_inserted=True)[0]
    trained = tokenizer.decode(row["input_ids"][row["loss_mask"] == 1])
    assert trained == "<Parallel>1+2</Path>2+1</Path>3</Summary>\nFinal Answer: 3<|im_end|>"
    everything = tokenizer.decode(paper["input_ids"][paper["loss_mask"] == 1])
    assert everything == BLOCK + "<|im_end|>"
    # the instruction's tags are no structure; the answer's are
    from parallel_r1.engine.fsdp import annotator

    ids = row["input_ids"].numpy()
    assert len(annotator(tokenizer, "turns")(ids).blocks) == 1
    assert len(annotator(tokenizer, "everywhere")(ids).blocks) == 2
    assert len(annotator(tokenizer, "causal")(ids).blocks) == 0
