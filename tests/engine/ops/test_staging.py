"""Buffers take turns, and none is filled before what is in it has arrived; on a made-up device."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from expertlane.engine.ops.device import STAGED_BYTES, Staging, copier_to


class Device:
    """Copies arrive when an event after them is waited for."""

    def __init__(self):
        self.told = []

    def new_buffer(self, num_bytes):
        self.told.append(f"buffer of {num_bytes}")
        return torch.full((num_bytes,), 0xFF, dtype=torch.uint8)

    def new_event(self):
        return MadeUpEvent(self, sum(isinstance(each, str) for each in self.told))


class MadeUpEvent:
    def __init__(self, device, number):
        self.device, self.number = device, number

    def record(self):
        self.device.told.append(("record", self.number))

    def synchronize(self):
        self.device.told.append(("wait", self.number))


def test_buffers_take_turns():
    device = Device()
    staging = Staging(device.new_buffer, device.new_event)
    for each in range(5):
        to = torch.empty(3)
        staging.copy(to, torch.full((3,), float(each)))
        assert to.tolist() == [each] * 3
    buffers, steps = device.told[:2], device.told[2:]
    assert buffers == [f"buffer of {STAGED_BYTES}"] * 2
    assert steps == [(what, 1 + i % 2) for i in range(5) for what in ("wait", "record")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.int32])
def test_types_and_shapes(dtype):
    """Into another type, apart in memory, of nothing, and of more than a buffer holds."""
    device = Device()
    staging = Staging(device.new_buffer, device.new_event)
    values = (torch.arange(24).view(4, 6) % 7).to(dtype)
    for to in (torch.empty(4, 6), torch.empty(6, 4).t(), torch.empty(4, 6, dtype=torch.float16)):
        staging.copy(to, values[:, :])
        assert torch.equal(to, values.to(to.dtype))
    staging.copy(torch.empty(4, 3), values[:, ::2])
    staging.copy(torch.empty(0, 6), values[:0])
    num_steps = len(device.told)
    many = torch.arange(STAGED_BYTES // 4 + 1, dtype=torch.float32)
    to = torch.empty_like(many)
    staging.copy(to, many)
    assert torch.equal(to, many)
    assert len(device.told) == num_steps


def test_a_cpu_needs_no_staging():
    to = torch.empty(2)
    copier_to(torch.device("cpu"))(to, torch.ones(2))
    assert to.tolist() == [1, 1]


def test_types_change_on_the_device():
    """There as they are first, or torch would widen them on the host."""
    asked = []

    class Asked(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket.__name__ in ("copy_", "_to_copy"):
                asked.append([each.dtype for each in args if isinstance(each, torch.Tensor)])
            return func(*args, **kwargs or {})

    staging = Staging(lambda num: torch.empty(num, dtype=torch.uint8), Device().new_event)
    to = torch.empty(3, device="meta")
    with Asked():
        staging.copy(to, torch.ones(3, dtype=torch.bfloat16))
    assert asked[-2:] == [[torch.bfloat16], [torch.float32, torch.bfloat16]]
