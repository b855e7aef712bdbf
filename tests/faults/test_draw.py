"""Plans: who is hit how often, how many bits really differ, and the same plan for the same seed."""

import hashlib

import numpy as np
import pytest
from catalogues import ZOO, bits_hit, drawn, holding, ones, tensor
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ckptflip.bits import as_words, classify, encode, lookup, popcount, scale, to_values
from ckptflip.errors import GuardError, SelectionError, UsageError
from ckptflip.faults import Plan, Policy
from ckptflip.faults.plan import COLUMNS, draw
from ckptflip.faults.record import counts_of

LEAST_P = 1e-3
GOLDEN = [(0, 12, 16384), (1, 0, 33554432), (2, 3, 4096), (2, 7, 64), (4, 8, 1073741824), (5, 10, 4)]
GOLDEN_DIGEST = "ac11dcd68c0af96a479cc5eda06d21feb0501174da77d716bf2614c1a0780c08"
SMALL = [
    tensor("kernel", (40,), layer="dense", role="weight"),
    tensor("bias", (1,), layer="dense", role="bias"),
]


def same(first, second):
    return all(np.array_equal(getattr(first, c), getattr(second, c)) for c in COLUMNS)


def check(plan, tensors=ZOO):
    """What holds for any plan."""
    keys = list(zip(plan.tensor.tolist(), plan.word.tolist(), strict=True))
    assert keys == sorted(set(keys))
    for (t, w), hit, before, after in zip(
        keys, plan.hit.tolist(), plan.before.tolist(), plan.after.tolist(), strict=True
    ):
        assert 0 <= w < tensors[t].words
        assert hit >> tensors[t].number.part_width == 0
        assert (before ^ after) & ~hit == 0
    kinds = [getattr(plan, c).dtype.name for c in COLUMNS]
    assert kinds == ["int32", "int64", "uint64", "uint64", "uint64", "uint16"]


class TestUniform:
    def test_every_bit_of_every_tensor_has_the_same_chance(self):
        """Injectors that draw a tensor first hit a 1-element bias beside a kernel every other time."""
        units = sum(t.words * t.number.part_width for t in ZOO)
        found = {}
        for seed in range(400):
            for hit in bits_hit(drawn(Policy(count=20), seed=seed)):
                found[hit] = found.get(hit, 0) + 1
        counts = np.zeros(units, np.int64)
        counts[: len(found)] = list(found.values())
        assert len(found) > units * 0.9
        assert stats.chisquare(counts).pvalue > LEAST_P

    def test_a_bias_beside_a_large_kernel(self):
        tensors = [tensor("kernel", (1999,)), tensor("bias", (1,))]
        hits = [h for s in range(40) for h in bits_hit(drawn(Policy(count=500), tensors, s))]
        on_bias = sum(t == 1 for t, _, _ in hits)
        assert stats.binomtest(on_bias, len(hits), 1 / 2000).pvalue > LEAST_P

    def test_each_bit_position_has_the_same_chance(self):
        """Some injectors only ever touch the mantissa."""
        hits = bits_hit(drawn(Policy(count=6400), [tensor("w", (10**6,))]))
        assert stats.chisquare(np.bincount([b for _, _, b in hits], minlength=32)).pvalue > LEAST_P

    @pytest.mark.parametrize("bits", ["exponent", "all,!critical", "sign", "0-3,31"])
    def test_chosen_bits_only_and_all_alike(self, bits):
        from ckptflip.bits import BitSpec

        mask = BitSpec(bits).mask(lookup("float32"))
        hits = bits_hit(drawn(Policy(count=2000, bits=bits), [tensor("w", (10**6,))]))
        found = np.bincount([b for _, _, b in hits], minlength=32)
        eligible = np.array([bool(mask >> b & 1) for b in range(32)])
        assert found[~eligible].sum() == 0
        assert eligible.sum() == 1 or stats.chisquare(found[eligible]).pvalue > LEAST_P

    def test_both_parts_of_complex_numbers(self):
        plan = drawn(Policy(count=4000), [tensor("c", (10**5,), "complex64")])
        parts = np.bincount(plan.word % 2, weights=np.bitwise_count(plan.hit))
        assert stats.chisquare(parts).pvalue > LEAST_P


