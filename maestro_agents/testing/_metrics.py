"""`GET /metrics`: vLLM's names, Prometheus text."""

from __future__ import annotations

from ._engine import Engine


def metrics_text(engine: Engine) -> str:
    """The stub's metrics in the Prometheus text format."""
    settings = engine.settings
    labels = f'engine="0",model_name="{settings.models[0]}"'
    blocks = f'num_gpu_blocks="{settings.kv_blocks}",block_size="{settings.block_size}"'
    gauges = {
        "vllm:num_requests_running": engine.slots.running,
        "vllm:num_requests_waiting": engine.slots.waiting,
    }
    counters = {
        "vllm:prompt_tokens_total": engine.prompt_tokens,
        "vllm:generation_tokens_total": engine.generation_tokens,
    }
    lines = ["# TYPE vllm:cache_config_info gauge"]
    lines.append(f'vllm:cache_config_info{{engine="0",{blocks}}} 1')
    for kind, values in (("gauge", gauges), ("counter", counters)):
        for name, value in values.items():
            lines += [f"# TYPE {name} {kind}", f"{name}{{{labels}}} {value}"]
    lines.append("# TYPE vllm:request_success_total counter")
    for reason in ("stop", "length", "tool_calls", "abort"):
        count = engine.finished[reason]
        lines.append(f'vllm:request_success_total{{{labels},finished_reason="{reason}"}} {count}')
    return "\n".join(lines) + "\n"
