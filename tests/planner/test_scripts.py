"""Scripts for Slurm and Kubernetes: by linters and schemas, and run with stand-ins for servers."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from engine.ranks.processes import wait_until
from expertlane.cli.app import app
from expertlane.planner.commands import Serving
from expertlane.planner.engines import ENGINES
from expertlane.planner.scripts import scripts_of
from expertlane.planner.server_start import ServeTarget
from planner.serving_options import words_of
from planner.test_commands import GATHERED, PARSERS, TYPES, served
from test_deploy import LEADER_WORKER_SET, check, tool

PATIENCE_S = 50  # less than the minute after which a script kills what it has told to end
# Names of a model that would do something if they were not quoted.
EVIL = (
    "org/model",
    "/there/a $(touch touched) `touch touched` 'it' \"is\" ${hosts[0]} @@1@@ $(LWS_GROUP_SIZE)",
    "x\n#SBATCH --nodes=9\ntouch touched",
)
SHAPES = {
    "one device": lambda: [served("tp=1")],
    "one host": lambda: [served("tp=8")],
    "two hosts": lambda: [served("dp=16,ep=16", GATHERED)],
    "servers on hosts": lambda: [served("replicas=6,tp=4")],
    "pools": lambda: [
        served("replicas=2,dp=4,ep=4", role="prefill"),
        served("dp=16,ep=16", role="decode"),
    ],
}


def scripts(engine, shape, model="org/model"):
    serving = Serving(ENGINES[engine], SHAPES[shape](), ServeTarget(model), TYPES, 4096)
    return scripts_of(serving)


def runs(engine, shape):
    return not (engine == "expertlane" and shape == "pools")


CASES = [(engine, shape) for engine in ENGINES for shape in SHAPES if runs(engine, shape)]


def check_scripts(*paths):
    """By the shell, and by shellcheck."""
    for path in paths:
        check("bash", "-n", path)
    check(tool("shellcheck"), *paths)


@pytest.mark.parametrize(("engine", "shape"), CASES)
def test_shellcheck_takes_them(engine, shape, tmp_path):
    for place, model in enumerate(EVIL):
        path = tmp_path / f"{place}.sh"
        path.write_text(scripts(engine, shape, model)[f"{engine}.slurm.sh"])
    check_scripts(*tmp_path.iterdir())


def check_manifest(text):
    """By Kubernetes' own schema, and by that of LeaderWorkerSet; gives its documents."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    documents = list(yaml.safe_load_all(text))
    for each in documents:
        if each["kind"] != "LeaderWorkerSet":
            kubernetes_validate.validate(each, "1.33", strict=True)
            continue
        jsonschema.validate(each, LEADER_WORKER_SET)
        for pod in pods_of(each):
            whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "any"}, **pod}
            kubernetes_validate.validate(whole, "1.33", strict=True)
    return documents


@pytest.mark.parametrize(("engine", "shape"), CASES)
def test_manifests_fit_their_schemas(engine, shape):
    for model in EVIL:
        text = scripts(engine, shape, model).get(f"{engine}.kubernetes.yaml")
        if text is None:
            assert (engine, shape) in (("trtllm", "two hosts"), ("trtllm", "pools"))
            continue
        kinds = [each["kind"] for each in check_manifest(text)]
        assert "LeaderWorkerSet" in kinds
        assert kinds[-1] == "Service"


def pods_of(document):
    template = document["spec"]["leaderWorkerTemplate"]
    return [template[name] for name in ("leaderTemplate", "workerTemplate") if name in template]


def expanded(word):
    """As Kubernetes expands a word of a command, with LWS's variables left as they are."""
    return word.replace("$$", "\0").replace("$(", "<").replace("\0", "$")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_pods_run_what_the_parsers_take(engine, shape):
    model = EVIL[1]
    documents = yaml.safe_load_all(scripts(engine, shape, model)[f"{engine}.kubernetes.yaml"])
    sets = [each for each in documents if each["kind"] == "LeaderWorkerSet"]
    for each in sets:
        size = each["spec"]["leaderWorkerTemplate"]["size"]
        pods = pods_of(each)
        assert len(pods) == min(2, size)
        for place, pod in enumerate(pods):
            (container,) = pod["spec"]["containers"]
            words = [expanded(word) for word in container["command"]]
            assert model in words
            numbered = ["1" if word == "<LWS_WORKER_INDEX)" else word for word in words]
            package, rest = split(numbered)
            taken = vars(PARSERS[package].parse_args(rest))
            assert (taken["nnodes"] or 1) == size
            world = int(container["resources"]["limits"]["nvidia.com/gpu"]) * size
            if engine == "sglang":
                assert taken["tp_size"] == world
            if size > 1:
                address = taken["master_addr" if engine == "vllm" else "dist_init_addr"]
                assert address.startswith("<LWS_LEADER_ADDRESS)")
                assert "<LWS_WORKER_INDEX)" in words
            if engine == "vllm":
                assert bool(taken["headless"]) == (place > 0)
            assert ("startupProbe" in container) == (place == 0)


