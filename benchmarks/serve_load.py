"""What `uq serve` makes of its backend, and whether it keeps every request apart.

python benchmarks/serve_load.py rate BUNDLE             tokens per second beside the bare batch
python benchmarks/serve_load.py stream BUNDLE           the same, every token sent as it comes
python benchmarks/serve_load.py many BUNDLE [REQUESTS]  short requests; each answer is checked
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from uq.formats.bundle import Bundle, open_bundle
from uq.kernels.backends import open_batch, open_session
from uq.kernels.session import BatchSession, Piece, Sampling

AT_A_TIME, PROMPT, GENERATED, ROUNDS = 16, 64, 64, 8
WORDS = ["the", "time", "of", "a", "world", "and", "its", "city", "in", "which", "no", "one"]
READ = 1 << 20  # bytes that an answer may have
KINDS = 100  # different requests; their answers are computed once, alone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("rate", "stream", "many"))
    parser.add_argument("bundle", type=Path)
    parser.add_argument("requests", type=int, nargs="?", default=10_000)
    args = parser.parse_args()
    bundle = open_bundle(args.bundle)
    if args.what == "many":
        asyncio.run(many(bundle, args.requests))
    else:
        asyncio.run(rate(bundle, stream=args.what == "stream"))


async def rate(bundle: Bundle, *, stream: bool) -> None:
    """Alternate rounds of the bare batch and of the server; medians, and of the ratios of pairs."""
    session = open_batch(bundle, slots=AT_A_TIME, max_context=1024)
    bare, served = [], []
    with serving(bundle, AT_A_TIME) as port:
        for number in range(1 + ROUNDS):
            prompts = random_prompts(bundle, number)
            bare.append(batch_rate(session, prompts))
            served.append(await served_rate(port, prompts, stream))
    del bare[0], served[0]  # the first round warms up
    print(f"the batch alone: {spread(bare, 1)} tokens/s")
    print(f"uq serve:        {spread(served, 1)} tokens/s")
    ratios = [ours / alone for ours, alone in zip(served, bare, strict=True)]
    print(f"ratio of pairs:  {spread(ratios, 3)}")


def spread(values: list[float], digits: int) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


async def served_rate(port: int, prompts: list[list[int]], stream: bool) -> float:
    """Generated tokens per second, from sending the first request to reading the last answer."""
    options: dict[str, object] = {"max_tokens": GENERATED, "temperature": 0}
    if stream:
        options |= {"stream": True, "stream_options": {"include_usage": True}}
    bodies = [options | {"prompt": prompt} for prompt in prompts]
    began = time.perf_counter()
    answers = await all_at_once(port, bodies, AT_A_TIME)
    count: int = sum(answer["usage"]["completion_tokens"] for answer in answers)
    return count / (time.perf_counter() - began)


def random_prompts(bundle: Bundle, number: int) -> list[list[int]]:
    """Others in each round: the server would find the beginning of an earlier one in its cache."""
    rng = np.random.default_rng(number + 1)
    vocab = bundle.tokenizer().size
    return [[2, *rng.integers(1000, vocab, PROMPT - 1).tolist()] for _ in range(AT_A_TIME)]


def batch_rate(session: BatchSession, prompts: list[list[int]]) -> float:
    """Greedy tokens per second of a bare session, prompts included, as the server has them."""
    vocab = session.config.vocab_size
    began = time.perf_counter()
    last: list[int] = []
    together = session.block // PROMPT
    for first in range(0, len(prompts), together):
        pieces = [Piece(slot, prompts[slot]) for slot in range(len(prompts))[first:][:together]]
        for slot, _ in pieces:
            session.rewind(slot, 0)
        ends = session.extend(pieces)[PROMPT - 1 :: PROMPT]
        last += session.logits(ends.copy(), 0, vocab).argmax(axis=1).tolist()
    for _ in range(GENERATED - 1):
        hidden = session.extend([Piece(slot, [token]) for slot, token in enumerate(last)])
        last = session.logits(hidden, 0, vocab).argmax(axis=1).tolist()
    return len(prompts) * GENERATED / (time.perf_counter() - began)


async def many(bundle: Bundle, requests: int) -> None:
    """Short random requests, 16 to 64 at a time; nothing may be missing, mixed or wrong."""
    bodies = [request(number) for number in range(KINDS)]
    session, tokenizer = open_session(bundle, max_context=256), bundle.tokenizer()
    expected = []
    for body in bodies:
        session.reset()
        session.prefill(tokenizer.encode(str(body["prompt"])))
        sampling = Sampling(float(body["temperature"]), 0, 1.0, int(body["seed"]))
        tokens = []
        for token in session.decode(int(body["max_tokens"]), sampling):
            if token in tokenizer.eos:
                break
            tokens.append(token)
        expected.append(tokenizer.decode(tokens))
    order = [random.Random(number).randrange(KINDS) for number in range(requests)]
    with serving(bundle, AT_A_TIME) as port:
        began = time.perf_counter()
        answers = await all_at_once(port, [bodies[kind] for kind in order], 4 * AT_A_TIME)
        seconds = time.perf_counter() - began
    outcome = Counter(
        "right" if answer["choices"][0]["text"] == expected[kind] else "WRONG"
        for kind, answer in zip(order, answers, strict=True)
    )
    print(f"{requests} requests in {seconds:.1f} s, {requests / seconds:.1f}/s: {dict(outcome)}")


def request(number: int) -> dict[str, str | int | float]:
    rng = random.Random(number)
    return {
        "prompt": " ".join(rng.choices(WORDS, k=rng.randint(1, 30))),
        "max_tokens": rng.randint(1, 12),
        "temperature": rng.choice([0.0, 1.0]),
        "seed": rng.randrange(1000),
    }


async def all_at_once(port: int, bodies: list[dict], width: int) -> list[dict]:  # type: ignore[type-arg]
    """Answers to all bodies, `width` connections at a time."""
    answers: list[dict] = [{}] * len(bodies)  # type: ignore[type-arg]
    numbers = iter(range(len(bodies)))

    async def worker() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=READ)
        for number in numbers:
            data = json.dumps(bodies[number]).encode()
            head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
            writer.write(head.encode() + data)
            read = read_stream if bodies[number].get("stream") else read_answer
            answers[number] = await read(reader)
        writer.close()

    await asyncio.gather(*(worker() for _ in range(width)))
    return answers


async def read_answer(reader: asyncio.StreamReader) -> dict:  # type: ignore[type-arg]
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    length = int(head.split("content-length: ")[1].split("\r\n")[0])
    body = json.loads(await reader.readexactly(length))
    if " 200 " not in head.splitlines()[0]:
        raise SystemExit(f"{head.splitlines()[0]}: {body}")
    return body  # type: ignore[no-any-return]


async def read_stream(reader: asyncio.StreamReader) -> dict:  # type: ignore[type-arg]
    """The event behind the last token: it holds the usage."""
    events = (await reader.readuntil(b"data: [DONE]\n\n\r\n0\r\n\r\n")).split(b"data: ")
    return json.loads(events[-2].partition(b"\n")[0])  # type: ignore[no-any-return]


@contextmanager
def serving(bundle: Bundle, parallel: int) -> Iterator[int]:
    argv = [
        sys.executable,
        "-m",
        "uq",
        "serve",
        str(bundle.path),
        "--port",
        "0",
        "--context",
        "1024",
    ]
    with subprocess.Popen(
        [*argv, "--parallel", str(parallel)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        line = next(line for line in process.stdout if line.startswith("OpenAI API: "))
        try:
            yield int(line.strip().removesuffix("/v1").rpartition(":")[2])
        finally:
            process.terminate()


if __name__ == "__main__":
    main()
