"""The kernels without torch: each set with an address sanitizer, others in an emulator of a CPU."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from engine.ops.instruction_sets import ARITHMETIC, backend_or_skip
from expertlane.engine.ops import build as module
from expertlane.engine.ops.build import InstructionSet, arithmetic_sets

_PATIENCE_S = 1200  # an emulator beside other programs
pytestmark = [pytest.mark.full, pytest.mark.timeout(2 * _PATIENCE_S)]

OPS = Path(module.__file__).parent
KERNELS = ("attention", "few_rows", "narrow", "products", "rows", "sums")
CHECKS = ("attention_checks", "kernels_program", "narrow_checks")


def compile_program(
    compiler: str, instructions: InstructionSet, folder: Path, *options: str
) -> Path:
    """The program with the kernels of a set; a skip where the compiler lacks one of the options."""
    program = folder / "kernels"
    here = Path(__file__).parent
    sources = [here / f"{name}.cpp" for name in CHECKS] + [OPS / f"{name}.cpp" for name in KERNELS]
    arguments = ["-O2", "-std=c++20", f"-I{OPS}", *instructions.flags, *options]
    done = subprocess.run(
        [compiler, *arguments, *map(str, sources), "-o", str(program)],
        capture_output=True,
        text=True,
        timeout=_PATIENCE_S,
    )
    if done.returncode and any(word in done.stderr for word in ("libasan", "unrecognized")):
        pytest.skip(done.stderr.splitlines()[0])
    assert done.returncode == 0, done.stderr
    return program


def run(*command: str) -> None:
    # GCC 12 aligns what it puts on the sanitizer's own stack to 32 bytes, AVX-512 wants 64.
    options = {"ASAN_OPTIONS": "detect_stack_use_after_return=0", "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=_PATIENCE_S, env=os.environ | options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith(" 0 wrong"), done.stdout


def found_or_skip(name: str) -> str:
    return shutil.which(name) or pytest.skip(f"no {name}")


@pytest.mark.parametrize("name", ARITHMETIC)
def test_no_kernel_reads_past_a_buffer_s_end(name, tmp_path):
    compiler = found_or_skip("g++")
    backend_or_skip(name)
    (instructions,) = (each for each in module.SETS if each.name == name)
    run(str(compile_program(compiler, instructions, tmp_path, "-fsanitize=address")))


@pytest.mark.parametrize(
    ("name", "compiler", "emulator", "cpu"),
    [
        ("avx2", "x86_64-linux-gnu-g++", "qemu-x86_64", "Haswell"),
        ("neon", "aarch64-linux-gnu-g++", "qemu-aarch64", "max"),
        ("neon_bf16", "aarch64-linux-gnu-g++", "qemu-aarch64", "max"),
    ],
)
def test_kernels_of_other_cpus_in_an_emulator(name, compiler, emulator, cpu, tmp_path):
    compiler, emulator = found_or_skip(compiler), found_or_skip(emulator)
    sets = (*arithmetic_sets("x86_64"), *arithmetic_sets("aarch64"))
    (instructions,) = (each for each in sets if each.name == name)
    program = compile_program(compiler, instructions, tmp_path, "-static")
    run(emulator, "-cpu", cpu, str(program))
