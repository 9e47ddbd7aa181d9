"""Times of operations on one device."""

from dataclasses import replace

import numpy as np
import pytest

from cli.screen import telling, tells
from expertlane.cost.laws import shipped_profiles
from expertlane.cost.laws.device import DeviceModel, has_law, stand_ins
from expertlane.cost.laws.profile import Device, Profile, Term, read_profile
from expertlane.cost.laws.times import Basis, Surface
from expertlane.cost.step.operation import (
    ATTENTION,
    BYTES_ALONE,
    ITEM_BYTES,
    SIZES,
    STATES,
    NumberTypes,
    OpKind,
)
from expertlane.errors import SpecError
from expertlane.spec.model import PRESETS
from planner.requests import COMPRESSED

_DEVICE = Device("toy", 1e9, 1e9, {"float32": 1e12, "bfloat16": 2e12}, "made up")
_TOY = Profile("toy", _DEVICE, 1, {})

_PROMPTS, _CHOSEN = (2.0, 2 * 512 * 513 / 2, 1024.0, 1024.0), (2.0, 2048.0 * 64, 64.0, 8192.0)
# In the order of `SIZES`.
_EXAMPLES = {
    OpKind.GEMM: (64.0, 4096.0, 2048.0),
    OpKind.EXPERTS: (256.0, 8.0, 4096.0, 1536.0, 3.0),
    OpKind.PREFILL_ATTENTION: (*_PROMPTS, 32.0, 4.0, 128.0),
    OpKind.DECODE_ATTENTION: (8.0, 8000.0, 32.0, 4.0, 128.0),
    OpKind.LATENT_PREFILL: (*_PROMPTS, 16.0, 576.0, 512.0),
    OpKind.LATENT_DECODE: (8.0, 8000.0, 16.0, 576.0, 512.0),
    OpKind.SPARSE: (*_CHOSEN, 64.0, 576.0, 512.0),
    OpKind.COMPRESSED: (2.0, 256.0 * 64, 64.0, 512.0, 64.0, 512.0, 512.0),
    OpKind.SPARSE_GROUPED: (*_CHOSEN, 64.0, 4.0, 128.0),
    OpKind.INDEX: (8192.0 * 64, 64.0, 64.0, 128.0, 8192.0 * (132 + 64), 8192.0 * 64),
    OpKind.INDEX_DECODE: (8192.0, 64.0, 64.0, 128.0, 8192.0 * (132 + 64), 8192.0),
    OpKind.CHOOSE: (8192.0 * 64, 64.0, 2048.0),
    OpKind.CONVOLUTION: (8.0, 64.0, 8192.0, 4.0),
    **dict.fromkeys(STATES, (8.0, 64.0, 32 * 128 * 128.0, 6 * 32 * 128 * 128.0, 12_352.0)),
    OpKind.MEMORY: (1e6,),
}
_ONE_OF_EACH = {kind: dict(zip(SIZES[kind], _EXAMPLES[kind], strict=True)) for kind in OpKind}
_OF_FLOAT8 = (OpKind.INDEX, OpKind.INDEX_DECODE, OpKind.COMPRESSED)  # in float8 alone
_UNMEASURED = (
    OpKind.SPARSE_GROUPED,
    *(kind for kind in STATES if kind.startswith(("lightning", "mamba"))),
)
# What there is none of where a rank has nothing to do, and more of where it has more to do.
_AMOUNTS = {"m", "pairs", "seqs", "query_key_pairs", "tokens", "positions", "read_bytes", "scores"}
_AMOUNTS |= {"bytes"}


@pytest.fixture(scope="module")
def h100():
    return DeviceModel(read_profile("h100"))


def test_without_measurements_a_range_of_the_roofline_holds():
    # 2 · 1000³ FLOPs over 1 TFLOP/s are 2 ms; 12 MB over 1 GB/s are 12 ms.
    times = DeviceModel(_TOY).times(OpKind.GEMM, "float32", {"m": 1e3, "n": 1e3, "k": 1e3})
    assert times.low == pytest.approx(12e-3)
    assert times.seconds == pytest.approx(20e-3)
    assert times.high == pytest.approx(60e-3)
    assert times.basis is Basis.BOUND


