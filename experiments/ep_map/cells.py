"""What the map is made of: each model on each cluster at each load, with and without EP.

Every cell has the best deployment with experts spread over ranks (ep > 1) and the best without, on
the same devices, by output tokens a second as the planner screens them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import exp, log
from typing import NamedTuple

import numpy as np

from expertlane.cost.laws.profile import LIKELY, Execution, ModelledCluster, read_profile
from expertlane.cost.projector import Projector, Setting, StepSize
from expertlane.cost.routing import PowerLawRouting
from expertlane.cost.step.operation import NumberTypes
from expertlane.cost.throughput import Goals
from expertlane.planner.candidates import Candidate, PlanRequest, candidates_of, valid_layouts
from expertlane.planner.screen import Screen, ScreenedCandidate, fitting
from expertlane.results.record import StepsRecord
from expertlane.spec.from_hf import from_hf
from expertlane.spec.layout import Layout
from expertlane.spec.model import PRESETS, ModelConfig
from expertlane.spec.ranges import LIKENESS, SKEW_BOUNDS
from expertlane.spec.workload import Workload

SEQS_PER_DEVICE = (0.5, 2.0, 8.0, 32.0, 128.0)
DEVICES = (8, 16, 32, 64)
PROMPT_LEN = OUTPUT_LEN = 1024
SAME = 1.05  # a smaller factor is none
_NUM_SKEWED = 4  # of the best on each side, screened under other routings too
_TP = (1, 2, 4, 8)


class Hardware(NamedTuple):
    """A profile, and what its devices are linked by."""

    profile: str
    name: str
    link: str


HARDWARE = (
    Hardware("h200", "H200", "InfiniBand, 50 GB/s per device, between nodes of 8"),
    Hardware("b200", "B200", "InfiniBand, 50 GB/s per device, between nodes of 8"),
    Hardware("gb200", "GB200", "NVLink, 900 GB/s per device, within a rack of 72"),
)
MODELS: dict[str, tuple[ModelConfig, str]] = {
    "DeepSeek-V3": (
        from_hf({"model_type": "deepseek_v3", "max_position_embeddings": 163840}, "DeepSeek-V3"),
        "float8",
    ),
    "Qwen3-30B-A3B": (
        from_hf({"model_type": "qwen3_moe", "num_hidden_layers": 48}, "Qwen3-30B-A3B"),
        "float8",
    ),
    "Mixtral 8x7B": (from_hf({"model_type": "mixtral"}, "Mixtral 8x7B"), "float8"),
    "the paper's model": (PRESETS["paper"], "float16"),
}


@dataclass(frozen=True, eq=False)
class Cell:
    """A model on a cluster at a load.

    Attributes:
        with_ep, without: the best of each; None where none fits.
        factor: output tokens a second with EP over without; None where one side is missing.
        factors: the same with uniform routing and with the most skew.
    """

    model: str
    hardware: Hardware
    num_devices: int
    seqs_per_device: float
    with_ep: ScreenedCandidate | None
    without: ScreenedCandidate | None
    factor: float | None
    factors: tuple[float, float] | None

    @property
    def num_seqs(self) -> int:
        """Over all devices."""
        return round(self.seqs_per_device * self.num_devices)

    @property
    def side(self) -> str:
        """`EP`, `no EP`, `even` (too close, or up to the skew), or `neither` fits."""
        if self.factor is None or self.factors is None:
            if self.with_ep is None and self.without is None:
                return "neither"
            return "no EP" if self.with_ep is None else "EP"
        low, high = min(self.factor, *self.factors), max(self.factor, *self.factors)
        if self.factor >= SAME and low >= 1:
            return "EP"
        if self.factor <= 1 / SAME and high <= 1:
            return "no EP"
        return "even"


def request_of(
    model: str, hardware: Hardware, num_devices: int, skew: float | None = None
) -> PlanRequest:
    """The question of a cluster; its workload is the largest load of the map.

    Args:
        skew: of routing; None for the model's usual one.
    """
    config, dtype = MODELS[model]
    skew = config.usual_skew if skew is None else skew
    workload = Workload(int(SEQS_PER_DEVICE[-1] * num_devices), PROMPT_LEN, OUTPUT_LEN)
    routing = PowerLawRouting.of(config, skew, num_sampled_layers=2, likeness=LIKENESS)
    payload = "float8" if dtype == "float8" else "model"
    setting = Setting(NumberTypes.asked(dtype), Execution.GRAPH, routing, payload)
    cluster = ModelledCluster(read_profile(hardware.profile), num_devices)
    return PlanRequest(config, cluster, workload, Goals(), setting)


def candidates(request: PlanRequest) -> Iterator[Candidate]:
    """Those of the map: experts spread over all ranks of a stage, or none; copies or none."""
    devices = request.cluster.num_devices
    nodes = {1, max(1, devices // 8)}
    per_node = request.cluster.profile.ranks_per_node
    for layout in valid_layouts(request.model, devices):
        if layout.tp not in _TP or layout.pp not in nodes or layout.ep not in _eps(layout):
            continue
        yield from candidates_of(layout, request.model, per_node, request.setting.payload)


def _eps(layout: Layout) -> tuple[int, int]:
    return 1, layout.dp * layout.tp


def tps_at(option: ScreenedCandidate, num_seqs: float) -> float:
    """Output tokens a second of so many sequences at once; as many as fit if that is fewer.

    Between sizes that were screened the logarithm goes straight; 0 below the smallest.
    """
    sizes, tps = option.served.num_seqs, option.served.tps[LIKELY]
    if num_seqs < sizes[0] or not tps.all():
        return 0.0
    return exp(float(np.interp(log(num_seqs), np.log(sizes), np.log(tps))))


def cells_of(model: str, hardware: Hardware, num_devices: int) -> list[Cell]:
    """A cluster's cells, one for each load."""
    request = request_of(model, hardware, num_devices)
    options = fitting(Screen(request).run(candidates(request), lambda _: None))
    best = [_best(options, round(each * num_devices)) for each in SEQS_PER_DEVICE]
    closer = {id(each): each for sides in best for side in sides for each in side[:_NUM_SKEWED]}
    skewed = []
    for skew in SKEW_BOUNDS:
        other = request_of(model, hardware, num_devices, skew)
        chosen = [each.candidate for each in closer.values()]
        skewed.append(fitting(Screen(other).run(chosen, lambda _: None)))
    cells = []
    for seqs, sides in zip(SEQS_PER_DEVICE, best, strict=True):
        num_seqs = round(seqs * num_devices)
        tops = [side[0] if side else None for side in sides]
        low, high = (_factor(_best(each, num_seqs), num_seqs) for each in skewed)
        factors = None if low is None or high is None else (low, high)
        cells.append(
            Cell(
                *(model, hardware, num_devices, seqs, *tops),
                factor=_factor(sides, num_seqs),
                factors=factors,
            )
        )
    return cells


