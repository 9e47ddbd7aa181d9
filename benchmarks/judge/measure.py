"""Decode steps of ranks on real links and slowed cores: the truth that virtual time is judged by.

Each node is a network namespace with a torchrun of its own; links have the bandwidth and latency of
the case (`network.py`), and ranks a share of a core (`dilation.py`), so that 16 ranks on 2 cores
run as 16 on 16 would, only slower. Links are told by ping-pong between two nodes; nothing is fitted
to a step. Needs root, Linux with cgroup v1's CPU controller, network namespaces, TUN, htb, tbf, ifb
and mirred, iproute2 and util-linux. Ranks come before whatever else runs, for they have to get
their shares; so other work on the machine slows down.

    python benchmarks/judge/measure.py [--cases NAME …] [--out FOLDER]

Prints tables, then one JSON line, and leaves in the folder `truth.json` and for each link a profile
as projections read it, of ranks with a core each (`profile` of a case). A dilated case's
times are theirs when multiplied by its share. `token_s`: between a sequence's tokens, all steps;
`step_s`: from sending a plan to having all its outcomes; `cpu_s` and `process_cpu_s`: [num_ranks],
CPU time for a token, by stage of the main thread, and of the whole process.
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


def run_session(session: Session, nodes: Network, folder: Path, log: Path) -> list[dict[str, Any]]:
    """Start torchrun in every node and wait for all of them; the rows that were written.

    Raises:
        JudgeError: one of them failed, they took too long, or the network broke.
    """
    task = folder / "session.json"
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
            torchrun += ["--nproc-per-node", "1"]  # it starts the node's ranks
            torchrun += ["--master-addr", f"{network.CONTROL_NETWORK}1"]
            torchrun += ["--master-port", str(MASTER_PORT)]
            torchrun += [str(here / "on_ranks.py"), str(task)]
            agents.append(
                subprocess.Popen(
                    network.inside(node, *torchrun),
                    stdout=output,
                    stderr=output,
                    env=environment,
                    preexec_fn=dilation.join,
                    start_new_session=True,
                )
            )
        until = time.monotonic() + SESSION_S
        while any(agent.poll() is None for agent in agents):
            time.sleep(0.5)
            nodes.check()
            if any(agent.poll() for agent in agents) or time.monotonic() > until:
                break
    if any(agent.poll() != 0 for agent in agents):
        raise JudgeError(f"the ranks did not end well; what they said is in {log}")
    return [json.loads(line) for line in Path(session.out).read_text().splitlines()]


def measure(cases: list[Case], folder: Path, log: Path) -> dict[str, Any]:
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
        with Network(num_nodes, Path(latency_file)) as nodes:
            asked = [c.name for c in own if (c.link, c.share) not in measured_links]
            for is_ping_pong in (True, False):
                names = asked if is_ping_pong else [case.name for case in own]
                if not names:
                    continue
                size = (2, 2) if is_ping_pong else (num_nodes, num_ranks)
                dilation.Dilation(size[1]).make()
                session = Session(*size, names, is_ping_pong, latency_file, out)
                rows = run_session(session, nodes, folder, log)
                dilation.remove_all()
                for row in rows:
                    if "rates" in row:
                        truth["rates"] = row["rates"]
                    else:
                        truth["links" if is_ping_pong else "cases"].append(row)
            measured_links |= {(case.link, case.share) for case in own}
    return truth


def write_profiles(truth: dict[str, Any], folder: Path) -> None:
    """A profile of each link and number of ranks that share it; the case's row names its own."""
    of_link = {(row["link"], row["share"]): row for row in truth["links"]}
    for row in truth["cases"]:
        case = row["case"]
        num_near, share = case["ranks_per_node"], case["share"]
        profile = profile_of(
            of_link[case["link"], share], row["ping_pong_inside"], num_near, truth["rates"]
        )
        path = folder / f"{profile.name}-{1 / share:.0f}.toml"
        row["profile"] = path.name
        write_profile(profile, path)


