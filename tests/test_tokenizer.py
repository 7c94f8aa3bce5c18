"""Tokenizer against llama.cpp (the real vocabulary) and transformers (the tiny one)."""

from __future__ import annotations

import json
import random
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from transformers import AutoTokenizer

from uq.errors import CheckpointError
from uq.formats.checkpoint import open_checkpoint
from uq.formats.checkpoint.compact import without_unused_merges
from uq.formats.checkpoint.merges import all_splits, concatenate, used_merges
from uq.formats.tokenizer import Tokenizer

TEXTS = [
    "",
    " ",
    "Hello world",
    " leading and trailing ",
    "   three   spaces   everywhere   ",
    *(" " * count for count in (2, 3, 16, 30, 31, 32, 33, 64, 100)),
    *("\n" * count for count in (1, 2, 3, 30, 31, 32, 33, 65)),
    *("\t" * count for count in (1, 2, 3, 30, 31, 32, 40)),
    "\n \n  \n\t\n \t \n",
    "a\r\nb\r\rc",
    "    def f(x):\n        return x  # four, then eight\n",
    "👍 👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇫🇷 ❤️ ☂",
    "今天天气很好。日本語のテキスト、カタカナ。한국어 문장입니다.",
    "مرحبا بالعالم، كيف حالك؟ שָׁלוֹם עוֹלָם नमस्ते दुनिया",
    "ภาษาไทยไม่มีช่องว่างระหว่างคำ",
    "0123456789 007 3.14159 1,000,000 ½ ² Ⅷ ٣",
    "\x00\x01\x02\x07\x1b[31m\x7f\x80\x9f",
    "\u200b\u200d\u2060\ufeff\u00ad\u00a0\u2003\u3000\u2028\u2029",
    "<bos>", "<eos>", "<pad>", "<unk>", "<mask>", "<unused42>", "[multimodal]",
    "<bos><bos> <bos>text<eos>",
    "<start_of_turn>user\nHi!<end_of_turn>\n<start_of_turn>model\n",
    "<start_of_turn", "start_of_turn>", "< start_of_turn >", "<<start_of_turn>>",
    "<table><tr><td>1</td></tr></table>", "<h1>Title</h1><br><p>text</p>", "</code></pre>",
    "▁", "▁▁", "▁▁▁▁", " ▁ ▁▁ ", "▁the▁word", "the▁",
    "<0x41>", "<0x0A><0xE2><0x96>", "<0xff>",
    "e\u0301 a\u0308\u0304 Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢L̠ͨͧͩ͘G̴̻͈͍͔̹̑͗̎̅͛́Ǫ̵̹̻̝̳͂̌̌͘!", "क्षि ཀྵ ង់",
    "\U0010ffff\ue000\uf8ff\u0378\U000e0041", "\ufffd\ufffe\uffff",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 𓀀 ﷽ ﬁ ǆ",
    "a" * 1000, "ab" * 300,
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamten" * 4,
    "----====____....!!!!????////\\\\\\\\", "'''\"\"\"```{{{}}}[[[]]](((",
    "https://example.org/a?b=c&d=%20#e",
    "The quick brown fox jumps over the lazy dog. " * 20,
]  # fmt: skip
PARTS = [
    " ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", "▁", "a", "ab", "the", " the", "The", "12", "7",
    "é", "e\u0301", "ß", "中文", "日本", "カ", "한국", "ไทย", "ที่", "مرحبا", "नमस्ते", "👩‍👩‍👧",
    "👍🏽", "\u200d", "\ufeff", "\u00a0", "\x01", "<", ">", "</", "<bos>", "<end_of_turn>", "<unk>",
    "<table>", "</td>", "<0x41>", "_", "...", "!!", "==", "\U0010ffff", "aaaa", "aaaaa", "ababab",
    "xxxx", "𝔘", "\\n", "’",
]  # fmt: skip
Post = Callable[[str, dict[str, Any]], Any]


def random_texts(vocabulary: list[str], count: int) -> Iterator[str]:
    """Pieces of trouble, tokens in random order, and random characters."""
    rng = random.Random(20)
    planes = [(1, 0x250), (0x300, 0x3000), (0x3000, 0xD7FF), (0xE000, 0x1FFFF)]
    for _ in range(count):
        yield "".join(rng.choice(PARTS) for _ in range(rng.randint(1, 14)))
        joined = "".join(rng.choice(vocabulary) for _ in range(rng.randint(1, 6)))
        yield joined.replace("▁", " ") if rng.random() < 0.7 else joined
        yield "".join(chr(rng.randint(*rng.choice(planes))) for _ in range(rng.randint(1, 20)))


@pytest.fixture(scope="module")
def real_tokenizer(real_gguf: Path) -> Tokenizer:
    return open_checkpoint(real_gguf).tokenizer()