class TestDesigns:
    def test_each_tensor_alike(self):
        tensors = [tensor("a", (10**6,)), tensor("b", (10**4,)), tensor("c", (10**5,), "int8")]
        plan = drawn(Policy(count=3000, design="tensor"), tensors)
        assert stats.chisquare(np.bincount([t for t, _, _ in bits_hit(plan)])).pvalue > LEAST_P

    def test_each_layer_alike_though_layers_interleave(self):
        tensors = [tensor(f"t{i}", (10 ** (3 + i),), layer="xyx"[i % 3]) for i in range(4)]
        plan = drawn(Policy(count=3000, design="layer"), tensors)
        check(plan, tensors)
        on = np.bincount([t for t, _, _ in bits_hit(plan)], minlength=4)
        by_layer = [on[0] + on[2] + on[3], on[1]]
        assert stats.chisquare(by_layer).pvalue > LEAST_P
        within = np.array([10**3, 10**5, 10**6]) / 1_101_000
        assert stats.chisquare(on[[0, 2, 3]], within * by_layer[0]).pvalue > LEAST_P

    @pytest.mark.parametrize("design", ["tensor", "layer"])
    def test_a_full_group_leaves_the_rest_to_the_others(self, design):
        plan = drawn(Policy(count=41 * 32 - 5, design=design), SMALL)
        assert plan.bits_hit == plan.bits_effective == 41 * 32 - 5

    @pytest.mark.parametrize("design", ["tensor", "layer"])
    def test_guards_apply_to_every_design(self, design):
        tensors = [tensor(f"t{i}", (50,), layer="xyx"[i % 3]) for i in range(4)]
        arrays = [np.full(50, 0x3F800000, np.uint32)] * 4
        policy = Policy(count=90, design=design, forbid=("extreme",), bits="exponent")
        plan = drawn(policy, tensors, read=holding(arrays))
        check(plan, tensors)
        assert plan.bits_hit == 90
        assert not classify(plan.after.astype(np.uint32), lookup("float32")).extreme.any()


class TestCounts:
    @given(st.integers(1, 400), st.integers(0, 50), st.sampled_from(["all", "exponent", "mantissa", "!sign"]))
    def test_as_many_flips_as_asked_for_really_differ(self, count, seed, bits):
        """Distinct bits: no second flip undoes a first, as happens when drawing with replacement."""
        plan = drawn(Policy(count=count, bits=bits), seed=seed)
        check(plan)
        assert plan.bits_hit == plan.bits_effective == count == popcount(plan.before ^ plan.after)
        assert plan.words_effective == len(plan)
        assert counts_of(plan).tensors == np.unique(plan.tensor).size

    def test_every_single_bit(self):
        units = sum(t.words * t.number.part_width for t in ZOO)
        plan = drawn(Policy(count=units))
        assert plan.bits_effective == units
        assert len(plan) == sum(t.words for t in ZOO)
        assert same(plan, drawn(Policy(fraction=1.0), seed=9))

    def test_one_more_than_there_is(self):
        with pytest.raises(SelectionError, match="count 1313 is larger than the 1312 eligible bits"):
            drawn(Policy(count=1313), SMALL)
        with pytest.raises(SelectionError, match="larger than the 41 eligible words"):
            drawn(Policy(count=42, fault="value:0"), SMALL)
        with pytest.raises(SelectionError, match="larger than the 1189 eligible placements"):
            drawn(Policy(count=1190, fault="burst:4"), SMALL)

    def test_one_fault_unless_told_otherwise(self):
        assert drawn(Policy()).bits_effective == 1

    @pytest.mark.parametrize(("fraction", "count"), [(0.25, 328), (1e-9, 1), (0.5, 656), (0.0012, 2)])
    def test_fraction(self, fraction, count):
        assert drawn(Policy(fraction=fraction), SMALL).bits_effective == count

    def test_a_million_faults(self):
        plan = drawn(Policy(count=10**6), [tensor("w", (10**8,))])
        assert plan.bits_effective == 10**6

    def test_an_enormous_catalogue_at_a_tiny_rate(self):
        tensors = [tensor(f"w{i}", (10**6, 10**5)) for i in range(4)]  # 1.28e13 bits
        counts = [drawn(Policy(ber=1e-12), tensors, s).bits_effective for s in range(300)]
        assert stats.chisquare(np.bincount(np.array(counts) >= 13), None).pvalue > 0.001
        assert abs(np.mean(counts) - 12.8) < 4 * np.sqrt(12.8 / 300)
        assert drawn(Policy(count=5), tensors).bits_effective == 5

    def test_ber_counts_are_binomial_and_may_be_none(self):
        counts = [drawn(Policy(ber=1e-3), SMALL, s).bits_effective for s in range(800)]
        law = stats.binom(41 * 32, 1e-3)
        found = np.bincount(np.minimum(counts, 4), minlength=5)
        expected = 800 * np.array([*law.pmf(range(4)), law.sf(3)])
        assert found[0] > 0
        assert stats.chisquare(found, expected).pvalue > LEAST_P

    def test_ber_one_hits_every_bit(self):
        assert drawn(Policy(ber=1.0), SMALL).bits_effective == 41 * 32


