"""plan, simulate and compare --project say the same of one question."""

import random

import pytest

import expertlane
from expertlane.compare.projection import ExperimentProjector
from expertlane.cost.laws.profile_file import parse_cluster
from expertlane.cost.number_types import NumberTypes
from expertlane.progress import Silent
from expertlane.results.record import BEST
from expertlane.spec.deployment import Deployment
from expertlane.spec.experiment import Experiment
from expertlane.spec.model import PRESETS
from expertlane.spec.workload import Workload

_SKEWS = 0.0, 0.8
_SAME = 1e-3  # of a value
_WORSE = 0.01  # what chance may do to an answer


def draw(seed):
    """A question: the model, the cluster and the load, as `plan` takes them."""
    dice = random.Random(seed)
    return {
        "model": dice.choice(["paper-small", "paper"]),
        "cluster": f"{dice.choice(['h100', 'h200'])}x{dice.choice([2, 4, 8])}",
        "batch": dice.choice([1, 5, 24, 64]),
        "prompt_len": dice.choice([16, 100, 160]),
        "output_len": dice.choice([12, 40]),
        "skew": dice.choice(_SKEWS),
        "seed": dice.randrange(3),
    }


def plan(asked, **more):
    return expertlane.plan(**asked | more)


def best_of(results):
    return results.select("projected", BEST)[0]


def told(record):
    """Tokens a second, mean TPOT and mean TTFT."""
    serving = record.serving[0]
    means = (None if each is None else each.mean for each in (serving.tpot_s, serving.ttft_s))
    return [serving.output_tps.value, *(None if each is None else each.value for each in means)]


@pytest.mark.smoke(1)
@pytest.mark.parametrize("seed", range(8))
def test_simulate_says_of_a_row_what_plan_says(seed):
    asked = draw(seed)
    for row in plan(asked).select("projected", BEST)[:2]:
        layout, num_seqs = row.known_layout, row.serving[0].num_running
        options = row.known_options
        found = expertlane.simulate(
            **asked | {"batch": str(num_seqs)},
            layout=str(layout),
            dispatch=options.dispatch,
            prefill_dispatch=options.prefill_dispatch,
            overlap="on" if options.overlap else "off",
            num_micro_batches=options.num_micro_batches,
            micro_batch_schedule=options.micro_batch_schedule,
            num_redundant_experts=options.num_redundant_experts,
            max_num_seqs=-(-num_seqs // (layout.replicas * layout.dp)),
        )
        assert told(found.deployments[0]) == pytest.approx(told(row), rel=_SAME)


@pytest.mark.smoke(1)
@pytest.mark.parametrize("seed", range(8))
def test_compare_says_of_two_rows_what_plan_says(seed):
    asked = draw(100 + seed)
    rows = plan(asked).select("projected", BEST)[:2]
    model = PRESETS[asked["model"]]
    workload = Workload(asked["batch"], asked["prompt_len"], asked["output_len"], asked["seed"])
    deployments = tuple(
        Deployment(f"row {place}", row.known_layout, row.known_options)
        for place, row in enumerate(rows)
    )
    experiment = Experiment("rows", model, workload, deployments)
    types = NumberTypes.all_of("float16")
    cluster = parse_cluster(asked["cluster"])
    projected = ExperimentProjector(experiment, cluster, types, asked["skew"]).run(Silent(), "")
    for place, row in enumerate(rows):
        mine = next(each for each in projected.deployments if each.name == f"row {place}")
        assert told(mine) == pytest.approx(told(row), rel=_SAME)
    if len(rows) > 1:
        verdict = projected.workload
        assert {verdict.name, verdict.other} == {"row 0", "row 1"}


def more_of(dice, asked):
    """A question that is easier than another in one thing."""
    profile, num = asked["cluster"].split("x")
    changes = [
        {"batch": round(asked["batch"] * dice.choice([1.1, 1.5, 3]))},
        {"cluster": f"{profile}x{2 * int(num)}"},
    ]
    if profile == "h100":
        changes.append({"cluster": f"h200x{num}"})
    return asked | dice.choice(changes)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(16))
def test_more_of_anything_makes_no_answer_worse(seed):
    dice, asked = random.Random(1000 + seed), draw(1000 + seed)
    free = best_of(plan(asked))
    limit_s = free.serving[0].tpot_s.mean.value * dice.choice([0.8, 1.0, 3.0])
    limits = [f"tpot.mean={1e3 * factor * limit_s:.6g}ms" for factor in (1.0, 1.3)]

    def best(asked, limit):
        try:
            return best_of(plan(asked, slo=limit)).serving[0]
        except expertlane.UserError:  # nothing keeps it
            return None

    before = best(asked, limits[0])
    if before is None:
        return
    # Sequences are whole: where a limit is what one more just misses by chance, that one is lost.
    least = (1 - _WORSE - 1 / before.num_running) * before.output_tps.value
    assert best(asked, limits[1]).output_tps.value >= least
    assert best(more_of(dice, asked), limits[0]).output_tps.value >= least


def test_a_limit_takes_all_the_sequences_that_it_allows():
    """Between halves of those that fit."""
    asked = draw(3) | {"batch": 64, "cluster": "h100x2"}
    free = best_of(plan(asked))
    limit_s = 0.9 * free.serving[0].tpot_s.mean.value
    kept = best_of(plan(asked, slo=f"tpot.mean={1e3 * limit_s:.6g}ms"))
    assert 0.9 * limit_s <= kept.serving[0].tpot_s.mean.value <= limit_s
    assert kept.serving[0].num_running not in (16, 32, 64)


@pytest.mark.full
def test_a_percentile_may_be_the_limit():
    asked = draw(4) | {"batch": 24}
    free = best_of(plan(asked))
    mean_s = free.serving[0].ttft_s.mean.value
    kept = best_of(plan(asked, slo=f"ttft.p95={1e3 * mean_s:.6g}ms"))
    assert kept.serving[0].ttft_s.mean.value < mean_s
