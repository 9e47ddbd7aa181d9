"""Requests whose keys and values were computed elsewhere."""

import pytest

from schedule.by_hand import add, answer, make, only_batch, request, step


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
