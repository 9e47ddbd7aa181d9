"""Ranks that do not compute alike are refused; what a start waits for."""

import errno
import gc
import json
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from cli.screen import refused, refusing, tells
from cli.stub_llm import MACHINE
from expertlane.engine.launch import LoadPlan, describe_ranks, start_pool
from expertlane.engine.ranks import pool as pool_module
from expertlane.engine.ranks.fork_server import _Server
from expertlane.engine.ranks.local_ranks import LocalRanks, connections_for
from expertlane.engine.ranks.messages import Channel, Decoder, Failure, FailureKind
from expertlane.engine.ranks.rank_settings import (
    RankSettings,
    RunFiles,
    ServerSettings,
    check_cpu_isa,
)
from expertlane.engine.stage.context import Cores
from expertlane.errors import CapacityError
from expertlane.schedule.request import Limits
from expertlane.spec.deployment import Options
from expertlane.spec.engine_config import EngineConfig
from expertlane.spec.layout import Layout
from expertlane.spec.model import PRESETS

TINY = PRESETS["paper-tiny"]
LIMITS = Limits(TINY.vocab_size, 64, 64, 16)


def plan(layout="tp=1", model=TINY, checkpoint=None, **options):
    return LoadPlan(model, Layout.parse(layout), Options(**options), [], checkpoint)


def pool_of(*kernels, transports=()):
    machines = [
        SimpleNamespace(host=f"node{i}", kernels=each, backend="gloo")
        for i, each in enumerate(kernels)
    ]
    for machine, transport in zip(machines, transports, strict=False):
        machine.backend = transport
    return SimpleNamespace(call=lambda command: machines)


def test_ranks_that_compute_alike():
    pool = pool_of("torch", "torch (there is no compiler)")
    assert [each.host for each in describe_ranks(pool)] == ["node0", "node1"]


def test_nodes_with_other_kernels_are_refused():
    """Weights of experts that move would be taken for others: silently wrong numbers."""
    with refusing("rank 0 node0 expertlane 2 node2 torch CPU avx512_bf16 EXPERTLANE_BACKEND=torch"):
        describe_ranks(pool_of("expertlane", "expertlane", "torch (this CPU lacks avx512_bf16)"))


def test_ranks_with_other_transports_are_refused():
    """They would wait for each other in vain."""
    transports = "shared_memory", "gloo"
    with refusing("rank 0 1 shared_memory EXPERTLANE_TRANSPORT=gloo"):
        describe_ranks(pool_of("torch", "torch", transports=transports))


@pytest.mark.full
def test_a_start_that_waits_for_a_compiler_is_no_hang(monkeypatch, tmp_path):
    """It takes longer than a start may without progress, then fails: torch computes."""
    compiler = tmp_path / "cxx"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\nsleep 20\nexit 1\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("EXPERTLANE_CPU_ISA", "")
    monkeypatch.setattr(pool_module, "_START_TIMEOUT_S", 12.0)  # imports take some seconds
    began_s = time.monotonic()
    with start_pool(EngineConfig(timeout_s=12.0), 2) as pool:
        assert time.monotonic() - began_s > 20
        for machine in describe_ranks(pool):
            assert tells(machine.kernels, "failed exit code 1")


CPU_RANK = {"on_gpu": False, "kernels": "expertlane (avx2)", "backend": "gloo"}
GPU_RANK = {"on_gpu": True, "kernels": "torch and expertlane (triton 3.9.0)", "backend": "nccl"}


def test_kernels_are_not_chosen_where_torch_replaces_them(monkeypatch):
    monkeypatch.setenv("EXPERTLANE_BACKEND", "torch")
    with refusing("--cpu-isa EXPERTLANE_CPU_ISA amx EXPERTLANE_BACKEND=torch"):
        start_pool(EngineConfig(cpu_isa="amx"))
    check_cpu_isa(None)
    monkeypatch.setenv("EXPERTLANE_BACKEND", "cpu")
    check_cpu_isa("amx")


@pytest.mark.parametrize(
    ("rank", "reason"),
    [
        (CPU_RANK, "GPU rank"),
        (
            GPU_RANK | {"kernels": "torch (Triton is not installed)"},
            "GPU torch Triton",
        ),
    ],
)
def test_graphs_that_cannot_be_are_refused_if_asked_for(rank, reason):
    machines = [SimpleNamespace(**GPU_RANK), SimpleNamespace(**rank)]
    with refusing(f"--cuda-graphs cuda_graphs=True {reason} auto off None False"):
        plan(cuda_graphs=True).check_options(machines)
    plan().check_options(machines)
    plan(cuda_graphs=False).check_options(machines)
    plan(cuda_graphs=True).check_options([SimpleNamespace(**GPU_RANK)] * 2)


def test_a_float8_cache_that_a_gpu_cannot_read_is_refused():
    older = replace(MACHINE, device="NVIDIA A100", reads_float8=False)
    with refusing("float8 KV --kv-dtype kv_dtype 8.9 NVIDIA A100 model"):
        plan("dp=2,ep=2", kv_dtype="float8").fit(LIMITS, [MACHINE, older])
    plan().check_options([MACHINE, older])
    plan(kv_dtype="float8").check_options([MACHINE])


def stored_in_float8(folder):
    method = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps({"quantization_config": method}))
    return folder


