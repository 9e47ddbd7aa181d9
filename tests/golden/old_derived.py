"""What follows from several measured records: what overlap hides, and how a family scales."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from expertlane.results.record import EXPERIMENT, SCALING, DeploymentRecord
from expertlane.results.results import Results


@dataclass(frozen=True)
class HiddenCommunication:
    """Two deployments that differ in overlap alone.

    Attributes:
        off, on: their names.
        step_off_s, step_on_s: their mean decode steps (rounds, where micro-batches rotate).
        exposed_s: seconds of such a step blocked in dispatch and combine without overlap.
        hidden: (step_off_s - step_on_s) / exposed_s; negative where overlap costs time; None
            where nothing was exposed.
    """

    off: str
    on: str
    step_off_s: float
    step_on_s: float
    exposed_s: float

    @property
    def hidden(self) -> float | None:
        """The share of exposed communication that overlap hides."""
        return hidden_communication(self.step_off_s, self.step_on_s, self.exposed_s)


def hidden_communication(step_off_s: float, step_on_s: float, exposed_s: float) -> float | None:
    """(step_off_s - step_on_s) / exposed_s; None where nothing was exposed."""
    return (step_off_s - step_on_s) / exposed_s if exposed_s > 0 else None


def hidden_by_overlap(records: Sequence[DeploymentRecord]) -> tuple[HiddenCommunication, ...]:
    """One entry for each two measured deployments that decode and differ in overlap alone."""
    return tuple(
        HiddenCommunication(
            off=off.name,
            on=on.name,
            step_off_s=off.decode.round_s.value,
            step_on_s=on.decode.round_s.value,
            exposed_s=off.decode.exposed_s or 0.0,
        )
        for off in records
        for on in records
        if off.layout == on.layout
        and on.options.overlap is True
        and off.options == replace(on.options, overlap=False)
        and off.decode
        and on.decode
    )


@dataclass(frozen=True)
class ScalingPoint:
    """Decoding at one expert-parallel size; `relative_…`: to the first point's."""

    name: str
    ep_size: int
    num_ranks: int
    tps: float
    tps_per_rank: float
    relative_tps_per_rank: float
    critical_path_tps_per_rank: float
    relative_critical_path_tps_per_rank: float


def scaling_points(results: Results) -> tuple[ScalingPoint, ...]:
    """Measured decode throughput over expert-parallel sizes, by size.

    Deployments of the same family (layouts that differ from the scaling runs' in `dp` and `ep`
    alone, same options) join at sizes that these lack.
    """
    of_sizes = {each.layout.ep: each for each in results.select("measured", SCALING)}
    families = {_family(each) for each in of_sizes.values()}
    for record in results.select("measured", EXPERIMENT):
        if _family(record) in families:
            of_sizes.setdefault(record.layout.ep, record)
    rows = []
    for _, record in sorted(of_sizes.items()):
        decode = record.decode
        if decode and decode.critical_path:
            num = record.num_ranks
            rows.append((record, decode.tps.value, decode.critical_path.tps / num))
    return tuple(
        ScalingPoint(
            name=record.name,
            ep_size=record.layout.ep,
            num_ranks=record.num_ranks,
            tps=tps,
            tps_per_rank=tps / record.num_ranks,
            relative_tps_per_rank=(tps / record.num_ranks) / (rows[0][1] / rows[0][0].num_ranks),
            critical_path_tps_per_rank=critical_tps,
            relative_critical_path_tps_per_rank=critical_tps / rows[0][2],
        )
        for record, tps, critical_tps in rows
    )


def _family(record: DeploymentRecord) -> tuple[object, ...]:
    layout = record.layout
    return layout.replicas, layout.pp, layout.tp, layout.etp, record.options