class TestSelection:
    def test_conv1_never_hits_conv10(self):
        """A prefix match would take conv10 for conv1."""
        plan = drawn(Policy(tensors=("conv1",), fraction=1.0))
        assert {ZOO[t].name for t in plan.tensor.tolist()} == {"conv1.weight", "conv1.bias"}

    def test_conditions_and_exclusions(self):
        plan = drawn(Policy(tensors=("!conv1.bias",), layers=("conv1", "bn"), fraction=1.0))
        assert {ZOO[t].name for t in plan.tensor.tolist()} == {"conv1.weight", "bn.scale"}
        plan = drawn(Policy(roles=("state",), fraction=1.0))
        assert {ZOO[t].name for t in plan.tensor.tolist()} == {"adam/step"}

    def test_tensors_without_such_bits_are_passed_over(self):
        plan = drawn(Policy(bits="critical", fraction=1.0))
        floats = {t.name for t in ZOO if t.number.is_float and t.size}
        assert {ZOO[t].name for t in plan.tensor.tolist()} == floats

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({"rows": "1,3-9"}, {*range(6, 12), *range(18, 24)}),
            ({"slice": "1:3,:,0"}, {6, 8, 10, 12, 14, 16}),
            ({"slice": "-1"}, {*range(18, 24)}),
        ],
    )
    def test_rows_and_slices(self, options, expected):
        plan = drawn(Policy(tensors=("conv1.weight",), fraction=1.0, **options))
        assert set(plan.word.tolist()) == expected
        assert plan.bits_effective == 32 * len(expected)

    def test_rows_of_complex_numbers_hold_both_parts(self):
        plan = drawn(Policy(tensors=("fft.kernel",), rows="1", fraction=1.0))
        assert plan.word.tolist() == [6, 7, 8, 9, 10, 11]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"tensors": ("conv2",)}, "did you mean"),
            ({"tensors": ("empty",)}, "the selected tensors are empty: they hold no bits"),
            (
                {"tensors": ("bn",), "bits": "16-20"},
                "no selected tensor has bits '16-20' with room for 'flip'",
            ),
            ({"tensors": ("quantised",), "bits": "exponent"}, "their dtypes: int8"),
            ({"tensors": ("quantised",), "fault": "burst:9"}, "with room for 'burst:9'"),
            (
                {"tensors": ("bn",), "rows": "3-9"},
                "rows '3-9' lies outside every selected tensor (bn.scale (3,))",
            ),
            ({"tensors": ("adam",), "slice": "0"}, "slice '0' lies outside every selected tensor"),
            ({"bits": "all,!all"}, "no selected tensor has bits"),
        ],
    )
    def test_nothing_to_hit(self, options, message):
        with pytest.raises(SelectionError) as caught:
            drawn(Policy(**options))
        assert message in str(caught.value)


