"""What the tests of ``with live.faults(…)`` share."""

import numpy as np
import torch

SIZES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor):
    """A copy of a tensor's words in C order, made without a number."""
    plain = tensor.detach().cpu()
    plain = torch.view_as_real(plain) if plain.is_complex() else plain
    words = plain.view(SIZES[plain.element_size()]).contiguous().numpy()
    return np.frombuffer(words.tobytes(), f"u{words.itemsize}").copy()


def same(first, second):
    return all((bits(a) == bits(b)).all() for a, b in zip(first, second, strict=True))


def state_of(model):
    return [*model.parameters(), *model.buffers()]


def gate_of(module):
    """What is called in a module's place."""
    return module.__dict__.get("_compiled_call_impl")


def hooks_of(model):
    """Every gate and hook that stands on a model or its parameters."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_always_called")
    found = [hook for module in model.modules() for kind in kinds for hook in getattr(module, kind).values()]
    found += [gate for module in model.modules() if (gate := gate_of(module)) is not None]
    return found + [p for p in model.parameters() if p._post_accumulate_grad_hooks]


class Gives(torch.nn.Module):
    """Gives what a function makes of its input."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args, **kwargs):
        return self.function(*args, **kwargs)
