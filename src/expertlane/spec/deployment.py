"""A deployment: a name, a layout, and the options it runs with, dispatch forms among them."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from expertlane.errors import SpecError
from expertlane.spec.layout import Layout
from expertlane.spec.names import Phase
from expertlane.spec.ranges import Strict, shown, take_fields

DispatchForm = Literal["all_to_all", "all_gather", "hierarchical", "static"]
DeepEPKernels = Literal["low_latency", "normal"]


@dataclass(frozen=True)
class FormTraits:
    """Traits of a dispatch form; how to add one: `CONTRIBUTING.md`.

    Attributes:
        sends: its traffic, in the words of the help.
        by_node: over groups of a node's ranks and across nodes, so every node must hold equally
            many; another form does the same unless several nodes hold several ranks each.
        deepep: the nearest of DeepEP's kernels for decodes; None for what needs no such library.
        needs_counts: shapes turn on the routing, so the host waits for numbers of rows.
        is_tried: `auto` times it, and plans consider it; not where another form is as fast at
            least on every transport that has run.
    """

    sends: str
    deepep: DeepEPKernels | None = None
    by_node: bool = False
    needs_counts: bool = True
    is_tried: bool = True


DISPATCH_FORMS: dict[DispatchForm, FormTraits] = {
    "all_to_all": FormTraits("one copy to each rank with a chosen expert", deepep="low_latency"),
    "all_gather": FormTraits("all tokens to all ranks", needs_counts=False),
    "hierarchical": FormTraits(
        "one copy per node, forwarded inside it", deepep="normal", by_node=True
    ),
    "static": FormTraits(
        "all_to_all in buffers of fixed size",
        deepep="low_latency",
        needs_counts=False,
        is_tried=False,
    ),
}


def dispatch_forms(layout: Layout, ranks_per_node: int) -> tuple[DispatchForm, ...]:
    """The forms that differ on a layout, of those that are tried."""
    if layout.ep == 1:
        return ("all_gather",)
    try:
        has_hierarchy = 1 < layout.ep_ranks_per_node(ranks_per_node) < layout.ep
    except SpecError:  # not equally many on each node
        has_hierarchy = False
    return tuple(
        form
        for form, traits in DISPATCH_FORMS.items()
        if traits.is_tried and (has_hierarchy or not traits.by_node)
    )


def form_on(layout: Layout, form: DispatchForm) -> DispatchForm | None:
    """The form that steps really take; without expert parallelism, every rank needs all tokens.

    None where one rank has them all.
    """
    if layout.stage_size == 1:
        return None
    return "all_gather" if layout.ep == 1 else form


def is_by_node_on(layout: Layout, form: DispatchForm) -> bool:
    """True if the form that steps really take sends by nodes."""
    own = form_on(layout, form)
    return own is not None and DISPATCH_FORMS[own].by_node


def is_static_on(layout: Layout, form: DispatchForm) -> bool:
    """True if the form that steps really take has shapes that do not depend on the routing."""
    own = form_on(layout, form)
    return own is None or not DISPATCH_FORMS[own].needs_counts


@dataclass(frozen=True)
class DispatchMode(Strict):
    """One way to run a step.

    Attributes:
        overlap: run in two halves, one of which computes while the other's tokens travel.
    """

    form: DispatchForm
    overlap: bool = False

    def __str__(self) -> str:
        return self.form.replace("_", "-") + (" with overlap" if self.overlap else "")


@dataclass(frozen=True)
class DispatchRow(Strict):
    """Times of steps with one number of tokens.

    Attributes:
        num_tokens: tokens of a micro-batch on the rank that owns most of the stage's.
        step_s: [num_modes]; time of a step with so many tokens.
    """

    num_tokens: int
    step_s: tuple[float, ...]


@dataclass(frozen=True)
class DispatchTable(Strict):
    """Times of dispatch modes by number of tokens, measured once: every rank decides alike.

    Attributes:
        modes: the modes that were timed; of equally fast ones the first is taken.
        rows: ascending in tokens, one at least.
        prefill_form: form of steps that hold prompts, in place of the mode's; None for the same.

    Raises:
        SpecError: no row, or one that does not have a time for each mode.
    """

    modes: tuple[DispatchMode, ...]
    rows: tuple[DispatchRow, ...]
    prefill_form: DispatchForm | None = None

    def __post_init__(self) -> None:
        lengths = {len(row.step_s) for row in self.rows}
        if not self.modes or lengths != {len(self.modes)}:
            raise SpecError(
                f"a dispatch table of {len(self.modes)} modes has rows of "
                f"{', '.join(map(str, sorted(lengths))) or 'no'} times"
            )

    @classmethod
    def fixed(
        cls, form: DispatchForm, overlap: bool = False, prefill_form: DispatchForm | None = None
    ) -> "DispatchTable":
        """A table that always chooses this mode, for prompts perhaps another form."""
        return cls((DispatchMode(form, overlap),), (DispatchRow(1, (0.0,)),), prefill_form)

    @property
    def only(self) -> DispatchMode | None:
        """The mode of all steps; None where `choose` has to tell."""
        is_only = len(self.modes) == 1 and self.prefill_form is None
        return self.modes[0] if is_only else None

    def choose(
        self, num_tokens: int, can_split: bool = True, phase: Phase | None = None
    ) -> DispatchMode:
        """The fastest mode, of times interpolated between rows; past the last, as there.

        Args:
            can_split: whether there is anything to halve; if not, modes with overlap count only
                where there are no others.
            phase: phase of the step; None for one without prompts.
        """
        spans = self._spans if can_split else self._unsplit_spans
        index = bisect_left(spans, num_tokens, key=lambda span: span[0])
        mode = spans[min(index, len(spans) - 1)][1]
        if phase is Phase.PREFILL and self.prefill_form is not None:
            return DispatchMode(self.prefill_form, mode.overlap)
        return mode

    @property
    def forms(self) -> tuple[DispatchForm, ...]:
        """All forms that may be chosen."""
        spans = [*self._spans, *self._unsplit_spans]
        prefill = (self.prefill_form,) if self.prefill_form else ()
        return tuple(dict.fromkeys((*(mode.form for _, mode in spans), *prefill)))

    def __str__(self) -> str:
        """The modes by number of tokens: `all-gather up to 16, then all-to-all`."""
        *before, (_, last) = self._spans
        parts = [f"{mode} up to {num_tokens}" for num_tokens, mode in before]
        parts.append(f"then {last}" if parts else str(last))
        if self.prefill_form is not None:
            parts.append(f"{self.prefill_form} in prefill".replace("_", "-"))
        return ", ".join(parts)

    @cached_property
    def _spans(self) -> list[tuple[int, DispatchMode]]:
        return self._spans_of(range(len(self.modes)))

    @cached_property
    def _unsplit_spans(self) -> list[tuple[int, DispatchMode]]:
        plain = [place for place, mode in enumerate(self.modes) if not mode.overlap]
        return self._spans_of(plain) if plain else self._spans

    def _spans_of(self, places: Sequence[int]) -> list[tuple[int, DispatchMode]]:
        """The largest number of tokens of each span in which one of some modes is fastest."""
        import numpy as np  # not for the help of a command, which names the options

        sizes = [row.num_tokens for row in self.rows]
        num_tokens = np.arange(1, sizes[-1] + 1)
        step_s = [
            np.interp(num_tokens, sizes, [row.step_s[place] for row in self.rows])
            for place in places
        ]
        fastest = np.argmin(step_s, axis=0)
        ends = [*np.flatnonzero(np.diff(fastest)).tolist(), len(fastest) - 1]
        return [(int(num_tokens[end]), self.modes[places[fastest[end]]]) for end in ends]


MicroBatchSchedule = Literal["drained", "rotating"]
DispatchChoice = Literal[DispatchForm, "auto"]
OverlapChoice = bool | Literal["auto"]
PayloadType = Literal["model", "bfloat16", "float8"]
WeightsType = Literal["model", "int8"]
KVCacheType = Literal["model", "float8"]
ActivationsType = Literal["model", "float8"]
INPUTS_OF_SCALE = 128  # of weights that are rounded while loading, and of float8 activations
PlacementMethod = Literal["linear", "round_robin", "load"]


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
        placement: which experts a rank holds: `linear`: consecutive ones; `round_robin`; `load`:
            by the load of earlier tokens, hot ones several times, in each layer as
            `balance.planner.plan_placement` does it. The cluster model has it; an engine comes to
            it by `rebalance_steps`, or begins with a `placement_file`.
        placement_file: a placement written by `expertlane balance`, in place of these.
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
    placement: PlacementMethod = "linear"
    placement_file: str | None = None
    num_redundant_experts: int = 0
    rebalance_steps: int = 0
    cuda_graphs: bool | None = None

    def __post_init__(self) -> None:
        take_fields(self)
        if not isinstance(self.placement_file, str | None):
            raise SpecError(f"placement_file is {shown(self.placement_file)}; it must be a path")
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
