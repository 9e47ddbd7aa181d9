"""Whole deployments as others measured them, against the model: nothing of this was fitted.

python calibration/judge_published.py      DeepSeek-V3, from write-ups; what EPLB brings

Prints Markdown. The model is read from the configurations that aiconfigurator-core brings.

Left out: 2,200 tokens/s per H200 with wide EP (vLLM, 2025-12-17; llm-d 0.3, 2025-10-10), since
neither says in words on how many GPUs, with which batch, or of which lengths.
"""

import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from expertlane.cost.laws.profile import Execution, ModelledCluster, read_profile
from expertlane.cost.projector import Projector, Setting, StepSize
from expertlane.cost.routing import PowerLawRouting, choose_routing
from expertlane.cost.step.operation import NumberTypes
from expertlane.spec.deployment import DispatchForm, Options, PlacementMethod
from expertlane.spec.from_hf import from_hf
from expertlane.spec.layout import Layout
from expertlane.spec.model import ModelConfig

_BLOG = "LMSYS, 2025-05-05, Deploying DeepSeek with PD Disaggregation and Large-scale EP"
_GB200 = "LMSYS, 2025-09-25, Deploying DeepSeek on GB200 NVL72 with PD and Large Scale EP (Part II)"
_DEEPSEEK = "DeepSeek, 2025-03-01, DeepSeek-V3/R1 Inference System Overview, mean of 24 hours"
_MTP_ACCEPTANCE = 0.6  # as the write-up takes it for DeepSeek's own profile
_PER_NODE = 8
_NUM_REDRAWN = 2  # draws of the experts that tokens choose, beside the first; a row has the mean

Bounds = tuple[float, float, float]


@dataclass(frozen=True)
class Published:
    """One row of a write-up.

    Attributes:
        tps: tokens a second of `num_devices`.
        num_seqs, num_new, num_cached: of a GPU's step.
        tokens_per_seq: that a step yields.
        is_routed: as tokens of a model's users choose experts by default; else routing was
            balanced.
    """

    name: str
    tps: float
    layout: Layout
    options: Options
    num_seqs: int
    num_new: int
    num_cached: int
    tokens_per_seq: float = 1.0
    is_routed: bool = False
    source: str = _BLOG
    num_devices: int = _PER_NODE
    hardware: str = "h100"
    types: NumberTypes = NumberTypes.asked("float8")  # noqa: RUF009


@dataclass(frozen=True)
class PublishedGain:
    """How many times the throughput a deployment has whose experts are placed by load."""

    name: str
    times: float
    balanced: Published


def _options(
    form: DispatchForm, num_redundant: int, placement: PlacementMethod, *, overlap: bool = True
) -> Options:
    return Options(
        overlap=overlap,
        dispatch=form,
        payload="float8",
        num_redundant_experts=num_redundant,
        placement=placement,
    )


def _gb200(
    name: str, tps: float, ranks: int, steps: tuple[int, int, int], types: NumberTypes
) -> Published:
    options = _options("all_to_all", 32, "load", overlap=False)
    layout = Layout(dp=ranks, ep=ranks)
    return Published(name, tps, layout, options, *steps, 1.0, True, _GB200, 1, "gb200", types)


_EP32, _EP72, _EP128, _EP144 = (Layout(dp=size, ep=size) for size in (32, 72, 128, 144))
_BALANCED = _options("hierarchical", 32, "linear")
_PREFILL, _DECODE = (_options(form, 32, "load") for form in ("hierarchical", "all_to_all"))
_ROUTED = 1.0, True
_FLOAT8, _FP4 = NumberTypes.asked("float8"), NumberTypes.asked("nvfp4", "float8")
_PREFILL_4K = Published(
    "prefill EP32, 4 × 4,096, SGLang, as routed", 50_302, _EP32, _PREFILL, 4, 4096, 0, *_ROUTED
)
_DECODE_2K = Published(
    "decode EP72, 256 × 2,000, SGLang", 22_282, _EP72, _DECODE, 256, 1, 2000, *_ROUTED
)
PUBLISHED = (
    Published("prefill EP32, 4 × 4,096, DeepSeek's profile", 62_713, _EP32, _BALANCED, 4, 4096, 0),
    Published("the same, SGLang, balanced by simulation", 59_337, _EP32, _BALANCED, 4, 4096, 0),
    _PREFILL_4K,
    Published("8 × 2,048, SGLang, as routed", 54_543, _EP32, _PREFILL, 8, 2048, 0, *_ROUTED),
    Published("16 × 1,024, SGLang, as routed", 57_674, _EP32, _PREFILL, 16, 1024, 0, *_ROUTED),
    _DECODE_2K,
    # Multi-token prediction as the write-up simulates it: twice the tokens, half the cache each.
    Published(
        "decode EP128, 128 × 4,096, DeepSeek's profile, with MTP",
        18_598,
        _EP128,
        _options("all_to_all", 0, "linear"),
        256,
        1,
        2048,
        (1 + _MTP_ACCEPTANCE) / 2,
    ),
    Published(
        "decode EP72, 128 × 4,000, SGLang, MTP simulated",
        17_373,
        _EP72,
        _DECODE,
        256,
        1,
        2000,
        (1 + _MTP_ACCEPTANCE) / 2,
        True,
    ),
    # 73.7k input tokens/s of which 56.3 % were cached: 32.2k. From 608 : 168 tokens in and out, and
    # 4,989 positions of an output token, a prompt has about 4,400, of which 1,900 are computed;
    # 16,384 new tokens a GPU, as the first write-up has it. 14.8k tokens/s at 20 to 22 tokens/s of
    # a user are 88 users a GPU; whether they had MTP is not said.
    Published(
        "prefill EP32, 8 × 2,048 after 2,640 cached, DeepSeek in production",
        32_206,
        _EP32,
        _PREFILL,
        8,
        2048,
        2640,
        *_ROUTED,
        _DEEPSEEK,
    ),
    Published(
        "decode EP144, 88 × 4,989, DeepSeek in production",
        14_800,
        _EP144,
        _DECODE,
        88,
        1,
        4989,
        *_ROUTED,
        _DEEPSEEK,
    ),
    # The batch is said to fill the cache: 768 sequences of 4,000 tokens, 1,408 of 2,000.
    _gb200("decode EP48, 768 × 2,000, bfloat16 cache", 9_087, 48, (768, 1, 2000), _FLOAT8),
    _gb200("decode EP48, 1,408 × 2,000, bfloat16 cache", 9_087, 48, (1408, 1, 2000), _FLOAT8),
    _gb200("prefill EP4, 8 × 2,000, bfloat16 cache", 18_471, 4, (8, 2000, 0), _FLOAT8),
    _gb200("decode EP48, 1,408 × 2,000, NVFP4", 13_386, 48, (1408, 1, 2000), _FP4),
    _gb200("prefill EP2, 8 × 2,000, NVFP4", 26_156, 2, (8, 2000, 0), _FP4),
)
# Of the same write-up; it does not say of which prompts and batch: those of its overall results.
GAINS = (
    PublishedGain("prefill EP32, 4 × 4,096", 1.49, _PREFILL_4K),
    PublishedGain("decode EP72, 256 × 2,000", 2.54, _DECODE_2K),
)


