"""Scripts that start the servers of an engine's best deployment, and the router: `plan --scripts`.

A batch script for Slurm uses the engine's own way over several nodes: `srun` starts one task on
each node of a server, or one task for each rank if the engine uses MPI. A manifest for Kubernetes
has a LeaderWorkerSet for each pool. Both come from the templates in `launchers/`, one file each,
which Jinja renders.
"""

import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from itertools import takewhile
from typing import Any

from jinja2 import StrictUndefined
from jinja2.sandbox import SandboxedEnvironment

from expertlane.planner.commands import (
    ROUTER_PORT,
    PoolStarts,
    RouterStart,
    Serving,
    pool_starts,
    router_start,
)
from expertlane.planner.engines import ServedPool
from expertlane.planner.server_start import PORT, NodeStart, Place, ServerStart
from expertlane.printable import printable
from expertlane.spec.files import strict_json
from expertlane.spec.names import EngineName


def scripts_of(serving: Serving) -> dict[str, str]:
    """Texts by file name: a batch script for Slurm, and a Kubernetes manifest.

    There is no manifest if MPI must start the ranks of several machines.
    """
    name = serving.engine.name
    made = {f"{name}.slurm.sh": _SlurmScript(serving).text()}
    manifest = _KubernetesManifest(serving).text()
    return made if manifest is None else made | {f"{name}.kubernetes.yaml": manifest}


def _rendered(
    name: str, filters: Mapping[str, Callable[[Any], Any]], values: Mapping[str, Any]
) -> str:
    """The text of a template of `launchers/`; a value that it lacks is an error.

    Args:
        filters: by name: what quotes a value for the script.
    """
    environment = SandboxedEnvironment(
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        comment_start_string="{##",  # `${#words[@]}` is a number of words in Bash
        comment_end_string="##}",
    )
    environment.filters.update(filters)
    text = files("expertlane.planner").joinpath("launchers", name).read_text("utf-8")
    return environment.from_string(text).render(values)


def _origin(serving: Serving) -> list[str]:
    """First lines of a script's comment: what it starts, and what it was written for."""
    engine = serving.engine
    lines = [serving.title, f"Written by expertlane for {engine.title} {engine.version}."]
    if not engine.is_checked:
        lines.append("Its options are as documented; no parser has taken them.")
    return lines


def _notes(starts: Iterable[ServerStart]) -> list[str]:
    """Lines of a comment with the notes of all servers, each once."""
    return [f"Note: {note}" for note in dict.fromkeys(n for each in starts for n in each.notes)]


_COLUMNS = 88  # width of a line, about


class _SlurmScript:
    """A batch script that starts all servers: `sbatch FILE`.

    Names are quoted, so none can be read as a command. The job ends, with all that it started, when
    any server ends.

    Attributes:
        started: the servers of each pool, with placeholders for hosts.
        host: matches a placeholder; its group is the host's number.
    """

    def __init__(self, serving: Serving) -> None:
        mark = serving.mark
        self.serving, self.engine = serving, serving.engine
        self.started = pool_starts(serving, lambda number: f"{mark}{number}{mark}")
        self.host = re.compile(f"{mark}([0-9]+){mark}")
        self.num_servers = sum(len(each.servers) for each in self.started)
        self.router = RouterStart(())
        if self.num_servers > 1:
            self.router = router_start(self.engine, self.started)

    def text(self) -> str:
        """The text of the script."""
        urls = [server.place.url for each in self.started for server in each.servers]
        first_host = self.started[0].servers[0].place.hosts[0]
        front = f"http://{first_host}:{ROUTER_PORT}" if self.router.argv else urls[0]
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
            "router": self.router,
            "first_host": first_host,
            "front": front,
        }
        return _rendered("slurm.sh.j2", filters, values)

    def _about(self) -> list[str]:
        """Lines of the comment at the head of the script."""
        lines, router = _origin(self.serving), self.engine.router
        if self.num_servers > 1 and router is not None:
            lines.append(f"The router: pip install {router.package}=={router.version}")
        if self.num_servers > 1 and not self.router.argv:
            lines.append("Put any HTTP load balancer before the servers.")
        lines += _notes(each.servers[0] for each in self.started)
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


_IMAGES: Mapping[EngineName, str] = {
    "vllm": "vllm/vllm-openai:v{}",
    "sglang": "lmsysorg/sglang:v{}",
    "trtllm": "nvcr.io/nvidia/tensorrt-llm/release:{}",
    "expertlane": "registry.example.com/expertlane:{}",
}
_ROUTER_IMAGE = "python:3.12-slim"
_SET_LABEL = "leaderworkerset.sigs.k8s.io/name"
_INDEX_LABEL = "leaderworkerset.sigs.k8s.io/worker-index"
_LEADER, _INDEX = "$(LWS_LEADER_ADDRESS)", "$(LWS_WORKER_INDEX)"
_CONFIG = "/etc/serving"  # working directory of a pod, with the files that its server reads


@dataclass(frozen=True)
class _Set:
    """A LeaderWorkerSet: the servers of a pool.

    Attributes:
        num_servers: number of groups.
        start: the commands of its first server, with placeholders for addresses.
    """

    name: str
    num_servers: int
    start: ServerStart


