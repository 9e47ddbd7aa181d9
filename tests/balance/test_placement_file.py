import json

import pytest

from cli.screen import refusing, telling, tells
from expertlane.balance.holding import (
    ModelPlacement,
    check_deployment,
    read_placement,
    write_placement,
)
from expertlane.balance.placement import Placement
from expertlane.errors import SpecError, UserError
from expertlane.spec.deployment import Deployment, Options
from expertlane.spec.layout import Layout
from expertlane.spec.model import PRESETS

PLACEMENT = ModelPlacement(
    "a/model", 3, {4: Placement(3, ((0, 1), (2, 0))), 1: Placement(3, ((2,), (0, 1)))}
)
VALID = {
    "schema_version": 1,
    "model": "a/model",
    "num_experts": 3,
    "ep": 2,
    "layers": [
        {"layer": 1, "experts_of_rank": [[2], [0, 1]]},
        {"layer": 4, "experts_of_rank": [[0, 1], [2, 0]]},
    ],
}


def test_written_and_read_back(tmp_path):
    path = tmp_path / "new folder" / "placement.json"
    write_placement(PLACEMENT, path)

    assert json.loads(path.read_text()) == VALID
    assert read_placement(path) == PLACEMENT
    assert list(read_placement(path).layers) == [1, 4]
    assert [each.name for each in path.parent.iterdir()] == ["placement.json"]
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # a byte order mark is passed over
    assert read_placement(path) == PLACEMENT


def test_what_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^cannot write .*file/placement.json: "):
        write_placement(PLACEMENT, tmp_path / "file" / "placement.json")


def changed(**changes):
    return json.dumps(VALID | changes)


def one_layer(*experts_of_rank, layer=1):
    return changed(layers=[{"layer": layer, "experts_of_rank": experts_of_rank}])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "JSON 1"),
        ("{", "JSON"),
        ("[]", "schema_version placement file"),
        ("{}", "schema_version placement file"),
        (changed(schema_version=2), "schema_version 2 reads 1"),
        (changed(schema_version=True), "schema_version True reads 1"),
        (changed(extra=1), "unknown extra schema_version"),
        (json.dumps({"schema_version": 1}), "num_experts layers missing"),
        (changed(model="a\nb"), "model one line"),
        (changed(num_experts=2), "layer 1 rank 0 expert 2"),
        (changed(num_experts=4), "layer 1 4 experts 3 slots 2 ranks"),
        (changed(num_experts=10**9), "num_experts 1000000000 1"),
        (changed(num_experts=-(10**9)), "num_experts -1000000000"),
        (changed(ep=0), "ep 0 1 1,000,000"),
        (changed(ep=3), "layer 1 2 ranks 3"),
        (changed(layers=[]), "no layer"),
        (changed(layers=[{}]), "layers.0.layer layers.0.experts_of_rank missing"),
        (changed(layers=VALID["layers"][:1] * 2), "layer 1 twice"),
        (one_layer([0], [1, 2], layer=-1), "layer -1 0 1,023"),
        (one_layer([0], [1.5, 2]), "layers.0.experts_of_rank.1.0 1.5"),
        (one_layer([0], [1, 0]), "layer 1 rank expert 2"),
        (one_layer([0, 0], [1, 2]), "layer 1 rank 0 expert twice"),
    ],
)
def test_a_damaged_file_gives_one_line_that_names_it(tmp_path, text, message):
    path = tmp_path / "placement.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_placement(path)
    line = str(caught.value)
    assert line.startswith(str(path))
    assert tells(line, message)
    assert "\n" not in line


@pytest.mark.parametrize(
    ("other", "message"),
    [
        *(({"model": name}, "") for name in (None, "a/model", "/checkpoints/model/", "model")),
        ({"layers": [4, 1]}, ""),
        ({"num_experts": 8}, "p.json a/model 3 experts layer"),
        ({"layers": [1]}, "2 layers a/model 1 layer 4"),
        ({"layers": [1, 3, 4]}, "3 lacks layer"),
        ({"ep": 4}, "p.json 2 ranks 4"),
        ({"model": "a/nother"}, "p.json a/model a/nother"),
    ],
)
def test_it_fits_its_model_and_no_other(other, message):
    with refusing(message):
        PLACEMENT.check("p.json", **({"num_experts": 3, "layers": [1, 4], "ep": 2} | other))


def test_layers_must_be_alike():
    one = Placement(3, ((0, 1, 2),))
    with pytest.raises(SpecError, match=telling("layer 1 3 experts 4")):
        ModelPlacement("m", 4, {1: one})
    with pytest.raises(SpecError, match=telling("layer 2 ranks 1")):
        ModelPlacement("m", 3, {1: one, 2: Placement.linear(3, 2)})
    with pytest.raises(SpecError, match=telling("layer -1 layers 0")):
        ModelPlacement("m", 3, {-1: one})


def test_by_load_is_for_models_of_a_cluster():
    options = Options(placement="load", num_redundant_experts=2)
    asked = PRESETS["paper-tiny"], Deployment("wide", Layout(dp=2, ep=2), options), 8
    with pytest.raises(UserError, match=telling("by load --rebalance-steps balance")):
        check_deployment(*asked)
    placements = check_deployment(*asked, is_modelled=True)
    num_slots = PRESETS["paper-tiny"].num_experts + 2
    assert {placement.num_slots for placement in placements} == {num_slots}
