"""The dashboard's and the alerts' queries, against a server that they would be asked of."""

import json
import re
from pathlib import Path

import httpx
import promql_parser
import pytest
from prometheus_client.parser import text_string_to_metric_families
from promql_parser import MatchOp

from engine.ranks.processes import wait_until
from expertlane.engine.llm import LLM
from expertlane.spec.deployment import Options
from server.running import serving

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana" / "expertlane.json").read_text())
ALERTS = (DEPLOY / "prometheus" / "alerts.yml").read_text()
OF_PROMETHEUS = {"job": "expertlane", "instance": "here"}
VARIABLES = {"$__rate_interval": "6s", "$model_name": ".*", "$layer": "0"}


def filled(query):
    for name, value in VARIABLES.items():
        query = query.replace(name, value)
    return query


PANELS = {
    f"{panel['title']}: {target['legendFormat']}": filled(target["expr"])
    for panel in DASHBOARD["panels"]
    for target in panel.get("targets", ())
}
QUERIES = PANELS | {query: query for query in re.findall(r"expr: (.*)", ALERTS)}


@pytest.fixture(scope="module")
def rebalanced(chatty):
    """A server whose experts move, which has answered requests."""
    options = Options(rebalance_steps=4, num_redundant_experts=2)
    settings = {"dtype": "float32", "num_blocks": 32, "on_failure": "replace"}
    with (
        LLM(chatty, layout="dp=2,ep=2", options=options, **settings) as llm,
        serving(llm, llm.tokenizer, watch=llm.watch()) as server,
    ):
        ask(server)
        rebalancer = server.service.model.watch.rebalancer
        assert wait_until(lambda: ask(server) or rebalancer.decisions)
        yield server


def ask(server):
    prompts = [[1, 2, 3], [1, 2, 3, 4] * 5]
    assert server.ask(prompt=prompts, max_tokens=12).status_code == 200


def scraped(server):
    """What a server says while it works: imbalance is that of the last seconds."""
    texts = []

    def is_whole():
        texts.append(httpx.get(f"{server.url}/metrics").text)
        return "expertlane:imbalance{" in texts[-1] or ask(server)

    assert wait_until(is_whole, pause_s=0.2)
    return texts[-1]


def selectors(node):
    """All selectors below a node of a query."""
    if isinstance(node, promql_parser.VectorSelector):
        return [node]
    if isinstance(node, promql_parser.MatrixSelector):
        return [node.vector_selector]
    below = [getattr(node, name, None) for name in ("expr", "lhs", "rhs", "param")]
    below += getattr(node, "args", [])
    return [each for child in below if child is not None for each in selectors(child)]


def fits(matcher, labels):
    value = labels.get(matcher.name, "")
    if matcher.op in (MatchOp.Re, MatchOp.NotRe):
        return bool(re.fullmatch(matcher.value, value)) == (matcher.op == MatchOp.Re)
    return (value == matcher.value) == (matcher.op == MatchOp.Equal)


@pytest.mark.smoke(8)
@pytest.mark.parametrize("query", QUERIES)
def test_every_query_finds_series_with_its_labels(query, rebalanced):
    text = scraped(rebalanced)
    series = [
        (sample.name, sample.labels | OF_PROMETHEUS)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    ] + [("up", OF_PROMETHEUS)]
    expression = promql_parser.parse(QUERIES[query])
    asked = selectors(expression)
    assert asked
    wanted = set(re.findall(r"\{\{ ?(?:\$labels\.)?(\w+) ?\}\}", query))
    for each in re.findall(r"(?:by|on) \(([^)]+)\)", QUERIES[query]):
        wanted |= set(each.split(", "))
    for selector in asked:
        found = [
            labels
            for name, labels in series
            if name == selector.name and all(fits(m, labels) for m in selector.matchers.matchers)
        ]
        if 'status="5xx"' in QUERIES[query]:
            continue  # there was none
        assert found, f"no series for {selector.prettify()}"
        if wanted - {"le"} and len(asked) == 1:
            assert wanted <= set(found[0])


def test_variables_are_labels_of_the_scrape(rebalanced):
    text = scraped(rebalanced)
    asked = [each["query"] for each in DASHBOARD["templating"]["list"] if each["type"] == "query"]
    for each in asked:
        name, label = re.fullmatch(r"label_values\(([\w:]+), (\w+)\)", each["query"]).groups()
        assert re.search(rf'^{name}{{.*\b{label}="', text, re.MULTILINE)


def test_every_metric_of_ours_is_shown(rebalanced):
    shown = {
        each.name for query in PANELS.values() for each in selectors(promql_parser.parse(query))
    }
    text = scraped(rebalanced)
    ours = {
        sample.name
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("expertlane:")
        and not sample.name.endswith(("_created", "_count"))
    }
    assert "expertlane:recoveries_total" in ours
    assert ours - {"expertlane:requests_running"} <= shown  # vLLM's name of it is shown


def rows_of(text):
    """The list in `docs/metrics.md`, from a scrape."""
    rows = []
    for family in text_string_to_metric_families(text):
        if not family.name.startswith(("vllm:", "expertlane:", "http_")):
            continue
        labels = dict.fromkeys(
            label for sample in family.samples for label in sample.labels if label != "le"
        )
        own = [f"`{label}`" for label in labels if label not in ("model_name", "engine")]
        name = f"{family.name}_total" if family.type == "counter" else family.name
        kind = "; ".join(filter(None, (family.type, ", ".join(own))))
        rows.append(f"- `{name}` ({kind}): {family.documentation}")
    return rows


def test_the_page_of_metrics_lists_what_there_is(rebalanced):
    page = (DEPLOY.parent / "docs" / "metrics.md").read_text().splitlines()
    wanted = rows_of(scraped(rebalanced))
    given = [line for line in page if re.match(r"- `(vllm:|expertlane:|http_)", line)]
    assert sorted(given) == sorted(wanted), "\n".join(wanted)
