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
from cli.small_checkpoint import checkpoint
from expertlane.cost.laws.profile_file import shipped_profiles
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
BENCH = ("bench", "paper-tiny", "--prompt-len", "4", "--output-len", "2")
PLAN = ("plan", "paper-tiny", "--cluster", "h100x1")
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
        ("num_sequences", "1e29", "a whole number"),
        ("num_sequences", str(10**29), "a whole number, 1 to 1,048,576"),
        ("num_micro_batches", "99999999999", "a whole number, 1 to 1,024"),
        ("rebalance_steps", str(10**23), "a whole number, 0 to 1,000,000,000"),
        ("seed", "-1", "a whole number, 0 to 2**64 - 1"),
        ("prompt_len", "9" * 4000, "a whole number, 1 to 16,777,216"),
    ],
)
@pytest.mark.parametrize("options", [(), ("--project",)])
def test_an_experiment_s_number(refused, key, value, valid, options):
    lines = EXPERIMENT.splitlines()
    lines[[line.partition(" ")[0] for line in lines].index(key)] = f"{key} = {value}"
    Path("mine.toml").write_text("\n".join(lines))
    line = refused("compare", "mine.toml", *options)
    assert f"{key} is " in line
    assert line.endswith(f"; it must be {valid}")


def test_a_projection_of_more_sequences_than_there_can_be(refused):
    Path("mine.toml").write_text(EXPERIMENT.replace("= 4", "= 9000000000000000000", 1))
    line = refused("compare", "mine.toml", "--project")
    assert line.endswith("is 9000000000000000000; it must be a whole number, 1 to 1,048,576")


def test_more_tokens_than_memory_could_hold(refused):
    text = EXPERIMENT.replace('"paper-tiny"', '"paper"').replace("= 4", "= 1000000", 1)
    Path("mine.toml").write_text(text.replace("prompt_len = 8", "prompt_len = 16000"))
    line = refused("compare", "mine.toml", "--project")
    assert "are 16,003,000,000 in all; a run holds at most 268,435,456" in line


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000; it must be a whole"),
        (
            {"num_local_experts": 10**12},
            "num_local_experts is 1000000000000; it must be a whole number, 1",
        ),
        ({"rope_theta": 10**400}, "a number has 401 digits; valid: at most 40"),
        ({"rope_theta": 10**38}, "rope_theta is 1" + "0" * 38 + "; it must be a number above 1"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf; it must be a number above 0, at"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; it must be a number above 0, at"),
        ({"vocab_size": 10**39}, "vocab_size is a number of about 40 digits; it must be a whole"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": 0}},
            "beta_fast is 0; it must be a number above 0, at most 1,000,000",
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
            "rope_scaling: low_freq_factor is 4; it must be under high_freq_factor, 4",
        ),
        (
            {"hidden_size": 2**16, "intermediate_size": 2**24, "num_local_experts": 4096},
            "parameters; valid: 100,000,000,000,000 at most",
        ),
    ],
)
def test_a_configuration_s_number(refused, changes, line):
    checkpoint(Path("model"), **changes)
    assert line in refused("generate", "model", "--token-ids", "1")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((*BENCH, "--rate", "1e-300"), "--rate is '1e-300'; it must be a number, 0.001 to"),
        ((*BENCH, "--num-requests", str(10**15)), "--num-requests is 1000000000000000; it must"),
        ((*BENCH, "--batch", str(10**15)), "--batch is '1000000000000000'; it must be a whole"),
        ((*BENCH, "--seed", str(2**64)), "--seed is 18446744073709551616; it must be a whole"),
        ((*BENCH, "--timeout-s", "1e300"), "--timeout-s is 1e+300; it must be a number above 0"),
        ((*BENCH, "--block-size", str(10**9)), "--block-size is 1000000000; it must be a whole"),
        ((*PLAN, "--slo", "tpot.mean=1s,tpot.mean=2s"), "--slo: tpot.mean is given twice"),
        ((*PLAN, "--slo", f"tpot.mean={'9' * 400}s"), "the limit must be a number above 0, at"),
        ((*PLAN, "--batch", "9999999"), "--batch is '9999999'; for plan it must be a whole"),
        ((*BENCH, "--price", "1e300"), "--price is 1e+300; it must be a number above 0, at most"),
        ((*SIMULATE, "h100x9999999"), "cluster 'h100x9999999' is not PROFILExCOUNT"),
        (
            ("compare", "--experts-per-token", "9" * 5000),
            "it must be a whole number, 1 to 4,096, or several",
        ),
        (("compare", "--tok-p"), "(try: "),
    ],
)
def test_an_option_s_number(refused, arguments, line):
    assert line in refused(*arguments)


RESULTS = to_json(example_results.results([(example_results.SMALL, 0.2)]))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            RESULTS.replace('"rank": 0', f'"rank": {"9" * 5000}'),
            "a number has 5,000 digits; valid: at most 40",
        ),
        ('{"kind": 1e999}', "the number 1e999 is too large"),
        ('{"kind": "a", "kind": "b"}', "the key 'kind' is given twice"),
        ('{"a": ' * 5000, "nested too deeply; valid: 100 levels at most"),
        ("", "is not JSON: Expecting value at line 1, column 1"),
    ],
)
def test_results(refused, text, line):
    Path("results.json").write_text(text)
    assert line in refused("report", "results.json")


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("ranks_per_node", "9" * 5000, "malformed TOML: Exceeds the limit"),
        (
            "ranks_per_node",
            "1" + "0" * 399,
            "ranks_per_node is a number of about 400 digits; it must be",
        ),
        (
            "memory_bytes",
            "1" + "0" * 399,
            "device.memory_bytes is inf; it must be a number, 1 to 1e+18",
        ),
        ("memory_bytes", "inf", "device.memory_bytes is inf; it must be a number, 1 to 1e+18"),
    ],
)
def test_a_profile_s_number(refused, key, value, line):
    text = shipped_profiles()["h100"].read_text()
    changed = re.sub(rf"^{key} = .*", f"{key} = {value}", text, count=1, flags=re.MULTILINE)
    assert changed != text
    Path("mine.toml").write_text(changed)
    assert line in refused(*SIMULATE, "mine.tomlx1", "--prompt-len", "8", "--output-len", "4")


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
    assert "there is no config.json" in refused("generate", "model", "--token-ids", "1")
    os.unlink("model/config.json")
    checkpoint(Path("other"))
    os.mkfifo("other/generation_config.json")
    line = refused("generate", "other", "--token-ids", "1")
    assert line == "cannot read other/generation_config.json: it is not a regular file"


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
    assert line.endswith(" bytes when unpacked; at most 4,194,304 are read")


@pytest.mark.parametrize("give", ["file", "pipe"])
def test_prompts_may_come_through_a_pipe(comparison, run, give):
    reader, writer = os.pipe()
    os.write(writer, b"Hello\n")
    os.close(writer)
    Path("prompts").write_text("\ufeffHello\n", encoding="utf-8")
    name = "prompts" if give == "file" else f"/dev/fd/{reader}"
    code, out, err = run("generate", "paper-tiny", "--file", name)
    os.close(reader)
    line = "expertlane: error: paper-tiny has no tokenizer; give prompts with --token-ids\n"
    assert (code, out, err) == (2, "", line)  # so it was read


def test_prompts_without_an_end(refused, monkeypatch):
    monkeypatch.setattr("expertlane.cli.generate.PROMPTS_BYTES", 1000)
    line = refused("generate", "paper-tiny", "--file", "/dev/zero")
    assert line == "/dev/zero: more than 1,000 bytes are not read of such a file"
