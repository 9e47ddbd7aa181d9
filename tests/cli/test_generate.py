import io
import json
import math
import os
import re
import signal
import subprocess
import sys

import pytest

from cli.screen import one_line, refused, tells
from cli.stub_llm import StubLLM
from engine.model.chat_checkpoint import save_chat_checkpoint
from expertlane.balance.trace import read_trace
from expertlane.cli import local_model, model
from expertlane.cli.generate import sampling_params
from expertlane.errors import UserError
from expertlane.schedule.request import RequestOutput, not_finite
from expertlane.spec.model import PRESETS
from expertlane.spec.sampling import SamplingParams, TokenLogprobs
from expertlane.text.tokenizer import Tokenizer

TINY = PRESETS["paper-tiny"]
TEMPLATE = """\
{%- for message in messages -%}
<{{ message.role[0] }}>{{ message.content }}{% if message.role == 'wizard' %}!{% endif %}
{%- endfor -%}<a>"""
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('No system.') }}{% endif %}"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny checkpoint with a byte-level tokenizer and a chat template."""
    return save_chat_checkpoint(tmp_path_factory.mktemp("chatty"), TEMPLATE)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def type_in(monkeypatch):
    """Give standard input."""

    def set_stdin(text, terminal=False):
        monkeypatch.setattr(sys, "stdin", Terminal(text) if terminal else io.StringIO(text))

    set_stdin("", terminal=True)
    return set_stdin


@pytest.fixture
def stub(monkeypatch, type_in):
    """Put a stub in place of what would be loaded."""

    def use(folder=None):
        if folder is None:
            llm = StubLLM(TINY)
        else:
            found = model.find_model(str(folder))
            llm = StubLLM(found.config, Tokenizer.from_folder(folder))

        def load(found, layout, options, *, record_routing):
            llm.layout, llm.options, llm.records_routing = layout, options, record_routing
            return llm

        monkeypatch.setattr("expertlane.cli.generate.load_model", load)
        return llm

    return use


@pytest.mark.full
def test_a_preset_on_real_ranks(run, type_in, tmp_path):
    options = ["--max-tokens", "3", "--temperature", "0", "--logprobs", "1", "--layout", "tp=2"]
    trace = tmp_path / "routing.npz"
    options += ["--record-routing", str(trace)]
    code, out, err = run(
        "generate", "paper-tiny", "--token-ids", "1,2", "--token-ids", "1, 2", *options, "--json"
    )

    assert code == 0
    first, second = map(json.loads, out.splitlines())
    assert first["token_ids"] == second["token_ids"]
    assert len(first["token_ids"]) == 3
    assert (first["prompt"], first["prompt_token_ids"]) == (None, [1, 2])
    assert (first["text"], first["finish_reason"], first["num_preemptions"]) == ("", "length", 0)
    assert 0 < first["ttft_s"] < first["e2e_s"]
    assert first["e2e_s"] == pytest.approx(first["ttft_s"] + 2 * first["tpot_s"])
    assert [each["token_id"] for each in first["logprobs"]] == first["token_ids"]
    assert first["logprobs"][0]["top"] == [[first["token_ids"][0], first["logprobs"][0]["logprob"]]]
    loading, computing, written, speed = err.splitlines()
    assert computing.startswith("computing with ")
    assert written == f"written: {trace}"
    assert tells(loading, "paper-tiny 2 ranks tp=2")
    assert re.fullmatch(r"6 tokens in \S+ s, \S+ tokens/s; median TTFT \S+ ms", speed)
    recorded = read_trace(trace)
    assert recorded.num_tokens == 2 * (2 + 2)  # the last token of an output is not fed
    assert recorded.layers == (0, 1, 2, 3)
    code, out, _ = run("balance", str(trace), "--ep", "2", "--json")
    assert (code, json.loads(out)["num_tokens"]) == (0, 8)


