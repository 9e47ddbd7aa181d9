"""Draw `/live` as a picture for the README and its page, under a load of its own.

    python docs/pictures/live.py [SECONDS]

Serves a small model of random weights with rebalancing on, asks it for a minute, or so many
seconds, by streams of random tokens, and writes `live.png` beside this script, by headless
Chromium.
"""

import json
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx
from playwright.sync_api import sync_playwright

from expertlane.spec.model import PRESETS

HERE = Path(__file__).parent
MODEL, LAYOUT = "paper-small", "dp=4,ep=4"
OPTIONS = ["--num-redundant-experts", "4", "--rebalance-steps", "60", "--num-blocks", "96"]
NUM_STREAMS, LOAD_S = 12, 60.0
SIZE = {"width": 1240, "height": 1000}


def ask(url: str, seed: int, until_s: float) -> None:
    """One request after the other, of drawn lengths; some have a prefix in common."""
    draw, vocab_size = random.Random(seed), PRESETS[MODEL].vocab_size
    with httpx.Client(base_url=url, timeout=60) as client:
        while time.monotonic() < until_s:
            prompt = [draw.randrange(vocab_size) for _ in range(draw.randint(8, 60))]
            if draw.random() < 0.3:
                prompt = [*range(32), *prompt]
            body = {"prompt": prompt, "max_tokens": draw.randint(10, 80), "ignore_eos": True}
            try:
                client.post("/v1/completions", json=body)
            except httpx.HTTPError:  # the picture is drawn, and the server has ended
                return


def draw(page_url: str) -> None:
    """Write the picture."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport=SIZE)
        page.set_default_timeout(120_000)
        page.goto(page_url)
        page.wait_for_selector("#lanes .bar")
        time.sleep(5)
        page.screenshot(path=HERE / "live.png", full_page=True)
        browser.close()


def main() -> None:
    """Serve, ask, draw."""
    load_s = float(sys.argv[1]) if len(sys.argv) > 1 else LOAD_S
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "expertlane", "serve", MODEL, "--layout", LAYOUT]
        command += [*OPTIONS, "--port", "0", "--json", "--served-model-name", MODEL]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder) as server:
            try:
                assert server.stdout is not None
                page_url = json.loads(server.stdout.readline())["live"]
                url, until_s = page_url.removesuffix("/live"), time.monotonic() + load_s
                streams = [
                    threading.Thread(target=ask, args=(url, seed, until_s))
                    for seed in range(NUM_STREAMS)
                ]
                for each in streams:
                    each.start()
                time.sleep(load_s / 2)
                draw(page_url)
            finally:
                server.terminate()


if __name__ == "__main__":
    main()
