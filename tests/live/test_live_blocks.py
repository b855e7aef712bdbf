"""``with live.faults(…)``: nothing stays behind, everything is counted, and what does not fire is said."""

import copy
import warnings

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from blocks import Gives, bits, hooks_of, same, state_of
from click.testing import CliRunner

import ckptflip
from ckptflip import live, record_files, torch_h5
from ckptflip.cli.main import cli
from ckptflip.errors import CheckpointError, GuardError, LiveError, SelectionError, UsageError
from ckptflip.faults import Policy
from ckptflip.live.torch_tensors import TorchTarget

nn = torch.nn


def net():
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    made.register_buffer("cache", torch.ones(3), persistent=False)
    return made.eval()


def trained():
    model = net().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    step(model, optimizer)
    return model, optimizer


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.arange(12.0).reshape(3, 4)).square().sum().backward()
    optimizer.step()


def everything(model, optimizer):
    slots = [v for state in optimizer.state.values() for v in state.values()]
    return [t.detach().clone() for t in (*state_of(model), *slots)]


X = torch.ones(3, 4)


def flips(before, after):
    """Bits that differ."""
    return sum(int(np.bitwise_count(bits(a) ^ bits(b)).sum()) for a, b in zip(before, after, strict=True))


class TestState:
    def test_nothing_stays_behind(self):
        model, optimizer = trained()
        before = everything(model, optimizer)
        with live.faults(model, Policy(ber=0.01), seed=1, optimizer=optimizer) as block:
            during = everything(model, optimizer)
        (record,) = block.records
        flipped = flips(before, during)
        assert flipped == record.bits_effective == block.effective > 0
        assert {t.name.split("/")[0] for t in record.header.tensors} == {"model", "optimizer"}
        assert same(before, everything(model, optimizer)) and not hooks_of(model)

    def test_the_same_faults_as_in_a_file(self, tmp_path):
        model = net()
        torch_h5.save({"model": model.state_dict()}, tmp_path / "model.h5")
        policy = Policy(roles=("weight",), count=9, bits="exponent")
        record = ckptflip.inject(tmp_path / "model.h5", policy=policy, seed=4, out=tmp_path / "out.h5")
        with live.faults(model, policy, seed=4) as block:
            pass
        here = block.records[0].plan
        assert all((getattr(here, c) == getattr(record.plan, c)).all() for c in ("word", "before", "after"))

    def test_an_exception_ends_the_block_like_any_other_way_out(self):
        model = net()
        before = [t.clone() for t in state_of(model)]
        with (
            pytest.raises(KeyboardInterrupt),
            live.faults(model, Policy(count=50), seed=1, activations=True, state=True),
        ):
            assert not same(before, state_of(model))
            raise KeyboardInterrupt
        assert same(before, state_of(model)) and not hooks_of(model)

    def test_anew_in_each_call_and_never_piled_up(self):
        model = net()
        before = [t.clone() for t in state_of(model)]
        changed = []
        with live.faults(model, Policy(roles=("weight",), count=5), seed=1, every=2) as block:
            for _ in range(5):
                model(X)
                changed.append(flips(before, state_of(model)))
        # What was hit in a call stays until the next that is due, so that a backward pass sees it too.
        assert changed == [0, 5, 5, 5, 5] and same(before, state_of(model))
        first, second = block.records
        assert [r.header.output for r in (first, second)] == ["call 000001 state", "call 000003 state"]
        assert first.plan.word.tolist() != second.plan.word.tolist()
        assert block.counts() == [live.Count("state", 2, 2, 10, 10)]
        again = live.inject(TorchTarget(model), first.header.policies, seed=first.header.seed)
        assert again.plan.word.tolist() == first.plan.word.tolist()

    def test_together_with_activations(self):
        model = net()
        before = [t.clone() for t in state_of(model)]
        with (
            torch.no_grad(),
            live.faults(model, Policy(count=2), seed=1, state="3", activations="0") as block,
        ):
            model(X)
            assert not same(before, state_of(model))
        assert [c.name for c in block.counts()] == ["state", "activations/0"]
        assert block.records[0].header.output == "start" and same(before, state_of(model))
        assert {t.name for t in block.records[0].header.tensors} <= {"model/3.weight", "model/3.bias"}

    def test_words_that_training_has_changed_stay_and_are_said(self):
        model, optimizer = trained()
        policy = Policy(tensors=("0.weight", "cache"), bits="mantissa", count=60)
        with (
            pytest.warns(live.FaultWarning, match=r"\d+ words of the state .* changed by something else"),
            live.faults(model, policy, seed=1),
        ):
            step(model, optimizer)
        assert (model.cache == 1).all()

    def test_an_inner_block_sees_the_outer_ones_faults(self):
        model = net()
        before = [t.clone() for t in state_of(model)]
        with live.faults(model, Policy(ber=0.05), seed=1):
            outer = [t.clone() for t in state_of(model)]
            with live.faults(model, Policy(ber=0.05), seed=2):
                pass
            assert same(outer, state_of(model))
        assert same(before, state_of(model))

    def test_blocks_that_are_not_left_in_the_reverse_order_are_said(self):
        model, other = net(), net()
        first, second = (live.faults(model, Policy(count=9), seed=1) for _ in range(2))
        with live.faults(other, Policy(), seed=1):
            first.__enter__()
            second.__enter__()
            with pytest.warns(live.FaultWarning, match=r"entered after this one and goes on.*reverse order"):
                first.__exit__(None, None, None)
            second.__exit__(None, None, None)  # warnings are errors here

    def test_tied_weights_are_one(self):
        model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
        model[1].weight = model[0].weight
        with live.faults(model, Policy(fraction=1), seed=1) as block:
            pass
        assert block.effective == 9 * 32 and block.records[0].header.tensors[0].aliases == ("model/1.weight",)

    def test_a_fault_is_seen_by_autocast_which_keeps_copies_of_weights(self):
        model = nn.Sequential(nn.Linear(4, 4))
        with torch.autocast("cpu", torch.bfloat16):
            clean = model(X).detach()
            with live.faults(model, Policy(bits="sign", fraction=1), seed=1):
                faulty = model(X).detach()
            assert not (faulty == clean).any() and (model(X) == clean).all()

    def test_a_target_of_any_make(self):
        model = net()
        before = [t.clone() for t in state_of(model)]
        target = TorchTarget(model)
        with live.faults(target, Policy(count=3), seed=1) as block:
            assert not same(before, state_of(model))
        assert block.effective == 3 and same(before, state_of(model))

    def test_entering_that_fails_leaves_nothing(self, monkeypatch):
        model = net()
        before = [t.clone() for t in state_of(model)]
        monkeypatch.setattr("ckptflip.live.torch_calls.TorchCalls.attach", lambda self: 1 / 0)
        with (
            pytest.raises(ZeroDivisionError),
            live.faults(model, Policy(count=9), seed=1, state=True, activations=True),
        ):
            pass
        assert same(before, state_of(model)) and not hooks_of(model)


