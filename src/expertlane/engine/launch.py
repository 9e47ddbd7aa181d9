"""Starting ranks, checking options and a checkpoint, and estimating the size of the KV cache."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from expertlane.balance.holding import Placements
from expertlane.cost.memory import FREE_SHARE, PlacedModel
from expertlane.cost.step.operation import NumberTypes
from expertlane.engine.model.stored_tensors import StoredTensors
from expertlane.engine.ranks.commands import DescribeMachine, RankMachine
from expertlane.engine.ranks.local_ranks import LocalRanks
from expertlane.engine.ranks.node_ranks import NodeRanks
from expertlane.engine.ranks.pool import RankPool
from expertlane.engine.ranks.rank_settings import check_cpu_isa, check_num_ranks
from expertlane.engine.ranks.torchrun import (
    TorchrunNode,
    become_supervisor,
    end_with_torchrun,
    is_under_torchrun,
)
from expertlane.errors import CapacityError, SpecError, UserError
from expertlane.schedule.request import Limits
from expertlane.spec.deployment import INPUTS_OF_SCALE, Options
from expertlane.spec.engine_config import EngineConfig
from expertlane.spec.files import fill_closed
from expertlane.spec.hf_config import is_mxfp4, narrow_scheme, read_config
from expertlane.spec.layout import Layout, partition
from expertlane.spec.model import ModelConfig
from expertlane.spec.ranges import RANGES


def start_pool(config: EngineConfig, num_ranks: int | None = None) -> RankPool | None:
    """Start ranks on this machine, or on all nodes where torchrun has started this process.

    Args:
        config: what is asked of ranks: bounds, number type, instruction set, what to do about lost
            ones.
        num_ranks: None for those of its layout.

    Returns:
        The pool; None in those processes of torchrun that have nothing to do. In the first process
        of each other node this does not return: it becomes a supervisor.

    Raises:
        CapacityError: too many local ranks for this machine, or too few processes of torchrun.
        RankError: the ranks did not start.
        UserError: torchrun's variables do not fit together, or `cpu_isa` and `EXPERTLANE_BACKEND`.
    """
    num_ranks = config.layout.world_size if num_ranks is None else num_ranks
    given, cpu_isa = (config.timeout_s, config.dtype), config.cpu_isa
    oversubscribe, recovers = config.oversubscribe, config.on_failure != "stop"
    check_cpu_isa(cpu_isa)
    fill_closed()  # a fork server writes to standard error, and inherits files by number

    def local_pool(num: int) -> RankPool:
        check_num_ranks(num, oversubscribe=oversubscribe)
        ranks = LocalRanks(num, *given, cpu_isa=cpu_isa, recovers=recovers)
        return RankPool(ranks, config.timeout_s)

    if not is_under_torchrun():
        return local_pool(num_ranks)
    node = TorchrunNode.from_environment()
    if not node.is_supervisor:
        return None
    try:
        ranks_per_node = node.num_ranks(num_ranks)
    except CapacityError:
        if node.number > 0:
            return None  # the launcher says so
        raise
    oversubscribe |= node.num_processes > 1  # torchrun was told to start several
    if node.number > 0:
        become_supervisor(
            *(node, ranks_per_node, *given),
            oversubscribe=oversubscribe,
            cpu_isa=cpu_isa,
            rejoin_s=config.rejoin_s if recovers else 0.0,
        )
    end_with_torchrun()
    if node.meeting is None:
        return local_pool(ranks_per_node)
    check_num_ranks(ranks_per_node, oversubscribe=oversubscribe)
    ranks = NodeRanks(
        *(node.meeting, ranks_per_node, *given),
        cpu_isa=cpu_isa,
        recovers=recovers,
        rejoin_s=config.rejoin_s,
    )
    return RankPool(ranks, config.timeout_s)


def describe_ranks(pool: RankPool) -> list[RankMachine]:
    """[num_ranks]; the machine, device, kernels and transport of each rank.

    Raises:
        UserError: they do not all use the same kernels or transport. Experts move between ranks in
            their memory layout, which our kernels and torch do not share.
    """
    machines = pool.call(DescribeMachine())
    for rank, machine in enumerate(machines):
        ours, theirs = machines[0].kernels, machine.kernels
        if ours.split()[0] != theirs.split()[0]:
            raise UserError(
                f"rank 0 on {machines[0].host} computes with {ours}, but rank {rank} on "
                f"{machine.host} with {theirs}; set EXPERTLANE_BACKEND=torch on all nodes, or "
                "make them alike"
            )
        if machine.backend != machines[0].backend:
            raise UserError(
                f"rank 0 exchanges messages by {machines[0].backend}, but rank {rank} by "
                f"{machine.backend}; set EXPERTLANE_TRANSPORT=gloo on all nodes"
            )
    return machines


_NUM_SHOWN = 3


def check_checkpoint(
    model: ModelConfig, folder: Path, *, ignore_unused_tensors: bool, log: Callable[[str], None]
) -> ModelConfig:
    """Compare a checkpoint with its model, by the headers of its files.

    Args:
        ignore_unused_tensors: go on with a warning where the model has no use for some tensors.
        log: gets warnings, a line each; under torchrun those of the first process.

    Returns:
        The model that ranks are to load: its head is not tied to its embedding where the
        checkpoint has another head, as in transformers 5.

    Raises:
        SpecError: a tensor is missing, has a wrong shape, or is not used.
    """
    if is_under_torchrun() and os.environ["RANK"] != "0":  # all find the same; the first one prints
        log = _discard
    checkpoint = StoredTensors(folder, model)
    unused = checkpoint.check()
    if unused:
        text = f"{folder}: config.json has no use for {_listed(unused)}"
        if not ignore_unused_tensors:
            raise SpecError(
                f"{text}; to ignore them: --ignore-unused-tensors (ignore_unused_tensors=True)"
            )
        log(f"warning: {text}; ignoring them")
    if not checkpoint.has_head_of_its_own():
        return model
    log(
        f"warning: {folder}: config.json ties the output head to the embedding, but "
        "lm_head.weight is another; it is used"
    )
    return model.with_overrides(tie_word_embeddings=False)


def _discard(line: str) -> None:
    pass


def _listed(names: list[str]) -> str:
    shown, num_more = ", ".join(names[:_NUM_SHOWN]), len(names) - _NUM_SHOWN
    kind = "tensor" if len(names) == 1 else "tensors"
    return f"{kind} {shown}" + (f" and {num_more} more" if num_more > 0 else "")


_CPU_CACHE_SHARE = 0.5  # of the memory beside the weights: other programs need some too


@dataclass(frozen=True)
class LoadPlan:
    """A model for ranks to load: cut by a layout, placed, in its options' number types.

    Attributes:
        placements: [num_hidden_layers].
        checkpoint: the folder the weights are in; None where they are random.
    """

    model: ModelConfig
    layout: Layout
    options: Options
    placements: Placements
    checkpoint: Path | None = None

    def check_options(self, machines: Sequence[RankMachine]) -> None:
        """Refuse options that these ranks, this checkpoint or this layout cannot have.

        Args:
            machines: [world_size]; the machine of each rank.

        Raises:
            UserError: CUDA graphs, or a cache of float8, are asked for that these ranks cannot
                have, or float8 activations that they, the checkpoint or the layout cannot.
        """
        _check_graphs(self.options, machines)
        _check_cache(self.options, machines)
        _check_activations(self, machines)

    def placed(self, machine: RankMachine) -> PlacedModel:
        """The parts of the model on each rank, in the number types of this machine."""
        return PlacedModel(self.model, self.layout, self._types(machine), self.placements)

    def _types(self, machine: RankMachine) -> NumberTypes:
        """The number types of a rank's weights, hidden states, keys and values."""
        if not machine.keeps_narrow:
            return NumberTypes.of_engine(machine.dtype, self.options)
        config = {} if self.checkpoint is None else read_config(self.checkpoint)
        if machine.keeps_mxfp4 and is_mxfp4(config) and self.layout.etp == 1:  # cut: widened
            return NumberTypes.kept_as(machine.dtype, self.options, "mxfp4")
        scheme = narrow_scheme(config)
        kept = None if scheme is None else scheme.type
        return NumberTypes.kept_as(machine.dtype, self.options, kept)

    def fit(
        self, limits: Limits, seen: Sequence[RankMachine], cpu_cache_share: float = 1.0
    ) -> Limits:
        """The limits with as many blocks, up to `num_blocks`, as every rank has room for.

        Args:
            seen: [num_ranks]; the machine of each rank, those of the layout first.
            cpu_cache_share: the share of the free memory that the cache may take on a CPU; see
                `PlacedModel.fit_cache`.

        Raises:
            CapacityError: not even one sequence fits; it names the bytes needed and those free.
            UserError: the options do not suit these ranks; see `check_options`.
        """
        seen = seen[: self.layout.world_size]
        self.check_options(seen)

        def own_bytes(of_rank: RankMachine) -> float:
            return of_rank.free_bytes / of_rank.num_sharing(self.layout.world_size)

        tightest = min(seen, key=own_bytes)
        share = 1.0 if tightest.on_gpu else cpu_cache_share
        return self.placed(tightest).fit_cache(limits, FREE_SHARE * own_bytes(tightest), share)

    def with_blocks(
        self, wanted: Limits, num_blocks: int | None, seen: Sequence[RankMachine]
    ) -> Limits:
        """The limits with `num_blocks`; with None, blocks for `max_num_seqs` sequences, or less.

        Those are as many as fit on CPUs; on GPUs an upper bound, since more is measured later.

        Args:
            wanted: its number of blocks counts where `num_blocks` is given.

        Raises:
            CapacityError: the model and one sequence, or `num_blocks`, do not fit into memory.
        """
        if num_blocks is not None:
            fitting = self.fit(wanted, seen)
            check_num_blocks(num_blocks, fitting)
            return fitting
        enough = wanted.max_num_seqs * wanted.blocks_for(wanted.max_model_len)
        wanted = replace(wanted, num_blocks=min(enough, int(RANGES["num_blocks"].high)))
        fitting = self.fit(wanted, seen, _CPU_CACHE_SHARE)
        return wanted if seen[0].on_gpu else fitting


def check_num_blocks(num_blocks: int, fitting: Limits) -> None:
    """Refuse more blocks than there is memory for.

    Raises:
        CapacityError: there are; it names both numbers.
    """
    if fitting.num_blocks < num_blocks:
        raise CapacityError(
            f"num_blocks is {num_blocks} but there is memory for {fitting.num_blocks}"
        )


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


def _check_activations(plan: LoadPlan, machines: Sequence[RankMachine]) -> None:
    """Refuse float8 activations: no float8 matrix, no such GPU, or a layout that cuts scales."""
    model, layout, checkpoint = plan.model, plan.layout, plan.checkpoint
    if plan.options.activations != "float8":
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
