"""The numbers of well-known `config.json` files, as far as a KV cache depends on them."""

from __future__ import annotations

from typing import Any


def _model(kind: str, layers: int, heads: int, hidden: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": kind,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_size": hidden,
        **more,
    }


_LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
_FULL, _SLIDING = "full_attention", "sliding_attention"

MODELS: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": _model("llama", 30, 9, 576, num_key_value_heads=3),
    "Llama-2-7B": _model("llama", 32, 32, 4096),
    "Llama-3-8B": _model("llama", 32, 32, 4096, num_key_value_heads=8),
    "Llama-3-70B": _model("llama", 80, 64, 8192, num_key_value_heads=8),
    "GPT-2": {"model_type": "gpt2", "n_layer": 12, "n_head": 12, "n_embd": 768},
    "Falcon-7B": _model("falcon", 32, 71, 4544, multi_query=True, new_decoder_architecture=False),
    "Qwen2.5-7B": _model(
        "qwen2", 28, 28, 3584, num_key_value_heads=4, sliding_window=131072,
        use_sliding_window=False, max_window_layers=28,
    ),
    "Qwen3-8B": _model(
        "qwen3", 36, 32, 4096, num_key_value_heads=8, head_dim=128, sliding_window=None,
        use_sliding_window=False, max_window_layers=36,
    ),
    "Mistral-7B-v0.1": _model("mistral", 32, 32, 4096, num_key_value_heads=8, sliding_window=4096),
    "Mistral-7B-v0.3": _model("mistral", 32, 32, 4096, num_key_value_heads=8, sliding_window=None),
    "Gemma-2-9B": _model(
        "gemma2", 42, 16, 3584, num_key_value_heads=8, head_dim=256, sliding_window=4096
    ),
    "Gemma-3-1B": _model(
        "gemma3_text", 26, 4, 1152, num_key_value_heads=1, head_dim=256, sliding_window=512,
        sliding_window_pattern=6,
    ),
    "Gemma-3-4B": {
        "model_type": "gemma3",
        "torch_dtype": "bfloat16",
        "text_config": {
            "model_type": "gemma3_text",
            "hidden_size": 2560,
            "num_hidden_layers": 34,
            "sliding_window": 1024,
        },
    },
    "Gemma-3-27B": {
        "model_type": "gemma3",
        "torch_dtype": "bfloat16",
        "text_config": _model(
            "gemma3_text", 62, 32, 5376, num_key_value_heads=16, head_dim=128, sliding_window=1024
        ),
    },
    "gpt-oss-20b": _model(
        "gpt_oss", 24, 64, 2880, num_key_value_heads=8, head_dim=64, sliding_window=128,
        layer_types=[_SLIDING, _FULL] * 12,
    ),
    "DeepSeek-V2-Lite": _model("deepseek_v2", 27, 16, 2048, num_key_value_heads=16, **_LATENT),
    "DeepSeek-V3": _model("deepseek_v3", 61, 128, 7168, num_key_value_heads=128, **_LATENT),
}  # fmt: skip
