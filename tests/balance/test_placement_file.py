import json
from pathlib import Path

import pytest

from expertlane.balance.placement import Placement
from expertlane.balance.placement_file import ModelPlacement, read_placement, write_placement
from expertlane.errors import SpecError, UserError

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
        ("", "is not JSON: Expecting value at line 1, column 1"),
        ("{", "is not JSON: "),
        ("[" * 100_000, ": nested too deeply; valid: 100 levels at most"),
        ("[]", "not a placement file: it has no schema_version"),
        ("{}", "not a placement file: it has no schema_version"),
        (changed(schema_version=2), "schema_version is 2; this expertlane reads 1"),
        (changed(schema_version=True), "schema_version is True; this expertlane reads 1"),
        (changed(schema_version=1.0), "schema_version is 1.0; this expertlane reads 1"),
        (changed(extra=1), "unknown key 'extra' in the file; valid: schema_version, model,"),
        (json.dumps({"schema_version": 1}), "model, num_experts, ep, layers are missing"),
        (changed(model=1), "model is 1; it must be a string"),
        (changed(model="a\nb"), r"model is 'a\nb'; it must be a name, one line of text"),
        (changed(model="\ud800"), "it holds a string that is no Unicode text"),
        (changed(num_experts=True), "num_experts is true; it must be a whole number"),
        (changed(num_experts=2), "layer 1: placement: ep rank 0 holds expert 2; there are"),
        (changed(num_experts=4), "layer 1: placement: 4 experts, but 3 slots on 2 ep ranks; each"),
        (changed(num_experts=10**9), "num_experts is 1000000000; it must be a whole number, 1"),
        (changed(num_experts=-(10**9)), "num_experts is -1000000000; it must be a whole number"),
        (changed(num_experts=0).replace("0", "9" * 5000, 1), "a number has 5,000 digits; valid"),
        (changed(num_experts="x" * 99), f'num_experts is "{"x" * 59}…; it must be a whole number'),
        (changed(ep=0), "ep is 0; it must be a whole number, 1 to 1,000,000"),
        (changed(ep=3), "layer 1 has 2 ranks; ep is 3"),
        (changed(layers={}), "layers is {}; it must be a list"),
        (changed(layers=[]), "placement: there is no layer"),
        (
            changed(layers=[1]),
            "layers.0 is 1; it must be a table of known keys (in JSON, an object)",
        ),
        (changed(layers=[{}]), "layers.0.layer, layers.0.experts_of_rank are missing"),
        (changed(layers=VALID["layers"][:1] * 2), "layer 1 is given twice"),
        (one_layer([0], [1, 2], layer=-1), "layer is -1; it must be a whole number, 0 to 1,023"),
        (one_layer([0], [1, 2], layer="1"), 'layers.0.layer is "1"; it must be a whole number'),
        (one_layer([0], [1.5, 2]), "layers.0.experts_of_rank.1.0 is 1.5; it must be a whole"),
        (one_layer([0], 1), "layers.0.experts_of_rank.1 is 1; it must be a list"),
        (one_layer([0], [1, 0]), "layer 1: placement: no ep rank holds expert 2"),
        (one_layer([0, 0], [1, 2]), "layer 1: placement: ep rank 0 holds expert 0 twice"),
    ],
)
def test_a_damaged_file_gives_one_line_that_names_it(tmp_path, text, message):
    path = tmp_path / "placement.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_placement(path)
    line = str(caught.value)
    assert line.startswith(str(path))
    assert message in line
    assert "\n" not in line


def test_no_file_and_no_text(tmp_path):
    with pytest.raises(UserError, match=r"^cannot read .*none.json: No such file"):
        read_placement(tmp_path / "none.json")
    path = tmp_path / "binary.json"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"binary\.json: byte 0 is not UTF-8"):
        read_placement(path)


def test_a_byte_order_mark_is_passed_over(tmp_path):
    path = tmp_path / "placement.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(VALID).encode())
    assert read_placement(path) == PLACEMENT


def test_a_path_that_is_none():
    with pytest.raises(UserError, match=r"^cannot read 'a\\x00b': embedded null byte$"):
        read_placement(Path("a\0b"))


@pytest.mark.parametrize("model", [None, "a/model", "/checkpoints/model/", "model"])
def test_it_fits_its_model(model):
    PLACEMENT.check("p.json", num_experts=3, layers=[4, 1], ep=2, model=model)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"num_experts": 8},
            "p.json is a placement of a/model, which has 3 experts per layer; here",
        ),
        ({"layers": [1]}, r"of 2 MoE layers of a/model; here there are 1 \(it has layer 4\)"),
        ({"layers": [1, 3, 4]}, r"here there are 3 \(it lacks layer 3\)"),
        ({"ep": 4}, "p.json is a placement on 2 ep ranks; here there are 4"),
        ({"model": "a/nother"}, "p.json is a placement of a/model; here the model is a/nother"),
    ],
)
def test_it_is_for_something_else(other, message):
    with pytest.raises(UserError, match=message):
        PLACEMENT.check("p.json", **({"num_experts": 3, "layers": [1, 4], "ep": 2} | other))


def test_layers_must_be_alike():
    one = Placement(3, ((0, 1, 2),))
    with pytest.raises(SpecError, match="layer 1 has 3 experts; the model has 4"):
        ModelPlacement("m", 4, {1: one})
    with pytest.raises(SpecError, match="layer 2 is for 2 ep ranks; the first layer is for 1"):
        ModelPlacement("m", 3, {1: one, 2: Placement.linear(3, 2)})
    with pytest.raises(SpecError, match="layer -1; layers are counted from 0"):
        ModelPlacement("m", 3, {-1: one})
