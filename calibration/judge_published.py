"""Whole deployments as others measured them, against the model: nothing of this was fitted.

python calibration/judge_published.py             DeepSeek-V3 on H100 and H800, from write-ups
python calibration/judge_published.py --silicon   the MoE rows on H100 of silicon_sample.csv

Both print Markdown. Models are read from the configurations that aiconfigurator-core brings.
"""

import argparse
import csv
import importlib.util
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from expertlane.cost.laws.execution import Execution
from expertlane.cost.laws.profile_file import ModelledCluster, read_profile
from expertlane.cost.number_types import NumberTypes
from expertlane.cost.routing import PowerLawRouting
from expertlane.errors import SpecError
from expertlane.plan.project import Projector, Setting, StepSize
from expertlane.results.record import StepsRecord
from expertlane.spec.deployment import Options, PlacementMethod
from expertlane.spec.dispatch import DispatchForm
from expertlane.spec.from_hf import from_hf
from expertlane.spec.layout import Layout
from expertlane.spec.model import ModelConfig

_BLOG = "LMSYS, 2025-05-05, Deploying DeepSeek with PD Disaggregation and Large-scale EP"
_MTP_ACCEPTANCE = 0.6  # as the write-up takes it for DeepSeek's own profile
_PER_NODE = 8


@dataclass(frozen=True)
class Published:
    """One row of a write-up; tokens a second of a node of eight.

    Attributes:
        num_seqs, num_new, num_cached: of a GPU's step.
        tokens_per_seq: that a step yields.
        is_routed: with the model's usual skew, and experts placed by load, as SGLang's balancer
            had them; else routing was balanced.
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


def _options(form: DispatchForm, num_redundant: int, placement: PlacementMethod) -> Options:
    return Options(
        overlap=True,
        dispatch=form,
        payload="float8",
        num_redundant_experts=num_redundant,
        placement=placement,
    )


_EP32, _EP72, _EP128 = (Layout(dp=size, ep=size) for size in (32, 72, 128))
_BALANCED = _options("hierarchical", 32, "linear")
_PREFILL, _DECODE = (_options(form, 32, "load") for form in ("hierarchical", "all_to_all"))
_ROUTED = 1.0, True
PUBLISHED = (
    Published("prefill EP32, 4 × 4,096, DeepSeek's profile", 62_713, _EP32, _BALANCED, 4, 4096, 0),
    Published("the same, SGLang, balanced by simulation", 59_337, _EP32, _BALANCED, 4, 4096, 0),
    Published("the same, SGLang, as routed", 50_302, _EP32, _PREFILL, 4, 4096, 0, *_ROUTED),
    Published("8 × 2,048, SGLang, as routed", 54_543, _EP32, _PREFILL, 8, 2048, 0, *_ROUTED),
    Published("16 × 1,024, SGLang, as routed", 57_674, _EP32, _PREFILL, 16, 1024, 0, *_ROUTED),
    Published("decode EP72, 256 × 2,000, SGLang", 22_282, _EP72, _DECODE, 256, 1, 2000, *_ROUTED),
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
)


def main() -> int:
    """Project and compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--silicon", action="store_true", help="the rows of silicon_sample.csv")
    spec = importlib.util.find_spec("aiconfigurator_core")
    if spec is None or spec.origin is None:
        print("install the tables first: pip install '.[calibration]'", file=sys.stderr)
        return 2
    package = Path(spec.origin).parent
    if parser.parse_args().silicon:
        _judge_silicon(package)
    else:
        _judge_published(package)
    return 0


def model_of(package: Path, name: str) -> ModelConfig:
    """The model of a configuration.

    Raises:
        SpecError: expertlane does not know its architecture.
    """
    path = package / "model_configs" / f"{name.replace('/', '--')}_config.json"
    return from_hf(json.loads(path.read_text(encoding="utf-8")), name)


def _projector(
    model: ModelConfig, layout: Layout, options: Options, skew: float = 0.0
) -> Projector:
    setting = Setting(
        NumberTypes.asked("float8"),
        Execution.GRAPH,
        PowerLawRouting.of(model, skew, num_sampled_layers=2),
        "float8",
    )
    cluster = ModelledCluster(read_profile("h100"), layout.world_size)
    return Projector(model, layout, options, cluster, setting)


