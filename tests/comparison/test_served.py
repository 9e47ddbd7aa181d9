"""Deployments on servers of another engine: a stub, found by its entry point, which misbehaves."""

import json
import os
import socket
import subprocess
import sys
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

from client import vllm_server
from comparison import stub_engine
from comparison.test_server_process import wait_gone
from engine.ranks.processes import wait_until
from expertlane.cli.compare_servers import ServerOptions, compare_servers
from expertlane.client.run import one_round
from expertlane.comparison.engines.engine import find_engine, known_engines
from expertlane.comparison.served import free_port
from expertlane.comparison.turns import Repeats
from expertlane.errors import ExpertlaneError, UserError
from expertlane.report.sections import report_of
from expertlane.report.shown import answer_text
from expertlane.results import file
from expertlane.results.hardware import own_cores
from expertlane.spec.deployment import Deployment
from expertlane.spec.experiment import Experiment
from expertlane.spec.from_hf import read_model
from expertlane.spec.layout import Layout
from expertlane.spec.workload import Workload

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

CONFIG = {
    "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "hidden_size": 64,
    "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 128,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "dtype": "bfloat16",
}  # fmt: skip
WORKLOAD = Workload(num_sequences=3, prompt_len=4, output_len=5)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("expertlane.comparison.server_process._GRACE_S", 0.3)


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """The stub, installed as another package's."""
    info = tmp_path / "site" / "stub-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stub\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        f"[expertlane.engines]\nstub = {stub_engine.__name__}:Stub\n"
        f"other = {stub_engine.__name__}:Other\n"
    )
    monkeypatch.syspath_prepend(str(info.parent))
    return "stub"


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def compare(checkpoint, names, tmp_path, repeats=1, *, are_layouts=False, **options):
    experiment = Experiment(
        "own",
        read_model(checkpoint, str(checkpoint), weights=False),
        WORKLOAD,
        tuple(Deployment(name, Layout.parse(name) if are_layouts else Layout()) for name in names),
        checkpoint=str(checkpoint),
    )
    options = {"engine": ["stub"], "request_timeout_s": 5.0} | options
    if options["engine"]:
        options.setdefault("start_timeout_s", 20.0)
    return compare_servers(
        experiment,
        ServerOptions(**(DEFAULTS | options)),
        Repeats(repeats),
        None,
        tmp_path / "out",
        "expertlane compare",
    )


DEFAULTS = {
    "engine": None, "url": None, "engine_python": None, "engine_args": None, "tokenizer": None,
    "start_timeout_s": 1200.0, "request_timeout_s": None, "dry_run": False,
    "scripts": None, "api_key_file": None, "flush_caches": False,
    "kv_tokens": None, "served_model": None,
}  # fmt: skip


def test_every_failure_is_a_row_and_the_rest_completes(stub, checkpoint, tmp_path):
    names = [
        "fast", "slow", "starts slowly", "dies in start-up", "never ready", "hangs", "error 500",
        "garbage", "ignores SIGTERM", "leaves grandchildren", "refused",
    ]  # fmt: skip
    found = compare(checkpoint, names, tmp_path, start_timeout_s=5.0, request_timeout_s=3.0)
    records = {each.name: each for each in found.deployments}
    assert [*records] == names
    failures = {name: each.server.failure for name, each in records.items() if each.server.failure}
    for name, words in {
        "dies in start-up": "exited during startup, exit code 1: ValueError: 3 heads on 2 ranks",
        "never ready": "not ready within 5 s; its last line: loading as never ready",
        "hangs": "did not answer within 3 s",
        "error 500": "HTTP 500, worker is lost; its log: RuntimeError: CUDA error: an illegal",
        "garbage": "no tokens",
        "refused": "Stub has no such layout (stub.py: Layout)",
    }.items():
        assert words in failures.pop(name), f"{name}: {records[name].server.failure}"
        assert not records[name].serving
    assert not failures
    for name in ("fast", "slow", "starts slowly", "ignores SIGTERM", "leaves grandchildren"):
        (serving,) = records[name].serving
        assert serving.num_requests == 3
        assert serving.num_output_tokens == 15
        assert serving.client.num_failed == 0
        assert records[name].server.software == "stub 1.2"
    assert min(records["starts slowly"].server.start_s) > 0.5
    left = [int(each.read_text()) for each in (tmp_path / "out").rglob("pid")]
    left += [int(each.read_text()) for each in (tmp_path / "out").rglob("grandchild")]
    assert len(left) == 9
    assert not wait_gone(left)


