"""What a plan answers, from made-up numbers."""

import re
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.screen import in_order, tells
from example_plan import PLAN, planned
from example_projection import step
from expertlane.cost.throughput import Goals, ThroughputCurve
from expertlane.planner.ranking import Contender, Uncertain, ranked
from expertlane.report import planning
from expertlane.report.document import Figure
from expertlane.report.plan_answer import answer, headline, verdict
from expertlane.report.planning import measurement, named
from expertlane.report.sections import report_of
from expertlane.results.estimate import Estimate, Summary
from expertlane.results.hardware import Validation
from expertlane.results.record import (
    BEST,
    DECODE_POOL,
    FAMILY,
    PREFILL_POOL,
    TWO_POOLS,
    DeploymentRecord,
    StepsRecord,
)
from expertlane.results.results import (
    BreakEven,
    EngineBest,
    Level,
    Results,
    ServeCommand,
    with_costs,
)
from expertlane.spec.deployment import Options
from expertlane.spec.layout import Layout
from expertlane.spec.names import Phase
from report.shown import answer_lines

FIRST, SECOND = Layout(dp=2, tp=8, ep=16), Layout(dp=16, ep=16)
JUDGED = Validation("TPOT of a model", 127, 0.34)


def one(decode: StepsRecord | None = None) -> DeploymentRecord:
    """A single sequence with a TPOT of 10 ms; a decode step takes 8 of them, a prefill step 50."""
    found = planned(Layout(tp=2), 100, BEST)
    tpot_s = Summary(mean=Estimate(0.010, 0.009, 0.012))
    serving = replace(found.serving[0], num_running=1, tpot_s=tpot_s)
    prefill = replace(timed(50, 0.2, 0.2), phase=Phase.PREFILL)
    return replace(found, serving=(serving,), steps=(prefill, decode or timed(8, 0.2, 0.2)))


def timed(step_ms: float, bound: float, extrapolated: float) -> StepsRecord:
    shares = {"bound": bound, "fitted": 1 - bound}
    return replace(step(step_ms, 100), basis_shares=shares, extrapolated_share=extrapolated)


def plan(*records: DeploymentRecord, **changes) -> Results:
    summary = replace(PLAN.plans[0], **changes)
    return replace(PLAN, deployments=records, plans=(summary,))


def behind(
    layout: Layout, low: float, value: float, high: float, role=BEST, why=""
) -> DeploymentRecord:
    found = planned(layout, 20_000 * value, role, in_full=role == BEST)
    return replace(found, over_best=Estimate(value, low, high), why=why)


def said(results: Results) -> str:
    """All sentences of the answer."""
    found = answer(results)
    return " ".join([found.headline, *(each for each in found.parts if isinstance(each, str))])


def tied(*records: DeploymentRecord, by="most tokens", **changes) -> Results:
    """#1 and #2 tie."""
    return plan(*records, num_tied=2, tie_spread=0.02, tie_break=by, **changes)


def test_a_tie_says_what_decided():
    rows = planned(FIRST, 20_000, BEST), behind(SECOND, 0.9, 0.98, 1.1)
    assert tells(headline(tied(*rows)), "#1–#2 tie tokens/s 2.0% #1 most")
    assert tells(headline(tied(*rows, by="farther from the limit")), "#1 farthest limit")
    assert tells(headline(tied(*rows), {1}), "2 plans tie")
    assert tells(said(tied(*rows, *pools(1.1, 1.2, 1.3))), "Aggregated #1–#2 tie tokens/s")


def test_the_wait_for_a_place_is_told_beside_the_ttft_of_pools():
    best, behind_it = planned(FIRST, 20_000, BEST), behind(SECOND, 0.86, 0.9, 0.95)
    together, *apart = pools(1.1, 1.2, 1.3)
    assert "for a place" not in said(plan(best, behind_it, together, *apart))
    serving = replace(together.serving[0], place_wait_s=Estimate(0.1))
    found = said(plan(best, behind_it, replace(together, serving=(serving,)), *apart))
    assert "ms after 100 ms for a place, KV transfer" in found
    without = plan(best, behind_it, no_two_pools="over limits")
    assert "Disaggregated: none meets the limits." in said(without)
    free = {name: each for name, each in without.question.items() if not name.startswith("max_")}
    assert "Disaggregated: none serves the load." in said(replace(without, question=free))