def split(words):
    return words_of(shlex.join(words))


def test_a_service_reaches_what_serves():
    def service(shape):
        documents = list(yaml.safe_load_all(scripts("vllm", shape)["vllm.kubernetes.yaml"]))
        return documents[-1], documents

    alone, _ = service("two hosts")
    assert alone["spec"]["selector"] == {
        "leaderworkerset.sigs.k8s.io/name": "vllm",
        "leaderworkerset.sigs.k8s.io/worker-index": "0",
    }
    router, documents = service("pools")
    (deployment,) = (each for each in documents if each["kind"] == "Deployment")
    template = deployment["spec"]["template"]
    assert template["metadata"]["labels"] == router["spec"]["selector"]
    words = template["spec"]["containers"][0]["command"]
    taken = vars(PARSERS["vllm-router"].parse_args(words[words.index("vllm-router") + 1 :]))
    assert [url for url, *_ in taken["prefill"]] == [
        f"http://vllm-prefill-{number}.vllm-prefill:8000" for number in range(2)
    ]
    names = {each["metadata"]["name"]: each for each in documents}
    assert names["vllm-prefill"]["spec"]["replicas"] == 2


# In place of Slurm: tasks run here, on the addresses of the loopback network that stand for hosts.
SRUN = """\
#!/usr/bin/env bash
while [[ "$1" == --* ]]; do
    case "$1" in
    --chdir=*) cd "${1#*=}" || exit 1 ;;
    --output=*) exec >"${1#*=}" 2>&1 ;;
    --nodelist=*) export STUB_HOST="${1#*=}" ;;
    --ntasks=*) export STUB_TASKS="${1#*=}" ;;
    esac
    shift
done
exec "$@"
"""
SERVER = """\
#!{python}
import http.server, json, os, sys, time
from pathlib import Path

host, seen = os.environ["STUB_HOST"].split(",")[0], Path(os.environ["STUB_SEEN"])
tasks, program = int(os.environ["STUB_TASKS"]), Path(sys.argv[0]).name
kept = dict(argv=[program, *sys.argv[1:]], host=os.environ["STUB_HOST"], tasks=tasks)
kept["pid"] = os.getpid()
kept["devices"] = os.environ.get("CUDA_VISIBLE_DEVICES")
kept["here"] = sorted(os.listdir())
unfinished = seen / f"{{os.getpid()}}.unfinished"
unfinished.write_text(json.dumps(kept))
unfinished.replace(unfinished.with_suffix(".json"))
if os.environ.get("STUB_DIES") == program:
    sys.exit("it died")
words = sys.argv[1:]
if "--headless" in words or "--port" not in words:
    time.sleep(1000)
time.sleep(0.3)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        status = 200 if os.environ.get("STUB_DIES") != "never ready" else 503
        self.send_response(status)
        self.end_headers()

    def log_message(self, *args):
        pass

port = int(words[words.index("--port") + 1])
http.server.HTTPServer((host, port), Handler).serve_forever()
"""


