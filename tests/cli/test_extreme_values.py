"""Numbers and files that no run could take: one line and exit 2, soon, and before a rank starts."""

import io
import json
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import example_results
from cli.screen import one_line, tells
from cli.small_checkpoint import checkpoint
from expertlane.cost.laws import shipped_profiles
from expertlane.results.file import to_json

EXPERIMENT = """\
name = "mine"
seed = 0
[model]
preset = "paper-tiny"
[workload]
num_sequences = 4
prompt_len = 8
output_len = 3
[[deployments]]
name = "one"
layout = "dp=2,ep=2"
num_micro_batches = 1
rebalance_steps = 0
"""
SIMULATE = ("simulate", "paper-tiny", "--layout", "tp=1", "--cluster")

Refused = Callable[..., str]


@pytest.fixture
def refused(comparison, run) -> Refused:
    """Run a command in an empty folder; gives the line with which it refuses."""

    def refused_with(*arguments: str) -> str:
        before = sorted(os.listdir())
        code, out, err = run(*arguments)
        assert (code, out) == (2, ""), err
        (line,) = err.splitlines()
        assert not comparison.pools
        assert sorted(os.listdir()) == before
        return line.removeprefix("expertlane: error: ")

    return refused_with


@pytest.mark.parametrize(
    ("key", "value", "valid"),
    [
        ("num_sequences", "1e29", "whole"),
        ("num_sequences", str(10**29), "1 1,048,576"),
        ("num_micro_batches", "99999999999", "1 1,024"),
        ("rebalance_steps", str(10**23), "0 1,000,000,000"),
        ("seed", "-1", "0 2**64 1"),
        ("prompt_len", "9" * 4000, "1 16,777,216"),
    ],
)
@pytest.mark.parametrize("options", [(), ("--project",)])
def test_an_experiment_s_number(refused, key, value, valid, options):
    lines = EXPERIMENT.splitlines()
    lines[[line.partition(" ")[0] for line in lines].index(key)] = f"{key} = {value}"
    Path("mine.toml").write_text("\n".join(lines))
    line = refused("compare", "mine.toml", *options)
    assert f"{key} is " in line
    assert tells(line, valid)


def test_more_tokens_than_memory_could_hold(refused):
    text = EXPERIMENT.replace('"paper-tiny"', '"paper"').replace("= 4", "= 1000000", 1)
    Path("mine.toml").write_text(text.replace("prompt_len = 8", "prompt_len = 16000"))
    line = refused("compare", "mine.toml", "--project")
    assert tells(line, "16,003,000,000 268,435,456")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"num_hidden_layers": 10**12}, "num_hidden_layers 1000000000000"),
        ({"num_local_experts": 10**12}, "num_local_experts 1000000000000 1"),
        ({"rope_theta": 10**400}, "401 digits 40"),
        ({"rope_theta": 10**38}, "rope_theta 1" + "0" * 38),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps inf 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps nan 0"),
        ({"vocab_size": 10**39}, "vocab_size 40 digits"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": 0}},
            "beta_fast 0 1,000,000",
        ),
        (
            {
                "rope_scaling": {
                    "type": "llama3",
                    "factor": 4.0,
                    "low_freq_factor": 4.0,
                    "high_freq_factor": 4.0,
                }
            },
            "rope_scaling low_freq_factor 4 high_freq_factor",
        ),
        (
            {"hidden_size": 2**16, "intermediate_size": 2**24, "num_local_experts": 4096},
            "100,000,000,000,000",
        ),
    ],
)
def test_a_configuration_s_number(refused, changes, line):
    checkpoint(Path("model"), **changes)
    assert tells(refused("generate", "model", "--token-ids", "1"), line)


