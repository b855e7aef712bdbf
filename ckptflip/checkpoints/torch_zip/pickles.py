"""Reading a pickle without running it: an interpreter of the opcodes that only notes down what it is told.

Loading a pickle executes whatever the file says. Here the stack, the marks and the memo work as in Python's
own interpreter, but a class or function stays a name and a call stays a note (see `values`). Source of the
opcodes: Python's ``pickletools``, protocols 0 to 5.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import partial
from typing import Any

from ckptflip.checkpoints.torch_zip.stream import LONGEST, Read, Stream, UnsoundError
from ckptflip.checkpoints.torch_zip.values import Call, Global, Large, Pairs, Persistent
from ckptflip.errors import CheckpointError

_LONGEST_INTEGER = 64
# What a hostile file can make us hold: some hundred bytes for each container. A checkpoint of 100,000 tensors
# with optimizer state takes 10 million opcodes and 3 million containers, of 10 bytes of the pickle each.
_MOST_OPCODES = 1 << 25
_MOST_CONTAINERS = 1 << 23
_FEW_CONTAINERS = 1 << 16
_LARGEST_MEMO = 1 << 23
_MOST_OUT_OF_ORDER = 1 << 16


def parse(read: Read, size: int, where: str, longest: int = LONGEST) -> Any:
    """The value a pickle describes.

    Args:
        read: gives bytes of the pickle: (position, how many).
        size: its length in bytes.
        where: its name, for messages.
        longest: strings of more bytes are passed over without being read; 64 KiB unless told.

    Raises:
        CheckpointError: no sound pickle, or one far larger than any checkpoint's.
    """
    stream = Stream(read, size, longest)
    try:
        return _Machine(stream, min(_MOST_CONTAINERS, _FEW_CONTAINERS + size // 2)).run()
    except (IndexError, KeyError, ValueError, struct.error) as why:
        what = str(why) if isinstance(why, UnsoundError) else "it is no sound pickle"
        raise CheckpointError(
            f"{where} is damaged at byte {stream.position}: {what}. Copy or download the checkpoint again"
        ) from None


def parse_bytes(data: bytes, where: str) -> Any:
    """The value a pickle in memory describes; see `parse`.

    Example:
        >>> parse_bytes(b"cos\\nsystem\\n(S'ls'\\ntR.", "an attack").function
        Global(module='os', name='system')
    """
    return parse(lambda at, count: data[at : at + count], len(data), where)


class _Machine:
    """The state of the interpreter: a stack with marks, and a memo. `containers` is how many it may make."""

    def __init__(self, stream: Stream, containers: int) -> None:
        self._stream = stream
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        # Numbers are given in order, but for what no known writer makes.
        self._memo: list[Any] = []
        self._out_of_order: dict[int, Any] = {}
        self._containers_left = containers

    def run(self) -> Any:
        """Interpret opcodes up to STOP."""
        handlers: list[Callable[[], None]] = [self._unknown] * 256
        for code, (name, *args) in _OPCODES.items():
            method = getattr(self, f"_{name}")
            handlers[ord(code)] = partial(method, *args) if args else method
        stop, byte = ord("."), self._stream.byte
        for _ in range(_MOST_OPCODES):
            code_read = byte()
            if code_read == stop:
                return self._stack.pop()
            handlers[code_read]()
        raise UnsoundError(f"it has more than {_MOST_OPCODES} opcodes")

    def _count(self) -> None:
        self._containers_left -= 1
        if self._containers_left < 0:
            raise UnsoundError("it makes more objects than any checkpoint of its size")

    def _unknown(self) -> None:
        raise UnsoundError("an opcode that no checkpoint uses")

    def _skip(self, count: int) -> None:
        self._stream.take(count)

    def _mark(self) -> None:
        self._count()
        self._marks.append(self._stack)
        self._stack = []

    def _marked(self) -> list[Any]:
        """What was pushed since the last mark."""
        items = self._stack
        self._stack = self._marks.pop()
        return items

    def _pop(self) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._marked()

    def _dup(self) -> None:
        self._stack.append(self._stack[-1])

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _unsigned(self, width: int) -> None:
        self._stack.append(self._stream.unsigned(width))

    def _signed4(self) -> None:
        self._stack.append(int.from_bytes(self._stream.take(4), "little", signed=True))

    def _int_line(self) -> None:
        line = self._stream.line()
        special = {b"00": False, b"01": True}
        self._stack.append(special[line] if line in special else _integer(line.rstrip(b"L")))

    def _long(self, width: int) -> None:
        size = self._stream.unsigned(width)
        raw = self._stream.body(size)
        small = raw is not None and size <= _LONGEST_INTEGER
        self._stack.append(int.from_bytes(raw or b"", "little", signed=True) if small else Large(size))

    def _float_line(self) -> None:
        self._stack.append(float(self._stream.line()))

    def _float8(self) -> None:
        self._stack.append(struct.unpack(">d", self._stream.take(8))[0])

    def _string_line(self) -> None:
        self._stack.append(self._stream.line().strip(b"'\"").decode("latin-1"))

    def _unicode_line(self) -> None:
        self._stack.append(self._stream.line().decode("raw-unicode-escape"))

    def _text(self, width: int, encoding: str) -> None:
        size = self._stream.unsigned(width)
        raw = self._stream.body(size)
        self._stack.append(Large(size) if raw is None else raw.decode(encoding, "surrogatepass"))

    def _bytes(self, width: int) -> None:
        size = self._stream.unsigned(width)
        raw = self._stream.body(size)
        self._stack.append(Large(size) if raw is None else raw)

    def _tuple(self) -> None:
        items = tuple(self._marked())
        self._stack.append(items)

    def _tuple_of(self, count: int) -> None:
        self._count()
        if len(self._stack) < count:
            raise UnsoundError("a tuple lacks items")
        self._stack[-count:] = [tuple(self._stack[-count:])]

    def _empty_list(self) -> None:
        self._count()
        self._stack.append([])

    def _list(self) -> None:
        items = self._marked()
        self._stack.append(items)

    def _empty_dict(self) -> None:
        self._count()
        self._stack.append(Pairs())

    def _dict(self) -> None:
        pairs = _paired(self._marked())
        self._stack.append(Pairs(pairs))

    def _empty_set(self) -> None:
        self._call(Global("builtins", "set"), ())

    def _frozenset(self) -> None:
        items = self._marked()
        self._call(Global("builtins", "frozenset"), (items,))

    def _append(self) -> None:
        item = self._stack.pop()
        self._extend([item])

    def _appends(self) -> None:
        self._extend(self._marked())

    def _extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, Call):
            target.items = target.items or []
            target.items.extend(items)
        elif isinstance(target, list):
            target.extend(items)
        else:
            raise UnsoundError("something is appended to what is no list")

    def _set_item(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._store([(key, value)])

    def _set_items(self) -> None:
        self._store(_paired(self._marked()))

    def _store(self, pairs: list[tuple[Any, Any]]) -> None:
        target = self._stack[-1]
        if isinstance(target, Pairs | Call):
            target.pairs = target.pairs or []
            target.pairs.extend(pairs)
        else:
            raise UnsoundError("something is stored under a key in what is no dict")

    def _get_line(self) -> None:
        self._recall(int(self._stream.line()[:_LONGEST_INTEGER]))

    def _get(self, width: int) -> None:
        self._recall(self._stream.unsigned(width))

    def _recall(self, number: int) -> None:
        known = 0 <= number < len(self._memo)
        self._stack.append(self._memo[number] if known else self._out_of_order[number])

    def _put_line(self) -> None:
        self._remember(int(self._stream.line()[:_LONGEST_INTEGER]))

    def _put(self, width: int) -> None:
        self._remember(self._stream.unsigned(width))

    def _memoize(self) -> None:
        self._remember(len(self._memo) + len(self._out_of_order))

    def _remember(self, number: int) -> None:
        value, count = self._stack[-1], len(self._memo)
        if number == count < _LARGEST_MEMO:
            self._memo.append(value)
        elif 0 <= number < count:
            self._memo[number] = value
        elif len(self._out_of_order) < _MOST_OUT_OF_ORDER:
            self._out_of_order[number] = value
        else:
            raise UnsoundError("it remembers too many objects")

    def _global(self) -> None:
        module, name = self._stream.line(), self._stream.line()
        self._stack.append(Global(module.decode(), name.decode()))

    def _stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise UnsoundError("a class is named by something else than text")
        self._stack.append(Global(module, name))

    def _extension(self, width: int) -> None:
        self._stack.append(Global("copyreg", f"extension {self._stream.unsigned(width)}"))

    def _reduce(self) -> None:
        args = self._stack.pop()
        self._call(self._stack.pop(), args)

    def _new_object_ex(self) -> None:
        keywords = self._stack.pop()
        self._reduce()
        self._stack[-1].states = [keywords]

    def _instance(self) -> None:
        module, name = self._stream.line(), self._stream.line()
        args = self._marked()
        self._call(Global(module.decode(), name.decode()), tuple(args))

    def _object(self) -> None:
        function, *args = self._marked()
        self._call(function, tuple(args))

    def _call(self, function: Any, args: Any) -> None:
        self._count()
        if not isinstance(args, tuple):
            raise UnsoundError("something is called without a list of arguments")
        self._stack.append(Call(function, args))

    def _build(self) -> None:
        state = self._stack.pop()
        target = self._stack[-1]
        if isinstance(target, Call):
            target.states = target.states or []
            target.states.append(state)

    def _persistent_line(self) -> None:
        self._stack.append(Persistent(self._stream.line().decode()))

    def _persistent(self) -> None:
        self._stack[-1] = Persistent(self._stack[-1])


def _integer(text: bytes) -> int | Large:
    return Large(len(text)) if len(text) > _LONGEST_INTEGER else int(text)


def _paired(items: list[Any]) -> list[tuple[Any, Any]]:
    if len(items) % 2:
        raise UnsoundError("a key has no value")
    return list(zip(items[::2], items[1::2], strict=True))


# The method for each opcode and its arguments. Buffers outside the pickle (protocol 5) are missing: no file
# uses them.
_OPCODES: dict[str, tuple[Any, ...]] = {
    # constants, numbers
    "N": ("push", None), "\x88": ("push", True), "\x89": ("push", False), "I": ("int_line",),
    "L": ("int_line",), "J": ("signed4",), "K": ("unsigned", 1), "M": ("unsigned", 2), "\x8a": ("long", 1),
    "\x8b": ("long", 4), "F": ("float_line",), "G": ("float8",),
    # strings
    "S": ("string_line",), "T": ("text", 4, "latin-1"), "U": ("text", 1, "latin-1"), "V": ("unicode_line",),
    "\x8c": ("text", 1, "utf-8"), "X": ("text", 4, "utf-8"), "\x8d": ("text", 8, "utf-8"),
    "C": ("bytes", 1), "B": ("bytes", 4), "\x8e": ("bytes", 8), "\x96": ("bytes", 8),
    # containers
    ")": ("push", ()), "t": ("tuple",), "\x85": ("tuple_of", 1), "\x86": ("tuple_of", 2),
    "\x87": ("tuple_of", 3), "]": ("empty_list",), "l": ("list",), "a": ("append",), "e": ("appends",),
    "}": ("empty_dict",), "d": ("dict",), "s": ("set_item",), "u": ("set_items",), "\x8f": ("empty_set",),
    "\x90": ("appends",), "\x91": ("frozenset",),
    # objects
    "c": ("global",), "\x93": ("stack_global",), "\x82": ("extension", 1), "\x83": ("extension", 2),
    "\x84": ("extension", 4), "R": ("reduce",), "\x81": ("reduce",), "\x92": ("new_object_ex",),
    "i": ("instance",), "o": ("object",), "b": ("build",), "P": ("persistent_line",), "Q": ("persistent",),
    # the stack, the memo, the stream
    "(": ("mark",), "0": ("pop",), "1": ("marked",), "2": ("dup",), "g": ("get_line",), "h": ("get", 1),
    "j": ("get", 4), "p": ("put_line",), "q": ("put", 1), "r": ("put", 4), "\x94": ("memoize",),
    "\x80": ("skip", 1), "\x95": ("skip", 8),
}  # fmt: skip