@pytest.mark.full
def test_a_chat_with_a_checkpoint_on_a_real_rank(run, type_in, checkpoint):
    type_in("the thing\n\n/reset\nthe thing\n/exit\nnever read\n")
    code, out, err = run(
        "generate", str(checkpoint), "--chat", "--temperature", "0", "--max-tokens", "4"
    )

    assert code == 0
    assert len(out) > 2
    assert out[: len(out) // 2] == out[len(out) // 2 :]  # /reset: the same again
    assert tells(err, "tokens median TTFT")


def test_what_an_output_must_be_on_a_real_rank(run, checkpoint, tmp_path):
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": [{"two": [3, 4]}]}')
    compact = "--json-schema", str(schema), "--compact-json", "--json"
    code, out, _ = run("generate", str(checkpoint), "the", *compact)
    assert code == 0
    answer = json.loads(out)
    assert (answer["text"], answer["finish_reason"]) == ('{"two":[3,4]}', "stop")
    schema.write_text("{")
    code, _, err = run("generate", str(checkpoint), "the", "--json-schema", str(schema))
    assert (code, err.count("\n")) == (2, 1)
    assert "json_schema is no JSON" in err


def test_a_closed_pipe_ends_it_quietly():
    process = subprocess.Popen(
        [sys.executable, "-m", "expertlane", "generate", "paper-tiny", "--token-ids", "1"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    loading, computing = process.stderr.read().splitlines()
    process.stderr.close()
    assert process.wait() == 141
    assert loading.startswith("loading paper-tiny")
    assert computing.startswith("computing with ")


def test_one_text_appears_as_it_comes(run, stub, checkpoint, monkeypatch):
    stub(checkpoint)
    pieces = []
    monkeypatch.setattr(local_model, "print_text", pieces.append)
    code, _, err = run("generate", str(checkpoint), "ab", "--max-tokens", "3")

    assert code == 0
    assert [piece for piece in pieces if piece] == ["c", "d", "e", "\n"]
    assert re.fullmatch(r"3 tokens in \S+ s, \S+ tokens/s; TTFT \S+ ms", err.strip())


def test_one_prompt_without_a_tokenizer_gives_token_ids(run, stub):
    stub()
    assert run("generate", "paper-tiny", "--token-ids", "7", "--max-tokens", "3")[1] == "8,9,10\n"


def test_several_are_printed_in_order_with_their_prompts(run, stub, checkpoint, tmp_path):
    llm = stub(checkpoint)
    (tmp_path / "prompts").write_text("d\r\n\n  \nb\n")
    stop = llm.tokenizer.encode("f")[0]
    arguments = ["a", "--file", str(tmp_path / "prompts"), "--token-ids", f"{stop - 1}"]
    code, out, _ = run("generate", str(checkpoint), *arguments, "--stop", "f")

    assert code == 0
    assert out == f"> a\nbcde\n\n> d\ne\n\n> b\ncde\n\n> {stop - 1}\n\n\n"


def test_standard_input_is_one_prompt_a_line(run, stub, checkpoint, type_in):
    stub(checkpoint)
    type_in("a\nc\n")
    code, out, _ = run("generate", str(checkpoint), "--max-tokens", "1", "--json")
    assert code == 0
    shown = [json.loads(line) for line in out.splitlines()]
    assert [(each["prompt"], each["text"]) for each in shown] == [("a", "b"), ("c", "d")]
    assert "logprobs" not in shown[0]
    assert shown[0]["tpot_s"] is None


def test_a_terminal_obeys_nothing_that_a_model_writes(monkeypatch):
    text = "a\tb\n\x1b]0;title\x07\x9b31m\r\u202eלא\u202c\x7f"
    shown = Terminal()
    monkeypatch.setattr(sys, "stdout", shown)
    local_model.print_text(text)
    assert shown.getvalue() == ("a\tb\n\\x1b]0;title\\x07\\x9b31m\\r\\u202eלא\\u202c\\x7f")
    piped = io.StringIO()
    monkeypatch.setattr(sys, "stdout", piped)
    local_model.print_text(text)
    assert piped.getvalue() == text


def test_sampling_is_the_users_then_the_checkpoints_then_the_default(tmp_path):
    assert sampling_params(None, {"top_k": None, "seed": 3}) == SamplingParams(seed=3)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.5, "top_k": 7}')
    given = {"temperature": 0.25, "top_k": None, "stop": ("x",)}
    assert sampling_params(tmp_path, given) == SamplingParams(
        temperature=0.25, top_k=7, stop=("x",)
    )
    (tmp_path / "generation_config.json").write_text('{"do_sample": false, "top_p": 3}')
    with pytest.raises(UserError, match="top_p is 3"):
        sampling_params(tmp_path, {})
    assert sampling_params(tmp_path, {"top_p": 1.0}).is_greedy


NOT_FINITE = not_finite(step=0)


def test_logits_that_are_not_finite_end_one_request_of_many(run, stub):
    stub().poisoned = 7
    given = ["--token-ids", "5,7", "--token-ids", "1,2", "--max-tokens", "2"]
    code, out, err = run("generate", "paper-tiny", *given, "--json")
    assert code == 1
    bad, good = (json.loads(line, parse_constant=pytest.fail) for line in out.splitlines())
    error = f"prompt 1, output token 1: {NOT_FINITE}"
    assert (bad["finish_reason"], bad["error"], bad["token_ids"]) == ("error", error, [])
    assert (bad["ttft_s"], bad["e2e_s"]) == (None, None)
    assert (good["finish_reason"], good["error"], good["token_ids"]) == ("length", None, [3, 4])
    assert err.splitlines()[-1] == f"expertlane: error: {error}"
    assert err.count("error") == 1

    stub().poisoned = 7
    code, out, err = run("generate", "paper-tiny", *given, "--token-ids", "7")
    assert (code, out) == (1, "> 5,7\n\n\n> 1,2\n3,4\n\n> 7\n\n\n")
    assert err.splitlines()[-1] == f"expertlane: error: {error}; and 1 more of 3 prompts"

    stub().poisoned = 7
    code, out, err = run("generate", "paper-tiny", "--token-ids", "7")
    assert (code, out) == (1, "\n")
    assert err.splitlines()[-1] == f"expertlane: error: {error}"


def test_a_token_that_the_model_rules_out_has_no_log_probability():
    ended = RequestOutput("1", None, [1], 0.0)
    ended.logprobs = [TokenLogprobs(3, -0.5, ((3, -0.5), (4, -math.inf)))]
    found = json.loads(local_model.output_json(ended), parse_constant=pytest.fail)
    assert found["logprobs"] == [{"token_id": 3, "logprob": -0.5, "top": [[3, -0.5], [4, None]]}]


@pytest.mark.parametrize(
    ("given", "line"), [(b"\n \n", "standard input prompt"), (b"ab\xff", "standard input 2 utf-8")]
)
def test_standard_input_without_prompts(run, stub, monkeypatch, given, line):
    stub()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given), encoding="utf-8"))
    assert refused(run("generate", "paper-tiny"), line)


