import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from expertlane.engine.model.draw import uniform_numbers
from expertlane.engine.model.head import NO_TOKEN, likeliest
from expertlane.engine.model.sampler import Sampler
from expertlane.spec.sampling import SamplingParams, SamplingState

CPU = torch.device("cpu")


def logits_of(step, seq_id, vocab_size, scale=2.0):
    """What a model might give a sequence; the same whatever batch it is in."""
    generator = torch.Generator().manual_seed(step * 1000 + seq_id)
    return torch.randn(vocab_size, generator=generator) * scale


def state(params, prompt=(), output=(), seed=0):
    def ids(tokens):
        return np.array(tokens, dtype=np.int64)

    return SamplingState(params, seed, ids(prompt), ids(output))


def sample(sampler, seq_ids, logits):
    """The tokens, and log-probabilities by sequence id."""
    chosen = sampler.sample(seq_ids, logits)
    return chosen.read(iter(chosen.tensors))


def generate(vocab_size, params, batches, prompts=None, scale=2.0):
    """Sample step after step; a batch is the ids of its sequences, which are also their seeds.

    Args:
        params: by sequence id; those without are not admitted.

    Returns:
        Tokens and log-probabilities by sequence id.
    """
    sampler = Sampler(vocab_size, CPU)
    for seq_id, asked in params.items():
        sampler.begin_step(
            admitted={seq_id: state(asked, (prompts or {}).get(seq_id, ()), seed=seq_id)}
        )
    tokens = {seq_id: [] for batch in batches for seq_id in batch}
    logprobs = {seq_id: [] for seq_id in tokens}
    for batch in batches:
        logits = torch.empty(len(batch), vocab_size)
        for row, seq_id in enumerate(batch):
            logits[row] = logits_of(len(tokens[seq_id]), seq_id, vocab_size, scale)
        before = logits.clone()
        chosen, found = sample(sampler, batch, logits)
        assert torch.equal(logits, before)
        for seq_id, token_id in zip(batch, chosen, strict=True):
            tokens[seq_id].append(token_id)
            logprobs[seq_id].append(found.get(seq_id))
    return tokens, logprobs


def reference_scores(params, logits, prompt, output):
    """By transformers' processors, and by hand what they lack."""
    scores = logits.clone()[None]
    if params.repetition_penalty != 1:
        seen = torch.tensor([[*prompt, *output]], dtype=torch.int64)
        scores = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(seen, scores)
    for token_id in set(output):
        times = output.count(token_id)
        scores[0, token_id] -= params.presence_penalty + times * params.frequency_penalty
    return scores


def reference_token(params, logits, prompt, output, seed):
    scores = reference_scores(params, logits, prompt, output)
    if params.is_greedy:
        return int(scores.argmax())
    warpers = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        warpers.append(MinPLogitsWarper(params.min_p))
    p = warpers(None, scores).double().softmax(1)[0]
    number = uniform_numbers(np.array([seed], np.uint64), np.array([len(output)]))[0]
    return int(torch.searchsorted(p.cumsum(0), number, right=True))


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 5, 20, 10**6]),
    top_p=st.sampled_from([1.0, 0.9, 0.4, 1e-6]),
    min_p=st.sampled_from([0.0, 0.02, 0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    presence_penalty=st.sampled_from([0.0, 1.5, -0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.7]),
    logprobs=st.sampled_from([None, 2]),
)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(PARAMS, min_size=1, max_size=6), st.sampled_from([3, 30, 300]))
def test_a_mixed_batch_samples_as_transformers_does_one_by_one(several, vocab_size):
    params = dict(enumerate(several))
    prompts = {seq_id: [seq_id % vocab_size, 2] for seq_id in params}
    tokens, _ = generate(vocab_size, params, [list(params)] * 5, prompts)
    for seq_id, asked in params.items():
        for step, token_id in enumerate(tokens[seq_id]):
            logits = logits_of(step, seq_id, vocab_size)
            output = tokens[seq_id][:step]
            expected = reference_token(asked, logits, prompts[seq_id], output, seq_id)
            assert token_id == expected, (seq_id, step)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.data(), st.lists(PARAMS, min_size=2, max_size=6), st.sampled_from([2, 50, 3000]))
