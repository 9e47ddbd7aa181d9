"""`--resume`: an interrupted comparison goes on; what it can't go on with is refused."""

from dataclasses import replace

import pytest

from cli.screen import telling, tells
from distributed.running import deployment
from expertlane.comparison.journal import FILE_NAME
from expertlane.comparison.run import run_comparison
from expertlane.comparison.turns import Repeats
from expertlane.errors import UserError
from expertlane.progress import Progress
from expertlane.spec.experiment import Cluster, Experiment
from expertlane.spec.model import PRESETS
from expertlane.spec.workload import Workload

EXPERIMENT = Experiment(
    name="tiny",
    model=PRESETS["paper-tiny"],
    workload=Workload(6, prompt_len=3, output_len=3),
    deployments=(
        replace(deployment("tp=2"), name="TP 2", is_baseline=True),
        replace(deployment("dp=2,ep=2", rebalance_steps=2), name="EP 2"),
    ),
    cluster=Cluster(ranks_per_node=2),
)


class Interrupted(Exception):
    pass


class Ending(Progress):
    """Ends the comparison when a measurement begins."""

    def __init__(self, last):
        self.last, self.begun = last, []

    def task(self, name, total):
        if self.last is not None and len(self.begun) == self.last:
            raise Interrupted
        self.begun.append(name)


def compared(pools, folder, last=None, *, resume=False, experiment=EXPERIMENT):
    progress = Ending(last)
    try:
        results = run_comparison(
            experiment,
            pools.pool(2),
            progress,
            command="",
            repeats=Repeats(3),
            folder=folder,
            resume=resume,
        )
    except Interrupted:
        return None, progress.begun
    return results, progress.begun


@pytest.mark.full
def test_it_goes_on_where_it_was_interrupted(pools, tmp_path):
    whole, all_begun = compared(pools, tmp_path / "whole")
    assert all_begun[1:] == ["TP 2", "EP 2", "EP 2, run 2", "TP 2, run 2", *all_begun[5:]]
    folder = tmp_path / "resumed"
    assert compared(pools, folder, last=4) == (None, all_begun[:4])
    journal = folder / FILE_NAME
    journal.write_bytes(journal.read_bytes()[:-9])  # killed while it was writing the third
    results, begun = compared(pools, folder, resume=True)
    assert tells(begun[1], "2 interrupted run")
    assert begun[2] == "EP 2, run 2"
    assert [each.name for each in results.deployments] == ["TP 2", "EP 2"]
    for own, other in zip(results.deployments, whole.deployments, strict=True):
        assert own.tokens_sha256 == other.tokens_sha256
        assert own.decode.num_tokens == other.decode.num_tokens
        assert own.held == other.held
        assert len(own.decode.tps_of_runs) == 3
    assert not journal.exists()


def test_nothing_is_measured_twice(pools, tmp_path):
    _, all_begun = compared(pools, tmp_path / "whole")
    last = len(all_begun) - 1
    compared(pools, tmp_path, last=last)
    _, begun = compared(pools, tmp_path, resume=True)
    assert begun[0] == all_begun[0]
    assert tells(begun[1], f"{last - 1} interrupted")
    assert begun[2:] in (["EP 2, run 3"], ["TP 2, run 3"])  # the faster one is measured first


@pytest.mark.smoke(1)
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"seed": 7}, "another experiment"),
        ({"workload": Workload(5, prompt_len=3, output_len=3)}, "another experiment"),
    ],
)
def test_another_comparison_is_refused(pools, tmp_path, change, reason):
    compared(pools, tmp_path, last=2)
    with pytest.raises(UserError, match=telling(reason)):
        compared(pools, tmp_path, resume=True, experiment=replace(EXPERIMENT, **change))


def test_without_a_journal_there_is_nothing_to_resume(pools, tmp_path):
    with pytest.raises(UserError, match=telling("nothing resume")):
        compared(pools, tmp_path, resume=True)


@pytest.mark.parametrize("content", [b"", b"XLM1", b"\x80\x04pickle" * 9])
def test_a_file_that_is_no_journal_is_refused(pools, tmp_path, content):
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(UserError, match=telling("cannot read")):
        compared(pools, tmp_path, resume=True)
