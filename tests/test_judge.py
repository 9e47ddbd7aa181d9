"""The judge of virtual time: rows kept while it runs, and results of earlier runs."""

import importlib
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]
NAMES = ("cases", "dilation", "judge", "measure", "network", "on_ranks", "rows")
HEAD = {"version": "1", "cpu": "a"}


@pytest.fixture(scope="module")
def scripts():
    """The modules of benchmarks/judge, as its scripts see them."""
    sys.path.insert(0, str(ROOT / "benchmarks" / "judge"))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})
    sys.path.pop(0)
    for name in NAMES:
        del sys.modules[name]


def test_a_run_that_was_ended_goes_on(scripts, tmp_path):
    path, case = tmp_path / "rows.jsonl", scripts.cases.CASES[0]
    rows = scripts.rows.Rows(path, HEAD)
    assert scripts.measure.is_missing(rows, case, link=True)
    scripts.rows.add(path, "link", {"link": case.link, "share": case.share})
    scripts.rows.add(path, "case", {"case": case.described, "token_median_s": 1.0})
    with path.open("a") as file:
        file.write('{"case": {"ca')  # as it was killed
    rows = scripts.rows.Rows(path, HEAD)
    assert [kind for kind, _ in rows.all()] == ["link", "case"]
    assert not scripts.measure.is_missing(rows, case, link=True)
    assert not scripts.measure.is_missing(rows, case, link=False)
    changed = replace(case, batch=1, link="slow")  # as another version has it
    assert scripts.measure.is_missing(rows, changed, link=True)
    assert scripts.measure.is_missing(rows, changed, link=False)
    scripts.rows.add(path, "case", {"case": changed.described})
    assert not scripts.measure.is_missing(rows, changed, link=False)


def test_what_another_machine_measured_is_left_alone(scripts, tmp_path):
    path = tmp_path / "rows.jsonl"
    scripts.rows.Rows(path, HEAD)
    with pytest.raises(scripts.network.JudgeError, match=r"rows.jsonl is of .*'a'.*'b'"):
        scripts.rows.Rows(path, HEAD | {"cpu": "b"})
    assert json.loads(path.read_text()) == HEAD


def test_what_was_measured_is_told_once(scripts, tmp_path, capsys):
    path, case = tmp_path / "rows.jsonl", scripts.cases.CASES[2]
    rows = scripts.rows.Rows(path, HEAD)
    size = path.stat().st_size
    scripts.rows.add(rows.path, "link", {"link": "fast", "share": 0.125})
    row = {"case": case.described, "token_median_s": 1.2, "took_s": 12.0}
    scripts.rows.add(rows.path, "case", row)
    whole = path.stat().st_size
    with path.open("a") as file:
        file.write('{"case"')
    size = scripts.measure.tell(path, size)
    assert size == whole
    link, told = capsys.readouterr().err.splitlines()
    assert link.endswith("link fast, 0.125 of a core")
    assert told.endswith("ep2: 150.0 ms, took 12 s")
    assert scripts.measure.tell(path, size) == size
    assert capsys.readouterr().err == ""


def test_the_figures_of_before_stand_beside(scripts):
    kept = ROOT / "benchmarks" / "results"
    folders = [kept / "2026-11-26-judge-2", kept / "2026-11-26-judge"]
    found = scripts.judge.earlier(folders)
    assert found.keys() == {case.name for case in scripts.cases.CASES}
    assert found["ep2"]["error"] == pytest.approx(-0.139, abs=1e-3)
    assert found["ep16"] == {"true_s": pytest.approx(0.1942, abs=1e-4)}  # measured alone
    row = {"case": "ep16", "bound": "compute", "layout": "dp=16,ep=16", "spread": 0.02}
    row |= {"true_s": 0.2, "virtual_s": 0.18, "error": -0.1}
    row |= {"cpu_ratio": 1.2, "error_with_same_cpu": -0.03}
    cells = [next(iter(column.cells)) for column in scripts.judge.table_of([row], found).columns]
    assert cells[2:] == ["200.0", "2.0%", "180.0", "-10.0%", "× 1.20", "-3.0%", "194.2", "—", "—"]


@pytest.mark.skipif(sys.platform != "linux", reason="ranks are named on Linux alone")
def test_ranks_are_found_by_their_names(scripts, tmp_path, monkeypatch):
    monkeypatch.setattr(scripts.dilation, "ROOT", tmp_path)
    (tmp_path / "cgroup.procs").write_text(f"{os.getpid()}\n")
    (tmp_path / "rank0").mkdir()
    dilation = scripts.dilation.Dilation(1)
    with pytest.raises(scripts.network.JudgeError, match="no process is called expertlane r0"):
        dilation.place_ranks()
    name = Path("/proc/self/comm").read_text()
    Path("/proc/self/comm").write_text("expertlane r0")
    try:
        dilation.place_ranks()
    finally:
        Path("/proc/self/comm").write_text(name)
    assert (tmp_path / "rank0" / "cgroup.procs").read_text() == str(os.getpid())
    with pytest.raises(scripts.network.JudgeError, match="rank 0 has no connection to another"):
        dilation.check_links(1)


def test_a_machine_without_quotas_is_told_in_a_line(scripts, tmp_path, monkeypatch):
    monkeypatch.setattr(scripts.dilation, "CONTROLLER", tmp_path)
    with pytest.raises(scripts.network.JudgeError, match="no CPU controller of cgroup v1"):
        scripts.dilation.Dilation(1).make()