class TestFaultModels:
    @pytest.mark.parametrize(("fault", "effective"), [("set0", 16), ("set1", 16)])
    def test_stuck_bits_count_both_ways(self, fault, effective):
        """Every second bit is set already: half of the faults have an effect; both counts are told."""
        plan = drawn(Policy(fault=fault, count=32), [tensor("x", (1,))])
        assert (plan.bits_hit, plan.bits_effective) == (32, effective)
        assert plan.after.tolist() == [0 if fault == "set0" else 0xFFFFFFFF]

    @given(
        st.integers(1, 40),
        st.sampled_from(["burst:2", "burst:5", "mask:101", "mask:10011"]),
        st.integers(0, 9),
    )
    def test_wide_faults_neither_overlap_nor_cancel(self, count, fault, seed):
        policy = Policy(fault=fault, count=count)
        plan = drawn(policy, SMALL, seed)
        check(plan, SMALL)
        pattern = {"burst:2": 0b11, "burst:5": 0b11111, "mask:101": 0b101, "mask:10011": 0b10011}[fault]
        assert plan.bits_hit == plan.bits_effective == count * pattern.bit_count()

    def test_a_burst_keeps_inside_its_word_and_bits(self):
        plan = drawn(Policy(fault="burst:3", bits="23-30", count=30), [tensor("w", (1000,))])
        for hit in plan.hit.tolist():
            low = (hit & -hit).bit_length() - 1
            assert 23 <= low <= 28 or hit.bit_count() > 3
            assert hit & ~0x7F800000 == 0

    def test_a_mask_lies_as_it_is_written(self):
        plan = drawn(Policy(fault="mask:1101", count=1), [tensor("w", (1,))])
        hit = int(plan.hit[0])
        assert hit // (hit & -hit) == 0b1101

    def test_placements_are_uniform(self):
        lows = []
        for seed in range(1500):
            hit = int(drawn(Policy(fault="burst:4"), [tensor("b", (1,), "int8")], seed).hit[0])
            lows.append((hit & -hit).bit_length() - 1)
        found = np.bincount(lows)
        assert found.size == 5
        assert stats.chisquare(found).pvalue > LEAST_P

    def test_bursts_that_fill_a_word(self):
        plan = drawn(Policy(fault="burst:32", count=7), [tensor("w", (7,))])
        assert plan.hit.tolist() == [0xFFFFFFFF] * 7

    @pytest.mark.parametrize("count", [9, 30])
    def test_bursts_without_room_end_soon(self, count, soon):
        with pytest.raises(GuardError, match="cannot be placed without overlap"):
            drawn(Policy(fault="burst:8", count=count), [tensor("x", (2,))])

    def test_many_bursts_without_room_end_soon(self, soon):
        with pytest.raises(GuardError, match="cannot be placed without overlap"):
            drawn(Policy(fault="burst:8", count=100_000), [tensor("x", (10_000,))])

    def test_bursts_at_a_rate_may_overlap_but_never_cancel(self):
        plan = drawn(Policy(fault="burst:4", ber=0.2), SMALL)
        assert plan.bits_hit == plan.bits_effective

    @pytest.mark.parametrize("factor", ["2", "-0.5", "0"])
    def test_scale(self, factor):
        plan = drawn(Policy(fault=f"scale:{factor}", fraction=1.0))
        check(plan)
        assert len(plan) == sum(t.words for t in ZOO)
        for t, rows in plan.by_tensor():
            number = ZOO[t].number
            before = plan.before[rows].astype(number.word_dtype)
            assert plan.after[rows].tolist() == scale(before, number, float(factor)).tolist()

    def test_value_in_every_format_that_holds_it(self):
        plan = drawn(Policy(fault="value:1", fraction=1.0))
        for t, rows in plan.by_tensor():
            assert set(plan.after[rows].tolist()) == {encode("1", ZOO[t].number)}

    def test_value_as_a_word(self):
        plan = drawn(Policy(fault="value:0x7f800001", count=5, tensors=("conv1",)))
        assert plan.after.tolist() == [0x7F800001] * 5  # a signalling NaN, as asked for

    def test_value_that_a_tensor_cannot_hold(self):
        with pytest.raises(UsageError, match="outside -128 … 127, the range of int8"):
            drawn(Policy(fault="value:300", tensors=("quantised",)))

    @pytest.mark.parametrize("fault", ["value:1", "scale:2", "set0", "set1", "flip"])
    def test_bits_beside_a_narrow_number_stay(self, fault):
        narrow = [tensor("n", (4,), "int4")]
        plan = drawn(Policy(fault=fault, fraction=1.0), narrow, read=holding([np.full(4, 0xA3, np.uint8)]))
        check(plan, narrow)
        assert {a & 0xF0 for a in plan.after.tolist()} == {0xA0}