def test_a_surface_and_a_floor_are_applied():
    surface = Surface({"m": (1.0, 10.0)}, np.log([2.0, 2.0]), 0.5, 3.0, Basis.MEASURED, "by hand")
    floor = Term(1e-3, 1e-3, 1e-3, Basis.MEASURED, "by hand")
    profile = replace(_TOY, surfaces={"gemm.float32": surface}, terms={"gemm_floor_s": floor})
    sizes = {"m": np.array([0.0, 10.0, 1000.0]), "n": 1e3, "k": 1e3}
    times = DeviceModel(profile).times(OpKind.GEMM, "float32", sizes)
    # 10 rows: 4 MB of weights and 0.08 MB of rows over 1 GB/s.
    assert times.seconds == pytest.approx([0, 2 * 5.08e-3, 2 * 13e-3])
    assert times.low[1] == pytest.approx(5.08e-3)
    assert times.high[1] == pytest.approx(6 * 5.08e-3)
    assert times.is_extrapolated.tolist() == [False, False, True]
    assert times.basis is Basis.MEASURED


def test_rooflines_count_flops_and_bytes_as_the_engine_does():
    ranges = {
        # bfloat16: 4 · 8000 · 32 · 128 FLOPs; keys and values of 4 heads, queries and results.
        OpKind.DECODE_ATTENTION: max(131.072e6 / 2e12, 2 * 2 * 128 * (8000 * 4 + 8 * 32) / 1e9),
        OpKind.LATENT_DECODE: max(
            2 * 8000 * 16 * 1088 / 2e12, 2 * (8000 * 576 + 8 * 16 * 1088) / 1e9
        ),
        OpKind.EXPERTS: 2 * (8 * 3 * 4096 * 1536 + 256 * (2 * 4096 + 3 * 1536)) / 1e9,
        OpKind.MEMORY: 1e-3,
    }
    for kind, seconds in ranges.items():
        times = DeviceModel(_TOY).times(kind, "bfloat16", _ONE_OF_EACH[kind])
        assert times.low == pytest.approx(seconds), kind


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float8"])
@pytest.mark.parametrize("kind", list(OpKind))
def test_nothing_to_do_takes_no_time(h100, kind, dtype):
    amounts = (_AMOUNTS | {"active"}) & _ONE_OF_EACH[kind].keys()
    nothing = dict.fromkeys(amounts, np.array([0.0, 0.0]))
    times = h100.times(kind, dtype, {**_ONE_OF_EACH[kind], **nothing})
    assert times.seconds.tolist() == times.low.tolist() == times.high.tolist() == [0, 0]
    assert not times.is_extrapolated.any()
    mixed = {
        name: np.array([0.0, size]) if name in amounts else size
        for name, size in _ONE_OF_EACH[kind].items()
    }
    some = h100.times(kind, dtype, mixed)
    assert some.seconds[0] == 0
    assert some.seconds[1] > 1e-6
    alone = h100.times(kind, dtype, _ONE_OF_EACH[kind])
    assert some.seconds[1] == pytest.approx(float(alone.seconds))


@pytest.mark.parametrize(
    "kind", [kind for kind in OpKind if kind not in (*_UNMEASURED, *BYTES_ALONE, *_OF_FLOAT8)]
)
def test_float16_stands_on_bfloat16_as_a_wider_bound(h100, kind):
    known = h100.times(kind, "bfloat16", _ONE_OF_EACH[kind])
    other = h100.times(kind, "float16", _ONE_OF_EACH[kind])
    assert known.basis is Basis.FITTED
    assert other.basis is Basis.BOUND
    assert other.seconds == pytest.approx(known.seconds)
    assert other.low < known.low
    assert other.high > known.high
    assert "bfloat16" in h100._surface(kind, "float16").origin


@pytest.mark.smoke(16)
@pytest.mark.parametrize("name", sorted(shipped_profiles()))
@pytest.mark.parametrize("kind", list(OpKind))
def test_times_of_every_shipped_profile_are_between_bounds_and_no_faster_than_light(name, kind):
    profile = read_profile(name)
    model = DeviceModel(profile)
    for dtype in profile.device.flops_per_s:
        if kind in ATTENTION and dtype not in ITEM_BYTES:
            continue  # a type of weights alone
        times = model.times(kind, dtype, _ONE_OF_EACH[kind])
        assert 0 < times.low <= times.seconds <= times.high < 20e-3


_FITTED = ("a100", "b200", "b300", "gb200", "gb300", "h100", "h200", "l40s", "rtxpro6000")


