"""What a plan answers, from made-up numbers."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from example_plan import PLAN, planned
from example_projection import step
from expertlane.report import terminal
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
from expertlane.results.results import Results
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
        ("lowest TTFT", "the lowest TTFT wins."),
        (
            "fewest kinds",
            "3 of their TTFTs tie with the lowest within error; of these #1 has the fewest kinds "
            "of parallelism.",
        ),
        (
            "most tokens",
            "3 of their TTFTs tie with the lowest within error; of these with the fewest kinds of "
            "parallelism #1 has most tokens/s.",
        ),
    ],
)
def test_a_tie_says_what_decided(by, words):
    rows = planned(FIRST, 20_000, BEST), behind(SECOND, 0.9, 1.02, 1.1)
    tied = plan(*rows, num_tied=2, tie_spread=0.02, tie_break=by, num_ttft_tied=3)
    assert headline(tied).endswith(f"#1–#2 tie for most tokens/s (2.0% apart): {words}")
    many = plan(*rows, num_tied=11, tie_spread=0.02, tie_break=by)
    assert "11 plans tie for most tokens/s" in headline(many)


def chosen_by_ttft(*more: DeploymentRecord, over_fastest: Estimate | None = None) -> Results:
    """#2 has a tenth more tokens/s than #1, within error."""
    rows = planned(FIRST, 20_000, BEST), behind(SECOND, 0.9, 1.1, 1.3)
    tie = {"num_tied": 2, "tie_spread": 0.09, "tie_break": "lowest TTFT"}
    return plan(*rows, *more, **tie, fastest=rows[1], pools_over_fastest=over_fastest)


def test_what_a_choice_by_ttft_costs_is_said():
    assert headline(chosen_by_ttft()).endswith(
        "the lowest TTFT wins. 20.0k for TTFT 1,000 ms; dp=16,ep=16 has 22.0k at 1,000 ms, within "
        "error."
    )


def test_disaggregated_pools_are_held_against_the_fastest_not_the_first():
    faster = chosen_by_ttft(*pools(1.1, 1.4, 1.7), over_fastest=Estimate(1.27, 1.15, 1.4))
    assert "1.27× (1.15–1.40) the best aggregated, dp=16,ep=16." in headline(faster)
    assert "Disaggregated: 27% faster than dp=16,ep=16 (15–40%)" in said(faster)
    assert "Aggregated: #1–#2 tie for most tokens/s" in said(faster)
    tied = chosen_by_ttft(*pools(1.1, 1.2, 1.3), over_fastest=Estimate(1.09, 0.95, 1.2))
    assert headline(tied).startswith("Use dp=2,tp=8,ep=16: ")
    assert "ties with dp=16,ep=16 (1.09×, 0.950–1.20)" in said(tied)


def last_lines(results: Results) -> tuple[str, ...]:
    """How to go on."""
    after = answer(results).parts[-1]
    assert isinstance(after, Figure)
    return after.lines


def test_no_command_of_an_aggregated_plan_where_disaggregated_wins():
    best = planned(FIRST, 20_000, BEST)
    assert last_lines(plan(best))[-1] == "vllm serve x"
    assert last_lines(plan(best, *pools(1.1, 1.2, 1.3))) == (
        "Next, on such a cluster: expertlane compare results/plan/experiment.toml",
        "It has the best aggregated ones; compare runs no disaggregated pools.",
    )
    copies = plan(planned(Layout(replicas=2, tp=8), 20_000, BEST))
    assert last_lines(copies)[-1] == "One of 2 replicas: vllm serve x"


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
    assert not any("vllm" in line for line in last_lines(cpus))


@pytest.mark.parametrize(
    ("routing", "words"),
    [
        ("--skew 0.8", "routing skew 0.8 (assumed; --skew 0 is uniform)"),
        ("--skew 0", "routing uniform (assumed; the best case)"),
        ("--routing-trace a/folder/mine.npz", "routing of mine.npz"),
    ],
)
def test_the_setting_has_the_routing_and_the_models_limit(routing, words):
    best = planned(FIRST, 20_000, BEST)
    conditions = replace(best.conditions, routing=routing)
    found = plan(replace(best, conditions=conditions))
    assert answer(found).setting == (
        "paper on h100x16 | 1,024 concurrent, 1,000 in / 1,000 out | TPOT ≤ 20 ms | projected | "
        + words
    )
    model = {"name": "paper", "max_position_embeddings": 2000}
    limited = replace(found, question=found.question | {"model": model})
    assert "1,000 out (the model's limit) | " in answer(limited).setting


