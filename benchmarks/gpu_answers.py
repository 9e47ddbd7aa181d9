"""What the results of `make gpu` say of each goal, a line each: goal, measured, met or not.

Shares of bandwidth and peak are of the card's datasheet where expertlane has a profile of the card,
else of a large copy and a large product measured in the same run.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

Parts = Mapping[str, Mapping[str, Any]]

ROOT = Path(__file__).parents[1]
WAITING = "## What waits for a GPU"  # a heading of docs/validation.md, and the table below it
DECODE_SHARE, PROMPT_SHARE, STEP_SHARE, STEP_ERROR = 0.80, 0.70, 0.75, 0.10
REPORTED_MS = {"EP 16": 2.2, "TP 8 × PP 2": 8.3}  # the paper's table


@dataclass(frozen=True)
class Answer:
    """To one goal.

    Attributes:
        number: of what issue 21 has to show.
        is_met: None where it cannot be said: nothing was measured, or there is no goal.
        is_rehearsed: a CPU ran small ones, which says nothing of a goal for GPUs.
    """

    number: int
    what: str
    goal: str
    measured: str
    is_met: bool | None
    is_rehearsed: bool = False

    def __str__(self) -> str:
        if not self.goal:
            return f"{self.number} {self.what}: {self.measured}"[:80]
        verdict = {True: "met", False: "MISSED", None: "-"}[self.is_met]
        if self.is_rehearsed and self.is_met is not None:
            verdict = "rehearsed"
        return f"{self.number} {self.what:38.38} {self.goal:>9.9} {self.measured:>18.18}  {verdict}"


def sheet_of(card: str, limits: Mapping[str, Any]) -> tuple[float, float]:
    """Bytes and bfloat16 FLOPs a second of a card."""
    from expertlane.cost.laws import shipped_profiles
    from expertlane.cost.laws.profile import read_profile

    names = [name for name in shipped_profiles() if name.upper() in card.upper()]
    if not names:
        return limits["bytes_per_s"], limits["flops_per_s"]
    device = read_profile(max(names, key=len)).device
    return device.memory_bytes_per_s, device.flops_per_s["bfloat16"]


def share(number: int, what: str, goal: float, found: float | None) -> Answer:
    """Of a limit; None where it was not measured."""
    if found is None:
        return Answer(number, what, f"≥ {goal:.0%}", "not run", None)
    return Answer(number, what, f"≥ {goal:.0%}", f"{found:.0%}", found >= goal)


def tests_of(parts: Parts, words: Sequence[str]) -> list[Mapping[str, Any]]:
    """Tests of any part with one of the words in their names, skipped ones left out."""
    found = [test for part in parts.values() for test in part.get("tests", [])]
    return [
        test
        for test in found
        if any(word in test["name"] for word in words) and test["outcome"] != "skipped"
    ]


def of_tests(parts: Parts, what: str, *words: str) -> Answer:
    """Whether tests passed, and the largest error that they noted."""
    found = tests_of(parts, words)
    if not found:
        return Answer(2, what, "all pass", "not run", None)
    passed = sum(test["outcome"] == "passed" for test in found)
    errors = [float(test["error"]) for test in found if "error" in test]
    worst = f", {max(errors):.1e}" if errors else ""
    return Answer(2, what, "all pass", f"{passed} of {len(found)}{worst}", passed == len(found))


def parity(parts: Parts) -> Iterator[Answer]:
    """Must-show 2."""
    yield of_tests(parts, "models in float32 (error)", "in_float32", "kind_of_model[float32")
    yield of_tests(parts, "models in bfloat16 (error)", "kind_of_model[bfloat16")
    yield of_tests(parts, "models in float16 (error)", "kind_of_model[float16")
    yield of_tests(parts, "a model that fills the card (error)", "fills_the_card")
    yield of_tests(
        parts, "several ranks on one GPU (error)", "several_ranks_on_one_gpu", "on_shared_gpus"
    )
    yield of_tests(parts, "no synchronisation in decode", "no_sync", "waits_for_nothing")
    yield of_tests(parts, "graphs on and off equal", "graphs_on_and_off")
    yield of_tests(parts, "kernels against torch", "tests.ops.cuda")


def limits(parts: Parts, card: str) -> Iterator[Answer]:
    """Must-show 3, of single operations."""
    data = parts.get("limits", {}).get("data")
    bytes_per_s, flops_per_s = sheet_of(card, data) if data else (1.0, 1.0)
    cases = {case["name"]: case for case in (data or {"cases": []})["cases"]}

    def best(begin: str, amount: str, per_s: float) -> float | None:
        rates = [
            case[amount] / case["seconds"]
            for name, case in cases.items()
            if name.startswith(begin) and not name.endswith(("order", "sum"))
        ]
        return max(rates) / per_s if rates else None

    for what in ("paper", "DeepSeek"):
        found = best(f"experts decode, {what}", "num_bytes", bytes_per_s)
        yield share(3, f"experts, decode, {what}: bandwidth", DECODE_SHARE, found)
    for what in ("paper", "DeepSeek"):
        found = best(f"experts prompt, {what}", "flops", flops_per_s)
        yield share(3, f"experts, prompts, {what}: peak", PROMPT_SHARE, found)
    for what in ("paper", "Qwen3", "DeepSeek"):
        found = best(f"decode, {what}, 64 × 8k", "num_bytes", bytes_per_s)
        yield share(3, f"attention at 8k, {what}: bandwidth", DECODE_SHARE, found)


def steps_of_one_rank(parts: Parts, card: str) -> Iterator[Answer]:
    """Must-show 3, of whole steps: batch 1, and the paper's table."""
    part = parts.get("one_rank", {}).get("data") or {"rows": []}
    measured = parts.get("limits", {}).get("data")
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in part["rows"]:
        groups.setdefault(row["group"], []).append(row)
    alone = [rows[0] for group, rows in groups.items() if group.startswith("batch 1")]
    if not alone or measured is None:
        yield share(3, "decode at batch 1: bandwidth", STEP_SHARE, None)
    for row in alone if measured else ():
        rate = row["read_bytes"] / _best_s(row) / sheet_of(card, measured)[0]
        yield share(3, row["group"].replace("batch 1, ", "batch 1: "), STEP_SHARE, rate)
    for name, reported_ms in REPORTED_MS.items():
        for group, rows in groups.items():
            if group.startswith(f"paper {name}"):
                yield _of_paper(group.removeprefix("paper "), rows, reported_ms)
        if not any(group.startswith(f"paper {name}") for group in groups):
            yield Answer(3, f"paper's {name}, computing", f"({reported_ms} ms)", "not run", None)


