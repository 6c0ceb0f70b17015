"""One text for all weights of a model, to tell whether they came back as they went."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

_CHUNK = 1 << 22  # of a byte eight are made: it must fit beside everything else


def checksum(model: Any) -> str:
    """SHA-256 over name, shape and sum of each parameter and buffer.

    The sum is of the tensor's bytes, each times its place (modulo a prime), in 64 bits: swapped or
    shifted bytes change it. Ours.
    """
    digest = hashlib.sha256()
    for tensors in (model.named_parameters(), model.named_buffers()):
        for name, tensor in tensors:
            digest.update(f"{name} {tuple(tensor.shape)} {_sum(tensor.detach())}\n".encode())
    return digest.hexdigest()


def _sum(tensor: Any) -> int:
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    places = torch.arange(1, _CHUNK + 1, device=flat.device, dtype=torch.int64) % 65521
    total = torch.zeros((), device=flat.device, dtype=torch.int64)
    for number, start in enumerate(range(0, flat.numel(), _CHUNK)):
        part = flat[start : start + _CHUNK]
        total += (number + 1) * (part * places[: part.numel()]).sum()
    return int(total)
