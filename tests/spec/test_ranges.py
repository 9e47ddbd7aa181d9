import dataclasses
import typing

import numpy as np
import pytest

from cli.screen import telling
from expertlane.cli.options import EngineOptions, LaunchOptions, SchedulerOptions
from expertlane.errors import SpecError, UserError
from expertlane.schedule.request import Limits
from expertlane.spec.deployment import Options
from expertlane.spec.experiment import Cluster, Experiment
from expertlane.spec.layout import Layout
from expertlane.spec.mixers import LatentAttention, RopeScaling
from expertlane.spec.model import PRESETS, ModelConfig, Routing
from expertlane.spec.ranges import RANGES, shown, take, take_fields, take_option
from expertlane.spec.sampling import SamplingParams
from expertlane.spec.workload import LengthRange, Load, Workload

READ = (
    Cluster,
    EngineOptions,
    Experiment,
    LatentAttention,
    Layout,
    Limits,
    Load,
    ModelConfig,
    Options,
    LaunchOptions,
    RopeScaling,
    Routing,
    SamplingParams,
    SchedulerOptions,
    Workload,
)


PAIRS = {"logit_bias"}  # by the ranges of `stop_token_ids` and `bias`


def _is_number(kind: object) -> bool:
    kinds = typing.get_args(kind) or (kind,)
    return any(each in (int, float) or _is_tuple_of_numbers(each) for each in kinds)


def _is_tuple_of_numbers(kind: object) -> bool:
    return typing.get_origin(kind) is tuple and int in typing.get_args(kind)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (kind, field.name)
        for kind in READ
        for field in dataclasses.fields(kind)
        if _is_number(field.type) and field.name not in PAIRS
    ],
)
def test_every_number_that_is_read_has_a_range(kind, name):
    assert name in RANGES


@pytest.mark.parametrize(("name", "allowed"), RANGES.items())
def test_ends_are_valid_and_what_is_beyond_is_not(name, allowed):
    assert take(name, allowed.high) == allowed.high
    assert np.isfinite([allowed.low, allowed.high]).all()
    if not allowed.is_above:
        assert take(name, allowed.low) == allowed.low
    if allowed.is_whole:
        beyond = [allowed.low - 1, allowed.high + 1]
    else:
        low, high = float(allowed.low), float(allowed.high)
        beyond = [low if allowed.is_above else np.nextafter(low, -1e99), np.nextafter(high, 1e99)]
    for value in [*beyond, float("nan"), float("inf"), 10**400, True, None, "1"]:
        with pytest.raises(SpecError, match=telling(f"{name} {shown(value)} {allowed}")):
            take(name, value)


@pytest.mark.parametrize(
    ("name", "text", "number"),
    [
        ("tp", " 8 ", 8),
        ("tp", "0", None),
        ("tp", "1000001", None),
        ("tp", "²", None),
        ("tp", "8.0", None),
        ("tp", "9" * 5000, None),
        ("rate", "2.5", 2.5),
        ("rate", "1e-300", None),
        ("rate", "nan", None),
        ("rate", "fast", None),
    ],
)
def test_texts(name, text, number):
    assert RANGES[name].parse(text) == number


def test_numbers_of_numpy_are_put_into_one_form():
    workload = Workload(np.int64(2), 3, 4)
    assert type(workload.num_sequences) is int
    params = SamplingParams(temperature=np.float32(0.5))
    assert type(params.temperature) is float


def test_an_option_is_named_as_a_user_gives_it():
    with pytest.raises(SpecError, match=telling("--price -1 0")):
        take_option("--price", -1)
    assert take_option("--price", None) is None


def test_none_is_valid_where_the_type_says_so():
    take_fields(PRESETS["paper-tiny"])
    with pytest.raises(SpecError, match=telling("hidden_size None 1")):
        PRESETS["paper-tiny"].with_overrides(name="x", hidden_size=None)


@pytest.mark.parametrize("lengths", [LengthRange(0, 1), LengthRange(1, 2**25), LengthRange(3, 2)])
def test_lengths_of_a_load(lengths):
    with pytest.raises(UserError, match=r"whole number|the first end must be the lower one"):
        Load(1, lengths, LengthRange(1, 1), batch=1)


def test_a_load_that_memory_could_not_hold():
    with pytest.raises(UserError, match=telling("16,777,216,000,000 run")):
        Load(10**6, LengthRange(1, 2**24 - 1), LengthRange(1, 1), batch=1)
