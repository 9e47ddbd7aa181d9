import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from cli.screen import telling
from expertlane.errors import UserError
from expertlane.text.tokenizer import Tokenizer, default_sampling, read_json

WORDS = ["<s>", "</s>", "<|end|>", "<think>", "a", "b"]


def save(folder: Path, **files: Any) -> Path:
    """A folder with a tokenizer of whole words, and with JSON files."""
    core = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "a"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    core.add_special_tokens(WORDS[:3])
    core.add_tokens(WORDS[3:4])
    core.enable_truncation(2)
    core.enable_padding(length=9)
    core.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_round_trip(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(save(tmp_path))
    assert tokenizer.encode("a b a <think>") == [0, 4, 5, 4, 3]  # neither truncated nor padded
    assert tokenizer.encode("<s>b", add_special_tokens=False) == [0, 5]
    assert tokenizer.encode("") == [0]
    assert tokenizer.encode("", add_special_tokens=False) == []
    assert tokenizer.decode([0, 4, 5, 3, 2]) == "a b <think>"
    assert tokenizer.decode([0, 4, 2], skip_special_tokens=False) == "<s> a <|end|>"
    assert tokenizer.decode([]) == ""


def test_what_is_known_of_tokens(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(save(tmp_path))
    assert tokenizer.vocab_size == 6
    assert tokenizer.special_token_ids == {0, 1, 2}
    assert [tokenizer.has_token(token_id) for token_id in (0, 5, 6)] == [True, True, False]
    assert tokenizer.decode([4, 6, 5]) == "a b"  # a model's spare ids have no text


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"config": {"eos_token_id": 1}, "generation_config": {"eos_token_id": [2, 1]}}, {1, 2}),
        ({"config": {"eos_token_id": 1}, "generation_config": {"eos_token_id": 2}}, {1, 2}),
        ({"config": {"eos_token_id": 1}, "generation_config": {"eos_token_id": None}}, {1}),
        ({"config": {"eos_token_id": [0]}, "tokenizer_config": {"eos_token": "</s>"}}, {0}),
        ({"tokenizer_config": {"eos_token": "</s>"}}, {1}),
        ({"config": {}, "tokenizer_config": {"eos_token": {"content": "<|end|>"}}}, {2}),
        ({"tokenizer_config": {"eos_token": "absent"}}, set()),
        ({"tokenizer_config": {"eos_token": None}}, set()),
        ({}, set()),
    ],
)
def test_eos_token_ids(tmp_path: Path, files: dict[str, Any], expected: set[int]) -> None:
    assert Tokenizer.from_folder(save(tmp_path, **files)).eos_token_ids == expected


def test_byte_tokens_are_those_that_decode_to_bytes() -> None:
    names = ["<unk>", "<0x0A>", "<0xE4>", "<0xFFF>", "<0xe5>"]
    core = tokenizers.Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    assert Tokenizer(core).byte_tokens == {}  # without the decoder they are plain text
    core.decoder = decoders.ByteFallback()
    assert Tokenizer(core).byte_tokens == {1: b"\n", 2: b"\xe4"}
    core.add_special_tokens(["<0x0A>"])
    assert Tokenizer(core).byte_tokens == {1: b"\n", 2: b"\xe4"}


def test_a_long_text_holds_no_other_thread_up(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(save(tmp_path))
    found: list[list[int]] = []
    thread = threading.Thread(target=lambda: found.append(tokenizer.encode("a b " * 200_000)))
    thread.start()
    num_turns = 0
    while thread.is_alive():
        num_turns += 1
        time.sleep(0.001)
    assert found == [[0, *[4, 5] * 200_000]]
    assert num_turns > 10  # `encode` alone leaves one or two


def test_half_a_surrogate_pair_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(save(tmp_path))
    with pytest.raises(UserError, match=telling("text \\ud800 surrogate")):
        tokenizer.encode("a \ud800")
    with pytest.raises(UserError, match=telling("surrogate")):
        tokenizer.encode("a " * 20_000 + "\ud800")
    with pytest.raises(TypeError):
        tokenizer.encode(7)  # type: ignore[arg-type]  # a mistake of ours, not of the text


def test_files_that_are_missing_or_wrong(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=telling("tokenizer.json token ids")):
        Tokenizer.from_folder(tmp_path)
    save(tmp_path, config={"eos_token_id": "two"})
    with pytest.raises(UserError, match=telling("config.json eos_token_id two")):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=telling("config.json JSON")):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=telling("tokenizer.json read")) as caught:
        Tokenizer.from_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_read_json(tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    assert read_json(path) == {}
    path.write_text("[1]")
    with pytest.raises(UserError, match=telling("JSON object")):
        read_json(path)
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(UserError, match="byte 7 is not UTF-8"):
        read_json(path)
    with pytest.raises(UserError, match=telling("folder")):
        read_json(tmp_path)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, {}),
        ({"temperature": 0.6, "top_p": 0.9}, {"temperature": 0.6, "top_p": 0.9}),
        (
            {"do_sample": True, "top_k": 20, "repetition_penalty": 1.05, "temperature": None},
            {"top_k": 20, "repetition_penalty": 1.05},
        ),
        ({"do_sample": False, "temperature": 0.6}, {"temperature": 0.0}),
        ({"do_sample": False, "top_k": 5, "bos_token_id": 1}, {"temperature": 0.0, "top_k": 5}),
    ],
)
def test_default_sampling(
    tmp_path: Path, config: dict[str, Any] | None, expected: dict[str, Any]
) -> None:
    if config is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(config))
    assert default_sampling(tmp_path) == expected
