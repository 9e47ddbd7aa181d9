"""A server on two hosts, of which the second is cut off, or lost, and comes back.

    PYTHONPATH=src:tests python -m distributed.cut_nodes [--by torchrun|variables] [--shrink]

Needs root: see `distributed.namespaces`. Clients stream from the first host all the time, each the
same request again and again. Prints what happened when, and whether any token was another one; then
one JSON line.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from distributed.namespaces import TwoHosts, why_not
from engine.ranks.processes import wait_until

PORT, MASTER_PORT = 8123, 29517
NUM_CLIENTS, NUM_TOKENS = 6, 60
PATIENCE_S = 240.0


class Client(threading.Thread):
    """Streams one request over and over, until it is told to stop.

    Attributes:
        answers: the tokens of each time, and why they ended.
        arrived_s: of each token, by the monotonic clock.
        error: why it could not go on; empty if all is well.
    """

    def __init__(self, url: str, number: int) -> None:
        super().__init__(daemon=True)
        self._url, self._number = url, number
        self.answers: list[tuple[list[int], str]] = []
        self.arrived_s: list[float] = []
        self.error = ""
        self.is_told = threading.Event()

    def run(self) -> None:
        with httpx.Client(timeout=PATIENCE_S) as client:
            while not self.is_told.is_set() and not self.error:
                try:
                    self._ask(client)
                except (httpx.HTTPError, LookupError, ValueError) as error:
                    self.error = f"{type(error).__name__}: {error}"

    def _ask(self, client: httpx.Client) -> None:
        body = {"prompt": [self._number + 1, 2, 3], "max_tokens": NUM_TOKENS, "ignore_eos": True}
        body |= {"temperature": self._number % 2, "seed": self._number, "return_token_ids": True}
        tokens: list[int] = []
        reason = "cut short"
        url = f"{self._url}/completions"
        with client.stream("POST", url, json=body | {"stream": True}) as answer:
            for line in answer.iter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise ValueError(event["error"])
                for choice in event["choices"]:
                    tokens += choice["token_ids"]
                    self.arrived_s += [time.monotonic()] * len(choice["token_ids"])
                    reason = choice["finish_reason"] or reason
        self.answers.append((tokens, reason))


@dataclass
class ServedOnTwoHosts:
    """The server, its clients, and what was seen of them.

    Attributes:
        by: what starts processes and sets their variables: `torchrun`, or nobody (`variables`).
        rejoin_s: of the server.
        moments: what happened, and the monotonic time.
    """

    hosts: TwoHosts
    folder: Path
    by: str = "torchrun"
    rejoin_s: float = 120.0
    options: tuple[str, ...] = ()
    clients: list[Client] = field(default_factory=list)
    moments: list[tuple[str, float]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://{self.hosts.front}:{PORT}/v1"

    def start(self, host: int) -> None:
        """Start the command on a host, also again."""
        command = [sys.executable, "-m"]
        variables = {"OMP_NUM_THREADS": "1"}
        if self.by == "torchrun":
            command += ["torch.distributed.run", "--log-dir", str(self.folder / "torchrun-logs")]
            command += ["--nnodes", "2", "--nproc-per-node", "1"]
            command += ["--max-restarts", "3", "--node-rank", str(host), "--master-addr"]
            command += [self.hosts.address[0], "--master-port", str(MASTER_PORT), "-m"]
        else:
            variables |= {"RANK": str(host), "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
            variables |= {"LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": self.hosts.address[0]}
            variables |= {"MASTER_PORT": str(MASTER_PORT)}
        command += ["expertlane", "serve", "paper-tiny", "--layout", "dp=4,ep=4", "--dtype"]
        command += ["float32", "--host", "0.0.0.0", "--port", str(PORT), "--max-num-seqs", "4"]
        command += ["--num-blocks", "32", "--rejoin-s", str(self.rejoin_s), *self.options]
        self.hosts.run(host, command, self.folder / f"host{host}", variables)

    def said(self, host: int) -> list[str]:
        """Our lines of a host."""
        text = (self.folder / f"host{host}").read_text(errors="replace")
        return [line for line in text.splitlines() if "Warning" not in line]

    def serves(self) -> bool:
        """Whether it answers."""
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"{self.url[:-3]}/health", timeout=5).status_code == 200
        return False

    def start_all(self) -> None:
        """Both hosts, and clients, each of which has had one answer."""
        for host in (1, 0):
            self.start(host)
        self.see("it serves", self.serves)
        self.clients = [Client(self.url, number) for number in range(NUM_CLIENTS)]
        for client in self.clients:
            client.start()
        self.see("clients have answers", lambda: all(c.answers or c.error for c in self.clients))

    def see(self, what: str, condition: object) -> float:
        """Wait for something; its moment."""
        assert wait_until(condition, PATIENCE_S, pause_s=0.05), self.report(what)
        return self.note(what)

    def note(self, what: str) -> float:
        """It happens now."""
        self.moments.append((what, time.monotonic()))
        return self.moments[-1][1]

    def see_line(self, what: str, words: str, host: int = 0, number: int = 1) -> float:
        """Wait until a host has said something, so many times."""
        return self.see(what, lambda: sum(words in line for line in self.said(host)) >= number)

    def see_ranks(self, what: str, number: int) -> float:
        """Wait until the second host has so many ranks."""
        return self.see(what, lambda: len(self.hosts.ranks(1)) == number)

    def see_tokens(self, what: str) -> float:
        """Wait until every client has a new answer."""
        before = [len(client.answers) for client in self.clients]
        return self.see(
            what,
            lambda: all(
                client.error or len(client.answers) > 1 + had
                for client, had in zip(self.clients, before, strict=True)
            ),
        )

    def stop_clients(self) -> None:
        """Let them end with whole answers."""
        for client in self.clients:
            client.is_told.set()
        for client in self.clients:
            client.join(PATIENCE_S)
            assert not client.is_alive()

    def num_tokens_between(self, begin_s: float, end_s: float) -> int:
        """Tokens that came to clients between two moments."""
        return sum(begin_s < each < end_s for client in self.clients for each in client.arrived_s)

    def faults(self) -> list[str]:
        """What is wrong with what clients got: nothing may be."""
        wrong = []
        for number, client in enumerate(self.clients):
            if client.error:
                wrong.append(f"client {number}: {client.error}")
            for turn, (tokens, reason) in enumerate(client.answers):
                if (tokens, reason) != (client.answers[0][0], "length"):
                    wrong.append(f"client {number}, answer {turn}: {reason}, {tokens}")
        return wrong

    def report(self, missing: str = "") -> str:
        """What was seen, for people."""
        begin_s = self.moments[0][1] if self.moments else 0.0
        lines = [f"{at_s - begin_s:7.2f} s  {what}" for what, at_s in self.moments]
        lines += [f"never: {missing}"] if missing else []
        lines += [f"host {host}: {line}" for host in range(2) for line in self.said(host)[-25:]]
        return "\n".join([*lines, *self.faults()])


@contextlib.contextmanager
def served(**settings: object):
    """Two hosts, not started yet; nothing is left of them afterwards."""
    hosts = TwoHosts()
    try:
        with tempfile.TemporaryDirectory() as folder:
            yield ServedOnTwoHosts(hosts, Path(folder), **settings)
    finally:
        hosts.close()


def cut_off_and_back(run: ServedOnTwoHosts) -> None:
    """The link of the second host goes down, and up again."""
    run.note("the link goes down")
    run.hosts.cut()
    run.see_ranks("host 1 has ended its ranks, by itself", 0)
    lost_s = run.see_line("the launcher says that node 1 is lost", "; recovering")
    time.sleep(5)
    mended_s = run.note("the link is up")
    assert run.num_tokens_between(lost_s, mended_s) == 0, "nobody computes for the lost ranks"
    run.hosts.mend()
    run.see_line("node 1 is back", "is back after")
    run.see_tokens("clients have whole answers")


def serve_without(run: ServedOnTwoHosts) -> None:
    """With `--on-failure shrink` the first host serves while the link is down, and both after."""
    run.note("the link goes down")
    run.hosts.cut()
    run.see_ranks("host 1 has ended its ranks, by itself", 0)
    run.see_line("the launcher serves without node 1", "serving with 2 of 4 data-parallel ranks")
    run.see_tokens("clients have whole answers")
    run.note("the link is up")
    run.hosts.mend()
    run.see_line("node 1 is back", "is back after")
    run.see_line("all ranks serve", "grew back in")
    run.see_tokens("clients have whole answers")


def lose_fork_server(run: ServedOnTwoHosts) -> None:
    """The process that has forked the second host's ranks is killed; somebody starts it again."""
    run.note("the fork server of host 1 is killed")
    (supervisor,) = run.hosts.supervisors(1)
    supervisor.kill()
    if run.by != "torchrun":
        run.see_ranks("its ranks are dead", 0)
        run.start(1)
    run.see_line("node 1 is back", "is back after", number=2)
    run.see_tokens("clients have whole answers")


