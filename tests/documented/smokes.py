"""Arguments with which each documented script runs at a small size, or the test that runs it.

In arguments, `{…}` stands for a file of `Stage`: a checkpoint, results, a profile, public rows.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from string import Formatter

from chromium import CHROMIUM
from documented.commands import ROOT

LIMIT_S = 1500.0  # of a command; machines may be busy
ROWS = (
    "hardware,framework,precision,spec_method,disagg,is_multinode,prefill_tp,prefill_ep,"
    "prefill_dp_attention,prefill_num_workers,decode_tp,decode_ep,decode_dp_attention,"
    "decode_num_workers,num_prefill_gpu,num_decode_gpu,isl,osl,conc,date,median_ttft,p99_ttft,"
    "median_tpot,p99_tpot,median_itl,median_e2el,tput_per_gpu,input_tput_per_gpu,"
    "output_tput_per_gpu",
    *(
        f"h200,trt,fp8,none,False,False,8,{ep},False,0,8,{ep},False,0,8,8,1024,1024,{conc},"
        f"2026-01-0{day},0.1,1,0.02,1,0.2,20,9,4,{4 + day}"
        for day, (ep, conc) in enumerate([(8, 4), (1, 4), (8, 8), (1, 8), (8, 16), (1, 16)], 1)
    ),
)

SERVED = (
    "id,silicon_data_source,backend,backend_version,model_path,system,precision,mode,isl,osl,gemm_quant_mode,"
    "moe_quant_mode,prefill_batch_size,silicon_ttft_ms,silicon_tpot_ms,split_family,"
    "split_concurrency,split_layout",
    "1,measured=2026-01-02,trtllm,,deepseek-ai/DeepSeek-V3,h200_sxm,fp8,agg,1024,1024,fp8,fp8,,100,20,DeepSeek-R1,8,"
    '"tp=8,dp=1,ep=8"',
)


def _no_tables() -> str | None:
    if find_spec("aiconfigurator_core") is None:
        return "aiconfigurator-core is not installed: pip install 'expertlane[calibration]'"
    return None


def _no_chromium() -> str | None:
    return None if CHROMIUM else "no Chromium on this machine: install Debian's chromium"


def _no_vllm() -> str | None:
    return None if find_spec("vllm") else "vLLM is not installed"


_MEASURED = "benchmarks/results"


@dataclass(frozen=True)
class Smoke:
    """A run of a script that takes seconds.

    Attributes:
        arguments: as a shell takes them.
        shows: what its output matches.
        needs: gives the reason why it cannot run here, else None.
        beside: copied into the folder with its neighbours first, since it writes beside itself.
        computes: runs torch before it starts ranks, which a fork of it could not then.
    """

    arguments: str
    shows: str
    needs: Callable[[], str | None] = lambda: None
    beside: bool = False
    computes: bool = False


SMOKES: Mapping[str, Smoke] = {
    "benchmarks/bench_cuda.py": Smoke("--tiny", r"norm, 3 rows: 1536 bytes"),
    "benchmarks/bench_engine.py": Smoke(
        "--checkpoint qwen3 --rounds 1 --retries 0 --max-wait 0 --folder . --points decode-1 "
        "--contenders ours:tp=1 transformers:eager",
        r"goal reached at \d of 1 points",
    ),
    "benchmarks/bench_one_rank.py": Smoke("--rehearse", r"projected by h100: \d"),
    "benchmarks/bench_plan.py": Smoke("--devices 8", r"candidates screened"),
    "benchmarks/bench_projection.py": Smoke(
        "--ranks 1 --hidden 64 --layers 1 --experts 2 --rounds 1 --profile {profile}",
        r"both: median error",
    ),
    "benchmarks/bench_recovery.py": Smoke("dp=2,ep=2 --runs 1", r'"benchmark": "recovery"'),
    "benchmarks/bench_serve.py": Smoke(
        "--streams 1 --rounds 1 --prompt-len 4 --output-len 4 --requests-per-stream 1 "
        "--max-wait 0 --folder .",
        r'"benchmark": "serve"',
    ),
    "calibration/fit.py": Smoke("h200 --output .", r"", _no_tables),
    "calibration/judge_published.py": Smoke("", r"\| decode EP72", _no_tables),
    "calibration/judge_mixers.py": Smoke("h100", r"\| h100 \| generation \| glm-5", _no_tables),
    "calibration/beside.py": Smoke("{served} {rows} --jobs 1", r"\| all \| 1 \|", _no_tables),
    "calibration/judge_corrections.py": Smoke("{rows}", r"^0 configurations were measured at 5"),
    "calibration/judge_serving.py": Smoke("{rows} --jobs 1", r"\| all \| 3 \| 3 \|"),
    "calibration/popularity.py": Smoke("mixtral", r"^mixtral: 0\.17$"),
    "docs/pictures/live.py": Smoke("6", r"", _no_chromium, beside=True),
    "docs/pictures/recovery.py": Smoke(
        f"{{root}}/{_MEASURED}/2026-11-26-bench_recovery.json", r"", beside=True
    ),
    "docs/pictures/report.py": Smoke("{results} {results}", r"", _no_chromium, beside=True),
    "tests/faults/runs.py": Smoke("runs.jsonl --to 1", r"\| moment \| cases \| wrong"),
    "tests/golden/golden.py": Smoke("check balance", r"balance: "),
    "tests/planner/serving_options.py": Smoke("take vllm", r"takes 0 commands", _no_vllm),
    "tests/server/journal_kills.py": Smoke("--kills 1", r"none lost"),
    "tests/server/soak.py": Smoke("--requests 4 --layouts dp=2,ep=2", r"4 of 4 requests"),
    "tests/endpoint/drawn_cases.py": Smoke(
        "--wrong 1 --right 0 --out cases.jsonl", r"above the noise: 1 of 1", computes=True
    ),
    "tests/endpoint/sparse.py": Smoke("folder 64 32 2 4", r'"added": \d+'),
}

# Scripts that tests of their own run.
COVERED: Mapping[str, str] = {
    "benchmarks/compile_cuda.py": "tests/engine/ops/cuda/test_compile.py",
    "benchmarks/gpu.py": "tests/gpu/test_script.py",
    "docs/notebook.py": "tests/test_notebook.py",
    "docs/option_table.py": "tests/test_docs.py",
    "docs/family_table.py": "tests/test_docs.py",
    "docs/pictures/deployments.py": "tests/test_docs.py",
    "docs/printed.py": "tests/test_docs.py",
    "experiments/paper/likeness.py": "tests/comparison/test_likeness.py",
    "experiments/paper/study.py": "tests/report/test_study.py",
    "experiments/paper/what_it_takes.py": "tests/report/test_what_it_takes.py",
    "tests/api_stub.py": "tests/test_api.py",
    "tests/distributed/cut_nodes.py": "tests/distributed/test_cut_nodes.py",
    "tests/vllm_environment.py": "tests/test_vllm_environment.py",
}

# Scripts that others start, and those others.
PARTS: Mapping[str, str] = {
    "benchmarks/engine_peers/make_checkpoint.py": "benchmarks/bench_engine.py",
    "benchmarks/engine_peers/measure_machine.py": "benchmarks/bench_engine.py",
    "benchmarks/engine_peers/child.py": "benchmarks/bench_engine.py",
}

# Pages whose commands tests run as written, and options that are added so that they take seconds.
FIRST_PAGES = {"README.md", "docs/getting_started.md", "docs/index.md"}
MORE: Mapping[str, str] = {
    "bench --url http://127.0.0.1:8000 --rate 2,5": "--num-requests 4",
    "calibrate mine": "--within 1 --ranks 2",
    "simulate paper --layout dp=16,ep=16 --cluster h100x16": "--output-len 32:256",
}


class Stage:
    """Files in the folder that documented commands run in.

    Args:
        folder: an empty one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fill(self, word: str) -> str:
        """A word with its `{…}` replaced; makes only what it names."""
        names = [name for _, name, _, _ in Formatter().parse(word) if name]
        return word.format_map({name: str(getattr(self, name)) for name in names})

    @property
    def root(self) -> Path:
        """The checkout."""
        return ROOT

    @cached_property
    def checkpoint(self) -> Path:
        """A tiny Mixtral with a tokenizer and a chat template."""
        from engine.model.chat_checkpoint import save_chat_checkpoint

        path = self.folder / "my-checkpoint"
        path.mkdir()
        return save_chat_checkpoint(path, "{% for m in messages %}{{ m.content }}{% endfor %}")

    @cached_property
    def profile(self) -> Path:
        """This machine's for bfloat16, measured in a second."""
        path = self.folder / "profile.toml"
        run_expertlane(
            self.folder,
            "calibrate",
            "profile",
            "--within",
            "1",
            "--ranks",
            "1",
            "--dtype",
            "bfloat16",
        )
        assert path.exists()
        return path

    @cached_property
    def results(self) -> Path:
        """A projected comparison, with its page."""
        run_expertlane(self.folder, "compare", "paper", "--project", "--out", "projected")
        return self.folder / "projected"

    @cached_property
    def rows(self) -> Path:
        """Made-up public measurements."""
        path = self.folder / "rows.csv"
        path.write_text("\n".join(ROWS) + "\n")
        return path

    @cached_property
    def served(self) -> Path:
        """A made-up measurement in the columns of aiconfigurator's."""
        path = self.folder / "served.csv"
        path.write_text("\n".join(SERVED) + "\n")
        return path


def run(folder: Path, *command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder, as a user would."""
    paths = [str(ROOT / "src"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )


def run_expertlane(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command of expertlane, which must succeed."""
    done = run(folder, sys.executable, "-m", "expertlane", *words)
    assert done.returncode == 0, done.stderr
    return done
