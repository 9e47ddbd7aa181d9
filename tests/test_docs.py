"""The documentation says what the code says: messages, pictures, cluster files, commands."""

import ast
import dataclasses
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from expertlane.cli.app import app
from expertlane.spec.deployment import Options
from expertlane.spec.hf_config import FAMILIES
from expertlane.spec.sampling import SamplingParams

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
MESSAGE = re.compile(r"^- `(.+)`$", re.MULTILINE)


def _texts(node: ast.AST) -> list[str]:
    """The strings of a piece of code, what is filled in as …"""
    texts = []
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            texts.append(part.value)
        elif isinstance(part, ast.JoinedStr):
            texts.append(
                "".join(
                    str(value.value) if isinstance(value, ast.Constant) else "…"
                    for value in part.values
                )
            )
    return texts


def _plain(text: str) -> str:
    return re.sub("…+", "…", " ".join(text.split()))


@pytest.fixture(scope="module")
def source_texts() -> list[str]:
    return [
        _plain(text)
        for path in sorted((ROOT / "src").rglob("*.py"))
        for text in _texts(ast.parse(path.read_text(encoding="utf-8")))
    ]


@pytest.mark.parametrize(
    "message", MESSAGE.findall((DOCS / "troubleshooting.md").read_text(encoding="utf-8"))
)
def test_a_message_that_is_explained_is_in_the_code(message: str, source_texts: list[str]):
    words = _plain(message).strip("… ")
    assert any(words in text for text in source_texts)


def test_every_command_has_a_guide():
    commands = {
        command.name or command.callback.__name__
        for command in app.registered_commands
        if command.callback is not None
    }
    guides = {path.stem for path in (DOCS / "commands").glob("*.md")}
    assert commands <= guides


def test_the_pictures_are_those_that_the_script_draws(tmp_path: Path):
    script = tmp_path / "deployments.py"
    script.write_bytes((DOCS / "pictures" / "deployments.py").read_bytes())
    subprocess.run([sys.executable, script], check=True)
    drawn = sorted(tmp_path.glob("*.svg"))
    assert drawn
    for picture in drawn:
        assert picture.read_bytes() == (DOCS / "pictures" / picture.name).read_bytes()


def test_the_kubernetes_manifests_fit_together():
    yaml = pytest.importorskip("yaml")  # comes with transformers
    text = (DOCS / "cluster" / "kubernetes.yaml").read_text(encoding="utf-8")
    service, job = yaml.safe_load_all(text)
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    command = container["command"]

    assert (service["kind"], job["kind"]) == ("Service", "Job")
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert spec["completions"] == spec["parallelism"]
    assert f"--nnodes={spec['completions']}" in command
    assert "--nproc-per-node=1" in command
    first = f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert f"--master-addr={first}" in command
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }


def script(name):
    """A script of the documentation, as a module."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def option_table():
    return script("option_table")


@pytest.fixture(scope="module")
def printed():
    return script("printed")


def test_every_output_that_is_shown_has_its_command(printed):
    documents = printed.documents()
    assert ROOT / "README.md" in documents
    for each in documents:
        text = each.read_text(encoding="utf-8")
        num_shown = len(re.findall(r"^Printed on ", text, re.MULTILINE))
        assert len(printed.commands_of(text)) == num_shown, each
    with pytest.raises(ValueError, match="no command before"):
        printed.commands_of("Printed on a day (here):\n\n```text\nold\n```\n")


def test_what_a_command_prints_takes_the_place_of_what_it_printed(printed):
    text = (
        "One\n\n```bash\nexpertlane list \\\n    models   # all\nexpertlane list nothing\n```\n\n"
        "Printed on a day (here, first 2 lines):\n\n```text\nold\n```\n\nTwo\n"
    )
    assert printed.renewed(text, ["plan", "bench"]) == text
    before, _, rest = printed.renewed(text, ["models"]).partition("Printed on ")
    line, _, after = rest.partition("\n\n```text\n")
    assert before == text.partition("Printed on ")[0]
    assert re.fullmatch(r"\d+ \w+ \d{4} \(.+, \d+ cores, \d+ s of CPU, first 2 lines\):", line)
    assert (
        after == "Models | random weights\n3 presets: paper, paper-small, paper-tiny.\n```\n\nTwo\n"
    )


def test_the_page_of_options_is_what_the_code_says(option_table):
    page = option_table.render()
    assert all(f"`{each.name}" in page for each in option_table.options())


def test_the_tables_of_families_have_all_families_and_published_models():
    family_table = script("family_table")
    rows = re.findall(r"^\| `?(\S+?)`? \|", family_table.render(), re.MULTILINE)
    assert {*rows} >= {*FAMILIES, *(name for name, _ in family_table.published())}


def test_no_spelling_has_two_meanings(option_table):
    for option in option_table.options():
        first_sentences = {re.split(r"\.(?: |$)", text)[0] for text in option.texts.values()}
        assert len(first_sentences) == 1, (option.name, option.texts)
        # A command may take one value where another takes several, or named ones, or fewer choices.
        values = {re.sub(r"\[NAME=\]|\[.*|NAME=", "", value) for value in option.values.values()}
        choices = [set(value.split("|")) for value in values]
        most = max(choices, key=len)
        assert all(each <= most for each in choices), (option.name, values)


def test_nothing_has_two_spellings(option_table):
    spelled, told = {}, {}
    for path, command, _ in option_table.commands():
        for each in command.params:
            if each.param_type_name == "option":
                name = option_table.spellings(each)
                assert spelled.setdefault(each.name, name) == name, (path, each.name)
                assert told.setdefault(each.help, name) == name, (path, each.help)
    fields = {
        field.name for kind in (Options, SamplingParams) for field in dataclasses.fields(kind)
    }
    one_each = {"stop_token_ids"}  # an option each, so in the singular
    for name in (fields & spelled.keys()) - one_each:
        assert f"--{name.replace('_', '-')}" in spelled[name]