def test_an_empty_text_and_a_file_of_other_bytes(run, stub, checkpoint, tmp_path):
    stub(checkpoint)
    assert refused(run("generate", str(checkpoint), "a", ""), "prompt 2 empty 1")
    (tmp_path / "bytes").write_bytes(b"a\xff")
    assert run("generate", str(checkpoint), "--file", str(tmp_path / "bytes")) == (
        2,
        "",
        f"expertlane: error: {tmp_path / 'bytes'}: byte 1 is not UTF-8\n",
    )


def chat(run, folder, *options):
    return run("generate", str(folder), "--chat", "--max-tokens", "2", *options)


def test_a_chat_keeps_what_was_said(run, stub, checkpoint, type_in):
    llm = stub(checkpoint)
    type_in("Hi\n\n  you \n/reset\nAgain\n")
    code, out, _ = chat(run, checkpoint, "--system", "Be brief.")

    assert code == 0
    # The template ends with <a>, token 2; the stub goes on with 3, a control token, and 4, "!".
    assert out == "!\n!\n!\n"
    said = [llm.tokenizer.decode(prompt, skip_special_tokens=False) for prompt in llm.prompts]
    assert said == [
        "<s>Be brief.<u>Hi<a>",
        "<s>Be brief.<u>Hi<a>!<u>you<a>",
        "<s>Be brief.<u>Again<a>",
    ]


