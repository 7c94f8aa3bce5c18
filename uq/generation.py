"""Continue a text with a bundle, token by token."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from uq.chat import ChatTemplate
from uq.formats.bundle import open_bundle
from uq.formats.tokenizer import Tokenizer
from uq.kernels.backends import open_session
from uq.kernels.numerics import FLOAT, Numerics
from uq.kernels.session import Device, Sampling, require_context

GREEDY = Sampling()


@dataclass(frozen=True)
class Rate:
    tokens: int
    seconds: float

    @property
    def per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True)
class Generated:
    """Where and how fast a text was generated."""

    device: Device
    prefill: Rate
    decode: Rate


def generate(
    path: str | Path,
    prompt: str,
    *,
    chat: bool = False,
    max_tokens: int = 256,
    sampling: Sampling = GREEDY,
    device: str = "auto",
    threads: int | None = None,
    numerics: Numerics = FLOAT,
    speculate: bool = False,
    write: Callable[[str], None],
) -> Generated:
    """Continue `prompt` until the model ends the text or `max_tokens` are generated.

    Args:
        chat: put the prompt into the bundle's chat template first.
        numerics: what the device keeps in integers beside the weights.
        speculate: check guessed tokens where a greedy text repeats itself.
        write: receives the text piece by piece, as soon as it is known.

    Raises:
        BundleError: the folder is not a bundle, or a broken one.
        UsageError: the text would be longer than the model's context; no chat template.
        DeviceError: the device is not available.
    """
    bundle = open_bundle(path)
    tokenizer = bundle.tokenizer()
    if chat:
        with ChatTemplate.of(bundle) as template:
            prompt = template.render([{"role": "user", "content": prompt}])
    tokens = tokenizer.encode(prompt)
    context = len(tokens) + max_tokens
    require_context("prompt and --max-tokens", context, bundle.config)
    session = open_session(
        bundle,
        device,
        max_context=context,
        threads=threads,
        numerics=numerics,
        speculate=speculate,
    )

    began = time.perf_counter()
    session.prefill(tokens)
    filled = time.perf_counter()
    count = write_text(session.decode(max_tokens, sampling), tokenizer, write)
    ended = time.perf_counter()
    prefill, decode = Rate(len(tokens), filled - began), Rate(count, ended - filled)
    return Generated(session.device, prefill, decode)


def write_text(tokens: Iterable[int], tokenizer: Tokenizer, write: Callable[[str], None]) -> int:
    """Write what `tokens` say, up to an end-of-text token; the number of tokens in front of it."""
    stream = tokenizer.stream()
    count = 0
    for token in tokens:
        if token in tokenizer.eos:
            break
        write(stream.push(token))
        count += 1
    write(stream.flush())
    return count
