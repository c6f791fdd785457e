"""Where in the user's source an equation comes from, and emitting others as if from there."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from jax.extend.core import JaxprEqn
from jax.extend.source_info_util import current_name_stack, summarize, user_context

_LIBRARY = re.compile(
    r"-packages[/\\](jax|jaxlib|flax|haiku|equinox)[/\\]|[/\\]lora_jax[/\\]rewrite[/\\]"
)


def where(eqn: JaxprEqn) -> str:
    """``file:line (function)`` of the innermost frame outside JAX and the neural-network libraries.

    Falls back to JAX's own summary where every frame belongs to a library.
    """
    traceback = eqn.source_info.traceback
    frames = traceback.frames if traceback else []
    own = (frame for frame in frames if not _LIBRARY.search(frame.file_name))
    frame = next(own, None)
    if frame is None:
        return summarize(eqn.source_info)
    return f"{frame.file_name}:{frame.line_num} ({frame.function_name})"


@contextmanager
def as_from(eqn: JaxprEqn) -> Iterator[None]:
    """Emit with the equation's own context: named scopes, traceback, compute placement."""
    own_names, context = eqn.source_info.name_stack, eqn.ctx
    if not (own_names.stack or context.compute_type or context.xla_metadata):
        yield  # Entering contexts that say nothing would take half of the time of tracing.
        return
    names = current_name_stack() + own_names
    with context.manager, user_context(eqn.source_info.traceback, name_stack=names):
        yield
