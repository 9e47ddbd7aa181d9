"""Profiles of a server's ranks: begun and ended by requests, with a trace of each rank."""

import gzip
import json
import os
import re
import signal

import pytest

from engine.elastic.recovering import pids
from engine.ranks.processes import wait_until
from expertlane import LLM
from server.running import StubServer, serving

BODY = {"prompt": [1, 2, 3], "max_tokens": 6, "temperature": 0}


@pytest.fixture
def server(tmp_path, layout):
    settings = {"dtype": "float32", "num_blocks": 64, "on_failure": "replace"}
    with LLM("paper-tiny", layout=layout, oversubscribe=True, **settings) as llm:
        folder = tmp_path / "traces"
        given = {"watch": llm.watch(), "scaling": llm.scaling, "profiler": llm.profiler(folder)}
        with serving(llm, **given) as server:
            server.folder = folder
            yield server


def post(server, path):
    return server.post({}, path)


def profiled(server):
    """The answer that ends a profile of one request."""
    assert post(server, "/start_profile").json() == {"is_profiling": True}
    assert server.post(BODY).status_code == 200
    answer = post(server, "/stop_profile")
    assert answer.status_code == 200, answer.text
    return answer.json()


def annotations_of(server, answer):
    """By rank, the annotations in its trace."""
    folder = server.folder / answer["folder"]
    assert sorted(answer["traces"].values()) == sorted(each.name for each in folder.iterdir())
    found = {}
    for rank, name in answer["traces"].items():
        events = json.loads(gzip.decompress((folder / name).read_bytes()))["traceEvents"]
        names = [each["name"] for each in events if each.get("cat") == "user_annotation"]
        found[rank] = [each for each in names if each.startswith("expertlane")]
    return found


def num_steps(annotations):
    return len([each for each in annotations if re.match(r"expertlane: (prefill|decode) ", each)])


LAYOUTS = ["tp=1", "dp=2,ep=2"]
MORE = ["tp=2", "pp=2", "dp=2,tp=2,ep=4", "dp=2,pp=2,ep=2"]
LAYOUTS += [pytest.param(each, marks=pytest.mark.full) for each in MORE]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_profile_has_the_steps_and_stages_of_each_rank(server):
    answer = profiled(server)
    assert answer["missing"] == {}
    found = annotations_of(server, answer)
    assert [*found] == [str(rank) for rank in range(len(found))]
    for of_rank in found.values():
        assert num_steps(of_rank) == 6
        for stage in ("attention", "router", "experts", "head"):
            assert f"expertlane: {stage}" in of_rank
    again = profiled(server)
    assert again["folder"] != answer["folder"]
    assert {num_steps(each) for each in annotations_of(server, again).values()} == {6}


@pytest.mark.parametrize("layout", ["tp=1"])
def test_begins_and_ends_take_turns(server):
    early = post(server, "/stop_profile")
    assert (early.status_code, early.json()["error"]["message"]) == (
        409,
        "no profile is under way",
    )
    assert post(server, "/start_profile").status_code == 200
    twice = post(server, "/start_profile")
    assert twice.status_code == 409
    assert "under way" in twice.json()["error"]["message"]
    assert post(server, "/stop_profile").status_code == 200


def test_without_a_folder_there_is_none():
    server = StubServer()
    try:
        for path in ("/start_profile", "/stop_profile"):
            answer = post(server, path)
            assert answer.status_code == 404
            assert "--profile-dir DIR" in answer.json()["error"]["message"]
    finally:
        server.stop()


@pytest.mark.parametrize("layout", ["dp=2,ep=2"])
def test_a_replaced_rank_has_no_trace_and_says_so(server):
    assert post(server, "/start_profile").status_code == 200
    assert server.post(BODY).status_code == 200
    before = pids(server.llm)
    os.kill(before[1], signal.SIGKILL)
    wait_until(lambda: pids(server.llm)[1] not in (None, before[1]))
    assert server.post(BODY).status_code == 200
    answer = post(server, "/stop_profile")
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert list(found["traces"]) == ["0"]
    assert found["missing"] == {"1": "it was started after the profile began"}
    assert [*annotations_of(server, found)] == ["0"]
    assert sorted(profiled(server)["traces"]) == ["0", "1"]


@pytest.mark.parametrize("layout", ["tp=1"])
def test_a_folder_that_cannot_be_written_is_one_line(server):
    server.folder.write_text("a file")
    assert post(server, "/start_profile").status_code == 200
    answer = post(server, "/stop_profile")
    assert answer.status_code == 409
    assert "cannot write to" in answer.json()["error"]["message"]
    server.folder.unlink()
    assert post(server, "/stop_profile").status_code == 200
    assert server.post(BODY).status_code == 200
