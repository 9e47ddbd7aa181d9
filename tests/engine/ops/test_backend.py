"""Which kernels are used: two environment variables, the CPU, the compiler; and what is refused."""

import errno
import fcntl
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args
from unittest.mock import Mock

import pytest
import torch

import expertlane
from cli.screen import telling, tells
from expertlane.engine.ops import backend as module
from expertlane.engine.ops import build as build_module
from expertlane.engine.ops.backend import (
    backend_for,
    backend_of_cpu,
    choose_platform,
    compiled_messages,
)
from expertlane.engine.ops.build import (
    _ARM,
    _X86,
    BASELINE,
    ONLY_IF_ASKED_FOR,
    SETS,
    BuildError,
    InstructionSet,
    _CompilerFailed,
    _library,
    build,
    library_name,
)
from expertlane.engine.ops.cpu import CpuBackend
from expertlane.engine.ops.torch_backend import TorchBackend
from expertlane.errors import CapacityError, UserError
from expertlane.spec.names import CpuIsa

CPU = torch.device("cpu")
NO_COMPILER = "no C++ compiler: neither g++ nor clang++ is on the PATH, and CXX is unset"

needs_compiler = pytest.mark.skipif(
    not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")),
    reason="no C++ compiler",
)


@pytest.fixture(autouse=True)
def anew(monkeypatch):
    """Each test chooses for itself."""
    for variable in ("EXPERTLANE_BACKEND", "EXPERTLANE_CPU_ISA", "EXPERTLANE_TRANSPORT"):
        monkeypatch.delenv(variable, raising=False)
    backend_of_cpu.cache_clear()
    compiled_messages.cache_clear()
    yield
    backend_of_cpu.cache_clear()
    compiled_messages.cache_clear()


def failing_compiler(folder: Path, says: str) -> str:
    """One that knows its version and nothing else."""
    script = folder / "cxx"
    script.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "{says}" >&2\nexit 1\n')
    script.chmod(0o755)
    return str(script)


def test_torch_alone(monkeypatch):
    monkeypatch.setenv("EXPERTLANE_BACKEND", "torch")
    assert type(backend_for(CPU)) is TorchBackend
    platform = choose_platform(0, 1, "bfloat16", shares_memory=True)
    assert platform.kernels == "torch (EXPERTLANE_BACKEND=torch)"
    assert platform.transport == ("shared_memory" if compiled_messages()[0] else "gloo")


@needs_compiler
def test_no_set_but_the_baseline(monkeypatch):
    monkeypatch.setenv("EXPERTLANE_CPU_ISA", "baseline")
    assert type(backend_for(CPU)) is CpuBackend
    why = "baseline kernels bfloat16"
    assert tells(choose_platform(0, 1, "bfloat16").kernels, f"torch {why}")
    assert choose_platform(0, 1, "float32").kernels == "torch and expertlane (baseline)"
    monkeypatch.setenv("EXPERTLANE_BACKEND", "cpu")
    backend_of_cpu.cache_clear()
    choose_platform(0, 1, "float32")
    with pytest.raises(UserError, match=telling(f"EXPERTLANE_BACKEND=cpu kernels {why}")):
        choose_platform(0, 1, "bfloat16")


def cpu_with(names: set[str]):
    """The library of the baseline on another CPU."""

    class Other:
        def __init__(self, library):
            self._library = library

        def has_instructions(self, name: bytes) -> bool:
            return name.decode() in names

        def __getattr__(self, name):
            return getattr(self._library, name)

    return Other(build(BASELINE))


@needs_compiler
def test_a_cpu_without_the_instructions(monkeypatch):
    def build_there(instructions: InstructionSet):
        assert instructions is BASELINE, "no other is to be loaded"
        return cpu_with(set())

    monkeypatch.setattr(module, "build", build_there)
    why = "CPU avx2 neon bfloat16"
    assert type(backend_for(CPU)) is CpuBackend
    assert tells(choose_platform(0, 1, "bfloat16").kernels, f"torch {why}")
    monkeypatch.setenv("EXPERTLANE_BACKEND", "cpu")
    backend_of_cpu.cache_clear()
    with pytest.raises(UserError, match=telling(why)):
        choose_platform(0, 1, "bfloat16")


