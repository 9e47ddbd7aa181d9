"""The cards: datasheets, which tables of the package are a card's, and terms that none measures."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from expertlane.cost.laws.profile import Device, Like, LinkSheet, Profile, Term
from expertlane.cost.laws.times import Basis
from expertlane.spec.names import Link

_DENSE = "dense, without sparsity"
_SMALLEST = "about the least that a kernel of the fitted table takes; corrected by its surface"
_ASSUMED = "assumed, not measured: "
_PACKAGE = "aiconfigurator-core 0.12.0"


class Generation(StrEnum):
    """Which kernels the frameworks choose."""

    HOPPER = "hopper"
    BLACKWELL = "blackwell"
    AMPERE = "ampere"
    ADA = "ada"
    RTX_BLACKWELL = "rtx_blackwell"


# A serving engine's own kernels, one-shot and two-shot; and those that add up in NVLink's switches,
# which vLLM takes for large messages (on as many ranks as a node has).
_CUSTOM = {"custom": ("sglang", "0.5.14")}
_ALL_REDUCES = {**_CUSTOM, "multicast": ("vllm", "0.24.0")}


@dataclass(frozen=True, eq=False)
class Card:
    """A card that the package has tables of.

    Attributes:
        sheet: its datasheet, with the terms that no table measures.
        folder: of its tables.
        measured_ranks: that collectives were timed on, inside a node.
        deepep_nodes: nodes that the fitted rows of DeepEP are on; none if it was not timed.
        has_min_latency: whether TensorRT-LLM's kernels for few tokens in NVFP4 were timed.
        has_nvlink_exchange: whether an all-to-all over an NVLink domain of many hosts was timed.
        like: whose laws fill the holes.
        nccl: its version.
        all_reduces: of serving engines, by library: engine and version.
    """

    sheet: Profile
    folder: str
    generation: Generation
    measured_ranks: tuple[int, ...]
    deepep_nodes: tuple[int, ...] = (1,)
    has_min_latency: bool = False
    has_nvlink_exchange: bool = False
    like: Like | None = None
    nccl: str = "2.29.2"
    all_reduces: Mapping[str, tuple[str, str]] = field(default_factory=lambda: _ALL_REDUCES)


def _floor(micros: float) -> Term:
    return Term(micros * 1e-6, micros * 0.5e-6, micros * 2e-6, Basis.FITTED, _SMALLEST)


_TERMS = {
    "gemm_floor_s": _floor(2.5),
    "experts_floor_s": _floor(20),
    "prefill_attention_floor_s": _floor(8),
    "decode_attention_floor_s": _floor(8),
    "latent_prefill_floor_s": _floor(12),
    "latent_decode_floor_s": _floor(12),
    "memory_floor_s": _floor(2),
    "gated_delta_prefill_floor_s": _floor(20),
    "gated_delta_decode_floor_s": _floor(4),
    "kimi_delta_prefill_floor_s": _floor(20),
    "kimi_delta_decode_floor_s": _floor(4),
    "convolution_floor_s": _floor(2),
    "index_floor_s": _floor(4),
    "index_decode_floor_s": _floor(4),
    "choose_floor_s": _floor(4),
    "sparse_attention_floor_s": _floor(30),
    "compressed_attention_floor_s": _floor(10),
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
}
_WIDENED = "; mxfp4 and int4 weights are widened to bfloat16 as they are read"
_WITH_FLOAT8 = "; mxfp4 is multiplied with 8-bit activations, int4 widened to bfloat16"
# Rates in TFLOP/s; memory in GB and TB/s; links in GB/s a direction.
_HOPPER = {"float32": 67, "float16": 989, "bfloat16": 989, "float8": 1979, "mxfp4": 989}
_B200 = {"float32": 75, "float16": 2250, "bfloat16": 2250, "float8": 4500, "mxfp4": 4500}
_GB200 = {"float32": 80, "float16": 2500, "bfloat16": 2500, "float8": 5000, "mxfp4": 5000}


def _sheet(
    name: str,
    device: str,
    memory: tuple[float, float],
    tflops: dict[str, float],
    origin: str,
    near: tuple[float, str],
    far: tuple[float, str],
    float8_attention: str = "",
) -> Profile:
    rates = {**tflops, "int4": tflops["bfloat16"]}
    return Profile(
        name=name,
        device=Device(
            name=device,
            memory_bytes=memory[0] * 1e9,
            memory_bytes_per_s=memory[1] * 1e12,
            flops_per_s={dtype: rate * 1e12 for dtype, rate in rates.items()},
            origin=origin,
            # Rows of Blackwell's tables reach 1.3 × bfloat16's peak; of Hopper's 0.76.
            float8_attention=float8_attention or ("float8" if "nvfp4" in tflops else "bfloat16"),
        ),
        ranks_per_node=8,
        links={
            Link.INTRA_NODE: LinkSheet(near[0] * 1e9, near[1]),
            Link.INTER_NODE: LinkSheet(far[0] * 1e9, far[1]),
        },
        terms=_TERMS,
    )


def _over_pcie(sheet: Profile, efficiency: tuple[float, float, float]) -> Profile:
    """Without NVLink; collectives get a share of PCIe where no law of theirs holds."""
    why = "NCCL's table inside a node, largest sizes: on 8 ranks, and up to that on 2"
    term = Term(*efficiency, Basis.BOUND, why)
    terms = {**sheet.terms, "efficiency.collective.intra_node": term}
    return replace(sheet, terms=terms, has_nvlink=False)


_H100 = _sheet(
    "h100",
    "NVIDIA H100 SXM 80 GB",
    (80, 3.35),
    _HOPPER,
    f"NVIDIA H100 SXM5 datasheet; {_DENSE}{_WIDENED}",
    (450, "NVIDIA H100 SXM5 datasheet: NVLink 900 GB/s in both directions"),
    (50, "DGX H100 datasheet: one 400 Gb/s NIC for every GPU"),
)
_H200 = _sheet(
    "h200",
    "NVIDIA H200 SXM 141 GB",
    (141, 4.8),
    _HOPPER,
    f"NVIDIA H200 datasheet, SXM; {_DENSE}{_WIDENED}",
    (450, "NVIDIA H200 datasheet: NVLink 900 GB/s in both directions"),
    (50, "DGX H200 datasheet: one 400 Gb/s NIC for every GPU"),
)
_B200_SHEET = _sheet(
    "b200",
    "NVIDIA B200 SXM 180 GB",
    (180, 7.7),
    {**_B200, "nvfp4": 9000},
    f"NVIDIA HGX B200 and DGX B200 datasheets, an eighth of a node; {_DENSE}{_WITH_FLOAT8}",
    (900, "NVIDIA HGX B200 datasheet: NVLink 1.8 TB/s in both directions"),
    (50, "DGX B200 datasheet: one 400 Gb/s NIC for every GPU"),
)
_B300_SHEET = _sheet(
    "b300",
    "NVIDIA B300 SXM 288 GB",
    (288, 7.75),
    {**_B200, "nvfp4": 13500},
    f"NVIDIA HGX B300 and DGX B300 datasheets, an eighth of a node; {_DENSE}{_WITH_FLOAT8}",
    (900, "NVIDIA HGX B300 datasheet: NVLink 1.8 TB/s in both directions"),
    (100, "DGX B300 datasheet: one 800 Gb/s NIC for every GPU"),
)
_GB200_SHEET = replace(
    _sheet(
        "gb200",
        "NVIDIA GB200",
        (186, 8.0),
        {**_GB200, "nvfp4": 10000},
        f"NVIDIA GB200 NVL72 datasheet, a 72nd of a rack; {_DENSE}{_WITH_FLOAT8}",
        (900, "NVIDIA GB200 NVL72 datasheet: NVLink 1.8 TB/s in both directions, all 72 GPUs"),
        (50, "GB200 NVL72, compute tray: one 400 Gb/s NIC for every GPU"),
    ),
    ranks_per_node=72,
    devices_per_host=4,
)
_GB300_SHEET = replace(
    _sheet(
        "gb300",
        "NVIDIA GB300",
        (279, 8.0),
        {**_GB200, "nvfp4": 15000},
        f"NVIDIA GB300 NVL72 datasheet, a 72nd of a rack; {_DENSE}{_WITH_FLOAT8}",
        (900, "NVIDIA GB300 NVL72 datasheet: NVLink 1.8 TB/s in both directions, all 72 GPUs"),
        (100, "NVIDIA GB300 NVL72 datasheet: one 800 Gb/s NIC for every GPU"),
    ),
    ranks_per_node=72,
    devices_per_host=4,
)
_A100 = _sheet(
    "a100",
    "NVIDIA A100 SXM 80 GB",
    (80, 2.039),
    {"float32": 19.5, "float16": 312, "bfloat16": 312, "mxfp4": 312},
    f"NVIDIA A100 datasheet, SXM 80 GB; {_DENSE}; no float8{_WIDENED}",
    (300, "NVIDIA A100 datasheet: NVLink 600 GB/s in both directions"),
    (25, "DGX A100 datasheet: one 200 Gb/s NIC for every GPU"),
)
_L40S = _over_pcie(
    _sheet(
        "l40s",
        "NVIDIA L40S 48 GB",
        (48, 0.864),
        {"float32": 91.6, "float16": 362.05, "bfloat16": 362.05, "float8": 733, "mxfp4": 362.05},
        f"NVIDIA L40S datasheet; {_DENSE}{_WIDENED}; transfers as on one host, whose 8 GPUs "
        "got 1.2 to 2 GB/s each of PCIe's 32",
        (32, "NVIDIA L40S datasheet: PCIe Gen4 x16, 64 GB/s in both directions; no NVLink"),
        (50, f"{_ASSUMED}{_PACKAGE}, systems/l40s.yaml: 400 Gb/s for every GPU"),
    ),
    (0.05, 0.035, 0.6),
)
_RTX_PRO_6000 = _over_pcie(
    _sheet(
        "rtxpro6000",
        "NVIDIA RTX PRO 6000 96 GB",
        (96, 1.597),
        {
            "float32": 120,
            "float16": 467.8,
            "bfloat16": 467.8,
            "float8": 935.6,
            "mxfp4": 935.6,
            "nvfp4": 1871.2,
        },
        f"NVIDIA RTX PRO 6000 Blackwell Server Edition datasheet; tensor rates of {_PACKAGE}, "
        f"systems/rtx_pro_6000_server.yaml, at 2430 MHz; {_DENSE}{_WITH_FLOAT8}",
        (64, "NVIDIA RTX PRO 6000 Blackwell Server Edition datasheet: PCIe Gen5 x16; no NVLink"),
        (
            50,
            f"{_ASSUMED}{_PACKAGE}, systems/rtx_pro_6000_server.yaml: 400 Gb/s for every GPU",
        ),
        "bfloat16",
    ),
    (0.36, 0.25, 0.6),
)
# What needs NVLink, or its switches, or was timed over NVLink and NICs together.
_BY_NVLINK = ("all_reduce.multicast", "dispatch", "combine")
_HOPPER_LIKE, _OTHER_LIKE = Like("h100", 1.2), Like("h100", 1.5)

CARDS = {
    card.sheet.name: card
    for card in (
        Card(_H100, "h100_sxm", Generation.HOPPER, (2, 4, 8), (1, 2, 4)),
        Card(_H200, "h200_sxm", Generation.HOPPER, (2, 4, 8), like=_HOPPER_LIKE),
        Card(
            _B200_SHEET,
            "b200_sxm",
            Generation.BLACKWELL,
            (2, 4, 8),
            has_min_latency=True,
            like=_OTHER_LIKE,
        ),
        Card(_B300_SHEET, "b300_sxm", Generation.BLACKWELL, (2, 4, 8), like=_OTHER_LIKE),
        Card(
            _GB200_SHEET,
            "gb200",
            Generation.BLACKWELL,
            (2, 4),
            has_min_latency=True,
            has_nvlink_exchange=True,
            like=_OTHER_LIKE,
        ),
        Card(_GB300_SHEET, "gb300", Generation.BLACKWELL, (2, 4), like=Like("gb200", 1.2)),
        Card(
            _A100,
            "a100_sxm",
            Generation.AMPERE,
            (2, 4, 8),
            (),
            like=Like("h100", 1.5, ("all_reduce.multicast",)),
            nccl="2.27.3",
            all_reduces={"custom": ("sglang", "0.5.10")},
        ),
        Card(
            _L40S,
            "l40s",
            Generation.ADA,
            (2, 4, 8),
            (),
            like=Like("h100", 1.5, _BY_NVLINK),
            nccl="2.27.3",
            all_reduces=_CUSTOM,
        ),
        Card(
            _RTX_PRO_6000,
            "rtx_pro_6000_server",
            Generation.RTX_BLACKWELL,
            (2, 4, 8),
            (),
            like=Like("h100", 1.5, _BY_NVLINK),
            all_reduces=_CUSTOM,
        ),
    )
}
