"""Several processes as one machine, through JAX's own distributed runtime."""

import re
import socket
import time
from typing import Any

import jax
import numpy as np

from lora_jax.errors import InputError


def initialize_distributed(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: int = 300,
) -> None:
    """Join this process to the others; call it before anything else of JAX.

    Without arguments JAX reads the cluster's environment: Slurm, Open MPI, Kubernetes or Cloud
    TPU. With them, all three are needed, and every process gives the same coordinator and number.

    Args:
      coordinator: ``host:port`` of process 0, which listens there.
      num_processes: of the whole run.
      process_id: of this process, from 0.
      timeout: seconds to wait for the others. Process 0 can't tell who is missing: JAX's
        runtime ends it with DEADLINE_EXCEEDED.

    Raises:
      InputError: some arguments are missing or impossible, nobody answers at the coordinator's
        address, there is no cluster to read, or JAX has started already.

    >>> initialize_distributed("node0", num_processes=2)
    Traceback (most recent call last):
    ...
    lora_jax.errors.InputError: distributed: process_id is missing; coordinator is 'node0', \
expected host:port
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    if problems := _problems(given):
        raise InputError("distributed: " + "; ".join(problems))
    if jax.distributed.is_initialized():
        raise InputError("distributed: this process has joined already, call it once")
    if coordinator and process_id:
        _await_coordinator(coordinator, timeout)
    try:
        jax.distributed.initialize(
            coordinator, num_processes, process_id, initialization_timeout=timeout
        )
    except (RuntimeError, ValueError) as error:
        raise InputError(f"distributed: {_remedy(given)} ({error})") from error


def any_process(flag: bool) -> bool:
    """Whether ``flag`` is set in some process; all of them have to call it."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def is_main() -> bool:
    """Whether this process is the one that writes files and prints."""
    return jax.process_index() == 0


def _problems(given: dict[str, Any]) -> list[str]:
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return []
    coordinator, count, index = given.values()
    checks = {
        f"{' and '.join(missing)} is missing": bool(missing),
        f"coordinator is {coordinator!r}, expected host:port": (
            coordinator is not None and not re.fullmatch(r".+:\d+", coordinator)
        ),
        f"num_processes is {count}, expected 1 or more": count is not None and count < 1,
        f"process_id is {index}, expected 0 to num_processes - 1": (
            index is not None and not 0 <= index < max(count or index + 1, 1)
        ),
    }
    return [problem for problem, holds in checks.items() if holds]


def _await_coordinator(coordinator: str, timeout: int) -> None:
    """Where nobody answers, JAX's runtime would abort the process without naming the address."""
    host, _, port = coordinator.rpartition(":")
    deadline = time.monotonic() + timeout
    while True:
        try:
            return socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError as error:
            if time.monotonic() > deadline:
                raise InputError(
                    f"distributed: nobody answered at {coordinator} within {timeout} s ({error}): "
                    "start process 0 there, and check the address and the firewall"
                ) from error
        time.sleep(0.2)


def _remedy(given: dict[str, Any]) -> str:
    if given["coordinator"] is None:
        return (
            "no cluster was found in the environment; start under Slurm, Open MPI, Kubernetes or "
            "Cloud TPU, or give coordinator, num_processes and process_id"
        )
    return "can't join as process {process_id} of {num_processes} at {coordinator}".format(**given)