def test_one_deployment_has_no_rival():
    found = plan(one())
    assert headline(found).endswith(", the most of 97 that meet the limits.")
    alone = replace(found.plans[0], num_candidates=1, num_too_large=0, num_over_limits=0)
    said = headline(replace(found, plans=(alone,)))
    assert said.endswith("; no other deployment meets the limits.")


def test_gaps_are_given_where_they_exceed_the_noise():
    rows = planned(FIRST, 20_000, BEST), behind(SECOND, 0.95, 0.99, 1.02)
    assert "Gap" not in said(plan(*rows))
    slow = behind(Layout(tp=16), 0.7, 0.8, 0.9, why="µs per token: weight reads in decode +2")
    assert "Gap of #3 to #1: µs per token: weight reads in decode +2." in said(plan(*rows, slow))
    cells = [row[-1] for row in answer(plan(*rows, slow)).parts[0].rows]
    assert cells == ["—", "tie", "−20%"]


def test_the_best_without_experts_apart_is_named():
    other = behind(Layout(tp=16), 0.7, 0.8, 0.9, FAMILY, "µs per token: weight reads +2")
    assert (
        "Best without EP: tp=16, 20% slower than #1 (10–30%); µs per token: weight reads +2."
    ) in said(plan(planned(FIRST, 20_000, BEST), other))


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
    names = "dp=8 on 8 ranks for prefill and tp=8 on 8 for decode"
    tied = plan(best, *pools(0.9, 0.97, 1.05))
    assert f"Disaggregated, {names}: ties with #1 (0.970×, 0.900–1.05), TPOT " in said(tied)
    assert "KV transfer 1.50 ms" in said(tied)
    assert headline(tied).startswith("Use dp=2,tp=8,ep=16: ")
    faster = plan(best, *pools(1.1, 1.2, 1.3))
    assert headline(faster).startswith(f"Use disaggregated pools, {names}: 24.0k tokens/s")
    assert "1.20× (1.10–1.30) the best aggregated, dp=2,tp=8,ep=16" in headline(faster)
    assert "Disaggregated: 20% faster than #1 (10–30%)" in said(faster)


@pytest.mark.parametrize(
    ("why", "words"),
    [
        ("no split", "the devices cannot be split"),
        ("too large", "the model does not fit both pools of any split"),
        ("over limits", "none meets the limits"),
    ],
)
def test_why_nothing_is_disaggregated(why, words):
    assert f"Disaggregated: {words}." in said(plan(one(), no_two_pools=why))


def test_how_sure_it_is():
    judged = replace(PLAN.cluster, judged=JUDGED)
    assert next(iter(how_sure(replace(PLAN, cluster=judged)))) == (
        "Judged on TPOT of a model: 34% median error, 127 rows."
    )
    assert "Not judged" in next(iter(how_sure(PLAN)))


def test_what_most_time_rests_on_is_said():
    assert "Most of the time" not in said(plan(one()))
    # 8 of 10 ms are the decode step's: 0.8 × 0.7 + 0.2 × 0.2
    most = "Most of the time of #1 rests on datasheets and assumptions (60%)"
    assert f"{most}: take the range, not the value." in said(plan(one(timed(8, 0.7, 0.0))))
    several = plan(one(timed(8, 0.7, 0.0)), behind(SECOND, 0.9, 1.02, 1.1))
    assert f"{most}: rankings are reliable, absolute values are not." in said(several)
    most = "Most of the time of #1 lies outside the measured sizes (76%)"
    several = plan(one(timed(8, 0.0, 0.9)), behind(SECOND, 0.9, 1.02, 1.1))
    assert f"{most}: take the range, not the value." in said(several)


def test_cautions_are_part_of_the_answer():
    results = replace(plan(one()), cautions=("Mind the step.",))
    assert "Mind the step." in said(results)
    assert verdict(results).parts[-1] == "Mind the step."


def test_a_price_gives_the_cost_of_the_first():
    priced = with_costs(plan(planned(FIRST, 20_000, BEST)), 3.0)
    assert "Cost of #1: $0.667 (0.333–1.33) per million output tokens" in said(priced)


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