RESULTS = to_json(example_results.results([(example_results.SMALL, 0.2)]))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (RESULTS.replace('"rank": 0', f'"rank": {"9" * 5000}'), "5,000 digits 40"),
        ('{"kind": 1e999}', "1e999"),
        ('{"kind": "a", "kind": "b"}', "kind twice"),
        ('{"a": ' * 5000, "nested 100"),
        ("", "JSON 1"),
    ],
)
def test_results(refused, text, line):
    Path("results.json").write_text(text)
    assert tells(refused("report", "results.json"), line)


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("ranks_per_node", "9" * 5000, "TOML"),
        ("ranks_per_node", "1" + "0" * 399, "ranks_per_node 400 digits"),
        ("memory_bytes", "1" + "0" * 399, "device.memory_bytes inf 1 1e+18"),
        ("memory_bytes", "inf", "device.memory_bytes inf 1 1e+18"),
    ],
)
def test_a_profile_s_number(refused, key, value, line):
    text = shipped_profiles()["h100"].read_text()
    changed = re.sub(rf"^{key} = .*", f"{key} = {value}", text, count=1, flags=re.MULTILINE)
    assert changed != text
    Path("mine.toml").write_text(changed)
    assert tells(refused(*SIMULATE, "mine.tomlx1", "--prompt-len", "8", "--output-len", "4"), line)


FILES = {
    "/dev/zero": "it is not a regular file",
    "./fifo.toml": "it is not a regular file",
    "./folder.toml": "it is a folder; give a file",
    "./none.toml": "No such file or directory",
    "./a\nb.toml": "No such file or directory",
}


@pytest.mark.parametrize(("path", "what"), FILES.items())
def test_what_is_no_regular_file(refused, path, what):
    os.mkfifo("fifo.toml")
    Path("folder.toml").mkdir()
    line = f"cannot read {' '.join(path.removeprefix('./').split())}: {what}"
    assert refused("compare", path) == line
    Path("mine.toml").write_text(f"{EXPERIMENT}placement_file = {json.dumps(path)}\n")
    assert refused("compare", "mine.toml").replace(f"{Path.cwd()}/", "").endswith(line)
    if path.endswith(".toml") and "\n" not in path:
        assert refused(*SIMULATE, f"{path}x1") == line
    if what != FILES["./folder.toml"]:  # of a folder, the results in it
        assert refused("report", path) == line
    assert refused("balance", path, "--ep", "2") == line


def test_a_configuration_that_is_no_regular_file(refused):
    Path("model").mkdir()
    os.mkfifo("model/config.json")
    assert tells(refused("generate", "model", "--token-ids", "1"), "config.json")
    os.unlink("model/config.json")
    checkpoint(Path("other"))
    os.mkfifo("other/generation_config.json")
    line = refused("generate", "other", "--token-ids", "1")
    assert tells(line, "other/generation_config.json regular")


def bomb(claimed: int, written: int) -> bytes:
    """A trace whose `step` claims one number of values and holds another."""
    arrays = {
        "schema_version": np.array(1),
        "model": np.array("m"),
        "num_experts": np.array(4),
        "layers": np.arange(1),
        "topk_ids": np.zeros((1, 1, 1), dtype=np.int16),
        "step": np.zeros(1, dtype=np.int64),
    }
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array)
                if name == "step":
                    zeros = bytes(2**24)
                    for _ in range(written // len(zeros)):
                        member.write(zeros)
    return file.getvalue().replace(b"'shape': (1,), }" + b" " * 12, _shape(claimed))


def _shape(claimed: int) -> bytes:
    return f"'shape': ({claimed},), }}".encode().ljust(28)


def test_a_trace_that_unpacks_to_more_than_is_read(refused, monkeypatch):
    monkeypatch.setattr("expertlane.balance.trace.TRACE_BYTES", 2**22)
    Path("trace.npz").write_bytes(bomb(1, 2**24))
    line = refused("balance", "trace.npz", "--ep", "2")
    assert tells(line, "bytes 4,194,304")


@pytest.mark.parametrize("give", ["file", "pipe"])
def test_prompts_may_come_through_a_pipe(comparison, run, give):
    reader, writer = os.pipe()
    os.write(writer, b"Hello\n")
    os.close(writer)
    Path("prompts").write_text("\ufeffHello\n", encoding="utf-8")
    name = "prompts" if give == "file" else f"/dev/fd/{reader}"
    code, out, err = run("generate", "paper-tiny", "--file", name)
    os.close(reader)
    assert (code, out) == (2, "")
    assert one_line(err, "paper-tiny tokenizer --token-ids")  # so it was read


def test_prompts_without_an_end(refused, monkeypatch):
    monkeypatch.setattr("expertlane.cli.generate.PROMPTS_BYTES", 1000)
    line = refused("generate", "paper-tiny", "--file", "/dev/zero")
    assert tells(line, "/dev/zero 1,000 bytes")
