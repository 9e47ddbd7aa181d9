"""`expertlane scale`: another layout for a running server."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from expertlane.cli import output
from expertlane.cli.help import Panel
from expertlane.cli.option_groups import takes_groups
from expertlane.cli.options import layout_option
from expertlane.cli.output import PrintOptions
from expertlane.cli.server_options import api_key_file_option, api_keys, key_lines
from expertlane.errors import ExpertlaneError, UserError
from expertlane.spec.files import strict_json
from expertlane.spec.layout import Layout
from expertlane.spec.names import Origin

if TYPE_CHECKING:
    from expertlane.client.connection import Connections, Url
    from expertlane.progress import Progress

_OVER_S = 10.0  # for a step to be committed after the change, if there are requests
_LOOK_S = 0.3  # between requests for its progress
_CONFLICT = 409  # with the state of the server: the call itself was right
_NUM_RATES = 8  # rates measured; their median and its interval are shown


@dataclass(frozen=True, kw_only=True)
class _Options:
    layout: str | None = layout_option(None)
    cancel: bool = typer.Option(
        False, rich_help_panel=Panel.SERVER, help="Give up the change that is being prepared."
    )
    watch_s: float = typer.Option(
        4.0,
        rich_help_panel=Panel.SERVER,
        help="Measure tokens per second for this long before and after the change. 0: do not.",
    )
    api_key_file: Path | None = api_key_file_option(rich_help_panel=Panel.SERVER)

    def new_layout(self) -> str | None:
        """The layout to change to; None where a change is to be cancelled.

        Raises:
            UserError: it is malformed; or both are asked for, or neither.
        """
        if (self.layout is None) != self.cancel:
            raise UserError("give either --layout LAYOUT or --cancel")
        return None if self.layout is None else str(Layout.parse(self.layout))

    def headers(self) -> dict[str, str]:
        """The header with the API key, if there is one.

        Raises:
            UserError: it is none.
        """
        given = [] if self.api_key_file is None else key_lines(self.api_key_file).items()
        keys = api_keys(dict(islice(given, 1)))
        return {"Authorization": f"Bearer {keys[0]}"} if keys else {}


@takes_groups
def scale(
    url: Annotated[str, typer.Argument(metavar="URL", help="The server, as http://HOST:PORT.")],
    *,
    own: _Options,
    print_options: PrintOptions,
) -> None:
    """Change the layout of a running expertlane serve.

    No request is lost, and no token changes. New ranks load their weights while requests go on;
    then clients see one pause. Prints how long both took, where weights came from, and tokens per
    second before and after; --full: also each rank's weights by source. Exit code 2 if the server
    refuses the layout, 1 if new ranks could not be prepared or the change was cancelled; then
    nothing has changed. --cancel gives up a change whose ranks are still being prepared.

    \b
    Examples:
      expertlane scale http://127.0.0.1:8000 --layout dp=4,ep=4
      expertlane scale http://127.0.0.1:8000 --layout tp=2 --json
      expertlane scale http://127.0.0.1:8000 --cancel
    """
    from expertlane.client.connection import Url

    layout = own.new_layout()
    server = Url.parse(url, "URL")
    if layout is None:
        found = asyncio.run(_cancel(server, own))
    else:
        found = asyncio.run(_scale(server, layout, own))
    if print_options.as_json:
        output.print_json(strict_json(found))
    elif layout is None:
        typer.echo(f"cancelled; the layout is still {found['layout']}")
    else:
        lines = _lines(found)
        if print_options.full and found["change"] is not None:
            lines += ["", *_rank_lines(found["change"]["ranks"])]
        typer.echo("\n".join(lines[:1] if print_options.quiet else lines))


async def _cancel(url: "Url", own: _Options) -> dict[str, Any]:
    from expertlane.client.connection import Connections

    connections = Connections(url, own.headers())
    try:
        facts = await _ask(connections, "DELETE")
    finally:
        connections.close()
    return {name: facts[name] for name in ("layout", "num_ranks")}


async def _scale(url: "Url", layout: str, own: _Options) -> dict[str, Any]:
    from expertlane.client.connection import Connections

    connections, others = (Connections(url, own.headers()) for _ in range(2))
    try:
        body: dict[str, Any] = {"layout": layout}
        earlier = (await _ask(connections, "POST", body | {"dry_run": True}))["changes"]
        before = await _rate(connections, own.watch_s)
        began_s = time.perf_counter()
        with output.progress_on_stderr() as progress:
            change = asyncio.create_task(_ask(connections, "POST", body))
            try:
                await _show(change, others, progress)
                facts = await change
            except asyncio.CancelledError:  # by Ctrl-C
                output.print_message(
                    f"{url}: it goes on with the change; expertlane scale {url} --cancel ends that"
                )
                raise
        answered_s = time.perf_counter() - began_s
        after = await _rate(connections, own.watch_s)
        until_s = time.monotonic() + _OVER_S
        made = await _made(connections, earlier)
        while made is not None and not made["is_over"] and time.monotonic() < until_s:
            await asyncio.sleep(_LOOK_S)
            made = await _made(connections, earlier)
    finally:
        connections.close()
        others.close()
    return {
        "layout": facts["layout"],
        "num_ranks": facts["num_ranks"],
        "seconds": round(answered_s, 3),
        "tokens_per_s_before": before,
        "tokens_per_s_after": after,
        "change": made,
    }


async def _made(
    connections: "Connections", earlier: Sequence[dict[str, Any]]
) -> dict[str, Any] | None:
    """The last change, if it came after the earlier ones; None if the layout was that already."""
    *_, last = (await _ask(connections, "GET"))["changes"] or [None]
    return None if last is None or (earlier and last["at"] == earlier[-1]["at"]) else last


async def _show(
    change: "asyncio.Task[dict[str, Any]]", connections: "Connections", progress: "Progress"
) -> None:
    """Show the progress of preparing until the change is made or refused."""
    shown: int | None = None
    while not (await asyncio.wait([change], timeout=_LOOK_S))[0]:
        preparing = (await _ask(connections, "GET"))["preparing"]
        if preparing is None:
            continue
        if shown is None:
            shown = 0
            progress.task(f"preparing {preparing['layout']}", 100)
        percent = int(100 * preparing["share"])
        progress.advance(max(0, percent - shown))
        shown = max(shown, percent)
    if shown is not None and change.exception() is None:
        progress.done()


async def _rate(connections: "Connections", seconds: float) -> dict[str, float] | None:
    """Tokens per second of the whole server, with an interval; None if `seconds` is 0."""
    from expertlane.results.estimate import median_interval

    if not seconds:
        return None
    looks = []
    for number in range(_NUM_RATES + 1):
        if number:
            await asyncio.sleep(seconds / _NUM_RATES)
        num_tokens: int = (await _ask(connections, "GET"))["num_generation_tokens"]
        looks.append((time.perf_counter(), num_tokens))
    rates = [(then - now) / (then_s - now_s) for (now_s, now), (then_s, then) in pairwise(looks)]
    found = median_interval(rates)
    assert found.low is not None
    assert found.high is not None
    named = {"median": found.value, "low": found.low, "high": found.high}
    return {name: round(value, 1) for name, value in named.items()}


async def _ask(
    connections: "Connections", method: str, body: dict[str, Any] | None = None
) -> dict[str, Any]:
    """An answer of `/scale`.

    Raises:
        UserError: the server refuses.
        ExpertlaneError: it cannot be reached, is none of ours, or cannot do so now.
    """
    import msgspec

    from expertlane.client.connection import ClosedEarly, ConnectionFailed, error_message
    from expertlane.client.server import Unreachable

    url = connections.url
    try:
        sent = b"" if body is None else msgspec.json.encode(body)
        answer = await connections.ask(method, "/scale", sent)
    except (ConnectionFailed, ClosedEarly) as error:
        raise Unreachable(f"{url}: {error}") from None
    if answer.status == 200:
        try:
            found = msgspec.json.decode(bytes(answer.body), type=dict[str, Any])
        except msgspec.DecodeError:
            found = {}
        if "changes" not in found:
            raise UserError(f"{url} is not a server of expertlane serve")
        return found
    text = f"{url}: {error_message(bytes(answer.body))}"
    if answer.status < 500 and answer.status != _CONFLICT:
        raise UserError(text)
    raise ExpertlaneError(text)


def _lines(found: dict[str, Any]) -> list[str]:
    change = found["change"]
    ranks = f"{found['num_ranks']} rank{'s' * (found['num_ranks'] != 1)}"
    lines = [f"{found['layout']} on {ranks}, after {found['seconds']:.2f} s"]
    if change is None:
        lines[0] = f"{found['layout']} on {ranks}: nothing has changed"
    else:
        num, ahead_s = change["num_requests_computed_again"], change["seconds_ahead"]
        spent = {"preparing": ahead_s} if ahead_s else {}
        spent |= change["seconds_by_state"]
        lines += [
            f"from          {change['from']}",
            "time          " + ", ".join(f"{state} {each:.2f} s" for state, each in spent.items()),
            f"weights       {_sizes(change['weight_bytes_from'])}",
            f"requests      {num} computed again, none lost",
            *(f"lost          {cause}" for cause in change["lost"]),
        ]
    rates = [found[f"tokens_per_s_{when}"] for when in ("before", "after")]
    if None not in rates:
        before, after = map(_rate_text, rates)
        lines.append(f"tokens/s      {before} before, {after} after")
    return lines


def _rate_text(rate: dict[str, float]) -> str:
    if not rate["high"]:
        return "none"  # no request ran
    return f"{rate['median']:,.0f} ({rate['low']:,.0f} to {rate['high']:,.0f})"


def _sizes(bytes_from: dict[str, int]) -> str:
    return ", ".join(f"{size / 1e6:,.1f} MB {origin}" for origin, size in bytes_from.items())


def _rank_lines(ranks: list[dict[str, Any]]) -> list[str]:
    """MB of each rank's weights by origin, and of its KV cache."""
    lines = ["rank " + "".join(f"{origin:>9}" for origin in Origin) + "  seconds  KV cache"]
    for rank, each in enumerate(ranks):
        sizes = (each["weight_bytes_from"].get(origin, 0) / 1e6 for origin in Origin)
        lines.append(
            f"{rank:>4} "
            + "".join(f"{size:>9,.1f}" for size in sizes)
            + f"{sum(each['seconds_from'].values()):>9.2f}{each['kv_bytes'] / 1e6:>10,.1f}"
        )
    return [*lines, "MB of weights by source; seconds in the pause"]
