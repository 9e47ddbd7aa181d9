"""A checkpoint whose embedding of one token is NaN or infinite: a request with it ends alone."""

import shutil
from dataclasses import replace
from itertools import chain
from pathlib import Path
from unittest import mock

import pytest
from safetensors.torch import load_file, save_file

from distributed.running import deployment
from engine.model.families import VOCAB_SIZE
from engine.stub_runner import StubEngine, expected, run
from expertlane.comparison.run import run_comparison
from expertlane.engine import llm as llm_module
from expertlane.engine.llm import LLM
from expertlane.errors import ModelError
from expertlane.progress import Progress
from expertlane.schedule.request import FinishReason, RequestOutput
from expertlane.spec.deployment import Options
from expertlane.spec.experiment import Experiment
from expertlane.spec.from_hf import read_model
from expertlane.spec.sampling import SamplingParams
from expertlane.spec.workload import Workload
from schedule.paged import check_empty

FAMILY = "qwen2_moe"
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
POISON = 25  # of the runner without a model
THREE = replace(GREEDY, max_tokens=3)
DRAWN = SamplingParams(
    seed=3, top_p=0.9, repetition_penalty=1.1, max_tokens=8, logprobs=2, ignore_eos=True
)
PREFIX = [5, 9, 2, 77, 31, 8, 40, 12, 64, 3]  # two blocks and a half
HEALTHY = [[*PREFIX, 20], [*PREFIX, 21, 22], [50, 51], [11] * 17]
PARAMS = [GREEDY, DRAWN, replace(GREEDY, logprobs=1), replace(DRAWN, top_p=1)]
SIZES = {"block_size": 4, "max_num_batched_tokens": 16, "num_blocks": 40, "max_model_len": 64}


def poison(healthy: Path, folder: Path, token_id: int, value: float) -> Path:
    shutil.copytree(healthy, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][token_id] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def kept_ranks(pools):
    """What each `LLM` gets in place of ranks of its own, and does not end."""

    class Kept:
        def __init__(self, config):
            self._pool = pools.pool(config.layout.world_size, config.dtype)

        def __getattr__(self, name):
            return getattr(self._pool, name)

        def close(self, *, failed=False):
            pass

    with mock.patch.object(llm_module, "start_pool", Kept):
        yield


