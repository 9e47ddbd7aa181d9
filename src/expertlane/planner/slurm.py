"""A batch script for Slurm that starts the servers of an engine's best deployment, and the router.

It uses the engine's own way over several nodes: `srun` starts one task on each node of a server, or
one task for each rank if the engine uses MPI.
"""

import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from expertlane.planner.commands import (
    ROUTER_PORT,
    PoolStarts,
    RouterStart,
    Serving,
    pool_starts,
    router_start,
)
from expertlane.planner.engines import ServingEngine
from expertlane.planner.server_start import NodeStart, ServerStart
from expertlane.planner.templates import rendered
from expertlane.printable import printable

_COLUMNS = 88  # width of a line, about


def slurm_script(serving: Serving) -> str:
    """The batch script that starts all servers: `sbatch FILE`.

    Names are quoted, so none can be read as a command. The job ends, with all that it started, when
    any server ends.
    """
    mark = serving.mark
    started = pool_starts(serving, lambda number: f"{mark}{number}{mark}")
    return _Script(serving, started, re.compile(f"{mark}([0-9]+){mark}")).text()


@dataclass(frozen=True)
class _Script:
    """A script under construction.

    Attributes:
        started: the servers of each pool, with placeholders for hosts.
        host: matches a placeholder; its group is the host's number.
    """

    serving: Serving
    started: Sequence[PoolStarts]
    host: re.Pattern[str]

    @property
    def engine(self) -> ServingEngine:
        """The engine that is started."""
        return self.serving.engine

    def text(self) -> str:
        """The text of the script."""
        urls = [server.place.url for each in self.started for server in each.servers]
        router, front = RouterStart(()), urls[0]
        first_host = self.started[0].servers[0].place.hosts[0]
        if len(urls) > 1:
            router = router_start(self.engine, self.started)
            if router.argv:
                front = f"http://{first_host}:{ROUTER_PORT}"
        filters: dict[str, Callable[[Any], Any]] = {
            "shell": self._word,
            "in_quotes": lambda url: self.host.sub(r"${hosts[\1]}", url),
            "option_lines": self._option_lines,
            "command": _continued,
        }
        values = {
            "about": list(map(printable, self._about())),
            "name": f"expertlane-{self.engine.name}",
            "num_hosts": sum(each.num_hosts for each in self.started),
            "num_devices": max(map(_devices, self.started)),
            "pools": list(map(self._pool, self.started)),
            "urls": urls,
            "router": router,
            "first_host": first_host,
            "front": front,
        }
        return rendered("slurm.sh.j2", filters, values)

    def _about(self) -> list[str]:
        """Lines of the comment at the head of the script."""
        engine, num = self.engine, sum(len(each.servers) for each in self.started)
        lines = [self.serving.title, f"Written by expertlane for {engine.title} {engine.version}."]
        if not engine.is_checked:
            lines.append("Its options are as documented; no parser has taken them.")
        if num > 1 and engine.router is not None:
            router = engine.router
            lines.append(f"The router: pip install {router.package}=={router.version}")
        if num > 1 and not router_start(engine, self.started).argv:
            lines.append("Put any HTTP load balancer before the servers.")
        notes = dict.fromkeys(note for each in self.started for note in each.servers[0].notes)
        lines += [f"Note: {note}" for note in notes]
        lines.append("Whoever reaches these nodes can use the servers: they ask for no key.")
        lines.append("Activate the engine's environment, then: sbatch FILE")
        lines.append("START_S, POLL_S and LOGS in the environment change its waits and its logs.")
        return lines

    def _pool(self, started: PoolStarts) -> dict[str, Any]:
        """Words that all commands of a pool begin and end with, and the commands of its nodes."""
        role = "server" if started.pool.role == "both" else started.pool.role
        nodes = [
            (server, number, node)
            for server in started.servers
            for number, node in enumerate(server.nodes)
        ]
        tasks = [_under_srun(server, node) for server, _, node in nodes]
        first = tasks[0][0]
        head, tail = _shared([words for words, _ in tasks])
        if head < len(first) and first[head - 1].startswith("-"):  # its value differs between nodes
            head -= 1
        begin = f"{role}_begin" if tail else role
        starts = []
        for (server, number, node), (words, num_tasks) in zip(nodes, tasks, strict=True):
            place = started.servers.index(server)
            name = f"{role}-{place}" + (f"-node{number}" if len(server.nodes) > 1 else "")
            hosts = server.place.hosts if server.num_tasks else (server.place.hosts[number],)
            mpi = "pmix" if num_tasks > len(hosts) else "none"
            starts.append(
                [
                    *("start", name, role, self._word(",".join(hosts)), str(num_tasks), mpi),
                    *self._environment(node),
                    f'"${{{begin}[@]}}"',
                    *map(self._word, words[head : len(words) - tail]),
                    *([f'"${{{role}_end[@]}}"'] if tail else []),
                ]
            )
        return {
            "role": role,
            "begin": first[:head],
            "end": first[len(first) - tail :],
            "files": started.servers[0].files,
            "starts": starts,
        }

    def _environment(self, node: NodeStart) -> list[str]:
        """Words that set variables inside the task, since `srun` sets CUDA_VISIBLE_DEVICES too."""
        if not node.environment:
            return []
        pairs = (f"{name}={value}" for name, value in node.environment.items())
        return ["env", *map(self._word, pairs)]

    def _option_lines(self, words: Sequence[str]) -> list[str]:
        """Quoted words of an array, one option on each line."""
        lines: list[str] = []
        for word in map(self._word, words):
            starts = not lines or word.startswith("-")
            if starts or len(lines[-1]) + len(word) > _COLUMNS:
                lines.append(word)
            else:
                lines[-1] += f" {word}"
        return lines

    def _word(self, word: str) -> str:
        """A word for the shell, quoted if need be, with its placeholders as the job's hosts."""
        parts = self.host.split(word)  # text, number, text, …
        texts = [_quoted(text) if text else "" for text in parts[::2]]
        hosts = [f'"${{hosts[{number}]}}"' for number in parts[1::2]]
        joined = "".join(text + host for text, host in zip(texts, [*hosts, ""], strict=True))
        return joined or "''"


