"""What `bench` and `simulate` share: the options of a load, and how they are read."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from expertlane.errors import UserError

if TYPE_CHECKING:
    from expertlane.spec.load import LengthRange, Load

_DEFAULT_BATCH = "1,8,32"
_DEFAULT_NUM_REQUESTS = 100
_MAX_DIGITS = 7

_Number = TypeVar("_Number", int, float)

Batch = Annotated[
    str | None,
    typer.Option(
        metavar="N[,N…]",
        help="Closed loop: keep N requests unfinished; with several, one point each. "
        f"Default: {_DEFAULT_BATCH}.",
    ),
]
Rate = Annotated[
    str | None,
    typer.Option(
        metavar="R[,R…]",
        help="Open loop in place of --batch: R requests a second arrive at random times.",
    ),
]
NumRequests = Annotated[
    int | None,
    typer.Option(
        metavar="N", help=f"Of a point. Default: the batch; with --rate {_DEFAULT_NUM_REQUESTS}."
    ),
]
PromptLen = Annotated[
    str, typer.Option(metavar="N[:N]", help="Tokens of a prompt; of a range, drawn uniformly.")
]
OutputLen = Annotated[
    str, typer.Option(metavar="N[:N]", help="Tokens of an output; of a range, drawn uniformly.")
]
Seed = Annotated[int, typer.Option(metavar="N", help="Of prompts, lengths and arrivals.")]


def check_seed(seed: int) -> None:
    """Check a seed.

    Raises:
        UserError: it is negative.
    """
    if seed < 0:
        raise UserError(f"--seed is {seed}; it must be 0 or more")


def parse_loads(
    batch: str | None,
    rate: str | None,
    num_requests: int | None,
    prompt_len: str,
    output_len: str,
) -> "list[Load]":
    """What to measure, a point each.

    Raises:
        UserError: it is not clear what.
    """
    from expertlane.spec.load import Load

    prompts, outputs = _length("prompt", prompt_len), _length("output", output_len)
    if batch is not None and rate is not None:
        raise UserError("--batch and --rate exclude each other; run one, then the other")
    if num_requests is not None and num_requests < 1:
        raise UserError(f"--num-requests is {num_requests}; it must be 1 or more")
    if rate is not None:
        size = num_requests or _DEFAULT_NUM_REQUESTS
        rates = _parse_list("--rate", rate, _rate, "numbers above 0 with commas between: 2,5")
        return [Load(size, prompts, outputs, rate=each) for each in rates]
    batches = _parse_list(
        "--batch", batch or _DEFAULT_BATCH, _whole, "whole numbers with commas between: 1,8,32"
    )
    if num_requests is not None and num_requests < max(batches):
        raise UserError(
            f"--num-requests is {num_requests} but --batch has {max(batches)}; it must be as many "
            "or more"
        )
    return [Load(num_requests or each, prompts, outputs, batch=each) for each in batches]


def _length(name: str, text: str) -> "LengthRange":
    from expertlane.spec.load import LengthRange

    ends = [_whole(part) for part in text.split(":")]
    low, high = ends[0], ends[-1]
    if low is None or high is None or len(ends) > 2 or low > high:
        raise UserError(
            f"--{name}-len is {text!r}; it must be a whole number, 1 or more, or a range: 32:512"
        )
    return LengthRange(low, high)


def _parse_list(
    option: str, text: str, parse: Callable[[str], _Number | None], valid: str
) -> list[_Number]:
    numbers = []
    for part in text.split(","):
        number = parse(part)
        if number is None:
            raise UserError(f"{option} is {text!r}; it must be {valid}")
        numbers.append(number)
    return numbers


def _whole(text: str) -> int | None:
    text = text.strip()
    is_number = text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS
    return int(text) or None if is_number else None


def _rate(text: str) -> float | None:
    try:
        rate = float(text)
    except ValueError:
        return None
    return rate if 0 < rate < math.inf else None
