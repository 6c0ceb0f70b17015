"""vLLM's own KV arithmetic, in a process of its own: cases in as JSON, what vLLM makes of them out.

The configs go through `transformers` and vLLM's reading of them; specs, groups, bytes per block and
admission are vLLM's. Only which layers slide is repeated here, from `Attention.__init__` and
`EngineArgs.create_engine_config`.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

from maestro_backend.workers.vllm_plugin import hide_mismatched_packages

hide_mismatched_packages()

import torch  # noqa: E402
from transformers import AutoConfig  # noqa: E402
from vllm.sampling_params import SamplingParams  # noqa: E402
from vllm.transformers_utils.model_arch_config_convertor import (  # noqa: E402
    MODEL_ARCH_CONFIG_CONVERTORS,
    ModelArchConfigConvertorBase,
)
from vllm.v1.core import kv_cache_utils  # noqa: E402
from vllm.v1.core.kv_cache_manager import KVCacheManager  # noqa: E402
from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs  # noqa: E402
from vllm.v1.kv_cache_interface import (  # noqa: E402
    FullAttentionSpec,
    KVCacheConfig,
    MLAAttentionSpec,
    SlidingWindowSpec,
)
from vllm.v1.kv_cache_layout import KVCacheLayout  # noqa: E402
from vllm.v1.request import Request  # noqa: E402


def vllm_config(case: dict[str, Any]) -> Any:
    return SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=case["max_model_len"]),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=not case["hybrid"]),
        cache_config=SimpleNamespace(get_resolved_kv_cache_layout=lambda: KVCacheLayout.LBNHC),
        attention_config=SimpleNamespace(hisparse_config=None),
        speculative_config=None,
        max_in_flight_tokens=case["in_flight_tokens"],
    )


def specs(case: dict[str, Any]) -> dict[str, Any]:
    config = dict(case["config"])
    whole = AutoConfig.for_model(config.pop("model_type"), **config)
    text = whole.get_text_config()
    read = MODEL_ARCH_CONFIG_CONVERTORS.get(text.model_type, ModelArchConfigConvertorBase)(
        whole, text
    )
    dtype = torch.float8_e4m3fn if case["kv_dtype"] == "fp8" else getattr(torch, case["dtype"])
    shape = {"block_size": case["block_tokens"], "head_size": read.get_head_size(), "dtype": dtype}
    layers = range(read.get_num_hidden_layers())
    if read.is_deepseek_mla():
        return {f"{i}": MLAAttentionSpec(num_kv_heads=1, **shape) for i in layers}
    shape["num_kv_heads"] = max(1, read.get_total_num_kv_heads() // case["tensor_parallel"])
    made: dict[str, Any] = {}
    for layer, window in enumerate(windows(text, len(layers))):
        made[f"{layer}"] = (
            SlidingWindowSpec(sliding_window=window, **shape)
            if window
            else FullAttentionSpec(**shape)
        )
    return made


def windows(text: Any, layers: int) -> list[int | None]:
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None) or ["sliding_attention"] * layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def answer(case: dict[str, Any]) -> dict[str, Any]:
    config = vllm_config(case)
    groups = kv_cache_utils.get_kv_cache_groups(config, specs(case))
    pool = KVCacheConfig(num_blocks=9000, kv_cache_tensors=[], kv_cache_groups=groups)
    pool = kv_cache_utils.generate_scheduler_kv_cache_config([pool])
    manager = KVCacheManager(
        pool,
        case["max_model_len"],
        case["block_tokens"],
        case["block_tokens"],
        max_in_flight_tokens=case["in_flight_tokens"],
        enable_caching=False,
    )
    singles = manager.coordinator.single_type_managers
    return {
        "block_bytes": kv_cache_utils._pool_bytes_per_block(groups),
        "longest_bytes": kv_cache_utils._max_memory_usage_bytes_from_groups(config, groups),
        "groups": len(groups),
        "most_blocks": [
            -(-s.kv_cache_spec.max_memory_usage_bytes(config) // s.kv_cache_spec.page_size_bytes)
            for s in singles
        ],
        "admitted": [sum(admitted(s, tokens) for s in singles) for tokens in case["lengths"]],
        "held": [most_held(manager, tokens, case) for tokens in case["lengths"]],
    }


def admitted(single: Any, tokens: int) -> int:
    """Blocks that must be free before a request of so many tokens is let in."""
    return int(
        single.get_num_blocks_to_allocate("new", tokens, [], 0, 0, tokens, apply_admission_cap=True)
    )


def most_held(manager: Any, tokens: int, case: dict[str, Any]) -> int:
    """Run a request through the block manager in steps; the most blocks that it held at once."""
    request = Request(f"r{tokens}", [1] * tokens, SamplingParams(max_tokens=1), None)
    null, most = manager.block_pool.null_block.block_id, 0
    while request.num_computed_tokens < tokens:
        step = min(case["in_flight_tokens"] // 2, tokens - request.num_computed_tokens)
        if request.num_computed_tokens >= tokens // 2:
            step = min(step, 1 + request.num_computed_tokens % 7)  # as if it decoded
        assert manager.allocate_slots(request, step) is not None
        request.num_computed_tokens += step
        tables = manager.get_block_ids(request.request_id)
        most = max(most, sum(block != null for table in tables for block in table))
    manager.free(request)
    return most


if __name__ == "__main__":
    register_all_kvcache_specs(None)
    said, sys.stdout = sys.stdout, sys.stderr
    print(json.dumps([answer(case) for case in json.load(sys.stdin)]), file=said)