def test_what_is_surely_slower_than_another_that_ties_does_not_tie():
    """Its ratio to #1 may be 1, by errors of its own."""
    rows = planned(FIRST, 20_000, BEST), behind(SECOND, 0.99, 0.995, 1.0)
    third = behind(Layout(tp=16), 0.9, 0.96, 1.02, why="µs per token: gate in decode +2")
    results = tied(*rows, third, replace(third, roles=(FAMILY,)))
    assert [row[-1] for row in answer(results).parts[0].rows] == ["—", "tie", "−4.0%"]
    words = "Gap #3 #1 gate decode +2 without EP #3 4.0% slower #1 0.900–1.02×"
    assert in_order(said(results), words)


OTHERS = tuple(
    map(Layout.parse, ("tp=8,pp=2", "dp=2,tp=8", "dp=8,tp=2,ep=16", "dp=4,tp=4,ep=4", "tp=16"))
)
LONG = Options(overlap=True, dispatch="hierarchical", payload="float8", num_redundant_experts=16)


@dataclass(frozen=True)
class Finalist:
    """What a ranking reads of one."""

    layout: Layout

    @property
    def served(self):
        return ThroughputCurve(np.array([1]), *[np.ones((3, 1))] * 3)


@st.composite
def drawn_plans(draw) -> Results:
    """A plan of drawn tokens/s, in rows as it makes them."""
    contenders = [
        Contender(Finalist(layout), Uncertain(value, {(str(layout), ()): (0.96 * value, value)}))
        for layout in (FIRST, *draw(st.lists(st.sampled_from(OTHERS), unique=True)))
        for value in (draw(st.floats(16_000, 20_000)),)
    ]
    ranking = ranked(contenders, Goals())
    options = draw(st.sampled_from([Options(), LONG]))
    why = "µs per token: weight reads in decode +2" + "; and more" * draw(st.integers(0, 40))
    rows = []
    for each in ranking.contenders:
        over = None if each is ranking.chosen else each.tps.over(ranking.chosen.tps)
        record = planned(each.finalist.layout, each.tps.value, BEST, in_full=False)
        said_of = "" if each in ranking.tied else why
        rows.append(replace(record, options=options, over_best=over, why=said_of))
    kinds = {each.known_layout.ep > 1: replace(each, roles=(FAMILY,)) for each in rows[::-1]}
    together = pools(1.1, 1.2, 1.3) if draw(st.booleans()) else ()
    engines = engine("vllm", "vLLM", rows[-1], "has other stages")
    found = plan(
        *(*rows, *kinds.values(), *together),
        num_tied=ranking.num_tied,
        tie_break=ranking.by,
        tie_spread=ranking.spread,
        engines=(engines,),
    )
    cautions = ("Mind the step. " * draw(st.integers(0, 30)),)
    return replace(found, cautions=cautions)


@given(drawn_plans())
def test_words_and_table_are_of_the_same_rows(results):
    found = answer(results)
    table, *others = found.parts
    places = [int(row[0]) for row in table.rows]
    words = [found.headline, *(each for each in others if isinstance(each, str))]
    for number in re.findall(r"#(\d+)", " ".join(words)):
        assert int(number) in places
    rows = results.select("projected", BEST)
    num_tied = results.plans[0].num_tied
    assert [row[0] for row in table.rows if row[-1] == "tie"] == [
        str(place) for place in places if 1 < place <= num_tied
    ]
    for first, last in re.findall(r"#(\d+)–#(\d+) tie", " ".join(words)):
        assert (first, last) == ("1", str(num_tied))
        assert places[:num_tied] == list(range(1, 1 + num_tied))
    for gap in re.findall(r"Gap of #(\d+)", " ".join(words)):
        assert int(gap) == num_tied + 1
    # Pools have no rows; an engine's best is named by its layout where its row is not shown.
    of_rows = [each for each in words if not each.startswith(("Disaggregated", "Tokens/s by"))]
    named_rows = {named(rows[place - 1]) for place in places}
    for each in rows:
        if named(each) not in named_rows:
            assert named(each) not in " ".join(of_rows)
    if len(places) > 1 and not results.cautions[0]:
        assert len(answer_lines(report_of(results))) <= 40