def test_a_sequence_does_not_feel_the_batch_around_it(data, several, vocab_size):
    params = dict(enumerate(several))
    everyone = [*params, 99]  # one was never admitted
    alone = {seq_id: [] for seq_id in everyone}
    for seq_id in everyone:
        own = {seq_id: params[seq_id]} if seq_id in params else {}
        alone[seq_id] = [kind[seq_id] for kind in generate(vocab_size, own, [[seq_id]] * 6)]
    subsets = st.lists(st.sampled_from(everyone), unique=True)
    few = st.sampled_from(data.draw(st.lists(subsets, min_size=1, max_size=3)))  # so they recur
    batches = data.draw(st.lists(few, min_size=1, max_size=6))
    tokens, logprobs = generate(vocab_size, params, batches)
    for seq_id, found in tokens.items():
        assert found == alone[seq_id][0][: len(found)]
        assert logprobs[seq_id] == alone[seq_id][1][: len(found)]


def test_a_large_batch_over_a_large_vocabulary_samples_as_its_rows_do():
    vocab_size = 40_000  # the batch is worked on in several pieces
    asked = [
        SamplingParams(temperature=0.8, logprobs=3),
        SamplingParams(top_p=0.95),
        SamplingParams(top_k=50, repetition_penalty=1.2),
        SamplingParams(temperature=0, frequency_penalty=1),
    ]
    params = {seq_id: asked[seq_id % 4] for seq_id in range(16)}
    together = generate(vocab_size, params, [list(params)] * 3)
    for seq_id in params:
        alone = generate(vocab_size, {seq_id: params[seq_id]}, [[seq_id]] * 3)
        assert [kind[seq_id] for kind in together] == [kind[seq_id] for kind in alone]


@settings(derandomize=True, deadline=None, max_examples=40)
@given(PARAMS, st.integers(0, 5))
def test_a_preempted_sequence_goes_on_as_if_nothing_had_been(asked, when):
    vocab_size, prompt = 40, (3, 4)
    whole = generate(vocab_size, {5: asked}, [[5]] * 6, {5: prompt})[0][5]
    sampler = Sampler(vocab_size, CPU)
    sampler.begin_step(admitted={5: state(asked, prompt, seed=5)})
    again = []
    for step in range(6):
        if step == when:
            sampler.begin_step(admitted={5: state(asked, prompt, again, seed=5)})
        again += sample(sampler, [5], logits_of(step, 5, vocab_size)[None])[0]
    assert again == whole


