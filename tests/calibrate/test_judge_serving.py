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

import serving_errors  # noqa: E402
import serving_fit  # noqa: E402
import serving_waves  # noqa: E402
from serving_rows import Row, Workers, model, read_rows  # noqa: E402
from serving_simulation import Projected  # noqa: E402

from expertlane.cost.laws.frameworks import frameworks  # noqa: E402

HEADER = (
    "hardware,framework,precision,spec_method,disagg,is_multinode,prefill_tp,prefill_ep,"
    "prefill_dp_attention,prefill_num_workers,decode_tp,decode_ep,decode_dp_attention,"
    "decode_num_workers,num_prefill_gpu,num_decode_gpu,isl,osl,conc,date,median_ttft,p99_ttft,"
    "median_tpot,p99_tpot,median_itl,median_e2el,tput_per_gpu,input_tput_per_gpu,"
    "output_tput_per_gpu\n"
)
LINES = (
    "h200,trt,fp8,none,False,False,8,8,True,0,8,8,True,0,64,64,1024,1024,64,d,0.1,1,0.02,1,0.2,20,"
    "9,4,5\n"
    "gb200,dynamo-trt,fp4,mtp,True,True,4,4,True,5,32,32,True,1,20,32,1024,1024,180,d,0.1,1,0.01,1,"
    "2.3,10,9,4,5\n"
    "gb200,dynamo-trt,fp4,none,True,False,36,1,False,0,36,1,False,0,36,36,8192,1024,4,d,0.1,1,0.01,"
    "1,0.2,10,9,4,5\n"
)
ROW = Row(
    hardware="h200",
    framework="trt",
    precision="fp8",
    is_speculative=False,
    prefill=None,
    decode=Workers(8, 8, False, 1),
    isl=1024,
    osl=1024,
    conc=4,
    date="d",
    ttft_s=0.1,
    tpot_s=0.01,
    itl_s=0.1,
    tps_per_gpu=100.0,
    output_tps=50.0,
)


def projected(tpot_s, ttft_s=0.1, output_tps=50.0):
    around = [
        tuple(share * each for share in (0.8, 1, 1.2)) for each in (tpot_s, ttft_s, output_tps)
    ]
    return Projected(*around, steps_per_token=1.0)