def _best_s(row: Mapping[str, Any]) -> float:
    return float(row["graph_s"] or row["step_s"])


def _of_paper(group: str, rows: Sequence[Mapping[str, Any]], reported_ms: float) -> Answer:
    """A step's computing, its stages one after the other, beside what is projected of it."""
    kernels = [row["kernels_s"] for row in rows]
    taken_ms = 1e3 * sum(each or _best_s(row) for each, row in zip(kernels, rows, strict=True))
    name = "this card" if "this card" in rows[0]["projected"] else "h100"
    projected_ms = 1e3 * sum(row["projected"][name][1] for row in rows)
    measured = f"{taken_ms:.2f}, proj. {projected_ms:.2f}"
    return Answer(3, f"{group}, computing, ms", f"({reported_ms})", measured, None)


def projection(parts: Parts) -> Iterator[Answer]:
    """Must-show 4."""
    data = parts.get("steps", {}).get("data")
    if not data:
        yield Answer(4, "steps by this card's profile", "≤ 10%", "not run", None)
        return
    for phase, of in data["summary"].items():
        what = f"{phase.removesuffix('_s')}: median error, largest"
        median, largest = of["median_error"], of["largest_error"]
        yield Answer(4, what, "≤ 10%", f"{median:.1%}, {largest:.1%}", largest <= STEP_ERROR)


def beside_vllm(parts: Parts) -> Answer:
    """Whether it was run; its table is in the log."""
    part = parts.get("vllm", {})
    status = part.get("status", "not run")
    return Answer(3, "beside vLLM (table in log.txt)", "", status, None)


def waiting() -> list[tuple[str, str, str]]:
    """What waits, the part that runs it, and words of its tests; from docs/validation.md."""
    text = (ROOT / "docs" / "validation.md").read_text(encoding="utf-8")
    section = text.partition(WAITING)[2].partition("\nNeither")[0]
    of_parity, _, others = section.partition("\nOther parts:\n")
    rows = [("parity", what) for what in re.findall(r"^- (.+)$", of_parity, re.MULTILINE)]
    rows += re.findall(r"`(\w+)`: (.+?)(?=; `\w+`: |$)", others, re.MULTILINE)
    words = [re.findall(r"\((`[\w., `]+`)\)", what) for _, what in rows]
    return [
        (what.partition(" (`")[0], part, ", ".join(of_what).replace("`", ""))
        for (part, what), of_what in zip(rows, words, strict=True)
    ]


def of_waiting(parts: Parts) -> Iterator[Answer]:
    """Must-show 5: how many of the list were run, and the first of those that were not."""
    listed, missing = waiting(), []
    for what, part, words in listed:
        ran = parts.get(part, {}).get("status") == "passed"
        if words:
            found = tests_of(parts, words.split(", "))
            ran = bool(found) and all(test["outcome"] == "passed" for test in found)
        if not ran:
            missing.append(what)
    done = f"{len(listed) - len(missing)} of {len(listed)}"
    yield Answer(5, "what waited for a GPU: passed", "all", done, not missing if listed else None)
    for what in missing[:4]:
        yield Answer(5, "  not passed", "", what, None)


def answers(parts: Parts, card: str, *, is_rehearsal: bool = False) -> list[Answer]:
    """All of them, in the order of the issue."""
    found = [
        *parity(parts),
        *limits(parts, card),
        *steps_of_one_rank(parts, card),
        beside_vllm(parts),
        *projection(parts),
        *of_waiting(parts),
    ]
    return [replace(each, is_rehearsed=is_rehearsal) for each in found]
