"""Throughput of `pit-jax serve`: many clients at once against one client at a time, with the official openai client.

    python benchmarks/serve_throughput.py [--clients 64] [--requests 1000] [--tokens 64] [--run DIR]

Without `--run`, a model of bytes is trained for a step in a temporary directory: what it says is noise, and what is
measured is the server. Each request is a prompt without a draft: a draft by the policy and a proposal by the improver;
with `--accept gap` also two scores by the gap model. The server is a process of its own on the same machine; needs
openai.

What batches save is reading the parameters once for many rows, token by token. Prompts and scores are read many tokens
at a time, which keeps a CPU busy with one row as with many. Of a nano model (`--width 64 --layers 2`) there is
nothing to save on a CPU, where its parameters stay in the cache: a request then costs what Python and HTTP cost.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from openai import AsyncOpenAI

from pit_jax.models.decoder_only import DecoderOnlyConfig
from pit_jax.testing.byte_run import VOCABULARY, byte_run
from pit_jax.text.codec import Lengths

READY_SECONDS = 1200.0


class Measured(NamedTuple):
    """Requests a second, seconds of each, how many failed, and what they cost the server's processor."""

    rate: float
    cpu: float
    seconds: list[float]
    errors: int
    tokens: int


class Served(NamedTuple):
    """Where a server listens, and its process."""

    url: str
    process: int


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--alone", type=int, default=30, help="requests of the one client")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--accept", choices=("gap", "always"), default="always")
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--run", type=pathlib.Path)
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--flags", default="", help="more flags of `pit-jax serve`")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        run = options.run or make_run(pathlib.Path(directory) / "bytes", options.width, options.layers, options.tokens)
        with served(run, options.port, [f"--accept={options.accept}", *options.flags.split()]) as server:
            asyncio.run(measure(server, 4, 16, options.tokens, options.stream))
            alone = asyncio.run(measure(server, 1, options.alone, options.tokens, options.stream))
            row(1, options.alone, alone)
            together = asyncio.run(measure(server, options.clients, options.requests, options.tokens, options.stream))
            row(options.clients, options.requests, together)
            print(f"ratio {together.rate / alone.rate:.1f}")
            batches(server.url)


def make_run(directory: pathlib.Path, width: int, layers: int, tokens: int) -> pathlib.Path:
    """Make a run of bytes whose models have learned nothing."""
    model = DecoderOnlyConfig(
        vocab_size=VOCABULARY,
        width=width,
        layers=layers,
        heads=max(1, width // 64),
        kv_heads=1,
        head_dim=64,
        mlp=4 * width,
        role_embedding=True,
    )
    # They end an answer in one of 384 tokens: nearly all are as long as they can be.
    return byte_run(directory, model, Lengths(inputs=24, targets=tokens), learning_rate=1e-8)


@contextlib.contextmanager
def served(run: pathlib.Path, port: int, flags: list[str]) -> Iterator[Served]:
    """Serve a run in a process of its own; yield where when it is ready, and stop it by SIGTERM."""
    command = [
        sys.executable,
        "-m",
        "pit_jax",
        "serve",
        f"--checkpoint={run}",
        f"--port={port}",
        "--name=bytes",
        *flags,
    ]
    process = subprocess.Popen(command, env=dict(os.environ))
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + READY_SECONDS
        while not is_ready(url):
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit("the server did not come up")
            time.sleep(0.5)
        yield Served(url, process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        print(f"server stopped with status {process.wait(timeout=60)}")


def is_ready(url: str) -> bool:
    """Return whether the server takes requests."""
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, ConnectionError):
        return False


async def measure(server: Served, clients: int, requests: int, tokens: int, stream: bool) -> Measured:
    """Send `requests` from `clients` at once, each of which sends the next when it has its answer."""
    left = iter(range(requests))
    seconds: list[float] = []
    errors = received = 0

    async def client() -> None:
        nonlocal errors, received
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300) as api:
            for number in left:
                started = time.monotonic()
                try:
                    answered = await ask(api, number, tokens, stream)
                    received += answered
                except Exception as error:  # noqa: BLE001 (every failure counts, whatever it is)
                    errors += 1
                    print(f"request {number}: {error!r}", file=sys.stderr)
                seconds.append(time.monotonic() - started)

    started, before = time.monotonic(), processor_seconds(server.process)
    await asyncio.gather(*(client() for _ in range(clients)))
    cpu = processor_seconds(server.process) - before
    return Measured(requests / (time.monotonic() - started), cpu / requests, seconds, errors, received)


def processor_seconds(process: int) -> float:
    """Return the processor time of a process so far; 0 where the system does not say."""
    stat = pathlib.Path(f"/proc/{process}/stat")
    if not stat.exists():
        return 0.0
    user, system = stat.read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


async def ask(api: AsyncOpenAI, number: int, tokens: int, stream: bool) -> int:
    """Send one request and return the tokens of its answer."""
    asked = {"model": "bytes", "prompt": f"goal {number}", "max_tokens": tokens, "seed": number}
    if not stream:
        reply = await api.completions.create(**asked)
        assert reply.choices[0].finish_reason in ("stop", "length")
        return reply.usage.completion_tokens
    last = None
    async for chunk in await api.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        last = chunk
    assert last is not None and last.usage is not None, "the stream ends with the usage"
    return last.usage.completion_tokens


def row(clients: int, requests: int, measured: Measured) -> None:
    """Print a line of the table."""
    middle, late = np.percentile(measured.seconds, [50, 95])
    print(
        f"clients {clients:>3}  requests {requests:>5}  errors {measured.errors}  {measured.rate:7.2f} requests/s  "
        f"{1000 * measured.cpu:6.1f} ms of the server's processor each  "
        f"{measured.rate * measured.tokens / requests:8.0f} answer tokens/s  median {middle:.3f} s  95 % {late:.3f} s",
        flush=True,
    )


def batches(url: str) -> None:
    """Print the mean number of rows of a batch, from the server's own metrics."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    for kind in ("policy", "improver", "gap"):
        found = [re.search(rf'pit_batch_rows_{what}{{kind="{kind}"}} (\S+)', text) for what in ("sum", "count")]
        rows, count = (float(match[1]) if match else 0.0 for match in found)
        print(f"{kind}: {count:.0f} batches of {rows / max(count, 1):.1f} rows")


if __name__ == "__main__":
    main()
