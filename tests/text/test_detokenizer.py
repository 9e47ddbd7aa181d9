"""A text by pieces is the text at once: with broken characters, stop strings, any prompt."""

import tracemalloc
from itertools import groupby

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from expertlane.text.tokenizer import (
    IncrementalDetokenizer,
    StopMatch,
    StopStrings,
    Tokenizer,
)

CORPUS = [
    "the quick brown fox jumps over the lazy dog, again and again",
    "人工智能模型 日本語のテキスト 한국어 텍스트",
    "smile 😀😃 rocket 🚀🚀 family 👨‍👩‍👧 café naïve Ünïcödé",
    "stop here. END of it\n\nnew line",
] * 4
SPECIAL = ["<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level() -> Tokenizer:
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return Tokenizer(core, [1])


def metaspace() -> Tokenizer:
    """As SentencePiece has it: a space before the text, which decoding takes away."""
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    core.decoder = decoders.Metaspace(prepend_scheme="always")
    core.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False)
    )
    return Tokenizer(core, [1])


def llama() -> Tokenizer:
    """As Llama and Mixtral have it: unknown characters, and line ends, as byte tokens."""
    text = ["▁", "th", "e", "▁the", "▁a", "END", "人", ".", "é", "\ufffd"]
    vocab = {token: i for i, token in enumerate([*SPECIAL, "<unk>", *BYTES, *text])}
    core = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    core.add_special_tokens([*SPECIAL, "<unk>"])
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return Tokenizer(core, [1])


TOKENIZERS = {"byte_level": byte_level(), "metaspace": metaspace(), "llama": llama()}
by_kind = pytest.mark.parametrize("kind", TOKENIZERS)
quick = settings(derandomize=True, deadline=None, max_examples=200)


def in_pieces(
    tokenizer: Tokenizer,
    prompt: list[int],
    tokens: list[int],
    stop: tuple[str, ...] = (),
    skip_special_tokens: bool = True,
) -> tuple[str, IncrementalDetokenizer]:
    detokenizer = IncrementalDetokenizer(
        tokenizer, prompt, stop=stop, skip_special_tokens=skip_special_tokens
    )
    pieces = [*map(detokenizer.append, tokens), detokenizer.finish()]
    assert detokenizer.finish() == ""
    return "".join(pieces), detokenizer


def at_once(tokenizer: Tokenizer, prompt: list[int], tokens: list[int], **options: bool) -> str:
    before = tokenizer.decode(prompt, **options)
    after = tokenizer.decode([*prompt, *tokens], **options)
    assert after.startswith(before)
    return after[len(before) :]


def cut(text: str, stop: tuple[str, ...]) -> str:
    """Up to the stop string that is complete first, looked for one end after the other."""
    for end in range(len(text) + 1):
        starts = [end - len(string) for string in stop if text[:end].endswith(string)]
        if starts:
            return text[: min(starts)]
    return text


