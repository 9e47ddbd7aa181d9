"""An output that another process began: whatever it is held to, the rest is what it would be."""

from dataclasses import replace

import pytest

from engine.model.chat_checkpoint import save_chat_checkpoint
from engine.stub_runner import StubEngine, expected, letters, run
from expertlane.engine.llm import LLM
from expertlane.schedule.request import FinishReason, RequestOutput
from expertlane.spec.sampling import SamplingParams, Structured

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
DRAWN = SamplingParams(temperature=1.0, seed=3, max_tokens=24, ignore_eos=True)
PARAMS = {
    "greedy": GREEDY,
    "drawn": DRAWN,
    "log-probabilities": replace(DRAWN, logprobs=2, prompt_logprobs=1),
    "penalties": replace(
        DRAWN, repetition_penalty=1.5, presence_penalty=0.7, frequency_penalty=0.9
    ),
    "min_tokens": replace(DRAWN, min_tokens=20, stop_token_ids=tuple(range(4, 130))),
    "bias": replace(DRAWN, logit_bias={40: 5.0}, top_p=0.9, top_k=30),
    "stop": replace(DRAWN, stop=("e", "th"), min_tokens=4),
    "a schema": replace(
        DRAWN,
        structured=Structured(
            json_schema={"type": "array", "items": {"type": "integer"}, "minItems": 4}
        ),
        max_tokens=40,
    ),
    "a regex": replace(DRAWN, structured=Structured(regex="[a-f]{12} [é日]+ ok"), max_tokens=40),
    "structured and min_tokens": replace(
        DRAWN, structured=Structured(regex="[a-f]*"), min_tokens=15, ignore_eos=False
    ),
}


def begun(whole: RequestOutput, request_id: str, num: int, text: str) -> RequestOutput:
    """As a journal gives it back."""
    return RequestOutput(
        request_id,
        None,
        list(whole.prompt_token_ids),
        0.0,
        token_ids=whole.token_ids[:num],
        text=text,
        logprobs=whole.logprobs[:num],
        prompt_logprobs=whole.prompt_logprobs,
    )


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = save_chat_checkpoint(tmp_path_factory.mktemp("resumed"), "")
    with LLM(folder, dtype="float32", num_blocks=256, block_size=4) as made:
        yield made


def test_the_rest_is_what_it_would_be(llm):
    """Each kind of request, cut after one token, in the middle and before its last; all at once."""
    prompts, params = ["the thing"] * len(PARAMS), list(PARAMS.values())
    chunks: list[list[tuple[int, str]]] = [[] for _ in params]
    for place, chunk in llm.stream(prompts, params):
        chunks[place].append((chunk.token_id, chunk.text))
    wholes = llm.generate(prompts, params)
    engine, resumed = llm.engine, {}
    for place, (whole, of_one) in enumerate(zip(wholes, params, strict=True)):
        total = len(whole.token_ids)
        assert total > 2, whole
        for num in {1, 2, total // 2, total - 1}:
            request_id = f"{place} {num}"
            text = "".join(each for _, each in chunks[place][:num])
            earlier = begun(whole, request_id, num, text)
            given = whole.prompt_token_ids
            output = engine.add(request_id, given, of_one, earlier=earlier)
            assert output is earlier
            resumed[request_id] = output, whole
    while engine.has_unfinished:
        engine.step()
    for name, (output, whole) in resumed.items():
        kind = list(PARAMS)[int(name.split()[0])]
        assert output.token_ids == whole.token_ids, (kind, name)
        assert (output.text, output.finish_reason) == (whole.text, whole.finish_reason), kind
        for one, other in zip(output.logprobs, whole.logprobs, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-5)
    assert {whole.finish_reason for _, whole in resumed.values()} == {"length", "stop"}


def test_a_grammar_that_was_complete_ends_at_once(llm):
    params = replace(DRAWN, structured=Structured(choice=("a", "b")), max_tokens=5)
    (whole,) = llm.generate(["the"], params)
    earlier = begun(whole, "0", len(whole.token_ids), whole.text)
    llm.engine.add("0", whole.prompt_token_ids, params, earlier=earlier)
    while llm.engine.has_unfinished:
        llm.engine.step()
    assert (earlier.token_ids, earlier.text) == (whole.token_ids, whole.text)
    assert earlier.finish_reason is FinishReason.STOP


@pytest.mark.parametrize("num_blocks", [64, 6])
def test_what_is_resumed_may_be_preempted(num_blocks):
    """Several at once in a cache that is too small for all of them."""
    engine = StubEngine(tokenizer=letters(), num_blocks=num_blocks, max_model_len=24)
    params = SamplingParams(temperature=0, max_tokens=20)
    outputs = []
    for number in range(4):
        whole = expected([number], 20)
        num = 1 + 5 * number
        earlier = RequestOutput(str(number), None, [number], 0.0, whole[:num])
        outputs.append(engine.add(str(number), [number], params, earlier=earlier))
    run(engine)
    assert [output.token_ids for output in outputs] == [expected([n], 20) for n in range(4)]
