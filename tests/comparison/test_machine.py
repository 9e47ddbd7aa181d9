"""What of an experiment is refused before ranks are started."""

import pytest

from cli.screen import refusing, tells
from expertlane.balance.holding import check_experiment
from expertlane.comparison.run import why_not_here
from expertlane.spec.deployment import Deployment, Options
from expertlane.spec.experiment import Cluster, Experiment, read_experiment, shipped_experiments
from expertlane.spec.layout import Layout
from expertlane.spec.model import PRESETS
from expertlane.spec.workload import Workload


def experiment(layout, options, *, hidden_size=PRESETS["paper-tiny"].hidden_size):
    return Experiment(
        "mine",
        PRESETS["paper-tiny"].with_overrides(hidden_size=hidden_size),
        Workload(num_sequences=4, prompt_len=8, output_len=3),
        (Deployment("plain", Layout()), Deployment("mine", Layout.parse(layout), options)),
        (Deployment("scaling", Layout(dp=2, ep=2)),),
        Cluster(ranks_per_node=3),
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layout": "tp=2", "options": Options(rebalance_steps=4)}, "rebalance_steps 4 tp=2 ep=1"),
        (
            {"layout": "dp=2,ep=2", "options": Options(payload="float8"), "hidden_size": 30},
            "float8 hidden_size 4 30",
        ),
        (
            {"layout": "dp=4,ep=4", "options": Options(dispatch="hierarchical")},
            "dp=4,ep=4 hierarchical dispatch",
        ),
        (
            {"layout": "dp=2,ep=2", "options": Options(placement_file="no/file")},
            "no/file No such file",
        ),
        ({"layout": "dp=2,ep=2", "options": Options(rebalance_steps=4, payload="float8")}, ""),
    ],
)
def test_an_experiment_names_the_deployment_that_cannot_be(settings, message):
    with refusing(message and f"deployment mine {message}"):
        check_experiment(experiment(**settings))


def test_what_a_machine_lacks_is_known_before_ranks_are_started(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr("expertlane.comparison.run._ACCELERATORS", ())
    monkeypatch.setattr("expertlane.engine.ops.host.memory_bytes", lambda: (10**9, 2 * 10**9))
    paper = read_experiment(shipped_experiments()["paper"])
    line = why_not_here(paper, None)
    assert line is not None
    assert tells(line, "TP 8 × PP 2 pp=2,tp=8 15.2 GB rank")
    assert tells(line, "memory free")
    assert why_not_here(experiment("dp=2", Options()), None) is None
    graphs = why_not_here(experiment("dp=2", Options(cuda_graphs=True)), None)
    assert graphs is not None
    assert graphs.startswith(
        "deployment 'mine': CUDA graphs (--cuda-graphs on, cuda_graphs=True) need a GPU for"
    )
    monkeypatch.setenv("WORLD_SIZE", "16")  # torchrun's ranks may be elsewhere
    assert why_not_here(paper, None) is None
