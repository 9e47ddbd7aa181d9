"""Servers measured in turns: `compare --engine` and `compare --url`.

A server that is started here has the machine to itself: it is started for its turn, and stopped
before the next one starts. A server that fails is a record; the others are still measured.
"""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

from expertlane.client.connection import (
    Connections,
)
from expertlane.client.measure import ratios
from expertlane.client.run import (
    Target,
    allow_connections,
    headers_of,
    run_until_told,
)
from expertlane.client.server import (
    PROBE_S,
    alike,
    find_server,
    sglang_settings,
)
from expertlane.comparison.engines.engine import Engine
from expertlane.comparison.served import EngineLauncher, MeasuredServer, RunningServer, Setting
from expertlane.comparison.turns import Repeats, measure_in_turns
from expertlane.errors import ExpertlaneError, TerminatedError, UserError, naming
from expertlane.results.hardware import Machine, own_cores, this_machine
from expertlane.results.record import (
    choose_compared,
)
from expertlane.results.results import Results
from expertlane.spec.experiment import Experiment
from expertlane.spec.workload import Workload, check_lengths


def measure_running(
    targets: Mapping[str, Target],
    setting: Setting,
    workload: Mapping[str, object],
    repeats: Repeats,
    command: str,
    *,
    ended: list[BaseException] | None = None,
) -> Results:
    """Measure servers that run already, without an experiment.

    Args:
        targets: servers, by name.
        workload: the load, as results of `bench` have it.
        ended: as in `measure_servers`.

    Raises:
        UserError: a server does not answer, or refuses.
        ExpertlaneError: no server could be measured; the text has the reason for each.
    """
    with RunningServer() as up:
        own = [
            MeasuredServer(name, setting, up, None, None, each) for name, each in targets.items()
        ]
        compared = _in_turns(own, setting, repeats, up, ended)
    models = dict.fromkeys(each.seen.model for each in own if each.seen is not None)
    question = {"model": " and ".join(models), "workload": dict(workload)}
    return _results(question, own, compared, setting, command, ended)


def measure_servers(
    experiment: Experiment,
    engines: Sequence[EngineLauncher],
    targets: Mapping[str, Target],
    setting: Setting,
    repeats: Repeats,
    command: str,
    dtype: str,
    *,
    ended: list[BaseException] | None = None,
) -> Results:
    """Measure the experiment's deployments on each engine, and servers that run already.

    Args:
        targets: servers that run already, by name; a deployment's name means that the server has
            that deployment's layout.
        dtype: number type of weights in the engines' commands.
        ended: gets the exception of a signal that ends the measurement early, if there are
            results; None to raise it, and lose them.

    Raises:
        UserError: two servers would have the same name, or one that runs already does not answer.
        ExpertlaneError: no server could be measured; the text has the reason for each.
    """
    with RunningServer() as up:
        own = [*_subjects(experiment, engines, targets, setting, up)]
        names = [each.name for each in own]
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(f"two servers would be called {twice[0]!r}; give --url another name")
        compared = _in_turns(own, setting, repeats, up, ended)
    question = {"experiment": experiment.question, "workload": _lengths(experiment.workload)}
    machine = this_machine(experiment.num_ranks, dtype) if engines else None
    return _results(question, own, compared, setting, command, ended, machine)


def _in_turns(
    own: Sequence[MeasuredServer],
    setting: Setting,
    repeats: Repeats,
    up: RunningServer,
    ended: list[BaseException] | None,
) -> Sequence[MeasuredServer]:
    """Measure all servers in turns; return those of the first sentence.

    Raises:
        UserError: a server that runs already does not answer, or refuses.
        ExpertlaneError: no server could be measured; the text has the reason for each.
    """
    allow_connections()

    def choose() -> list[MeasuredServer]:
        return _chosen([each for each in own if each.rounds])

    run_until_told(_look_at([each for each in own if each.target is not None], setting, up))
    try:
        with _on_cores(setting.client_cores):
            compared = measure_in_turns(own, repeats, choose)
    except (KeyboardInterrupt, TerminatedError) as error:
        if ended is None or not any(each.rounds for each in own):
            raise
        ended.append(error)
        compared = choose()
    if not any(each.rounds for each in own):
        reasons = "; ".join(f"{each.name}: {each.failure}" for each in own)
        raise ExpertlaneError(f"no deployment could be measured: {reasons}")
    return compared


@contextmanager
def _on_cores(cores: Collection[int]) -> Iterator[None]:
    """The client on cores of its own; on all where there are none."""
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


