"""Policies: what is refused and how it is said, and the TOML files they come from."""

import msgspec
import numpy as np
import pytest

from ckptflip.errors import UsageError
from ckptflip.faults import Policy
from ckptflip.faults.models import parse
from ckptflip.faults.policy import MOST_POLICIES, combine, load

REFUSED = [
    ({"count": 1, "fraction": 0.5}, "count and fraction were both given"),
    ({"count": 1, "ber": 0.5}, "count and ber were both given"),
    ({"fraction": 0.1, "ber": 0.5}, "fraction and ber were both given"),
    ({"count": 0}, "count must be at least 1, not 0"),
    ({"count": -3}, "count must be at least 1"),
    ({"count": 2.5}, "count 2.5 is of the wrong kind"),
    ({"count": "3"}, "count '3' is of the wrong kind"),
    ({"count": True}, "count True is of the wrong kind"),
    ({"tensors": 5}, "tensors 5 is of the wrong kind: Expected `array`, got `int`"),
    ({"roles": "wheight"}, "did you mean 'weight'"),
    ({"rows": "warm:1%"}, "(0:100:2), nor hot:1% or cold:1%"),
    ({"fraction": 0}, "fraction must be above 0 and at most 1"),
    ({"fraction": 1.1}, "fraction must be above 0 and at most 1"),
    ({"fraction": float("nan")}, "fraction must be above 0 and at most 1"),
    ({"ber": 0.0}, "ber must be above 0 and at most 1"),
    ({"ber": -1e-9}, "ber must be above 0"),
    ({"ber": float("inf")}, "ber must be above 0"),
    ({"design": "layers"}, "design 'layers' is not one of uniform, tensor, layer"),
    ({"ber": 0.1, "design": "tensor"}, "it cannot be drawn per tensor"),
    ({"bits": "exponnent"}, "did you mean 'exponent'"),
    ({"fault": "scale:2", "bits": "exponent"}, "changes whole words"),
    ({"fault": "value:0", "bits": "0-3"}, "changes whole words"),
    ({"fault": "flop"}, "fault 'flop' is not a fault model; use flip, set0"),
    ({"fault": ""}, "is not a fault model"),
    ({"fault": "flip:2"}, "is not a fault model"),
    ({"fault": "set2"}, "is not a fault model"),
    ({"fault": "burst"}, "is not a fault model"),
    ({"fault": "burst:0"}, "is not a fault model"),
    ({"fault": "burst:65"}, "up to 64 bits"),
    ({"fault": "burst:-1"}, "is not a fault model"),
    ({"fault": "mask:"}, "is not a fault model"),
    ({"fault": "mask:000"}, "is not a fault model"),
    ({"fault": "mask:102"}, "is not a fault model"),
    ({"fault": "mask:" + "1" * 65}, "up to 64 bits"),
    ({"fault": "scale:"}, "the factor must be a finite number"),
    ({"fault": "scale:inf"}, "the factor must be a finite number"),
    ({"fault": "scale:x"}, "the factor must be a finite number"),
    ({"fault": "value:"}, "is not a fault model"),
    ({"fault": "value:x"}, "'x' is not a number"),
    ({"fault": "value:1e999"}, "1e999 is beyond the range"),
    ({"rows": "1", "slice": "1"}, "rows and slice were both given"),
    ({"rows": "x"}, "is not a position (5)"),
    ({"rows": 5}, "rows 5 is of the wrong kind"),
    ({"slice": "1:2:0"}, "is not a position (5)"),
    ({"roles": ("wheight",)}, "did you mean 'weight'"),
    ({"forbid": ("zero",)}, "forbid 'zero' is not nan, inf, extreme or extreme:1e10"),
    ({"forbid": ("nan:1",)}, "forbid 'nan:1' is not"),
    ({"forbid": ("extreme:",)}, "is not nan"),
    ({"forbid": ("extreme:-1",)}, "is not nan"),
    ({"forbid": ("extreme:nan",)}, "is not nan"),
    ({"tensors": (1,)}, "is of the wrong kind"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[str(o) for o, _ in REFUSED])
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(UsageError) as caught:
        Policy(**options)
    assert message in str(caught.value)


def test_lists_and_numpys_numbers_are_taken_as_meant():
    policy = Policy(tensors=["a", "b"], count=np.int64(3))
    assert policy == Policy(tensors=("a", "b"), count=3)
    assert hash(policy) == hash(Policy(tensors=("a", "b"), count=3))
    assert Policy(fraction=np.float32(0.5)) == Policy(fraction=0.5)
    assert type(Policy(ber=1).ber) is float


def test_policies_survive_json():
    policy = Policy(
        tensors=("a", "!b"), bits="exponent", ber=1e-9, fault="set1", forbid=("nan", "extreme:1e5")
    )
    assert msgspec.json.decode(msgspec.json.encode(policy), type=Policy) == policy


@pytest.mark.parametrize(
    ("policy", "text"),
    [(Policy(), "1 fault"), (Policy(count=2), "2 faults"), (Policy(ber=1e-9), "BER 1e-09"),
     (Policy(fraction=0.25), "a fraction of 0.25")],
)  # fmt: skip
def test_amount(policy, text):
    assert policy.amount == text


def test_guards():
    assert Policy(forbid=("nan", "extreme")).guards() == {"nan": 0.0, "extreme": 1e10}
    assert Policy(forbid=("inf", "extreme:5")).guards() == {"inf": 0.0, "extreme": 5.0}


def test_a_burst_is_a_mask_of_ones():
    assert parse("burst:3") == parse("mask:111") == parse("mask:01110")
    assert parse("mask:1011").pattern == 0b1011
    assert parse("burst:64").span == 64


class TestToml:
    def read(self, tmp_path, text):
        path = tmp_path / "policy.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load(path)

    def test_one_policy_with_a_seed(self, tmp_path):
        text = 'seed = 7\ntensors = ["conv*"]\nbits = "exponent"\nber = 1e-9\n'
        assert self.read(tmp_path, text) == ((Policy(tensors=("conv*",), bits="exponent", ber=1e-9),), 7)

    def test_several(self, tmp_path):
        text = "seed = 1\n[[policy]]\ncount = 2\n[[policy]]\nfraction = 1\n"
        assert self.read(tmp_path, text) == ((Policy(count=2), Policy(fraction=1.0)), 1)

    def test_a_single_table(self, tmp_path):
        assert self.read(tmp_path, "[policy]\ncount = 2\n") == ((Policy(count=2),), None)

    def test_an_empty_file_is_the_default_policy(self, tmp_path):
        assert self.read(tmp_path, "") == ((Policy(),), None)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("cuont = 3", "policy 1: there is no key 'cuont'; did you mean 'count'?"),
            (
                "[[policy]]\n[[policy]]\nrows_weights = 'a'",
                "policy 2: there is no key 'rows_weights'; did you mean",
            ),
            ("zzz = 3", "there is no key 'zzz'; known: tensors, layers"),
            ("count = 'three'", "Expected `int | null`, got `str` - at `$.count`"),
            ("count = 1.5", "got `float` - at `$.count`"),
            ("count = true", "got `bool` - at `$.count`"),
            ("tensors = 1", "Expected `array`, got `int` - at `$.tensors`"),
            ("[[policy]]\nseed = 1", "seed belongs at top level"),
            ("count = 0", "policy 1: count must be at least 1"),
            ("[[policy]]\ncount = 1\n[[policy]]\nber = 2", "policy 2: ber must be above 0"),
            ("count = 1\n[[policy]]\ncount = 2", "count stand beside [[policy]] tables"),
            ("policy = 3", "policy 1: Expected `object`, got `int`"),
            ("count = ", "is not TOML"),
            (b"\xff\xfe", "is not TOML"),
            ("seed = -1", "seed must be a whole number from 0 to 2^64-1, not -1"),
            ("seed = 1.0", "seed must be a whole number"),
            ("seed = true", "seed must be a whole number"),
            ("seed = 'x'", "seed must be a whole number"),
            ("fraction = nan", "fraction must be above 0"),
        ],
    )
    def test_errors_name_the_file_and_what_is_wrong(self, tmp_path, text, message):
        with pytest.raises(UsageError) as caught:
            self.read(tmp_path, text)
        assert message in str(caught.value)
        assert "policy.toml" in str(caught.value)

    def test_one_string_is_a_list_of_one(self, tmp_path):
        fields = ("tensors", "layers", "roles", "fields", "forbid")
        values = ("emb*", "fc1", "model", "scale", "nan")
        given = dict(zip(fields, values, strict=True))
        made = Policy(**given, rowwise="int8")
        assert [getattr(made, name) for name in fields] == [(value,) for value in values]
        text = "".join(f"{name} = '{value}'\n" for name, value in given.items())
        assert self.read(tmp_path, f"{text}rowwise = 'int8'") == ((made,), None)

    def test_missing(self, tmp_path):
        with pytest.raises(UsageError, match="No such file"):
            load(tmp_path / "nothing.toml")
        with pytest.raises(UsageError, match="not a plain file"):
            load(tmp_path)


def test_combine():
    assert combine(Policy()) == (Policy(),)
    assert combine([Policy(), Policy(count=2)]) == (Policy(), Policy(count=2))
    for n in (0, MOST_POLICIES + 1):
        with pytest.raises(UsageError, match=f"between 1 and 16 policies can be combined, not {n}"):
            combine([Policy()] * n)