@pytest.mark.parametrize(
    ("asked", "scores"),
    [
        ({"temperature": 1}, [2.0, 1.0, 0.0, -1.0, -math.inf]),
        ({"temperature": 2}, [1.0, 0.5, 0.0, -0.5, -math.inf]),
        ({"top_k": 2}, [2.0, 1.0, -math.inf, -math.inf, -math.inf]),
        ({"top_p": 0.8}, [2.0, 1.0, -math.inf, -math.inf, -math.inf]),  # 0.64 + 0.24
        ({"min_p": 0.1}, [2.0, 1.0, 0.0, -math.inf, -math.inf]),
    ],
)
def test_tokens_come_as_often_as_they_should(asked, scores):
    num_draws, logits = 4000, torch.tensor([2.0, 1.0, 0.0, -1.0, -math.inf])
    sampler = Sampler(5, CPU)
    for seq_id in range(100):
        sampler.begin_step(admitted={seq_id: state(SamplingParams(**asked), seed=seq_id)})
    counts = np.zeros(5)
    for _ in range(num_draws // 100):
        chosen, _ = sample(sampler, list(range(100)), logits.expand(100, 5))
        counts += np.bincount(chosen, minlength=5)
    expected = torch.tensor(scores).softmax(0).numpy() * num_draws
    possible = expected > 0
    assert counts[~possible].sum() == 0
    squares = (counts - expected)[possible] ** 2 / expected[possible]
    assert squares.sum() < 16.3  # chi-square, 3 degrees of freedom, p = 0.001


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(PARAMS, min_size=1, max_size=3), st.data())
def test_steps_that_are_undone_and_taken_again_choose_the_same(asked, data):
    """With sequences that come, begin again and go between them."""
    vocab_size, num_steps = 30, 8
    seqs = range(len(asked))
    drawn = [data.draw(st.sets(st.sampled_from(seqs))) for _ in range(num_steps)]  # come or go
    known, plans = set(), []
    for changed in drawn:
        plans.append((changed & known, changed - known))
        known ^= changed

    def step(sampler, number):
        released, admitted = plans[number]
        states = {seq: state(asked[seq], (1, 2), (number,), seed=seq) for seq in admitted}
        begun = sampler.begin_step(released, states)
        logits = torch.stack([logits_of(number, seq, vocab_size) for seq in seqs])
        return begun, sample(sampler, list(seqs), logits)

    sampler = Sampler(vocab_size, CPU)
    expected = [step(sampler, number)[1] for number in range(num_steps)]
    sampler, number, uncommitted = Sampler(vocab_size, CPU), 0, []
    for _ in range(3 * num_steps):
        if data.draw(st.booleans()) and uncommitted:
            for begun in reversed(uncommitted):
                sampler.undo(begun)
            number -= len(uncommitted)
            uncommitted.clear()
        elif data.draw(st.booleans()) and uncommitted:
            sampler.commit(uncommitted.pop(0))
        elif number < num_steps:
            begun, found = step(sampler, number)
            assert found == expected[number]
            uncommitted.append(begun)
            number += 1


@pytest.mark.parametrize(
    "asked",
    [
        {"temperature": 1e-300},
        {"temperature": 1e-4},
        {"temperature": 1e4, "top_k": 1},
        {"temperature": 50, "top_p": 1e-12},
        {"temperature": 1e4, "top_k": 1, "top_p": 5e-324},
        {"min_p": 1},
        {"temperature": 1e-300, "top_k": 3, "top_p": 0.5, "min_p": 0.1},
    ],
)
def test_limits_at_which_drawing_is_greedy(asked):
    params = {0: SamplingParams(**asked)}
    assert generate(500, params, [[0]] * 20) == generate(500, {}, [[0]] * 20)


@pytest.mark.parametrize("penalty", [1e-6, 1e6])
def test_an_extreme_repetition_penalty_leaves_something_to_choose(penalty):
    sampler = Sampler(2, CPU)
    for seq_id, temperature in enumerate((0, 1)):
        asked = SamplingParams(temperature=temperature, repetition_penalty=penalty)
        sampler.begin_step(admitted={seq_id: state(asked, prompt=[0, 1])})
    for logits in ([8.0, 9.0], [-9.0, -8.0]):
        greedy, drawn = sample(sampler, [0, 1], torch.tensor([logits, logits]))[0]
        assert greedy == 1
        assert drawn in (0, 1)


def test_log_probabilities_are_the_model_s_own():
    logits = torch.tensor([[0.0, 3.0, 1.0, 3.0]]).expand(4, 4)
    asked = {"temperature": 0, "repetition_penalty": 50}
    sampler = Sampler(4, CPU)
    sampler.begin_step(admitted={10: state(SamplingParams(**asked, logprobs=2), prompt=[1, 3])})
    sampler.begin_step(admitted={11: state(SamplingParams(**asked), prompt=[1, 3])})
    sampler.begin_step(admitted={12: state(SamplingParams(temperature=0, logprobs=0))})
    sampler.begin_step(admitted={13: state(SamplingParams(temperature=0, logprobs=20))})
    token_ids, logprobs = sample(sampler, [10, 11, 12, 13], logits)
    assert token_ids == [2, 2, 1, 1]
    expected = logits[0].log_softmax(0).tolist()
    assert sorted(logprobs) == [10, 12, 13]
    assert (logprobs[10].token_id, logprobs[10].logprob) == (2, expected[2])
    assert logprobs[10].top == ((1, expected[1]), (3, expected[3]))
    assert (logprobs[12].token_id, logprobs[12].top) == (1, ())
    assert [token_id for token_id, _ in logprobs[13].top] == [1, 3, 2, 0]


