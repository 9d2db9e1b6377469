"""Checks what a pickle would build, from its instructions, without executing any.

torch's weights-only unpickler calls nothing dangerous, but builds whatever it is told to. A hundred bytes that put a
tuple twice into a tuple, sixty times over, and use the result as a key make it hash for ever: few instructions can
expand to an enormous value. So they are simulated first, on a stack of sizes instead of values.
"""

from __future__ import annotations

import io
import pickletools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import BinaryIO

import torch

# FlowNet2's 220 tensors and twice as many of an optimiser take 30,000 instructions, expand to as many values, and are
# nested six deep.
MOST_INSTRUCTIONS = 1_000_000
MOST_VALUES = 1_000_000  # within one value; a shared part counts each time it occurs
MOST_WORK = 10_000_000  # values hashed, copied or handed to functions
MOST_DEPTH = 100
MOST_BYTES = 32 << 20  # of all pickles of a checkpoint; with an optimiser they have a few megabytes
TEXT_OF_ONE_VALUE = 16  # characters; longer text counts as several

# Names that occur in checkpoints. torch allows more, some of which build large values from small arguments (bytearray,
# Counter).
_NAMES = re.compile(
    r"torch\._utils\._rebuild_(tensor|tensor_v2|parameter)|torch\.(cuda\.)?\w+Storage|torch\.nn\.parameter\.Parameter"
    r"|torch\.storage\.(Typed|Untyped)Storage|torch\.(Size|device|bool|b?float\d+|u?int\d+|complex\d+)"
    r"|collections\.OrderedDict|_codecs\.encode|numpy\.dtype|numpy\._?core\.multiarray\.scalar"
)
_NUMBER_DTYPE = re.compile(r"[<>|=]?[fiub][1248]")

_ZIP = b"PK\3\4"
_PICKLE = b"\x80"  # since protocol 2, which every torch has written
_LEGACY_PICKLES = 5  # magic number, version, system, the content itself, storage keys; the tensors follow

