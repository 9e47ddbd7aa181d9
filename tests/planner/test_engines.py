"""What each engine runs: rows rule out what they say, and plans keep to them."""

from dataclasses import replace

import pytest

from expertlane.cost.laws.profile import read_profile
from expertlane.errors import UserError
from expertlane.planner.candidates import Candidate, PlanRequest, candidates_of, valid_layouts
from expertlane.planner.engines import ENGINES, RolePool, engines_on
from expertlane.planner.ranking import contender, ranked
from expertlane.planner.results import of_each_engine
from expertlane.planner.screen import fitting
from expertlane.planner.search import Search
from expertlane.planner.simulated import simulated_pool
from expertlane.planner.two_pools import TwoPools, TwoPoolSearch
from expertlane.spec.deployment import Options
from expertlane.spec.layout import Layout
from expertlane.spec.mixers import StateMixer
from expertlane.spec.model import PRESETS
from expertlane.spec.workload import Workload
from planner.requests import MIXED, request_of

PAPER = PRESETS["paper"]
MANY = PAPER.with_overrides(
    name="many", num_experts=256, num_attention_heads=128, num_key_value_heads=4
)
ALL = ("vllm", "sglang", "trtllm", "expertlane")
GATHERED, NORMAL = Options(dispatch="all_gather"), Options(dispatch="hierarchical")
PREFILL_NORMAL = Options(prefill_dispatch="hierarchical")
ROTATING = Options(num_micro_batches=2, micro_batch_schedule="rotating")


def candidate(layout: str, options: Options | None = None, drafts: int = 0) -> Candidate:
    return Candidate(Layout.parse(layout), options or Options(), drafts)


def who_runs(each: Candidate, role="both", model=MANY) -> tuple[str, ...]:
    return tuple(name for name, engine in ENGINES.items() if engine.runs(each, model, role))


def test_cards_without_nvlink_are_not_dispatched_to_by_deepep():
    engines = engines_on(read_profile("l40s"))
    by_deepep, gathered = candidate("dp=8,ep=8"), candidate("dp=8,ep=8", GATHERED)
    assert who_runs(by_deepep) == ("sglang", "trtllm", "expertlane")
    assert [name for name, each in engines.items() if each.runs(by_deepep, MANY)] == ["expertlane"]
    assert tuple(name for name, each in engines.items() if each.runs(gathered, MANY)) == ALL
    row = engines["sglang"].broken(by_deepep, MANY)
    assert row is not None
    assert "NVLink" in row.says
    assert engines_on(read_profile("h100")) is ENGINES


@pytest.mark.parametrize(
    ("layout", "options", "engines"),
    [
        ("tp=8", None, ALL),
        ("replicas=4,tp=2", None, ALL),
        ("dp=8", None, ALL),
        ("dp=2,tp=4", None, ("vllm", "sglang", "expertlane")),
        ("tp=8,ep=8", GATHERED, ALL),
        ("tp=8,ep=2", GATHERED, ("sglang", "trtllm", "expertlane")),
        ("tp=8,ep=8", None, ("sglang", "expertlane")),
        ("dp=8,ep=8", GATHERED, ALL),
        ("dp=8,ep=8", None, ("sglang", "trtllm", "expertlane")),
        ("dp=8,ep=4", None, ("trtllm", "expertlane")),
        ("dp=16,ep=16", NORMAL, ("trtllm", "expertlane")),
        ("dp=16,ep=16", PREFILL_NORMAL, ("sglang", "trtllm", "expertlane")),
        ("dp=8,ep=8", replace(GATHERED, prefill_dispatch="all_to_all"), ("trtllm", "expertlane")),
        ("dp=8,ep=8", replace(GATHERED, num_redundant_experts=8), ALL),
        ("dp=8,ep=8", replace(GATHERED, num_redundant_experts=2), ("expertlane",)),
        ("tp=8,ep=8", replace(GATHERED, num_redundant_experts=8), ("vllm", "sglang", "expertlane")),
        ("dp=8,ep=8", Options(overlap=True), ("sglang", "expertlane")),
        ("dp=8,ep=8", replace(GATHERED, overlap=True), ("expertlane",)),
        ("pp=2,tp=4", ROTATING, ALL),
        ("pp=2,tp=4", None, ("expertlane",)),
        ("pp=4,tp=2", ROTATING, ("expertlane",)),
        ("tp=8,dcp=8", None, ("vllm", "sglang")),
        ("dp=24,ep=24", GATHERED, ("vllm", "trtllm", "expertlane")),  # 256 experts
    ],
)
def test_servers_that_an_engine_runs(layout, options, engines):
    assert who_runs(candidate(layout, options)) == engines


