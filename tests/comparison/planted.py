"""Measured results with a mistake planted: projected under an assumption that a plan lacks."""

from dataclasses import dataclass, replace
from math import exp, log

import numpy as np

from expertlane.cost.laws.frameworks import ServingKind, cluster_record, conditions_of
from expertlane.cost.laws.links import ASSUMED_TERMS
from expertlane.cost.laws.profile import Execution, ModelledCluster, read_profile
from expertlane.cost.projector import Projector, Setting, StepSize
from expertlane.cost.routing import PowerLawRouting
from expertlane.cost.step.operation import NumberTypes
from expertlane.results.estimate import Estimate, Summary
from expertlane.results.hardware import Machine
from expertlane.results.metrics import serving_record
from expertlane.results.record import (
    EXPERIMENT,
    DeploymentRecord,
    PoolRecord,
    StepsRecord,
)
from expertlane.results.results import Results
from expertlane.simulator.simulator import ServingSetup, Simulator, scheduling_of
from expertlane.spec.deployment import Deployment, Options
from expertlane.spec.experiment import Experiment, ProjectionSetup
from expertlane.spec.layout import Layout
from expertlane.spec.model import PRESETS
from expertlane.spec.names import Cause, Link, Phase, ProjectedCause
from expertlane.spec.workload import Workload

TYPES = NumberTypes.all_of("bfloat16")
ALPHA = 0.6
MODEL = replace(PRESETS["paper-small"], max_position_embeddings=8192)
MACHINE = Machine("a CPU", "a GPU", 64, 0, 10**12, 16, 8, "nccl", "bfloat16", "made up", None)


def kernels(kind):
    def slowed(profile, factor):
        return replace(
            profile,
            surfaces={
                name: replace(law, correction=law.correction + log(factor))
                if name.partition(".")[0] in kind
                else law
                for name, law in profile.surfaces.items()
            },
        )

    return slowed


def link(which):
    def slowed(profile, factor):
        sheet = profile.links[which]
        slow = replace(sheet, bytes_per_s=sheet.bytes_per_s / factor)
        return replace(profile, links={**profile.links, which: slow})

    return slowed


def terms(*begin):
    def slowed(profile, factor):
        known = {**ASSUMED_TERMS, **profile.terms}
        return replace(
            profile,
            terms={
                name: replace(
                    each, value=each.value * factor, low=each.low * factor, high=each.high * factor
                )
                if name.startswith(begin)
                else each
                for name, each in known.items()
            },
        )

    return slowed


# By the assumption that is wrong: what makes it so, and by how much.
MISTAKES = {
    "intra_node_link": (link(Link.INTRA_NODE), 2.0),
    "inter_node_link": (link(Link.INTER_NODE), 2.0),
    "latency": (terms("floor_"), 3.0),
    "attention": (kernels(("decode_attention", "prefill_attention")), 1.5),
    "gemm": (kernels(("gemm",)), 1.5),
    "experts": (kernels(("experts",)), 1.5),
    "host": (terms("launch_s", "graph_launch_s"), 3.0),
    "scheduler": (terms("driver_s", "driver_per_rank_s", "dp_sync_s"), 3.0),
    "skew": (None, 2.0),
}


@dataclass(frozen=True)
class Case:
    """What is measured, and what is wrong."""

    mistake: str
    cluster: str
    execution: Execution
    layouts: tuple[str, ...]
    num_seqs: int
    prompt_len: int
    has_terms: bool
    seed: int

    @property
    def factor(self):
        return MISTAKES[self.mistake][1]

    @property
    def experiment(self):
        workload = Workload(self.num_seqs, self.prompt_len, 8)
        deployments = tuple(Deployment(each, Layout.parse(each)) for each in self.layouts)
        return Experiment("planted", MODEL, workload, deployments)


