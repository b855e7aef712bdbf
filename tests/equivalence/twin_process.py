"""Twin networks in PyTorch and Keras, in a process of their own: `python twin_process.py DESCRIPTOR`.

Commands come as JSON lines on standard input, answers go to the descriptor.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np

from ckptflip.equivalence import layouts


def torch_nets():
    import torch
    from torch import nn

    class Images(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = nn.Conv2d(2, 4, 3, padding=1)
            self.bn1 = nn.BatchNorm2d(4, eps=1e-3)
            self.dw = nn.Conv2d(4, 8, 3, groups=4)
            self.conv2 = nn.Conv2d(8, 6, 3)
            self.fc1 = nn.Linear(6 * 4 * 3, 5)
            self.fc2 = nn.Linear(5, 3)

        def forward(self, x):
            x = torch.relu(self.bn1(self.conv1(x)))
            x = torch.relu(self.conv2(self.dw(x)))
            return self.fc2(torch.relu(self.fc1(x.flatten(1))))

    class Words(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.emb = nn.Embedding(11, 4)
            self.rnn = getattr(nn, kind)(4, 3, batch_first=True)
            self.fc = nn.Linear(3, 2)

        def forward(self, x):
            return self.fc(self.rnn(self.emb(x))[0][:, -1])

    torch.manual_seed(1)
    return {"images": Images(), "lstm": Words("LSTM"), "gru": Words("GRU")}


def keras_nets():
    import keras
    from keras import layers

    images = keras.Sequential(
        [
            keras.Input((8, 7, 2)),
            layers.Conv2D(4, 3, padding="same", name="conv1"),
            layers.BatchNormalization(epsilon=1e-3, name="bn1"),
            layers.ReLU(),
            layers.DepthwiseConv2D(3, depth_multiplier=2, name="dw"),
            layers.Conv2D(6, 3, activation="relu", name="conv2"),
            layers.Flatten(),
            layers.Dense(5, activation="relu", name="fc1"),
            layers.Dense(3, name="fc2"),
        ]
    )
    found = {"images": images}
    for kind in ("LSTM", "GRU"):
        found[kind.lower()] = keras.Sequential(
            [
                keras.Input((6,), dtype="int32"),
                layers.Embedding(11, 4, name="emb"),
                getattr(layers, kind)(3, name="rnn"),
                layers.Dense(2, name="fc"),
            ]
        )
    return found


def as_keras(name, array, target):
    """An array of PyTorch's under Keras' layout, by the index maps alone."""
    shape = array.shape
    gates = {"gru": 3, "lstm": 4}.get(name.partition("/")[0], 0) if "rnn" in name else 0
    if len(shape) < 2 or "emb" in name:
        return array
    channels = 6 if "fc1" in name else None
    return layouts.between(shape, target, channels=channels, gates=gates).moved(array)


NAMES = {"running_mean": "moving_mean", "running_var": "moving_variance"}
NORM = {"weight": "gamma", "bias": "beta"}


def keras_path(name):
    """The path in Keras of a tensor of PyTorch's; None where there is none of its own."""
    layer, _, variable = name.partition(".")
    if layer == "rnn":
        kept = {"weight_ih_l0": "kernel", "weight_hh_l0": "recurrent_kernel"}.get(variable)
        return kept and f"rnn/{kept}"
    if layer == "bn1":
        return f"bn1/{ {**NORM, **NAMES}.get(variable, '') }"
    if layer == "emb":
        return "emb/embeddings"
    return f"{layer}/{'kernel' if variable == 'weight' else variable}"


def input_of(kind):
    rng = np.random.default_rng(5)
    if kind == "images":
        return rng.normal(size=(4, 2, 8, 7)).astype("f4")
    return rng.integers(0, 11, (4, 6))


def step(net, kind, optimizer):
    import torch

    net.train()
    net(torch.as_tensor(input_of(kind))).square().sum().backward()
    optimizer.step()
    net.eval()


