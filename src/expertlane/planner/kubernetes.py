"""A Kubernetes manifest for the servers of an engine's best deployment, in LeaderWorkerSets.

Each server is a group of a LeaderWorkerSet (https://lws.sigs.k8s.io): a pod for each of its
machines; the leader has the HTTP API. LWS gives each pod its number and the leader's address in
environment variables.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from expertlane.planner.commands import (
    ROUTER_PORT,
    PoolStarts,
    RouterStart,
    Serving,
    router_start,
)
from expertlane.planner.engines import ServingEngine
from expertlane.planner.served_pool import ServedPool
from expertlane.planner.server_start import PORT, NodeStart, Place, ServerStart
from expertlane.planner.templates import rendered
from expertlane.printable import printable
from expertlane.spec.files import strict_json
from expertlane.spec.names import EngineName

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


def kubernetes_manifest(serving: Serving) -> str | None:
    """The manifest that starts all servers: `kubectl apply -f FILE`.

    None if MPI must start ranks on several machines, which LWS does not do.
    """
    return _Manifest(serving).text()


@dataclass(frozen=True)
class _Set:
    """A LeaderWorkerSet: the servers of a pool.

    Attributes:
        one: one server of the pool.
        num_servers: number of groups.
        start: the commands of its first server, with placeholders for addresses.
    """

    name: str
    one: ServedPool
    num_servers: int
    start: ServerStart


@dataclass(frozen=True)
class _Manifest:
    serving: Serving

    @property
    def engine(self) -> ServingEngine:
        """The engine that is started."""
        return self.serving.engine

    @property
    def _leader(self) -> str:
        """Placeholder for the leader's address."""
        return f"{self.serving.mark}leader{self.serving.mark}"

    @property
    def _own(self) -> str:
        """Placeholder for a pod's own address."""
        return f"{self.serving.mark}own{self.serving.mark}"

    def text(self) -> str | None:
        """The YAML documents, after a comment; None if MPI must start the ranks."""
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
        return rendered("kubernetes.yaml.j2", {"json": _json}, values)

    def _set(self, pool: ServedPool) -> _Set:
        one, num_servers = pool.servers(self.engine)
        # A pod sees only its own devices, so ports and devices need no shift on a shared machine.
        alone = replace(one, devices_per_host=-(-one.layout.world_size // one.num_hosts))
        hosts = (self._leader, *[self._own] * (one.num_hosts - 1))
        name = self.engine.name if pool.role == "both" else f"{self.engine.name}-{pool.role}"
        return _Set(name, alone, num_servers, self.serving.start(alone, Place(hosts)))

    def _addresses(self, each: _Set) -> PoolStarts:
        """Its servers, at the DNS names that LWS gives their leaders."""
        places = [
            Place((f"{each.name}-{number}.{each.name}",)) for number in range(each.num_servers)
        ]
        return PoolStarts(each.one, tuple(replace(each.start, place=place) for place in places))

    def _about(self, sets: Sequence[_Set]) -> list[str]:
        engine = self.engine
        lines = [self.serving.title, f"Written by expertlane for {engine.title} {engine.version}."]
        if not engine.is_checked:
            lines.append("Its options are as documented; no parser has taken them.")
        notes = dict.fromkeys(note for each in sets for note in each.start.notes)
        lines += [f"Note: {note}" for note in notes]
        if engine.name == "expertlane":
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

    @property
    def _is_folder(self) -> bool:
        return self.serving.served.model.startswith("/")

    @property
    def _image(self) -> str:
        version = self.engine.version
        whole = version if version.count(".") > 1 else f"{version}.0"
        return _IMAGES[self.engine.name].format(whole)

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
            "num_devices": each.one.devices_per_host,
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
