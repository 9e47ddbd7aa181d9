"""Servers as processes: what starts is waited for, and nothing of it is left, however it ends."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from expertlane.comparison.server_process import (
    ServerError,
    ServerProcess,
    command_line,
    last_words,
)
from expertlane.errors import UserError
from expertlane.results import hardware
from expertlane.results.hardware import own_cores, parted_cores

_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="orphans are found on Linux alone")
_SOON_S = 60.0  # of what takes a second on a quiet machine


def python(code):
    return [sys.executable, "-c", textwrap.dedent(code)]


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_gone(pids):
    until_s = time.monotonic() + _SOON_S
    while time.monotonic() < until_s and any(map(is_alive, pids)):
        time.sleep(0.02)
    return [pid for pid in pids if is_alive(pid)]


def pids_in(path, num):
    until_s = time.monotonic() + _SOON_S
    while time.monotonic() < until_s:
        found = path.read_text().split() if path.exists() else []
        if len(found) == num:
            return [int(each) for each in found]
        time.sleep(0.02)
    raise AssertionError(f"{num} processes in {path}, found {found}")


# A server that ignores SIGTERM, with a grandchild in a session of its own whose parent has ended.
STUBBORN = """
    import os, signal, subprocess, sys, time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    code = ("import os, sys, time; os.setsid(); "
            "open(sys.argv[1], 'a').write(f'{os.getpid()} '); time.sleep(60)")
    middle = ("import subprocess, sys; "
              "subprocess.Popen([sys.executable, '-c', sys.argv[1], sys.argv[2]])")
    subprocess.run([sys.executable, "-c", middle, code, "pids"])
    open("pids", "a").write(f"{os.getpid()} ")
    time.sleep(60)
