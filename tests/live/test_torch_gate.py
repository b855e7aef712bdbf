"""Standing before a model's calls: in copies, in files, one gate behind another, with compiled modules."""

import copy
import io

import pytest

pytest.importorskip("torch")

import torch
from blocks import gate_of, hooks_of

from ckptflip import live
from ckptflip.errors import UsageError
from ckptflip.faults import Policy
from ckptflip.live.torch_gate import Gate, is_compiled

nn = torch.nn
X = torch.ones(3, 4)
NEVER = 10**9


class Copied(nn.Module):
    """A model whose copies hold all that it holds, also what PyTorch leaves out of them."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x)

    def __getstate__(self):
        return self.__dict__


def count(model):
    made = Gate(model, lambda through, args, kwargs: through(*args, **kwargs))
    made.open()
    return made


@pytest.mark.filterwarnings("ignore::ckptflip.live.FaultWarning")
@pytest.mark.parametrize("made", [lambda: nn.Sequential(nn.Linear(4, 4)), Copied])
def test_copies_and_files_made_in_a_block_are_models_of_their_own(made):
    model, file = made(), io.BytesIO()
    with live.faults(model, Policy(), seed=1, activations=True, calls=NEVER) as block, torch.no_grad():
        copied = copy.deepcopy(model)
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        for other in (copied, loaded):
            for parameter in other.parameters():
                parameter.zero_()
            assert (other(X) == 0).all() and gate_of(other) is None
        assert block.calls == 0 and (model(X) != 0).all()


def test_no_hook_stands_on_a_model_between_calls():
    model = nn.Sequential(nn.Linear(4, 4))
    with live.faults(model, Policy(), seed=1, activations=True, every=2) as block, torch.no_grad():
        assert not model._forward_hooks and not model._forward_pre_hooks and gate_of(model) is not None
        for _ in range(4):
            model(X)
            assert not model[0]._forward_hooks
    assert block.effective == 2 and gate_of(model) is None and not hooks_of(model)


def test_a_model_of_one_layer_is_hit_in_its_first_call_too():
    model = nn.Linear(4, 4)
    options = {"seed": 1, "module_inputs": True, "activations": True}
    with live.faults(model, Policy(), **options) as block, torch.no_grad():
        model(X)
    assert [(c.name, c.fired) for c in block.counts()] == [("activations", 1), ("module_inputs", 1)]


@pytest.mark.parametrize("first", [0, 1])
def test_gates_close_in_any_order(first):
    model = nn.Linear(4, 4)
    gates = [count(model), count(model)]
    model(X)
    gates[first].close()
    model(X)
    gates[1 - first].close()
    model(X)
    assert [gates[first].calls, gates[1 - first].calls] == [1, 2] and gate_of(model) is None


def test_a_module_compiled_in_place_stays_so():
    model = nn.Sequential(nn.Linear(4, 4))
    model.compile(backend="eager")
    compiled = gate_of(model)
    with torch.no_grad():
        clean = model(X)
        with (
            pytest.warns(live.FaultWarning, match=r"compiled \(torch\.compile\)"),
            live.faults(model, Policy(bits="sign", fraction=1), seed=1, state=True, every=1) as block,
        ):
            assert torch.equal(model(X), -clean)
            assert is_compiled(model)
    assert block.effective == 20 and gate_of(model) is compiled and torch.equal(model(X), clean)
    torch.compiler.reset()


def test_a_gate_alone_is_nothing_compiled():
    model = nn.Linear(4, 4)
    gate = count(model)
    assert not is_compiled(model)
    gate.close()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_the_weights_of_scripted_models_are_refused_and_their_inputs_hit():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 2)))
    with pytest.raises(UsageError, match=r"the model is scripted .* the module that it was made from"):
        live.faults(scripted, Policy(), seed=1).__enter__()
    with pytest.raises(UsageError, match="module '0' is scripted"):
        live.faults(nn.Sequential(scripted), Policy(), seed=1).__enter__()
    with (
        pytest.warns(live.FaultWarning, match="is scripted"),
        live.faults(scripted, Policy(), seed=1, inputs=True) as block,
        torch.no_grad(),
    ):
        scripted(X)
    assert block.effective == 1 and gate_of(scripted) is None


def test_a_call_that_fails_ends():
    model = nn.Linear(4, 4)
    with live.faults(model, Policy(), seed=1, activations=True) as block:
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            model(torch.ones(3, 5))
        model(X)
    assert block.calls == 2 and block.effective == 1 and not hooks_of(model)
