"""Where the time of traced steps goes: published and made-up traces whose answer is known."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comparison.traces.traced import (
    ALL_REDUCE,
    ARGMAX,
    ATTENTION,
    COMBINE,
    DISPATCH,
    EMBED,
    EXPERTS,
    GEMM,
    NORM,
    SEND,
    STRANGE,
    TOPK,
    Trace,
    h800,
    h800_annotations,
    h800_trace,
)
from expertlane.comparison.traces.rank_trace import read_rank_trace
from expertlane.comparison.traces.torch_trace import read_step_causes, steps_record
from expertlane.errors import UserError
from expertlane.spec.names import Cause, Phase, Stage

DECODE = "execute_context_0(0)_generation_{seqs}({seqs})"
US = 1e-6


def of_one(trace, tmp_path, rank=0):
    """The only step of the only rank."""
    (step,) = read_step_causes([trace.save(tmp_path / "trace.json", rank)]).steps
    (one,) = step.ranks
    assert sum(one.causes_s.values()) == pytest.approx(one.duration_s, abs=1e-12)
    return one


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    path = h800_trace().save(tmp_path_factory.mktemp("h800") / "train.json", 0)
    return read_rank_trace(path, 0), read_step_causes([path])


# The stages that each of DeepSeek's own annotations of the forward chunk may hold: its attention
# block ends with the router and with the conversion of what is dispatched.
INSIDE = {
    "attn(F)": {Stage.ATTENTION, Stage.ROUTER, Stage.DISPATCH},
    "dispatch(F)": {Stage.DISPATCH},
    "mlp(F)": {Stage.EXPERTS},
    "combine(F)": {Stage.COMBINE},
}


def test_the_stages_of_a_published_forward_chunk(published):
    trace, _ = published
    seconds = dict.fromkeys(("router", *INSIDE), 0.0)
    for work, around in zip(trace.work, h800_annotations(), strict=True):
        if around in INSIDE:
            assert work.cause in INSIDE[around], (work.name, around)
            seconds["router" if work.cause is Stage.ROUTER else around] += (
                work.end_ns - work.start_ns
            )
        else:
            assert work.cause is None, (work.name, around)  # training's backward chunk
    # By hand, from the table: milliseconds of four layers.
    assert {name: round(ns / 1e6, 1) for name, ns in seconds.items()} == {
        "router": 1.7,
        "attn(F)": 15.8,
        "dispatch(F)": 26.8,
        "mlp(F)": 18.4,
        "combine(F)": 34.7,
    }


def test_the_router_of_a_published_forward_chunk(published):
    """From the gate's product to the last choice; the norm before it is attention's no more."""
    trace, _ = published
    names = {work.name for work in trace.work if work.cause is Stage.ROUTER}
    for part in ("sm90_xmma_gemm_bf16f32", "topk_sum_and_topk_idx", "gatherTopK", "7168u, 1u"):
        assert any(part in name for name in names), part
    assert not any(part in name for name in names for part in ("GemmKernel", "flash", "ep::"))


def test_the_overlap_of_a_published_forward_chunk(published):
    """Exposed and hidden parts, counted again microsecond by microsecond."""
    _, causes = published
    (step,) = causes.steps
    (rank,) = step.ranks
    table = h800()
    end = max(start + duration for _, _, start, duration, _ in table["kernels"])
    computes, moves = np.zeros(end, dtype=bool), {"dispatch(F)": 0, "combine(F)": 0}
    exposed = dict.fromkeys(moves, 0)
    transfers = []
    for (name, _, start, duration, _), around in zip(
        table["kernels"], h800_annotations(), strict=True
    ):
        text = table["kernel_names"][name]
        is_transfer = "ep::internode" in text
        if is_transfer and around in moves:
            transfers.append((around, start, start + duration))
        elif not is_transfer or around not in moves:
            computes[start : start + duration] = True  # of the backward chunk any kernel
    for around, start, stop in transfers:
        moves[around] += stop - start
        exposed[around] += int((~computes[start:stop]).sum())
    preparing = sum(  # dispatch's layout runs on that stream, but is no transfer
        duration
        for name, _, _, duration, _ in table["kernels"]
        if "get_dispatch_layout" in table["kernel_names"][name]
    )
    for stage, around in ((Stage.DISPATCH, "dispatch(F)"), (Stage.COMBINE, "combine(F)")):
        whole = rank.stage_s[stage] + rank.hidden_s[stage]
        own = preparing + 214 if stage is Stage.DISPATCH else 0  # and the conversions
        assert whole == pytest.approx((moves[around] + own) * US, abs=US)
        assert rank.hidden_s[stage] / whole > 0.96  # that is what DualPipe is for
    assert rank.stage_s[Stage.COMBINE] == pytest.approx(exposed["combine(F)"] * US, abs=US)
    assert rank.duration_s == pytest.approx(0.129545)
    assert rank.stage_s[Stage.ATTENTION] == pytest.approx(15.5e-3, rel=0.01)
    assert rank.stage_s[Stage.EXPERTS] == pytest.approx(18.4e-3, rel=0.01)
    assert causes.unknown_share == pytest.approx(rank.backward_s / rank.duration_s)
    assert set(causes.unknown_s) == {"backward pass"}


def test_the_place_in_a_layer_says_what_the_annotations_say(tmp_path):
    """Without them, and without the backward chunk, over 99.5 % of the time is placed alike."""
    with_them = read_rank_trace(h800_trace().save(tmp_path / "with.json", 0), 0)
    alone = h800_trace(with_annotations=False).save(tmp_path / "alone.json", 0)
    named = {(w.name, w.start_ns): w.cause for w in with_them.work if w.cause is not None}
    placed = {(w.name, w.start_ns): w for w in read_rank_trace(alone, 0).work}
    assert named.keys() == placed.keys()
    same = sum(w.end_ns - w.start_ns for key, w in placed.items() if w.cause is named[key])
    assert same / sum(w.end_ns - w.start_ns for w in placed.values()) > 0.995


def test_one_kernel(tmp_path):
    trace = Trace()
    trace.kernel(ATTENTION, 10, 5)
    one = of_one(trace, tmp_path)
    assert one.stage_s == {Stage.ATTENTION: pytest.approx(5 * US)}
    assert one.duration_s == pytest.approx(5 * US)


def test_a_layer_by_names_and_places(tmp_path):
    trace, at = Trace(), 1
    layer = [
        (NORM, Stage.ATTENTION),
        (GEMM, Stage.ATTENTION),
        (ATTENTION, Stage.ATTENTION),
        (GEMM, Stage.ATTENTION),
        (ALL_REDUCE, Stage.COLLECTIVES),
        (NORM, Stage.ROUTER),
        (GEMM, Stage.ROUTER),
        (TOPK, Stage.ROUTER),
        (EXPERTS, Stage.EXPERTS),
        (ALL_REDUCE, Stage.COLLECTIVES),
    ]
    kernels = [(EMBED, Stage.EMBED), *layer, *layer, (NORM, Stage.HEAD), (GEMM, Stage.HEAD)]
    expected = dict.fromkeys({stage for _, stage in kernels}, 0)
    trace.annotation(DECODE.format(seqs=1), 0, 10)
    for number, (name, stage) in enumerate([*kernels, (ARGMAX, Stage.HEAD)]):
        trace.kernel(name, at, number + 1, launched=5)
        at += number + 1
        expected[stage] += number + 1
    found = of_one(trace, tmp_path)
    assert found.stage_s == {stage: pytest.approx(us * US) for stage, us in expected.items()}
    assert found.host_gaps_s == pytest.approx(1 * US)  # from the annotation's begin


GATHER, SCATTER = (
    f"ncclDevKernel_{name}_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
    for name in ("AllGather", "ReduceScatter_Sum_bf16")
)
CAST = "void vllm::dynamic_per_token_scaled_fp8_quant_kernel_strided<c10::BFloat16>(float*)"


@pytest.mark.parametrize(
    "layer",
    [
        # vLLM: tokens and the router's logits are gathered, then experts are chosen.
        "norm A, gemm A, attention A, gemm A, "
        "norm R, gemm R, gather D, gather D, topk R, experts E, scatter C",
        # Experts are chosen first.
        "norm A, gemm A, attention A, gemm A, "
        "norm R, gemm R, topk R, cast D, gather D, experts E, scatter C",
        # Tokens are scattered over the TP group around the norms: no dispatch.
        "norm A, gather T, gemm A, attention A, gemm A, scatter T, "
        "norm R, gather T, gemm R, topk R, experts E, scatter T",
        # A shared expert before the router.
        "norm A, gemm A, attention A, gemm A, "
        "norm E, gemm E, silu E, gemm E, gemm R, topk R, experts E, reduce T",
        # A dense layer.
        "norm A, gemm A, attention A, gemm A, reduce T, norm E, gemm E, silu E, gemm E, reduce T",
    ],
)
def test_transfers_by_their_place(tmp_path, layer):
    names = {
        "norm": NORM,
        "gemm": GEMM,
        "attention": ATTENTION,
        "topk": TOPK,
        "experts": EXPERTS,
        "gather": GATHER,
        "scatter": SCATTER,
        "reduce": ALL_REDUCE,
        "cast": CAST,
        "silu": "void vllm::act_and_mul_kernel<c10::BFloat16, &vllm::silu_kernel>(c10::BFloat16*)",
    }
    stages = {
        "A": Stage.ATTENTION,
        "R": Stage.ROUTER,
        "D": Stage.DISPATCH,
        "E": Stage.EXPERTS,
        "C": Stage.COMBINE,
        "T": Stage.COLLECTIVES,
    }
    kernels = [tuple(each.split()) for each in layer.split(", ")] * 3
    trace = Trace()
    for number, (name, _) in enumerate(kernels):
        trace.kernel(names[name], 10 * number, 10)
    found = read_rank_trace(trace.save(tmp_path / "trace.json", 0), 0).work
    expected = [f"{name} {stages[stage].label}" for name, stage in kernels]
    assert [
        f"{name} {work.cause.label}" for work, (name, _) in zip(found, kernels, strict=True)
    ] == expected


def test_what_is_not_known_is_a_row_and_is_said(tmp_path):
    trace = Trace()
    trace.kernel(ATTENTION, 0, 90)
    trace.kernel(STRANGE, 90, 10)
    causes = read_step_causes([trace.save(tmp_path / "trace.json", 0)])
    assert causes.unknown_s == {STRANGE: pytest.approx(10 * US)}
    assert causes.unknown_share == pytest.approx(0.1)
    assert "10%" in causes.remark
    assert STRANGE in causes.remark
    trace.kernel(ATTENTION, 100, 200)
    assert not read_step_causes([trace.save(tmp_path / "trace.json", 0)]).remark


@pytest.mark.parametrize(
    ("begin", "end", "exposed", "hidden"),
    [(100, 140, 0, 40), (180, 240, 40, 20), (300, 330, 30, 0), (200, 260, 60, 0)],
)
def test_a_transfer_beneath_the_experts_is_hidden(tmp_path, begin, end, exposed, hidden):
    trace = Trace()
    trace.kernel(ATTENTION, 0, 10)
    trace.kernel(EXPERTS, 100, 100)
    trace.kernel(DISPATCH, begin, end - begin, stream=20)
    trace.kernel(ATTENTION, 400, 1)
    one = of_one(trace, tmp_path)
    assert one.stage_s.get(Stage.DISPATCH, 0) == pytest.approx(exposed * US)
    assert one.hidden_s.get(Stage.DISPATCH, 0) == pytest.approx(hidden * US)
    assert one.stage_s[Stage.EXPERTS] == pytest.approx(100 * US)


def test_steps_without_annotations_are_found_by_their_ends(tmp_path):
    trace = Trace()
    for start in (0, 1000, 2000):
        kernels = (EMBED, NORM, ATTENTION, TOPK, EXPERTS, NORM, GEMM, ARGMAX)
        for number, name in enumerate(kernels):
            trace.kernel(name, start + 10 * number, 10)
    causes = read_step_causes([trace.save(tmp_path / "trace.json", 0)])
    assert [step.ranks[0].start_s for step in causes.steps] == pytest.approx([0, 1e-3, 2e-3])
    assert [step.phase for step in causes.steps] == [None] * 3
    for step in causes.steps[:2]:
        assert step.ranks[0].host_gaps_s == pytest.approx(920 * US)


@pytest.mark.parametrize(
    ("names", "phases", "tokens"),
    [
        (["execute_context_1(20)_generation_2(2)", DECODE.format(seqs=3)], "PD", [22, 3]),
        (
            ["execute_22_context_1(sq20sk20sqsq400sqsk400)_generation_2(sq2sk8sqsq2sqsk8)"],
            "P",
            [22],
        ),
        (["step[EXTEND bs=2 toks=64]", "step[DECODE bs=2]"], "PD", [64, 2]),
        (["ProfilerStep#1", "ProfilerStep#2"], "--", [None, None]),
        (["execute_context_0(0)_generation_0(0)"], "-", [None]),
    ],
)
def test_annotations_of_steps(tmp_path, names, phases, tokens):
    trace = Trace()
    for number, name in enumerate(names):
        trace.annotation(name, 100 * number, 50)
        trace.kernel(ATTENTION, 100 * number + 20, 60)
    causes = read_step_causes([trace.save(tmp_path / "trace.json", 0)])
    known = {"P": Phase.PREFILL, "D": Phase.DECODE, "-": None}
    assert [step.phase for step in causes.steps] == [known[each] for each in phases]
    assert [step.num_tokens for step in causes.steps] == tokens


def test_the_sampler_s_kernels_belong_to_the_step_before(tmp_path):
    trace = Trace()
    for start in (0, 1000):
        trace.annotation(DECODE.format(seqs=1), start, 100)
        trace.kernel(ATTENTION, start + 50, 100)
        trace.kernel(ARGMAX, start + 200, 10, launched=start + 150)
    first, second = read_step_causes([trace.save(tmp_path / "trace.json", 0)]).steps
    assert first.ranks[0].duration_s == second.ranks[0].duration_s == pytest.approx(210 * US)
    assert second.ranks[0].before_s == pytest.approx(790 * US)


@pytest.mark.parametrize(
    ("transfer", "place", "waited", "bubble"),
    [(ALL_REDUCE, "pp0_tp1", 40, 0), (SEND, "pp1_tp0", 0, 40), (None, "pp0_tp1", 0, 0)],
)
def test_a_rank_waits_between_two_steps_too(tmp_path, transfer, place, waited, bubble):
    """What one has above the others that it meets is waiting, or a bubble of its stage."""
    paths = []
    for name, late in (("dp0_pp0_tp0", 0), (f"dp0_{place}", 40)):
        trace = Trace()
        for start in (0, 500 + late):
            trace.annotation(DECODE.format(seqs=1), start, 50)
            trace.kernel(ATTENTION, start + 10, 90)
            trace.kernel(transfer or ARGMAX, start + 100, 100 - (late if start else 0))
        paths.append(trace.save(tmp_path / f"{name}.json", len(paths)))
    causes = read_step_causes(paths)
    first, second = causes.steps
    assert [each.before_s for each in first.ranks] == [0, 0]
    one, other = second.ranks
    assert (one.waited_before_s, one.bubble_before_s) == (0, 0)
    found = other.waited_before_s, other.bubble_before_s
    assert found == (pytest.approx(waited * US), pytest.approx(bubble * US))
    record = steps_record(causes, Phase.DECODE)
    assert 2 * sum(record.breakdown_s.values()) == pytest.approx(record.wall_s.value)


def test_operators_of_a_cpu_count_without_those_inside(tmp_path):
    trace = Trace()
    trace.annotation(DECODE.format(seqs=1), 0, 100)
    trace.operator("aten::slice", 2, 3)
    trace.operator("aten::embedding", 10, 10)
    trace.operator("aten::index_select", 12, 5)
    trace.operator("vllm::unified_attention_with_output", 30, 20)
    trace.operator("_C::cpu_attention_with_kv_cache", 35, 10)
    trace.operator("vllm::moe_forward", 60, 30)
    trace.operator("aten::topk", 62, 4)
    trace.operator("strange::op", 92, 1)
    one = of_one(trace, tmp_path)
    assert one.stage_s == {
        Stage.EMBED: pytest.approx(10 * US),
        Stage.ATTENTION: pytest.approx(20 * US),
        Stage.ROUTER: pytest.approx(4 * US),
        Stage.EXPERTS: pytest.approx(26 * US),
    }
    assert one.unknown_s == {"strange::op": pytest.approx(1 * US)}
    assert one.host_gaps_s == pytest.approx(39 * US)


DURATIONS = st.integers(1, 500)


@st.composite
def runs(draw):
    """Steps of a few ranks with known truth: what each rank does, in microseconds."""
    num_ranks, num_steps = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    layers = [
        [
            {
                "attention": [draw(DURATIONS) for _ in range(num_ranks)],
                "gap": [draw(st.integers(0, 300)) for _ in range(num_ranks)],
                "transfer": draw(DURATIONS),
                "experts": [draw(DURATIONS) for _ in range(num_ranks)],
                "hidden": draw(st.booleans()),
            }
            for _ in range(draw(st.integers(1, 3)))
        ]
        for _ in range(num_steps)
    ]
    # What is less than a transfer takes is not told from ranks that leave one after the other.
    far = st.integers(10**4, 10**6)
    offsets = [0, *(draw(st.just(0) | far | far.map(lambda x: -x)) for _ in range(num_ranks - 1))]
    return num_ranks, layers, offsets


@given(run=runs())
@settings(deadline=None, max_examples=60)
def test_waiting_is_told_from_transfer_whatever_the_clocks(run, tmp_path_factory):
    num_ranks, steps, offsets = run
    traces = [Trace() for _ in range(num_ranks)]
    now = [2_000_000] * num_ranks
    expected = []
    for layers in steps:
        begin = list(now)
        sums = [
            dict.fromkeys(("attention", "gap", "transfer", "waiting", "experts"), 0) for _ in now
        ]
        for rank, trace in enumerate(traces):
            trace.annotation(DECODE.format(seqs=2), now[rank] + offsets[rank], 1)
        for layer in layers:
            for rank, trace in enumerate(traces):
                start, own = now[rank] + offsets[rank], layer["attention"][rank]
                launched = begin[rank] + offsets[rank]
                trace.kernel(ATTENTION, start, own, launched=launched)
                now[rank] += own + layer["gap"][rank]
            last = max(now)
            for rank, trace in enumerate(traces):
                waits = last - now[rank]
                start, end = now[rank] + offsets[rank], last + layer["transfer"] + offsets[rank]
                launched = begin[rank] + offsets[rank]
                trace.kernel(ALL_REDUCE, start, end - start, launched=launched)
                own = layer["experts"][rank]
                trace.kernel(EXPERTS, end, own, launched=launched)
                if layer["hidden"]:  # beneath the experts of all
                    together = min(layer["experts"])
                    trace.kernel(COMBINE, end, together, stream=20, launched=launched)
                now[rank] = last + layer["transfer"] + own
                for name, us in (
                    ("attention", layer["attention"][rank]),
                    ("gap", layer["gap"][rank]),
                    ("waiting", waits if num_ranks > 1 else 0),
                    ("transfer", layer["transfer"] + (0 if num_ranks > 1 else waits)),
                    ("experts", own),
                ):
                    sums[rank][name] += us
        expected.append(sums)
        for rank in range(num_ranks):
            now[rank] += 5
    folder = tmp_path_factory.mktemp("ranks")
    paths = [
        trace.save(folder / f"{rank}.json{'.gz' if rank % 2 else ''}", rank)
        for rank, trace in enumerate(traces)
    ]
    causes = read_step_causes(reversed(paths))
    assert causes.ranks == tuple(range(num_ranks))
    assert causes.clock_offsets_s == pytest.approx([each * US for each in offsets], abs=1e-9)
    assert len(causes.steps) == len(steps)
    for step, of_ranks in zip(causes.steps, expected, strict=True):
        for one, sums in zip(step.ranks, of_ranks, strict=True):
            assert math.isclose(sum(one.causes_s.values()), one.duration_s, abs_tol=1e-12)
            found = {
                "attention": one.stage_s.get(Stage.ATTENTION, 0.0),
                "gap": one.host_gaps_s,
                "transfer": one.stage_s.get(Stage.COLLECTIVES, 0.0),
                "waiting": one.waiting_s,
                "experts": one.stage_s.get(Stage.EXPERTS, 0.0),
            }
            assert found == pytest.approx({name: us * US for name, us in sums.items()}, abs=1e-9)


def test_a_profiler_that_began_later_is_shifted(tmp_path):
    """Rank 1's trace lacks the first step, rank 0's the last one."""
    traces, now, lengths = [Trace(), Trace()], 1000, (3, 50, 7, 21, 90, 4)
    for number, length in enumerate(lengths):
        for rank, trace in enumerate(traces):
            if number != (len(lengths) - 1, 0)[rank]:
                trace.annotation(f"execute_context_0(0)_generation_1({number + 1})", now, 1)
                trace.kernel(ATTENTION, now, length * 10 + rank)
                start = now + length * 10 + rank
                trace.kernel(ALL_REDUCE, start, 20 - rank, launched=now)
                trace.kernel(ALL_REDUCE, start + 30 - rank, 10, launched=now)
        now += length * 10 + 100
    paths = [trace.save(tmp_path / f"{rank}.json", rank) for rank, trace in enumerate(traces)]
    causes = read_step_causes(paths)
    assert [len(step.ranks) for step in causes.steps] == [1, 2, 2, 2, 2, 1]
    assert [step.ranks[0].waiting_s for step in causes.steps[1:5]] == pytest.approx([1 * US] * 4)


def test_waiting_in_a_pipeline_is_its_bubble(tmp_path):
    traces = [Trace(), Trace()]
    for start in (0, 1000):
        traces[0].annotation(DECODE.format(seqs=1), start, 10)
        traces[0].kernel(ATTENTION, start + 10, 100, launched=start)
        traces[0].kernel(SEND, start + 110, 30, launched=start)
        traces[1].annotation(DECODE.format(seqs=1), start, 10)
        traces[1].kernel(SEND, start + 10, 130, launched=start)
        traces[1].kernel(ATTENTION, start + 140, 50, launched=start)
    names = ("dp0_pp0_tp0_rank0.pt.trace.json", "dp0_pp1_tp0_rank1.pt.trace.json")
    paths = [trace.save(tmp_path / name, None) for trace, name in zip(traces, names, strict=True)]
    causes = read_step_causes(paths)
    assert causes.ranks == (0, 1)
    first, second = causes.steps[0].ranks
    assert (first.bubble_s, second.bubble_s) == (0, pytest.approx(100 * US))
    assert second.stage_s[Stage.HAND_OVER] == pytest.approx(30 * US)


def test_groups_are_told_by_names_of_files(tmp_path):
    """Two replicas of TP 2: a rank waits for its own group alone."""
    paths = []
    for dp in range(2):
        for tp in range(2):
            trace = Trace()
            for start in (0, 1000):
                busy = 100 + 50 * dp + 20 * tp
                end = start + 100 + 50 * dp + 20 + 10
                trace.annotation(DECODE.format(seqs=4 + dp), start, 10)
                trace.kernel(ATTENTION, start, busy, launched=start)
                trace.kernel(ALL_REDUCE, start + busy, end - start - busy, launched=start)
            path = (
                tmp_path
                / f"dp{dp}_pp0_tp{tp}_dcp0_ep{2 * dp + tp}_rank{2 * dp + tp}.17.pt.trace.json"
            )
            paths.append(trace.save(path, None))
    causes = read_step_causes(paths)
    assert causes.steps[0].num_seqs == 9
    waiting = [each.waiting_s for each in causes.steps[0].ranks]
    assert waiting == pytest.approx([20 * US, 0, 20 * US, 0])


def test_replicas_that_each_count_from_zero(tmp_path):
    paths = []
    for dp in (1, 0):
        trace = Trace()
        trace.annotation(DECODE.format(seqs=1 + dp), 0, 10)
        trace.kernel(ATTENTION, 5, 10 + dp)
        paths.append(trace.save(tmp_path / f"dp{dp}_pp0_tp0_rank0.pt.trace.json", 0))
    causes = read_step_causes(paths)
    assert causes.ranks == (0, 1)
    assert [each.duration_s for each in causes.steps[0].ranks] == pytest.approx([15 * US, 16 * US])
    assert causes.steps[0].num_tokens == 3


def test_a_record_adds_up(tmp_path):
    trace = Trace()
    for start in (0, 1000, 2000):
        trace.annotation(DECODE.format(seqs=4), start, 10)
        trace.kernel(ATTENTION, start + 10, 100, launched=start)
        trace.kernel(STRANGE, start + 110, 20, launched=start)
        trace.kernel(DISPATCH, start + 130, 40, stream=20, launched=start)
        trace.kernel(EXPERTS, start + 150, 60, launched=start)
    causes = read_step_causes([trace.save(tmp_path / "trace.json", 0)])
    record = steps_record(causes, Phase.DECODE)
    assert steps_record(causes, Phase.PREFILL) is None
    assert (record.num_steps, record.num_tokens, record.num_seqs) == (3, 12, 12)
    assert sum(record.breakdown_s.values()) == pytest.approx(record.wall_s.value / 3)
    assert record.breakdown_s[Cause.HOST_GAPS] == pytest.approx(10 * US)
    assert record.breakdown_s[Cause.ENGINE] == pytest.approx(790 * US)
    assert record.breakdown_s[Cause.UNKNOWN] == pytest.approx(20 * US)
    assert record.unknown_kernels == {STRANGE: pytest.approx(20 * US)}
    assert record.hidden_share == pytest.approx(0.5)
    assert json.dumps(record.breakdown_s)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no trace"),
        ("[]", "no trace"),
        ("{}", "traceEvents"),
        ('{"traceEvents": 3}', "traceEvents"),
        ('{"traceEvents": []}', "neither kernels nor operators"),
        ('{"traceEvents": [{"ph": "X", "cat": "kernel", "ts": 1e300}]}', "out of range"),
        ('{"traceEvents": [{"ph": "X", "cat": "kernel", "ts": 1, "dur": -1}]}', "out of range"),
        ('{"traceEvents": [{"ph": "X", "cat": "kernel", "ts": NaN}]}', "no trace"),
        ("[" * 100_000, "no trace"),
        ("\x1f\x8bnot gzip", "gzip"),
    ],
)
def test_no_trace(tmp_path, text, says):
    path = tmp_path / "trace.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=says) as error:
        read_step_causes([path])
    assert "trace.json" in str(error.value)


def test_no_steps_at_all(tmp_path):
    with pytest.raises(UserError, match="no traces"):
        read_step_causes([])
    with pytest.raises(UserError, match="cannot read"):
        read_step_causes([tmp_path / "missing.json"])


def test_traces_that_do_not_belong_together(tmp_path):
    on_gpu, on_cpu = Trace(), Trace()
    on_gpu.kernel(ATTENTION, 0, 1)
    on_cpu.operator("aten::mm", 0, 1)
    paths = [on_gpu.save(tmp_path / "0.json", 0), on_cpu.save(tmp_path / "1.json", 1)]
    with pytest.raises(UserError, match="kernels of a GPU"):
        read_step_causes(paths)
    paths[1] = on_gpu.save(tmp_path / "1.json", 0)
    with pytest.raises(UserError, match="both of rank 0"):
        read_step_causes(paths)


def test_a_large_file_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("expertlane.comparison.traces.trace_file.MOST_BYTES", 1000)
    trace = Trace()
    for number in range(100):
        trace.kernel(ATTENTION, number, 1)
    for name in ("trace.json", "trace.json.gz"):
        with pytest.raises(UserError, match="1,000"):
            read_step_causes([trace.save(tmp_path / name, 0)])


def test_deep_operators_are_refused(tmp_path):
    trace = Trace()
    for depth in range(500):
        trace.operator("aten::add", depth, 2000 - 2 * depth)
    with pytest.raises(UserError, match="nested"):
        read_step_causes([trace.save(tmp_path / "trace.json", 0)])