_NEW = {"NONE", "NEWFALSE", "NEWTRUE", "BININT", "BININT1", "BININT2", "BINFLOAT", "LONG1"}
_NEW |= {"EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(slots=True)
class _Value:
    """A simulated value: what is known of it without building it."""

    size: int = 1  # values it expands to, including itself
    depth: int = 1  # of nesting
    text: str = ""  # of a name or string
    named: bool = False  # by GLOBAL: a class or function
    parts: tuple[_Value, ...] = ()  # of a tuple
    held: bool = False  # contained in another value


def check_checkpoint(path: str | Path) -> None:
    """Applies ``check_pickle`` to every pickle that ``torch.load`` would read from a file.

    Raises:
        UnpicklingError, ValueError: see ``check_pickle``; the latter also for a file that is no checkpoint at all.
        RuntimeError: torch finds no pickle in it.
    """
    with open(path, "rb") as file:
        start = file.read(32)
        if start.startswith(_ZIP):  # as torch decides; zipfile may disagree on what is a zip file
            file.seek(0)
            pickles = io.BytesIO(torch._C.PyTorchFileReader(file).get_record("data.pkl"))
            count = 1
        elif not start.startswith(_PICKLE):
            # What came instead shows in its first words: a Git LFS pointer, a web page, an HDF5 file.
            raise ValueError(f"it begins with {start!r}, not as a zip file or a pickle as torch.save writes them")
        else:
            file.seek(0)
            pickles = io.BytesIO(file.read(MOST_BYTES))
            count = _LEGACY_PICKLES
    for _ in range(count):
        check_pickle(pickles)


def check_pickle(file: BinaryIO) -> None:
    """Reads one pickle, from the file's current position, and checks what loading it would take.

    Raises:
        UnpicklingError: it would take more than a checkpoint can need, call something no checkpoint names, or use an
            instruction that torch does not support.
        ValueError: it is truncated or damaged.
    """
    building = _Building()
    for count, (instruction, argument, _) in enumerate(pickletools.genops(file)):
        if count >= MOST_INSTRUCTIONS:
            raise UnpicklingError(f"a pickle of over {MOST_INSTRUCTIONS} instructions")
        try:
            building.step(instruction.name, argument)
        except (IndexError, KeyError):
            raise ValueError(f"a pickle whose {instruction.name} finds nothing to work on") from None


class _Building:
    """The unpickler's stack, marks and memo, holding ``_Value`` instead of values."""

    def __init__(self) -> None:
        self._stack: list[_Value] = []
        self._marked: list[list[_Value]] = []
        self._memo: dict[int, _Value] = {}
        self._work = 0

    def step(self, name: str, argument: object) -> None:
        if name in _NEW:
            self._stack.append(_Value())
        elif isinstance(argument, str) and name in ("BINUNICODE", "SHORT_BINSTRING"):
            self._stack.append(_Value(1 + len(argument) // TEXT_OF_ONE_VALUE, text=argument))
        elif isinstance(argument, int) and name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = self._stack[-1]
        elif isinstance(argument, int) and name in ("BINGET", "LONG_BINGET"):
            self._stack.append(self._memo[argument])
        elif name == "MARK":
            self._marked.append(self._stack)
            self._stack = []
        elif name == "TUPLE":
            parts = self._since_mark()
            self._stack.append(_tuple(parts))
        elif name in _TUPLES:
            self._stack.append(_tuple(self._popped(_TUPLES[name])))
        elif name in ("APPEND", "APPENDS"):
            self._grow(self._popped(1) if name == "APPEND" else self._since_mark())
        elif name in ("SETITEM", "SETITEMS"):
            added = self._popped(2) if name == "SETITEM" else self._since_mark()
            self._do(added[::2])
            self._grow(added)
        elif name == "BUILD":
            state = self._popped(1)
            self._do(state)
            self._grow(state)
        elif name in ("REDUCE", "NEWOBJ"):
            called, given = self._popped(2)
            _check_call(called, given)
            self._do([given])
            self._stack.append(_holding(_Value(), [given]))
        elif name == "BINPERSID":
            named = self._popped(1)
            self._do(named)
            self._stack.append(_holding(_Value(), named))
        elif name == "GLOBAL":
            self._stack.append(_Value(text=_known_name(str(argument).replace(" ", ".")), named=True))
        elif name == "STOP":
            self._stack.pop()
        elif name != "PROTO":
            raise UnpicklingError(f"unsupported instruction {name}")

    def _popped(self, count: int) -> list[_Value]:
        if len(self._stack) < count:
            raise IndexError
        taken = self._stack[-count:]
        del self._stack[-count:]
        return taken

    def _since_mark(self) -> list[_Value]:
        taken, self._stack = self._stack, self._marked.pop()
        return taken

    def _grow(self, added: list[_Value]) -> None:
        """Adds to the value on top of the stack. If another contains it, that one's size would become wrong."""
        for value in added:
            value.held = True
        if self._stack[-1].held:
            raise UnpicklingError("a value that changes after another holds it, or holds itself")
        _holding(self._stack[-1], added)

    def _do(self, values: Iterable[_Value]) -> None:
        self._work += sum(value.size for value in values)
        if self._work > MOST_WORK:
            raise UnpicklingError(f"a pickle that has over {MOST_WORK} values hashed or handed to functions")


def _tuple(parts: list[_Value]) -> _Value:
    value = _holding(_Value(), parts)
    value.parts = tuple(parts)
    return value


def _holding(value: _Value, added: list[_Value]) -> _Value:
    for part in added:
        part.held = True
        value.size += part.size
        value.depth = max(value.depth, part.depth + 1)
    if value.size > MOST_VALUES:
        raise UnpicklingError(f"a value that unfolds to over {MOST_VALUES} values")
    if value.depth > MOST_DEPTH:
        raise UnpicklingError(f"values nested more than {MOST_DEPTH} deep")
    return value


def _known_name(name: str) -> str:
    if _NAMES.fullmatch(name):
        return name
    raise UnpicklingError(f"unsupported name {name}")


def _check_call(called: _Value, given: _Value) -> None:
    """Two of the allowed names could build large values from small arguments; their arguments are restricted."""
    if not called.named:
        raise UnpicklingError("a call of something that is not a class or function")
    first, second = ([part.text for part in given.parts] + ["", ""])[:2]
    if called.text == "_codecs.encode" and second not in ("latin1", "latin-1"):
        raise UnpicklingError(f"unsupported encoding {second!r}")
    if called.text == "numpy.dtype" and not _NUMBER_DTYPE.fullmatch(first):
        raise UnpicklingError(f"unsupported dtype {first!r}")
