import base64
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cli.screen import fits_a_screen, one_line, tells
from expertlane.balance.holding import ModelPlacement, read_placement, write_placement
from expertlane.balance.placement import Placement
from expertlane.balance.trace import RoutingTrace, write_trace
from expertlane.spec.model import PRESETS


def trace_of(num_layers=2, num_experts=8, num_tokens=300, seed=0):
    rng = np.random.default_rng(seed)
    noise = rng.gumbel(size=(num_layers, num_tokens, num_experts))
    scores = noise - np.log(np.arange(1, num_experts + 1))
    return RoutingTrace(
        "a/model",
        num_experts,
        tuple(range(1, num_layers + 1)),
        np.argsort(-scores, axis=-1)[..., :2].astype(np.int16),
        np.zeros(num_tokens, dtype=np.int64),
    )


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    write_trace(trace_of(), Path("trace.npz"))
    write_placement(placement_of(8, (1, 2)), Path("placement.json"))
    return tmp_path


def placement_of(num_experts, layers, ep=4):
    each = Placement.round_robin(num_experts, ep, 4)
    return ModelPlacement("a/model", num_experts, dict.fromkeys(layers, each))


def test_a_table_and_a_placement(run):
    asked = ("balance", "trace.npz", "--ep", "4", "--ranks-per-node", "2")
    asked += ("--num-redundant-experts", "4", "--out", "new")
    code, out, err = run(*asked)
    assert (code, err) == (0, "written: new/placement.json\n")
    setting, more, headline, *_ = out.splitlines()
    assert setting == "a/model | 300 tokens, 2 of 8 experts each |"
    assert tells(more, "EP 4 2 nodes 12 experts layer")
    assert tells(headline, "Max/mean ranks")
    assert fits_a_screen(out)
    assert run(*asked, "--quiet")[1] == headline + "\n"
    rows = [line.split() for line in out.splitlines() if line[:3].strip() in ("1", "2", "all")]
    assert [row[0] for row in rows] == ["1", "2", "all"]
    for _, before, after, _, crossings, to_move in rows:
        assert float(before) > float(after) >= 1.0
        assert 0 < float(crossings) < 1
        assert int(to_move) > 0
    placement = read_placement(Path("new/placement.json"))
    placement.check("new/placement.json", num_experts=8, layers=[1, 2], ep=4)
    assert placement.layers[1].num_slots == 12


def test_json_agrees_with_the_placement_it_wrote(run):
    code, out, _ = run(
        "balance", "trace.npz", "--ep", "4", "--num-redundant-experts", "4", "--out", ".", "--json"
    )
    assert code == 0
    found = json.loads(out)
    assert (found["model"], found["ep"], found["ranks_per_node"], found["num_slots"]) == (
        *("a/model", 4),
        *(4, 12),
    )
    assert [each["layer"] for each in found["layers"]] == [1, 2]
    load = trace_of().load()
    for each, of_layer, placement in zip(
        found["layers"], load, read_placement(Path("placement.json")).layers.values(), strict=True
    ):
        loads = placement.rank_loads(of_layer, 4)
        assert each["after"]["max_over_mean"] == pytest.approx(loads.max() / loads.mean())
        assert each["after"]["cross_node_copies"] == 0  # one node
    assert found["total"]["num_moves"] == sum(each["num_moves"] for each in found["layers"])
    assert found["total"]["layer"] is None


def test_a_placement_is_judged(run):
    arguments = ("balance", "trace.npz", "--ep", "4", "--json")
    _, judged, _ = run(*arguments, "--placement", "placement.json")
    _, made, _ = run(*arguments, "--placement", "round_robin", "--num-redundant-experts", "4")
    assert json.loads(judged) == json.loads(made)
    _, linear, _ = run(*arguments, "--placement", "linear")
    found = json.loads(linear)["total"]
    assert (found["before"], found["num_moves"]) == (found["after"], 0)


def test_coactivation_can_be_left_out(run):
    # Experts 2i and 2i + 1 go together.
    first = 2 * np.repeat(np.arange(8), 48)  # each from every node as often
    ids = np.stack([first, first + 1], axis=1).astype(np.int16)[None]
    trace = RoutingTrace("m", 16, (0,), ids, np.zeros(384, dtype=np.int64))
    write_trace(trace, Path("pairs.npz"))
    arguments = ("balance", "pairs.npz", "--ep", "4", "--ranks-per-node", "1", "--json")
    with_it, without = (
        json.loads(run(*arguments, *more)[1])["total"]["after"]["cross_node_copies"]
        for more in ((), ("--no-coactivation",))
    )
    assert (with_it, without) == (288, 576)  # one node a token, or two; a quarter is at home


