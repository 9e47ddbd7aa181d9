"""Serving frameworks beside a profile's devices: what a step and a request cost on their hosts.

`frameworks.toml` has a few numbers of each, fitted by `calibration/judge_serving.py` to half of the
public measurements of DeepSeek-R1 that it reads, and judged on the other half.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from expertlane.cost.laws.profile import Profile, Term
from expertlane.cost.laws.profile_file import (
    ModelledCluster,
    TermTable,
    parse_cluster,
    read_term,
)
from expertlane.errors import SpecError, naming
from expertlane.spec.files import CONFIG_BYTES, read_toml
from expertlane.spec.ranges import Strict, shown
from expertlane.spec.tables import build

FILE = Path(__file__).with_name("frameworks.toml")


@dataclass(frozen=True)
class Framework:
    """How a framework serves.

    Attributes:
        title: as its makers write it.
        max_num_batched_tokens: of a step and data-parallel rank.
        prompt_wait_steps: as of `schedule.request.Limits`.
        terms: in place of a profile's: `driver_s`, `arrival_s`.
    """

    name: str
    title: str
    max_num_batched_tokens: int
    prompt_wait_steps: int
    terms: Mapping[str, Term]


@dataclass(frozen=True)
class _Framework(Strict):
    title: str
    max_num_batched_tokens: int
    prompt_wait_steps: int
    terms: dict[str, TermTable]


@dataclass(frozen=True)
class JudgedGroup(Strict):
    """Rows of one kind that projections were held against; errors are medians of their size.

    Attributes:
        hardware: the profile's name.
        weights: their number type.
        has_two_pools, has_drafts: prefill apart from decode; multi-token prediction.
        is_fitted: with the overheads of each row's framework; else without any.
        tpot, output, ttft: of TPOT, of output throughput, and of TTFT.
    """

    hardware: str
    weights: str
    has_two_pools: bool
    has_drafts: bool
    is_fitted: bool
    num_rows: int
    tpot: float
    output: float
    ttft: float


@dataclass(frozen=True)
class _File(Strict):
    frameworks: dict[str, _Framework]
    judged: list[JudgedGroup] = field(default_factory=list)


@cache
def _file() -> _File:
    return build(_File, read_toml(FILE, CONFIG_BYTES))


@cache
def frameworks() -> Mapping[str, Framework]:
    """All that are known, by name."""
    with naming(FILE):
        return {
            name: Framework(
                name,
                each.title,
                each.max_num_batched_tokens,
                each.prompt_wait_steps,
                {term: read_term(law, f"{name}.{term}") for term, law in each.terms.items()},
            )
            for name, each in _file().frameworks.items()
        }


def judged_groups() -> Sequence[JudgedGroup]:
    """What was judged, of enough rows to say so."""
    return _file().judged


def find_framework(name: str) -> Framework:
    """One of them.

    Raises:
        SpecError: there is none of that name.
    """
    known = frameworks()
    if name not in known:
        raise SpecError(f"no framework is called {shown(name)}; there are {', '.join(known)}")
    return known[name]


def served_by(profile: Profile, framework: Framework) -> Profile:
    """The profile with a framework's terms in place of its own."""
    terms = {**profile.terms, **framework.terms}
    return replace(profile, terms=terms, framework=framework.name)


def served_cluster(text: str, framework: str | None) -> ModelledCluster:
    """Read a cluster, as `parse_cluster`, and how it is served.

    Raises:
        SpecError: no such cluster or framework.
    """
    cluster = parse_cluster(text)
    if framework is None:
        return cluster
    return replace(cluster, profile=served_by(cluster.profile, find_framework(framework)))
