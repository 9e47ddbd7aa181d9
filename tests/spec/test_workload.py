import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.screen import refusing, telling
from expertlane.errors import UserError
from expertlane.spec.model import PRESETS
from expertlane.spec.workload import LengthRange, Load, Workload, draw_requests

TINY = PRESETS["paper-tiny"]  # 64 positions


def test_the_last_output_token_takes_no_position():
    assert Workload(1, prompt_len=10, output_len=1).max_len == 10
    assert Workload(1, prompt_len=10, output_len=5).max_len == 14


def test_the_largest_seed_can_be_drawn_from():
    assert Workload(1, 1, 1, seed=2**64 - 1).prompt_token_ids(257).shape == (1, 1)


@pytest.mark.parametrize(
    ("prompt_len", "output_len", "message"),
    [
        (65, 1, "prompt 65 1 tokens positions 64 prompt_len output_len"),
        (60, 17, "prompt 60 17 tokens 76 positions 64 prompt_len output_len 1 48"),
        (2, 64, "prompt 2 64 tokens 65 positions prompt_len output_len 1"),
        (1, 100, "prompt 1 100 tokens positions 64 output_len"),
        (64, 1, ""),
        (1, 64, ""),
        (32, 33, ""),
    ],
)
def test_workloads_that_fit_and_others(prompt_len, output_len, message):
    with refusing(message):
        Workload(1, prompt_len, output_len).check_model(TINY)


def test_prompts_are_repeatable_and_depend_on_the_seed():
    workload = Workload(num_sequences=5, prompt_len=7, output_len=1, seed=3)
    prompts = workload.prompt_token_ids(257)
    assert prompts.shape == (5, 7)
    assert prompts.dtype == np.int64
    np.testing.assert_array_equal(prompts, workload.prompt_token_ids(257))
    assert (prompts != Workload(5, 7, 1, seed=4).prompt_token_ids(257)).any()


def test_prompts_use_the_whole_vocabulary_and_no_more():
    prompts = Workload(num_sequences=100, prompt_len=10, output_len=1).prompt_token_ids(4)
    assert set(prompts.reshape(-1).tolist()) == {0, 1, 2, 3}


@given(
    num=st.integers(1, 30),
    prompt_len=st.integers(2, 20),
    num_prefixes=st.integers(1, 4),
    data=st.data(),
)
def test_prompts_share_their_beginnings(num, prompt_len, num_prefixes, data):
    prefix_len = data.draw(st.integers(0, prompt_len - 1))
    lengths = LengthRange(prompt_len, prompt_len + 5), LengthRange(1, 3)
    plain = Load(num, *lengths, batch=1)
    shared = Load(num, *lengths, batch=1, prefix_len=prefix_len, num_prefixes=num_prefixes)
    before, after = (draw_requests(each, 10**6, [7]) for each in (plain, shared))
    lens = [[len(request.prompt_token_ids) for request in each] for each in (before, after)]
    assert lens[0] == lens[1]
    prompts = [request.prompt_token_ids for request in after]
    beginnings = {tuple(each[:prefix_len]) for each in prompts}
    assert len(beginnings) <= num_prefixes
    assert shared.has_prefixes == (prefix_len > 0)
    if not prefix_len:
        assert prompts == [request.prompt_token_ids for request in before]


def test_a_prompt_is_longer_than_its_beginning():
    with pytest.raises(UserError, match=telling("prefix_len 4 prompt_len 4:9 prompt")):
        Load(1, LengthRange(4, 9), LengthRange(1, 1), batch=1, prefix_len=4)
