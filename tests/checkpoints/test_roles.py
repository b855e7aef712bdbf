"""Layers and roles guessed from the names that Keras, PyTorch, Chainer, JAX and TensorFlow give."""

import h5py
import numpy as np
import pytest

import ckptflip
from ckptflip.bits import lookup
from ckptflip.checkpoints.roles import guess

F4, I8 = "float32", "int64"
# (path, dtype, axes, siblings, name attribute of the parent group) → (layer, role)
KERAS_2 = [
    ("model_weights/conv2d/conv2d/kernel:0", F4, 4, (), "", "conv2d", "weight"),
    ("model_weights/conv2d/conv2d/bias:0", F4, 1, (), "", "conv2d", "bias"),
    (
        "model_weights/batch_normalization/batch_normalization/gamma:0",
        F4,
        1,
        (),
        "",
        "batch_normalization",
        "norm",
    ),
    (
        "model_weights/batch_normalization/batch_normalization/beta:0",
        F4,
        1,
        (),
        "",
        "batch_normalization",
        "norm",
    ),
    ("model_weights/bn1/bn1/moving_mean:0", F4, 1, (), "", "bn1", "statistic"),
    ("model_weights/bn1/bn1/moving_variance:0", F4, 1, (), "", "bn1", "statistic"),
    ("model_weights/embedding/embedding/embeddings:0", F4, 2, (), "", "embedding", "embedding"),
    ("model_weights/lstm/lstm/lstm_cell/recurrent_kernel:0", F4, 2, (), "", "lstm", "weight"),
    ("model_weights/lstm/lstm/lstm_cell/kernel:0", F4, 2, (), "", "lstm", "weight"),
    ("model_weights/sep/sep/depthwise_kernel:0", F4, 4, (), "", "sep", "weight"),
    ("optimizer_weights/Adam/dense/kernel/m:0", F4, 2, (), "", "Adam/dense/kernel", "optimizer"),
    ("optimizer_weights/Adam/iter:0", I8, 0, (), "", "Adam", "optimizer"),
    ("optimizer_weights/training/SGD/iteration:0", I8, 0, (), "", "training/SGD", "counter"),
]
KERAS_3 = [
    ("layers/dense/vars/0", F4, 2, ("0", "1"), "fc1", "fc1", "weight"),
    ("layers/dense/vars/1", F4, 1, ("0", "1"), "fc1", "fc1", "bias"),
    ("layers/dense/vars/0", F4, 2, ("0", "1"), "", "dense", "weight"),
    ("layers/conv2d/vars/0", F4, 4, ("0",), "stem", "stem", "weight"),
    ("layers/batch_normalization/vars/0", F4, 1, (), "bn", "bn", "norm"),
    ("layers/batch_normalization/vars/1", F4, 1, (), "bn", "bn", "norm"),
    ("layers/batch_normalization/vars/2", F4, 1, (), "bn", "bn", "statistic"),
    ("layers/batch_normalization/vars/3", F4, 1, (), "bn", "bn", "statistic"),
    ("layers/layer_normalization_2/vars/1", F4, 1, (), "", "layer_normalization_2", "norm"),
    ("layers/embedding/vars/0", F4, 2, (), "tokens", "tokens", "embedding"),
    (
        "layers/dropout/seed_generator/vars/seed_generator_state",
        "uint32",
        1,
        (),
        "",
        "dropout",
        "rng",
    ),
    ("layers/dropout/seed_generator/vars/0", "uint32", 1, (), "", "dropout", "rng"),
    ("optimizer/vars/0", I8, 0, (), "adam", "adam", "counter"),
    ("optimizer/vars/1", F4, 0, (), "adam", "adam", "optimizer"),
    ("optimizer/vars/2", F4, 2, (), "adam", "adam", "optimizer"),
]
PYTORCH = [
    ("model/conv1.weight", F4, 4, ("conv1.weight", "conv1.bias"), "", "conv1", "weight"),
    ("model/conv1.bias", F4, 1, ("conv1.weight", "conv1.bias"), "", "conv1", "bias"),
    ("state_dict/layer1.0.conv2.weight", F4, 4, (), "", "layer1.0.conv2", "weight"),
    ("model/layer1.0.bn1.weight", F4, 1, (), "", "layer1.0.bn1", "norm"),
    ("model/layer1.0.bn1.bias", F4, 1, (), "", "layer1.0.bn1", "norm"),
    ("model/features.1.weight", F4, 1, ("features.1.running_mean",), "", "features.1", "norm"),
    ("model/features.1.bias", F4, 1, ("features.1.running_mean",), "", "features.1", "norm"),
    ("model/features.0.bias", F4, 1, ("features.1.running_mean",), "", "features.0", "bias"),
    ("model/features.1.running_mean", F4, 1, (), "", "features.1", "statistic"),
    ("model/features.1.running_var", F4, 1, (), "", "features.1", "statistic"),
    ("model/features.1.num_batches_tracked", I8, 0, (), "", "features.1", "counter"),
    ("model/embed_tokens.weight", F4, 2, (), "", "embed_tokens", "embedding"),
    ("model/transformer.wte.weight", F4, 2, (), "", "transformer.wte", "embedding"),
    ("model/embeddings.word_embeddings.weight", F4, 2, (), "", "embeddings.word_embeddings", "embedding"),
    ("model/embeddings.LayerNorm.weight", F4, 1, (), "", "embeddings.LayerNorm", "norm"),
    ("model/layers.0.input_layernorm.weight", F4, 1, (), "", "layers.0.input_layernorm", "norm"),
    ("model/transformer.ln_f.bias", F4, 1, (), "", "transformer.ln_f", "norm"),
    ("model/attn.in_proj_weight", F4, 2, (), "", "attn", "weight"),
    ("model/attn.in_proj_bias", F4, 1, (), "", "attn", "bias"),
    ("model/rnn.weight_ih_l0", F4, 2, (), "", "rnn", "weight"),
    ("model/rnn.bias_hh_l0", F4, 1, (), "", "rnn", "bias"),
    ("model/encoder.ln_1.weight", F4, 1, (), "", "encoder.ln_1", "norm"),
    ("model/head.norm.weight", F4, 1, (), "", "head.norm", "norm"),
    ("conv1.weight", F4, 4, (), "", "conv1", "weight"),
    ("optimizer/state/0/exp_avg", F4, 2, (), "conv1.weight", "conv1", "optimizer"),
    ("optimizer/state/0/step", F4, 0, (), "conv1.weight", "conv1", "counter"),
    ("rng/torch", "uint8", 1, (), "", "", "rng"),
    ("epoch", I8, 0, (), "", "", "counter"),
]
CHAINER = [
    ("updater/model:main/conv1/W", F4, 4, (), "", "conv1", "weight"),
    ("updater/model:main/conv1/b", F4, 1, (), "", "conv1", "bias"),
    ("updater/model:main/predictor/fc6/W", F4, 2, (), "", "predictor/fc6", "weight"),
    ("updater/model:main/bn/gamma", F4, 1, ("avg_mean",), "", "bn", "norm"),
    ("updater/model:main/bn/avg_mean", F4, 1, (), "", "bn", "statistic"),
    ("updater/model:main/bn/avg_var", F4, 1, (), "", "bn", "statistic"),
    ("updater/model:main/bn/N", I8, 0, (), "", "bn", "counter"),
    ("updater/optimizer:main/conv1/W/v", F4, 4, (), "", "conv1/W", "optimizer"),
    ("updater/optimizer:main/t", I8, 0, (), "", "", "counter"),
    ("updater/iteration", I8, 0, (), "", "", "counter"),
]
I4 = "int32"
JAX = [
    *((f"params/{n}/scale", F4, 1, (), "", n, "norm") for n in ("BatchNorm_0", "LayerNorm_0", "RMSNorm_0")),
    ("params/bn1/scale", F4, 1, (), "", "bn1", "norm"),
    ("params/BatchNorm_0/bias", F4, 1, (), "", "BatchNorm_0", "norm"),
    ("params/rescaling/scale", F4, 0, (), "", "rescaling", "other"),
    ("batch_stats/BatchNorm_0/mean", F4, 1, (), "", "BatchNorm_0", "statistic"),
    ("batch_stats/bn1/var", F4, 1, (), "", "bn1", "statistic"),
    ("batch_stats/own/mean", F4, 1, (), "", "own", "statistic"),
    ("params/gaussian/mean", F4, 1, (), "", "gaussian", "other"),
    ("params/layers/0/kernel", F4, 2, (), "", "layers/0", "weight"),
    ("params/layers/0/attn/query/kernel", F4, 3, (), "", "layers/0/attn/query", "weight"),
    ("params/Embed_0/embedding", F4, 2, (), "", "Embed_0", "embedding"),
    ("opt_state/0/count", I4, 0, (), "", "", "counter"),
    ("opt_state/0/count", F4, 0, (), "", "", "optimizer"),
    ("params/cells/count", I4, 0, (), "", "cells", "other"),
    *(
        (f"opt_state/0/{tree}/conv1/kernel", F4, 4, (), "", "conv1", "optimizer")
        for tree in ("mu", "nu", "trace", "momentum", "v_row")
    ),
    ("opt_state/1/0/mu/layers/0/kernel", F4, 2, (), "", "layers/0", "optimizer"),
    ("opt_state/0/mu/BatchNorm_0/scale", F4, 1, (), "", "BatchNorm_0", "optimizer"),
    ("opt_state/inner_states/head/inner_state/0/nu/params/head/bias", F4, 1, (), "", "head", "optimizer"),
    ("model/layer1/0/weight", F4, 4, (), "", "layer1/0", "weight"),
    ("model/0/weight", F4, 2, (), "", "0", "weight"),
    ("optimizer/state/0/exp_avg", F4, 2, (), "", "", "optimizer"),
]
TENSORFLOW = [
    ("optimizer/_iterations", I8, 0, (), "", "", "counter"),
    ("save_counter", I8, 0, (), "", "", "counter"),
    ("adam/iteration", I8, 0, (), "", "adam", "counter"),
    ("adam/net_hidden_kernel_momentum", F4, 2, (), "", "adam", "optimizer"),
    ("net/adam/kernel", F4, 2, (), "", "net/adam", "weight"),
]


