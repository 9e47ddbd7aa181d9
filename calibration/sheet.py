"""The H100's datasheet, and terms that no table of the package measures."""

from expertlane.cost.laws.profile import Device, LinkSheet, Profile, Term
from expertlane.cost.laws.times import Basis
from expertlane.spec.names import Link

_DATASHEET = "NVIDIA H100 SXM5 datasheet"
_SMALLEST = "about the least that a kernel of the fitted table takes; corrected by its surface"
_ASSUMED = "assumed, not measured: "


def _floor(micros: float) -> Term:
    return Term(micros * 1e-6, micros * 0.5e-6, micros * 2e-6, Basis.FITTED, _SMALLEST)


H100 = Profile(
    name="h100",
    device=Device(
        name="NVIDIA H100 SXM 80 GB",
        memory_bytes=80e9,
        memory_bytes_per_s=3.35e12,
        flops_per_s={
            "float32": 67e12,
            "float16": 989e12,
            "bfloat16": 989e12,
            "float8": 1979e12,
        },
        origin=f"{_DATASHEET}; dense, without sparsity",
    ),
    ranks_per_node=8,
    links={
        Link.INTRA_NODE: LinkSheet(450e9, f"{_DATASHEET}: NVLink 900 GB/s in both directions"),
        Link.INTER_NODE: LinkSheet(50e9, "DGX H100 datasheet: one 400 Gb/s NIC for every GPU"),
    },
    terms={
        "gemm_floor_s": _floor(2.5),
        "experts_floor_s": _floor(20),
        "prefill_attention_floor_s": _floor(8),
        "decode_attention_floor_s": _floor(8),
        "latent_prefill_floor_s": _floor(12),
        "latent_decode_floor_s": _floor(12),
        "memory_floor_s": _floor(2),
        "launch_s": Term(
            5e-6,
            2.5e-6,
            10e-6,
            Basis.BOUND,
            _ASSUMED + "one kernel's launch from Python, where nothing is captured in a graph",
        ),
        "graph_launch_s": Term(
            10e-6,
            5e-6,
            30e-6,
            Basis.BOUND,
            _ASSUMED + "one launch of a captured graph, however many kernels it has",
        ),
        "driver_s": Term(
            200e-6,
            50e-6,
            1000e-6,
            Basis.BOUND,
            _ASSUMED + "between steps: a step is planned and sent to the ranks, tokens come back",
        ),
    },
)
