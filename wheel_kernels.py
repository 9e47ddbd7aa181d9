"""Hatchling's hook for `make wheel`: a wheel with compiled kernels, so that users need no compiler.

Without EXPERTLANE_WHEEL_KERNELS=1 (an editable install, an sdist, `pip install .`) it does nothing:
kernels are then compiled where they are first used. The wheel's tag names the oldest C library that
has what the kernels need. OpenMP comes from the libgomp that torch brings, which is loaded before.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# The version of glibc in the oldest systems whose libstdc++ has symbols of a version (auditwheel's
# policies, from manylinux_2_28 on).
_GLIBC_OF_GLIBCXX = {25: 28, 28: 31, 29: 34, 30: 35, 32: 38, 33: 39}


class KernelsHook(BuildHookInterface[Any]):
    """Compiles every set of this architecture into a wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the libraries to a wheel that is not editable."""
        if version == "editable" or os.environ.get("EXPERTLANE_WHEEL_KERNELS") != "1":
            return
        sys.path.insert(0, str(Path(self.root) / "src"))
        from expertlane.engine.ops.build import BASELINE, SETS, compile_library, library_name

        compiler = shlex.split(os.environ.get("CXX") or shutil.which("g++") or "clang++")
        self._folder = tempfile.TemporaryDirectory()
        libraries = []
        for instructions in (BASELINE, *SETS):
            library = Path(self._folder.name) / library_name(instructions)
            try:
                compile_library(compiler, instructions, library, "-s")
            except subprocess.CalledProcessError as error:
                sys.exit(f"{instructions.name}: {error.stderr.decode()}")
            libraries.append(library)
            shipped = f"expertlane/engine/ops/libraries/{library.name}"
            build_data["force_include"][str(library)] = shipped
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform_tag(libraries)}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what is in the wheel by now."""
        if hasattr(self, "_folder"):
            self._folder.cleanup()


def platform_tag(libraries: list[Path]) -> str:
    """By the newest versions of symbols that one of them needs (PEP 600).

    Raises:
        ValueError: libstdc++ has newer ones than are known here.
    """
    found = b" ".join(library.read_bytes() for library in libraries)
    of_c = max((int(each) for each in re.findall(rb"\bGLIBC_2\.(\d+)", found)), default=17)
    of_cxx = max((int(each) for each in re.findall(rb"\bGLIBCXX_3\.4\.(\d+)", found)), default=0)
    fitting = [glibc for version, glibc in _GLIBC_OF_GLIBCXX.items() if version >= of_cxx]
    if not fitting:
        raise ValueError(f"no system is known whose libstdc++ has GLIBCXX_3.4.{of_cxx}")
    return f"manylinux_2_{max(of_c, fitting[0])}_{os.uname().machine}"