def sizes(case):
    prompts = max(1, min(case.num_seqs, 4096 // case.prompt_len))
    return (
        StepSize(case.num_seqs, 1, case.prompt_len + 3),
        StepSize(prompts, case.prompt_len, 0, phase=Phase.PREFILL),
    )


def profile_of(case, is_wrong):
    profile = read_profile(case.cluster.rpartition("x")[0])
    change, factor = MISTAKES[case.mistake]
    return change(profile, factor) if is_wrong and change is not None else profile


def routing_of(case, is_wrong):
    alpha = ALPHA * (case.factor if is_wrong and case.mistake == "skew" else 1.0)
    return PowerLawRouting.of(MODEL, alpha, 0, 2)


def projector(case, deployment, is_wrong):
    setting = Setting(TYPES, case.execution, routing_of(case, is_wrong))
    cluster = ModelledCluster(profile_of(case, is_wrong), 16)
    return Projector(MODEL, deployment.layout, deployment.options, cluster, setting)


_NAMES = {
    str(ProjectedCause.DISPATCH_COMBINE): str(Cause.DISPATCH_COMBINE),
    str(ProjectedCause.IMBALANCE): str(Cause.WAITING),
}


def measured_steps(case, deployment, rng):
    """Steps by ranks' clocks; times have 2 % of noise, their parts 5 %."""
    for size in sizes(case):
        of = projector(case, deployment, True)
        step = of.by_stage(size, of.fastest_mode(size))
        causes = {}
        for cause, seconds in step.causes_s.items():
            name = _NAMES.get(cause, cause)
            causes[name] = causes.get(name, 0.0) + seconds * exp(rng.normal(0, 0.05))
        seconds = step.seconds * exp(rng.normal(0, 0.02))
        total = sum(causes.values())
        num_steps = 20
        yield StepsRecord(
            phase=size.phase,
            num_steps=num_steps,
            num_tokens=num_steps * size.num_seqs * size.num_new,
            num_seqs=num_steps * size.num_seqs,
            num_rounds=num_steps if size.phase is Phase.DECODE else None,
            wall_s=Estimate(seconds * num_steps),
            tps=Estimate(size.num_seqs * size.num_new / seconds),
            context=size.num_cached,
            breakdown_s={cause: each / total * seconds for cause, each in causes.items() if each},
        )


def measured_serving(case, deployment, rng):
    """What a client sees of the load; with 3 % of noise."""
    load = case.experiment.workload.load
    layout = deployment.layout
    places = -(-case.num_seqs // (layout.replicas * layout.dp))
    setup = ServingSetup(
        layout,
        None,
        Options(),
        TYPES,
        case.execution,
        routing_of(case, True),
        max_num_seqs=places,
        **scheduling_of(None, None, places),
    )
    cluster = ModelledCluster(profile_of(case, True), layout.world_size)
    simulator = Simulator(MODEL, cluster, setup, load)
    found = serving_record(simulator.run(0).served)

    def noisy(estimate):
        return Estimate(estimate.value * exp(rng.normal(0, 0.03)))

    return replace(
        found,
        batch=case.num_seqs,
        output_tps=noisy(found.output_tps),
        ttft_s=Summary(noisy(found.ttft_s.mean)),
        tpot_s=Summary(noisy(found.tpot_s.mean)),
        itl_s=None,
        e2e_s=None,
        wall_s=None,
        total_tps=None,
        prefill_tps=None,
        requests_per_s=None,
    )


def results_of(case):
    """Measured with the mistake, projected without."""
    rng = np.random.default_rng(case.seed + 1)
    experiment, model = case.experiment, MODEL
    records = []
    for deployment in experiment.deployments:
        seen = {}
        if case.has_terms:
            seen["steps"] = tuple(measured_steps(case, deployment, rng))
        else:
            seen["serving"] = (measured_serving(case, deployment, rng),)
        records.append(
            DeploymentRecord(
                deployment.name,
                deployment.layout,
                deployment.options,
                "measured",
                roles=(EXPERIMENT,),
                **seen,
            )
        )
    conditions = conditions_of(model.num_experts_per_tok, case.execution, "skewed", TYPES)
    for deployment in experiment.deployments:
        of = projector(case, deployment, False)
        records.append(
            DeploymentRecord(
                deployment.name,
                deployment.layout,
                deployment.options,
                "projected",
                roles=(EXPERIMENT,),
                conditions=conditions,
                pools=(PoolRecord(),),
                steps=tuple(map(of.step, sizes(case))),
            )
        )
    cluster = ModelledCluster(profile_of(case, False), 16)
    return Results.now(
        "comparison",
        "expertlane compare",
        {
            "experiment": experiment.question,
            "skew": ALPHA,
            "projection": ProjectionSetup(cluster=case.cluster, execution=case.execution.value),
        },
        records,
        machine=MACHINE,
        context=sizes(case)[0].num_cached,
        cluster=cluster_record(cluster, ServingKind(model, TYPES.weights)),
    )
