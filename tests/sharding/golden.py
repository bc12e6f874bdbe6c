"""How parameters of large models are cut over the shipped meshes, as text; run it to record `tests/golden/` anew."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterator, Mapping

from pit_jax.cli import shipped
from pit_jax.cli.gin_config import GinSource, build
from pit_jax.cli.stages import ROOT
from pit_jax.core.tree import named_leaves
from pit_jax.models.heads import ScalarModel
from pit_jax.models.lora import Lora
from pit_jax.models.presets.catalog import language_model, preset
from pit_jax.models.trained import Network
from pit_jax.sharding.mesh import MeshConfig
from pit_jax.sharding.rules import spec

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
DEVICES = {
    "cpu": 1,
    "gpu_1": 1,
    "gpu_8": 8,
    "fsdp_tensor_4": 8,
    "sequence_4": 8,
    "v5e_4x4": 16,
    "v5e_16x16": 256,
    "v5p_4x4x4": 64,
    "v5p_4x8x8": 256,
    "v6e_16x16": 256,
    "v5p_4x4x4_2_slices": 128,
}
_LORA = {"lora": Lora(rank=16, alpha=32, targets=("query", "value", "down"))}
NETWORKS: Mapping[str, Network] = {
    "llama-3.2-1b": language_model(preset("llama-3.2-1b")),
    "qwen-2.5-7b_reward": ScalarModel(language_model(preset("qwen-2.5-7b"))),
    "gemma-2-9b": language_model(preset("gemma-2-9b")),
    "gemma-3-27b_lora": language_model(preset("gemma-3-27b", **_LORA)),
    "t5-base": language_model(preset("t5-base")),
    "flan-t5-xxl": language_model(preset("flan-t5-xxl")),
    "umt5-xl_lora": language_model(preset("umt5-xl", **_LORA)),
    "t5gemma-9b-2b": language_model(preset("t5gemma-9b-2b")),
}


def mesh(name: str) -> MeshConfig:
    """Return the mesh of a shipped gin file."""
    files = (str(shipped.gin_directory() / "recipes/demo.gin"), str(shipped.gin_directory() / f"meshes/{name}.gin"))
    source = GinSource(files=files, bindings=("MODEL_DIR='run'",), search_paths=(), defaults=())
    return build(source, ROOT).value.experiment.mesh


def lines(network: Network, meshes: Mapping[str, MeshConfig]) -> Iterator[str]:
    """Yield, mesh by mesh, every parameter with its shape and partition, and how many of them a device holds."""
    axes = dict(named_leaves(network.axes(), is_leaf=lambda node: isinstance(node, tuple)))
    shapes = dict(named_leaves(network.abstract()))
    for name, config in meshes.items():
        sizes = config.sizes(DEVICES[name])
        yield f"[{name}] " + ", ".join(f"{axis} {size}" for axis, size in sizes.items())
        held = 0
        for parameter, leaf in shapes.items():
            cut = spec(axes[parameter], leaf.shape, sizes, config.rules)
            used = [axis for entry in cut if entry for axis in ([entry] if isinstance(entry, str) else entry)]
            held += math.prod(leaf.shape) // math.prod(sizes[axis] for axis in used)
            yield f"{parameter:44} {leaf.dtype!s:9} {leaf.shape!s:22} {tuple(cut)}"
        total = sum(math.prod(leaf.shape) for leaf in shapes.values())
        yield f"of {total:,} parameters a device holds {held:,}\n"


def record() -> None:
    """Write every golden file."""
    meshes = {name: mesh(name) for name in DEVICES}
    for name, network in NETWORKS.items():
        (GOLDEN / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines(network, meshes)))


if __name__ == "__main__":
    record()
