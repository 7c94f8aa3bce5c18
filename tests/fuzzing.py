"""Valid files with random damage, and what a reader may do with them: give a value or a UqError of
one line, in little time, with memory in proportion to the file.
"""

from __future__ import annotations

import json
import random
import signal
import struct
import tracemalloc
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from uq.errors import UqError

INTERESTING = (0, 1, 2, 4, 7, 8, 0xFF, 0x100, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


@dataclass(frozen=True)
class Edit:
    """Damage at one place; place and value are reduced to what the file has."""

    kind: int
    place: int
    value: int


def damage(data: bytes, edits: Sequence[Edit]) -> bytes:
    damaged = bytearray(data)
    for edit in edits:
        if damaged:
            EDITS[edit.kind % len(EDITS)](damaged, edit.place % len(damaged), edit.value)
    return bytes(damaged)


def set_byte(data: bytearray, place: int, value: int) -> None:
    data[place] = value & 0xFF


def set_word(data: bytearray, place: int, value: int) -> None:
    data[place & ~3 : (place & ~3) + 4] = struct.pack("<I", value & 0xFFFFFFFF)


def set_interesting(data: bytearray, place: int, value: int) -> None:
    set_word(data, place, INTERESTING[value % len(INTERESTING)])


def add_to_word(data: bytearray, place: int, value: int) -> None:
    word = int.from_bytes(data[place & ~3 : (place & ~3) + 4], "little")
    set_word(data, place, word + value % 17 - 8)


def cut(data: bytearray, place: int, value: int) -> None:
    del data[place : place + 1 + value % 16]


def insert(data: bytearray, place: int, value: int) -> None:
    data[place:place] = bytes([value & 0xFF]) * (4 * (value >> 8 & 3) or 1)


def repeat(data: bytearray, place: int, value: int) -> None:
    data[place:place] = data[place : place + 1 + value % 64]


def truncate(data: bytearray, place: int, value: int) -> None:
    del data[place:]


EDITS = (set_byte, set_word, set_interesting, add_to_word, cut, insert, repeat, truncate)


# What JSON can hold and a reader might not expect.
VALUES: tuple[Any, ...] = (
    0, 1, -1, 3, 2**31, 2**63, 2**64, 10**18, 10**400, 0.5, -0.0, 1e-320, 1e308, float("inf"),
    float("nan"), True, False, None, "", "a", "\ud800", "../x", "/etc/passwd", "a\nb", "\0",
    "x" * 3000, "\U0001f600" * 300, [], {}, [0], [[]], {"a": {}}, [1] * 500, {"0": [1, 2]}, 12345,
)  # fmt: skip


def damage_json(data: bytes, edits: Sequence[Edit]) -> bytes:
    """The same document with other values, fewer or more of them, or other nesting.

    The document itself where it became too deep to be written.
    """
    document = json.loads(data)
    for edit in edits:
        places = list(nodes(document))
        if places:
            holder, key = places[edit.place % len(places)]
            JSON_EDITS[edit.kind % len(JSON_EDITS)](holder, key, edit.value)
    try:
        return json.dumps(document, separators=(",", ":")).encode()
    except RecursionError:
        return data


def nodes(value: Any) -> list[tuple[Any, Any]]:
    """Every place in a document: what holds it, and under which key."""
    found, waiting = [], [value]
    while waiting:
        holder = waiting.pop()
        keys = holder if isinstance(holder, dict) else range(len(holder))
        for key in keys:
            found.append((holder, key))
            if isinstance(holder[key], dict | list):
                waiting.append(holder[key])
    return found


def copied(value: Any) -> Any:
    """A copy, or the value itself where earlier edits nested it too deeply to be copied."""
    try:
        return deepcopy(value)
    except RecursionError:
        return value


def replace_value(holder: Any, key: Any, value: int) -> None:
    holder[key] = deepcopy(VALUES[value % len(VALUES)])


def remove_value(holder: Any, key: Any, value: int) -> None:
    del holder[key]


def nudge_value(holder: Any, key: Any, value: int) -> None:
    old = holder[key]
    holder[key] = old + value % 17 - 8 if isinstance(old, int | float) else value


def wrap_value(holder: Any, key: Any, value: int) -> None:
    holder[key] = [holder[key]] if value % 2 else {"x": holder[key]}


def nest_value(holder: Any, key: Any, value: int) -> None:
    depth = (1, 5, 90, 300)[value % 4]
    for _ in range(depth):
        holder[key] = [holder[key]]


def move_value(holder: Any, key: Any, value: int) -> None:
    """Another value of the same holder in its place."""
    keys = list(holder) if isinstance(holder, dict) else range(len(holder))
    holder[key] = copied(holder[keys[value % len(keys)]])


def multiply_value(holder: Any, key: Any, value: int) -> None:
    if isinstance(holder[key], list | str):
        holder[key] = holder[key] * (value % 9) if len(holder[key]) < 1000 else None


def add_value(holder: Any, key: Any, value: int) -> None:
    if isinstance(holder, dict):
        holder[f"{key}{value % 3}"] = copied(holder[key])
    else:
        holder.append(copied(holder[key]))


JSON_EDITS = (
    replace_value, replace_value, remove_value, nudge_value, wrap_value, nest_value, move_value,
    multiply_value, add_value,
)  # fmt: skip


@dataclass(frozen=True)
class Format:
    """Valid files and their reader.

    Attributes:
        mend: makes a damaged file look whole again: lengths, checksums.
        structured: damage that knows the structure; takes the place of bytes and mending.
    """

    samples: Sequence[bytes]
    read: Callable[[bytes], object]
    mend: Callable[[bytes], bytes] = bytes
    structured: Callable[[bytes, Sequence[Edit]], bytes] | None = None

    def damaged(self, sample: int, edits: Sequence[Edit], mend: bool) -> bytes:
        data = self.samples[sample % len(self.samples)]
        if mend and self.structured is not None:
            return self.structured(data, edits)
        return self.mend(damage(data, edits)) if mend else damage(data, edits)


def is_read(form: Format, data: bytes) -> bool:
    """Whether a file is read. Any error but a UqError of one line fails."""
    try:
        form.read(data)
    except UqError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < MESSAGE, f"a message of {len(str(error))} characters"
        return False
    return True


def accepts(form: Format, sample: int, edits: Sequence[Edit], mend: bool) -> bool:
    return is_read(form, form.damaged(sample, edits, mend))


edit_lists = st.lists(
    st.builds(Edit, st.integers(0, 8), st.integers(0, 1 << 16), st.integers(0, 0xFFFFFFFF)),
    max_size=4,
)

MESSAGE = 2000  # characters
SECONDS = 1.0  # of processor time for one input
PER_BYTE, CONSTANT = 4, 4 << 20  # what an input may take at its peak: so much of its size, and this


@dataclass
class Found:
    """What a fuzzing run found.

    Attributes:
        peak: bytes that an input took at most, and the size of that input.
    """

    read: int = 0
    refused: int = 0
    peak: tuple[int, int] = (0, 0)


def fuzz(form: Format, runs: int, seed: int) -> Found:
    """Read `runs` damaged files; raises AssertionError at the first that breaks a rule."""
    rng = random.Random(seed)
    found = Found()
    for sample in form.samples:
        is_read(form, sample)  # what is compiled and kept once does not count
    signal.signal(signal.SIGVTALRM, too_slow)
    tracemalloc.start()
    try:
        for _ in range(runs):
            edits = [
                Edit(rng.randrange(9), rng.getrandbits(16), rng.getrandbits(32))
                for _ in range(1 + rng.getrandbits(1) * rng.randrange(4))
            ]
            data = form.damaged(rng.getrandbits(3), edits, rng.random() < 0.75)
            watched(form, data, found)
    finally:
        tracemalloc.stop()
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    return found


def watched(form: Format, data: bytes, found: Found) -> None:
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    try:
        if is_read(form, data):
            found.read += 1
        else:
            found.refused += 1
    except BaseException as error:
        raise AssertionError(f"{error!r:.300} by {data!r:.3000}") from error
    peak = tracemalloc.get_traced_memory()[1] - before
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    assert peak <= PER_BYTE * len(data) + CONSTANT, f"{peak} bytes for {len(data)}: {data!r:.3000}"
    found.peak = max(found.peak, (peak, len(data)))


def too_slow(*_: object) -> None:
    raise AssertionError(f"an input took more than {SECONDS} s of processor time")
