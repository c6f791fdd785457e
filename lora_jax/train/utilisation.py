"""How much of a machine an update uses: floating-point operations against its peak, and memory."""

import resource
import sys
from typing import Any

import jax

PEAK_FLOPS = {
    "h100": 989e12,
    "h200": 989e12,
    "a100": 312e12,
    "l4": 121e12,
    "t4": 65e12,
    "v6": 918e12,
    "v5p": 459e12,
    "v5 lite": 197e12,
    "v4": 275e12,
}
"""Dense bfloat16 (float16 on T4) operations a second of one device, from the makers' data sheets;
the keys are parts of `device_kind` in small letters, the more special ones first."""


def update_flops(base_parameters: int, adapter_parameters: int, positions: int) -> float:
    """Floating-point operations of an update by theory: ``(4 N + 6 P) · positions``.

    N are the base's parameters that take part in products (without embedding tables), which cost
    a forward product and the gradient of its input, two operations each; P are the adapter's, of
    which the gradient of the factor is made too. Attention's scores are not counted.

    >>> update_flops(100, 10, 7)
    3220.0
    """
    return float((4 * base_parameters + 6 * adapter_parameters) * positions)


def peak_flops(devices: Any) -> float | None:
    """Of all ``devices`` together; None where one is not in `PEAK_FLOPS`."""
    peaks = [_peak_of(device.device_kind.lower()) for device in devices]
    return None if None in peaks else sum(peak for peak in peaks if peak)


def peak_memory() -> int:
    """Bytes used at most so far: of the first device, or of the process where that is the host."""
    stats = jax.local_devices()[0].memory_stats()
    if stats:
        return stats["peak_bytes_in_use"]
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def _peak_of(kind: str) -> float | None:
    return next((peak for name, peak in PEAK_FLOPS.items() if name in kind), None)
