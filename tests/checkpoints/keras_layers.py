"""One layer of each kind that Keras has, with and without its optional weights, in one model each."""

from __future__ import annotations

import inspect

import numpy as np

# Layers that only wrap another framework's module.
FOREIGN = {"FlaxLayer", "JaxLayer", "TFSMLayer", "TorchModuleWrapper"}


def cases():
    """Layers, each with the shape of its input; two are given where it takes two."""
    from keras import layers

    image, series, volume = (6, 6, 3), (8, 3), (5, 5, 5, 2)
    yield layers.Dense(4), (3,)
    yield layers.Dense(4, use_bias=False), (3,)
    yield layers.EinsumDense("abc,cd->abd", (None, 4), bias_axes="d"), series
    yield layers.EinsumDense("abc,cd->abd", (None, 4)), series
    yield layers.Embedding(9, 4), (5,)
    yield layers.ReversibleEmbedding(9, 4), (5,)
    yield layers.ReversibleEmbedding(9, 4, tie_weights=False), (5,)
    for kind in ("Conv1D", "Conv1DTranspose", "SeparableConv1D"):
        yield getattr(layers, kind)(4, 2), series
    for kind in ("Conv2D", "Conv2DTranspose", "SeparableConv2D"):
        yield getattr(layers, kind)(4, 2), image
        yield getattr(layers, kind)(4, 2, use_bias=False), image
    for kind in ("Conv3D", "Conv3DTranspose"):
        yield getattr(layers, kind)(4, 2), volume
    yield layers.DepthwiseConv1D(2), series
    yield layers.DepthwiseConv2D(2), image
    for scale in (True, False):
        for center in (True, False):
            yield layers.BatchNormalization(scale=scale, center=center), (3,)
            yield layers.LayerNormalization(scale=scale, center=center), (3,)
            yield layers.GroupNormalization(1, scale=scale, center=center), (3,)
    yield layers.BatchNormalization(renorm=True), (3,)
    yield layers.RMSNormalization(), (3,)
    yield layers.Normalization(), (3,)
    yield layers.SpectralNormalization(layers.Dense(4)), (3,)
    for kind in ("LSTM", "GRU", "SimpleRNN"):
        yield getattr(layers, kind)(4), series
        yield getattr(layers, kind)(4, use_bias=False), series
        yield layers.RNN(getattr(layers, f"{kind}Cell")(4)), series
        yield layers.Bidirectional(getattr(layers, kind)(4)), series
    yield layers.RNN([layers.LSTMCell(4), layers.GRUCell(4)]), series
    yield layers.ConvLSTM1D(2, 2), (3, *series)
    yield layers.ConvLSTM2D(2, 2), (3, *image)
    yield layers.ConvLSTM3D(2, 2), (3, *volume)
    yield layers.TimeDistributed(layers.Dense(4)), series
    yield layers.PReLU(), (3,)
    yield layers.Attention(use_scale=True), (series, series)
    yield layers.Attention(score_mode="concat"), (series, series)
    yield layers.Attention(use_scale=True, score_mode="concat"), (series, series)
    yield layers.AdditiveAttention(), (series, series)
    yield layers.MultiHeadAttention(2, 3), (series, series)
    yield layers.MultiHeadAttention(2, 3, use_bias=False), (series, series)
    yield layers.GroupQueryAttention(3, 2, 1), (series, series)
    yield layers.STFTSpectrogram(), (600, 1)


def write(folder, truth, fill):
    """Save a model of all cases; what each variable is, and which layers with weights are missing here."""
    import keras

    inputs, outputs, seen = [], [], set()
    for layer, shape in cases():
        shapes = shape if isinstance(shape[0], tuple) else (shape,)
        given = [keras.Input(s) for s in shapes]
        inputs += given
        if type(layer).__name__.endswith("HeadAttention") or type(layer).__name__.startswith("Group"):
            made = layer(*given)
        else:
            made = layer(given if len(given) > 1 else given[0])
        outputs += list(made) if isinstance(made, list) else [made]
        seen.add(type(layer).__name__)
    model = keras.Model(inputs, outputs)
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    fill([*model.variables, *model.optimizer.variables])
    model.save(f"{folder}/sweep.keras")
    model.save_weights(f"{folder}/sweep.weights.h5")
    return {"name": model.name, "truth": truth(model), "missing": _missing(seen)}


def _missing(seen):
    """Layers that make weights when they are called on something, and that no case tries."""
    import keras

    found = []
    for name, kind in inspect.getmembers(keras.layers, inspect.isclass):
        if name in seen | FOREIGN or kind.__name__ in seen or not issubclass(kind, keras.layers.Layer):
            continue
        try:
            layer = kind()
        except Exception:
            continue
        for rank in (2, 3, 4, 5):
            try:
                layer(np.ones((2,) * rank, np.float32))
            except Exception:
                continue
            break
        if [v for v in layer.weights if "seed" not in v.path]:
            found.append(name)
    return found


def optimizers():
    """Optimizers by a name, with what they may keep besides."""
    from keras import optimizers as o

    for kind in ("Adam", "AdamW", "RMSprop", "Adagrad", "Adadelta", "Adamax", "Nadam", "Ftrl", "Lion"):
        yield kind, getattr(o, kind)()
    for kind in ("Adafactor", "Lamb", "Muon", "ScheduleFreeAdamW"):
        if hasattr(o, kind):
            yield kind, getattr(o, kind)()
    yield "SGD", o.SGD()
    yield "momentum", o.SGD(0.1, momentum=0.9)
    yield "amsgrad", o.Adam(amsgrad=True)
    yield "average", o.Adam(use_ema=True)
    yield "accumulated", o.Adam(gradient_accumulation_steps=2)
    yield "centred", o.RMSprop(centered=True)
    yield "centred_momentum", o.RMSprop(centered=True, momentum=0.1)
    yield "schedule", o.Adam(o.schedules.CosineDecay(0.1, 10))
    yield "scaled", o.LossScaleOptimizer(o.SGD(0.1, momentum=0.9))


def write_optimizers(folder, truth, fill):
    """Save one model with every optimizer."""
    import keras
    from keras import layers

    told = {}
    for name, optimizer in optimizers():
        model = keras.Sequential(
            [keras.Input((3,)), layers.Dense(5), layers.BatchNormalization(), layers.Dense(2, name="head")]
        )
        model.compile(optimizer, "mse")
        optimizer.build(model.trainable_variables)
        fill([*model.variables, *optimizer.variables])
        model.save(f"{folder}/by-{name}.keras")
        model.save_weights(f"{folder}/by-{name}.weights.h5")
        told[name] = {"name": model.name, "truth": truth(model)}
    return told
