"""The sections of each kind of report, in order."""

from collections.abc import Iterable
from dataclasses import replace

from expertlane.report import load_plots, plan_answer, planning, plots, servers, serving
from expertlane.report.answer import comparison_answer
from expertlane.report.compared import Comparison, projected, run
from expertlane.report.compared_servers import servers_answer, servers_sections
from expertlane.report.document import Answer, Chapter, ChapterName, Report, Section
from expertlane.report.drilled import drill_answer, drill_sections
from expertlane.report.loads import NAME_COLUMNS
from expertlane.report.numbers import shortened
from expertlane.report.scaling import overlap, sizes
from expertlane.report.setup import assumptions, cautions, setup
from expertlane.report.speed import (
    bottlenecks,
    by_conditions,
    by_context,
    by_link_speed,
    deployments,
    firmness,
    memory,
    projected_time,
    rests_on,
)
from expertlane.report.traffic import (
    experts_and_traffic,
    hot_spots,
    rebalancing,
    work_and_traffic,
)
from expertlane.report.verdict import in_wall_time, verdict
from expertlane.report.verified import verified_answer, verified_sections
from expertlane.results.results import Results

_SURE = Chapter(
    "sure",
    "Accuracy and cautions",
    "What was assumed, what rests on measurements, and what may have disturbed them.",
)
_SETUP = Chapter(
    "setup",
    "Setup and files",
    "What was the same for all, on which machine and software; every number is in results.json, "
    "which was written with this page.",
)
# By the kind of results, the chapters of its page.
_CHAPTERS: dict[str, tuple[Chapter, ...]] = {
    "comparison": (
        Chapter("answer", "The answer", "Which deployment is faster, and all beside each other."),
        Chapter(
            "why",
            "Why",
            "What a step's time is spent on, by cause, rank by rank and expert by expert; what "
            "overlap hides.",
        ),
        Chapter(
            "loads",
            "Other loads, links and sizes",
            "How the order changes with context, batch, links, routing and the number of ranks.",
        ),
        _SURE,
        _SETUP,
    ),
    "plan": (
        Chapter("answer", "The answer", "What to use."),
        Chapter("run", "Run it", "The commands that start it, by engine.", is_box=True),
        Chapter(
            "found",
            "What else was found",
            "The best deployments, those of other kinds and engines, and what the fastest answers "
            "cost in throughput.",
        ),
        Chapter("why", "Why", "What a step's time is spent on, by cause and rank by rank."),
        _SURE,
    ),
    "simulation": (
        Chapter("answer", "The answer", "How fast it is, and what limits it."),
        Chapter("loads", "Load by load", "Throughput, latency and objectives of each load."),
        Chapter(
            "why",
            "Why",
            "What a step's time is spent on, by cause and rank by rank; experts and traffic.",
        ),
        _SURE,
        _SETUP,
    ),
    "bench": (
        Chapter("answer", "The answer", "How fast it was."),
        Chapter("loads", "Load by load", "Throughput, latency and objectives of each load."),
        _SURE,
        _SETUP,
    ),
    "verify": (
        Chapter("answer", "The answer", "Whether it computes the model that it claims."),
        Chapter("why", "Why", "Every condition, every test, and the tokens that are farthest off."),
        _SURE,
        _SETUP,
    ),
    "drill": (
        Chapter("answer", "The answer", "What became of requests, and when all was well again."),
        _SETUP,
    ),
}


def report_of(results: Results) -> Report:
    """The whole report of any kind of results."""
    make = {
        "comparison": _comparison,
        "plan": _plan,
        "simulation": _simulation,
        "bench": _bench,
        "verify": _verify,
        "drill": _drill,
    }
    name, answer, sections = make[results.kind](results)
    sources = sorted({each.source for each in results.deployments})
    return Report(
        f"expertlane{name}",
        answer,
        ", and apart: ".join(sources),
        results.command,
        results.created,
        sections,
        _with_sections(_CHAPTERS[results.kind], sections),
    )


def _with_sections(chapters: Iterable[Chapter], sections: Iterable[Section]) -> tuple[Chapter, ...]:
    """The chapters that have sections."""
    filled = {each.chapter for each in sections if each.parts}
    return tuple(each for each in chapters if each.name in filled)


def _of(chapter: ChapterName, *sections: Section) -> list[Section]:
    """Sections of one chapter."""
    return [replace(each, chapter=chapter) for each in sections]


_Made = tuple[str, Answer, tuple[Section, ...]]


def _named(results: Results) -> str:
    """The name of an experiment, with its experts per token; without one that of the model."""
    experiment = results.question.get("experiment")
    if experiment is None:
        return results.model_name
    top_k = experiment.get("model", {}).get("num_experts_per_tok")
    return str(experiment.get("name", "comparison")) + (f", top-{top_k}" if top_k else "")


def _compared_servers(results: Results) -> _Made:
    """A comparison of servers, with its projection if there is one."""
    name, modelled = _named(results), projected(results)
    sections = [
        *servers_sections(results),
        *(_projected(results, modelled) if modelled is not None else ()),
        *_of("setup", setup(results, "Controlled variables (the same for every deployment)")),
    ]
    return f": {name}", servers_answer(name, results), tuple(sections)


