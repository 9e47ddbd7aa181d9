"""Where ranks compute and how they talk, on machines with made-up GPUs."""

import pytest
import torch

from cli.screen import telling
from expertlane.engine.ops import backend as module
from expertlane.engine.ops.backend import backend_of_cpu, choose_platform
from expertlane.engine.ops.torch_backend import TorchBackend
from expertlane.errors import UserError

SHARING = "; EXPERTLANE_TRANSPORT=shared_memory lets ranks share GPUs"


@pytest.fixture
def gpus(monkeypatch):
    """Sets how many there are; gives the devices that were chosen."""
    for variable in ("EXPERTLANE_BACKEND", "EXPERTLANE_CPU_ISA", "EXPERTLANE_TRANSPORT"):
        monkeypatch.delenv(variable, raising=False)
    backend_of_cpu.cache_clear()
    chosen = []

    def have(num):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: num > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: num)
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device.index}")
        monkeypatch.setattr(module, "backend_of_cuda", lambda device: (TorchBackend(), "made up"))
        return chosen

    yield have
    backend_of_cpu.cache_clear()


def places(num_ranks, **arguments):
    """Device and ranks on it, of each rank; what they have in common."""
    found = [choose_platform(rank, num_ranks, None, **arguments) for rank in range(num_ranks)]
    (common,) = {(each.transport, each.dtype, each.is_staged) for each in found}
    return [(str(each.device), each.ranks_on_device) for each in found], common


def test_a_gpu_for_each_rank(gpus):
    chosen = gpus(3)
    of_ranks, common = places(2, shares_memory=True)
    assert of_ranks == [("cuda:0", 1), ("cuda:1", 1)]
    assert common == ("nccl", torch.float16, False)
    assert [str(each) for each in chosen] == ["cuda:0", "cuda:1"]
    assert choose_platform(1, 2, "bfloat16").device_name == "card 1"
    assert choose_platform(1, 2, None).num_idle_gpus == 0


@pytest.mark.parametrize("num_gpus", [0, 1, 2])
def test_too_few_gpus_are_not_used_unless_asked(gpus, num_gpus):
    chosen = gpus(num_gpus)
    platform = choose_platform(0, 3, None, shares_memory=True)
    assert (str(platform.device), platform.dtype, platform.is_staged) == (
        "cpu",
        torch.float32,
        False,
    )
    assert platform.transport.startswith("shared_memory")
    assert (platform.num_idle_gpus, platform.ranks_on_device, chosen) == (num_gpus, 1, [])


@pytest.mark.parametrize(
    ("num_gpus", "expected"),
    [
        (1, [("cuda:0", 3)] * 3),
        (2, [("cuda:0", 2), ("cuda:1", 1), ("cuda:0", 2)]),
        (3, [("cuda:0", 1), ("cuda:1", 1), ("cuda:2", 1)]),
    ],
)
@pytest.mark.parametrize("transport", ["gloo", "shared_memory"])
def test_a_transport_through_hosts_lets_ranks_share(
    gpus, monkeypatch, num_gpus, expected, transport
):
    gpus(num_gpus)
    monkeypatch.setenv("EXPERTLANE_TRANSPORT", transport)
    of_ranks, (name, dtype, is_staged) = places(3, shares_memory=True)
    assert of_ranks == expected
    assert (dtype, is_staged) == (torch.float16, True)
    assert name.startswith(transport)
    assert name.endswith(", staged on the host")


def test_several_nodes_stage_too(gpus, monkeypatch):
    gpus(1)
    monkeypatch.setenv("EXPERTLANE_TRANSPORT", "shared_memory")
    _, (name, *_) = places(2, shares_memory=True, several_nodes=True)
    assert name.endswith(", gloo between nodes, staged on the host")


def test_a_rank_that_is_ahead_of_its_layout_has_a_gpu_that_exists(gpus):
    gpus(1)
    platform = choose_platform(1, 1, None)
    assert (str(platform.device), platform.ranks_on_device) == ("cuda:0", 1)


@pytest.mark.parametrize("transport", ["", "gloo"])
def test_a_cpu_that_was_asked_for(gpus, monkeypatch, transport):
    """With kernels or without: then that is what is refused."""
    gpus(4)
    monkeypatch.setenv("EXPERTLANE_BACKEND", "cpu")
    monkeypatch.setenv("EXPERTLANE_TRANSPORT", transport)
    if backend_of_cpu()[1]:
        pytest.skip("our kernels are not available")
    platform = choose_platform(0, 2, None, shares_memory=True)
    assert (str(platform.device), platform.num_idle_gpus) == ("cpu", 0)


@pytest.mark.parametrize(("num_gpus", "sharing"), [(0, ""), (1, SHARING)])
@pytest.mark.parametrize(
    ("backend", "dtype", "message"),
    [
        (
            "cuda",
            None,
            "EXPERTLANE_BACKEND=cuda GPU rank cpu torch",
        ),
        ("", "float16", "dtype float16 GPU rank float32 bfloat16"),
    ],
)
def test_what_needs_a_gpu_for_each_rank(
    gpus, monkeypatch, num_gpus, sharing, backend, dtype, message
):
    gpus(num_gpus)
    monkeypatch.setenv("EXPERTLANE_BACKEND", backend)
    with pytest.raises(UserError, match=telling(f"{message} {sharing}")):
        choose_platform(0, 2, dtype)


def test_kernels_are_demanded_of_shared_gpus_too(gpus, monkeypatch):
    gpus(1)
    monkeypatch.setenv("EXPERTLANE_TRANSPORT", "gloo")
    monkeypatch.setenv("EXPERTLANE_BACKEND", "cuda")
    with pytest.raises(UserError, match=telling("kernels made up")):
        choose_platform(0, 2, None)
    monkeypatch.setenv("EXPERTLANE_BACKEND", "torch")
    assert str(choose_platform(0, 2, None).device) == "cuda:0"


def test_a_transport_that_is_none(gpus, monkeypatch):
    gpus(2)
    monkeypatch.setenv("EXPERTLANE_TRANSPORT", "nccl")
    with pytest.raises(
        UserError, match="EXPERTLANE_TRANSPORT is 'nccl'; valid: shared_memory, gloo"
    ):
        choose_platform(0, 2, None)
