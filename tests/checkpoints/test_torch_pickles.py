"""The reader of pickles: the same values as Python's own, nothing executed, hostile input refused."""

import collections
import io
import pickle
import pickletools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptflip.checkpoints.listing import DamagedError
from ckptflip.checkpoints.torch_zip.pickles import _OPCODES, parse, parse_bytes
from ckptflip.checkpoints.torch_zip.trees import tensors_in
from ckptflip.checkpoints.torch_zip.values import Call, Global, Large, Pairs, Persistent, pairs_of
from ckptflip.errors import CheckpointError


class Thing:
    """Something with attributes."""


class Slotted:
    """Something with a slot."""

    __slots__ = ("inner",)


def value_of(found):
    """A symbolic value as the Python value that it describes, for the types that occur here."""
    if isinstance(found, Pairs):
        return {value_of(k): value_of(v) for k, v in found.pairs or ()}
    if isinstance(found, list | tuple):
        return type(found)(value_of(v) for v in found)
    if isinstance(found, Call):
        name = found.function.name
        if name in ("set", "frozenset"):
            items = found.items or (value_of(found.args[0]) if found.args else [])
            return {"set": set, "frozenset": frozenset}[name](value_of(i) for i in items)
        if name == "OrderedDict":
            return collections.OrderedDict((value_of(k), value_of(v)) for k, v in found.pairs or ())
        if name == "bytes":  # empty ones in protocols 0 to 2
            return b""
        if name == "encode":  # bytes in protocols 0 to 2
            return found.args[0].encode(found.args[1])
    return found


ATOMS = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.integers(-(1 << 200), 1 << 200)),
    *(st.floats(allow_nan=False), st.text(max_size=300), st.binary(max_size=300)),
)  # fmt: skip
KEYS = st.one_of(st.integers(), st.text(max_size=9), st.tuples(st.integers(), st.text(max_size=3)))
VALUES = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=5),
        st.tuples(inner),
        st.tuples(inner, inner),
        st.tuples(inner, inner, inner, inner),
        st.dictionaries(KEYS, inner, max_size=5),
        st.sets(KEYS, max_size=4),
        st.frozensets(KEYS, max_size=4),
        st.dictionaries(KEYS, inner, max_size=3).map(collections.OrderedDict),
    ),
    max_leaves=20,
)


@settings(max_examples=300)
@given(VALUES, st.integers(0, 5))
def test_plain_values_of_all_protocols(value, protocol):
    data = pickle.dumps(value, protocol)
    assert value_of(parse_bytes(data, "x")) == value
    assert value_of(parse_bytes(pickletools.optimize(data), "x")) == value


def test_all_opcodes_but_out_of_band_buffers_are_known():
    every = {o.code for o in pickletools.opcodes}
    assert every - set(_OPCODES) == {".", "\x97", "\x98"}


@pytest.mark.parametrize("protocol", range(6))
def test_objects(protocol):
    thing, slotted = Thing(), Slotted()
    thing.a, thing.b = 1, [thing]
    slotted.inner = thing
    found = parse_bytes(pickle.dumps((thing, Thing), protocol), "x")
    call, kind = found
    assert kind == Global(__name__, "Thing") and kind.path == f"{__name__}.Thing"
    state = dict(pairs_of(call.states[0]))
    assert state["a"] == 1 and state["b"][0] is call
    if protocol >= 2:
        (nothing, slots), *_ = parse_bytes(pickle.dumps(slotted, protocol), "x").states
        assert nothing is None and slots.pairs[0][0] == "inner"


def test_persistent_ids():
    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", 7) if value == 1.5 else None

    out = io.BytesIO()
    Pickler(out, 2).dump([1.5, 2])
    first, second = parse_bytes(out.getvalue(), "x")
    assert isinstance(first, Persistent) and first.id == ("storage", 7) and second == 2
    assert parse_bytes(b"Pabc\n.", "x").id == "abc"


def test_old_opcodes():
    assert parse_bytes(b"(I01\nI5\nL70L\nF1.5\nS'it'\nVun\\u0069\nt.", "x") == (True, 5, 70, 1.5, "it", "uni")
    made = parse_bytes(b"(S'x'\nios\nsystem\n.", "x")
    assert (made.function, made.args) == (Global("os", "system"), ("x",))
    assert parse_bytes(b"(cos\nsystem\nI1\no.", "x").args == (1,)
    assert parse_bytes(b"(lI1\na(I2\nI3\ne.", "x") == [1, 2, 3]
    assert parse_bytes(b"(dI1\nI2\ns.", "x").pairs == [(1, 2)]
    assert parse_bytes(b"I1\n2(I3\n1\x86.", "x") == (1, 1)
    assert parse_bytes(b"I1\n(I2\n00.", "x") == 1
    assert parse_bytes(b"\x82\x07.", "x") == Global("copyreg", "extension 7")


def test_nothing_is_run():
    class Attack:
        def __reduce__(self):
            return exec, ("raise SystemExit",)

    for protocol in range(6):
        made = parse_bytes(pickle.dumps(Attack(), protocol), "x")
        assert made.function.name == "exec" and made.args == ("raise SystemExit",)


def test_long_strings_are_passed_over_unread():
    asked = []
    data = pickle.dumps([b"x" * 5_000_000, "y" * 5_000_000, 1 << 4000, 5], 4)

    def read(at, count):
        asked.append(count)
        return data[at : at + count]

    assert parse(read, len(data), "x") == [Large(5_000_000), Large(5_000_000), Large(501), 5]
    assert sum(asked) < 4_200_000  # three windows


