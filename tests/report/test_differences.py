"""What differs between the servers of a comparison."""

from hypothesis import given
from hypothesis import strategies as st

from expertlane.report.differences import differences_of, differs_in, settings_of, table_of
from expertlane.results.record import DeploymentRecord, ServerRecord


def record(name, command="", engine="vLLM", **more):
    more = {"software": "vllm 0.32.0"} | more
    return DeploymentRecord(
        name, None, None, "measured", server=ServerRecord(engine, command=command, **more)
    )


def test_options_variables_and_files_of_a_command():
    server = ServerRecord(
        "TensorRT-LLM",
        command="A=1 B='x y' /my/trtllm-serve ./mix=1 --config trtllm.yaml --eager --port=80 --a=3",
        files={
            "trtllm.yaml": '{"tp": 2, "kv": {"max_tokens": 8, "on": false}}',
            "other": "no: JSON",
        },
        settings={"tp_size": "4"},
    )
    assert settings_of(server) == {
        "A": "1", "B": "x y", "--config": "trtllm.yaml", "--eager": "on", "--a": "3", "tp": "2",
        "kv.max_tokens": "8", "kv.on": "false", "--tp-size": "4",
    }  # fmt: skip


def test_what_differs_of_one_engine():
    records = [
        record("a", "vllm serve m --tp 1 --seqs 8 --port 1", kv_tokens=512),
        record("b", "vllm serve m --tp 2 --seqs 8 --port 2", kv_tokens=1024),
        record("c", "vllm serve m --tp 2 --seqs 8 --eager --port 3"),
    ]
    found = {each.name: each.by_value for each in differences_of(records)}
    assert found == {
        "KV cache": {"512 tokens": ["a"], "1,024 tokens": ["b"]},
        "--tp": {"1": ["a"], "2": ["b", "c"]},
        "--eager": {"—": ["a", "b"], "on": ["c"]},
    }
    assert differs_in(records) == "KV cache 512 tokens / 1,024 tokens; --tp 1 / 2; --eager — / on"
    rows = table_of(records).rows
    assert rows[2:4] == (("--tp", "1", "a"), ("", "2", "b, c"))


def test_options_of_two_engines_are_not_compared():
    records = [
        record("a", "vllm serve m --tp 1"),
        record("b", "sglang serve m --tp-size 2", "SGLang", software="sglang 0.5"),
    ]
    assert [each.name for each in differences_of(records)] == ["version"]
    assert differs_in(records) == "", "the line above has the versions"
    two = [record("a"), record("b", software="vllm 0.33.0")]
    assert differs_in(two) == "version vllm 0.32.0 / vllm 0.33.0"


def test_many_differences_are_a_line():
    commands = [" ".join(f"--option-{each} {value}" for each in range(20)) for value in (1, 2)]
    records = [record(name, command) for name, command in zip("ab", commands, strict=True)]
    assert differs_in(records).endswith("--option-5 1 / 2; and 14 settings more")
    assert len(table_of(records).rows) == 40


def test_nothing_differs():
    assert differs_in([]) == ""
    assert table_of([record("a", "x --y"), record("b", "x --y")]) is None
    assert differences_of([record("a", "x --y")]) == []


@given(st.lists(st.text(max_size=30), max_size=4))
def test_any_command_is_read(commands):
    records = [record(str(place), each) for place, each in enumerate(commands)]
    for each in differences_of(records):
        assert len(each.by_value) > 1
