"""A comparison in virtual time: each rank on its own core, with the links of a cluster."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from expertlane.comparison.assumptions import (
    PROPOSAL,
    StepWork,
    is_of_the_papers_kind,
    own_step_work,
    paper_step_work,
)
from expertlane.comparison.projection import check_has_law, usual_number_type
from expertlane.cost.laws.profile import Profile
from expertlane.cost.recorded_program import PricedRecording
from expertlane.cost.step.operation import NumberTypes
from expertlane.cost.virtual import ReplayedStep, VirtualClock, VirtualLinks
from expertlane.errors import UserError
from expertlane.results.hardware import LinkSpeed, MachinePeak, VirtualTime
from expertlane.results.metrics import latency
from expertlane.results.record import StepsRecord
from expertlane.results.results import Assumption
from expertlane.results.step_record import StepRecord
from expertlane.spec.deployment import Deployment
from expertlane.spec.experiment import Experiment
from expertlane.spec.layout import Layout
from expertlane.spec.names import Cause

_NEAR = (0.5, 1.0, 2.0)  # factors of the scale of links
_FAR = (0.0, 0.25, 4.0)  # 0: without links


@dataclass(frozen=True)
class VirtualSettings:
    """The user's assumptions for virtual time.

    Attributes:
        links: the profile of the links; None where transfers take no time.
        scale: factor of the time of transfers; None to choose it (`choose_scale`).
        compute: the profile whose laws give the time of computing; None for measured CPU time.
        is_asked: whether the user asked for virtual time; else ranks on several hosts have none.
    """

    links: Profile | None
    scale: float | None = None
    compute: Profile | None = None
    is_asked: bool = False

    def check(self, deployments: Sequence[Deployment]) -> None:
        """Refuse, before anything runs, what virtual time cannot be made of.

        Raises:
            UserError: `compute` is given, and a deployment's experts move while it runs; or the
                scale of links is to be chosen, and their profile has no FLOP/s to choose it by.
        """
        links = self.links
        if links is not None and self.scale is None and self.compute is None:
            dtype = usual_number_type(links)
            if dtype not in links.device.flops_per_s:
                raise UserError(f"profile {links.name} has no FLOP/s of {dtype}; give --link-scale")
        for each in deployments if self.compute else ():
            if each.options.rebalance_steps:
                raise UserError(
                    f"deployment {each.name!r} moves experts while it runs; --compute needs "
                    "deployments without rebalancing"
                )
            check_has_law(each)


def compute_ratio(here: StepWork, there: StepWork, peak: MachinePeak, profile: Profile) -> float:
    """Roofline time of one step's work on a core here, over that of another on a profile's device.

    FLOPs over the peak or bytes read over the memory bandwidth, whichever is longer: at the rates
    measured for a core here, and at the device's datasheet rates for its usual number type.

    Raises:
        UserError: no work was counted.
    """
    device, dtype = profile.device, usual_number_type(profile)
    num_units = peak.num_units
    here_s = here.seconds(peak.gemm_flops_per_s / num_units, peak.read_bytes_per_s / num_units)
    there_s = there.seconds(device.flops_per_s[dtype], device.memory_bytes_per_s)
    if not there_s:
        raise UserError("no work was counted; give --link-scale")
    return here_s / there_s


@dataclass(frozen=True)
class LinkScale:
    """Factors from a profile's transfers to those of virtual time.

    Attributes:
        times: factor of the duration.
        byte_scale: factor of the bytes sent.
        why: the reason, for the report.
    """

    times: float = 1.0
    byte_scale: float = 1.0
    why: str = ""


def choose_scale(
    settings: VirtualSettings,
    experiment: Experiment,
    decodes: Sequence[StepRecord],
    peak: MachinePeak,
) -> LinkScale:
    """The scale asked for, else one that keeps the cluster's ratio of transfers to computing.

    For a small copy of the paper's model, each transfer takes the same share of a step as the
    corresponding transfer takes of the paper's step: its bytes are multiplied by the ratio of the
    dispatch bytes, its time by the `compute_ratio` of the copy's step to the paper's. For other
    models, the time is multiplied by the `compute_ratio` of all decode steps.

    Args:
        decodes: the recorded decode steps of the deployments.
        peak: measured on this machine.

    Raises:
        UserError: no work was counted.
    """
    links = settings.links
    if settings.scale is not None:
        return LinkScale(settings.scale, why="asked for")
    if links is None or settings.compute is not None:
        return LinkScale(
            why="unscaled, since compute times come from a profile too" if links else ""
        )
    if not is_of_the_papers_kind(experiment):
        work = StepWork([record for step in decodes for record in step.records])
        why = (
            "the ratio of roofline compute times of all decode steps, a core here over "
            f"{links.device.name}"
        )
        return LinkScale(compute_ratio(work, work, peak, links), why=why)
    own = own_step_work(experiment, PROPOSAL, NumberTypes.all_of(peak.dtype))
    paper = paper_step_work(PROPOSAL, experiment.model.num_experts_per_tok)
    why = (
        "so that each transfer takes the same share of a step as in the paper: the ratio of "
        "dispatch bytes, the paper's over this step's, and of roofline compute time, this step's "
        f"on a core here over the paper's on {links.device.name}"
    )
    byte_scale = paper.dispatch_bytes / own.dispatch_bytes
    return LinkScale(compute_ratio(own, paper, peak, links), byte_scale, why)


@dataclass(eq=False)
class VirtualRuns:
    """Replays of the deployments' recorded steps in virtual time.

    Args:
        num_layers: hidden layers of the model.
        peak: measured peak rates of this machine.
        ranks_per_node: consecutive ranks that share a node.
    """

    settings: VirtualSettings
    num_layers: int
    ranks_per_node: int
    peak: MachinePeak
    scale: LinkScale

    @classmethod
    def of(
        cls,
        settings: VirtualSettings,
        experiment: Experiment,
        decodes: Sequence[StepRecord],
        ranks_per_node: int,
        peak: MachinePeak,
    ) -> "VirtualRuns":
        """Replays with the scale of links that `choose_scale` gives."""
        scale = choose_scale(settings, experiment, decodes, peak)
        return cls(settings, experiment.model.num_hidden_layers, ranks_per_node, peak, scale)

    def replay(
        self,
        layout: Layout,
        steps: Sequence[StepRecord],
        laws: PricedRecording | None,
        factors: tuple[float, float, float] = _NEAR,
    ) -> list[ReplayedStep]:
        """The steps of a deployment in virtual time.

        Args:
            laws: give the time of computing; None for measured CPU time.
            factors: factors of the link scale, for the three times of the clock.
        """
        low, likely, high = (self.scale.times * factor for factor in factors)
        links = VirtualLinks(self.settings.links, (low, likely, high), self.scale.byte_scale)
        clock = VirtualClock(layout, self.num_layers, links, self.ranks_per_node, laws)
        return clock.replay(steps)

    def peak_of(self, layout: Layout) -> MachinePeak:
        """The rates of all ranks of a deployment together, each with its own core."""
        peak, factor = self.peak, layout.world_size / self.peak.num_units
        return replace(
            peak,
            gemm_flops_per_s=factor * peak.gemm_flops_per_s,
            read_bytes_per_s=factor * peak.read_bytes_per_s,
            num_units=layout.world_size,
        )

    def decode_tps(
        self,
        layout: Layout,
        steps: Sequence[StepRecord],
        laws: PricedRecording | None,
        replayed: Sequence[ReplayedStep],
    ) -> dict[float, float]:
        """Decode TPS by link scale, from a quarter to four times the chosen one; 0: no links.

        Args:
            steps: decode steps.
            replayed: what `replay` returned for them.
        """
        if self.settings.links is None:
            return {0.0: _tps([each.step for each in replayed])}
        found = {
            factor * self.scale.times: _tps([each.by_scale[place] for each in of_factors])
            for factors, of_factors in (
                (_NEAR, replayed),
                (_FAR, self.replay(layout, steps, laws, _FAR)),
            )
            for place, factor in enumerate(factors)
        }
        return dict(sorted(found.items()))

    def summary(self, of_deployments: Sequence[dict[float, float]]) -> VirtualTime:
        """The links, their scale, and decode TPS by link scale, for the results.

        Args:
            of_deployments: what `decode_tps` returned, for each deployment that decodes.
        """
        links = self.settings.links
        speeds = [
            LinkSpeed(scale, tuple(each[scale] for each in of_deployments))
            for scale in (of_deployments[0] if of_deployments else ())
        ]
        scale = self.scale
        name = links.name if links else None
        return VirtualTime(name, scale.times, scale.byte_scale, tuple(speeds))

    def assumptions(self) -> tuple[Assumption, ...]:
        """Rows about links, computing and what is left out, for the report."""
        links = self.settings.links
        if links is None:
            of_links = Assumption("links", "none: transfers take no time", change="--links")
        else:
            scale = self.scale
            value = f"{links.name}, transfers {scale.times:,.4g} times as long"
            if scale.byte_scale != 1:
                value += f", of {scale.byte_scale:,.4g} times the bytes"
            of_links = Assumption("links", value, scale.why, "--links, --link-scale")
        compute = self.settings.compute
        computing = Assumption(
            "compute",
            "CPU time of each operation, one thread per rank, the lesser of two repetitions",
            "measured while at most one rank per core computes; noise only adds time",
            "--compute",
        )
        if compute is not None:
            computing = Assumption(
                "compute",
                f"cost model of profile {compute.name}, in {usual_number_type(compute)}",
                "for the operations that ran: counters and collectives of the ranks equal the "
                "model's for the same routing",
                "--compute",
            )
        rows = (
            of_links,
            computing,
            Assumption(
                "excluded",
                "scheduler, and messages to and from it",
                "included in wall time; a cluster hides most of it",
            ),
        )
        return tuple(replace(each, source="virtual") for each in rows)


def without_scheduler(steps: StepsRecord) -> StepsRecord:
    """The steps without the scheduler, which in virtual time takes none with measured computing.

    What is left of a phase when a rank is done, or before it begins, is waiting for other ranks.
    """
    causes_s = dict(steps.breakdown_s)
    causes_s[Cause.WAITING] += causes_s[Cause.ENGINE]
    causes_s[Cause.ENGINE] = 0.0
    return replace(steps, breakdown_s=causes_s)


def _tps(steps: Sequence[StepRecord]) -> float:
    return latency(steps).tps.value
