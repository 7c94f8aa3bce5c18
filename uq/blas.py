"""How many cores matrix products take: BLAS has threads of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from threadpoolctl import ThreadpoolController


@contextmanager
def blas_threads(most: int | None) -> Iterator[None]:
    """BLAS with so many threads at most; None: with those it has, usually one per core.

    They wait for each other without letting go of their cores. Where other programs run on these,
    every product takes as long as the thread that waits longest for its turn.
    """
    found = ThreadpoolController().select(user_api="blas").lib_controllers
    before = [(library, library.num_threads) for library in found]
    larger = [(library, count) for library, count in before if most and count > most]
    for library, _ in larger:
        library.set_num_threads(most)
    try:
        yield
    finally:
        for library, count in larger:
            library.set_num_threads(count)