def test_windows_of_any_size_give_the_same():
    value = [{"a" * n: (n, float(n), b"b" * n)} for n in range(600)]
    for protocol in (0, 1, 2, 4):
        data = pickle.dumps(value, protocol)
        whole = value_of(parse_bytes(data, "x"))
        assert whole == value
        small = parse(lambda at, count, data=data: data[at : at + min(count, 70_000)], len(data), "x")
        assert value_of(small) == value


ATTACKS = {
    "empty": b"",
    "no stop": b"N",
    "nothing to stop with": b".",
    "pop of nothing": b"\x80\x02R.",
    "no mark": b"t.",
    "a memo of nothing": b"h\x05.",
    "a memo of nothing, far away": b"Nj\xff\xff\xff\xff.",
    "unknown opcode": b"\xff.",
    "buffers": b"\x97.",
    "a string longer than the file": b"X\xff\xff\xff\x7fabc.",
    "a string longer than any": b"\x8d\xff\xff\xff\xff\xff\xff\xff\xff.",
    "a negative size": b"\x8b\xff\xff\xff\xff.",
    "a line without end": b"I" + b"1" * 100_000,
    "not a number": b"Ix\n.",
    "not UTF-8": b"X\x01\x00\x00\x00\xff.",
    "a key without value": b"}(Nu.",
    "a dict that is none": b"N(NNu.",
    "a list that is none": b"N(Ne.",
    "a call of no tuple": b"cos\nsystem\nNR.",
    "a class without name": b"NN\x93.",
    "too few for a tuple": b"N\x86.",
}


@pytest.mark.parametrize("data", ATTACKS.values(), ids=ATTACKS)
def test_attacks_end_in_a_clear_error(data):
    with pytest.raises(CheckpointError, match="an attack is damaged at byte"):
        parse_bytes(data, "an attack")


@pytest.mark.parametrize("unit", [b"}", b"(", b"]", b")\x85", b"\x8f", b"\x94", b"N\x94"])
def test_floods_are_cut_off(unit, soon):
    with pytest.raises(CheckpointError, match=r"more objects than|ends too early|no sound pickle"):
        parse_bytes(b"N" + unit * 500_000, "a flood")


def test_deep_nests_and_bombs_end(soon):
    deep = parse_bytes(b"N" + b"\x85q\1" * 300_000 + b".", "x")
    assert [s.reason for s in tensors_in(deep).skipped] == ["it is nested too deep"]
    wrapped = b"ctorch._utils\n_rebuild_parameter\n"
    deep = parse_bytes(wrapped * 50_000 + b"N" + b"\x85R" * 50_000 + b".", "x")
    assert [s.reason for s in tensors_in(deep).skipped] == ["it is nested too deep"]
    doubling = b"]" + b"q\0(h\0h\0h\0h\0h\0h\0h\0h\0l" * 50 + b"."
    tensors_in(parse_bytes(doubling, "x"))


def test_a_dict_that_holds_itself():
    found = parse_bytes(b"}q\0X\x01\0\0\0ah\0s.", "x")
    assert found.pairs[0][1] is found
    assert tensors_in(found).views == []


TENSOR = (
    b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x04tQ"
    b"K\0K\x04\x85K\x01\x85\x89)ctorch\nSize\n)\x86\x86tR."
)


def test_golden_tensor():
    (view,) = tensors_in(parse_bytes(TENSOR, "x")).views
    assert (view.name, view.storage, view.offset, view.shape, view.strides) == ("tensor", "0", 0, (4,), (1,))
    assert view.dtype.number.name == "float32"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"K\x04\x85K\x01\x85", b"K\x04\x85K\x01K\x01\x86"),
        (b"K\x04\x85K\x01\x85", b"J\xff\xff\xff\xff\x85K\x01\x85"),
        (b"K\x04\x85K\x01\x85", b"K\x04\x85J\xff\xff\xff\xff\x85"),
        (b"K\x04\x85K\x01\x85", b"G\0\0\0\0\0\0\0\0\x85K\x01\x85"),
        (b"K\x04\x85K\x01\x85", b"\x8a\x08" + b"\xff" * 7 + b"\x3f\x85K\x01\x85"),
        (b"QK\0", b"QJ\xff\xff\xff\xff"),
        (b"QK\0", b"QN"),
        (b"storage", b"stirage"),
        (b"tQ", b"t"),
    ],
)
def test_impossible_tensors_are_refused(old, new):
    with pytest.raises(DamagedError):
        tensors_in(parse_bytes(TENSOR.replace(old, new, 1), "x"))


def attempt(data):
    """Whether a pickle is read; only clear errors are let through."""
    try:
        tensors_in(parse_bytes(data, "x"))
    except (CheckpointError, DamagedError):
        return False
    return True


SEEDS = [
    TENSOR,
    pickle.dumps({"a": [1, 2.5, (3, b"x")], "b": {4, 5}, "c": collections.OrderedDict(x=1)}, 4),
    pickle.dumps({"a": [1, 2.5, (3, b"x")], "b": {4, 5}, "c": collections.OrderedDict(x=1)}, 0),
]


def test_truncated_anywhere():
    for data in SEEDS:
        assert not any(attempt(data[:n]) for n in range(len(data)))


@settings(max_examples=600)
@given(
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8),
)
def test_random_bytes_in_pickles(data, changes):
    raw = bytearray(data)
    for where, value in changes:
        raw[int(where * len(raw))] = value
    attempt(bytes(raw))


@settings(max_examples=600)
@given(st.lists(st.sampled_from([o.code.encode("latin-1") for o in pickletools.opcodes]), max_size=60))
def test_random_opcodes(codes):
    attempt(b"N)}](" + b"".join(codes) + b"\0\n" * 20 + b".")
