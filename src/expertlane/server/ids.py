"""Ids inside an answer: random, yet the same whenever the answer is made again."""

from dataclasses import dataclass, field
from hashlib import blake2b
from uuid import uuid4


@dataclass(frozen=True)
class AnswerIds:
    """The ids of one answer and its parts.

    Attributes:
        root: 122 random bits, from which all its ids follow.
    """

    root: str = field(default_factory=lambda: uuid4().hex)

    def of(self, *what: str | int) -> str:
        """An id of 32 hexadecimal digits; the same for the same arguments."""
        text = "/".join(map(str, (self.root, *what)))
        return blake2b(text.encode(), digest_size=16).hexdigest()