class _KubernetesManifest:
    """A manifest that starts all servers, in LeaderWorkerSets: `kubectl apply -f FILE`.

    Each server is a group of a LeaderWorkerSet (https://lws.sigs.k8s.io): a pod for each of its
    machines; the leader has the HTTP API. LWS gives each pod its number and the leader's address in
    environment variables. Names of pods are placeholders until then: `_leader`, and a pod's `_own`.
    """

    def __init__(self, serving: Serving) -> None:
        mark = serving.mark
        self.serving, self.engine = serving, serving.engine
        self._leader, self._own = f"{mark}leader{mark}", f"{mark}own{mark}"
        self._is_folder = serving.served.model.startswith("/")
        version = self.engine.version
        whole = version if version.count(".") > 1 else f"{version}.0"
        self._image = _IMAGES[self.engine.name].format(whole)

    def text(self) -> str | None:
        """The YAML documents, after a comment; None if MPI must start ranks on several machines.

        LWS starts no ranks by MPI.
        """
        sets = [self._set(pool) for pool in self.serving.pools]
        if any(each.start.num_tasks for each in sets):
            return None
        router = service = None
        if sum(each.num_servers for each in sets) > 1:
            router = self._router(router_start(self.engine, list(map(self._addresses, sets))))
        if router is not None:
            name = f"{self.engine.name}-router"
            service = {"name": name, "selector": {"app": name}, "port": ROUTER_PORT}
        elif len(sets) == 1:  # a service over the leaders of all groups
            (only,) = sets
            selector = {_SET_LABEL: only.name, _INDEX_LABEL: "0"}
            service = {"name": f"{only.name}-api", "selector": selector, "port": PORT}
        values = {
            "about": list(map(printable, self._about(sets))),
            "engine": self.engine,
            "image": self._image,
            "folder": self.serving.served.model if self._is_folder else None,
            "config": _CONFIG,
            "port": PORT,
            "sets": list(map(self._values, sets)),
            "router": router,
            "service": service,
        }
        return _rendered("kubernetes.yaml.j2", {"json": _json}, values)

    def _set(self, pool: ServedPool) -> _Set:
        one, num_servers = pool.servers(self.engine)
        # A pod sees only its own devices, so ports and devices need no shift on a shared machine.
        alone = replace(one, devices_per_host=-(-one.layout.world_size // one.num_hosts))
        hosts = (self._leader, *[self._own] * (one.num_hosts - 1))
        name = self.engine.name if pool.role == "both" else f"{self.engine.name}-{pool.role}"
        return _Set(name, num_servers, self.serving.start(alone, Place(hosts)))

    def _addresses(self, each: _Set) -> PoolStarts:
        """Its servers, at the DNS names that LWS gives their leaders."""
        places = [
            Place((f"{each.name}-{number}.{each.name}",)) for number in range(each.num_servers)
        ]
        return PoolStarts(
            each.start.pool, tuple(replace(each.start, place=place) for place in places)
        )

    def _about(self, sets: Sequence[_Set]) -> list[str]:
        lines = [*_origin(self.serving), *_notes(each.start for each in sets)]
        if self.engine.name == "expertlane":
            lines.append("The image is a placeholder: deploy/Dockerfile builds one.")
        if self._is_folder:
            lines.append("Each machine has the model's folder under the same path.")
        else:
            lines.append("Each pod fetches the model; a gated one needs a token:")
            lines.append("  kubectl create secret generic huggingface --from-literal=token=TOKEN")
        lines.append("RDMA devices and placement are your cluster's: add them to the pods.")
        lines.append("Whoever reaches the pods can use the servers: they ask for no key.")
        lines.append("With LeaderWorkerSet installed: kubectl apply -f FILE")
        return lines

    def _values(self, each: _Set) -> dict[str, Any]:
        """What the template says of a set: its leader's node, and another node if there is one."""
        nodes = [
            {"command": self._command(node), "environment": dict(self._environment(node))}
            for node in each.start.nodes[:2]
        ]
        return {
            "name": each.name,
            "files": each.start.files,
            "num_servers": each.num_servers,
            "size": len(each.start.nodes),
            "num_devices": each.start.pool.devices_per_host,
            "nodes": nodes,
        }

    def _command(self, node: NodeStart) -> list[str]:
        """A pod's command, with LWS's variables for the leader's address and the node's number."""
        words = [_literal(word).replace(self._leader, _LEADER) for word in node.argv]
        if "--node-rank" in words:
            words[words.index("--node-rank") + 1] = _INDEX
        return words

    def _environment(self, node: NodeStart) -> Iterator[tuple[str, str | None]]:
        """Environment variables of a pod; None for those that are the pod's address."""
        if self.engine.name == "vllm":
            yield "VLLM_HOST_IP", None
        for name, value in node.environment.items():
            yield name, None if value in (self._leader, self._own) else value

    def _router(self, start: RouterStart) -> dict[str, Any] | None:
        """The router's image, command and files; None if the engine has none."""
        if not start.argv:
            return None
        image, command, own = _ROUTER_IMAGE, list(map(_literal, start.argv)), self.engine.router
        if start.files:
            image = self._image
        elif own is not None:
            install = _literal('pip install --no-cache-dir "$0" && exec "$@"')
            command = ["sh", "-c", install, f"{own.package}=={own.version}", *command]
        return {"image": image, "command": command, "files": start.files}


def _literal(word: str) -> str:
    """A word of a container's command, with `$` escaped so that Kubernetes expands no variable."""
    return word.replace("$", "$$")


# Characters that JSON leaves as they are and YAML does not allow.
_UNREADABLE = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")


def _json(value: str) -> str:
    """A text as JSON, which is YAML too."""
    quoted = strict_json(value, ensure_ascii=False)
    return _UNREADABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", quoted)
