"""Chats render as transformers renders them; mistakes get one line."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from cli.screen import telling, tells
from expertlane.errors import UserError
from expertlane.text.chat_template import ChatTemplate
from expertlane.text.tokenizer import Tokenizer

CHATML = """\
{%- if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if loop.first and message.content is not string %}{% continue %}{% endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message.content + '<|im_end|>\\n' }}{% endgeneration -%}
    {%- else %}{{ message.content + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA = """\
{% set ns = namespace(system="") %}
{% if messages[0]['role'] == 'system' %}
    {% set ns.system = messages[0]['content'] | trim %}
    {% set messages = messages[1:] %}
{% endif %}
{{ bos_token }}<|start_header_id|>system<|end_header_id|>

Today is {{ strftime_now("%Y") }}.{% if tools is not none %} Tools!{% endif %}
{{ ns.system }}<|eot_id|>
{%- for message in messages %}
<|start_header_id|>{{ message['role'] }}<|end_header_id|>

{{ message['content'] | trim }}<|eot_id|>
{%- endfor %}
{% if add_generation_prompt %}
<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""
MISTRAL = """\
{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate\n user/assistant/user/...') }}
{% endif %}
{% if message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]
{%- elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}
{%- else %}{{ raise_exception('Only user and assistant roles are supported!') }}
{%- endif %}
{% endfor %}"""
AS_JSON = """\
{{ messages | tojson }}
{{ messages | tojson(indent=2) }}
{{ messages[0] | tojson(ensure_ascii=True, sort_keys=True, separators=(',', ':')) }}
{{ unk_token }}{{ documents is none }}{% for m in messages %}{{ m.name }}{% break %}{% endfor %}"""

TEMPLATES = {"chatml": CHATML, "llama": LLAMA, "mistral": MISTRAL, "json": AS_JSON}
USER = {"role": "user", "content": " <b>Wie geht's?</b> 你好 & 😀\n"}
ASSISTANT = {"role": "assistant", "content": "Well."}
SYSTEM = {"role": "system", "content": "Be brief.\n"}
CHATS = {
    "one": [USER],
    "several": [USER, ASSISTANT, USER],
    "answered": [USER, ASSISTANT],
    "system": [SYSTEM, USER, ASSISTANT],
    "empty": [{"role": "user", "content": ""}],
}


def hf_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<s>", "</s>", "<unk>"]
    vocab = {token: i for i, token in enumerate([*specials, *alphabet])}
    core = tokenizers.Tokenizer(models.BPE(vocab, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def write_config(folder: Path, **config: Any) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.smoke(12)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("shape", TEMPLATES)
def test_parity_with_transformers(
    tmp_path: Path, shape: str, chat: str, add_generation_prompt: bool
) -> None:
    theirs = hf_tokenizer()
    theirs.chat_template = TEMPLATES[shape]
    theirs.save_pretrained(tmp_path)
    ours = ChatTemplate.from_folder(tmp_path)
    messages, options = CHATS[chat], {"add_generation_prompt": add_generation_prompt}
    if shape == "mistral" and chat == "system":
        with pytest.raises(UserError, match=r"roles must alternate user/assistant/user/\.\.\.$"):
            ours.render(messages, **options)
        return
    text = ours.render(messages, **options)
    assert text == theirs.apply_chat_template(messages, tokenize=False, **options)
    assert text.count("\n") > 1 or shape == "mistral"
    token_ids = Tokenizer.from_folder(tmp_path).encode(text, add_special_tokens=False)
    assert token_ids == theirs.apply_chat_template(messages, return_dict=False, **options)
    assert token_ids.count(0) == (shape in ("llama", "mistral"))  # one <s>, the template's own


def test_where_templates_are_looked_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=telling("chat_template.jinja tokenizer_config.json")):
        ChatTemplate.from_folder(tmp_path)
    write_config(tmp_path, chat_template="{{ bos_token }}one", bos_token={"content": "<s>"})
    assert ChatTemplate.from_folder(tmp_path).render([USER]) == "<s>one"
    named = [
        {"name": "tool_use", "template": "tools"},
        {"name": "default", "template": "two{{ eos_token }}{{ bos_token }}"},
    ]
    write_config(tmp_path, chat_template=named, eos_token="</s>", bos_token=None)
    assert ChatTemplate.from_folder(tmp_path).render([USER]) == "two</s>"
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "<b>", "eos_token": "no"}')
    write_config(tmp_path, chat_template=named, eos_token="</s>")
    assert ChatTemplate.from_folder(tmp_path).render([USER]) == "two</s><b>"
    (tmp_path / "chat_template.jinja").write_text("é{{ eos_token }}", encoding="utf-8")
    assert ChatTemplate.from_folder(tmp_path).render([USER]) == "é</s>"


@pytest.mark.parametrize(
    ("templates", "named"), [([{"name": "rag", "template": ""}], "rag"), ([], "none"), (7, "none")]
)
def test_named_templates_without_a_default(tmp_path: Path, templates: Any, named: str) -> None:
    write_config(tmp_path, chat_template=templates)
    with pytest.raises(UserError, match=telling(f"default {named}")):
        ChatTemplate.from_folder(tmp_path)


def test_unreadable_templates(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"chat_template\.jinja: byte 0 is not UTF-8"):
        ChatTemplate.from_folder(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.jinja").mkdir()
    with pytest.raises(UserError, match=telling("chat_template.jinja folder")):
        ChatTemplate.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("\n{% if %}", "line 2"),
        ("{{ messages[0].role + 1 }}", "TypeError"),
        ("{{ nothing.at.all }}", "nothing undefined"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ messages.append(1) }}", "append list unsafe"),
        ("{{ ().__class__.__base__.__subclasses__() }}", "unsafe"),
        ("{{ raise_exception('two\nlines') }}", "two lines"),
    ],
)
def test_a_template_that_fails(source: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        ChatTemplate(source, {}, "here").render([USER])
    assert tells(str(caught.value), "chat template")
    assert tells(str(caught.value), said)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "chat empty"),
        (["hello"], "0 hello role content"),
        ([USER, {"content": "a"}], "1 role None string user"),
        ([{"role": 1, "content": "a"}], "0 role 1"),
        ([{"role": "user"}], "0 content None"),
        ([{"role": "wizard", "content": "a"}], "wizard? No."),
    ],
)
def test_bad_messages(messages: list[Any], said: str) -> None:
    source = (
        "{% for m in messages if m.role == 'wizard' %}{{ raise_exception('wizard? No.') }}"
        "{% endfor %}"
    )
    with pytest.raises(UserError, match=telling(said)):
        ChatTemplate(source, {}, "here").render(messages)


def test_what_a_template_sets_inside_generation_stays_there() -> None:
    source = "{% generation %}{% set x = 1 %}{{ x }}{% endgeneration %}[{{ x }}]"
    assert ChatTemplate(source, {}, "here").render([USER]) == "1[]"


def test_messages_stay_as_they_are() -> None:
    message = {"role": "user", "content": [{"type": "text", "text": "hi"}]}
    source = "{{ messages[0].content[0].text }}"
    assert ChatTemplate(source, {}, "here").render([message]) == "hi"
    assert message == {"role": "user", "content": [{"type": "text", "text": "hi"}]}


TOO_MUCH_MEMORY = "memory"
TOO_MUCH_TIME = "1 s time"


@pytest.mark.smoke(5)
@pytest.mark.parametrize(
    ("source", "said"),
    [
        ('{{ "A" * 10**10 }}', TOO_MUCH_MEMORY),
        ('{{ "A" * 10**7 }}', "10,000,000 characters"),
        ("{{ 10 ** (10**9) }}", TOO_MUCH_TIME),
        ("{{ [0] * 10**10 }}", TOO_MUCH_MEMORY),
        ('{{ "%1000000000d" % 1 }}', TOO_MUCH_MEMORY),
        ('{{ "{:>10000000000}".format(1) }}', TOO_MUCH_MEMORY),
        ('{{ "%10000000000s" | format("a") }}', TOO_MUCH_MEMORY),
        ('{{ "a".ljust(10**10) }}', TOO_MUCH_MEMORY),
        ('{{ "a" | center(10**9) }}', TOO_MUCH_MEMORY),
        ('{{ "a" | indent(10**9) }}', TOO_MUCH_MEMORY),
        ('{{ ("a" * 10**6).replace("a", "b" * 10**6) }}', TOO_MUCH_MEMORY),
        ("{{ ([0] * 10**6) | tojson }}", "3,000,000 characters"),
        ("{% for i in range(10**9) %}{% endfor %}", "OverflowError"),
        ("{% for i in range(99999) %}" * 4 + "{% endfor %}" * 4, TOO_MUCH_TIME),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
        ("{{ " + "(" * 10**5 + "1" + ")" * 10**5 + " }}", "RecursionError"),
        ("{{ lipsum(n=10**6) }}", TOO_MUCH_TIME),
        ("{{ raise_exception('A' * 10**7) }}", "here: " + "A" * 500),
    ],
)
def test_a_template_that_takes_too_much_is_refused(source: str, said: str) -> None:
    began_s = time.monotonic()
    with pytest.raises(UserError) as caught:
        ChatTemplate(source, {}, "here").render([USER])
    assert time.monotonic() - began_s < 20  # 1 s of its own processor time, on a busy machine too
    assert tells(str(caught.value), "chat template")
    assert tells(str(caught.value), said)
    assert len(str(caught.value)) < 600


def test_after_a_chat_that_took_too_much_the_next_one_is_rendered() -> None:
    source = "{{ 'A' * (10**10 if messages[0].content == 'big' else 3) }}"
    template = ChatTemplate(source, {}, "here")
    with pytest.raises(UserError, match=TOO_MUCH_MEMORY):
        template.render([{"role": "user", "content": "big"}])
    assert template.render([USER]) == "AAA"


def test_after_its_process_was_killed_the_next_chat_is_rendered() -> None:
    template = ChatTemplate("{{ messages[0].role }}", {}, "here")
    process = psutil.Process(template._process.pid)
    process.kill()
    process.wait()
    assert template.render([USER]) == "user"


def test_a_long_chat_is_rendered() -> None:
    messages = [{"role": "user", "content": "Wie geht's? 你好 " * 2000}, ASSISTANT] * 100
    text = ChatTemplate(CHATML, {}, "here").render(messages)
    assert len(text) > 2_000_000


def test_ctrl_c_ends_a_template_that_goes_on() -> None:
    template = ChatTemplate("{{ 10 ** (10**9 * messages | length) }}", {}, "here")

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    def children() -> set[int]:
        return {child.pid for child in psutil.Process().children()}

    others = children()
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt):
            template.render([USER])
    finally:
        signal.signal(signal.SIGALRM, before)
    assert template._process.pid is None
    assert children() <= others


def test_messages_that_are_no_plain_data() -> None:
    template = ChatTemplate("", {}, "here")
    with pytest.raises(UserError, match=telling("messages JSON bytes")):
        template.render([USER | {"image": b"a"}])


def test_several_threads_render_with_one_template() -> None:
    template = ChatTemplate("{{ messages[0].content }}", {}, "here")
    texts: dict[str, str] = {}

    def render(name: str) -> None:
        for _ in range(50):
            texts[name] = template.render([{"role": "user", "content": name}])

    threads = [threading.Thread(target=render, args=(str(i) * 10_000,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts) == 4
    assert all(name == text for name, text in texts.items())


def test_no_file_of_the_working_directory_is_imported(tmp_path: Path, monkeypatch) -> None:
    for name in ("json", "jinja2", "random", "select", "expertlane"):
        (tmp_path / f"{name}.py").write_text("open('was_here', 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert ChatTemplate("{{ messages[0].role }}", {}, "here").render([USER]) == "user"
    assert not (tmp_path / "was_here").exists()


@pytest.mark.parametrize("forks", [False, True])
def test_the_process_ends_with_its_parent(forks: bool) -> None:
    program = f"""
import os, time
from expertlane.text.chat_template import ChatTemplate
template = ChatTemplate("", {{}}, "here")
print(template._process.pid, flush=True)
if {forks} and not os.fork():
    time.sleep(200)  # holds the socket of the template's process
    os._exit(0)
time.sleep(200)
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert psutil.pid_exists(pid)
        parent.kill()
        until_s = time.monotonic() + 100
        while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < until_s
            time.sleep(0.05)
        if forks:
            os.killpg(parent.pid, signal.SIGKILL)
