"""Judge whole mixers by modules that aiconfigurator-core timed, to which no law is fitted.

python calibration/judge_mixers.py CARD…     all cards with such tables by default

A module of sparse attention is all from a layer's norm to its output projection, with its indexer,
of one rank of `tp_size`, by SGLang: of DeepSeek-V3.2 and GLM-5, and of compressed attention of
DeepSeek-V4 without its residual streams; weights in float8. Its collectives are not in the tables,
so they are left out of ours. Modules that wait for their host are left out
too: of prompts, which ran eagerly, those of under 4,096 tokens or of over 16 sequences; of single
tokens those of over 256 sequences. Prints Markdown; errors are measured over projected, less one.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from sheet import CARDS, Card, Generation
from tables import Columns, MissingTablesError, Part, Table, read

from expertlane.cost.laws.device import DeviceModel
from expertlane.cost.laws.profile import read_profile
from expertlane.cost.pricing import law_dtype
from expertlane.cost.step.attention import mixer_steps
from expertlane.cost.step.batch_sizes import PartSizes
from expertlane.cost.step.counts import StageMesh
from expertlane.cost.step.operation import NumberTypes, Operation
from expertlane.cost.step.step_list import GPU_LIBRARIES, StepList
from expertlane.spec.from_hf import from_hf
from expertlane.spec.layout import Layout
from expertlane.spec.mixers import Mixing
from expertlane.spec.model import ModelConfig


class Module(NamedTuple):
    """A kind of modules of a table.

    Attributes:
        path: the model in the table.
        name: the model in `_CONFIGS`.
        prefix: of the table's name.
        caches: types of the cache, in the table and here.
    """

    path: str
    name: str
    prefix: str = "dsa"
    mixing: Mixing = Mixing()
    caches: tuple[tuple[str, str], ...] = (("bfloat16", "bfloat16"), ("fp8", "float8"))


_MODULES = (
    Module("deepseek-ai/DeepSeek-V3.2", "deepseek-v3.2"),
    Module("zai-org/GLM-5-FP8", "glm-5"),
    *(
        Module(f"sgl-project/DeepSeek-V4-{size}-FP8", f"deepseek-v4-{size.lower()}", *kind)
        for size in ("Flash", "Pro")
        for kind in (
            ("dsv4_csa", Mixing("attention", 128, "chosen"), (("fp8_e4m3", "float8"),)),
            ("dsv4_hca", Mixing("attention", 128, "all"), (("fp8_e4m3", "float8"),)),
        )
    ),
)
_CONFIGS = Path(__file__).parents[1] / "tests" / "spec" / "published_mixers.json"
_LEAST_TOKENS = {"context": 4096, "generation": 1}
_MOST_SEQS = {"context": 16, "generation": 256}
_MOST_ROWS = 400  # of a table's kind, drawn evenly


def main() -> int:
    """Price every module, and compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    known = [name for name, card in CARDS.items() if _has_modules(card)]
    parser.add_argument("cards", nargs="*", choices=[[], *known], metavar="CARD")
    asked = parser.parse_args()
    configs = json.loads(_CONFIGS.read_text(encoding="utf-8"))
    print("| card | phase | model | cache | rows | median | median size | p90 | inside |")
    print("| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: |")
    try:
        for name in asked.cards or known:
            for module in _MODULES:
                model = from_hf(configs[module.name], module.name, weights=False)
                for line in _lines(name, module, model.with_overrides(num_streams=1)):
                    print(line, flush=True)
    except MissingTablesError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _has_modules(card: Card) -> bool:
    return card.generation in (Generation.HOPPER, Generation.BLACKWELL)


def _lines(card: str, module: Module, model: ModelConfig) -> Iterator[str]:
    device = DeviceModel(read_profile(card))
    for phase in ("context", "generation"):
        for cache, kv in module.caches:
            columns = _rows(card, phase, module, cache)
            if not len(columns["seconds"]):
                continue
            bounds = np.array(
                [_priced(device, model, module.mixing, kv, each) for each in _each(columns)]
            ).T
            ratio = columns["seconds"] / bounds[1]
            sizes = np.abs(ratio - 1)
            inside = (columns["seconds"] >= bounds[0]) & (columns["seconds"] <= bounds[2])
            numbers = np.median(ratio) - 1, np.median(sizes), np.percentile(sizes, 90)
            shown = f"{numbers[0]:+.0%} | {numbers[1]:.0%} | {numbers[2]:.0%} | {inside.mean():.0%}"
            entries = f", {module.mixing.entries} entries" if module.mixing.entries else ""
            yield f"| {card} | {phase} | {model.name}{entries} | {kv} | {len(ratio)} | {shown} |"


def _rows(card: str, phase: str, module: Module, cache: str) -> Columns:
    """Some rows of a table, with seconds; contexts of at most 128 ki positions."""
    where = {
        "model": module.path,
        "op_name": f"{module.prefix}_{phase}_module",
        "gemm_type": "fp8_block",
        "kv_cache_dtype": cache,
    }
    table = f"{module.prefix}_{phase}_module_perf.parquet"
    file = f"{CARDS[card].folder}/sparse_attention/sglang/0.5.14/{table}"
    columns = read(Table(file, where, lambda c: np.zeros(len(c["step"]))), Part.FITTED)
    tokens = columns["batch_size"] * columns["isl"]
    keep = (tokens >= _LEAST_TOKENS[phase]) & (columns["step"] <= 2**17)
    keep &= columns["batch_size"] <= _MOST_SEQS[phase]
    chosen = np.flatnonzero(keep)
    chosen = chosen[np.linspace(0, len(chosen) - 1, min(len(chosen), _MOST_ROWS)).astype(int)]
    return {name: values[chosen] for name, values in columns.items()}


def _each(columns: Columns) -> Iterator[dict[str, int]]:
    names = ("batch_size", "isl", "step", "tp_size")
    for values in zip(*(columns[name].astype(int).tolist() for name in names), strict=True):
        yield dict(zip(names, values, strict=True))


def _priced(
    device: DeviceModel, model: ModelConfig, mixing: Mixing, kv: str, row: dict[str, int]
) -> list[float]:
    """Seconds of a module, low, likely and high."""
    types = NumberTypes("float8", "bfloat16", kv)
    mesh = StageMesh.of(Layout(tp=row["tp_size"]), 0, 0, 8)
    out = StepList(mesh, types, "all_gather", GPU_LIBRARIES)
    ranks = row["tp_size"]
    sizes = PartSizes.even(1, ranks, row["batch_size"], row["isl"], row["step"])
    mixer_steps(out, model, mixing, sizes)
    total = np.zeros(3)
    for step in out.steps:
        if isinstance(step, Operation):
            total += device.times(step.kind, law_dtype(types, step), step.sizes).bounds[..., 0]
    return [float(each) for each in total]


if __name__ == "__main__":
    sys.exit(main())
