"""Structured output against transformers' logits, masked by the package `regex`.

The reference chooses greedily among the tokens after which the text can still become a match, and
the end of the text if it is a match. Where the pattern allows only one next byte, the text is
forced, and any way to split it into tokens is right.
"""

import random
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import regex
import tokenizers
import torch
from transformers.convert_slow_tokenizer import bytes_to_unicode

from engine.model.chat_checkpoint import save_chat_checkpoint
from engine.model.families import load_model
from expertlane.engine.llm import LLM
from expertlane.spec.sampling import SamplingParams, Structured
from parity.against_transformers import BOUND

NUM_CASES, MOST_TOKENS = 80, 24
VOCAB_SIZE, EOS = 270, 1
_CLASSES = ("[a-f]", "[0-9]", "[A-Z]", "x", "the", " ", "[A-Zz ]", "\\.", "é", "[αβγ日]")


def _drawn_regex(draw: random.Random, depth: int = 2) -> str:
    """A regular expression that has the same meaning in Rust's syntax and in Python's."""
    kind = draw.randrange(4) if depth else 0
    if kind == 0:
        return draw.choice(_CLASSES)
    parts = [_drawn_regex(draw, depth - 1) for _ in range(draw.randrange(1, 4))]
    if kind == 1:
        return "".join(parts)
    if kind == 2:
        return f"({'|'.join(parts)})"
    least = draw.randrange(3)
    how = draw.choice(["?", "*", "+", f"{{{least},{least + draw.randrange(1, 4)}}}"])
    return f"({''.join(parts)}){how}"


def _drawn_case(seed: int) -> tuple[list[int], Structured, str]:
    """A prompt, its constraint, and a regular expression with the same meaning."""
    draw = random.Random(seed)
    prompt = [draw.randrange(4, 260) for _ in range(draw.randrange(1, 9))]
    if seed % 4:
        pattern = "".join(_drawn_regex(draw) for _ in range(draw.randrange(1, 4)))
        return prompt, Structured(regex=pattern), pattern
    words = ["the thing", "the", "then", "no", "ja, é", "x" * 9, "日本", "1.5", "the things"]
    chosen = draw.sample(words, draw.randrange(1, 6))
    return prompt, Structured(choice=tuple(chosen)), "|".join(map(regex.escape, chosen))


@cache
def _texts_of_tokens(folder: Path) -> list[bytes | None]:
    """Bytes by token id; None for special tokens and ids that the tokenizer lacks."""
    core = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    special = core.get_added_tokens_decoder()
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    texts = [None if i in special else core.id_to_token(i) for i in range(VOCAB_SIZE)]
    return [None if text is None else bytes(byte_of[each] for each in text) for text in texts]


class _Reference:
    """Finds out if bytes are a match of a pattern, or the beginning of one."""

    def __init__(self, pattern: str) -> None:
        self._pattern = regex.compile(pattern)
        self._wide = [each for each in set(pattern) if each > "\x7f"]

    def may_begin(self, text: bytes) -> bool:
        """True if the text is a match, or can become one with more bytes."""
        whole = text.decode(errors="ignore")
        if rest := text[len(whole.encode()) :]:
            ends = [each for each in self._wide if each.encode().startswith(rest)]
            return any(self._pattern.fullmatch(whole + each, partial=True) for each in ends)
        return self._pattern.fullmatch(whole, partial=True) is not None

    def is_match(self, text: bytes) -> bool:
        """True if the text is a match."""
        whole = text.decode(errors="ignore")
        return whole.encode() == text and self._pattern.fullmatch(whole) is not None


def _check(folder: Path, prompt: list[int], pattern: str, tokens: list[int]) -> Counter[str]:
    """Check that each token is the reference's choice; returns how many were of which kind."""
    model, texts, reference = load_model(folder), _texts_of_tokens(folder), _Reference(pattern)
    with torch.no_grad():
        run = model(torch.tensor([[*prompt, *tokens]]), use_cache=False).logits[0]
    so_far, seen = b"", Counter[str]()
    for place, token in enumerate(tokens):
        logits = run[len(prompt) - 1 + place].clone()
        bound = BOUND * float(logits.abs().max())
        mask = [text is not None and reference.may_begin(so_far + text) for text in texts]
        mask[EOS] = reference.is_match(so_far)
        assert mask[token], (pattern, so_far, token)
        logits[~torch.tensor(mask)] = -torch.inf
        firsts = {text[:1] for text, fits in zip(texts, mask, strict=True) if fits and text}
        if len(firsts) == 1 and not mask[EOS]:  # any split into tokens is right
            seen["forced"] += 1
        elif logits.max() - logits.sort().values[-2] <= bound:
            seen["tied"] += 1
        else:
            assert token == int(logits.argmax()), (pattern, so_far)
            seen["chosen"] += 1
        so_far += b"" if token == EOS else texts[token] or b""
    if len(tokens) < MOST_TOKENS:
        assert reference.is_match(so_far), (pattern, so_far)
        seen["ended"] += 1
    return seen


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_chat_checkpoint(tmp_path_factory.mktemp("structured"), "{{ messages }}")


@pytest.mark.smoke(1)
@pytest.mark.parametrize("layout", ["tp=1", "tp=2,ep=2", "pp=2,dp=2,ep=2"])
def test_each_token_is_the_masked_reference_s_choice(folder, layout: str) -> None:
    cases = [_drawn_case(seed) for seed in range(NUM_CASES)]
    prompts = [prompt for prompt, _, _ in cases]
    params = [
        SamplingParams(temperature=0, max_tokens=MOST_TOKENS, structured=structured)
        for _, structured, _ in cases
    ]
    with LLM(str(folder), layout=layout, dtype="float32", max_num_seqs=16) as llm:
        outputs = llm.generate(prompts, params)
    seen = Counter[str]()
    for (prompt, _, pattern), output in zip(cases, outputs, strict=True):
        assert output.error is None
        seen += _check(folder, prompt, pattern, list(output.token_ids))
    assert seen["chosen"] >= 4 * NUM_CASES
    assert seen["tied"] <= seen["chosen"] / 100
    assert seen["ended"] >= NUM_CASES / 2
