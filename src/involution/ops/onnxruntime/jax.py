"""Nodes in a graph that jax2onnx converts: a primitive, and its conversion."""

import jax
from jax.extend.core import Primitive

from involution.ops.onnxruntime.domain import DOMAIN, VERSION

primitive = Primitive("involution_onnxruntime")


def node(name, tensors, attributes, shape):
    # Parameters of a primitive must be hashable.
    attributes = tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in attributes.items())
    return primitive.bind(*tensors, name=name, attributes=attributes, sizes=tuple(shape[2:]))


@primitive.def_abstract_eval
def _shape(x, *_, name, attributes, sizes):
    return jax.core.ShapedArray((*x.shape[:2], *sizes), x.dtype)


def register_conversion():
    """Registers the primitive with jax2onnx."""
    from jax2onnx.plugins.plugin_system import PrimitiveLeafPlugin, register_primitive

    @register_primitive(jaxpr_primitive=primitive.name)
    class _Plugin(PrimitiveLeafPlugin):
        def lower(self, ctx, eqn):
            (output,) = eqn.outvars
            spec = ctx.get_value_for_var(output, name_hint=ctx.fresh_name("involution"))
            result = getattr(ctx.builder, eqn.params["name"])(
                *(ctx.get_value_for_var(tensor) for tensor in eqn.invars),
                **dict(eqn.params["attributes"]),
                _domain=DOMAIN,
                _version=VERSION,
                _outputs=[ctx.fresh_name("involution")],
            )
            result.type, result.shape = spec.type, spec.shape
            ctx.bind_value_for_var(output, result)
