"""Public end-to-end measurements of DeepSeek-R1, and the deployment that each was made on.

A row of the file says hardware, framework, number type, layouts, lengths and concurrency, and what
was measured. What it does not say is assumed here, the same for all rows:

- Lengths are drawn uniformly from 80 to 100 % of `isl` and `osl`: from the medians of latency, TTFT
  and TPOT follow outputs of 0.90 × `osl` (0.85 to 0.94 in nine rows of ten).
- Keys and values are float8; requests come as others end (a closed loop of `conc`).
- Clients of TensorRT-LLM see the tokens of 10, 20 or 100 steps at once, as rows without multi-token
  prediction show (ITL over TPOT); with it that ratio tells the tokens of a step.
- Where pools are apart, a rank decodes at most `Row.decode_seqs` requests at once. The file lacks
  the limit that each deployment was started with; its loads are mostly a little above it, and what
  has no place waits, in TTFT (docs/validation.md has how far this can be seen).
- `tp` ranks hold the attention of a request together, or with `dp_attention` one each; experts are
  cut in `ep`. Of rows in one pool, the file's numbers of GPUs are `tp` × `ep`: wrong, and not used.
"""

import csv
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from expertlane.cost.laws.profile import Profile
from expertlane.spec.deployment import Options
from expertlane.spec.dispatch import DispatchForm
from expertlane.spec.from_hf import from_hf
from expertlane.spec.layout import Layout
from expertlane.spec.model import ModelConfig
from expertlane.spec.workload import LengthRange, Load

TYPES = {"fp8": "float8", "fp4": "nvfp4"}
_SHORTEST = 0.8  # of lengths, as a share of the longest
_LIMITS = (1, 3, 4, *(most << place for place in range(2, 12) for most in (2, 3)))

# Sizes that transformers gives a DeepseekV3Config are the model's; these two it leaves out.
_MODEL = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "max_position_embeddings": 163840,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
}


def model() -> ModelConfig:
    """DeepSeek-R1, of DeepSeek-V3's sizes."""
    return from_hf(_MODEL, "DeepSeek-R1")