@pytest.mark.parametrize("admitted", [False, True])
def test_no_sequences_and_one_token(admitted):
    sampler = Sampler(1, CPU)
    if admitted:
        asked = SamplingParams(top_k=1, top_p=0.5, min_p=0.5, repetition_penalty=2, logprobs=1)
        sampler.begin_step(admitted={0: state(asked, prompt=[0])})
    assert sample(sampler, [], torch.empty(0, 1)) == ([], {})
    token_ids, logprobs = sample(sampler, [0], torch.tensor([[-3.0]]))
    assert token_ids == [0]
    assert [found.top for found in logprobs.values()] == [((0, 0.0),)] * admitted


def test_equal_logits_are_drawn_alike_and_chosen_by_the_lowest_id():
    sampler = Sampler(6, CPU)
    asked = [
        SamplingParams(top_k=1),  # equals of the last one kept are kept
        SamplingParams(temperature=0, logprobs=1),
    ]
    for seq_id, params in enumerate(asked):
        sampler.begin_step(admitted={seq_id: state(params)})
    logits = torch.tensor([[0.0, 5.0, 1.0, 5.0, 5.0, 0.0]]).expand(2, 6)
    drawn = set()
    for _ in range(30):
        (token_id, greedy), logprobs = sample(sampler, [0, 1], logits)
        drawn.add(token_id)
        assert greedy == logprobs[1].top[0][0] == 1
    assert drawn == {1, 3, 4}


MASKED = [0.5, -math.inf, 1.0, -math.inf]
BAD_ROWS = {
    "nan": [0.0, math.nan, 9.0, 1.0],
    "inf": [0.0, 1.0, math.inf, 2.0],
    "both": [math.inf, math.nan, -math.inf, 0.0],
    "all -inf": [-math.inf] * 4,
}
WAYS = {
    "greedy": {"temperature": 0},
    "greedy with logprobs": {"temperature": 0, "logprobs": 4},
    "drawn": {"logprobs": 4},
    "top-k": {"top_k": 2, "top_p": 0.9},
    "top-p": {"top_p": 0.5, "min_p": 0.1},
    "penalties": {"repetition_penalty": 1.5, "frequency_penalty": 1, "presence_penalty": 1},
    "penalised greedily": {"temperature": 0, "repetition_penalty": 1.5},
}


@pytest.mark.parametrize("bad", BAD_ROWS.values(), ids=BAD_ROWS)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_only_rows_that_are_not_finite_get_no_token(way, bad):
    asked = {0: SamplingParams(**way), 1: SamplingParams(**way), 2: SamplingParams(**way)}

    def sampled(second):
        sampler = Sampler(4, CPU)
        for seq_id, params in asked.items():
            sampler.begin_step(admitted={seq_id: state(params, prompt=[1, 2], seed=seq_id)})
        logits = torch.tensor([MASKED, second, [0.0, 1.0, 2.0, 3.0]])
        return [sample(sampler, [0, 1, 2], logits) for _ in range(4)]

    for (tokens, logprobs), (usual, usual_logprobs) in zip(
        sampled(bad), sampled(MASKED), strict=True
    ):
        assert tokens == [usual[0], NO_TOKEN, usual[2]]
        assert tokens[0] in (0, 2)
        usual_logprobs.pop(1, None)
        assert logprobs == usual_logprobs


