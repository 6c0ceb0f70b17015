"""Llamas of given sizes without a download: a configuration, a byte-level tokenizer, and weights
that are random, or no more than a file's holes where vLLM makes its own (`load_format: dummy`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_GIB = 1024**3
_MIB = 1024**2
_BF16 = 2


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama's sizes."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int

    @property
    def head(self) -> int:
        """The size of one attention head."""
        return self.hidden // self.heads

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes, as checkpoints have them."""
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocabulary, self.hidden)
        kv = self.kv_heads * self.head
        layer = {
            "input_layernorm": (self.hidden,),
            "post_attention_layernorm": (self.hidden,),
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }
        for number in range(self.layers):
            for name, shape in layer.items():
                yield f"model.layers.{number}.{name}.weight", shape

    def config(self) -> dict[str, Any]:
        """The content of `config.json`."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 16384,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "dtype": "bfloat16",
        }


ON_GPU = {
    "small": Shape(2048, 16, 32, 8, 8192, 128256),  # 1.5 B, as Llama 3.2 1B with its own head
    "medium": Shape(4096, 32, 32, 8, 14336, 128256),  # 8.0 B, as Llama 3.1 8B
    "large": Shape(5120, 48, 40, 8, 13824, 152064),  # 14.8 B, as Qwen 2.5 14B
}
ON_CPU = {
    "small": Shape(256, 4, 4, 2, 1024, 1024),
    "medium": Shape(512, 6, 8, 2, 1536, 1024),
    "large": Shape(512, 10, 8, 2, 2048, 1024),
}
"""For a dry run only: these figures say nothing of a GPU."""

_STUB_MIB = {"small": 16, "medium": 32, "large": 48}


class Models:
    """The settings of models by size, their files made in `folder` when first asked for."""

    def __init__(self, engine: str, folder: Path) -> None:
        self._engine = engine
        self._folder = folder / engine
        self._shapes = ON_GPU if engine == "vllm" else ON_CPU

    def made_up(self, size: str, *, eager: bool = True, **settings: Any) -> dict[str, Any]:
        """On a GPU with weights that vLLM makes up, all layers alike and next to nothing: answers
        hardly depend on them, so that only their checksum tells of them. Else as `random`."""
        if self._engine != "vllm":
            return self.random(size, **settings)
        arguments = {"load_format": "dummy", **({"enforce_eager": True} if eager else {})}
        return self._settings(size, "made-up", arguments, settings)

    def random(self, size: str, **settings: Any) -> dict[str, Any]:
        """With random weights on the disk."""
        arguments = {"enforce_eager": True} if self._engine == "vllm" else {}
        return self._settings(size, "random", arguments, settings)

    def folder(self, size: str, kind: str) -> Path:
        """Of the checkpoint, which is made if it is not there."""
        made = self._folder / f"{size}-{kind}"
        if not (made / "config.json").is_file():
            made.mkdir(parents=True, exist_ok=True)
            _write(made, self._shapes[size], random=kind == "random")
        return made

    def _settings(
        self, size: str, kind: str, arguments: dict[str, Any], settings: dict[str, Any]
    ) -> dict[str, Any]:
        if self._engine == "stub":
            stub = {"weights_bytes": _STUB_MIB[size] * _MIB, "resume_s": 0.1, "suspend_s": 0.02}
            more = {**stub, "decode_tokens_s": 400.0, **settings.pop("engine_args", {})}
            return {"source": size, "engine": "stub", "engine_args": more, **settings}
        memory = 4 * _GIB if self._engine == "vllm" else 64 * _MIB
        # What kvcached breaks must not take the other steps with it: one step asks for it.
        only_when_asked = {"elastic_kv": False} if self._engine == "vllm" else {}
        return {
            **only_when_asked,
            "source": str(self.folder(size, kind)),
            "engine": self._engine,
            "kv_memory": memory,
            "max_model_len": 8192 if self._engine == "vllm" else 2048,
            "engine_args": {**arguments, **settings.pop("engine_args", {})},
            **settings,
        }


def _write(folder: Path, shape: Shape, *, random: bool) -> None:
    """`config.json` comes last: with it the checkpoint is whole."""
    from maestro_backend.workers._convert import byte_tokenizer

    byte_tokenizer(shape.vocabulary).save_pretrained(folder)
    weights = folder / "model.safetensors"
    if random:
        _write_random(weights, shape)
    else:
        _write_holes(weights, shape)
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=1))


def _write_random(file: Path, shape: Shape) -> None:
    import torch
    from safetensors.torch import save_file

    device = "cuda" if torch.cuda.is_available() else "cpu"
    maker = torch.Generator(device).manual_seed(0)
    tensors = {}
    for name, size in shape.tensors():
        if len(size) == 1:
            tensors[name] = torch.ones(size, dtype=torch.bfloat16)
        else:
            values = torch.randn(size, generator=maker, device=device) * 0.02
            tensors[name] = values.to(torch.bfloat16).cpu()
    save_file(tensors, file, metadata={"format": "pt"})


def _write_holes(file: Path, shape: Shape) -> None:
    """A header as of all the tensors, and a file of that size which takes no room."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, size in shape.tensors():
        begin, end = end, end + _BF16 * _product(size)
        header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        os.truncate(out.fileno(), 8 + len(text) + end)


def _product(size: tuple[int, ...]) -> int:
    whole = 1
    for part in size:
        whole *= part
    return whole