@pytest.mark.parametrize(
    ("layout", "options", "role", "engines"),
    [
        ("dp=8,ep=8", None, "decode", ("vllm", "sglang", "trtllm")),
        ("dp=8,ep=8", None, "prefill", ("vllm", "sglang", "trtllm")),
        ("dp=16,ep=16", NORMAL, "decode", ("trtllm",)),
        ("dp=16,ep=16", NORMAL, "prefill", ("vllm", "sglang", "trtllm")),
        ("dp=8,ep=8", Options(overlap=True), "decode", ("vllm", "sglang")),
        ("pp=2,tp=4", ROTATING, "decode", ("sglang", "trtllm")),
        ("pp=2,tp=4", ROTATING, "prefill", ("vllm", "sglang", "trtllm")),
        ("dp=168,ep=168", replace(NORMAL, num_redundant_experts=80), "prefill", ("trtllm",)),
        # As published for DeepSeek-V3 on 12 nodes: 288 slots on 9 of them.
        ("dp=72,ep=72", Options(overlap=True, num_redundant_experts=32), "decode",
         ("vllm", "sglang")),
        ("dp=32,ep=32", replace(NORMAL, overlap=True, num_redundant_experts=32), "prefill",
         ("vllm", "sglang")),
    ],
)  # fmt: skip
def test_pools_that_an_engine_runs(layout, options, role, engines):
    assert who_runs(candidate(layout, options), role) == engines


def test_drafts_without_a_pipeline():
    assert who_runs(candidate("tp=8", drafts=2)) == ("vllm", "sglang", "trtllm")
    assert who_runs(candidate("pp=2,tp=4", ROTATING, 2)) == ("vllm",)
    assert who_runs(candidate("pp=2,tp=4", ROTATING, 2), "prefill") == ("vllm", "sglang")


def test_positions_shared_beside_states_or_windows():
    state = StateMixer("lightning", num_heads=128, num_key_heads=128, key_dim=8, value_dim=8)
    windows = (None, *(64,) * (MANY.num_hidden_layers - 1))
    for more in ({}, {"sliding_window": windows}, {"state": state, "state_layers": (1,)}):
        runs = "vllm" in who_runs(candidate("tp=8,dcp=2"), model=MANY.with_overrides(**more))
        assert runs == (not more)


@pytest.mark.parametrize(
    ("prefill", "decode", "engines"),
    [
        ("tp=8", "tp=4", ("vllm", "sglang", "trtllm")),
        ("tp=2", "tp=3", ("sglang", "trtllm")),
        ("tp=8", "tp=8,dcp=8", ("sglang",)),  # grouped queries
        ("tp=8,dcp=8", "tp=8", ()),
    ],
)
def test_pools_side_by_side(prefill, decode, engines):
    pools = candidate(prefill), candidate(decode)
    assert tuple(name for name, each in ENGINES.items() if each.joins(*pools, MANY)) == engines


def test_stages_of_pools():
    for prefill, engines in (("pp=2,tp=4", ("sglang", "trtllm")), ("tp=8", ("trtllm",))):
        options = ROTATING if "pp" in prefill else None
        pools = candidate(prefill, options), candidate("pp=2,tp=4", ROTATING)
        joined = tuple(name for name, each in ENGINES.items() if each.joins(*pools, MANY))
        assert joined == engines


