"""Traces of the torch profiler, made up: kernels, operators and annotations at given times."""

import gzip
import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
H800 = HERE / "deepseek_v3_h800.json"
HOST, MAIN = 4711, 4711

ATTENTION = "void flash_fwd_kernel<Flash_fwd_kernel_traits<128, 64, 64, 4>>(Flash_fwd_params)"
NORM = "void vllm::rms_norm_kernel<c10::BFloat16, 8, 2>(c10::BFloat16*, c10::BFloat16 const*, int)"
GEMM = "nvjet_tst_128x64_64x8_1x2_h_bz_coopA_NNT"
TOPK = "void vllm::moe::topkGatingSoftmax<8, 128, 4, 16, int>(float const*, bool const*, float*)"
EXPERTS = "fused_moe_kernel"
ALL_REDUCE = "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
SEND = "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)"
DISPATCH = "void deep_ep::internode_ll::dispatch<true, false, 7168>(void*, void*, int*, long*)"
COMBINE = "void deep_ep::internode_ll::combine<true, 7168, 9>(void*, void*, int*, void*)"
EMBED = "void at::native::vectorized_gather_kernel<16, long>(char*, char*, long*, int, long, long)"
ARGMAX = (
    "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::ArgMaxOps>>"
)
STRANGE = "quux_kernel<7>(float*)"


class Trace:
    """The events of one rank; times in whole microseconds."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def _add(self, cat: str, name: str, start: int, duration: int, tid: int, **args: Any) -> None:
        event = {"ph": "X", "cat": cat, "name": name, "pid": HOST, "tid": tid}
        self.events.append({**event, "ts": start, "dur": duration, "args": args})

    def annotation(self, name: str, start: int, duration: int) -> None:
        """What `record_function` writes."""
        self._add("user_annotation", name, start, duration, MAIN)

    def operator(self, name: str, start: int, duration: int) -> None:
        """An operator of the thread that runs the steps."""
        self._add("cpu_op", name, start, duration, MAIN)

    def kernel(
        self, name: str, start: int, duration: int, stream: int = 7, launched: int | None = None
    ) -> None:
        """A kernel, launched one microsecond before it starts unless it is said."""
        correlation = len(self.events)
        self._add("kernel", name, start, duration, stream, correlation=correlation)
        at = start - 1 if launched is None else launched
        self._add("cuda_runtime", "cudaLaunchKernel", at, 1, MAIN, correlation=correlation)

    def save(self, path: Path, rank: int | None, **head: Any) -> Path:
        """Write it, gzipped where the name ends so."""
        known = {} if rank is None else {"distributedInfo": {"rank": rank, "world_size": 8}}
        text = json.dumps({"schemaVersion": 1, **known, "traceEvents": self.events, **head})
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
        return path


def h800() -> dict[str, Any]:
    """DeepSeek's published trace as a table; its `source` says of what."""
    table: dict[str, Any] = json.loads(H800.read_text())
    return table


def h800_trace(*, with_annotations: bool = True) -> Trace:
    """That table as a trace; without annotations the forward chunk's kernels alone."""
    table, trace = h800(), Trace()
    marks = table["annotations"]
    if with_annotations:
        trace.annotation(*table["step"])
        for mark in marks:
            trace.annotation(*mark)
    for row, around in zip(table["kernels"], h800_annotations(), strict=True):
        name, stream, start, duration, launched = row
        if with_annotations or around.endswith("(F)"):
            trace.kernel(table["kernel_names"][name], start, duration, stream, launched)
    return trace


def h800_annotations() -> list[str]:
    """The annotation in which each kernel of the table was launched."""
    table = h800()
    return [
        next(
            name
            for name, start, duration in table["annotations"]
            if start <= at <= start + duration
        )
        for *_, at in table["kernels"]
    ]
