"""A chat gives the answers that its whole text would get, and computes no token twice."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path

import pytest

from uq.chat import ChatTemplate
from uq.cli import main
from uq.conversation import Conversation
from uq.errors import UsageError
from uq.formats.bundle import Bundle, open_bundle
from uq.kernels.backends import open_session
from uq.kernels.cpu.session import CpuSession
from uq.kernels.session import Sampling

# In short, the template of the tiny models.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{{ '<start_of_turn>model\\n' }}"
)
SAMPLING = Sampling(temperature=1.0, seed=3)


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Callable[..., Path]) -> Bundle:
    return open_bundle(tiny_bundle())


@pytest.fixture(scope="module")
def template(bundle: Bundle) -> Iterator[ChatTemplate]:
    with ChatTemplate.of(bundle) as template:
        yield template


@pytest.fixture(scope="module")
def verbatim() -> Iterator[ChatTemplate]:
    """Writes an answer as it was said, blanks included."""
    with ChatTemplate(CHAT_TEMPLATE.replace(" | trim", ""), {"bos_token": "<bos>"}) as template:
        yield template


class Recorder(CpuSession):
    """Keeps a list of the tokens that its KV cache holds."""

    def reset(self) -> None:
        super().reset()
        self.tokens: list[int] = []

    def prefill(self, tokens: Sequence[int]) -> None:
        super().prefill(tokens)
        self.tokens.extend(tokens)


Begin = Callable[..., Conversation]


@pytest.fixture
def begin(bundle: Bundle, template: ChatTemplate) -> Begin:
    def conversation(
        context: int = 400, max_tokens: int = 12, system: str | None = None
    ) -> Conversation:
        return Conversation(
            open_session(bundle, "cpu", max_context=context),
            bundle.tokenizer(),
            template,
            sampling=SAMPLING,
            max_tokens=max_tokens,
            system=system,
        )

    return conversation


def never() -> bool:
    return False


def after(looks: int) -> Callable[[], bool]:
    """Stops at look number `looks`, the first being 0."""
    numbers = count()
    return lambda: next(numbers) >= looks


def ignore(text: str) -> None: ...


@pytest.mark.parametrize("stopped", [never, after(5)], ids=["whole answers", "a stopped answer"])
def test_only_new_tokens_are_computed(
    verbatim: ChatTemplate, bundle: Bundle, stopped: Callable[[], bool]
) -> None:
    session, tokenizer = Recorder(bundle.config, bundle, max_context=400), bundle.tokenizer()
    chat = Conversation(session, tokenizer, verbatim, sampling=SAMPLING, max_tokens=12)
    chat.ask("the time", ignore, stopped)
    before = len(session.tokens)
    history = list(chat.messages)
    turn = chat.ask("the city", ignore, never)

    asked = session.tokens[: before + turn.prefill.tokens]
    prompt = verbatim.render([*history, {"role": "user", "content": "the city"}])
    assert tokenizer.decode(asked, special=True) == prompt
    # The oracle computes everything in one go; its random numbers go by position, as ours do.
    oracle = open_session(bundle, "cpu", max_context=400)
    oracle.prefill(asked)
    answer = list(oracle.decode(turn.decode.tokens, SAMPLING))
    assert session.tokens == asked + answer


def test_a_template_that_trims_answers_costs_nothing(begin: Begin) -> None:
    chat = begin()
    first = chat.ask("the time " * 20, ignore, never)
    assert chat.messages[-1]["content"] != chat.messages[-1]["content"].strip()
    assert chat.ask("the city", ignore, never).prefill.tokens < first.prefill.tokens


def test_a_stopped_answer_is_kept_as_far_as_it_came(begin: Begin) -> None:
    chat = begin()
    said: list[str] = []
    turn = chat.ask("the time", said.append, after(4))
    assert turn.ended == "interrupted" and turn.decode.tokens == 4
    assert chat.messages[-1] == {"role": "assistant", "content": "".join(said)}


def test_a_message_stopped_before_its_answer_leaves_no_trace(begin: Begin) -> None:
    chat, fresh = begin(), begin()
    chat.ask("one", ignore, never)
    history = list(chat.messages)
    assert chat.ask("two", ignore, after(0)).ended == "interrupted"
    assert chat.messages == history
    fresh.ask("one", ignore, never)
    chat.ask("three", ignore, never)
    fresh.ask("three", ignore, never)
    assert chat.messages == fresh.messages


def test_a_full_context_forgets_the_oldest(begin: Begin) -> None:
    chat = begin(context=160, max_tokens=20)
    turns = [chat.ask(f"the city number {number}", ignore, never) for number in range(8)]
    assert turns[0].forgotten == 0
    assert sum(turn.forgotten for turn in turns) > 0
    assert chat.messages[-2] == {"role": "user", "content": "the city number 7"}
    assert 2 <= len(chat.messages) < 16


def test_an_answer_ends_with_the_context(begin: Begin) -> None:
    chat = begin(context=40, max_tokens=1000)
    turn = chat.ask("x", ignore, never)
    assert turn.ended in ("context", "stop")
    assert turn.prefill.tokens + turn.decode.tokens <= 40


def test_a_message_longer_than_the_context_is_refused(begin: Begin) -> None:
    chat = begin(context=100)
    chat.ask("one", ignore, never)
    history = list(chat.messages)
    with pytest.raises(UsageError, match="the context has 100; send less"):
        chat.ask("world " * 200, ignore, never)
    assert chat.messages == history
    assert chat.ask("two", ignore, never).ended in ("stop", "length")


def test_reset_forgets(begin: Begin) -> None:
    chat = begin()
    chat.ask("one", ignore, never)
    first = list(chat.messages)
    chat.reset()
    assert chat.messages == []
    chat.ask("one", ignore, never)
    assert chat.messages == first


def test_chat_answers_every_line_of_a_pipe(
    bundle: Bundle, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "the time\n\n/what\n/reset\nthe time\n" + "world " * 5000 + "\n/exit\nnever read\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert main(["chat", str(bundle.path), "--max-tokens", "6", "--seed", "2"]) == 0
    out, err = capsys.readouterr()
    first, again = out[: len(out) // 2], out[len(out) // 2 :]
    assert first == again != ""
    assert "/what is not known" in err and "(forgotten)" in err
    assert "uq: the message needs" in err
    assert err.count("tokens/s") == 4


def test_ctrl_c_stops_the_answer_and_not_the_program(
    bundle: Bundle, interruptible: list[str]
) -> None:
    argv = [*interruptible, "chat", str(bundle.path), "--context", "100000", "--max-tokens"]
    with subprocess.Popen(
        [*argv, "90000"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write(b"the time\n")
        process.stdin.flush()
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        process.stdin.write(b"/exit\n")
        process.stdin.flush()
        assert b"stopped; " in process.stderr.read()
        process.stdout.read()
    assert process.returncode == 0


def test_a_template_of_ones_own(
    bundle: Bundle,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "own").write_text("{{ raise_exception('as I am told') }}")
    monkeypatch.setattr(sys, "stdin", io.StringIO("the time\n"))
    assert main(["chat", str(bundle.path), "--template", str(tmp_path / "own")]) == 1
    assert "uq: chat template: TemplateError: as I am told" in capsys.readouterr().err
    assert main(["chat", str(bundle.path), "--template", str(tmp_path / "none")]) == 2
    assert "--template" in capsys.readouterr().err
