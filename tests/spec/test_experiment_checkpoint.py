"""`checkpoint` in an experiment's file; no weights are read, so `config.json` is all there is."""

import json
from pathlib import Path

import pytest

from cli.screen import tells
from expertlane.errors import SpecError, UserError
from expertlane.spec.experiment import read_experiment
from expertlane.spec.from_hf import from_hf

CONFIG = {
    "architectures": ["MixtralForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 16,
    "max_position_embeddings": 64,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "rms_norm_eps": 1e-05,
    "vocab_size": 97,
}
TEXT = """\
name = "mine"
[model]
checkpoint = "models/small moe"
[workload]
num_sequences = 4
prompt_len = 8
output_len = 3
[[deployments]]
name = "one"
layout = "tp=1"
[[deployments]]
name = "two"
layout = "dp=2,ep=2"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of the checkpoint that `TEXT` names, in a file beside `models`."""
    folder = tmp_path / "models" / "small moe"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture
def read(tmp_path: Path):
    def read(text: str, **how: object):
        path = tmp_path / "mine.toml"
        path.write_text(text)
        return read_experiment(path, **how)

    return read


@pytest.fixture
def error_of(read, tmp_path: Path):
    def error(text: str, **how: object) -> str:
        with pytest.raises(SpecError) as caught:
            read(text, **how)
        line = str(caught.value)
        assert line.startswith(f"{tmp_path / 'mine.toml'}: ")
        assert "\n" not in line
        return line.removeprefix(f"{tmp_path / 'mine.toml'}: ")

    return error


def test_a_folder_beside_the_file(read, folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir("/")
    experiment = read(TEXT)
    assert experiment.model == from_hf(CONFIG, "small moe")
    assert experiment.checkpoint == str(folder)


@pytest.mark.parametrize("given", ["{folder}", "models/../models/small moe/."])
def test_other_ways_to_name_it(read, folder: Path, given: str):
    experiment = read(TEXT.replace("models/small moe", given.format(folder=folder)))
    assert experiment.model.name == "small moe"
    assert experiment.checkpoint == str(folder)


def test_others_may_find_it(read, folder: Path, tmp_path: Path):
    asked = []

    def find(checkpoint: str, base: Path) -> Path:
        asked.append((checkpoint, base))
        return folder

    experiment = read(TEXT.replace("models/small moe", "org/Name-8x7B"), find_checkpoint=find)
    assert asked == [("org/Name-8x7B", tmp_path)]
    assert experiment.model.name == "Name-8x7B"
    assert experiment.checkpoint == str(folder)


def test_what_cannot_be_found_is_one_line_of_the_file(error_of):
    def find(checkpoint: str, base: Path) -> Path:
        raise UserError(f"model {checkpoint!r}: it is gated")

    assert tells(error_of(TEXT, find_checkpoint=find), "[model] models/small moe gated")


def test_experts_per_token_can_be_changed(read, folder: Path):
    experiment = read(TEXT.replace("[workload]", "num_experts_per_tok = 1\n[workload]"))
    assert experiment.model == from_hf(CONFIG | {"num_experts_per_tok": 1}, "small moe")


@pytest.mark.parametrize("other", ['preset = "paper-tiny"', "hidden_size = 32", 'name = "x"'])
def test_nothing_else_can_stand_beside_it(error_of, folder: Path, other: str):
    key = other.partition(" ")[0]
    for text in (f"{other}\n[workload]", f"num_experts_per_tok = 1\n{other}\n[workload]"):
        assert tells(
            error_of(TEXT.replace("[workload]", text)),
            f"[model] checkpoint {key} num_experts_per_tok",
        )


def test_a_missing_folder_and_one_without_a_configuration(error_of, tmp_path: Path):
    folder = tmp_path / "models" / "small moe"
    facts = f"[model] {folder} config.json"
    assert tells(error_of(TEXT), facts)
    folder.mkdir(parents=True)
    assert tells(error_of(TEXT), facts)


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "[model] LlamaForCausalLM families"),
        ({"num_attention_heads": None}, "[model] small moe num_attention_heads null"),
        ({"max_position_embeddings": 8}, "prompt 8 3 tokens 10 positions"),
    ],
)
def test_a_checkpoint_that_cannot_be_run_so(error_of, folder: Path, config: dict, line: str):
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    assert tells(error_of(TEXT), line)


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ('"models/small moe"', "3", "[model] checkpoint 3 string"),
        ("[workload]", "num_experts_per_tok = 9\n[workload]", "num_experts_per_tok 9 8 experts"),
        ("[workload]", "num_experts_per_tok = 1.5\n[workload]", "[model] num_experts_per_tok 1.5"),
    ],
)
def test_wrong_values(error_of, folder: Path, old: str, new: str, line: str):
    assert tells(error_of(TEXT.replace(old, new)), line)