@needs_compiler
@pytest.mark.skipif(not SETS, reason="this architecture has no set but the baseline")
@pytest.mark.parametrize("limit", [None, *(each.name for each in SETS)])
@pytest.mark.parametrize("num_sets", range(1, len(SETS) + 1))
def test_the_best_of_the_allowed_sets_is_chosen(monkeypatch, num_sets, limit):
    names = [each.name for each in SETS]
    there = cpu_with(set(names[:num_sets]))
    others = build(SETS[0]) if build(BASELINE).has_instructions(names[0].encode()) else None
    if others is None:
        pytest.skip(f"this CPU lacks {names[0]}")
    built = []

    def build_there(instructions: InstructionSet):
        built.append(instructions.name)
        return there if instructions is BASELINE else others

    monkeypatch.setattr(module, "build", build_there)
    asked_only = {each.name for each in ONLY_IF_ASKED_FOR}
    if limit is None:
        allowed = [name for name in names if name not in asked_only]
    else:
        monkeypatch.setenv("EXPERTLANE_CPU_ISA", limit)
        allowed = names[: names.index(limit) + 1]
    if limit in names[num_sets:]:
        has = ", ".join(["baseline", *names[:num_sets]])
        with pytest.raises(UserError) as caught:
            choose_platform(0, 1, "bfloat16")
        asked = f"{limit}, which --cpu-isa or EXPERTLANE_CPU_ISA asks for"
        assert str(caught.value) == f"this CPU lacks {asked}; it has: {has}"
        return
    expected = [name for name in allowed if name in names[:num_sets]][-1]
    assert choose_platform(0, 1, "bfloat16").kernels == f"expertlane ({expected})"
    assert choose_platform(0, 1, "float32").kernels == f"torch and expertlane ({expected})"
    assert built == [BASELINE.name, expected]


@needs_compiler
def test_a_compiler_that_lacks_a_set(monkeypatch):
    """The next smaller one serves."""
    if not build(BASELINE).has_instructions(b"avx512"):
        pytest.skip("this CPU lacks avx512")

    def build_there(instructions: InstructionSet):
        if instructions.name not in (BASELINE.name, "avx2"):
            raise BuildError("unknown option")
        return build(instructions)

    monkeypatch.setattr(module, "build", build_there)
    assert choose_platform(0, 1, "bfloat16").kernels == "expertlane (avx2)"


def no_compiler(monkeypatch, folder):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(folder))
    return NO_COMPILER


def broken_compiler(monkeypatch, folder):
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    compiler = failing_compiler(folder, "In file included\nx.h:1: error: no room\nnote")
    monkeypatch.setenv("CXX", compiler)
    return f"compiling with {compiler} failed: x.h:1: error: no room"


def silent_compiler(monkeypatch, folder):
    monkeypatch.setenv("CXX", "/bin/false")
    return "compiling with /bin/false failed: exit code 1"


def absent_compiler(monkeypatch, folder):
    monkeypatch.setenv("CXX", "/no/such/compiler")
    return "compiling with /no/such/compiler failed: [Errno 2] No such file or directory: "


def odd_compiler(monkeypatch, folder):
    monkeypatch.setenv("CXX", "g++ '")
    return "compiling with g++ ' failed: No closing quotation"


def no_cache(monkeypatch, folder):
    (folder / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "file"))
    return "Not a directory; set XDG_CACHE_HOME"


@pytest.mark.parametrize(
    "without",
    [no_compiler, broken_compiler, silent_compiler, absent_compiler, odd_compiler, no_cache],
)
def test_no_library(monkeypatch, tmp_path, without):
    if without is no_cache and not shutil.which("g++"):
        pytest.skip("no g++")
    reason = without(monkeypatch, tmp_path)
    assert type(backend_for(CPU)) is TorchBackend
    assert reason in backend_of_cpu()[1]
    for dtype in ("float32", "bfloat16"):
        platform = choose_platform(0, 1, dtype, shares_memory=True)
        assert platform.kernels == f"torch ({backend_of_cpu()[1]})"
        assert platform.transport == "gloo"
    monkeypatch.setenv("EXPERTLANE_TRANSPORT", "shared_memory")
    with pytest.raises(UserError, match=re.escape(reason)):
        choose_platform(0, 1, "float32", shares_memory=True)
    monkeypatch.delenv("EXPERTLANE_TRANSPORT")
    monkeypatch.setenv("EXPERTLANE_BACKEND", "cpu")
    backend_of_cpu.cache_clear()
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(UserError, match=re.escape(reason)) as caught:
            choose_platform(0, 1, dtype)
        assert tells(str(caught.value), "EXPERTLANE_BACKEND=cpu kernels")


