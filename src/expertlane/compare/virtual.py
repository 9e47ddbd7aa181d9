"""A comparison in virtual time: each rank on cores of its own, on the links of a cluster."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from expertlane.compare.likeness import (
    PROPOSAL,
    StepWork,
    is_of_the_papers_kind,
    own_step_work,
    paper_step_work,
)
from expertlane.compare.projection import usual_number_type
from expertlane.cost.compute_laws import ComputeLaws
from expertlane.cost.laws.profile import Profile
from expertlane.cost.number_types import NumberTypes
from expertlane.cost.virtual import Replayed, VirtualClock, VirtualLinks
from expertlane.errors import UserError
from expertlane.results.metrics import latency
from expertlane.results.results import Assumption, LinkSpeed, MachinePeak, VirtualTime
from expertlane.results.step_record import StepRecord
from expertlane.spec.deployment import Deployment
from expertlane.spec.experiment import Experiment
from expertlane.spec.layout import Layout

_NEAR = (0.5, 1.0, 2.0)  # of the scale of links
_FAR = (0.0, 0.25, 4.0)  # 0: without links


@dataclass(frozen=True)
class VirtualSettings:
    """What virtual time is to assume.

    Attributes:
        links: the profile of the links; None where transfers take no time.
        scale: how many times as long transfers take; None to choose (`choose_scale`).
        compute: the profile whose laws say how long computing takes; None for what was measured.
    """

    links: Profile | None
    scale: float | None = None
    compute: Profile | None = None

    def check(self, deployments: Sequence[Deployment]) -> None:
        """Refuse what laws cannot say.

        Raises:
            UserError: experts of a deployment move while it runs.
        """
        for each in deployments if self.compute else ():
            if each.options.rebalance_steps:
                raise UserError(
                    f"deployment {each.name!r} moves experts while it runs; --compute takes "
                    "deployments whose experts stay, or leave --compute out"
                )


def compute_ratio(here: StepWork, there: StepWork, peak: MachinePeak, profile: Profile) -> float:
    """How many times as long one work takes here, on a core, as another on a profile's device.

    FLOPs over the peak or bytes read over the memory's bandwidth, whichever is longer: measured of
    a core here, of the datasheet there, in the type that its ranks compute in.

    Raises:
        UserError: there is no work, or the device has no figure for such a type.
    """
    device, dtype = profile.device, usual_number_type(profile)
    if dtype not in device.flops_per_s:
        raise UserError(
            f"profile {profile.name} has no FLOP/s of {dtype}; --link-scale says how much slower "
            "links are to be"
        )
    num_units = peak.num_units
    here_s = here.seconds(peak.gemm_flops_per_s / num_units, peak.read_bytes_per_s / num_units)
    there_s = there.seconds(device.flops_per_s[dtype], device.memory_bytes_per_s)
    if not there_s:
        raise UserError("no work was counted; --link-scale says how much slower links are to be")
    return here_s / there_s


@dataclass(frozen=True)
class LinkScale:
    """How transfers of virtual time stand to those of a profile.

    Attributes:
        times: as long.
        byte_scale: times as many bytes are sent.
        why: for a reader.
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
    """What was asked for, else what lets computing and transfers stand as they do on the cluster.

    Of a small copy of the paper's model: each transfer takes the share of a step that its like
    takes of the paper's own step. It is priced for the bytes that the paper's would have, and takes
    as many times as long as the step of the copy takes here over the paper's there. Otherwise the
    ratio is that of the work of all decode steps, here and there.

    Raises:
        UserError: as `compute_ratio`.
    """
    links = settings.links
    if settings.scale is not None:
        return LinkScale(settings.scale, why="asked for")
    if links is None or settings.compute is not None:
        return LinkScale(why="as they are: computing is a profile's too" if links else "")
    if not is_of_the_papers_kind(experiment):
        work = StepWork([record for step in decodes for record in step.records])
        why = (
            "the ratio of compute speeds: FLOPs over the peak or bytes over the memory's "
            f"bandwidth, of all decode steps, on a core here over the same on {links.device.name}"
        )
        return LinkScale(compute_ratio(work, work, peak, links), why=why)
    own = own_step_work(experiment, PROPOSAL, NumberTypes.all_of(peak.dtype))
    paper = paper_step_work(PROPOSAL, experiment.model.num_experts_per_tok)
    why = (
        "as in the paper's step: its dispatch sends so many times the bytes, and computing this "
        f"step takes so many times as long on a core here as the paper's on {links.device.name}, "
        "by FLOPs over the peak or bytes over the memory's bandwidth"
    )
    byte_scale = paper.dispatch_bytes / own.dispatch_bytes
    return LinkScale(compute_ratio(own, paper, peak, links), byte_scale, why)


@dataclass(eq=False)
class VirtualRuns:
    """The recorded steps of an experiment's deployments, and what becomes of them.

    Args:
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
        """With the scale of links that `choose_scale` gives."""
        scale = choose_scale(settings, experiment, decodes, peak)
        return cls(settings, experiment.model.num_hidden_layers, ranks_per_node, peak, scale)

    def replay(
        self,
        layout: Layout,
        steps: Sequence[StepRecord],
        laws: ComputeLaws | None,
        factors: tuple[float, float, float] = _NEAR,
    ) -> list[Replayed]:
        """The steps of a deployment in virtual time.

        Args:
            laws: of computing; None for what was measured.
            factors: of the scale of links, for the three times of the clock.
        """
        low, likely, high = (self.scale.times * factor for factor in factors)
        links = VirtualLinks(self.settings.links, (low, likely, high), self.scale.byte_scale)
        clock = VirtualClock(layout, self.num_layers, links, self.ranks_per_node, laws)
        return clock.replay(steps)

    def peak_of(self, layout: Layout) -> MachinePeak:
        """The rates of a deployment's ranks, each with a core."""
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
        laws: ComputeLaws | None,
        replayed: Sequence[Replayed],
    ) -> dict[float, float]:
        """Decode TPS by the scale of links, 0 for none: a quarter to four times the chosen one.

        Args:
            steps: that decode.
            replayed: as `replay` gave it for them.
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
        """What the results say of the clock; of deployments that decode."""
        links = self.settings.links
        speeds = [
            LinkSpeed(scale, tuple(each[scale] for each in of_deployments))
            for scale in (of_deployments[0] if of_deployments else ())
        ]
        scale = self.scale
        name = links.name if links else None
        return VirtualTime(name, scale.times, scale.byte_scale, tuple(speeds))

    def assumptions(self) -> tuple[Assumption, ...]:
        """What virtual time takes for granted."""
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
            "computing",
            "the CPU time of each operation, one thread a rank, the least of all repetitions",
            "measured while at most one rank a core computes; what disturbs it only adds to it",
            "--compute",
        )
        if compute is not None:
            computing = Assumption(
                "computing",
                f"the laws of {compute.name}, in {usual_number_type(compute)}",
                "of the operations that ran: what ranks counted, and every collective, is what the "
                "description of a step emits for the same choices of experts",
                "--compute",
            )
        rows = (
            of_links,
            computing,
            Assumption(
                "left out",
                "the launcher, messages to and from it, and what copies cost the ranks",
                "wall time has them; a cluster hides most of them",
            ),
        )
        return tuple(replace(each, source="virtual") for each in rows)


def _tps(steps: Sequence[StepRecord]) -> float:
    return latency(steps).tps.value
