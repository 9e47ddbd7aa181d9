"""Libraries of our C++: those that came in the wheel, else compiled where first needed.

Compiled ones stay in the user's cache. The types of all their functions stand in one table here.
"""

import ctypes
import errno
import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, TextIO

from expertlane.engine.ops.host import num_cores
from expertlane.errors import CapacityError, no_room
from expertlane.spec.files import user_cache

_FOLDER = Path(__file__).parent
_HEADERS = sorted(_FOLDER.glob("*.h"))
SHIPPED = _FOLDER / "libraries"  # in wheels that `make wheel` makes
_COMPILE = ("-O3", "-std=c++17", "-fPIC")
_TIMEOUT_S = 120.0
_LOCK_TIMEOUT_S = 3 * _TIMEOUT_S  # who has the lock compiles and links
_REMEMBERED_S = 600.0  # what keeps a compiler from it may be mended
_TOUCH_S, _LOOK_S = 1.0, 0.1


@dataclass(frozen=True)
class InstructionSet:
    """An instruction set of a CPU, and the source files that are compiled for it.

    Each set is a library of its own: of an inline function that two files share, a linker keeps
    one copy, and that could hold instructions that the CPU lacks.

    Attributes:
        flags: flags of the compiler.
        link_flags: flags of the linker. Fast math is not among them: the whole process would flush
            denormals.
    """

    name: str
    sources: tuple[str, ...]
    flags: tuple[str, ...] = ()
    link_flags: tuple[str, ...] = ()


BASELINE = InstructionSet(
    "baseline",
    ("dispatch.cpp", "instructions.cpp", "shared_memory.cpp", "sums.cpp"),
)


def _arithmetic(name: str, *flags: str) -> InstructionSet:
    names = "attention few_rows layers mlp moe_step narrow products rows sampling step sums"
    sources = tuple(f"{each}.cpp" for each in names.split())
    return InstructionSet(name, sources, (*flags, "-fopenmp", "-ffp-contract=fast"), ("-fopenmp",))


# Of CPUs with products of bfloat16, Cooper Lake alone cannot look bytes up (vbmi).
AVX512_BF16 = _arithmetic("avx512_bf16", "-march=x86-64-v4", "-mavx512bf16", "-mavx512vbmi")
AMX = _arithmetic("amx", *AVX512_BF16.flags[:3], "-mamx-tile", "-mamx-bf16")
_X86 = (
    _arithmetic("avx2", "-mavx2", "-mfma", "-mf16c"),
    _arithmetic("avx512", "-march=x86-64-v4"),
    AVX512_BF16,
    AMX,
)
_ARM = (_arithmetic("neon"), _arithmetic("neon_bf16", "-march=armv8.2-a+bf16"))


def arithmetic_sets(machine: str) -> tuple[InstructionSet, ...]:
    """Instruction sets of an architecture, smallest first: each includes those before it."""
    return {"x86_64": _X86, "AMD64": _X86, "aarch64": _ARM, "arm64": _ARM}.get(machine, ())


SETS = arithmetic_sets(platform.machine())
ONLY_IF_ASKED_FOR = (AMX,)  # it has never run


# Of every function a letter for each argument's type, and for its result's, if it has one: p
# (pointer), n (int64), i (int32), f (float). What exists for float32 too has `_float` in its name.
_SIGNATURES = {
    # dispatch.cpp, instructions.cpp, sums.cpp
    "choose_copies": "pnpnpnnp",
    "rows_by_peer": "pnnninipppp n",
    "group_pairs": "pnnniinnppppp n",
    "outgoing": "pnnpnpnninppppp n",
    "fan_out": "pnninpnppp",
    "pack_rows": "pnnnpppp",
    "has_instructions": "p i",
    "gather_sum": "ippnppnnnp",
    "sum_parts": "ipnnp",
    # shared_memory.cpp
    "shared_group_bytes": "n n",
    "shared_open": "pnnnnn p",
    "shared_close": "p",
    "shared_group": "pnnnnp p",
    "shared_room": "pn n",
    "shared_begin": "pnppipp p",
    "shared_wait": "pnpp i",
    "shared_end": "p",
    "shared_exchange": "pnppippnppp i",
    # products.cpp, few_rows.cpp, narrow.cpp
    "linear": "pnnpnnpp",
    "heads_linear": "pnnnpnnnpnn",
    "experts": "pnpppnpppnnpp",
    "few_rows_linear": "pnnpnnpp",
    "few_rows_experts": "pnpppnpppnnpp",
    "narrow_linear": "iipnnppnnnnpp",
    "narrow_experts": "iipnpppnpppnnnnnp",
    # attention.cpp, rows.cpp, sampling.cpp
    "attention": "pnpnpnpnpppppnpppnnnnnnfnpp",
    "rotate": "pnnnnnppn",
    "rms_norm": "pnnnnpfpn",
    "draw_tokens": "pnnppppppp",
    # step.cpp, mlp.cpp, moe_step.cpp, layers.cpp
    "attention_part": "ppppnnp",
    "place_tokens": "pppnnnnppnppppp",
    "head_part": "pppnppp",
    "mlp_part": "ppnp",
    "router_part": "ppnppp",
    "local_bytes": "ppn n",
    "local_route": "pppnp",
    "local_group": "ppnp",
    "local_experts": "ppnp",
    "local_combine": "pppnpp",
    "layers_part": "pnpppnp",
}
_TYPES: dict[str, Any] = {
    "p": ctypes.c_void_p,
    "n": ctypes.c_int64,
    "i": ctypes.c_int32,
    "f": ctypes.c_float,
}


