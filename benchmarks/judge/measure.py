"""Decode steps of ranks on real links and slowed cores: the reference for virtual time.

Each node is a network namespace with a torchrun of its own; links have the bandwidth and latency of
the case (`network.py`), and ranks a share of a core (`dilation.py`), so that 16 ranks on 2 cores
run as 16 on 16 would, only slower. Links are measured by ping-pong between two nodes; nothing is
fitted to a step. Needs root, Linux with cgroup v1's CPU controller, network namespaces, TUN, htb,
tbf, ifb and mirred, iproute2 and util-linux. Ranks get their shares before all other processes, so
other work on the machine slows down.

    python benchmarks/judge/measure.py [--cases NAME …] [--out FOLDER]

Measurements are kept in the folder's `rows.jsonl`; the same command continues after them. A case
that fails is named and left out, with exit code 1; the same command tries it again.

Prints tables, then one JSON line, and writes to the folder `truth.json` and a profile per link that
projections can read, for ranks with a core each (`profile` of a case). Times of a dilated case,
multiplied by its share, are those of ranks with a core each. `token_s`: between a sequence's
tokens, all steps; `step_s`: from sending a plan to having all its outcomes; `cpu_s` and
`process_cpu_s`: [num_ranks], CPU time for a token, by stage of the main thread, and of the whole
process.
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
from typing import IO, Any

import dilation
import network
import psutil
import torch
from cases import CASES, LINKS, Case
from network import JudgeError, Network
from on_ranks import Session
from rich.console import Console
from rich.table import Table
from rows import Rows, add

from expertlane import __version__
from expertlane.cost.laws.profile import Device, LinkSheet, Profile, Term, write_profile
from expertlane.cost.laws.times import Basis
from expertlane.errors import UserError
from expertlane.spec.names import Link

MASTER_PORT = 29500
ROW_S = 300.0  # for a start of all ranks and one measurement; the longest took a minute
LOCK = Path("/run/expertlane-judge.lock")
ENVIRONMENT = {
    "EXPERTLANE_TRANSPORT": "gloo",
    "GLOO_SOCKET_IFNAME": "data0",
    "OMP_NUM_THREADS": "1",
}


@contextlib.contextmanager
def only_one() -> Iterator[None]:
    """Hold a lock: a second run at the same time would remove the namespaces of this one."""
    with LOCK.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise JudgeError("another run is under way on this machine") from None
        yield


@contextlib.contextmanager
def cleaned_up() -> Iterator[None]:
    """Remove namespaces and cgroups: first those of a killed run, at the end those of this one."""
    network.remove_all()
    dilation.remove_all()
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        dilation.remove_all()
        network.remove_all()


def run_session(session: Session, nodes: Network, folder: Path, log: Path) -> None:
    """Start torchrun in every node and wait for all of them; the ranks add rows to the file.

    Raises:
        JudgeError: one of them failed, no row came for too long, or the network broke.
    """
    task = folder / "session.json"
    task.write_text(json.dumps(asdict(session)))
    out, agents = Path(session.out), []
    with log.open("a") as output:
        print(f"\n{session}", file=output, flush=True)
        try:
            for node in range(session.num_nodes):
                agents += [start_node(node, session.num_nodes, task, output)]
            size, until = out.stat().st_size, time.monotonic() + ROW_S
            while any(agent.poll() is None for agent in agents):
                time.sleep(0.5)
                nodes.check()
                if out.stat().st_size > size:
                    size, until = tell(out, size), time.monotonic() + ROW_S
                if time.monotonic() > until:
                    raise JudgeError(f"nothing was measured for {ROW_S:g} s; see {log}")
                if any(agent.poll() for agent in agents):
                    raise JudgeError(f"the ranks failed; their output is in {log}")
            tell(out, size)
        finally:
            dilation.remove_all()
            for agent in agents:
                agent.wait()


def start_node(node: int, num_nodes: int, task: Path, output: IO[str]) -> subprocess.Popen[bytes]:
    """torchrun in one node; its one process starts the node's ranks."""
    here = Path(__file__).resolve().parent
    search = [str(here), str(here.parents[1] / "src"), os.environ.get("PYTHONPATH", "")]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--monitor-interval", "1"]
    torchrun += ["--log-dir", str(task.parent)]  # else a folder of each run stays in /tmp
    torchrun += ["--nnodes", str(num_nodes), "--node-rank", str(node), "--nproc-per-node", "1"]
    torchrun += ["--master-addr", f"{network.CONTROL_NETWORK}1", "--master-port", str(MASTER_PORT)]
    return subprocess.Popen(
        network.inside(node, *torchrun, str(here / "on_ranks.py"), str(task)),
        stdout=output,
        stderr=output,
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": ":".join(filter(None, search))},
        preexec_fn=dilation.join,
        start_new_session=True,
    )


def tell(out: Path, size: int) -> int:
    """Print what was measured since the file had `size` bytes; returns the bytes read so far."""
    new = out.read_bytes()[size:]
    whole = new[: new.rfind(b"\n") + 1]  # the last line may be half written
    for line in whole.splitlines():
        for kind, row in json.loads(line).items():
            told = f"link {row['link']}, {row['share']:g} of a core" if kind == "link" else ""
            if kind == "case":
                step_ms = 1e3 * row["token_median_s"] * row["case"]["share"]
                told = f"{row['case']['name']}: {step_ms:.1f} ms, took {row['took_s']:.0f} s"
            if told:
                print(f"{time.strftime('%H:%M:%S')} {told}", file=sys.stderr, flush=True)
    return size + len(whole)