def variables(net):
    """Keras' variables by layer and name."""
    found = {}
    for layer in net.layers:
        for variable in layer.weights:
            found[f"{layer.name}/{variable.path.rpartition('/')[2]}"] = variable
    return found


def convert(kind, torch_net, keras_net):
    by_path = variables(keras_net)
    state = {name: value.numpy() for name, value in torch_net.state_dict().items()}
    for name, array in state.items():
        path = keras_path(name)
        if path in by_path:
            by_path[path].assign(as_keras(f"{kind}/{name}", array, tuple(by_path[path].shape)))
    if kind == "images":
        return
    ih, hh = state["rnn.bias_ih_l0"], state["rnn.bias_hh_l0"]
    bias = ih + hh if kind == "lstm" else np.stack([ih, hh]).reshape(2, 3, -1)[:, [1, 0, 2]].reshape(2, -1)
    by_path["rnn/bias"].assign(bias)


def slots(kind, torch_net, optimizer, keras_net, which):
    """Keras' memory of each parameter from PyTorch's."""
    for position, (name, parameter) in enumerate(torch_net.named_parameters()):
        path = keras_path(name)
        own = next((v for p, v in variables(keras_net).items() if p == path), None)
        if own is None:
            continue
        at = [v.path for v in keras_net.trainable_variables].index(own.path)
        for kept, attribute in which:
            values = optimizer.state_dict()["state"][position][kept].numpy()
            variable = getattr(keras_net.optimizer, attribute)[at]
            variable.assign(as_keras(f"{kind}/{name}", values, tuple(variable.shape)))
        del parameter


OPTIMIZERS = {
    "adam": (("exp_avg", "_momentums"), ("exp_avg_sq", "_velocities")),
    "sgd": (("momentum_buffer", "momentums"),),
}


def make(folder):
    """Write the twins' checkpoints."""
    import keras
    import torch

    from ckptflip import torch_h5

    folder = Path(folder)
    for kind, net in torch_nets().items():
        for name, kept in OPTIMIZERS.items():
            if name == "adam":
                optimizer = torch.optim.Adam(net.named_parameters())
            else:
                optimizer = torch.optim.SGD(net.named_parameters(), lr=0.01, momentum=0.9)
            step(net, kind, optimizer)
            twin = keras_nets()[kind]
            twin.compile(
                keras.optimizers.Adam() if name == "adam" else keras.optimizers.SGD(0.01, 0.9), "mse"
            )
            twin.optimizer.build(twin.trainable_variables)
            convert(kind, net, twin)
            slots(kind, net, optimizer, twin, kept)
            state = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state, folder / f"{kind}_{name}.pt")
            torch_h5.save(state, folder / f"{kind}_{name}.h5")
            twin.save(folder / f"{kind}_{name}.keras")
            twin.save_weights(folder / f"{kind}_{name}.weights.h5")


def torch_output(kind, path):
    import torch

    from ckptflip import torch_h5

    state = torch.load(path, weights_only=True) if path.endswith(".pt") else torch_h5.load(path)
    net = torch_nets()[kind].eval()
    net.load_state_dict(state["model"])
    with torch.no_grad():
        return net(torch.as_tensor(input_of(kind))).numpy()


def keras_output(kind, path):
    import keras

    net = keras_nets()[kind]
    if path.endswith(".keras"):
        net = keras.saving.load_model(path)
    else:
        net.compile(keras.optimizers.Adam() if "_adam" in path else keras.optimizers.SGD(0.01, 0.9), "mse")
        net.load_weights(path)
    x = input_of(kind)
    return keras.ops.convert_to_numpy(net(x.transpose(0, 2, 3, 1) if kind == "images" else x))


def outputs(kind, path):
    """What a checkpoint's network makes of a fixed input."""
    is_keras = path.endswith((".keras", ".weights.h5"))
    return (keras_output if is_keras else torch_output)(kind, path).astype(float).tolist()


def main():
    with os.fdopen(int(sys.argv[1]), "w") as answers:
        for line in sys.stdin:
            command, *arguments = json.loads(line)
            answer = {"make": make, "outputs": outputs}[command](*arguments)
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
