"""Texts put to a model as chats: for calibration and for validation."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from uq.errors import UsageError
from uq.formats.chat import REQUEST, Message, Render, continuation, plain, read_conversations
from uq.formats.checkpoint import open_checkpoint
from uq.formats.tokenizer import Tokenizer
from uq.instruct import chat_render, instruction_tuned
from uq.quantize.text import Text, read_text, text_notes, token_sequences
from uq.validate.text import EvaluationText, text_warnings, windows

TURN = re.compile(r"<start_of_turn>(user|model)\n(.*?)(?=<end_of_turn>|$)", re.DOTALL)
LINES = "".join(
    json.dumps({"messages": [{"role": "user", "content": f"the city {i}"},
                             {"role": "assistant", "content": f"of the world {i} " * 4}]}) + "\n"
    for i in range(40)
)  # fmt: skip
STORY = "The city of the world had been the first of two, and after that time not one other. " * 30


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint()


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return open_checkpoint(folder).tokenizer()


@pytest.fixture(scope="module")
def render(folder: Path, tokenizer: Tokenizer) -> Iterator[Render]:
    assets = open_checkpoint(folder).assets()
    with chat_render("chat", "tiny", assets, lambda: tokenizer) as found:
        assert found is not None
        yield found


def gemma(messages: Sequence[Message]) -> str:
    """Gemma's template by hand."""
    names = {"user": "user", "assistant": "model"}
    turns = (
        f"<start_of_turn>{names[m['role']]}\n{m['content'].strip()}<end_of_turn>\n"
        for m in messages
    )
    return "<bos>" + "".join(turns)


def turns_of(tokenizer: Tokenizer, window: Sequence[int]) -> list[tuple[str, str]]:
    return TURN.findall(tokenizer.decode(window, special=True))


def test_a_text_is_continued_by_the_model(tokenizer: Tokenizer, render: Render) -> None:
    found = token_sequences(tokenizer, Text("story", STORY), sequences=3, length=64, render=render)
    assert found.shape == (3, 64) and found.dtype == np.int32
    for window in found:
        tokens = window.tolist()
        assert tokens[0] == tokenizer.bos and tokenizer.bos not in tokens[1:]
        (user, shown), (model, answer) = turns_of(tokenizer, tokens)
        assert (user, model) == ("user", "model") and shown.startswith(REQUEST.strip())
        assert answer and answer.split()[0] in STORY


def test_windows_are_what_the_template_writes(tokenizer: Tokenizer, render: Render) -> None:
    text = Text("talks", plain(read_conversations("x", LINES)), conversations=talks())
    found = token_sequences(tokenizer, text, sequences=1, length=100, render=render)
    count = len(tokenizer.encode(text.content, bos=False))
    first = (count - 99) // 2 * 40 // count  # of 40 conversations; the window lies in the middle
    messages = [message for conversation in talks()[first:] for message in conversation]
    assert found[0].tolist() == tokenizer.encode(gemma(messages))[:100]


def talks() -> tuple[tuple[Message, ...], ...]:
    return read_conversations("x", LINES)


def test_evaluated_conversations_are_used_once(tokenizer: Tokenizer, render: Render) -> None:
    text = EvaluationText("talks", plain(talks()), talks())
    found = windows(tokenizer, text, 96, None, render)
    assert len(found) > 3
    whole = [turn for window in found for turn in turns_of(tokenizer, window.tolist())[:-1]]
    asked = [shown for who, shown in whole if who == "user"]
    assert len(asked) == len(set(asked))
    np.testing.assert_array_equal(found[0], tokenizer.encode(gemma(sum(talks(), ())))[:96])
    np.testing.assert_array_equal(windows(tokenizer, text, 96, 2, render), found[:2])


def test_an_evaluated_text_is_continued(tokenizer: Tokenizer, render: Render) -> None:
    text = EvaluationText("story", STORY)
    found = windows(tokenizer, text, 64, None, render)
    assert found.shape == windows(tokenizer, text, 64, None, None).shape
    assert all(len(turns_of(tokenizer, window.tolist())) == 2 for window in found)