_Sides = tuple[list[ScreenedCandidate], list[ScreenedCandidate]]


def _best(options: Sequence[ScreenedCandidate], num_seqs: int) -> _Sides:
    """With EP and without, the most tokens a second first; those that can run so few at all."""
    able = [(tps, each) for each in options if (tps := tps_at(each, num_seqs)) > 0]
    able.sort(key=lambda each: -each[0])
    with_ep = [each for _, each in able if each.candidate.layout.ep > 1]
    return with_ep, [each for _, each in able if each.candidate.layout.ep == 1]


def _factor(sides: _Sides, num_seqs: int) -> float | None:
    if not all(sides):
        return None
    with_ep, without = (tps_at(side[0], num_seqs) for side in sides)
    return with_ep / without


def decode_steps(cell: Cell) -> tuple[StepsRecord, StepsRecord] | None:
    """A decode step of both best in full, with EP first; None where one side is missing."""
    if cell.with_ep is None or cell.without is None:
        return None
    request = request_of(cell.model, cell.hardware, cell.num_devices)
    first, second = (
        Projector(
            *(request.model, each.candidate.layout, each.candidate.options),
            *(request.cluster, request.setting),
        ).step(StepSize(min(cell.num_seqs, int(each.served.num_seqs[-1])), 1, _CONTEXT))
        for each in (cell.with_ep, cell.without)
    )
    return first, second


_CONTEXT = PROMPT_LEN + OUTPUT_LEN // 2


@dataclass(frozen=True)
class Pair:
    """Two layouts that others measured at one load, alike but for the experts.

    Attributes:
        factor: output tokens a second a device with EP over without.
        days: between the two measurements.
    """

    hardware: str
    framework: str
    dtype: str
    num_devices: int
    prompt_len: int
    output_len: int
    num_seqs: int
    factor: float
    days: int

    @property
    def place(self) -> float:
        """Of the map's loads the nearest, in sequences a device."""
        own = log(self.num_seqs / self.num_devices)
        return min(SEQS_PER_DEVICE, key=lambda each: abs(log(each) - own))


def projected_factor(pair: Pair) -> float | None:
    """What the model says of the same two layouts; None where it does not know one of the types."""
    hardware = next((each for each in HARDWARE if each.profile == pair.hardware), None)
    if hardware is None:
        return None
    request = request_of("DeepSeek-V3", hardware, pair.num_devices)
    dtype = {"fp8": "float8", "fp4": "nvfp4"}[pair.dtype]
    setting = replace(request.setting, types=NumberTypes.asked(dtype))
    workload = Workload(pair.num_seqs, pair.prompt_len, pair.output_len)
    request = replace(request, setting=setting, workload=workload)
    tps = []
    for ep in (pair.num_devices, 1):
        layout = Layout(tp=pair.num_devices, ep=ep)
        of_layout = candidates_of(
            layout, request.model, request.cluster.profile.ranks_per_node, "model"
        )
        plain = [each for each in of_layout if not each.options.num_redundant_experts]
        screened = fitting(Screen(request).run(plain, lambda _: None))
        tps.append(max((tps_at(each, pair.num_seqs) for each in screened), default=0.0))
    return tps[0] / tps[1] if all(tps) else None
