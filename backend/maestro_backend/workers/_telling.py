"""What a failed process's output says went wrong, and the mend where it is known."""

from __future__ import annotations

import re

_MENDS = (
    (
        r"libgomp\S*: cannot open shared object|libgomp\S* not found",
        "the library libgomp is missing; install it (Debian, Ubuntu: apt install libgomp1)",
    ),
    (
        r"Available memory on node|Cannot allocate memory|MemoryError|CUDA out of memory",
        "too little memory is free; lower kv_memory, stop other programs or serve fewer models",
    ),
    (
        r"larger than the (?:maximum|available) .*KV cache|KV cache is needed",
        "the KV cache cannot hold one request of max_model_len; raise kv_memory or lower it",
    ),
    (
        r"No module named '?maestro_backend",
        "the engine's environment lacks Maestro; install maestro-mas there (`python:` in config)",
    ),
    (
        r"No module named '?pip",
        "this environment has no pip; run `python -m ensurepip` in it",
    ),
)
_LOG_LINE = re.compile(r"(?:\(\w+(?: pid=\d+)?\) ?)*(?:([A-Z]+) [\d-]+ [\d:]+ \[[^]]*\] ?)?(.*)")
_ERROR = re.compile(r"\b\w*(?:Error|Exception)\b:\s*\S|(?:^|: )error: ")
_DIED = re.compile(r"\bdied unexpectedly")
_HARMLESS = ("DEBUG", "INFO", "WARNING")
_VAGUE = re.compile(r"Engine core initialization failed|EngineDeadError|Executor failed")


def mend(text: str) -> str:
    """What to do about a failure that is known by its output; "" for an unknown one."""
    return next((advice for pattern, advice in _MENDS if re.search(pattern, text)), "")


def telling_line(text: str) -> str:
    """The last line that names an error (else the last line), after its known mend."""
    lines: list[str] = []
    errors: list[str] = []
    for raw in text.splitlines():
        match = _LOG_LINE.fullmatch(raw.strip())
        level, line = (match[1], match[2].strip()) if match else ("", raw.strip())
        if line:
            lines.append(line)
            if level not in _HARMLESS and (_ERROR.search(line) or _DIED.search(line)):
                errors.append(line)
    precise = [line for line in errors if not _VAGUE.search(line)]
    last = (precise or errors or lines or [""])[-1][:400]
    advice = mend(text)
    return f"{advice} ({last})" if advice and last else advice or last
