"""What one of several processes does in `test_processes.py`: `python scene.py NAME FILE` writes the JSON FILE."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from pit_jax.core.errors import ConfigError, PitError
from pit_jax.core.rng import key_for
from pit_jax.sharding import processes
from pit_jax.sharding.mesh import MeshConfig, make_mesh
from pit_jax.sharding.place import fetch, init_sharded, put_batch
from pit_jax.stages import together

SILENCE = 3.0
WORK = pathlib.Path(sys.argv[-1]).parent
ROWS = np.arange(24, dtype=np.float32).reshape(8, 3)


def message(action: Callable[[], Any]) -> str:
    """Return what a PitError says."""
    try:
        action()
    except PitError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def _refuse() -> None:
    raise ConfigError("x = 1 must be 2. Set it.")


def everything() -> dict[str, Any]:
    """Go through all that processes do together."""
    me, written = processes.number(), []
    agreed = {"same": [1, {"deep": 2}], "host": 0}
    results = {
        "number": me,
        "count": processes.count(),
        "devices": [jax.device_count(), jax.local_device_count()],
        "gathered": processes.gather("numbers", {"me": me}),
        "first": processes.first("work", lambda: written.append(me) or [me, "done"]),
        "worked": len(written),
        "refused": message(lambda: processes.first("refusal", _refuse)),
        "agreed": message(lambda: processes.agree("settings", agreed)),
        "differs": message(lambda: processes.agree("settings", {**agreed, "same": [1, {"deep": 2 + (me == 2)}]})),
        "absent": message(lambda: time.sleep(2) if me == 3 else processes.barrier("compilation", 1.0)),
    }
    processes.barrier("after that")
    return results | _arrays() | _directories()


def _arrays() -> dict[str, Any]:
    """Put the same whole batch on the devices of all processes, compute, and fetch."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=-1))
    with jax.set_mesh(mesh):
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key_for(0, "rows"), np.arange(8))
        placed = put_batch({"rows": ROWS, "keys": keys}, mesh, row_axis=0)
        drawn = jax.jit(lambda batch: batch["rows"] + jax.vmap(jax.random.normal)(batch["keys"])[:, None])(placed)
        cut = NamedSharding(mesh, PartitionSpec("fsdp"))
        params = init_sharded(lambda key: {"w": jax.random.normal(key, (4, 2))}, key_for(0, "init"), {"w": cut})
    here = [shard.data.shape for shard in placed["rows"].addressable_shards]
    found = fetch({"rows": placed["rows"], "drawn": drawn, "params": params, "host": np.ones(2)})
    return {"shards": here, "arrays": jax.tree.map(np.ndarray.tolist, found)}


def _directories() -> dict[str, str]:
    """Look for what process 0 writes, in a directory for all and where the last process has another one."""
    own = WORK / "other" if processes.number() == processes.count() - 1 else WORK / "common"
    return {
        "common": message(lambda: together.check_shared(epath.Path(WORK / "common"))),
        "apart": message(lambda: together.check_shared(epath.Path(own))),
    }


def failing() -> dict[str, Any]:
    """Process 1 ends with an error while the others wait for it in a collective."""
    mesh = make_mesh(MeshConfig())
    placed = put_batch(ROWS[: 2 * processes.count()], mesh, row_axis=0)
    if processes.number() == 1:
        processes.leave(7, "the data of step 3 cannot be read")
    return {"sum": fetch(jax.jit(jax.numpy.sum)(placed)).tolist()}


def dying() -> dict[str, Any]:
    """The last process is killed while the others wait for it in a collective."""
    mesh = make_mesh(MeshConfig())
    placed = put_batch(ROWS[: 2 * processes.count()], mesh, row_axis=0)
    if processes.number() == processes.count() - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"sum": fetch(jax.jit(jax.numpy.sum)(placed)).tolist()}


def alone() -> dict[str, Any]:
    """Process 1 never comes to the start."""
    return {}


def main(name: str, file: str) -> None:
    """Join, play the scene, and write what came of it."""
    cluster = processes.cluster(processes.Cluster(silence=SILENCE, start=4.0 if name == "alone" else 60.0), os.environ)
    try:
        processes.join(cluster)
    except PitError as error:
        pathlib.Path(file).write_text(json.dumps({"error": str(error)}))
        return
    results = {"everything": everything, "failing": failing, "dying": dying, "alone": alone}[name]()
    pathlib.Path(file).write_text(json.dumps(results))
    processes.leave(0, "done")


if __name__ == "__main__":
    main(*sys.argv[1:])
