import pytest
import torch
from safetensors.torch import load_file, save_file

from cli.screen import telling, tells
from engine.model.families import save_checkpoint
from expertlane.engine.launch import check_checkpoint
from expertlane.engine.llm import LLM
from expertlane.engine.model.checkpoint import Checkpoint
from expertlane.errors import SpecError


def _with_extra(folder, **tensors):
    path = folder / "model.safetensors"
    save_file(load_file(path) | tensors, path)
    return folder


def _check(folder, *, ignore):
    lines = []
    model = Checkpoint(folder).model
    checked = check_checkpoint(model, folder, ignore_unused_tensors=ignore, log=lines.append)
    assert checked == model
    return lines


@pytest.fixture
def folder(tmp_path):
    return save_checkpoint("mixtral", tmp_path)


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["b"], "tensor b"),
        (["c", "b", "a"], "tensors a, b, c"),
        (["a", "b", "c", "d", "e"], "tensors a, b, c and 2 more"),
    ],
)
def test_unused_tensors_are_refused_by_name(folder, names, shown):
    _with_extra(folder, **{name: torch.zeros(1) for name in names})
    with pytest.raises(SpecError) as error:
        _check(folder, ignore=False)
    assert tells(
        str(error.value), f"{folder} {shown} --ignore-unused-tensors ignore_unused_tensors=True"
    )
    (warning,) = _check(folder, ignore=True)
    assert tells(warning, f"warning: {folder} config.json {shown}")


def test_a_missing_tensor_is_found_before_ranks_start(folder):
    path = folder / "model.safetensors"
    stored = load_file(path)
    del stored["model.norm.weight"]
    save_file(stored, path)
    with pytest.raises(SpecError, match=telling("model.norm.weight missing")):
        LLM(folder)


def test_only_the_first_process_of_torchrun_speaks(folder, monkeypatch):
    _with_extra(folder, other=torch.zeros(1))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        assert len(_check(folder, ignore=True)) == (rank == 0)
        with pytest.raises(SpecError):  # on all: torchrun waits half a minute for the others
            _check(folder, ignore=False)


def test_of_an_llm(folder, capfd):
    _with_extra(folder, other=torch.zeros(1))
    with pytest.raises(SpecError, match=telling("other ignore")):
        LLM(folder)
    with LLM(folder, ignore_unused_tensors=True, num_blocks=4) as llm:
        assert len(llm.generate([[3, 4]])[0].token_ids) > 0
    assert capfd.readouterr().err.count("tensor other") == 1
