"""What a user reads has the field's terms: none of those that they replaced, in code or docs."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DIARIES = {"log.md", "design_decisions.md"}  # what was written on a day stays as it was
REPLACED = {
    "told apart": "not significant",
    "too close to tell": "within error",
    "goes one token on": "one decode step",
    "ranks without a plan": "scheduler overhead",
    "hand-over": "PP send/recv",
    "comes last": "straggler",
    "users would feel": "latency",
    "taken? for granted": "assumptions",
    "why (they|it) loses?": "gap to #1",
    "two pools": "disaggregated",
    "keys and values travel": "KV transfer",
    "trust orders": "rankings are reliable, absolute values are not",
    "as if they did": "ignoring the memory limit",
    "served without end": "steady state",
    "cluster that is not here": "target hardware",
    "kept results": "results.json",
    "kept unfinished|requests unfinished": "concurrency",
    "equal seeds draw": "reproducible for equal seeds",
    "equal beginnings": "prefix caching",
    "experts alike": "uniform",
    "placed? anew": "rebalanced",
    "(stays?|sums?|results) (at )?home": "local",
    "(tokens|tokens/s|ms|µs|bytes|copies|experts|slots|ranks|collectives|sequences) "
    "an? (token|rank|gpu|node|second|step|layer|core|device)": "per token, per rank",
    "tensor-parallel collectives": "TP collectives",
    "between steps:": "scheduler overhead",
    "not judged|judged on": "validated",
    "how sure(ly)?": "confidence, accuracy",
    "^late$": "send delay",
    "is of no help": "failed",
    r"\b0 else\b": "otherwise",
    "held up by prompts": "delayed by prefill",
    "times stand in for": "the same times, with wider bounds",
}
PATTERN = re.compile("|".join(REPLACED), re.IGNORECASE)


def docstrings(tree: ast.AST) -> set[int]:
    """Those of a file, which users do not read, by id."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    owners = [node for node in ast.walk(tree) if isinstance(node, kinds) and node.body]
    firsts = [node.body[0] for node in owners]
    return {id(each.value) for each in firsts if isinstance(each, ast.Expr)}


def strings(path: Path) -> list[str]:
    """Of a module without its docstrings, save those of commands, which are their help."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    unread = set() if path.parent.name == "cli" else docstrings(tree)
    constants = (node for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return [
        each.value for each in constants if isinstance(each.value, str) and id(each) not in unread
    ]


@pytest.mark.parametrize(
    "term", ["64 tokens a rank", "Keep N requests unfinished", "hand-over", "How sure"]
)
def test_a_replaced_term_is_found(term: str) -> None:
    assert PATTERN.search(f"So: {term}.")


def test_code_says_none() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {text}"
        for path in sorted((ROOT / "src").rglob("*.py"))
        for text in strings(path)
        if PATTERN.search(" ".join(text.split()))
    ]
    assert not found


@pytest.mark.parametrize(
    "path",
    [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(each for each in sorted((ROOT / "docs").rglob("*.md")) if "_build" not in each.parts),
    ],
    ids=lambda path: path.name,
)
def test_pages_say_none(path: Path) -> None:
    if path.name in DIARIES:
        return
    text = " ".join(path.read_text(encoding="utf-8").split())
    assert not [match.group() for match in PATTERN.finditer(text)]
