"""Nothing that lies in the working directory is run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

NAMES = ("select", "ctypes", "random", "json", "socket", "typing_extensions", "numpy", "torch")
EXPERTLANE = str(Path(sys.executable).with_name("expertlane"))
TORCHRUN = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone"]
EXPERIMENT = """
name = "one"
[model]
preset = "paper-tiny"
[workload]
num_sequences = 2
prompt_len = 3
output_len = 2
[[deployments]]
name = "one"
layout = "dp=1"
"""

pytestmark = pytest.mark.starts_anew


@pytest.mark.full
@pytest.mark.parametrize(
    "command",
    [
        [EXPERTLANE],
        [sys.executable, "-m", "expertlane"],
        [*TORCHRUN, "--no-python", EXPERTLANE],
    ],
    ids=["script", "module", "torchrun"],
)
def test_files_named_like_modules(tmp_path, command):
    for name in NAMES:
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'a')\nboom\n")
    (tmp_path / "one.toml").write_text(EXPERIMENT)
    finished = subprocess.run(
        [*command, "compare", "one.toml", "--repeat", "1", "--out", "out"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        env={key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"},
    )
    assert not (tmp_path / "was_run").exists(), finished.stderr
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "out" / "results.json").exists()


def test_other_processes_look_for_modules_where_this_one_does(tmp_path, monkeypatch):
    """A program may have put folders first on its path."""
    from expertlane.engine.ranks.fork_server import python_command

    (tmp_path / "probe.py").write_text("import sys\ndef main():\n    print(sys.path, sys.argv[1:])")
    strange = str(tmp_path / "no\udcff folder 'here'")
    monkeypatch.setattr(sys, "path", [str(tmp_path), strange, *sys.path])
    finished = subprocess.run(
        python_command("probe", ["a b"]), capture_output=True, text=True, check=True, timeout=60
    )
    assert finished.stdout == f"{sys.path} ['a b']\n"
