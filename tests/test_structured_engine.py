"""The structured vLLM engine against a dense forward; its refusals; the arithmetic of the GPU backend."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import ROOT
from models import sharp_model
from parallel_r1.attention import dense_mask
from parallel_r1.rollout import vllm_kwargs
from parallel_r1.rollout.hidden_rows import find, publish
from parallel_r1.structure import annotate
from parallel_r1.tags import TagIds

BOUND = 1e-4  # nats, float32
TAGS = TagIds(1000, 1001, 1002, 1003, 1004, 1005)
PO, PC, P, EP, S, ES = TAGS

ENGINES: dict[str, dict[str, Any]] = {
    "prefix caching": {},
    "chunked prefill": {"engine": {"max_num_batched_tokens": 40, "max_num_seqs": 8}},
    "small blocks, no prefix caching": {"engine": {"block_size": 16, "enable_prefix_caching": False}},
    "preemption": {
        "engine": {"block_size": 16, "num_gpu_blocks_override": 34, "max_num_batched_tokens": 64, "max_num_seqs": 8},
        "longest": 70,
    },
    "compiled": {"engine": {"block_size": 128, "enforce_eager": False}},
    "broken: stock": {"break": "stock"},
    "broken: mask": {"break": "mask"},
    "broken: positions": {"break": "positions"},
}


@pytest.fixture(scope="session", params=["qwen3", "llama"])
def parity(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """Results of :mod:`engine_parity` by engine."""
    model = sharp_model(tmp_path_factory.mktemp("sharp") / request.param, request.param)
    return dict(zip(ENGINES, run_parity(model, *ENGINES.values()), strict=True))


def run_parity(model: Path, *options: dict[str, Any]) -> list[dict[str, float]]:
    command = [sys.executable, str(ROOT / "tests" / "engine_parity.py"), str(model), *map(json.dumps, options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.slow
def test_engine_equals_a_dense_forward(parity: dict[str, dict[str, float]]) -> None:
    for name, result in parity.items():
        assert result["tokens"] > 500
        if not name.startswith("broken"):
            assert result["worst"] < BOUND, (name, result)
    assert parity["preemption"]["preemptions"] > 0 and parity["prefix caching"]["preemptions"] == 0


@pytest.mark.slow
def test_broken_engines_miss_the_bound_by_orders_of_magnitude(parity: dict[str, dict[str, float]]) -> None:
    for kind in ("stock", "mask", "positions"):
        assert parity[f"broken: {kind}"]["worst"] > 1000 * BOUND, kind


@pytest.mark.slow
def test_tensor_parallelism(tmp_path: Path) -> None:
    model = sharp_model(tmp_path / "model")
    engine = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    assert run_parity(model, {"engine": engine})[0]["worst"] < BOUND


@pytest.mark.slow
def test_a_prompt_that_ends_in_a_later_path_is_refused(tmp_path: Path) -> None:
    model = sharp_model(tmp_path / "model")
    program = f"""
from parallel_r1 import environment
environment.prepare("cpu")
from vllm import LLM
from parallel_r1.rollout import vllm_kwargs
kwargs = vllm_kwargs({str(model)!r})
po, _, p, *_ = kwargs["hf_overrides"]["parallel_r1"]["tags"]
llm = LLM({str(model)!r}, enforce_eager=True, max_model_len=64, distributed_executor_backend="uni", **kwargs)
llm.generate([{{"prompt_token_ids": [9, po, p, 9, p, 9]}}])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200)
    assert done.returncode != 0 and "ends inside path 2 of a block" in done.stderr


# ---- switching it on


def test_vllm_kwargs_of_a_model_that_cannot_be_structured(tmp_path: Path, tiny_model: Path) -> None:
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no structured engine for .*GPT2"):
        vllm_kwargs(tmp_path)