def test_rows_are_read_as_deployments(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text(HEADER + LINES)
    (one_pool, two_pools), (unknown,) = read_rows(file)
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


def test_the_model_is_deepseek_s():
    config = model()
    assert (config.num_hidden_layers, config.num_experts, config.hidden_size) == (61, 256, 7168)
    assert config.routing.n_group == 8
    assert config.latent.kv_lora_rank == 512
    assert config.routing.scoring_func == "sigmoid"


def test_all_loads_of_a_configuration_are_on_one_side():
    rows = [
        replace(ROW, hardware=name, conc=conc, decode=Workers(8, ep, dp, 1))
        for name in ("h200", "b200")
        for ep, dp in ((1, False), (8, False), (8, True), (1, True))
        for conc in (4, 16, 64)
    ]
    sides = serving_fit.Sides.drawn(rows)
    fitted, judged = ({row.configuration for row in side} for side in (sides.fitted, sides.judged))
    assert not fitted & judged
    assert len(sides.fitted) == len(sides.judged) == 12
    assert sides == serving_fit.Sides.drawn(rows[::-1][::-1])


def test_the_fit_finds_what_hosts_took():
    """Steps of 10 ms and a host of 3 ms, requests that take 50 ms to arrive."""
    rows = [replace(ROW, conc=conc, tpot_s=0.013, ttft_s=0.073) for conc in (4, 8, 16)]
    base = [(row, projected(0.01, 0.02)) for row in rows]
    found = serving_fit.fit(base)["trt"].terms
    assert found["driver_s"].value == pytest.approx(0.003, abs=2e-4)
    assert found["arrival_s"].value == pytest.approx(0.05, abs=6e-3)
    for term in found.values():
        assert term.low <= term.value <= term.high


def test_acceptance_gives_the_tokens_that_were_seen():
    rows = [replace(ROW, is_speculative=True, itl_s=0.01 * 10 * seen) for seen in (2.2, 2.3, 2.4)]
    known = serving_fit.acceptances(rows)
    share = serving_fit.acceptance_of(rows[0], known)
    assert sum(share**place for place in range(4)) == pytest.approx(2.3, abs=0.01)
    sglang = replace(rows[0], framework="sglang")
    assert serving_fit.acceptance_of(sglang, known) == share
    assert serving_fit.acceptance_of(ROW, known) == 0


def test_errors_and_bounds():
    pairs = [(ROW, projected(0.01 * share)) for share in (0.9, 1.0, 1.1, 1.5)]
    errors = serving_errors.Errors.of("TPOT", pairs)
    assert errors.signed == pytest.approx(0.05)
    assert errors.size == pytest.approx(0.1)
    assert errors.inside == 0.75
    assert errors.half_width == pytest.approx(0.2)
    lines = "\n".join(serving_errors.table({"h200": pairs}))
    assert "| h200 | 4 | TPOT | too few rows |" in lines
    assert "+5%" in "\n".join(serving_errors.table({"h200": pairs}, fewest=4))


@pytest.mark.parametrize(
    ("other_s", "said_s", "line"),
    [
        (0.02, 0.015, "| TPOT | 1 | 1 | 100% |"),
        (0.02, 0.009, "| TPOT | 1 | 1 | 0% |"),
        (0.0105, 0.02, "| TPOT | 0 | 0 | none |"),  # within noise
    ],
)
def test_the_order_of_layouts_at_one_load(other_s, said_s, line):
    other = replace(ROW, decode=Workers(8, 8, True, 1), tpot_s=other_s)
    elsewhere = replace(other, conc=8, tpot_s=1.0)
    pairs = [(ROW, projected(0.01)), (other, projected(said_s)), (elsewhere, projected(9.0))]
    assert line in list(serving_errors.orders(pairs, lambda one, two: True))


def test_what_is_written_is_read(tmp_path, monkeypatch):
    written = serving_fit.fit([(ROW, projected(0.008, 0.05))])
    path = tmp_path / "frameworks.toml"
    serving_fit.write(written, [], path)
    monkeypatch.setattr("expertlane.cost.laws.frameworks.FILE", path)
    for each in (frameworks, sys.modules["expertlane.cost.laws.frameworks"]._file):
        each.cache_clear()
    try:
        read = frameworks()
    finally:
        for each in (frameworks, sys.modules["expertlane.cost.laws.frameworks"]._file):
            each.cache_clear()
    assert set(read) == {*serving_fit.TITLES, "vllm", "dynamo-sglang"}
    assert read["trt"].fitted_to == (61, 7168, 256)
    assert read["vllm"].fitted_to is None
    assert read["trt"].terms["driver_s"].value == pytest.approx(0.002, abs=1e-4)
    assert np.isfinite([term.high for each in read.values() for term in each.terms.values()]).all()


def two_pools(**others):
    """Prompts of ten tokens take a second each, alone or not."""
    sizes = {"step_tokens": 10, "num_places": 8, "tpot_s": 0.0, "alone_s": 1.0, "full_s": 1.0}
    return serving_waves.TwoPools(**{"num_prefill": 1, "num_decode": 1, **sizes, **others})


def test_waves_wait_for_each_other_s_prefill():
    """Eight at once, a prompt a second, no time to decode: each wave waits for seven others."""
    alone = two_pools(tpot_s=0.1).serve(1, (10, 10), (10, 10))
    assert alone.ttft_s == pytest.approx(np.full(serving_waves.NUM_WAVES, 1.0))
    assert alone.total_s == pytest.approx(1.9 * serving_waves.NUM_WAVES)
    seen = two_pools().serve(8, (10, 10), (10, 10))
    assert seen.ttft_s[:8].tolist() == list(range(1, 9))
    assert seen.ttft_s[8:] == pytest.approx(np.full(len(seen.ttft_s) - 8, 8.0))
    # Spread by the first wave for good.
    assert two_pools(tpot_s=100.0).serve(8, (10, 10), (10, 10)).ttft_s[8:].max() < 1.01


@pytest.mark.parametrize(
    ("num_prefill", "step_tokens", "full_s", "last_s"),
    [
        (1, 80, 1.0, 1.0),  # all eight in a step
        (1, 40, 2.0, 4.0),  # four in a step, twice
        (2, 40, 2.0, 2.0),  # four in a step of each
        (1, 15, 1.5, 9.0),  # one and a half in each of six steps, the first of another wave last
    ],
)
def test_prompts_share_steps(num_prefill, step_tokens, full_s, last_s):
    sizes = {"num_prefill": num_prefill, "step_tokens": step_tokens, "full_s": full_s}
    seen = two_pools(**sizes).serve(8, (10, 10), (10, 10))
    assert seen.ttft_s[:8].max() == pytest.approx(last_s)


@given(
    num_decode=integers(1, 5),
    num_places=integers(1, 20),
    over=integers(1, 20),
    outputs=tuples(integers(50, 90), integers(100, 150)),
)
@settings(max_examples=20, deadline=None)
def test_what_has_no_place_waits_for_its_first_token(num_decode, num_places, over, outputs):
    """Little's law: so many wait on average, whatever the lengths."""
    pools = two_pools(num_decode=num_decode, num_places=num_places, alone_s=0, full_s=0, tpot_s=1)
    places = num_decode * num_places
    seen = pools.serve(places + over, (10, 10), outputs)
    decode_s = np.mean(outputs) - 1
    waiting_s = seen.ttft_s.sum() / seen.total_s
    assert seen.num_tokens == pytest.approx(np.mean(outputs) * len(seen.ttft_s), rel=0.2)
    assert waiting_s <= places + over
    assert seen.total_s >= 0.8 * len(seen.ttft_s) * decode_s / places
    if num_decode == 1:
        assert waiting_s == pytest.approx(over, rel=0.35, abs=1)


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


def test_waves_are_played_once(tmp_path, monkeypatch):
    monkeypatch.setattr(serving_waves, "_PLAYED", tmp_path / "waves.jsonl")
    apart = replace(ROW, prefill=Workers(8, 8, False, 1))
    pairs = [(ROW, projected(0.01)), (apart, replace(projected(0.01), prefill_rate=5.0))]
    found = serving_waves.all_in_waves([*pairs, *pairs], 1)
    monkeypatch.setattr(serving_waves, "in_waves", lambda row, steady: pytest.fail("again"))
    again = serving_waves.all_in_waves([*pairs, *pairs], 1)
    for one, two in zip(found, again, strict=True):
        assert two.ttft_s == pytest.approx(one.ttft_s)
    assert found[0] != found[1]


def test_a_benchmark_of_waves_is_slower_than_its_steady_state():
    steady = projected(0.01)
    assert serving_waves.in_waves(ROW, steady).output_tps[1] == pytest.approx(50 / 1.05)
    apart = replace(ROW, prefill=Workers(8, 8, False, 1), conc=64)
    found = serving_waves.in_waves(apart, replace(steady, prefill_rate=5.0, prompt_s=0.2))
    low_s, likely_s, high_s = found.ttft_s
    assert 0.1 <= low_s <= likely_s <= high_s
    assert found.output_tps[1] <= 5.0 * apart.load.output_len.high / 8  # what prompts allow
