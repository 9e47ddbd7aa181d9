"""The commands as Python functions: what `import expertlane` offers beside `LLM`.

A function takes the options that its command declares, under the same names with underscores and
with the same defaults. What is found is returned; it is written only if `out` says where. Progress
and warnings go to stderr, as the commands' do.
"""

from collections.abc import Callable
from contextlib import closing
from inspect import unwrap
from pathlib import Path
from typing import Any

from expertlane.cli.bench import bench as bench_command
from expertlane.cli.compare import compare as compare_command
from expertlane.cli.diff import THRESHOLD_PERCENT
from expertlane.cli.drill import drill as drill_command
from expertlane.cli.option_groups import (
    Fill,
    PythonFunction,
    PythonOptions,
    call_with,
    names_itself,
)
from expertlane.cli.output import Call, Found, write_beside
from expertlane.cli.plan import plan as plan_command
from expertlane.cli.simulate import of_plan
from expertlane.cli.simulate import simulate as simulate_command
from expertlane.cli.verify import verify as verify_command
from expertlane.comparison import corrections
from expertlane.cost.laws.corrections import Corrections
from expertlane.errors import UserError
from expertlane.progress import Progress
from expertlane.report.sections import report_of
from expertlane.report.shown import Difference, Results
from expertlane.results import file
from expertlane.results.diff import difference
from expertlane.results.results import Results as Schema
from expertlane.spec.files import as_path
from expertlane.spec.ranges import take

__all__ = [
    "Corrections",
    "Difference",
    "Results",
    "bench",
    "compare",
    "diff",
    "drill",
    "fit_corrections",
    "load_results",
    "plan",
    "simulate",
    "verify",
]


def _function(command: Callable[..., None], fill: Fill = lambda _: {}) -> PythonFunction[Results]:
    """A command as a function, with every option that it declares.

    Args:
        fill: as `takes_groups` takes it.
    """
    run = unwrap(command)
    options = PythonOptions.of(run)

    def function(*arguments: Any, **given: Any) -> Results:
        taken = options.take(*arguments, **given)
        out = taken.pop("out", None)
        if out is None and taken.get("trace"):
            raise UserError("trace writes files; say where: out='results/NAME'")
        call = Call(options.command(taken), out)
        found = call_with(run, options.defaults() | taken | fill(taken) | {"call": call})
        if not isinstance(found, Found):
            with closing(found):  # of a comparison: one, of the one number of experts per token
                (found,) = found
        results = Results.of(found.results)
        if found.folder is not None:
            file.write(results, found.folder)
            write_beside(found, report_of(results), None)
        else:
            found.also()  # files whose folder another option names
        return results

    return options.describe(function, run.__name__, __name__, Results)


compare = _function(compare_command)
plan = _function(plan_command)
simulate = _function(simulate_command, of_plan)
bench = _function(bench_command)
drill = _function(drill_command)
verify = _function(verify_command)


@names_itself
def load_results(path: str | Path) -> Results:
    """Read a results.json of compare, plan, simulate, bench, drill or verify, or that of a folder.

    Raises:
        UserError: it is missing, damaged, or of another schema version; one line that says which.
    """
    return Results.of(file.read(as_path("path", path)))


@names_itself
def diff(
    first: Schema | str | Path,
    second: Schema | str | Path,
    *,
    threshold: float = THRESHOLD_PERCENT,
) -> Difference:
    """What changed from one result to another: deployment by deployment, load by load.

    Args:
        first, second: results, a results.json, or the folder it is in.
        threshold: in percent: by how much a metric may get worse before it is a regression.

    Raises:
        UserError: they are of different commands, have nothing in common, or cannot be read.
    """
    given = first, second
    share = take("threshold", threshold) / 100
    results = [
        each if isinstance(each, Schema) else Results.of(file.read(as_path(name, each)))
        for name, each in zip(("first", "second"), given, strict=True)
    ]
    names = [
        letter if isinstance(each, Schema) else str(each)
        for letter, each in zip("AB", given, strict=True)
    ]
    return Difference.of(difference(results[0], results[1], (names[0], names[1]), share))


@names_itself
def fit_corrections(
    *results: Schema | str | Path, cluster: str | None = None, engine: str | None = None
) -> Corrections:
    """The corrections of a projection that fit measured deployments best.

    Their `write` writes the file that `corrections` of plan, simulate and compare takes.

    Args:
        results: results, a results.json, or its folder: with measured and projected deployments, or
            one with measured deployments and one of `plan` or `simulate`.
        cluster: the cluster to project on, as `--cluster` takes it; None for the projection's own.
        engine: engine whose deployments are taken; None if only one was measured.

    Raises:
        UserError: nothing is measured or projected, models or devices differ, several engines were
            measured, or a file cannot be read.
    """
    if not results:
        raise UserError("fit_corrections: give one or more results")
    read = [
        each if isinstance(each, Schema) else Results.of(file.read(as_path("results", each)))
        for each in results
    ]
    return corrections.fit_corrections(read, Progress(), cluster, engine)
