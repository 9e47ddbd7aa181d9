"""A row of a plan or a projected comparison, read from its results to be simulated again."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expertlane.cost.throughput import Goals
from expertlane.errors import UserError, naming
from expertlane.results import file
from expertlane.results.record import (
    BEST,
    DECODE_POOL,
    EXPERIMENT,
    PREFILL_POOL,
    TWO_POOLS,
    DeploymentRecord,
)
from expertlane.results.results import Results
from expertlane.spec.deployment import Options
from expertlane.spec.experiment import ProjectionSetup
from expertlane.spec.files import build
from expertlane.spec.model import ModelConfig
from expertlane.spec.ranges import shown
from expertlane.spec.workload import SLO

POOLS = "pools"
_CHOSEN = "chosen"  # the recommendation of a plan; the first row of a comparison
# Options that exclude each other: one that is given removes a row's values of the others.
_LENGTHS = "prompt_len", "output_len"
_SHARED = "prefix_len", "num_prefixes"
_INSTEAD: dict[str, tuple[str, ...]] = {
    **dict.fromkeys((*_LENGTHS, *_SHARED), ("requests",)),
    "requests": (*_LENGTHS, *_SHARED),
    "batch": ("rate",),
    "rate": ("batch",),
    "skew": ("routing_trace",),
    "routing_trace": ("skew",),
    "mtp": ("mtp_acceptance",),
}


@dataclass(frozen=True)
class Row:
    """A deployment and its load.

    Attributes:
        options: of the pool that decodes, where two serve.
        slos: limits asked for.
        cautions: cautions about the model for a reader, in sentences.
        all_run: whether all requests that were asked for ran at once.
        simulated_by: options of `simulate`, by name, that serve it again.
    """

    model: ModelConfig
    options: Options
    prefill_options: Options | None
    slos: tuple[SLO, ...]
    cautions: tuple[str, ...]
    all_run: bool
    simulated_by: Mapping[str, Any]

    def values(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """`simulated_by` beside options with other values, and without those that they exclude."""
        left_out = {*given, *(other for name in given for other in _INSTEAD.get(name, ()))}
        if self.all_run and {"batch", "rate"} & set(given):
            left_out.add("max_num_seqs")  # it is no limit
        return {name: each for name, each in self.simulated_by.items() if name not in left_out}


def find_row(text: str) -> Row:
    """Read `results.json#2`, a row of the results of a plan or a projected comparison.

    After `#` stands the row's number, `pools` for disaggregated ones, or the name of an engine for
    the best that it runs; without, what the plan recommends, or a comparison's first row.

    Raises:
        UserError: the file cannot be read or is of another kind, or it has no such row.
    """
    name, row = _split(text)
    results = file.read(Path(name))
    with naming(name):
        return _row(results, row)


def _split(text: str) -> tuple[str, str]:
    name, mark, row = text.rpartition("#")
    if not mark or os.path.exists(text) or not name:
        return text, _CHOSEN
    return name, row


def _row(results: Results, row: str) -> Row:
    question = results.question
    if results.kind == "plan":
        record, prefill, decode = _of_plan(results, row)
        model, workload = question["model"], question["workload"]
    elif results.kind == "comparison" and results.select("projected", EXPERIMENT):
        record, prefill, decode = _of_comparison(results, row), None, None
        model, workload = (question["experiment"][name] for name in ("model", "workload"))
    else:
        raise UserError(
            f"it has results of a {results.kind} without projected rows; --plan takes those of "
            "plan or compare --project"
        )
    asked = question.get("projection")
    if asked is None or record.conditions is None:
        raise UserError("it lacks the options of its projection; repeat the command that wrote it")
    decoding, conditions = decode or record, record.conditions
    running = decoding.serving[0].num_running
    if running is None:
        raise UserError(f"row {row} lacks the number of sequences that run at once")
    asked = build(ProjectionSetup, asked, "question.projection")
    load, layout = question.get("load") or {}, record.known_layout
    options = decoding.served_with or decoding.known_options
    rate, num_asked = load.get("rate"), workload["num_sequences"]
    batch = running if decode is None else record.serving[0].num_running or running
    if (path := load.get("requests")) is not None:
        lengths: dict[str, Any] = {"requests": Path(path)}
    else:
        lengths = {name: str(load.get(name, workload[name])) for name in _LENGTHS}
        lengths |= {name: load[name] for name in _SHARED if name in load}
    simulated_by = {
        "layout": str(layout),
        "prefill_layout": None if record.prefill_layout is None else str(record.prefill_layout),
        "cluster": asked.cluster,
        "overlap": "on" if options.overlap else "off",
        "num_micro_batches": options.num_micro_batches,
        "micro_batch_schedule": options.micro_batch_schedule,
        "dispatch": options.dispatch,
        "prefill_dispatch": options.prefill_dispatch,
        "payload": options.payload,
        "placement": options.placement_file or _method(options),
        "num_redundant_experts": options.num_redundant_experts,
        "batch": str(batch) if rate is None else None,
        "rate": None if rate is None else f"{rate:g}",
        **lengths,
        "seed": workload.get("seed", 0),
        "skew": asked.skew,
        "routing_trace": None if asked.routing_trace is None else Path(asked.routing_trace),
        "dtype": conditions.dtype,
        "kv_dtype": conditions.kv_dtype,
        "execution": asked.execution,
        "framework": asked.framework,
        "corrections": None if asked.corrections is None else Path(asked.corrections),
        "mtp": decoding.num_drafts,
        "mtp_acceptance": asked.mtp_acceptance if decoding.num_drafts else None,
        "max_num_seqs": layout.places_of_rank(running, None if rate is not None else num_asked),
        "price": question.get("price"),
    }
    return Row(
        build(ModelConfig, model, "question.model"),
        options,
        None if prefill is None else prefill.known_options,
        _limits(question),
        results.cautions,
        running >= num_asked,
        simulated_by,
    )


def _method(options: Options) -> str:
    """Placement option; experts that move while requests run count as placed by load."""
    return "load" if options.is_by_load else options.placement


_Parts = tuple[DeploymentRecord, DeploymentRecord | None, DeploymentRecord | None]


def _of_plan(results: Results, row: str) -> _Parts:
    """A row's record; for disaggregated pools also those of prefill and of decode."""
    if row == _CHOSEN:
        row = "1" if results.faster_pools is None else POOLS
    if row == POOLS:
        pools = [
            each
            for role in (TWO_POOLS, PREFILL_POOL, DECODE_POOL)
            for each in results.select("projected", role)
        ]
        if not pools:
            raise UserError("the plan has no disaggregated pools")
        return _three(pools)
    engines = {each.engine: each for each in results.plans[0].engines}
    if (engine := next((each for name, each in engines.items() if name == row), None)) is not None:
        if engine.best is None:
            raise UserError(f"{engine.title} runs no deployment that meets the limits")
        return _three(engine.pools) if engine.pools else (engine.best, None, None)
    words = [*([POOLS] if results.select("projected", TWO_POOLS) else []), *engines]
    return _numbered(results.select("projected", BEST), row, words), None, None


