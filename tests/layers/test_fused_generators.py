"""Eligibility of generators for fusion, with alterations that change the result of a call.

A fused layer must equal the same layer with stored kernels, for which Keras calls the generator:
in outputs, losses, all gradients and the state after the call.
"""

import dataclasses
import functools

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import involution
from involution import kernel_generators as kg
from involution.kernel_generators import convolutional, pointwise
from involution.layers import keras_io
from involution.ops import fused
from tests.support.backends import (
    BACKEND,
    mostly_slow_on_jax,
    requires_native,
    to_float64,
)

pytestmark = requires_native

CHANNELS, GROUPS, SIZES = 8, 2, (9, 7)
TAPS = 9
# Relative to the largest value. Only stored kernels are rounded to the compute dtype.
TOLERANCES = {"float64": 1e-11, "float32": 2e-5, "mixed_bfloat16": 0.06, "bfloat16": 0.06}


class Wide(kg.Bottleneck):
    """A generator whose last convolution is 3x3."""

    def _build_generator(self, channels):
        super()._build_generator(channels)
        hidden = channels // self.reduction_ratio
        self.expand = self.make_convolution("wide", self.kernel_channels, hidden, kernel_size=3)


class Squared(kg.Linear):
    """A generator that overrides ``hidden`` only, which can be fused."""

    def hidden(self, features):
        return keras.ops.square(super().hidden(features))


class Sine(kg.Contextual):
    def _generate(self, features):
        return keras.ops.sin(super()._generate(features))


class Doubled(kg.Linear):
    def call(self, features):
        return 2 * super().call(features)


