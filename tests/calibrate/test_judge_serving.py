"""The judge of whole deployments: rows are read, split, fitted to and counted as it says."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.strategies import integers, tuples

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "calibration"))

import serving_fit  # noqa: E402
import serving_replay  # noqa: E402
from serving_fit import Fit, Point, Times  # noqa: E402
from serving_rows import DEEPSEEK, Row, Workers, model_of, read_rows  # noqa: E402

from expertlane.cost.laws.frameworks import ErrorGroup, FrameworkFit, served_by  # noqa: E402
from expertlane.cost.laws.profile import parse_cluster  # noqa: E402
from expertlane.simulator.steady import StepTimes  # noqa: E402

HEADER = (
    "hardware,framework,precision,spec_method,disagg,is_multinode,prefill_tp,prefill_ep,"
    "prefill_dp_attention,prefill_num_workers,decode_tp,decode_ep,decode_dp_attention,"
    "decode_num_workers,num_prefill_gpu,num_decode_gpu,isl,osl,conc,date,median_ttft,p99_ttft,"
    "median_tpot,p99_tpot,median_itl,median_e2el,tput_per_gpu,input_tput_per_gpu,"
    "output_tput_per_gpu\n"
)
LINES = (
    "h200,trt,fp8,none,False,False,8,8,True,0,8,8,True,0,64,64,1024,1024,64,2026-01-02,0.1,1,0.02,"
    "1,0.2,20,9,4,5\n"
    "gb200,dynamo-trt,fp4,mtp,True,True,4,4,True,5,32,32,True,1,20,32,1024,1024,180,2026-01-02,0.1,"
    "1,0.01,1,2.3,10,9,4,5\n"
    "gb200,dynamo-trt,fp4,none,True,False,36,1,False,0,36,1,False,0,36,36,8192,1024,4,2026-01-02,"
    "0.1,1,0.01,1,0.2,10,9,4,5\n"
)
LIST = (
    "id,silicon_data_source,backend,backend_version,model_path,system,precision,mode,isl,osl,"
    "silicon_ttft_ms,silicon_tpot_ms,split_concurrency,split_layout\n"
    "one,dump; measured=2026-01-02T00:00:00Z,trtllm,1.2,deepseek-ai/DeepSeek-V3,h200_sxm,fp8,agg,"
    '1024,1024,150,20,64,"tp=1,dp=8,ep=8"\n'
    "two,gap-analysis/data; x,sglang,0.5.9,deepseek-ai/DeepSeek-V3,b200_sxm,fp4,disagg,1000,100,"
    "200,30,512,1/1/4/4/2/1/8/8\n"
)
ROW = Row(
    id="line 2",
    model=DEEPSEEK,
    version="",
    hardware="h200",
    framework="trt",
    precision="fp8",
    is_speculative=False,
    prefill=None,
    decode=Workers(8, 8, False, 1),
    isl=1024,
    osl=1024,
    conc=4,
    date="2026-01-02",
    ttft_s=0.1,
    tpot_s=0.01,
    itl_s=0.1,
    output_tps=50.0,
)


def point(row=ROW, tpot_s=0.01, ttft_s=0.1, output_tps=50.0, *, is_fitted=True):
    measured = Times(row.tpot_s, row.ttft_s, row.output_tps)
    return Point(row, measured, Times(tpot_s, ttft_s, output_tps), is_fitted, 1)


def test_rows_are_read_as_deployments(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text(HEADER + LINES)
    (one_pool, two_pools), (unknown,) = read_rows([file])
    assert str(one_pool.decode.layout) == "dp=8,ep=8"
    assert one_pool.prefill is None
    assert one_pool.num_devices == 8
    assert one_pool.num_drafts == 0
    assert str(two_pools.prefill.layout) == "replicas=5,dp=4,ep=4"
    assert str(two_pools.decode.layout) == "dp=32,ep=32"
    assert two_pools.num_devices == 52
    assert two_pools.tokens_seen == pytest.approx(2.3)
    assert two_pools.num_drafts == 3
    assert unknown.decode.tp == 36
    assert (one_pool.load.batch, one_pool.load.output_len.low) == (64, 819)


def test_the_list_s_rows_are_read_too_and_no_measurement_twice(tmp_path):
    rows, listed = tmp_path / "rows.csv", tmp_path / "list.csv"
    rows.write_text(HEADER + LINES)
    listed.write_text(LIST)
    alone, _ = read_rows([listed])
    assert [each.id for each in alone] == ["one", "two"]
    one, two = alone
    assert (one.framework, str(one.decode.layout), one.has_means) == ("trt", "dp=8,ep=8", True)
    assert (one.date, one.is_exact, one.load.output_len.low) == ("2026-01-02", False, 819)
    assert str(two.prefill.layout) == "dp=4,ep=4"
    assert str(two.decode.layout) == "replicas=2,dp=8,ep=8"
    assert (two.framework, two.weights, two.is_exact) == ("dynamo-sglang", "nvfp4", True)
    assert two.load.output_len.low == two.load.output_len.high == 100
    both, _ = read_rows([listed, rows])
    assert [each.id for each in both] == ["line 2", "line 3", "two"]


def test_all_loads_of_a_configuration_are_on_one_side():
    rows = [
        replace(ROW, hardware=name, conc=conc, decode=Workers(8, ep, dp, 1))
        for name in ("h200", "b200")
        for ep, dp in ((1, False), (8, False), (8, True), (1, True))
        for conc in (4, 16, 64)
    ]
    sides = serving_fit.Sides.of(rows)
    fitted, judged = ({row.configuration for row in side} for side in (sides.fitted, sides.judged))
    assert not fitted & judged
    assert len(sides.fitted) == len(sides.judged) == 12
    again = serving_fit.Sides.of(rows[::-1])
    assert {row.configuration for row in again.fitted} == fitted


def test_the_fit_finds_what_steps_and_arrivals_took():
    """Steps take 1.3 times what laws give, and requests 50 ms to arrive."""
    rows = [replace(ROW, conc=conc, tpot_s=0.013, ttft_s=0.076) for conc in range(1, 101)]
    others = [replace(ROW, framework="vllm", conc=conc) for conc in range(1, 11)]
    fit = Fit.to([*(point(row, 0.01, 0.02) for row in rows), *map(point, others)])
    found = fit.of(ROW)
    assert found.step_factor == pytest.approx(1.3, rel=0.02)
    assert found.arrival_s == pytest.approx(0.05, abs=6e-3)
    assert found.num_points == 100
    # A kind with the points of a coarser one has no numbers of its own.
    assert found.kind == ("trt",)
    assert fit.of(replace(ROW, framework="sglang")).kind == ()
    corrected = point(rows[0], 0.01, 0.02, 50.0).corrected(found)
    assert corrected.played.tpot_s == pytest.approx(0.013, rel=0.02)
    assert corrected.played.ttft_s == pytest.approx(0.076, rel=0.1)
    assert corrected.played.output_tps == pytest.approx(50 / 1.3, rel=0.03)


def test_out_of_sample_leaves_a_configuration_out():
    own = [point(replace(ROW, conc=conc, tpot_s=0.02)) for conc in range(1, 9)]
    elsewhere = [
        point(replace(ROW, isl=isl, conc=conc)) for isl in range(100, 1000, 50) for conc in (1, 2)
    ]
    found = serving_fit.out_of_sample([*own, *elsewhere])
    assert len(found) == len(own) + len(elsewhere)
    of_own = [each.played.tpot_s for each in found if each.row.isl == 1024]
    assert of_own == pytest.approx(np.full(8, 0.01))  # nothing of their own doubled time


def test_errors_and_bounds():
    points = [point(tpot_s=0.01 * share) for share in (0.9, 1.0, 1.1, 1.5)]
    errors = serving_fit.Errors.of("TPOT", points, lambda what, each: (0.8, 1.2))
    assert errors.signed == pytest.approx(0.05)
    assert errors.size == pytest.approx(0.1)
    assert errors.inside == 0.75
    lines = "\n".join(serving_fit.table({"h200": points}, lambda what, each: (0.8, 1.2)))
    assert "| h200 | 4 | 4 | +5, 10, 38 | 75% in −20%/+20% | +0, 0, 0 | 100% in " in lines
    listed = [replace(each, measured=replace(each.measured, output_tps=None)) for each in points]
    (*_, line) = serving_fit.table({"all": listed}, lambda what, each: (1, 1))
    assert line.startswith("| all | 4 | 4 | +5, 10, 38 | 25% in −0%/+0% |  |  | +0, 0, 0 |")


def test_bounds_of_a_kind_are_its_own_where_it_has_many_points():
    """Measured over projected, 0.5 to 1.5 of a kind with many points, 1 of all others."""
    spread = [point(tpot_s=0.01 / share) for share in np.linspace(0.5, 1.5, 201)]
    even = [point(replace(ROW, hardware="b200", framework="sglang")) for _ in range(50)]
    bounds = serving_fit.Bounds([*spread, *even])
    assert bounds.of("TPOT", spread[0]) == pytest.approx((0.55, 1.45), abs=0.05)
    low, high = bounds.of("TPOT", even[0])
    assert 0.8 < low <= 1 <= high < 1.2
    new = point(replace(ROW, hardware="gb300", framework="vllm"))
    low, high = bounds.of("TPOT", new)
    assert low < 0.8  # of all
    assert high > 1.2


def test_what_is_written_is_read(tmp_path, monkeypatch):
    fitted = [FrameworkFit(("trt",), 1.25, 0.05, 12), FrameworkFit(("trt", "Hopper"), 1.5, 0.07, 3)]
    group = ErrorGroup(
        "h200", "float8", False, False, "trt", 12, 0.1, 0.1, 0.2, (0.8, 1.2), (0.8, 1.2), (0.5, 2.0)
    )
    path = tmp_path / "frameworks.toml"
    serving_fit.write(fitted, [group], path)
    module = sys.modules["expertlane.cost.laws.frameworks"]
    monkeypatch.setattr(module, "FILE", path)
    module._file.cache_clear()
    try:
        assert module.judged_groups() == [group]
        cluster, model = parse_cluster("h200x8"), model_of(DEEPSEEK)
        served = served_by(cluster, "trt", model, "float8").profile
        assert served.framework == "trt"
        assert served.terms["arrival_s"].value == 0.07
        law, own = (each.surfaces["gemm.float8"] for each in (served, cluster.profile))
        np.testing.assert_allclose(law.correction, own.correction + np.log(1.5))
        on_b200 = served_by(parse_cluster("b200x8"), "trt", model, "float8").profile
        assert on_b200.terms["arrival_s"].value == 0.05
        assert served_by(cluster, None, model, "float8") is cluster
        assert "arrival_s" not in served_by(cluster, "vllm", model, "float8").profile.terms
    finally:
        module._file.cache_clear()


def play(row=ROW, *, decode_s=1.0, prompt_s=1e-9, per_s=1e9, places=99, beside=0.0, **rules):
    """Outputs of ten tokens after prompts of ten; a benchmark of so many as `row.conc`."""
    rules = {"step_tokens": 10, **rules}
    row = replace(row, isl=10, osl=10, is_exact=True)
    steps = StepTimes({1: decode_s}, {1: beside}, prompt_s, per_s, places)
    return serving_replay.play(row, steps, serving_replay.Scheduling(**rules))


APART = replace(ROW, prefill=Workers(1, 1, False, 1), decode=Workers(1, 1, False, 1))


@pytest.mark.parametrize("row", [ROW, APART], ids=["one pool", "two pools"])
def test_requests_that_are_alone(row):
    """A prompt of a second, and nine more tokens of a tenth of one."""
    seen = play(replace(row, conc=1), decode_s=0.1, prompt_s=1.0, per_s=1.0)
    assert seen.ttft_s == pytest.approx(np.full(10, 1.0))
    assert seen.tpot_s == pytest.approx(np.full(10, 0.1))
    assert seen.total_s == pytest.approx(19.0)
    assert seen.num_tokens == 100


@pytest.mark.parametrize("row", [ROW, APART], ids=["one pool", "two pools"])
@pytest.mark.parametrize(
    ("step_tokens", "per_s", "first_s", "last_s"),
    [
        (10, 1.0, 1.0, 8.0),  # a prompt in each step
        (80, 8.0, 1.0, 1.0),  # all eight in a step
        (40, 2.0, 2.0, 4.0),  # four in a step, twice
    ],
)
def test_prompts_of_a_wave_wait_for_each_other(row, step_tokens, per_s, first_s, last_s):
    seen = play(
        replace(row, conc=8),
        decode_s=100.0,
        prompt_s=1.0,
        per_s=per_s,
        step_tokens=step_tokens,
        phases_apart=True,
    )
    assert seen.ttft_s[:8].min() == pytest.approx(first_s)
    assert seen.ttft_s[:8].max() == pytest.approx(last_s)


@given(
    num_places=integers(1, 20),
    over=integers(1, 20),
    outputs=tuples(integers(50, 90), integers(100, 150)),
)
@settings(max_examples=20, deadline=None)
def test_what_has_no_place_waits_for_its_first_token(num_places, over, outputs):
    """Little's law: so many wait on average."""
    row = replace(ROW, isl=10, osl=100, conc=num_places + over, is_exact=True)
    steps = StepTimes({1: 1.0}, {1: 0.0}, 1e-9, 1e9, num_places)
    rules = serving_replay.Scheduling(step_tokens=10**6)
    seen = serving_replay.play(row, steps, rules)
    waiting = seen.ttft_s.sum() / seen.total_s
    assert waiting == pytest.approx(over, rel=0.35, abs=1)
    assert seen.total_s >= 0.95 * len(seen.ttft_s) * 99 / num_places


@pytest.mark.parametrize(
    ("conc", "workers", "most"),
    [
        (666, Workers(16, 16, True, 1), 32),
        (16130, Workers(4, 4, True, 5), 768),
        (20, Workers(8, 8, False, 4), 4),
        (6, Workers(8, 8, False, 3), 1),
        (76, Workers(8, 8, True, 4), 3),
        (1, Workers(8, 8, False, 1), 1),
        (2, Workers(8, 8, False, 4), 1),
    ],
)
def test_places_where_a_pool_decodes(conc, workers, most):
    assert (
        replace(ROW, prefill=Workers(4, 4, True, 1), decode=workers, conc=conc).decode_seqs == most
    )
    assert ROW.decode_seqs == 0
