"""Policies on detection: what is raised, counted, computed again."""

import pytest

from ckptflip.errors import CkptflipError, DetectedError, UsageError
from ckptflip.protect.detection import ON_ERROR, Detections, policy, settle


def never():
    raise AssertionError("not asked to compute again")


def test_raise_says_where_and_what():
    seen = Detections()
    with pytest.raises(DetectedError, match=r"fc1: a fault was found: row 3 is off; run it again"):
        settle("raise", seen, "fc1", "row 3 is off", 41, never)
    assert seen == Detections(faulty=1)


def test_count_goes_on_with_the_faulty_result():
    seen = Detections(calls=5)
    assert settle("count", seen, "fc1", "", 41, never) == 41
    assert seen == Detections(calls=5, faulty=1)


def test_recompute_gives_the_new_result():
    seen = Detections()
    assert settle("recompute", seen, "fc1", "", 41, lambda: (42, True)) == 42
    assert seen == Detections(faulty=1, recomputed=1)


def test_a_fault_that_stays_is_raised_also_by_recompute():
    seen = Detections()
    with pytest.raises(DetectedError, match="load the checkpoint anew"):
        settle("recompute", seen, "fc1", "", 41, lambda: (41, False))
    assert seen == Detections(faulty=1)


def test_counts_add_up():
    assert Detections(1, 2, 3, 4) + Detections(10, 20, 30, 40) == Detections(11, 22, 33, 44)


@pytest.mark.parametrize("name", ON_ERROR)
def test_names_of_policies(name):
    assert policy(name) == name


def test_another_name_lists_the_policies():
    with pytest.raises(UsageError, match="'ignore' is no policy; there are: raise, count, recompute"):
        policy("ignore")


def test_found_faults_have_the_exit_code_of_corruption():
    assert DetectedError.exit_code == 3 and issubclass(DetectedError, CkptflipError)