async def _look_at(running: Sequence[MeasuredServer], setting: Setting, up: RunningServer) -> None:
    """Check all servers that run already, before the first one is measured.

    Raises:
        UserError: one does not answer, refuses, or does not accept requests that long.
    """
    asked = setting.asked
    several = [
        Connections(each.target.url, headers_of(each.target)) for each in running if each.target
    ]
    servers = []
    try:
        for each, connections in zip(running, several, strict=True):
            with naming(f"--url {each.name}"):
                assert each.target is not None
                found = await find_server(
                    *(connections, each.target.model, asked.tokenizer),
                    is_chat=asked.is_chat,
                    timeout_s=min(PROBE_S, asked.timeout_s),
                )
                if found.max_model_len is not None:
                    check_lengths(setting.load, found.max_model_len - 1)
                servers.append(found)
                each.settings = await sglang_settings(connections)
    finally:
        for connections in several:
            connections.close()
    if servers:
        up.vocabulary = alike(servers)[0].vocabulary


def _results(
    question: Mapping[str, object],
    own: Sequence[MeasuredServer],
    compared: Sequence[MeasuredServer],
    setting: Setting,
    command: str,
    ended: Sequence[BaseException] | None,
    machine: Machine | None = None,
) -> Results:
    """The results; the first sentence is about the fastest server, unless there is a baseline."""
    answered = [each for each in compared if each.rounds]
    if not any(each.deployment and each.deployment.is_baseline for each in answered):
        answered.sort(key=lambda each: -each.tps)
    paired = [
        ratio
        for other in answered[1:]
        for ratio in ratios(
            *(setting.load, answered[0].rounds, other.rounds),
            (answered[0].name, other.name),
        )
    ]
    return Results.now(
        "comparison",
        command,
        {**question, "servers": len(own)},
        [each.record() for each in own],
        machine=machine,
        ratios=tuple(paired),
        cautions=(
            *(["Partial: interrupted before all was measured."] if ended else ()),
            *_cautions(own, setting),
        ),
    )


def _subjects(
    experiment: Experiment,
    engines: Sequence[EngineLauncher],
    targets: Mapping[str, Target],
    setting: Setting,
    up: RunningServer,
) -> Iterator[MeasuredServer]:
    deployments = {each.name: each for each in experiment.deployments}
    for name, target in targets.items():
        yield MeasuredServer(name, setting, up, deployments.get(name), None, target)
    for each in engines:
        for deployment in experiment.deployments:
            name = deployment.name
            if len(engines) > 1 or name in targets:
                name = f"{each.engine.title} {name}"
            yield MeasuredServer(name, setting, up, deployment, each)


def _chosen(answered: Sequence[MeasuredServer]) -> list[MeasuredServer]:
    """The fastest of each engine, in order of speed; of one engine by `choose_compared`."""
    records, tps = [each.record() for each in answered], [each.tps for each in answered]
    by_tps = sorted(range(len(answered)), key=lambda place: -tps[place])
    best: dict[Engine | None, MeasuredServer] = {}
    for place in by_tps:
        engines = answered[place].engines
        best.setdefault(engines.engine if engines else None, answered[place])
    if len(best) > 1:
        return [*best.values()]
    return [answered[place] for place in choose_compared(records, tps)]


def _lengths(workload: Workload) -> dict[str, object]:
    """Lengths and seed of the workload, as results of `bench` have them."""
    return {
        "prompt_len": str(workload.prompt_len),
        "output_len": str(workload.output_len),
        "seed": workload.seed,
        "requests": None,
    }


def _cautions(own: Sequence[MeasuredServer], setting: Setting) -> Iterator[str]:
    """Sentences on conditions that differ between servers, or that disturb measurements."""
    shares = [
        each.driven.cpu_s / each.driven.wall_s
        for served in own
        if served.engines is not None
        for each in served.rounds
        if each.driven.wall_s
    ]
    if shares and not setting.client_cores:
        yield (
            f"The client shares the {len(own_cores())} cores with the servers, too few to have its "
            f"own, and uses {max(shares):.0%} of one."
        )
    if setting.kv_tokens is not None:
        without = [
            each.name for each in own if each.engines and not each.engines.engine.takes_kv_tokens
        ]
        if without:
            yield f"--kv-tokens is not set on {', '.join(without)}: no option of it is known."
    if unflushed := [each.name for each in own if each.is_unflushed]:
        yield (
            f"The prefix cache of {', '.join(unflushed)} could not be emptied: no route for that, "
            "or it refused."
        )
    models: dict[str, list[str]] = {}
    for each in own:
        if each.seen is not None and each.engines is None:
            models.setdefault(each.seen.model, []).append(each.name)
    if len(models) > 1:
        told = "; ".join(f"{', '.join(names)}: {model}" for model, names in models.items())
        yield f"Servers name different models: {told}."
    forms = {each.seen.form for each in own if each.seen is not None}
    if len(forms) > 1:
        yield "Some servers were sent prompts as text, others as token ids."