def lose_host(run: ServedOnTwoHosts) -> None:
    """The second host loses its power; the command is started there again."""
    run.note("host 1 loses its power")
    run.hosts.cut()
    run.hosts.crash(1)
    run.hosts.mend()
    run.start(1)
    run.see_line("node 1 is back", "is back after", number=3)
    run.see_tokens("clients have whole answers")


def end(run: ServedOnTwoHosts) -> None:
    """As an orchestrator does."""
    run.stop_clients()
    run.note("host 0 is told to end")
    (first,) = run.hosts.processes[0]
    os.killpg(first.pid, signal.SIGTERM)
    run.see("no process is left", lambda: not run.hosts.pids(0) and not run.hosts.pids(1))


def main() -> None:
    """Show it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--by", choices=["torchrun", "variables"], default="torchrun")
    parser.add_argument("--shrink", action="store_true", help="serve on without the other host")
    own = parser.parse_args()
    if why := why_not():
        sys.exit(why)
    shrink = ("--on-failure", "shrink")
    with served(by=own.by, options=shrink if own.shrink else ()) as run:
        run.start_all()
        waits = cut_off_and_back, lose_fork_server, lose_host
        for act in (*((serve_without,) if own.shrink else waits), end):
            act(run)
        print(run.report())
        num_answers = sum(len(client.answers) for client in run.clients)
        print(f"{num_answers} answers of {NUM_TOKENS} tokens, {len(run.faults())} of them wrong")
        begin_s = run.moments[0][1]
        moments = [(round(at_s - begin_s, 2), what) for what, at_s in run.moments]
        facts = {"by": own.by, "shrink": own.shrink, "answers": num_answers}
        print(json.dumps(facts | {"wrong": len(run.faults()), "moments": moments}))


if __name__ == "__main__":
    main()