def test_the_likeliest_of_rows_that_are_not_finite():
    logits = torch.tensor([MASKED, *BAD_ROWS.values()])
    assert likeliest(logits).tolist() == [2] + [NO_TOKEN] * 4
    assert sample(Sampler(4, CPU), [0, 1, 2, 3, 4], logits) == ([2] + [NO_TOKEN] * 4, {})
    assert likeliest(torch.empty(0, 4)).tolist() == []


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_bias_is_added_before_all_else(temperature):
    params = SamplingParams(temperature=temperature, logit_bias={3: 100, 5: -100})
    tokens, _ = generate(11, {1: params}, [[1, 2]] * 20)
    assert tokens[1] == [3] * 20
    plain, _ = generate(11, {}, [[1, 2]] * 20)
    assert tokens[2] == plain[2]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_stop_token_before_there_are_enough(temperature):
    vocab_size, stops = 5, (0, 1, 2, 99)
    params = SamplingParams(temperature=temperature, min_tokens=6, stop_token_ids=stops, seed=1)
    held = SamplingState(params, 1, np.array([4]), np.array([], dtype=np.int64), stops)
    sampler = Sampler(vocab_size, CPU)
    sampler.begin_step(admitted={1: held, 2: state(SamplingParams(seed=2), seed=2)})
    logits = torch.tensor([[9.0, 1.0, 1.0, 0.0, 0.0]] * 2)
    chosen = []
    for step in range(12):
        batch = [1, 2] if step % 2 else [2, 1]  # another batch each step
        tokens, _ = sample(sampler, batch, logits)
        chosen.append(tokens[batch.index(1)])
    assert {*chosen[:6]} <= {3, 4}
    assert 0 in chosen[6:]


def test_tokens_before_a_preemption_count_as_enough():
    params = SamplingParams(temperature=0, min_tokens=3, stop_token_ids=(0,))
    again = SamplingState(params, 1, np.array([4]), np.array([1, 1]), (0,))
    sampler = Sampler(3, CPU)
    sampler.begin_step(admitted={1: again})
    logits = torch.tensor([[9.0, 1.0, 0.0]])
    assert [sample(sampler, [1], logits)[0][0] for _ in range(3)] == [1, 0, 0]


def bits(vocab_size, tokens):
    allowed = np.zeros(-(-vocab_size // 8) * 8, dtype=np.uint8)
    allowed[list(tokens)] = 1
    return np.packbits(allowed, bitorder="little")


@given(st.data(), st.integers(2, 70))
def test_masks_are_as_if_the_vocabulary_were_smaller(data, vocab_size):
    """Whatever else is asked for: a bias on them, and penalties, do not let others back in."""
    asked = {1: SamplingParams(temperature=0, logit_bias={0: 100}), 2: SamplingParams(top_k=3)}
    asked[3] = SamplingParams(top_p=0.9, min_p=0.1, repetition_penalty=0.5, logprobs=1)
    sampler = Sampler(vocab_size, CPU)
    masks = {}
    for seq in (2, 3, 4):
        allowed = data.draw(st.sets(st.integers(0, vocab_size - 1), min_size=1))
        masks[seq] = bits(vocab_size, allowed)
    admitted = {seq: state(params, prompt=[0], seed=seq) for seq, params in asked.items()}
    sampler.begin_step(admitted=admitted, masks=masks)
    logits = torch.randn(4, vocab_size, generator=torch.Generator().manual_seed(1))
    before = logits.clone()
    tokens, logprobs = sample(sampler, [1, 2, 3, 4], logits)
    assert torch.equal(logits, before)
    for seq, token in zip([2, 3, 4], tokens[1:], strict=True):
        assert np.unpackbits(masks[seq], bitorder="little")[token]
    assert tokens[0] == (logits[0] + torch.tensor([100.0] + [0.0] * (vocab_size - 1))).argmax()
    assert logprobs[3].logprob == pytest.approx(logits[2].log_softmax(0)[tokens[2]].item())
    sampler.begin_step()  # the next step has masks of its own, or none
    free, _ = sample(sampler, [4], logits[3:])
    assert free == [logits[3].argmax().item()]
