"""Text <-> token ids, from the bytes of a tokenizer.json."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable
from typing import Any

import tokenizers
from tokenizers.models import BPE

from uq.errors import CheckpointError

MAX_STEPS, MAX_REPLACEMENT = 2, 8
BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class Tokenizer:
    """A byte-fallback BPE tokenizer of Gemma's kind.

    Attributes:
        inner: the tokenizer of the `tokenizers` library.
        bos: id put in front of a text. Gemma is useless without it.
        eos: ids that end a text or a turn.
        size: number of ids.
    """

    def __init__(self, inner: tokenizers.Tokenizer, bos: int, eos: tuple[int, ...]) -> None:
        self.inner = inner
        self._special = {
            index for index, token in inner.get_added_tokens_decoder().items() if token.special
        }
        self.bos = bos
        self.eos = eos
        self.size = inner.get_vocab_size(with_added_tokens=True)

    @classmethod
    def from_bytes(cls, data: bytes, bos: int, eos: tuple[int, ...]) -> Tokenizer:
        """Build from the content of a tokenizer.json.

        Raises:
            CheckpointError: not a tokenizer, not a BPE with byte fallback, or one that does more to
                the text in front of it than Gemma's do.
        """
        try:
            inner = tokenizers.Tokenizer.from_buffer(data)
        except BaseException as error:  # bare exceptions, and panics, which are none
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise CheckpointError(f"tokenizer.json: cannot be read: {_line(error)}") from error
        if not (isinstance(inner.model, BPE) and inner.model.byte_fallback):
            raise CheckpointError(
                f"tokenizer.json: {type(inner.model).__name__} model; expected the BPE model with "
                "byte fallback that Gemma has"
            )
        _require_plain(inner)
        # What text is made into is ours to say; a file may ask for a billion tokens of padding.
        inner.no_padding()
        inner.no_truncation()
        inner.post_processor = inner.decoder = None
        return cls(inner, bos, eos)

    @property
    def longest(self) -> int:
        """Bytes of text that a token stands for, at most."""
        return max(len(token.encode()) for token in self.inner.get_vocab(with_added_tokens=True))

    def encode(self, text: str, *, bos: bool = True, special: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
            bos: begin with `<bos>`, exactly once, even if the text spells it out.
            special: `<start_of_turn>` and the like in the text become their tokens; else they are
                text like any other, which is right for text that nobody vouches for.
        """
        self.inner.encode_special_tokens = not special
        # Lone surrogates (from undecodable bytes) have no UTF-8 form.
        clean = text.encode("utf-8", "replace").decode()
        ids: list[int] = self.inner.encode(clean, add_special_tokens=False).ids
        return [self.bos, *ids] if bos and ids[:1] != [self.bos] else ids

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Text of token ids, without special tokens unless asked for.

        Bytes that are not UTF-8 become U+FFFD.
        """
        stream = TokenStream(self, special=special)
        return "".join(map(stream.push, ids)) + stream.flush()

    def stream(self) -> TokenStream:
        """A decoder that takes tokens one at a time."""
        return TokenStream(self)

    def piece(self, index: int, *, special: bool = False) -> bytes:
        """UTF-8 bytes that a token stands for; none for a special token unless asked for."""
        token = self.inner.id_to_token(index)
        if token is None or (index in self._special and not special):
            return b""
        if byte := BYTE.fullmatch(token):
            return bytes([int(byte[1], 16)])
        return str(token).replace("▁", " ").encode()


def _require_plain(inner: tokenizers.Tokenizer) -> None:
    """Before the BPE, Gemma's tokenizers replace spaces and split at them.

    Other steps may blow a text up (each `Replace` can double it) or search it for hours.
    """
    steps = [
        *_steps(inner.normalizer, "normalizers"),
        *_steps(inner.pre_tokenizer, "pretokenizers"),
    ]
    for step in steps:
        pattern = step.get("pattern")
        literal = isinstance(pattern, dict) and bool(pattern.get("String"))
        replaced = step["type"] == "Replace" and len(step["content"]) <= MAX_REPLACEMENT
        if not (literal and (replaced or step["type"] == "Split")):
            raise CheckpointError(
                f"tokenizer.json: a step of type {step['type']} that Gemma's tokenizers do not have"
            )
    if sum(step["type"] == "Replace" for step in steps) > MAX_STEPS or len(steps) > 2 * MAX_STEPS:
        raise CheckpointError(f"tokenizer.json: {len(steps)} steps in front of the BPE model")


def _steps(component: Any, key: str) -> list[dict[str, Any]]:
    """The parts of a normalizer or pre-tokenizer, as the file describes them."""
    if component is None:
        return []
    state = json.loads(component.__getstate__())
    steps: list[dict[str, Any]] = state[key] if state["type"] == "Sequence" else [state]
    return steps


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


class TokenStream:
    """Turns tokens into text as they come; holds back bytes of an unfinished character."""

    def __init__(self, tokenizer: Tokenizer, *, special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._show_special = special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, index: int) -> str:
        """The text that this token completes; may be empty."""
        return self._decoder.decode(self._tokenizer.piece(index, special=self._show_special))

    def flush(self) -> str:
        """What is left at the end: U+FFFD if a character stayed unfinished."""
        return self._decoder.decode(b"", final=True)
