"""What of a `results.json` a golden file keeps, and how two of them are compared.

A file becomes columns: one line a path, list indices collapsed to `[]`, the values of all places
nested as the lists were; `ABSENT` where a place has no such key. Whatever no rule here names is
kept.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

Json = Any
Columns = dict[str, Json]

ABSENT = "-"
RELATIVE_TOLERANCE = 1e-6  # between CPUs
_ROUNDING_TOLERANCE = 1e-3  # of what rounding to fewer bits changed: CPUs round ties of sums apart
_ABSOLUTE_TOLERANCE = 1e-12  # shares that are differences of equals
_DIGITS = 9
_LONGEST = 64  # numbers of a list that are kept one by one

# Of every file: when, from where and by what it was made.
MADE_BY = {"command", "created", "version", "versions", "not_measured"}
# Of `machine`, beside what was asked for.
MACHINE = {"cpu_name", "kernels", "num_cores", "memory_bytes", "num_idle_gpus", "peak"}
# Seconds, microseconds, and tokens a second, under any name that says so.
_TIMED = re.compile(r"(^|_)(s|us|tps)(_|$)")
# What is computed from times without a unit in its name.
OF_TIMES = {
    "bottleneck",
    "critical_path",
    "dispatch_table",
    "foreign_cpu_share",
    "hidden",
    "hidden_share",
    "num_last_arrivals",
    "num_meetings",
    "flops_utilisation",
    "pairs",
    "read_utilisation",
}
# Of those, what there may be none of: its type depends on time too.
_MAYBE_NONE = {"hidden", "hidden_share", "straggler"}
# Where experts moved while requests ran: decided by measured times, and what followed from that.
OF_REBALANCES = {
    "active_expert_share",
    "num_collectives",
    "num_experts_per_layer",
    "rebalances",
    "traffic",
    "traffic_bytes",
    "weight_bytes",
}


def projected(results: Json) -> Columns:
    """Columns of a projection: all numbers."""
    return columns(_shortened(_without(results, lambda key: key in MADE_BY)))


def published(results: Json) -> Columns:
    """Columns of a plan's answer: its best three deployments, and each engine's commands."""
    best = [_without(each, lambda key: key == "steps") for each in results["deployments"][:3]]
    plans = _without(results["plans"], lambda key: key in ("aggregated", "pools"))
    return projected({**results, "deployments": best, "plans": plans})


def measured(results: Json) -> Columns:
    """Columns of a measured comparison: its structure, and what does not depend on time."""
    kept = {
        **results,
        "machine": _without(results["machine"], lambda key: key in MACHINE),
        "deployments": [_without_chance(each) for each in results["deployments"]],
    }
    untimed = _shortened(_without(kept, _is_of_time), with_times=False)
    types = {f"type of {path}": kinds for path, kinds in structure(results).items()}
    return types | columns(untimed)


def _is_of_time(key: str) -> bool:
    return key in MADE_BY | OF_TIMES or _TIMED.search(key) is not None


def _without_chance(deployment: Json) -> Json:
    """Without what depends on which replica was faster, or on when experts were moved."""
    if deployment["layout"]["replicas"] > 1:
        deployment = _of_replicas(deployment)
    if deployment["options"]["rebalance_steps"]:
        deployment = _without(deployment, lambda key: key in OF_REBALANCES)
    return deployment


def _of_replicas(value: Json, is_by_step: bool = False) -> Json:
    """Without rounds; what is counted by step, of all replicas as they ended, sorted."""
    if isinstance(value, dict):
        return {
            key: _of_replicas(each, is_by_step or key == "payload_bytes_of_step")
            for key, each in value.items()
            if key != "num_rounds"
        }
    if isinstance(value, list) and not is_by_step:
        return [_of_replicas(each) for each in value]
    return sorted(value) if is_by_step else value


def _without(value: Json, is_dropped: Callable[[str], bool]) -> Json:
    if isinstance(value, dict):
        return {k: _without(v, is_dropped) for k, v in value.items() if not is_dropped(k)}
    if isinstance(value, list):
        return [_without(each, is_dropped) for each in value]
    return value


def structure(results: Json) -> dict[str, str]:
    """The types of each path; `rebalances` by its name alone, since there may be none."""
    found: dict[str, set[str]] = {}

    def walk(value: Json, path: str) -> None:
        name = path.rpartition(".")[2]
        kind = "number or null" if name in _MAYBE_NONE else type(value).__name__
        found.setdefault(path or "results", set()).add(kind)
        if name == "rebalances":
            return
        if isinstance(value, dict):
            for key, each in value.items():
                walk(each, f"{path}.{key}" if path else key)
        elif isinstance(value, list):
            for each in value:
                walk(each, f"{path}[]")

    walk(results, "")
    return {path: " or ".join(sorted(kinds)) for path, kinds in found.items()}


def _shortened(value: Json, with_times: bool = True) -> Json:
    """Timelines and long lists as sums and digests; floats rounded."""
    if isinstance(value, dict):
        if {"ranks", "tracks", "stages"} <= value.keys():
            value = {**value, "ranks": _events(value, with_times)}
        return {key: _shortened(each, with_times) for key, each in value.items()}
    if isinstance(value, list):
        return _short_list(value, with_times)
    return _rounded(value) if isinstance(value, float) else value


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}") if abs(value) > _ABSOLUTE_TOLERANCE else 0.0


def _short_list(values: list[Json], with_times: bool) -> Json:
    if values and all(type(each) is list for each in values):
        rows = [row for row in values if all(type(each) is int for each in row)]
        if len(rows) == len(values) and sum(map(len, rows)) > _LONGEST:
            columns_of = [sum(column) for column in zip(*rows, strict=True)]
            return {
                "sum of rows": _short_list([sum(row) for row in rows], with_times),
                "sum of columns": _short_list(columns_of, with_times),
                "sha256": _digest(values),
            }
    if len(values) > _LONGEST and all(type(each) is int for each in values):
        return {"num": len(values), "sum": sum(values), "sha256": _digest(values)}
    return [_shortened(each, with_times) for each in values]


def _digest(values: Json) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def _events(timeline: Json, with_times: bool) -> Json:
    """By track and stage, over all ranks: how many, where (sums of places), and when.

    Without times, which ranks are shown: how a rank's waiting is cut into events depends on time.
    """
    if not with_times:
        return [rank["rank"] for rank in timeline["ranks"]]
    found: dict[str, dict[str, float]] = {}
    for rank in timeline["ranks"]:
        names = ("track", "stage", "layer", "micro_batch", "begin_us", "duration_us")
        for track, stage, *values in zip(*(rank[name] for name in names), strict=True):
            where = f"{timeline['tracks'][track]}, {timeline['stages'][stage]}"
            sums = found.setdefault(where, dict.fromkeys(("num", "rank", *names[2:]), 0))
            for name, value in zip(sums, (1, rank["rank"], *values), strict=True):
                sums[name] += value
    return {where: list(sums.values()) for where, sums in found.items()}


def columns(value: Json) -> Columns:
    """One entry a path; a list's elements side by side."""
    if isinstance(value, dict) and value:
        return {
            key + (f".{path}" if path and not path.startswith("[") else path): column
            for key, each in value.items()
            for path, column in columns(each).items()
        }
    if isinstance(value, list) and any(isinstance(each, dict | list) for each in value):
        of_each = [columns(each) for each in value]
        paths = dict.fromkeys(path for each in of_each for path in each)
        return {
            f"[]{path if not path or path.startswith('[') else '.' + path}": [
                each.get(path, ABSENT) for each in of_each
            ]
            for path in paths
        }
    return {"[]" if isinstance(value, list) else "": value}