class CustomDropIn(involution.Involution):
    """The drop-in with a custom generator."""

    def __init__(self, tail, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.tail = tail

    def build(self, input_shape):
        super().build(input_shape)
        if TAILS[self.tail] is not None:
            self.kernel_gen = sequential(TAILS[self.tail], self.dtype_policy)
            self.kernel_gen.build(input_shape)


class Shifted(keras.layers.Conv2D):
    def call(self, inputs):
        return super().call(inputs) + 1


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer, with an alteration of its generator or of the generator's last layer.

    Attributes:
        generator: A name in ``GENERATORS``, for ``Involution2D``; None: the drop-in.
        tail: The last layers of the drop-in's generator, a name in ``TAILS``.
        alteration: A name in ``ALTERATIONS`` or ``GENERATOR_ALTERATIONS``, or None.
    """

    generator: str | None
    tail: str
    alteration: str | None
    policy: str = "float32"
    strides: int = 1
    layout: str = "contiguous"
    training: bool = False
    seed: int = 0

    def layer(self):
        """Builds the layer."""
        keras.utils.set_random_seed(self.seed)
        if self.generator is None:
            settings = {"return_kernel": False, "dtype": self.policy}
            layer = CustomDropIn(self.tail, None, GROUPS, 3, self.strides, 2, **settings)
        else:
            layer = involution.Involution2D(
                3,
                strides=self.strides,
                groups=GROUPS,
                group_layout=self.layout,
                kernel_generator=GENERATORS[self.generator](self.policy),
                dtype=self.policy,
            )
        layer.build((None, *SIZES, CHANNELS))
        # Many of the initial weights are 0.
        random = np.random.default_rng(self.seed)
        layer.set_weights([random.uniform(0.1, 0.6, w.shape) for w in layer.get_weights()])
        return layer


GENERATORS = {
    "bottleneck": lambda policy: kg.Bottleneck(2, dtype=policy),
    "contextual": lambda policy: kg.Contextual(2, dtype=policy),
    "linear": lambda policy: kg.Linear(dtype=policy, kernel_regularizer="l2"),
    "activity regularizer": lambda policy: kg.Linear(dtype=policy, activity_regularizer="l2"),
    "weight regularizers": lambda policy: kg.Bottleneck(
        2, dtype=policy, kernel_regularizer="l1", bias_regularizer="l2"
    ),
    "3 x 3": lambda policy: Wide(2, dtype=policy),
    "overridden hidden": lambda policy: Squared(dtype=policy),
    "overridden _generate": lambda policy: Sine(2, dtype=policy),
    "overridden call": lambda policy: Doubled(dtype=policy),
    "static": lambda policy: kg.Static(dtype=policy),
    "Sequential": lambda policy: sequential(TAILS["tanh"], policy),
}

OUT = TAPS * GROUPS
TAILS = {
    "as built": None,
    "plain": lambda c: [c.Conv2D(OUT, 1)],
    "tanh": lambda c: [c.Conv2D(OUT, 1, activation="tanh")],
    "3 x 3": lambda c: [c.Conv2D(OUT, 3, padding="same")],
    "no bias": lambda c: [c.Conv2D(OUT, 1, use_bias=False)],
    "groups": lambda c: [c.Conv2D(OUT, 1, groups=2)],
    "activation": lambda c: [c.Conv2D(OUT, 1), c.Activation("sigmoid")],
    "dropout": lambda c: [c.Conv2D(OUT, 1), c.Dropout(0.5)],
    "normalization": lambda c: [c.Conv2D(OUT, 1), c.BatchNormalization()],
    "dense": lambda c: [c.Dense(OUT)],
    "nested": lambda c: [c.Sequential([c.Conv2D(OUT, 1, activation="tanh")])],
    "activity regularizer": lambda c: [c.Conv2D(OUT, 1, activity_regularizer="l1")],
    "constraint": lambda c: [c.Conv2D(OUT, 1, kernel_constraint="non_neg")],
    "subclass": lambda c: [c.Shifted(OUT, 1)],
    "pointwise": lambda c: [c.PointwiseConv2D(OUT, 1)],
}


class _LayerFactory:
    """Keras's layers and those of this module, with a dtype policy."""

    def __init__(self, policy):
        self.policy = policy

    def __getattr__(self, name):
        if name == "Sequential":
            return keras.Sequential
        own = {"Shifted": Shifted, "PointwiseConv2D": pointwise.PointwiseConv2D}
        return functools.partial(own.get(name) or getattr(keras.layers, name), dtype=self.policy)


def sequential(tail, policy):
    factory = _LayerFactory(policy)
    generator = keras.Sequential([factory.Conv2D(4, 1, activation="relu"), *tail(factory)])
    generator.dtype_policy = policy
    return generator


# --- Alterations ----------------------------------------------------------------------------------


def _set(name, value):
    return lambda layer, generator, last: setattr(last, name, value)


def _override(layer, generator, last):
    call = last.call
    last.call = lambda inputs: 3 * call(inputs)


def _hook(register, of="last"):
    """Registers a hook that doubles its values, on the last layer or on the generator."""

    def alter(layer, generator, last):
        getattr(last if of == "last" else generator, register)(_double_values)

    return alter


def _double_values(module, *values):
    return tuple(2 * v for v in values[0]) if isinstance(values[0], tuple) else 2 * values[0]


def _double_output(module, inputs, output):
    return 2 * output


def _forward_hook(layer, generator, last):
    last.register_forward_hook(_double_output)


def _generator_forward_hook(layer, generator, last):
    generator.register_forward_hook(_double_output)


def _full_backward_hook(layer, generator, last):
    last.register_full_backward_hook(
        lambda module, inputs, outputs: tuple(g if g is None else 2 * g for g in inputs)
    )


def _lora(layer, generator, last):
    last.enable_lora(2)
    last.lora_kernel_b.assign(np.full(last.lora_kernel_b.shape, 0.3))


def _replace_generate(layer, generator, last):
    own = generator._generate
    generator._generate = lambda features: own(features) - 1


ALTERATIONS = {
    "activation": _set("activation", keras.activations.tanh),
    "activity regularizer": _set("activity_regularizer", keras.regularizers.L2(0.1)),
    "the generator's activity regularizer": lambda layer, generator, last: setattr(
        generator, "activity_regularizer", keras.regularizers.L2(0.1)
    ),
    "call replaced": _override,
    "low precision": _set("dtype_policy", "mixed_float16"),
    "LoRA": _lora,
    "strides": _set("strides", (1, 1)),
    "frozen": _set("trainable", False),
    "no bias": _set("use_bias", False),
}
GENERATOR_ALTERATIONS = {"_generate replaced": _replace_generate}
TORCH_ALTERATIONS = {
    "forward hook": _forward_hook,
    "the generator's forward hook": _generator_forward_hook,
    "forward pre-hook": _hook("register_forward_pre_hook"),
    "backward hook": _full_backward_hook,
}
if BACKEND == "torch":
    ALTERATIONS |= TORCH_ALTERATIONS
# None is a layer without an alteration.
FUSIBLE_ALTERATIONS = ("strides", "frozen", None)


def alter(layer, name):
    generator = layer.kernel_gen if hasattr(layer, "kernel_gen") else layer.kernel_generator
    last = generator.layers[-1] if hasattr(generator, "layers") else generator.expand
    (ALTERATIONS | GENERATOR_ALTERATIONS)[name](layer, generator, last)


def applies(case) -> bool:
    """Whether the generator has the attributes that the alteration changes."""
    if case.alteration is None:
        return True
    if case.generator in ("static", "Sequential") or case.tail in ("nested", "dropout"):
        return False
    if case.alteration in GENERATOR_ALTERATIONS:
        return case.generator is not None
    if case.generator is None and case.tail in ("activation", "normalization", "dense"):
        return case.alteration not in ("LoRA", "strides", "no bias", "activation")
    if case.alteration == "LoRA":
        return case.tail not in ("constraint", "groups")
    return True


# --- The comparison -------------------------------------------------------------------------------


def outcome(layer, x, dy, training) -> list[np.ndarray]:
    """The output, the loss, the gradients of x and of every trainable weight, and the other weights
    after the call. The layer's weights are restored."""
    before = layer.get_weights()
    trainable, others = layer.trainable_variables, layer.non_trainable_variables

    def total(y):
        return keras.ops.sum(y * dy) + sum(keras.ops.cast(loss, y.dtype) for loss in layer.losses)

    if BACKEND == "jax":
        import jax

        def run(x, values):
            mapping = list(zip(trainable, values, strict=True))
            with keras.StatelessScope(mapping, collect_losses=True) as scope:
                y = layer(x, training=training)
                loss = total(y)
            return loss, (y, [scope.get_current_value(v) for v in others])

        values = [v.value for v in trainable]
        # One compilation instead of one for each operation.
        compiled = jax.jit(jax.value_and_grad(run, (0, 1), has_aux=True))
        ((loss, (y, state)), (dx, dw)) = compiled(x, values)
        gradients = [dx, *dw]
        state = [s if s is not None else v.value for s, v in zip(state, others, strict=True)]
    elif BACKEND == "torch":
        import torch

        x = x.clone().requires_grad_()
        y = layer(x, training=training)
        loss = total(y)
        sources = [x, *(v.value for v in trainable)]
        gradients = torch.autograd.grad(loss, sources, allow_unused=True)
        state = [v.value.detach().clone() for v in others]
    else:
        import tensorflow as tf

        sources = [x, *(v.value for v in trainable)]
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=training)
            loss = total(y)
        gradients = tape.gradient(loss, sources)
        state = [tf.identity(v.value) for v in others]
    shapes = [x.shape, *(v.shape for v in trainable)]
    gradients = [
        np.zeros(shape) if g is None else to_float64(g)
        for g, shape in zip(gradients, shapes, strict=True)
    ]
    results = [to_float64(y), to_float64(loss), *gradients, *map(to_float64, state)]
    layer.set_weights(before)
    return results


