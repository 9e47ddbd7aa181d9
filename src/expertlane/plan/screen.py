"""Every candidate deployment priced at once, from expected traffic and one rank of each stage."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from expertlane.balance.deployed import Placements
from expertlane.balance.placement import Placement
from expertlane.cost.cluster import ModelledCluster
from expertlane.cost.execution import Terms
from expertlane.cost.links import LinkModel
from expertlane.cost.operation import Floats, HandOver, Ints
from expertlane.cost.stage_mesh import StageMesh
from expertlane.plan.candidates import Candidate
from expertlane.plan.capacity import Capacity, capacity
from expertlane.plan.prices import Priced, price
from expertlane.plan.scenario import Scenarios, ScenarioSteps
from expertlane.plan.setting import Setting, Traffic
from expertlane.plan.spread import Spread, spread_of
from expertlane.plan.stage_cost import StagePlan
from expertlane.plan.step_time import Pipelining, StepEstimates, step_estimates
from expertlane.spec.deployment import DispatchForm
from expertlane.spec.layout import Layout
from expertlane.spec.model import ModelConfig

_PREFILL_TOKENS = 8192  # of a data-parallel rank's prefill step, if prompts allow
_MOST_BATCHES = 12  # numbers of sequences that are tried


@dataclass(frozen=True, eq=False)
class Screened:
    """A candidate's steps.

    Attributes:
        capacity: what memory allows; a candidate that does not fit has no estimates.
        num_seqs: [N]; sequences of a data-parallel rank in decode steps, ascending.
        decode: [N]; None where it does not fit.
        prefill: one step, of `prefill_tokens` new tokens on each data-parallel rank.
    """

    candidate: Candidate
    capacity: Capacity
    num_seqs: Ints
    decode: StepEstimates | None
    prefill: StepEstimates | None
    prefill_tokens: int