@pytest.mark.smoke(1)
@by_kind
@given(data=st.data())
@quick
def test_pieces_make_the_text_at_once(kind: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[kind]
    # Ids beyond the vocabulary too: models have spare ones.
    token = st.integers(0, tokenizer.vocab_size + 2)
    if kind == "llama":  # byte tokens only as whole characters; see the test of broken ones
        token = token.filter(lambda token_id: token_id not in tokenizer.byte_tokens)
        text = st.text(st.sampled_from("a\n é人😀"), min_size=1, max_size=3)
        as_bytes = text.map(
            lambda text: [tokenizer._core.token_to_id(BYTES[byte]) for byte in text.encode()]
        )
        tokens = data.draw(st.lists(st.one_of(token.map(lambda t: [t]), as_bytes)))
        tokens = [token_id for part in tokens for token_id in part]
    else:
        tokens = data.draw(st.lists(token, max_size=40))
    text = data.draw(st.sampled_from(["", "the fox", "日本語 😀", "line\n", " "]))
    prompt = tokenizer.encode(text)
    stop = tuple(data.draw(st.lists(st.sampled_from(["e", "th", "the", " \n", "人", "END"]))))
    skip = data.draw(st.booleans())
    expected = at_once(tokenizer, prompt, tokens, skip_special_tokens=skip)
    got, detokenizer = in_pieces(tokenizer, prompt, tokens, stop, skip)
    assert got == cut(expected, stop)
    assert detokenizer.stopped == any(string in expected for string in stop)


few_letters = st.text(st.sampled_from("ab"), min_size=1, max_size=6)


@given(stop=st.lists(few_letters, max_size=4), pieces=st.lists(few_letters, max_size=8))
@quick
def test_stop_strings_are_found_as_by_looking_everywhere(
    stop: list[str], pieces: list[str]
) -> None:
    finder, text = StopStrings(stop), ""
    for piece in pieces:
        found, before, text = finder.feed(piece), text, text + piece
        first = next((n for n in range(len(text) + 1) if any(map(text[:n].endswith, stop))), None)
        if first is not None:
            size = max(len(each) for each in stop if text[:first].endswith(each))
            assert found == StopMatch(first - len(before), size)
            return
        assert found is None
        begun = [end for each in stop for end in range(1, len(each)) if text.endswith(each[:end])]
        assert finder.num_begun == max(begun, default=0)


@pytest.mark.parametrize("string", ["a" * 50_000 + "b", "ab" * 25_000 + "c"])
def test_stop_strings_take_memory_of_their_length_at_most(string: str) -> None:
    tracemalloc.start()
    try:
        finder = StopStrings([string])
        assert finder.feed(string[:-1]) is None
        assert finder.num_begun == len(string) - 1
        assert finder.feed(string[:2]) is None
        assert finder.feed("x") is None
        assert finder.num_begun == 0
        assert finder.feed(string) == StopMatch(len(string), len(string))
        assert tracemalloc.get_traced_memory()[1] < 16 * len(string)
    finally:
        tracemalloc.stop()


@by_kind
@given(text=st.text(st.sampled_from("the END.人工智能é😀👨‍👩‍👧 \n"), max_size=30), data=st.data())
@quick
def test_text_cut_anywhere_between_prompt_and_output(
    kind: str, text: str, data: st.DataObject
) -> None:
    tokenizer = TOKENIZERS[kind]
    tokens = tokenizer.encode(text)
    at = data.draw(st.integers(0, len(tokens)))
    got, _ = in_pieces(tokenizer, tokens[:at], tokens[at:])
    # A character that the prompt leaves incomplete comes with the output.
    whole = (tokenizer.decode(tokens[:end]).rstrip("\ufffd") for end in range(at + 1))
    assert max(whole, key=len) + got == tokenizer.decode(tokens)


@given(
    tokens=st.lists(st.one_of(st.integers(3, 258), st.integers(0, 266)), max_size=30),
    prompt=st.sampled_from(["the", "the\n", "the 😀"]),
)
@example(tokens=[3 + 0xE4, 3 + 0xBD, 3 + 0xFF, 3 + 0x0A], prompt="the")
@quick
def test_broken_runs_of_byte_tokens_keep_what_is_whole(tokens: list[int], prompt: str) -> None:
    tokenizer = TOKENIZERS["llama"]
    before = tokenizer.encode(prompt)
    expected = ""
    shown = [token_id for token_id in tokens if token_id not in tokenizer.special_token_ids]
    for is_byte, group in groupby(shown, tokenizer.byte_tokens.__contains__):
        run = list(group)
        if is_byte:
            expected += b"".join(tokenizer.byte_tokens[i] for i in run).decode(errors="replace")
        else:
            expected += at_once(tokenizer, before, run)
    assert in_pieces(tokenizer, before, tokens)[0] == expected


def test_characters_come_when_they_are_complete() -> None:
    for kind in ("byte_level", "llama"):
        tokenizer = TOKENIZERS[kind]
        prompt, tokens = tokenizer.encode("the"), tokenizer.encode("the \n𓀀.")[-6:]
        detokenizer = IncrementalDetokenizer(tokenizer, prompt)
        pieces = [detokenizer.append(token_id) for token_id in tokens]
        assert pieces == ["\n", "", "", "", "𓀀", "."]
        assert detokenizer.finish() == ""


def test_a_replacement_character_of_the_vocabulary_is_not_lost() -> None:
    tokenizer = TOKENIZERS["llama"]
    token_id = tokenizer._core.token_to_id("\ufffd")
    line_end = tokenizer._core.token_to_id("<0x0A>")
    tokens = [token_id, token_id, line_end, token_id]
    assert in_pieces(tokenizer, tokenizer.encode("the"), tokens)[0] == "\ufffd\ufffd\n\ufffd"


def test_the_first_space_is_kept_after_a_prompt_alone() -> None:
    for kind in ("metaspace", "llama"):
        tokenizer = TOKENIZERS[kind]
        the = tokenizer.encode("the")
        for prompt, expected in (([], "the the"), ([0], "the the"), (the, " the the")):
            assert in_pieces(tokenizer, prompt, [*the, 1, *the])[0] == expected


def test_a_beginning_of_a_stop_string_is_held_back() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    detokenizer = IncrementalDetokenizer(tokenizer, [], stop=("abc", "bcd!"))
    letters = {letter: tokenizer.encode(letter)[0] for letter in "abcd!x"}
    pieces = [detokenizer.append(letters[letter]) for letter in "aabxabd"]
    assert pieces == ["", "a", "", "abx", "", "", "abd"]
    assert [detokenizer.append(letters[letter]) for letter in "bcd"] == ["", "", ""]
    assert not detokenizer.stopped
    assert detokenizer.append(letters["!"]) == ""
    assert detokenizer.stopped
    assert detokenizer.append(letters["x"]) == detokenizer.finish() == ""


def test_no_token() -> None:
    for tokenizer in TOKENIZERS.values():
        assert in_pieces(tokenizer, [], [])[0] == ""
        assert in_pieces(tokenizer, tokenizer.encode("the 😀"), [], ("e",))[0] == ""


def test_a_long_broken_run_costs_no_more_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is decoded stays short: a window that grew would decode 500,000 tokens here."""
    for kind, broken in (("byte_level", "ÿ"), ("llama", "<0xFF>")):
        tokenizer = TOKENIZERS[kind]
        detokenizer = IncrementalDetokenizer(tokenizer, [])
        lengths: list[int] = []

        def decode(ids: list[int], tokenizer: Tokenizer = tokenizer, **options: bool) -> str:
            lengths.append(len(ids))  # noqa: B023
            return Tokenizer.decode(tokenizer, ids, **options)

        monkeypatch.setattr(tokenizer, "decode", decode)
        broken_id = tokenizer._core.token_to_id(broken)
        pieces = [detokenizer.append(broken_id) for _ in range(1000)]
        assert "".join([*pieces, detokenizer.finish()]) == "\ufffd" * 1000
        assert 1000 <= sum(lengths) < 12_000


@pytest.mark.parametrize("min_tokens", [0, 1, 2, 3, 4, 5])
def test_stop_strings_count_from_a_token_on(min_tokens):
    tokenizer = byte_level()
    tokens = [token for letter in "aXbXc" for token in tokenizer.encode(letter)]
    assert len(tokens) == 5
    detokenizer = IncrementalDetokenizer(tokenizer, [], stop=("X",), min_tokens=min_tokens)
    pieces = [detokenizer.append(token) for token in tokens] + [detokenizer.finish()]
    expected = {0: "a", 1: "a", 2: "a", 3: "aXb", 4: "aXb", 5: "aXbXc"}[min_tokens]
    assert "".join(pieces) == expected
    assert detokenizer.stopped == (min_tokens < 5)
    if min_tokens == 3:
        assert pieces[:2] == ["a", "X"]  # given at once: no stop string can take it back


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({}, "the END"),
        ({"shown_token_ids": [1]}, "the</s> END"),
        ({"skip_special_tokens": False}, "<s>the</s> END"),
        ({"skip_special_tokens": False, "stop": ("END",)}, "<s>the</s> "),
        ({"stop": ("END",), "include_stop": True}, "the END"),
    ],
)
def test_control_tokens_and_stop_strings_that_are_text(more, text):
    tokenizer = byte_level()
    tokens = [0, *tokenizer.encode("the"), 1, *tokenizer.encode(" END")]
    detokenizer = IncrementalDetokenizer(tokenizer, [], **more)
    assert "".join(map(detokenizer.append, tokens)) + detokenizer.finish() == text
    assert tokenizer.split_special("a<s></s>b") == [
        ("a", None),
        ("<s>", 0),
        ("</s>", 1),
        ("b", None),
    ]
