"""Every command says of the same work what the golden files say; see docs/validation.md."""

import pytest

from cli.screen import tells
from golden.cases import CASES
from golden.golden import MOST_SHOWN, difference_lines, read_golden, run_case, workplace
from golden.reduce import ABSENT, columns, differences, measured

QUICK = [case for case in CASES if case.is_quick]
LONG = [pytest.param(case, marks=pytest.mark.full) for case in CASES if not case.is_quick]
_TIMEOUT_S = 900


@pytest.fixture(scope="module")
def folder():
    with workplace() as place:
        yield place


@pytest.mark.timeout(_TIMEOUT_S)
@pytest.mark.parametrize("case", [*QUICK, *LONG], ids=lambda case: case.name.replace(" ", "-"))
def test_results_are_those_of_the_golden_file(case, folder):
    golden = read_golden(case.source)
    assert case.name in golden, "write it: python -m golden.golden write"
    lines = difference_lines(case, run_case(case, folder), golden[case.name])
    assert not lines, "\n".join(lines)


def test_golden_files_hold_the_cases_and_no_others():
    for source in ("measured", "projected", "published"):
        names = {case.name for case in CASES if case.source == source}
        assert set(read_golden(source)) == names


def test_columns_put_places_side_by_side():
    value = {"a": [{"b": 1}, {"b": 2, "c": [3.5]}, {}], "d": {"e": [[1, 2], []]}, "f": []}
    assert columns(value) == {
        "a[].b": [1, 2, ABSENT],
        "a[].c[]": [ABSENT, [3.5], ABSENT],
        "a[]": [ABSENT, ABSENT, {}],
        "d.e[][]": [[1, 2], []],
        "f[]": [],
    }


@pytest.mark.parametrize(
    ("golden", "found", "expected"),
    [
        ({"a[].b": [1, 2]}, {"a[].b": [1, 3]}, [("a[1].b", 2, 3)]),
        (
            {"a[].b[]": [[1], [2]]},
            {"a[].b[]": [[1], [2, 3]]},
            [("a[1].b[]", "1 values", "2 values")],
        ),
        ({"a": 1}, {"a": 1.0}, [("a", 1, 1.0)]),
        ({"a": 1}, {"a": True}, [("a", 1, True)]),
        ({"a": 1.0}, {"a": 1.0 + 5e-7}, []),
        ({"a": 1.0}, {"a": 1.0 + 5e-6}, [("a", 1.0, 1.0 + 5e-6)]),
        ({"a.payload_error": 1.0}, {"a.payload_error": 1.0 + 5e-6}, []),
        ({"a": 1}, {"b": 1}, [("a", 1, ABSENT), ("b", ABSENT, 1)]),
    ],
)
def test_differences(golden, found, expected):
    assert list(differences(golden, found)) == expected


def test_the_first_differences_are_shown_with_both_values():
    lines = difference_lines(CASES[0], {"a[]": list(range(50))}, {"a[]": [-1] * 50})
    assert tells(lines[0], f"{CASES[0].name} 50")
    assert lines[2] == "  a[1]: -1 became 1"
    assert len(lines) == 1 + MOST_SHOWN


def test_what_is_measured_loses_times_and_keeps_what_no_rule_knows():
    deployment = {
        "layout": {"replicas": 1},
        "options": {"rebalance_steps": 0},
        "decode": {"tps": 1.0, "tps_of_runs": [1.0], "step_s": 2.0, "flops": {"head": 7}},
        "traffic": {"num_last_arrivals": [1], "anything new": 3},
    }
    moved = {**deployment, "options": {"rebalance_steps": 4}}
    machine = {"memory_bytes": 5, "dtype": "float32"}
    results = {"created": "now", "machine": machine, "deployments": [deployment, moved]}
    found = {k: v for k, v in measured(results).items() if not k.startswith("type of ")}
    assert found == {
        "machine.dtype": "float32",
        "deployments[].layout.replicas": [1, 1],
        "deployments[].options.rebalance_steps": [0, 4],
        "deployments[].decode.flops.head": [7, 7],
        "deployments[].traffic.anything new": [3, ABSENT],
    }
    assert measured(results)["type of deployments[].decode.tps_of_runs[]"] == "float"


def test_steps_of_replicas_come_in_any_order():
    deployment = {
        "layout": {"replicas": 2},
        "options": {"rebalance_steps": 0},
        "decode": {"num_rounds": 3, "num_steps": 4},
        "traffic": {"decode": {"payload_bytes_of_step": {"intra-node": [3, 1, 2]}}},
    }
    found = measured({"machine": {}, "deployments": [deployment]})
    assert "deployments[].decode.num_rounds" not in found
    assert found["deployments[].decode.num_steps"] == [4]
    path = "deployments[].traffic.decode.payload_bytes_of_step.intra-node[]"
    assert found[path] == [[1, 2, 3]]