def test_results_are_written_read_and_shown(stub, checkpoint, tmp_path):
    found = compare(checkpoint, ["slow", "fast", "dies in start-up"], tmp_path, repeats=5)
    folder = tmp_path / "out"
    file.write(found, folder)
    assert file.read(folder) == found
    ratio = next(each for each in found.ratios if each.metric == "output tokens/s")
    assert {ratio.name, ratio.other} == {"fast", "slow"}
    assert ratio.num_rounds == 5
    assert ratio.ratio.low is not None
    text = answer_text(report_of(found).answer)
    assert f"{ratio.name} gives" in text
    assert "3 heads on 2 ranks" in " ".join(text.split())
    lines = text.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80


def test_a_server_that_dies_later_keeps_its_rounds(stub, checkpoint, tmp_path):
    folder = tmp_path / "out" / "servers" / "dies-later"
    folder.mkdir(parents=True)
    found = compare(checkpoint, ["dies later", "fast"], tmp_path, repeats=1)
    assert not found.deployments[0].server.failure
    (folder / "rounds").write_text("")
    found = compare(checkpoint, ["dies later", "fast"], tmp_path, repeats=1)
    assert "CUDAError: device lost" in found.deployments[0].server.failure


def test_two_engines_are_compared_by_the_fastest_of_each(stub, checkpoint, tmp_path):
    found = compare(checkpoint, ["slow", "fast", "refused"], tmp_path, engine=["stub", "other"])
    best = {}
    for each in found.deployments:
        if each.serving:
            engine, tps = each.server.engine, each.serving[0].output_tps.value
            best[engine] = max(best.get(engine, (0.0, "")), (tps, each.name))
    assert [*best] == ["Stub", "Other"]
    (_, second), (_, first) = sorted(best.values())
    assert {(each.name, each.other) for each in found.ratios} == {(first, second)}


def test_two_servers_of_one_name(stub, checkpoint, tmp_path):
    with pytest.raises(UserError, match="would be called 'Stub a'"):
        compare(checkpoint, ["a"], tmp_path, url=["a=127.0.0.1:9", "Stub a=127.0.0.1:10"])


def test_none_could_be_measured(stub, checkpoint, tmp_path):
    with pytest.raises(ExpertlaneError, match="no deployment could be measured: refused: Stub"):
        compare(checkpoint, ["refused"], tmp_path)


def test_engines_are_found_by_entry_points(stub):
    own = ["vllm", "sglang", "trtllm", "expertlane"]
    assert [*known_engines()] == [*own, "stub", "other"]
    assert find_engine("stub").title == "Stub"
    with pytest.raises(UserError, match="--engine is 'vlm'; known: vllm"):
        find_engine("vlm")


@contextmanager
def stubs(kinds, folder):
    """Servers that run already; gives their ports."""
    ports = [free_port() for _ in kinds]
    servers = [
        subprocess.Popen([sys.executable, stub_engine.__file__, str(port), kind], cwd=folder)
        for port, kind in zip(ports, kinds, strict=True)
    ]
    try:
        for port in ports:
            wait_until(partial(_listens, port))
        yield ports
    finally:
        for each in servers:
            each.kill()
            each.wait()


