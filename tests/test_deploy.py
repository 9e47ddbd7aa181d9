"""The files of `deploy/`, by the linters and schemas of what reads them; nothing here is built."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

DEPLOY = Path(__file__).parents[1] / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text("utf-8")


def tool(name: str) -> str:
    """One that comes from PyPI."""
    found = shutil.which(name, path=str(Path(sys.executable).parent))
    if found is None:
        pytest.skip(f"{name} is not installed: pip install -e '.[dev]'")
    return found


def check(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_hadolint_takes_the_dockerfile() -> None:
    check(tool("hadolint"), DEPLOY / "Dockerfile")


def test_the_image_is_no_root_and_holds_what_it_copies_alone() -> None:
    last = DOCKERFILE.rpartition("\nFROM ")[2]
    assert re.findall(r"^USER (.*)$", last, re.MULTILINE) == ["10001:10001"]
    assert "HEALTHCHECK" in last
    assert not re.search(r"(KEY|TOKEN|PASSWORD|SECRET)\s*=", DOCKERFILE)
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text("utf-8").splitlines()
    assert ignored[1] == "*"  # after a comment: nothing but what follows
    kept = {line[1:] for line in ignored if line.startswith("!")}
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE)
    assert {name for line in copied for name in line.split()} == kept
    assert all((DEPLOY.parent / name).exists() for name in kept)


@pytest.mark.parametrize("script", sorted(DEPLOY.glob("*.sh")), ids=lambda path: path.name)
def test_shellcheck_takes_the_scripts(script: Path) -> None:
    check("bash", "-n", script)
    check(tool("shellcheck"), script)


def test_the_slurm_script_starts_a_task_a_node(tmp_path: Path) -> None:
    """With stand-ins for Slurm's commands and for torchrun."""
    for name, text in {
        "scontrol": "echo first; echo second",
        "srun": 'shift; SLURM_NODEID=0 "$@"; SLURM_NODEID=1 "$@"',
        "torchrun": 'echo "$@"',
    }.items():
        path = tmp_path / name
        path.write_text(f"#!/usr/bin/env bash\n{text}\n")
        path.chmod(0o755)
    around = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "any", "SLURM_NNODES": "2"}
    around["SLURM_JOB_ID"] = "7"

    def run(*given: str) -> subprocess.CompletedProcess[str]:
        command = [DEPLOY / "slurm.sh", *given]
        return subprocess.run(command, env=around, capture_output=True, text=True)

    serve = ("serve", "a model", "--layout", "dp=2,ep=2")
    for given in (serve, ("compare",), ()):
        refused = run(*given)
        assert (refused.returncode, refused.stdout) == (2, "")
    torchrun = (
        "--nnodes 2 --nproc-per-node 1 --node-rank {} --max-restarts {} --master-addr first "
        "--master-port 29500"
    )
    compared = "compare paper --out results/slurm-7 --resume"
    assert run("compare", "paper", "--resume").stdout.splitlines() == [
        f"{torchrun.format(node, 0)} -m expertlane {compared}" for node in range(2)
    ]
    around["EXPERTLANE_API_KEY"] = "k"
    _, *tasks = run(*serve).stdout.splitlines()
    served = "serve a model --host 0.0.0.0 --port 8000 --drain-s 20 --layout dp=2,ep=2"
    assert tasks == [
        f"{torchrun.format(node, 3 * node)} -m expertlane {served}" for node in range(2)
    ]


def test_the_compose_file_listens_on_this_machine_alone() -> None:
    """Its fields by the Compose specification's names; and that its parts fit together."""
    found = yaml.safe_load((DEPLOY / "compose.yaml").read_text("utf-8"))
    assert found.keys() == {"name", "services", "configs", "secrets", "volumes"}
    services = found["services"]
    for service in services.values():
        assert all(each.startswith("127.0.0.1:") for each in service.get("ports", ()))
        assert set(service.get("secrets", ())) <= found["secrets"].keys()
        for volume in service["volumes"]:
            source = volume.partition(":")[0]
            assert source[0] in "$." or source in found["volumes"]
        for config in service.get("configs", ()):
            yaml.safe_load(found["configs"][config["source"]]["content"])
    assert (DEPLOY / "compose.yaml").parent / services["serve"]["build"]["context"]
    assert "--api-key-file=/run/secrets/api_key" in services["serve"]["command"]
    grace = int(services["serve"]["stop_grace_period"].removesuffix("s"))
    assert grace > 30  # the default of --drain-s


def _object(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "required": list(required),
        "properties": properties,
        "additionalProperties": False,
    }


_COUNT, _COUNT_OR_SHARE = {"type": "integer", "minimum": 0}, {"type": ["integer", "string"]}
_POD = _object(("spec",), metadata={"type": "object"}, spec={"type": "object"})
# The fields of leaderworkerset.x-k8s.io/v1 (api/leaderworkerset/v1/leaderworkerset_types.go of
# kubernetes-sigs/lws, October 2026); templates of pods are checked by Kubernetes' own schema.
LEADER_WORKER_SET = _object(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "leaderworkerset.x-k8s.io/v1"},
    kind={"const": "LeaderWorkerSet"},
    metadata={"type": "object", "required": ["name"]},
    spec=_object(
        ("leaderWorkerTemplate",),
        replicas=_COUNT,
        startupPolicy={"enum": ["LeaderCreated", "LeaderReady"]},
        networkConfig=_object(
            ("subdomainPolicy",), subdomainPolicy={"enum": ["Shared", "UniquePerReplica"]}
        ),
        rolloutStrategy=_object(
            ("type",),
            type={"const": "RollingUpdate"},
            rollingUpdateConfiguration=_object(
                partition=_COUNT, maxUnavailable=_COUNT_OR_SHARE, maxSurge=_COUNT_OR_SHARE
            ),
        ),
        leaderWorkerTemplate=_object(
            ("workerTemplate",),
            leaderTemplate=_POD,
            workerTemplate=_POD,
            size={"type": "integer", "minimum": 1},
            restartPolicy={
                "enum": ["Default", "RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None"]
            },
            subGroupPolicy=_object(
                subGroupPolicyType={"enum": ["LeaderWorker", "LeaderExcluded"]}, subGroupSize=_COUNT
            ),
            volumeClaimTemplates={"type": "array"},
            persistentVolumeClaimRetentionPolicy={"type": "object"},
        ),
    ),
)


def test_the_leader_worker_set_fits_its_schemas() -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    text = (DEPLOY / "leaderworkerset.yaml").read_text("utf-8")
    service, found = yaml.safe_load_all(text)
    jsonschema.validate(found, LEADER_WORKER_SET)
    kubernetes_validate.validate(service, "1.33", strict=True)
    template = found["spec"]["leaderWorkerTemplate"]
    for name in ("leaderTemplate", "workerTemplate"):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "any"}}
        kubernetes_validate.validate(pod | template[name], "1.33", strict=True)
        spec = template[name]["spec"]
        (container,) = spec["containers"]
        mounted = {each["name"] for each in container["volumeMounts"]}
        assert mounted == {each["name"] for each in spec["volumes"]}
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert "--nnodes=$(LWS_GROUP_SIZE)" in container["command"]
    selector = service["spec"]["selector"]
    assert selector["leaderworkerset.sigs.k8s.io/name"] == found["metadata"]["name"]
    assert service["metadata"]["name"] != found["metadata"]["name"]
    (port,) = template["leaderTemplate"]["spec"]["containers"][0]["ports"]
    assert service["spec"]["ports"][0]["targetPort"] == port["name"]
