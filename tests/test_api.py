"""The Python interface: what it exports, its options and errors, how results show themselves."""

import ast
import inspect
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import example_pages
import expertlane
from api_stub import STUB, stub
from cli.screen import telling, tells
from expertlane import api
from expertlane.cli.app import app
from expertlane.cli.option_groups import call_with, parameters_of
from expertlane.cli.options import EngineOptions
from expertlane.cli.output import OutputOptions
from expertlane.errors import SpecError, UserError
from expertlane.report.shown import Results
from expertlane.results.file import read, write
from expertlane.spec.layout import Layout

PACKAGE = Path(expertlane.__file__).parent
FUNCTIONS = ["compare", "plan", "simulate", "bench", "drill", "verify"]
SMALL = {"cluster": "h100x2", "batch": 4, "prompt_len": 8, "output_len": 8}


def simulated(**options) -> Results:
    given = SMALL | {"layout": "dp=2,ep=2"} | options
    return expertlane.simulate("paper-tiny", **given)


def in_new_process(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_loads_no_library():
    loaded = in_new_process("import expertlane, sys; print(*sys.modules)").split()
    assert not {"numpy", "torch", "typer", "pydantic", "rich"} & {*loaded}


def test_all_names_are_there():
    tree = ast.parse(STUB.read_text())
    typed = {
        alias.asname or alias.name
        for each in tree.body
        if isinstance(each, ast.ImportFrom)
        for alias in each.names
    }
    typed |= {each.name for each in tree.body if isinstance(each, ast.FunctionDef | ast.ClassDef)}
    assert not {*expertlane.__all__} - typed
    for name in expertlane.__all__:
        assert getattr(expertlane, name) is not None
        assert name in dir(expertlane)
    with pytest.raises(AttributeError, match="module 'expertlane' has no attribute 'nothing'"):
        expertlane.nothing  # noqa: B018


def test_commands_are_plain_functions_and_no_room_has_their_names():
    for name in ("bench", "compare", "plan", "simulate"):
        assert getattr(expertlane, name) is getattr(api, name)
        assert inspect.isfunction(getattr(expertlane, name))
        assert not list(PACKAGE.glob(f"{name}/*.py"))


def is_hidden(option):
    return getattr(option.default, "hidden", False)


def test_what_plan_refuses_is_no_option_of_it():
    with pytest.raises(TypeError, match="num_requests"):
        expertlane.plan("paper", num_requests=2)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_takes_the_options_of_its_command(name):
    (command,) = (
        each.callback for each in app.registered_commands if each.callback.__name__ == name
    )
    declared = {each.name for each in parameters_of(command) if not is_hidden(each)}
    of_output = {each.name for each in parameters_of(OutputOptions)}
    function = inspect.signature(getattr(api, name))
    assert {*function.parameters} == declared - of_output | {"out"}
    for each in function.parameters.values():
        assert f"\n    {each.name}: " in getattr(api, name).__doc__


def test_the_stub_is_what_the_commands_declare():
    assert STUB.read_text("utf-8") == stub(), "run: python tests/api_stub.py"


def test_the_engine_has_the_defaults_of_the_commands():
    values = {
        each.name: getattr(each.default, "default", each.default)
        for each in parameters_of(EngineOptions)
    }
    assert call_with(EngineOptions, values).config(Layout()) == expertlane.EngineConfig()


def test_results_show_themselves(tmp_path):
    results = simulated()
    assert tells(repr(results), "simulation paper-tiny h100x2 1")
    assert len(repr(results.deployments)) < 200
    assert results.headline.split()[0] in results.answer
    assert max(map(len, results.answer.splitlines())) <= 80
    assert len(results.answer.splitlines()) <= 40
    assert "--full" not in results.answer
    assert results.page.html.startswith("<!doctype html>")
    assert results.page._repr_html_().startswith('<iframe sandbox="allow-scripts" srcdoc="')
    assert "<pre>" in results._repr_html_()
    assert results.command == (
        "expertlane.simulate(model='paper-tiny', layout='dp=2,ep=2', cluster='h100x2', batch='4', "
        "prompt_len='8', output_len='8')"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.full
def test_results_of_every_kind_have_an_answer_and_a_page():
    for make in example_pages.KINDS.values():
        results = Results.of(make())
        assert len(repr(results)) < 300
        assert results.headline
        assert results._repr_html_().count("<table>") == results._repr_html_().count("</table>")


def test_html_of_a_notebook_is_escaped():
    results = example_pages.serving()
    hostile = "<script>alert(1)</script>\"'&"
    record = replace(results.deployments[0], name=hostile)
    shown = Results.of(
        replace(results, deployments=(record,), question=results.question | {"model": hostile})
    )
    assert "<script" not in shown._repr_html_()
    assert "&lt;script" in shown._repr_html_()
    frame = shown.page._repr_html_()
    assert frame.count("<") == 2  # of the frame itself
    assert frame.count('"') == 6


def test_files_are_written_where_asked(tmp_path):
    results = simulated(out=tmp_path / "there", trace=True)
    there = sorted(each.name for each in (tmp_path / "there").iterdir())
    assert "results.json" in there
    assert "report.html" in there
    assert any(name.startswith("trace-") for name in there)
    assert expertlane.load_results(tmp_path / "there") == results
    saved = results.save(tmp_path / "saved")
    assert [each.name for each in saved] == ["results.json", "report.md", "report.html"]
    assert read(tmp_path / "saved") == read(tmp_path / "there")
    assert (
        results.export(tmp_path / "table.csv").read_text("utf-8").startswith("kind,created,model")
    )
    with pytest.raises(UserError, match=telling(".csv .parquet")):
        results.export(tmp_path / "table.xlsx")


def test_values_are_given_as_python_has_them():
    layout = expertlane.simulate("paper-tiny", **SMALL, layout=["dp=2", "ep=2"])
    assert layout.deployments == simulated().deployments
    swept = simulated(batch=[2, 4])
    assert [each.batch for each in swept.deployments[0].serving] == [2, 4]
    limited = simulated(slo=["ttft.p95=500ms", "tpot.mean=20ms"])
    assert len(limited.deployments[0].serving[0].slos) == 2


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"overlap": "maybe"}, "overlap maybe off on auto"),
        ({"skew": 99}, "skew 99 0 10"),
        ({"mtp": 1.5}, "mtp 1.5"),
        ({"trace": 1}, "trace 1 True False"),
        ({"trace": True}, "trace out='results/NAME'"),
        ({"layout": None}, "layout missing row plan"),
        ({"layout": "dp=3,ep=2"}, "layout"),
        ({"requests": 3}, "requests 3 path"),
        ({"cluster": "h100x0"}, ""),
    ],
)
def test_mistakes_are_the_packages_own_errors(options, line):
    with pytest.raises(expertlane.ExpertlaneError) as caught:
        simulated(**options)
    assert tells(str(caught.value), line)
    assert isinstance(caught.value, UserError)


