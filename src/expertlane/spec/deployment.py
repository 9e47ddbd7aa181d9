"""A deployment: a name, a layout, and the options it runs with."""

from dataclasses import dataclass, field, replace
from typing import Literal

from expertlane.errors import SpecError
from expertlane.spec.dispatch import (
    DISPATCH_FORMS,
    DispatchForm,
    DispatchMode,
    DispatchTable,
    dispatch_forms,
)
from expertlane.spec.layout import Layout
from expertlane.spec.names import Phase
from expertlane.spec.ranges import Strict, shown, take_fields

MicroBatchSchedule = Literal["drained", "rotating"]
DispatchChoice = Literal[DispatchForm, "auto"]
OverlapChoice = bool | Literal["auto"]
PayloadType = Literal["model", "bfloat16", "float8"]
WeightsType = Literal["model", "int8"]
KVCacheType = Literal["model", "float8"]
ActivationsType = Literal["model", "float8"]
INPUTS_OF_SCALE = 128  # of weights that are rounded while loading, and of float8 activations
INT8_FOLDER = "expertlane-int8"  # in a checkpoint's, where such weights are kept
PlacementMethod = Literal["linear", "round_robin", "load"]
CopyMethod = Literal["nearest", "balanced"]


MOST_IN_GRAPHS = 1024  # sequences; beyond, a step takes longer than its launches
_BY = 8


