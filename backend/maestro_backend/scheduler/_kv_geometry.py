"""What a request holds of a worker's KV cache: whole blocks, group of layers by group of layers."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil


@dataclass(frozen=True, slots=True)
class KvGroup:
    """Layers that share one block table.

    A block of theirs holds `block_tokens` tokens of a request, and a request holds `most_blocks`
    of them at most (None: no bound is known). That is what bounds layers that look back over a
    window, and those that keep a state which does not grow.
    """

    block_tokens: int
    most_blocks: int | None = None

    def blocks(self, tokens: int, choices: int = 1) -> int:
        """The most blocks that a call of so many tokens holds in this group.

        Each of its choices is a request of its own, and begins blocks of its own.
        """
        needed = -(-tokens // self.block_tokens) + choices - 1
        return needed if self.most_blocks is None else min(needed, self.most_blocks * choices)


@dataclass(frozen=True, slots=True)
class KvGeometry:
    """One pool of blocks of `block_bytes` bytes each (per device), and who takes blocks of it.

    As vLLM accounts (`KVCacheManager`, v1): each group takes its blocks for itself, and a block of
    any group costs the same. What vLLM sets apart for itself, one block of the pool, is not in it.
    """

    block_bytes: int
    groups: tuple[KvGroup, ...]

    @property
    def token_bytes(self) -> int:
        """Bytes by which a request grows per token, over whole blocks and below every bound."""
        return ceil(sum(self.block_bytes / group.block_tokens for group in self.groups))

    def blocks(self, tokens: int, choices: int = 1) -> int:
        """Blocks that a call of so many tokens (prompt and all choices) holds at most."""
        blocks = 0
        for group in self.groups:
            blocks += group.blocks(tokens, choices)
        return blocks

    def bytes_of(self, tokens: int, choices: int = 1) -> int:
        """The same in bytes."""
        return self.blocks(tokens, choices) * self.block_bytes

    def kept_bytes_of(self, tokens: int) -> int:
        """Bytes of the prefix that an ended request of so many tokens leaves behind, at most.

        Only full blocks are found again, but those that a window has left behind may be, too.
        """
        return sum(tokens // group.block_tokens for group in self.groups) * self.block_bytes


def one_group(block_bytes: int, block_tokens: int) -> KvGeometry:
    """The geometry of an engine all of whose layers grow alike.

    `block_bytes` are those of a block over all layers, on one device.
    """
    return KvGeometry(block_bytes, (KvGroup(block_tokens),))
