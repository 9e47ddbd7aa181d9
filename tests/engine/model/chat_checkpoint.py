"""A tiny checkpoint that chats: a byte-level tokenizer, and a template."""

from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from engine.model.families import save_checkpoint


def save_chat_checkpoint(folder: Path, template: str) -> Path:
    """Write it into an empty folder; gives the folder."""
    save_checkpoint("mixtral", folder, vocab_size=270)
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=261,
        special_tokens=["<u>", "</s>", "<a>", "<s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(["the thing"], trainer)
    core.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(template)
    return folder
