from pathlib import Path

import pytest

from cli.screen import telling, tells
from expertlane.errors import SpecError
from expertlane.spec.deployment import Deployment, Options
from expertlane.spec.experiment import (
    Cluster,
    Experiment,
    Projection,
    find_experiment,
    read_experiment,
    shipped_experiments,
)
from expertlane.spec.layout import Layout
from expertlane.spec.model import PRESETS
from expertlane.spec.workload import Workload

SMALLEST = """\
name = "mine"
[model]
preset = "paper-tiny"
[workload]
num_sequences = 4
prompt_len = 8
output_len = 3
[[deployments]]
name = "one"
layout = "tp=1"
"""


@pytest.fixture
def error_of(tmp_path: Path):
    """The line with which a file's text is refused, after the path."""

    def error(text: str | bytes) -> str:
        path = tmp_path / "mine.toml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        with pytest.raises(SpecError) as caught:
            read_experiment(path)
        line = str(caught.value)
        assert line.startswith(f"{path}: ")
        assert "\n" not in line
        return line.removeprefix(f"{path}: ")

    return error


def test_smallest_file_gives_defaults(tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_text(SMALLEST)

    assert read_experiment(path) == Experiment(
        name="mine",
        model=PRESETS["paper-tiny"],
        workload=Workload(num_sequences=4, prompt_len=8, output_len=3, seed=0),
        deployments=(Deployment("one", Layout(), Options(), is_baseline=True),),
        scaling=(),
        cluster=Cluster(ranks_per_node=0),
        seed=0,
    )


def test_every_key_is_read(tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_text(
        """
        name = "all"
        seed = 7
        [model]
        preset = "paper-tiny"
        num_experts_per_tok = 1
        rope_theta = 500 # a whole number is a number
        [workload]
        num_sequences = 4
        prompt_len = 8
        output_len = 3
        seed = 9
        [cluster]
        ranks_per_node = 2
        [[deployments]]
        name = "first"
        layout = "tp=2,pp=2"
        num_micro_batches = 4
        micro_batch_schedule = "rotating"
        [[deployments]]
        name = "second"
        layout = "dp=2,tp=2,ep=2"
        baseline = true
        [[deployments]]
        name = "third"
        layout = "dp=4,ep=4"
        overlap = true
        [[scaling]]
        name = "EP 1"
        layout = "dp=1"
        """
    )

    assert read_experiment(path) == Experiment(
        name="all",
        model=PRESETS["paper-tiny"].with_overrides(num_experts_per_tok=1, rope_theta=500.0),
        workload=Workload(num_sequences=4, prompt_len=8, output_len=3, seed=9),
        deployments=(
            Deployment("first", Layout(tp=2, pp=2), Options(False, 4, "rotating"), True),
            Deployment("second", Layout(dp=2, tp=2, ep=2), Options(), True),
            Deployment("third", Layout(dp=4, ep=4), Options(overlap=True), False),
        ),
        scaling=(Deployment("EP 1", Layout(), Options(), False),),
        cluster=Cluster(ranks_per_node=2),
        seed=7,
    )


def test_model_without_a_preset(tmp_path: Path):
    path = tmp_path / "mine.toml"
    sizes = """\
name = "small"
num_hidden_layers = 1
hidden_size = 8
num_attention_heads = 2
head_dim = 4
num_experts = 2
num_experts_per_tok = 1
moe_intermediate_size = 16
vocab_size = 11
max_position_embeddings = 32
"""
    path.write_text(SMALLEST.replace('preset = "paper-tiny"\n', sizes))

    model = read_experiment(path).model
    assert (model.name, model.num_experts, model.rope_theta) == ("small", 2, 10_000.0)


UNKNOWN_KEYS = {
    ('name = "mine"', 'nmae = "mine"'): "unknown nearest name",
    ("[workload]", "[worklod]"): "unknown nearest",
    ("preset =", "prest ="): "unknown [model] nearest preset",
    ("prompt_len", "promt_len"): "unknown promt_len [workload] nearest prompt_len",
    (
        "[[deployments]]",
        "[cluster]\nranks_a_node = 8\n[[deployments]]",
    ): "unknown ranks_a_node [cluster] nearest ranks_per_node",
    ("layout =", "layuot ="): "unknown [[deployments]] 1 nearest layout",
    (
        'layout = "tp=1"',
        'layout = "tp=1"\nmicro_batches = 2',
    ): "unknown micro_batches [[deployments]] 1 nearest",
    (
        'layout = "tp=1"',
        'layout = "tp=1"\n[[scaling]]\nname = "s"\nbaseline = true',
    ): "unknown baseline [[scaling]] 1 name layout overlap",
}

WRONG_VALUES = {
    ("num_sequences = 4", 'num_sequences = "4"'): "[workload] num_sequences 4 whole number",
    ("num_sequences = 4", "num_sequences = 4.0"): "[workload] num_sequences 4.0 whole number",
    ("num_sequences = 4", "num_sequences = true"): "[workload] num_sequences true whole number",
    ("num_sequences = 4", "num_sequences = 0"): "num_sequences 0 whole number 1",
    ("prompt_len = 8", "prompt_len = 63"): "63 3 65 64 prompt_len output_len 1 62",
    ("output_len = 3\n", ""): "[workload] output_len missing",
    ("prompt_len = 8\noutput_len = 3\n", ""): "[workload] prompt_len output_len missing",
    ('name = "mine"\n', ""): "name missing",
    ('"mine"', "3"): "name 3 string",
    ('"mine"', "2020-01-01"): "name 2020-01-01 string",
    ('"mine"', '"../mine"'): "name mine folder letters _",
    ('"mine"', '"mine"\nseed = 1.5'): "seed 1.5 whole number",
    ('preset = "paper-tiny"', "preset = 3"): "[model] preset 3 string",
    ('"paper-tiny"', '"paper-tny"'): "[model] unknown preset nearest",
    ('"paper-tiny"', '"paper-tiny"\nrope_theta = nan'): "rope_theta number 1 1e 12",
    ('"paper-tiny"', '"paper-tiny"\nrope_theta = "x"'): "[model] rope_theta number",
    (
        'preset = "paper-tiny"',
        'name = "x"',
    ): "[model] num_hidden_layers hidden_size num_attention_heads",
    ('name = "one"\n', ""): "[[deployments]] 1 name missing",
    ('"one"', '""'): "[[deployments]] 1 deployment name one",
    ('"one"', '"a\\nb"'): "[[deployments]] 1 deployment name one",
    ('layout = "tp=1"\n', ""): "[[deployments]] 1 layout missing",
    ('"tp=1"', "1"): "[[deployments]] 1 layout string",
    ('"tp=1"', '"dp=4,ep=3"'): "[[deployments]] 1 layout 4 3 × 2",
    ('"tp=1"', '"tp=5"'): "deployment one layout 5 16 1 2 4 8",
    ('"tp=1"', '"tp=1"\noverlap = 1'): "[[deployments]] 1 overlap true false auto",
    ('"tp=1"', '"tp=1"\noverlap = "on"'): "[[deployments]] 1 overlap true false auto",
    (
        '"tp=1"',
        '"tp=1"\nnum_micro_batches = 0',
    ): "[[deployments]] 1 num_micro_batches 0 whole number",
    (
        '"tp=1"',
        '"tp=1"\nmicro_batch_schedule = "drain"',
    ): "[[deployments]] 1 micro_batch_schedule drained rotating",
    ('"tp=1"', '"tp=1"\nplacement_file = ""'): "[[deployments]] 1 placement_file path",
    (
        '"tp=1"',
        '"tp=1"\nplacement_file = "a\\u0000b"',
    ): "[[deployments]] 1 placement_file u0000b path",
    ('"tp=1"', '"tp=1"\nbaseline = false'): "[[deployments]] 1 baseline false deployment one",
    ('"tp=1"', '"tp=1"\n[[deployments]]\nname = "one"\nlayout = "tp=2"'): "mine one",
    ('"tp=1"', '"tp=1"\n[[deployments]]\nname = "two"'): "[[deployments]] 2 layout missing",
    ('"tp=1"', '"tp=1"\n[[scaling]]\nname = "two"'): "[[scaling]] 1 layout missing",
    ("[[deployments]]", "[deployments]"): "name one layout 1 [[deployments]]",
    (
        '[[deployments]]\nname = "one"\nlayout = "tp=1"\n',
        "",
    ): "mine deployment [[deployments]] table",
    ('[model]\npreset = "paper-tiny"\n', ""): "table [model] missing",
    ('name = "mine"\n', 'name = "mine"\ncluster = 8\n'): "cluster 8 table [cluster]",
}

_PROJECTION = '[projection]\ncluster = "h100x2"\n'
WRONG_PROJECTIONS = {
    "[projection]\n": "[projection] cluster missing",
    f"{_PROJECTION}speed = 1": "unknown [projection] cluster routing_trace kv_dtype",
    f"{_PROJECTION}skew = 11.5": "projection 11.5 number 0 10",
    f'{_PROJECTION}skew = "0.5"': "[projection] 0.5 number",
    f'{_PROJECTION}skew = 1\nrouting_trace = "x"': "projection routing_trace exclude",
    f'{_PROJECTION}execution = "serial"': "[projection] graph eager",
    f'{_PROJECTION}dtype = "fp8"': "[projection] fp8 nvfp4 did you mean float8?",
    f'{_PROJECTION}kv_dtype = "bf16"': "[projection] bf16 did you mean bfloat16?",
    f'{_PROJECTION}slo = "tpot=20ms"': "projection 20ms statistic p90 p95 p99",
    f'{_PROJECTION}prompt_len = "9:3"': "projection prompt_len 9 3 whole number 1 one 32 512",
    f"{_PROJECTION}prompt_len = 9": "[projection] prompt_len 9 string",
    f'{_PROJECTION}prompt_len = "9"\nrequests = "x"': "projection prompt_len output_len prefix_len",
    f"{_PROJECTION}num_running = {{ two = 3 }}": "unknown projection.num_running one",
    f"{_PROJECTION}num_running = {{ one = 0 }}": "projection num_running one 0 whole number 1",
    f'{_PROJECTION}num_running = {{ one = "x" }}': "[projection] num_running.one whole number",
}

MALFORMED = {
    ('name = "mine"', "name = mine"): "malformed TOML 1 8",
    ("[model]", "[model"): "malformed TOML end table 2 7",
    ('layout = "tp=1"\n', "layout ="): "malformed TOML 10 9 end",
    ("prompt_len = 8", "num_sequences = 8"): "malformed TOML 6 18",
}


@pytest.mark.parametrize(("change", "words"), (UNKNOWN_KEYS | WRONG_VALUES | MALFORMED).items())
def test_a_mistake_gets_one_clear_line(error_of, change: tuple[str, str], words: str):
    old, new = change
    assert old in SMALLEST
    assert tells(error_of(SMALLEST.replace(old, new, 1)), words)


@pytest.mark.parametrize(("table", "words"), WRONG_PROJECTIONS.items())
def test_a_mistake_in_how_it_is_projected_gets_one_line(error_of, table: str, words: str):
    assert tells(error_of(f"{SMALLEST}{table}\n"), words)


def test_how_it_is_projected(tmp_path: Path):
    """Paths are those beside the file."""
    path = tmp_path / "mine.toml"
    path.write_text(
        SMALLEST
        + """
        [projection]
        cluster = "own.tomlx2"
        framework = "trt"
        routing_trace = "routing.npz"
        execution = "eager"
        slo = "ttft.p95=2s,tpot.mean=20ms"
        dtype = "float8"
        kv_dtype = "bfloat16"
        prompt_len = "4:12"
        num_running = { one = 3 }
        """
    )
    found = read_experiment(path).projection
    assert found == Projection(
        cluster=f"{tmp_path}/own.tomlx2",
        framework="trt",
        routing_trace=f"{tmp_path}/routing.npz",
        execution="eager",
        slo="ttft.p95=2s,tpot.mean=20ms",
        dtype="float8",
        kv_dtype="bfloat16",
        prompt_len="4:12",
        num_running={"one": 3},
    )
    assert list(map(str, found.slos)) == ["TTFT p95 ≤ 2 s", "TPOT mean ≤ 20 ms"]
    load = found.load(Workload(4, 8, 3))
    assert load is not None
    assert (str(load.prompt_len), str(load.output_len), load.batch) == ("4:12", "3", 4)


def test_empty_file(error_of):
    assert error_of("") == "the table [model] is missing"


def test_a_long_value_is_cut(error_of):
    line = error_of(SMALLEST.replace("num_sequences = 4", f'num_sequences = "{"x" * 500}"'))
    assert tells(line, f"[workload] num_sequences {'x' * 59}")


def test_a_number_of_too_many_digits(error_of):
    line = error_of(SMALLEST.replace("num_sequences = 4", f"num_sequences = {'9' * 5000}"))
    assert tells(line, "malformed TOML")


def test_not_utf8(error_of):
    assert error_of(b"name = '\xff'") == "byte 8 is not UTF-8"


def test_a_missing_file(tmp_path: Path):
    path = tmp_path / "none.toml"
    with pytest.raises(SpecError, match=telling(f"{path} No such file")):
        read_experiment(path)


def test_find_takes_a_path_or_a_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").write_text(SMALLEST)
    (tmp_path / "paper-small").mkdir()  # a folder hides no shipped experiment

    assert find_experiment("a/b") == Path("a/b")
    assert find_experiment("none.toml") == Path("none.toml")
    assert find_experiment("mine") == Path("mine")
    assert find_experiment(".") == Path(".")
    assert find_experiment("paper-small") == shipped_experiments()["paper-small"]


def test_find_names_the_nearest_shipped_experiment():
    with pytest.raises(SpecError, match=telling("paper-smal nearest paper-small")):
        find_experiment("paper-smal")


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("routing = 3", "3 JSON object"),
        ("dense_layers = 3", "dense_layers 3 list"),
        ("routing = { n_groups = 2 }", "routing.n_groups unknown"),
        ("routing = { n_group = 2.5 }", "routing.n_group 2.5"),
        ("num_experts = nan", "num_experts NaN"),
    ],
)
def test_nested_values_of_a_model_are_one_line_too(tmp_path: Path, line: str, wanted: str):
    path = tmp_path / "mine.toml"
    path.write_text(
        f'name = "mine"\n[model]\npreset = "paper-tiny"\n{line}\n[workload]\nnum_sequences = 1\n'
        'prompt_len = 1\noutput_len = 1\n[[deployments]]\nname = "one"\nlayout = "tp=1"\n'
    )
    with pytest.raises(SpecError) as caught:
        read_experiment(path)
    assert tells(str(caught.value), wanted)
    assert "\n" not in str(caught.value)


SMALL = read_experiment(shipped_experiments()["paper-small"])


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("EP 16", ["EP 16"]),
        ("8", ["EP 16"]),
        ("9, 8", ["EP 16", "EP 16 + overlap"]),  # in the experiment's order
        ("DP 2 × TP 8, EP 2,EP 16", ["DP 2 × TP 8, EP 2", "EP 16"]),
        ("tp 8 x pp 2, m=2 rotating,tp 8 x pp 2", ["TP 8 × PP 2", "TP 8 × PP 2, m=2 rotating"]),
    ],
)
def test_some_deployments_alone(text: str, names: list[str]) -> None:
    """Names have commas in them; the longest that fits is meant."""
    found = SMALL.only(text)
    assert [each.name for each in found.deployments] == names
    assert found.scaling == ()


@pytest.mark.parametrize("text", ["", "17", ",EP 16", "EP 16 EP 16", "8,EP 16", "EP"])
def test_names_that_there_are_not(text: str) -> None:
    with pytest.raises(SpecError):
        SMALL.only(text)
