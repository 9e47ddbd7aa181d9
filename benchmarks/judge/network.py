"""Nodes as network namespaces: a data link through TUN, htb, tbf and a forwarder; a control link.

Node i has `data0` (10.78.0.i+1). htb sends so many bytes a second from it, taking its peers in turn
as a NIC takes its connections; the forwarder holds packets back (latency); a token bucket on an ifb
device lets so many bytes a second in. And it has `control0` (10.77.0.i+1) on a bridge without
limits, for torchrun and the launcher, so that their messages load no modelled link.
"""

import ctypes
import fcntl
import os
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path

NAME = "xljudge"
CONTROL_NETWORK, DATA_NETWORK = "10.77.0.", "10.78.0."
MTU = 9000
QUEUE_BYTES = 256 << 20  # nothing is dropped: TCP's own windows are smaller
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
PR_SET_PDEATHSIG = 1
ESTABLISHED = "01"  # in /proc/net/tcp
COMMAND_S = 30.0  # for one of ip, tc and nsenter
# Reno keeps growing its window where nothing is lost; an idle connection keeps it.
TCP = {"congestion_control": "reno", "slow_start_after_idle": "0", "no_metrics_save": "1"}
LEAST_TIMEOUT = "1s"  # what waits in a queue for long is not lost


class JudgeError(Exception):
    """One line: what this machine lacks, or which command failed."""


def end_with_parent() -> None:
    """For `preexec_fn`: the process is killed when the one that started it ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def run(*command: str, text: str = "", check: bool = True) -> None:
    """Run a command, with `text` on its standard input; its first line on stderr is the error."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, input=text, timeout=COMMAND_S
        )
    except FileNotFoundError:
        raise JudgeError(f"{command[0]} is missing; install iproute2 and util-linux") from None
    except subprocess.TimeoutExpired:
        raise JudgeError(f"{' '.join(command)}: no answer within {COMMAND_S:g} s") from None
    if check and done.returncode:
        why = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[0]
        raise JudgeError(f"{' '.join(command)}: {why}")


def namespace(node: int) -> str:
    return f"{NAME}{node}"


def inside(node: int, *command: str) -> list[str]:
    """The command in a node's network; unlike `ip netns exec`, /sys stays as it is."""
    return ["nsenter", f"--net=/run/netns/{namespace(node)}", *command]


def is_linked(pid: int) -> bool:
    """True if a process has a TCP connection to another node over their data links."""
    network = socket.inet_aton(f"{DATA_NETWORK}0")[2::-1].hex().upper()  # as the kernel lists it
    try:
        own = {os.readlink(each) for each in Path(f"/proc/{pid}/fd").iterdir()}
        listed = Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]
    except OSError:  # it has ended
        return False
    for _, local, remote, state, *rest in map(str.split, listed):
        here, there = (address.split(":")[0] for address in (local, remote))
        is_between = here != there and here.endswith(network) and there.endswith(network)
        if is_between and state == ESTABLISHED and f"socket:[{rest[5]}]" in own:
            return True
    return False


def run_tc(node: int, lines: list[str]) -> None:
    """Run tc's commands in a node."""
    run("tc", "-n", namespace(node), "-batch", "-", text="\n".join(lines) + "\n")


def set_links(num_nodes: int, bytes_per_s: float, latency_s: float, latency_file: Path) -> None:
    """Set the bandwidth of each node in each direction, and the latency of all links."""
    rate, burst = f"{round(8 * bytes_per_s)}bit", 2 * MTU
    of_peer = f"{round(8 * bytes_per_s / num_nodes)}bit"  # others may take what one does not use
    limits = f"ceil {rate} burst {burst} cburst {burst} quantum {MTU}"
    classes = [f"parent 1: classid 1:1 htb rate {rate} {limits}"] + [
        f"parent 1:1 classid 1:{peer + 2:x} htb rate {of_peer} {limits}"
        for peer in range(num_nodes)
    ]
    receiving = f"root tbf rate {rate} burst {burst} limit {QUEUE_BYTES}"
    lines = [f"class replace dev data0 {each}" for each in classes]
    for node in range(num_nodes):
        run_tc(node, [*lines, f"qdisc replace dev ifb0 {receiving}"])
    with latency_file.open("r+b") as file:  # cut short, it would kill the forwarder, which maps it
        file.write(struct.pack("d", latency_s))


