"""Sampling: every set equally likely, counts exactly binomial, the same numbers for ever."""

import hashlib
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ckptflip.errors import UsageError
from ckptflip.faults.sampling import _exponential, bernoulli, distinct, union
from ckptflip.faults.stream import Stream, check_seed, philox

LEAST_P = 1e-3  # seeds are fixed, so a test that passes once passes for ever
GOLDEN_SHA256 = "628264aec238de109550ad346c6e9d07564307e8da562931bff35fbefbca4db0"
GOLDEN_RAW = [16242730742183356629, 11169168799798111308, 6679402142117448868]
GOLDEN_BELOW = [768, 87, 814, 980, 8, 869, 256, 142]
GOLDEN_DISTINCT = [188825055102, 247714311247, 381517196484, 934407487715]
GOLDEN_BERNOULLI = [380694, 432043, 482349, 678875, 942306]


class TestStream:
    def test_golden_values(self):
        """Plans of other machines, versions and years depend on these numbers; they never change."""
        assert Stream(0).raw(3).tolist() == GOLDEN_RAW
        assert Stream(7, 0).below(1000, 8).tolist() == GOLDEN_BELOW
        assert distinct(Stream(7, 1), 10**12, 4).tolist() == GOLDEN_DISTINCT
        assert bernoulli(Stream(7, 2), 10**6, 5e-6).tolist() == GOLDEN_BERNOULLI

    @pytest.mark.parametrize(
        ("counter", "key", "expected"),
        [
            ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
            ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
            (
                (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
                (0xA4093822, 0x299F31D0),
                (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
            ),
        ],
    )
    def test_philox_gives_the_authors_known_answers(self, counter, key, expected):
        words = tuple(np.array([c], np.uint64) for c in counter)
        assert tuple(int(w[0]) for w in philox(words, key)) == expected

    def test_raw_is_philox_of_the_counter_under_the_seed(self):
        counter = tuple(np.array([c], np.uint64) for c in (0, 0, 3, 0))
        a, b, c, d = (int(w[0]) for w in philox(counter, (5, 1)))
        assert Stream(5 + 2**32, 3).raw(2).tolist() == [a | b << 32, c | d << 32]

    @pytest.mark.parametrize("seed", [-1, 2**64, 1.0, True, "1"])
    def test_what_is_no_seed_is_refused(self, seed):
        with pytest.raises(UsageError, match="seed must be"):
            check_seed(seed)

    def test_a_stream_goes_on(self):
        stream = Stream(1)
        assert set(stream.raw(100).tolist()).isdisjoint(stream.raw(100).tolist())

    def test_keys_are_kept_apart(self):
        keys = [(1, 23), (12, 3), (123,), (0, 123), (2**32, 1), (1, 2**31), (2**64 - 1,)]
        assert len({tuple(Stream(*key).raw(2).tolist()) for key in keys}) == len(keys)

    @pytest.mark.parametrize("end", [1, 2, 3, 7, 1000])
    def test_below_is_uniform(self, end):
        found = np.bincount(Stream(2, end).below(end, 20_000), minlength=end)
        assert found.size == end
        assert end == 1 or stats.chisquare(found).pvalue > LEAST_P

    def test_below_reaches_huge_ends_without_bias(self):
        end = 3 << 59
        found = Stream(3).below(end, 4000)
        assert found.min() >= 0
        assert found.max() < end
        assert stats.kstest(found / end, "uniform").pvalue > LEAST_P

    def test_numpys_global_state_is_neither_used_nor_touched(self):
        np.random.seed(1)  # noqa: NPY002
        state = np.random.get_state()[1].tolist()  # noqa: NPY002
        first = distinct(Stream(1), 1000, 5).tolist()
        assert np.random.get_state()[1].tolist() == state  # noqa: NPY002
        np.random.seed(2)  # noqa: NPY002
        assert distinct(Stream(1), 1000, 5).tolist() == first


class TestDistinct:
    @pytest.mark.parametrize(("end", "n", "taken"), [(6, 2, ()), (6, 3, ()), (6, 4, ()), (8, 2, (0, 3, 7)),
                                                     (8, 4, (0, 3, 7)), (7, 1, ()), (7, 6, ())])  # fmt: skip
    def test_every_set_is_equally_likely(self, end, n, taken):
        """Both the direct path and that of the complement."""
        sets = list(itertools.combinations(sorted(set(range(end)) - set(taken)), n))
        at = {s: i for i, s in enumerate(sets)}
        stream = Stream(11, 10 * end + n)
        barred = np.array(taken, np.int64)
        draws = (tuple(distinct(stream, end, n, barred).tolist()) for _ in range(200 * len(sets)))
        found = np.bincount([at[d] for d in draws], minlength=len(sets))
        assert len(sets) == math.comb(end - len(taken), n)
        assert stats.chisquare(found).pvalue > LEAST_P

    @given(st.integers(1, 300), st.data())
    def test_distinct_ascending_inside_and_not_taken(self, end, data):
        taken = data.draw(st.sets(st.integers(0, end - 1), max_size=end))
        n = data.draw(st.integers(0, end - len(taken)))
        found = distinct(Stream(data.draw(st.integers(0, 9))), end, n, np.array(sorted(taken), np.int64))
        assert found.size == n
        assert found.dtype == np.int64
        assert np.all(np.diff(found) > 0)
        assert set(found.tolist()) <= set(range(end)) - taken

    def test_more_than_there_is(self):
        with pytest.raises(ValueError, match="4 positions wanted, 3 left"):
            distinct(Stream(1), 5, 4, np.array([1, 2]))

    def test_huge_end(self):
        end = 1 << 60
        found = distinct(Stream(4), end, 5000)
        assert np.unique(found).size == 5000
        assert stats.kstest(found / end, "uniform").pvalue > LEAST_P

    def test_a_dense_draw_of_a_million(self):
        assert np.unique(distinct(Stream(5), 1_000_001, 1_000_000)).size == 1_000_000


@given(st.lists(st.integers(0, 50)), st.lists(st.integers(0, 50)))
def test_union_equals_that_of_sets(first, second):
    found = union(np.array(first, np.int64), np.array(second, np.int64))
    assert found.tolist() == sorted({*first, *second})


class TestBernoulli:
    @pytest.mark.parametrize(
        ("end", "p"),
        [
            (3 * 10**12, 1e-12),
            (10**15, 1e-14),
            (1000, 1e-2),
            (40, 0.3),
            (30, 0.97),
            (1 << 60, 2.0**-58),
            (1, 0.5),
        ],
    )
    def test_counts_are_binomial(self, end, p):
        stream = Stream(21, end)
        counts = np.array([bernoulli(stream, end, p).size for _ in range(3000)])
        law = stats.poisson(end * p) if end > 10**6 else stats.binom(end, p)
        edges = np.unique(law.ppf(np.linspace(0, 1, 9)[1:-1]))
        found = np.bincount(np.searchsorted(edges, counts), minlength=edges.size + 1)
        expected = np.diff([0, *law.cdf(edges), 1]) * counts.size
        keep = expected > 0
        assert found[~keep].sum() == 0
        assert stats.chisquare(found[keep], expected[keep]).pvalue > LEAST_P

    @pytest.mark.parametrize(("end", "p"), [(50, 0.3), (200, 0.02), (12, 0.9)])
    def test_positions_are_uniform(self, end, p):
        stream = Stream(22, end)
        found = np.zeros(end, np.int64)
        for _ in range(2000):
            hit = bernoulli(stream, end, p)
            assert np.all(np.diff(hit) > 0)
            found[hit] += 1
        assert stats.chisquare(found).pvalue > LEAST_P

    def test_positions_are_uniform_over_a_huge_range(self):
        end = 10**13
        found = bernoulli(Stream(23), end, 5e-10)
        assert found.max() < end
        assert stats.kstest(found / end, "uniform").pvalue > LEAST_P

    @pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
    def test_same_law_as_asking_every_position(self, p):
        """Every one of the 16 subsets of 4 positions has the chance that independence gives it."""
        stream = Stream(24, round(p * 10))
        found = np.bincount(
            [sum(1 << i for i in bernoulli(stream, 4, p).tolist()) for _ in range(8000)], minlength=16
        )
        expected = [8000 * p ** s.bit_count() * (1 - p) ** (4 - s.bit_count()) for s in range(16)]
        assert stats.chisquare(found, expected).pvalue > LEAST_P

    def test_gaps_are_geometric(self):
        gaps = np.diff(bernoulli(Stream(25), 4_000_000, 0.01))
        edges = stats.geom(0.01).ppf(np.linspace(0, 1, 21)[1:-1])
        found = np.bincount(np.searchsorted(edges, gaps), minlength=20)
        expected = np.diff([0, *stats.geom(0.01).cdf(edges), 1]) * gaps.size
        assert stats.chisquare(found, expected).pvalue > LEAST_P

    def test_the_same_positions_on_every_processor(self):
        """numpy's own logarithm gives other positions with AVX-512 than without, once in 10,000 hits."""
        found = bernoulli(Stream(0), 10**17, 1e-12)
        assert hashlib.sha256(found.astype("<i8").tobytes()).hexdigest() == GOLDEN_SHA256

    def test_the_logarithm(self):
        u = np.concatenate(
            [np.random.default_rng(0).random(10_000), 2.0 ** -np.arange(1, 64), 1 - 2.0 ** -np.arange(1, 54)]
        )
        np.testing.assert_allclose(_exponential(u), -np.log1p(-u), rtol=1e-15)

    def test_more_hits_than_one_chunk_holds(self):
        end, p = 6_000_000, 0.5
        found = bernoulli(Stream(26), end, p)
        assert abs(found.size - end * p) < 5 * math.sqrt(end * p * (1 - p))
        assert np.all(np.diff(found) > 0)

    @pytest.mark.parametrize(("p", "expected"), [(1.0, [0, 1, 2]), (0.0, [])])
    def test_ends(self, p, expected):
        assert bernoulli(Stream(1), 3, p).tolist() == expected
        assert bernoulli(Stream(1), 0, p).tolist() == []

    @pytest.mark.parametrize("p", [1e-300, 5e-324])
    def test_a_probability_too_small_to_ever_hit(self, p):
        assert bernoulli(Stream(1), 1 << 60, p).tolist() == []

    def test_just_below_one(self):
        assert bernoulli(Stream(1), 1000, 1 - 2**-53).size == 1000
