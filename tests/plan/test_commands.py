"""The command lines of other systems, and what they say of weights."""

import pytest

from expertlane.cost.number_types import NumberTypes
from expertlane.plan.candidates import Candidate
from expertlane.plan.commands import ServeTarget, serve_commands
from expertlane.spec.deployment import Options
from expertlane.spec.hf_config import Quantization
from expertlane.spec.layout import Layout

FP8, MXFP4 = Quantization("fp8", "float8"), Quantization("mxfp4", "mxfp4")


@pytest.mark.parametrize(
    ("weights", "stored", "words", "note"),
    [
        ("bfloat16", None, "--dtype bfloat16", ""),
        ("float8", None, "--quantization fp8", ""),
        ("float8", FP8, "", ""),
        ("bfloat16", FP8, "--dtype bfloat16", "it serves the stored fp8 weights, not bfloat16"),
        ("bfloat16", MXFP4, "--dtype bfloat16", "it serves the stored mxfp4 weights, not bfloat16"),
        ("float8", MXFP4, "", "it serves the stored mxfp4 weights, not float8"),
        ("mxfp4", MXFP4, "", ""),
        ("nvfp4", None, "", "it needs a checkpoint quantised to nvfp4"),
    ],
)
def test_types_of_weights(weights, stored, words, note):
    candidate = Candidate(Layout(tp=4), Options())
    types = NumberTypes.asked(weights)
    for each in serve_commands(candidate, ServeTarget("/there/mine", stored), types, 100, 1):
        assert "/there/mine" in each.command
        assert words in each.command
        assert ("--dtype" in each.command) == ("--dtype" in words)
        assert ("--quantization" in each.command) == ("--quantization" in words)
        assert each.note == note
