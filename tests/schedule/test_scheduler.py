"""Steps of one rank by hand: chunks, admission, preemption, shared blocks, arrived prompts."""

import pytest

from expertlane.schedule.request import FinishReason, Request, RequestState
from expertlane.spec.names import Phase
from schedule.by_hand import (
    add,
    answer,
    make,
    make_limits,
    only_batch,
    request,
    scheduled,
    step,
)
from schedule.paged import PagedRunner, check_empty, seqs_of


def test_nothing_to_do():
    scheduler = make("replicas=2,dp=2")
    assert scheduler.next_plan() is None
    check_empty(scheduler)


def test_one_request_by_hand():
    scheduler = make(max_num_batched_tokens=4, block_size=4)
    (one,) = add(scheduler, request("a", prompt_len=6, max_tokens=4, first=20))
    assert one.state is RequestState.WAITING

    first = scheduler.next_plan()
    assert scheduler.next_plan() is None  # in flight
    assert one.state is RequestState.RUNNING
    assert (first.step, first.replica, first.phase) == (0, 0, Phase.PREFILL)
    batch = only_batch(first)
    assert batch.seq_ids.tolist() == [0]
    assert batch.num_computed_tokens.tolist() == [0]
    assert batch.token_ids.tolist() == [20, 21, 22, 23]
    assert batch.block_tables.tolist() == [[0, 1]]
    assert batch.yields_token.tolist() == [False]
    answer(scheduler, first)
    assert one.output_token_ids == []
    assert scheduler.stepped == []

    batch = only_batch(step(scheduler, token=50))
    assert batch.num_computed_tokens.tolist() == [4]
    assert batch.token_ids.tolist() == [24, 25]
    assert batch.yields_token.tolist() == [True]
    assert scheduler.stepped == [one]

    plan = step(scheduler, token=51)
    batch = only_batch(plan)
    assert (plan.step, plan.phase) == (2, Phase.DECODE)
    assert batch.num_computed_tokens.tolist() == [6]
    assert batch.token_ids.tolist() == [50]
    assert batch.yields_token.tolist() == [True]

    assert only_batch(step(scheduler, token=52)).block_tables.tolist() == [[0, 1]]
    batch = only_batch(step(scheduler, token=53))  # position 8: a third block
    assert batch.num_computed_tokens.tolist() == [8]
    assert batch.block_tables.tolist() == [[0, 1, 2]]
    assert one.output_token_ids == [50, 51, 52, 53]
    assert (one.state, one.finish_reason) == (RequestState.FINISHED, FinishReason.LENGTH)
    assert scheduler.next_plan() is None
    check_empty(scheduler)


def test_decodes_go_first_then_running_prompts_then_waiting_ones():
    scheduler = make(max_num_batched_tokens=6)
    add(scheduler, request("a", 2), request("b", 9), request("c", 3))
    assert scheduled(step(scheduler)) == [[{0: 2, 1: 4}]]
    mixed = step(scheduler)
    assert scheduled(mixed) == [[{0: 1, 1: 5}]]
    assert mixed.phase is Phase.PREFILL
    assert only_batch(mixed).yields_token.tolist() == [True, True]
    assert scheduled(step(scheduler)) == [[{0: 1, 1: 1, 2: 3}]]
    # Each row keeps its place from step to step.
    assert scheduled(step(scheduler)) == [[{0: 1, 1: 1, 2: 1}]]


def test_a_budget_under_the_number_of_decodes_goes_round():
    scheduler = make(max_num_batched_tokens=2)
    add(scheduler, *(request(name) for name in "abc"))
    turns = [seqs_of(step(scheduler)) for _ in range(6)]
    assert turns == [[0, 1], [0, 1], [0, 1], [0, 1], [2], [2]]

    scheduler = make(max_num_batched_tokens=3)
    add(scheduler, *(request(name, max_tokens=20) for name in "abcd"))
    step(scheduler)
    assert [seqs_of(step(scheduler)) for _ in range(2)] == [[0, 1, 2]] * 2


def test_max_num_seqs_bounds_what_runs():
    scheduler = make(max_num_seqs=2)
    add(scheduler, *(request(name, max_tokens=2) for name in "abc"))
    turns = [seqs_of(step(scheduler)) for _ in range(4)]
    assert turns == [[0, 1], [0, 1], [2], [2]]


