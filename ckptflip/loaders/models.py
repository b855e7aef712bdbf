"""Loaders of exchange formats for models: GGUF, ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ckptflip.bits import as_words
from ckptflip.loaders.arrays import arrays, words
from ckptflip.loaders.probes import Words


class Gguf:
    """GGUF with plain tensors and blocks of 8-bit codes."""

    def write(self, folder: Path) -> Path:
        """Write with gguf."""
        import gguf

        writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
        writer.add_tensor("token_embd.weight", arrays()["conv.weight"].reshape(6, 6))
        random = np.random.default_rng(0).standard_normal((2, 64)).astype("float32")
        codes = gguf.quants.quantize(random, gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor("blk.0.attn_q.weight", codes, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return folder / "model.gguf"

    def load(self, path: Path) -> Words:
        """Read with gguf: of a block of 34 bytes, two are the scale, the others codes."""
        import gguf

        found: dict[str, Any] = {}
        for tensor in gguf.GGUFReader(path).tensors:
            if tensor.tensor_type == gguf.GGMLQuantizationType.Q8_0:
                blocks = np.array(tensor.data).reshape(-1, 34)
                found[f"{tensor.name}.scale"] = np.ascontiguousarray(blocks[:, :2]).view("<u2")
                found[f"{tensor.name}.codes"] = np.ascontiguousarray(blocks[:, 2:])
            else:
                found[tensor.name] = np.array(tensor.data)
        return words(found)


class Onnx:
    """ONNX with its initialisers inside."""

    external = False

    def write(self, folder: Path) -> Path:
        """Write with onnx."""
        import onnx
        from onnx import TensorProto, helper, numpy_helper

        tensors = [numpy_helper.from_array(array, name) for name, array in arrays().items()]
        output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4, 3, 3])
        node = helper.make_node("Identity", ["conv.weight"], ["y"])
        model = helper.make_model(helper.make_graph([node], "g", [], [output], tensors))
        onnx.save(
            model, folder / "model.onnx", save_as_external_data=self.external, location="model.data",
            size_threshold=0,
        )  # fmt: skip
        return folder / "model.onnx"

    def load(self, path: Path) -> Words:
        """Read with onnx."""
        import onnx
        from onnx import numpy_helper

        found = onnx.load(path).graph.initializer
        return {t.name: as_words(np.ascontiguousarray(numpy_helper.to_array(t))) for t in found}


class OnnxExternal(Onnx):
    """ONNX with its initialisers in a file beside it."""

    external = True