@pytest.mark.smoke(14)
@pytest.mark.parametrize("name", _FITTED)
@pytest.mark.parametrize("kind", list(OpKind))
def test_more_work_is_never_much_faster(name, kind):
    profile = read_profile(name)
    times = 2.0 ** np.arange(-3, 9)
    grown = {
        name: size * times if name in _AMOUNTS else size
        for name, size in _ONE_OF_EACH[kind].items()
    }
    fitted = {"bfloat16", "float8"} if kind in ATTENTION else set(profile.device.flops_per_s)
    for dtype in fitted - {"float16", "float32"}:
        seconds = DeviceModel(profile).times(kind, dtype, grown).seconds
        assert np.all(seconds[1:] > 0.85 * seconds[:-1]), dtype


def test_without_a_law_of_its_own_a_convolution_is_priced_as_bytes_moved():
    laws = {"memory": Surface({}, np.array(0.0), 1, 1, Basis.MEASURED, "toy")}
    model = DeviceModel(replace(_TOY, surfaces=laws))
    sizes = {"seqs": 2.0, "tokens": 100.0, "channels": 1000.0, "kernel": 4.0}
    times = model.times(OpKind.CONVOLUTION, "bfloat16", sizes)
    assert times.seconds == pytest.approx(2 * 2 * 1000 * (100 + 2 * 3) / 1e9)
    assert times.basis is Basis.MEASURED
    own = Surface({}, np.array(np.log(3.0)), 1, 1, Basis.FITTED, "toy")
    model = DeviceModel(replace(_TOY, surfaces={**laws, "convolution": own}))
    assert model.times(OpKind.CONVOLUTION, "bfloat16", sizes).seconds == pytest.approx(
        3 * times.seconds
    )


@pytest.mark.parametrize("name", [*_FITTED, "l4", "h100pcie", "a100pcie", "a30"])
def test_delta_rules_have_laws_on_every_card_and_mamba_nowhere(name):
    profile = read_profile(name)
    for kind in STATES:
        assert has_law(profile, kind, "bfloat16") is (kind not in _UNMEASURED), kind
    assert not has_law(_TOY, OpKind.GATED_DELTA_DECODE, "bfloat16")


def test_measurements_that_stand_in_for_a_type_are_named():
    h100 = read_profile("h100")

    def said(*types):
        return " ".join(stand_ins(h100, NumberTypes(*types), PRESETS["paper"]))

    assert said("bfloat16", "bfloat16", "bfloat16") == ""
    assert tells(said("float16", "float16", "float16"), "bfloat16 float16 15%")
    of_both = said("float8", "bfloat16", "float8")
    assert tells(of_both, "float8 cache")
    assert "measured in" not in of_both
    assert (
        list(stand_ins(_TOY, NumberTypes("float16", "float16", "float8"), PRESETS["paper"])) == []
    )


def test_laws_that_stand_in_for_compressed_attention_are_named():
    h100, float8 = read_profile("h100"), NumberTypes("float8", kv="float8")
    said = " ".join(stand_ins(h100, NumberTypes(), COMPRESSED))
    assert tells(said, "Compressed attention is priced chosen positions latent window entries")
    said = " ".join(stand_ins(h100, float8, COMPRESSED))
    assert tells(said, "Compressed attention of single tokens priced chosen positions")
    assert "nothing was measured" not in said
    assert "SGLang" not in said
    said = " ".join(stand_ins(read_profile("gb200"), float8, COMPRESSED))
    assert tells(said, "Prompts in layers with chosen entries took SGLang 1.6 times projected")
    said = " ".join(stand_ins(_TOY, float8, COMPRESSED))
    assert tells(said, "Compressed attention of prompts over a float8 cache nothing was measured")


def test_a_type_without_a_figure_is_one_clear_line():
    with pytest.raises(SpecError, match=telling("NVIDIA A100 SXM 80 GB float8")):
        DeviceModel(read_profile("a100")).times(OpKind.GEMM, "float8", _ONE_OF_EACH[OpKind.GEMM])
    with pytest.raises(SpecError, match=telling("float64 priced")):
        DeviceModel(_TOY).times(OpKind.GEMM, "float64", _ONE_OF_EACH[OpKind.GEMM])


def test_a_float8_cache_needs_no_float8_peak():
    sizes = _ONE_OF_EACH[OpKind.DECODE_ATTENTION]
    times = DeviceModel(read_profile("a100")).times(OpKind.DECODE_ATTENTION, "float8", sizes)
    assert times.basis is Basis.BOUND


