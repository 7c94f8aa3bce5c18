"""Scales of 8 bits: whole multiples, -127..127, of a float16 step of their row.

A step has at most four significant bits. Times a multiple of seven bits that makes eleven, as many
as a float16 holds, and no product lies below the smallest step: every scale is exactly a float16.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

STEP_BITS = 4  # significant ones of a step
MOST = 127  # the largest multiple
UNIT = 2.0**-24  # the smallest float16; all others are multiples
ODD = np.array([15, 13, 11, 9, 7, 5, 3, 1])  # odd numbers of four bits: they span all steps


def join_scales(steps: NDArray[np.float16], multiples: NDArray[np.int8]) -> NDArray[np.float16]:
    """Scales of steps and multiples; their shapes broadcast.

    A step of more bits than it may have makes the nearest float16.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # of broken files, as in scales themselves
        product = steps.astype(np.float32) * multiples.astype(np.float32)
        return product.astype(np.float16)


def split_scales(
    scales: NDArray[np.float16],
) -> tuple[NDArray[np.float16], NDArray[np.int8]]:
    """Steps (rows,) and multiples (rows, groups) of scales (rows, groups).

    The step is the largest that all scales of the row are multiples of, so that the same scales
    have the same bytes; 0 for a row of zeros.

    Raises:
        ValueError: the scales of a row are no such multiples.
    """
    if not np.isfinite(scales).all():
        raise ValueError("scales are not finite")
    units = (np.abs(scales).astype(np.float64) / UNIT).astype(np.int64)
    common = np.gcd.reduce(units, axis=1)  # (rows,)
    shift = common & -common  # the largest power of two in it
    odd = common // np.maximum(shift, 1)
    fits = odd[:, None] % ODD == 0  # (rows, odd numbers)
    steps = ODD[np.argmax(fits, axis=1)] * shift
    multiples = units // np.maximum(steps, 1)[:, None]
    if multiples.max(initial=0) > MOST:
        raise ValueError(f"scales of a row are no multiples up to {MOST} of one step")
    signed = np.where(np.signbit(scales), -multiples, multiples).astype(np.int8)
    return (steps * UNIT).astype(np.float16), signed


def round_scales(scales: NDArray[np.float16]) -> NDArray[np.float16]:
    """The nearest scales of 8 bits to (rows, groups) others, on steps of `row_steps`.

    In rows with one that is not finite all become NaN.
    """
    steps = row_steps(np.abs(scales).max(axis=1))[:, None]
    with np.errstate(over="ignore", invalid="ignore"):
        multiples = np.rint(scales / np.where(steps > 0, steps, 1))
        return (multiples * steps + 0.0).astype(np.float16)  # no zero is negative


def row_steps(largest: NDArray[np.float16]) -> NDArray[np.float64]:
    """The smallest step for each largest magnitude (rows,); 0 for 0, NaN where it is not finite."""
    finite = np.isfinite(largest)
    least = np.maximum(np.where(finite, largest, 0).astype(np.float64) / MOST, UNIT)
    _, exponent = np.frexp(least)  # of the bit in front of the first
    unit = np.maximum(np.ldexp(1.0, exponent - STEP_BITS), UNIT)
    steps = np.ceil(least / unit) * unit
    return np.where(finite, np.where(largest > 0, steps, 0.0), np.nan)
