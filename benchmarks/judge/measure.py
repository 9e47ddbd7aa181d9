"""Decode steps of ranks on real links and slowed cores: the truth that virtual time is judged by.

Each node is a network namespace with a torchrun of its own; links have the bandwidth and latency of
the case (`network.py`), and ranks a share of a core (`dilation.py`), so that 16 ranks on 2 cores
run as 16 on 16 would, only slower. Links are told by ping-pong between two nodes; nothing is fitted
to a step. Needs root, Linux with cgroup v1's CPU controller, network namespaces, TUN, tbf and ifb,
iproute2 and util-linux:

    python benchmarks/judge/measure.py [--cases NAME …] [--out FOLDER]

Prints a table, then one JSON line, and leaves in the folder `truth.json` and for each link a
profile as projections read it, `links-LINK-SHARE.toml`. Times of a dilated case, and of its links'
ping-pong, divided by dilation (times `share`) are those of ranks with a core each.
"""

import argparse
import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import dilation
import network
import psutil
import torch
from cases import CASES, LINKS, Case
from network import JudgeError, Network
from on_ranks import Session
from rich.console import Console
from rich.table import Table

from expertlane import __version__
from expertlane.cost.laws.profile import Device, LinkSheet, Profile, Term
from expertlane.cost.laws.profile_file import write_profile
from expertlane.cost.laws.times import Basis
from expertlane.errors import UserError
from expertlane.spec.names import Link

MASTER_PORT, SESSION_S = 29500, 1800.0
LOCK = Path("/run/expertlane-judge.lock")
KEPT_LINES = 15  # of a failed session's log
ENVIRONMENT = {
    "EXPERTLANE_TRANSPORT": "gloo",
    "GLOO_SOCKET_IFNAME": "data0",
    "OMP_NUM_THREADS": "1",
}


@contextlib.contextmanager
def only_one() -> Iterator[None]:
    """No other run at once: it would take our namespaces for its leftovers."""
    with LOCK.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise JudgeError("another run is under way on this machine") from None
        yield


@contextlib.contextmanager
def cleaned_up() -> Iterator[None]:
    """Nothing is left of this run, nor of an earlier one that was killed."""
    network.remove_all()
    dilation.remove_all()
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        dilation.remove_all()
        network.remove_all()


