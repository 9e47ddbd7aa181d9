"""How far the step of a small experiment is like the paper's: experts' FLOPs for each byte.

    python experiments/paper/likeness.py
    python experiments/paper/likeness.py mine.toml --context 128 --dtype bfloat16

Of one decode step of all sequences, as the engine counts it; runs nothing.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields

from expertlane.comparison.assumptions import (
    BASELINE,
    PAPER_CONTEXT,
    PROPOSAL,
    FlopsPerByte,
    flops_per_byte,
    likeness,
    paper_step_work,
)
from expertlane.cost.step.operation import NumberTypes
from expertlane.errors import UserError
from expertlane.report import markdown
from expertlane.report.document import Answer, Report, Section, Table, number, text
from expertlane.report.numbers import figures, times
from expertlane.spec.experiment import Experiment, find_experiment, read_experiment
from expertlane.spec.layout import Layout


@dataclass(frozen=True)
class _Row:
    """One kind of bytes."""

    name: str
    paper: float
    factors: tuple[float, ...]


def table(
    experiment: Experiment, layout: Layout, dtypes: Sequence[str], context: int = PAPER_CONTEXT
) -> Table:
    """FLOPs a byte of the paper, and by what factor the experiment's differ in each dtype."""
    paper = flops_per_byte(paper_step_work(layout, experiment.model.num_experts_per_tok, context))
    found = [likeness(experiment, layout, NumberTypes.all_of(dtype), context) for dtype in dtypes]
    rows = [
        _Row(
            field.name.replace("_", " "),
            getattr(paper, field.name),
            tuple(getattr(each, field.name) for each in found),
        )
        for field in fields(FlopsPerByte)
    ]
    columns = [
        text("expert FLOPs for a byte of", lambda row: row.name),
        number("the paper's", lambda row: row.paper, figures),
        *(
            number(dtype, lambda row, place=place: row.factors[place], times)
            for place, dtype in enumerate(dtypes)
        ),
    ]
    return Table.of(str(layout), columns, rows)


def report(experiment: Experiment, dtypes: Sequence[str], context: int = PAPER_CONTEXT) -> Report:
    """A table for the paper's baseline and one for its proposal."""
    model, workload = experiment.model, experiment.workload
    says = (
        f"A decode step of {workload.num_sequences:,} sequences at {workload.mean_context:,} "
        f"tokens of context, {model.name}, against the paper's at {context:,} tokens: factors of "
        "the paper's experts' FLOPs for each byte; 1.00× is alike, less is more bytes."
    )
    tables = (table(experiment, layout, dtypes, context) for layout in (BASELINE, PROPOSAL))
    section = Section(f"{experiment.name} beside the paper's step", (says, *tables))
    answer = Answer(f"{experiment.name} | counted", says)
    return Report("Likeness to the paper's step", answer, "counted", "", "", (section,))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables as Markdown; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("experiment", nargs="?", default="paper-small", help="name or TOML file")
    parser.add_argument("--context", type=int, default=PAPER_CONTEXT, help="the paper's tokens")
    parser.add_argument("--dtype", default="float32,bfloat16", help="dtypes, by commas")
    options = parser.parse_args(arguments)
    try:
        experiment = read_experiment(find_experiment(options.experiment))
        if options.context < 0:
            raise UserError(f"--context is {options.context}; valid: 0 or more")
        made = report(experiment, options.dtype.split(","), options.context)
    except UserError as error:
        print(f"likeness: {error}", file=sys.stderr)
        return 2
    print(markdown.render(made), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
