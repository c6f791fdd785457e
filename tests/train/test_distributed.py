"""Two processes of four devices over loopback compute what one device computes.

Run as a script, this file is one of the processes: ``test_distributed.py PORT PROCESS FOLDER``.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from lora_jax.errors import InputError
from lora_jax.train.distributed import initialize_distributed, is_main
from lora_jax.train.mesh import make_mesh
from lora_jax.train.placement import on_mesh, on_one_device, on_replicas

from tiny_task import batches, require_equal, tiny_task, trained

PLACES = {
    "data 4, fsdp 2": lambda task: mesh_of(task, data=4, fsdp=2),
    "fsdp across processes": lambda task: mesh_of(task, tensor=2, fsdp=4),
    "pmap": lambda task: on_replicas(),
}


def mesh_of(task, **sizes):
    return on_mesh(make_mesh(**sizes), task.params, task.adapter, task.plan)


def worker(port, process, folder):
    """Train everywhere; the main process saves losses and adapters."""
    jax.config.update("jax_num_cpu_devices", 4)
    initialize_distributed(
        f"127.0.0.1:{port}", num_processes=2, process_id=int(process), timeout=60
    )
    assert (jax.process_count(), jax.device_count(), jax.local_device_count()) == (2, 8, 4)
    task = tiny_task()
    for name, place in PLACES.items():
        placement = place(task)
        whole = batches(task)[0]
        assert len(placement.own(whole).tokens) == len(whole.tokens) // 2
        run = trained(placement, task)
        if is_main():
            leaves = jax.tree.leaves(run.adapter)
            np.savez(Path(folder) / f"{name}.npz", run.losses, *leaves)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(*words, **environment):
    """Another Python, with this one's paths and without its devices."""
    paths = os.pathsep.join(filter(None, sys.path))
    environment = os.environ | {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"} | environment
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, *map(str, words)], env=environment, **pipes)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder, port = tmp_path_factory.mktemp("distributed"), free_port()
    workers = [start(__file__, port, process, folder) for process in range(2)]
    try:
        printed = [each.communicate(timeout=300)[0] for each in workers]
    finally:
        for each in workers:
            each.kill()
    assert [each.returncode for each in workers] == [0, 0], "\n".join(printed)
    return folder


@pytest.fixture(scope="module")
def expected():
    return trained(on_one_device(), tiny_task())


@pytest.mark.parametrize("place", PLACES)
def test_two_processes_compute_what_one_device_does(saved, expected, place):
    losses, *leaves = np.load(saved / f"{place}.npz").values()
    adapter = jax.tree.unflatten(jax.tree.structure(expected.adapter), leaves)
    require_equal(expected._replace(losses=losses, adapter=adapter), expected)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"coordinator": "node0:1234"}, "num_processes and process_id is missing"),
        (
            {"coordinator": "node0", "num_processes": 2, "process_id": 2},
            "coordinator is 'node0', expected host:port; process_id is 2, expected 0 to",
        ),
        (
            {"coordinator": "node0:1", "num_processes": 0, "process_id": -1},
            "num_processes is 0, expected 1 or more; process_id is -1",
        ),
    ],
)
def test_impossible_arguments_are_all_named(given, found):
    with pytest.raises(InputError) as error:
        initialize_distributed(**given)
    assert found in str(error.value)


def test_no_cluster_is_a_clear_error():
    call = "from lora_jax.train.distributed import *; initialize_distributed()"
    printed = start("-c", call).communicate(timeout=60)[0]
    assert "InputError: distributed: no cluster was found" in printed


def test_a_coordinator_that_is_not_there_is_a_clear_error():
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(InputError, match=f"nobody answered at {address} within 0 s"):
        initialize_distributed(address, num_processes=2, process_id=1, timeout=0)


def test_joining_after_jax_has_started_is_a_clear_error():
    jax.devices()
    with pytest.raises(InputError, match="must be called before"):
        initialize_distributed("127.0.0.1:1", num_processes=1, process_id=0)


if __name__ == "__main__":
    worker(*sys.argv[1:])
