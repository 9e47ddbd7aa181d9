import errno
import json
import re
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from cli.screen import one_line, refused, tells
from expertlane.comparison.run import Repeats
from expertlane.engine.model.stored_tensors import tensor_locations
from expertlane.errors import CapacityError, RankError
from expertlane.spec.experiment import read_experiment, shipped_experiments
from expertlane.spec.from_hf import from_hf
from expertlane.spec.hf_config import family_of
from expertlane.spec.model import PRESETS
from expertlane.spec.ranges import RANGES
from expertlane.spec.tensors import tensor_names, tensor_shape

SMALL = read_experiment(shipped_experiments()["paper-small"])


def test_the_default_runs_shows_and_writes(comparison, run):
    code, out, err = run("compare")

    assert (code, out) == (0, "results!\n")
    assert comparison.pools == [
        {"num_ranks": 16, "dtype": None, "oversubscribe": False, "cpu_isa": None, "timeout_s": 60.0}
    ]
    assert comparison.calls == [{"experiment": SMALL, "command": "expertlane compare"}]
    assert Path("results/paper-small/report.md").read_text() == "# results ×\n"
    assert sorted(path.name for path in Path("results/paper-small").iterdir()) == [
        "report.html",
        "report.md",
        "results.json",
    ]
    started, progress, written = err.splitlines()
    assert tells(started, "16 ranks")
    assert tells(progress, "EP 16")
    names = ("results.json", "report.md", "report.html")
    assert written == "written: " + ", ".join(f"results/paper-small/{name}" for name in names)


def test_traces_are_written_if_asked_for(comparison, run):
    code, _, err = run("compare", "--trace")

    assert code == 0
    names = ["results.json", "report.md", "report.html", "trace-EP-16.json", "trace-EP-16-2.json"]
    folder = Path("results/paper-small")
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    assert err.splitlines()[-1] == "written: " + ", ".join(f"{folder}/{name}" for name in names)
    assert json.loads((folder / "trace-EP-16.json").read_text())["traceEvents"] == []


def test_options_are_handed_over(comparison, run):
    code, _, _ = run(
        "compare", "paper", "--dtype", "bfloat16", "--oversubscribe", "--timeout-s", "2.5"
    )

    assert code == 0
    assert comparison.pools == [
        {
            "num_ranks": 16,
            "dtype": "bfloat16",
            "oversubscribe": True,
            "cpu_isa": None,
            "timeout_s": 2.5,
        }
    ]
    paper = read_experiment(shipped_experiments()["paper"])
    assert [call["experiment"] for call in comparison.calls] == [paper]


def test_resume_goes_on_in_the_folder_of_the_results(comparison, run):
    assert run("compare", "--resume")[0] == 0
    assert comparison.resume == (Path("results/paper-small"), True)


@pytest.mark.parametrize(
    ("arguments", "repeats", "names"),
    [
        ([], Repeats(), [each.name for each in SMALL.deployments]),
        (["--repeat", "9", "--min-time", "2.5"], Repeats(9, 2.5), None),
        (["--only", "EP 16"], Repeats(), ["EP 16"]),
        (["--only", "dp 2 x tp 8, ep 2,8"], Repeats(), ["DP 2 × TP 8, EP 2", "EP 16"]),
    ],
)
def test_how_often_and_which(comparison, run, arguments, repeats, names):
    assert run("compare", *arguments)[0] == 0
    (call,) = comparison.calls
    assert comparison.repeats == repeats
    if names is not None:
        assert [each.name for each in call["experiment"].deployments] == names
    if "--only" in arguments:
        assert call["experiment"].scaling == ()
        assert [path.name for path in Path("results").iterdir()] == ["paper-small-only"]


@pytest.mark.parametrize(
    ("arguments", "links", "scale", "is_asked"),
    [
        ([], "h100", None, False),  # on several hosts it is not made then
        (["--clock", "virtual"], "h100", None, True),
        (["--links", "h100"], "h100", None, True),
        (["--links", "a100", "--link-scale", "20"], "a100", 20.0, True),
        (["--clock", "virtual", "--links", "none"], None, None, True),
    ],
)
def test_virtual_time_has_the_links_that_were_asked_for(
    comparison, run, arguments, links, scale, is_asked
):
    assert run("compare", *arguments)[0] == 0
    found = comparison.virtual
    assert (found.links and found.links.name, found.scale, found.is_asked) == (
        *(links, scale),
        is_asked,
    )
    assert run("compare", "--clock", "wall")[0] == 0
    assert comparison.virtual is None


