"""Results and differences that show themselves, for Python and notebooks."""

import io
import re
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any, get_args

from rich.console import Console

from expertlane.errors import UserError
from expertlane.report import html, terminal
from expertlane.report.diff import report_of_difference
from expertlane.report.document import Answer, Report
from expertlane.report.files import write_reports
from expertlane.report.sections import report_of
from expertlane.results import diff, file
from expertlane.results.file import Format
from expertlane.results.results import Results as Schema
from expertlane.spec.files import as_path
from expertlane.spec.ranges import shown

_WIDTH = 80


def answer_text(answer: Answer) -> str:
    """The answer as a terminal of 80 columns shows it."""
    stream = io.StringIO()
    console = Console(
        file=stream, width=_WIDTH, color_system=None, markup=False, emoji=False, highlight=False
    )
    terminal.draw_answer(answer, console)
    return re.sub(r" +$", "", stream.getvalue(), flags=re.MULTILINE)


class _Display:
    """Something that has a report: it prints as its answer."""

    def _report(self) -> Report:
        raise NotImplementedError

    @property
    def answer(self) -> str:
        """What the command prints: at most 40 lines of 80 columns."""
        return answer_text(self._report().answer)

    @property
    def headline(self) -> str:
        """The answer in a sentence or two."""
        return self._report().answer.headline

    def _repr_html_(self) -> str:
        return f"<pre>{escape(self.answer)}</pre>"


@dataclass(frozen=True)
class Page:
    """The page of a report; a notebook shows it in a frame that cannot reach what is around it.

    Attributes:
        html: the whole page, which works offline.
    """

    html: str

    def __repr__(self) -> str:
        return f"<Page of {len(self.html):,} characters>"

    def _repr_html_(self) -> str:
        return (
            f'<iframe sandbox="allow-scripts" srcdoc="{escape(self.html)}" '
            f'style="width: 100%; height: 700px; border: 0"></iframe>'
        )


@dataclass(frozen=True, repr=False)
class Results(Schema, _Display):
    """What compare, plan, simulate or bench found; all of `results.json`.

    Times are in seconds, sizes in bytes, throughputs in tokens per second, shares from 0 to 1.
    `deployments` has the records; each has `steps`, by phase, and `serving`, by load.
    """

    @classmethod
    def of(cls, results: Schema) -> "Results":
        """The results, with display in notebooks."""
        return cls(**{each.name: getattr(results, each.name) for each in fields(Schema)})

    def _report(self) -> Report:
        return report_of(self)

    @property
    def page(self) -> Page:
        """The whole report, with its charts."""
        return Page(html.render(self._report()))

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame`: a row for each deployment and phase or load, as `--export` has it.

        Columns are named after the records' fields, with their units: `tokens_per_s`,
        `ttft_s_p95`, and `_low` and `_high` for the bounds of what was projected.

        Raises:
            UserError: pandas is not installed.
        """
        return file.to_pandas(file.rows_of(self))

    def export(self, path: str | Path) -> Path:
        """Write the table of `to_pandas` to a file ending in .csv or .parquet; return its path.

        Raises:
            UserError: another ending, pyarrow is missing, or the folder can't be written to.
        """
        path = as_path("path", path)
        formats: tuple[Format, ...] = get_args(Format)
        for each in formats:
            if path.suffix == f".{each}":
                return file.write_table(file.rows_of(self), path, each)
        valid = " or ".join(f".{each}" for each in formats)
        raise UserError(f"export to {shown(str(path))}: it must end in {valid}")

    def save(self, folder: str | Path) -> tuple[Path, ...]:
        """Write results.json, report.md and report.html; return their paths.

        Raises:
            UserError: the folder can't be written to.
        """
        folder = as_path("folder", folder)
        return file.write(self, folder), *write_reports(self._report(), folder)


@dataclass(frozen=True)
class Difference(diff.Difference, _Display):
    """Changes from A to B; `regressions` is empty where no common metric got worse."""

    @classmethod
    def of(cls, found: diff.Difference) -> "Difference":
        """The difference, with display in notebooks."""
        return cls(**{each.name: getattr(found, each.name) for each in fields(found)})

    def _report(self) -> Report:
        return report_of_difference(self, "", datetime.now(UTC).isoformat(timespec="seconds"))

    def __repr__(self) -> str:
        a, b = self.names
        return f"<Difference from {a} to {b}: {self.headline}>"

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame`: a row for each metric of each deployment and phase or load.

        Raises:
            UserError: pandas is not installed.
        """
        return file.to_pandas(file.aligned([change.row() for change in self.changes]))
