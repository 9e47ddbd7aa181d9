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
        documents = [document for each in sets for document in self._documents(each)]
        num_servers = sum(each.num_servers for each in sets)
        router = None
        if num_servers > 1:
            router = router_start(self.engine, [self._addresses(each) for each in sets])
        if router is not None and router.argv:
            documents += self._router(router)
        elif len(sets) == 1:  # a service over the leaders of all groups
            (only,) = sets
            selector = {_SET_LABEL: only.name, _INDEX_LABEL: "0"}
            documents.append(_service(f"{only.name}-api", selector, PORT))
        about = "".join(f"# {printable(line)}\n" for line in self._about(sets))
        return about + "---\n".join("".join(_yaml(each)) + "\n" for each in documents)

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

    def _documents(self, each: _Set) -> Iterator[dict[str, Any]]:
        """A LeaderWorkerSet, after the ConfigMap with the files that its pods read."""
        if each.start.files:
            files = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": each.name}}
            yield files | {"data": dict(each.start.files)}
        first, *others = (self._pod(each, node) for node in each.start.nodes[:2])
        template: dict[str, Any] = {
            "size": len(each.start.nodes),
            "restartPolicy": "RecreateGroupOnPodRestart",
        }
        # A group of one pod has only a leader, which is made from the worker template.
        template |= {"leaderTemplate": first} if others else {}
        template["workerTemplate"] = others[0] if others else first
        yield {
            "apiVersion": "leaderworkerset.x-k8s.io/v1",
            "kind": "LeaderWorkerSet",
            "metadata": {"name": each.name},
            "spec": {"replicas": each.num_servers, "leaderWorkerTemplate": template},
        }

    def _pod(self, each: _Set, node: NodeStart) -> dict[str, Any]:
        is_leader = node is each.start.nodes[0]
        mounts: list[dict[str, Any]] = [{"name": "shared-memory", "mountPath": "/dev/shm"}]
        memory = {"medium": "Memory", "sizeLimit": "16Gi"}  # for NCCL's buffers
        volumes: list[dict[str, Any]] = [{"name": "shared-memory", "emptyDir": memory}]
        if self._is_folder:
            folder = self.serving.served.model
            mounts.append({"name": "model", "mountPath": folder, "readOnly": True})
            volumes.append({"name": "model", "hostPath": {"path": folder, "type": "Directory"}})
        if each.start.files:
            mounts.append({"name": "files", "mountPath": _CONFIG})
            volumes.append({"name": "files", "configMap": {"name": each.name}})
        version = self.engine.version
        container = {
            "name": self.engine.name,
            "image": _IMAGES[self.engine.name].format(
                version if version.count(".") > 1 else f"{version}.0"
            ),
            "command": self._command(node),
            "env": [*self._environment(node)],
            "resources": {"limits": {"nvidia.com/gpu": each.one.devices_per_host}},
            "volumeMounts": mounts,
        }
        if each.start.files:
            container["workingDir"] = _CONFIG
        if is_leader:
            container["ports"] = [{"name": "http", "containerPort": PORT}]
            container |= _probes()
        return {
            "spec": {
                "containers": [container],
                "enableServiceLinks": False,  # VLLM_…_PORT would be read as settings
                "terminationGracePeriodSeconds": 60,
                "volumes": volumes,
            }
        }

    def _command(self, node: NodeStart) -> list[str]:
        """A pod's command, with LWS's variables for the leader's address and the node's number."""
        words = [_literal(word).replace(self._leader, _LEADER) for word in node.argv]
        if "--node-rank" in words:
            words[words.index("--node-rank") + 1] = _INDEX
        return words

    def _environment(self, node: NodeStart) -> Iterator[dict[str, Any]]:
        """Environment variables of a pod; those that name its machine get the pod's address."""
        address = {"fieldRef": {"fieldPath": "status.podIP"}}
        if self.engine.name == "vllm":
            yield {"name": "VLLM_HOST_IP", "valueFrom": address}
        for name, value in node.environment.items():
            if value in (self._leader, self._own):
                yield {"name": name, "valueFrom": address}
            else:
                yield {"name": name, "value": value}
        if not self._is_folder:
            secret = {"name": "huggingface", "key": "token", "optional": True}
            yield {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": secret}}

    def _router(self, router: RouterStart) -> Iterator[dict[str, Any]]:
        """The router's Deployment and Service, and a ConfigMap if it reads a file."""
        name, own = f"{self.engine.name}-router", self.engine.router
        labels = {"app": name}
        container: dict[str, Any] = {
            "name": "router",
            "image": _ROUTER_IMAGE,
            "command": list(map(_literal, router.argv)),
            "ports": [{"name": "http", "containerPort": ROUTER_PORT}],
            **_probes(),
        }
        pod: dict[str, Any] = {"containers": [container]}
        if router.files:
            container["image"] = _IMAGES[self.engine.name].format(f"{self.engine.version}.0")
            container["workingDir"] = _CONFIG
            container["volumeMounts"] = [{"name": "files", "mountPath": _CONFIG}]
            pod["volumes"] = [{"name": "files", "configMap": {"name": name}}]
            yield {
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "metadata": {"name": name},
                "data": dict(router.files),
            }
        elif own is not None:
            install = 'pip install --no-cache-dir "$0" && exec "$@"'
            package = f"{own.package}=={own.version}"
            container["command"] = ["sh", "-c", _literal(install), package, *container["command"]]
        yield {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": name},
            "spec": {
                "replicas": 1,
                "selector": {"matchLabels": labels},
                "template": {"metadata": {"labels": labels}, "spec": pod},
            },
        }
        yield _service(name, labels, ROUTER_PORT)


def _service(name: str, selector: Mapping[str, str], port: int) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name},
        "spec": {
            "selector": dict(selector),
            "ports": [{"name": "http", "port": port, "targetPort": "http"}],
        },
    }


