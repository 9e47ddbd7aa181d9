"""Compiles the C++ files where they are first needed; the library stays in the user's cache."""

import ctypes
import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

_SOURCES = sorted(Path(__file__).parent.glob("*.cpp"))
_HEADERS = sorted(Path(__file__).parent.glob("*.h"))
# Fast math when compiling only: linking with it would make the whole process flush denormals.
_COMPILE = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-ffast-math")
_LINK = ("-shared", "-fopenmp")
_NEEDED_FLAGS = {"avx512_bf16", "avx512bw", "avx512vl"}
_TIMEOUT_S = 120.0


def build() -> ctypes.CDLL | None:
    """The compiled library; None where the CPU or a compiler for it is missing.

    Ranks that start together wait for the one that compiles.
    """
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if found is None or not has_instructions():
        return None
    compiler = shlex.split(found)  # it may come with options, or behind a cache
    try:
        library = _library(compiler)
        return ctypes.CDLL(str(library))
    except (OSError, RuntimeError, subprocess.SubprocessError):  # no home, no room, no success
        return None


def has_instructions() -> bool:
    """Whether the CPU multiplies bfloat16 in 512-bit vectors."""
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    flags = next((line for line in info.splitlines() if line.startswith("flags")), "")
    return _NEEDED_FLAGS.issubset(flags.split())


def _library(compiler: list[str]) -> Path:
    version = subprocess.run(
        [*compiler, "--version"], capture_output=True, check=True, timeout=_TIMEOUT_S
    ).stdout
    info = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    model = [line for line in info.splitlines() if line.startswith(("model name", "flags"))]
    texts = (*compiler, *_COMPILE, *_LINK, *model)
    contents = (path.read_bytes() for path in (*_SOURCES, *_HEADERS))
    key = (*contents, version, *map(str.encode, texts))
    name = hashlib.blake2b(b"\0".join(key), digest_size=12).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "expertlane"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"cpu-{platform.machine()}-{name}.so"
    with (folder / "build.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _compile(compiler, library)
    return library


def _compile(compiler: list[str], library: Path) -> None:
    made = library.with_suffix(".new")

    def run(*arguments: str) -> None:
        subprocess.run(
            [*compiler, *arguments], capture_output=True, check=True, timeout=_TIMEOUT_S, cwd=folder
        )

    with tempfile.TemporaryDirectory() as folder:
        run(*_COMPILE, "-c", *map(str, _SOURCES))  # objects go where it runs
        run(*_LINK, *(f"{source.stem}.o" for source in _SOURCES), "-o", str(made))
    made.replace(library)
