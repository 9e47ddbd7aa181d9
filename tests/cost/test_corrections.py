"""Corrections on laws: what they change, what becomes of bounds, and their file."""

from dataclasses import replace
from math import log

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cost.projected import PROFILE as MADE_UP
from expertlane.cost.laws.corrections import (
    Correction,
    Corrections,
    FitSource,
    LawKind,
    corrected,
    read_corrections,
    scaled,
)
from expertlane.cost.laws.device import DeviceModel
from expertlane.cost.laws.frameworks import ServingKind, judged
from expertlane.cost.laws.profile import Execution, ModelledCluster, Term, read_profile
from expertlane.cost.laws.times import Basis
from expertlane.cost.projector import Projector, Setting, StepSize
from expertlane.cost.routing import PowerLawRouting
from expertlane.cost.step.operation import OF_MIXERS, NumberTypes, OpKind
from expertlane.errors import UserError
from expertlane.spec.deployment import Options
from expertlane.spec.layout import Layout
from expertlane.spec.model import PRESETS
from expertlane.spec.names import Phase

H100 = read_profile("h100")
MEASURED = replace(
    H100,
    surfaces={name: replace(law, basis=Basis.MEASURED) for name, law in H100.surfaces.items()},
)
MODEL = PRESETS["paper"]
TYPES = NumberTypes.all_of("bfloat16")
ON = FitSource(
    "a model", "h100", "an engine 1.0", ("one", "two"), 12, (8, 16), (1, 64), (10, 900), 0.3, 0.02
)
GEMM = {"m": np.array([64.0]), "n": 4096.0, "k": 4096.0}


def step_of(profile, layout, execution):
    """A prefill as a graph, or a small decode step kernel by kernel."""
    setting = Setting(TYPES, execution, PowerLawRouting.of(MODEL, 0.5))
    cluster = ModelledCluster(profile, 16)
    projector = Projector(MODEL, Layout.parse(layout), Options(), cluster, setting)
    sizes = {
        Execution.GRAPH: StepSize(16, 512, 0, phase=Phase.PREFILL),
        Execution.EAGER: StepSize(16, 1, 100),
    }
    return projector.step(sizes[execution])


def by(**factors):
    return {LawKind(name): Correction.exactly(factor) for name, factor in factors.items()}


@settings(deadline=None, max_examples=8)
@given(st.sampled_from(["gemm", "experts", "attention", "memory"]), st.floats(1.05, 8))
def test_a_family_of_kernels_takes_its_factor_and_no_other_does(name, factor):
    profile = scaled(H100, by(**{name: factor}))
    for law, surface in H100.surfaces.items():
        kind = law.partition(".")[0]
        mixes = kind in OF_MIXERS or "attention" in kind or "latent" in kind
        is_own = (name == "attention" and mixes) or kind == name
        change = profile.surfaces[law].correction - surface.correction
        assert change == pytest.approx(log(factor) if is_own else 0.0)
        assert (profile.surfaces[law].basis is Basis.FITTED) or not is_own


@pytest.mark.parametrize("profile", [H100, MADE_UP], ids=["h100", "no laws"])
def test_a_product_takes_so_many_times_as_long(profile):
    """Where nothing was measured, too."""
    before, after = (
        DeviceModel(each).times(OpKind.GEMM, "bfloat16", GEMM)
        for each in (profile, scaled(profile, by(gemm=3.0)))
    )
    assert after.seconds == pytest.approx(3 * before.seconds)
    assert after.basis is Basis.FITTED


@pytest.mark.parametrize(("rows", "wanted"), [(1, 1.0), (64, 1.0), (8192, 0.5)])
def test_computing_is_corrected_where_flops_take_longer_than_bytes(rows, wanted):
    sizes = GEMM | {"m": np.array([float(rows)])}
    factor = {LawKind.COMPUTE: Correction(0.5, 0.25, 1.0)}
    before, after = (
        DeviceModel(each).times(OpKind.GEMM, "bfloat16", sizes)
        for each in (MEASURED, scaled(MEASURED, factor))
    )
    assert after.seconds == pytest.approx(wanted * before.seconds, rel=0.05)
    assert after.basis is Basis.FITTED
    assert (after.low <= after.seconds).all()
    assert (after.seconds <= after.high).all()


def test_another_engine_may_be_faster_than_what_was_measured():
    """A machine's peak is what kernels there reached; a datasheet's is the most there is."""
    sizes = GEMM | {"m": np.array([8192.0])}
    own, of_card = (
        DeviceModel(scaled(each, by(gemm=0.1))).times(OpKind.GEMM, "bfloat16", sizes).seconds
        / DeviceModel(each).times(OpKind.GEMM, "bfloat16", sizes).seconds
        for each in (MEASURED, H100)
    )
    assert own == pytest.approx(0.1)
    assert of_card > 0.3


OF_NO_STEP = LawKind.SKEW, LawKind.ARRIVAL


@pytest.mark.parametrize("name", [each for each in LawKind if each not in OF_NO_STEP])
def test_every_factor_slows_some_step(name):
    profile = scaled(H100, by(**{name: 8.0}))
    layouts = ("dp=16,ep=16", "tp=8")
    steps = [
        (step_of(each, layout, execution).round_s.value)
        for layout in layouts
        for execution in (Execution.GRAPH, Execution.EAGER)
        for each in (H100, profile)
    ]
    pairs = list(zip(steps[::2], steps[1::2], strict=True))
    assert all(after >= before * (1 - 1e-9) for before, after in pairs)
    assert any(after > 1.01 * before for before, after in pairs)


