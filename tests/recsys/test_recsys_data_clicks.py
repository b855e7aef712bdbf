"""The generated log: any slice by itself, Zipf ids, labels that follow the truth, a known best AUC."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from ckptflip.errors import UsageError
from ckptflip.recsys.data import clicks, logs, truth
from ckptflip.recsys.data.best import best_auc
from ckptflip.recsys.data.clicks import KAGGLE_SIZES, ClickSpec, generate, stream

ROWS = 60_000


@pytest.fixture(scope="module")
def log() -> clicks.Generated:
    return generate(ClickSpec(11), 0, ROWS)


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """The share of pairs in order, ties half, by going through all pairs."""
    one, none = scores[labels == 1][:, None], scores[labels == 0][None, :]
    return float((one > none).mean() + 0.5 * (one == none).mean())


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (5, 300), (32_760, 32_790), (59_999, 60_000)])
def test_any_slice_is_generated_by_itself(log: clicks.Generated, start: int, stop: int) -> None:
    part = generate(ClickSpec(11), start, stop)
    assert part.log.labels.tolist() == log.log.labels[start:stop].tolist()
    assert part.log.dense.tolist() == log.log.dense[start:stop].tolist()
    assert part.log.ids.tolist() == log.log.ids[start:stop].tolist()
    assert part.counts.tolist() == log.counts[start:stop].tolist()
    assert part.missing.tolist() == log.missing[start:stop].tolist()
    np.testing.assert_allclose(part.probabilities, log.probabilities[start:stop], rtol=1e-14)


def test_slices_far_away_and_streams() -> None:
    far = 1 << 45
    whole = generate(ClickSpec(11), far, far + 100).log.ids
    parts = [part.log.ids for part in stream(ClickSpec(11), far, far + 100, rows=33)]
    assert [len(part) for part in parts] == [33, 33, 33, 1]
    assert np.concatenate(parts).tolist() == whole.tolist()


def test_the_log_is_the_same_for_ever(log: clicks.Generated) -> None:
    """Ids and counts are exact arithmetic; a change of them changes every study that used the log."""
    digest = hashlib.sha256()
    for array in (log.log.ids[:1000], log.counts[:1000], log.log.labels[:1000].astype(np.int64)):
        digest.update(array.astype("<i8").tobytes())
    assert digest.hexdigest()[:16] == "9f312db43dc4781e"


def test_another_seed_is_another_log(log: clicks.Generated) -> None:
    other = generate(ClickSpec(12), 0, 1000)
    assert (other.log.ids != log.log.ids[:1000]).mean() > 0.5
    assert logs.check(other.log) is other.log


def test_the_arrays_are_a_click_log(log: clicks.Generated) -> None:
    assert logs.check(log.log) is log.log
    assert log.log.dense.shape == (ROWS, 13)
    assert log.log.sizes == ClickSpec(11).tables
    assert 0.2 < log.log.labels.mean() < 0.3


@pytest.mark.parametrize("zipf", [2.0, 1.5, 1.25, 1.0625])
def test_ids_follow_the_power_law(zipf: float) -> None:
    scipy_stats = pytest.importorskip("scipy.stats")
    steps, size, n = round(1 / (zipf - 1)), 5000, 200_000
    uniform = np.random.default_rng(4).random(n)
    ranks = truth.power_law(uniform, truth.root(1 / (size + 1), steps), steps)
    assert ranks.min() == 0
    assert ranks.max() < size
    chances = truth.chances(size, size, steps)
    assert chances.sum() == pytest.approx(1)
    # The continuous law it stands for: ratios of neighbouring chances far from 0.
    assert chances[2000] / chances[1000] == pytest.approx((2001.5 / 1001.5) ** -zipf, rel=1e-3)
    expected = np.append(chances[:200], chances[200:].sum()) * n
    observed = np.bincount(np.minimum(ranks, 200), minlength=201)
    kept = expected > 5
    statistic = ((observed - expected)[kept] ** 2 / expected[kept]).sum()
    assert scipy_stats.chi2.sf(statistic, kept.sum() - 1) > 1e-3


def test_hot_rows_lie_all_over_a_table_and_every_row_is_an_id(log: clicks.Generated) -> None:
    counts = logs.access_counts([log.log])
    for size, found in zip(log.log.sizes, counts, strict=True):
        assert found.sum() == ROWS
        if size <= 30:
            assert (found > 0).all()
    big = counts[2]
    hottest = np.sort(np.argsort(big)[-100:])
    assert big[hottest].sum() > 0.5 * ROWS
    assert np.diff(hottest).max() < big.size / 5


@pytest.mark.parametrize("size", [2, 3, 4, 10, 24, 1000, 1460])
def test_popularity_to_id_is_one_to_one(size: int) -> None:
    for field in range(26):
        factor, shift = clicks._scatter(7, field, size)
        assert np.unique((np.arange(size) * factor + shift) % size).size == size


def test_dense_features(log: clicks.Generated) -> None:
    present = ~log.missing
    assert (log.counts[~present] == 0).all()
    assert log.counts[:, 1].min() == -2
    assert (np.delete(log.counts, 1, axis=1) >= 0).all()
    told = np.where(present, np.maximum(log.counts, 0), 0)
    np.testing.assert_allclose(log.log.dense, np.log1p(told), rtol=1e-6)
    assert present[:, 1].all()
    assert 0.47 < present[:, 11].mean() < 0.53


def test_labels_follow_the_probabilities(log: clicks.Generated) -> None:
    p, labels = log.probabilities, log.log.labels
    order = np.argsort(p)
    for part in np.array_split(order, 20):
        deviation = np.sqrt((p[part] * (1 - p[part])).sum())
        assert abs(labels[part].sum() - p[part].sum()) < 4.5 * deviation


def test_the_products_are_planted(log: clicks.Generated) -> None:
    """Without them the logit would be a sum over fields; the residual from the best such sum is theirs."""
    logit = np.log(log.probabilities / (1 - log.probabilities))
    one, other = log.log.ids[:, 4], log.log.ids[:, 16]
    top, left = np.bincount(one).argsort()[-2:], np.bincount(other).argsort()[-2:]
    mean = np.array([[logit[(one == a) & (other == b)].mean() for b in left] for a in top])
    spread = max(logit[(one == a) & (other == b)].size ** -0.5 for b in left for a in top)
    assert abs(mean[0, 0] - mean[0, 1] - mean[1, 0] + mean[1, 1]) > 4 * 2 * 1.3 * spread


def additive_auc(generated: clicks.Generated, train: int) -> float:
    """What a model without interactions reaches: each field's log odds of a click, counted and added up."""
    log, octaves = generated.log, truth.octaves(np.maximum(generated.counts, 0))
    rate, score = log.labels[:train].mean(), np.zeros(len(log) - train)
    for column in (*log.ids.T, *(2 * octaves).astype(np.int64).T):
        ones, most = log.labels[:train], int(column.max()) + 1
        clicked = np.bincount(column[:train], ones, most) + 20 * rate
        not_clicked = np.bincount(column[:train], 1 - ones, most) + 20 * (1 - rate)
        score += np.log(clicked / not_clicked)[column[train:]]
    return auc(score, log.labels[train:])