@pytest.mark.parametrize(
    ("arguments", "folders"),
    [
        (["--experts-per-token", "1"], {1: "results/paper-small-top1"}),
        (
            ["--experts-per-token", "2,1"],
            {2: "results/paper-small-top2", 1: "results/paper-small-top1"},
        ),
        (["--experts-per-token", "1", "--out", "here"], {1: "here"}),
        (["--experts-per-token", "2, 1", "--out", "."], {2: "top2", 1: "top1"}),
    ],
)
def test_top_k_gives_one_comparison_each(comparison, run, arguments, folders):
    code, out, _ = run("compare", *arguments)

    assert (code, out) == (0, "results!\n" * len(folders))
    assert len(comparison.pools) == 1  # the same ranks for all
    models = [call["experiment"].model for call in comparison.calls]
    assert models == [SMALL.model.with_overrides(num_experts_per_tok=k) for k in folders]
    found = {str(path.parent.relative_to(Path.cwd())) for path in Path.cwd().rglob("report.md")}
    assert found == set(folders.values())


SMALL_CHECKPOINT = {
    "architectures": ["MixtralForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 16,
    "max_position_embeddings": 64,
    "num_attention_heads": 16,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_local_experts": 16,
    "rms_norm_eps": 1e-05,
    "vocab_size": 97,
}


def put_checkpoint(folder: str, **config: object) -> Path:
    """A configuration, and weights of zeros that fit `SMALL_CHECKPOINT`."""
    path = Path.cwd() / folder
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(SMALL_CHECKPOINT | config))
    model = from_hf(SMALL_CHECKPOINT)
    family = family_of(SMALL_CHECKPOINT)
    stored = {
        tensor_locations(family, name)[0].name: torch.zeros(tensor_shape(model, name))
        for name in tensor_names(model)
    }
    save_file(stored, path / "model.safetensors")
    return path


@pytest.mark.parametrize("argument", ["models/my moe", "./models/my moe/", "{folder}"])
def test_a_checkpoint_in_place_of_the_experiments_model(comparison, run, argument):
    folder = put_checkpoint("models/my moe")
    code, out, _ = run("compare", "--model", argument.format(folder=folder))

    assert (code, out) == (0, "results!\n")
    expected = replace(
        SMALL,
        name="paper-small-my-moe",
        model=from_hf(SMALL_CHECKPOINT, "my moe"),
        checkpoint=str(folder),
    )
    assert [call["experiment"] for call in comparison.calls] == [expected]
    assert Path("results/paper-small-my-moe/report.md").is_file()


def test_a_checkpoint_with_other_numbers_of_experts_per_token(comparison, run):
    folder = put_checkpoint("moe")
    assert run("compare", "--model", "moe", "--experts-per-token", "4,1", "paper-small")[0] == 0
    experiments = [call["experiment"] for call in comparison.calls]
    assert [each.model.num_experts_per_tok for each in experiments] == [4, 1]
    assert [each.checkpoint for each in experiments] == [str(folder)] * 2
    assert Path("results/paper-small-moe-top4/report.md").is_file()


def test_unused_tensors_are_refused_before_ranks_start(comparison, run):
    folder = put_checkpoint("moe")
    weights = folder / "model.safetensors"
    save_file(load_file(weights) | {"other": torch.zeros(1)}, weights)
    text = f"{folder}: config.json tensor other"
    code, out, err = run("compare", "--model", "moe")
    assert (code, out, comparison.pools) == (2, "", [])
    assert one_line(err, f"{text} --ignore-unused-tensors ignore_unused_tensors=True")
    code, out, err = run(
        "compare", "--model", "moe", "--ignore-unused-tensors", "--experts-per-token", "2,1"
    )
    assert (code, len(comparison.calls)) == (0, 2)
    (warning,) = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert tells(warning, text)