@pytest.fixture(scope="module")
def drawn() -> list[RolePool]:
    """Every deployment on a few numbers of devices, also with what no candidate has."""
    return [
        RolePool(each._replace(options=options, num_drafts=num_drafts), MANY, role)
        for size in (8, 24, 168)
        for layout in valid_layouts(MANY, size)
        if size == 8 or (layout.dp == layout.ep and layout.pp == 1)
        for each in candidates_of(layout, MANY, 8)
        for options in (
            each.options,
            replace(each.options, num_redundant_experts=3),
            replace(each.options, prefill_dispatch="all_to_all"),
        )
        for num_drafts in (0, 2)
        for role in ("both", "prefill", "decode")
    ]


@pytest.mark.parametrize("name", ALL)
def test_every_row_has_a_source_and_rules_something_out(name, drawn):
    engine = ENGINES[name]
    assert all(row.source and row.says for row in (*engine.rows, *(engine.pairs or ())))
    unused = set(engine.rows)
    gated = RolePool(candidate("tp=8"), MANY.with_overrides(attention_gate="sigmoid"), "both")
    window = MANY.with_overrides(sliding_window=(64,) * MANY.num_hidden_layers)
    windows = RolePool(candidate("tp=8,dcp=2"), window, "both")
    for pool in (*drawn, gated, windows):
        unused -= {row for row in unused if row.rules_out(pool)}
    assert not unused


def request_for(engine=None) -> PlanRequest:
    return replace(request_of(workload=Workload(256, 2048, 64)), engine=engine)


@pytest.mark.parametrize("name", ALL)
def test_a_plan_for_an_engine_has_nothing_else(name):
    search = Search(request_for(name))
    screened = search.screen()
    options = search.options(screened)
    assert options
    assert all(ENGINES[name].runs(each.candidate, MIXED) for each in options)
    everything = Search(request_for())
    every = everything.options(everything.screen())
    runs = {each.candidate for each in every if ENGINES[name].runs(each.candidate, MIXED)}
    assert runs <= {each.candidate for each in options}
    pools = TwoPoolSearch(request_for(name)).run()
    if name == "expertlane":
        assert pools == "not run"
    else:
        assert isinstance(pools, TwoPools)
        assert ENGINES[name].joins(pools.prefill.candidate, pools.decode.candidate, MIXED)


def test_an_engine_that_runs_nothing_says_so():
    search = Search(request_for("trtllm"))
    every = fitting(Search(request_for()).screen())
    mixed = [each for each in every if str(each.candidate.layout) == "dp=2,tp=2"]
    with pytest.raises(UserError, match="TensorRT-LLM runs no deployment of mixed that fits"):
        search.options(mixed)


def best_of_engines(engine=None, pools=None):
    """The ranking of one pool, and the best of each engine beside some disaggregated pools."""
    search = Search(request_for(engine))
    screened = search.screen()
    found = simulated_pool(search, screened, lambda _: None)
    contenders = [contender(each, search.request.workload) for each in found.finalists]
    ranking = ranked(contenders, search.request.goals)
    of_pools = TwoPoolSearch(search.request, search.known, fitting(screened))
    return ranking, of_each_engine(search, ranking, pools or of_pools.run(), of_pools)


@pytest.mark.full
def test_the_best_of_each_engine_is_what_it_runs():
    ranking, choices = best_of_engines()
    assert [each.engine.name for each in choices] == list(ALL)
    chosen = ranking.chosen.finalist.candidate
    for each in choices:
        best = each.aggregated
        assert best is not None
        assert each.engine.runs(best.finalist.candidate, MIXED)
        assert best.tps.value <= ranking.chosen.tps.value
        if each.engine.runs(chosen, MIXED):
            assert best is ranking.chosen
        if each.pools is not None:
            pools = each.pools.prefill.candidate, each.pools.decode.candidate
            assert each.engine.joins(*pools, MIXED)