def cpu() -> str:
    """The CPU's name with family and model, since a name may stand for several generations."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    of_first = dict(map(str.strip, line.split(":", 1)) for line in reversed(lines) if ":" in line)
    return "{model name}, family {cpu family}, model {model}".format_map(of_first)


def is_missing(rows: Rows, case: Case, *, link: bool) -> bool:
    """True if the rows do not have the case as it is now, or its link."""
    if link:
        found = [(row["link"], row["share"]) for row in rows.of("link")]
        return (case.link, case.share) not in found
    return all(row["case"] != case.described for row in rows.of("case"))


def measure(cases: list[Case], rows: Rows, folder: Path, log: Path) -> list[str]:
    """Measure what the rows lack; cases that need the same network follow each other.

    Returns:
        The names of cases that failed.
    """
    for share in dict.fromkeys(case.share for case in cases if case.share < 1):
        if all(row["share"] != share for row in rows.of("dilation")):
            for row in dilation.check(share):
                add(rows.path, "dilation", row)
            dilation.remove_all()
    failed: list[str] = []
    for per_node in sorted({case.ranks_per_node for case in cases}):
        own = [case for case in cases if case.ranks_per_node == per_node]
        for link in (True, False):
            own = [case for case in own if case.name not in failed]
            failed += measure_alike(own, link, rows, folder, log)
    return failed


def measure_alike(cases: list[Case], link: bool, rows: Rows, folder: Path, log: Path) -> list[str]:
    """Measure what the rows lack of cases with equally many ranks per node, or of their links.

    Returns:
        The names of cases that failed.
    """
    failed: list[str] = []
    latency_file = folder / "latency"
    while left := [c for c in cases if c.name not in failed and is_missing(rows, c, link=link)]:
        num_ranks = 2 if link else max(case.num_ranks for case in left)
        num_nodes = 2 if link else num_ranks // left[0].ranks_per_node
        names, files = [case.name for case in left], (str(latency_file), str(rows.path))
        why = "it was not measured"
        with Network(num_nodes, latency_file) as nodes:
            dilation.Dilation(num_ranks).make()
            try:
                run_session(Session(num_nodes, num_ranks, names, link, *files), nodes, folder, log)
            except JudgeError as error:
                why = str(error)
        for case in [case for case in left if is_missing(rows, case, link=link)][:1]:
            print(f"{case.name}: {why}", file=sys.stderr, flush=True)
            alike = [c.name for c in left if (c.link, c.share) == (case.link, case.share)]
            failed += alike if link else [case.name]
    return failed


def truth_of(rows: Rows) -> dict[str, Any]:
    """All measurements, with the cases in the order of `CASES`."""
    known = [case.described for case in CASES]
    return {
        "dilation": rows.of("dilation"),
        "links": rows.of("link"),
        "rates": rows.of("rates")[-1],
        "cases": sorted(
            (row for row in rows.of("case") if row["case"] in known),
            key=lambda row: known.index(row["case"]),
        ),
    }


def write_profiles(truth: dict[str, Any], folder: Path) -> None:
    """Write a profile for each link and number of ranks that share it; name it in cases' rows."""
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
    """The profile of a link by its ping-pong, as if each rank had a core.

    A NIC carries the bytes of all peers one after the other, each way by itself; so an exchange
    takes the bytes of the busier direction over the bandwidth, which the ranks of a node share
    equally. gloo's sender waits until the receiver has said that it is ready: a round trip where
    all ranks begin together, but no wait in a pipeline, whose stages have said so long before.
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
    """Measured time of the case's larger all-to-all, over the time that ping-pong predicts."""
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
    """Print tables of what `measure` found."""
    names = ["share of a core", "work ms", "after a wait of ms", "wall × share / work"]
    table = Table(*names, "work per CPU second")
    for row in truth["dilation"]:
        milliseconds = f"{1e3 * row['work_s']:.0f}", f"{1e3 * row['wait_s']:.0f}"
        ratio = f"{row['ratio']:.3f} ± {row['spread']:.3f}"
        speed = f"{row['speed']:.2f}" if "speed" in row else "—"
        table.add_row(f"1/{1 / row['share']:.0f}", *milliseconds, ratio, speed)
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
    head = {"benchmark": "judge", "version": __version__, "torch": str(torch.__version__)}
    head["cpu"] = cpu()
    rows, log = Rows(asked.out / "rows.jsonl", head), asked.out / "ranks.log"
    with only_one(), cleaned_up(), tempfile.TemporaryDirectory() as folder:
        failed = measure(cases, rows, Path(folder), log)
    truth = truth_of(rows)
    write_profiles(truth, asked.out)
    line = json.dumps(head | truth)
    (asked.out / "truth.json").write_text(line + "\n")
    console = Console(width=140)
    show(console, truth)
    console.out(line, highlight=False)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    try:
        main()
    except (JudgeError, UserError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
