"""A toy program for the loop's tests, also run as a process of its own, or as one of several on one machine.

DIRECTORY [--steps N] [--pause SECONDS] [--die WHERE] [--process NUMBER --count N --port PORT]
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pit_jax.core import metric
from pit_jax.core.errors import PitError
from pit_jax.core.rng import key_for
from pit_jax.sharding.processes import Cluster, join, leave
from pit_jax.train import state as states
from pit_jax.train.loop import Interrupted, Loop, RunFiles, fit
from pit_jax.train.optim import Optimizer, build
from pit_jax.train.step import make_step
from pit_jax.train.window import Phases

OPTIMIZER = Optimizer(learning_rate=0.05, schedule="cosine", warmup_steps=1)


def objective(params, batch, key):
    noise = 0.1 * jax.random.normal(key, batch["y"].shape)
    error = jnp.tanh(batch["x"] @ params["kernel"]) @ params["out"] - batch["y"] + noise
    loss = metric.mean(error**2)
    return loss, {"tokens": metric.Metric(loss.weight, jnp.ones(())), "bias": metric.mean(error)}


class Toy:
    """Linear data drawn from a stream whose position must be restored, and a running mean kept on the host."""

    def __init__(self, steps, *, poison=None, pause=0.0, on_step=None, placement=None):
        self.next, self.running = 0, 0.0
        self.poison, self.pause, self.on_step = poison, pause, on_step
        self.evaluated, self.phases = [], Phases()
        self._step = make_step(objective, OPTIMIZER, steps=steps, shardings=placement)
        self._norm = jax.jit(lambda state: jnp.linalg.norm(state.params["kernel"]))

    def batch(self):
        rng = np.random.default_rng(self.next)
        self.next += 3
        x = rng.normal(size=(2, 4, 5)).astype(np.float32)
        return {"x": x, "y": x.sum(axis=-1)}

    def advance(self, state, step):
        self.phases.enter("data")
        time.sleep(self.pause)
        batch = self.batch()
        if step == self.poison:
            batch["y"] = batch["y"] * np.float32("nan")
        self.phases.enter("update")
        state, metrics = self._step(state, batch, key_for(0, "noise", step))
        self.running = 0.9 * self.running + 0.1 * float(batch["x"].mean())
        if self.on_step is not None:
            self.on_step(step)
        return state, metrics | {"running": metric.scalar(self.running)}

    def evaluate(self, state):
        self.evaluated.append(int(state.step))
        return {"norm": float(self._norm(state)), "undefined": float("nan")}

    def snapshot(self):
        return {"next": self.next, "running": self.running}

    def restore(self, snapshot):
        self.next, self.running = snapshot["next"], snapshot["running"]


def start(steps, width=6, placement=None):
    one, two = jax.random.split(jax.random.key(7))
    params = {"kernel": jax.random.normal(one, (5, width)), "out": jax.random.normal(two, (width,))}
    return states.create(jax.device_get(params), build(OPTIMIZER, steps), placement)


def places(steps, width=6, devices=None):
    """Return where the state lives on so many devices, by default on all of all processes."""
    devices = jax.devices()[:devices]
    mesh = jax.make_mesh((len(devices),), ("tensor",), axis_types=(AxisType.Auto,), devices=devices)
    cut = {"kernel": PartitionSpec(None, "tensor"), "out": PartitionSpec("tensor")}
    transform = build(OPTIMIZER, steps)
    shapes = jax.eval_shape(lambda: start(steps, width)).params
    named = {name: NamedSharding(mesh, spec) for name, spec in cut.items()}
    return states.shardings(states.abstract(shapes, transform), named, transform)


def die(where):
    """Be killed at a chosen moment: in the evaluation of step 5, or before or after a name of step 6's checkpoint."""

    def killed(original, dies, after):
        def wrapped(*args, **kwargs):
            if dies(*args) and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*args, **kwargs)
            if dies(*args):
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapped

    if where == "evaluation":
        Toy.evaluate = killed(Toy.evaluate, lambda _, state: int(state.step) == 5, after=True)
    else:
        moment, name = where.split()
        ends = re.compile(rf"checkpoint_6{'/sizes.json' if name == 'sizes' else ''}$")
        for function in ("rename", "replace"):
            new = killed(vars(os)[function], lambda _, target: bool(ends.search(os.fspath(target))), moment == "after")
            setattr(os, function, new)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("directory")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--die")
    parser.add_argument("--process", type=int, default=0)
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--port", type=int)
    arguments = parser.parse_args()
    if arguments.count > 1:
        join(Cluster(coordinator=f"localhost:{arguments.port}", count=arguments.count, process=arguments.process))
    status = train(arguments)
    leave(status, "the toy has stopped")
    return status


def train(arguments):
    if arguments.die:
        die(arguments.die)
    placement = None if arguments.count == 1 else places(arguments.steps)
    loop = Loop(steps=arguments.steps, log_every=4, eval_every=5, checkpoint_every=3, eval_at_start=True)
    run = RunFiles(directory=arguments.directory, name="toy", tensorboard=False)
    try:
        program = Toy(arguments.steps, pause=arguments.pause, placement=placement)
        state = fit(program, start(arguments.steps, placement=placement), loop, run)
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        return stopped.exit_status
    except PitError as error:
        print(error, file=sys.stderr)
        return 1
    leaves = {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(state))}
    np.savez(f"{arguments.directory}/final.npz", **(leaves if arguments.count == 1 else {}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
