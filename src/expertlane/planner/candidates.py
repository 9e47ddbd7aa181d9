"""The question of a plan, and every deployment that a model and a number of devices allow."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

from expertlane.cost.laws.profile import ModelledCluster
from expertlane.cost.memory import BLOCK_SIZE
from expertlane.cost.projector import Setting
from expertlane.cost.throughput import Goals
from expertlane.errors import CapacityError, SpecError
from expertlane.spec.deployment import (
    DispatchForm,
    MicroBatchSchedule,
    Options,
    PayloadType,
    dispatch_forms,
    drafts_text,
)
from expertlane.spec.layout import Layout, divisors
from expertlane.spec.model import ModelConfig
from expertlane.spec.names import EngineName
from expertlane.spec.ranges import MAX_TOKENS_OF_A_RUN, RANGES
from expertlane.spec.workload import NOTHING_SHARED, Load, SharedPrefixes, Workload

_PIPELINES: tuple[tuple[int, MicroBatchSchedule], ...] = (
    (1, "drained"),
    (2, "drained"),
    (4, "drained"),
    (2, "rotating"),
    (4, "rotating"),
)

MOST_DEVICES = 4096  # devices that a plan can be made for
# Sequences per device, in the search for the most requests/s: without a limit of TPOT, with one.
_MOST_SEQS, _MOST_LIMITED_SEQS = 512, 4096


@dataclass(frozen=True)
class PlanRequest:
    """The model, cluster, load and limits that a plan is made for.

    Attributes:
        workload: in steady state, `num_sequences` at once where they fit; no prompt is read.
            Lengths that vary are their means, which the formula takes.
        load: the lengths themselves, which simulations take; None for those of `workload`. In an
            open loop `workload` has as many sequences as the devices may hold: deployments are
            ranked by the most requests/s that they serve, and the best are then simulated at the
            load's rate.
        engine: engine that must be able to run it; None for all that the cluster model has.
    """

    model: ModelConfig
    cluster: ModelledCluster
    workload: Workload
    goals: Goals
    setting: Setting
    engine: EngineName | None = None
    load: Load | None = None

    @classmethod
    def of_load(
        cls,
        load: Load,
        model: ModelConfig,
        cluster: ModelledCluster,
        goals: Goals,
        setting: Setting,
        engine: EngineName | None = None,
        seed: int = 0,
    ) -> "PlanRequest":
        """The request for a closed or an open load."""
        batch = load.batch or _most_concurrent(load, cluster.num_devices, goals)
        return cls(model, cluster, load.means(seed, batch), goals, setting, engine, load)

    def on(self, num_devices: int) -> "PlanRequest":
        """The same request for another number of devices."""
        cluster, workload = replace(self.cluster, num_devices=num_devices), self.workload
        if self.rate is not None and self.load is not None:
            num = _most_concurrent(self.load, num_devices, self.goals)
            workload = replace(workload, num_sequences=num)
        return replace(self, cluster=cluster, workload=workload)

    @property
    def rate(self) -> float | None:
        """Requests that arrive a second; None in a closed loop."""
        return None if self.load is None else self.load.rate

    @property
    def num_asked(self) -> int | None:
        """Concurrent requests; None where they arrive at a rate."""
        return None if self.rate is not None else self.workload.num_sequences

    @property
    def prefixes(self) -> SharedPrefixes:
        """Shared prefixes of prompts, in whole blocks of a cache."""
        return NOTHING_SHARED if self.load is None else self.load.shared(BLOCK_SIZE)

    def load_at(self, batch: int) -> Load:
        """The load as `simulate` serves it, with so many requests at once."""
        load = self.load or self.workload.load
        num_requests = load.num_requests if load.recorded else batch
        at = replace(load, batch=batch, rate=None, num_requests=num_requests)
        return at.varied(self.model.max_position_embeddings)

    def load_at_rate(self) -> Load:
        """The open load as `simulate` serves it."""
        assert self.load is not None, "an open loop"
        return self.load.varied(self.model.max_position_embeddings)


def _most_concurrent(load: Load, num_devices: int, goals: Goals) -> int:
    """Concurrent requests that a plan for an open load tries at most."""
    of_request = load.prompt_len.high + load.output_len.high
    most = min(MAX_TOKENS_OF_A_RUN // of_request, int(RANGES["num_sequences"].high))
    of_device = _MOST_SEQS if goals.of_means[0] is None else _MOST_LIMITED_SEQS
    return max(1, min(of_device * num_devices, most))


class Candidate(NamedTuple):
    """One deployment, not yet named.

    Attributes:
        num_drafts: draft tokens of multi-token prediction.
    """

    layout: Layout
    options: Options
    num_drafts: int = 0

    def __str__(self) -> str:
        return f"{self.layout}; {self.options}{drafts_text(self.num_drafts)}"


def check_plan_size(cluster: ModelledCluster) -> None:
    """Check that a plan can be made in time.

    Raises:
        CapacityError: there are more devices than it can be made for, with both numbers.
    """
    if cluster.num_devices > MOST_DEVICES:
        raise CapacityError(
            f"cluster {cluster} has {cluster.num_devices:,} devices; a plan takes at most "
            f"{MOST_DEVICES:,}: plan a part, {cluster.profile.name}x{MOST_DEVICES} for example"
        )


def valid_layouts(model: ModelConfig, num_devices: int) -> list[Layout]:
    """All layouts that use all devices and that the model can be laid out as.

    Without expert parallelism `ep` is 1, and it goes up to all ranks of a stage, also where there
    are fewer experts: copies then fill the ranks. Where ranks of a `tp` group hold the same keys
    and values, there is also the layout in which each holds a part of the positions.
    """
    layouts = []
    for replicas in divisors(num_devices):
        of_replica = num_devices // replicas
        for pp in divisors(of_replica):
            for tp in divisors(of_replica // pp):
                dp = of_replica // pp // tp
                for ep in divisors(dp * tp):
                    layout = Layout(replicas, pp, dp, tp, ep)
                    if not _fits(layout, model):
                        continue
                    layouts.append(layout)
                    if (dcp := layout.most_dcp(model)) > 1:
                        layouts.append(replace(layout, dcp=dcp))
    return layouts


def candidates_of(
    layout: Layout,
    model: ModelConfig,
    ranks_per_node: int,
    payload: PayloadType = "model",
    num_drafts: int = 0,
) -> Iterator[Candidate]:
    """A layout with every dispatch form × overlap × micro-batches × redundancy that it takes.

    With drafts, each with and without them. A form that comes down to another one on this layout is
    left out. Experts are placed by load; every rank has equally many, by redundant ones if need be,
    or one more.
    """
    for form in _forms(layout, ranks_per_node):
        for num_redundant in _redundancies(layout, model):
            for num_micro_batches, schedule in _pipelines(layout.pp):
                for overlap in (False, True) if layout.stage_size > 1 else (False,):
                    options = _options(
                        overlap=overlap,
                        num_micro_batches=num_micro_batches,
                        micro_batch_schedule=schedule,
                        dispatch=form,
                        payload=payload if layout.ep > 1 else "model",
                        num_redundant_experts=num_redundant,
                        placement="load" if layout.ep > 1 else "linear",
                    )
                    yield Candidate(layout, options)
                    if num_drafts:
                        yield Candidate(layout, options, num_drafts)


def candidates_like(layout: Layout, options: Options, ranks_per_node: int) -> list[Candidate]:
    """The candidate of a deployment; one for each form and overlap where those are `auto`."""
    forms = [options.dispatch]
    if options.dispatch == "auto":
        forms = list(_forms(layout, ranks_per_node))
    overlaps = [options.overlap] if options.overlap != "auto" else [False, True]
    return [
        Candidate(layout, replace(options, dispatch=form, overlap=overlap))
        for form in forms
        for overlap in overlaps
    ]


@cache
def _pipelines(pp: int) -> tuple[tuple[int, MicroBatchSchedule], ...]:
    """Ways to pipeline: the usual ones, and as many steps in flight as stages, as engines run."""
    if pp == 1:
        return _PIPELINES[:1]
    of_stages: tuple[int, MicroBatchSchedule] = (pp, "rotating")
    return _PIPELINES if of_stages in _PIPELINES else (*_PIPELINES, of_stages)


_options = cache(Options)  # many layouts share them


def family_of(layout: Layout) -> str:
    """The family in a few words; replicas serve as one of them does."""
    parts = ["expert parallel" if layout.ep > 1 else "no expert parallelism"]
    if layout.dp > 1:
        parts.append("data-parallel attention")
    if layout.pp > 1:
        parts.append("pipeline")
    return ", ".join(parts)


def _fits(layout: Layout, model: ModelConfig) -> bool:
    try:
        layout.check_model(model)
    except SpecError:
        return False
    return True


def _forms(layout: Layout, ranks_per_node: int) -> tuple[DispatchForm, ...]:
    if layout.ep == 1:  # every form is the all-gather then; the default's name is plainest
        return ("all_to_all",)
    return dispatch_forms(layout, ranks_per_node)


def _redundancies(layout: Layout, model: ModelConfig) -> tuple[int, ...]:
    """Numbers of redundant experts that fill all ranks alike.

    On as few ranks as a token has experts none is needed: there even an expert that all tokens
    choose has no more to do than a rank has on average.
    """
    ep, num_experts = layout.ep, model.num_experts
    per_rank = -(-num_experts // ep)
    fewest = ep * per_rank - num_experts
    if ep == 1 or num_experts == 1:
        return (0,)
    if ep <= model.num_experts_per_tok or per_rank == num_experts:
        return (fewest,)
    most = RANGES["num_redundant_experts"].high
    return tuple(each for each in (fewest, fewest + ep) if each <= most) or (0,)