def _comparison(results: Results) -> _Made:
    if results.is_of_servers:
        return _compared_servers(results)
    wall, virtual, modelled = run(results, "measured"), run(results, "virtual"), projected(results)
    sections: list[Section] = []
    if wall is not None:
        own = virtual or wall
        said = verdict(own, results)
        sections.append(plots.first(results, own))
        beside = filter(None, (in_wall_time(wall, results),)) if virtual else ()
        sections += [
            Section("Verdict", said, "top", "answer"),
            Section("", (*beside, *cautions(results)), "top", "sure"),
        ]
        sections += _run(results, own, wall)
    if modelled is not None:
        sections += _projected(results, modelled)
    sections += [
        *_of(
            "sure",
            assumptions(results, "virtual", "Assumptions of virtual time"),
            assumptions(results, "measured"),
        ),
        *_of("setup", setup(results, "Controlled variables (the same for every deployment)")),
    ]
    name = _named(results)
    answer = comparison_answer(name, results, virtual or wall, wall if virtual else None, modelled)
    return f": {name}", answer, tuple(sections)


def _run(results: Results, own: Comparison, wall: Comparison) -> list[Section]:
    """Sections of a run on real ranks: virtual time if there is any, with wall time beside it."""
    is_virtual = own is not wall
    return [
        *_of("answer", deployments(own, wall if is_virtual else None)),
        *plots.comparison(results, own),
        *_of("loads", by_link_speed(results, own)),
        *_of(
            "why",
            bottlenecks(own),
            *((bottlenecks(wall, "Wall time: bottlenecks"),) if is_virtual else ()),
            work_and_traffic(own),
            hot_spots(own),
            rebalancing(wall),
            overlap(own),
        ),
        *_of("loads", sizes(results, own)),
    ]


def _projected(results: Results, modelled: Comparison) -> list[Section]:
    conditions = modelled.conditions
    assert conditions is not None, "projections have them"
    types = conditions.dtype
    if conditions.kv_dtype != types:
        types += f", KV cache in {conditions.kv_dtype}"
    is_alone = not results.select("measured")
    own = plots.first(results, modelled)
    verdict_heading = (
        f"Projected: verdict ({results.projected_for.name}; nothing was measured there)"
    )
    return [
        *((own,) if is_alone else ()),
        Section(
            verdict_heading,
            (
                f"Decode steps of {modelled.num_seqs:,} sequences at {modelled.context:,} "
                f"tokens of context, {types}.",
                *verdict(modelled, results),
            ),
            "top",
            "answer",
        ),
        Section(
            "",
            (
                firmness([row.step for row in modelled.rows]),
                *(cautions(results) if is_alone else ()),
            ),
            "top",
            "sure",
        ),
        *(() if is_alone else (replace(own, heading="Projected throughput", place="plots"),)),
        *plots.comparison(results, modelled),
        *_of("loads", by_context(modelled), by_conditions(results, modelled)),
        *_of("setup", memory(results, modelled)),
        *_of("why", projected_time(modelled)),
        *_of("sure", rests_on(results, modelled)),
        *_of("why", overlap(modelled)),
        *_of("loads", sizes(results, modelled)),
        *_of("answer", planning.beside(results, modelled)),
        *_of("sure", assumptions(results, "projected", "Projected: assumptions")),
    ]


def _plan(results: Results) -> _Made:
    asked = f"{results.question['model']['name']} on {results.projected_for.name}"
    sections = (
        *plan_answer.verdict(results),
        *plots.plan(results),
        *planning.plan(results),
        *_of("sure", assumptions(results, "projected")),
    )
    return f" plan: {asked}", plan_answer.answer(results), sections


def _simulation(results: Results) -> _Made:
    record = results.deployments[0]
    layouts = [record.prefill_layout, record.layout]
    layout = " + ".join(str(each) for each in layouts if each is not None)
    name, where = results.question["model"]["name"], f"as {layout} on {results.projected_for.name}"
    asked = f"{name} {where}"
    return (
        f" simulate: {asked}",
        serving.simulation_answer(results, f"{shortened(name, NAME_COLUMNS)} {where}"),
        (
            *serving.simulation(results),
            *load_plots.by_load(results),
            *plots.simulation(results),
            *_of("why", experts_and_traffic(record, serving.phases_of(record))),
            *_of("sure", assumptions(results, "projected")),
            *_of("setup", setup(results, "What was simulated")),
        ),
    )


def _bench(results: Results) -> _Made:
    load = results.question["workload"]
    asked = (
        f"{results.question['model']}, prompts of {load['prompt_len']} and outputs of "
        f"{load['output_len']} tokens"
    )
    if "urls" in results.question:
        own, answer = servers.of_servers(results), servers.server_answer(results)
    else:
        own, answer = serving.bench(results), serving.bench_answer(results)
    return (
        f" bench: {asked}",
        answer,
        (
            *own,
            *load_plots.by_load(results),
            *_of("setup", setup(results, "What was measured")),
        ),
    )


def _verify(results: Results) -> _Made:
    return (
        f" verify: {results.question['model']} at {results.question['url']}",
        verified_answer(results),
        (*verified_sections(results), *_of("setup", setup(results, "What was verified"))),
    )


def _drill(results: Results) -> _Made:
    return (
        f" drill: {results.question['model']}, {results.question['fault']}",
        drill_answer(results),
        (*drill_sections(results), *_of("setup", setup(results, "What was drilled"))),
    )
