"""Guards on real tensors: what flipped is put right where it is, reported, and nothing else is touched."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptflip.bits import BitSpec, as_words, lookup
from ckptflip.bits.formats import COMPLEX_PARTS, ML_FLOATS, ML_INTEGERS, numpy_dtype
from ckptflip.errors import LiveError, SelectionError, UsageError
from ckptflip.faults import Policy
from ckptflip.protect.bits import Flip, guard, ideal, unprotected

torch = pytest.importorskip("torch")

from ckptflip import live  # noqa: E402
from ckptflip.live.torch_tensors import TorchTarget  # noqa: E402

NAMES = [
    "float64",
    "float32",
    "float16",
    "complex64",
    "complex128",
    "int8",
    "uint16",
    "int64",
    "bool",
    ">f4",
    ">i2",
]
DTYPES = [np.dtype(name) for name in NAMES] + [numpy_dtype(lookup(n)) for n in (*ML_FLOATS, *ML_INTEGERS)]


def random_array(dtype, count, seed):
    number = lookup(dtype)
    words = np.random.default_rng(seed).integers(0, 1 << number.part_width, count * number.parts, np.uint64)
    made = np.zeros(count, dtype)
    as_words(made)[:] = words
    return made


@settings(max_examples=200)
@given(
    dtype=st.sampled_from(DTYPES),
    count=st.integers(1, 200),
    bits=st.sampled_from(["all", "sign,exponent", "critical,msb", "0", "!critical"]),
    code=st.sampled_from(["parity", "secded", "tmr"]),
    data=st.data(),
)
def test_one_flip_of_any_bit_of_any_format(dtype, count, bits, code, data):
    array, number = random_array(dtype, count, 1), lookup(dtype)
    mask = BitSpec(bits).mask(number)
    if not mask:
        with pytest.raises(SelectionError, match="no selected tensor has the bits"):
            guard(array, bits, code)
        return
    guarded = guard(array, bits, code, group=data.draw(st.integers(2, 70)))
    assert guarded.scrub().clean
    element = data.draw(st.integers(0, count - 1))
    bit = data.draw(st.integers(0, number.width - 1))
    clean = as_words(array).copy()
    part, within = divmod(bit, number.part_width)
    as_words(array)[element * number.parts + part] ^= clean.dtype.type(1 << within)
    damaged = as_words(array).copy()
    report = guarded.scrub()
    if not mask >> bit & 1:
        assert report.clean and np.array_equal(as_words(array), damaged)
    elif code == "parity":
        assert (report.corrected, report.uncorrectable) == (0, 1)
        (lost,) = report.losses()
        assert lost.bit == bit and element in lost.elements and lost.elements[-1] < count
        assert np.array_equal(as_words(array), damaged)
    else:
        assert list(report.corrections()) == [Flip("array", element, bit)]
        assert np.array_equal(as_words(array), clean) and guarded.scrub().clean


def test_complex_formats_are_known():
    assert set(COMPLEX_PARTS) >= {"complex64", "complex128"}


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.EmbeddingBag(500, 8), torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16)
    )


def words_of(net):
    return {
        n: t.detach().clone().view(torch.int32) for n, t in net.state_dict().items() if t.is_floating_point()
    }


@pytest.mark.parametrize(("code", "uncorrectable"), [("secded", 0), ("tmr", 0), ("parity", 4)])
def test_faults_in_a_model_are_put_right(code, uncorrectable):
    net = model()
    guarded, clean = guard(net, code=code), words_of(net)
    block = live.faults(net, Policy(bits="sign,exponent", count=4), seed=3)
    with block:
        report = guarded.scrub()
        assert (report.corrected, report.uncorrectable) == (4 - uncorrectable, uncorrectable)
        mended = words_of(net)
        assert all(torch.equal(clean[n], mended[n]) for n in clean) == (not uncorrectable)
        (record,) = block.records
        names = [record.header.tensors[i].name for i in record.plan.tensor]
        hit = set(zip(names, record.plan.word.tolist(), record.plan.hit.tolist(), strict=True))
        if not uncorrectable:
            assert {(f.tensor, f.element, 1 << f.bit) for f in report.corrections()} == hit


@pytest.mark.parametrize("code", ["parity", "secded", "tmr"])
@pytest.mark.parametrize("bits", ["sign,exponent", "critical,0-2"])
@pytest.mark.parametrize("count", [1, 5, 100, 300])
def test_a_flip_of_any_bit_of_the_checks(count, bits, code):
    """It is mended, or with parity reported as a group's; and flips of the array are still put right."""
    array = np.random.default_rng(count).standard_normal(count).astype(np.float32)
    words, clean = as_words(array), as_words(array).copy()
    guarded = guard(array, bits, code)
    (kept,) = guarded._kept
    good, low = kept.checks.copy(), BitSpec(bits).mask(lookup("float32")).bit_length() - 1
    for place in range(kept.checks.size * 8):
        kept.checks[place // 8] ^= np.uint8(1 << place % 8)
        report = guarded.scrub()
        assert not report.corrected and np.array_equal(words, clean)
        if report.uncorrectable:
            assert code == "parity" and (report.uncorrectable, report.checks) == (1, 0)
            (lost,) = report.losses()
            assert lost.elements and lost.elements[-1] < count
            kept.checks[:] = good
        else:
            assert report.checks == 1 and np.array_equal(kept.checks, good)
        assert guarded.scrub().clean
        words[place % count] ^= np.uint32(1 << low)
        report = guarded.scrub()
        if code == "parity":
            assert report.uncorrectable == 1
            words[place % count] ^= np.uint32(1 << low)
        else:
            assert list(report.corrections()) == [Flip("array", place % count, low)]
        assert np.array_equal(words, clean)


def test_what_guards_and_scrubs_print():
    array = np.ones(64_000, np.float32)
    guarded = guard(array)
    assert repr(guarded) == (
        "<Guard of 1 tensor: secded of 64 elements over 'sign,exponent', 9000 bytes of checks, "
        "3.5% of the tensors>"
    )
    as_words(array)[7] ^= np.uint32(3 << 30)
    assert repr(guarded.scrub()).startswith("<Scrub: 2 corrected, 0 uncorrectable, 0 of the checks; ")
    assert repr(guard(array, code="tmr")).startswith("<Guard of 1 tensor: tmr over 'sign,exponent', ")


def test_only_chosen_tensors_are_guarded():
    net = model()
    assert guard(net, layers="1").tensors == ["model/1.bias", "model/1.weight"]
    assert guard(net, layers="0", roles="weight", bits="critical").tensors == ["model/0.weight"]
    assert "model/2.num_batches_tracked" not in guard(net, bits="exponent").tensors
    with pytest.raises(SelectionError, match="matches nothing"):
        guard(net, tensors="nine")


def test_tensors_that_do_not_lie_in_a_row():
    net = torch.nn.Linear(8, 8)
    net.weight = torch.nn.Parameter(torch.rand(8, 8).T)
    guarded, clean = guard(net), net.weight.detach().clone()
    with live.faults(net, Policy(bits="critical", count=1, tensors=("weight",)), seed=1):
        assert guarded.scrub().corrected == 1
        assert torch.equal(net.weight, clean)


def test_training_makes_a_guard_stale():
    net = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    guarded = guard(net)
    net(torch.rand(2, 4)).sum().backward()
    optimizer.step()
    with pytest.raises(LiveError, match="refresh"):
        guarded.scrub()
    guarded.refresh()
    assert guarded.scrub().clean
    with torch.no_grad():
        net.weight[0, 0].view(torch.int32).bitwise_xor_(1 << 30)
    assert guarded.scrub(force=True).corrected == 1
    net.weight = torch.nn.Parameter(torch.rand(4, 4))
    with pytest.raises(LiveError):
        guarded.scrub()


def test_more_flips_than_the_code_stands_are_reported_and_left():
    array = np.random.default_rng(0).random(640, np.float32)
    guarded, words = guard(array), as_words(array)
    words[[0, 10]] ^= np.uint32(1 << 30)
    damaged = words.copy()
    for _ in range(2):
        report = guarded.scrub()
        assert (report.corrected, report.uncorrectable) == (0, 1)
        (lost,) = report.losses()
        assert lost.bit == 30 and list(lost.elements) == list(range(0, 640, 10))
        assert np.array_equal(words, damaged)
    guarded.refresh()
    assert guarded.scrub().clean


def test_cost_is_what_the_checks_take():
    array = np.zeros(64_000, np.float32)
    shares = {code: guard(array, code=code).cost.share for code in ("parity", "secded", "tmr")}
    assert shares == pytest.approx({"parity": 9 / 32 / 64, "secded": 9 / 32 / 8, "tmr": 18 / 32})
    assert guard(array, "critical", "tmr").cost.checks == 2 * 64_000 / 8


def test_signalling_nans_pass_through():
    array = np.array([0x7F800001, 0x3F800000] * 8, np.uint32).view(np.float32)
    guarded, words = guard(array), as_words(array)
    words[0] ^= np.uint32(1 << 30)
    assert guarded.scrub().corrected == 1 and words[0] == 0x7F800001


def test_ideal_protection_is_the_plan_without_the_bits():
    target = TorchTarget(model())
    plan = live.Armed(target, Policy(ber=1e-2)).draw(5)
    left = unprotected(plan, target.tensors)
    floats = [target.tensors[i].number.is_float for i in left.tensor]
    assert not (left.hit[floats] & np.uint64(0x1FF << 23)).any() and left.bits_hit < plan.bits_hit
    kept = {(t, w): h for t, w, h in zip(plan.tensor, plan.word, plan.hit, strict=True)}
    assert all(kept[t, w] & h == h for t, w, h in zip(left.tensor, left.word, left.hit, strict=True))
    drawn = live.Armed(target, ideal(Policy(ber=1e-2))).draw(5)
    floats = [target.tensors[i].number.is_float for i in drawn.tensor]
    assert not (drawn.hit[floats] & np.uint64(0x1FF << 23)).any()
    with pytest.raises(UsageError, match="without '!'"):
        ideal(Policy(), "all,!mantissa")


def test_bad_input_is_said():
    with pytest.raises(UsageError, match="no arrays"):
        guard({})
    with pytest.raises(UsageError, match="not a numpy array"):
        guard({"x": [1.0]})
    with pytest.raises(UsageError, match="contiguous"):
        guard(np.zeros((4, 4), np.float32).T)
    frozen = np.zeros(4, np.float32)
    frozen.flags.writeable = False
    with pytest.raises(UsageError, match="may not be written"):
        guard(frozen)
    with pytest.raises(UsageError, match="is not a bit field"):
        guard(np.zeros(4, np.float32), "exponnt")
    for bits in (None, 5):
        with pytest.raises(UsageError, match="bits are a text"):
            guard(np.zeros(4, np.float32), bits)
    with pytest.raises(UsageError, match="no code is called None; use parity"):
        guard(np.zeros(4, np.float32), code=None)
    with pytest.raises(UsageError, match="no target for faults"):
        guard(3)


def test_keras_variables():
    keras = pytest.importorskip("keras")
    net = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8), keras.layers.Dense(2)])
    guarded, clean = guard(net, code="tmr"), net.get_weights()
    with live.faults(net, Policy(bits="sign,exponent", count=3), seed=1):
        assert guarded.scrub().corrected == 3
        assert all(np.array_equal(a, b) for a, b in zip(net.get_weights(), clean, strict=True))
