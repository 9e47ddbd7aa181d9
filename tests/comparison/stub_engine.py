"""An engine of another package for tests: its servers behave as their deployment's name says."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

HANG_S = 60.0


def engine(name, title):
    """The class, made where expertlane can be imported: servers import none of it."""
    from expertlane.comparison.engines.engine import CannotServe, Engine, LaunchCommand

    class Stub(Engine):
        def start(self, asked):
            behaviour = asked.deployment.name
            if behaviour == "refused":
                raise CannotServe("Stub has no such layout (stub.py: Layout)")
            argv = (sys.executable, __file__, str(asked.place.port), behaviour)
            return LaunchCommand((*argv, *asked.arguments), {"STUB": "1"}, {"stub.json": "{}"})

    Stub.name, Stub.title = name, title
    return Stub


def __getattr__(name):
    if name == "Stub":
        return engine("stub", "Stub")
    if name == "Other":
        return engine("other", "Other")
    raise AttributeError(name)


async def _events(writer, num, behaviour):
    if behaviour == "garbage":
        writer.write(b"data: \xff\xfe{not json\n\ndata: {}\n\ndata: [DONE]\n\n")
        return
    for _ in range(num):
        writer.write(b'data: {"choices": [{"index": 0, "text": "a"}]}\n\n')
        await writer.drain()
        await asyncio.sleep(0.001 if behaviour == "fast" else 0.02)
        if behaviour == "dies later" and Path("rounds").exists():
            print("CUDAError: device lost", flush=True)
            os._exit(1)
    usage = {"prompt_tokens": 4, "completion_tokens": num}
    writer.write(b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n")
    writer.write(b"data: [DONE]\n\n")


async def _answer(reader, writer, behaviour):
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
    except asyncio.IncompleteReadError:  # a connection that asks nothing
        writer.close()
        return
    length = next(
        int(line.split(":")[1])
        for line in head.split("\r\n")
        if line.lower().startswith("content-length:")
    )
    body = await reader.readexactly(length) if length else b""
    path = head.split()[1]
    kind = "application/json"
    status, content = "200 OK", b"{}"
    if path == "/health":
        pass
    elif path == "/version":
        content = b'{"version": "1.2"}'
    elif path == "/v1/models":
        content = b'{"data": [{"id": "model", "owned_by": "stub"}]}'
    elif path in ("/server_info", "/get_server_info") and behaviour == "sglang":
        settings = {"expert_distribution_recorder_mode": None, "ep_size": 2, "tp_size": 2}
        content = json.dumps(settings | {"api_key": "sk-secret", "max_total_tokens": 512}).encode()
    elif behaviour == "error 500":
        status, content = "500 Internal Server Error", b'{"error": {"message": "worker is lost"}}'
        print("RuntimeError: CUDA error: an illegal memory access", flush=True)
    elif behaviour == "hangs":
        await asyncio.sleep(HANG_S)
    else:
        kind = "text/event-stream"
        writer.write(
            f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nConnection: close\r\n\r\n".encode()
        )
        await _events(writer, json.loads(body)["max_tokens"], behaviour)
        writer.close()
        return
    writer.write(
        f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(content)}\r\n"
        "Connection: close\r\n\r\n".encode()
        + content
    )
    writer.close()


async def _serve(port, behaviour):
    server = await asyncio.start_server(
        lambda reader, writer: _answer(reader, writer, behaviour), "127.0.0.1", port
    )
    print("ready", flush=True)
    await server.serve_forever()


def main():
    port, behaviour = int(sys.argv[1]), sys.argv[2]
    print(f"loading as {behaviour}", flush=True)
    if behaviour == "dies in start-up":
        print("ValueError: 3 heads on 2 ranks", flush=True)
        sys.exit(1)
    if behaviour == "never ready":
        time.sleep(HANG_S)
    if behaviour == "starts slowly":
        time.sleep(0.5)
    if behaviour == "ignores SIGTERM":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if behaviour == "leaves grandchildren":
        code = "import os, time; os.setsid(); time.sleep(60)"
        left = subprocess.Popen([sys.executable, "-c", code])
        Path("grandchild").write_text(str(left.pid))
    Path("pid").write_text(f"{os.getpid()}")
    Path("cores").write_text(json.dumps(sorted(os.sched_getaffinity(0))))
    asyncio.run(_serve(port, behaviour))


if __name__ == "__main__":
    main()
