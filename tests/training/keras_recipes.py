"""Keras workloads that hold whatever a resume can lose, and a process that trains and resumes them.

As a program: ``keras_recipes.py straight FOLDER RECIPE…`` trains each to epoch 4 with checkpoints of epochs 2
and 4, and has another process go on from epoch 2; each writes what it measured to ``FOLDER/<mode>.json``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from ckptflip.training.keras import KerasWorkload
from ckptflip.training.keras_settings import keras

layers, optimizers = keras.layers, keras.optimizers


def cross_entropy():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def data(*shape):
    rng = np.random.default_rng(0)
    x = rng.random((40, *shape), dtype=np.float32)
    y = (x.reshape(40, -1).mean(axis=1) > 0.5).astype(np.int64)
    return (x, y), (x[:21], y[:21])


def full():
    """Augmentation, noise, normalisation, dropout, a penalty, momentum, clipping, a schedule, a metric."""
    rate = optimizers.schedules.CosineDecay(0.1, 20, warmup_target=0.2, warmup_steps=4)
    model = keras.Sequential([
        keras.Input((6, 6, 2)), layers.RandomTranslation(0.2, 0.2), layers.RandomFlip("horizontal"),
        layers.Conv2D(3, 3, kernel_regularizer="l2"), layers.BatchNormalization(), layers.ReLU(),
        layers.GaussianNoise(0.1), layers.Flatten(), layers.Dropout(0.3), layers.Dense(2),
    ])  # fmt: skip
    sgd = optimizers.SGD(rate, momentum=0.9, nesterov=True, global_clipnorm=1.0)
    model.compile(sgd, cross_entropy(), metrics=["accuracy", "sparse_categorical_crossentropy"])
    return model


def dense(optimizer="adam", policy=None, floatx=None):
    """The same in small, with an optimizer and numbers of one's choice."""
    if floatx:
        keras.config.set_floatx(floatx)
    if policy:
        keras.config.set_dtype_policy(policy)
    model = keras.Sequential([
        keras.Input((5,)), layers.Dense(4, activation="relu"), layers.BatchNormalization(),
        layers.Dropout(0.3), layers.Dense(2),
    ])  # fmt: skip
    model.compile(optimizer() if callable(optimizer) else optimizer, cross_entropy())
    return model


class Subclassed(keras.Model):
    """Not built before it sees data, draws by `keras.random`, and adds a loss while it runs."""

    def __init__(self):
        super().__init__()
        self.hidden, self.head = layers.Dense(4), layers.Dense(2)
        self.dropout = layers.Dropout(0.5)
        self.seeds = keras.random.SeedGenerator()

    def call(self, x, training=False):
        x = self.dropout(keras.ops.relu(self.hidden(x)), training=training)
        self.add_loss(0.01 * keras.ops.mean(x**2))
        noise = keras.random.normal(keras.ops.shape(x), seed=self.seeds)
        return self.head(x + 0.1 * noise if training else x)


def subclassed():
    model = Subclassed()
    model.compile(optimizers.RMSprop(0.01, momentum=0.5, use_ema=True), cross_entropy())
    return model


def accumulating():
    return optimizers.Adam(0.01, amsgrad=True, weight_decay=0.01, gradient_accumulation_steps=2)


def loss_scaling():
    inner = optimizers.Adam(optimizers.schedules.ExponentialDecay(0.02, 3, 0.7))
    return optimizers.LossScaleOptimizer(inner, initial_scale=2.0**17, dynamic_growth_steps=3)


RECIPES = {
    "full": (full, (6, 6, 2)),
    "adam": (lambda: dense(accumulating), (5,)),
    "subclassed": (subclassed, (5,)),
    "mixed_float16": (lambda: dense(loss_scaling, "mixed_float16"), (5,)),
    "mixed_bfloat16": (lambda: dense(policy="mixed_bfloat16"), (5,)),
    "bfloat16": (lambda: dense(policy="bfloat16"), (5,)),
    "float64": (lambda: dense(floatx="float64", policy="float64"), (5,)),
}


def workload(name):
    model, shape = RECIPES[name]
    return KerasWorkload(name, model=model, data=lambda: data(*shape), batch_size=16)


def go_on(made, epochs):
    return [(made.train_epoch(), made.evaluate()) for _ in range(epochs)]


def straight(folder, name):
    """Four epochs at a stretch, and what the last two measured."""
    made = workload(name)
    made.start(3)
    go_on(made, 2)
    made.save(folder / f"{name}-2.keras")
    measured = go_on(made, 2)
    made.save(folder / f"{name}-4.keras")
    return measured


def resumed(folder, name, out="resumed"):
    """Two epochs more from the checkpoint of the second."""
    made = workload(name)
    made.load(folder / f"{name}-2.keras")
    measured = go_on(made, 2)
    made.save(folder / f"{name}-{out}.keras")
    return measured


if __name__ == "__main__":
    folder = Path(sys.argv[2])
    mode = {"straight": straight, "resumed": resumed}[sys.argv[1]]
    told = {name: mode(folder, name) for name in sys.argv[3:]}
    (folder / f"{sys.argv[1]}.json").write_text(json.dumps(told))
    if mode is straight:
        subprocess.run([sys.executable, __file__, "resumed", *sys.argv[2:]], check=True)