def last_lines(results: Results) -> tuple[str, ...]:
    """How to go on."""
    after = answer(results).parts[-1]
    assert isinstance(after, Figure)
    return after.lines


def test_where_the_commands_are():
    best = planned(FIRST, 20_000, BEST)
    assert last_lines(plan(best))[-1] == "Commands of vLLM and expertlane: --full"
    _, why, again, _ = last_lines(plan(best, *pools(1.1, 1.2, 1.3)))
    assert tells(why, "aggregated compare no disaggregated")
    assert again == "Again: expertlane simulate --plan results/plan#pools"


def engine(name: str, title: str, best: DeploymentRecord | None, why: str = "", **more):
    started = (ServeCommand(title, (f"{name} x", f"{name} y"), "mind"),)
    return EngineBest(name, title, "1", best, why=why, source="a file", commands=started, **more)


def test_the_best_of_each_engine_is_said_where_they_differ():
    best, second = planned(FIRST, 20_000, BEST), behind(SECOND, 0.86, 0.9, 0.95)
    third = planned(Layout(tp=4, pp=4), 15_000, BEST)
    same = (engine("vllm", "vLLM", best), engine("sglang", "SGLang", best))
    assert "engine" not in said(plan(best, second, engines=same))
    assert "engine" not in str(verdict(plan(best, second, engines=same)))
    differ = (
        *same,
        engine("trtllm", "TensorRT-LLM", second, "has no dp"),
        engine("expertlane", "expertlane", None, "has none"),
    )
    found = plan(best, second, engines=differ)
    assert (
        "Tokens/s by engine: vLLM and SGLang 20.0k (#1); TensorRT-LLM 18.0k (#2); expertlane none "
        "that meets the limits."
    ) in said(found)
    other = plan(best, second, engines=(engine("vllm", "vLLM", third, "has no dp"),))
    assert "vLLM 15.0k (pp=4,tp=4)" in said(other)
    page = "\n".join(map(str, planning.plan(found)))
    for words in ("Best of each engine", "has no dp", "a file", "trtllm x", "trtllm y", "(mind)"):
        assert words in page
    alone = plan(best, engines=differ[2:3], engine="trtllm")
    assert "| TensorRT-LLM 1 |" in answer(alone).setting
    assert "by engine" not in said(alone)


def test_pools_that_an_engine_runs_are_named():
    best, both = planned(FIRST, 20_000, BEST), pools(1.1, 1.2, 1.3)
    engines = (
        engine("vllm", "vLLM", best, pools=both),
        engine("sglang", "SGLang", best, "has other stages", pools=both),
        engine("expertlane", "expertlane", best, "has no pools"),
    )
    name = both[0].name
    assert said(plan(best, *both, engines=engines)).count(
        f"vLLM 24.0k (these pools); SGLang 24.0k ({name}); expertlane 20.0k (#1)"
    )


def test_a_plan_for_cpus_is_per_rank_and_no_other_system_serves_it():
    load = {"num_sequences": 100, "prompt_len": 1000, "output_len": 1000}
    cpus = replace(
        PLAN,
        cluster=replace(PLAN.cluster, device="cpu rank of a CPU"),
        question=PLAN.question | {"workload": load},
    )
    headings = [each.heading for each in answer(cpus).parts[0].columns]
    assert "/rank" in headings
    assert "/GPU" not in headings
    assert last_lines(cpus)[-1] == "Commands of expertlane: --full"