def test_a_chat_ends_with_logits_that_are_not_finite(run, stub, checkpoint, type_in):
    stub(checkpoint).poisoned = 2  # <a>, the template's last
    type_in("Hi\n")
    code, out, err = chat(run, checkpoint)
    assert (code, out) == (1, "\n")
    assert one_line(err, f"message 1 {NOT_FINITE}")


def test_an_interrupt_stops_the_present_answer_only(run, stub, checkpoint, type_in):
    llm = stub(checkpoint)
    num_steps = 0

    def interrupt_second_step():
        nonlocal num_steps
        num_steps += 1
        if num_steps == 2:
            os.kill(os.getpid(), signal.SIGINT)

    llm.before_step = interrupt_second_step
    type_in("a\nb\n", terminal=True)
    before = signal.getsignal(signal.SIGINT)
    code, out, err = run("generate", str(checkpoint), "--chat", "--max-tokens", "6")

    assert code == 0
    assert out == '!\n!"#$%\n'  # two tokens, then all six
    hint, prompts, speed = err.splitlines()
    assert tells(hint, "/reset /exit Ctrl-D Ctrl-C")
    assert prompts == "> > > "  # answers go elsewhere
    assert speed.startswith("8 tokens in ")
    assert llm.tokenizer.decode(llm.prompts[1], skip_special_tokens=False) == "<u>a<a>!<u>b<a>"
    assert signal.getsignal(signal.SIGINT) is before
    assert not llm.is_open


def test_a_second_interrupt_ends_the_program(run, stub, checkpoint, type_in):
    llm = stub(checkpoint)

    def interrupt_twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    llm.before_step = interrupt_twice
    type_in("a\nb\n")
    code, _, err = chat(run, checkpoint)
    assert (code, err) == (130, "expertlane: error: interrupted\n")
    assert len(llm.prompts) == 1
    assert not llm.is_open


def test_a_refused_message_does_not_end_a_chat_on_a_terminal(run, stub, checkpoint, type_in):
    llm = stub(checkpoint)
    type_in(f"{'x' * 300}\nb\n", terminal=True)
    code, _, err = chat(run, checkpoint)
    assert code == 0
    refused = err.splitlines()[1]
    assert tells(refused, "message 1 prompt 302 tokens 256")
    assert tells(refused, "/reset")
    assert len(llm.prompts) == 1


def test_a_refused_message_of_a_pipe_is_a_mistake(run, stub, checkpoint, type_in):
    stub(checkpoint)
    type_in(f"{'x' * 300}\nb\n")
    code, _, err = chat(run, checkpoint)
    assert code == 2
    assert one_line(err, "message 1 prompt 302")


def test_a_chat_without_messages(run, stub, checkpoint, type_in):
    stub(checkpoint)
    type_in("")
    assert chat(run, checkpoint) == (0, "", "")


def test_a_template_that_refuses_does_so_before_anything_is_loaded(
    run, monkeypatch, type_in, checkpoint, tmp_path
):
    monkeypatch.setattr("expertlane.cli.generate.load_model", None)
    folder = tmp_path / "strict"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_bytes((checkpoint / name).read_bytes())
    code, _, err = chat(run, folder)
    assert code == 2
    assert tells(err, "chat template")
    (folder / "chat_template.jinja").write_text(STRICT)
    code, _, err = chat(run, folder, "--system", "Be brief.")
    assert code == 2
    assert err.endswith("chat_template.jinja: No system.\n")
