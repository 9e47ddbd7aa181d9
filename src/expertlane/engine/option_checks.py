"""Checks of a deployment's options, before its ranks load weights."""

from collections.abc import Sequence
from pathlib import Path

from expertlane.engine.ranks.commands import RankMachine
from expertlane.errors import UserError
from expertlane.spec.deployment import INPUTS_OF_SCALE, Options
from expertlane.spec.hf_config import narrow_scheme, read_config
from expertlane.spec.layout import Layout, partition
from expertlane.spec.model import ModelConfig


def check_options(
    options: Options,
    model: ModelConfig,
    layout: Layout,
    machines: Sequence[RankMachine],
    checkpoint: Path | None,
) -> None:
    """Refuse options that these ranks, this checkpoint or this layout cannot have.

    Args:
        machines: of the layout's ranks.
        checkpoint: the folder the weights are in.

    Raises:
        UserError: CUDA graphs, or a cache of float8, are asked for that these ranks cannot have, or
            float8 activations that they, the checkpoint or the layout cannot.
    """
    _check_graphs(options, machines)
    _check_cache(options, machines)
    _check_activations(options, model, layout, machines, checkpoint)


def _check_graphs(options: Options, machines: Sequence[RankMachine]) -> None:
    """Refuse CUDA graphs that were asked for where steps cannot be recorded."""
    if not options.cuda_graphs:
        return
    why_not = ""
    for machine in machines:
        if not machine.on_gpu:
            why_not = "need a GPU for every rank"
        elif "expertlane" not in machine.kernels:
            why_not = f"need our GPU kernels, but a rank computes with {machine.kernels}"
    if why_not:
        raise UserError(
            f"CUDA graphs (--cuda-graphs on, cuda_graphs=True) {why_not}; valid here: auto or off "
            "(in Python None or False; in a file false, or without cuda_graphs)"
        )


def _check_cache(options: Options, machines: Sequence[RankMachine]) -> None:
    """Refuse a cache of float8 where attention cannot read it."""
    if options.kv_dtype != "float8":
        return
    for machine in machines:
        if not machine.reads_float8:
            raise UserError(
                f"a float8 KV cache (--kv-dtype float8, kv_dtype='float8') needs GPUs whose Triton "
                f"reads float8, from compute capability 8.9 on; {machine.device} on "
                f"{machine.host} does not; valid here: model"
            )


def _check_activations(
    options: Options,
    model: ModelConfig,
    layout: Layout,
    machines: Sequence[RankMachine],
    checkpoint: Path | None,
) -> None:
    """Refuse float8 activations that no matrix takes, that ranks cannot have, or would cut."""
    if options.activations != "float8":
        return
    asked = "activations in float8 (--activations float8, activations='float8')"
    scheme = None if checkpoint is None else narrow_scheme(read_config(checkpoint))
    if scheme is None or scheme.type != "float8":
        raise UserError(
            f"{asked} are for matrices stored in float8; {checkpoint or model.name} has none; "
            "valid here: model"
        )
    for machine in machines:
        if not machine.multiplies_float8:
            raise UserError(
                f"{asked} need GPUs whose Triton multiplies float8, from compute capability 8.9 "
                f"on; {machine.device} on {machine.host} does not; valid here: model"
            )
    cut = {
        "attention's output": (model.attention_output_size, layout.tp),
        "experts' inner width": (model.moe_intermediate_size, layout.etp),
        "the shared expert's inner width": (model.shared_expert_intermediate_size, layout.tp),
        "dense layers' inner width": (model.intermediate_size, layout.tp),
    }
    for what, (width, num_parts) in cut.items():
        if any(part.start % INPUTS_OF_SCALE for part in partition(width, num_parts) if part):
            raise UserError(
                f"{asked} have a scale for every {INPUTS_OF_SCALE} inputs, but layout {layout} "
                f"cuts {what} of {width} in {num_parts}; valid: parts of whole {INPUTS_OF_SCALE}s"
            )
