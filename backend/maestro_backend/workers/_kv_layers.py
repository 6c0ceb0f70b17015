"""What each layer of a model keeps per token, as its `config.json` and vLLM 0.30 have it.

Where vLLM does something that the file does not tell (a state beside the keys and values, an index,
heads that differ from layer to layer), nothing is guessed: the engine tells once it runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from maestro_agents.protocol import UnsupportedError

Config = Mapping[str, Any]
Windows = tuple[int | None, ...]

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1}
_FP8 = ("fp8_e4m3", "fp8_e5m2", "fp8_inc")

_TEXT_KEYS = ("text_config", "language_config", "llm_config")
_OUTER_KEYS = ("dtype", "quantization_config", "torch_dtype")
"""Multimodal models tell these once, outside of the language model's part."""

_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads")
_HIDDEN = ("hidden_size", "n_embd", "d_model")
_KV_HEADS = ("n_head_kv", "num_kv_heads", "num_key_value_heads", "multi_query_group_num")

_GEMMA3 = {"sliding_window": 4096, "sliding_window_pattern": 6}
_QWEN = {"use_sliding_window": False, "max_window_layers": 28}
_DEFAULTS: Mapping[str, Config] = {
    "cohere2": {"sliding_window_pattern": 4},
    "gemma2": {"sliding_window": 4096, "sliding_window_pattern": 2},
    "gemma3_text": {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "num_hidden_layers": 26,
        **_GEMMA3,
    },
    "gpt_oss": {"sliding_window_pattern": 2},
    "mistral": {"num_key_value_heads": 8},
    "qwen2": _QWEN,
    "qwen2_moe": _QWEN,
    "qwen3": {**_QWEN, "head_dim": 128},
    "qwen3_moe": _QWEN,
}
"""What `transformers` assumes where a file is silent, of the models whose files are."""

_LATENT = (
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe_lite",
    "kimi_k2",
)
"""Models of which vLLM keeps one latent vector per token and layer (MLA), and nothing else."""

_UNTOLD = {
    "attn_layer_period": "layers with a state",
    "attn_type_list": "layers with a state",
    "block_configs": "layers that differ",
    "compress_ratios": "compressed layers",
    "conv_L_cache": "layers with a state",
    "full_attention_interval": "layers with a state",
    "global_head_dim": "layers that differ",
    "hybrid_override_pattern": "layers with a state",
    "index_topk": "an index beside the keys",
    "layers_block_type": "layers with a state",
    "linear_attn_config": "layers with a state",
    "mamba_d_state": "layers with a state",
    "num_global_key_value_heads": "layers that differ",
    "rswa_window": "a window over the output only",
    "ssm_cfg": "layers with a state",
    "state_size": "layers with a state",
    "swa_head_dim": "layers that differ",
}

_FULL = ("attention", "chunked_attention", "full_attention")
"""vLLM keeps chunked layers whole: it turns its hybrid allocation off for them."""
_SLIDING = "sliding_attention"


@dataclass(frozen=True, slots=True)
class KvLayers:
    """The layers that keep keys and values, in the model's order.

    `windows` has one entry per layer: how many tokens it looks back, None for all of them.
    `token_bytes` is what one layer keeps of one token, on each device.
    """

    windows: Windows
    token_bytes: int


def read_layers(
    config: Config, *, dtype: str, kv_dtype: str = "auto", tensor_parallel: int = 1
) -> KvLayers:
    """The layers of a model that is served as `dtype` on so many devices.

    `config` is the content of its `config.json`, `kv_dtype` vLLM's `kv_cache_dtype`.

    Raises:
        UnsupportedError: the file does not tell enough; the message says what it has or lacks.
    """
    told = text_config(config)
    shape = {**_DEFAULTS.get(str(told.get("model_type")), {}), **told}
    _refuse_what_is_untold(shape)
    element = _element_bytes(shape, dtype, kv_dtype)
    return KvLayers(_windows(shape), _elements(shape, tensor_parallel) * element)


def text_config(config: Config) -> Config:
    """The part of a `config.json` that is about the language model; all of it, where it is flat."""
    inner = next((config[key] for key in _TEXT_KEYS if isinstance(config.get(key), Mapping)), None)
    if inner is None:
        return config
    outer = {key: config[key] for key in _OUTER_KEYS if config.get(key) is not None}
    return {**outer, **{key: value for key, value in inner.items() if value is not None}}