def differences(golden: Columns, found: Columns) -> Iterator[tuple[str, Json, Json]]:
    """Path, golden and found value of every place where they differ.

    A field that the golden file does not know, and that is empty everywhere, is none.
    """
    for path in sorted(golden.keys() | found.keys()):
        if path not in golden and _is_empty(found[path]):
            continue
        yield from _differing(path, golden.get(path, ABSENT), found.get(path, ABSENT))


def _is_empty(value: Json) -> bool:
    if isinstance(value, list):
        return all(map(_is_empty, value))
    return value in (None, ABSENT, {}, "")


def _differing(path: str, golden: Json, found: Json) -> Iterator[tuple[str, Json, Json]]:
    if isinstance(golden, list) and isinstance(found, list) and "[]" in path:
        if len(golden) != len(found):
            yield path, f"{len(golden)} values", f"{len(found)} values"
        for index, pair in enumerate(zip(golden, found, strict=False)):
            yield from _differing(path.replace("[]", f"[{index}]", 1), *pair)
    elif not _is_same(golden, found, path.endswith("payload_error")):
        yield path, golden, found


def _is_same(golden: Json, found: Json, is_of_rounding: bool) -> bool:
    if type(golden) is not type(found):
        return False
    if isinstance(golden, float):
        tolerance = _ROUNDING_TOLERANCE if is_of_rounding else RELATIVE_TOLERANCE
        return math.isclose(golden, found, rel_tol=tolerance, abs_tol=_ABSOLUTE_TOLERANCE)
    return bool(golden == found)
