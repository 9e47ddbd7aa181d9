"""Records and answers of other engines, made as their sources say, and damaged ones."""

import base64
import io
import json
import pickle
import zipfile
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cli.screen import telling
from expertlane.balance import torch_file
from expertlane.balance.engine_routing import RoutingCounts, read_routing
from expertlane.balance.torch_file import read_torch_file
from expertlane.balance.trace import RoutingTrace, read_trace, write_trace
from expertlane.errors import UserError
from expertlane.spec.model import PRESETS

MODEL = replace(PRESETS["paper-tiny"], num_experts=4, num_experts_per_tok=2)
MODEL = replace(MODEL, name="m", num_hidden_layers=3, dense_layers=(0,), intermediate_size=8)
IDS = np.array([[[0, 1], [1, 3]], [[2, 1], [3, 1]], [[3, 0], [0, 1]]])  # [tokens, moe layers, k]


def refuses(path, words, *given):
    with pytest.raises(UserError, match=telling(words)) as caught:
        read_routing(path, *given)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def saved(tmp_path, value):
    path = tmp_path / "expert_distribution_recorder_1.5.pt"
    torch.save(value, path)
    return path


# SGLang's record, mode stat


def test_a_record_of_loads(tmp_path):
    """_StatAccumulator.dump: [steps, layers, logical experts]; layer 0 is dense."""
    counts = torch.zeros((5, 3, 4), dtype=torch.int32)
    counts[0, 1] = torch.tensor([1, 2, 3, 4])
    counts[1, 1] = torch.tensor([1, 0, 0, 1])
    counts[1, 2] = torch.tensor([4, 0, 0, 0])
    value = {"rank": 0, "logical_count": counts, "average_utilization_rate_over_window": None}
    found = read_routing(saved(tmp_path, value))
    assert isinstance(found, RoutingCounts)
    assert (found.model, found.layers) == ("expert_distribution_recorder_1.5", (1, 2))
    np.testing.assert_array_equal(found.load(), [[2, 2, 3, 5], [4, 0, 0, 0]])
    assert (found.num_experts, found.num_choices) == (4, 8)
    assert read_routing(saved(tmp_path, value), None, "deepseek").model == "deepseek"


@pytest.mark.parametrize("shape", [(0, 3, 4), (5, 0, 4), (5, 3, 4)])
def test_nothing_recorded(tmp_path, shape):
    path = saved(tmp_path, {"rank": 0, "logical_count": torch.zeros(shape, dtype=torch.int32)})
    refuses(path, "no routing recorded requests")


# per_token


def record(step, ids, **more):
    """_DetailSinglePassGatherer.collect: [layers, tokens, 8], -1 where there is nothing."""
    filled = torch.full((3, len(ids), 8), -1, dtype=torch.int32)
    if len(ids):
        filled[1:, :, :2] = torch.tensor(np.array(ids)).transpose(0, 1)
    return {
        "forward_pass_id": step,
        "rank": 0,
        "gatherer_key": "primary",
        "input_ids": list(range(len(ids))),
        "positions": list(range(len(ids))),
        "extend_seq_lens": None,
        "forward_mode": 2,
        "topk_ids_of_layer": filled,
        "misc_objects": [],
        **more,
    }


def recorded(*records, physical=(0, 1, 2, 3)):
    experts = torch.tensor([list(physical)] * 3)
    return {"records": list(records), "last_physical_to_logical_map": experts}


def test_a_record_of_tokens(tmp_path):
    path = saved(tmp_path, recorded(record(7, IDS[2:]), record(3, IDS[:2]), record(9, [])))
    found = read_routing(path)
    assert isinstance(found, RoutingTrace)
    assert (found.layers, found.num_experts, found.num_experts_per_tok) == ((1, 2), 4, 2)
    np.testing.assert_array_equal(found.topk_ids, IDS.transpose(1, 0, 2))
    np.testing.assert_array_equal(found.step, [3, 3, 7])
    write_trace(found, tmp_path / "trace.npz")
    np.testing.assert_array_equal(read_trace(tmp_path / "trace.npz").topk_ids, found.topk_ids)


