from dataclasses import replace

import numpy as np
import pytest

from cli.screen import telling
from expertlane.balance.trace import RoutingTrace, read_trace, write_trace
from expertlane.errors import SpecError, UserError
from expertlane.spec.model import PRESETS

IDS = np.array([[[0, 1], [2, 1], [3, 0]], [[1, 3], [3, 1], [0, 1]]], dtype=np.int16)
STEP = np.array([0, 0, 5])
MODEL = replace(PRESETS["paper-tiny"], name="m", num_experts=4)
TRACE = RoutingTrace("m", 4, (0, 2), IDS, STEP)


def refuses(path, message):
    """One line that tells of all words of the message."""
    with pytest.raises(UserError, match=telling(message)) as caught:
        read_trace(path)
    assert "\n" not in str(caught.value)


def check_same(one, other):
    assert (one.model, one.num_experts, one.layers) == (
        other.model,
        other.num_experts,
        other.layers,
    )
    np.testing.assert_array_equal(one.topk_ids, other.topk_ids)
    np.testing.assert_array_equal(one.step, other.step)
    assert one.topk_ids.dtype == other.topk_ids.dtype


def test_written_and_read_back(tmp_path):
    path = tmp_path / "trace"  # no name is added to
    write_trace(TRACE, path)
    check_same(read_trace(path), TRACE)
    assert [each.name for each in tmp_path.iterdir()] == ["trace"]


def test_counts_by_hand():
    np.testing.assert_array_equal(TRACE.load(), [[2, 2, 1, 1], [1, 3, 0, 2]])
    assert (TRACE.num_tokens, TRACE.num_experts_per_tok) == (3, 2)


def test_gathered_step_by_step(tmp_path):
    parts = [{0: IDS[0, :1].astype(np.int64), 2: IDS[1, :2]}, {0: IDS[0, 1:2]}]
    steps = [(5, [{2: IDS[1, 2:], 0: IDS[0, 2:]}]), (0, parts)]
    write_trace(RoutingTrace.of_steps(MODEL, [0, 2], steps), tmp_path / "trace.npz")
    check_same(read_trace(tmp_path / "trace.npz"), TRACE)
    twice = [steps[0], (0, parts), (5, [])]  # a step of two replicas, one without tokens
    check_same(RoutingTrace.of_steps(MODEL, [0, 2], twice), TRACE)


@pytest.mark.parametrize("steps", [[], [0, 1]])
def test_no_tokens(tmp_path, steps):
    nothing = {layer: np.zeros((0, 2), dtype=np.int64) for layer in (0, 2)}
    trace = RoutingTrace.of_steps(MODEL, [0, 2], [(step, [nothing]) for step in steps])
    write_trace(trace, tmp_path / "trace.npz")
    trace = read_trace(tmp_path / "trace.npz")
    assert trace.topk_ids.shape == (2, 0, 2)
    np.testing.assert_array_equal(trace.load(), np.zeros((2, 4)))


def test_the_layers_of_a_step_must_agree():
    with pytest.raises(ValueError, match="same shape"):
        RoutingTrace.of_steps(MODEL, [0, 2], [(3, [{0: IDS[0], 2: IDS[1, :1]}])])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 3}, "expert 3 experts 0 2"),
        ({"topk_ids": IDS - np.int16(1)}, "expert -1"),
        ({"topk_ids": np.zeros_like(IDS)}, "expert twice"),
        ({"topk_ids": IDS[0]}, "topk_ids int16 3 2"),
        ({"topk_ids": IDS.astype(np.float32)}, "topk_ids float32"),
        ({"topk_ids": IDS[:1]}, "2 layers topk_ids 1"),
        ({"topk_ids": IDS[:, :, :0]}, "0 experts 1 4"),
        ({"layers": (2, 0)}, "layers indices"),
        ({"layers": (-1, 0)}, "layers -1 0 1,023"),
        ({"layers": ()}, "layers indices"),
        ({"step": STEP[:2]}, "3 tokens"),
        ({"step": STEP[::-1]}, "step falls"),
        ({"step": STEP.astype(np.float64)}, "step float64"),
        ({"num_experts": 0}, "num_experts 0"),
    ],
)
def test_what_is_no_trace(tmp_path, changes, message):
    fields = {"model": "m", "num_experts": 4, "layers": (0, 2), "topk_ids": IDS, "step": STEP}
    fields |= changes
    with pytest.raises(SpecError, match=telling(message)):
        RoutingTrace(**fields)
    path = tmp_path / "trace.npz"
    np.savez(path, schema_version=1, **fields)
    refuses(path, f"{path}: ")