def _loaded(path: Path) -> ctypes.CDLL:
    """Load a library; those of its functions that `_SIGNATURES` names get their types."""
    library = ctypes.CDLL(str(path))
    for name, signature in _SIGNATURES.items():
        arguments, _, result = signature.partition(" ")
        for function in (getattr(library, f"{name}{dtype}", None) for dtype in ("", "_float")):
            if function is not None:
                function.argtypes = [_TYPES[letter] for letter in arguments]
                function.restype = _TYPES[result] if result else None
    return library


class BuildError(Exception):
    """A library cannot be built; the text says why in one line."""


class _CompilerFailed(Exception):
    """A compiler failed, now or lately; the text says why in one line."""


def _no_touch() -> None:
    """Do nothing: nobody waits for the compiler."""


def build(instructions: InstructionSet, touch: Callable[[], None] = _no_touch) -> ctypes.CDLL:
    """The library of an instruction set: the shipped one, else compiled here.

    Ranks that start together wait for the one that compiles; where that failed, they and those who
    start soon afterwards do not try again.

    Args:
        touch: called every second while a compiler works, here or for another process.

    Raises:
        BuildError: there is no compiler, it failed, or there is nowhere to put the library.
        CapacityError: too few processes or descriptors, which a compiler needs.
    """
    if (shipped := _shipped(instructions)) is not None:
        return shipped
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if found is None:
        raise BuildError(
            "no C++ compiler: neither g++ nor clang++ is on the PATH, and CXX is unset"
        )
    try:
        compiler = shlex.split(found)  # it may have options, or a prefix such as ccache
        library = _library(compiler, instructions, touch)
        try:
            return _loaded(library)
        except OSError:  # damaged since it was compiled
            library.unlink(missing_ok=True)
            return _loaded(_library(compiler, instructions, touch))
    except _CompilerFailed as error:
        reason = str(error)
    except subprocess.SubprocessError as error:
        reason = _reason(error)
        _check_room(reason)
    except (OSError, RuntimeError, ValueError) as error:
        # No home folder, a full disk, a malformed CXX.
        reason = _first_line(str(error).encode())
        _check_room(reason)
    raise BuildError(f"compiling with {found} failed: {reason}")


_LIMITS = {os.strerror(each): each for each in (errno.EAGAIN, errno.EMFILE, errno.ENFILE)}
_LIMITS["can't start new thread"] = errno.EAGAIN


def _check_room(reason: str) -> None:
    """Tell a limit of processes or descriptors from a failure that trying again would repeat.

    Raises:
        CapacityError: it is one. Other ranks may have got past it, and must compute alike.
    """
    for text, number in _LIMITS.items():
        if text in reason:
            raise CapacityError(f"cannot compile kernels: {no_room(OSError(number, text))}")


def _shipped(instructions: InstructionSet) -> ctypes.CDLL | None:
    path = SHIPPED / library_name(instructions)
    try:
        return _loaded(path) if path.exists() else None
    except OSError:  # a system that lacks a library of its own, as one without glibc does
        return None


def library_name(instructions: InstructionSet, *compiler: bytes) -> str:
    """The file name of a set's library; it changes with sources, headers, flags and compiler.

    Args:
        compiler: what tells it from others; nothing for the library in a wheel.
    """
    sources = (_FOLDER / name for name in instructions.sources)
    flags = (*_COMPILE, *instructions.flags, *instructions.link_flags)
    contents = (path.read_bytes() for path in (*sources, *_HEADERS))
    key = hashlib.blake2b(
        b"\0".join((*contents, *compiler, *map(str.encode, flags))), digest_size=12
    )
    return f"{platform.machine()}-{instructions.name}-{key.hexdigest()}.so"


