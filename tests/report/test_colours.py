"""Colours of plots: told apart by everybody, on a light page and on a dark one."""

import re
from itertools import combinations

import pytest

from expertlane.report.charts.colours import (
    ABOVE,
    BACKGROUND,
    BELOW,
    OF_CAUSE,
    OF_GAP,
    OTHERS,
    PALETTE,
    PROPOSAL,
    REPORTED,
    RIVAL,
    SERIES,
    on,
    style_sheet,
)
from expertlane.spec.names import Cause, Gap, ProjectedCause
from report.colour_vision import SEEN_BY, contrast, difference, lab

LEAST = 12  # of CIEDE2000

# What one plot may have in it; what is drawn on the page itself differs from that too.
TOGETHER = {
    "causes": {"--card", *(OF_CAUSE[cause] for cause in Cause)},
    "projected causes": {"--card", *(OF_CAUSE[cause] for cause in ProjectedCause)},
    "timelines": {"--card", *(OF_CAUSE[cause] for cause in Cause), *OF_GAP.values()},
    "projected timelines": {
        *("--card", OF_GAP[Gap.IDLE]),
        *(OF_CAUSE[cause] for cause in ProjectedCause),
    },
    "curves": {"--card", *SERIES, BACKGROUND, REPORTED},
    "bars": {"--card", "--ink", PROPOSAL, RIVAL, OTHERS},
    "differences": {"--card", "--ink", PROPOSAL, RIVAL, OTHERS, BELOW, ABOVE},
}
SCHEMES = pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425),
        ((50, -1, 2), (50, 0, 0), 2.3669),
        ((50, 2.49, -0.001), (50, -2.49, 0.0009), 7.1792),
        ((50, 2.49, -0.001), (50, -2.49, 0.0011), 7.2195),
        ((50, 2.5, 0), (73, 25, -18), 27.1492),
        ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
        ((2.0776, 0.0795, -1.1350), (0.9033, -0.0636, -0.5514), 0.9082),
    ],
)
def test_differences_are_those_that_were_published(one, other, expected):
    """Of Sharma, Wu and Dalal (2005), table 1."""
    assert difference(one, other) == pytest.approx(expected, abs=1e-4)


def test_white_grey_and_what_is_seen_without_a_cone():
    assert lab("#ffffff") == pytest.approx((100, 0, 0), abs=0.01)
    for vision in SEEN_BY:  # greys are seen by all
        assert lab("#808080", vision) == pytest.approx(lab("#808080"), abs=0.1)
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    assert difference(lab("#c00000"), lab("#406000")) > 40
    assert difference(lab("#c00000", "deuteranopia"), lab("#406000", "deuteranopia")) < 25


@SCHEMES
@pytest.mark.parametrize("vision", SEEN_BY)
@pytest.mark.parametrize("names", TOGETHER.values(), ids=TOGETHER)
def test_colours_that_meet_are_told_apart(names, vision, scheme):
    seen = {name: lab(PALETTE[name][scheme], vision) for name in sorted(names)}
    alike = {
        (one, other): found
        for one, other in combinations(seen, 2)
        if (found := difference(seen[one], seen[other])) < LEAST
    }
    assert not alike


@SCHEMES
def test_words_and_marks_stand_out_from_the_page(scheme):
    def on(name: str, ground: str) -> float:
        return contrast(PALETTE[name][scheme], PALETTE[ground][scheme])

    for ground in ("--card", "--page"):
        assert on("--ink", ground) > 7
        assert on("--muted", ground) > 4.5
        assert on("--accent", ground) > 4.5
    for name in TOGETHER["causes"] | TOGETHER["projected causes"] | TOGETHER["curves"]:
        assert name == "--card" or on(name, "--card") > 2


@SCHEMES
def test_words_on_the_colour_of_a_cause_can_be_read(scheme):
    said = style_sheet().splitlines()[scheme]
    for name in OF_CAUSE.values():
        written = re.search(rf"{on(name)}:(#[0-9a-f]{{6}});", said)
        assert contrast(written[1], PALETTE[name][scheme]) > 4.5


def test_every_cause_has_a_colour_and_every_colour_a_use():
    used = {*OF_CAUSE.values(), *OF_GAP.values(), *SERIES, BELOW, ABOVE}
    plain = {"--ink", "--muted", "--line", "--page", "--card", "--accent", "--shadow"}
    assert used | plain | {PROPOSAL, RIVAL, OTHERS, BACKGROUND, REPORTED} == {*PALETTE}
