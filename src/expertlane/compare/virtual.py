"""A comparison in virtual time: each rank on cores of its own, on the links of a cluster."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from expertlane.compare.projection import usual_number_type
from expertlane.cost.compute_laws import ComputeLaws
from expertlane.cost.laws.profile import Profile
from expertlane.cost.virtual import Replayed, VirtualClock, VirtualLinks
from expertlane.errors import UserError
from expertlane.results.metrics import latency
from expertlane.results.results import Assumption, LinkSpeed, MachinePeak, VirtualTime
from expertlane.results.step_record import StepRecord
from expertlane.spec.deployment import Deployment
from expertlane.spec.layout import Layout
from expertlane.spec.names import Phase

_NEAR = (0.5, 1.0, 2.0)  # of the scale of links
_FAR = (0.0, 0.25, 4.0)  # 0: without links


@dataclass(frozen=True)
class VirtualSettings:
    """What virtual time is to assume.

    Attributes:
        links: the profile of the links; None where transfers take no time.
        scale: how many times as long transfers take; None for the ratio of compute speeds, or 1
            where computing is a profile's too.
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


def compute_ratio(steps: Sequence[StepRecord], peak: MachinePeak, profile: Profile) -> float:
    """How many times as long the same work takes here, on a core, as on a profile's device.

    Work is the FLOPs and the bytes read of each stage of each rank; it takes FLOPs over the peak
    or bytes over the memory's bandwidth, whichever is longer: measured of a core here, of the
    datasheet there, in the type that its ranks compute in.

    Raises:
        UserError: the steps hold no work, or the device has no figure for such a type.
    """
    device, dtype = profile.device, usual_number_type(profile)
    there = device.flops_per_s.get(dtype)
    if there is None:
        raise UserError(
            f"profile {profile.name} has no FLOP/s of {dtype}; --link-scale says how much slower "
            "links are to be"
        )
    records = [record for step in steps for record in step.records]
    flops = np.array([record.flops for record in records], dtype=np.float64)
    read = np.array([record.weight_bytes for record in records], dtype=np.float64)

    def seconds(flops_per_s: float, bytes_per_s: float) -> float:
        return float(np.maximum(flops / flops_per_s, read / bytes_per_s).sum())

    here_s = seconds(peak.gemm_flops_per_s / peak.num_units, peak.read_bytes_per_s / peak.num_units)
    there_s = seconds(there, device.memory_bytes_per_s)
    if not there_s:
        raise UserError("no work was counted; --link-scale says how much slower links are to be")
    return here_s / there_s


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
    scale: float = 1.0

    def choose_scale(self, decodes: Sequence[StepRecord]) -> None:
        """Take the scale that was asked for, or that of the work of all these steps."""
        settings = self.settings
        if settings.scale is not None:
            self.scale = settings.scale
        elif settings.links is not None and settings.compute is None:
            self.scale = compute_ratio(decodes, self.peak, settings.links)

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
        low, likely, high = (self.scale * factor for factor in factors)
        links = VirtualLinks(self.settings.links, (low, likely, high))
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
            replayed: as `replay` gave it for the steps.
        """
        if self.settings.links is None:
            return {0.0: _decode_tps([each.step for each in replayed])}
        found = {
            factor * self.scale: _decode_tps([each.by_scale[place] for each in of_factors])
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
        return VirtualTime(links.name if links else None, self.scale, tuple(speeds))

    def assumptions(self) -> tuple[Assumption, ...]:
        """What virtual time takes for granted."""
        links = self.settings.links
        if links is None:
            of_links = Assumption("links", "none: transfers take no time", change="--links")
        else:
            why = "so that computing and transfers stand as on the cluster: FLOPs over the peak or "
            why += "bytes over the memory's bandwidth, of all decode steps, on a core here over "
            why += f"the same on {links.device.name}"
            if self.settings.scale is not None:
                why = "asked for"
            elif self.settings.compute is not None:
                why = "as they are: computing is a profile's too"
            of_links = Assumption(
                "links",
                f"{links.name}, transfers {self.scale:,.4g} times as long",
                why,
                "--links, --link-scale",
            )
        compute = self.settings.compute
        computing = Assumption(
            "computing",
            "the CPU time of each operation, one thread a rank",
            "measured while at most one rank a core computes",
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


def _decode_tps(steps: Sequence[StepRecord]) -> float:
    return latency([step for step in steps if step.phase is Phase.DECODE]).tps.value
