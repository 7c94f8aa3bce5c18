"""The server over HTTP: real clients, wrong requests, clients that leave."""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from numpy.typing import NDArray

from tests.serve_site import KEY, Site, site
from uq.cli import main
from uq.formats.bundle import Bundle, open_bundle
from uq.formats.tokenizer import Tokenizer
from uq.formats.writer import BundleWriter
from uq.kernels.cpu.session import CpuSession
from uq.kernels.session import Sampling

HARNESS = Path(__file__).with_name("harness")


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint()


@pytest.fixture(scope="module")
def bundle(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("bundles") / "tiny"
    assert main(["quantize", str(model), "-o", str(out), "--method", "rtn"]) == 0
    return open_bundle(out)


@pytest.fixture(scope="module")
def local(bundle: Bundle) -> Iterator[Site]:
    with site(bundle, key=KEY, parallel=8, queue=400, context=600) as local:
        yield local


@pytest.fixture(scope="module")
def expected(bundle: Bundle) -> Callable[[str, int, Sampling], str]:
    session = CpuSession(bundle.config, bundle, max_context=600)
    tokenizer = bundle.tokenizer()

    def text(prompt: str, count: int, sampling: Sampling) -> str:
        session.reset()
        session.prefill(tokenizer.encode(prompt))
        tokens: list[int] = []
        for token in session.decode(count, sampling):
            if token in tokenizer.eos:
                break
            tokens.append(token)
        return tokenizer.decode(tokens)

    return text


Expected = Callable[[str, int, Sampling], str]


def test_openai_completes_a_text(local: Site, expected: Expected) -> None:
    options: dict[str, Any] = {"max_tokens": 20, "temperature": 1.5, "top_p": 0.9, "seed": 3}
    text = expected("the time", 20, Sampling(1.5, 0, 0.9, 3))
    whole = local.client.completions.create(model="tiny", prompt="the time", **options)
    assert whole.choices[0].text == text
    assert whole.usage is not None and whole.usage.completion_tokens <= 20
    pieces = list(
        local.client.completions.create(model="tiny", prompt="the time", stream=True, **options)
    )
    assert "".join(piece.choices[0].text for piece in pieces) == text
    assert pieces[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_openai_chats(local: Site, expected: Expected) -> None:
    messages: list[Any] = [{"role": "user", "content": [{"type": "text", "text": "the time"}]}]
    prompt = "<bos><start_of_turn>user\nthe time<end_of_turn>\n<start_of_turn>model\n"
    text = expected(prompt, 12, Sampling(1.0, seed=5))
    options: dict[str, Any] = {"max_completion_tokens": 12, "seed": 5, "messages": messages}
    whole = local.client.chat.completions.create(
        model="tiny", logprobs=True, top_logprobs=2, **options
    )
    assert whole.choices[0].message.content == text
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None and whole.usage is not None
    assert len(logprobs.content) == whole.usage.completion_tokens
    assert len(logprobs.content[0].top_logprobs) == 2
    usage = {"include_usage": True}
    *pieces, last = local.client.chat.completions.create(
        model="tiny", stream=True, stream_options=usage, **options
    )  # type: ignore[call-overload]
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == text
    assert last.choices == [] and last.usage.total_tokens == whole.usage.total_tokens


def test_several_prompts_and_answers(local: Site, expected: Expected) -> None:
    answer = local.client.completions.create(
        model="tiny", prompt=["the time", "the city"], n=2, seed=10, max_tokens=8, echo=True
    )
    texts = [choice.text for choice in answer.choices]
    assert texts == [
        prompt + expected(prompt, 8, Sampling(1.0, seed=seed))
        for prompt in ("the time", "the city")
        for seed in (10, 11)
    ]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]


def test_what_is_null_is_left_to_the_server(local: Site) -> None:
    """As clients write it that have a field for everything."""
    names = ("temperature", "top_p", "top_k", "n", "stream", "stop", "seed", "logprobs")
    body = dict.fromkeys((*names, "max_tokens"), None)
    messages = [{"role": "user", "content": "the time"}]
    for path, asked in (
        ("/v1/completions", {"prompt": "the time", "echo": None, "suffix": None}),
        ("/v1/chat/completions", {"messages": messages, "top_logprobs": None}),
        ("/v1/chat/completions", {"messages": messages, "stream_options": {"include_usage": None}}),
    ):
        status, _, answer = local.send("POST", path, body | asked)
        assert status == 200, answer


def test_token_ids_are_taken_as_they_are(local: Site, bundle: Bundle) -> None:
    tokens = bundle.tokenizer().encode("the time of the world", bos=False)
    body = {"prompt": tokens, "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0}
    status, _, answer = local.send("POST", "/v1/completions", body)
    assert status == 200
    found = answer["choices"][0]["logprobs"]
    assert len(found["tokens"]) == len(tokens) + 1 and found["token_logprobs"][0] is None
    assert "".join(found["tokens"][:-1]) == "the time of the world"
    assert found["text_offset"][1] == len(found["tokens"][0])
    session = CpuSession(bundle.config, bundle)
    logs = log_softmax(session.logits(session.score(np.array([tokens], np.int32))[0], 0, 512))
    picked = [logs[place, token] for place, token in enumerate(tokens[1:])]
    np.testing.assert_allclose(found["token_logprobs"][1:-1], picked, atol=1e-4)
    assert answer["usage"]["prompt_tokens"] == len(tokens)


@pytest.mark.parametrize("stream", [False, True])
def test_offsets_are_those_of_the_text(local: Site, stream: bool) -> None:
    """`<bos>` is no part of it, and the bytes of a character begin where it does."""
    prompt = "the été 世界 ☃ of time"
    asked: dict[str, Any] = {"max_tokens": 12, "echo": True, "logprobs": 0, "temperature": 0}
    answer: Any = local.client.completions.create(
        model="tiny", prompt=prompt, stream=stream, **asked
    )
    choices = [part.choices[0] for part in (answer if stream else [answer])]
    text = "".join(choice.text for choice in choices)
    tokens = [token for choice in choices for token in choice.logprobs.tokens]
    offsets = [offset for choice in choices for offset in choice.logprobs.text_offset]
    assert text.startswith(prompt) and tokens[0] == "<bos>" and offsets[0] == offsets[1] == 0
    whole = [at for at, token in enumerate(tokens) if not token.startswith(("bytes:", "<"))]
    assert len(whole) > 12
    for at in whole:
        assert text[offsets[at] : offsets[at] + len(tokens[at])] == tokens[at]
    assert offsets == sorted(offsets) and offsets[-1] <= len(text)


def test_cached_tokens_are_counted_once_for_a_prompt(local: Site) -> None:
    body = {"prompt": "the time of the world and the city " * 4, "n": 4, "max_tokens": 1}
    for _ in range(2):
        _, _, answer = local.send("POST", "/v1/completions", body)
    found = answer["usage"]
    assert 0 < found["prompt_tokens_details"]["cached_tokens"] < found["prompt_tokens"]


def test_what_cannot_fit_is_refused_before_it_is_taken_apart(
    local: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tokenizer, "encode", None)
    body = {"prompt": "the time " * 100_000}
    status, _, answer = local.send("POST", "/v1/completions", body)
    assert status == 400 and "context of 600" in answer["error"]["message"]
    status, _, answer = local.send("POST", "/v1/completions", {"prompt": [""] * 20_000, "n": 128})
    assert status == 400 and "2560000 answers" in answer["error"]["message"]


def test_no_request_of_many_is_dropped_or_mixed(local: Site, expected: Expected) -> None:
    """Far more than run at a time, from many threads, streamed and whole."""

    def ask(number: int) -> str:
        prompt, seed = f"the city number {number % 40}", number % 40
        body = {"prompt": prompt, "max_tokens": 1 + number % 7, "seed": seed}
        status, _, answer = local.send("POST", "/v1/completions", body)
        assert status == 200, answer
        return str(answer["choices"][0]["text"])

    with ThreadPoolExecutor(24) as pool:
        texts = list(pool.map(ask, range(280)))
    known: dict[tuple[int, int], str] = {}
    for number, text in enumerate(texts):
        case = (number % 40, 1 + number % 7)
        if case not in known:
            prompt, sampling = f"the city number {case[0]}", Sampling(1.0, seed=case[0])
            known[case] = expected(prompt, case[1], sampling)
        assert text == known[case]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_generation(bundle: Bundle, stream: bool) -> None:
    with site(bundle, parallel=2, context=100_000) as local:
        body = {"prompt": "the", "max_tokens": 90_000, "stream": stream, "temperature": 0}
        connection = http.client.HTTPConnection("127.0.0.1", local.port)
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        if stream:
            assert connection.getresponse().read(10)
        wait_for(lambda: local.metric("uq_running") == 1)
        connection.close()
        wait_for(lambda: local.metric("uq_running") == 0)
        assert local.metric("uq_generated_tokens_total") < 90_000


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_full_queue_is_503_with_the_time_to_come_back(bundle: Bundle) -> None:
    with site(bundle, parallel=1, queue=1, context=100_000) as local:
        body = {"prompt": "the", "max_tokens": 90_000, "temperature": 0}
        data = json.dumps({**body, "stream": True}).encode()
        with (
            local.request("POST", "/v1/completions", data) as first,
            local.request("POST", "/v1/completions", data),
        ):
            assert first.read(10)
            status, headers, answer = local.send("POST", "/v1/completions", body)
            assert (status, headers["retry-after"]) == (503, "1")
            assert answer["error"]["type"] == "server_error"
            with pytest.raises(openai.InternalServerError, match="1 of at most 1"):
                local.client.completions.create(model=bundle.name, prompt="x")
            for answers in ({"prompt": ["a"] * 3}, {"prompt": "a", "n": 3}):
                status, _, answer = local.send("POST", "/v1/completions", answers)
                assert status == 400 and "3 answers, more than 2" in answer["error"]["message"]


CHAT = [{"role": "user", "content": "x"}]


@pytest.mark.parametrize(
    ("path", "body", "status", "part"),
    [
        ("completions", b'{"prompt": "x"', 400, "body: invalid json"),
        ("completions", b"\xff", 400, "body"),
        ("completions", b"[" * 100_000, 400, "body"),
        ("completions", [], 400, "body"),
        ("completions", {}, 400, "prompt: field required"),
        ("completions", {"prompt": 5}, 400, "prompt"),
        ("completions", {"prompt": []}, 400, "prompt: no token"),
        ("completions", {"prompt": [[]]}, 400, "prompt: no token"),
        ("completions", {"prompt": [512]}, 400, "token 512 of 512"),
        ("completions", {"prompt": [-1]}, 400, "greater than or equal to 0"),
        ("completions", {"prompt": [True]}, 400, "prompt"),
        ("completions", {"prompt": "x", "temperature": -1}, 400, "temperature: input should"),
        ("completions", {"prompt": "x", "max_tokens": 700}, 400, "context of 600"),
        ("completions", {"prompt": "x " * 5000}, 400, "context of 600"),
        ("completions", {"prompt": "x", "logprobs": 21}, 400, "logprobs"),
        ("completions", {"prompt": "x", "best_of": 3}, 400, "best_of"),
        ("completions", {"prompt": "x", "suffix": "y"}, 400, "suffix"),
        ("completions", {"prompt": "x", "frequency_penalty": 1}, 400, "frequency_penalty"),
        ("completions", {"prompt": "x", "min_p": 0.1}, 400, "min_p: this server does not have"),
        ("completions", {"prompt": "x", "model": "gpt"}, 404, "model 'gpt' is not here"),
        ("chat/completions", {"messages": []}, 400, "messages"),
        ("chat/completions", {"messages": [{"role": "x", "content": ""}]}, 400, "messages.0.role"),
        ("chat/completions", {"messages": CHAT, "tools": [{}]}, 400, "tools"),
        ("chat/completions", {"messages": CHAT * 400}, 400, "context of 600"),
        ("nothing", {}, 404, "POST /v1/nothing: not found"),
        ("models", {}, 405, "method not allowed"),
    ],
)
def test_a_wrong_request_gets_the_right_status(
    local: Site, path: str, body: object, status: int, part: str
) -> None:
    found, _, answer = local.send("POST", f"/v1/{path}", body)
    assert (found, set(answer)) == (status, {"error"})
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert part in answer["error"]["message"] and len(answer["error"]["message"]) < 300


def test_openai_sees_its_own_errors(local: Site) -> None:
    with pytest.raises(openai.NotFoundError):
        local.client.completions.create(model="gpt", prompt="x")
    with pytest.raises(openai.BadRequestError, match="context"):
        local.client.completions.create(model="tiny", prompt="x", max_tokens=10_000)
    with pytest.raises(openai.AuthenticationError):
        local.client.with_options(api_key="other").models.list()


def test_models_are_listed(local: Site) -> None:
    assert [model.id for model in local.client.models.list()] == ["tiny"]
    assert local.client.models.retrieve("tiny").owned_by == "uq"
    with pytest.raises(openai.NotFoundError):
        local.client.models.retrieve("other")


def test_health_and_metrics(local: Site) -> None:
    assert local.send("GET", "/health", Authorization="")[2] == {"status": "ok"}
    before = local.metric("uq_generated_tokens_total")
    local.client.completions.create(model="tiny", prompt="the", max_tokens=3, temperature=0)
    wait_for(lambda: local.metric("uq_generated_tokens_total") > before)
    text = local.send("GET", "/metrics")[2]
    assert 'uq_requests_total{path="/v1/completions",status="200"}' in text
    assert local.send("GET", "/metrics", Authorization="")[0] == 401


def test_a_base_model_does_not_chat(bundle_parts: Callable[..., Any], tmp_path: Path) -> None:
    parts = bundle_parts()
    with BundleWriter(tmp_path / "base", len(parts.shards), {}) as writer:
        for index, entries in enumerate(parts.shards):
            writer.write_shard(index, entries)
        tokenizer = {"tokenizer.json": parts.assets["tokenizer.json"]}
        bundle = open_bundle(writer.finish(parts.manifest, tokenizer))
    with site(bundle) as local:
        status, _, answer = local.send("POST", "/v1/chat/completions", {"messages": CHAT})
        assert status == 400 and "base is a base model" in answer["error"]["message"]
        assert local.send("POST", "/v1/completions", {"prompt": "x", "max_tokens": 1})[0] == 200


def test_the_requests_of_the_documentation_are_answered(local: Site) -> None:
    page = (Path(__file__).parents[1] / "docs" / "serving.md").read_text()
    found = re.findall(r"^curl http://127\.0\.0\.1:8000(\S+)(?: .*-d '(.*)')?$", page, re.MULTILINE)
    assert len(found) == page.count("\ncurl ") == 4
    for path, body in found:
        status, _, _ = local.send("POST" if body else "GET", path, body.encode())
        assert status == 200


def test_lm_evaluation_harness_runs_against_it(
    local: Site, model: Path, bundle: Bundle, expected: Expected, tmp_path: Path
) -> None:
    url = f"http://127.0.0.1:{local.port}/v1/completions"
    arguments = f"base_url={url},model=tiny,tokenizer={model},add_bos_token=True,num_concurrent=2"
    argv = [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions"]
    argv += ["--model_args", arguments, "--tasks", "uq_choices,uq_words", "--include_path", "."]
    argv += ["--batch_size", "2", "--log_samples", "--output_path", str(tmp_path / "out")]
    caches = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": KEY}
    done = subprocess.run(
        argv, cwd=HARNESS, env=os.environ | caches, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    session, tokenizer = CpuSession(bundle.config, bundle), bundle.tokenizer()
    for sample in samples(tmp_path, "uq_choices"):
        for choice, (logprob, _) in zip(
            sample["doc"]["choices"], sample["filtered_resps"], strict=True
        ):
            text = sample["doc"]["text"]
            context, tokens = tokenizer.encode(text), tokenizer.encode(f"{text} {choice}")
            logits = session.logits(session.score(np.array([tokens], np.int32))[0], 0, 512)
            logs = log_softmax(logits)[np.arange(len(tokens) - 1), tokens[1:]]
            assert float(logprob) == pytest.approx(logs[len(context) - 1 :].sum(), abs=1e-3)
    for sample in samples(tmp_path, "uq_words"):
        text = expected(sample["doc"]["text"], 6, Sampling())
        assert sample["filtered_resps"] == [text.partition("e")[0]]


def samples(folder: Path, task: str) -> list[dict[str, Any]]:
    (file,) = (folder / "out").rglob(f"samples_{task}_*.jsonl")
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(found) == 6
    return found


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    rows = logits.astype(np.float64)
    logs: NDArray[np.float64] = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
    return logs
