"""What `bench` and `simulate` share: the options of a load, and how they are read."""

from typing import TYPE_CHECKING, Annotated

import typer

from expertlane.errors import UserError
from expertlane.spec.ranges import RANGES, shown, take_option

if TYPE_CHECKING:
    from expertlane.spec.workload import LengthRange, Load

_DEFAULT_BATCH = "1,8,32"
_DEFAULT_NUM_REQUESTS = 100

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
    from expertlane.spec.workload import Load

    prompts, outputs = _length("prompt", prompt_len), _length("output", output_len)
    if batch is not None and rate is not None:
        raise UserError("--batch and --rate exclude each other; run one, then the other")
    num_requests = take_option("--num-requests", num_requests)
    if rate is not None:
        size = num_requests or _DEFAULT_NUM_REQUESTS
        rates = _parse_list("--rate", rate, "2,5")
        return [Load(size, prompts, outputs, rate=each) for each in rates]
    batches = [int(each) for each in _parse_list("--batch", batch or _DEFAULT_BATCH, "1,8,32")]
    if num_requests is not None and num_requests < max(batches):
        raise UserError(
            f"--num-requests is {num_requests} but --batch has {max(batches)}; it must be as many "
            "or more"
        )
    return [Load(num_requests or each, prompts, outputs, batch=each) for each in batches]


def _length(name: str, text: str) -> "LengthRange":
    from expertlane.spec.workload import LengthRange

    allowed = RANGES[f"{name}_len"]
    ends = [allowed.parse(part) for part in text.split(":")]
    low, high = ends[0], ends[-1]
    if low is None or high is None or len(ends) > 2 or low > high:
        raise UserError(
            f"--{name}-len is {shown(text)}; it must be {allowed}, or two, the lower one first: "
            "32:512"
        )
    return LengthRange(int(low), int(high))


def _parse_list(named: str, text: str, example: str) -> list[float]:
    allowed = RANGES[named.removeprefix("--")]
    numbers = []
    for part in text.split(","):
        number = allowed.parse(part)
        if number is None:
            raise UserError(
                f"{named} is {shown(text)}; it must be {allowed}, or several with commas between: "
                f"{example}"
            )
        numbers.append(number)
    return numbers