def test_another_device_needs_no_kernels(monkeypatch):
    monkeypatch.setenv("EXPERTLANE_BACKEND", "cpu")
    monkeypatch.setenv("CXX", "/bin/false")
    assert type(backend_for(torch.device("meta"))) is TorchBackend


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("EXPERTLANE_BACKEND", "x", "EXPERTLANE_BACKEND x cpu cuda torch"),
        (
            "EXPERTLANE_CPU_ISA",
            "sse9",
            " ".join(["EXPERTLANE_CPU_ISA sse9 baseline", *(each.name for each in SETS)]),
        ),
    ],
)
def test_what_is_not_valid(monkeypatch, variable, value, message):
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=telling(message)):
        choose_platform(0, 1, None)


def run(arguments: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "expertlane", *arguments],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.full), "bfloat16"])
def test_a_command_goes_on_without_a_compiler(tmp_path, dtype):
    """Its ranks exchange messages by gloo, and one line says so."""
    command = ["generate", "paper-tiny", "--layout", "dp=2,ep=2", "--dtype", dtype]
    ended = run([*command, "--token-ids", "1,2", "--max-tokens", "2"], PATH=str(tmp_path), CXX="")
    assert (ended.returncode, ended.stdout.count(",")) == (0, 1), ended.stderr
    (line,) = [each for each in ended.stderr.splitlines() if NO_COMPILER in each]
    assert tells(line, "torch gloo")


SMALL = InstructionSet("small", ("instructions.cpp",))  # compiled in a moment


@needs_compiler
def test_a_library_is_compiled_once(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build(SMALL)
    (library,) = (tmp_path / "expertlane").glob("*.so")
    made = library.stat().st_mtime_ns
    build(SMALL)
    assert library.stat().st_mtime_ns == made
    assert [path.suffix for path in library.parent.iterdir() if path != library] == [".lock"]


def counting_compiler(folder: Path, seconds: float = 0) -> tuple[str, Path]:
    """One that fails, and the file where it leaves a line each time that it compiles."""
    script, calls = folder / "cxx", folder / "calls"
    calls.touch()
    script.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && exit 0\necho >> {calls}\nsleep {seconds}\n'
        'echo "x.h:1: error: no room" >&2\nexit 1\n'
    )
    script.chmod(0o755)
    return str(script), calls


