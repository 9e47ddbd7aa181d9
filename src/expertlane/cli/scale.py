"""`expertlane scale`: another layout for a running server."""

import asyncio
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from expertlane.cli import output
from expertlane.cli.api_keys import API_KEY, check_key, key_lines
from expertlane.cli.help import Panel
from expertlane.cli.option_groups import takes_groups
from expertlane.cli.options import layout_option
from expertlane.cli.output_options import PrintOptions
from expertlane.errors import ExpertlaneError, UserError
from expertlane.spec.files import strict_json
from expertlane.spec.layout import Layout

if TYPE_CHECKING:
    from expertlane.client.connection import Connections, Url

_OVER_S = 10.0  # for a step to be committed after the change, if there are requests


@dataclass(frozen=True, kw_only=True)
class _Options:
    layout: str = layout_option(...)
    watch_s: float = typer.Option(
        2.0,
        metavar="SECONDS",
        rich_help_panel=Panel.SERVER,
        help="Measure tokens per second for this long before and after the change. 0: do not.",
    )
    api_key_file: Path | None = typer.Option(
        None,
        metavar="FILE",
        rich_help_panel=Panel.SERVER,
        show_default=f"{API_KEY}, else none",
        help="File with the API key.",
    )

    def headers(self) -> dict[str, str]:
        """With the key, if there is one.

        Raises:
            UserError: it is none.
        """
        key, where = os.environ.get(API_KEY), API_KEY
        if self.api_key_file is not None:
            (where, key), *_ = key_lines(self.api_key_file).items()
        if not key:
            return {}
        check_key(key, where)
        return {"Authorization": f"Bearer {key}"}


@takes_groups
def scale(
    url: Annotated[str, typer.Argument(metavar="URL", help="The server, as http://HOST:PORT.")],
    *,
    own: _Options,
    print_options: PrintOptions,
) -> None:
    """Change the layout of a running expertlane serve.

    No request is lost, and no token changes; clients see one pause. Prints how long the change
    took, what was moved, and tokens per second before and after. Exit code 2 if the server refuses
    the layout; then nothing has changed.

    \b
    Examples:
      expertlane scale http://127.0.0.1:8000 --layout dp=4,ep=4
      expertlane scale http://127.0.0.1:8000 --layout tp=2 --json
    """
    from expertlane.client.connection import Url

    layout = str(Layout.parse(own.layout))  # a mistake in it is told at once
    found = asyncio.run(_scale(Url.parse(url, "URL"), layout, own))
    if print_options.as_json:
        output.print_json(strict_json(found))
    else:
        lines = _lines(found)
        typer.echo("\n".join(lines[:1] if print_options.quiet else lines))


async def _scale(url: "Url", layout: str, own: _Options) -> dict[str, Any]:
    from expertlane.client.connection import Connections

    connections = Connections(url, own.headers())
    try:
        before = await _rate(connections, own.watch_s)
        began_s = time.perf_counter()
        body = b'{"layout": "%b"}' % layout.encode()
        facts = await _ask(connections, "POST", body)
        answered_s = time.perf_counter() - began_s
        after = await _rate(connections, own.watch_s)
        until_s = time.monotonic() + _OVER_S
        changes = (await _ask(connections, "GET"))["changes"]
        while changes and not changes[-1]["is_over"] and time.monotonic() < until_s:
            await asyncio.sleep(0.2)
            changes = (await _ask(connections, "GET"))["changes"]
    finally:
        connections.close()
    return {
        "layout": facts["layout"],
        "num_ranks": facts["num_ranks"],
        "seconds": round(answered_s, 3),
        "tokens_per_s_before": before,
        "tokens_per_s_after": after,
        "change": changes[-1] if changes else None,
    }


async def _rate(connections: "Connections", seconds: float) -> float | None:
    """Tokens per second, of all requests of the server; None over no time."""
    if not seconds:
        return None
    first, began_s = await _ask(connections, "GET"), time.perf_counter()
    await asyncio.sleep(seconds)
    then = await _ask(connections, "GET")
    num_tokens: int = then["num_generation_tokens"] - first["num_generation_tokens"]
    seconds = time.perf_counter() - began_s
    return round(num_tokens / seconds, 1)


async def _ask(connections: "Connections", method: str, body: bytes = b"") -> dict[str, Any]:
    """An answer of `/scale`.

    Raises:
        UserError: the server refuses.
        ExpertlaneError: it cannot be reached, or is none of ours.
    """
    import msgspec

    from expertlane.client.connection import ClosedEarly, ConnectionFailed
    from expertlane.client.events import error_message
    from expertlane.client.server import Unreachable

    url = connections.url
    try:
        answer = await connections.ask(method, "/scale", body)
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
    if answer.status < 500:
        raise UserError(text)
    raise ExpertlaneError(text)


def _lines(found: dict[str, Any]) -> list[str]:
    change = found["change"]
    ranks = f"{found['num_ranks']} rank{'s' * (found['num_ranks'] != 1)}"
    lines = [f"{found['layout']} on {ranks}, after {found['seconds']:.2f} s"]
    if change is None:
        lines[0] = f"{found['layout']} on {ranks}: nothing has changed"
    else:
        num, by_state = change["num_requests_computed_again"], change["seconds_by_state"]
        spent = ", ".join(f"{state} {seconds:.2f} s" for state, seconds in by_state.items())
        lines += [
            f"from          {change['from']}",
            f"time          {spent}",
            f"weights       {change['weight_bytes_kept'] / 1e6:,.1f} MB kept, "
            f"{change['weight_bytes_read'] / 1e6:,.1f} MB read",
            f"requests      {num} computed again, none lost",
            *(f"lost          {cause}" for cause in change["lost"]),
        ]
    rates = [found[f"tokens_per_s_{when}"] for when in ("before", "after")]
    if None not in rates:
        lines.append(f"tokens/s      {rates[0]:,.0f} before, {rates[1]:,.0f} after")
    return lines
