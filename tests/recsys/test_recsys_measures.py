"""AUC, DeLong, entropy and calibration against scikit-learn, direct sums over pairs, and hand-made values."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss, roc_auc_score

from ckptflip.errors import UsageError
from ckptflip.recsys import measures


def drawn(seed, rows=300, rate=0.3, levels=0):
    """Labels and scores that go together a little; with `levels`, scores of so many values."""
    draws = np.random.default_rng(seed)
    labels = (draws.random(rows) < rate).astype(np.float32)
    scores = draws.normal(size=rows) + labels
    return labels, np.round(scores * levels) / levels if levels else scores


def by_pairs(labels, scores):
    """AUC and DeLong's variance straight from the definition, over all pairs of a positive and a negative."""
    above, below = scores[labels == 1], scores[labels == 0]
    kernel = (above[:, None] > below) + (above[:, None] == below) / 2
    of_positives, of_negatives = kernel.mean(axis=1), kernel.mean(axis=0)
    variance = of_positives.var(ddof=1) / above.size + of_negatives.var(ddof=1) / below.size
    return kernel.mean(), variance, of_positives, of_negatives


@pytest.mark.parametrize("levels", [0, 3, 1])
def test_the_auc_is_scikit_learn_s(levels):
    for seed in range(10):
        labels, scores = drawn(seed, levels=levels)
        assert measures.auc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-14)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.sampled_from([0.0, 0.25, 0.5, 1.0])), min_size=2, max_size=40))
def test_any_ties_are_ranked_as_scikit_learn_ranks_them(rows):
    labels, scores = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
    found = measures.auc(labels, scores)
    if labels.all() or not labels.any():
        assert found is None
    else:
        assert found == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


def test_hand_made_areas():
    assert measures.auc([0, 1], [0.1, 0.2]) == 1.0
    assert measures.auc([1, 0], [0.1, 0.2]) == 0.0
    assert measures.auc([0, 1, 0, 1], [0.5] * 4) == 0.5
    # Pairs: (0.4: above 0.1, ties 0.4), (0.9: above both) = 3.5 of 4.
    assert measures.auc([0, 0, 1, 1], [0.1, 0.4, 0.4, 0.9]) == 0.875


def test_scores_that_are_nan_rank_last_and_tie():
    nan = math.nan
    assert measures.auc([0, 1, 1], [0.5, nan, 0.9]) == 0.5
    assert measures.auc([1, 0, 0], [0.5, nan, 0.1]) == 1.0
    assert measures.auc([1, 0, 1, 0], [nan] * 4) == 0.5
    assert measures.auc([1, 0], [nan, -math.inf]) == 0.5
    assert measures.delong([1, 0, 0, 1], [0.5, nan, 0.1, 0.2]).unscored == 1
    found = measures.evaluate([0, 1, 1], [0.5, nan, 0.9])
    assert (found.auc, found.unscored) == (0.5, 1)
    assert all(math.isnan(value) for value in (found.loss, found.ne, found.calibration, found.ece))


@pytest.mark.parametrize("levels", [0, 3])
def test_delong_s_variance_is_that_of_the_definition(levels):
    for seed in range(5):
        labels, scores = drawn(seed, rows=120, levels=levels)
        area, variance, *_ = by_pairs(labels, scores)
        found = measures.delong(labels, scores)
        assert found.value == pytest.approx(area, abs=1e-14)
        assert found.variance == pytest.approx(variance, rel=1e-10)
        assert (found.positives, found.negatives) == (labels.sum(), 120 - labels.sum())


def test_a_hand_made_variance():
    # Placements of positives 0.5 and 1, of negatives 1 and 0.5: each has the variance 0.125, over 2 rows.
    found = measures.delong([0, 0, 1, 1], [0.1, 0.6, 0.4, 0.9])
    assert (found.value, found.variance) == (0.75, 0.125)


def test_delong_s_interval_covers_the_true_area():
    """Binormal scores one apart have the area Phi(1/sqrt 2) = 0.7602; 95 of 100 intervals should cover it."""
    truth, inside, repeats = 0.7602499389065233, 0, 1000
    draws = np.random.default_rng(5)
    labels = np.repeat([0, 1], [120, 60])
    for _ in range(repeats):
        found = measures.delong(labels, draws.normal(size=180) + labels)
        inside += found.low <= truth <= found.high
    # Three binomial standard errors on either side.
    assert 0.929 <= inside / repeats <= 0.971


def test_paired_intervals_cover_and_p_values_are_uniform_without_a_difference():
    draws = np.random.default_rng(6)
    labels, repeats, inside, small = np.repeat([0, 1], [120, 60]), 600, 0, 0
    for _ in range(repeats):
        shared = draws.normal(size=180) + labels
        first, second = (shared + draws.normal(size=180) for _ in range(2))
        found = measures.compare(labels, first, second)
        inside += found.low <= 0 <= found.high
        small += found.p < 0.1
    assert 0.92 <= inside / repeats <= 0.975
    assert 0.06 <= small / repeats <= 0.14