def test_redundant_experts_are_their_logical_ones(tmp_path):
    physical = np.where(IDS == 1, 4, IDS)
    path = saved(tmp_path, recorded(record(0, physical), physical=(0, 1, 2, 3, 1)))
    np.testing.assert_array_equal(read_routing(path).topk_ids, IDS.transpose(1, 0, 2))


def test_tokens_that_fill_a_batch_up_are_left_out(tmp_path):
    ids = np.array([IDS[0], np.full((2, 2), -1), IDS[1]])
    assert read_routing(saved(tmp_path, recorded(record(0, ids)))).num_tokens == 2


def test_a_record_by_pass(tmp_path):
    one = {"forward_pass_id": 0, "rank": 0, "gatherer_key": "primary"}
    counts = torch.tensor([[0, 0, 0, 0, 0], [1, 2, 3, 4, 5], [0, 1, 0, 0, 0]])
    records = [one | {"global_physical_count": counts}, one | {"global_physical_count": counts}]
    found = read_routing(saved(tmp_path, recorded(*records, physical=(0, 1, 2, 3, 1))))
    np.testing.assert_array_equal(found.load(), [[2, 14, 6, 8], [0, 2, 0, 0]])


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([1, 2], "record SGLang"),
        ({"a": 1}, "logical_count records"),
        ({"logical_count": 3}, "logical_count tensor"),
        ({"logical_count": torch.zeros((1, 2, 3))}, "logical_count integer tensor"),
        ({"logical_count": torch.full((1, 2, 3), -1)}, "count negative"),
        (recorded(), "no routing recorded"),
        ({"records": [3]}, "logical_count records"),
        (recorded(record(0, [])), "no routing recorded"),
        (recorded({"forward_pass_id": 0}), "global_physical_count"),
        (recorded({"global_physical_count": torch.ones((3, 9), dtype=torch.int64)}), "3 9 3 4"),
        (recorded(record(0, IDS + 4)), "physical expert 7 map 4"),
        (recorded(record(-1, IDS)), "forward_pass_id"),
        (recorded(record(0, IDS), physical=(0, 1, 2, -1)), "last_physical_to_logical_map"),
        (recorded(record(0, np.zeros_like(IDS))), "expert twice"),
    ],
)
def test_what_is_no_such_record(tmp_path, value, words):
    refuses(saved(tmp_path, value), words)


# Files of torch.save


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('it ran')",)


@pytest.mark.parametrize("value", [Evil(), {"logical_count": Evil()}, [object()], {1, 2}, b"x", 1j])
def test_nothing_else_is_built(tmp_path, value):
    refuses(saved(tmp_path, value), "more than numbers text")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_numbers_text_and_tensors_come_back(tmp_path, protocol):
    value = {
        "whole": [0, -1, 300, 70_000, 2**40, -(2**70)],
        "other": (None, True, False, 1.5, "ä" * 300, (), (1,), (1, 2), (1, 2, 3, 4), {}, []),
        7: torch.arange(24, dtype=torch.int64).view(2, 3, 4).transpose(0, 2)[1:, :, ::1],
        "kinds": [
            torch.tensor([1, 2], dtype=kind)
            for kind in (torch.int8, torch.uint8, torch.int16, torch.float32, torch.float64)
        ],
        "shared": [base := torch.arange(6), base[2:4], base[:0], torch.tensor(3)],
    }
    path = tmp_path / "a.pt"
    torch.save(value, path, pickle_protocol=protocol)
    found = read_torch_file(path)
    assert found["whole"] == value["whole"]
    assert found["other"] == value["other"]
    np.testing.assert_array_equal(found[7], value[7].numpy())
    for mine, theirs in zip(
        [*found["kinds"], *found["shared"]], [*value["kinds"], *value["shared"]], strict=True
    ):
        np.testing.assert_array_equal(mine, theirs.numpy())
        assert mine.dtype == theirs.numpy().dtype


