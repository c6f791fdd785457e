"""torch tensors, NumPy arrays and JAX arrays over one piece of memory, where layouts allow.

=============  ========  ===================================================================
call           makes     it copies
=============  ========  ===================================================================
``as_torch``   tensor    read-only NumPy arrays (torch has no such tensors), negative strides
``as_numpy``   array     tensors of another device
``as_jax``     array     strides with gaps, memory that is not aligned as XLA needs it
=============  ========  ===================================================================

Dtypes are kept, bfloat16 and float8 too. Who writes to one sees it in the other; JAX takes its
arrays for constant, so don't write to a tensor that a JAX array shares.
"""

from typing import Any

import ml_dtypes
import numpy as np

from lora_jax.errors import InputError

# Dtypes that torch and NumPy don't both know by name: they change hands as integers.
_AS_INTEGERS = {
    "bfloat16": (np.dtype(ml_dtypes.bfloat16), "int16"),
    "float8_e4m3fn": (np.dtype(ml_dtypes.float8_e4m3fn), "int8"),
    "float8_e5m2": (np.dtype(ml_dtypes.float8_e5m2), "int8"),
}
# Of 64 bits to a number, which JAX halves unless jax_enable_x64 is set.
_WIDE = frozenset(f"torch.{name}" for name in ("float64", "int64", "uint64", "complex128"))


def as_torch(array: Any) -> Any:
    """A torch tensor of a NumPy or JAX array, on its device.

    >>> array = np.zeros(2, np.float32)
    >>> as_torch(array)[0] = 3
    >>> array.tolist()
    [3.0, 0.0]
    """
    import torch

    if not isinstance(array, np.ndarray | np.generic):
        return torch.from_dlpack(array)
    array = np.asarray(array, array.dtype.newbyteorder("="))
    if not array.flags.writeable or min(array.strides, default=0) < 0:
        array = array.copy()
    if array.dtype.name not in _AS_INTEGERS:
        return torch.from_numpy(array)
    _, integer = _AS_INTEGERS[array.dtype.name]
    return torch.from_numpy(array.view(integer)).view(getattr(torch, array.dtype.name))


def as_numpy(tensor: Any) -> np.ndarray:
    """A NumPy array of a torch tensor; strides are those of the tensor.

    Raises:
      InputError: NumPy has nothing like it, as for sparse and quantised tensors.

    >>> import torch
    >>> tensor = torch.zeros(2, 3, dtype=torch.bfloat16)
    >>> as_numpy(tensor.t())[2, 0] = 1
    >>> tensor[0].tolist()
    [0.0, 0.0, 1.0]
    >>> as_numpy(tensor).dtype.name
    'bfloat16'
    """
    import torch

    dtype, integer = _AS_INTEGERS.get(str(tensor.dtype).removeprefix("torch."), (None, ""))
    try:
        tensor = tensor.detach().cpu()
        if dtype is None:
            return tensor.numpy()
        return tensor.view(getattr(torch, integer)).numpy().view(dtype)
    except (TypeError, RuntimeError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"a tensor of {tensor.dtype}, {tensor.layout}, on {tensor.device} has no NumPy form: "
            f"{reason}"
        ) from error


def as_jax(tensor: Any) -> Any:
    """A JAX array of a torch tensor, on its device.

    Raises:
      InputError: float64, int64, uint64 or complex128, of which JAX would keep half the bits unless
        told otherwise.

    >>> import torch
    >>> as_jax(torch.ones(2, 3, dtype=torch.bfloat16)).dtype.name
    'bfloat16'
    """
    import jax

    tensor = tensor.detach()
    if str(tensor.dtype) in _WIDE and not jax.config.read("jax_enable_x64"):
        raise InputError(
            f"a tensor of {tensor.dtype}, which JAX holds in half the bits: cast it, or set "
            "jax_enable_x64"
        )
    try:
        return jax.dlpack.from_dlpack(tensor)
    except jax.errors.JaxRuntimeError:  # strides with gaps
        return jax.dlpack.from_dlpack(tensor.contiguous())
