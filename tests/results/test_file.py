import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import example_results as example
from cli.screen import telling, tells
from expertlane.errors import UserError
from expertlane.results.file import read, write
from expertlane.spec.deployment import DispatchMode, DispatchRow, DispatchTable
from expertlane.spec.names import Phase


@pytest.fixture
def written(tmp_path: Path) -> Path:
    return write(example.usual(), tmp_path / "new" / "folder")


def complaint(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read(path)
    line = str(caught.value)
    assert "\n" not in line
    return line.replace(str(path), "FILE")


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    given = example.usual()
    path = write(given, tmp_path)
    assert read(path) == given
    assert os.listdir(tmp_path) == ["results.json"]


def test_numbers_of_numpy_are_written_as_others(tmp_path: Path) -> None:
    given = example.usual()
    of_numpy = replace(given, foreign_cpu_share=np.float64(0.25), context=np.int64(128))
    found = read(write(of_numpy, tmp_path))
    assert found == replace(given, foreign_cpu_share=0.25, context=128)
    assert (type(found.foreign_cpu_share), type(found.context)) == (float, int)


def test_nothing_decoded_and_one_deployment(tmp_path: Path) -> None:
    given = example.results([(example.SMALL, 0.5)], output_len=1)
    assert given.deployments[0].decode is None
    assert [each.phase for each in given.deployments[0].steps] == [Phase.PREFILL]
    assert read(write(given, tmp_path)) == given


def test_a_dispatch_table_is_kept(tmp_path: Path) -> None:
    modes = (DispatchMode("all_to_all"), DispatchMode("all_gather", overlap=True))
    table = DispatchTable(modes, (DispatchRow(1, (0.5, 0.25)), DispatchRow(4, (0.5, 0.75))))
    given = example.usual()
    first, *others = given.deployments
    timed = replace(
        first,
        options=replace(first.options, dispatch="auto", overlap="auto"),
        dispatch_table=table,
    )
    given = replace(given, deployments=(timed, *others))
    path = write(given, tmp_path)
    assert read(path) == given
    data = json.loads(path.read_text())
    data["deployments"][0]["dispatch_table"]["rows"][1]["step_s"] = [0.5]
    path.write_text(json.dumps(data))
    assert tells(complaint(path), "FILE dispatch 2 1")


def test_the_file_has_the_names_of_the_schema(written: Path) -> None:
    data = json.loads(written.read_text())
    assert data["schema_version"] == 9
    deployment = data["deployments"][0]
    assert deployment["layout"] == {
        **{"replicas": 1, "pp": 2, "dp": 1, "tp": 8},
        **{"ep": 1, "dcp": 1},
    }
    assert deployment["source"] == "measured"
    prefill, decode = deployment["steps"]
    assert (prefill["phase"], decode["phase"]) == ("prefill", "decode")
    assert decode["tps"] == {"value": pytest.approx(16 / 0.4), "low": None, "high": None}
    assert decode["token_s"].keys() == {"mean", "median", "p95", "p99"}
    assert decode["traffic"]["by_link"]["inter-node"]["payload"] == 2 * 16 * 8 * 100
    assert decode["breakdown_s"]["experts"] == pytest.approx(0.2)
    assert data["question"]["experiment"]["model"]["hidden_size"] == 64


def test_an_older_file_is_replaced_whole(tmp_path: Path) -> None:
    write(example.usual(), tmp_path)
    newer = replace(example.usual(), command="another")
    write(newer, tmp_path)
    assert read(tmp_path / "results.json").command == "another"


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", no_space)
    with pytest.raises(UserError, match=telling("results.json No space left")):
        write(example.usual(), tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write(example.usual(), tmp_path / "taken")


def test_fields_that_are_gone_are_dropped(written: Path) -> None:
    found, data = read(written), json.loads(written.read_text())
    data["question"]["traffic"] = True
    first = data["deployments"][0]
    first["copies"] = None
    first["options"] |= {"copies": None, "cache_int8": False}
    written.write_text(json.dumps(data))
    assert read(written) == found


def test_missing_file(tmp_path: Path) -> None:
    assert tells(complaint(tmp_path / "none.json"), "FILE No such file")


def test_damaged_file(written: Path) -> None:
    written.write_text(written.read_text()[:20])
    assert complaint(written).startswith("FILE is not JSON: ")
    assert "line 2" in complaint(written)
    written.write_bytes(b"{\xff}")
    assert complaint(written) == "FILE: byte 1 is not UTF-8"


@pytest.mark.parametrize("text", ["[]", "{}", "3"])
def test_not_a_results_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    assert tells(complaint(path), "FILE schema_version results file")


_LOAD = {"prompt_len": "8", "output_len": "8", "requests": None}


def _without_tps(data: dict) -> None:
    del data["deployments"][1]["steps"][0]["tps"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda data: data.update(schema_version=1), "FILE schema_version 1 9 expertlane compare"),
        (lambda data: data.update(colour="red"), "FILE unknown colour nearest cluster"),
        (_without_tps, "FILE deployments.1.steps.0.tps missing"),
        (lambda data: data["machine"].update(num_cores="two"), "FILE machine.num_cores two"),
        (lambda data: data["deployments"][0]["layout"].update(ep=3), "ep=3 divide"),
        (
            lambda data: data["question"]["experiment"]["workload"].update(prompt_len="long"),
            "FILE question experiment.workload.prompt_len long",
        ),
        (
            lambda data: data["question"].update(load=_LOAD | {"prefix_len": -1}),
            "FILE question load.prefix_len -1",
        ),
    ],
    ids=[
        *["version", "unknown key", "missing key", "another type", "an impossible layout"],
        *["a damaged workload", "a damaged load"],
    ],
)
def test_what_is_wrong_is_told_with_its_place(written: Path, change, told: str) -> None:
    data = json.loads(written.read_text())
    change(data)
    written.write_text(json.dumps(data))
    assert tells(complaint(written), told)


def test_a_folder_and_the_only_kind_that_is_wanted(written: Path) -> None:
    assert read(written.parent, "comparison") == read(written)
    with pytest.raises(UserError, match=telling("results.json comparison plan")):
        read(written, "plan")