class Cluster:
    """A folder of stand-ins, and the addresses of hosts."""

    def __init__(self, folder):
        self.folder, self.bin, self.seen = folder, folder / "bin", folder / "seen"
        self.bin.mkdir()
        self.seen.mkdir()
        third = os.getpid() % 250 + 1
        self.hosts = [f"127.{third}.7.{number}" for number in range(1, 5)]
        hosts = "\n".join(f"echo {host}" for host in self.hosts)
        self.write("scontrol", f"#!/usr/bin/env bash\n{hosts}\n")
        self.write("srun", SRUN)
        for name in ("vllm", "vllm-router", "trtllm-llmapi-launch", "trtllm-serve"):
            self.write(name, SERVER.format(python=sys.executable))

    def write(self, name, text):
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)

    def start(self, text, **around):
        script = self.folder / "script.sh"
        script.write_text(text)
        variables = {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "SLURM_JOB_NODELIST": "any",
            "SLURM_JOB_ID": "7",
            "SLURM_CPUS_ON_NODE": "8",
            "STUB_SEEN": str(self.seen),
            "POLL_S": "0.1",
            **around,
        }
        return subprocess.Popen(
            ["bash", script],
            cwd=self.folder,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def tasks(self):
        """What each task was started with."""
        found = [json.loads(each.read_text()) for each in self.seen.glob("*.json")]
        return sorted(found, key=lambda each: (each["host"], each["argv"]))

    def left(self):
        """Processes of tasks that still run."""
        return [each["pid"] for each in self.tasks() if is_alive(each["pid"])]


def is_alive(pid):
    with suppress(OSError):
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.fixture
def cluster(tmp_path):
    if shutil.which("curl") is None or not sys.platform.startswith("linux"):
        pytest.skip("it needs curl, and the loopback network of Linux")
    found = Cluster(tmp_path)
    yield found
    for pid in found.left():
        os.kill(pid, signal.SIGKILL)


def with_free_ports(text):
    """The script on ports that nothing has; each host has an address of its own."""
    with socket.socket() as first, socket.socket() as router:
        first.bind(("", 0))
        router.bind(("", 0))
        ports = {"8080": router.getsockname()[1], "8000": first.getsockname()[1]}
    ports["8001"] = ports["8000"] + 1
    return re.sub(r"\b80[08][01]\b", lambda found: str(ports[found[0]]), text)


def first_line(process):
    line = process.stdout.readline()
    assert line, process.communicate(timeout=PATIENCE_S)
    return line


@pytest.mark.parametrize("model", EVIL[1:], ids=["quotes", "lines"])
def test_a_script_starts_waits_and_cleans_up(model, cluster):
    text = with_free_ports(scripts("vllm", "pools", model)["vllm.slurm.sh"])
    process = cluster.start(text)
    said = first_line(process)
    assert said.startswith(f"serving at http://{cluster.hosts[0]}:")
    # Two prefill, two nodes of decode, a router; nobody waits for decode's second node.
    assert wait_until(lambda: len(cluster.tasks()) == 5)
    tasks = cluster.tasks()
    assert len(cluster.left()) == 5
    servers = [each for each in tasks if each["argv"][0] == "vllm"]
    assert all(each["argv"][:3] == ["vllm", "serve", model] for each in servers)
    assert [each["host"] for each in servers] == [cluster.hosts[n] for n in (0, 0, 1, 2)]
    assert [each["devices"] for each in servers] == ["0,1,2,3", "4,5,6,7", None, None]
    argv = [each["argv"] for each in servers]
    numbers = [each[each.index("--node-rank") + 1] for each in argv[2:]]
    assert numbers == ["0", "1"]
    assert {each[each.index("--master-addr") + 1] for each in argv[2:]} == {cluster.hosts[1]}
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 143
    assert cluster.left() == []
    assert not list(cluster.folder.rglob("touched"))
    assert {each.name for each in (cluster.folder / "expertlane-vllm-7").glob("*.log")} == {
        *("prefill-0.log", "prefill-1.log", "router.log"),
        *("decode-0-node0.log", "decode-0-node1.log"),
    }


def test_ranks_of_mpi_are_tasks_and_find_their_files(cluster):
    text = with_free_ports(scripts("trtllm", "two hosts")["trtllm.slurm.sh"])
    process = cluster.start(text)
    first_line(process)
    (task,) = cluster.tasks()
    assert task["argv"][:3] == ["trtllm-llmapi-launch", "trtllm-serve", "org/model"]
    assert (task["tasks"], task["host"]) == (16, ",".join(cluster.hosts[:2]))
    assert task["here"] == ["trtllm.yaml"]
    os.kill(task["pid"], signal.SIGTERM)  # whatever ends ends all
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert "a process ended" in err


@pytest.mark.parametrize(
    ("around", "code", "words"),
    [
        ({"STUB_DIES": "vllm"}, 1, "a process ended before"),
        ({"STUB_DIES": "never ready", "START_S": "1"}, 1, "is not ready after 1 s"),
    ],
)
def test_what_does_not_start_ends_all(around, code, words, cluster):
    text = with_free_ports(scripts("vllm", "servers on hosts")["vllm.slurm.sh"])
    process = cluster.start(text, **around)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, out) == (code, "")
    assert words in err
    assert cluster.left() == []


def test_too_few_nodes_are_refused(cluster):
    cluster.write("scontrol", "#!/usr/bin/env bash\necho one\n")
    process = cluster.start(scripts("vllm", "two hosts")["vllm.slurm.sh"])
    assert process.communicate(timeout=PATIENCE_S)[1] == "it takes 2 nodes; the job has 1\n"
    assert process.returncode == 2
    assert cluster.tasks() == []


def test_a_plan_writes_them_and_says_where(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = "plan paper-tiny --cluster h100x2 --batch 4 --prompt-len 16 --output-len 8"
    result = CliRunner().invoke(app, [*command.split(), "--scripts", "mine"])
    assert result.exit_code == 0, result.output
    assert "Scripts for Slurm and Kubernetes: mine" in result.output
    names = {each.name for each in Path("mine").iterdir()}
    assert {f"{engine}.slurm.sh" for engine in ENGINES} <= names
    assert {f"{engine}.kubernetes.yaml" for engine in ENGINES} <= names
    Path("file").touch()
    refused = CliRunner().invoke(app, [*command.split(), "--scripts", "file"])
    assert refused.exit_code == 2 or "not a folder" in str(refused.exception)
