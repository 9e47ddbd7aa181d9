"""The paper's four design goals, with what a projection says of each."""

from dataclasses import replace

from expertlane.report.document import Section, Table, number, text
from expertlane.report.numbers import NONE, bytes_si, counted, figures, milliseconds, percent, times
from expertlane.report.projected_rows import BEYOND, at_context, bounds, numbers, tps
from expertlane.results.projection import ProjectedDeployment, ProjectedScaling, Projection
from expertlane.spec.names import ProjectedCause

_DISPATCH = str(ProjectedCause.DISPATCH_COMBINE)


def goals(projection: Projection) -> tuple[Section, ...]:
    """Parallelism and contention, overlap, scaling."""
    return _parallelism(projection), _overlap(projection), _scaling(projection)


def _parallelism(projection: Projection) -> Section:
    rows = projection.usual(projection.top_ks[0])
    place = numbers(projection)
    num_experts = {row.name: row.layout.ep_size * row.layout.replicas for row in rows}
    most = max(num_experts.values())
    leaders = ", ".join(f"#{place[row.name]}" for row in rows if num_experts[row.name] == most)
    least = min(at_context(projection, row).weight_bytes for row in rows)
    readers = ", ".join(
        f"#{place[row.name]}"
        for row in rows
        if at_context(projection, row).weight_bytes < 1.01 * least
    )
    return Section(
        "Projected, goals 1 and 2: experts at once, no contention inside a GPU",
        (
            f"Most experts of a layer computing at once: {most}, with {leaders}. Fewest weights "
            f"read by a GPU in a decode step: {bytes_si(least)}, with {readers}.",
            Table(
                "",
                (
                    text("#"),
                    text("deployment"),
                    number("experts of a layer at once"),
                    number("stages at once"),
                    number("part of an expert on a GPU"),
                    number("weights read by a GPU, step"),
                ),
                tuple(
                    (
                        str(place[row.name]),
                        row.name,
                        str(num_experts[row.name]),
                        str(min(row.layout.pp_size, row.options.num_micro_batches)),
                        _part(row),
                        bytes_si(at_context(projection, row).weight_bytes),
                    )
                    for row in rows
                ),
            ),
            "At once: groups of GPUs with different experts. A step of m micro-batches or two "
            "halves reads an expert's weights once for each that has a token for it.",
        ),
    )


def _part(row: ProjectedDeployment) -> str:
    etp = row.layout.layout.etp
    return "all" if etp == 1 else f"1/{etp}"


def _overlap(projection: Projection) -> Section:
    heading = "Projected, goal 3: communication hidden under computation"
    cells, num_paying = [], 0
    place = numbers(projection)
    for top_k in projection.top_ks:
        for off, on in _pairs(projection.usual(top_k)):
            before, after = at_context(projection, off), at_context(projection, on)
            exposed_s = before.shares.get(_DISPATCH, 0.0) * before.step_s.value
            gained_s = before.step_s.value - after.step_s.value
            num_paying += gained_s > 0
            cells.append(
                (
                    f"top-{top_k}",
                    f"#{place[off.name]}, #{place[on.name]}",
                    milliseconds(before.step_s.value),
                    milliseconds(after.step_s.value),
                    milliseconds(exposed_s),
                    percent(gained_s / exposed_s) if gained_s > 0 and exposed_s else NONE,
                    bytes_si(after.weight_bytes - before.weight_bytes),
                    _prefill_gain(off, on),
                )
            )
    if not cells:
        return Section(heading, ("No two deployments differ in overlap alone.",))
    return Section(
        heading,
        (
            f"Overlap shortens the decode step in {num_paying} of {len(cells)} pairs at "
            f"{projection.context:,} tokens of context. Each half of a batch reads the weights for "
            "itself: where a step is bound by weights, that costs more than it hides. Hidden: the "
            "time gained over what dispatch and combine took exposed.",
            Table(
                "",
                (
                    text("model"),
                    text("without, with"),
                    number("step without, ms"),
                    number("with, ms"),
                    number("exposed without, ms"),
                    number("hidden"),
                    number("more weights read"),
                    number("prefill TPS gained"),
                ),
                tuple(cells),
            ),
        ),
    )