@pytest.mark.parametrize(
    ("routing", "words"),
    [
        ("--skew 0.8", "routing skew 0.8 --skew 0"),
        ("--skew 0", "routing uniform"),
        ("--routing-trace a/folder/mine.npz", "routing mine.npz"),
    ],
)
def test_the_setting_has_the_routing_and_the_models_limit(routing, words):
    best = planned(FIRST, 20_000, BEST)
    conditions = replace(best.conditions, routing=routing)
    found = plan(replace(best, conditions=conditions))
    assert tells(answer(found).setting, f"paper h100x16 1,024 1,000 TPOT 20 projected {words}")
    model = {"name": "paper", "max_position_embeddings": 2000}
    limited = replace(found, question=found.question | {"model": model})
    assert "limit" in answer(limited).setting


def test_the_best_without_experts_apart_is_a_row():
    other = behind(Layout(tp=16), 0.7, 0.8, 0.9, FAMILY, "µs per token: weight reads +2")
    results = plan(planned(FIRST, 20_000, BEST), other)
    assert in_order(said(results), "without EP #2 20% slower #1 10–30% weight reads +2")
    assert [row[:2] for row in answer(results).parts[0].rows] == [
        ("1", "dp=2,tp=8,ep=16"),
        ("2", "tp=16"),
    ]


def pools(low: float, value: float, high: float) -> tuple[DeploymentRecord, ...]:
    together = behind(Layout(tp=8), low, value, high, TWO_POOLS)
    transfer = replace(together.serving[0], transfer_s=Estimate(0.0015))
    return (
        replace(together, serving=(transfer,), prefill_layout=Layout(dp=8)),
        planned(Layout(dp=8), 1.0, PREFILL_POOL),
        planned(Layout(tp=8), 1.0, DECODE_POOL),
    )


def test_disaggregated_pools_are_held_against_one_pool():
    best = planned(FIRST, 20_000, BEST)
    names = "Disaggregated dp=8 8 prefill tp=8 8 decode"
    tied = plan(best, *pools(0.9, 0.97, 1.05))
    assert in_order(said(tied), f"{names} #1 0.970× 0.900–1.05 TPOT")
    assert "KV transfer 1.50 ms" in said(tied)
    assert headline(tied).startswith("Use dp=2,tp=8,ep=16: ")
    faster = plan(best, *pools(1.1, 1.2, 1.3))
    assert tells(headline(faster), f"{names.lower()} 24.0k tokens/s")
    assert tells(headline(faster), "1.20× 1.10–1.30 dp=2,tp=8,ep=16")
    assert "Disaggregated: 20% faster than #1 (10–30%)" in said(faster)


@pytest.mark.parametrize(
    ("why", "words"),
    [
        ("no split", "devices split"),
        ("too large", "fit pools"),
        ("over limits", "none limits"),
    ],
)
def test_why_nothing_is_disaggregated(why, words):
    assert tells(said(plan(one(), no_two_pools=why)), f"Disaggregated {words}")


def test_what_most_time_rests_on_is_said():
    assert "Most of the time" not in said(plan(one()))
    # 8 of 10 ms are the decode step's: 0.8 × 0.7 + 0.2 × 0.2
    assert tells(said(plan(one(timed(8, 0.7, 0.0)))), "60% range")
    several = plan(one(timed(8, 0.7, 0.0)), behind(SECOND, 0.9, 1.02, 1.1))
    assert tells(said(several), "60% rankings reliable")
    several = plan(one(timed(8, 0.0, 0.9)), behind(SECOND, 0.9, 1.02, 1.1))
    assert tells(said(several), "76% range")


def test_cautions_are_part_of_the_answer():
    results = replace(plan(one()), cautions=("Mind the step.",))
    assert "Mind the step." in said(results)
    found, sure = verdict(results)
    assert sure.parts[-1] == "Mind the step."
    assert "Mind the step." not in found.parts


