"""Environment variables that choose kernels; read without torch, so that launchers refuse early."""

import os

from expertlane.errors import UserError


def asked_backend() -> str | None:
    """`EXPERTLANE_BACKEND`; None where it is not set.

    Raises:
        UserError: there is no such backend.
    """
    value = os.environ.get("EXPERTLANE_BACKEND") or None
    if value not in (None, "cpu", "cuda", "torch"):
        raise UserError(f"EXPERTLANE_BACKEND is {value!r}; valid: cpu, cuda, torch")
    return value


def asked_set() -> str | None:
    """`EXPERTLANE_CPU_ISA`, not checked; None where it is not set."""
    return os.environ.get("EXPERTLANE_CPU_ISA") or None
