"""The words of a row-wise table's fields and the bytes that hold them, for every layout, padded and odd."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptflip.bits import lookup
from ckptflip.checkpoints.target import Changes
from ckptflip.faults.catalogue import Shard, Tensor
from ckptflip.faults.rowwise import FIELDS, fitted, parse
from ckptflip.recsys.tables.split import Split

PLAIN = Tensor("top", (4,), lookup("uint16"))


@st.composite
def tables(draw):
    """A layout, a stored table, and how many of a row's bits belong to no field."""
    bits, batched = draw(st.sampled_from([8, 4, 2])), draw(st.booleans())
    dim, rows = draw(st.integers(1, 20)), draw(st.integers(1, 6))
    layout = parse(f"int{bits}{'-tbe' * batched}:{dim}")
    needed = layout.packed(dim)
    width = -(-needed // 16) * 16 if batched and draw(st.booleans()) else needed
    seed = draw(st.integers(0, 2**32))
    stored = np.random.default_rng(seed).integers(0, 256, (rows, width)).astype(np.uint8)
    return layout, stored, width * 8 - dim * bits - 8 * layout.overhead


def split_of(layout, stored):
    catalogue = [PLAIN, Tensor("emb", stored.shape, lookup("uint8"), offset=1000)]
    return Split(catalogue, {1: layout})


def reader(stored):
    plain = np.arange(4, dtype=np.uint16)

    def read(base, words):
        assert (np.diff(words) > 0).all(), "positions are promised ascending, each once"
        return (plain, stored.reshape(-1))[base][words]

    return read


@given(tables())
@settings(max_examples=150)
def test_fields_hold_every_bit_of_a_row_but_its_padding(case):
    layout, stored, padding = case
    split = split_of(layout, stored)
    assert [t.name for t in split.tensors] == ["top", *(f"emb.{f}" for f in FIELDS)]
    held = np.zeros_like(stored)
    for i, tensor in list(enumerate(split.tensors))[1:]:
        every = np.arange(tensor.words)
        masks = np.full(every.size, (1 << tensor.number.part_width) - 1, np.uint64)
        changes = split.stored_changes(Changes(np.full(every.size, i, np.int32), every, masks, masks))
        assert not (held.reshape(-1)[changes.word] & changes.mask.astype(np.uint8)).any(), "fields overlap"
        held.reshape(-1)[changes.word] |= changes.mask.astype(np.uint8)
        assert np.array_equal(split.stored_words(i, every), changes.word)
    assert int(np.bitwise_count(held).sum()) == stored.size * 8 - padding * stored.shape[0]


@given(tables(), st.data())
@settings(max_examples=150)
def test_a_change_to_words_is_that_change_to_bytes(case, data):
    layout, stored, _ = case
    split = split_of(layout, stored)
    before = [split.read(reader(stored), i, np.arange(t.words)) for i, t in enumerate(split.tensors)]
    rows = []
    for i, tensor in enumerate(split.tensors):
        for word in sorted(data.draw(st.sets(st.integers(0, tensor.words - 1), max_size=5))):
            fault = data.draw(st.integers(1, (1 << tensor.number.part_width) - 1))
            rows.append((i, word, data.draw(st.sampled_from([fault, 0])), fault))
    columns = np.array(rows, np.int64).reshape(-1, 4).T
    changes = Changes(
        columns[0].astype(np.int32), columns[1], columns[2].astype(np.uint64), columns[3].astype(np.uint64)
    )
    made = split.stored_changes(changes)
    order = np.lexsort((made.word, made.tensor))
    assert np.array_equal(order, np.arange(order.size))
    assert len(set(zip(made.tensor.tolist(), made.word.tolist(), strict=True))) == order.size
    altered, plain = stored.copy(), np.arange(4, dtype=np.uint16)
    for base, part in made.by_tensor():
        target = (plain, altered.reshape(-1))[base]
        target[made.word[part]] ^= made.mask[part].astype(target.dtype)
    for i, word, mask, _ in rows:
        before[i][word] ^= mask
    assert np.array_equal(plain, before[0])
    for i, tensor in list(enumerate(split.tensors))[1:]:
        assert np.array_equal(split.read(reader(altered), i, np.arange(tensor.words)), before[i])
        assert np.array_equal(split.of_rows(i, altered), before[i])


def test_no_words():
    stored = np.zeros((2, 12), np.uint8)
    split = split_of(parse("int8"), stored)
    for i, tensor in enumerate(split.tensors):
        assert split.read(reader(stored), i, np.empty(0, np.int64)).dtype == tensor.number.word_dtype
    nothing = Changes(*(np.empty(0, kind) for kind in (np.int32, np.int64, np.uint64, np.uint64)))
    assert split.stored_changes(nothing).word.size == 0


def test_what_the_catalogue_says():
    stored = np.zeros((6, 20), np.uint8)
    shards = (Shard(0, (0, 0), (4, 20)), Shard(1, (4, 0), (2, 20)))
    table = Tensor(
        "m/emb", stored.shape, lookup("uint8"), ">", "emb", "embedding", ("emb",), "contiguous", 96
    )
    split = Split([table], {0: parse("int8-tbe:13")})
    code, scale, bias = split.tensors
    assert (code.shape, code.dtype, code.offset) == ((6, 13), "uint8", 100)
    assert (scale.shape, scale.dtype, scale.offset) == ((6,), "float16", 96)
    assert (bias.name, bias.aliases, bias.offset) == ("m/emb.bias", ("emb.bias",), 98)
    assert {(t.layer, t.role, t.layout) for t in split.tensors} == {
        ("emb", "embedding", "row-wise int8-tbe:13, contiguous")
    }
    by_rows = Split([Tensor("emb", stored.shape, lookup("uint8"), shards=shards)], {0: parse("int8")})
    assert [s.shape for s in by_rows.tensors[0].shards] == [(4, 12), (2, 12)]
    assert [(s.start, s.shape) for s in by_rows.tensors[1].shards] == [((0,), (4,)), ((4,), (2,))]


def test_dimensions_that_follow_from_the_width():
    def dim(layout, width):
        return fitted(parse(layout), Tensor("t", (1, width), lookup("uint8"))).dim

    assert [dim(*c) for c in (("int8", 72), ("int4", 36), ("int2", 20), ("int8-tbe", 68))] == [64, 64, 64, 64]
    assert [dim(*c) for c in (("int4:33", 21), ("int4-tbe:20", 16), ("int2-tbe:3", 5))] == [33, 20, 3]
