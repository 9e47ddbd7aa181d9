"""Commands and scripts of models that people run, on the clusters that they run them on."""

import json
from pathlib import Path

import pytest

import expertlane
from golden.cases import DEEPSEEK
from planner.test_commands import parsed
from planner.test_scripts import check_manifest, check_scripts
from spec.test_published import CONFIGS

QWEN3_235B = json.loads((Path(__file__).parents[2] / "docs/qwen3-235b/config.json").read_text())
LOAD = {"batch": "256", "prompt_len": "2000", "output_len": "500"}
CASES = {
    "DeepSeek-R1 on 16 H100": (DEEPSEEK, "h100x16", "float8"),
    "Qwen3-235B on 8 H200": (QWEN3_235B, "h200x8", "float8"),
    "gpt-oss on 4 B200": (CONFIGS["gpt-oss-20b"], "b200x4", "mxfp4"),
    "DeepSeek-R1 on a GB200 NVL72": (DEEPSEEK, "gb200x72", "nvfp4"),
}


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", CASES)
def test_parsers_linters_and_schemas_take_them(name, tmp_path, monkeypatch):
    config, cluster, dtype = CASES[name]
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    Path("model", "config.json").write_text(json.dumps(config))
    (plan,) = expertlane.plan(
        "./model", cluster=cluster, dtype=dtype, scripts="scripts", **LOAD
    ).plans
    of_engine = {each.engine: each for each in plan.engines}
    for engine in ("vllm", "sglang"):
        lines = [line for each in of_engine[engine].commands for line in each.lines]
        assert lines
        assert all(map(parsed, lines))
    for engine in of_engine.values():
        if engine.best is not None:
            check_scripts(Path("scripts", f"{engine.engine}.slurm.sh"))
    manifests = list(Path("scripts").glob("*.yaml"))
    assert {each.name for each in manifests} >= {"vllm.kubernetes.yaml", "sglang.kubernetes.yaml"}
    for each in manifests:
        check_manifest(each.read_text())
