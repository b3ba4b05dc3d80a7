"""What only a GPU can show; skipped without one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from parallel_r1.attention import PackedStructure, structured_attention
from test_attention import packed_dense, random_structures
from test_structured_engine import dense_step, step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@pytest.mark.parametrize("seed", range(4))
def test_flex_attention_and_its_gradient_equal_a_dense_mask(seed: int) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    structures = random_structures(seed)
    packed, dense = PackedStructure(structures, "cuda"), packed_dense(structures).cuda()
    q, k, v = (torch.randn(1, heads, len(packed), 64, device="cuda", requires_grad=True) for heads in (4, 2, 2))
    found, _ = structured_attention(torch.nn.Module(), q, k, v, None, structure=packed)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=dense, enable_gqa=True).transpose(1, 2)
    assert (found - expected).abs().max() < 1e-5
    direction = torch.randn_like(found)
    ours = torch.autograd.grad(found, (q, k, v), direction)
    theirs = torch.autograd.grad(expected, (q, k, v), direction)
    assert max((a - b).abs().max() for a, b in zip(ours, theirs, strict=True)) < 1e-5


def test_flash_attention_segments_equal_a_dense_mask() -> None:
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func
    from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

    from parallel_r1.rollout.hidden_rows import find
    from parallel_r1.rollout.vllm_flash_attention import attend, make_segments

    checked = 0
    for seed in range(20):
        torch.manual_seed(seed)
        s = step(np.random.default_rng(seed), dim=64)
        expected, causal = dense_step(s), dense_step(s, structured=False)
        s = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in s.items()}
        rows = find(s["hidden"], s["query_start_loc"], s["seq_lens"])
        if rows is None:
            continue
        query, keys, values, output = (x.bfloat16().cuda() for x in (s["query"], s["keys"], s["values"], causal))
        segments = make_segments(rows, s["block_table"].int(), 16)
        attend(flash_attn_varlen_func, merge_attn_states, query, keys, values, segments, output, 64**-0.5)
        assert (output.float().cpu() - expected).abs().max() < 0.05  # bfloat16
        assert (causal - expected).abs().max() > 0.5
        checked += 1
    assert checked > 10