class TestInputs:
    class Takes(nn.Module):
        def __init__(self, rows=10):
            super().__init__()
            self.table = nn.EmbeddingBag(rows, 4, mode="sum")
            self.fc = nn.Linear(3, 4)

        def forward(self, dense, sparse, *, scale=None):
            found = self.fc(dense) + self.table(sparse["ids"], sparse["offsets"])
            return found if scale is None else found * scale

    def given(self):
        sparse = {"ids": torch.tensor([1, 2, 3, 9]), "offsets": torch.tensor([0, 3])}
        return torch.ones(2, 3), sparse, torch.full((2, 1), 2.0)

    def test_the_callers_tensors_stay_as_they_are(self):
        model = self.Takes()
        dense, sparse, scale = self.given()
        got = []
        handle = model.fc.register_forward_hook(lambda m, args, out: got.append(args[0]))
        with (
            torch.no_grad(),
            live.faults(model, Policy(bits="sign", count=2), seed=1, inputs="dense") as block,
        ):
            faulty = model(dense, sparse, scale=scale)
        handle.remove()
        assert (dense == 1).all() and (got[0] == -1).sum() == 2
        (record,) = block.records
        assert [t.name for t in record.header.tensors] == ["inputs/dense"]
        expected = model(got[0], sparse, scale=scale)
        assert torch.equal(faulty, expected) and not hooks_of(model)

    def test_all_inputs_are_one_place_by_position_or_name(self):
        model = self.Takes()
        dense, sparse, scale = self.given()
        options = {"seed": 1, "inputs": ["*", "!sparse"]}
        with torch.no_grad(), live.faults(model, Policy(fraction=1, bits="sign"), **options) as block:
            one = model(dense, sparse, scale=scale)
            other = model(sparse=sparse, dense=dense, scale=scale)
        assert torch.equal(one, other)
        assert [t.name for t in block.records[0].header.tensors] == ["inputs/dense", "inputs/scale"]
        assert block.counts() == [live.Count("inputs", 2, 2, 16, 16)]

    def test_ids_beyond_the_table_are_refused(self):
        model = self.Takes()
        dense, sparse, _ = self.given()
        with (
            pytest.raises(
                LiveError,
                match=r"table has 10 rows, and after the faults .* row \d+.*beyond='clamp' .* nearest row$",
            ),
            live.faults(model, Policy(bits="8-20"), seed=1, inputs="sparse/ids"),
        ):
            model(dense, sparse)
        assert not hooks_of(model)

    @pytest.mark.parametrize(("bit", "row"), [("20", 9), ("63", 0)])
    def test_or_clamped(self, bit, row):
        model = self.Takes()
        dense, sparse, _ = self.given()
        sparse["ids"] = torch.tensor([4, 4, 4, 4])
        asked = []
        with (
            live.faults(model, Policy(bits=bit), seed=1, inputs="sparse/ids", beyond="clamp") as block,
            torch.no_grad(),
        ):
            listener = model.register_forward_pre_hook(
                lambda m, a: handles.append(
                    model.table.register_forward_pre_hook(lambda m, a: asked.append(a[0]))
                )
            )
            handles = [listener]
            model(dense, sparse)
        for handle in handles:
            handle.remove()
        assert sorted(asked[0].tolist()) == sorted([row, 4, 4, 4]) and block.clamped == 1

    def test_ids_inside_the_table_are_let_pass(self):
        model = self.Takes(1 << 12)
        dense, sparse, _ = self.given()
        with (
            live.faults(model, Policy(bits="0-10", count=3), seed=1, inputs="sparse/ids") as block,
            torch.no_grad(),
        ):
            model(dense, sparse)
        assert block.effective == 3 and sparse["ids"].tolist() == [1, 2, 3, 9]

    def test_offsets_that_are_none_are_refused_or_mended(self):
        model = self.Takes()
        dense, sparse, _ = self.given()
        policy = Policy(bits="62", fraction=1)
        with (
            pytest.raises(LiveError, match="offsets are not those of 4 ids"),
            live.faults(model, policy, seed=1, inputs="sparse/offsets"),
        ):
            model(dense, sparse)
        with (
            live.faults(model, policy, seed=1, inputs="sparse/offsets", beyond="clamp") as block,
            torch.no_grad(),
        ):
            model(dense, sparse)
        assert block.clamped == 2

    def test_inputs_of_modules_are_hit_for_them_alone(self):
        class Skip(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = nn.Identity()

            def forward(self, x):
                return x, self.inner(x)

        model, x = Skip(), torch.ones(4)
        with live.faults(model, Policy(bits="sign"), seed=1, module_inputs="inner") as block:
            straight, through = model(x)
        assert (straight == 1).all() and (through == -1).sum() == 1 and (x == 1).all()
        assert block.records[0].header.tensors[0].name == "module_inputs/inner/0"

    def test_an_input_that_is_not_there(self):
        with (
            pytest.raises(
                SelectionError, match=r"inputs dens match none .* its tensors are dense, sparse/ids"
            ),
            live.faults(self.Takes(), Policy(), seed=1, inputs="dens") as block,
        ):
            self.given() and block._parts[0]._model(*self.given()[:2])

    def test_gradients_reach_what_was_given(self):
        model = nn.Sequential(nn.Linear(4, 2))
        x = torch.ones(3, 4, requires_grad=True)
        with live.faults(model, Policy(bits="sign", count=2), seed=1, inputs=True):
            model(x).sum().backward()
        torch.testing.assert_close(x.grad, model[0].weight.sum(0).expand(3, 4))


class TestGradients:
    def test_hit_when_the_backward_pass_is_over_and_given_back(self):
        model, optimizer = trained()
        optimizer.zero_grad()
        model(X).sum().backward()
        clean = [p.grad.clone() for p in model.parameters()]
        optimizer.zero_grad()
        with live.faults(model, Policy(bits="sign", count=4), seed=1, gradients=True) as block:
            model(X).sum().backward()
            faulty = [p.grad.clone() for p in model.parameters()]
        assert flips(clean, faulty) == block.effective == 4
        assert same(clean, [p.grad for p in model.parameters()]) and not hooks_of(model)
        assert block.records[0].header.output == "backward 000000"

    def test_of_chosen_parameters_in_chosen_passes(self):
        model, optimizer = trained()
        with live.faults(model, Policy(), seed=1, gradients="3.*", every=2) as block:
            for _ in range(5):
                step(model, optimizer)
        assert [r.header.output for r in block.records] == ["backward 000001", "backward 000003"]
        assert all(t.name.startswith("gradients/3.") for r in block.records for t in r.header.tensors)

    def test_a_pass_that_fails_does_not_count(self):
        model, optimizer = trained()

        def fail(grad):
            raise RuntimeError("broken")

        with live.faults(model, Policy(), seed=1, gradients=True) as block:
            x = model[0](X)
            x.register_hook(fail)
            with pytest.raises(RuntimeError, match="broken"):
                model[3](x).sum().backward()
            step(model, optimizer)
        assert len(block.records) == 1

    def test_the_optimizer_steps_with_them(self):
        model, _ = trained()
        other = copy.deepcopy(model)
        with live.faults(model, Policy(bits="sign", fraction=1), seed=1, gradients=True):
            step(model, torch.optim.SGD(model.parameters(), lr=1.0))
        step(other, torch.optim.SGD(other.parameters(), lr=1.0, maximize=True))
        for one, two in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(one, two)

    def test_distributed_training_is_sent_elsewhere(self, tmp_path):
        torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
        try:
            wrapped = nn.parallel.DistributedDataParallel(net())
            with pytest.raises(UsageError, match=r"ckptflip\.callbacks\.Injector"):
                live.faults(wrapped, Policy(), seed=1, gradients=True)
            with torch.no_grad(), live.faults(wrapped, Policy(), seed=1, activations="0") as block:
                wrapped(X)
            assert block.effective == 1
        finally:
            torch.distributed.destroy_process_group()


class TestWarnings:
    def said(self, model, act, **options):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with live.faults(model, Policy(), seed=1, **options) as block:
                act()
        return [str(w.message) for w in caught if w.category is live.FaultWarning], block

    def test_a_model_that_is_not_called(self):
        model = net()
        for act in (lambda: None, lambda: model.forward(X), lambda: model[0](X)):
            said, block = self.said(model, act, activations=True)
            assert len(said) == 1 and "the model was never called" in said[0] and not block.records
        assert "never called" in self.said(model, lambda: None, every=2)[0][0]

    def test_modules_that_are_passed_by(self):
        class Partial(nn.Module):
            def __init__(self):
                super().__init__()
                self.used, self.unused, self.direct = (nn.Linear(4, 4) for _ in range(3))

            def forward(self, x):
                return self.direct.forward(self.used(x))

        model = Partial()
        said, block = self.said(model, lambda: model(X), activations=True)
        assert len(said) == 1 and "2 of 3 places were never passed" in said[0]
        assert "activations/unused, activations/direct" in said[0] and block.effective == 1

    def test_calls_that_are_never_due(self):
        model = net()
        said, _ = self.said(model, lambda: model(X), activations="0", calls=range(5, 9))
        assert said == ["no fault fired: none of the 1 calls of the model was due (calls=, every=)"]
        assert (
            "none of 1 backward passes"
            in self.said(model, lambda: model(X).sum().backward(), gradients=True, every=2)[0][0]
        )
        assert "no backward pass" in self.said(model, lambda: model(X), gradients=True)[0][0]

    def test_outputs_without_elements(self):
        model = nn.Sequential(Gives(lambda x: x[:0]), Gives(lambda x: 3))
        said, _ = self.said(model, lambda: model(X), activations=True)
        assert said == ["nothing that passed activations/0, activations/1 holds an element that could be hit"]

    def test_compiled_models(self):
        model = net()
        compiled = torch.compile(model, backend="eager")
        with torch.no_grad():
            compiled(X)
            said, block = self.said(compiled, lambda: compiled(X), activations="0")
        assert "is compiled (torch.compile)" in said[0] and "force_eager" in said[0]
        assert any("no fault fired" in one for one in said[1:]) == (not block.effective)
        torch.compiler.reset()

    def test_what_the_warning_advises_works(self):
        model = net()
        compiled = torch.compile(model, backend="eager")
        with torch.no_grad():
            clean = compiled(X)
            with torch.compiler.set_stance("force_eager"):
                said, block = self.said(compiled, lambda: compiled(X), activations="0")
            assert not said and block.effective == 1
            assert torch.equal(compiled(X), clean)
        torch.compiler.reset()

    def test_a_model_compiled_in_the_block_keeps_no_fault(self):
        model = net()
        with torch.no_grad():
            clean = model(X)
            said, block = self.said(model, lambda: torch.compile(model, backend="eager")(X), activations="0")
            assert torch.equal(torch.compile(model, backend="eager")(X), clean)
        assert bool(said) == (not block.effective)
        torch.compiler.reset()

    def test_faults_in_the_weights_of_a_compiled_model_need_no_hook(self):
        model = net()
        compiled = torch.compile(model, backend="eager")
        with torch.no_grad():
            clean = compiled(X)
            with live.faults(compiled, Policy(tensors=("3.bias",), bits="sign", fraction=1), seed=1):
                assert not torch.equal(compiled(X), clean)
            assert torch.equal(compiled(X), clean)
        torch.compiler.reset()

    def test_sparse_gradients(self):
        model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 2))
        ids = torch.tensor([1, 2])
        said, block = self.said(model, lambda: model(ids).sum().backward(), gradients=True)
        assert len(said) == 1
        assert "were left out: of 0.weight, which is sparse or nested (torch.sparse_coo)" in said[0]
        assert block.effective == 1
        assert not self.said(model, lambda: model(ids).sum().backward(), gradients="1")[0]

    @pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
    def test_scripted_modules(self):
        model = nn.Sequential(torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU())), nn.Linear(4, 2))
        said, _ = self.said(model, lambda: model(X), activations="1")
        assert said == [said[0]] and "module '0' is scripted" in said[0]


