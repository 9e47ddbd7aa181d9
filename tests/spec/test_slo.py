import pytest

from cli.screen import tells
from expertlane.errors import UserError
from expertlane.spec.workload import SLO, parse_slos


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
    "ttlt.p95=1s": "ttlt ttft tpot itl e2e",
    "ttft.p42=1s": "p42 mean median p90 p95 p99",
    "ttft=1s": "ttft.mean=1s median p90 p95 p99",
    "": "latency",
    "ttft.p95": "limit 0 1,000,000,000 unit ms s",
    "ttft.p95=500": "unit ms s",
    "ttft.p95=0ms": "limit 0",
    "ttft.p95=-1s": "limit 0",
    "ttft.p95=nans": "limit 0",
    "ttft.p95=1m": "unit ms s",
    "ttft.p95=1s,ttft.p95=2s": "--slo ttft.p95 twice",
    "ttft.p50=1s,ttft.median=2s": "--slo ttft.median twice",
    "ttft.p95=1s,": "latency",
}


@pytest.mark.parametrize(("text", "said"), MISTAKES.items(), ids=MISTAKES)
def test_mistakes(text, said):
    with pytest.raises(UserError) as caught:
        parse_slos([text])
    assert str(caught.value).startswith("--slo")
    assert tells(str(caught.value), said)
