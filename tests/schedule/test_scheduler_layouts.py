"""Replicas, data-parallel ranks, micro-batches and steps in flight by hand."""

from expertlane.spec.names import Phase
from schedule.by_hand import add, answer, make, request, scheduled, step
from schedule.paged import seqs_of


def test_data_parallel_ranks_share_the_tokens_and_all_take_part():
    scheduler = make("dp=3")
    add(scheduler, request("a", 6), request("b", 2), request("c", 1), request("d", 3))
    # Each goes where the fewest tokens are; "d" joins "c".
    plan = scheduler.next_plan()
    assert scheduled(plan) == [[{0: 6}, {1: 2}, {2: 1, 3: 3}]]
    answer(scheduler, plan)

    scheduler = make("dp=3")
    add(scheduler, request("a"))
    plan = scheduler.next_plan()
    assert scheduled(plan) == [[{0: 1}, {}, {}]]
    empty = plan.micro_batches[0][2]
    assert empty.block_tables.shape == (0, 0)
    assert empty.token_ids.shape == empty.yields_token.shape == (0,)


def test_of_ranks_with_equal_work_the_one_with_more_free_blocks_is_chosen():
    scheduler = make("dp=2", max_num_batched_tokens=64)
    add(scheduler, request("long", 9), request("short", 1, first=50))
    step(scheduler)  # both decode now: one token each
    add(scheduler, request("next", 1, first=60))
    assert scheduled(step(scheduler)) == [[{0: 1}, {1: 1, 2: 1}]]


def test_a_prompt_goes_where_its_prefix_is_known():
    scheduler = make("dp=2")
    add(scheduler, request("a", 2, first=40, max_tokens=1), request("b", 9, max_tokens=1))
    assert scheduled(step(scheduler)) == [[{0: 2}, {1: 9}]]
    add(scheduler, request("c", 9))
    assert scheduled(step(scheduler)) == [[{}, {2: 1}]]


def test_replicas_share_the_requests():
    scheduler = make("replicas=2")
    add(scheduler, *(request(str(number)) for number in range(8)))
    first, second = scheduler.next_plan(), scheduler.next_plan()
    assert scheduler.next_plan() is None
    assert (first.replica, second.replica) == (0, 1)
    assert (seqs_of(first), seqs_of(second)) == ([0, 1, 2, 3], [4, 5, 6, 7])
    answer(scheduler, second)
    # A request goes to the less loaded replica: here the one with fewer blocks.
    scheduler.cancel("5")
    add(scheduler, request("late"))
    assert seqs_of(scheduler.next_plan()) == [4, 6, 7, 8]
    answer(scheduler, first)
    assert seqs_of(scheduler.next_plan()) == [0, 1, 2, 3]


def test_drained_steps_are_cut_into_micro_batches():
    scheduler = make("pp=2,dp=2", num_micro_batches=2)
    add(scheduler, *(request(name, prompt_len=2, first=ord(name)) for name in "abcde"))
    plan = scheduler.next_plan()
    assert scheduler.next_plan() is None
    assert scheduled(plan) == [[{0: 2, 2: 2}, {1: 2}], [{4: 2}, {3: 2}]]
    for batches in plan.micro_batches:
        for batch in batches:
            assert batch.block_tables.shape == (batch.num_seqs, 1)
            assert batch.yields_token.tolist() == [True] * batch.num_seqs
    # No micro-batch without any sequence.
    scheduler = make("pp=2", num_micro_batches=4)
    add(scheduler, request("a"))
    assert scheduled(scheduler.next_plan()) == [[{0: 1}]]


def test_rotating_steps_are_in_flight_together():
    scheduler = make("pp=2", num_micro_batches=2, rotating=True)
    add(scheduler, *(request(name, max_tokens=9) for name in "abcde"))
    first, second = scheduler.next_plan(), scheduler.next_plan()
    assert scheduler.next_plan() is None
    assert [seqs_of(first), seqs_of(second)] == [[0, 1, 2], [3, 4]]
    answer(scheduler, first)
    third = scheduler.next_plan()
    assert seqs_of(third) == [0, 1, 2]
    answer(scheduler, second)
    answer(scheduler, third)
    # The groups stay even when some are gone.
    for name in "ab":
        scheduler.cancel(name)
    assert [seqs_of(scheduler.next_plan()) for _ in range(2)] == [[3, 4], [2]]


def test_more_groups_than_stages_take_turns():
    scheduler = make("pp=2", num_micro_batches=4, rotating=True)
    add(scheduler, *(request(name, max_tokens=9) for name in "abcd"))
    plans = [scheduler.next_plan(), scheduler.next_plan()]
    for _ in range(6):
        answer(scheduler, plans[-2])
        plans.append(scheduler.next_plan())
    assert {len(seqs_of(plan)) for plan in plans[2:]} == {1, 2}
    assert {seq for plan in plans for seq in seqs_of(plan)} == {0, 1, 2, 3}


def test_flags_reach_every_plan():
    for flags in ({"return_logits": True, "record": False}, {}):
        scheduler = make(flags=flags)
        add(scheduler, request("a"))
        plan = scheduler.next_plan()
        assert plan.return_logits is flags.get("return_logits", False)
        assert plan.record is flags.get("record", True)


def test_a_prompt_waits_for_one_on_every_rank():
    """Two ranks, one decoding: another prompt waits for its company, or for three steps."""
    scheduler = make("dp=2", prompt_wait_steps=3)
    add(scheduler, request("first", prompt_len=4, max_tokens=9))
    assert step(scheduler).phase is Phase.PREFILL  # nobody decodes, so nobody is held up
    (late,) = add(scheduler, request("late", prompt_len=4, max_tokens=9))
    phases = [step(scheduler).phase for _ in range(4)]
    assert phases == [Phase.DECODE, Phase.DECODE, Phase.DECODE, Phase.PREFILL]
    assert len(late.output_token_ids) == 1

    scheduler = make("dp=2", prompt_wait_steps=3)
    add(scheduler, request("first", prompt_len=4, max_tokens=9))
    step(scheduler)
    both = add(
        scheduler,
        request("one", prompt_len=4, max_tokens=9),
        request("two", prompt_len=4, max_tokens=9),
    )
    assert step(scheduler).phase is Phase.PREFILL
    assert {each.dp_rank for each in both} == {0, 1}