class TestRecords:
    def test_in_a_folder_one_for_each_call(self, tmp_path):
        model = net()
        folder = tmp_path / "records"
        with (
            torch.no_grad(),
            live.faults(
                model,
                Policy(count=2),
                seed=1,
                activations=["0", "3"],
                inputs=True,
                calls=[0, 2],
                records=folder,
            ) as block,
        ):
            for _ in range(4):
                model(X)
        files = sorted(folder.iterdir())
        assert [f.name for f in files] == ["call_000000.flips.jsonl", "call_000002.flips.jsonl"]
        for file, record in zip(files, block.records, strict=True):
            read = record_files.read(file)
            assert record.path == str(file) and read.header == record.header
            assert (read.plan.after == record.plan.after).all() and read.bits_effective == 6
        shown = CliRunner().invoke(cli, ["show", str(files[0]), "--flips"])
        assert shown.exit_code == 0 and "inputs/input" in shown.output and "activations/3" in shown.output
        with pytest.raises(UsageError, match=r"holds records already, such as call_00000"):
            live.faults(model, Policy(), seed=1, activations="0", records=folder)
        with pytest.raises(UsageError, match="cannot be the name of a folder"):
            live.faults(model, Policy(), seed=1, activations="0", records="\0")
        with pytest.raises(UsageError, match="is a file; name a folder"):
            live.faults(model, Policy(), seed=1, activations="0", records=files[0])

    def test_of_a_call_that_fails(self, tmp_path):
        model = net()
        model.append(Gives(lambda x: 1 / 0))
        with (
            pytest.raises(ZeroDivisionError),
            live.faults(model, Policy(), seed=1, activations="0", state=True, every=1, records=tmp_path),
        ):
            model(X)
        assert sorted(f.name for f in tmp_path.iterdir()) == [
            "call_000000.flips.jsonl",
            "call_000000_state.flips.jsonl",
        ]

    def test_of_a_call_that_is_interrupted(self):
        model = net()
        model.append(Gives(lambda x: interrupt()))

        def interrupt():
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt), live.faults(model, Policy(), seed=1, activations="0") as block:
            model(X)
        assert len(block.records) == 1 and not hooks_of(model)

    def test_once(self):
        model = net()
        with (
            torch.no_grad(),
            live.faults(model, Policy(), seed=1, activations="0", every=2, once=True) as block,
        ):
            for _ in range(9):
                model(X)
        assert [r.header.output for r in block.records] == ["call 000001"] and block.calls == 9

    def test_several_policies_act_one_after_the_other(self):
        model = net()
        policies = [Policy(bits="sign", fraction=1), Policy(bits="sign", fraction=1)]
        with torch.no_grad():
            clean = model(X)
            with live.faults(model, policies, seed=1, activations="3") as block:
                assert torch.equal(model(X), clean)
        assert block.counts()[0].hit == 6 * 1 and block.effective == 0


