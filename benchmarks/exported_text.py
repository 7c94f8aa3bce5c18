"""What other programs make of exported bundles: greedy text, and how far their logits are off.

    python -m benchmarks.exported_text BUNDLE [--prompt TEXT ...] [--tokens 64] [--server FILE]

Every export is read by the program that it is for, on the tokens that the float32 reference writes
with the bundle's weights. As long as the likeliest next token is the reference's, so is the greedy
text. llama.cpp rounds the inputs of a quantized matrix to 8 bits in groups of 32. What that does by
itself the last row says: the reference with the same weights and such inputs (`Int8Activations`).
`--server` adds a llama-server, such as a Vulkan build; GGML_VK_DISABLE_INTEGER_DOT_PRODUCT=1 in the
environment keeps the inputs of that one in floating point.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.vulkan_against_llama_cpp import PORT, llama_server
from uq.export.export import ExportOptions, export
from uq.formats.bundle import Bundle, open_bundle
from uq.kernels.numerics import Int8Activations, Numerics
from uq.kernels.reference import ReferenceSession
from uq.kernels.session import Sampling
from uq.kernels.weights import BundleWeights

PROMPTS = ("The capital of France is", "Once upon a time", "def fibonacci(n):")
LIKELIEST = 20  # next tokens whose log-probabilities are compared

Array = NDArray[np.float64]
Next = list[dict[int, float]]  # of each place the likeliest next tokens and their log-probabilities
Reader = Callable[[list[int], int], Next]  # of all places from the given one on


@dataclass(frozen=True)
class Text:
    """What the reference writes behind a prompt, and the log-probabilities (places, vocab)."""

    tokens: list[int]
    start: int
    wanted: Array


def write_texts(bundle: Bundle, prompts: Sequence[str], count: int) -> list[Text]:
    session = ReferenceSession(BundleWeights(bundle), resident=True)
    return [_write(session, bundle.tokenizer().encode(prompt), count) for prompt in prompts]


def _write(session: ReferenceSession, prompt: list[int], count: int) -> Text:
    session.reset()
    session.prefill(prompt)
    tokens = prompt + list(session.decode(count, Sampling(temperature=0)))
    return Text(tokens, len(prompt), reference_scores(session, tokens, len(prompt)))


def reference_scores(session: ReferenceSession, tokens: list[int], start: int) -> Array:
    """(places, vocab): log-probabilities of what follows each place."""
    states = session.score(np.array([tokens[:-1]], np.int32))[0, start - 1 :]
    return log_softmax(session.logits(states, 0, session.config.vocab_size))


def log_softmax(logits: NDArray[np.float32]) -> Array:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return wide


def transformers_reader(folder: Path) -> Reader:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def read(tokens: list[int], start: int) -> Next:
        with torch.no_grad():
            logits = model(torch.tensor([tokens[:-1]])).logits[0, start - 1 :].numpy()
        return [_likeliest(row) for row in log_softmax(logits)]

    return read


def _likeliest(row: Array) -> dict[int, float]:
    chosen = np.argsort(-row)[:LIKELIEST]
    return dict(zip(chosen.tolist(), row[chosen].tolist(), strict=True))


def llama_cpp_reader(path: Path) -> Reader:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 1024, 1, False, 0
    server = xllamacpp.Server(params)

    return asking(server.handle_completions)


def asking(answered: Callable[[dict[str, Any]], Any]) -> Reader:
    """Asks a server of llama.cpp for one token at every place."""

    def likeliest(prompt: list[int]) -> dict[int, float]:
        request = {"prompt": prompt, "n_predict": 1, "n_probs": LIKELIEST, "temperature": 0.0}
        entries = answered(request)["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        return {entry["id"]: entry["logprob"] for entry in entries}

    return lambda tokens, start: [likeliest(tokens[:end]) for end in range(start, len(tokens))]


def posted(body: dict[str, Any]) -> Any:
    """The answer of the server that is running."""
    address, head = f"http://127.0.0.1:{PORT}/v1/completions", {"Content-Type": "application/json"}
    request = urllib.request.Request(address, json.dumps(body).encode(), head)
    with urllib.request.urlopen(request, timeout=600) as answer:
        return json.load(answer)


def eight_bit_reader(bundle: Bundle) -> Reader:
    session = ReferenceSession(
        BundleWeights(bundle), numerics=Numerics(Int8Activations()), resident=True
    )
    return lambda tokens, start: [
        _likeliest(row) for row in reference_scores(session, tokens, start)
    ]


ROWS: Mapping[str, tuple[ExportOptions, Callable[[Path], Reader]]] = {
    "hf": (ExportOptions("hf"), transformers_reader),
    "compressed-tensors": (ExportOptions("compressed-tensors"), transformers_reader),
    "gguf --dtype float32": (ExportOptions("gguf", dtype="float32"), llama_cpp_reader),
    "gguf": (ExportOptions("gguf"), llama_cpp_reader),
}


def compare(text: Text, found: Next) -> tuple[int, float, str]:
    """Equal tokens in front of the first other one; the largest difference of log-probabilities;
    and what the two best ones were apart where another was chosen."""
    wanted = text.tokens[text.start :]
    best = [max(place, key=lambda token: place[token]) for place in found]
    same = [ours == theirs for ours, theirs in zip(wanted, best, strict=True)]
    worst = max(
        abs(value - row[token])
        for place, row in zip(found, text.wanted, strict=True)
        for token, value in place.items()
    )
    if all(same):
        return len(same), worst, ""
    second, first = np.sort(text.wanted[same.index(False)])[-2:]
    return same.index(False), worst, f"{first - second:.3f}"


def line(name: str, texts: Sequence[Text], read: Reader) -> str:
    found = [compare(text, read(text.tokens, text.start)) for text in texts]
    same, worst, gaps = zip(*found, strict=True)
    cells = [name, ", ".join(map(str, same)), f"{max(worst):.1e}", ", ".join(filter(None, gaps))]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompt", nargs="+", default=PROMPTS)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument(
        "--exports", nargs="*", choices=[*ROWS], default=[*ROWS], help="default: %(default)s"
    )
    parser.add_argument("--server", type=Path, metavar="FILE", help="a llama-server")
    args = parser.parse_args()
    bundle = open_bundle(args.bundle, verify="lazy")
    texts = write_texts(bundle, args.prompt, args.tokens)
    print("| export | same tokens | log-probabilities off by at most | gap where they part |")
    print("|---|---|---|---|")
    for name in args.exports:
        options, reader = ROWS[name]
        with tempfile.TemporaryDirectory() as folder:
            read = reader(export(bundle, Path(folder) / "export", options).path)
            print(line(name, texts, read), flush=True)
    if args.server is not None:
        with tempfile.TemporaryDirectory() as folder:
            file = export(bundle, Path(folder) / "export.gguf", ExportOptions("gguf")).path
            with llama_server(args.server, file, 1024):
                print(line(f"gguf, {args.server.name}", texts, asking(posted)), flush=True)
    print(line("none: the reference with inputs of 8 bits", texts, eight_bit_reader(bundle)))


if __name__ == "__main__":
    main()
