"""Static dispatch: what it sends, sums of padded groups, and that the host waits for nothing."""

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from cli.screen import telling
from engine.moe.in_process import CPU, dispatch_and_combine, in_step, ranks_of
from engine.moe.no_sync import RefusesToWait, Unguarded
from engine.moe.test_dispatch import ROW_BYTES, A, B, C, own, run
from engine.moe.test_dispatch_forms import expected, random_inputs
from expertlane.balance.placement import Placement
from expertlane.engine.comm import collectives
from expertlane.engine.moe import dispatch
from expertlane.engine.moe.dispatch import Dispatcher, RoutedTokens
from expertlane.engine.ops.backend import backend_for
from expertlane.engine.ops.products import Activation, Expert, Linear, grouped_mm
from expertlane.engine.ops.torch_backend import TorchBackend
from expertlane.spec.layout import Layout
from expertlane.spec.names import Traffic
from records import sent_over

pytestmark = pytest.mark.numerical

LAYOUTS = ("dp=2,ep=2", "dp=4,ep=4", "dp=2,tp=2,ep=2", "dp=4,ep=2", "dp=3,ep=3")


def backends():
    found = [TorchBackend(), backend_for(CPU)]
    try:
        from engine.ops.cuda.near import needs_kernels
        from expertlane.engine.ops.cuda.backend import CudaBackend
    except (ImportError, pytest.skip.Exception):
        return found
    return found if needs_kernels.args[0] else [*found, CudaBackend()]


BACKENDS = backends()


def group_as_on_a_gpu(patch):
    """Where nobody asks for the number of pairs."""
    patch.setattr(
        Dispatcher,
        "_pairs",
        lambda self, ids, first: self._ops.group_pairs(
            ids, first, 1, self._num_local_experts, self._most_pairs(ids)
        ),
    )


def test_bytes_of_two_ranks_by_hand(pools):
    inputs = [own([A, B], [[0, 2], [1, 0]]), own([C], [[1, 0]])]
    zero, one = run(pools, "dp=2,ep=2", 4, inputs, form="static")
    # Room for two rows there, one of them filled: a has an expert of rank 1; b has none.
    row_bytes = ROW_BYTES + 2 * 4 + 2 * 4  # ids and weights
    assert sent_over(zero.dispatch, Traffic.PAYLOAD) == ROW_BYTES
    assert sent_over(zero.dispatch, Traffic.METADATA) == row_bytes - ROW_BYTES
    assert sent_over(zero.dispatch, Traffic.PADDING) == row_bytes
    assert sent_over(one.dispatch, Traffic.PADDING) == 0
    # Back come a sum for each row, and padding for b's.
    assert sent_over(one.combine, Traffic.PAYLOAD) == ROW_BYTES
    assert sent_over(one.combine, Traffic.PADDING) == ROW_BYTES
    assert sent_over(zero.combine, Traffic.PAYLOAD) == ROW_BYTES
    assert sent_over(zero.combine, Traffic.PADDING) == 0
    # Nobody tells counts.
    assert zero.dispatch.num_collectives.sum() == zero.combine.num_collectives.sum() == 1
    for result, wanted in zip((zero, one), expected(inputs), strict=True):
        np.testing.assert_allclose(result.combined, wanted)


@pytest.mark.parametrize("layout", ["dp=2,ep=2", "dp=4,ep=4"])
def test_sums_are_those_of_an_all_gather_bit_for_bit(pools, layout):
    """Ranks sum in the same order where experts are whole, and so does the rank at home."""
    inputs = random_inputs(np.random.default_rng(3), Layout.parse(layout).world_size, 6, 3, 9)
    found = {form: run(pools, layout, 6, inputs, form=form) for form in ("static", "all_gather")}
    for one, other in zip(found["static"], found["all_gather"], strict=True):
        assert one.combined.tobytes() == other.combined.tobytes()