def test_the_paired_variance_is_that_of_the_definition():
    labels, first = drawn(1, rows=150)
    second = first + np.random.default_rng(9).normal(size=150) / 2
    a, _, first_positive, first_negative = by_pairs(labels, first)
    b, _, second_positive, second_negative = by_pairs(labels, second)
    covariances = [np.cov(first_positive, second_positive), np.cov(first_negative, second_negative)]
    sizes = [first_positive.size, first_negative.size]
    matrix = sum(found / size for found, size in zip(covariances, sizes, strict=True))
    variance = matrix[0, 0] + matrix[1, 1] - 2 * matrix[0, 1]
    found = measures.compare(labels, first, second)
    assert found.difference == pytest.approx(b - a, abs=1e-14)
    assert found.variance == pytest.approx(variance, rel=1e-9)
    assert found.p == pytest.approx(math.erfc(abs(b - a) / math.sqrt(2 * variance)))
    back = measures.compare(labels, second, first)
    assert (back.difference, back.p) == (-found.difference, found.p)


def test_scores_of_equal_ranks_do_not_differ():
    labels, scores = drawn(2)
    found = measures.compare(labels, scores, 3 * scores + 1)
    assert (found.difference, found.variance, found.p, found.low, found.high) == (0, 0, 1, 0, 0)


def test_perfect_separation_leaves_room_below():
    found = measures.delong([0] * 50 + [1] * 20, list(range(70)))
    assert (found.value, found.variance, found.high) == (1.0, 0.0, 1.0)
    # Wilson's lower bound of 20 of 20.
    assert found.low == pytest.approx(20 / (20 + 1.959963984540054**2))
    worst = measures.delong([1] * 20 + [0] * 50, list(range(70)))
    assert (worst.value, worst.low) == (0.0, 0.0)
    assert worst.high == pytest.approx(1 - found.low)
    ties = measures.delong([0, 1, 0, 1], [0.5] * 4)
    assert ties.low < 0.5 < ties.high


def test_more_confidence_is_a_wider_interval():
    labels, scores = drawn(3)
    narrow, wide = (measures.delong(labels, scores, confidence) for confidence in (0.9, 0.99))
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high


def test_losses_are_scikit_learn_s():
    labels, scores = drawn(4)
    probabilities = 1 / (1 + np.exp(-scores))
    assert measures.log_loss(labels, probabilities) == pytest.approx(log_loss(labels, probabilities))
    base = np.full(labels.size, labels.mean(dtype=np.float64))
    assert measures.normalised_entropy(labels, base) == pytest.approx(1.0)
    expected = log_loss(labels, probabilities) / log_loss(labels, base)
    assert measures.normalised_entropy(labels, probabilities) == pytest.approx(expected)


def test_a_sure_error_costs_a_hundred():
    assert measures.log_loss([1], [0.0]) == 100.0
    assert measures.log_loss([0, 0], [1.0, 0.0]) == 50.0


def test_hand_made_calibration():
    labels, probabilities = [0, 1, 1, 0], [0.05, 0.55, 0.55, 0.25]
    assert measures.calibration(labels, probabilities) == pytest.approx(0.7)
    # Of 2 bins: 0.05 and 0.25 are 0.3 too many, 0.55 and 0.55 are 0.9 too few; of 4 rows.
    assert measures.calibration_error(labels, probabilities, bins=2) == pytest.approx(1.2 / 4)
    assert measures.calibration_error([1, 0], [1.0, 0.0]) == 0.0


@pytest.mark.parametrize(("label", "note"), [
    (0, "all 3 labels are 0: there is no AUC, no normalised entropy and no calibration"),
    (1, "all 3 labels are 1: there is no AUC and no normalised entropy"),
])  # fmt: skip
def test_one_class_has_no_auc_and_says_so(label, note):
    labels, scores = [label] * 3, [0.2, 0.4, 0.9]
    assert measures.auc(labels, scores) is None
    assert measures.delong(labels, scores) is None
    assert measures.compare(labels, scores, scores) is None
    found = measures.evaluate(labels, scores)
    assert (found.auc, found.auc_se, found.ne, found.note) == (None, None, None, note)
    assert (found.rows, found.positives) == (3, 3 * label)
    assert (found.calibration is None) == (label == 0)
    assert found.loss > 0


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: measures.auc([0, 1], [0.5]), r"shapes are \(2,\) and \(1,\)"),
        (lambda: measures.auc([], []), "the split is empty"),
        (lambda: measures.auc([0, 2], [0.1, 0.2]), "not 2"),
        (lambda: measures.auc([0, math.nan], [0.1, 0.2]), "not nan"),
        (lambda: measures.evaluate([0, 1], [0.5, 1.5]), "are these logits"),
        (lambda: measures.delong([0, 1], [0.5, 0.6], confidence=95), "between 0 and 1"),
        (lambda: measures.calibration_error([0, 1], [0.5, 0.6], bins=0), "bins"),
    ],
)
def test_bad_input_is_named(call, said):
    with pytest.raises(UsageError, match=said):
        call()
