"""Ranks that torchrun started: the same command, the same tokens."""

import json
import os
import subprocess
import sys

import pytest

EXPERIMENT = """
name = "four"
[model]
preset = "paper-tiny"
[workload]
num_sequences = 9
prompt_len = 5
output_len = 3
[[deployments]]
name = "TP 2 × PP 2"
layout = "tp=2,pp=2"
num_micro_batches = 2
micro_batch_schedule = "rotating"
[[deployments]]
name = "EP 4 + overlap"
layout = "dp=4,ep=4"
overlap = true
"""
COMMAND = ["-m", "expertlane", "compare", "four.toml", "--json", "--out"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def run(folder, *arguments):
    """Run Python in `folder`; gives exit code, stdout and stderr."""
    (folder / "four.toml").write_text(EXPERIMENT)
    finished = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # torchrun warns where it is not set
    )
    return finished.returncode, finished.stdout, finished.stderr


@pytest.fixture(scope="module")
def under_torchrun(tmp_path_factory):
    folder = tmp_path_factory.mktemp("torchrun")
    return folder, *run(folder, *TORCHRUN, "4", *COMMAND, "out")


def test_it_ends_well_and_one_rank_speaks(under_torchrun):
    folder, code, out, err = under_torchrun
    assert code == 0, err
    assert json.loads(out)["machine"]["num_ranks"] == 4
    assert err.count("written: ") == 1
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["report.md", "results.json"]


def test_tokens_and_counters_are_those_of_local_ranks(under_torchrun, tmp_path):
    _, _, out, _ = under_torchrun
    code, local_out, err = run(tmp_path, *COMMAND, "out")
    assert code == 0, err
    theirs, ours = json.loads(out)["deployments"], json.loads(local_out)["deployments"]
    assert len(theirs) == len(ours) == 2
    for one, other in zip(theirs, ours, strict=True):
        for key in ("name", "tokens_sha256", "expert_load", "traffic_bytes"):
            assert one[key] == other[key]
        for key in ("flops", "weight_bytes", "kv_bytes", "num_collectives"):
            assert one["decode"][key] == other["decode"][key]
    assert theirs[0]["tokens_sha256"] == theirs[1]["tokens_sha256"]


def test_too_few_ranks(tmp_path):
    _, out, err = run(tmp_path, *TORCHRUN, "2", *COMMAND, "out")
    errors = [line for line in err.splitlines() if "expertlane: error:" in line]
    assert errors == [
        "expertlane: error: the experiment needs 4 ranks but torchrun started 2; start it with 4 "
        "processes in all"
    ]
    assert out == ""
    assert not (tmp_path / "out").exists()
