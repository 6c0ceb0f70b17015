"""Deterministic text: the same prompt gives the same words."""

from __future__ import annotations

import re
from hashlib import blake2b
from random import Random

_WORDS = tuple(
    """
    agent answer batch budget cache call careful cluster context critic decode device draft edge
    engine evidence example first fits follows forecast graph host idea join latency layer lead
    memory model module moves needs next node notes order path plan policy prefix priority queue
    reads report result review role route run schedule search shared short slack source stage
    state step stream summary token tool useful waits weights work worker writes
    """.split()  # noqa: SIM905  a list literal of sixty words would be a page long
)
# Double and typographic quotes anywhere; single ones only around a word, so apostrophes stay out.
_QUOTED = re.compile(r'"([^"\n]+)"|“([^”]+)”|「([^」]+)」|(?<!\w)\'([^\'\n]+)\'(?!\w)')
_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?![\w.]*\d)")
_JSON_PIECE = 4


class Material:
    """What a reply is made of: what the user quoted, the numbers they named, then words."""

    def __init__(self, prompt: str, user: str, salt: str) -> None:
        digest = blake2b(f"{salt}\0{prompt}".encode(errors="replace"), digest_size=8).digest()
        self.seed = int.from_bytes(digest)
        self.user = user
        self._random = Random(self.seed)
        self._quoted: list[str] | None = None
        self._numbers: list[float] | None = None

    def quoted(self) -> list[str]:
        """Quoted passages of the last user message that have not been taken yet."""
        if self._quoted is None:
            self._quoted = [next(filter(None, m)) for m in _QUOTED.findall(self.user)]
        return self._quoted

    def numbers(self) -> list[float]:
        """Numbers in the last user message that have not been taken yet."""
        if self._numbers is None:
            self._numbers = [float(n) for n in _NUMBER.findall(self.user)]
        return self._numbers

    def take_names(self) -> list[str]:
        """The quoted passages that are names, as the keys of a JSON object are; takes them."""
        names = [quote for quote in self.quoted() if quote.isidentifier()]
        self._quoted = [quote for quote in self.quoted() if quote not in names]
        return names

    def words(self, count: int) -> list[str]:
        return self._random.choices(_WORDS, k=count)

    def below(self, limit: int) -> int:
        """A whole number from 0 to `limit - 1`."""
        return self._random.randrange(limit)

    def sentence_tokens(self, count: int) -> list[str]:
        """Exactly `count` tokens: the quoted passages first, words after them."""
        echo = [word for quote in self.quoted() for word in f'"{quote}"'.split()][:count]
        words = echo + self.words(count - len(echo))
        return [word if i == 0 else " " + word for i, word in enumerate(words)]


def json_tokens(text: str) -> list[str]:
    """JSON text in token-sized pieces."""
    return [text[i : i + _JSON_PIECE] for i in range(0, len(text), _JSON_PIECE)]