def compare_with_stored(case) -> tuple[float, bool]:
    """The largest error of the chosen implementation against stored kernels, relative to each
    result's largest value, and whether the layer was fused."""
    layer = case.layer()
    if case.alteration is not None:
        alter(layer, case.alteration)
    random = np.random.default_rng(case.seed + 1)
    sizes = [-(-n // case.strides) for n in SIZES]
    x = keras.ops.convert_to_tensor(
        random.uniform(-1, 1, (2, *SIZES, CHANNELS)), layer.compute_dtype
    )
    dy = keras.ops.convert_to_tensor(random.uniform(-1, 1, (2, *sizes, CHANNELS)), x.dtype)
    implementation = layer.chosen_implementation(x)
    results = outcome(layer, x, dy, case.training)
    with involution.ops.force_implementation("native"):
        expected = outcome(layer, x, dy, case.training)
    errors = [
        np.abs(r - e).max() / max(np.abs(e).max(), 1e-3)
        for r, e in zip(results, expected, strict=True)
    ]
    return np.max(errors), implementation == "fused"


def assert_matches_stored(case):
    error, was_fused = compare_with_stored(case)
    assert error <= TOLERANCES[case.policy], case
    return was_fused


@st.composite
def cases(draw):
    generator = draw(st.sampled_from([None, *GENERATORS]))
    tail = draw(st.sampled_from(sorted(TAILS))) if generator is None else "as built"
    names = st.sampled_from([*ALTERATIONS, *GENERATOR_ALTERATIONS])
    case = Case(
        generator,
        tail,
        draw(st.none() | names),
        draw(st.sampled_from(sorted(TOLERANCES))),
        1 if generator == "Sequential" else draw(st.sampled_from([1, 2])),
        draw(st.sampled_from(["contiguous", "interleaved"])),
        draw(st.booleans()) and tail != "dropout",
        draw(st.integers(0, 2**16)),
    )
    return case if applies(case) else dataclasses.replace(case, alteration=None)


@pytest.mark.long
@given(cases())
@settings(max_examples=4 if BACKEND == "jax" else 25, deadline=None, derandomize=True)
def test_random_generators_match_stored_kernels(case):
    assert_matches_stored(case)


@pytest.mark.slow
def test_many_random_generators_match_stored_kernels():
    results = []

    @given(cases())
    @settings(max_examples=2000, deadline=None, database=None)
    def run(case):
        error, was_fused = compare_with_stored(case)
        results.append((error / TOLERANCES[case.policy], was_fused))
        assert error <= TOLERANCES[case.policy], case

    run()
    worst = max(error for error, _ in results)
    fused_count = sum(was_fused for _, was_fused in results)
    print(f"{len(results)} generators, {fused_count} fused, worst {worst:.2f} of bound")


# Each generator, tail and alteration by itself, in float32.
SINGLE_CASES = [
    *(Case("bottleneck", "as built", name) for name in (*ALTERATIONS, *GENERATOR_ALTERATIONS)),
    *(Case(None, "as built", name) for name in ALTERATIONS),
    *(Case(None, name, None) for name in TAILS),
    *(Case(name, "as built", None) for name in GENERATORS),
]
FUSIBLE = {
    *(Case(g, "as built", name) for name in FUSIBLE_ALTERATIONS for g in ("bottleneck", None)),
    *(Case(None, name, None) for name in ("as built", "plain", "constraint", "pointwise")),
    *(
        Case(name, "as built", None)
        for name in (
            "bottleneck",
            "contextual",
            "linear",
            "weight regularizers",
            "overridden hidden",
        )
    ),
}


@pytest.mark.parametrize("case", mostly_slow_on_jax(SINGLE_CASES, 3), ids=str)
def test_only_affine_last_layers_are_fused(case):
    assert assert_matches_stored(case) == (case in FUSIBLE)


@pytest.mark.long
def test_comparison_detects_fusion_without_checks(monkeypatch):
    """Most cases differ or raise if the last layer's weights are read without checks."""

    def unchecked(layer):
        return layer.kernel[(0,) * layer.rank], layer.bias

    monkeypatch.setattr(convolutional, "affine", unchecked)
    for module in (convolutional, keras_io):
        monkeypatch.setattr(module, "has_plain_call", lambda layer: True)
    detected = []
    unfusible = [
        case for case in SINGLE_CASES[:: 1 if BACKEND == "torch" else 4] if case not in FUSIBLE
    ]
    for case in unfusible:
        try:
            error, was_fused = compare_with_stored(case)
        except (AttributeError, IndexError, ValueError):
            detected.append(case)
            continue
        if was_fused and error > TOLERANCES[case.policy]:
            detected.append(case)
    # The rest still match: other checks reject generators of another type or dtype, and `kernel`
    # includes the weights that LoRA adds.
    rejected_types = {"overridden _generate", "overridden call", "static", "Sequential"}
    matching_alterations = {"_generate replaced", "low precision", "LoRA"}
    assert [
        case
        for case in unfusible
        if case not in detected
        and case.generator not in rejected_types
        and case.alteration not in matching_alterations
    ] == []


@pytest.mark.skipif(BACKEND != "torch", reason="requires PyTorch's hooks")
def test_global_module_hooks_prevent_fusion(monkeypatch):
    from torch.nn.modules import module

    layer = Case("bottleneck", "as built", None).layer()
    x = keras.ops.ones((2, *SIZES, CHANNELS))
    seen = []
    handle = module.register_module_forward_hook(lambda m, i, o: seen.append(m))
    try:
        layer(x)
        assert layer.chosen_implementation(x) != "fused"
    finally:
        handle.remove()
    assert layer.kernel_generator.expand in seen
    assert layer.chosen_implementation(x) == "fused"
    # A release of PyTorch that stores its hooks elsewhere.
    monkeypatch.delattr(module, "_global_forward_hooks")
    assert pointwise._hooked(layer.kernel_generator)


@pytest.mark.long
def test_changed_attributes_take_effect_at_the_next_call(monkeypatch):
    layer = Case("bottleneck", "as built", None).layer()
    x = keras.ops.ones((2, *SIZES, CHANNELS))
    calls = []
    apply = fused.apply_generated
    monkeypatch.setattr(fused, "apply_generated", lambda *args: calls.append(1) or apply(*args))
    layer(x)
    layer.kernel_generator.expand.activation = keras.activations.tanh
    layer(x)
    layer.kernel_generator.expand.activation = None
    layer(x)
    assert len(calls) == 2