@dataclass(frozen=True)
class GraphLimits:
    """Limits of decode steps that are recorded as CUDA graphs.

    Attributes:
        max_num_seqs: sequences of a data-parallel rank; above `MOST_IN_GRAPHS` there is no graph.
        max_positions: positions of a sequence.
    """

    max_num_seqs: int
    max_positions: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of sequences for which there are graphs, ascending.

        1, 2, 4, 8, then by 8, and above 128 by an eighth of the last power of two: at most 43.
        """
        most = min(self.max_num_seqs, MOST_IN_GRAPHS)
        sizes = [size for size in (1, 2, 4) if size < most]
        size = _BY
        while size < most:
            sizes.append(size)
            size += max(_BY, 1 << size.bit_length() - 4)
        return *sizes, most


@dataclass(frozen=True)
class Options(Strict):
    """Options of a deployment.

    Attributes:
        overlap: two-batch overlap: a rank's batch is split in two, and one half computes while
            the other half's tokens travel. `auto`: where that is faster, as `dispatch`'s.
        num_micro_batches: parts a step's batch is cut into for the pipeline.
        micro_batch_schedule: `drained`: a step's micro-batches all finish before the next step
            begins; `rotating`: each micro-batch starts its next token as soon as it has the
            last one, so the pipeline never runs empty.
        dispatch: how tokens travel to experts, one of `DISPATCH_FORMS`; or `auto`: the fastest for
            a step's number of tokens, by a table measured once at the start.
        prefill_dispatch: the form of steps that hold prompts; None for `dispatch` in all steps.
        payload: the type in which hidden states travel to experts: `model`: the model's own;
            `bfloat16`; `float8`: eight bits with a scale for every 128 values. Results come back in
            the model's. Rounding changes what a deployment computes, by an error that is measured.
        weights: the type in which ranks keep matrices: `model`: as they are stored, if in one byte,
            else the model's own; `int8`: eight bits with a scale for every 128 inputs. Routers,
            norms, embeddings and biases are not rounded.
        activations: the type in which matrices stored in float8 get their inputs: `model`: the
            model's own; `float8`: each token's inputs are rounded to eight bits with a scale for
            every 128, whatever batch it is in. Other matrices get theirs as they are.
        kv_dtype: the type of keys and values in the cache: `model`: the model's own; `float8`:
            eight bits with a scale for every key and value of a head. A step computes with what it
            has just rounded, so that results do not depend on how a prompt was cut.
        cache_int8: what `weights` rounds is kept in the checkpoint's folder, and read from there by
            later starts.
        placement: which experts a rank holds: `linear`: consecutive ones; `round_robin`; `load`:
            by the load of earlier tokens, hot ones several times, in each layer as
            `balance.planner.plan_placement` does it. The cluster model has it; an engine comes to
            it by `rebalance_steps`, or begins with a `placement_file`.
        placement_file: a placement written by `expertlane balance`, in place of these.
        copies: which copy of a redundant expert computes a token: `nearest`: one on the token's own
            rank, else on its node, else any, in turns; `balanced`: in every step tokens are shared
            among copies anew, so that the fullest rank has least, in phases where that pays.
        rebalance_steps: experts move while requests run: after so many steps they are rebalanced
            by the load of those steps, if that pays over as many more; 0 for never.
        num_redundant_experts: copies beside each MoE layer's experts, in the placement's order.
        cuda_graphs: decode steps are recorded once and launched as one; None where ranks have GPUs
            and our kernels.

    Raises:
        SpecError: a value is not valid.
    """

    overlap: OverlapChoice = False
    num_micro_batches: int = 1
    micro_batch_schedule: MicroBatchSchedule = "drained"
    dispatch: DispatchChoice = "all_to_all"
    prefill_dispatch: DispatchForm | None = None
    payload: PayloadType = "model"
    weights: WeightsType = "model"
    activations: ActivationsType = "model"
    kv_dtype: KVCacheType = "model"
    cache_int8: bool = False
    placement: PlacementMethod = "linear"
    placement_file: str | None = None
    num_redundant_experts: int = 0
    copies: CopyMethod = "nearest"
    rebalance_steps: int = 0
    cuda_graphs: bool | None = None

    def __post_init__(self) -> None:
        take_fields(self)
        if not isinstance(self.placement_file, str | None):
            raise SpecError(f"placement_file is {shown(self.placement_file)}; it must be a path")
        if self.cache_int8 and self.weights != "int8":
            raise SpecError(
                f"cache_int8 keeps matrices that are rounded to int8, but weights are "
                f"{self.weights!r}; give weights='int8' (--weights int8) too"
            )
        if self.activations == "float8" and self.weights != "model":
            raise SpecError(
                "activations in float8 are for matrices that are stored in float8, but weights are "
                f"{self.weights!r}; give one of them"
            )
        if self.placement_file is not None and (
            self.num_redundant_experts or self.placement != "linear"
        ):
            raise SpecError(
                "placement_file already names each expert's rank; give no placement or redundant "
                "experts"
            )
        if not isinstance(self.overlap, bool | str) or self.overlap not in (True, False, "auto"):
            raise SpecError(f"overlap is {shown(self.overlap)}; it must be true, false or 'auto'")
        if self.prefill_dispatch is not None and self.dispatch == "auto":
            raise SpecError(
                f"prefill_dispatch is {self.prefill_dispatch}, but dispatch is auto, which picks a "
                "form for every step; give one of them"
            )

    @property
    def rounded(self) -> tuple[str, ...]:
        """The numbers that are rounded, without those of `payload`."""
        are_rounded = {
            "weights": self.weights == "int8",
            "inputs of matrices": self.activations == "float8",
            "keys and values": self.kv_dtype == "float8",
        }
        return tuple(numbers for numbers, are in are_rounded.items() if are)

    @property
    def is_by_load(self) -> bool:
        """True if experts are placed by their load, or moved by it."""
        moves = self.rebalance_steps > 0 and self.placement_file is None
        return moves or self.placement == "load"

    @property
    def is_timed(self) -> bool:
        """True if the dispatch form or overlap is chosen by a table timed at the start."""
        return "auto" in (self.dispatch, self.overlap)

    @property
    def fixed_table(self) -> DispatchTable | None:
        """The table that always chooses what was asked for; None where that is timed."""
        if self.dispatch == "auto" or self.overlap == "auto":
            return None
        return DispatchTable.fixed(self.dispatch, self.overlap, self.prefill_dispatch)

    @property
    def is_by_node(self) -> bool:
        """True if a form was asked for that needs equally many ranks on every node."""
        forms = (self.dispatch, self.prefill_dispatch)
        asked = [form for form in forms if form is not None and form != "auto"]
        return any(DISPATCH_FORMS[form].by_node for form in asked)

    def of_phase(self, phase: Phase) -> "Options":
        """The options of steps of one phase, with its dispatch form."""
        if self.prefill_dispatch is None:
            return self
        form = self.prefill_dispatch if phase is Phase.PREFILL else self.dispatch
        return replace(self, dispatch=form, prefill_dispatch=None)

    def forms(self, layout: Layout, ranks_per_node: int) -> tuple[DispatchForm, ...]:
        """The dispatch forms that steps may take."""
        if self.dispatch == "auto":
            return dispatch_forms(layout, ranks_per_node)
        prefill = (self.prefill_dispatch,) if self.prefill_dispatch else ()
        return tuple(dict.fromkeys((self.dispatch, *prefill)))

    def modes(self, layout: Layout, ranks_per_node: int) -> tuple[DispatchMode, ...]:
        """Modes that steps may take, without overlap first; one rank has nothing to overlap."""
        overlaps: tuple[bool, ...] = (False, True) if layout.stage_size > 1 else (False,)
        if self.overlap != "auto":
            overlaps = (self.overlap,)
        forms = self.forms(layout, ranks_per_node)
        return tuple(DispatchMode(form, overlap) for overlap in overlaps for form in forms)

    def __str__(self) -> str:
        num_parts, num = self.num_micro_batches, self.num_redundant_experts
        is_auto = self.dispatch == "auto"
        prefill = self.prefill_dispatch if self.prefill_dispatch != self.dispatch else None
        placement = "placed by load" if self.placement == "load" else _hyphened(self.placement)
        parts = {
            f"{num_parts} micro-batches {self.micro_batch_schedule}": num_parts > 1,
            "auto overlap" if self.overlap == "auto" else "overlap": bool(self.overlap),
            "auto dispatch" if is_auto else _hyphened(self.dispatch): self.dispatch != "all_to_all",
            f"{_hyphened(prefill or '')} in prefill": prefill is not None,
            f"payload {self.payload}": self.payload != "model",
            f"{self.weights} weights": self.weights != "model",
            f"{self.activations} activations": self.activations != "model",
            f"{self.kv_dtype} KV cache": self.kv_dtype != "model",
            placement: self.placement != "linear",
            "placed by file": self.placement_file is not None,
            f"{num} redundant expert{'s' if num > 1 else ''}": num > 0,
            f"copies {self.copies}": self.copies != "nearest",
            "no CUDA graphs": self.cuda_graphs is False,
            f"rebalanced every {self.rebalance_steps} steps": self.rebalance_steps > 0,
        }
        return ", ".join(part for part, is_there in parts.items() if is_there) or "plain"


def _hyphened(name: str) -> str:
    return name.replace("_", "-")


@dataclass(frozen=True)
class Deployment:
    """One way to run the experiment's model.

    Attributes:
        is_baseline: one of the deployments that the proposal is compared with; factors are given
            against the best of them too.

    Raises:
        SpecError: the name is blank or not one line of text.
    """

    name: str
    layout: Layout
    options: Options = field(default_factory=Options)
    is_baseline: bool = False

    def __post_init__(self) -> None:
        if not self.name.strip() or not self.name.isprintable():
            raise SpecError(f"a deployment's name is {self.name!r}; it must be one line of text")


def drafts_text(num_drafts: int) -> str:
    """The suffix `, 2 drafts` of a deployment's name; empty without multi-token prediction."""
    return f", {num_drafts} draft{'' if num_drafts == 1 else 's'}" if num_drafts else ""
