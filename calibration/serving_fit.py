"""Overheads of each framework: fitted to half of the configurations, a few numbers a framework."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import serving_rows
import tomli_w
from serving_rows import Row
from serving_simulation import Projected

from expertlane.cost.laws.execution import ARRIVAL_S, DRIVER_S, LIKELY
from expertlane.cost.laws.frameworks import Framework, JudgedGroup, sizes_of
from expertlane.cost.laws.profile import Term
from expertlane.cost.laws.times import Basis

TITLES = {
    "trt": "TensorRT-LLM",
    "dynamo-trt": "Dynamo with TensorRT-LLM",
    "sglang": "SGLang",
    "dynamo-sglang": "Dynamo with SGLang",
    "vllm": "vLLM",
}
# Assumed, not fitted; vLLM has the default budget of a server on cards of 70 GiB and more.
_CHUNKS = {
    "trt": 8192,
    "dynamo-trt": 8192,
    "sglang": 16384,
    "dynamo-sglang": 16384,
    "vllm": 8192,
}
# TensorRT-LLM's with attention data parallelism: `timeout_iters` of the public scripts that started
# the servers.
_WAITS = {"trt": 60}
_FEW_OPEN = 64  # requests
_SEED = 18
_SAMPLES = np.concatenate([np.arange(0.0, 0.02, 1e-4), np.arange(0.02, 1.0, 5e-3)])
_INNER = (0.25, 0.75)  # quantiles of what single rows ask for: the bounds of a term
# What was measured, what the model says, and how often the time adds to that.
_Asked = tuple[float, float, float]
_ORIGIN = "calibration/judge_serving.py: half of the configurations of DeepSeek-R1"


@dataclass(frozen=True)
class Sides:
    """Rows to fit to, and rows to judge by."""

    fitted: list[Row]
    judged: list[Row]

    @classmethod
    def drawn(cls, rows: Sequence[Row]) -> "Sides":
        """Every second configuration of each group, in a drawn order: all its rows go together."""
        by_group: defaultdict[Any, set[Any]] = defaultdict(set)
        for row in rows:
            by_group[row.group].add(row.configuration)
        rng, chosen, place = np.random.default_rng(_SEED), set(), 0
        for _, found in sorted(by_group.items()):
            for each in rng.permutation(len(found)):
                if place % 2 == 0:
                    chosen.add(sorted(found, key=str)[each])
                place += 1
        return cls(
            [row for row in rows if row.configuration in chosen],
            [row for row in rows if row.configuration not in chosen],
        )


def unfitted(name: str) -> Framework:
    """A framework whose hosts take no time."""
    return _framework(name, {DRIVER_S: (0.0, 0.0, 0.0), ARRIVAL_S: (0.0, 0.0, 0.0)})


def _framework(name: str, terms: Mapping[str, tuple[float, float, float]]) -> Framework:
    known = {
        term: Term(value, low, high, Basis.FITTED, _ORIGIN)
        for term, (low, value, high) in terms.items()
    }
    fitted_to = sizes_of(serving_rows.model_of(serving_rows.DEEPSEEK))
    return Framework(name, TITLES[name], _CHUNKS[name], _WAITS.get(name, 0), known, fitted_to)


def acceptances(rows: Sequence[Row]) -> dict[tuple[str, int, int], float]:
    """How often a draft is right, by framework, drafts and output length, from rows to fit to.

    SGLang's rows do not tell; its drafts are taken to be as good as TensorRT-LLM's.
    """
    seen: defaultdict[tuple[str, int, int], list[float]] = defaultdict(list)
    for row in rows:
        if row.tokens_seen is not None and row.tokens_seen > 1:
            seen[row.framework, row.num_drafts, row.osl].append(row.tokens_seen)
    found = {key: _acceptance(float(np.median(each)), key[1]) for key, each in seen.items()}
    for (name, drafts, osl), value in list(found.items()):
        if name == "trt":
            found["sglang", drafts, osl] = value
    return found


def acceptance_of(row: Row, known: Mapping[tuple[str, int, int], float]) -> float:
    """Of a row's kind, or of the nearest kind that was seen."""
    if not row.is_speculative:
        return 0.0

    def distance(key: tuple[str, int, int]) -> tuple[bool, bool, bool]:
        return key[1] != row.num_drafts, key[2] != row.osl, key[0] != row.framework

    return known[min(sorted(known), key=distance)]


def _acceptance(tokens: float, num_drafts: int) -> float:
    """The probability with which so many drafts give so many tokens a step."""
    grid = np.linspace(0.0, 1.0, 1001)
    given = sum(grid**place for place in range(num_drafts + 1))
    return float(grid[np.abs(given - tokens).argmin()])


