"""Public end-to-end measurements, and the deployment that each was made on.

A row says model, hardware, framework, number type, layouts, lengths and concurrency, and what was
measured. Two kinds of files are read: InferenceX's results of DeepSeek-R1, which tell medians and
throughput, and aiconfigurator's list of measurements (`silicon_*.csv`, with its columns
`split_layout` and `split_concurrency`), which tells means and neither throughput nor drafts. What
they do not say is assumed here, the same for all rows of a benchmark:

- InferenceX draws lengths uniformly from 80 to 100 % of `isl` and `osl`: from the medians of
  latency, TTFT and TPOT follow outputs of 0.90 × `osl` (0.85 to 0.94 in nine rows of ten). Others
  have the lengths that they name.
- Requests come as others end (a closed loop of `conc`), ten times `conc` in all.
- Keys and values are float8 where public scripts say so (`Row.kv`), and else as the model computes.
- Clients of TensorRT-LLM see the tokens of 10, 20 or 100 steps at once, as rows without multi-token
  prediction show (ITL over TPOT); with it that ratio tells the tokens of a step.
- Where pools are apart, a rank decodes at most `Row.decode_seqs` requests at once. The file lacks
  the limit that each deployment was started with; its loads are mostly a little above it, and what
  has no place waits, in TTFT (docs/validation.md has how far this can be seen).
- `tp` ranks hold the attention of a request together, or with `dp_attention` one each; experts are
  cut in `ep`. Of rows in one pool, the file's numbers of GPUs are `tp` × `ep`: wrong, and not used.
"""

import csv
import importlib.util
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any

from expertlane.cost.laws.frameworks import usual_dispatch
from expertlane.cost.laws.profile import Profile
from expertlane.errors import SpecError
from expertlane.spec.deployment import Options, PayloadType
from expertlane.spec.from_hf import from_hf
from expertlane.spec.layout import Layout
from expertlane.spec.model import ModelConfig
from expertlane.spec.workload import LengthRange, Load

DEEPSEEK = "DeepSeek-R1"
_TYPES = {"bf16": "bfloat16", "fp8": "float8", "fp4": "nvfp4"}
_SHORTEST = 0.8  # of lengths, as a share of the longest
# Models of aiconfigurator's list, and DeepSeek-R1's by other names.
_NAMES = {
    "deepseek-ai/DeepSeek-V3": DEEPSEEK,
    "nvidia/DeepSeek-R1-NVFP4": DEEPSEEK,
    "nvidia/DeepSeek-V3.1-NVFP4": DEEPSEEK,
    "Qwen/Qwen3-235B-A22B-FP8": "Qwen3-235B",
    "Qwen/Qwen3.5-397B-A17B": "Qwen3.5-397B",
    "openai/gpt-oss-120b": "gpt-oss-120b",
    "MiniMaxAI/MiniMax-M2.5": "MiniMax-M2.5",
}
_PATHS = {name: path for path, name in _NAMES.items()}
_FRAMEWORKS = {
    ("trtllm", "agg"): "trt",
    ("trtllm", "disagg"): "dynamo-trt",
    ("sglang", "agg"): "sglang",
    ("sglang", "disagg"): "dynamo-sglang",
    ("vllm", "agg"): "vllm",
}
_LIMITS = (1, 3, 4, *(most << place for place in range(2, 12) for most in (2, 3)))

# Sizes are transformers' defaults of DeepseekV3Config; the keys below are as published.
_MODEL = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "max_position_embeddings": 163840,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
}


@cache
def model_of(name: str) -> ModelConfig:
    """A model of the files; all but DeepSeek-R1 as aiconfigurator-core brings its configuration.

    Raises:
        SpecError: expertlane does not know its architecture, or aiconfigurator-core is missing.
    """
    if name == DEEPSEEK:
        return from_hf(_MODEL, name)
    path = _PATHS.get(name, name)
    file = tables_package() / "model_configs" / f"{path.replace('/', '--')}_config.json"
    return from_hf(json.loads(file.read_text(encoding="utf-8")), path, weights=False)


def tables_package() -> Path:
    """Where aiconfigurator-core is installed.

    Raises:
        SpecError: it is not.
    """
    spec = importlib.util.find_spec("aiconfigurator_core")
    if spec is None or spec.origin is None:
        raise SpecError("install the tables first: pip install '.[calibration]'")
    return Path(spec.origin).parent


