"""The benchmark's side of a contender: a long-lived child process that loads a model once."""

import json
import os
import select
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

LOAD_TIMEOUT_S = 600.0
RUN_TIMEOUT_S = 300.0
MIN_FREE_BYTES = 6e9  # a contender that loads takes 1 to 4 GB, and nothing may be paged out


# For oneDNN, MKL and torch's own kernels; vLLM's are chosen by what torch says of the CPU.
_LIMITS = {
    "avx2": ("AVX2", "AVX2", "avx2"),
    "avx512": ("AVX512_CORE", "AVX512", "avx512"),
    "avx512_bf16": ("AVX512_CORE_BF16", "AVX512", "avx512"),
    "amx": ("AVX512_CORE_AMX", "AVX512", "avx512"),
}
INSTRUCTION_SETS = tuple(_LIMITS)
_HIDDEN = Path(__file__).parent / "hidden_instructions"  # its sitecustomize.py


def instruction_limit(cpu_isa: str | None) -> dict[str, str]:
    """Variables that keep a process from instructions beyond this set, though the CPU has them."""
    if cpu_isa is None:
        return {}
    onednn, mkl, aten = _LIMITS[cpu_isa]
    paths = [str(_HIDDEN), os.environ.get("PYTHONPATH", "")]
    return {
        "EXPERTLANE_CPU_ISA": cpu_isa,
        "ONEDNN_MAX_CPU_ISA": onednn,
        "MKL_ENABLE_INSTRUCTIONS": mkl,
        "ATEN_CPU_CAPABILITY": aten,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }


class ContenderError(Exception):
    """A contender that died, hung or could not load; the message names its log."""


class Contender:
    """A child that speaks the protocol of `child.py`.

    Args:
        name: for tables and the name of its log.
        command: what to run, without a shell.
        environment: variables in addition to this process's.
        log: gets the child's standard error.
    """

    def __init__(
        self, name: str, command: list[str], environment: dict[str, str], log: Path
    ) -> None:
        self.name = name
        self._log = log
        # A library's default is one thread a core: what a shell has set for tests is no setting.
        inherited = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env=inherited | environment,
            )
        try:
            self._answer(LOAD_TIMEOUT_S)
        except BaseException:
            self.close()
            raise

    def seconds(self, prompts: list[list[int]], max_tokens: int) -> float | None:
        """Seconds to generate `max_tokens` after each prompt; None where it cannot."""
        request = {"prompts": prompts, "max_tokens": max_tokens}
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # that it ended is noticed below
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        return self._answer(RUN_TIMEOUT_S).get("seconds")

    def cpu_seconds(self) -> float:
        """Processor time that the child and its descendants have used so far."""
        total = 0.0
        for process in self._tree():
            try:
                times = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            total += times.user + times.system
        return total

    def close(self) -> None:
        """End the child and its descendants."""
        tree = self._tree()
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        _, alive = psutil.wait_procs(tree, timeout=20)
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def _tree(self) -> list[psutil.Process]:
        try:
            process = psutil.Process(self._process.pid)
            return [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        output = self._process.stdout
        assert output is not None
        until_s = time.monotonic() + timeout_s
        while not select.select([output], [], [], 1.0)[0]:
            if time.monotonic() > until_s:
                raise ContenderError(
                    f"{self.name}: no answer in {timeout_s:.0f} s; see {self._log}"
                )
        line = output.readline()  # one answer is one line, written at once
        if not line:
            status = self._process.wait(timeout=20)  # negative: the signal that ended it
            raise ContenderError(f"{self.name}: it ended with status {status}; see {self._log}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def start(
    name: str,
    checkpoint: Path,
    num_cores: int,
    vllm_python: Path | None,
    cpu_isa: str | None = None,
) -> Contender:
    """Start a contender by its name and wait until it has loaded.

    Args:
        name: `ours:LAYOUT`, `transformers:EXPERTS_IMPLEMENTATION` or `vllm:TENSOR_PARALLEL_SIZE`.
        cpu_isa: the largest instruction set that it may use; None for all.

    Raises:
        ContenderError: it could not load, or memory is short.
    """
    free_bytes = psutil.virtual_memory().available
    if free_bytes < MIN_FREE_BYTES:
        raise ContenderError(
            f"{name}: {free_bytes / 1e9:.1f} GB of memory are free, "
            f"{MIN_FREE_BYTES / 1e9:.0f} GB are wanted"
        )
    here = Path(__file__).parent
    kind, _, option = name.partition(":")
    python, environment = Path(sys.executable), {"HF_HUB_OFFLINE": "1"}
    environment |= instruction_limit(cpu_isa)
    if kind == "vllm":
        if vllm_python is None:
            raise ContenderError(f"{name}: no --vllm-python")
        python = vllm_python
        environment |= vllm_environment(vllm_python, checkpoint, num_cores, int(option))
    if kind == "ours":
        environment["EXPERTLANE_PIN"] = "1"  # other layouts' ranks are there too, but idle
    command = [str(python), str(here / "child.py"), kind, str(checkpoint), option]
    if kind == "transformers":
        command.append(str(num_cores))
    log = checkpoint.parent / f"{checkpoint.name}-{name.replace(':', '-').replace(',', '-')}.log"
    return Contender(name, command, environment, log)


def vllm_environment(
    python: Path, checkpoint: Path, num_cores: int, tensor_parallel_size: int
) -> dict[str, str]:
    """Threads bound to cores, one group a rank; the libraries that its manual asks to preload."""
    cores = sorted(os.sched_getaffinity(0))[:num_cores]
    share = len(cores) // tensor_parallel_size
    groups = [cores[rank * share : (rank + 1) * share] for rank in range(tensor_parallel_size)]
    wanted = [
        Path("/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4"),
        python.parent.parent / "lib/libiomp5.so",
    ]
    return {
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(",".join(map(str, group)) for group in groups),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CACHE_ROOT": str(checkpoint.parent / "vllm-cache"),
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "LD_PRELOAD": ":".join(str(library) for library in wanted if library.exists()),
    }
