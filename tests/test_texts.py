"""The shipped texts: shares of the calibration mix, and nothing of it in the held-out texts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from uq.errors import UsageError
from uq.formats.checkpoint import open_checkpoint
from uq.formats.tokenizer import Tokenizer
from uq.quantize.text import MIX, Text, apportion, read_mix, read_text, token_sequences

ROOT = Path(__file__).parents[1]
HELD_OUT = [
    ROOT / "validate" / "evaluation.txt",
    *sorted((ROOT / "benchmarks/texts").glob("*.[tj]*")),
]
RUN = 64


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Callable[..., Path]) -> Tokenizer:
    return open_checkpoint(tiny_checkpoint()).tokenizer()


def shared_run(first: str, second: str, length: int = RUN) -> str | None:
    """A run of `length` characters that both texts have.

    Such a run of the second text covers a whole block of `length / 2` at a multiple of it.
    """
    half = length // 2
    blocks: dict[str, list[int]] = {}
    for at in range(0, len(second) - half + 1, half):
        blocks.setdefault(second[at : at + half], []).append(at)
    for at in range(len(first) - half + 1):
        for other in blocks.get(first[at : at + half], ()):
            for back in range(half + 1):
                run = first[max(at - back, 0) : at - back + length]
                if len(run) == length and run == second[other - back : other - back + length]:
                    return run
    return None


def words(text: str) -> str:
    """One space between words: neither indentation nor ruled lines count as shared text."""
    return " ".join(word for word in text.split() if any(map(str.isalnum, word)))


def test_a_shared_run_is_found_wherever_it_lies() -> None:
    run = "".join(map(chr, range(1000, 1064)))
    for before in range(70):
        assert shared_run(f"x{run}y", "z" * before + run + "w") == run
    assert shared_run(run[1:], run) is None


@pytest.mark.parametrize("path", HELD_OUT, ids=lambda path: path.name)
def test_no_held_out_text_is_calibrated_on(path: Path) -> None:
    held_out = words(path.read_text("utf-8"))
    assert len(held_out) > 50_000
    found = ((leaf.name, shared_run(words(leaf.content), held_out)) for leaf in mix().leaves())
    assert [(name, run) for name, run in found if run] == []


def mix() -> Text:
    return read_text(None)


def groups_drawn(tokenizer: Tokenizer, count: int) -> Counter[str]:
    """Windows of each group in a mix of four groups whose texts are told apart by one letter."""
    windows = token_sequences(tokenizer, lettered(), sequences=count, length=9)
    return Counter(tokenizer.decode(window.tolist()).strip()[0] for window in windows)


def lettered() -> Text:
    parts = zip("abcd", (4.0, 3.0, 2.0, 1.0), strict=True)
    return Text("m", parts=tuple(Text(f"{x}!", (x + " ") * 9000, share) for x, share in parts))


def test_every_number_of_windows_has_the_shares(tokenizer: Tokenizer) -> None:
    for count in (10, 37, 200):
        drawn = groups_drawn(tokenizer, count)
        for letter, share in zip("abcd", (0.4, 0.3, 0.2, 0.1), strict=True):
            assert abs(drawn[letter] - share * count) <= 1, (count, drawn)


def test_a_longer_draw_continues_a_shorter_one() -> None:
    order = apportion([5, 3, 1], [9, 9, 9], 20)
    assert order[:7] == apportion([5, 3, 1], [9, 9, 9], 7)


def test_sainte_lague_seats() -> None:
    """Seats of a textbook example (53, 24, 23 thousand votes, 7 seats): 3, 2, 2."""
    assert Counter(apportion([53, 24, 23], [7, 7, 7], 7)) == {0: 3, 1: 2, 2: 2}


def test_an_exhausted_text_leaves_its_share_to_the_others() -> None:
    assert Counter(apportion([9, 1], [2, 9], 8)) == {0: 2, 1: 6}


def test_a_seed_draws_the_same_texts_at_other_places(tokenizer: Tokenizer) -> None:
    letters = "".join(chr(97 + i * i % 26) for i in range(3000))
    text = Text("m", parts=(Text("a", letters, 2), Text("b", letters.upper(), 1)))

    def draw(seed: int | None) -> NDArray[np.int32]:
        return token_sequences(tokenizer, text, sequences=9, length=20, seed=seed)

    kinds = [[tokenizer.decode(w.tolist()).isupper() for w in draw(seed)] for seed in (None, 1)]
    assert kinds[0] == kinds[1] and sum(kinds[0]) == 3
    np.testing.assert_array_equal(draw(1), draw(1))
    assert len({draw(seed).tobytes() for seed in (None, 0, 1, 2)}) == 4


def test_the_default_mix_has_enough_windows(tokenizer: Tokenizer) -> None:
    assert len(token_sequences(tokenizer, mix(), sequences=1000, length=512)) == 1000


def test_every_file_of_the_mix_is_drawn_from() -> None:
    names = Counter(leaf.name for leaf in mix().leaves())
    files = [path.stem for path in MIX.parent.glob("*.*") if path.suffix in (".txt", ".jsonl")]
    assert names == Counter(files)


def test_the_hash_of_a_mix_covers_texts_and_shares(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    turns = [{"role": "user", "content": "two"}, {"role": "assistant", "content": "three"}]
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": turns}) + "\n")

    def sha256(shares: str, text: str = "one") -> str:
        (tmp_path / "a.txt").write_text(text)
        (tmp_path / "mix.toml").write_text(f"[g]\nshare = 1\ntexts = {{ {shares} }}\n")
        return read_mix(tmp_path / "mix.toml").sha256

    found = [sha256("a = 1, b = 2"), sha256("a = 2, b = 2"), sha256("a = 1, b = 2", "three")]
    assert len(set(found)) == 3 and sha256("a = 1, b = 2") == found[0]


def test_texts_are_clean() -> None:
    for name, text in texts():
        assert not {"\ufffd", "\r", "\0"} & set(text), name


def test_prose_repeats_no_paragraph() -> None:
    for group in mix().parts:
        for leaf in group.leaves() if group.name != "code" else ():
            lines = Counter(line for line in leaf.content.splitlines() if len(line) > 100)
            assert max(lines.values()) == 1, (leaf.name, lines.most_common(1))


def texts() -> Iterator[tuple[str, str]]:
    yield from ((leaf.name, leaf.content) for leaf in mix().leaves())
    yield from ((path.name, path.read_text("utf-8")) for path in HELD_OUT)


def test_a_mix_too_short_for_a_window_is_refused(tokenizer: Tokenizer) -> None:
    parts = (Text("a", "the time"), Text("b", "of the"))
    with pytest.raises(UsageError, match="m: 4 tokens are less than one .* of 512"):
        token_sequences(tokenizer, Text("m", parts=parts), sequences=4, length=512)
