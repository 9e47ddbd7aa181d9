"""What a plan answers, from made-up numbers."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from cli.screen import in_order, tells
from example_plan import PLAN, planned
from example_projection import step
from expertlane.report import planning, terminal
from expertlane.report.document import Figure
from expertlane.report.plan_answer import answer, headline, how_sure, verdict
from expertlane.report.planning import named
from expertlane.report.sections import report_of
from expertlane.results.cost import with_costs
from expertlane.results.estimate import Estimate, Summary
from expertlane.results.hardware import Judged
from expertlane.results.record import (
    BEST,
    DECODE_POOL,
    FAMILY,
    PREFILL_POOL,
    TWO_POOLS,
    DeploymentRecord,
    StepsRecord,
)
from expertlane.results.results import EngineBest, Results, ServeCommand
from expertlane.spec.deployment import Options
from expertlane.spec.layout import Layout
from expertlane.spec.names import Phase

FIRST, SECOND = Layout(dp=2, tp=8, ep=16), Layout(dp=16, ep=16)
JUDGED = Judged("TPOT of a model", 127, 0.34)


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


def test_the_fastest_is_named_with_its_gap():
    results = plan(planned(FIRST, 20_000, BEST), behind(SECOND, 0.86, 0.9, 0.95))
    assert headline(results) == (
        "Use dp=2,tp=8,ep=16: 20.0k tokens/s (−50%/+100%); #2 is 10% slower than #1 (5.0–14%)."
    )


@pytest.mark.parametrize(
    ("by", "words"),
    [
        ("lowest TTFT", "lowest TTFT"),
        (
            "fewest kinds",
            "3 tie #1 fewest",
        ),
        (
            "most tokens",
            "3 tie fewest #1 most tokens/s",
        ),
    ],
)
def test_a_tie_says_what_decided(by, words):
    rows = planned(FIRST, 20_000, BEST), behind(SECOND, 0.9, 1.02, 1.1)
    tied = plan(*rows, num_tied=2, tie_spread=0.02, tie_break=by, num_ttft_tied=3)
    assert tells(headline(tied), f"#1–#2 tie tokens/s 2.0% {words}")
    many = plan(*rows, num_tied=11, tie_spread=0.02, tie_break=by)
    assert tells(headline(many), "11 tie tokens/s")


def chosen_by_ttft(*more: DeploymentRecord, over_fastest: Estimate | None = None) -> Results:
    """#2 has a tenth more tokens/s than #1, within error."""
    rows = planned(FIRST, 20_000, BEST), behind(SECOND, 0.9, 1.1, 1.3)
    tie = {"num_tied": 2, "tie_spread": 0.09, "tie_break": "lowest TTFT"}
    return plan(*rows, *more, **tie, fastest=rows[1], pools_over_fastest=over_fastest)


def test_what_a_choice_by_ttft_costs_is_said():
    assert in_order(
        headline(chosen_by_ttft()), "lowest TTFT 20.0k 1,000 ms dp=16,ep=16 22.0k 1,000 error"
    )


def test_disaggregated_pools_are_held_against_the_fastest_not_the_first():
    faster = chosen_by_ttft(*pools(1.1, 1.4, 1.7), over_fastest=Estimate(1.27, 1.15, 1.4))
    assert in_order(headline(faster), "1.27× 1.15–1.40 dp=16,ep=16")
    assert in_order(said(faster), "Disaggregated 27% faster dp=16,ep=16 15–40%")
    assert tells(said(faster), "Aggregated #1–#2 tie tokens/s")
    tied = chosen_by_ttft(*pools(1.1, 1.2, 1.3), over_fastest=Estimate(1.09, 0.95, 1.2))
    assert headline(tied).startswith("Use dp=2,tp=8,ep=16: ")
    assert in_order(said(tied), "ties dp=16,ep=16 1.09× 0.950–1.20")


def last_lines(results: Results) -> tuple[str, ...]:
    """How to go on."""
    after = answer(results).parts[-1]
    assert isinstance(after, Figure)
    return after.lines


def test_where_the_commands_are():
    best = planned(FIRST, 20_000, BEST)
    assert last_lines(plan(best))[-1] == "Commands of vLLM and expertlane: --full"
    _, why, _ = last_lines(plan(best, *pools(1.1, 1.2, 1.3)))
    assert tells(why, "aggregated compare no disaggregated")


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
        "meets the limits."
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


def test_one_deployment_has_no_rival():
    found = plan(one())
    assert tells(headline(found), "97 limits")
    alone = replace(found.plans[0], num_candidates=1, num_too_large=0, num_over_limits=0)
    said = headline(replace(found, plans=(alone,)))
    assert tells(said, "no other limits")


def test_gaps_are_given_where_they_exceed_the_noise():
    rows = planned(FIRST, 20_000, BEST), behind(SECOND, 0.95, 0.99, 1.02)
    assert "Gap" not in said(plan(*rows))
    slow = behind(Layout(tp=16), 0.7, 0.8, 0.9, why="µs per token: weight reads in decode +2")
    assert in_order(said(plan(*rows, slow)), "#3 #1 weight reads decode +2")
    cells = [row[-1] for row in answer(plan(*rows, slow)).parts[0].rows]
    assert cells == ["—", "tie", "−20%"]


def test_the_best_without_experts_apart_is_named():
    other = behind(Layout(tp=16), 0.7, 0.8, 0.9, FAMILY, "µs per token: weight reads +2")
    assert in_order(
        said(plan(planned(FIRST, 20_000, BEST), other)),
        "without EP tp=16 20% slower #1 10–30% weight reads +2",
    )


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


def test_how_sure_it_is():
    judged = replace(PLAN.cluster, judged=JUDGED)
    assert tells(next(iter(how_sure(replace(PLAN, cluster=judged)))), "TPOT 34% 127")
    assert "Not validated" in next(iter(how_sure(PLAN)))


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


def test_a_price_gives_the_cost_of_the_first():
    priced = with_costs(plan(planned(FIRST, 20_000, BEST)), 3.0)
    assert in_order(said(priced), "#1 0.667 0.333–1.33 million")


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
    stream = io.StringIO()
    console = Console(file=stream, width=80)
    terminal.show_answer(report_of(results), console, Path("results/plan/report.html"))
    lines = stream.getvalue().splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80
    names = {word for row in answer(results).parts[0].rows for word in row[1].split()}
    assert all(any(name in line for line in lines) for name in names)  # no word is broken


def test_drafts_are_part_of_a_name():
    record = replace(PLAN.deployments[0], num_drafts=2)
    assert named(record).endswith(", 2 drafts") or named(record).endswith("; 2 drafts")
    assert named(replace(record, options=Options(), num_drafts=1)).endswith("; 1 draft")
    assert "draft" not in named(replace(record, num_drafts=0))
