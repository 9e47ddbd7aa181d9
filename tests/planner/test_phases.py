"""A dispatch form for each phase of one pool."""

from dataclasses import replace
from math import inf

import pytest

from expertlane.cost.laws.profile import LIKELY
from expertlane.planner.screen import fitting, with_fastest_prefill
from expertlane.planner.search import Search
from expertlane.spec.workload import Workload
from planner.requests import request_of

REQUEST = request_of(num_devices=16, workload=Workload(64, 2048, 128))


@pytest.fixture(scope="module")
def screened():
    return fitting(Search(REQUEST).screen())


def alike(option):
    options = option.candidate.options
    return option.candidate._replace(
        options=replace(options, dispatch="all_to_all", prefill_dispatch=None)
    )


def prompt_s(option):
    """Of a prompt by itself and one beside those of all ranks."""
    return option.steps.alone_s[LIKELY] + option.steps.batched_s[LIKELY]


def test_prefill_is_as_fast_as_with_the_best_form(screened):
    found = with_fastest_prefill(screened, REQUEST)
    fastest, of_candidate = {}, {each.candidate: each for each in screened}
    for each in screened:
        fastest[alike(each)] = min(fastest.get(alike(each), inf), prompt_s(each))
    assert 0 < len(found) < len(screened)
    for after in found:
        options = replace(after.candidate.options, prefill_dispatch=None)
        before = of_candidate[after.candidate._replace(options=options)]
        assert after.steps.decode_s is before.steps.decode_s
        assert prompt_s(after) == fastest[alike(after)]
        assert prompt_s(before) > 1.02 * prompt_s(after)
        assert after.tps >= before.tps


def test_in_full_each_phase_has_its_form(screened):
    search = Search(REQUEST)
    option = max(
        (each for each in with_fastest_prefill(screened, REQUEST) if each.place is not None),
        key=lambda each: each.tps,
    )
    whole = search.finish(option)
    options = option.candidate.options
    of_forms = [
        search.finish(
            replace(option, candidate=option.candidate._replace(options=options.of_phase(phase)))
        )
        for phase in (whole.prefill.phase, whole.decode.phase)
    ]
    assert whole.prefill.wall_s == of_forms[0].prefill.wall_s
    assert whole.decode.wall_s == of_forms[1].decode.wall_s
    assert whole.prefill.wall_s.value < of_forms[1].prefill.wall_s.value