def test_one_node_has_no_plural(run):
    out = run("balance", "trace.npz", "--ep", "4")[1]
    assert "EP 4 on 1 node, 8 physical" in out
    assert "cross" not in out.lower()


def test_more_crossings_are_told_with_what_they_bought(run):
    # In order, each pair of experts is on one node, and the popular pairs are on the first.
    ids = np.array([[0, 2]] * 90 + [[1, 3]] * 30 + [[4, 6]] * 10 + [[5, 7]] * 6, dtype=np.int16)
    trace = RoutingTrace("m", 8, (0,), ids[None], np.zeros(len(ids), dtype=np.int64))
    write_trace(trace, Path("pairs.npz"))
    arguments = ("balance", "pairs.npz", "--ep", "4", "--ranks-per-node", "2")
    lines = run(*arguments, "--placement", "round_robin")[1].splitlines()
    before, after = next(line.split()[3:5] for line in lines if line.startswith("all "))
    assert float(before) < float(after)
    assert "rose" in " ".join(lines)
    assert "optimistic" not in " ".join(lines)  # it was not made from the trace
    assert "rose" not in run(*arguments, "--placement", "linear")[1]


def test_more_crossings_for_nothing(run):
    ids = np.array([[0, 2], [1, 3], [4, 6], [5, 7]] * 8, dtype=np.int16)
    trace = RoutingTrace("m", 8, (0,), ids[None], np.zeros(len(ids), dtype=np.int64))
    write_trace(trace, Path("even.npz"))
    arguments = ("--ep", "4", "--ranks-per-node", "2", "--placement", "round_robin")
    words = " ".join(run("balance", "even.npz", *arguments)[1].split())
    assert tells(words, "Cross-node rose not better")


def test_many_layers_are_summed_up(run):
    write_trace(trace_of(num_layers=30), Path("deep.npz"))
    _, out, _ = run("balance", "deep.npz", "--ep", "4")
    assert fits_a_screen(out)
    rows = [line.split()[0] for line in out.splitlines()[4:] if line[:2].strip().isdigit()]
    assert len(rows) == 12
    assert [int(row) for row in rows] == sorted(map(int, rows))
    assert tells(out, "12 30 layers")
    assert out.endswith("\nMore: --full\n")
    full = run("balance", "deep.npz", "--ep", "4", "--full")[1]
    assert sum(line[:3].strip().isdigit() for line in full.splitlines()) == 30


def test_no_tokens(run):
    write_trace(trace_of(num_tokens=0), Path("empty.npz"))
    code, out, _ = run("balance", "empty.npz", "--ep", "4", "--ranks-per-node", "1", "--json")
    assert code == 0
    assert json.loads(out)["total"]["after"] == {"max_over_mean": 0.0, "cross_node_copies": 0}
    assert run("balance", "empty.npz", "--ep", "4")[0] == 0


def test_loads_that_sglang_recorded(run, tmp_path):
    """Without tokens nothing is said of nodes that they cross."""
    counts = np.ones((3, 2, 8), dtype=np.int32)
    counts[:, 1, 0] = 20
    torch.save({"rank": 0, "logical_count": torch.tensor(counts)}, "record.pt")
    asked = ("balance", "record.pt", "--ep", "4", "--ranks-per-node", "2", "--out", "new")
    asked += ("--model", "a/model", "--num-redundant-experts", "4")
    code, out, err = run(*asked)
    assert (code, err) == (0, "written: new/placement.json\n")
    assert tells(out, "a/model 52 choices layer 8 experts Only loads not tokens")
    assert "cross-node" not in out
    assert fits_a_screen(out)
    found = json.loads(run(*asked, "--json")[1])
    assert found["total"]["after"]["max_over_mean"] < found["total"]["before"]["max_over_mean"]
    assert found["total"]["after"]["cross_node_copies"] is None
    assert (found["num_tokens"], found["num_experts_per_tok"]) == (None, None)
    assert read_placement(Path("new/placement.json")).model == "a/model"


def test_answers_with_routed_experts(run):
    model = PRESETS["paper-tiny"]
    size = (5, model.num_hidden_layers, model.num_experts)
    ids = np.random.default_rng(0).random(size).argsort()[..., : model.num_experts_per_tok]
    routed = base64.b64encode(ids.astype("<i4").tobytes()).decode()
    Path("answers.json").write_text(json.dumps({"meta_info": {"routed_experts": routed}}))
    code, out, _ = run("balance", "answers.json", "--ep", "2", "--model", "paper-tiny")
    assert code == 0
    assert tells(out, "paper-tiny 5 tokens")
    code, out, err = run("balance", "answers.json", "--ep", "2")
    assert (code, out) == (2, "")
    assert one_line(err, "answers.json --model")