def _reason(error: subprocess.SubprocessError) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        return _first_line(error.stderr) or f"exit code {error.returncode}"
    return f"no answer within {_TIMEOUT_S:.0f} s"


def _first_line(output: bytes) -> str:
    """The line of a compiler's output that says why it failed.

    It is the first that names a resource that ran out, else the first error, else the first line.
    """
    lines = [line.strip() for line in output.decode(errors="replace").splitlines() if line.strip()]
    for words in ([*_LIMITS, os.strerror(errno.ENOSPC)], ["error"], [""]):
        for line in lines:
            if any(each in line for each in words):
                return line
    return ""


def _library(
    compiler: list[str], instructions: InstructionSet, touch: Callable[[], None] = _no_touch
) -> Path:
    version = subprocess.run(
        [*compiler, "--version"], capture_output=True, check=True, timeout=_TIMEOUT_S
    ).stdout
    folder = user_cache()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BuildError(
            f"compiled kernels cannot be kept in {folder}: {error.strerror}; set XDG_CACHE_HOME"
        ) from None
    library = folder / library_name(instructions, version, *map(str.encode, compiler))
    with (folder / "build.lock").open("w") as lock:
        _take(lock, touch)
        if not library.exists():
            _compile_unless_failed(compiler, instructions, library, touch)
    return library


def _take(lock: TextIO, touch: Callable[[], None]) -> None:
    """Wait until no other process compiles; a stopped one would keep the lock for ever."""
    begin_s = touched_s = time.monotonic()
    while True:
        with suppress(BlockingIOError):
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        now_s = time.monotonic()
        if now_s - begin_s > _LOCK_TIMEOUT_S:
            raise _CompilerFailed(f"another process has been at it for {_LOCK_TIMEOUT_S:.0f} s")
        if now_s - touched_s > _TOUCH_S:
            touch()
            touched_s = now_s
        time.sleep(_LOOK_S)


def _compile_unless_failed(
    compiler: list[str], instructions: InstructionSet, library: Path, touch: Callable[[], None]
) -> None:
    """Compile; a failure stands in a file beside the library for a while.

    Raises:
        _CompilerFailed: it fails, or did so lately.
        CapacityError: too few processes or descriptors.
    """
    failed = library.with_suffix(".failed")
    with suppress(OSError):  # there is none
        left_s = failed.stat().st_mtime + _REMEMBERED_S - time.time()
        if 0 < left_s <= _REMEMBERED_S:
            text = failed.read_text(errors="replace")
            raise _CompilerFailed(f"{text}; it is tried again in {left_s / 60:.0f} minutes")
    try:
        compile_library(compiler, instructions, library, touch=touch)
    except subprocess.SubprocessError as error:
        reason = _reason(error)
        _check_room(reason)
        with suppress(OSError):
            failed.write_text(reason)
        raise _CompilerFailed(reason) from None
    failed.unlink(missing_ok=True)


def compile_library(
    compiler: list[str],
    instructions: InstructionSet,
    library: Path,
    *link_flags: str,
    touch: Callable[[], None] = _no_touch,
) -> None:
    """Compile and link the library of an instruction set.

    Args:
        library: the file to write.
        touch: called every second meanwhile.

    Raises:
        CalledProcessError, TimeoutExpired: the compiler failed, or took too long.
    """
    sources = [_FOLDER / name for name in instructions.sources]
    made = library.with_suffix(".new")

    def run(*arguments: str) -> None:
        subprocess.run(
            [*compiler, *arguments], capture_output=True, check=True, timeout=_TIMEOUT_S, cwd=folder
        )

    def compile_one(source: Path) -> None:  # its object goes where the compiler runs
        run(*_COMPILE, *instructions.flags, "-c", str(source))

    with tempfile.TemporaryDirectory() as folder, ThreadPool(num_cores()) as pool:
        compiled = pool.map_async(compile_one, sources, chunksize=1)
        while not compiled.ready():
            compiled.wait(_TOUCH_S)
            touch()
        compiled.get()
        objects = (f"{source.stem}.o" for source in sources)
        run("-shared", *instructions.link_flags, *link_flags, *objects, "-o", str(made))
    made.replace(library)