@pytest.mark.parametrize(
    ("name", "driver_s", "factor", "wanted_s"),
    [
        ("scheduler", 0.0, 3.0, 6e-3),  # on a CPU 3 ms are usual
        ("scheduler", 5e-4, 3.0, 6.5e-3),
        ("scheduler", 5e-4, 0.2, 0.0),
        ("scheduler", 4e-3, 3.0, 12e-3),
        ("arrival", 0.0, 3.0, 10e-3),
        ("arrival", 0.0, 1.0, 0.0),
    ],
)
def test_a_factor_on_next_to_nothing_is_one_on_what_is_usual(name, driver_s, factor, wanted_s):
    none = replace(H100.terms["launch_s"], value=driver_s, low=driver_s, high=driver_s)
    cpu = replace(H100, terms={**H100.terms, "overhead_s": none, "driver_s": none})
    found = scaled(cpu, {LawKind(name): Correction(factor, factor / 2, factor * 2)})
    term = found.terms["driver_s" if name == "scheduler" else "admission_s"]
    assert term.value == pytest.approx(wanted_s)
    assert term.low <= term.value <= term.high
    assert term.basis is Basis.FITTED


def test_experts_priced_as_products_take_their_own_factor():
    """Wider ones than any law knows."""
    sizes = {"pairs": np.array([64.0]), "active": 2.0, "hidden": 8192.0, "inner": 16384.0}
    sizes["matrices"] = 3.0
    plain, by_gemm, by_experts = (
        DeviceModel(scaled(H100, factors)).times(OpKind.EXPERTS, "bfloat16", sizes).seconds
        for factors in ({}, by(gemm=3.0, memory=2.0), by(experts=2.0))
    )
    assert by_gemm == pytest.approx(plain)
    assert by_experts == pytest.approx(2 * plain)


def test_bounds_are_of_factor_and_law():
    correction = Correction(2.0, 1.8, 2.3)
    law = H100.surfaces["gemm.bfloat16"]
    found = scaled(H100, {LawKind.GEMM: correction}).surfaces["gemm.bfloat16"]
    assert found.low < law.low
    assert found.high > law.high
    guess = scaled(MADE_UP, {LawKind.GEMM: correction}).surfaces["gemm"]
    assert (guess.low, guess.high) == pytest.approx((0.9, 1.15))


def test_bounds_widen_outside_of_what_was_fitted():
    of_size = Correction(2.0, 1.8, 2.2, 1e-6, 1e-3)
    model = DeviceModel(scaled(MADE_UP, {LawKind.GEMM: of_size}))
    inside, outside, farther = (
        model.times(OpKind.GEMM, "bfloat16", {**GEMM, "m": np.array([m])}) for m in (1.0, 1e6, 4e6)
    )

    def width(times):
        return float((times.high / times.low)[0])

    assert not inside.is_extrapolated.any() or width(inside) >= 1
    assert outside.is_extrapolated.all()
    assert width(farther) > width(outside)


def test_terms_widen_for_more_devices():
    corrections = Corrections(ON, {"scheduler": Correction(2.0, 1.5, 2.5)})
    near, far = (corrected(ModelledCluster(H100, num), corrections).profile for num in (16, 64))

    def width(term: Term):
        return term.high / term.low

    assert near.terms["driver_s"].value == pytest.approx(2 * H100.terms["driver_s"].value)
    assert near.terms["driver_s"].basis is Basis.FITTED
    assert width(far.terms["driver_s"]) > 1.3 * width(near.terms["driver_s"])


def test_a_machine_that_was_measured_is_still_its_own():
    every = {str(each): Correction(1.1, 1.0, 1.2) for each in LawKind if each != LawKind.SKEW}
    profile = corrected(ModelledCluster(MEASURED, 16), Corrections(ON, every)).profile
    served = ServingKind(MODEL, "bfloat16")
    assert judged(profile, served) == judged(MEASURED, served)


@settings(deadline=None)
@given(
    st.dictionaries(
        st.sampled_from([str(each) for each in LawKind]),
        st.tuples(st.floats(0.2, 4), st.floats(1.01, 2), st.booleans()),
    )
)
def test_a_file_is_read_as_it_was_written(tmp_path_factory, factors):
    found = {
        name: Correction(
            float(f"{factor:.4g}"),
            float(f"{factor / wide:.4g}") if factor / wide < factor else factor,
            float(f"{factor * wide:.4g}"),
            *((1e-6, 1e-3) if has_span else (None, None)),
        )
        for name, (factor, wide, has_span) in factors.items()
    }
    corrections = Corrections(ON, found)
    path = tmp_path_factory.mktemp("file") / "corrections.toml"
    assert read_corrections(corrections.write(path)) == corrections


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("schema_version = 1", "schema_version = 2", "schema_version"),
        ("[factors.gemm]", "[factors.gems]", "factors.gems"),
        ("factor = 2.0", "factor = -2.0", "must rise"),
        ("factor = 2.0", 'factor = "2"', "factor"),
        ("low = 1.5", "low = 0", "above 0"),
        ("high = 2.5", "high = 1e9", "must rise"),
        ("num_points = 12", "num_points = 12\nwho = 1", "who"),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path, old, new, said):
    path = tmp_path / "corrections.toml"
    Corrections(ON, {"gemm": Correction(2.0, 1.5, 2.5)}).write(path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(UserError, match=said) as error:
        read_corrections(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