def _judge_published(package: Path) -> None:
    model = model_of(package, "deepseek-ai/DeepSeek-V3")
    print(f"Source: {_BLOG}. Float8, two-batch overlap.\n")
    print("| setup | skew | published, tokens/s a node | projected | low | high | error |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for each in PUBLISHED:
        num_seqs = each.num_seqs * each.layout.world_size
        skew = model.usual_skew if each.is_routed else 0.0
        step = _projector(model, each.layout, each.options, skew).step(
            StepSize(num_seqs, each.num_new, each.num_cached)
        )
        scale = each.tokens_per_seq * _PER_NODE / each.layout.world_size
        low, tps, high = (scale * bound for bound in step.tps.bounds)
        print(
            f"| {each.name} | {skew:g} | {each.tps:,} | {tps:,.0f} | {low:,.0f} | "
            f"{high:,.0f} | {tps / each.tps - 1:+.0%} |"
        )


def _judge_silicon(package: Path) -> None:
    """Medians by model and mode; a row's batch is taken as that of one data-parallel rank."""
    errors: defaultdict[tuple[str, str, str], list[float]] = defaultdict(list)
    left_out: defaultdict[str, int] = defaultdict(int)
    with (package / "systems" / "silicon_sample.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["system"].startswith("h100")]
    for row in rows:
        try:
            model = model_of(package, row["model_path"])
        except (SpecError, OSError) as error:
            left_out[f"{row['model_path']}: {type(error).__name__}"] += 1
            continue
        if row["precision"] != "fp8":
            left_out[f"{row['model_path']}: {row['precision'] or 'no precision'}"] += 1
            continue
        for what, projected, measured in _of_row(model, row):
            errors[row["model_path"], row["mode"], what].append(projected / measured - 1)
    print("| model | mode | of | rows | median error | absolute | p90 |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: |")
    for (name, mode, what), found in sorted(errors.items()):
        size = np.abs(found)
        print(
            f"| {name} | {mode} | {what} | {len(found)} | {np.median(found):+.0%} | "
            f"{np.median(size):.0%} | {np.quantile(size, 0.9):.0%} |"
        )
    told = ", ".join(f"{count} of {name}" for name, count in sorted(left_out.items()))
    print(f"\nLeft out: {told}.")


def _of_row(model: ModelConfig, row: dict[str, str]) -> Iterator[tuple[str, float, float]]:
    """TPOT and TTFT, projected and measured, ms."""
    isl, osl = int(row["isl"]), int(row["osl"])
    prefix = {"agg": ("", ""), "disagg": ("prefill_", "decode_")}[row["mode"]]
    prefill = _step(model, row, prefix[0], StepSize(0, isl, 0))
    decode = _step(model, row, prefix[1], StepSize(0, 1, isl + osl // 2))
    if decode is not None and row["silicon_tpot_ms"]:
        step_s = decode.round_s.value
        if row["mode"] == "agg" and prefill is not None:
            # Others' prompts between the steps: each sequence's share of prefill a token.
            step_s += decode.num_tokens * isl / osl / prefill.tps.value
        yield "TPOT", 1e3 * step_s, float(row["silicon_tpot_ms"])
    if prefill is not None and row["silicon_ttft_ms"] and row["mode"] == "disagg":
        yield "TTFT", 1e3 * prefill.round_s.value, float(row["silicon_ttft_ms"])


def _step(
    model: ModelConfig, row: dict[str, str], prefix: str, size: StepSize
) -> StepsRecord | None:
    """None where the row's sizes are no layout of ours."""

    def number(name: str) -> int:
        return int(float(row[prefix + name] or 1))

    batch = number("batch_size")
    if prefix == "" and size.num_new > 1:
        batch = 1  # prompts come one by one as others end
    try:
        layout = Layout(
            pp=number("pp_size"),
            dp=number("attention_dp_size"),
            tp=number("tp_size"),
            ep=number("moe_ep_size"),
        )
        layout.check_model(model)
    except SpecError:
        return None
    spans = layout.stage_size > _PER_NODE
    form: DispatchForm = "all_gather"
    if spans and layout.ep > 1:
        form = "hierarchical" if size.num_new > 1 else "all_to_all"
    options = Options(dispatch=form)
    num_seqs = batch * layout.dp
    return _projector(model, layout, options).step(
        StepSize(num_seqs, size.num_new, size.num_cached)
    )


if __name__ == "__main__":
    sys.exit(main())
