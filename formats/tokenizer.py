"""Text <-> token ids, from the bytes of a tokenizer.json."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable

import tokenizers
from tokenizers.models import BPE

from uq.errors import CheckpointError

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
            CheckpointError: not a tokenizer, or not a BPE with byte fallback.
        """
        try:
            inner = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:  # the library raises bare exceptions
            raise CheckpointError(f"tokenizer.json: cannot be read: {error}") from error
        if not (isinstance(inner.model, BPE) and inner.model.byte_fallback):
            raise CheckpointError(
                f"tokenizer.json: {type(inner.model).__name__} model; expected the BPE model with "
                "byte fallback that Gemma has"
            )
        return cls(inner, bos, eos)

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
