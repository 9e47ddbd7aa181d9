"""The environment variables of ranks, and the limit of their number on a node."""

import os
import socket

from expertlane.engine.ops.asked_kernels import asked_backend
from expertlane.engine.ops.host import num_cores
from expertlane.errors import CapacityError, UserError
from expertlane.spec.names import CpuIsa

MAX_RANKS_PER_CORE = 32
_SPIN_COUNT = "10000"  # some 0.2 ms


def check_num_ranks(num_ranks: int, *, oversubscribe: bool) -> None:
    """Refuse a number of local ranks that is far too large for the cores.

    Raises:
        CapacityError: more than `MAX_RANKS_PER_CORE` for each core, without `oversubscribe`.
    """
    limit = MAX_RANKS_PER_CORE * num_cores()
    if num_ranks > limit and not oversubscribe:
        raise CapacityError(
            f"{num_ranks} ranks are more than {MAX_RANKS_PER_CORE} × {num_cores()} cores; "
            f"use at most {limit}, or start with --oversubscribe"
        )


def check_cpu_isa(cpu_isa: CpuIsa | None) -> None:
    """Refuse a choice of our kernels where the environment asks for torch's.

    Raises:
        UserError: both are asked for, or the environment's backend is not valid.
    """
    if cpu_isa is not None and asked_backend() == "torch":
        raise UserError(
            f"--cpu-isa (or EXPERTLANE_CPU_ISA) {cpu_isa} is for kernels that "
            "EXPERTLANE_BACKEND=torch leaves out; give one of the two"
        )


def rank_environment(cpu_isa: CpuIsa | None, *, on_one_node: bool) -> dict[str, str]:
    """The environment variables of ranks.

    They choose the kernels, since every process that computes chooses for itself. On one node, gloo
    uses loopback, whatever the host's name resolves to. A thread of a parallel kernel spins for the
    others for a short time, then sleeps: libgomp's default spins for milliseconds, on a core that
    other processes need, above all the launcher.
    """
    environment = dict(os.environ)
    environment.setdefault("GOMP_SPINCOUNT", _SPIN_COUNT)
    if cpu_isa is not None:
        environment["EXPERTLANE_CPU_ISA"] = cpu_isa
    interfaces = {name for _, name in socket.if_nameindex()} if on_one_node else ()
    for loopback in ("lo", "lo0"):
        if loopback in interfaces:
            environment.setdefault("GLOO_SOCKET_IFNAME", loopback)
    return environment