class TestArguments:
    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"seed": -1}, "seed must be"),
            ({"beyond": "wrap"}, "'refuse' or 'clamp'"),
            ({"state": False}, "nothing is to be hit"),
            ({"state": 3}, "globs on names"),
            ({"inputs": [3], "policy": Policy()}, "globs on names"),
            ({"every": 0}, "every must be"),
            ({"calls": -1, "activations": "0"}, "numbers from 0 on"),
            ({"calls": [], "activations": "0"}, "numbers from 0 on"),
            ({"calls": "1-3", "activations": "0"}, "numbers from 0 on"),
            ({"calls": range(3), "every": 4, "activations": "0"}, "no call is ever hit"),
            ({"policy": Policy(tensors=("0",)), "activations": "0"}, "policy's tensors choose among"),
            ({"policy": Policy(roles=("weight",)), "gradients": True}, "policy's roles choose among"),
            ({"policy": Policy(count=10**6), "gradients": True}, "count 1000000 is larger"),
            ({"policy": Policy(tensors=("9",))}, "matches nothing"),
            ({"gradients": "9"}, "matches nothing"),
            ({"model": 3}, "no PyTorch or Keras model"),
            ({"optimizer": 3}, r"an optimizer is a torch\.optim\.Optimizer, not int"),
            ({"policy": "count=3"}, r"a policy is a ckptflip\.Policy, .*, not 'count=3'"),
            ({"policy": {"count": 3}}, r"a policy is a ckptflip\.Policy"),
            (
                {"model": net().requires_grad_(False), "gradients": True},
                "no parameter of the model has requires",
            ),
        ],
    )
    def test_that_make_no_sense(self, options, said):
        options = {"model": net(), "policy": Policy(), "seed": 1, **options}
        with pytest.raises(UsageError, match=said), warnings.catch_warnings():
            live.faults(options.pop("model"), options.pop("policy"), **options)

    def test_targets_have_no_calls(self):
        for options in ({"activations": "0"}, {"every": 2}, {"gradients": True}):
            with pytest.raises(UsageError, match="of a target the state alone"):
                live.faults(TorchTarget(net()), Policy(), seed=1, **options)
        with pytest.raises(UsageError, match="an optimizer is given for a PyTorch model alone"):
            live.faults(TorchTarget(net()), Policy(), seed=1, optimizer=3)

    def test_tensors_that_cannot_be_hit_are_named_with_the_reason(self):
        model = net()
        model.register_buffer("wide", torch.ones(1).expand(3))
        with pytest.raises(SelectionError, match=r"matches nothing.*Cannot be hit: model/wide is expanded"):
            live.faults(model, Policy(tensors=("wide",)), seed=1)

    def test_classes_of_one_name_are_told_apart(self):
        class Linear(Gives):
            pass

        said = rf"no torch\.nn\.modules\.linear\.Linear; its layers are {__name__}\.Linear, torch\."
        with pytest.raises(SelectionError, match=said):
            live.faults(nn.Sequential(Linear(abs), nn.ReLU()), Policy(), seed=1, activations=nn.Linear)

    def test_records_that_cannot_be_written(self, tmp_path):
        (tmp_path / "file").touch()
        model = net()
        before = [bits(t) for t in state_of(model)]
        with (
            pytest.raises(CheckpointError, match="cannot be made"),
            live.faults(model, Policy(), seed=1, records=tmp_path / "file" / "records"),
        ):
            pass
        assert all(np.array_equal(bits(t), b) for t, b in zip(state_of(model), before, strict=True))

    def test_transformed_calls(self):
        """A tensor in a transform of torch.func has no words, and a trace would keep one call's faults."""
        model = net()
        with live.faults(model, Policy(), seed=1, activations="0"), torch.no_grad():
            with pytest.raises(LiveError, match=r"activations/0 cannot be hit: it is inside torch\.func"):
                torch.vmap(model)(X)
            with (
                pytest.raises(LiveError, match=r"torch\.jit\.trace.*outside the block"),
                warnings.catch_warnings(),
            ):
                warnings.simplefilter("ignore", DeprecationWarning)
                torch.jit.trace(model, X)
            model(X)
        assert not hooks_of(model)

    def test_a_block_is_used_once(self):
        block = live.faults(net(), Policy(), seed=1)
        with block:
            pass
        with pytest.raises(UsageError, match="in a block before"), block:
            pass

    def test_copies_in_several_threads(self):
        wrapped = nn.DataParallel(net())
        wrapped.device_ids = [0, 1]
        with pytest.raises(UsageError, match=r"DataParallel.*pass model\.module"):
            live.faults(wrapped, Policy(), seed=1, activations="0")

    def test_guards_that_cannot_be_met(self):
        model = nn.Sequential(Gives(lambda x: x * torch.inf))
        with (
            pytest.raises(GuardError, match="inf"),
            live.faults(model, Policy(bits="sign", forbid=("inf",)), seed=1, activations="0"),
        ):
            model(X)
        assert not hooks_of(model)


def test_activation_checkpointing_recomputes_without_the_fault():
    """The fault was in what was thrown away; gradients are computed, and nothing is left."""
    from torch.utils.checkpoint import checkpoint

    class Saving(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return checkpoint(lambda v: self.fc(v).tanh(), x, use_reentrant=False)

    model = Saving()
    with live.faults(model, Policy(bits="sign"), seed=1, activations="fc") as block:
        model(X).sum().backward()
    assert block.effective == 1 and model.fc.weight.grad.isfinite().all() and not hooks_of(model)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_is_hit_like_the_processor():
    here, x = net(), X
    there = copy.deepcopy(here).cuda()
    options = {"seed": 1, "activations": True, "inputs": True, "state": True, "every": 1}
    with torch.no_grad():
        with live.faults(here, Policy(count=3, bits="sign"), **options) as one:
            result = here(x)
        with live.faults(there, Policy(count=3, bits="sign"), **options) as other:
            torch.testing.assert_close(there(x.cuda()).cpu(), result)
    assert [r.plan.word.tolist() for r in one.records] == [r.plan.word.tolist() for r in other.records]
    assert same(state_of(here), state_of(there))
