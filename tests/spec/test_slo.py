import pytest

from expertlane.errors import UserError
from expertlane.spec.slo import SLO, parse_slos


def test_objectives_of_an_option_given_once_or_often():
    assert parse_slos(["ttft.p95=500ms,tpot.mean=20ms", "e2e.p99=10s"]) == (
        SLO("ttft", "p95", 0.5),
        SLO("tpot", "mean", 0.02),
        SLO("e2e", "p99", 10.0),
    )
    assert parse_slos([]) == ()


def test_spellings():
    assert parse_slos([" ITL.P50 = 1.5 MS "]) == (SLO("itl", "median", 0.0015),)
    assert [str(each) for each in parse_slos(["itl.p90=1.5ms,e2e.median=2s"])] == [
        "ITL p90 ≤ 1.5 ms",
        "E2E median ≤ 2 s",
    ]


MISTAKES = {
    "ttlt.p95=1s": "no latency is called 'ttlt'; valid: ttft, tpot, itl, e2e",
    "ttft.p42=1s": "no statistic is called 'p42'; valid: mean, median, p90, p95, p99",
    "ttft=1s": "write ttft.mean=1s, or .median, .p90, .p95, .p99",
    "": "no latency is called ''",
    "ttft.p95": "the limit must be a number above 0, at most 1,000,000,000, with its unit, ms or s",
    "ttft.p95=500": "with its unit, ms or s",
    "ttft.p95=0ms": "the limit must be a number above 0",
    "ttft.p95=-1s": "the limit must be a number above 0",
    "ttft.p95=nans": "the limit must be a number above 0",
    "ttft.p95=1m": "with its unit, ms or s",
    "ttft.p95=1s,ttft.p95=2s": "--slo: ttft.p95 is given twice",
    "ttft.p50=1s,ttft.median=2s": "--slo: ttft.median is given twice",
    "ttft.p95=1s,": "no latency is called ''",
}


@pytest.mark.parametrize(("text", "said"), MISTAKES.items(), ids=MISTAKES)
def test_mistakes(text, said):
    with pytest.raises(UserError) as caught:
        parse_slos([text])
    assert str(caught.value).startswith("--slo")
    assert said in str(caught.value)
