"""The client on our own server: both count the same."""

import httpx

from expertlane.client.connection import Url
from expertlane.client.run import MeasureOptions, Target, measure
from expertlane.client.server import Vocabulary
from expertlane.progress import Progress
from expertlane.server.setup import ServerOptions
from expertlane.spec.workload import LengthRange, Load
from server.running import StubServer

KEY = "a-key"


def counted(server: StubServer, name: str) -> float:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name}{{"))


def test_tokens_are_those_of_the_server() -> None:
    server = StubServer(ServerOptions(api_keys=("other", KEY)))
    try:
        load = Load(20, LengthRange(2, 9), LengthRange(1, 7), batch=4)
        asked = MeasureOptions([load], 3, tokenizer=Vocabulary(range(26)), num_warm_up=0)
        found = measure([Target(Url.parse(server.url), KEY)], asked, Progress())
        (record,) = found.records
        (serving,) = record.serving
        client = serving.client
        assert client is not None
        assert (serving.num_requests, client.num_failed, client.num_uncounted) == (20, 0, 0)
        assert serving.num_output_tokens is not None
        assert client.num_events <= serving.num_output_tokens
        probe = 2  # tokens; of four
        assert counted(server, "vllm:generation_tokens_total") == serving.num_output_tokens + probe
        assert counted(server, "vllm:prompt_tokens_total") == (serving.num_prompt_tokens or 0) + 4
        assert record.name.startswith(f"{server.url} (expertlane ")
        assert found.models == ("stub",)
    finally:
        server.stop()
