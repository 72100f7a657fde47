"""Milliseconds of forms of the operator in onnxruntime, generation of the kernels included.

Inputs are features (B, C, H, W) and hidden channels (B, C / 4, H, W), as after a convolution;
kernels are 1x1 convolutions of the hidden channels, of K x K taps. The forms:

    rows      a product and a sum for each row of taps (implementation `rows`)
    taps      a product and an addition for each tap, on planes of channels
    windows   windows copied, one batched matrix product
    bandN     stored kernels as banded matrices of N outputs, one batched matrix product
    genN      the same, generated as bands (implementation `banded`)
    conv3     a 3x3 convolution, for comparison

    python benchmarks/onnx_operator.py --batches 1,8 --taps 7
"""

import argparse
import statistics
import time

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

# Side, channels and groups of RedNet's stages.
CASES = {"red1": (56, 64, 4), "red2": (28, 128, 8), "red3": (14, 256, 16), "red4": (7, 512, 32)}


class Graph:
    def __init__(self, side, channels, groups, taps):
        self.side, self.channels, self.groups, self.taps = side, channels, groups, taps
        self.pad, self.group_channels = taps // 2, channels // groups
        self.nodes, self.constants = [], []

    def constant(self, values):
        name = f"constant{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def op(self, kind, *inputs, output=None, **attributes):
        """Adds a node; tuples and arrays among its inputs are constants."""
        names = [
            value
            if isinstance(value, str)
            else self.constant(np.array(value, "int64") if isinstance(value, tuple) else value)
            for value in inputs
        ]
        output = output or f"value{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, names, [output], **attributes))
        return output

    def slice(self, x, axis, start, stop):
        return self.op("Slice", x, (start,), (stop,), (axis,))

    def total(self, terms):
        result = None
        for term in terms:
            result = term if result is None else self.op("Add", result, term)
        return result

    def weight(self):
        """(groups, hidden channels, taps), the same for every form."""
        shape = (self.groups, self.channels // 4, self.taps**2)
        return np.random.default_rng(5).standard_normal(shape, "float32")

    def kernels(self):
        """(B, groups * taps, H, W)."""
        weight = self.weight().transpose(0, 2, 1).reshape(-1, self.channels // 4, 1, 1)
        return self.op("Conv", "hidden", np.ascontiguousarray(weight))

    def values_last(self):
        """Features as (B, groups, H, W, channels of a group)."""
        side, channels = self.side, self.group_channels
        x = self.op("Reshape", "x", (-1, self.groups, channels, side * side))
        x = self.op("Transpose", x, perm=[0, 1, 3, 2])
        return self.op("Reshape", x, (-1, self.groups, side, side, channels))

    def finish(self, y):
        """The output from (B, groups, H, W, channels of a group)."""
        side = self.side
        y = self.op("Reshape", y, (-1, self.groups, side * side, self.group_channels))
        y = self.op("Transpose", y, perm=[0, 1, 3, 2])
        self.op("Reshape", y, (-1, self.channels, side, side), output="y")

    def session(self):
        def value(name, shape):
            return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

        side, channels = self.side, self.channels
        inputs = [
            value("x", ["batch", channels, side, side]),
            value("hidden", ["batch", channels // 4, side, side]),
        ]
        graph = helper.make_graph(
            self.nodes, "operator", inputs, [value("y", None)], self.constants
        )
        opset = [helper.make_opsetid("", 18)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=9)
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        return onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )


def rows(g):
    pad, side, taps = g.pad, g.side, g.taps
    x = g.op("Transpose", "x", perm=[0, 2, 3, 1])
    x = g.op("Pad", x, (0, pad, pad, 0, 0, pad, pad, 0))
    x = g.op("Reshape", x, (-1, side + 2 * pad, side + 2 * pad, g.groups, 1, g.group_channels))
    kernels = g.op("Transpose", g.kernels(), perm=[0, 2, 3, 1])
    kernels = g.op("Reshape", kernels, (-1, side, side, g.groups, taps**2, 1))
    columns = g.op("Concat", *(g.slice(x, 2, b, b + side) for b in range(taps)), axis=4)
    products = [
        g.op("Mul", g.slice(columns, 1, a, a + side), g.slice(kernels, 4, a * taps, (a + 1) * taps))
        for a in range(taps)
    ]
    y = g.total(g.op("ReduceSum", p, (4,), keepdims=0) for p in products)
    y = g.op("Reshape", y, (-1, side, side, g.channels))
    g.op("Transpose", y, perm=[0, 3, 1, 2], output="y")


def taps(g):
    pad, side, width = g.pad, g.side, g.side + 2 * g.pad
    x = g.op("Pad", "x", (0, 0, pad, pad, 0, 0, pad, pad))
    x = g.op("Reshape", x, (-1, g.groups, g.group_channels, width, width))
    kernels = g.op("Reshape", g.kernels(), (-1, g.groups, g.taps**2, side, side))
    y = g.total(
        g.op(
            "Mul",
            g.op("Slice", x, (a, b), (a + side, b + side), (3, 4)),
            g.slice(kernels, 2, a * g.taps + b, a * g.taps + b + 1),
        )
        for a in range(g.taps)
        for b in range(g.taps)
    )
    g.op("Reshape", y, (-1, g.channels, side, side), output="y")


def windows(g):
    pad, side = g.pad, g.side
    x = g.op("Pad", g.values_last(), (0, 0, pad, pad, 0, 0, 0, pad, pad, 0))
    columns = [g.op("Unsqueeze", g.slice(x, 3, b, b + side), (4,)) for b in range(g.taps)]
    columns = g.op("Concat", *columns, axis=4)
    copied = g.op("Concat", *(g.slice(columns, 2, a, a + side) for a in range(g.taps)), axis=4)
    kernels = g.op("Reshape", g.kernels(), (-1, g.groups, g.taps**2, side * side))
    kernels = g.op("Transpose", kernels, perm=[0, 1, 3, 2])
    kernels = g.op("Reshape", kernels, (-1, g.groups, side, side, 1, g.taps**2))
    g.finish(g.op("MatMul", kernels, copied))


def banded(tile, generated):
    def build(g):
        side, taps, pad = g.side, g.taps, g.pad
        count = -(-side // tile)
        width, span = count * tile, tile + taps - 1
        row, more = taps * span, count * tile - side
        if generated:
            spread = np.zeros((g.groups, g.channels // 4, row + 1), "float32")
            spread[..., :row].reshape(*spread.shape[:2], taps, span)[..., :taps] = (
                g.weight().reshape(*spread.shape[:2], taps, taps)
            )
            hidden = g.op("Transpose", "hidden", perm=[0, 2, 3, 1])
            hidden = g.op("Pad", hidden, (0, 0, 0, 0, 0, 0, more, 0))
            hidden = g.op("Reshape", hidden, (-1, 1, side * width, g.channels // 4))
            kernels = g.op("MatMul", hidden, spread[None])
        else:
            kernels = g.op("Reshape", g.kernels(), (-1, g.groups, taps**2, side * side))
            kernels = g.op("Transpose", kernels, perm=[0, 1, 3, 2])
            kernels = g.op("Reshape", kernels, (-1, g.groups, side, side, taps**2))
            kernels = g.op("Pad", kernels, (*(0,) * 8, more, 0))
            kernels = g.op("Reshape", kernels, (-1, tile, taps, taps))
            kernels = g.op("Pad", kernels, (*(0,) * 7, span - taps))
            kernels = g.op("Reshape", kernels, (-1, tile, row))
            kernels = g.op("Pad", kernels, (*(0,) * 5, 1))
        kernels = g.op("Reshape", kernels, (-1, tile * (row + 1)))
        kernels = g.slice(kernels, 1, 0, tile * row)
        kernels = g.op("Reshape", kernels, (-1, g.groups, side, count, tile, row))
        x = g.op("Pad", g.values_last(), (0, 0, pad, pad, 0, 0, 0, pad, pad + more, 0))
        columns = np.arange(count)[:, None] * tile + np.arange(span)
        x = g.op("Gather", x, columns, axis=3)
        lines = (side + 2 * pad) * count
        x = g.op("Reshape", x, (-1, g.groups, lines, span, g.group_channels))
        reads = np.arange(side)[:, None, None] + np.arange(taps)
        x = g.op("Gather", x, reads * count + np.arange(count)[:, None], axis=2)
        x = g.op("Reshape", x, (-1, g.groups, side, count, row, g.group_channels))
        y = g.op(
            "Reshape", g.op("MatMul", kernels, x), (-1, g.groups, side, width, g.group_channels)
        )
        g.finish(g.slice(y, 3, 0, side) if more else y)

    return build


def conv3(g):
    weight = np.random.default_rng(0).standard_normal((g.channels, g.channels, 3, 3), "float32")
    g.op("Conv", "x", weight, pads=[1, 1, 1, 1], output="y")


FORMS = {"rows": rows, "taps": taps, "windows": windows, "conv3": conv3}
for _tile in (7, 8, 14):
    FORMS[f"band{_tile}"] = banded(_tile, generated=False)
    FORMS[f"gen{_tile}"] = banded(_tile, generated=True)


def expected(g, x, hidden):
    kernels = np.einsum("bhij,ght->bgtij", hidden, g.weight())
    pad, side = g.pad, g.side
    x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    x = x.reshape(len(x), g.groups, g.group_channels, *x.shape[2:])
    y = sum(
        x[..., a : a + side, b : b + side] * kernels[:, :, None, a * g.taps + b]
        for a in range(g.taps)
        for b in range(g.taps)
    )
    return y.reshape(len(x), g.channels, side, side)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--forms", default=",".join(FORMS))
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--taps", type=int, default=7)
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    print(f"onnxruntime {onnxruntime.__version__}, {options.taps} x {options.taps} taps")
    forms = options.forms.split(",")
    print(f"{'case':6}{'batch':>6}" + "".join(f"{form:>9}" for form in forms))
    for batch in map(int, options.batches.split(",")):
        for case in options.cases.split(","):
            side, channels, _ = sizes = CASES[case]
            random = np.random.default_rng(0)
            x = random.standard_normal((batch, channels, side, side), "float32")
            hidden = random.standard_normal((batch, channels // 4, side, side), "float32")
            sessions = {}
            for form in forms:
                graph = Graph(*sizes, options.taps)
                FORMS[form](graph)
                sessions[form] = graph.session()
                (y,) = sessions[form].run(["y"], {"x": x, "hidden": hidden})
                reference = y if form == "conv3" else expected(graph, x, hidden)
                assert np.abs(y - reference).max() <= 1e-4 * np.abs(reference).max(), form
            times = {form: [] for form in forms}
            for _ in range(options.steps):
                for form, session in sessions.items():
                    started = time.perf_counter()
                    session.run(["y"], {"x": x, "hidden": hidden})
                    times[form].append(1e3 * (time.perf_counter() - started))
            medians = "".join(f"{statistics.median(values[2:]):9.2f}" for values in times.values())
            print(f"{case:6}{batch:6}{medians}", flush=True)


if __name__ == "__main__":
    main()
