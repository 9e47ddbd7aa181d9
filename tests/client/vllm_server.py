"""vLLM's own server in a process group of its own, on a tiny checkpoint made here."""

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers

from engine.model.families import randomise, save_checkpoint
from vllm_environment import python_of

PYTHON = "EXPERTLANE_TEST_VLLM_PYTHON"
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else two ranks need more cores than there may be
    "OMP_NUM_THREADS": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "fork",  # a process that imports anew takes a minute
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
_START_S = 420.0
_END_S = 20.0


class NotStarted(AssertionError):
    """vLLM did not start; the text is the end of its log."""


def python() -> str:
    """The interpreter of an environment with vLLM; the test is skipped without one."""
    made = python_of(Path(__file__).parents[2] / ".venv" / "vllm")
    found = os.environ.get(PYTHON) or str(made)
    if not Path(found).exists():
        pytest.skip(f"there is no {found}, a Python with vLLM: `make vllm`, or set {PYTHON}")
    return found


def checkpoint(folder: Path) -> Path:
    """A mixture of experts of sizes that vLLM's kernels for CPUs take, with a tokenizer."""
    save_checkpoint(
        "qwen3_moe",
        folder,
        vocab_size=320,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        moe_intermediate_size=64,
        intermediate_size=128,
        num_experts=8,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
        attention_bias=False,
        tie_word_embeddings=False,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    return add_tokenizer(folder)


def dense_checkpoint(folder: Path) -> Path:
    """One without experts: vLLM's build for CPUs cannot gather those of data-parallel ranks.

    Its CpuCommunicator has no all_gatherv (0.32): the first request ends the engines.
    """
    config = transformers.Qwen3Config(
        vocab_size=320,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=256,
        tie_word_embeddings=False,
        max_position_embeddings=512,
        eos_token_id=1,
    )
    model = transformers.Qwen3ForCausalLM(config).eval()
    randomise(model, 0)
    model.save_pretrained(folder)
    return add_tokenizer(folder)


def add_tokenizer(folder: Path) -> Path:
    """Add a tokenizer of bytes to a checkpoint, without which vLLM does not start."""
    core = tokenizers.Tokenizer(models.BPE(_bytes(), [], fuse_unk=False))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512}'
    )
    return folder


def _bytes() -> dict[str, int]:
    return {each: number for number, each in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


@contextmanager
def vllm(folder: Path, *flags: str, start_s: float = _START_S, **environment: str) -> Iterator[str]:
    """A server of a checkpoint; gives its URL. Everything that it started is ended.

    Args:
        start_s: seconds that it may take to start.
    """
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = chosen.getsockname()[1]
    # vllm-cpu has no package metadata named vllm, so the command `vllm` fails.
    command = [python(), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", folder.name, "--host", "127.0.0.1", "--port", str(port)]
    command += [
        "--dtype",
        "float32",
        "--max-model-len",
        "256",
        "--max-num-seqs",
        "8",
        "--enforce-eager",
        *flags,
    ]
    log = folder.parent / f"vllm-{port}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | ENVIRONMENT | environment,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(process, url, log, start_s)
        yield url
    finally:
        _end(process)


def _wait(process: "subprocess.Popen[bytes]", url: str, log: Path, start_s: float) -> None:
    end_s = time.monotonic() + start_s
    while True:
        with suppress(urllib.error.URLError, OSError):
            if urllib.request.urlopen(f"{url}/health", timeout=5).status == 200:
                return
        if process.poll() is not None or time.monotonic() > end_s:
            last = log.read_text("utf-8", "replace")[-4000:]
            raise NotStarted(f"vLLM did not start ({process.poll()}): {last}")
        time.sleep(0.5)


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(_END_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(_END_S)
