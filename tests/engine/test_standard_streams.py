"""A program whose standard streams are closed."""

import subprocess
import sys

PROGRAM = """
import sys
from expertlane import LLM, SamplingParams
if __name__ == "__main__":
    with LLM("paper-tiny", layout="dp=2,ep=2", num_blocks=64, on_failure="replace") as llm:
        (output,) = llm.generate([[1, 2]], SamplingParams(max_tokens=3, ignore_eos=True))
    sys.exit(40 + len(output.token_ids))
"""


def test_a_program_without_standard_streams():
    closed = 'exec "$@" <&- >&- 2>&-'
    command = ["sh", "-c", closed, "sh", sys.executable, "-P", "-c", PROGRAM]
    assert subprocess.run(command, timeout=60).returncode == 43