"""


@_LINUX
@pytest.mark.parametrize("ending", ["stop", "exception", "killed parent"])
def test_nothing_is_left(tmp_path, monkeypatch, ending):
    monkeypatch.setattr("expertlane.comparison.server_process._GRACE_S", 0.3)
    if ending == "killed parent":
        code = f"""
            import sys, time
            from pathlib import Path
            from expertlane.comparison import server_process
            server_process._GRACE_S = 0.3
            argv = [sys.executable, "-c", {textwrap.dedent(STUBBORN)!r}]
            server = server_process.ServerProcess(argv, {{}}, Path({str(tmp_path)!r}))
            time.sleep(60)
        """
        with subprocess.Popen(python(code)) as parent:
            pids = pids_in(tmp_path / "pids", 2)
            parent.kill()
        assert not wait_gone(pids)
        return
    server = ServerProcess(python(STUBBORN), {}, tmp_path)
    pids = pids_in(tmp_path / "pids", 2)
    if ending == "stop":
        server.stop()
    else:
        with pytest.raises(KeyboardInterrupt), server:
            raise KeyboardInterrupt
    assert not wait_gone(pids)
    assert server.exit_status == 128 + signal.SIGKILL


@_LINUX
def test_what_a_server_leaves_when_it_ends_is_gone_too(tmp_path):
    code = """
        import subprocess, sys
        code = ("import os, time; os.setsid(); "
                "open('pids', 'a').write(f'{os.getpid()} '); time.sleep(60)")
        subprocess.Popen([sys.executable, "-c", code])
        import os, time
        while not (os.path.exists("pids") and os.path.getsize("pids")): time.sleep(0.01)
        sys.exit(3)
    """
    server = ServerProcess(python(code), {}, tmp_path)
    pids = pids_in(tmp_path / "pids", 1)
    with pytest.raises(ServerError, match="exit code 3"):
        server.wait_until(lambda: False, _SOON_S)
    assert not wait_gone(pids)
    server.stop()


def test_a_polite_server_ends_by_itself(tmp_path):
    code = """
        import signal, sys, time
        def end(*_):
            print("bye", flush=True)
            sys.exit(0)
        signal.signal(signal.SIGTERM, end)
        open("ready", "w")
        time.sleep(60)
    """
    with ServerProcess(python(code), {}, tmp_path) as server:
        waited_s = server.wait_until((tmp_path / "ready").exists, _SOON_S)
    assert 0 < waited_s < _SOON_S
    assert server.exit_status == 0
    assert server.last_words() == "bye"


def test_errors_are_those_since_it_was_ready(tmp_path):
    code = """
        import os, time
        print("ImportError: no such kernels", flush=True)
        open("ready", "w")
        while not os.path.exists("go"): time.sleep(0.01)
        print('  File "/x/runner.py", line 3, in gather')
        print("AssertionError\\nINFO: ended\\nKeyError: 'request-1'", flush=True)
        open("gone", "w")
        time.sleep(60)
    """
    with ServerProcess(python(code), {}, tmp_path) as server:
        server.wait_until((tmp_path / "ready").exists, _SOON_S)
        assert server.errors() == ""
        (tmp_path / "go").write_text("")
        until_s = time.monotonic() + _SOON_S
        while not (tmp_path / "gone").exists() and time.monotonic() < until_s:
            time.sleep(0.02)
        assert server.errors() == "AssertionError in gather (runner.py), then KeyError: 'request-1'"


def test_environment_folder_and_files(tmp_path):
    code = "import os; print(os.environ['OWN'], open('config.yaml').read())"
    server = ServerProcess(python(code), {"OWN": "a b"}, tmp_path / "new", {"config.yaml": "x: 1"})
    with pytest.raises(ServerError, match="exit code 0: a b x: 1"):
        server.wait_until(lambda: False, _SOON_S)
    server.stop()


def test_not_ready_in_time(tmp_path):
    code = "import time; print('loading', flush=True); time.sleep(60)"
    with ServerProcess(python(code), {}, tmp_path) as server:
        until_s = time.monotonic() + _SOON_S
        while not server.last_words() and time.monotonic() < until_s:
            time.sleep(0.02)
        with pytest.raises(ServerError, match=r"not ready within 0\.05 s; its last line: loading"):
            server.wait_until(lambda: False, 0.05)


def test_no_such_command(tmp_path):
    server = ServerProcess(["/no/such/engine"], {}, tmp_path)
    with pytest.raises(ServerError, match="cannot start /no/such/engine: No such file"):
        server.wait_until(lambda: False, _SOON_S)
    server.stop()


def test_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    before = set(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else set()
    with pytest.raises(UserError, match="cannot write to"):
        ServerProcess(["true"], {}, tmp_path / "file" / "folder")
    if before:
        assert set(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("", ""),
        ("loading\n\n", "loading"),
        ("a\nValueError: too long\nbye\n", "ValueError: too long"),
        (
            "(Core pid=7) AssertionError: no NUMA node\n(API pid=1) RuntimeError: Engine core "
            "initialization failed. See root cause above.\n",
            "AssertionError: no NUMA node",
        ),
        ("(API) OSError: see root cause\n", "OSError: see root cause"),
        ("usage: x\napi_server.py: error: unrecognized arguments: --no\n",
         "api_server.py: error: unrecognized arguments: --no"),
        ("\x1b[31mtorch.OutOfMemoryError: CUDA out of memory\x1b[0m\n",
         "torch.OutOfMemoryError: CUDA out of memory"),
        ("bell \x07\n", "bell \\x07"),
        (
            'ERROR [a.py:1]   File "/x/all2all.py", line 3, in gather\nERROR [a.py:1] '
            "    raise NotImplementedError\nERROR [a.py:1] NotImplementedError\n"
            "RuntimeError: Worker failed, please check the stack trace above for the root cause\n",
            "NotImplementedError in gather (all2all.py)",
        ),
    ],
)  # fmt: skip
def test_last_words(log, words):
    assert last_words(log) == words


def test_last_words_are_cut():
    assert len(last_words("x" * 10_000)) < 400


def test_command_line_for_a_shell(tmp_path):
    line = command_line(["cat", "a file"], {"A": "b c"}, {"a file": "it's\n"})
    done = subprocess.run(["sh", "-c", line], cwd=tmp_path, capture_output=True, check=True)
    assert done.stdout.decode() == "it's\n\n"


@_LINUX
def test_a_server_runs_on_its_cores(tmp_path):
    last = own_cores()[-1]
    code = "import os, time; print(sorted(os.sched_getaffinity(0)), flush=True); time.sleep(60)"
    for cores, words in (((last,), str([last])), ((), str(own_cores()))):
        with ServerProcess(python(code), {}, tmp_path, cores=cores) as server:
            until_s = time.monotonic() + _SOON_S
            while not server.last_words() and time.monotonic() < until_s:
                time.sleep(0.02)
            assert server.last_words() == words


@pytest.mark.parametrize(
    ("num_cores", "sizes", "num_of_client"),
    [
        (1, [1], 0),
        (2, [1], 0),
        (4, [1], 1),
        (4, [1, 2], 0),
        (8, [1, 2], 2),
        (8, [2, 3], 2),
        (8, [8], 0),
        (64, [4, 8], 8),
        (64, [], 1),
    ],
)
def test_the_client_has_cores_of_its_own_if_there_are_enough(
    num_cores, sizes, num_of_client, monkeypatch
):
    cores = tuple(range(3, 3 + num_cores))
    monkeypatch.setattr(hardware, "own_cores", lambda: [*cores])
    of_servers, of_client = parted_cores(sizes)
    assert of_servers + of_client == cores
    assert len(of_client) == num_of_client
    if of_client:
        assert all(len(of_servers) % size == 0 for size in sizes)
