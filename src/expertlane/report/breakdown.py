"""Where a step's time goes, deployment by deployment, and what work and traffic it took."""

from expertlane.report.comparison import Comparison, Row
from expertlane.report.document import Section, Table, number, text
from expertlane.report.numbers import NONE, bytes_si, figures, milliseconds, percent
from expertlane.spec.names import Cause, Link

# Deployments side by side in one table that fits 80 columns.
_NUM_SIDE_BY_SIDE = 9


def bottlenecks(comparison: Comparison) -> Section:
    """The largest part of each deployment's time, then all parts of all deployments."""
    rows = comparison.rows
    table = Table(
        "",
        (text("#"), text("deployment"), text("largest part")),
        tuple(
            (str(row.number), row.deployment.name, row.deployment.bottleneck.sentence)
            for row in rows
        ),
    )
    chunks = [
        rows[start : start + _NUM_SIDE_BY_SIDE] for start in range(0, len(rows), _NUM_SIDE_BY_SIDE)
    ]
    return Section(
        "Bottlenecks",
        (
            table,
            *(_shares(comparison, chunk) for chunk in chunks),
            "Mean over ranks. The last row is the time in which every sequence goes one token on. "
            "Waiting is time blocked because another rank came later; what even the last rank "
            "waits for is the transfer. A straggler waits less than the others of its pipeline "
            "stage, by over 5% of the time. Pipeline bubble: blocked in a hand-over, its transfer "
            "included, or idle while another stage works. Between steps: all ranks without a plan.",
        ),
    )


def _shares(comparison: Comparison, rows: tuple[Row, ...]) -> Table:
    phase = comparison.phase
    shares = [row.deployment.cause_shares(phase) for row in rows]
    total_s = [sum(row.deployment.breakdown_s[phase].values()) for row in rows]
    return Table(
        f"Where the time of {phase} goes",
        (text(""), *(number(f"#{row.number}") for row in rows)),
        (
            *(
                (
                    cause.value,
                    *(percent(of_row[cause]) if of_row[cause] else NONE for of_row in shares),
                )
                for cause in Cause
                if any(of_row[cause] for of_row in shares)
            ),
            ("ms in all", *(milliseconds(seconds) for seconds in total_s)),
        ),
    )


def work_and_traffic(comparison: Comparison) -> Section:
    """CPU time, utilisation, balance and bytes."""
    return Section(
        f"Work and traffic of {comparison.phase}",
        (
            Table(
                "",
                (
                    text("#"),
                    text("deployment"),
                    number("CPU ms per token"),
                    number("critical-path TPS"),
                    number("critical-path ms per step"),
                    number("of peak FLOP/s"),
                    number("of peak bytes/s"),
                    number("load max/mean"),
                ),
                tuple(_work(row) for row in comparison.rows),
            ),
            Table(
                "Sent to other ranks, per token",
                (
                    text("#"),
                    text("deployment"),
                    *(number(f"{link.label} {kind}") for link in Link for kind in ("", "meta")),
                    number("collectives per rank, round"),
                ),
                tuple(_traffic(comparison, row) for row in comparison.rows),
            ),
            "Critical path: per stage the largest CPU time among ranks, chained through the "
            "pipeline; transfers and other threads left out. Load: token-expert pairs of the "
            "fullest expert over the mean, prefill and decode counted together, in the layer "
            "where that is most.",
        ),
    )


def _work(row: Row) -> tuple[str, ...]:
    phase = row.phase
    return (
        str(row.number),
        row.deployment.name,
        milliseconds(phase.cpu_s_per_token),
        figures(phase.critical_path.tps),
        milliseconds(phase.critical_path.step_s),
        percent(phase.utilisation.flops),
        percent(phase.utilisation.read_bytes),
        figures(max(row.deployment.expert_load.max_over_mean)),
    )


def _traffic(comparison: Comparison, row: Row) -> tuple[str, ...]:
    of_link = row.deployment.traffic_bytes[comparison.phase]
    sent = [of_link[link.label] for link in Link]
    num_collectives = sum(row.phase.num_collectives.values())
    return (
        str(row.number),
        row.deployment.name,
        *(
            bytes_si(num_bytes / row.phase.num_tokens)
            for bytes_of in sent
            for num_bytes in (bytes_of.payload, bytes_of.metadata)
        ),
        figures(num_collectives / row.deployment.num_ranks / row.phase.num_rounds),
    )
