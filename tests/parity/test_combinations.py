"""Contract 1 on drawn combinations: layout, schedule, cache, budget, prompts, preemptions, draws.

Requests come from a fixed pool whose outputs the reference computes once. A request's tokens are
compared everywhere: the pool has no near tie.
"""

from collections import Counter
from dataclasses import replace
from typing import NamedTuple, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import PoolKeeper
from distributed.running import Inline, deployment, runner_on
from expertlane.engine.elastic.rebalancing import Rebalancer
from expertlane.engine.ranks.commands import SetDispatch
from expertlane.errors import SpecError
from expertlane.schedule.plan import StepOutcome, StepPlan
from expertlane.schedule.request import Limits, Request
from expertlane.schedule.scheduler import ContinuousScheduler
from expertlane.spec.deployment import DISPATCH_FORMS, DispatchMode, DispatchRow, DispatchTable
from expertlane.spec.layout import Layout
from expertlane.spec.model import PRESETS
from expertlane.spec.names import CheckLevel
from parity.contract import check_contract
from parity.reference import ReferenceRun
from parity.request_pool import KINDS, MAX_OUTPUT_LEN, PooledRequest, requests
from parity.test_equivalence import small_layouts
from schedule.paged import check_empty

TINY = PRESETS["paper-tiny"]
MAX_LOGPROB_ERROR = 1e-4


@pytest.fixture(scope="module")
def asked(references) -> list[PooledRequest]:
    return requests(references.model(TINY, 0), TINY.vocab_size)


class Arrival(NamedTuple):
    """A request to be: which of the pool, its output's length, after how many steps it comes."""

    number: int
    output_len: int
    step: int