def fit(base: Sequence[tuple[Row, Projected]]) -> dict[str, Framework]:
    """The overheads of each framework.

    A step's host time adds to TPOT as many times as there are steps to a token. Its bounds come
    from the half of the points with the shorter TPOT: it is the same whatever a step computes, and
    what long steps lack is mostly for bounds of the laws. What a request takes to arrive adds to
    TTFT where hardly any waits for others. Repeats of a point count once.

    Args:
        base: rows to fit to, with what the model says where hosts take no time.
    """
    found = {}
    for name in TITLES:
        own = _points([each for each in base if each[0].framework == name])
        steps = sorted((row.tpot_s, each.tpot_s[LIKELY], each.steps_per_token) for row, each in own)
        host = _nearest(steps, steps[: -(-len(steps) // 2)])
        alone = [each for each in own if _is_prompt_alone(each[0])]
        arrival = _nearest(
            [(row.ttft_s, each.ttft_s[LIKELY] + host[1], 1.0) for row, each in alone or own]
        )
        found[name] = _framework(name, {DRIVER_S: host, ARRIVAL_S: arrival})
    return found


def _points(pairs: Sequence[tuple[Row, Projected]]) -> list[tuple[Row, Projected]]:
    """Repeats of a point taken together, by the medians of what was measured."""
    same: defaultdict[Any, list[tuple[Row, Projected]]] = defaultdict(list)
    for row, each in pairs:
        same[row.point].append((row, each))
    found = []
    for repeats in same.values():
        row, each = repeats[0]
        tpot_s = float(np.median([other.tpot_s for other, _ in repeats]))
        ttft_s = float(np.median([other.ttft_s for other, _ in repeats]))
        found.append((replace(row, tpot_s=tpot_s, ttft_s=ttft_s), each))
    return found


def _is_prompt_alone(row: Row) -> bool:
    """Whether a prompt hardly waits: few requests, each with a place, none awaits other ranks'."""
    if row.prefill is None:
        return row.conc <= _FEW_OPEN and not row.decode.dp_attention
    layout = row.decode.layout
    return row.conc <= min(_FEW_OPEN, row.decode_seqs * layout.dp * layout.replicas)


def with_overheads(row: Row, base: Projected, framework: Framework) -> Projected:
    """What the model says where hosts take a framework's time.

    Added to what was simulated without: nothing hides the time between two steps, so it comes once
    a step. In a closed loop of so many requests throughput falls as latency grows.
    """
    host, arrival = (
        np.array([law.low, law.value, law.high])
        for law in (framework.terms[DRIVER_S], framework.terms[ARRIVAL_S])
    )
    before_s, first_s = np.array(base.tpot_s), np.array(base.ttft_s)
    tpot_s = before_s + base.steps_per_token * host
    ttft_s = first_s + arrival + host
    num_after = row.load.mean_lens[1] - 1
    longer = (ttft_s + num_after * tpot_s) / (first_s + num_after * before_s)
    low, likely, high = np.array(base.output_tps) / longer[::-1]
    return replace(
        base,
        tpot_s=tuple(tpot_s.tolist()),
        ttft_s=tuple(ttft_s.tolist()),
        output_tps=(float(low), float(likely), float(high)),
    )


def _nearest(
    asked: Sequence[_Asked], for_bounds: Sequence[_Asked] | None = None
) -> tuple[float, float, float]:
    """Low, likely and high of a time whose likely value makes the median error least.

    Args:
        for_bounds: those whose quartiles are the bounds; all where left out.
    """
    if not asked:
        return 0.0, 0.0, 0.0
    measured, likely, times = np.array(asked).T
    off = np.abs(np.log((likely + _SAMPLES[:, None] * times) / measured))
    value = float(_SAMPLES[np.median(off, axis=1).argmin()])
    measured, likely, times = np.array(for_bounds or asked).T
    lacking = np.maximum((measured - likely) / times, 0.0)
    low, high = (float(np.quantile(lacking, share)) for share in _INNER)
    return min(low, value), value, max(high, value)


def write(frameworks: Mapping[str, Framework], judged: Sequence[JudgedGroup], path: Path) -> None:
    """The file that expertlane reads."""
    tables = {
        each.name: {
            "title": each.title,
            "max_num_batched_tokens": each.max_num_batched_tokens,
            "prompt_wait_steps": each.prompt_wait_steps,
            **({} if each.fitted_to is None else {"fitted_to": list(each.fitted_to)}),
            "terms": {
                term: {
                    "value": float(f"{law.value:.3g}"),
                    "low": float(f"{law.low:.3g}"),
                    "high": float(f"{law.high:.3g}"),
                    "basis": law.basis.label,
                    "origin": law.origin,
                }
                for term, law in each.terms.items()
            },
        }
        for each in frameworks.values()
    }
    data = {"frameworks": tables, "judged": [asdict(each) for each in judged]}
    path.write_text(tomli_w.dumps(data), encoding="utf-8")
