"""Prompts of given lengths for a server: token ids that its model has, or texts of as many."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from expertlane.errors import UserError
from expertlane.spec.model import PRESETS

if TYPE_CHECKING:
    from expertlane.text.tokenizer import Tokenizer

_MOST_ATTEMPTS = 8


@dataclass(frozen=True)
class Vocabulary:
    """Tokens that prompts are drawn from.

    Attributes:
        token_ids: ordinary tokens; prompts are drawn as indices into this.
        tokenizer: for prompts that must be text; None where there is none here.
    """

    token_ids: Sequence[int]
    tokenizer: "Tokenizer | None" = None

    @classmethod
    def of_folder(cls, folder: Path) -> "Vocabulary":
        """The vocabulary of a checkpoint's tokenizer.

        Raises:
            UserError: it has no tokenizer that can be read.
        """
        from expertlane.text.tokenizer import Tokenizer

        tokenizer = Tokenizer.from_folder(folder)
        special = tokenizer.special_token_ids
        return cls([each for each in range(tokenizer.vocab_size) if each not in special], tokenizer)

    @classmethod
    def of_name(cls, name: str) -> "Vocabulary | None":
        """The vocabulary of a preset, or of a checkpoint's folder; None for other names."""
        if name in PRESETS:
            return cls(range(PRESETS[name].vocab_size))
        folder = Path(name)
        if (folder / "tokenizer.json").is_file():
            return cls.of_folder(folder)
        return None

    def __len__(self) -> int:
        return len(self.token_ids)

    def ids(self, places: Sequence[int]) -> list[int]:
        """The tokens at drawn indices."""
        return [self.token_ids[place] for place in places]

    def text(self, places: Sequence[int]) -> str:
        """A text of as many tokens, or nearly: not every token sequence survives decoding.

        Raises:
            UserError: there is no tokenizer.
        """
        if self.tokenizer is None:
            raise UserError("prompts must be text here; give the model's folder with --tokenizer")
        wanted = self.ids(places)
        decode, encode = self.tokenizer.decode, self.tokenizer.encode
        text = decode(wanted)
        for _ in range(_MOST_ATTEMPTS):
            found = encode(text, add_special_tokens=False)
            if len(found) == len(wanted):
                break
            found = found[: len(wanted)] + wanted[: max(0, len(wanted) - len(found))]
            text = decode(found)
        return text