def _three(pools: Sequence[DeploymentRecord]) -> _Parts:
    together, prefill, decode = pools
    return together, prefill, decode


def _of_comparison(results: Results, row: str) -> DeploymentRecord:
    usual, row = results.conditions[0], "1" if row == _CHOSEN else row
    record = _numbered(results.select("projected", EXPERIMENT, usual), row, [])
    if not record.serving:
        raise UserError(f"{record.name!r} does not fit, so it was not simulated")
    return record


def _numbered(rows: Sequence[DeploymentRecord], row: str, words: Sequence[str]) -> DeploymentRecord:
    number = int(row) if row.isascii() and row.isdigit() and len(row) < 10 else 0
    if not 1 <= number <= len(rows):
        numbers = f"#1 to #{len(rows)}" if len(rows) > 1 else "#1"
        valid = ", ".join([numbers, *(f"#{word}" for word in words)])
        raise UserError(f"there is no row {shown(row)}; valid: {valid}")
    return rows[number - 1]


def _limits(question: Mapping[str, Any]) -> tuple[SLO, ...]:
    """Limits that a plan was made for; empty for a comparison."""
    slos = tuple(build(SLO, each, "question.slos") for each in question.get("slos", ()))
    return Goals(question.get("max_tpot_s"), question.get("max_ttft_s"), slos).all