def test_unknown_and_missing_options_are_type_errors():
    with pytest.raises(TypeError, match=r"^simulate\(\): .*'skeww'; did you mean skew\?$"):
        simulated(skeww=1)
    with pytest.raises(TypeError, match=r"^bench\(\): .*'qqqqq'$"):
        expertlane.bench("paper-tiny", qqqqq=1)
    with pytest.raises(TypeError, match=telling("plan missing model")):
        expertlane.plan()
    with pytest.raises(TypeError, match=r"^diff\(\): .*'treshold'; did you mean threshold\?$"):
        expertlane.diff("a", "b", treshold=1)
    with pytest.raises(TypeError, match=telling("load_results missing path")):
        expertlane.load_results()
    with pytest.raises(TypeError, match=telling("plan positional")):
        expertlane.plan("paper-tiny", "h100x2")


def test_differences(tmp_path):
    results = simulated(skew=0)
    same = expertlane.diff(results, results)
    assert not same.regressions
    assert tells(repr(same), "Difference A B 3 identical")
    write(results, tmp_path)
    between = expertlane.diff(tmp_path, simulated(skew=0, execution="eager"), threshold=1)
    assert between.names == (str(tmp_path), "B")
    assert between.regressions
    assert between.headline in " ".join(between.answer.split())
    assert between._repr_html_().startswith("<pre>A: ")
    with pytest.raises(SpecError, match="threshold is -1"):
        expertlane.diff(results, results, threshold=-1)
    with pytest.raises(UserError, match="cannot read"):
        expertlane.diff(results, Path("nowhere"))


def test_without_pandas_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError, match=r"pip install 'expertlane\[pandas\]'"):
        Results.of(example_pages.serving()).to_pandas()


def test_with_pandas_a_frame():
    pytest.importorskip("pandas", reason="pandas is not installed")
    frame = simulated(batch=[2, 4]).to_pandas()
    assert list(frame[frame["row"] == "serving"]["batch"]) == [2, 4]