class TestGuards:
    def weights(self, n=400):
        values = np.random.default_rng(0).normal(0, 0.1, n).astype(np.float32)
        return [tensor("w", (n,))], holding([as_words(values)])

    @pytest.mark.parametrize("forbid", [("nan",), ("inf",), ("extreme",), ("nan", "inf", "extreme:100")])
    def test_forbidden_results_are_redrawn(self, forbid):
        tensors, read = self.weights()
        plan = drawn(Policy(bits="exponent", count=2000, forbid=forbid), tensors, read=read)
        assert plan.bits_effective == 2000
        found = classify(plan.after.astype(np.uint32), lookup("float32"), 100.0 if len(forbid) > 1 else 1e10)
        for kind in forbid:
            assert not getattr(found, kind.partition(":")[0]).any()

    def test_without_guards_such_results_do_occur(self):
        tensors, read = self.weights()
        plan = drawn(Policy(bits="exponent", count=2000), tensors, read=read)
        assert classify(plan.after.astype(np.uint32), lookup("float32")).extreme.any()

    def test_what_is_allowed_stays_uniform(self):
        ones_ = holding([np.full(10**6, 0x3F800000, np.uint32)])
        found = np.zeros(32, int)
        for seed in range(3):
            plan = drawn(Policy(count=500, forbid=("nan", "inf")), [tensor("w", (10**6,))], seed, ones_)
            for _, _, bit in bits_hit(plan):
                found[bit] += 1
        assert found[30] == 0  # 1.0 with its critical bit flipped is an infinity
        assert stats.chisquare(np.delete(found, 30)).pvalue > LEAST_P

    @pytest.mark.parametrize("size", [1, 200, 10**9])
    @pytest.mark.parametrize("count", [1, 100, 100_000])
    def test_the_impossible_ends_soon(self, size, count, soon):
        if count > size:
            return
        with pytest.raises(GuardError, match=r"without nan cannot be drawn .* take bits out"):
            drawn(Policy(fault="value:nan", count=count, forbid=("nan",)), [tensor("w", (size,))])

    def test_the_last_possible_ones_are_found(self):
        """9 of 10 words would become infinite; the others must all be found."""
        words = np.full(300, 0x3F800000, np.uint32)
        words[::10] = 0
        policy = Policy(bits="critical", count=30, forbid=("inf",))
        plan = drawn(policy, [tensor("w", (300,))], read=holding([words]))
        assert plan.word.tolist() == list(range(0, 300, 10))
        with pytest.raises(GuardError):
            drawn(
                Policy(bits="critical", count=31, forbid=("inf",)),
                [tensor("w", (300,))],
                read=holding([words]),
            )

    def test_only_the_fault_to_blame_is_out(self):
        """In crowded words, one critical bit must not take the harmless faults beside it away."""
        read = holding([np.full(100, 0x3F800000, np.uint32)])
        policy = Policy(bits="mantissa,30", count=2300, forbid=("nan", "inf"))
        assert drawn(policy, [tensor("w", (100,))], read=read).bits_effective == 2300

    def test_interleaved_layers_do_not_mix_up_whom_to_blame(self):
        tensors = [
            tensor(n, (k,), layer=layer) for n, k, layer in (("a", 5, "x"), ("b", 7, "y"), ("c", 11, "x"))
        ]
        arrays = [
            np.full(5, 0x3F800000, np.uint32),
            np.zeros(7, np.uint32),
            np.full(11, 0x3F800000, np.uint32),
        ]
        policy = Policy(bits="critical", count=7, design="layer", forbid=("inf",))
        plan = drawn(policy, tensors, read=holding(arrays))
        assert plan.tensor.tolist() == [1] * 7

    def test_guards_with_bursts(self):
        tensors, read = self.weights()
        plan = drawn(Policy(fault="burst:3", count=500, forbid=("nan", "inf", "extreme")), tensors, read=read)
        assert plan.bits_effective == 1500
        assert not any(c.any() for c in classify(plan.after.astype(np.uint32), lookup("float32")))

    def test_guards_with_a_rate(self):
        tensors, read = self.weights()
        free = drawn(Policy(ber=0.02), tensors, read=read)
        plan = drawn(Policy(ber=0.02, forbid=("extreme",)), tensors, read=read)
        assert plan.bits_effective == free.bits_effective
        assert not classify(plan.after.astype(np.uint32), lookup("float32")).extreme.any()