@pytest.fixture(scope="module")
def llama_cpp(real_gguf: Path) -> Post:
    """The HTTP server of llama.cpp with the real vocabulary."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(real_gguf)
    params.n_ctx, params.n_batch, params.n_parallel, params.warmup = 64, 32, 1, False
    params.cpuparams.n_threads = 1
    server = xllamacpp.Server(params)

    def post(path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            f"{server.listening_address}/{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            return json.load(response)

    return post


@pytest.fixture(scope="module")
def texts(real_tokenizer: Tokenizer) -> list[str]:
    vocabulary = sorted(real_tokenizer.inner.get_vocab())
    return [*TEXTS, *random_texts(vocabulary, 500)]


@pytest.mark.real
@pytest.mark.parametrize("special", [True, False])
def test_ids_are_those_of_llama_cpp(
    real_tokenizer: Tokenizer, llama_cpp: Post, texts: list[str], special: bool
) -> None:
    for text in texts:
        if "</s>" in text and not special:
            continue  # user-defined in the file; llama.cpp takes it for an end-of-text token
        body = {"content": text, "add_special": True, "parse_special": special}
        expected = llama_cpp("tokenize", body)["tokens"]
        if special and expected[:2] == [2, 2]:
            expected = expected[1:]  # llama.cpp warns of a second <bos>, we never add one
        assert real_tokenizer.encode(text, special=special) == expected, repr(text)


@pytest.mark.real
def test_text_is_that_of_llama_cpp(
    real_tokenizer: Tokenizer, llama_cpp: Post, texts: list[str]
) -> None:
    for text in texts:
        if "\x00" in text:
            continue  # llama.cpp's JSON ends there
        ids = real_tokenizer.encode(text, bos=False)
        expected = llama_cpp("detokenize", {"tokens": ids})["content"]
        assert real_tokenizer.decode(ids, special=True) == expected, repr(text)


@pytest.mark.real
def test_text_comes_back(real_tokenizer: Tokenizer, texts: list[str]) -> None:
    for text in texts:
        if "<0x" in text:
            continue  # spelled-out bytes come back as bytes
        ids = real_tokenizer.encode(text, special=False)
        assert real_tokenizer.decode(ids) == text.replace("▁", " "), repr(text)


@pytest.mark.real
def test_rebuilt_vocabulary_has_one_merge_per_token(real_tokenizer: Tokenizer) -> None:
    model = json.loads(real_tokenizer.inner.to_str())["model"]
    results = ["".join(merge) for merge in model["merges"]]
    assert len(results) == len(set(results)) == 236_245  # 4 more are never reached
    assert all(token in model["vocab"] for token in results)


def plain_merge(best: dict[tuple[str, str], int], token: str) -> tuple[str, str] | None:
    """The merge that completes a token encoded alone, by merging Python strings."""
    symbols, last = list(token), None
    while pairs := list(zip(symbols, symbols[1:], strict=False)):
        ranked = [(best[pair], at) for at, pair in enumerate(pairs) if pair in best]
        if not ranked:
            return None
        at = min(ranked)[1]
        symbols[at : at + 2] = ["".join(pairs[at])]
        last = pairs[at]
    return last


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_used_merges_agree_with_plain_merging(seed: int, ties: bool) -> None:
    rng = random.Random(seed)
    tokens = sorted({"".join(rng.choices("abé中", k=rng.randint(1, 6))) for _ in range(400)})
    data, offsets = concatenate([token.encode() for token in tokens])
    left, right, result = all_splits(data, offsets)
    pairs = [(tokens[a], tokens[b]) for a, b in zip(left, right, strict=True)]
    assert pairs == [
        (token[:at], token[at:])
        for token in tokens
        for at in range(1, len(token))
        if token[:at] in tokens and token[at:] in tokens
    ]
    ranks = rng.choices(range(50), k=len(pairs)) if ties else rng.sample(range(9999), len(pairs))
    used = used_merges(data, offsets, left, right, result, np.array(ranks, np.int32))
    best = dict(zip(pairs, ranks, strict=True))
    assert {pairs[index] for index in np.flatnonzero(used)} == {
        merge for token in tokens if (merge := plain_merge(best, token))
    }
    assert 50 < used.sum() < len(pairs)


def shuffled_tokenizer(seed: int) -> bytes:
    """A tokenizer.json with every possible merge of a random vocabulary, in random order."""
    rng = random.Random(seed)
    pieces = {"".join(rng.choices("abé中", k=rng.randint(1, 6))) for _ in range(400)}
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(pieces | {*"abé中"})]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [
        (piece[:at], piece[at:])
        for piece in sorted(pieces)
        for at in range(1, len(piece))
        if piece[:at] in vocab and piece[at:] in vocab
    ]
    rng.shuffle(merges)
    model = tokenizers.models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>")
    return tokenizers.Tokenizer(model).to_str().encode()


@pytest.mark.parametrize("seed", range(3))
def test_tokenizer_without_unused_merges_gives_the_same_ids(seed: int) -> None:
    full = shuffled_tokenizer(seed)
    compact = without_unused_merges(full)
    assert len(compact) < 0.9 * len(full)
    before, after = (Tokenizer.from_bytes(data, 0, (0,)) for data in (full, compact))
    rng = random.Random(seed)
    for _ in range(1000):
        text = "".join(rng.choices("aabbé中☂", k=rng.randint(1, 40)))
        assert after.encode(text) == before.encode(text), text


@pytest.mark.parametrize(
    "data", [b"nonsense", b"[]", b'{"model": {}}', b'{"model": {"vocab": {}, "merges": ["a b"]}}']
)
def test_tokenizer_that_is_not_understood_is_left_alone(data: bytes) -> None:
    assert without_unused_merges(data) == data


def test_tokenizer_with_dropout_is_left_alone() -> None:
    document = json.loads(shuffled_tokenizer(0))
    document["model"]["dropout"] = 0.1
    data = json.dumps(document).encode()
    assert without_unused_merges(data) == data


def test_merges_written_as_strings_are_understood() -> None:
    document = json.loads(shuffled_tokenizer(0))
    expected = without_unused_merges(json.dumps(document).encode())
    document["model"]["merges"] = [" ".join(pair) for pair in document["model"]["merges"]]
    assert without_unused_merges(json.dumps(document).encode()) == expected


# The tiny vocabulary.


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint()


@pytest.fixture(scope="module")
def tiny(folder: Path) -> Tokenizer:
    return open_checkpoint(folder).tokenizer()


def test_ids_are_those_of_transformers(tiny: Tokenizer, folder: Path) -> None:
    oracle = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        if text == "<mask>":
            continue  # not in the tiny vocabulary; transformers appends it
        expected = oracle(text).input_ids
        assert tiny.encode(text) == (expected[1:] if expected[:2] == [2, 2] else expected)


def test_bos_is_added_exactly_once(tiny: Tokenizer) -> None:
    assert [tiny.encode(text).count(2) for text in ("", "the", "<bos>the")] == [1, 1, 1]


def test_bos_can_be_left_away(tiny: Tokenizer) -> None:
    assert tiny.encode("the", bos=False) == tiny.encode("the")[1:]


def test_special_text_is_plain_text_on_request(tiny: Tokenizer) -> None:
    text = "<start_of_turn>user<end_of_turn>"
    assert {4, 5} <= set(tiny.encode(text))
    plain = tiny.encode(text, bos=False, special=False)
    assert not {4, 5} & set(plain)
    assert tiny.decode(plain) == text


def test_special_tokens_are_not_printed_unless_asked_for(tiny: Tokenizer) -> None:
    ids = tiny.encode("<start_of_turn>the")
    assert tiny.decode(ids) == "the"
    assert tiny.decode(ids, special=True) == "<bos><start_of_turn>the"


def test_ids_outside_of_the_vocabulary_print_nothing(tiny: Tokenizer) -> None:
    assert tiny.decode([tiny.size + 1000]) == ""


def test_lone_surrogates_do_not_stop_the_encoder(tiny: Tokenizer) -> None:
    assert tiny.decode(tiny.encode("a\udcffb")) == "a?b"


def test_stream_prints_whole_characters_only(tiny: Tokenizer) -> None:
    stream = tiny.stream()
    parts = [stream.push(token) for token in tiny.encode("a☂b", bos=False)]
    assert parts == ["a", "", "", "☂", "b"]
    assert stream.flush() == ""


def test_stream_of_every_text_is_the_decoded_text(tiny: Tokenizer) -> None:
    for text in TEXTS:
        ids, stream = tiny.encode(text), tiny.stream()
        assert "".join(map(stream.push, ids)) + stream.flush() == tiny.decode(ids)


def test_broken_bytes_become_replacement_characters(tiny: Tokenizer) -> None:
    cut = tiny.encode("☂", bos=False)[:2]
    letter = tiny.encode("a", bos=False)
    assert tiny.decode([*cut, *letter]) == "\ufffda"
    assert tiny.decode(cut) == "\ufffd"


def test_end_tokens_come_from_both_configs(tiny: Tokenizer) -> None:
    assert (tiny.bos, tiny.eos, tiny.size) == (2, (1, 5), 512)


@pytest.mark.parametrize("data", [b"", b"{}", b"not json", b'{"model": 3}'])
def test_broken_tokenizer_is_refused(data: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: cannot be read: "):
        Tokenizer.from_bytes(data, 2, (1,))


def test_tokenizer_of_another_kind_is_refused() -> None:
    other = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(CheckpointError, match="WordLevel model; expected the BPE model"):
        Tokenizer.from_bytes(other.to_str().encode(), 2, (1,))
