"""Damaged and unfitting files: one line, exit code 2, and no rank was started."""

import json
from pathlib import Path

import numpy as np
import pytest

from cli.screen import refused
from expertlane.balance.placement import Placement
from expertlane.balance.placement_file import ModelPlacement, write_placement
from expertlane.balance.trace import RoutingTrace, write_trace

EXPERIMENT = """\
name = "mine"
[model]
preset = "paper-tiny"
[workload]
num_sequences = 4
prompt_len = 8
output_len = 3
[[deployments]]
name = "one"
layout = "dp=2,ep=2"
placement_file = "FILE"
"""


@pytest.fixture(autouse=True)
def _files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    ids = np.array([[[0, 1], [2, 3]]], dtype=np.int16)
    trace = RoutingTrace("a/model", 4, (0,), ids, np.zeros(2, dtype=np.int64))
    write_trace(trace, Path("trace.npz"))
    write_placement(
        ModelPlacement("a/model", 4, {0: Placement.linear(4, 2)}), Path("placement.json")
    )


def changed_placement(**changes: object) -> None:
    placement = json.loads(Path("placement.json").read_text()) | changes
    Path("placement.json").write_text(json.dumps(placement))


def test_an_encrypted_trace(run):
    damaged = bytearray(Path("trace.npz").read_bytes())
    damaged[damaged.index(b"PK\x01\x02") + 8] ^= 1
    Path("trace.npz").write_bytes(damaged)
    assert refused(run("balance", "trace.npz", "--ep", "2"), "trace.npz damaged")


@pytest.mark.parametrize("output", [[], ["--json"], ["--out", "new"]])
def test_a_trace_with_an_unprintable_name(run, output):
    with np.load("trace.npz") as arrays:
        np.savez("trace.npz", **{**arrays, "model": np.array("\ud800")})
    answer = run("balance", "trace.npz", "--ep", "2", *output)
    assert refused(answer, r"trace.npz model \ud800")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"num_experts": 10**9},
            "placement.json num_experts 1000000000 1 4,096",
        ),
        (
            {"schema_version": True},
            "placement.json schema_version True reads 1",
        ),
    ],
)
@pytest.mark.parametrize(
    "command",
    [
        ("balance", "trace.npz", "--ep", "2", "--placement"),
        ("generate", "paper-tiny", "--token-ids", "1", "--layout", "dp=2,ep=2", "--placement"),
    ],
)
def test_a_placement_that_is_none(run, command, changes, line):
    changed_placement(**changes)
    assert refused(run(*command, "placement.json"), line)


def test_a_placement_with_a_number_of_too_many_digits(run):
    text = Path("placement.json").read_text()
    Path("placement.json").write_text(text.replace('"ep": 2', f'"ep": {"2" * 5000}'))
    arguments = ("balance", "trace.npz", "--ep", "2", "--placement", "placement.json")
    assert refused(run(*arguments), "placement.json 5,000 digits 40")


@pytest.mark.parametrize("value", ["", "a\\u0000b"])
def test_an_experiment_whose_placement_file_is_no_path(run, comparison, value):
    Path("mine.toml").write_text(EXPERIMENT.replace("FILE", value))
    words = f"mine.toml [[deployments]] 1 placement_file {value}"
    assert refused(run("compare", "mine.toml"), words)
    assert not comparison.pools


def test_nothing_to_rebalance(run):
    arguments = ("generate", "paper-tiny", "--token-ids", "1", "--layout", "tp=2")
    answer = run(*arguments, "--rebalance-steps", "4")
    assert refused(answer, "rebalance_steps 4 tp=2 ep=1 0 ep=2")