def test_interactions_matter_and_the_rest_can_be_learned() -> None:
    generated = generate(ClickSpec(1), 0, 203_000)
    best = best_auc(generated.probabilities[200_000:])
    missed = best.auc - additive_auc(generated, 200_000)
    assert 0.02 < missed < 0.065


@pytest.mark.parametrize("scale", [0.001, 0.1])
def test_the_best_auc_is_realistic_whatever_the_seed_and_scale(scale: float) -> None:
    found = [best_auc(generate(ClickSpec(seed, scale), 0, 20_000).probabilities) for seed in range(5)]
    assert all(0.77 < best.auc < 0.80 for best in found)
    assert max(best.auc for best in found) - min(best.auc for best in found) < 0.012
    rates = [generate(ClickSpec(seed, scale), 0, 20_000).log.labels.mean() for seed in range(5)]
    assert min(rates) > 0.23 and max(rates) < 0.27


def test_the_best_auc_equals_the_mean_over_redrawn_labels(log: clicks.Generated) -> None:
    p = log.probabilities[:400]
    rng = np.random.default_rng(1)
    drawn = np.array([auc(p, rng.random(p.size) < p) for _ in range(3000)])
    best = best_auc(p)
    assert drawn.mean() == pytest.approx(best.auc, abs=4 * drawn.std() / drawn.size**0.5 + 1e-3)
    assert drawn.std() == pytest.approx(best.spread, rel=0.08)


