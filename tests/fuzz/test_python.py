"""Whatever is wrong with results or arguments, Python gets a `UserError` of one line."""

import inspect
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import example_pages
import expertlane
from expertlane.errors import CapacityError, UserError
from expertlane.report import html
from expertlane.report.sections import report_of
from expertlane.report.shown import answer_text
from expertlane.results.file import csv_text, rows_of, to_json
from expertlane.spec import engine_config
from expertlane.spec.files import strict_json
from fuzz import seeds
from fuzz.mutations import changed_file
from fuzz.test_commands import SETTINGS

# Results with mistakes, read and shown.

_NAMES = ("measured", "projected", "plan", "simulation", "bench")
_DOCUMENTS = dict(zip(_NAMES, seeds.results(), strict=True))
_DOCUMENTS["both"] = json.loads(to_json(example_pages.both()))


def _complaint(path: Path, right: expertlane.Results, *, draws: bool) -> str | None:
    """What is wrong with how a file is read and shown; None where nothing is."""
    try:
        read = expertlane.load_results(path)
    except UserError as error:
        return None if _is_a_line(error, str(path)) else f"not one line with the file: {error!r}"
    except Exception as error:
        return f"reading: {error!r}"
    try:
        report = report_of(read)
        assert answer_text(report.answer)
        assert csv_text(rows_of(read))
        if draws:
            assert html.render(report)
    except Exception as error:
        return f"showing: {error!r}"
    for pair in ((right, read), (read, right)):
        try:
            found = expertlane.diff(*pair)
            assert found.answer
            assert [change.row() for change in found.changes]
            assert strict_json(asdict(found))
        except UserError as error:  # they may have nothing in common
            if not _is_a_line(error, ""):
                return f"not one line: {error!r}"
        except Exception as error:
            return f"comparing: {error!r}"
    return None


def _is_a_line(error: UserError, named: str) -> bool:
    return "\n" not in str(error) and named in str(error)


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> dict[str, expertlane.Results]:
    """The documents without mistakes, by kind."""
    path, found = tmp_path_factory.mktemp("right") / "results.json", {}
    for kind, document in _DOCUMENTS.items():
        path.write_text(json.dumps(document))
        found[kind] = expertlane.load_results(path)
    return found


def _check_damaged(
    data: st.DataObject, right: dict[str, expertlane.Results], folder: Path, *, draws: bool
) -> None:
    kind, path = data.draw(st.sampled_from(sorted(_DOCUMENTS))), folder / "results.json"
    path.write_bytes(changed_file(data.draw, _DOCUMENTS[kind], as_toml=False))
    assert _complaint(path, right[kind], draws=draws) is None


@settings(SETTINGS, max_examples=20)
@given(data=st.data())
def test_a_damaged_result_is_refused_or_shown(
    right: dict[str, expertlane.Results], tmp_path_factory: pytest.TempPathFactory, data: Any
):
    _check_damaged(data, right, tmp_path_factory.getbasetemp(), draws=False)


@pytest.mark.full
@pytest.mark.timeout(3600)
@settings(SETTINGS, max_examples=1500)
@given(data=st.data(), draws=st.sampled_from([False] * 9 + [True]))
def test_many_damaged_results_are_refused_or_shown(
    right: dict[str, expertlane.Results],
    tmp_path_factory: pytest.TempPathFactory,
    data: Any,
    draws: bool,
):
    _check_damaged(data, right, tmp_path_factory.getbasetemp(), draws=draws)


def _folder(path: Path) -> None:
    (path / "results.json").mkdir(parents=True)


def _pipe(path: Path) -> None:
    path.mkdir()
    os.mkfifo(path / "results.json")


