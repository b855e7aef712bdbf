"""The models against their formulas written out in numpy; DLRM's names, forms and first values."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import ckptflip  # noqa: E402
from ckptflip import torch_h5  # noqa: E402
from ckptflip.checkpoints import opened  # noqa: E402
from ckptflip.errors import UsageError  # noqa: E402
from ckptflip.recsys.models.configurations import CONFIGURATIONS, Dummy, configuration  # noqa: E402
from ckptflip.recsys.models.crossing import Dcn, WideDeep  # noqa: E402
from ckptflip.recsys.models.dlrm import Dlrm, dummy  # noqa: E402
from ckptflip.recsys.models.factorisation import Afm, DeepFm, Fm  # noqa: E402
from ckptflip.recsys.tables import write_counts  # noqa: E402

SIZES, DENSE, ROWS = (7, 3, 11), 2, 5
STUDY = [Fm, DeepFm, Afm, WideDeep, Dcn, lambda *given: Dcn(*given, version=2)]
NAMES = ["fm", "deepfm", "afm", "wide-deep", "dcn", "dcn-v2"]


def sample(dense=DENSE, sizes=SIZES, bag=None):
    draws = np.random.default_rng(3)
    shape = (ROWS, len(sizes)) if bag is None else (ROWS, len(sizes), bag)
    ids = np.stack([draws.integers(0, size, shape[:1] + shape[2:]) for size in sizes], axis=1)
    return torch.from_numpy(draws.random((ROWS, dense), np.float32)), torch.from_numpy(ids)


def randomised(model):
    """Every parameter of a size that shows, in float64: formulas are then equal to 1e-12."""
    generator = torch.Generator().manual_seed(1)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2)
    return model


def arrays(model):
    return {name: value.numpy() for name, value in model.state_dict().items()}


def looked_up(state, ids, name="emb_l"):
    """float64[n, tables, columns]"""
    return np.stack([state[f"{name}.{t}.weight"][ids[:, t]] for t in range(ids.shape[1])], axis=1)


def dense_layers(state, name, values, numbers, last_relu):
    for number in numbers:
        values = values @ state[f"{name}.{number}.weight"].T + state[f"{name}.{number}.bias"]
        if last_relu or number != numbers[-1]:
            values = np.maximum(values, 0)
    return values


def first_order(state, x, ids):
    return (
        looked_up(state, ids, "linear_emb").sum(axis=(1, 2))
        + x @ state["linear.weight"]
        + state["linear.bias"]
    )


def fields(state, x, ids):
    return np.concatenate([looked_up(state, ids), x[:, :, None] * state["dense_l.weight"]], axis=1)


def pair_sums(vectors):
    count = vectors.shape[1]
    return sum((vectors[:, i] * vectors[:, j]).sum(axis=1) for i, j in combinations(range(count), 2))


def mlp(state, flat):
    hidden = dense_layers(state, "mlp", flat, [0, 3], last_relu=True)
    return hidden, hidden @ state["out.weight"].T[: hidden.shape[1]]


def test_dlrm_is_its_formula():
    model = randomised(Dlrm(SIZES, DENSE, 4, (6, 4), (8, 5, 1)))
    x, ids = sample()
    state = arrays(model)
    bottom = dense_layers(state, "bot_l", x.double().numpy(), [0, 2], last_relu=True)
    vectors = np.concatenate([bottom[:, None], looked_up(state, ids.numpy())], axis=1)
    # Row by row below the diagonal: (1,0), (2,0), (2,1), (3,0), …
    products = [(vectors[:, i] * vectors[:, j]).sum(axis=1) for i in range(4) for j in range(i)]
    joined = np.concatenate([bottom, np.stack(products, axis=1)], axis=1)
    expected = dense_layers(state, "top_l", joined, [0, 2, 4], last_relu=False)[:, 0]
    with torch.no_grad():
        assert np.allclose(model(x.double(), ids).numpy(), expected, rtol=1e-12, atol=1e-12)


def test_a_bag_is_the_sum_of_its_rows():
    model = randomised(Dlrm(SIZES, DENSE, 4, (4,), (1,)))
    x, ids = sample(bag=3)
    from ckptflip.recsys.models.dlrm import look_up

    state = arrays(model)
    expected = sum(looked_up(state, ids[:, :, k].numpy()) for k in range(3))
    with torch.no_grad():
        assert np.allclose(look_up(model.emb_l, ids).numpy(), expected)
        assert model(x.double(), ids).shape == (ROWS,)


def test_sparse_gradients_are_the_dense_ones():
    torch.manual_seed(0)
    plain, thrifty = (Dlrm(SIZES, DENSE, 4, (4,), (1,), sparse=sparse) for sparse in (False, True))
    thrifty.load_state_dict(plain.state_dict())
    for model in (plain, thrifty):
        model(*sample()).sum().backward()
    assert thrifty.emb_l[0].weight.grad.is_sparse
    assert torch.equal(thrifty.emb_l[0].weight.grad.to_dense(), plain.emb_l[0].weight.grad)


def test_the_reference_s_names_and_forms():
    """Of the Kaggle and the Terabyte run, on small tables: layer k is number 2k, the ReLUs lie between."""
    for name, top, bottom in (
        ("kaggle", [(512, 367), (256, 512), (1, 256)], [(512, 13), (256, 512), (64, 256), (16, 64)]),
        ("terabyte", [(512, 415), (512, 512), (256, 512), (1, 256)], [(512, 13), (256, 512), (64, 256)]),
    ):
        chosen = configuration(name)
        model = Dlrm((4,) * 26, 13, chosen.embedding, chosen.bottom, chosen.top)
        forms = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        expected = {f"emb_l.{t}.weight": (4, chosen.embedding) for t in range(26)}
        for part, layers in (("bot_l", bottom), ("top_l", top)):
            for place, form in enumerate(layers):
                expected |= {f"{part}.{2 * place}.weight": form, f"{part}.{2 * place}.bias": form[:1]}
        assert forms == expected
        assert next(iter(forms)) == "emb_l.0.weight"


def test_the_reference_s_recipes():
    assert (CONFIGURATIONS["kaggle"].rate, CONFIGURATIONS["kaggle"].batch) == (0.1, 128)
    terabyte = CONFIGURATIONS["terabyte"]
    assert (terabyte.rate, terabyte.batch, terabyte.modulo) == (0.1, 2048, 10_000_000)


def test_the_reference_s_first_values():
    torch.manual_seed(4)
    model = Dlrm((10_000, 4), 13, 16, (512, 16), (256, 1))
    for table, rows in ((0, 10_000), (1, 4)):
        values, limit = model.emb_l[table].weight, rows**-0.5
        assert values.abs().max() <= limit
        assert values.abs().max() > 0.95 * limit
    assert model.emb_l[0].weight.std().item() == pytest.approx(0.01 / 3**0.5, rel=0.02)
    layer = model.bot_l[0]
    assert layer.weight.std().item() == pytest.approx((2 / (13 + 512)) ** 0.5, rel=0.05)
    assert layer.bias.std().item() == pytest.approx((1 / 512) ** 0.5, rel=0.15)
    assert layer.weight.mean().item() == pytest.approx(0, abs=0.005)


def test_fm_is_the_sum_over_all_pairs():
    model = randomised(Fm(SIZES, DENSE, 4))
    (x, ids), state = sample(), arrays(model)
    given, places = x.double().numpy(), ids.numpy()
    expected = first_order(state, given, places) + pair_sums(fields(state, given, places))
    with torch.no_grad():
        assert np.allclose(model(x.double(), ids).numpy(), expected)


def test_deepfm_adds_a_deep_part():
    model = randomised(DeepFm(SIZES, DENSE, 4))
    (x, ids), state = sample(), arrays(model)
    given, places = x.double().numpy(), ids.numpy()
    vectors = fields(state, given, places)
    deep = mlp(state, vectors.reshape(ROWS, -1))[1][:, 0] + state["out.bias"]
    expected = first_order(state, given, places) + pair_sums(vectors) + deep
    with torch.no_grad():
        assert np.allclose(model(x.double(), ids).numpy(), expected)


def test_afm_weighs_the_pairs_by_attention():
    model = randomised(Afm(SIZES, DENSE, 4))
    (x, ids), state = sample(), arrays(model)
    given, places = x.double().numpy(), ids.numpy()
    vectors = fields(state, given, places)
    pairs = np.stack([vectors[:, i] * vectors[:, j] for i in range(5) for j in range(i)], axis=1)
    attention = np.maximum(pairs @ state["attention.0.weight"].T + state["attention.0.bias"], 0)
    scores = np.exp(attention @ state["score.weight"].T)
    pooled = (scores / scores.sum(axis=1, keepdims=True) * pairs).sum(axis=1)
    expected = first_order(state, given, places) + (pooled @ state["out.weight"].T)[:, 0]
    with torch.no_grad():
        assert np.allclose(model(x.double(), ids).numpy(), expected)


def test_afm_in_parts_is_afm_at_once(monkeypatch):
    from ckptflip.recsys.models import factorisation

    model = randomised(Afm(SIZES, DENSE, 4))
    x, ids = sample()
    with torch.no_grad():
        whole = model(x.double(), ids)
        monkeypatch.setattr(factorisation, "_AT_A_TIME", 2)
        assert torch.allclose(model(x.double(), ids), whole)


def test_wide_deep_adds_first_order_and_deep():
    model = randomised(WideDeep(SIZES, DENSE, 4))
    (x, ids), state = sample(), arrays(model)
    given, places = x.double().numpy(), ids.numpy()
    flat = np.concatenate([looked_up(state, places).reshape(ROWS, -1), given], axis=1)
    expected = first_order(state, given, places) + mlp(state, flat)[1][:, 0] + state["out.bias"]
    with torch.no_grad():
        assert np.allclose(model(x.double(), ids).numpy(), expected)


@pytest.mark.parametrize("version", [1, 2])
def test_dcn_crosses_its_input(version):
    model = randomised(Dcn(SIZES, DENSE, 4, version=version))
    (x, ids), state = sample(), arrays(model)
    start = np.concatenate([looked_up(state, ids.numpy()).reshape(ROWS, -1), x.double().numpy()], axis=1)
    crossed = start
    for layer in range(3):
        weight, bias = state[f"cross_l.{layer}.weight"], state[f"cross_l.{layer}.bias"]
        if version == 1:
            crossed = start * (crossed @ weight)[:, None] + bias + crossed
        else:
            crossed = start * (crossed @ weight.T + bias) + crossed
    hidden, _ = mlp(state, start)
    expected = np.concatenate([crossed, hidden], axis=1) @ state["out.weight"].T + state["out.bias"]
    with torch.no_grad():
        assert np.allclose(model(x.double(), ids).numpy(), expected[:, 0])


@pytest.mark.parametrize("model", STUDY, ids=NAMES)
@pytest.mark.parametrize("dense", [0, 2])
def test_study_models_take_bags_and_logs_without_dense_features(model, dense):
    made = model(SIZES, dense)
    outputs = made(*sample(dense, bag=2))
    outputs.sum().backward()
    assert outputs.shape == (ROWS,)
    assert all(parameter.grad is not None for parameter in made.parameters())


def test_a_nan_reaches_the_rows_that_read_it_alone():
    model = Dlrm(SIZES, DENSE, 4, (4,), (8, 1))
    x, ids = sample()
    with torch.no_grad():
        model.emb_l[1].weight[2, 0] = float("nan")
        assert torch.equal(model(x, ids).isnan(), ids[:, 1] == 2)


@pytest.mark.parametrize("model", [lambda *given: Dlrm(*given, 4, (4,), (1,)), *STUDY], ids=["dlrm", *NAMES])
def test_tables_have_the_role_embedding(tmp_path, model):
    torch_h5.save({"model": model(SIZES, DENSE).state_dict()}, tmp_path / "c.h5")
    with opened(tmp_path / "c.h5") as target:
        roles = {tensor.name.removeprefix("model/"): tensor.role for tensor in target.tensors}
    tables = {name for name in roles if "emb" in name}
    assert len(tables) in (3, 6)
    assert {name for name, role in roles.items() if role == "embedding"} == tables
    assert {role for name, role in roles.items() if name not in tables} <= {"weight", "bias"}


def test_a_checkpoint_as_the_reference_saves_it(tmp_path):
    """Its keys; hot rows of its tables by counts that carry the tables' own names."""
    model = Dlrm((50, 20), DENSE, 4, (4,), (8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = {"state_dict": model.state_dict(), "opt_state_dict": optimizer.state_dict(), "epoch": 0}
    torch.save({"iter": 3, "train_acc": 0.7, **state}, tmp_path / "dlrm.pt")
    write_counts(tmp_path / "counts.npz", {f"emb_l.{t}.weight": np.arange((50, 20)[t]) for t in (0, 1)})
    record = ckptflip.inject(
        tmp_path / "dlrm.pt", out=tmp_path / "bad.pt", roles="embedding", rows="hot:10%",
        rows_weight=tmp_path / "counts.npz", fraction=1.0, seed=1,
    )  # fmt: skip
    bad = torch.load(tmp_path / "bad.pt")["state_dict"]
    for name, before in state["state_dict"].items():
        rows = len(before) - len(before) // 10 if name.startswith("emb_l") else len(before)
        assert torch.equal(bad[name][:rows], before[:rows])
        if name.startswith("emb_l"):
            assert (bad[name][rows:].view(torch.int32) == ~before[rows:].view(torch.int32)).all()
    assert record.bits_hit == (5 + 2) * 4 * 32


def test_the_dummy_model_has_the_study_s_sizes():
    made = dummy(Dummy(embedding=128, mlp=64, layers=2))
    forms = {name: tuple(value.shape) for name, value in made.state_dict().items() if "bias" not in name}
    assert forms == {
        "emb_l.0.weight": (8192, 128),
        "bot_l.0.weight": (64, 128),
        "bot_l.2.weight": (64, 64),
        "bot_l.4.weight": (128, 64),
        "top_l.0.weight": (64, 129),
        "top_l.2.weight": (64, 64),
        "top_l.4.weight": (1, 64),
    }


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: Dlrm((), 2, 4, (4,), (1,)), "has tables"),
        (lambda: Dlrm((3, 0), 2, 4, (4,), (1,)), "1 or more"),
        (lambda: Dlrm((3,), 2, 4, (8,), (1,)), "ends in 8 units and the tables have 4 columns"),
        (lambda: Dlrm((3,), 2, 4, (4,), (2,)), "ends in 1 unit, not 2"),
        (lambda: Fm((), 2), "0 tables"),
        (lambda: DeepFm((3,), 2, mlp=()), "hidden layers"),
        (lambda: DeepFm((3,), 2, dropout=1.0), "dropout"),
        (lambda: Dcn((3,), 2, version=3), "version 1 or 2"),
        (lambda: Dummy(sparsity=0.0), "sparsity"),
        (lambda: Dummy(layers=0), "1 or more"),
        (lambda: configuration("large"), "small, kaggle, terabyte, not 'large'"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(call, said):
    with pytest.raises(UsageError, match=said):
        call()