def test_conversations_too_few_for_a_window_are_refused(
    tokenizer: Tokenizer, render: Render
) -> None:
    text = EvaluationText("talks", plain(talks()), talks()[:1])
    with pytest.raises(UsageError, match="less than the 512 tokens of a window"):
        windows(tokenizer, text, 512, None, render)


def test_a_continuation_loses_nothing() -> None:
    user, assistant = continuation("one two three four five six")
    assert user["content"] == REQUEST + "one two three"
    assert assistant["content"] == "four five six"
    user, assistant = continuation("無空格的文字也可以")
    assert user["content"] + assistant["content"] == REQUEST + "無空格的文字也可以"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("hello", "x: line 1: no JSON object"),
        ("[]", "no JSON object with `messages`"),
        ('{"messages": 3}', "no JSON object with `messages`"),
        ('{"messages": [{"role": "user"}]}', "no JSON object with `messages`"),
        ('{"messages": []}', "do not take turns"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "do not take turns"),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": 1}]}',
            "content is no string",
        ),
    ],
)
def test_lines_that_are_no_conversation_are_refused(line: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_conversations("x", line)


def test_a_system_message_is_left_out() -> None:
    said = [("system", "be brief"), ("user", "a"), ("assistant", "b")]
    messages = [{"role": role, "content": content} for role, content in said]
    (conversation,) = read_conversations("x", json.dumps({"messages": messages}))
    assert [message["content"] for message in conversation] == ["a", "b"]


def test_a_file_of_conversations_is_read_as_such(tmp_path: Path) -> None:
    (tmp_path / "talks.jsonl").write_text(LINES)
    text = read_text(str(tmp_path / "talks.jsonl"))
    assert text.conversations == talks() and text.content == plain(talks())


@pytest.mark.parametrize(
    ("name", "end", "tuned"),
    [
        ("google/gemma-3-1b-it", 1, True),
        ("/models/gemma-2b-it-Q4_0.gguf", 1, True),
        ("my-gemma-Instruct/", 1, True),
        ("google/gemma-3-1b-pt", 1, False),
        ("italian-gemma", 1, False),
        ("my-own", 5, True),
    ],
)
def test_an_instruction_tuned_model_is_told_by_name_or_end(
    name: str, end: int, tuned: bool, tokenizer: Tokenizer
) -> None:
    assets = {"chat_template.jinja": b"{{ messages }}"}
    model = Tokenizer(tokenizer.inner, tokenizer.bos, (1, end))
    assert instruction_tuned(name, assets, lambda: model) is tuned
    assert not instruction_tuned(name, {}, lambda: model)


def test_a_chat_without_a_template_is_refused(tokenizer: Tokenizer) -> None:
    with (
        pytest.raises(UsageError, match="no chat template"),
        chat_render("chat", "m", {}, lambda: tokenizer),
    ):
        pass


def test_plain_is_plain(tokenizer: Tokenizer) -> None:
    assets = {"chat_template.jinja": b"x"}
    with chat_render("plain", "gemma-it", assets, lambda: tokenizer) as render:
        assert render is None


def test_strange_calibration_texts_are_noted(tokenizer: Tokenizer) -> None:
    def notes(content: str, sequences: int = 2) -> str:
        text = Text("t", content)
        found = token_sequences(tokenizer, text, sequences=sequences, length=100)
        return " ".join(text_notes(tokenizer, text, found, sequences))

    story = read_text(None).parts[0].parts[0].content
    assert notes(story) == ""
    assert "has 2 sequences of 100 tokens; 9 were wanted" in notes(STORY[:1000], 9)
    assert "repeats itself: " in notes("the time of the world " * 100)
    assert "characters per token" in notes("".join(map(chr, range(0x3400, 0x3800))))


def test_strange_perplexities_are_noted() -> None:
    assert text_warnings(12.0) == ()
    assert "improbable (perplexity 5000)" in text_warnings(5000.0)[0]
    assert "knows every next word" in text_warnings(1.01)[0]