class TestCombined:
    def test_policies_act_one_after_the_other(self):
        tensors = [tensor("x", (50,))]
        plan = drawn([Policy(fault="value:1", fraction=1.0), Policy(fault="scale:-3", count=20)], tensors)
        values = to_values(plan.after.astype(np.uint32), lookup("float32"))
        assert sorted(values.tolist()) == [-3.0] * 20 + [1.0] * 30
        assert np.bincount(plan.policies, minlength=4).tolist() == [0, 30, 0, 20]
        assert plan.before.tolist() == ones(tensors)(0, np.arange(50)).tolist()
        check(plan, tensors)

    def test_policies_draw_independently(self):
        plan = drawn([Policy(count=30), Policy(count=30)], [tensor("x", (10**6,))])
        first, second = plan.take(plan.policies == 1), plan.take(plan.policies == 2)
        assert (first.bits_hit, second.bits_hit) == (30, 30)
        assert same(first, drawn(Policy(count=30), [tensor("x", (10**6,))]))

    def test_disjoint_policies_over_the_zoo(self):
        policies = [
            Policy(roles=("bias",), count=4),
            Policy(layers=("q",), fault="set1", fraction=1.0),
            Policy(ber=0.01),
        ]
        plan = drawn(policies)
        check(plan)
        assert set(plan.policies.tolist()) <= set(range(1, 8))

    def test_two_flips_of_one_bit_cancel_and_the_counts_say_so(self):
        plan = drawn([Policy(fraction=1.0), Policy(fraction=1.0)], SMALL)
        assert (plan.bits_hit, plan.bits_effective, plan.words_effective) == (41 * 32, 0, 0)


class TestReproducibility:
    def test_golden_plan(self):
        """Plans of published campaigns depend on this; it never changes."""
        plan = drawn(Policy(count=6), seed=2021)
        found = list(zip(plan.tensor.tolist(), plan.word.tolist(), plan.hit.tolist(), strict=True))
        assert found == GOLDEN

    def test_golden_digest_over_many_policies(self):
        policies = [
            Policy(ber=0.05),
            Policy(count=9, design="layer", bits="exponent,msb"),
            Policy(fault="burst:2", count=5),
        ]
        digest = hashlib.sha256()
        for seed in range(5):
            plan = drawn(policies, seed=seed)
            for column in COLUMNS:
                digest.update(getattr(plan, column).astype("<u8").tobytes())
        assert digest.hexdigest() == GOLDEN_DIGEST

    def test_seeds(self):
        """The seed governs every draw."""
        plans = [drawn(Policy(count=5), seed=s) for s in (0, 1, 2, 2**40)]
        assert same(plans[0], drawn(Policy(count=5), seed=0))
        assert not any(same(plans[i], plans[j]) for i in range(4) for j in range(i))
        with pytest.raises(UsageError, match=r"seed must be a whole number from 0 to .*, not -1"):
            drawn(Policy(), seed=-1)

    def test_global_random_state_is_neither_used_nor_touched(self):
        """A global generator would make plans depend on who drew before."""
        import random

        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        states = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
        first = drawn(Policy(ber=0.1, forbid=("nan",)), seed=3)
        assert (random.getstate(), np.random.get_state()[1].tolist()) == states  # noqa: NPY002
        random.seed(2)
        np.random.seed(2)  # noqa: NPY002
        assert same(first, drawn(Policy(ber=0.1, forbid=("nan",)), seed=3))

    def test_the_same_bits_whatever_the_words_hold(self):
        words = [np.zeros(t.words, t.number.word_dtype) for t in ZOO]
        first, second = drawn(Policy(count=50)), drawn(Policy(count=50), read=holding(words))
        assert np.array_equal(first.word, second.word)
        assert np.array_equal(first.hit, second.hit)

    def test_reading_is_asked_for_hit_words_only(self):
        asked = []

        def read(position, words):
            asked.append(words.size)
            return ones(ZOO)(position, words)

        draw(Policy(count=7), ZOO, read, 1)
        assert sum(asked) <= 7


def test_an_empty_plan():
    plan = drawn(Policy(ber=1e-15), SMALL)
    assert (len(plan), plan.bits_hit, plan.bits_effective, list(plan.by_tensor())) == (0, 0, 0, [])
    assert isinstance(plan.take(slice(0, 3)), Plan)
    assert len(drawn([Policy(ber=1e-15), Policy(count=3)], SMALL)) in (1, 2, 3)


def test_a_plan_by_tensor():
    plan = drawn(Policy(count=100))
    for t, rows in plan.by_tensor():
        assert set(plan.tensor[rows].tolist()) == {t}
    assert sum(rows.stop - rows.start for _, rows in plan.by_tensor()) == len(plan)
