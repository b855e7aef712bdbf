"""Row-wise quantised tables in memory: a flip changes exactly the outputs that it should."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import ckptflip  # noqa: E402
from ckptflip.errors import SelectionError, UsageError  # noqa: E402
from ckptflip.faults import Policy  # noqa: E402
from ckptflip.live import inject, replay, undo  # noqa: E402
from ckptflip.live.torch_tensors import TorchTarget  # noqa: E402
from ckptflip.recsys.tables import count_ids, dequantise, write_counts  # noqa: E402
from ckptflip.recsys.tables.views import TableTarget  # noqa: E402

WIDTHS = {"int8": "byte", "int4": "4bit", "int2": "2bit"}
ROWS, DIM = 30, 8


def model_of(layout):
    torch.manual_seed(0)
    prepack = getattr(torch.ops.quantized, f"embedding_bag_{WIDTHS[layout]}_prepack")
    model = torch.nn.Module()
    model.register_buffer("emb", prepack(torch.randn(ROWS, DIM)))
    model.register_parameter("top", torch.nn.Parameter(torch.ones(2, DIM)))
    return model


def bags(model, layout, ids):
    """Each id as a bag of its own, then all of them as one."""
    operator = getattr(torch.ops.quantized, f"embedding_bag_{WIDTHS[layout]}_rowwise_offsets")
    single = operator(model.emb, torch.tensor(ids), offsets=torch.arange(len(ids)))
    return single, operator(model.emb, torch.tensor(ids), offsets=torch.tensor([0]))


@pytest.mark.parametrize("layout", WIDTHS)
@pytest.mark.parametrize("field", ["code", "scale", "bias"])
def test_a_flip_changes_exactly_its_outputs(layout, field):
    model = model_of(layout)
    clean, pooled = bags(model, layout, list(range(ROWS)))
    bits = "mantissa,!0-3" if field != "code" else "all"
    policy = Policy(tensors=("emb",), rowwise=layout, fields=(field,), bits=bits, count=1)
    target = TableTarget(TorchTarget(model), policy)
    before = model.emb.clone()
    for seed in range(12):
        record = inject(target, policy, seed=seed)
        (word,) = record.plan.word.tolist()
        row, column = divmod(word, DIM) if field == "code" else (word, None)
        faulty, together = bags(model, layout, list(range(ROWS)))
        changed = torch.zeros(ROWS, DIM, dtype=torch.bool)
        if field == "scale":
            # A code of 0 stands for the bias, whatever the scale.
            changed[row] = torch.from_numpy(codes(before, layout)[row] != 0)
        else:
            changed[row, slice(None) if column is None else column] = True
        assert torch.equal(faulty != clean, changed)
        assert torch.equal(faulty, torch.from_numpy(dequantise(model.emb.numpy(), layout)))
        assert not ((together != pooled)[0] & ~changed.any(0)).any()
        # Bags without the row know nothing of it.
        others = [r for r in range(ROWS) if r != row]
        assert torch.equal(bags(model, layout, others)[1].isfinite(), torch.ones(1, DIM, dtype=torch.bool))
        assert torch.equal(bags(model, layout, others)[0], clean[others])
        assert undo(target, record) == 1
        assert torch.equal(model.emb, before)


def codes(table, layout):
    from ckptflip.bits import lookup
    from ckptflip.faults.catalogue import Tensor
    from ckptflip.faults.rowwise import fitted, parse
    from ckptflip.recsys.tables.quantised import unpacked

    stored = table.numpy()
    return unpacked(stored, fitted(parse(layout), Tensor("t", stored.shape, lookup("uint8"))))


def test_the_same_faults_as_in_a_file(tmp_path):
    model = model_of("int4")
    torch.save({"model": model.state_dict()}, tmp_path / "m.pt")
    policy = Policy(tensors=("emb",), rowwise="int4", count=20)
    record = inject(TableTarget(TorchTarget(model), policy), policy, seed=3)
    ckptflip.inject(tmp_path / "m.pt", policy=policy, seed=3)
    loaded = torch.load(tmp_path / "m.flipped.pt")["model"]
    assert torch.equal(loaded["emb"], model.emb)
    # A file's record on a running model, and taken back there by what the record says of the tables.
    fresh = model_of("int4")
    made = replay(TableTarget(TorchTarget(fresh), policy), tmp_path / "m.flipped.pt.flips.jsonl")
    assert torch.equal(fresh.emb, model.emb)
    assert undo(TableTarget(TorchTarget(fresh), made), made) == len(record)
    assert torch.equal(fresh.emb, model_of("int4").emb)


def test_several_faults_in_one_byte(tmp_path):
    model = model_of("int2")
    policy = Policy(tensors=("emb",), rowwise="int2", ber=0.9)
    target, before = TableTarget(TorchTarget(model), policy), model.emb.clone()
    record = inject(target, policy, seed=1)
    changed = int(np.bitwise_count((model.emb ^ before).numpy()).sum())
    assert changed == record.bits_effective > 0.8 * before.numel() * 8
    undo(target, record)
    assert torch.equal(model.emb, before)


def test_a_strided_table(tmp_path):
    model = torch.nn.Module()
    model.register_buffer("emb", model_of("int8").emb.t().contiguous().t())
    policy = Policy(rowwise="int8", fields=("scale",), bits="exponent", count=3)
    before = model.emb.clone()
    target = TableTarget(TorchTarget(model), policy)
    record = inject(target, policy, seed=1)
    assert 1 <= (model.emb != before).any(1).sum() <= 3
    assert not (model.emb != before)[:, :DIM].any() and not (model.emb != before)[:, -4:].any()
    undo(target, record)
    assert torch.equal(model.emb, before)


def test_hot_rows_by_a_log(tmp_path):
    model = model_of("int8")
    log = [np.array([[3, 3], [7, 3]]), np.array([7, 1])]
    write_counts(tmp_path / "access.npz", {"emb": count_ids(log, ROWS)})
    policy = Policy(
        tensors=("emb",), rowwise="int8", rows="hot:2", rows_weight=str(tmp_path / "access.npz"), ber=0.5
    )
    before = model.emb.clone()
    inject(TableTarget(TorchTarget(model), policy), policy, seed=1)
    assert (model.emb != before).any(1).nonzero().flatten().tolist() == [3, 7]


def test_a_target_that_is_not_wrapped():
    policy = Policy(tensors=("emb",), rowwise="int8")
    with pytest.raises(
        SelectionError, match=r"is not seen as such a table: here the target has to be wrapped"
    ):
        inject(TorchTarget(model_of("int8")), policy, seed=1)


def test_a_table_that_is_none():
    with pytest.raises(SelectionError, match=r"model/top is no row-wise int8 table: it is float32"):
        TableTarget(TorchTarget(model_of("int8")), Policy(tensors=("top",), rowwise="int8"))


@pytest.mark.parametrize(
    ("ids", "text"),
    [([[0, 4]], "id 4 is beyond the table, which has 4 rows"), ([[-1]], "id -1 is beyond"),
     ([[0.5]], "ids are whole numbers, not float64")],
)  # fmt: skip
def test_ids_that_are_no_rows(ids, text):
    with pytest.raises(UsageError, match=text):
        count_ids(ids, rows=4)


def test_counts_of_long_and_short_batches():
    random = np.random.default_rng(0)
    batches = [random.integers(0, 1000, n) for n in (0, 1, 50, 5000)]
    assert np.array_equal(count_ids(batches, 1000), np.bincount(np.concatenate(batches), minlength=1000))


def test_counts_are_not_written_under_a_wrong_name(tmp_path):
    for counts, name in (([1], "a.npz"), ({"t": [1]}, "a.npy")):
        with pytest.raises(UsageError, match=r"for one$"):
            write_counts(tmp_path / name, counts)
    write_counts(tmp_path / "a.npy", [1])
    with pytest.raises(UsageError, match="exists"):
        write_counts(tmp_path / "a.npy", [1])


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ({"t": [1, -2]}, "of t: a count is -2"),
        ({"t": [1, np.nan]}, "a count is nan"),
        ({"t": [[1]]}, r"a count per row; not int64 \(1, 1\)"),
        ({"t": ["a"]}, "integers or floats"),
        ({}, "no tables"),
    ],
)
def test_what_are_no_counts_is_not_written(tmp_path, counts, said):
    with pytest.raises(UsageError, match=said):
        write_counts(tmp_path / "a.npz", counts)
    assert not (tmp_path / "a.npz").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("layout", WIDTHS)
def test_a_table_on_a_gpu_is_hit_like_on_the_processor(layout):
    here, there = model_of(layout), model_of(layout).cuda()
    policy = Policy(tensors=("emb",), rowwise=layout, ber=0.2)
    target = TableTarget(TorchTarget(there), policy)
    record = inject(target, policy, seed=1)
    inject(TableTarget(TorchTarget(here), policy), policy, seed=1)
    assert torch.equal(there.emb.cpu(), here.emb)
    undo(target, record)
    assert torch.equal(there.emb.cpu(), model_of(layout).emb)
