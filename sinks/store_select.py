"""What a key such as ``[5, :, 10:20]`` selects from a store: NumPy's indexing, resolved before anything is read."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Selection:
    """Which flows, in which order, and which part of each."""

    numbers: Sequence[int]  # of flows, from 0; may repeat
    single: bool  # one flow by number: the result has no axis of flows
    inside: tuple[int | slice, ...]  # what is taken of each flow, one entry per axis
    inner_shape: tuple[int, ...]  # of what is taken of each flow
    whole: bool  # whether that is each whole flow


def select(key: Any, shape: tuple[int, ...]) -> Selection:
    """Interprets a key as NumPy does for an array of ``shape``, whose first axis counts flows.

    Every axis takes numbers, slices and ``...``; the first one also takes lists, integer arrays and boolean masks.

    Raises:
        IndexError: out of range, too many entries, or a mask of another length.
        TypeError: anything else, including ``None`` and booleans as numbers.
    """
    first, *others = _one_an_axis(key if isinstance(key, tuple) else (key,), len(shape))
    inside = tuple(other if isinstance(other, slice) else _inside(other) for other in others)
    # NumPy itself checks the rest, on a broadcast array that has the shape but takes no memory.
    inner_shape = np.broadcast_to(np.int8(0), shape)[(slice(None), *inside)].shape[1:]
    all_of_it = [slice(0, size, 1) for size in shape[1:]]
    whole = all_of_it == [
        slice(*part.indices(size)) if isinstance(part, slice) else part
        for part, size in zip(inside, shape[1:], strict=True)
    ]
    if isinstance(first, slice):
        return Selection(range(*first.indices(shape[0])), False, inside, inner_shape, whole)
    if getattr(first, "ndim", 0) or (isinstance(first, Sequence) and not isinstance(first, str | bytes)):
        return Selection(_listed(first, shape[0]), False, inside, inner_shape, whole)
    return Selection([_position(first, shape[0])], True, inside, inner_shape, whole)


def _one_an_axis(parts: tuple[Any, ...], axes: int) -> list[Any]:
    """The entries of a key, one per axis: ``...`` and omitted trailing axes become full slices."""
    dots = [place for place, part in enumerate(parts) if isinstance(part, EllipsisType)]
    if len(dots) > 1:
        raise IndexError("an index has at most one '...'")
    place = dots[0] if dots else len(parts)
    missing = axes - len(parts) + len(dots)  # negative: too many, which NumPy refuses
    return [*parts[:place], *[slice(None)] * missing, *parts[place + 1 :]]


def _inside(key: Any) -> int:
    try:
        return _whole(key)
    except TypeError as error:
        raise TypeError(
            f"of each flow an index takes numbers, slices and '...', got {key!r}: pick the rest from what that gives"
        ) from error


def _listed(key: Any, count: int) -> list[int]:
    """The flows that a list, an array of integers or a mask selects."""
    if not isinstance(key, Sequence):
        key = np.asarray(key)
        if key.ndim != 1 or key.dtype.kind not in "iub":
            raise TypeError(f"an index array is 1-D, of integers or truth values, got {key.ndim}-D {key.dtype}")
        is_mask, key = key.dtype.kind == "b", key.tolist()
    else:
        is_mask = len(key) > 0 and all(isinstance(part, bool | np.bool_) for part in key)
    if is_mask:
        if len(key) != count:
            raise IndexError(f"a mask of {len(key)} truth values for {count} flows")
        return [number for number, wanted in enumerate(key) if wanted]
    return [_position(part, count) for part in key]


def _position(key: Any, count: int) -> int:
    number = _whole(key)
    if not -count <= number < count:
        raise IndexError(f"flow {number} of {count}")
    return number % count


def _whole(key: Any) -> int:
    dimensions = getattr(key, "ndim", None)
    plain = key.item() if dimensions == 0 else key
    if dimensions or isinstance(plain, bool):  # torch would take a tensor of one number, or of a truth value
        raise TypeError(f"a number is an integer, got {key!r}")
    return operator.index(plain)