def test_the_error_is_that_of_other_rows() -> None:
    found = [best_auc(part.probabilities) for part in stream(ClickSpec(3), 0, 400_000, rows=1000)]
    values = np.array([best.auc for best in found])
    assert values.std() == pytest.approx(np.mean([best.error for best in found]), rel=0.12)


def test_the_best_auc_by_going_through_all_pairs() -> None:
    p = np.array([0.1, 0.1, 0.4, 0.9, 0.4, 1.0, 0.0])
    pairs = [(i, j) for i in range(7) for j in range(7) if i != j]
    ordered = sum(p[i] * (1 - p[j]) * ((p[i] > p[j]) + 0.5 * (p[i] == p[j])) for i, j in pairs)
    assert best_auc(p).auc == pytest.approx(ordered / sum(p[i] * (1 - p[j]) for i, j in pairs), abs=1e-12)
    assert best_auc(np.full(5, 0.3)).auc == pytest.approx(0.5)


@pytest.mark.parametrize("wrong", [[], [0.5], [0.5, 1.5], [0.5, np.nan], [[0.1, 0.2]]])
def test_no_probabilities(wrong: list[float]) -> None:
    with pytest.raises(UsageError, match="two or more probabilities"):
        best_auc(wrong)


@pytest.mark.parametrize("sure", [0.0, 1.0])
def test_one_class_has_no_best_auc(sure: float) -> None:
    with pytest.raises(UsageError, match="there is no AUC"):
        best_auc([sure] * 4)


def test_tables_by_scale_and_by_hand() -> None:
    assert ClickSpec(scale=1.0).tables == KAGGLE_SIZES
    assert sum(KAGGLE_SIZES) == 33_762_577
    small = ClickSpec().tables
    assert sum(small) < 50_000
    assert all(a == b for a, b in zip(small, KAGGLE_SIZES, strict=True) if b <= 1000)
    assert max(ClickSpec(scale=8).tables) == 81_049_816
    huge = generate(ClickSpec(scale=8), 0, 1000)
    assert logs.check(huge.log).ids[:, 2].max() > 10_000_000
    tiny = generate(ClickSpec(sizes=[2] * 26), 0, 1000)  # type: ignore[arg-type]
    assert tiny.log.ids.max() == 1
    assert np.isfinite(tiny.probabilities).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "seed must be"),
        ({"scale": 0}, "scale is above 0"),
        ({"scale": float("nan")}, "scale is above 0"),
        ({"zipf": 1.3}, "zipf is 2"),
        ({"sizes": (5,) * 25}, "sizes are 26 numbers"),
        ({"sizes": (1,) * 26}, "sizes are 26 numbers"),
    ],
)
def test_specs_that_make_no_sense(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ClickSpec(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (5, 4), (-1, 3), (0, 2**49)])
def test_rows_that_do_not_exist(start: int, stop: int) -> None:
    with pytest.raises(UsageError, match="0 <= start < stop"):
        generate(ClickSpec(), start, stop)
    with pytest.raises(UsageError, match="1 row or more"):
        list(stream(ClickSpec(), 0, 10, rows=0))


def test_octaves_are_within_a_tenth_of_the_logarithm() -> None:
    counts = np.arange(100_000)
    assert np.abs(truth.octaves(counts) - np.log2(counts + 1)).max() < 0.0861
    assert (np.diff(truth.octaves(counts)) > 0).all()


def test_no_framework_is_imported() -> None:
    names = ["clicks", "criteo", "movielens", "splits", "tsv", "best", "ids"]
    code = f"import sys; from ckptflip.recsys.data import {', '.join(names)}; print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "False\n"