def _prefill_gain(off: ProjectedDeployment, on: ProjectedDeployment) -> str:
    if off.prefill is None or on.prefill is None:
        return NONE
    return percent(on.prefill.tps.value / off.prefill.tps.value - 1)


def _pairs(
    rows: tuple[ProjectedDeployment, ...],
) -> list[tuple[ProjectedDeployment, ProjectedDeployment]]:
    return [
        (off, on)
        for off in rows
        for on in rows
        if on.options.overlap is True
        and (off.layout, off.options) == (on.layout, replace(on.options, overlap=False))
    ]


def _scaling(projection: Projection) -> Section:
    heading = "Projected, goal 4: scaling"
    points = projection.scaling
    if not points:
        return Section(heading, ("This experiment has no layouts of growing ep.",))
    first, last = points[0], points[-1]
    too_large = [each for each in points if not each.same_work.fits]
    parts: list[str | Table] = [
        f"From {counted(first.num_ranks, 'GPU')} to {counted(last.num_ranks, 'GPU')}, at "
        f"{projection.context:,} tokens of context: with the same {projection.num_sequences:,} "
        f"sequences TPS per GPU goes to {times(_per_gpu(last) / _per_gpu(first))}; with as many "
        f"sequences on each GPU to {times(_share_per_gpu(last) / _share_per_gpu(first))}, since a "
        "GPU that holds fewer experts reads fewer weights; linear would be 1.00×.",
        *_scaling_tables(projection),
    ]
    if too_large:
        names = ", ".join(f"ep={each.layout.ep_size}" for each in too_large)
        parts.append(
            f"{BEYOND} Not all sequences fit beside the weights, as if they did: {names}; "
            f"ep={too_large[0].layout.ep_size} has {bytes_si(too_large[0].weight_bytes)} of "
            f"weights on a GPU where {bytes_si(too_large[0].device_bytes)} may be taken."
        )
    if any(each.num_slots_per_rank * each.layout.ep_size > _num_experts(points) for each in points):
        parts.append("Beyond one expert a GPU, GPUs are filled with copies of experts.")
    return Section(heading, tuple(parts))


def _scaling_tables(projection: Projection) -> tuple[Table, Table]:
    """Likely values, and their bounds."""
    points = projection.scaling
    first = points[0]
    return (
        Table(
            f"Decode TPS, top-{projection.top_ks[0]}",
            (
                number("ep"),
                number("experts a GPU"),
                number("weights a GPU"),
                number("TPS, same work"),
                number("per GPU"),
                number("to the first"),
                number("TPS, same share"),
                number("per GPU"),
                number("to the first"),
            ),
            tuple(
                (
                    str(each.layout.ep_size),
                    str(each.num_slots_per_rank),
                    bytes_si(each.weight_bytes),
                    tps(each.same_work),
                    figures(_per_gpu(each)),
                    times(_per_gpu(each) / _per_gpu(first)),
                    tps(each.same_share),
                    figures(_share_per_gpu(each)),
                    times(_share_per_gpu(each) / _share_per_gpu(first)),
                )
                for each in points
            ),
        ),
        Table(
            "Low to high, 1000 TPS",
            (number("ep"), number("same work"), number("same share")),
            tuple(
                (
                    str(each.layout.ep_size),
                    bounds(each.same_work.tps, 1e-3),
                    bounds(each.same_share.tps, 1e-3),
                )
                for each in points
            ),
        ),
    )


def _num_experts(points: tuple[ProjectedScaling, ...]) -> int:
    return points[0].num_slots_per_rank * points[0].layout.ep_size


def _per_gpu(point: ProjectedScaling) -> float:
    return point.same_work.tps.value / point.num_ranks


def _share_per_gpu(point: ProjectedScaling) -> float:
    return point.same_share.tps.value / point.num_ranks
