"""Wheels in a fresh environment without a compiler: with compiled kernels, and with none."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from cli.screen import tells
from expertlane.engine.ops.build import BASELINE, SETS, build, library_name

ROOT = Path(__file__).parent.parent
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
NO_COMPILER = "no C++ compiler: neither g++ nor clang++ is on the PATH, and CXX is unset"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a wheel of Linux")


def run(*command: str | Path, **variables: str) -> str:
    done = subprocess.run(
        list(map(str, command)),
        env={"HOME": os.environ.get("HOME", "/"), "PATH": os.environ["PATH"]} | variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def make_wheel(folder: Path, **variables: str) -> Path:
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir"]
    run(*PIP, "wheel", *options, folder, ROOT, **variables)
    (wheel,) = folder.glob("*.whl")
    return wheel


class Installed:
    """A wheel in an environment of its own, with this one's other packages.

    Attributes:
        cache: where a compiler's libraries would be.
    """

    def __init__(self, wheel: Path, folder: Path) -> None:
        self.cache, self._python = folder / "cache", folder / "env/bin/python"
        run(sys.executable, "-m", "venv", "--without-pip", folder / "env")
        run(*PIP, "--python", self._python, "install", "--no-deps", wheel)
        site = next((folder / "env").glob("lib/python*/site-packages"))
        (site / "others.pth").write_text(sysconfig.get_path("purelib"))  # runs none of theirs

    def generate(self, **variables: str) -> str:
        """What a run without a compiler says on standard error."""
        command = ["generate", "paper-tiny", "--token-ids", "1,2", "--max-tokens", "2"]
        return run(
            *(self._python, "-P", "-m", "expertlane", *command, "--dtype", "bfloat16"),
            **{"PATH": "/nowhere", "XDG_CACHE_HOME": str(self.cache)} | variables,
        )


def test_a_wheel_ships_the_templates_of_scripts(tmp_path):
    with zipfile.ZipFile(make_wheel(tmp_path)) as file:
        shipped = {Path(name).name for name in file.namelist() if "/planner/launchers/" in name}
    assert shipped == {"slurm.sh.j2", "kubernetes.yaml.j2"}


@pytest.mark.full
@pytest.mark.timeout(900)  # five sets are compiled
def test_a_wheel_with_kernels_needs_no_compiler(tmp_path):
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("no C++ compiler")
    baseline = build(BASELINE)
    wheel = make_wheel(tmp_path / "dist", EXPERTLANE_WHEEL_KERNELS="1")
    with zipfile.ZipFile(wheel) as file:
        shipped = {Path(name).name for name in file.namelist() if "/ops/libraries/" in name}
    assert shipped == {library_name(each) for each in (BASELINE, *SETS)}
    assert "-py3-none-manylinux_2_" in wheel.name
    installed = Installed(wheel, tmp_path)
    for each in SETS:
        if baseline.has_instructions(each.name.encode()):
            said = installed.generate(EXPERTLANE_CPU_ISA=each.name)
            assert tells(said, f"expertlane {each.name}")
    assert not installed.cache.exists()


@pytest.mark.full
def test_without_kernels_and_compiler_torch_computes_and_one_line_says_so(tmp_path):
    wheel = make_wheel(tmp_path / "dist")
    assert wheel.name.endswith("-py3-none-any.whl")
    said = Installed(wheel, tmp_path).generate()
    assert said.count(NO_COMPILER) == 1
    assert tells(said, f"torch {NO_COMPILER}")


@pytest.fixture(scope="module")
def hook():
    """The module of the hook, which is no part of a package."""
    spec = importlib.util.spec_from_file_location("wheel_kernels", ROOT / "wheel_kernels.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("needed", "tag"),
    [
        ([b"GLIBC_2.2.5"], "manylinux_2_28"),
        ([b"GLIBC_2.2.5 GLIBC_2.36", b"GLIBCXX_3.4"], "manylinux_2_36"),
        ([b"GLIBC_2.27", b"GLIBCXX_3.4.9 GLIBCXX_3.4.29"], "manylinux_2_34"),
        ([b"GLIBC_2.27 GLIBCXX_3.4.31"], "manylinux_2_38"),
    ],
)
def test_the_tag_names_the_oldest_system_that_has_what_is_needed(tmp_path, hook, needed, tag):
    libraries = [tmp_path / str(number) for number in range(len(needed))]
    for library, contents in zip(libraries, needed, strict=True):
        library.write_bytes(b"\0" + contents + b"\0")
    assert hook.platform_tag(libraries) == f"{tag}_{os.uname().machine}"


def test_a_newer_standard_library_than_is_known_is_refused(tmp_path, hook):
    (tmp_path / "library").write_bytes(b"GLIBCXX_3.4.99")
    with pytest.raises(ValueError, match=r"GLIBCXX_3.4.99"):
        hook.platform_tag([tmp_path / "library"])
