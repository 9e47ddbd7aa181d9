"""The commands that start an engine's deployment: one for each node, and the router."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil

from expertlane.cost.step.operation import NumberTypes
from expertlane.planner.engines import ServedPool, ServingEngine
from expertlane.planner.server_start import (
    BOOTSTRAP_PORT,
    PORT,
    Place,
    ServerStart,
    ServeTarget,
    server_start,
    shell_line,
)
from expertlane.results.results import ServeCommand, ServeRole
from expertlane.spec.files import strict_json

ROUTER_PORT = 8080


@dataclass(frozen=True)
class Serving:
    """A model and the pools that an engine serves it with.

    Attributes:
        pools: one pool, or one for prefill and one for decode.
        max_len: tokens of the longest request.
    """

    engine: ServingEngine
    pools: Sequence[ServedPool]
    served: ServeTarget
    types: NumberTypes
    max_len: int

    @property
    def title(self) -> str:
        """Model, engine and layouts, in a line."""
        pools = ", ".join(
            f"{'' if pool.role == 'both' else f'{pool.role} '}{pool.layout}" for pool in self.pools
        )
        return f"{self.served.model} on {self.engine.title}: {pools}"

    @property
    def mark(self) -> str:
        """A delimiter for placeholders: it does not occur in the model's name."""
        return "@" * (2 + max(map(len, re.findall("@+", self.served.model)), default=0))

    def start(self, one: ServedPool, place: Place) -> ServerStart:
        """The commands that start one server of a pool at its place."""
        return server_start(self.engine, one, self.served, self.types, self.max_len, place)


@dataclass(frozen=True)
class PoolStarts:
    """The commands that start all servers of a pool.

    Attributes:
        pool: the pool.
        servers: one start for each server; servers on one machine are adjacent.
    """

    pool: ServedPool
    servers: tuple[ServerStart, ...]

    @property
    def num_hosts(self) -> int:
        """Number of machines of all servers."""
        one = self.servers[0].pool
        return ceil(len(self.servers) / one.per_host) * one.num_hosts


def pool_starts(serving: Serving, host: Callable[[int], str] = "HOST{}".format) -> list[PoolStarts]:
    """The commands of every server of each pool; small servers share a machine.

    Args:
        host: gives the name of a machine by its number.
    """
    found: list[PoolStarts] = []
    first_host = 0
    for pool in serving.pools:
        one, num_servers = pool.servers(serving.engine)
        servers = []
        for server in range(num_servers):
            group, offset = divmod(server, one.per_host)
            first = first_host + group * one.num_hosts
            hosts = tuple(map(host, range(first, first + one.num_hosts)))
            devices = _devices(one, num_servers, offset)
            place = Place(hosts, PORT + offset, offset=offset, devices=devices)
            servers.append(serving.start(one, place))
        found.append(PoolStarts(pool, tuple(servers)))
        first_host += found[-1].num_hosts
    return found


def _devices(one: ServedPool, num_servers: int, offset: int) -> tuple[int, ...]:
    """Indices of a server's devices; empty if it does not share its machine."""
    if num_servers == 1 or one.per_host == 1:
        return ()
    size = one.layout.world_size
    return tuple(range(offset * size, (offset + 1) * size))


@dataclass(frozen=True)
class RouterStart:
    """The command that starts the router in front of the servers.

    Attributes:
        argv: empty if the engine has no router: any HTTP load balancer works.
        files: texts by name, to write into its working directory first.
    """

    argv: tuple[str, ...]
    files: Mapping[str, str] = field(default_factory=dict)


def engine_commands(serving: Serving) -> list[ServeCommand]:
    """The commands of each pool, and of the router if there are several servers."""
    made: list[ServeCommand] = []
    engine, started = serving.engine, pool_starts(serving)
    for each in started:
        first, num_servers = each.servers[0], len(each.servers)
        notes = list(first.notes)
        if num_servers > 1:
            notes.append(_further_servers(each, engine))
        # Which devices are whose is in the note.
        start = serving.start(first.pool, replace(first.place, devices=()))
        checked = engine.version if engine.is_checked else None
        note, role = "; ".join(notes), each.pool.role
        made.append(ServeCommand(engine.title, start.lines, note, role, num_servers, checked))
    if sum(len(each.servers) for each in started) > 1:
        made.append(_router_command(engine, router_start(engine, started)))
    return made


def _further_servers(started: PoolStarts, engine: ServingEngine) -> str:
    """A note on the options in which further servers of a pool differ from the first."""
    num, one = len(started.servers), started.servers[0].pool
    if one.per_host == 1:
        return f"each of the {num} servers on hosts of its own"
    ports = [f"--port {PORT} + K"]
    if engine.name == "sglang" and one.role == "prefill":
        ports.append(f"--disaggregation-bootstrap-port {BOOTSTRAP_PORT} + K")
    if engine.name == "sglang" and one.layout.dp > 1:
        ports.append("--dist-init-addr of its own")
    if engine.name == "vllm" and one.layout.dp > 1:
        ports.append("--data-parallel-rpc-port of its own")
    if engine.name == "vllm" and one.role != "both":
        ports.append("VLLM_NIXL_SIDE_CHANNEL_PORT of its own")
    size = one.layout.world_size
    devices = "device K" if size == 1 else f"devices {size}K to {size}K + {size - 1}"
    return (
        f"{min(num, one.per_host)} servers a host: server K of it with {devices} "
        f"(CUDA_VISIBLE_DEVICES), {', '.join(ports)}"
    )


def router_start(engine: ServingEngine, started: Sequence[PoolStarts]) -> RouterStart:
    """The command that starts the router in front of all servers."""
    places = {each.pool.role: [server.place for server in each.servers] for each in started}
    if engine.name == "trtllm" and "decode" in places:
        config = {
            "hostname": "0.0.0.0",
            "port": ROUTER_PORT,
            "context_servers": _instances(places["prefill"]),
            "generation_servers": _instances(places["decode"]),
        }
        program = ("trtllm-serve", "disaggregated", "-c", "disagg.yaml")
        return RouterStart(program, {"disagg.yaml": strict_json(config)})
    if engine.router is None:
        return RouterStart(())
    words = list(engine.router.words)
    if "both" in places:
        words += ["--worker-urls", *(place.url for place in places["both"])]
    else:
        words.append(engine.router.pools)
        for place in places["prefill"]:
            port = [str(place.bootstrap_port)] if engine.name == "sglang" else []
            words += ["--prefill", place.url, *port]
        for place in places["decode"]:
            words += ["--decode", place.url]
    words += ["--host", "0.0.0.0", "--port", str(ROUTER_PORT)]
    return RouterStart(tuple(words))


def _router_command(engine: ServingEngine, router: RouterStart) -> ServeCommand:
    role: ServeRole = "router"
    if not router.argv:
        return ServeCommand(engine.title, (), "any HTTP load balancer before the servers", role)
    line = shell_line(router.files, router.argv)
    if router.files or engine.router is None:
        return ServeCommand(engine.title, (line,), "", role)
    note, version = f"pip install {engine.router.package}", engine.router.version
    return ServeCommand(engine.title, (line,), note, role, checked=version)


def _instances(places: Sequence[Place]) -> dict[str, object]:
    return {
        "num_instances": len(places),
        "urls": [place.url.removeprefix("http://") for place in places],
    }
