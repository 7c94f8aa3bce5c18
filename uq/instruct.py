"""Whether a model was trained on chats, and the template that puts texts to it as chats."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from uq.errors import UsageError

if TYPE_CHECKING:
    from uq.formats.chat import Render
    from uq.formats.tokenizer import Tokenizer

FORMATS = ("auto", "plain", "chat")
# google/gemma-3-270m-it, gemma-2b-it.Q4_0.gguf, my-gemma-instruct
NAME = re.compile(r"(^|[-_.])(it|instruct|chat)([-_.]|$)", re.IGNORECASE)


@contextmanager
def chat_render(
    wanted: str, model: str, assets: Mapping[str, bytes], tokenizer: Callable[[], Tokenizer]
) -> Iterator[Render | None]:
    """The chat template by which texts are put to a model; None for plain text.

    Args:
        wanted: one of `FORMATS`; `auto` is `chat` for an instruction-tuned model.
        model: path or Hub id.
        assets: files of the model, as in `ChatTemplate.from_assets`.
        tokenizer: opens the model's tokenizer, which is asked only where the name says nothing.

    Raises:
        UsageError: `chat` is wanted and the model has no template.
        BundleError: its `tokenizer_config.json` is broken.
    """
    from uq.chat import ChatTemplate

    if wanted == "plain" or (wanted == "auto" and not instruction_tuned(model, assets, tokenizer)):
        yield None
        return
    with ChatTemplate.from_assets(assets) as template:
        yield partial(template.render, reply=False)


def instruction_tuned(
    model: str, assets: Mapping[str, bytes], tokenizer: Callable[[], Tokenizer]
) -> bool:
    """Whether it has a chat template and its name or its end tokens tell of turns."""
    from uq.chat import ChatTemplate

    try:
        ChatTemplate.from_assets(assets)
    except UsageError:
        return False
    if NAME.search(model.rstrip("/").rpartition("/")[2]):
        return True
    found = tokenizer()
    return any(b"turn" in found.piece(index, special=True) for index in found.eos)