def test_admission_leaves_a_block_for_each_that_runs():
    # Blocks of 4: "a" takes 2 of 5, "b" would take the other 3 and leave none for "a" to grow into.
    scheduler = make(num_blocks=5)
    add(scheduler, request("a", 5, max_tokens=3), request("b", 9, first=30), request("c"))
    assert seqs_of(step(scheduler)) == [0]
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 2)  # "c" does not pass "b"
    assert [seqs_of(step(scheduler)) for _ in range(3)] == [[0], [0], [1, 2]]


def test_preemption_by_hand():
    # 4 blocks of 2; "a" and "b" start with one block each and grow until none is free.
    scheduler = make(num_blocks=4, block_size=2, prefix_caching=False)
    first, last = add(
        scheduler, request("a", 2, max_tokens=6, first=10), request("b", 2, max_tokens=5, first=30)
    )
    assert scheduled(step(scheduler, token=1)) == [[{0: 2, 1: 2}]]
    assert [seqs_of(step(scheduler, token)) for token in (2, 3)] == [[0, 1]] * 2
    assert last.output_token_ids == [1, 2, 3]
    # "a" is at position 4 and all 4 blocks are held: "b" goes.
    assert seqs_of(step(scheduler, token=4)) == [0]
    assert last.state is RequestState.WAITING
    assert last.num_preemptions == scheduler.num_preemptions == 1
    assert scheduler.tables[0][0].blocks.num_free == 1
    assert [seqs_of(step(scheduler, token)) for token in (5, 6)] == [[0]] * 2
    assert first.output_token_ids == [1, 2, 3, 4, 5, 6]
    # Its prompt is now the old one and what it had generated.
    batch = only_batch(step(scheduler, token=8))
    assert batch.token_ids.tolist() == [30, 31, 1, 2, 3]
    assert batch.num_computed_tokens.tolist() == [0]
    assert batch.yields_token.tolist() == [True]
    step(scheduler, token=9)
    assert last.output_token_ids == [1, 2, 3, 8, 9]
    check_empty(scheduler)


def test_the_last_one_waits_with_its_blocks_instead_of_preempting_itself():
    # 4 blocks of 2; in the end "a" needs 2 and "b" 3.
    scheduler = make(num_blocks=4, block_size=2, prefix_caching=False)
    _, last = add(scheduler, request("a", 1, max_tokens=4), request("b", 2, max_tokens=4, first=30))
    # At position 4, "b" finds no block; "a" goes on, and what it leaves is for "b".
    assert [seqs_of(step(scheduler)) for _ in range(5)] == [[0, 1], [0, 1], [0, 1], [0], [1]]
    assert last.finish_reason is FinishReason.LENGTH
    assert last.num_preemptions == 0
    check_empty(scheduler)


def test_full_blocks_are_shared_once_they_are_computed():
    limits = make_limits()
    scheduler = make()
    runner = PagedRunner(scheduler, limits)
    same = [runner.add(request(name, prompt_len=10, max_tokens=2)) for name in "ab"]
    plan = scheduler.next_plan()
    # Both in one step: nothing to share yet.
    assert scheduled(plan) == [[{0: 10, 1: 10}]]
    scheduler.commit(plan, runner.collect(runner.submit(plan)))
    late = runner.add(request("c", prompt_len=10, max_tokens=2))
    plan = scheduler.next_plan()
    assert scheduled(plan) == [[{0: 1, 1: 1, 2: 2}]]  # 2 of its 3 blocks are there
    batch = only_batch(plan)
    assert batch.num_computed_tokens.tolist() == [10, 10, 8]
    assert batch.block_tables[2, :2].tolist() == batch.block_tables[0, :2].tolist()
    assert batch.block_tables[2, 2] not in batch.block_tables[:2]
    manager = scheduler.tables[0][0].blocks
    assert (manager.num_hits, manager.num_cached) == (2, 2)
    runner.submit(plan)
    for _ in range(2):
        scheduler.commit(plan, runner.collect(plan.step))
        plan = scheduler.next_plan()
        if plan is not None:
            runner.submit(plan)
    assert plan is None
    assert [each.output_token_ids for each in same] == [late.output_token_ids] * 2
    check_empty(scheduler)