def remove_all() -> None:
    """Delete all namespaces of ours, with what is in them; devices and qdiscs go with them."""
    for path in Path("/run/netns").glob(f"{NAME}*"):
        run("ip", "netns", "del", path.name, check=False)


class Network:
    """The nodes, and the forwarder between them; a context.

    Args:
        latency_file: see `set_links`.
    """

    def __init__(self, num_nodes: int, latency_file: Path) -> None:
        self._num_nodes = num_nodes
        self._latency_file = latency_file
        self._forwarder: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Network":
        remove_all()
        devices: list[int] = []
        try:
            self._latency_file.write_bytes(struct.pack("d", 0.0))
            run("ip", "netns", "add", f"{NAME}hub")
            run("ip", "-n", f"{NAME}hub", "link", "add", "bridge0", "type", "bridge")
            run("ip", "-n", f"{NAME}hub", "link", "set", "bridge0", "up")
            for node in range(self._num_nodes):
                run("ip", "netns", "add", namespace(node))
                self._set_up_tcp(node)
                self._add_control(node)
                devices.append(self._add_data(node))
            forwarder = str(Path(__file__).with_name("forwarder.py"))
            self._forwarder = subprocess.Popen(
                [sys.executable, forwarder, *map(str, devices), str(self._latency_file)],
                pass_fds=devices,
                preexec_fn=end_with_parent,
                start_new_session=True,
            )
        except BaseException:
            self.__exit__()
            raise
        finally:
            for device in devices:
                os.close(device)
        return self

    def __exit__(self, *_: object) -> None:
        if self._forwarder is not None:
            self._forwarder.kill()
            self._forwarder.wait()
        remove_all()

    def check(self) -> None:
        """Check that the forwarder still runs.

        Raises:
            JudgeError: the forwarder has ended.
        """
        if self._forwarder is not None and self._forwarder.poll() is not None:
            raise JudgeError(f"the forwarder ended with exit code {self._forwarder.returncode}")

    def _set_up_tcp(self, node: int) -> None:
        writes = [f"echo {value} > /proc/sys/net/ipv4/tcp_{key}" for key, value in TCP.items()]
        run(*inside(node, "sh", "-ec", "; ".join(writes)))
        run("ip", "-n", namespace(node), "link", "set", "lo", "up")

    def _add_control(self, node: int) -> None:
        hub, own, port = f"{NAME}hub", namespace(node), f"port{node}"
        pair = ["type", "veth", "peer", "name", "control0", "netns", own]
        run("ip", "-n", hub, "link", "add", port, *pair)
        run("ip", "-n", hub, "link", "set", port, "master", "bridge0", "up")
        run("ip", "-n", own, "addr", "add", f"{CONTROL_NETWORK}{node + 1}/24", "dev", "control0")
        run("ip", "-n", own, "link", "set", "control0", "up")

    def _add_data(self, node: int) -> int:
        """The device's descriptor, by which its packets are read and written."""
        own, made_as = namespace(node), f"{NAME}{node}"
        try:
            descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise JudgeError(f"/dev/net/tun: {error.strerror}") from None
        try:
            flags = IFF_TUN | IFF_NO_PI
            fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", made_as.encode(), flags))
            run("ip", "link", "set", made_as, "netns", own, "name", "data0")
            size = ["mtu", str(MTU), "txqueuelen", "10000"]
            run("ip", "-n", own, "link", "add", "ifb0", "type", "ifb")
            for device in ("data0", "ifb0"):
                run("ip", "-n", own, "link", "set", device, *size, "up")
            run("ip", "-n", own, "addr", "add", f"{DATA_NETWORK}{node + 1}/24", "dev", "data0")
            route = [f"{DATA_NETWORK}0/24", "dev", "data0", "src", f"{DATA_NETWORK}{node + 1}"]
            run("ip", "-n", own, "route", "replace", *route, "rto_min", LEAST_TIMEOUT)
            every = "match u32 0 0 action mirred egress redirect dev ifb0"
            lines = [
                "qdisc add dev data0 root handle 1: htb",
                "qdisc add dev data0 ingress",
                f"filter add dev data0 parent ffff: protocol ip u32 {every}",
            ]
            for peer in range(self._num_nodes):
                of_peer = f"match ip dst {DATA_NETWORK}{peer + 1}/32 flowid 1:{peer + 2:x}"
                lines.append(f"filter add dev data0 parent 1: protocol ip u32 {of_peer}")
            run_tc(node, lines)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor
