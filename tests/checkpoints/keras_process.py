"""A process of its own that runs Keras on one backend: it saves models, and loads what became of them.

Commands come as lines of JSON on stdin, answers go as such to the file descriptor named as first argument.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import traceback

import numpy as np

rng = np.random.default_rng(5)


def models(wanted):
    """Models by name, with an optimizer each where they can be trained."""
    import keras
    from keras import layers

    def compiled(model, optimizer):
        model.compile(optimizer, keras.losses.MeanSquaredError())
        model.optimizer.build(model.trainable_variables)
        return model

    def cnn():
        return keras.Sequential(
            [
                keras.Input((8, 8, 1)),
                layers.Conv2D(4, 3),
                layers.BatchNormalization(name="bn"),
                layers.DepthwiseConv2D(3, use_bias=False),
                layers.BatchNormalization(scale=False),
                layers.Dropout(0.1),
                layers.Flatten(),
                layers.Dense(10, name="head"),
            ]
        )

    def text():
        words = keras.Input((6,), dtype="int32")
        x = layers.Embedding(20, 8, name="words")(words)
        x = layers.Bidirectional(layers.LSTM(3, return_sequences=True))(x)
        x = layers.GRU(6, return_sequences=True)(x)
        x = layers.LayerNormalization()(layers.MultiHeadAttention(2, 3)(x, x))
        return keras.Model(words, layers.TimeDistributed(layers.Dense(2))(x))

    def nested():
        encoder = keras.Sequential(
            [keras.Input((4,)), layers.Dense(4), layers.LayerNormalization(), layers.Dense(4)], name="encoder"
        )
        inner_input = keras.Input((4,))
        inner = keras.Model(inner_input, layers.Dense(4)(encoder(inner_input)), name="inner")
        x = keras.Input((4,))
        y = layers.Dense(4)(x)
        y = layers.Add()([layers.BatchNormalization()(y), keras.ops.relu(inner(y))])
        return keras.Model(x, layers.Dense(4)(layers.Dense(4)(y)))

    @keras.saving.register_keras_serializable()
    class Subclassed(keras.Model):
        def __init__(self, **options):
            super().__init__(**options)
            self.zeroth = layers.Dense(4)
            self.attention = layers.Dense(4, name="alpha")
            self.blocks = [layers.Dense(4), layers.Dense(4)]
            self.tail = keras.Sequential([layers.Dense(2)])

        def build(self, shape):
            self.scale = self.add_weight(shape=(4,), name="scale")
            for each in (self.zeroth, self.attention, *self.blocks, self.tail):
                each.build((None, 4))
            self.built = True

        def call(self, x):
            x = self.attention(self.zeroth(x)) * self.scale
            for block in self.blocks:
                x = block(x)
            return self.tail(x)

    def subclassed():
        model = Subclassed()
        model.build((None, 4))
        return model

    def of_dtype(policy):
        return keras.Sequential(
            [
                keras.Input((4,)),
                layers.Dense(4, dtype=policy),
                layers.LayerNormalization(dtype=policy),
                layers.Dense(2, dtype=policy),
            ]
        )

    def quantised(mode):
        model = keras.Sequential(
            [
                keras.Input((4,), dtype="int32"),
                layers.Embedding(20, 8),
                layers.EinsumDense("abc,cd->abd", (4, 6), bias_axes="d"),
                layers.Dense(4),
            ]
        )
        model.quantize(mode)
        return model

    makers = {
        "cnn": lambda: compiled(cnn(), "adam"),
        "text": lambda: compiled(text(), keras.optimizers.SGD(0.1, momentum=0.9)),
        "nested": lambda: compiled(nested(), keras.optimizers.Adam(amsgrad=True)),
        "subclassed": lambda: compiled(subclassed(), "rmsprop"),
        "mixed": lambda: compiled(
            of_dtype("mixed_float16"), keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam())
        ),
        "bfloat16": lambda: compiled(of_dtype("bfloat16"), "adam"),
        "float16": lambda: compiled(of_dtype("float16"), "adam"),
        "int8": lambda: quantised("int8"),
        "int4": lambda: quantised("int4"),
    }
    for name in wanted:
        yield name, makers[name]()


def fill(variables):
    """Give every variable contents of its own, so that a file's tensors can be known by theirs."""
    for n, variable in enumerate(variables):
        kind = str(variable.dtype)
        if kind.startswith(("int", "uint")):
            most = 100 if kind.endswith("8") else 10_000
            value = rng.integers(0, most, variable.shape)
            value = value + n if not variable.shape and not kind.endswith("8") else value
            variable.assign(value.astype(kind))
        else:
            variable.assign(rng.random(variable.shape).astype(np.float32) + n % 7)


def raw(variable):
    """The bytes of a variable."""
    import keras
    import ml_dtypes

    value = keras.ops.convert_to_numpy(variable.value)
    if str(variable.dtype) == "bfloat16":
        value = value.astype(ml_dtypes.bfloat16)
    return np.ascontiguousarray(value).tobytes()


def contents(variables):
    """What variables hold: by path, the digests of their bytes."""
    found = {}
    for variable in variables:
        found.setdefault(variable.path, []).append(hashlib.sha1(raw(variable)).hexdigest())
    return found


def truth(model):
    """The real name of all contents, slots as ``adam/momentum of dense/kernel``."""
    found = {d: path for path, digests in contents(model.variables).items() for d in digests}
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None:
        return found
    parameters = {v.path.replace("/", "_"): v.path for v in model.trainable_variables}
    for path, digests in contents(optimizer.variables).items():
        owner, _, leaf = path.rpartition("/")
        for joined, parameter in parameters.items():
            if leaf.startswith(f"{joined}_"):
                path = f"{owner}/{leaf.removeprefix(joined + '_')} of {parameter}"
        found |= dict.fromkeys(digests, path)
    return found


made = {}


def write(folder, wanted):
    """Save models in every form that Keras has."""
    told = {}
    for name, model in models(wanted):
        optimizer = getattr(model, "optimizer", None)
        fill([*model.variables, *(optimizer.variables if optimizer else ())])
        made[name] = model
        model.save(f"{folder}/{name}.keras")
        model.save_weights(f"{folder}/{name}.weights.h5")
        if name in ("cnn", "text"):
            model.save(f"{folder}/{name}.h5")
            model.save_weights(f"{folder}/{name}.weights.json", max_shard_size=4e-6)
        told[name] = {"name": model.name, "truth": truth(model)}
    return told


def load(path, name):
    """The bytes of all variables after loading a file, as hexadecimal digits, in the order of the model."""
    import keras

    if path.endswith((".weights.h5", ".weights.json")):
        model = made[name]
        model.load_weights(path)
    else:
        model = keras.models.load_model(path)
    optimizer = getattr(model, "optimizer", None)
    every = [*model.variables, *(optimizer.variables if optimizer else ())]
    return [(v.path, raw(v).hex()) for v in every]


def sweep(folder):
    """Save a model of every kind of layer."""
    import keras_layers

    return keras_layers.write(folder, truth, fill)


def optimizers(folder):
    """Save a model with every optimizer."""
    import keras_layers

    return keras_layers.write_optimizers(folder, truth, fill)


COMMANDS = {"write": write, "load": load, "sweep": sweep, "optimizers": optimizers}


def main() -> None:
    if os.environ["KERAS_BACKEND"] != "tensorflow":
        # Keras looks for it on the way, which takes seconds, and does well without it.
        sys.modules["tensorflow"] = None
    with os.fdopen(int(sys.argv[1]), "w") as answers:
        for line in sys.stdin:
            command, arguments = json.loads(line)
            try:
                answer = {"answer": COMMANDS[command](*arguments)}
            except Exception as why:
                answer = {"error": f"{type(why).__name__}: {why}", "traceback": traceback.format_exc()}
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