def _literal(word: str) -> str:
    """A word of a container's command, with `$` escaped so that Kubernetes expands no variable."""
    return word.replace("$", "$$")


def _probes() -> dict[str, Any]:
    health = {"path": "/health", "port": "http"}
    return {
        # An hour for weights and compilation.
        "startupProbe": {"httpGet": health, "periodSeconds": 10, "failureThreshold": 360},
        "readinessProbe": {"httpGet": health, "periodSeconds": 10, "timeoutSeconds": 5},
    }


_PLAIN = re.compile(r"[A-Za-z/][A-Za-z0-9/._-]*")
_RESERVED = {"true", "false", "null", "yes", "no", "on", "off", "y", "n"}
# Characters that JSON leaves as they are and YAML does not allow.
_UNREADABLE = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")


def _yaml(value: Any, indent: int = 0) -> Iterator[str]:
    """YAML of a JSON value, in pieces; strings are quoted unless YAML reads them as strings."""
    before = "\n" + " " * indent
    if isinstance(value, dict):
        for place, (key, each) in enumerate(value.items()):
            yield f"{before if place or indent else ''}{_scalar(key)}:"
            yield from _value(each, indent + 2)
    else:
        for each in value:
            text = "".join(_yaml(each, indent + 2)).lstrip() if _is_nested(each) else _scalar(each)
            yield f"{before}- {text}"


def _value(value: Any, indent: int) -> Iterator[str]:
    if _is_nested(value):
        yield from _yaml(value, indent)
    else:
        yield f" {_scalar(value)}"


def _is_nested(value: Any) -> bool:
    return isinstance(value, dict | list) and len(value) > 0


def _scalar(value: Any) -> str:
    if not isinstance(value, str):
        return strict_json(value)
    if _PLAIN.fullmatch(value) and value.lower() not in _RESERVED:
        return value
    if value.isprintable() and ('"' in value or "\\" in value):
        single = value.replace("'", "''")
        return f"'{single}'"
    quoted = strict_json(value, ensure_ascii=False)
    return _UNREADABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", quoted)
