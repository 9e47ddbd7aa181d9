"""Hidden states that travel in a narrower type: how much changes, and what is sent."""

import numpy as np
import pytest
import torch

from engine.moe.test_dispatch import run
from engine.moe.test_dispatch_forms import FORMS, expected
from expertlane.engine.comm.clocks import HostClock
from expertlane.engine.comm.progress import ProgressBoard
from expertlane.engine.comm.recorder import Recorder
from expertlane.engine.moe.dispatch import Payload
from expertlane.spec.names import Stage, Traffic
from records import sent_over

pytestmark = pytest.mark.numerical

WORST = {"bfloat16": 2**-8, "float8": 2**-4}  # half a step, over the value


def recording():
    recorder = Recorder(0, 1, 1, ProgressBoard(1).reporter(0), HostClock(), world_size=1)
    recorder.begin_step(0, 1, record=True, count_idle=False)
    recorder.enter(Stage.DISPATCH, 0)
    return recorder


def hidden_states(num_tokens=5, hidden_size=200, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    scale = 10.0 ** torch.arange(-2, num_tokens - 2)[:, None]  # tokens of very different size
    return (torch.randn(num_tokens, hidden_size, generator=generator) * scale).to(dtype)


@pytest.mark.parametrize("kind", ["bfloat16", "float8"])
def test_values_come_back_rounded(kind):
    x, recorder = hidden_states(), recording()
    payload = Payload(kind, recorder)
    parts = payload.encode(x)
    assert parts[-1].itemsize * 4 == x.itemsize * {"bfloat16": 2, "float8": 1}[kind]
    back = payload.decode(parts, torch.float32)
    smallest = (
        0.0 if kind == "bfloat16" else 2**-7 * x.abs().amax() / 448
    )  # float8 is coarse near 0
    assert bool(((back - x).abs() <= x.abs() * WORST[kind] + smallest).all())
    error_squares, squares = recorder.end_step().payload_squares
    assert squares == pytest.approx(float(x.double().square().sum()))
    assert error_squares == pytest.approx(float((back - x).double().square().sum()))
    assert 0 < (error_squares / squares) ** 0.5 < WORST[kind]


def test_float8_has_a_scale_for_every_128_values():
    x = torch.ones(1, 200)
    x[0, 128:] = 1e-3
    scales, values = Payload("float8", recording()).encode(x)
    assert (scales.shape, values.shape, values.dtype) == ((1, 2), (1, 200), torch.uint8)
    np.testing.assert_allclose(scales[0], [1 / 448, 1e-3 / 448], rtol=1e-6)


def test_the_smallest_numbers_stay_finite():
    payload = Payload("float8", recording())
    tiny = torch.tensor([[1e-44, 5e-43, -3e-42, 0]])
    assert bool(payload.decode(payload.encode(tiny), torch.float32).isfinite().all())


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("model", torch.float32), ("bfloat16", torch.bfloat16), ("bfloat16", torch.float16)],
)
def test_nothing_is_rounded_that_is_as_narrow(kind, dtype):
    x, recorder = hidden_states(dtype=dtype), recording()
    payload = Payload(kind, recorder)
    (same,) = payload.encode(x)
    assert same is x
    assert payload.decode([same], dtype) is x
    assert recorder.end_step().payload_squares.tolist() == [0, 0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["bfloat16", "float8"])
@pytest.mark.parametrize("layout", ["dp=4,ep=4", "dp=2,tp=2,ep=2", "dp=2"])
def test_every_form_sends_it(pools, form, kind, layout):
    rng, num_ranks = np.random.default_rng(3), 2 if layout == "dp=2" else 4
    inputs = []
    for num_tokens in (5, 0, 1, 7)[:num_ranks]:
        chosen = [rng.permutation(6)[:2] for _ in range(num_tokens)]
        ids = np.array(chosen, dtype=np.int64).reshape(-1, 2)
        x = rng.standard_normal((num_tokens, 16)).astype(np.float32)
        inputs.append((x, ids, rng.random((num_tokens, 2)).astype(np.float32)))
    narrow, plain = (
        run(pools, layout, 6, inputs, 2, form=form, payload=each) for each in (kind, "model")
    )
    share = {"bfloat16": 2, "float8": 4}[kind]
    for result, exact, wanted in zip(narrow, plain, expected(inputs), strict=True):
        # float8 has eight bits of which three are a fraction; a sum has two of them.
        np.testing.assert_allclose(result.combined, wanted, atol=12 * 4 * WORST[kind])
        sent = sent_over(result.dispatch, Traffic.PAYLOAD)
        assert sent * share == sent_over(exact.dispatch, Traffic.PAYLOAD)
        more = sent_over(result.dispatch, Traffic.METADATA) - sent_over(
            exact.dispatch, Traffic.METADATA
        )
        assert more == (sent // 16 * 4 if kind == "float8" else 0)  # a scale for each row
        assert sent_over(result.combine, Traffic.PAYLOAD) == sent_over(
            exact.combine, Traffic.PAYLOAD
        )
    errors = sum(result.dispatch.payload_squares for result in narrow)
    assert 0 < errors[0] < errors[1] * WORST[kind] ** 2
    assert not any(result.dispatch.payload_squares.any() for result in plain)