def profile_of(
    link: dict[str, Any], inside: dict[str, Any] | None, num_near: int, rates: dict[str, Any]
) -> Profile:
    """A link as ping-pong shows it, as if each rank had a core.

    A NIC carries the bytes of all peers one after the other, each way by itself; so an exchange
    takes the bytes of the busier way over the bandwidth, of which ranks of one node have equal
    parts. gloo's sender waits until the receiver has said that it is ready. Where all begin
    together, that is a round trip; a pipeline stage has said so long before.
    """
    share = link["share"]
    places = {"inter_node": (link["ping_pong"], num_near)}
    if inside is not None:
        places["intra_node"] = inside, 1
    sheets, terms = {}, {}
    for place, (found, num_sharing) in places.items():
        origin = f"ping-pong, {place}, link {link['link']}, {share:g} of a core a rank"
        sheets[Link[place.upper()]] = LinkSheet(found["bytes_per_s"] / share / num_sharing, origin)

        def term(value: float, origin: str = origin) -> Term:
            return Term(value, value, value, Basis.MEASURED, origin)

        for kind, num_latencies in (("collective", 2), ("send", 1)):
            terms[f"floor_s.{kind}.{place}"] = term(num_latencies * found["latency_s"] * share)
            terms[f"efficiency.{kind}.{place}"] = term(1.0)
    for name in (
        "floor_per_doubling_s.collective.inter_node",
        "floor_per_peer_s.collective.intra_node",
    ):
        terms[name] = term(0.0)
    device = Device(
        name="a core of this machine",
        memory_bytes=float(psutil.virtual_memory().total),
        memory_bytes_per_s=rates["read_bytes_per_s"],
        flops_per_s={"float32": rates["gemm_flops_per_s"]},
        origin="measured: a large product, and reading memory, by one rank",
    )
    name = f"links-{link['link']}" + (f"-{num_near}-ranks-a-node" if num_near > 1 else "")
    return Profile(name, device, num_near, sheets, {}, terms)


def exchange_over_law(row: dict[str, Any], links: list[dict[str, Any]]) -> float:
    """Measured time of the case's larger all-to-all, over what ping-pong says of it."""
    case, (num_bytes, seconds) = row["case"], row["all_to_all"][-1]
    (found,) = (
        link["ping_pong"]
        for link in links
        if (link["link"], link["share"]) == (case["link"], case["share"])
    )
    num_near = case["ranks_per_node"]  # they share the NIC
    over_nic = num_bytes * num_near * (case["num_ranks"] - num_near)
    return seconds / (2 * found["latency_s"] + over_nic / found["bytes_per_s"])


def show(console: Console, truth: dict[str, Any]) -> None:
    """What `measure` found, as tables."""
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
    names = ["case", "bound", "layout", "batch", "link", "share", "s a step", "±", "× share ms"]
    table = Table(*names, "CPU ms", "exchange/law", title="decode steps, from token to token")
    for row in truth["cases"]:
        case, step_s, spread_s = row["case"], row["token_median_s"], row["token_spread_s"]
        texts = case["name"], case["bound"], case["layout"], str(case["batch"]), case["link"]
        times = f"{step_s:.3f}", f"{spread_s:.3f}", f"{1e3 * step_s * case['share']:.1f}"
        busiest = f"{1e3 * max(row['process_cpu_s']):.1f}"
        over_law = f"{exchange_over_law(row, truth['links']):.2f}"
        table.add_row(*texts, f"1/{1 / case['share']:.0f}", *times, busiest, over_law)
    console.print(table)
    console.print("CPU: of the busiest rank; exchange/law: an all-to-all of the case's size")


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
        truth = measure(cases, Path(folder), asked.out / "ranks.log")
    write_profiles(truth, asked.out)
    head = {"benchmark": "judge", "version": __version__, "torch": torch.__version__}
    line = json.dumps(head | truth)
    (asked.out / "truth.json").write_text(line + "\n")
    console = Console(width=140)
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