def _refuse_what_is_untold(shape: Config) -> None:
    for key, what in _UNTOLD.items():
        if shape.get(key) not in (None, [], {}):
            raise UnsupportedError(f"it has {what} ({key}), whose KV bytes only its engine tells")
    if shape.get("is_encoder_decoder"):
        raise UnsupportedError("it has an encoder, whose KV bytes only its engine tells")
    if shape.get("kv_lora_rank") is not None and shape.get("model_type") not in _LATENT:
        raise UnsupportedError("whether vLLM keeps its latent vectors only its engine tells")


# --- per token ------------------------------------------------------------------------------------


def _elements(shape: Config, tensor_parallel: int) -> int:
    """Numbers that a layer keeps of a token on each device.

    A latent vector is the same on all of them; so is a KV head where there are fewer than devices.
    """
    if shape.get("kv_lora_rank") is not None:
        return _whole(shape, "kv_lora_rank") + _whole(shape, "qk_rope_head_dim")
    heads = _whole(shape, *_HEADS)
    kv_heads = _kv_heads(shape, heads)
    size = _whole(shape, "head_dim") if shape.get("head_dim") else _whole(shape, *_HIDDEN) // heads
    if shape.get("v_head_dim", size) not in (None, size):
        raise UnsupportedError("its keys and values differ in size, and only its engine tells how")
    return 2 * max(1, kv_heads // tensor_parallel) * size


def _kv_heads(shape: Config, heads: int) -> int:
    if shape.get("multi_query") and not shape.get("new_decoder_architecture"):
        return 1
    if all(shape.get(name) is None for name in _KV_HEADS):
        return heads
    return _whole(shape, *_KV_HEADS)


def _element_bytes(shape: Config, dtype: str, kv_dtype: str) -> int:
    """Bytes of one number. Formats that store scales beside them are not known here."""
    chosen = _stored_kv_dtype(shape) if kv_dtype == "auto" else kv_dtype
    name = dtype if chosen == "auto" else "fp8" if chosen in _FP8 else chosen
    if name not in _BYTES:
        raise UnsupportedError(f"how many bytes a KV cache of {name} takes only its engine tells")
    return _BYTES[name]


def _stored_kv_dtype(shape: Config) -> str:
    """What the checkpoint asks for; vLLM follows unless it is told otherwise."""
    quantised = shape.get("quantization_config") or {}
    quantised = {**quantised, **(quantised.get("quantization") or {})}
    scheme = quantised.get("kv_cache_scheme") or quantised.get("kv_cache_quant_algo") or "auto"
    if isinstance(scheme, Mapping):
        scheme = "fp8" if scheme.get("num_bits") == 8 else f"{scheme.get('num_bits')} bits"
    return str(scheme).lower()


# --- per layer ------------------------------------------------------------------------------------


def _windows(shape: Config) -> Windows:
    layers = _whole(shape, *_LAYERS)
    window = shape.get("sliding_window") or None
    if window is not None and shape.get("model_type") == "cohere2":
        window += 1  # as vLLM's model has it
    looks = tuple(window if slides else None for slides in _sliding(shape, layers))
    shared = shape.get("num_kv_shared_layers") or 0  # the last ones read what others keep
    return looks[: layers - shared]


def _sliding(shape: Config, layers: int) -> list[bool]:
    """Whether each layer looks back over the window only."""
    kinds = shape.get("layer_types")
    if kinds:
        odd = {kind for kind in kinds if kind not in (*_FULL, _SLIDING)}
        if odd:
            names = ", ".join(sorted(odd))
            raise UnsupportedError(f"the KV bytes of its layers ({names}) only its engine tells")
        return [kind == _SLIDING for kind in kinds[:layers]]
    if "use_sliding_window" in shape:
        first = shape["max_window_layers"] if shape["use_sliding_window"] else layers
        return [layer >= first for layer in range(layers)]
    pattern = shape.get("sliding_window_pattern") or shape.get("_sliding_window_pattern")
    if isinstance(pattern, str):
        return [pattern[layer % len(pattern)] == "L" for layer in range(layers)]
    if pattern:
        return [(layer + 1) % pattern != 0 for layer in range(layers)]
    return [True] * layers


def _whole(shape: Config, *names: str) -> int:
    """The first of these numbers that is told; never 0."""
    name = next((name for name in names if shape.get(name) is not None), None)
    if name is None:
        raise UnsupportedError(f"its config.json does not tell {names[0]}")
    value = shape[name]
    if isinstance(value, int) and value > 0:
        return value
    raise UnsupportedError(f"its config.json has no one {name} for all layers")