def main() -> int:
    """Project and compare."""
    spec = importlib.util.find_spec("aiconfigurator_core")
    if spec is None or spec.origin is None:
        print("install the tables first: pip install '.[calibration]'", file=sys.stderr)
        return 2
    name = "deepseek-ai/DeepSeek-V3"
    path = Path(spec.origin).parent / "model_configs" / f"{name.replace('/', '--')}_config.json"
    _judge(from_hf(json.loads(path.read_text(encoding="utf-8")), name))
    return 0


def projected(each: Published, model: ModelConfig) -> Bounds:
    """Low, likely and high of what is published; the mean of some draws."""
    sources: Sequence[PowerLawRouting]
    sources = _draws(model) if each.is_routed else [PowerLawRouting.of(model, 0.0, 0, 2)]
    low, likely, high = np.mean([_tps(each, model, source) for source in sources], axis=0).tolist()
    return low, likely, high


def gain(each: PublishedGain, model: ModelConfig) -> Bounds:
    """How many times the tokens/s of experts in order; with the most even routing, and uneven."""
    draws = _draws(model)
    assert draws[0].extremes is not None, "by default"
    options = replace(each.balanced.options, placement="linear")
    in_order = replace(each.balanced, options=options)

    def times(source: PowerLawRouting) -> float:
        return _tps(each.balanced, model, source)[1] / _tps(in_order, model, source)[1]

    least, most = map(times, draws[0].extremes)
    return least, float(np.mean([times(source) for source in draws])), most


def _draws(model: ModelConfig) -> list[PowerLawRouting]:
    source = choose_routing(model, None, None, 0, num_sampled_layers=2).source
    assert isinstance(source, PowerLawRouting), "no trace"
    return [source, *source.redrawn(_NUM_REDRAWN)]


def _tps(each: Published, model: ModelConfig, routing: PowerLawRouting) -> Bounds:
    size = StepSize(each.num_seqs * each.layout.world_size, each.num_new, each.num_cached)
    setting = Setting(each.types, Execution.GRAPH, routing, "float8")
    cluster = ModelledCluster(read_profile(each.hardware), each.layout.world_size)
    step = Projector(model, each.layout, each.options, cluster, setting).step(size)
    scale = each.tokens_per_seq * each.num_devices / each.layout.world_size
    low, likely, high = (scale * bound for bound in step.tps.bounds)
    return low, likely, high


def _judge(model: ModelConfig) -> None:
    errors, num_inside = [], 0
    for source in dict.fromkeys(each.source for each in PUBLISHED):
        print(f"\nSource: {source}.\n")
        print("| setup | skew | published, tokens/s | of GPUs | projected | low | high | error |")
        print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
        for each in PUBLISHED:
            if each.source != source:
                continue
            low, likely, high = projected(each, model)
            errors.append(likely / each.tps - 1)
            num_inside += low <= each.tps <= high
            skew = model.usual_skew if each.is_routed else 0.0
            print(
                f"| {each.name} | {skew:g} | {each.tps:,} | {each.num_devices} | {likely:,.0f} | "
                f"{low:,.0f} | {high:,.0f} | {errors[-1]:+.0%} |",
                flush=True,
            )
    print(
        f"\nMedian error {np.median(errors):+.0%}, absolute {np.median(np.abs(errors)):.0%}; "
        f"{num_inside} of {len(errors)} within their bounds."
    )
    print("\n| EPLB: times the tokens/s | published | projected | skew 0.15 | skew 1 |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for of in GAINS:
        least, likely, most = gain(of, model)
        print(f"| {of.name} | {of.times:.2f} | {likely:.2f} | {least:.2f} | {most:.2f} |")


if __name__ == "__main__":
    sys.exit(main())
