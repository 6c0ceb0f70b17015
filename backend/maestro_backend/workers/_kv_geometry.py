"""KV geometry from a model's `config.json`: what vLLM will build, before it runs.

It repeats what vLLM 0.30 does (`kv_cache_utils._get_kv_cache_groups_uniform_page_size`,
`SlidingWindowSpec.max_admission_blocks_per_request`); a contract test holds it against vLLM's own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from maestro_backend.scheduler import KvGeometry, KvGroup

from ._kv_layers import KvLayers, read_layers


def kv_geometry(
    config: Mapping[str, Any],
    *,
    dtype: str,
    block_tokens: int,
    in_flight_tokens: int,
    max_model_len: int | None = None,
    kv_dtype: str = "auto",
    tensor_parallel: int = 1,
    hybrid: bool = True,
) -> KvGeometry:
    """What requests hold of each device's KV cache. Sizes in bytes, lengths in tokens.

    `config` is the content of a `config.json`, `dtype` what the model is served in, `kv_dtype`
    vLLM's `kv_cache_dtype` and `block_tokens` its block size. `in_flight_tokens` are the most that
    a step computes, times the steps under way at once: so much more than its window a layer holds.
    `hybrid` is False where vLLM keeps sliding layers whole beside others.

    Raises:
        UnsupportedError: the file does not tell enough; the message says what it has or lacks.
    """
    layers = read_layers(config, dtype=dtype, kv_dtype=kv_dtype, tensor_parallel=tensor_parallel)
    sizes = _group_sizes(_allocated(layers, hybrid))
    groups: list[KvGroup] = []
    for window, split in sizes.items():
        most = _most_blocks(window, block_tokens, in_flight_tokens, max_model_len)
        groups += [KvGroup(block_tokens, most)] * len(split)
    largest = max(max(split) for split in sizes.values())
    return KvGeometry(block_tokens * layers.token_bytes * largest, tuple(groups))


def _allocated(layers: KvLayers, hybrid: bool) -> Counter[int | None]:
    """How many layers there are of each window, as blocks are given to them."""
    counts = Counter(layers.windows)
    mixed = None in counts and len(counts) > 1
    return Counter({None: len(layers.windows)}) if mixed and not hybrid else counts


def _group_sizes(counts: Mapping[int | None, int]) -> dict[int | None, list[int]]:
    """Layers in each group, by window: groups are as large as the smallest kind of layer, or as the
    largest where that is less than half as much again (it wastes less)."""
    least, most = min(counts.values()), max(counts.values())
    size = most if most < least * 1.5 else least
    return {window: _split(count, -(-count // size)) for window, count in counts.items()}


def _split(count: int, groups: int) -> list[int]:
    return [count // groups + (group < count % groups) for group in range(groups)]


def _most_blocks(
    window: int | None, block_tokens: int, in_flight_tokens: int, max_model_len: int | None
) -> int | None:
    """Blocks of a longest request. A window may begin and end within a block, which is one more."""
    if window is None:
        return None if max_model_len is None else -(-max_model_len // block_tokens)
    held = window - 1 + in_flight_tokens
    held = held if max_model_len is None else min(held, max_model_len)
    return -(-held // block_tokens) + 1