def test_float8_activations_that_cannot_be_are_refused(tmp_path):
    stored = stored_in_float8(tmp_path)
    asked = "--activations activations='float8'"
    older = replace(MACHINE, device="NVIDIA A100", multiplies_float8=False)
    wide = TINY.with_overrides(moe_intermediate_size=384)
    for model, layout, machine, folder, why in (
        (TINY, "tp=1", MACHINE, None, "paper-tiny"),
        (
            *(TINY, "tp=1", older, stored),
            f"GPUs Triton 8.9 NVIDIA A100 {MACHINE.host}",
        ),
        (
            *(wide, "dp=2", MACHINE, stored),
            "128 dp=2 384",
        ),
    ):
        with refusing(f"{asked} {why}"):
            plan(layout, model, folder, activations="float8").check_options([machine])
    plan("dp=3", wide, stored, activations="float8").check_options([MACHINE])
    with refusing("float8 weights int8"):
        Options(activations="float8", weights="int8")


def raising(number):
    def raises(*arguments, **options):
        raise OSError(number, os.strerror(number))

    return raises


@pytest.fixture
def limits(monkeypatch):
    """Sets what the system says of all limits of this process."""

    def set_to(soft, hard=resource.RLIM_INFINITY):
        monkeypatch.setattr(resource, "getrlimit", lambda number: (soft, hard))

    return set_to


@pytest.mark.smoke(3)
@pytest.mark.parametrize(
    ("number", "soft", "hard", "words"),
    [
        (errno.EMFILE, 64, resource.RLIM_INFINITY, "few descriptors 64 ulimit -n 4096"),
        (errno.EMFILE, 64, 128, "few descriptors 64 ulimit -n 4096 hard 128 root"),
        (errno.EMFILE, 65536, 2**20, "few descriptors 65536 ulimit -n 262144"),
        (errno.ENFILE, 64, 64, "machine fs.file-max"),
        (errno.EAGAIN, 100, 1000, "few processes 100 ulimit -u 16384 hard 1000"),
        (errno.EAGAIN, resource.RLIM_INFINITY, resource.RLIM_INFINITY, "few processes container"),
        (errno.ENOSPC, 64, 64, "space device"),
    ],
)
def test_a_start_without_room_says_what_is_lacking(monkeypatch, limits, number, soft, hard, words):
    """The files that ranks share, their sockets, and the process that forks them."""
    limits(soft, hard)
    starts = [
        ((os, "memfd_create"), lambda: RunFiles(4, 4)),
        ((socket, "socketpair"), lambda: LocalRanks(4, 1.0, "float32")),
        ((subprocess, "Popen"), lambda: LocalRanks(4, 1.0, "float32")),
        ((socket, "socketpair"), lambda: connections_for([1, 2])),
    ]
    gc.collect()
    before = set(os.listdir("/proc/self/fd"))
    for (owner, name), start in starts:
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, raising(number))
            with pytest.raises(CapacityError) as refused:
                start()
        assert tells(str(refused.value), f"cannot start ranks {words}")
        del refused  # its traceback holds the board
    gc.collect()
    assert set(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize("is_launcher_gone", [False, True])
def test_a_server_that_cannot_fork_tells_the_launcher(monkeypatch, limits, is_launcher_gone):
    limits(100)
    ours, theirs = socket.socketpair()
    of_rank = socket.socketpair()
    files = RunFiles(1, 1)
    first = RankSettings.of_first(0, 1, files, None, 1.0, "float32")
    settings = ServerSettings(None, theirs.detach(), [of_rank[1].detach()], files.store_fd, first)
    monkeypatch.setattr(os, "fork", raising(errno.EAGAIN))
    monkeypatch.setattr(gc, "freeze", lambda: None)
    server = _Server(settings, {}, None)
    if is_launcher_gone:
        ours.close()
    assert not server.fork_all()
    if not is_launcher_gone:
        failure = Decoder(Failure).decode(Channel(ours).receive())
        assert failure.kind is FailureKind.USER
        assert tells(failure.text, f"{socket.gethostname()} cannot start ranks 100 ulimit -u 16384")
        ours.close()
    of_rank[0].close()
    files.leave_to_server(is_this_process=True)
    files.close()
    monkeypatch.setattr("signal.signal", lambda number, handler: None)
    server.end_all()


def test_a_rank_that_may_not_start_its_threads_says_so(monkeypatch, limits):
    """OpenMP would end it without a word of its own."""
    limits(100)
    share = SimpleNamespace(num_threads=4, num_cores=2, cpus=())
    monkeypatch.setattr("expertlane.engine.stage.context.share_of", lambda *given, **more: share)
    cores, start, started = Cores(0, 1), threading.Thread.start, []
    cores._num_threads = 4

    def starts_two(thread):
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", starts_two)
        with pytest.raises(CapacityError) as refused:
            cores.take(0, 1)
    assert tells(str(refused.value), "3 threads rank processes 100 ulimit -u 16384")
    assert not any(thread.is_alive() for thread in started)


@pytest.mark.full
@pytest.mark.parametrize("number", [8, 14])
def test_few_descriptors_are_one_line(tmp_path, number):
    generate = "generate paper-tiny --token-ids 1,2,3 --max-tokens 2 --layout dp=4,ep=4"
    command = f"ulimit -n {number}; exec {sys.executable} -m expertlane {generate}"
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    words = f"start ranks few descriptors {number} ulimit -n 4096"
    assert refused((done.returncode, done.stdout, done.stderr), words)