class Case(NamedTuple):
    """What a run can vary in.

    Attributes:
        dispatch: hierarchical where nodes hold equally many ranks, else flat.
        is_switching: by a drawn table, dispatch form and overlap change with the tokens of a step.
        num_redundant: fewer where that is more than a rank can hold.
        lookahead: not with pipeline stages.
        check: how much ranks look for silent errors, of which there are none.
        work: token budgets that the tokens of a data-parallel rank may fill; steps take long.
        seed: of which requests come and when, and how small the cache is.
    """

    layout: str
    ranks_per_node: int
    dispatch: str
    is_switching: bool
    placement: str
    num_redundant: int
    rebalance_steps: int
    overlap: bool
    num_micro_batches: int
    schedule: str
    block_size: int
    budget: int
    max_num_seqs: int
    prefix_caching: bool
    lookahead: bool
    check: CheckLevel
    work: int
    seed: int

    def draw(self, asked: list[PooledRequest]) -> tuple[list[Arrival], int]:
        """The requests in the order they come, one at least; the number of blocks.

        Hypothesis likes to change one thing at a time: the requests then change with it.
        """
        random = np.random.default_rng([self.seed, *map(ord, str(self))])
        layout = Layout.parse(self.layout)
        num_tables = layout.replicas * layout.dp
        left = self.work * max(self.budget, 6) * num_tables
        kept: list[Arrival] = []
        for _ in range(random.integers(2, 10 + 4 * num_tables)):
            number = int(random.integers(len(asked)))
            output_len = int(random.integers(1, MAX_OUTPUT_LEN + 1))
            left -= len(asked[number].prompt) + output_len
            if left >= 0 or not kept:
                kept.append(Arrival(number, output_len, int(random.choice([0, 0, 0, 1, 2, 5, 9]))))
        most = max(len(asked[number].prompt) + output_len - 1 for number, output_len, _ in kept)
        num_blocks = -(-int(most * random.choice([1, 1.3, 1.6, 2])) // self.block_size)
        return sorted(kept, key=lambda arrival: arrival.step), num_blocks


def cases(max_num_ranks: int, work: int) -> st.SearchStrategy[Case]:
    """Layouts of more than eight ranks, if any, are a third: their steps take long."""
    small = small_layouts(most=min(8, max_num_ranks))
    layouts = [small.filter(lambda layout: not layout.endswith("ep=1")), small]
    if max_num_ranks > 8:
        layouts.append(small_layouts(least=9, most=max_num_ranks))
    return st.builds(
        Case,
        layout=st.one_of(layouts),
        ranks_per_node=st.sampled_from([1, 2, 4, 8]),
        dispatch=st.sampled_from([*DISPATCH_FORMS][::-1]),
        is_switching=st.sampled_from([True, False]),
        placement=st.sampled_from(["linear", "round_robin"]),
        num_redundant=st.sampled_from([0, 1, 5, 16]),
        rebalance_steps=st.sampled_from([0, 1, 3]),
        overlap=st.booleans(),
        num_micro_batches=st.integers(1, 4),
        schedule=st.sampled_from(["drained", "rotating"]),
        block_size=st.sampled_from([1, 2, 3, 4, 16]),
        budget=st.sampled_from(range(1, 65)),
        max_num_seqs=st.sampled_from([8, 3]),
        prefix_caching=st.booleans(),
        lookahead=st.booleans(),
        check=st.sampled_from(["full", "light", "off"]),
        work=st.just(work),
        seed=st.integers(0, 2**32 - 1),
    )


def spreads_evenly(layout: Layout, case: Case) -> bool:
    try:
        layout.ep_ranks_per_node(case.ranks_per_node)
    except SpecError:
        return False
    return True


def draw_table(case: Case, layout: Layout) -> DispatchTable:
    """Of all forms that the nodes allow, with and without overlap; another at nearly every size."""
    by_node = spreads_evenly(layout, case)
    forms = [form for form, of in DISPATCH_FORMS.items() if by_node or not of.by_node]
    modes = [DispatchMode(form, overlap) for form in forms for overlap in (False, True)]
    random = np.random.default_rng(case.seed)
    sizes = [1, 2, 3, 4, 6, 9, 14, 24, 40]
    rows = [DispatchRow(size, tuple(random.random(len(modes)).tolist())) for size in sizes]
    return DispatchTable(tuple(modes), tuple(rows))


class Combination:
    """One run of a case on real ranks, the reference's tokens fed, and what was seen.

    With lookahead ranks go on with what they chose: the same, or the check fails.

    Attributes:
        logits, logprobs, tokens: of each request, in the order they came.
    """

    def __init__(self, pool: PoolKeeper, asked: list[PooledRequest], case: Case) -> None:
        self.asked = asked
        self.arrivals, num_blocks = case.draw(asked)
        layout = Layout.parse(case.layout)
        # Groups by node are made at the start, for whatever the table may say.
        dispatch = "hierarchical" if case.is_switching else case.dispatch
        num_redundant = min(case.num_redundant, TINY.num_experts * (layout.ep - 1))
        chosen = deployment(
            case.layout,
            dispatch=dispatch if spreads_evenly(layout, case) else "all_to_all",
            placement=case.placement,
            num_redundant_experts=num_redundant,
            overlap=case.overlap,
            num_micro_batches=case.num_micro_batches,
            micro_batch_schedule=case.schedule,
        )
        limits = Limits(
            TINY.vocab_size,
            TINY.max_position_embeddings,
            num_blocks,
            case.block_size,
            case.budget,
            case.max_num_seqs,
            prefix_caching=case.prefix_caching,
        )
        self.layout, self.dispatch = layout, chosen.options.dispatch
        ranks = pool.pool(chosen.layout.world_size)
        self.runner = runner_on(
            *(ranks, TINY, chosen, limits),
            ranks_per_node=case.ranks_per_node,
            check=case.check,
        )
        self.table: DispatchTable | None = None
        self.modes: set[DispatchMode] = set()
        if case.is_switching:
            self.table = draw_table(case, layout)
            ranks.call(SetDispatch(self.table), ranks=range(layout.world_size))
        if case.rebalance_steps and layout.ep > 1:  # at every chance, whether it pays or not
            self.runner.rebalancer = Rebalancer(
                ranks,
                self.runner.arranged,
                num_steps=case.rebalance_steps,
                log=lambda line: None,
                worth=lambda decision: decision.num_bytes,
                executor=Inline(),
            )
        self.scheduler = ContinuousScheduler(
            chosen.layout,
            chosen.options,
            limits,
            lookahead=case.lookahead and chosen.layout.pp == 1,
            return_logits=True,
            record=self.runner.rebalancer is not None,
        )
        self.requests: list[Request] = []
        self.most_in_flight = 0
        self.num_steps = 0
        self.logits: list[list[np.ndarray]] = [[] for _ in self.arrivals]
        self.logprobs: list[list[float]] = [[] for _ in self.arrivals]
        self.tokens: list[list[int]] = [[] for _ in self.arrivals]

    def run(self) -> None:
        in_flight: dict[object, StepPlan] = {}
        while True:
            self._add(idle=not self.scheduler.has_unfinished)
            while (plan := self.scheduler.next_plan()) is not None:
                in_flight[self.runner.submit(plan)] = plan
            if not in_flight:
                break
            self.most_in_flight = max(self.most_in_flight, len(in_flight))
            handle = self.runner.first_done(list(in_flight))
            self._finish(in_flight.pop(handle), self.runner.collect(handle))
        check_empty(self.scheduler)
        assert [len(request.output_token_ids) for request in self.requests] == [
            arrival.output_len for arrival in self.arrivals
        ]

    def _add(self, *, idle: bool) -> None:
        """Queue what is due, and when there is nothing else, the next."""
        for arrival in self.arrivals[len(self.requests) :]:
            if arrival.step > self.num_steps and not idle:
                return
            prompt, params, _ = self.asked[arrival.number]
            name = str(len(self.requests))
            sampling = params if params.needs_logits else None
            request = Request(
                name,
                prompt,
                max_tokens=arrival.output_len,
                sampling=sampling,
                sampling_seed=params.seed or 0,
            )
            self.scheduler.add(request)
            self.requests.append(request)
            idle = False

    def _finish(self, plan: StepPlan, outcome: StepOutcome) -> None:
        self.num_steps += 1
        if self.table is not None:
            sizes = [max(batch.num_tokens for batch in each) for each in plan.micro_batches]
            self.modes |= {self.table.choose(-(-size // self.layout.tp)) for size in sizes}
        forced = {}
        for seq, token in outcome.token_ids.items():
            self.tokens[seq].append(token)
            self.logits[seq].append(outcome.logits[seq])
            if seq in outcome.logprobs:
                assert outcome.logprobs[seq].token_id == token
                self.logprobs[seq].append(outcome.logprobs[seq].logprob)
            reference = self.asked[self.arrivals[seq].number].run
            forced[seq] = int(reference.tokens[len(self.requests[seq].output_token_ids)])
        self.scheduler.commit(plan, replace(outcome, token_ids=forced))

    def check(self) -> None:
        """Hold all tokens of all requests against the reference at once."""
        runs = [self.asked[arrival.number].run for arrival in self.arrivals]
        lens = [arrival.output_len for arrival in self.arrivals]
        pairs = list(zip(runs, lens, strict=True))
        tokens = np.concatenate([run.tokens[:length] for run, length in pairs])
        reference = ReferenceRun(
            tokens[None],
            np.concatenate([run.logits[:length] for run, length in pairs])[None],
            np.concatenate([run.router_margins[:length] for run, length in pairs])[None],
        )
        got = np.array([token for of_request in self.tokens for token in of_request])
        logits = np.array([row for of_request in self.logits for row in of_request])
        check_contract(reference, logits[None], got[None])
        assert got.tolist() == tokens.tolist()
        for arrival, found in zip(self.arrivals, self.logprobs, strict=True):
            _, params, run = self.asked[arrival.number]
            assert len(found) == (0 if params.logprobs is None else arrival.output_len)
            for logprob, row, token in zip(found, run.logits, run.tokens, strict=False):
                exact = row[token] - np.log(np.exp(row.astype(np.float64)).sum())
                assert abs(logprob - exact) <= MAX_LOGPROB_ERROR


def run_combinations(pools, asked, num: int, max_num_ranks: int, work: int) -> Counter[str]:
    """Check `num` cases; gives how many there were of each kind."""
    seen = Counter[str]()

    @settings(derandomize=True, deadline=None, max_examples=num, database=None)
    @given(cases(max_num_ranks, work))
    def check(case: Case) -> None:
        combination = Combination(pools, asked, case)
        combination.run()
        combination.check()
        num_hits = sum(
            table.blocks.num_hits for row in combination.scheduler.tables for table in row
        )
        seen["cases"] += 1
        seen["cases on over eight ranks"] += combination.layout.world_size > 8
        seen["steps"] += combination.num_steps
        seen["tokens"] += sum(map(len, combination.tokens))
        seen["preemptions"] += combination.scheduler.num_preemptions
        if combination.layout.ep > 1:
            forms = {mode.form for mode in combination.modes} or {combination.dispatch}
            seen.update(f"cases with {form}" for form in forms)
        seen[f"cases with check {case.check}"] += 1
        seen["cases that switch"] += len(combination.modes) > 2
        if combination.runner.rebalancer is not None:
            switched = [each.switched for each in combination.runner.rebalancer.decisions]
            seen["cases with a rebalance"] += any(step is not None for step in switched)
        seen["cases with preemptions"] += combination.scheduler.num_preemptions > 0
        seen["cases with shared blocks"] += num_hits > 0
        seen["cases with several steps in flight"] += combination.most_in_flight > 1

    check()
    print(dict(seen))
    assert seen["cases"] >= num
    return seen


def check_combinations(pools, asked, num: int, max_num_ranks: int, work: int) -> None:
    """Run `num` cases; among them must be enough of what is hard."""
    seen = run_combinations(pools, asked, num, max_num_ranks, work)
    assert seen["cases with preemptions"] >= num / 6
    for form in DISPATCH_FORMS:
        assert seen[f"cases with {form}"] >= num / 25
    for level in get_args(CheckLevel):
        assert seen[f"cases with check {level}"] >= num / 10
    assert seen["cases on over eight ranks"] >= (num / 10 if max_num_ranks > 8 else 0)
    assert seen["cases that switch"] >= num / 10
    assert seen["cases with a rebalance"] >= num / 10
    assert seen["cases with shared blocks"] >= num / 25
    assert seen["cases with several steps in flight"] >= num / 25


@pytest.fixture
def torch_pools(monkeypatch):
    """Ranks that compute with torch alone."""
    monkeypatch.setenv("EXPERTLANE_BACKEND", "torch")
    keeper = PoolKeeper()
    yield keeper
    keeper.close()


def test_a_few_combinations(pools, asked):
    run_combinations(pools, asked, 6, max_num_ranks=4, work=12)


@pytest.mark.full
def test_a_few_combinations_with_torch_alone(asked, torch_pools):
    run_combinations(torch_pools, asked, 3, max_num_ranks=4, work=12)


@pytest.mark.full
def test_some_combinations(pools, asked):
    check_combinations(pools, asked, 25, max_num_ranks=4, work=12)


@pytest.mark.full
def test_some_combinations_with_torch_alone(asked, torch_pools):
    check_combinations(torch_pools, asked, 25, max_num_ranks=4, work=12)


@pytest.mark.full
@pytest.mark.timeout(5400)
def test_many_combinations(pools, asked):
    check_combinations(pools, asked, 200, max_num_ranks=16, work=25)


def test_the_pool_holds_every_kind(asked):
    """Also that sampling is not greedy in disguise, and that prompts do begin alike."""
    assert {replace(request.params, seed=None) for request in asked} == set(KINDS)
    drawn = [request for request in asked if not request.params.is_greedy]
    greedy_tokens = [request.run.logits.argmax(-1) for request in drawn]
    assert all(
        (request.run.tokens != tokens).any()
        for request, tokens in zip(drawn, greedy_tokens, strict=True)
    )
    beginnings = Counter(tuple(request.prompt[:4]) for request in asked)
    assert max(beginnings.values()) >= 3