def test_another_head_than_the_one_it_is_tied_to(comparison, run):
    folder = put_checkpoint("moe", tie_word_embeddings=True)
    assert run("compare", "--model", "moe")[0] == 0
    assert comparison.calls[0]["experiment"].model.tie_word_embeddings  # a copy
    weights = folder / "model.safetensors"
    stored = load_file(weights)
    stored["lm_head.weight"][0, 0] = 1
    save_file(stored, weights)
    code, _, err = run("compare", "--model", "moe", "--experts-per-token", "2,1")
    assert code == 0
    (warning,) = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert tells(warning, f"{folder} config.json head embedding")
    for call in comparison.calls[1:]:
        assert not call["experiment"].model.tie_word_embeddings


def test_a_preset_in_place_of_the_experiments_model(comparison, run):
    assert run("compare", "--model", "paper-tiny")[0] == 0
    (call,) = comparison.calls
    assert call["experiment"] == replace(
        SMALL, name="paper-small-paper-tiny", model=PRESETS["paper-tiny"]
    )


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"max_position_embeddings": 4}, "--model moe 2 4 5 prompt_len output_len"),
        ({"num_hidden_layers": None}, f"num_hidden_layers null {RANGES['num_hidden_layers']}"),
    ],
)
def test_a_checkpoint_that_does_not_fit_the_experiment(comparison, run, config, line):
    put_checkpoint("moe", **config)
    assert refused(run("compare", "--model", "moe"), line)
    assert comparison.pools == []


def test_json_is_the_file_and_nothing_else(comparison, run):
    comparison.answer = "x" * 200  # wider than a pipe's 80 columns
    code, out, err = run("compare", "--json", "--out", "here")

    assert code == 0
    assert "x" * 200 in out
    assert out == Path("here/results.json").read_text()
    assert "EP 16: done" in err


def test_a_rank_that_does_not_speak_writes_nothing(comparison, run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    comparison.is_follower = True

    assert run("compare") == (0, "", "")
    assert comparison.calls == []
    assert list(Path.cwd().iterdir()) == []


def test_memory_is_checked_for_all_before_the_first_runs(comparison, run):
    comparison.too_large = CapacityError("too large")
    code, out, err = run("compare", "--experts-per-token", "2,1")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1] == "expertlane: error: too large"
    assert comparison.calls == []
    assert list(Path.cwd().iterdir()) == []


def test_what_is_finished_stays_when_a_later_comparison_fails(comparison, run):
    comparison.fails_at = 2
    comparison.error = RankError("rank 1 is gone")
    code, out, _ = run("compare", "--experts-per-token", "2,1")
    assert (code, out) == (1, "results!\n")
    assert [path.name for path in Path("results").iterdir()] == ["paper-small-top2"]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.EMFILE, "Too many open files"), "few descriptors ulimit -n"),
        (OSError(errno.ENFILE, "Too many open files in system"), "machine fs.file-max"),
        (RuntimeError("can't start new thread"), "few processes"),
        (KeyboardInterrupt(), "few processes"),  # by OpenBLAS, where it may start no thread
    ],
)
def test_a_limit_that_is_met_anywhere_is_one_line(comparison, run, monkeypatch, error, words):
    comparison.error = error
    if isinstance(error, KeyboardInterrupt):
        refused = RuntimeError("can't start new thread")
        monkeypatch.setattr(threading.Thread, "start", Mock(side_effect=refused))
    code, _, err = run("compare")
    assert code == 2
    assert one_line(err.splitlines(keepends=True)[-1], words)
    assert "Traceback" not in err


def test_help_names_every_shipped_experiment(run):
    _, out, _ = run("compare", "--help")
    words = re.findall(r"[a-z-]+", " ".join(out.split()))
    assert set(shipped_experiments()) <= {*words}


def test_the_module_runs_and_a_mistake_has_no_traceback(tmp_path: Path):
    finished = subprocess.run(
        [sys.executable, "-m", "expertlane", "compare", "none.toml"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert refused(
        (finished.returncode, finished.stdout, finished.stderr), "none.toml No such file"
    )
