"""Dispatch forms of tokens, and the table that picks one for a step."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from expertlane.errors import SpecError
from expertlane.spec.layout import Layout
from expertlane.spec.names import Phase
from expertlane.spec.ranges import Strict

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
