"""Where in the user's source an equation comes from."""

import re

from jax.extend.core import JaxprEqn
from jax.extend.source_info_util import summarize

_LIBRARY = re.compile(r"-packages[/\\](jax|jaxlib|flax|haiku|equinox)[/\\]")


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
