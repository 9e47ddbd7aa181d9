"""Long texts are refused by their beginning; those that fit are taken, whatever their length."""

import asyncio
from types import SimpleNamespace

import pytest

from cli.screen import telling
from expertlane.server.errors import ApiError
from expertlane.server.service import PromptEncoder, Service, TooLongError
from expertlane.text.tokenizer import LONG_TEXT


class Counting:
    """A tokenizer with `per_token` characters a token, which counts what it was given."""

    longest_token = 100

    def __init__(self, per_token):
        self.per_token = per_token
        self.given = []

    def encode(self, text, *, add_special_tokens):
        self.given.append(len(text))
        return [0] * -(-len(text) // self.per_token)


def encode(tokenizer, text, most=10_000, **more):
    async def run():
        encoder = PromptEncoder(tokenizer, most)
        return await encoder.encode([text], add_special_tokens=True, **more)

    (found,) = asyncio.run(run())
    return found


def test_more_characters_than_the_tokens_can_have():
    tokenizer = Counting(1)
    with pytest.raises(TooLongError, match="it has 1,000,001 characters; 10,000 tokens"):
        encode(tokenizer, "a" * 1_000_001)
    assert tokenizer.given == []


def test_more_tokens_in_its_beginning_than_are_taken():
    tokenizer = Counting(1)
    with pytest.raises(TooLongError, match=telling("40,000 tokens")):
        encode(tokenizer, "a" * 900_000)
    assert tokenizer.given == [40_000]


@pytest.mark.parametrize("size", [1, LONG_TEXT, LONG_TEXT + 1, 900_000])
def test_long_tokens_may_be_many_characters(size):
    tokenizer = Counting(90)
    assert len(encode(tokenizer, "a" * size)) == -(-size // 90)
    assert tokenizer.given[-1] == size
    assert sum(tokenizer.given) <= 3 * size


def test_a_factor_takes_more():
    assert len(encode(Counting(1), "a" * 40_000, factor=4)) == 40_000


@pytest.mark.parametrize(
    ("field", "remedy"),
    [
        ("prompt", "use token ids"),
        ("stop", "use stop_token_ids"),
        ("echo", "leave out echo"),
        ("response_format", "leave out response_format"),
    ],
)
def test_without_a_tokenizer_the_remedy_is_of_the_field(field, remedy):
    service = SimpleNamespace(model=SimpleNamespace(tokenizer=None, name="tiny"))
    with pytest.raises(ApiError, match=f"^{field}: tiny has no tokenizer; {remedy}$"):
        Service.tokenizer(service, field)