def _circle(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize("make", [_folder, _pipe, _circle, Path.touch, Path.mkdir])
def test_what_is_no_file_of_results_is_refused(make: Callable[[Path], None], tmp_path: Path):
    path = tmp_path / "here"
    make(path)
    with pytest.raises(UserError) as caught:
        expertlane.load_results(path)
    assert _is_a_line(caught.value, str(path))


@pytest.mark.parametrize("name", ["a\nb", "a\r\u2028b", "nul\0", "x" * 5000, "a\x1b[31m"])
def test_a_name_that_no_file_has(name: str):
    with pytest.raises(UserError) as caught:
        expertlane.load_results(name)
    assert str(caught.value).isprintable()


def test_the_place_of_a_mistake_is_named(tmp_path: Path):
    document = _DOCUMENTS["simulation"]
    path = tmp_path / "results.json"
    wrong: dict[str, Callable[[], object]] = {
        "question: workload.output_len is missing": lambda: question["workload"].pop("output_len"),
        "deployments.0: serving is ": lambda: record.update(serving=[]),
        "deployments.0.layout": lambda: record["layout"].update(ep=3),
        "created is ": lambda: changed.update(created="yesterday"),
        "deployments.0.steps.0.num_steps": lambda: record["steps"][0].update(num_steps=0),
        "deployments.0.serving.0.output_tps": lambda: tps.update(low=tps["value"] * 2, high=None),
    }
    for place, change in wrong.items():
        changed = json.loads(json.dumps(document))
        question, record = changed["question"], changed["deployments"][0]
        tps = record["serving"][0]["output_tps"]
        change()
        path.write_text(json.dumps(changed))
        with pytest.raises(UserError) as caught:
            expertlane.load_results(path)
        assert str(caught.value).startswith(f"{path}: {place}"), caught.value


# Arguments of wrong types.

_NESTED: list[Any] = []
for _ in range(3000):  # deeper than Python's stack
    _NESTED = [_NESTED]
_WRONG: dict[str, Any] = {
    **{repr(each): each for each in (None, {}, {"a": 1}, [], [1], [[1]], (), {1}, [None], [{}])},
    **{repr(each): each for each in (-1, 0, 2**70, 1.5, float("nan"), float("inf"), 1e300, True)},
    **{repr(each): each for each in ("", "x", "a\nb", "\0", b"x", range(10**9), 1j, int)},
    **{repr(each): each for each in (expertlane.Options(), expertlane.SamplingParams())},
    **{repr(each): each for each in (np.array([1, 2]), np.array([]), np.float32("nan"))},
    "a matrix": np.array([[1.0], [2.0]]),
    "an iterator": iter([1]),
    "an object": object(),
    "a long number": 10**5000,
    "long numbers": [10**5000],
    "a long text": "x" * 5000,
    "nested": _NESTED,
}


def _misused(
    function: Callable[..., object],
    right: dict[str, Any],
    unlike: frozenset[str] = frozenset(),
    valid: str = "no ranks",
) -> Iterator[str]:
    """What does not end as it should, of calls with one wrong argument each.

    No `url` is tried, as texts and numbers are names of hosts.

    Args:
        right: arguments that are valid.
        unlike: parameters that messages call otherwise.
        valid: how the error begins that a call ends with where all arguments are valid.
    """
    for name in _names(function):
        for called, value in _WRONG.items():
            try:
                function(**{**right, name: value})
            except UserError as error:
                line = str(error).replace("-", "_")
                is_named = name in line or name in unlike or str(error).startswith(valid)
                if "\n" in line or not is_named:
                    yield f"{name}={called}: {error}"
            except Exception as error:
                yield f"{name}={called}: {error!r}"


def _names(function: Callable[..., object]) -> Iterator[str]:
    """Parameters by name; in place of `**settings` the settings of an engine."""
    for name, each in inspect.signature(function).parameters.items():
        if each.kind is each.VAR_KEYWORD:
            yield from engine_config.SETTINGS
        elif name != "url":
            yield name


_LOAD = {"batch": 2, "prompt_len": 4, "output_len": 2}
_ON = {"model": "paper-tiny", "cluster": "h100x1", **_LOAD}


@pytest.fixture
def no_ranks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where ranks would be started, all arguments were valid; files go to a folder of the test."""

    def none_here(*_: object, **__: object) -> None:
        raise CapacityError("no ranks are started here")

    pytest.importorskip("torch", reason="torch is not installed")
    import expertlane.engine.llm

    monkeypatch.setattr(expertlane.engine.llm, "start_pool", none_here)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("function", [expertlane.Options, expertlane.SamplingParams])
def test_a_wrong_argument_is_named(function: Callable[..., object]):
    assert list(_misused(function, {})) == []


def test_a_wrong_argument_of_structured_output_is_named():
    def one(
        json_schema: Any = None, regex: Any = None, grammar: Any = None, choice: Any = None
    ) -> object:
        return expertlane.Structured(json_schema, regex, grammar, choice)

    def beside(lead: Any, may_lead: Any, prefix: Any, is_of_schemas: Any, compact: Any) -> object:
        rest = lead, may_lead, prefix, is_of_schemas, compact
        return expertlane.Structured({}, None, None, None, *rest)

    right = {
        "lead": None,
        "may_lead": None,
        "prefix": "",
        "is_of_schemas": False,
        "compact": False,
    }
    assert list(_misused(one, {})) == []
    assert list(_misused(beside, right)) == []


def test_a_wrong_argument_about_results_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    results = expertlane.Results.of(example_pages.serving())
    paths = frozenset({"path", "first", "second", "folder"})  # where it is one, the file is named
    right = {"first": "nowhere", "second": "nowhere"}
    assert list(_misused(expertlane.load_results, {}, paths)) == []
    assert list(_misused(expertlane.diff, right, paths, "cannot read nowhere")) == []
    assert list(_misused(results.export, {}, paths)) == []


@pytest.mark.parametrize("options", [{}, {"overlap": True}, [], "overlap", 1])
def test_options_of_another_type_are_refused(no_ranks: None, options: Any):
    with pytest.raises(UserError, match=r"^options is "):
        expertlane.LLM("paper-tiny", options=options)


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("LLM", {"model": "paper-tiny"}),
        ("simulate", {**_ON, "layout": "tp=1", "num_requests": 2}),
        ("plan", _ON),
        ("bench", {"model": "paper-tiny", "num_requests": 2, **_LOAD}),
        ("compare", {"project": True, "cluster": "h100x1", "only": "nothing"}),
    ],
)
def test_wrong_arguments_of_commands_are_named(no_ranks: None, name: str, right: dict[str, Any]):
    # Files are named themselves; lengths that are left out may be too long with the other one.
    names = {"experiment", "only", "routing_trace", "requests", "out", "prompt_len", "output_len"}
    valid = "--only nothing" if name == "compare" else "no ranks"
    assert list(_misused(getattr(expertlane, name), right, frozenset(names), valid)) == []


@pytest.mark.full
@pytest.mark.timeout(600)
def test_wrong_prompts_and_parameters_are_refused():
    from expertlane import LLM, SamplingParams

    one = SamplingParams(max_tokens=1, temperature=0)
    with LLM("paper-tiny") as llm:

        def prompts(value: Any) -> None:
            llm.generate(value, one)

        def one_of_several(value: Any) -> None:
            llm.generate([[1], value], one)

        def params(value: Any) -> None:
            llm.generate([[1]], value)

        def one_of_params(value: Any) -> None:
            llm.generate([[1]], [value])

        def stream(value: Any) -> None:
            list(llm.stream(value, one))

        def chat(value: Any) -> None:
            list(llm.chat(value, one))

        def layout(value: Any) -> None:
            llm.scale(value)

        for function in (prompts, one_of_several, params, one_of_params, stream, chat, layout):
            assert list(_misused(function, {}, frozenset({"value"}))) == []
        assert len(llm.generate([[1, 2]], one)[0].token_ids) == 1
