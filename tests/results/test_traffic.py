import json
from dataclasses import replace
from pathlib import Path

import pytest

import example_results as example
from expertlane.errors import UserError
from expertlane.results.file import read, write
from expertlane.spec.names import Phase


def test_the_section_of_a_phase(tmp_path: Path) -> None:
    results = example.usual()
    path = write(results, tmp_path)
    data = json.loads(path.read_text())["deployments"][2]
    seen = data["traffic"]["decode"]
    # Two steps of 100 bytes of payload to each of 15 others; padding goes to rank 0.
    matrix = seen["sent_bytes"]["payload"]
    assert matrix == [[0 if to == rank else 200 for to in range(16)] for rank in range(16)]
    assert [row[0] for row in seen["sent_bytes"]["padding"]] == [0] + [10] * 15
    assert seen["payload_bytes_of_step"] == {
        "intra-node": [16 * 7 * 100] * 2,
        "inter-node": [16 * 8 * 100] * 2,
    }
    of_dispatch = {"payload": 2 * 16 * 8 * 100, "metadata": 2 * 16 * 8 * 8, "padding": 8 * 10}
    assert seen["by_stage"].keys() == {"dispatch"}
    assert seen["by_stage"]["dispatch"]["inter-node"] == of_dispatch
    assert data["traffic_bytes"]["decode"] == seen["by_stage"]["dispatch"]
    assert seen["fan_out"]["tokens_by_ranks_reached"] == [0, 32, 96, *[0] * 14]
    assert seen["fan_out"]["nodes_per_token"] == 1.25
    assert seen["expert"] == {"layer": 0, "expert": 0, "share": 1 / 16}
    assert seen["num_last_arrivals"] == [2, *[0] * 15]
    assert seen["num_meetings"] == [2] * 16
    assert len(data["traffic"]["prefill"]["payload_bytes_of_step"]["intra-node"]) == 1
    assert read(path) == results


def test_saved_copies_and_straggler() -> None:
    deployments = example.usual().deployments
    seen = deployments[2].traffic[Phase.DECODE]
    assert seen.fan_out is not None
    assert seen.fan_out.num_saved_copies == 64 - 32
    assert (seen.straggler, seen.last_share(0)) == (0, 1.0)
    assert deployments[0].traffic[Phase.DECODE].straggler is None


def test_the_straggler_is_found_by_share() -> None:
    seen = example.usual().deployments[2].traffic[Phase.DECODE]
    changed = replace(seen, num_last_arrivals=(5, 1, 3, 0), num_meetings=(10, 10, 4, 0))
    assert (changed.straggler, changed.last_share(2)) == (2, 0.75)


def test_an_unknown_key_is_named(tmp_path: Path) -> None:
    path = write(example.usual(), tmp_path)
    data = json.loads(path.read_text())
    data["deployments"][0]["traffic"]["decode"]["by_stage"]["collectives"]["intra-node"]["x"] = 1
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match=r"traffic\.decode\.by_stage\.collectives.* unknown key"):
        read(path)