@settings(derandomize=True, deadline=None, database=None, max_examples=12)
@given(
    layout=st.sampled_from(LAYOUTS),
    form=st.sampled_from(["static", "all_gather"]),
    ops=st.sampled_from(BACKENDS),
    num_redundant=st.integers(0, 3),
    payload=st.sampled_from(["model", "bfloat16", "float8"]),
    most_tokens=st.sampled_from([0, 1, 5]),
    seed=st.integers(0, 99),
)
def test_no_padding_is_seen(layout, form, ops, num_redundant, payload, most_tokens, seed):
    parsed, rng = Layout.parse(layout), np.random.default_rng(seed)
    placement = Placement.round_robin(5, parsed.ep, num_redundant)
    inputs = random_inputs(rng, parsed.world_size, 5, 3, most_tokens)
    for asks in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not asks:
                group_as_on_a_gpu(patch)
            combined, arrived = dispatch_and_combine(
                layout, placement, form, inputs, ops=ops, payload=payload
            )
        bound = {"model": 1e-6, "bfloat16": 2**-8, "float8": 2**-3}[payload]
        for found, wanted, (x, _, weights) in zip(combined, expected(inputs), inputs, strict=True):
            assert found.shape == x.shape
            most = np.abs(x).max(initial=0) * 5 * weights.sum(1).max(initial=0)
            np.testing.assert_allclose(found, wanted, rtol=0, atol=bound * most + 1e-12)
        for rank, (rows, pairs, _) in enumerate(arrived):
            if not asks:
                local = len(placement.experts_of_rank[rank // parsed.etp])
                assert len(pairs.rows) == len(rows) * min(3, local)


class Waits(NamedTuple):
    """Fake ranks of a GPU."""

    layout: str
    form: str
    payload: str = "model"
    num_tokens: int = 5
    by_torch: bool = False


def compute_on_fake_gpus(case, monkeypatch):
    """Dispatch, experts and combine of all ranks; the number of operations on the GPU."""
    launches = pytest.importorskip("expertlane.engine.ops.cuda.launch")
    from expertlane.engine.ops.cuda.backend import CudaBackend
    from expertlane.engine.ops.cuda.parts import CudaExperts

    monkeypatch.setattr(launches, "_run", lambda *_: None)
    ops, dtype = CudaBackend(), torch.bfloat16
    for module in (dispatch, collectives):  # what they choose is kept, and fakes choose wrong
        monkeypatch.setattr(module, "backend_for", lambda device: ops)
    layout = Layout.parse(case.layout)
    placement = Placement.round_robin(6, layout.ep, 2)
    num_of = [case.num_tokens + rank for rank in range(layout.world_size)]
    with FakeTensorMode(), Unguarded():
        on = {"device": torch.device("cuda")}

        def linear(num_out, num_in):
            return Linear(torch.empty(num_out, num_in, dtype=dtype, **on))

        experts = [
            CudaExperts(
                [Expert(linear(16, 32), linear(32, 16), linear(16, 32)) for _ in held],
                Activation("silu"),
                grouped_mm if case.by_torch else None,
            )
            for held in placement.experts_of_rank
            for _ in range(layout.etp)
        ]
        ranks = ranks_of(case.layout, placement, case.form, payload=case.payload, **on)
        tokens = [
            RoutedTokens(
                torch.empty(num, 32, dtype=dtype, **on),
                torch.empty(num, 2, dtype=torch.int64, **on),
                torch.empty(num, 2, **on),
                num_of,
            )
            for num in num_of
        ]

        def block(place):
            rows, pairs, sent = yield from ranks[place].dispatch(tokens[place])
            room = ranks[place].result_buffer(pairs.rows.shape[0], rows)
            return (yield from ranks[place].combine(sent, experts[place](rows, pairs, room)))

        with RefusesToWait() as mode:
            for combined, num in zip(
                in_step(list(map(block, range(len(ranks))))), num_of, strict=True
            ):
                assert (combined.shape, combined.dtype) == ((num, 32), dtype)
                assert combined.device.type == "cuda"
    return mode.num_operations


@pytest.mark.smoke(2)
@pytest.mark.parametrize("payload", ["model", "float8"])
@pytest.mark.parametrize("form", ["static", "all_gather"])
@pytest.mark.parametrize("layout", ["dp=2,ep=2", "dp=2,tp=2,ep=2", "dp=4,ep=4"])
def test_the_host_waits_for_nothing(layout, form, payload, monkeypatch):
    for case in (
        Waits(layout, form, payload),
        Waits(layout, form, payload, num_tokens=0),
        Waits(layout, form, payload, by_torch=grouped_mm is not None),
    ):
        assert compute_on_fake_gpus(case, monkeypatch) > 20


def test_a_form_that_tells_counts_is_found_to_wait(monkeypatch):
    with pytest.raises(AssertionError, match=telling("host waits")):
        compute_on_fake_gpus(Waits("dp=2,ep=2", "all_to_all"), monkeypatch)


def test_a_graph_has_room_for_all_pairs_there_may_be(monkeypatch):
    """However many: while it is recorded, the host cannot ask how many there are."""
    own, is_capturing = SimpleNamespace(_num_local_experts=4), [False, True]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: is_capturing[0])
    with FakeTensorMode():
        few, many = (torch.empty(num, 8, device="cuda") for num in (100, 1 << 15))
        assert Dispatcher._most_pairs(own, few) == 400
        assert Dispatcher._most_pairs(own, many) is None
        is_capturing.pop(0)
        assert Dispatcher._most_pairs(own, many) == 4 << 15
