"""Real ranks that record what they do: the run stays what it was, the record holds all of it."""

import numpy as np
import pytest

from cost.by_hand import LINKS
from cost.tiny_models import MODELS
from distributed.on_ranks import local_ranks
from distributed.running import deployment, run_deployment
from expertlane.cost.step.operation import TransferKind
from expertlane.cost.virtual import VirtualClock, VirtualLinks
from expertlane.engine.ranks.pool import RankPool
from expertlane.results.step_record import Action
from expertlane.schedule.scheduler import step_records
from expertlane.spec.layout import Layout
from expertlane.spec.names import Stage
from expertlane.spec.workload import Workload

WORKLOAD = Workload(num_sequences=6, prompt_len=5, output_len=4)
RANKS_PER_NODE = 2
SEND = list(TransferKind).index(TransferKind.SEND)
COUNTED = ("flops", "weight_bytes", "kv_bytes", "sent_bytes", "num_collectives")
ROTATING = {"num_micro_batches": 2, "micro_batch_schedule": "rotating"}
CASES = [
    ("tp=1", {}, "plain"),
    ("tp=2", {"overlap": True}, "full_norm"),
    ("dp=2,ep=2", {"overlap": True}, "plain"),
    ("dp=3,ep=3", {"dispatch": "all_gather", "overlap": True, "payload": "bfloat16"}, "head_norm"),
    ("dp=2,tp=2,ep=4", {"dispatch": "hierarchical", "overlap": True}, "latent"),
    ("dp=2,tp=2,ep=2", {"dispatch": "hierarchical"}, "windows"),
    ("pp=2,tp=2", {"num_micro_batches": 2}, "plain"),
    ("pp=2,dp=2,ep=2", ROTATING | {"overlap": True}, "plain"),
    ("replicas=2,dp=2,ep=2", {}, "plain"),
]


def run(pool, layout, options, model="plain", **flags):
    """The run, and its steps by replica in their order."""
    made = deployment(layout, **options)
    done = run_deployment(
        pool, MODELS[model], made, WORKLOAD, ranks_per_node=RANKS_PER_NODE, **flags
    )
    of_replicas = [
        [step for step in done.steps if step.plan.replica == replica]
        for replica in range(made.layout.replicas)
    ]
    return done, of_replicas


def check_rank(record, num_micro_batches, is_first_stage):
    """All that the counters saw is in the operations, once."""
    operations = record.operations
    is_post = operations.action == Action.POST
    assert operations.transfer[is_post].tolist() == list(range(len(operations.kind)))
    for stage in Stage:
        here = operations.transfer[is_post & (operations.stage == stage)]
        assert len(here) == record.num_collectives[stage]
        of_stage = record.sent_bytes[stage].sum(axis=0)
        np.testing.assert_array_equal(operations.sent_bytes[here].sum(axis=0), of_stage)
    is_wait = operations.action == Action.WAIT
    collectives = np.flatnonzero(operations.kind != SEND)
    assert sorted(operations.transfer[is_wait].tolist()) == collectives.tolist()
    for transfer in collectives.tolist():
        post, wait = np.flatnonzero(operations.transfer == transfer)
        assert (operations.action[post], operations.action[wait]) == (Action.POST, Action.WAIT)
        for name in ("stage", "layer", "micro_batch"):  # also where halves are interleaved
            of_place = getattr(operations, name)
            assert of_place[post] == of_place[wait]
    num_arrivals = np.count_nonzero(operations.action == Action.ARRIVE)
    assert num_arrivals == (0 if is_first_stage else num_micro_batches)
    assert (operations.cpu_s >= 0).all()
    assert (operations.cpu_s[operations.action != Action.COMPUTE] == 0).all()
    assert set(operations.micro_batch.tolist()) <= set(range(num_micro_batches))
    # Of the rank's thread alone, and nothing twice.
    assert 0 < operations.cpu_s.sum() <= record.process_cpu_s + 1e-6


def check_replay(layout, records, num_layers):
    """Virtual time is at least what any rank computes, and with links no shorter than without."""
    ends = []
    for links in (None, LINKS):
        clock = VirtualClock(layout, num_layers, VirtualLinks(links), RANKS_PER_NODE)
        replayed = [each.step for each in clock.replay(records)]
        for step, measured in zip(replayed, records, strict=True):
            took_s = step.finished_s - step.submitted_s
            for virtual, of_rank in zip(step.records, measured.records, strict=True):
                assert virtual.rank == of_rank.rank
                cpu_s = of_rank.operations.cpu_s.sum()
                assert took_s >= cpu_s * (1 - 1e-9)
                computed_s = virtual.wall_s.sum() - virtual.blocked_s.sum()
                assert computed_s == pytest.approx(cpu_s)
                assert (virtual.blocked_s <= virtual.wall_s + 1e-12).all()
        ends.append([step.finished_s for step in replayed])
    assert (np.array(ends[0]) <= ends[1]).all()


@pytest.mark.smoke(5)
@pytest.mark.parametrize(("layout", "options", "model"), CASES, ids=str)
def test_recorded_steps(pools, layout, options, model):
    pool = pools.pool(8)
    plain, plain_steps = run(pool, layout, options, model)
    recorded, recorded_steps = run(pool, layout, options, model, record_operations=True)
    np.testing.assert_array_equal(recorded.tokens, plain.tokens)
    parsed = Layout.parse(layout)
    for of_plain, of_recorded in zip(plain_steps, recorded_steps, strict=True):
        for before, after in zip(of_plain, of_recorded, strict=True):
            num_micro_batches = len(after.plan.micro_batches)
            for without, record in zip(before.outcome.records, after.outcome.records, strict=True):
                assert without.operations is None
                for name in COUNTED:
                    counted = getattr(record, name), getattr(without, name)
                    np.testing.assert_array_equal(*counted, f"{name} of rank {record.rank}")
                at = parsed.coordinates(record.rank)
                check_rank(record, num_micro_batches, at.pp_rank == 0)
    num_layers = MODELS[model].num_hidden_layers
    check_replay(parsed, list(step_records(recorded.steps)), num_layers)


def test_next_to_all_a_rank_computes_is_in_its_operations(pools):
    """A rank alone sends nothing: what is left out is counting, for the record alone."""
    recorded, _ = run(pools.pool(8), "tp=1", {}, record_operations=True)
    records = [record for step in recorded.steps for record in step.outcome.records]
    kept_s = sum(record.operations.cpu_s.sum() for record in records)
    assert kept_s > 0.3 * sum(record.cpu_s.sum() for record in records)


@pytest.mark.full
@pytest.mark.parametrize(
    "environment",
    [{"EXPERTLANE_BACKEND": "torch"}, {"EXPERTLANE_TRANSPORT": "gloo"}],
    ids=lambda each: "=".join(*each.items()),
)
def test_on_any_backend_and_transport(monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with RankPool(local_ranks(4, 60.0), 60.0) as pool:
        for layout, options in (
            ("dp=2,tp=2,ep=4", {"dispatch": "hierarchical", "overlap": True}),
            ("pp=2,dp=2,ep=2", ROTATING),
        ):
            plain, _ = run(pool, layout, options)
            recorded, _ = run(pool, layout, options, record_operations=True)
            np.testing.assert_array_equal(recorded.tokens, plain.tokens)
            parsed = Layout.parse(layout)
            for step in recorded.steps:
                for record in step.outcome.records:
                    at = parsed.coordinates(record.rank)
                    check_rank(record, len(step.plan.micro_batches), at.pp_rank == 0)
            check_replay(parsed, list(step_records(recorded.steps)), 3)
