"""Results as a flat table: rows, names of columns, formats, and what is missing."""

import csv
import io
import sys
from dataclasses import replace

import pytest

import example_pages
from cli.screen import telling
from example_simulation import SIMULATION
from expertlane.errors import UserError
from expertlane.results.file import check_format, csv_text, rows_of, to_pandas, write_table


@pytest.mark.parametrize("make", example_pages.KINDS.values(), ids=example_pages.KINDS)
def test_a_row_for_each_deployment_and_phase_or_load(make):
    results = make()
    rows = rows_of(results)
    assert len(rows) == sum(
        max(1, len(each.steps) + len(each.serving)) for each in results.deployments
    )
    assert len({tuple(row) for row in rows}) == 1  # the same columns
    for name in rows[0]:
        assert any(row[name] is not None for row in rows), name
        assert name.isidentifier(), name
    assert {type(cell) for row in rows for cell in row.values()} <= {
        *(str, int, float, bool),
        type(None),
    }


def test_numbers_have_their_units_and_bounds():
    (steps, *_, load) = rows_of(SIMULATION)
    record = SIMULATION.deployments[0]
    assert (steps["row"], load["row"]) == ("steps", "serving")
    assert load["deployment"] == record.name
    assert load["layout"] == str(record.layout)
    assert load["output_tokens_per_s"] == record.serving[0].output_tps.value
    assert load["output_tokens_per_s_low"] == record.serving[0].output_tps.low
    assert record.serving[0].ttft_s is not None
    assert record.serving[0].ttft_s.p95 is not None
    assert load["ttft_s_p95"] == record.serving[0].ttft_s.p95.value
    assert steps["tokens_per_s"] == record.steps[0].tps.value
    assert load["tokens_per_s"] is None


def test_csv_reads_back():
    rows = rows_of(example_pages.serving())
    back = list(csv.DictReader(io.StringIO(csv_text(rows))))
    assert [list(row) for row in back] == [list(row) for row in rows]
    assert [row["batch"] for row in back] == ["1", "8", "32"]
    assert [float(row["output_tokens_per_s"]) for row in back] == [100.0, 800.0, 3200.0]


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@sum"])
def test_a_spreadsheet_calculates_no_name(name):
    record = replace(SIMULATION.deployments[0], name=name)
    rows = rows_of(replace(SIMULATION, deployments=(record,)))
    back = next(csv.DictReader(io.StringIO(csv_text(rows), newline="")))
    assert back["deployment"] == f"'{name}"
    assert rows[0]["deployment"] == name


def test_control_characters_are_escaped():
    assert csv_text([{"name": "\r=1\x1b"}]) == "name\n\\r=1\\x1b\n"


def test_negative_numbers_stay_numbers():
    assert csv_text([{"gain": -0.5, "name": "-x"}]) == "gain,name\n-0.5,'-x\n"


def test_parquet_reads_back(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    rows = rows_of(SIMULATION)
    path = write_table(rows, tmp_path / "results.csv", "parquet")
    assert path.name == "results.parquet"
    assert parquet.read_table(path).to_pylist() == rows


def test_a_data_frame_has_the_rows():
    pytest.importorskip("pandas", reason="pandas is not installed")
    frame = to_pandas(rows_of(example_pages.serving()))
    assert list(frame["output_tokens_per_s"]) == [100.0, 800.0, 3200.0]


def test_a_missing_library_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pandas", None)
    check_format("csv")
    with pytest.raises(UserError, match=telling("pyarrow pip install")):
        check_format("parquet")
    with pytest.raises(UserError, match=telling("pandas pip install")):
        to_pandas([])