@pytest.fixture
def urls(tmp_path):
    """Two servers that run already: tp=1 and b, which is slow."""
    with stubs(("fast", "slow"), tmp_path) as ports:
        yield [f"{name}=127.0.0.1:{port}" for name, port in zip(("tp=1", "b"), ports, strict=True)]


def _listens(port):
    with suppress(OSError):
        socket.create_connection(("127.0.0.1", port)).close()
        return True
    return False


def test_running_servers_by_url(checkpoint, tmp_path, urls):
    found = compare(checkpoint, ["tp=1"], tmp_path, repeats=2, engine=None, url=urls)
    one, other = found.deployments
    assert (one.name, one.layout, one.server.deployment) == ("tp=1", Layout(), "tp=1")
    assert (other.name, other.layout, other.server.deployment) == ("b", None, "")
    assert found.machine is None
    assert {each.num_rounds for each in found.ratios} == {2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": ["=http://a:1"]}, "it must be like tp8="),
        ({"url": ["a=http://x:1", "a=http://y:1"]}, "--url a is given twice"),
        ({"engine": ["stub", "stub"]}, "--engine stub is given twice"),
        ({"engine_python": ["/no/python"]}, "there is no such file"),
        ({"engine_args": ["vllm=--x"]}, "no --engine vllm is given"),
        ({"engine_args": ['--x "y']}, "--engine-args --x .y: a quotation mark is not closed"),
    ],
)
def test_wrong_options(stub, checkpoint, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        compare(checkpoint, ["fast"], tmp_path, **options)
    assert not (tmp_path / "out").exists()


def test_a_model_without_weights(stub, checkpoint, tmp_path):
    experiment = Experiment(
        "own",
        read_model(checkpoint, str(checkpoint), weights=False),
        WORKLOAD,
        (Deployment("a", Layout()),),
    )
    options = ServerOptions(**(DEFAULTS | {"engine": ["stub"]}))
    with pytest.raises(UserError, match="give its folder with --model"):
        compare_servers(experiment, options, Repeats(1), None, None, "")


LAYOUTS = {"tp=1": "tp=1", "tp=2": "tp=2", "pp=2": "pp=2", "dp=2": "dp=2", "ep=2": "dp=2,ep=2"}
# Neither does vLLM's build for CPUs (0.32): its communicator gathers no experts' tokens from
# data-parallel ranks, and it makes no buffers of a pipeline's later stages unless it compiles.
NOT_BY_VLLM = {
    "vLLM dp=2": "NotImplementedError in all_gatherv",
    "vLLM ep=2": "NotImplementedError in all_gatherv",
    "vLLM pp=2": "AssertionError in sync_and_gather_intermediate_tensors",
}


def processes_in(folder):
    """Whose working folder lies there."""
    found = []
    for each in Path("/proc").glob("[0-9]*/cwd"):
        with suppress(OSError):
            if Path(os.readlink(each)).is_relative_to(folder):
                found.append((each.parent / "cmdline").read_text())
    return found


@pytest.mark.full
@pytest.mark.timeout(1500)
def test_vllm_beside_our_own(tmp_path):
    python, folder = vllm_server.python(), tmp_path / "tiny"
    vllm_server.checkpoint(folder)
    experiment, out = tmp_path / "mine.toml", tmp_path / "out"
    lines = ['name = "mine"', "[model]", f'checkpoint = "{folder}"', "[workload]"]
    lines += ["num_sequences = 4", "prompt_len = 16", "output_len = 8"]
    for name, layout in LAYOUTS.items():
        lines += ["[[deployments]]", f'name = "{name}"', f'layout = "{layout}"']
        if name == "tp=1":
            lines.append("baseline = true")
        if name == "pp=2":  # vLLM has as many batches in flight as it has stages
            lines += ["num_micro_batches = 2", 'micro_batch_schedule = "rotating"']
        if name == "ep=2":
            lines.append('dispatch = "all_gather"')
    experiment.write_text("\n".join(lines))
    command = [sys.executable, "-m", "expertlane", "compare", str(experiment), "--out", str(out)]
    command += ["--engine", "vllm", "--engine", "expertlane", "--repeat", "1"]
    command += ["--engine-python", f"vllm={python}", "--engine-args", "vllm=--enforce-eager"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not processes_in(out)

    assert [each.name for each in tmp_path.rglob("results.json")] == ["results.json"]
    found = file.read(out)
    records = {each.name: each for each in found.deployments}
    assert [*records] == [
        f"{engine} {each}" for engine in ("vLLM", "expertlane") for each in LAYOUTS
    ]
    for name, each in records.items():
        failure = each.server.failure
        if name in NOT_BY_VLLM:
            assert NOT_BY_VLLM[name] in failure
            assert not each.serving
            assert "\n" not in failure
            continue
        assert not failure, f"{name}: {failure}"
        (serving,) = each.serving
        assert each.source == "measured"
        assert (serving.num_requests, serving.num_output_tokens) == (4, 32)
        assert each.server.software
        assert each.server.command
    first = " ".join(done.stdout.split("\n\n")[0].split())
    (ratio,) = [each for each in found.ratios if each.metric == "output tokens/s"][:1]
    assert f"{ratio.name} gives" in first
    failed = " ".join(done.stdout.split())
    assert all(f"{name}: http" in failed for name in NOT_BY_VLLM)
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    report = (out / "report.html").read_text()
    assert all(name in report for name in records)


# Cores


@pytest.fixture
def cores_of_client(monkeypatch):
    """The cores of each round's client."""
    found = []

    async def watched(*given):
        found.append(os.sched_getaffinity(0))
        return await one_round(*given)

    monkeypatch.setattr("expertlane.comparison.served.one_round", watched)
    return found


@pytest.mark.skipif(len(own_cores()) < 2, reason="needs two cores")
def test_the_client_is_kept_off_the_servers_cores(
    stub, checkpoint, tmp_path, cores_of_client, monkeypatch
):
    first, second, *_ = before = own_cores()
    parted = (first,), (second,)
    monkeypatch.setattr("expertlane.results.hardware.parted_cores", lambda sizes: parted)
    found = compare(checkpoint, ["fast", "slow"], tmp_path, repeats=2)
    cores = [json.loads(each.read_text()) for each in (tmp_path / "out").rglob("cores")]
    assert cores == [[first], [first]]
    assert cores_of_client == [{second}] * 4
    assert own_cores() == before
    assert not any("The client shares" in each for each in found.cautions)


def test_too_few_cores_are_a_caution(stub, checkpoint, tmp_path, cores_of_client, monkeypatch):
    both = own_cores()
    monkeypatch.setattr("expertlane.results.hardware.parted_cores", lambda sizes: (tuple(both), ()))
    found = compare(checkpoint, ["fast"], tmp_path)
    assert cores_of_client == [set(both)]
    shared = f"The client shares the {len(both)} cores with the servers, too few to have its own"
    assert any(each.startswith(shared) for each in found.cautions)


def test_a_budget_that_an_engine_does_not_take(stub, checkpoint, tmp_path):
    found = compare(checkpoint, ["fast"], tmp_path, kv_tokens=512)
    words = "--kv-tokens is not set on fast: no option of it is known."
    assert words in found.cautions


def test_settings_that_sglang_gives(checkpoint, tmp_path):
    with stubs(("sglang", "fast"), tmp_path) as ports:
        urls = [f"{name}=127.0.0.1:{port}" for name, port in zip("ab", ports, strict=True)]
        found = compare(checkpoint, ["tp=1"], tmp_path, engine=None, url=urls)
    one, other = found.deployments
    assert one.server.settings["max_total_tokens"] == "512"
    assert not other.server.settings
    assert "sk-secret" not in repr(found)