@dataclass(frozen=True)
class Workers:
    """Identical copies of one layout; `dp_attention` as the file has it."""

    tp: int
    ep: int
    dp_attention: bool
    num: int

    @property
    def layout(self) -> Layout:
        """Layout of all copies; with `dp_attention`, a request's attention is on one rank."""
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
        id: of the file, or the number of its line.
        version: of the framework; "" where the file does not say.
        prefill: None in one pool.
        date: of the measurement.
        has_means: TTFT and TPOT are means, and else medians.
        is_exact: whether lengths are `isl` and `osl`, and not drawn.
        output_tps: of a GPU that decodes; None where the file does not say, as `itl_s`.
    """

    id: str
    model: str
    version: str
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
    itl_s: float | None
    output_tps: float | None
    has_means: bool = False
    is_exact: bool = False

    @property
    def weights(self) -> str:
        """Their number type, as `NumberTypes.asked` takes it."""
        if self.model.startswith("gpt-oss"):
            return "mxfp4"
        return _TYPES[self.precision]

    @property
    def kv(self) -> str:
        """Number type of keys and values."""
        has_float8 = self.framework in ("trt", "dynamo-trt") or self.model == DEEPSEEK
        has_float8 |= self.model.startswith("MiniMax") and self.hardware != "h200"
        is_left = self.framework == "sglang" and self.hardware == "h200"  # at the model's
        return "float8" if has_float8 and not (self.is_exact or is_left) else "bfloat16"

    @property
    def configuration(self) -> tuple[Any, ...]:
        """All but the load, the framework's version and the day."""
        return (*self.kind, self.prefill, self.decode, *self.lengths)

    @property
    def point(self) -> tuple[Any, ...]:
        """All but the day: rows with the same are repeats."""
        return (*self.configuration, self.version, self.conc)

    @property
    def lengths(self) -> tuple[int, int]:
        """Of prompts and outputs."""
        return self.isl, self.osl

    @property
    def kind(self) -> tuple[str, str, str, str, bool, bool]:
        """What errors are grouped by: model, card, weights, framework, pools, drafts."""
        return (
            self.model,
            self.hardware,
            self.weights,
            self.framework,
            self.prefill is not None,
            self.is_speculative,
        )

    @property
    def num_devices(self) -> int:
        """GPUs of all pools."""
        pools = [self.decode] if self.prefill is None else [self.prefill, self.decode]
        return sum(each.layout.world_size for each in pools)

    @property
    def most_ranks(self) -> int:
        """GPUs of a replica of the larger pool."""
        pools = filter(None, (self.decode, self.prefill))
        return max(each.layout.replica_size for each in pools)

    @property
    def load(self) -> Load:
        """The benchmark's closed loop: lengths, and `conc` requests at a time."""
        shortest = 1.0 if self.is_exact else _SHORTEST
        ends = (LengthRange(round(shortest * each), each) for each in self.lengths)
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
    def step_tokens(self) -> int | None:
        """Token budget of a rank's step, where a public script names it."""
        if self.is_exact or self.prefill is not None or self.model != DEEPSEEK:
            return None
        if self.framework == "sglang" and self.weights == "float8":
            return 32768
        return None

    @property
    def tokens_seen(self) -> float | None:
        """Output tokens per step with multi-token prediction, as clients saw them, if known."""
        if not self.is_speculative or self.framework not in ("trt", "dynamo-trt"):
            return None
        assert self.itl_s is not None, "InferenceX tells it"
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
        form, first = usual_dispatch(self.decode.layout, profile), None
        if self.prefill is not None:
            first = usual_dispatch(self.prefill.layout, profile)
        payload: PayloadType = "float8" if "all_to_all" in (form, first) else "model"
        return Options(dispatch=form, prefill_dispatch=first, payload=payload)


def read_rows(paths: Sequence[Path]) -> tuple[list[Row], list[Row]]:
    """Rows to judge, and those of layouts that no deployment can have.

    A measurement that both kinds of files have is read once, from InferenceX's.
    """
    rows: list[Row] = []
    for path in sorted(paths, key=_is_list):
        with path.open(encoding="utf-8") as file:
            read = [
                _of_list(fields) if "split_layout" in fields else _of_inferencex(line, fields)
                for line, fields in enumerate(csv.DictReader(file), 2)
            ]
        known = {(each.date, *each.configuration, each.conc) for each in rows}
        rows += [
            each
            for each in read
            if not each.has_means or (each.date, *each.configuration, each.conc) not in known
        ]
    known_rows = [row for row in rows if _is_known(row)]
    return known_rows, [row for row in rows if not _is_known(row)]


def _is_list(path: Path) -> bool:
    with path.open(encoding="utf-8") as file:
        return "split_layout" in file.readline()


def _of_inferencex(line: int, fields: dict[str, str]) -> Row:
    def workers(role: str) -> Workers:
        return Workers(
            int(fields[f"{role}_tp"]),
            int(fields[f"{role}_ep"]),
            fields[f"{role}_dp_attention"] == "True",
            int(fields[f"{role}_num_workers"]) or 1,
        )

    return Row(
        id=f"line {line}",
        model=DEEPSEEK,
        version="",
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
        output_tps=float(fields["output_tput_per_gpu"]),
    )


def _of_list(fields: dict[str, str]) -> Row:
    source = fields["silicon_data_source"]
    date = re.search(r"measured=(\d{4}-\d{2}-\d{2})", source)
    *prefill, decode = _workers(fields["split_layout"])
    return Row(
        id=fields["id"],
        model=_NAMES[fields["model_path"]],
        version=fields["backend_version"],
        hardware=fields["system"].removesuffix("_sxm"),
        framework=_FRAMEWORKS[fields["backend"], fields["mode"]],
        precision=fields["precision"],
        is_speculative=False,
        prefill=prefill[0] if prefill else None,
        decode=decode,
        isl=int(fields["isl"]),
        osl=int(fields["osl"]),
        conc=int(fields["split_concurrency"]),
        date=date[1] if date else "",
        ttft_s=float(fields["silicon_ttft_ms"]) / 1e3,
        tpot_s=float(fields["silicon_tpot_ms"]) / 1e3,
        itl_s=None,
        output_tps=None,
        has_means=True,
        is_exact="gap-analysis/data" in source,
    )


def _workers(layout: str) -> Iterator[Workers]:
    """Of `tp=8,dp=1,ep=8`, or of workers, TP, DP and EP of two pools, `1/1/4/4/2/1/8/8`."""
    if "=" in layout:
        of_all = [dict(each.split("=") for each in layout.split(","))]
        pools = [[1, *(int(each[axis]) for axis in ("tp", "dp", "ep"))] for each in of_all]
    else:
        sizes = [int(each) for each in layout.split("/")]
        pools = [sizes[:4], sizes[4:]]
    for num, tp, dp, ep in pools:
        yield Workers(max(tp, dp), ep, dp > 1, num)


def _is_known(row: Row) -> bool:
    """False if `tp` is no power of two: of two-pool rows that give all GPUs as `tp`."""
    return row.decode.tp & (row.decode.tp - 1) == 0
