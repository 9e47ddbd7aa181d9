"""Multi-token prediction in a plan: each deployment with drafts and without."""

from dataclasses import replace

import numpy as np
import pytest

from expertlane.cost.laws.profile import LIKELY
from expertlane.cost.throughput import MultiToken
from expertlane.planner.candidates import candidates_of
from expertlane.planner.ranking import contender
from expertlane.planner.screen import Screen, fitting
from expertlane.planner.search import Search
from expertlane.spec.layout import Layout
from expertlane.spec.mixers import Mixing
from expertlane.spec.model import LayerKind
from expertlane.spec.workload import Workload
from planner import requests
from planner.requests import MIXED, agrees_with_the_whole_model

DRAFTS = MultiToken(2, 0.8)


def request_of(drafts, num_sequences=1024, model=MIXED):
    request = requests.request_of(model, workload=Workload(num_sequences, 512, 128))
    return replace(request, setting=replace(request.setting, multi_token=drafts))


def screened(request):
    return fitting(Screen(request).run(Search(request).candidates, lambda _: None))


def test_each_candidate_with_drafts_and_without():
    layout = Layout(dp=4, ep=4)
    plain = list(candidates_of(layout, MIXED, 8))
    both = list(candidates_of(layout, MIXED, 8, num_drafts=2))
    assert [each for each in both if not each.num_drafts] == plain
    assert {str(each) for each in both} - {str(each) for each in plain} == {
        f"{each}, 2 drafts" for each in plain
    }


# Attention with a window alone, a layer of experts alone, and a dense one.
_WINDOW = LayerKind(Mixing(window=64), "none")
_OWN = _WINDOW, LayerKind(None, "experts"), LayerKind(Mixing(), "dense")


@pytest.mark.parametrize("draft", [(), _OWN])
def test_one_rank_that_stands_for_all_drafts_as_all_do(draft):
    request = request_of(DRAFTS, model=replace(MIXED, draft=draft, intermediate_size=128))
    found = [
        each
        for each in screened(request)
        if each.candidate.num_drafts and not each.candidate.options.overlap
    ]
    for each in found[:: max(1, len(found) // 8)]:
        agrees_with_the_whole_model(each, request)


def test_accepted_drafts_shorten_tokens_and_their_bounds_show():
    request = request_of(DRAFTS, num_sequences=4)
    of_candidate = {each.candidate: each for each in screened(request)}
    for candidate, drafted in of_candidate.items():
        if not candidate.num_drafts:
            assert drafted.steps.tokens_per_step.tolist() == [1, 1, 1]
            continue
        plain = of_candidate[candidate._replace(num_drafts=0)]
        assert drafted.steps.decode_s[LIKELY, -1] > plain.steps.decode_s[LIKELY, -1]
        np.testing.assert_allclose(drafted.steps.tokens_per_step, [1 + 0.9 + 0.81, 2.44, 2.19])
        each_s = drafted.steps.decode_s / np.array([2.71, 2.44, 2.19])[:, None]
        np.testing.assert_allclose(drafted.steps.token_s, each_s)


def test_acceptance_is_one_error_of_the_plans_that_draft():
    request = request_of(DRAFTS, num_sequences=8)
    search = Search(request)
    pairs = [
        contender(search.finish(each), request.workload)
        for each in screened(request)
        if each.candidate.layout == Layout(tp=4) and not each.candidate.options.overlap
    ]
    by_drafts = {each.finalist.candidate.num_drafts: each for each in pairs}
    drafted, plain = by_drafts[2], by_drafts[0]
    error = ("acceptance of drafts", ())
    low, high = drafted.tps.by_error[error]
    assert low > drafted.tps.value > high  # at the error's low, tokens take less time
    assert error not in plain.tps.by_error
    assert drafted.tps.over(drafted.tps).bounds == (1, 1, 1)