@pytest.fixture(scope="module")
def undisturbed(checkpoints, kept_ranks):
    """By dtype: outputs of the healthy prompts, and those of prompts of one token, by it."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        with LLM(str(checkpoints.folder(FAMILY)), dtype=dtype, **SIZES) as llm:
            outputs = llm.generate(HEALTHY, PARAMS)
            others = llm.generate([[token] for token in range(VOCAB_SIZE)], THREE)
            found[dtype] = (
                [output.token_ids for output in outputs],
                [output.token_ids for output in others],
            )
    return found


@pytest.fixture(scope="module")
def poisoned(checkpoints, undisturbed, tmp_path_factory):
    """Folders by what the embedding of a token is filled with; the token; a prompt that meets it.

    The token is the third one that follows the prompt.
    """
    used = set(chain(*HEALTHY, *chain(*(outputs for outputs, _ in undisturbed.values()))))
    meets_it, token_id = next(
        (prompt, after[2])
        for prompt, after in enumerate(undisturbed["float32"][1])
        if after[2] not in {*used, prompt, *after[:2]}
        and after == undisturbed["bfloat16"][1][prompt]
    )
    healthy, root = checkpoints.folder(FAMILY), tmp_path_factory.mktemp("poisoned")
    folders = {
        value: poison(healthy, root / value, token_id, float(value)) for value in ("nan", "inf")
    }
    return folders, token_id, [meets_it]


def line(place: int, token: int) -> str:
    return f"prompt {place}, output token {token}: the logits are NaN or infinite (step "


def check_failed(output: RequestOutput, place: int, tokens: list[int]) -> None:
    assert output.finish_reason is FinishReason.ERROR
    assert output.token_ids == tokens
    assert output.error.startswith(line(place, len(tokens) + 1))
    assert len(output.token_times_s) == len(tokens)


def check_healthy(outputs: list[RequestOutput], begin: list[list[int]]) -> None:
    assert [output.error for output in outputs] == [None] * len(outputs)
    assert [output.finish_reason for output in outputs] == [FinishReason.LENGTH] * len(outputs)
    assert [o.token_ids[: len(b)] for o, b in zip(outputs, begin, strict=True)] == begin


@pytest.mark.parametrize(
    ("layout", "value", "dtype", "options"),
    [
        ("tp=1", "nan", "float32", {}),
        ("tp=1", "inf", "bfloat16", {"prefix_caching": False}),
        ("tp=2", "inf", "float32", {}),
        ("pp=2", "nan", "float32", {"options": Options(False, 2, "rotating")}),
        ("dp=2,ep=2", "nan", "float32", {"options": Options(overlap=True)}),
        pytest.param(
            *("dp=2,ep=2", "inf", "bfloat16", {"options": Options(dispatch="all_gather")}),
            marks=pytest.mark.full,
        ),
    ],
)
def test_others_go_on_as_ever(poisoned, undisturbed, layout, value, dtype, options):
    folders, token_id, meets_it = poisoned
    healthy, others = undisturbed[dtype]
    before_it = others[meets_it[0]]
    num_exact = 8 if dtype == "float32" else 1  # else rounding feels how many are in a batch
    healthy = [tokens[:num_exact] for tokens in healthy]
    bad = [[*PREFIX, token_id, *range(20, 30)], [token_id], meets_it]
    # The first is cut in two: a healthy one begins on its blocks before it is known to be bad.
    prompts = [bad[0], HEALTHY[0], bad[1], HEALTHY[1], bad[2], *HEALTHY[2:]]
    params = [DRAWN, PARAMS[0], GREEDY, PARAMS[1], GREEDY, *PARAMS[2:]]
    with LLM(str(folders[value]), layout=layout, dtype=dtype, **SIZES | options) as llm:
        outputs = llm.generate(prompts, params)
        check_healthy([outputs[1], outputs[3], *outputs[5:]], healthy)
        check_failed(outputs[0], 1, [])
        check_failed(outputs[2], 3, [])
        check_failed(outputs[4], 5, before_it)

        # It ends with the poisoned token, which the step after it, under way by then, computes.
        (short,) = llm.generate(meets_it, THREE)
        assert (short.token_ids, short.finish_reason) == (before_it, FinishReason.LENGTH)
        # All blocks are used again, and shared.
        for _ in range(2):
            check_healthy(llm.generate(HEALTHY, PARAMS), healthy)

        chunks = [chunk for _, chunk in llm.stream([bad[0]], GREEDY)]
        assert [(c.token_id, c.finish_reason) for c in chunks] == [(None, FinishReason.ERROR)]
        assert chunks[0].error.startswith(line(1, 1))
        assert not llm.engine.has_unfinished
        while llm.engine._loop.uncommitted:
            llm.engine.step()
        check_empty(llm.engine.scheduler)


def until_poison(prompt: list[int], num_tokens: int) -> list[int]:
    tokens = expected(prompt, num_tokens)
    return tokens[: tokens.index(POISON) + 1] if POISON in tokens else tokens


class TestScheduling:
    """On a runner without a model: whose history holds `POISON` gets no token."""

    @pytest.fixture(
        params=[("tp=1", (1, "drained")), ("dp=2", (2, "rotating")), ("pp=2", (2, "rotating"))]
    )
    def engine(self, request):
        layout, schedule = request.param
        engine = StubEngine(layout, Options(False, *schedule), max_num_batched_tokens=8)
        engine.runner.poison = POISON
        return engine

    @pytest.mark.parametrize("params", [GREEDY, replace(DRAWN, logprobs=None)])
    def test_one_of_many(self, engine, params):
        prompts = {str(i): [1, 2, 3, 4, 5, 6, 7, 8, 9, i] for i in range(6)}
        bad = engine.add("bad", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, POISON, *range(10)], params)
        outputs = {name: engine.add(name, prompt, params) for name, prompt in prompts.items()}
        chunks = run(engine)
        assert bad.finish_reason is FinishReason.ERROR
        assert bad.token_ids == []
        (told,) = [chunk for chunk in chunks if chunk.request_id == "bad"]
        assert (told.token_id, told.finish_reason, told.error) == (None, "error", bad.error)
        for name, prompt in prompts.items():
            assert outputs[name].token_ids == until_poison(prompt, 8)
        again = engine.add("bad", prompts["0"], params)  # the id is free
        run(engine)
        assert again.token_ids == until_poison(prompts["0"], 8)

    def test_nothing_of_it_is_shared(self):
        engine = StubEngine()
        engine.runner.poison = POISON
        engine.add("bad", [*range(9), POISON], GREEDY)
        run(engine)
        (table,) = engine.scheduler.tables[0]
        assert table.blocks.num_cached == 0
        engine.add("good", [*range(9), 11], replace(GREEDY, max_tokens=1))
        run(engine)
        assert table.blocks.num_hits == 0
        assert table.blocks.num_cached == 2

    @pytest.mark.parametrize("when", ["restarting", "waiting again"])
    def test_cancelled_while_it_begins_again(self, when):
        engine = StubEngine()
        good = engine.add("good", [*range(9), 11], replace(GREEDY, max_tokens=30))
        engine.step()
        bad = engine.add("bad", [*range(9), POISON], DRAWN)
        engine.runner.poison = POISON
        while not engine.scheduler._restarting:
            engine.step()
        if when == "waiting again":
            while engine.scheduler._restarting:
                engine.step()
            assert bad.finish_reason is None
        assert engine.cancel("bad")
        run(engine)
        assert bad.finish_reason is FinishReason.CANCELLED
        assert good.token_ids == until_poison([*range(9), 11], 30)


@pytest.mark.parametrize("layout", ["tp=2", "pp=2"])
def test_a_comparison_ends_with_one_line(poisoned, pools, layout):
    folders, *_ = poisoned
    folder = str(folders["nan"])
    experiment = Experiment(
        name="poisoned",
        model=read_model(folders["nan"], folder),
        workload=Workload(num_sequences=20, prompt_len=30, output_len=2),
        deployments=(replace(deployment(layout), name="mine", is_baseline=True),),
        checkpoint=folder,
    )
    with pytest.raises(ModelError) as caught:
        run_comparison(experiment, pools.pool(2), Progress(), command="")
    line = str(caught.value)
    assert line.startswith("deployment 'mine': sequence ")
    assert "\n" not in line
    assert caught.value.exit_code == 1
