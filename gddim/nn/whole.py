"""A value that XLA on a CPU computes once, before anything reads it.

XLA:CPU fuses a cheap producer into every one of its readers. A block's input has a dozen, of which the gradient of each
is a sum over those of all blocks after it: they were computed again, element by element, for every reader, and took most
of a training step. XLA:CPU drops optimization barriers before it fuses; a call that must not be inlined stands, and costs
nothing: what it returns is its argument, in place.
"""

import jax
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float


def whole(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`x`, and of its gradient the same; nothing to a compiler for accelerators, which fuses well by itself."""
    return _whole.bind(x)


def _call(x: Array) -> Array:
    with set_xla_metadata(inlineable="false"):
        return jax.jit(lax.optimization_barrier)(x)  # an identity would be left out


_whole = Primitive("whole")
_whole.def_impl(lambda x: x)
_whole.def_abstract_eval(lambda x: x)
mlir.register_lowering(_whole, lambda context, x: [x])
mlir.register_lowering(_whole, mlir.lower_fun(_call, multiple_results=False), platform="cpu")
ad.deflinear2(_whole, lambda cotangent, _: [whole(cotangent)])
batching.defvectorized(_whole)