def test_what_failed_is_not_tried_again_at_once(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiler, calls = counting_compiler(tmp_path)
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(BuildError, match=telling("failed x.h:1 room")):
        build(BASELINE)
    num_calls = len(calls.read_text())
    assert num_calls
    with pytest.raises(BuildError, match=telling("room tried 10 minutes")):
        build(BASELINE)
    assert len(calls.read_text()) == num_calls
    other = InstructionSet("other", BASELINE.sources, ("-DOTHER",))  # of this nothing is known
    with pytest.raises(BuildError, match=r"no room$"):
        build(other)
    assert len(calls.read_text()) > num_calls
    (failed,) = (tmp_path / "expertlane").glob("*-baseline-*.failed")
    os.utime(failed, (1, 1))  # long ago
    with pytest.raises(BuildError, match=r"no room$"):
        build(BASELINE)


def test_a_full_disk_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiler, _ = counting_compiler(tmp_path)
    script = Path(compiler).read_text()
    Path(compiler).write_text(
        script.replace("exit 1", 'echo "ld: No space left on device" >&2; exit 1')
    )
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(BuildError, match=telling("failed space left device")):
        build(BASELINE)


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EMFILE, errno.ENFILE])
@pytest.mark.parametrize("fails", ["at once", "in a part of the compiler", "as a thread"])
def test_a_limit_is_no_failure_of_the_compiler(monkeypatch, tmp_path, number, fails):
    """Other ranks may have a library meanwhile; and nothing of it is remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiler, calls = counting_compiler(tmp_path)
    monkeypatch.setenv("CXX", compiler)
    script = Path(compiler).read_text().replace("no room", os.strerror(number))
    Path(compiler).write_text(script)
    if fails == "at once":
        refused = OSError(number, os.strerror(number))
        monkeypatch.setattr(build_module.subprocess, "run", Mock(side_effect=refused))
    elif fails == "as a thread":
        no_thread = RuntimeError("can't start new thread")
        monkeypatch.setattr(build_module, "ThreadPool", Mock(side_effect=no_thread))
    for _ in range(2):
        before = len(calls.read_text())
        with pytest.raises(CapacityError, match=telling("cannot compile kernels too")):
            build(BASELINE)
        assert fails != "in a part of the compiler" or len(calls.read_text()) > before
    assert [*tmp_path.glob("expertlane/*.failed")] == []


@needs_compiler
def test_a_compiler_that_is_mended_is_asked_again(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiler = shlex.split(os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++"))
    library = _library(compiler, SMALL)
    failed = library.with_suffix(".failed")
    library.unlink()
    failed.write_text("no room")
    with pytest.raises(_CompilerFailed, match=telling("room again")):
        _library(compiler, SMALL)
    os.utime(failed, (1, 1))
    assert _library(compiler, SMALL) == library
    assert not failed.exists()


def test_who_waits_for_a_compiler_says_so(monkeypatch, tmp_path):
    """Here, and where another process has the lock, for so long at most."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build_module, "_TOUCH_S", 0.05)
    compiler, _ = counting_compiler(tmp_path, seconds=0.5)
    monkeypatch.setenv("CXX", compiler)
    touched = []
    with pytest.raises(BuildError, match=r"no room$"):
        build(BASELINE, lambda: touched.append(1))
    assert len(touched) >= 2
    touched.clear()
    monkeypatch.setattr(build_module, "_LOCK_TIMEOUT_S", 0.5)
    with (tmp_path / "expertlane" / "build.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(BuildError, match=telling("another process 0")):
            build(BASELINE, lambda: touched.append(1))
    assert len(touched) >= 2


@needs_compiler
def test_every_file_is_compiled_for_some_set(monkeypatch, tmp_path):
    sources = Path(module.__file__).parent.glob("*.cpp")
    sets = (BASELINE, *SETS)
    if SETS:
        assert {name for each in sets for name in each.sources} == {path.name for path in sources}
    assert not any("native" in flag for each in sets for flag in each.flags)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(BuildError, match=r"failed: .*no-such-cpu"):
        build(InstructionSet("other", BASELINE.sources, ("-march=no-such-cpu",)))


@needs_compiler
def test_a_damaged_library_is_compiled_anew(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    library = _library(shlex.split(compiler), SMALL)
    size = library.stat().st_size
    library.write_bytes(b"damaged")
    assert build(SMALL).has_instructions
    assert library.stat().st_size == size


@needs_compiler
def test_the_option_reaches_the_ranks():
    arguments = ["generate", "paper-tiny", "--token-ids", "1,2", "--max-tokens", "2"]
    ended = run([*arguments, "--cpu-isa", "baseline"], EXPERTLANE_CPU_ISA="")
    assert ended.returncode == 0
    assert tells(ended.stderr, "torch expertlane baseline")


def test_the_option_names_the_sets_of_every_architecture():
    assert {*get_args(CpuIsa)} == {"baseline", *(each.name for each in (*_X86, *_ARM))}


@needs_compiler
def test_what_the_wheel_brought_is_taken_before_a_compiler_is(monkeypatch, tmp_path):
    built = Path(build(BASELINE)._name)
    monkeypatch.setattr(build_module, "SHIPPED", tmp_path)
    monkeypatch.setenv("CXX", "/bin/false")
    shipped = tmp_path / library_name(BASELINE)
    shutil.copy(built, shipped)
    assert build(BASELINE)._name == str(shipped)


@needs_compiler
def test_what_the_wheel_brought_for_another_system_is_compiled_here(monkeypatch, tmp_path):
    monkeypatch.setattr(build_module, "SHIPPED", tmp_path)
    (tmp_path / library_name(BASELINE)).write_bytes(b"of another system")
    assert Path(build(BASELINE)._name).parent != tmp_path
    monkeypatch.setenv("CXX", "/bin/false")
    with pytest.raises(BuildError, match="/bin/false failed"):
        build(BASELINE)


def test_the_variables_are_read_in_one_place():
    package = Path(expertlane.__file__).parent
    reads = re.compile(r"(environ\b|getenv).*EXPERTLANE_(BACKEND|CPU_ISA)")
    found = [path.name for path in package.rglob("*.py") if reads.search(path.read_text())]
    assert found == ["host.py"]