@pytest.mark.parametrize(
    "case", [*KERAS_2, *KERAS_3, *PYTORCH, *CHAINER, *JAX, *TENSORFLOW], ids=lambda c: c[0]
)
def test_the_guess(case):
    path, dtype, ndim, siblings, given, layer, role = case
    assert guess(path, lookup(dtype), ndim, siblings, given) == (layer, role)


@pytest.mark.parametrize("path", ["x", "data/images", "a/b/c", "..", "/", "vars/0", "weights"])
def test_unknown_names_get_some_role(path):
    assert guess(path, lookup(F4), 1, ())[1] in ("other", "weight", "bias")


def test_roles_select_in_a_file(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        layer = file.create_group("layers/dense/vars")
        layer.attrs["name"] = "fc1"
        layer["0"], layer["1"] = np.ones((4, 4), "f4"), np.ones(4, "f4")
        file["optimizer/vars/0"] = np.int64(3)
        file["optimizer/vars/1"] = np.float32(0.1)
    with ckptflip.opened(tmp_path / "a.h5") as target:
        found = {n: (t.layer, t.role) for t in target.tensors for n in (t.name, *t.aliases)}
    assert found["layers/dense/vars/0"] == ("fc1", "weight")
    assert found["layers/dense/vars/1"] == ("fc1", "bias")
    assert found["optimizer/vars/0"][1] == "counter" and found["optimizer/vars/1"][1] == "optimizer"
    bias = ckptflip.inject(tmp_path / "a.h5", roles="bias", layers="fc1", fraction=1.0, dry_run=True)
    model = ckptflip.inject(tmp_path / "a.h5", roles="model", fraction=1.0, dry_run=True)
    assert bias.bits_hit == 4 * 32 and model.bits_hit == 20 * 32