def test_an_axis_that_a_kind_lacks_is_one_clear_line():
    surface = Surface({"rows": (1.0, 2.0)}, np.zeros(2), 0.5, 2.0, Basis.FITTED, "by hand")
    profile = replace(_TOY, surfaces={"gemm.float32": surface})
    with pytest.raises(SpecError, match=telling("toy gemm rows m n k")):
        DeviceModel(profile).times(OpKind.GEMM, "float32", _ONE_OF_EACH[OpKind.GEMM])


def test_what_was_measured_in_caches_is_no_faster_than_the_peak():
    surface = Surface({}, np.array(-0.5), 0.9, 1.1, Basis.FITTED, "made up")
    profile = replace(read_profile("h100"), surfaces={"memory": surface}, terms={})
    bandwidth = profile.device.memory_bytes_per_s
    sizes = {"bytes": np.array([1e-5, 1e-3]) * bandwidth}
    published = DeviceModel(profile).times(OpKind.MEMORY, "bfloat16", sizes)
    assert published.seconds == pytest.approx([1e-5 * np.exp(-0.5), 1e-3])
    assert published.low == pytest.approx([0.9e-5 * np.exp(-0.5), 1e-3])
    assert published.high == pytest.approx([1.1e-5 * np.exp(-0.5), 1e-3])
    own = replace(profile, surfaces={"memory": replace(surface, basis=Basis.MEASURED)})
    measured = DeviceModel(own).times(OpKind.MEMORY, "bfloat16", sizes)
    assert measured.seconds == pytest.approx(np.array([1e-5, 1e-3]) * np.exp(-0.5))


def _experts(pairs, active, hidden=8192.0, inner=32_768.0, matrices=2.0):
    sizes = {"pairs": pairs, "active": active}
    return {**sizes, "hidden": hidden, "inner": inner, "matrices": matrices}


def _gemm(m, n, k):
    return {"m": m, "n": n, "k": k}


@pytest.mark.parametrize("matrices", [2.0, 3.0])
def test_wide_experts_are_products_of_their_own_size(h100, matrices):
    """One of the paper's, 128 tokens: up, down, and the activation between them."""
    times = h100.times(OpKind.EXPERTS, "bfloat16", _experts(128.0, 1.0, matrices=matrices))
    up = h100.times(OpKind.GEMM, "bfloat16", _gemm(128.0, 32_768.0, 8192.0))
    down = h100.times(OpKind.GEMM, "bfloat16", _gemm(128.0, 8192.0, 32_768.0))
    moved = h100.times(OpKind.MEMORY, "bfloat16", {"bytes": 128 * 32_768 * matrices * 2})
    assert times.seconds == pytest.approx(
        (matrices - 1) * up.seconds + down.seconds + moved.seconds
    )
    assert times.low < times.seconds < times.high
    assert times.basis is Basis.FITTED
    assert not times.is_extrapolated


def test_experts_that_a_law_knows_keep_it(h100):
    """Some are wide on a rank that has any pairs; Mixtral's are as timed."""
    mixtral = _experts(512.0, 8.0, 4096.0, 14_336.0, 3.0)
    with_products = h100.times(OpKind.EXPERTS, "bfloat16", mixtral).seconds
    profile = read_profile("h100")
    without = {n: law for n, law in profile.surfaces.items() if not n.startswith("gemm.")}
    alone = DeviceModel(replace(profile, surfaces=without))
    assert with_products == alone.times(OpKind.EXPERTS, "bfloat16", mixtral).seconds
    some = _experts(np.array([0.0, 128.0]), np.array([0.0, 1.0]))
    assert h100.times(OpKind.EXPERTS, "bfloat16", some).seconds[0] == 0
    # Without a product's law the experts' own holds, far outside its sizes.
    assert alone.times(OpKind.EXPERTS, "bfloat16", _experts(128.0, 1.0)).is_extrapolated


def test_wide_experts_of_a_machine_that_was_measured_keep_its_law():
    axes = {"hidden": (64.0, 512.0), "inner": (64.0, 512.0)}
    law = Surface(axes, np.zeros((2, 2)), 0.9, 1.1, Basis.MEASURED, "by hand")
    gemm = Surface({"m": (1.0, 2.0)}, np.log([9.0, 9.0]), 0.9, 1.1, Basis.MEASURED, "by hand")
    model = DeviceModel(replace(_TOY, surfaces={"experts.float32": law, "gemm.float32": gemm}))
    times = model.times(OpKind.EXPERTS, "float32", _experts(1.0, 1.0))
    assert times.seconds == pytest.approx(2 * 8192 * 32_768 * 4 / 1e9, rel=1e-3)