def saved(**changes):
    fields = {"schema_version": 1, "model": "m", "num_experts": 4, "layers": [0, 2]}
    return fields | {"topk_ids": IDS, "step": STEP} | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 2}, "schema_version 2 reads 1"),
        ({"schema_version": "1"}, "schema_version shape"),
        ({"schema_version": np.arange(99)}, "schema_version int64 99"),
        ({"model": 7}, "model int64"),
        ({"model": "a\nb"}, "model one line"),
        ({"model": "\ud800"}, "model one line"),
        ({"num_experts": [4]}, "num_experts int64"),
        ({"num_experts": 4.5}, "num_experts float64"),
        ({"layers": 0}, "layers int64"),
    ],
)
def test_a_file_with_other_values(tmp_path, changes, message):
    np.savez(tmp_path / "trace.npz", **saved(**changes))
    refuses(tmp_path / "trace.npz", message)


def test_damaged_files(tmp_path):
    path = tmp_path / "trace.npz"
    write_trace(TRACE, path)
    whole = path.read_bytes()
    middle = len(whole) // 2
    for damaged in (b"", b"text", whole[:middle], whole[:-1], b"PK\x03\x04" + bytes(50)):
        path.write_bytes(damaged)
        refuses(path, "trace.npz damaged")
    with path.open("wb") as file:
        np.save(file, IDS)
    refuses(path, "routing trace damaged")
    np.savez(path, topk_ids=IDS)
    refuses(path, "lacks schema_version")
    np.savez(path, **saved(model=np.array([object()])))
    refuses(path, "routing trace damaged")
    refuses(tmp_path / "none.npz", "none.npz No such file")
    refuses(tmp_path, "folder")


@pytest.mark.parametrize(
    ("header", "offset", "bit"),
    [
        (b"PK\x01\x02", 8, 1),  # the flag that says it is encrypted, in the list of files
        (b"PK\x01\x02", 8, 32),  # and that it is a patch
        (b"PK\x01\x02", 10, 64),  # another kind of compression
    ],
)
def test_a_flipped_bit_of_the_archive(tmp_path, header, offset, bit):
    path = tmp_path / "trace.npz"
    write_trace(TRACE, path)
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(header) + offset] ^= bit
    path.write_bytes(damaged)
    refuses(path, "trace.npz damaged")


def test_a_shape_beyond_all_memory(tmp_path):
    path = tmp_path / "trace.npz"
    np.savez(path, **saved(step=np.zeros(3, dtype=np.int64)))
    shape = b"'shape': (3,), }" + b" " * 20
    whole = path.read_bytes()
    assert shape in whole
    path.write_bytes(whole.replace(shape, f"'shape': ({10**17},), }}".encode().ljust(len(shape))))
    refuses(path, "trace.npz damaged")


def test_every_flipped_byte_is_found_or_harmless(tmp_path):
    path = tmp_path / "trace.npz"
    write_trace(TRACE, path)
    whole = path.read_bytes()
    num_found = 0
    for position in range(0, len(whole), 7):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        try:
            trace = read_trace(path)
        except UserError:  # any other error fails the test
            num_found += 1
        else:
            assert trace.topk_ids.tolist() == TRACE.topk_ids.tolist()
            assert trace.step.tolist() == TRACE.step.tolist()
    assert num_found
