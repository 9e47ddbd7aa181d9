"""Commands and scripts of models that people run, on the clusters that they run them on."""

import json
import os
import subprocess
from pathlib import Path

import pytest

import expertlane
from client import vllm_server
from expertlane.results import file
from golden.cases import DEEPSEEK
from planner import serving_options
from planner.test_commands import drawn_plan, parsed
from planner.test_scripts import check_manifest, check_scripts
from spec.test_published import CONFIGS

QWEN3_235B = json.loads((Path(__file__).parents[2] / "docs/qwen3-235b/config.json").read_text())
LOAD = {"batch": "256", "prompt_len": "2000", "output_len": "500"}
CASES = {
    "DeepSeek-R1 on 16 H100": (DEEPSEEK, "h100x16", "float8"),
    "Qwen3-235B on 8 H200": (QWEN3_235B, "h200x8", "float8"),
    "gpt-oss on 4 B200": (CONFIGS["gpt-oss-20b"], "b200x4", "mxfp4"),
    "gpt-oss on a GB200 NVL72": (CONFIGS["gpt-oss-20b"], "gb200x72", "mxfp4"),
    "DeepSeek-R1 on a GB200 NVL72": (DEEPSEEK, "gb200x72", "nvfp4"),
}


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """Plans a case once: gives the results, with the scripts in the folder's `scripts`."""
    kept = {}

    def plan_of(name):
        if name not in kept:
            folder = tmp_path_factory.mktemp("plan")
            config, cluster, dtype = CASES[name]
            (folder / "model").mkdir()
            (folder / "model" / "config.json").write_text(json.dumps(config))
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                found = expertlane.plan(
                    "./model", cluster=cluster, dtype=dtype, scripts="scripts", **LOAD
                )
            kept[name] = found, folder / "scripts"
        return kept[name]

    return plan_of


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", CASES)
def test_parsers_linters_and_schemas_take_them(name, planned):
    found, scripts = planned(name)
    of_engine = {each.engine: each for each in found.plans[0].engines}
    for engine in ("vllm", "sglang"):
        lines = [line for each in of_engine[engine].commands for line in each.lines]
        assert lines
        assert all(map(parsed, lines))
    for engine in of_engine.values():
        if engine.best is not None:
            check_scripts(scripts / f"{engine.engine}.slurm.sh")
    manifests = list(scripts.glob("*.yaml"))
    assert {each.name for each in manifests} >= {"vllm.kubernetes.yaml", "sglang.kubernetes.yaml"}
    for each in manifests:
        check_manifest(each.read_text())


@pytest.mark.full
@pytest.mark.timeout(1500)
def test_vllms_own_parser_takes_them(planned, tmp_path, monkeypatch):
    """The installed one, beside the recorded one of another version; drawn plans, too."""
    python = vllm_server.python()
    monkeypatch.chdir(tmp_path)
    plans = [planned(name)[0] for name in CASES]
    plans += [expertlane.plan("paper", **drawn_plan(place)) for place in range(15)]
    for place, each in enumerate(plans):
        file.write(each, tmp_path / str(place))
    files = [str(tmp_path / str(place) / "results.json") for place in range(len(plans))]
    command = [python, "-P", serving_options.__file__, "take", "vllm", *files]
    around = os.environ | vllm_server.ENVIRONMENT
    done = subprocess.run(command, capture_output=True, text=True, env=around)
    assert done.returncode == 0, done.stderr[-2000:]
    num = sum(package == "vllm" for each in plans for package in packages_in(each))
    assert num >= len(plans)
    assert f" takes {num} commands of {len(plans)} plans" in done.stdout


def packages_in(found):
    """What each of its commands for vLLM and SGLang starts."""
    for engine in found.plans[0].engines:
        if engine.engine in ("vllm", "sglang"):
            for command in engine.commands:
                yield from (serving_options.words_of(line)[0] for line in command.lines)