def rewritten(path, change):
    """The archive with the bytes of its members changed."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            found = change(name.partition("/")[2], data)
            if found is not None:
                archive.writestr(name, found)
    return path


@pytest.mark.parametrize(
    "change",
    [
        lambda name, data: None if name == "data/0" else data,
        lambda name, data: data[:-1] if name == "data/0" else data,
        lambda name, data: data[:-1] if name == "data.pkl" else data,
        lambda name, data: b"" if name == "data.pkl" else data,
        lambda name, data: b"big" if name == "byteorder" else data,
        lambda name, data: pickle.dumps([1], 0) if name == "data.pkl" else data,
        lambda name, data: b"\x80\x02)Q." if name == "data.pkl" else data,
        lambda name, data: b"\x80\x02h\x05." if name == "data.pkl" else data,
        lambda name, data: b"\x80\x02." if name == "data.pkl" else data,
    ],
)
def test_damaged_files(tmp_path, change):
    path = saved(tmp_path, {"logical_count": torch.ones((1, 2, 3), dtype=torch.int32)})
    with pytest.raises(UserError, match=telling(f"{path}")) as caught:
        read_routing(rewritten(path, change))
    assert "\n" not in str(caught.value)


def test_sizes_are_bounded(tmp_path, monkeypatch):
    path = saved(tmp_path, {"logical_count": torch.ones((1, 2, 3), dtype=torch.int32)})
    monkeypatch.setattr(torch_file, "_PROGRAM_BYTES", 10)
    refuses(path, "data.pkl 10")
    monkeypatch.setattr(torch_file, "TRACE_BYTES", 100)
    with pytest.raises(UserError, match="100"):
        read_torch_file(path)


def test_a_tensor_beyond_its_storage(tmp_path):
    """Sizes that would be read from elsewhere in memory, or take all of it."""
    path = saved(tmp_path, {"logical_count": torch.ones((1, 2, 3), dtype=torch.int32)})

    def larger(name, data):
        # The sizes (1, 2, 3) are BININT1 each, in a TUPLE3.
        return data.replace(b"K\x01K\x02K\x03\x87", b"K\x01K\x02K\xff\x87")

    refuses(rewritten(path, larger), "damaged")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_damage_ends_in_another_error(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "damage"
    folder.mkdir(exist_ok=True)
    path = saved(folder, recorded(record(7, IDS[2:]), record(3, IDS[:2])))
    with zipfile.ZipFile(path) as archive:
        length = archive.getinfo(f"{path.stem}/data.pkl").file_size
    places = st.tuples(st.integers(0, length - 1), st.integers(0, 255))
    changes = data.draw(st.lists(places, min_size=1, max_size=4))

    def change(name, found):
        if name != "data.pkl":
            return found
        found = bytearray(found)
        for place, byte in changes:
            found[place] = byte
        return bytes(found)

    with suppress(UserError):
        read_routing(rewritten(path, change))


# Answers


def array_file(ids):
    """vllm/utils/serial_utils.py, numpy2base64."""
    file = io.BytesIO()
    np.save(file, ids, allow_pickle=False)
    return base64.b64encode(file.getvalue()).decode()


def with_dense(ids):
    return np.concatenate([np.zeros((len(ids), 1, 2), ids.dtype), ids], axis=1)


def written(tmp_path, *answers):
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join(map(json.dumps, answers)))
    return path


FORMS = {
    "vllm 0.22 and later": {"choices": [{"text": "", "routed_experts": array_file(IDS)}]},
    "vllm, bytes, all layers": {
        "choices": [{"routed_experts": array_file(with_dense(IDS).astype(np.uint8))}]
    },
    "vllm 0.21": {
        "prompt_routed_experts": IDS[:2].tolist(),
        "choices": [{"routed_experts": IDS[2:].tolist()}],
    },
    "sglang /generate": {
        "text": "",
        "meta_info": {
            "routed_experts": base64.b64encode(with_dense(IDS).astype("<i4").tobytes()).decode()
        },
    },
    "sglang chat": {
        "choices": [{"message": {"content": ""}}],
        "sglext": {
            "routed_experts": base64.b64encode(with_dense(IDS).astype("<i4").tobytes()).decode()
        },
    },
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_answers_of_every_form(tmp_path, form):
    found = read_routing(written(tmp_path, form), MODEL)
    assert (found.model, found.layers, found.num_experts) == ("m", (1, 2), 4)
    np.testing.assert_array_equal(found.topk_ids, IDS.transpose(1, 0, 2))
    twice = read_routing(written(tmp_path, form, {"choices": []}, form), MODEL)
    assert twice.num_tokens == 6
    (tmp_path / "one.json").write_text(json.dumps([form], indent=1))
    assert read_routing(tmp_path / "one.json", MODEL).num_tokens == 3


def test_positions_that_a_cache_had_are_left_out(tmp_path):
    ids = np.concatenate([np.full((1, 2, 2), -1), np.zeros((1, 2, 2), int), IDS])
    form = {"prompt_routed_experts": ids.tolist()}
    assert read_routing(written(tmp_path, form), MODEL).num_tokens == 3


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"choices": [{"routed_experts": None}]}, "--enable-return-routed-experts"),
        ([], "no response"),
        ({"routed_experts": "%%%"}, "base64"),
        ({"routed_experts": base64.b64encode(b"123").decode()}, "3 bytes 24"),
        ({"routed_experts": base64.b64encode(b"\x93NUMPY").decode()}, "damaged"),
        ({"routed_experts": array_file(np.zeros(3, int))}, "num_tokens"),
        ({"routed_experts": array_file(IDS.astype(float))}, "num_tokens"),
        ({"routed_experts": array_file(IDS[:, :1])}, "1 layers m 3 2"),
        ({"routed_experts": array_file(IDS[:, :, :1])}, "1 experts per token m 2"),
        ({"routed_experts": array_file(IDS + 1)}, "expert 4 m 4"),
        ({"routed_experts": [[[1, 2], [3]]]}, "rows lengths"),
        ({"routed_experts": 7}, "num_tokens"),
        ({"routed_experts": {"a": 1}}, "num_tokens"),
        ({"routed_experts": np.ones_like(IDS).tolist()}, "expert twice"),
    ],
)
def test_answers_that_do_not_fit(tmp_path, answer, words):
    refuses(written(tmp_path, answer), words, MODEL)


def test_an_array_that_claims_to_be_large(tmp_path):
    data = base64.b64decode(array_file(IDS)).replace(b"(3, 2, 2)", b"(3, 2, 2000000000)"[:9])
    form = {"routed_experts": base64.b64encode(data.replace(b"(3, ", b"(9, ")).decode()}
    refuses(written(tmp_path, form), "damaged", MODEL)


def test_answers_need_their_model(tmp_path):
    refuses(written(tmp_path, FORMS["vllm 0.21"]), "--model")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "JSON"),
        ('{"a": 1}\n{"b"', "line 2"),
        ("[" * 500 + "]" * 500, "nested"),
        ("", "routing trace"),
    ],
)
def test_files_of_no_kind(tmp_path, text, words):
    path = tmp_path / "answers.json"
    path.write_text(text)
    refuses(path, words, MODEL)


def test_our_own_traces_are_read_as_before(tmp_path):
    trace = RoutingTrace(
        "m", 4, (1, 2), IDS.transpose(1, 0, 2).astype(np.int16), np.array([0, 0, 1])
    )
    write_trace(trace, tmp_path / "trace.npz")
    np.testing.assert_array_equal(read_routing(tmp_path / "trace.npz").topk_ids, trace.topk_ids)
    refuses(tmp_path / "none.npz", "No such file")
    refuses(tmp_path, "folder")
