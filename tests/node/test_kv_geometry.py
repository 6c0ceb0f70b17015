"""KV bytes of well-known models, by hand; what a config.json leaves open is refused."""

from __future__ import annotations

from typing import Any

import pytest
from node.kv_models import MODELS

from maestro_agents.protocol import UnsupportedError
from maestro_backend.config import Config
from maestro_backend.scheduler import KvGeometry
from maestro_backend.workers import ENGINES, Checkpoint, ServedModel
from maestro_backend.workers._kv_geometry import kv_geometry
from maestro_backend.workers._kv_layers import read_layers, text_config


def geometry(name: str, **given: Any) -> KvGeometry:
    usual: dict[str, Any] = {"dtype": "bfloat16", "block_tokens": 16, "in_flight_tokens": 2048}
    return kv_geometry(MODELS[name], **{**usual, **given})


@pytest.mark.parametrize(
    ("name", "token_bytes"),
    [
        ("SmolLM2-135M", 2 * 30 * 3 * 64 * 2),
        ("Llama-2-7B", 524_288),
        ("Llama-3-8B", 131_072),
        ("GPT-2", 2 * 12 * 768 * 2),
        ("Falcon-7B", 2 * 32 * 64 * 2),
        ("Qwen2.5-7B", 2 * 28 * 4 * 128 * 2),
        ("Qwen3-8B", 2 * 36 * 8 * 128 * 2),
        ("DeepSeek-V2-Lite", 27 * 576 * 2),
        ("DeepSeek-V3", 70_272),
    ],
)
def test_bytes_per_token(name: str, token_bytes: int) -> None:
    known = geometry(name)
    assert known.token_bytes == token_bytes
    assert known.bytes_of(1) == 16 * token_bytes
    assert geometry(name, kv_dtype="fp8").token_bytes * 2 == token_bytes
    assert geometry(name, dtype="float32").token_bytes == 2 * token_bytes


@pytest.mark.parametrize(
    ("name", "full", "sliding", "layers"),
    [
        ("Gemma-2-9B", 1, 1, 21),
        ("Gemma-3-1B", 1, 6, 4),
        ("Gemma-3-4B", 1, 6, 5),
        ("Gemma-3-27B", 1, 6, 10),
        ("gpt-oss-20b", 1, 1, 12),
        ("Mistral-7B-v0.1", 0, 1, 32),
    ],
)
def test_layers_that_slide_form_groups(name: str, full: int, sliding: int, layers: int) -> None:
    """As many layers to a group as there are of the rarer kind; a block spans one group."""
    known = geometry(name)
    page = 16 * read_layers(MODELS[name], dtype="bfloat16").token_bytes
    assert [g.most_blocks is None for g in known.groups].count(True) == full
    assert len(known.groups) == full + sliding
    assert known.block_bytes == layers * page


def test_a_window_bounds_a_long_request() -> None:
    """A window of 128 tokens less one, a step of 2048 before it, and a block for where it cuts."""
    known = geometry("gpt-oss-20b")
    assert [g.most_blocks for g in known.groups] == [(127 + 2048 + 15) // 16 + 1, None]
    assert known.blocks(1000) == 2 * 63
    assert known.blocks(131_072) == 8192 + 137
    whole = geometry("gpt-oss-20b", hybrid=False)
    assert whole.bytes_of(131_072) == 8192 * 16 * 24 * 2 * 8 * 64 * 2


def test_devices_share_kv_heads_but_not_a_latent_vector() -> None:
    eight = geometry("Llama-3-8B", tensor_parallel=8).token_bytes
    assert eight * 8 == geometry("Llama-3-8B").token_bytes
    assert geometry("Llama-3-8B", tensor_parallel=32).token_bytes == eight, "each has one"
    assert geometry("DeepSeek-V3", tensor_parallel=8) == geometry("DeepSeek-V3")


@pytest.mark.parametrize(
    ("quantised", "size"),
    [
        ({"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 8}}, 1),
        ({"quant_method": "modelopt", "kv_cache_quant_algo": "FP8"}, 1),
        ({"quant_method": "modelopt", "quantization": {"kv_cache_quant_algo": "FP8"}}, 1),
        ({"quant_method": "awq"}, 2),
        ({"quant_method": "compressed-tensors", "kv_cache_scheme": None}, 2),
    ],
)
def test_a_checkpoint_may_ask_for_a_smaller_cache(quantised: dict[str, Any], size: int) -> None:
    config = {**MODELS["Llama-3-8B"], "quantization_config": quantised}
    assert read_layers(config, dtype="bfloat16").token_bytes == 2 * 8 * 128 * size
    told = read_layers(config, dtype="bfloat16", kv_dtype="bfloat16")
    assert told.token_bytes == 2 * 8 * 128 * 2, "who is asked otherwise obeys"


def test_what_a_multimodal_model_tells_outside_is_not_lost() -> None:
    text = text_config(MODELS["Gemma-3-4B"])
    assert (text["torch_dtype"], text["num_hidden_layers"]) == ("bfloat16", 34)
    assert Checkpoint("/m", geometry=text).stored_dtype == "bfloat16"


LLAMA = MODELS["Llama-3-8B"]


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({}, "does not tell num_hidden_layers"),
        ({"model_type": "mamba", "state_size": 16}, "layers with a state"),
        ({**LLAMA, "layer_types": ["linear_attention", "full_attention"] * 16}, "linear_attention"),
        ({**LLAMA, "full_attention_interval": 4}, "layers with a state"),
        ({**LLAMA, "num_key_value_heads": [4, 8]}, "no one num"),
        ({**LLAMA, "kv_lora_rank": 256}, "latent"),
        ({**MODELS["DeepSeek-V3"], "index_topk": 2048}, "index"),
        ({**LLAMA, "is_encoder_decoder": True}, "encoder"),
        ({**LLAMA, "v_head_dim": 64}, "differ in size"),
        ({**LLAMA, "quantization_config": {"kv_cache_scheme": {"num_bits": 4}}}, "4 bits"),
    ],
)
def test_what_is_not_told_is_not_guessed(config: dict[str, Any], says: str) -> None:
    with pytest.raises(UnsupportedError, match=says):
        read_layers(config, dtype="bfloat16")


def served(engine_args: dict[str, Any], **given: Any) -> ServedModel:
    settings = {"source": "hub:org/m", "engine_args": engine_args, **given}
    parsed = Config.parse({"models": {"m": settings}}).models["m"]
    return ServedModel("m", parsed, Checkpoint("/models/m", True, 1000, LLAMA))


def test_settings_of_the_engine_change_what_it_builds() -> None:
    vllm = ENGINES["vllm"]
    usual = vllm.kv_geometry(served({}))
    assert usual is not None and [g.block_tokens for g in usual.groups] == [128]
    for args, changed in (
        ({"block-size": 32}, (32, 131_072)),
        ({"kv_cache_dtype": "fp8_e5m2"}, (128, 65_536)),
        ({"speculative_config": {"method": "eagle3"}}, None),
        ({"kv_cache_dtype": "int4_per_token_head"}, None),
    ):
        known = vllm.kv_geometry(served(args))
        assert (known and (known.groups[0].block_tokens, known.token_bytes)) == changed
    measured = vllm.kv_geometry(served({"block_size": 32}), 64)
    assert measured is not None and measured.groups[0].block_tokens == 64


def test_the_floor_is_one_longest_request_and_the_block_that_vllm_sets_apart() -> None:
    floor = ENGINES["vllm"].kv_floor_bytes(served({}, max_model_len=1000))
    assert floor == (8 + 1) * 128 * 131_072