def worst_plan() -> Results:
    """Long names, many options, all that can be said."""
    options = Options(
        overlap=True,
        num_micro_batches=4,
        micro_batch_schedule="rotating",
        dispatch="hierarchical",
        payload="float8",
        num_redundant_experts=128,
    )
    layout = Layout(replicas=2, pp=2, dp=12, tp=2, ep=24)
    why = "µs per token: exposed dispatch and combine in prefill +1.25, waiting for slower ranks +2"

    def long(record: DeploymentRecord) -> DeploymentRecord:
        steps = tuple(
            replace(each, basis_shares={"bound": 1.0}, extrapolated_share=1.0)
            for each in record.steps
        )
        return replace(record, layout=layout, options=options, steps=steps)

    rows = [planned(layout, 1e6, BEST), *[behind(layout, 0.8, 0.9, 0.95, why=why)] * 7]
    other = behind(layout, 0.8, 0.9, 0.95, FAMILY, why)
    records = [*rows, *pools(0.9, 0.97, 1.05)]
    found = replace(
        plan(*map(long, records), replace(long(other), layout=Layout(tp=16))),
        cautions=(
            "The checkpoint's weights are compressed-tensors but priced as bfloat16, for want of a "
            "law of narrower ones: their memory and reads come out larger than they are.",
        ),
        cluster=replace(PLAN.cluster, name="a-machine-with-a-long-namex96", judged=JUDGED),
        question=PLAN.question
        | {"model": {"name": "org/" + "a-name-without-end-" * 9}, "max_ttft_s": 0.5},
    )
    commands = replace(found.plans[0], experiment="/a/folder" * 30 + "/experiment.toml")
    return with_costs(replace(found, plans=(commands,)), 3.0)


@pytest.mark.parametrize("results", [PLAN, worst_plan()], ids=["usual", "worst"])
def test_an_answer_fits_a_screen(results):
    lines = answer_lines(report_of(results))
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80
    names = {word for row in answer(results).parts[0].rows for word in row[1].split()}
    assert all(any(name in line for line in lines) for name in names)  # no word is broken


def test_drafts_are_part_of_a_name():
    record = replace(PLAN.deployments[0], num_drafts=2)
    assert named(record).endswith(", 2 drafts") or named(record).endswith("; 2 drafts")
    assert named(replace(record, options=Options(), num_drafts=1)).endswith("; 1 draft")
    assert "draft" not in named(replace(record, num_drafts=0))


def test_what_would_change_the_answer_is_said_with_what_is_lost():
    rows = planned(FIRST, 20_000, BEST), behind(SECOND, 0.86, 0.9, 0.95)
    third = behind(Layout(tp=16), 0.7, 0.8, 0.9)
    skew = Level("skew", 0.8, 0.95, 1.2, 1.09, (0.0, 1.2))
    more = Level("sequences", 512, 96.0, 32, 1.2, (32, 8192))
    found = BreakEven(third.name, (skew, more), "drawn experts", 0.64)
    words = said(plan(*rows, third, break_even=found))
    assert in_order(
        words, "#1 stays above #3 below skew 0.95 above 96 sequences skew 1.2 #3 9.0% more"
    )
    assert in_order(words, "with 32 sequences #3 20% more Measure first routing 64%")
    assert "--routing-trace" in words
    level = replace(skew, at=None, over_at_end=0.9)
    words = said(plan(*rows, third, break_even=replace(found, levels=(level,), unsure="")))
    assert "#1 stays above #3 at any skew up to 1.2 (screened)." in words
    assert "Measure first" not in words
    limited = replace(more, over_at_end=None, end=8192, at=1024.0)
    words = said(plan(*rows, third, break_even=replace(found, levels=(limited,))))
    assert in_order(words, "below 1,024 sequences with 8,192 sequences #1 misses the limits")


@pytest.mark.parametrize(
    ("unsure", "words"),
    [
        ("gemm.float32", "GEMMs in float32 (expertlane calibrate)"),
        ("dispatch.all_to_all.inter_node", "transfers between nodes (expertlane calibrate)"),
        ("driver_s", "host time between steps (expertlane calibrate)"),
        ("acceptance of drafts", "how many drafts are accepted (--mtp-acceptance)"),
        ("skew of experts", "the routing of your traffic (--routing-trace)"),
        ("hiding of transfers", "hiding of transfers (expertlane calibrate)"),
    ],
)
def test_what_to_measure_first(unsure, words):
    assert measurement(unsure) == words
