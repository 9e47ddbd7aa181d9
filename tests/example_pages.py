"""Results of every kind that a page is made of."""

from dataclasses import replace

import example_projection
import example_results
import example_timelines
from example_plan import PLAN
from example_serving import POINT, RECORD, RESULTS
from example_simulation import SIMULATION
from expertlane.results.estimate import Estimate
from expertlane.results.record import EXPERIMENT, DeploymentRecord, RatioRecord, ServerRecord
from expertlane.results.results import Results
from expertlane.results.serving_record import ClientRecord, RequestsRecord
from expertlane.spec.layout import Layout


def projected() -> Results:
    """The paper's experiment, projected alone: with batch sizes, timelines and the planner's."""
    found = example_projection.usual()
    usual = found.conditions[0]
    context = example_projection.CONTEXT

    def closer(record: DeploymentRecord) -> DeploymentRecord:
        if EXPERIMENT not in record.roles or record.conditions != usual:
            return record
        of_all = record.decode_of(context, example_projection.NUM_SEQS)
        timeline = example_timelines.timeline(16)
        steps = [
            replace(step, timeline=timeline) if step in (record.prefill, of_all) else step
            for step in record.steps
        ]
        fewer = (example_projection.step(batch / 100, context, batch) for batch in (1, 64))
        return replace(record, steps=(*steps, *fewer))

    front = example_projection.front(usual)
    return replace(found, deployments=(*map(closer, found.deployments), *front))


def both() -> Results:
    """Measured, with a projection beside it."""
    return example_results.usual().beside(projected())


def serving() -> Results:
    """Three loads on one layout."""
    points = tuple(
        replace(POINT, batch=batch, rate=None, output_tps=Estimate(100.0 * batch))
        for batch in (1, 8, 32)
    )
    return replace(RESULTS, deployments=(replace(RECORD, serving=points),))


def servers() -> Results:
    """Three servers of an engine: with other options, KV caches and versions, one by its URL."""
    client = ClientRecord(
        3,
        0,
        0,
        (),
        "",
        900,
        0,
        None,
        1.0,
        0.1,
        64.0,
        32.0,
        RequestsRecord((), (), (), (), (), (), (), (), ()),
    )
    point = replace(POINT, batch=8, rate=None, client=client)
    sizes = (8, 16, 16)
    records = []
    for number, tp in enumerate((1, 2, 4)):
        command = (
            "/opt/engine/bin/python -m vllm.entrypoints.openai.api_server --model /models/mix "
        )
        command += f"--tensor-parallel-size {tp} --max-num-seqs {sizes[number]} --port 8{number}"
        server = ServerRecord(
            "vLLM",
            software=f"vllm 0.3{number}.0",
            command=command,
            kv_tokens=1024 * (1 + number),
        )
        tps = Estimate(1000.0 * (1 + number), 950.0 * (1 + number), 1050.0 * (1 + number))
        serving = (replace(point, output_tps=tps),)
        name = f"tensor parallel over {tp} GPUs"
        layout = Layout(tp=tp)
        record = DeploymentRecord(name, layout, None, "measured", serving=serving, server=server)
        record = replace(record, roles=(EXPERIMENT,))
        records.append(record)
    ratio = RatioRecord(records[2].name, records[0].name, "", "output tokens/s", 5, Estimate(3.0))
    question = {**RESULTS.question, "servers": 3}
    del question["ranks_per_node"]
    return replace(
        RESULTS,
        kind="comparison",
        question=question,
        deployments=tuple(records),
        ratios=(ratio,),
        machine=None,
    )


KINDS = {
    "servers": servers,
    "measured": example_results.usual,
    "projected": projected,
    "both": both,
    "plan": lambda: PLAN,
    "simulation": lambda: SIMULATION,
    "bench": serving,
    "bench at rates": lambda: RESULTS,
}
