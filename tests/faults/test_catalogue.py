"""How tensors are named: globs, layers, roles, exclusions, and what is said when nothing matches."""

import pytest
from catalogues import ZOO, tensor
from hypothesis import given
from hypothesis import strategies as st

from ckptflip.errors import SelectionError, UsageError
from ckptflip.faults import matches, select


def names(**conditions):
    return [ZOO[i].name for i in select(ZOO, **conditions)]


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("model/conv1.weight", "conv1", True),
        ("model/conv10.weight", "conv1", False),  # the peer's prefix match hits both
        ("conv1/kernel", "conv1", True),
        ("conv10/kernel", "conv1", False),
        ("/conv1/kernel", "conv1", True),
        ("conv1/kernel", "/conv1/", True),
        ("xconv1/kernel", "conv1", False),
        ("model/conv1.weight", "conv1*", True),
        ("model/conv10.weight", "conv1*", True),
        ("model/conv1.weight", "conv?.weight", True),
        ("model/conv10.weight", "conv[0-9].weight", False),
        ("model/conv1.weight", "*.weight", True),
        ("model/conv1.weight", "weight", False),
        ("model/conv1.weight", "model", True),
        ("model/conv1.weight", "model/conv1", True),
        ("other/model/conv1", "model/conv1", False),
        ("layers/dense_1/vars/0", "layers/dense", False),
        ("a.b.c", "a.b", True),
        ("a.bc", "a.b", False),
        ("axb", "a.b", False),
        ("param_groups[0]", "param_groups[0]", True),
        ("Conv1", "conv1", False),
    ],
)
def test_matches(name, pattern, expected):
    assert matches(name, pattern) is expected


@given(st.text(min_size=1).filter(lambda name: name.strip("/")))
def test_every_name_matches_itself(name):
    assert matches(name, name)


def test_conditions_narrow_each_other():
    assert names() == [t.name for t in ZOO]
    assert names(names=["conv1"]) == ["conv1.weight", "conv1.bias"]
    assert names(names=["conv1", "embed"]) == ["conv1.weight", "conv1.bias", "embed"]
    assert names(names=["conv*"], roles=["bias"]) == ["conv1.bias"]
    assert names(layers=["conv10"]) == ["conv10.weight"]
    assert names(layers=["conv1", "bn"], roles=["weight", "norm"]) == ["conv1.weight", "bn.scale"]


def test_exclusion():
    assert names(names=["conv*", "!conv10"]) == ["conv1.weight", "conv1.bias"]
    assert names(names=["!conv10", "conv*"]) == ["conv1.weight", "conv1.bias"]
    assert "quantised" not in names(layers=["!q"])
    assert len(names(layers=["!q"])) == len(ZOO) - 3


def test_aliases_are_names_of_the_same_tensor():
    assert names(names=["head"]) == ["embed"]
    assert "embed" not in names(names=["!head.weight"])


def test_role_groups():
    assert names(roles=["state"]) == ["adam/step"]
    assert set(names(roles=["model"])) == {t.name for t in ZOO} - {"adam/step", "mask"}


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ({"names": ["conv2.weight"]}, "did you mean 'conv1"),
        ({"names": ["conv1", "zzz"]}, "tensors 'zzz' matches nothing; there are "),
        ({"names": ["!zzz"]}, "tensors 'zzz' matches nothing"),
        ({"layers": ["convl"]}, "layers 'convl' matches nothing; did you mean 'conv1'?"),
        ({"names": ["bn"], "roles": ["bias"]}, "no tensor satisfies tensors bn and roles bias together"),
        ({"names": ["bn", "!bn"]}, "no tensor satisfies tensors bn, !bn together"),
        ({"roles": ["rng"]}, "the target has the roles bias, counter,"),
    ],
)
def test_nothing_selected(conditions, message):
    with pytest.raises(SelectionError) as caught:
        select(ZOO, **conditions)
    assert message in str(caught.value)


def test_nothing_to_select_from():
    with pytest.raises(SelectionError, match="holds no tensor"):
        select([])
    with pytest.raises(SelectionError, match="the target has none"):
        select([tensor("a", (1,))], layers=["x"])


@pytest.mark.parametrize(
    ("role", "message"), [("wieght", "did you mean 'weight'"), ("qq", "use weight, bias, norm")]
)
def test_roles_are_checked(role, message):
    with pytest.raises(UsageError, match=message):
        select(ZOO, roles=[role])


def test_a_tensor_counts_its_words_and_bytes():
    fft, packed, step = ZOO[4], ZOO[7], ZOO[9]
    assert (fft.size, fft.words, fft.nbytes) == (6, 12, 48)
    assert (packed.size, packed.words, packed.nbytes) == (9, 9, 9)
    assert (step.size, step.words, step.nbytes) == (1, 1, 8)
    assert tensor("x", (2,), order=">").dtype == ">float32"


@pytest.mark.parametrize(
    ("glob", "selected", "others"),
    [
        (
            "conv1",
            ["model/conv1.weight", "params/conv1/kernel", "conv1/bias", "state_dict/conv1.weight"],
            ["model/conv10.weight", "model/block.conv1.weight", "params/block/conv1/kernel"],
        ),
        ("*conv1", ["model/conv1.weight", "model/block.conv1.weight"], ["model/conv10.weight"]),
        (
            "dense/kernel",
            ["dense/kernel", "model/dense/kernel"],
            ["encoder/dense/kernel", "adam/momentum of dense/kernel"],
        ),
        ("model", ["model/conv1.weight"], ["optimizer/state/0/exp_avg", "models/conv1.weight"]),
        ("*.weight", ["fc.weight", "model/fc.weight"], ["fc.bias"]),
    ],
)
def test_the_globs_of_the_page(glob, selected, others):
    assert [n for n in [*selected, *others] if matches(n, glob)] == selected


def test_a_suggestion_is_never_what_was_asked():
    tensors = [tensor(n, (1,)) for n in ("a/block/conv2/weight", "b/other")]
    with pytest.raises(SelectionError, match="did you mean 'a/block/conv2/weight'"):
        select(tensors, names=["conv2"])
