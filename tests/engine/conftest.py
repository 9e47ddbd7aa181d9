"""An `LLM` without ranks."""

import pytest

from cli.stub_llm import MACHINE
from engine.stub_runner import VOCAB_SIZE, StubRunner
from expertlane.engine import llm as llm_module
from expertlane.engine.llm import LLM
from expertlane.spec.model import PRESETS


class StubPool:
    """What an `LLM` needs of a pool that never computes."""

    is_closed = False

    def call(self, function):
        return [MACHINE]

    def close(self, *, failed=False):
        self.is_closed = True


def stub_runner(pool, model, config, limits, *, arranged, **kwargs):
    """In place of a `ModelRunner`, for an `LLM`."""
    runner = StubRunner(limits, config.layout, lookahead=True)
    runner.config, runner.limits, runner.arranged = config, limits, arranged
    return runner


@pytest.fixture
def stub_llm(monkeypatch):
    """An LLM with a `StubRunner` in place of ranks, as its attribute `runner`."""

    runners = []

    def make_runner(*args, **kwargs):
        runners.append(stub_runner(*args, **kwargs))
        return runners[-1]

    model = PRESETS["paper-tiny"].with_overrides(vocab_size=VOCAB_SIZE)
    monkeypatch.setitem(PRESETS, "stub", model)
    monkeypatch.setattr(llm_module, "start_pool", lambda config: StubPool())
    monkeypatch.setattr(llm_module, "ModelRunner", make_runner)
    with LLM("stub", num_blocks=40, block_size=4, max_num_seqs=4) as llm:
        (llm.runner,) = runners
        yield llm
