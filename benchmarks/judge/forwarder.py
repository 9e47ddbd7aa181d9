"""Carries packets between TUN devices, each after a delay, the links' latency.

Its arguments are the descriptors of the devices, that of node i being the i-th, and a file with
the latency in seconds as a double, which may change meanwhile. It runs before all other processes
(SCHED_FIFO), so that a busy machine doesn't lengthen links.
"""

import gc
import mmap
import os
import select
import struct
import sys
import time
from collections import deque

PACKET_BYTES = 1 << 16
DESTINATION = 19  # the last byte of an IPv4 packet's destination
PACKETS_A_TURN = 16  # of a device, so that none keeps the others waiting


def forward(devices: list[int], latency: mmap.mmap) -> None:
    """Node i has the address that ends in i + 1."""
    held: deque[tuple[float, int, bytes]] = deque()  # when it is due, where to, what
    while True:
        wait_s = max(0.0, held[0][0] - time.monotonic()) if held else None
        ready, _, _ = select.select(devices, [], [], wait_s)
        (latency_s,) = struct.unpack_from("d", latency)
        for device in ready:
            for _ in range(PACKETS_A_TURN):
                try:
                    packet = os.read(device, PACKET_BYTES)
                except BlockingIOError:
                    break
                node = packet[DESTINATION] - 1
                if packet[0] >> 4 == 4 and 0 <= node < len(devices):
                    held.append((time.monotonic() + latency_s, devices[node], packet))
        now = time.monotonic()
        while held and held[0][0] <= now:
            _, device, packet = held.popleft()
            os.write(device, packet)


def main() -> None:
    devices, path = [int(each) for each in sys.argv[1:-1]], sys.argv[-1]
    for device in devices:
        os.set_blocking(device, False)
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    gc.disable()  # nothing here refers to itself
    with open(path, "rb") as file:
        forward(devices, mmap.mmap(file.fileno(), 8, prot=mmap.PROT_READ))


if __name__ == "__main__":
    main()