@dataclass(frozen=True)
class Workers:
    """Alike copies of one layout; `dp_attention` as the file has it."""

    tp: int
    ep: int
    dp_attention: bool
    num: int

    @property
    def layout(self) -> Layout:
        """Attention by tensor parallelism, or a request's on one rank."""
        if self.dp_attention:
            return Layout(replicas=self.num, dp=self.tp, ep=self.ep)
        return Layout(replicas=self.num, tp=self.tp, ep=self.ep)

    def __str__(self) -> str:
        attention = "DP" if self.dp_attention else "TP"
        return f"{self.num} × {attention}{self.tp} EP{self.ep}"


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        prefill: None in one pool.
        ttft_s, tpot_s, itl_s: medians.
        tps_per_gpu: of inputs and outputs together, of all devices.
        output_tps: of a GPU that decodes.
    """

    hardware: str
    framework: str
    precision: str
    is_speculative: bool
    prefill: Workers | None
    decode: Workers
    isl: int
    osl: int
    conc: int
    date: str
    ttft_s: float
    tpot_s: float
    itl_s: float
    tps_per_gpu: float
    output_tps: float

    @property
    def configuration(self) -> tuple[Any, ...]:
        """Hardware, layout, number type and the like: all but the load and the day."""
        return (
            self.hardware,
            self.framework,
            self.precision,
            self.is_speculative,
            self.prefill,
            self.decode,
        )

    @property
    def point(self) -> tuple[Any, ...]:
        """All but the day: rows with the same are repeats."""
        return (*self.configuration, *self.lengths, self.conc)

    @property
    def lengths(self) -> tuple[int, int]:
        """Of prompts and outputs."""
        return self.isl, self.osl

    @property
    def group(self) -> tuple[str, str, str, str, str]:
        """What errors are told by."""
        return (
            self.hardware,
            self.framework,
            self.precision,
            "aggregated" if self.prefill is None else "disaggregated",
            "MTP" if self.is_speculative else "",
        )

    @property
    def num_devices(self) -> int:
        """GPUs of all pools."""
        pools = [self.decode] if self.prefill is None else [self.prefill, self.decode]
        return sum(each.layout.world_size for each in pools)

    @property
    def load(self) -> Load:
        """Requests kept unfinished."""
        ends = (LengthRange(round(_SHORTEST * each), each) for each in self.lengths)
        return Load(self.conc, *ends, batch=self.conc)

    @property
    def decode_seqs(self) -> int:
        """Requests that a rank of the pool for decoding has at once, at most; 0 in one pool.

        The largest of 1, 3, 4, 8, 12, 16, 24 ... that the load does not fall short of: powers of
        two and three times them, without 2 and 6, since of rows to fit to with so many requests on
        a rank most have room for 1 and 4. No benchmark is taken to keep more than twice as many.
        """
        if self.prefill is None:
            return 0
        layout = self.decode.layout
        of_rank = self.conc / (layout.replicas * layout.dp)
        most = max(each for each in _LIMITS if each <= max(of_rank, 1))
        return most if of_rank <= 2 * most else ceil(of_rank)

    @property
    def tokens_seen(self) -> float | None:
        """Of a step with multi-token prediction; None where it cannot be told."""
        if not self.is_speculative or self.framework not in ("trt", "dynamo-trt"):
            return None
        ratio = self.itl_s / self.tpot_s
        if self.framework == "trt":
            return ratio / 10
        return ratio / (100 if ratio > 100 else 20)

    @property
    def num_drafts(self) -> int:
        """Tokens guessed in a step: three as is usual, or one where no more than two are seen."""
        if not self.is_speculative:
            return 0
        return 1 if self.tokens_seen is not None and self.tokens_seen <= 2 else 3

    def options(self, profile: Profile) -> Options:
        """How tokens get to experts: not in the file, so what the frameworks do by default."""
        form: DispatchForm = "all_gather"
        stage = max(each.layout.stage_size for each in (self.decode, self.prefill or self.decode))
        has_multi_node_nvlink = profile.ranks_per_node > 8
        if self.decode.dp_attention and (has_multi_node_nvlink or stage > profile.ranks_per_node):
            form = "all_to_all"
        return Options(dispatch=form, payload="float8" if form == "all_to_all" else "model")


def read_rows(path: Path) -> tuple[list[Row], list[Row]]:
    """Rows to judge, and those of layouts that no deployment can have."""
    with path.open(encoding="utf-8") as file:
        rows = [_row(fields) for fields in csv.DictReader(file)]
    known = [row for row in rows if _is_known(row)]
    return known, [row for row in rows if not _is_known(row)]


def _row(fields: dict[str, str]) -> Row:
    def workers(role: str) -> Workers:
        return Workers(
            int(fields[f"{role}_tp"]),
            int(fields[f"{role}_ep"]),
            fields[f"{role}_dp_attention"] == "True",
            int(fields[f"{role}_num_workers"]) or 1,
        )

    return Row(
        hardware=fields["hardware"],
        framework=fields["framework"],
        precision=fields["precision"],
        is_speculative=fields["spec_method"] != "none",
        prefill=workers("prefill") if fields["disagg"] == "True" else None,
        decode=workers("decode"),
        isl=int(fields["isl"]),
        osl=int(fields["osl"]),
        conc=int(fields["conc"]),
        date=fields["date"],
        ttft_s=float(fields["median_ttft"]),
        tpot_s=float(fields["median_tpot"]),
        itl_s=float(fields["median_itl"]),
        tps_per_gpu=float(fields["tput_per_gpu"]),
        output_tps=float(fields["output_tput_per_gpu"]),
    )


def _is_known(row: Row) -> bool:
    """A few rows have two pools of no workers: their `tp` is all GPUs together."""
    return row.decode.tp & (row.decode.tp - 1) == 0