def test_vllm_kwargs_are_plain_data(tiny_model: Path) -> None:
    kwargs = vllm_kwargs(tiny_model)
    assert json.loads(json.dumps(kwargs)) == kwargs
    assert kwargs["hf_overrides"]["parallel_r1"]["chat"] is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"compilation_config.cudagraph_mode": "FULL"}, "full graphs"),
        ({"speculative_config": object()}, "speculative"),
        ({"parallel_config.pipeline_parallel_size": 2}, "pipeline"),
        ({"parallel_config.decode_context_parallel_size": 2}, "context"),
        ({"cache_config.cache_dtype": "fp8"}, "quantised"),
    ],
)
def test_engine_options_that_would_skip_the_mask_are_refused(change: dict[str, Any], message: str) -> None:
    from types import SimpleNamespace

    from vllm.config.compilation import CUDAGraphMode

    from parallel_r1.rollout.vllm_model import _refuse_unsupported

    config = SimpleNamespace(
        compilation_config=SimpleNamespace(cudagraph_mode=CUDAGraphMode.PIECEWISE),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1, decode_context_parallel_size=1, enable_dbo=False),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        speculative_config=None,
    )
    _refuse_unsupported(config)
    for key, value in change.items():
        *path, name = key.split(".")
        target = config
        for part in path:
            target = getattr(target, part)
        setattr(target, name, CUDAGraphMode.FULL if value == "FULL" else value)
    with pytest.raises(ValueError, match=message):
        _refuse_unsupported(config)


def test_metadata_of_an_unknown_kind_is_an_error() -> None:
    publish(torch.zeros(2, 4), None)  # a profiling run
    with pytest.raises(TypeError, match="list"):
        publish(torch.zeros(2, 4), [{}])


# ---- rows and segments of a step, and what the backends do with them