def test_the_last_token_of_a_known_prompt_is_computed_again():
    scheduler = make()
    add(scheduler, request("a", prompt_len=8, max_tokens=1))
    step(scheduler)
    add(scheduler, request("b", prompt_len=8, max_tokens=1))
    batch = only_batch(step(scheduler))
    assert batch.num_computed_tokens.tolist() == [4]
    assert batch.token_ids.tolist() == [4, 5, 6, 7]


def test_without_prefix_caching_nothing_is_shared():
    scheduler = make(prefix_caching=False)
    for name in "ab":
        add(scheduler, request(name, prompt_len=9, max_tokens=1))
        assert only_batch(step(scheduler)).num_tokens == 9
    assert scheduler.tables[0][0].blocks.num_cached == 0


@pytest.mark.parametrize(("num_arrived", "num_computed"), [(6, 6), (7, 6), (99, 6), (3, 3)])
def test_only_what_did_not_arrive_is_computed(num_arrived, num_computed):
    scheduler = make()
    add(scheduler, request("moved", 7, num_arrived_tokens=num_arrived))
    batch = only_batch(step(scheduler))
    assert batch.num_computed_tokens.tolist() == [num_computed]
    assert batch.num_scheduled_tokens.tolist() == [7 - num_computed]
    assert batch.yields_token.tolist() == [True]


def test_its_blocks_are_held_from_the_start():
    scheduler = make(num_blocks=4, block_size=4)
    first, _ = add(
        scheduler, request("moved", 9, num_arrived_tokens=8), request("next", 9, first=50)
    )
    batch = only_batch(step(scheduler))
    assert batch.seq_ids.tolist() == [first.seq_id]
    assert scheduler.num_waiting == 1


def test_a_preempted_one_computes_all_again():
    scheduler = make(num_blocks=4, block_size=4, max_num_seqs=2, prefix_caching=False)
    older, moved = add(
        scheduler,
        request("older", 4, max_tokens=12),
        request("moved", 4, max_tokens=8, first=50, num_arrived_tokens=3),
    )
    computed = []
    while scheduler.has_unfinished:
        plan = scheduler.next_plan()
        batch = only_batch(plan)
        for seq_id, before, new in zip(
            batch.seq_ids, batch.num_computed_tokens, batch.num_scheduled_tokens, strict=True
        ):
            if seq_id == moved.seq_id:
                computed.append((int(before), int(new)))
        answer(scheduler, plan)
    assert moved.num_preemptions == 1
    assert computed[0] == (3, 1)
    again = next(place for place, (before, _) in enumerate(computed) if before == 0)
    assert computed[again] == (0, 4 + again)
    assert len(older.output_token_ids) == 12
    assert len(moved.output_token_ids) == 8


def _served(scheduler, *prompts):
    """Tokens that each prompt found in the cache, one after the other."""
    found = []
    for number, prompt in enumerate(prompts):
        each = Request(f"{number} {len(prompt)}", prompt, max_tokens=2)
        scheduler.add(each)
        while scheduler.has_unfinished:
            step(scheduler)
        found.append(each.num_cached_tokens)
    return found


def test_prefixes_of_models_with_states_begin_where_a_state_was_kept():
    shared = list(range(16))
    prompts = [[*shared, *[20 + number] * 9] for number in range(4)]
    assert _served(make(), *prompts) == [0, 16, 16, 16]
    # The second leaves a state where it leaves the first; one that goes on from a prompt finds all.
    longer = [*prompts[0], *range(60, 69)]
    scheduler = make(state_blocks=2)
    assert _served(scheduler, *prompts, longer) == [0, 0, 16, 16, 24]
    # A prompt in chunks leaves one behind each.
    chunks = make(state_blocks=2, max_num_batched_tokens=8)
    assert _served(chunks, *prompts[:2]) == [0, 16]
    assert _served(make(state_blocks=2, prefix_caching=False), *prompts[:3]) == [0, 0, 0]


def test_kept_states_leave_a_small_cache_to_what_runs():
    prompts = [[number] * 9 for number in range(3)]
    scheduler = make(state_blocks=4, num_blocks=8)  # a sequence takes 3 blocks and a state
    assert _served(scheduler, *prompts, prompts[2]) == [0, 0, 0, 0]
    (table,) = scheduler.tables[0]
    assert (table.num_running, table.blocks.num_used) == (0, 0)
    assert table.blocks.num_free == 8
