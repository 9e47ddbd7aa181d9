"""Settings of an engine: declared once, checked once, and taken by name."""

import inspect
from dataclasses import fields

import pytest

from cli.screen import telling
from expertlane.engine.llm import LLM
from expertlane.errors import SpecError
from expertlane.spec.deployment import Options
from expertlane.spec.engine_config import EngineConfig, sentence_of
from expertlane.spec.layout import Layout

NAMES = [each.name for each in fields(EngineConfig)]


def test_settings_by_name_take_the_place_of_those_of_a_configuration():
    config = EngineConfig(layout=Layout(tp=2), seed=3)
    found = EngineConfig.of(config, layout="dp=2,ep=2", options=None, check="full")
    assert found == EngineConfig(layout=Layout(dp=2, ep=2), seed=3, check="full")
    assert found.deployment.layout == Layout(dp=2, ep=2)
    assert found.deployment.options == Options()
    assert EngineConfig.of() == EngineConfig()
    assert EngineConfig.of(config) == config


def test_a_setting_that_there_is_not_is_a_type_error_with_the_nearest():
    with pytest.raises(TypeError, match=telling("num_block no setting num_blocks")):
        EngineConfig.of(num_block=3)
    with pytest.raises(TypeError, match=r"'zzz' is no setting of an engine$"):
        EngineConfig.of(zzz=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "int8"}, "dtype int8 float32"),
        ({"dtype": "half"}, "dtype half float32 did you mean float16?"),
        ({"cpu_isa": "sse"}, "cpu_isa sse avx2"),
        ({"on_failure": "pray"}, "on_failure pray stop"),
        ({"check": None}, "check None off"),
        ({"oversubscribe": 1}, "oversubscribe 1 true false"),
        ({"rejoin_s": -1.0}, "rejoin_s -1.0"),
        ({"max_num_seqs": 0}, "max_num_seqs 0"),
        ({"layout": 2}, "layout 2 text"),
        ({"options": "fast"}, "options fast Options(…)"),
    ],
)
def test_every_value_is_checked(settings, message):
    with pytest.raises(SpecError, match=telling(message)):
        EngineConfig.of(**settings)


def test_every_setting_has_a_sentence_which_the_documentation_shows():
    for name in NAMES:
        assert sentence_of(name).endswith(".")
        assert f"{name}: {sentence_of(name)}" in EngineConfig.__doc__
    assert list(inspect.signature(LLM).parameters) == ["model", "config", *NAMES]