def _quoted(text: str) -> str:
    """A text quoted for the shell; also if it has a comma, which shellcheck warns of in arrays."""
    quoted = shlex.quote(text)
    return f"'{text}'" if quoted == text and "," in text else quoted


def _devices(started: PoolStarts) -> int:
    """Number of devices of a machine that a pool uses."""
    one = started.servers[0].pool
    of_server = -(-one.layout.world_size // one.num_hosts)
    return of_server * min(one.per_host, len(started.servers))


def _under_srun(server: ServerStart, node: NodeStart) -> tuple[tuple[str, ...], int]:
    """The command of a task, and the number of tasks; TensorRT-LLM's ranks are a task each."""
    if server.engine.name != "trtllm":
        return node.argv, 1
    world_size = server.pool.layout.world_size
    if server.num_tasks or world_size == 1:
        return node.argv, max(1, server.num_tasks)
    return ("trtllm-llmapi-launch", *node.argv), world_size


def _shared(commands: Sequence[Sequence[str]]) -> tuple[int, int]:
    """Number of words that all commands begin with, and number that all the rest ends with."""
    if len(commands) == 1:
        return len(commands[0]), 0
    head = _alike(commands)
    ends = [list(reversed(words[head:])) for words in commands]
    return head, _alike(ends)


def _alike(commands: Iterable[Sequence[str]]) -> int:
    places = zip(*commands, strict=False)
    return sum(1 for _ in takewhile(lambda words: len(set(words)) == 1, places))


def _continued(words: Sequence[str]) -> str:
    """A command, with line continuations if it is long."""
    lines, is_value = [""], False
    for word in words:
        if lines[-1] and not is_value and len(lines[-1]) + len(word) > _COLUMNS:
            lines.append(f"    {word}")
        else:
            lines[-1] += f" {word}" if lines[-1] else word
        is_value = word.startswith("--")
    return " \\\n".join(lines)