def run_session(session: Session, folder: Path) -> list[dict[str, Any]]:
    """Start torchrun in every node and wait for all of them; the rows that were written.

    Raises:
        JudgeError: one of them failed, or they took too long.
    """
    task, log = folder / "session.json", folder / "log"
    task.write_text(json.dumps(asdict(session)))
    Path(session.out).write_text("")
    here = Path(__file__).resolve().parent
    search = [str(here), str(here.parents[1] / "src"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": ":".join(filter(None, search))}
    agents = []
    with log.open("w") as output:
        for node in range(session.num_nodes):
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--monitor-interval", "1"]
            torchrun += ["--nnodes", str(session.num_nodes), "--node-rank", str(node)]
            torchrun += ["--nproc-per-node", str(session.num_ranks // session.num_nodes)]
            torchrun += ["--master-addr", "10.77.0.1", "--master-port", str(MASTER_PORT)]
            torchrun += [str(here / "on_ranks.py"), str(task)]
            agents.append(
                subprocess.Popen(
                    network.inside(node, *torchrun),
                    stdout=output,
                    stderr=output,
                    env=environment,
                    preexec_fn=dilation.join,
                )
            )
        until = time.monotonic() + SESSION_S
        while any(agent.poll() is None for agent in agents):
            time.sleep(0.5)
            if any(agent.poll() for agent in agents) or time.monotonic() > until:
                break
    if any(agent.poll() != 0 for agent in agents):
        print(*log.read_text().splitlines()[-KEPT_LINES:], sep="\n", file=sys.stderr)
        raise JudgeError("the ranks did not end well; the last lines of their output are above")
    return [json.loads(line) for line in Path(session.out).read_text().splitlines()]


def measure(cases: list[Case], folder: Path) -> dict[str, Any]:
    """All cases, those of one network after the other."""
    truth: dict[str, Any] = {"dilation": [], "links": [], "cases": []}
    for share in dict.fromkeys(case.share for case in cases if case.share < 1):
        truth["dilation"] += dilation.check(share)
        dilation.remove_all()
    latency_file, out = str(folder / "latency"), str(folder / "rows")
    measured_links: set[tuple[str, float]] = set()
    for per_node in sorted({case.ranks_per_node for case in cases}):
        own = [case for case in cases if case.ranks_per_node == per_node]
        num_ranks = max(case.num_ranks for case in own)
        num_nodes = num_ranks // per_node
        with Network(num_nodes, Path(latency_file)):
            asked = [c.name for c in own if (c.link, c.share) not in measured_links]
            for is_ping_pong in (True, False):
                names = asked if is_ping_pong else [case.name for case in own]
                if not names:
                    continue
                size = (2, 2) if is_ping_pong else (num_nodes, num_ranks)
                dilation.Dilation(size[1]).make()
                session = Session(*size, names, is_ping_pong, latency_file, out)
                rows = run_session(session, folder)
                dilation.remove_all()
                for row in rows:
                    if "rates" in row:
                        truth["rates"] = row["rates"]
                    else:
                        truth["links" if is_ping_pong else "cases"].append(row)
            measured_links |= {(case.link, case.share) for case in own}
    return truth


def profile_of(row: dict[str, Any], rates: dict[str, Any]) -> Profile:
    """A link as ping-pong shows it, as if each rank had a core.

    A NIC carries the bytes of all peers one after the other, the busier of its two directions;
    so the law of a collective is one latency and those bytes over the bandwidth.
    """
    share, found = row["share"], row["ping_pong"]
    origin = f"ping-pong between two nodes, link {row['link']}, {share:g} of a core a rank"
    latency_s = found["latency_s"] * share

    def term(value: float) -> Term:
        return Term(value, value, value, Basis.MEASURED, origin)

    terms = {}
    for kind in ("collective", "send"):
        terms[f"floor_s.{kind}.inter_node"] = term(latency_s)
        terms[f"efficiency.{kind}.inter_node"] = term(1.0)
    terms["floor_per_doubling_s.collective.inter_node"] = term(0.0)
    device = Device(
        name="a core of this machine",
        memory_bytes=float(psutil.virtual_memory().total),
        memory_bytes_per_s=rates["read_bytes_per_s"],
        flops_per_s={"float32": rates["gemm_flops_per_s"]},
        origin="measured: a large product, and reading memory, by one rank",
    )
    links = {Link.INTER_NODE: LinkSheet(found["bytes_per_s"] / share, origin)}
    return Profile(f"links-{row['link']}", device, 1, links, {}, terms)


def show(console: Console, truth: dict[str, Any]) -> None:
    table = Table("share of a core", "work ms", "after a wait of ms", "wall × share / work")
    for row in truth["dilation"]:
        milliseconds = f"{1e3 * row['work_s']:.0f}", f"{1e3 * row['wait_s']:.0f}"
        ratio = f"{row['ratio']:.3f} ± {row['spread']:.3f}"
        table.add_row(f"1/{1 / row['share']:.0f}", *milliseconds, ratio)
    console.print(table)
    table = Table("link", "share", "MB/s set", "ping-pong", "latency ms set", "ping-pong")
    for row in truth["links"]:
        slowed, found = LINKS[row["link"]].slowed(row["share"]), row["ping_pong"]
        rates = f"{slowed.bytes_per_s / 1e6:.2f}", f"{found['bytes_per_s'] / 1e6:.2f}"
        times = f"{1e3 * slowed.latency_s:.2f}", f"{1e3 * found['latency_s']:.2f}"
        table.add_row(row["link"], f"1/{1 / row['share']:.0f}", *rates, *times)
    console.print(table)
    names = ["case", "bound", "layout", "batch", "link", "share", "s a step", "±", "undilated ms"]
    table = Table(*names, "busiest CPU ms", title="decode steps, from token to token")
    for row in truth["cases"]:
        case, step_s = row["case"], row["token_median_s"]
        busiest = max(row["process_cpu_s"])
        texts = case["name"], case["bound"], case["layout"], str(case["batch"]), case["link"]
        times = (
            f"{step_s:.3f}",
            f"{row['token_spread_s']:.3f}",
            f"{1e3 * step_s * case['share']:.1f}",
        )
        table.add_row(*texts, f"1/{1 / case['share']:.0f}", *times, f"{1e3 * busiest:.1f}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in CASES])
    parser.add_argument("--out", type=Path, default=Path("results/judge"))
    asked = parser.parse_args()
    cases = [case for case in CASES if asked.cases is None or case.name in asked.cases]
    if os.geteuid() != 0:
        raise JudgeError("namespaces, qdiscs and quotas need root; run it as root")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    asked.out.mkdir(parents=True, exist_ok=True)
    with only_one(), cleaned_up(), tempfile.TemporaryDirectory() as folder:
        truth = measure(cases, Path(folder))
    for row in truth["links"]:
        name = f"links-{row['link']}-{1 / row['share']:.0f}.toml"
        row["profile"] = str(write_profile(profile_of(row, truth["rates"]), asked.out / name))
    head = {"benchmark": "judge", "version": __version__, "torch": torch.__version__}
    line = json.dumps(head | truth)
    (asked.out / "truth.json").write_text(line + "\n")
    console = Console(width=130)
    show(console, truth)
    console.out(line, highlight=False)


if __name__ == "__main__":
    try:
        main()
    except (JudgeError, UserError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
