"""The preprocessing of a classifier as nodes of its ONNX graph: from uint8 images of any size.

It repeats what ``Classifier.read`` does after decoding: ``transforms.center_crop``,
``decode.resize``, which is Pillow's bilinear filter, and ``transforms.to_unit_float``.
"""

import copy

from involution.export.fusion import all_nodes

# Not the operator Resize: it rounds a crop to whole pixels, or filters as if there were none, and
# few runtimes have its `antialias`. Pillow's weights are multiples of 2**-22, its box and the
# span of it are float32; float64 adds their products exactly, so that the same pixels result.
GRAPH = """
preprocessing (uint8[batch, height, width, 3] pixels) => (float[batch, {height}, {width}, 3] scaled)
<
    double[2] size = {{{height}, {width}}}, double zero = {{0}}, double half = {{0.5}},
    double one = {{1}}, double unit = {{4194304}}, float maximum = {{255}}, int64[1] last = {{-1}}
>
{{
    shape = Shape <start=1, end=3> (pixels)
    sides = Cast <to=11> (shape)
    {crop}
    scales = Div (spans, size)
    supports = Max (scales, one)
    {rows}
    {columns}
    wide = Cast <to=11> (pixels)
    planes = Transpose <perm=[0, 3, 1, 2]> (wide)
    columns = Transpose <perm=[1, 0]> (columns_weights)
    narrow = MatMul (planes, columns)
    narrow_above = Add (narrow, half)
    narrow_pixels = Floor (narrow_above)
    small = MatMul (rows_weights, narrow_pixels)
    small_above = Add (small, half)
    small_pixels = Floor (small_above)
    resized = Transpose <perm=[0, 2, 3, 1]> (small_pixels)
    floats = Cast <to=1> (resized)
    scaled = Div (floats, maximum)
}}
"""
WHOLE = """
    begins = Sub (sides, sides)
    spans = Identity (sides)
"""
CENTER = """
    fraction = Constant <value = double {{{fraction}}}> ()
    ratios = Div (sides, size)
    ratio = ReduceMin <keepdims=0> (ratios)
    part = Mul (ratio, fraction)
    crop = Mul (part, size)
    rest = Sub (sides, crop)
    before = Mul (rest, half)
    after = Add (before, crop)
    begin_floats = Cast <to=1> (before)
    end_floats = Cast <to=1> (after)
    span_floats = Sub (end_floats, begin_floats)
    begins = Cast <to=11> (begin_floats)
    spans = Cast <to=11> (span_floats)
"""
# The matrix (outputs, inputs) of a triangle filter along an axis, over inputs inside the image.
WEIGHTS = """
    {name}_axis = Constant <value_int={axis}> ()
    {name}_side = Gather (sides, {name}_axis)
    {name}_size = Gather (size, {name}_axis)
    {name}_begin = Gather (begins, {name}_axis)
    {name}_scale = Gather (scales, {name}_axis)
    {name}_support = Gather (supports, {name}_axis)
    {name}_inputs = Range (zero, {name}_side, one)
    {name}_outputs = Range (zero, {name}_size, one)
    {name}_positions = Add ({name}_inputs, half)
    {name}_middles = Add ({name}_outputs, half)
    {name}_offsets = Mul ({name}_middles, {name}_scale)
    {name}_line = Add ({name}_offsets, {name}_begin)
    {name}_centers = Unsqueeze ({name}_line, last)
    {name}_differences = Sub ({name}_positions, {name}_centers)
    {name}_distances = Abs ({name}_differences)
    {name}_relative = Div ({name}_distances, {name}_support)
    {name}_heights = Sub (one, {name}_relative)
    {name}_triangles = Max ({name}_heights, zero)
    {name}_sums = ReduceSum ({name}_triangles, last)
    {name}_exact = Div ({name}_triangles, {name}_sums)
    {name}_units = Mul ({name}_exact, unit)
    {name}_above = Add ({name}_units, half)
    {name}_whole = Floor ({name}_above)
    {name}_weights = Div ({name}_whole, unit)
"""


def make(classifier, image_shape):
    """The preprocessing as an ``onnx.GraphProto`` from ``pixels`` to ``scaled``.

    Args:
        classifier: The classifier, for its crop.
        image_shape: (height, width, 3) of the model's input.
    """
    import onnx.parser

    height, width, _ = image_shape
    fraction = classifier.crop_fraction
    text = GRAPH.format(
        height=height,
        width=width,
        crop=WHOLE if fraction is None else CENTER.format(fraction=fraction),
        rows=WEIGHTS.format(name="rows", axis=0),
        columns=WEIGHTS.format(name="columns", axis=1),
    )
    return onnx.parser.parse_graph(text)


def prepend(graph, front):
    """Puts a graph from ``make`` before a model's; the input keeps its name."""
    (given,), front = graph.input, copy.deepcopy(front)
    # Names that no exporter uses.
    names = {name: f"preprocessing/{name}" for node in front.node for name in node.output}
    names |= {tensor.name: f"preprocessing/{tensor.name}" for tensor in front.initializer}
    names["pixels"] = given.name
    for node in all_nodes(graph):
        _rename(node.input, {given.name: names["scaled"]})
    for node in front.node:
        _rename(node.input, names)
        _rename(node.output, names)
    for tensor in front.initializer:
        tensor.name = names[tensor.name]
    nodes = [*front.node, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(front.initializer)
    name = given.name
    given.CopyFrom(front.input[0])
    given.name = name


def _rename(names, new):
    for i, name in enumerate(names):
        names[i] = new.get(name, name)