def step(rng: np.random.Generator, dim: int = 8) -> dict[str, Any]:
    """A step of three requests, each with a chunk of its prompt to compute, and their paged key-value cache."""
    size, heads, kv_heads = 16, 4, 2
    requests = []
    for _ in range(3):
        ids = [7] * int(rng.integers(1, 20))
        for _ in range(2):
            ids.append(PO)
            for _ in range(int(rng.integers(1, 5))):
                ids += [P, *[7] * int(rng.integers(0, 30)), EP]
            ids += [PC, *[7] * int(rng.integers(1, 9))]
        computed = int(rng.integers(0, len(ids)))
        end = int(rng.integers(computed + 1, len(ids) + 1))
        requests.append((annotate(ids, TAGS), computed, end))
    blocks = [-(-end // size) for _, _, end in requests]
    order = rng.permutation(sum(blocks) + 2)
    table = np.zeros((3, max(blocks)), dtype=np.int64)
    used = 0
    for i, count in enumerate(blocks):
        table[i, :count] = order[used : used + count]
        used += count
    tokens = sum(end - computed for _, computed, end in requests)
    hidden = np.stack(
        [
            np.concatenate([getattr(s, name)[computed:end] for s, computed, end in requests])
            for name in ("hidden_start", "hidden_end")
        ]
    )
    return {
        "requests": requests,
        "block_table": torch.from_numpy(table),
        "query_start_loc": torch.tensor(np.cumsum([0, *(end - computed for _, computed, end in requests)])),
        "seq_lens": torch.tensor([end for _, _, end in requests]),
        "hidden": torch.from_numpy(hidden),
        "keys": torch.randn(len(order), size, kv_heads, dim),
        "values": torch.randn(len(order), size, kv_heads, dim),
        "query": torch.randn(tokens, heads, dim) * 3,
    }


def dense_step(s: dict[str, Any], structured: bool = True) -> torch.Tensor:
    """(tokens, heads, dim) by dense masks, request by request."""
    found = []
    for i, (structure, computed, end) in enumerate(s["requests"]):
        index = torch.arange(end)
        block, offset = s["block_table"][i, index // 16], index % 16
        mask = dense_mask(structure)[computed:end, :end]
        if not structured:
            mask = (index[None] <= index[computed:end, None]).expand_as(mask)
        start = int(s["query_start_loc"][i])
        q = s["query"][start : start + end - computed].transpose(0, 1)
        k, v = (s[name][block, offset].transpose(0, 1) for name in ("keys", "values"))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        found.append(out.transpose(0, 1))
    return torch.cat(found)


def test_hidden_rows_name_the_right_keys() -> None:
    for seed in range(30):
        s = step(np.random.default_rng(seed))
        rows = find(s["hidden"], s["query_start_loc"], s["seq_lens"])
        expected = []
        for i, (structure, computed, end) in enumerate(s["requests"]):
            for key in range(computed, end):
                low, high = int(structure.hidden_start[key]), int(structure.hidden_end[key])
                if low < high:
                    expected.append((int(s["query_start_loc"][i]) + key - computed, i, key, low, high))
        if not expected:
            assert rows is None
            continue
        columns = (rows.row, rows.request, rows.key, rows.start, rows.end)
        assert list(zip(*(column.tolist() for column in columns), strict=True)) == expected


def varlen(q, k, v, cu_seqlens_q, softmax_scale, causal, block_table=None, seqused_k=None, cu_seqlens_k=None, **_):
    """FlashAttention's function by dense attention: out (tokens, heads, dim), log-sum-exp (heads, tokens)."""
    out, lse = torch.empty_like(q), torch.empty(q.shape[1], q.shape[0])
    for i in range(len(cu_seqlens_q) - 1):
        a, b = int(cu_seqlens_q[i]), int(cu_seqlens_q[i + 1])
        if block_table is None:
            keys, values = (x[int(cu_seqlens_k[i]) : int(cu_seqlens_k[i + 1])] for x in (k, v))
        else:
            index = torch.arange(int(seqused_k[i]))
            keys, values = (x[block_table[i, index // x.shape[1]].long(), index % x.shape[1]] for x in (k, v))
        keys, values = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", q[a:b], keys) * softmax_scale
        if causal:  # aligned to the bottom right
            scores = scores.masked_fill(~torch.ones(scores.shape[1:]).tril(len(keys) - (b - a)).bool(), -torch.inf)
        lse[:, a:b] = scores.logsumexp(-1)
        out[a:b] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
    return out, lse


def merge(output, prefix, prefix_lse, suffix, suffix_lse):
    weights = torch.stack([prefix_lse, suffix_lse]).softmax(0).transpose(1, 2)[..., None]
    output.copy_(weights[0] * prefix + weights[1] * suffix)


def test_the_gpu_backend_computes_what_a_dense_mask_does() -> None:
    from parallel_r1.rollout.vllm_flash_attention import attend, make_segments

    checked = 0
    for seed in range(40):
        torch.manual_seed(seed)
        s = step(np.random.default_rng(seed))
        rows = find(s["hidden"], s["query_start_loc"], s["seq_lens"])
        if rows is None:
            continue
        output, expected = dense_step(s, structured=False), dense_step(s)
        assert (output - expected).abs().max() > 1e-2  # control: causal attention is something else
        segments = make_segments(rows, s["block_table"], 16)
        attend(varlen, merge, s["query"], s["keys"], s["values"], segments, output, s["query"].shape[-1] ** -0.5)
        assert (output - expected).abs().max() < 1e-5
        checked += 1
    assert checked > 20


@pytest.mark.parametrize("limit", [1, 2**25])
def test_the_cpu_backend_computes_what_a_dense_mask_does(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from parallel_r1.rollout import vllm_cpu_attention as cpu

    monkeypatch.setattr(cpu, "SCORES", limit)  # 1: every request is a batch of its own
    for seed in range(20):
        s = step(np.random.default_rng(seed))
        rows = find(s["hidden"], s["query_start_loc"], s["seq_lens"])
        if rows is None:
            continue
        output, expected = dense_step(s, structured=False), dense_step(s)
        batches = cpu.make_batches(rows, s["block_table"], 16)
        assert len(batches) == (len(rows.request.unique()) if limit == 1 else 1)
        for batch in batches:
            keys, values = (cpu.read_cache(s[name].transpose(1, 2), batch.blocks, None) for name in ("keys", "values"))
            found = torch.nn.functional.scaled_dot_product_attention(
                s["query"][batch.row].transpose(1, 2), keys, values, attn_mask=batch.mask, enable_gqa=True
            )
            output[batch.row[batch.valid]] = found.transpose(1, 2)[batch.valid]
        assert (output - expected).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("size", "isa"), [(16, "vec16"), (32, "vec"), (128, "vec")])
def test_cache_layout_reads_back_what_the_kernel_wrote(dtype: torch.dtype, size: int, isa: str) -> None:
    from vllm import _custom_ops as ops

    from parallel_r1.rollout.vllm_cpu_attention import cache_layout, read_cache

    heads, dim, count = 2, 32, 3
    tokens = torch.randn(count * size, heads, dim).to(dtype)
    caches = torch.zeros(count, heads, 2 * size, dim, dtype=dtype).chunk(2, dim=2)
    slots = torch.arange(count * size)
    scales = {"k_scale": 1.0, "v_scale": 1.0, "kv_cache_dtype": "auto"}
    ops.cpu_attn_reshape_and_cache(tokens, -tokens, *caches, slots, isa, **scales)
    for cache, layout, sign in zip(caches, cache_layout(dtype, size, dim, isa), (1, -1), strict=True):
        found = read_cache(cache, torch.tensor([[2, 0]]), layout)[0]
        expected = tokens.view(count, size, heads, dim)[[2, 0]].flatten(0, 1).transpose(0, 1)
        assert torch.equal(found, sign * expected)
