"""Totals of a simulated pool's steps, by phase."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from weakref import WeakKeyDictionary

import numpy as np

from expertlane.cost.breakdown import BreakdownTable, basis_seconds, floor_s
from expertlane.cost.laws.execution import LIKELY
from expertlane.cost.pricing import Pricing
from expertlane.cost.runner import PricedStep
from expertlane.cost.step.operation import Floats, Ints
from expertlane.cost.step.program import StepProgram
from expertlane.cost.step.totals import expert_loads, sent_bytes
from expertlane.schedule.plan import StepPlan
from expertlane.spec.model import ModelConfig
from expertlane.spec.names import Phase, ProjectedCause

_WINDOW = 16  # steps explained in a row
_MOST_SAMPLED = 256  # steps of a phase, one of which is drawn
_MOST_EXPLAINED = 64  # steps of a phase, about; explaining takes as long as pricing


@dataclass(frozen=True, eq=False)
class StepFacts:
    """Facts of a priced step, or of several added up, beside its time.

    Attributes:
        floor_s: see `cost.breakdown.floor_s`.
        basis_s: [num_bases]; likely seconds of operations and transfers, mean over ranks.
        extrapolated_s: part of them that lies outside the sizes that laws were fitted to.
        sent_bytes: [num_links, num_kinds_of_traffic]; bytes to other ranks.
        num_tokens_per_expert, rank_pairs: see `cost.step.totals.expert_loads`.
    """

    floor_s: float
    basis_s: Floats
    extrapolated_s: float
    sent_bytes: Ints
    num_tokens_per_expert: Ints
    rank_pairs: float

    @classmethod
    def of(cls, step: PricedStep, pricing: Pricing, model: ModelConfig) -> "StepFacts":
        """The facts of a step's program with its times."""
        return cls(
            floor_s([step.program], pricing.profile.device, pricing.types),
            *basis_seconds([step.work]),
            sent_bytes(step.program),
            *expert_loads(step.program, model.num_hidden_layers, model.num_experts),
        )

    def __add__(self, other: "StepFacts") -> "StepFacts":
        """The facts of both together."""
        names = [each.name for each in fields(self)]
        return StepFacts(*(getattr(self, name) + getattr(other, name) for name in names))


@dataclass(eq=False)
class PhaseTotals:
    """Steps of one phase; sums unless it says otherwise.

    Attributes:
        facts: of all steps together.
        sample: some steps with their likely seconds, evenly over all.
        step_s: [3] each step: low, likely, high.
        num_tokens, num_seqs: computed, drafts among them, and sequences that took part.
        why_s: by cause, of the steps that were explained; [num_causes].
        explained_s, flops_s, read_s: of those, their time, and that times utilisation.
    """

    facts: StepFacts
    sample: list[tuple[float, StepPlan]] = field(default_factory=list)
    step_s: list[Floats] = field(default_factory=list)
    num_tokens: int = 0
    num_seqs: int = 0
    why_s: Floats = field(default_factory=lambda: np.zeros(len(ProjectedCause)))
    explained_s: float = 0.0
    flops_s: float = 0.0
    read_s: float = 0.0
    _stride: int = 1

    def add(self, plan: StepPlan, seconds: Floats, num_drafts: int) -> None:
        """Add a step, whose facts are in `facts`."""
        batches = plan.batches
        num_tokens = sum(batch.num_tokens for batch in batches)
        if num_drafts:
            is_decode = [
                batch.yields_token & (batch.num_scheduled_tokens == 1) for batch in batches
            ]
            num_tokens += num_drafts * sum(int(each.sum()) for each in is_decode)
        self._keep(plan, float(seconds[LIKELY]))
        self.step_s.append(seconds)
        self.num_tokens += num_tokens
        self.num_seqs += sum(batch.num_seqs for batch in batches)

    def _keep(self, plan: StepPlan, likely_s: float) -> None:
        """Sample steps evenly: of ever more steps, an ever smaller share."""
        if len(self.step_s) % self._stride == 0:
            self.sample.append((likely_s, plan))
        if len(self.sample) > _MOST_SAMPLED:
            self.sample = self.sample[::2]
            self._stride *= 2

    @property
    def median(self) -> StepPlan:
        """The sampled step that takes about the median time of all."""
        median_s = float(np.median([seconds[LIKELY] for seconds in self.step_s]))
        return min(self.sample, key=lambda each: abs(each[0] - median_s))[1]

    def explain(self, table: BreakdownTable) -> None:
        """Add the breakdown of consecutive steps."""
        why = table.result()
        self.why_s = self.why_s + why.seconds * np.array(list(why.shares.values()))
        self.explained_s += why.seconds
        self.flops_s += why.seconds * why.flops_utilisation
        self.read_s += why.seconds * why.bytes_utilisation


class PoolTotals:
    """Adds up the steps of one pool.

    Time is broken down on the first replica, and of very many steps for some.

    Attributes:
        phases: totals of each phase with any steps.
        most_running: the most sequences that held blocks at once.

    Args:
        num_running: returns the sequences that hold blocks now.
        num_drafts: draft tokens in every decode.
    """

    def __init__(
        self,
        model: ModelConfig,
        pricing: Pricing,
        num_running: Callable[[], int],
        num_drafts: int = 0,
    ) -> None:
        self.phases: dict[Phase, PhaseTotals] = {}
        self.most_running = 0
        self._model = model
        self._pricing = pricing
        self._num_running = num_running
        self._num_drafts = num_drafts
        self._facts: WeakKeyDictionary[StepProgram, StepFacts] = WeakKeyDictionary()
        self._empty = BreakdownTable(pricing.profile.device, pricing.types)
        self._table: BreakdownTable | None = None
        self._explained: Phase | None = None

    def observe(self, step: PricedStep) -> None:
        """Add a step to the totals."""
        facts = self._facts.get(step.program)
        if facts is None:
            facts = self._facts[step.program] = StepFacts.of(step, self._pricing, self._model)
        phase = _phase(step.plan)
        totals = self.phases.get(phase)
        if totals is None:
            totals = self.phases[phase] = PhaseTotals(facts)
        else:
            totals.facts += facts
        totals.add(step.plan, _seconds(step), self._num_drafts)
        self.most_running = max(self.most_running, self._num_running())
        if step.plan.replica == 0:
            self._explain(step, phase, totals)

    def close(self) -> None:
        """Finish the totals: no step follows."""
        if self._table is not None and self._explained is not None:
            self.phases[self._explained].explain(self._table)
        self._table = None

    def _explain(self, step: PricedStep, phase: Phase, totals: PhaseTotals) -> None:
        number = len(totals.step_s) - 1
        window = number // _WINDOW
        stride = 1 + number // _MOST_EXPLAINED
        is_watched = window % stride == 0
        if self._explained is not phase or not is_watched:
            self.close()
        self._explained = phase
        if not is_watched:
            return
        if self._table is None:
            self._table = self._empty.cleared()
        self._table.add(step.times)


def _phase(plan: StepPlan) -> Phase:
    """Prefill if the plan computes any prompt; sequences that came with their cache have none."""
    batches = plan.batches
    is_decode = all((batch.num_scheduled_tokens == 1).all() for batch in batches)
    return Phase.DECODE if is_decode else Phase.PREFILL


def _seconds(step: PricedStep) -> Floats:
    """[3]; seconds from when the first rank turned to it until the last one was done."""
    begin_s = step.times.spans[0][0].begin.min(axis=1)
    seconds: Floats = step.times.end_s - step.times.origin_s - begin_s
    return seconds
