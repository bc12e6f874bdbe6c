"""T5X checkpoints: those of tests/data/t5x were written by T5X itself (commit cc342d41), which also gave the logits."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import shutil
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint
import pytest
import tensorstore as ts

from pit_jax.core.errors import CheckpointError, ConfigError, PitError
from pit_jax.core.tree import named_leaves
from pit_jax.io import t5x, t5x_write
from pit_jax.models.convert import t5x_config, t5x_load
from pit_jax.models.convert.t5x_load import DESCRIPTION, load_t5x
from pit_jax.models.convert.t5x_save import save_t5x
from pit_jax.models.decoder_only import DecoderOnly, DecoderOnlyConfig
from pit_jax.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from pit_jax.models.heads import ScalarModel
from pit_jax.models.lora import Lora
from pit_jax.sharding.mesh import MeshConfig, make_mesh

DATA = pathlib.Path(__file__).parents[1] / "data" / "t5x"
T5 = DATA / "t5_1_1"
TINY = ("decoder_only", "prefix_lm", "scalable_apart", "scalable_scanned")
SMALL = {"emb_dim": 8, "num_heads": 2, "head_dim": 3, "mlp_dim": 12, "vocab_size": 24}


def load(name: str, **kwargs: Any) -> tuple[Any, Any]:
    return load_t5x(DATA / name, DATA / name / "config.json", **kwargs)


def assert_same_tree(left: Any, right: Any) -> None:
    left, right = dict(named_leaves(left)), dict(named_leaves(right))
    assert left.keys() == right.keys()
    for name, leaf in left.items():
        assert leaf.dtype == right[name].dtype, name
        assert np.asarray(leaf).tobytes() == np.asarray(right[name]).tobytes(), name


def assert_same_files(left: pathlib.Path, right: pathlib.Path) -> None:
    one, other = t5x.open_t5x(left), t5x.open_t5x(right)
    assert one.arrays.keys() == other.arrays.keys()
    for name, array in one.arrays.items():
        assert (array.shape, array.dtype) == (other.arrays[name].shape, other.arrays[name].dtype), name
        assert one.read(name).tobytes() == other.read(name).tobytes(), name


# What T5X wrote


@pytest.mark.parametrize("layout", ["legacy", "orbax"])
def test_every_value_of_a_real_checkpoint_is_read(layout: str) -> None:
    stored, reference = t5x.open_t5x(T5 / layout), np.load(T5 / "reference.npz")
    digests = {name: hashlib.sha256(stored.read(name).tobytes()).hexdigest() for name in sorted(stored.arrays)}
    assert digests == dict(zip(reference["names"].tolist(), reference["sha256"].tolist(), strict=True))
    assert stored.directory.name == "checkpoint_3"


@pytest.mark.parametrize("name", ["t5_1_1/legacy", "t5_1_1/orbax", "scalable_scanned", "scalable_apart"])
def test_encoder_decoders_give_t5x_logits(name: str) -> None:
    home = T5 if name.startswith("t5_1_1") else DATA / name
    network, params = load_t5x(DATA / name, home / "config.json")
    reference = np.load(home / "reference.npz")
    tokens = jnp.asarray(reference["encoder_input_tokens"])
    logits = network.logits(params, tokens, tokens > 0, jnp.asarray(reference["decoder_input_tokens"]))
    # T5X hides decoder positions without a target from each other; what they give is never used.
    real = reference["decoder_loss_weights"] > 0
    np.testing.assert_allclose(np.asarray(logits)[real], reference["logits"][real], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["decoder_only", "prefix_lm"])
def test_decoder_only_models_give_t5x_logits(name: str) -> None:
    network, params = load(name)
    reference = np.load(DATA / name / "reference.npz")
    real = reference["decoder_target_tokens"] > 0
    tokens, prefix = jnp.asarray(reference["decoder_input_tokens"]), jnp.asarray(reference["prefix"] > 0)
    logits = network.logits(params, tokens, jnp.asarray(real), prefix if network.config.prefix_lm else None)
    np.testing.assert_allclose(np.asarray(logits)[real], reference["logits"][real], rtol=0, atol=1e-5)
    assert network.config.prefix_lm == (name == "prefix_lm")


def test_the_newest_step_of_a_model_is_taken(tmp_path: pathlib.Path) -> None:
    for step in (5, 12):
        shutil.copytree(DATA / "decoder_only" / "checkpoint_5", tmp_path / f"checkpoint_{step}")
    assert t5x.step_directory(tmp_path).name == "checkpoint_12"
    assert t5x.step_directory(tmp_path / "checkpoint_5").name == "checkpoint_5"
    (tmp_path / "checkpoint_100").mkdir()
    with pytest.raises(CheckpointError, match="checkpoint_100, the newest .* was not written to the end"):
        t5x.open_t5x(tmp_path)


# What we write


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", t5x_write.LAYOUTS)
@pytest.mark.parametrize("name", TINY)
def test_round_trip_is_bitwise(tmp_path: pathlib.Path, name: str, layout: str, dtype: str) -> None:
    network, params = load(name, dtype=dtype)
    step = save_t5x(tmp_path, network, params, step=7, layout=layout, scanned=name == "scalable_scanned")
    assert step == tmp_path / "checkpoint_7"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_7"]
    again, loaded = load_t5x(tmp_path)
    assert again == network
    assert_same_tree(loaded, params)
    if dtype == "float32":
        assert_same_files(DATA / name, tmp_path)


def test_orbax_and_flax_read_what_we_write(tmp_path: pathlib.Path) -> None:
    network, params = load("decoder_only")
    for layout in t5x_write.LAYOUTS:
        save_t5x(tmp_path / layout, network, params, step=7, layout=layout)
    stored = t5x.open_t5x(tmp_path / "orbax")
    tree = orbax.checkpoint.PyTreeCheckpointer().restore(tmp_path / "orbax" / "checkpoint_7" / "state")
    assert int(tree["state"]["step"]) == 7
    found = dict(named_leaves(tree["target"]))
    assert found.keys() == stored.arrays.keys()
    assert all(np.array_equal(found[name], stored.read(name)) for name in found)
    content: Any = flax.serialization.msgpack_restore(
        (tmp_path / "legacy" / "checkpoint_7" / "checkpoint").read_bytes()
    )
    assert content["version"] == 3
    assert content["optimizer"]["state"]["step"] == 7
    spec = content["optimizer"]["target"]["decoder"]["decoder_norm"]["scale"]
    theirs: Any = flax.serialization.msgpack_restore((T5 / "legacy" / "checkpoint_3" / "checkpoint").read_bytes())
    example = theirs["optimizer"]["target"]["decoder"]["decoder_norm"]["scale"]
    assert spec.keys() == example.keys()
    assert ts.Spec(spec).to_json() | {"metadata": None} == ts.Spec(example).to_json() | {"metadata": None}


@pytest.mark.parametrize("name", ["scalable_scanned", "prefix_lm"])
def test_four_devices_load_and_save_the_same(tmp_path: pathlib.Path, name: str) -> None:
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    network, params = load(name, mesh=mesh)
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(params))
    assert_same_tree(load(name)[1], params)
    save_t5x(tmp_path, network, params, step=5, scanned=name == "scalable_scanned")
    assert_same_files(DATA / name, tmp_path)


def test_zeros_and_arrays_of_many_chunks_survive(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(t5x_write, "_CHUNK_BYTES", 64)
    arrays = {"a/zeros": np.zeros((5, 7), np.float32), "a/kernel": np.arange(66, dtype=np.float32).reshape(11, 6)}
    for layout in t5x_write.LAYOUTS:
        t5x_write.write_t5x(tmp_path / layout, arrays.items(), step=0, layout=layout, beside={})
        stored = t5x.open_t5x(tmp_path / layout)
        assert all(np.array_equal(stored.read(name), array) for name, array in arrays.items())
        rows = stored.rows("a/kernel")
        for first, last in ((0, 1), (1, 4), (3, 11), (0, 2), (10, 11)):
            np.testing.assert_array_equal(rows[first:last], arrays["a/kernel"][first:last])
    assert len(list((tmp_path / "legacy" / "checkpoint_0" / "target.a.kernel").iterdir())) > 4


def test_layers_stacked_along_the_first_axis_are_found(tmp_path: pathlib.Path) -> None:
    """T5X's `param_scan_axis = 0`."""
    stored = t5x.open_t5x(DATA / "scalable_scanned")
    stacks = ("encoder/encoder/", "decoder/decoder/")
    arrays = ((name, stored.read(name)) for name in stored.arrays)
    moved = ((name, np.moveaxis(a, 1, 0).copy() if name.startswith(stacks) else a) for name, a in arrays)
    t5x_write.write_t5x(tmp_path, moved, step=5, layout="legacy", beside={})
    again, loaded = load_t5x(tmp_path, DATA / "scalable_scanned" / "config.json")
    network, params = load("scalable_scanned")
    assert again == network
    assert_same_tree(loaded, params)


def test_nothing_is_left_of_a_save_that_fails(tmp_path: pathlib.Path) -> None:
    def arrays():
        yield "a/kernel", np.ones((2, 2), np.float32)
        raise OSError("no space left on device")

    for layout in t5x_write.LAYOUTS:
        with pytest.raises(CheckpointError, match="could not be written: no space left"):
            t5x_write.write_t5x(tmp_path, arrays(), step=1, layout=layout, beside={})
    assert list(tmp_path.iterdir()) == []


def test_save_refuses_what_it_cannot_do(tmp_path: pathlib.Path) -> None:
    network, params = load("decoder_only")

    def save(network: Any = network, **changes: Any) -> None:
        save_t5x(tmp_path, network, params, **({"step": 1} | changes))

    def other(**changes: Any) -> DecoderOnly:
        return DecoderOnly(dataclasses.replace(network.config, **changes))

    for changes, message in (
        ({"layout": "zarr"}, "layout = 'zarr' must be one of orbax, legacy"),
        ({"step": -1}, "step = -1"),
        ({"scanned": True}, "scanned = True must be False"),
        ({"network": other(norm_eps=1e-5)}, "DecoderOnlyConfig.norm_eps = 1e-05 must be 1e-06"),
        ({"network": other(role_embedding=True)}, "role_embedding = True must be False"),
        ({"network": other(activation="gelu")}, "activation = 'gelu' must be one of"),
        ({"network": other(relative_buckets=16)}, "relative_buckets = 16 must be 32"),
        ({"network": other(lora=Lora(rank=2, alpha=4.0))}, r"lora = .* Merge the adapter first"),
        ({"network": other(scale_logits=False)}, "scale_logits = False must be True"),
    ):
        with pytest.raises(ConfigError, match=message):
            save(**changes)
    assert list(tmp_path.iterdir()) == []
    save()
    with pytest.raises(CheckpointError, match="exists already"):
        save()
    with pytest.raises(CheckpointError, match="not on a local disk"):
        t5x_write.write_t5x("gs://bucket/model", [], step=1, layout="orbax", beside={})


# Configs


def describe(network: str = "t5", model: str | None = "EncoderDecoderModel", **settings: Any) -> dict[str, Any]:
    spec = {"network": t5x_config.NETWORKS[network], "config": SMALL | settings}
    return spec if model is None else spec | {"model": model}


def test_settings_become_ours() -> None:
    config = t5x_config.config_from_t5x(
        describe(mlp_activations=["gelu", "linear"], num_decoder_layers=2, dtype="jnp.bfloat16")
        | {"relpos": {"num_buckets": 16}}
    )
    assert config == EncoderDecoderConfig(
        vocab_size=24, width=8, heads=2, head_dim=3, mlp=12, encoder_layers=6, decoder_layers=2, dropout=0.1,
        dtype="bfloat16", relative_buckets=16,
    )  # fmt: skip
    one = t5x_config.config_from_t5x(describe(logits_via_embedding=True))
    assert isinstance(one, EncoderDecoderConfig)
    assert (one.tied, one.gated, one.activation, one.logit_scale) == (True, False, "relu", 8**-0.5)
    scalable = t5x_config.config_from_t5x(describe("scalable_t5", remat_policy="minimal"))
    assert isinstance(scalable, EncoderDecoderConfig)
    assert (scalable.relative_per_layer, scalable.remat) == (True, "dots_with_no_batch_dims")
    for spec, both_ways in (
        (describe("decoder_only", "DecoderOnlyModel"), False),
        (describe("decoder_only", "PrefixLanguageModel"), True),
        (describe("decoder_only", "DecoderOnlyModel") | {"inputs_bidirectional_attention": True}, True),
    ):
        decoder = t5x_config.config_from_t5x(spec)
        assert isinstance(decoder, DecoderOnlyConfig)
        assert (decoder.prefix_lm, decoder.attention_scale, decoder.position) == (both_ways, 1.0, "relative")


def test_gin_spellings_are_understood(tmp_path: pathlib.Path) -> None:
    gin = {f"network.T5Config.{name}": str(value) for name, value in SMALL.items()}
    gin |= {"network.T5Config.mlp_activations": "('gelu', 'linear')", "network.T5Config.dtype": "'bfloat16'"}
    (tmp_path / "gin.json").write_text(json.dumps({"network": "@t5.network.Transformer()", "config": gin}))
    plain = describe(mlp_activations=("gelu", "linear"), dtype="bfloat16")
    assert t5x_config.config_from_t5x(tmp_path / "gin.json") == t5x_config.config_from_t5x(plain)


@pytest.mark.parametrize("name", TINY)
def test_description_of_our_config_gives_it_back(name: str) -> None:
    config = t5x_config.config_from_t5x(DATA / name / "config.json")
    spec = t5x_config.spec_from_config(config, scanned=False)
    assert t5x_config.config_from_t5x(spec) == config
    assert t5x_config.config_from_t5x(json.loads(json.dumps(spec))) == config


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"config": SMALL}, "no 'network'"),
        ({"network": "t5x.examples.t5.network.Transformer"}, "no 'config'"),
        (describe() | {"network": "t5x.contrib.moe.network.Transformer"}, "network = 't5x.contrib.moe"),
        (describe() | {"network": "network.Transformer"}, "network = 'network.Transformer'"),
        (describe(emb_dims=3), r"config.emb_dims = 3 is not a setting .* Did you mean 'emb_dim'"),
        (describe(scan_layers=True), "config.scan_layers = True is not a setting"),
        (describe(mlp_activations=["gelu", "gelu"]), "config.mlp_activations"),
        (describe(mlp_activations=["tanh"]), "config.mlp_activations"),
        (describe(mlp_activations=[]), "config.mlp_activations"),
        (describe(dtype="float16"), "config.dtype"),
        (describe(emb_dim=0), "config.emb_dim = 0"),
        (describe(emb_dim=True), "config.emb_dim = True"),
        (describe(logits_via_embedding="yes"), "config.logits_via_embedding"),
        (describe(logits_via_embedding=1), "config.logits_via_embedding"),
        (describe(dropout_rate="%DROPOUT_RATE"), "config.dropout_rate"),
        (describe("scalable_t5", remat_policy="some"), "config.remat_policy"),
        (describe("scalable_t5", param_scan_axis=2), "config.param_scan_axis"),
        (describe("t5", "DecoderOnlyModel"), "model = 'DecoderOnlyModel'"),
        (describe("decoder_only", None), "model = None"),
        (describe("decoder_only", "EncoderDecoderModel"), "model = 'EncoderDecoderModel'"),
        (describe() | {"relpos": {"buckets": 3}}, "relpos"),
        (describe() | {"relpos": {"num_buckets": 0}}, "relpos.num_buckets = 0"),
        (describe() | {"config": ["emb_dim"]}, "config = "),
    ],
)
def test_what_is_not_known_is_named(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        t5x_config.config_from_t5x(spec)


@pytest.mark.parametrize("name", ["t5_1_1/orbax", *TINY])
def test_without_config_the_error_says_what_shapes_tell(name: str) -> None:
    with pytest.raises(ConfigError, match="keeps no configuration") as caught:
        load_t5x(DATA / name)
    text = str(caught.value)
    suggested = json.loads(text[text.index("{") :])
    home = T5 if name.startswith("t5_1_1") else DATA / name
    real = json.loads((home / "config.json").read_text())
    # Whether a prefix is seen in both directions is in no shape.
    assert suggested["model"] == real["model"].replace("PrefixLanguageModel", "DecoderOnlyModel")
    right, found = (t5x_config.config_from_t5x(spec | {"model": real["model"]}) for spec in (real, suggested))
    assert dataclasses.replace(found, dropout=0.0) == right


# Bad checkpoints


def test_another_network_is_refused_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(t5x.Rows, "_read", lambda *_: pytest.fail("an array was read"))
    spec = json.loads((DATA / "prefix_lm" / "config.json").read_text())

    def load_with(**changes: Any) -> None:
        load_t5x(DATA / "prefix_lm", spec | {"config": spec["config"] | changes})

    with pytest.raises(CheckpointError, match=r"1 not of this network: decoder/logits_dense/kernel \(8, 24\)"):
        load_with(logits_via_embedding=True)
    with pytest.raises(CheckpointError, match=r"9 missing: decoder/layers_2/pre_self_attention_layer_norm/scale"):
        load_with(num_layers=3)
    with pytest.raises(CheckpointError, match=r"of another shape: decoder/token_embedder/embedding is \(24, 8\)"):
        load_with(vocab_size=25)
    with pytest.raises(CheckpointError, match=r"mlp/wi/kernel .*not of this network: decoder/layers_0/mlp/wi_0"):
        load_with(mlp_activations=["relu"])
    network = t5x_load.read_network(DATA / "prefix_lm", spec)
    with pytest.raises(CheckpointError, match="holds a language model, and a ScalarModel"):
        t5x_load.load_params(DATA / "prefix_lm", ScalarModel(network, "mean", "causal"), None)
    with pytest.raises(ConfigError, match="norm_eps = 1e-05"):
        t5x_load.read_network(DATA / "prefix_lm", dataclasses.replace(network.config, norm_eps=1e-5))
    wanted = dataclasses.replace(network.config, lora=Lora(rank=2, alpha=4.0), dropout=0.3)
    assert t5x_load.read_network(DATA / "prefix_lm", wanted).config == dataclasses.replace(wanted, lora=None)


def read_all(directory: pathlib.Path) -> None:
    stored = t5x.open_t5x(directory)
    for name in stored.arrays:
        stored.read(name)


@pytest.mark.parametrize("name", ["decoder_only", "prefix_lm"])
def test_missing_and_truncated_files_are_errors(tmp_path: pathlib.Path, name: str) -> None:
    """Every file is removed, then cut short, one after the other; nothing but our error or the same values may come."""
    source = DATA / name / "checkpoint_5"
    files = sorted(path.relative_to(source) for path in source.rglob("*") if path.is_file())
    needless = {"_CHECKPOINT_METADATA", "_METADATA", "process_0"}
    target = tmp_path / "checkpoint_5"
    for file in files:
        content = (source / file).read_bytes()
        for damaged in (None, content[: len(content) // 2]):
            shutil.copytree(source, target)
            (target / file).unlink()
            if damaged is not None:
                (target / file).write_bytes(damaged)
            try:
                read_all(target)
                failed = False
            except CheckpointError:
                failed = True
            part_of_one_process = file.parts[:2] == ("state", "ocdbt.process_0") and file.name == "manifest.ocdbt"
            assert failed or file.name in needless or part_of_one_process or not _is_used(source, file), file
            shutil.rmtree(target)


def _is_used(source: pathlib.Path, file: pathlib.Path) -> bool:
    """Return whether a piece of an OCDBT database is one that the merged database refers to."""
    if file.parent.name != "d" or file.parts[1] != "ocdbt.process_0":
        return True
    return any(file.name.encode() in path.read_bytes() for path in (source / "state" / "d").iterdir())


def write_msgpack(directory: pathlib.Path, content: dict[str, Any]) -> pathlib.Path:
    directory.mkdir(parents=True)
    (directory / "checkpoint").write_bytes(flax.serialization.msgpack_serialize(content))
    return directory


def test_arrays_inside_the_msgpack_file(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "a": np.arange(12, dtype=np.float32).reshape(3, 4),
        "b": np.asarray(jnp.linspace(-1, 1, 5, dtype=jnp.bfloat16)),
        "c": np.arange(50, dtype=np.float32).reshape(5, 10),
    }
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 64)  # "c" is stored in pieces
    state = {"step": np.int32(3), "param_states": {"a": {"v": 1 + 2j, "m": None}}}
    content = {"version": 3, "optimizer": {"state": state, "target": {"x": values}}}
    stored = t5x.open_t5x(write_msgpack(tmp_path / "checkpoint_3", content))
    assert stored.arrays.keys() == {"x/a", "x/b", "x/c"}
    for name, value in values.items():
        assert stored.arrays[f"x/{name}"].dtype == value.dtype
        np.testing.assert_array_equal(stored.read(f"x/{name}"), value)
        np.testing.assert_array_equal(stored.rows(f"x/{name}")[1:3], value[1:3])


def spec_content(**changes: Any) -> dict[str, Any]:
    spec = {"driver": "zarr", "dtype": "float32", "kvstore": {"driver": "file", "path": "target.a/"}}
    spec |= {"metadata": {"shape": [2, 3], "chunks": [2, 3], "compressor": {"id": "gzip"}}} | changes
    return {"version": 3, "optimizer": {"state": {"step": np.int32(1)}, "target": {"a": spec}}}


def write_array(directory: pathlib.Path) -> np.ndarray:
    value = np.arange(6, dtype=np.float32).reshape(2, 3)
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{directory}/target.a/"}}
    metadata = {"shape": [2, 3], "chunks": [2, 3], "dtype": "<f4", "compressor": {"id": "gzip", "level": 1}}
    ts.open(spec | {"metadata": metadata}, create=True).result().write(value).result()
    return value


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kvstore": {"driver": "gfile", "path": "target.a"}},
        {"kvstore": {"driver": "gcs", "bucket": "t5x-dummy-bucket", "path": "target.a"}},
        {"kvstore": {"driver": "file"}, "path": "target.a"},
    ],
)
def test_all_spellings_of_a_place_are_read(tmp_path: pathlib.Path, changes: dict[str, Any]) -> None:
    step = write_msgpack(tmp_path / "moved" / "checkpoint_1", spec_content(**changes))
    value = write_array(step)
    np.testing.assert_array_equal(t5x.open_t5x(tmp_path / "moved").read("a"), value)


def test_arrays_named_by_placeholders_are_read(tmp_path: pathlib.Path) -> None:
    """Orbax's first layout: a msgpack file of names, and an array in a directory of its own for each."""
    state = write_msgpack(tmp_path / "checkpoint_1" / "state", {"target": {"a": "PLACEHOLDER://target.a"}})
    value = write_array(state)
    np.testing.assert_array_equal(t5x.open_t5x(tmp_path).read("a"), value)
    (state / "checkpoint").unlink()
    np.testing.assert_array_equal(t5x.open_t5x(tmp_path).read("a"), value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (spec_content(kvstore={"driver": "file", "path": "/etc/target.a"}), "must be a path inside"),
        (spec_content(kvstore={"driver": "file", "path": "../checkpoint_1/target.a"}), "must be a path inside"),
        (spec_content(kvstore={"driver": "file"}), "must be a path inside"),
        (spec_content(kvstore={"driver": "http", "path": "target.a"}), "drivers 'zarr' and 'http'"),
        (spec_content(driver="json"), "drivers 'json' and 'file'"),
        (spec_content(kvstore="file:///etc/"), "drivers 'zarr' and None"),
        (spec_content(metadata={"shape": [3, 2]}), r"has shape \(2, 3\) on disk and \(3, 2\)"),
        (spec_content() | {"version": 1}, "version = 1 must be at least 2"),
        ({"optimizer": spec_content()["optimizer"]}, "version = 0 must be at least 2"),
        ({"version": 3}, "has no 'optimizer'"),
        ({"version": 3, "optimizer": {"state": {}}}, "holds no parameters under 'target'"),
        ({"version": 3, "optimizer": {"target": {}}}, "holds no parameters under 'target'"),
    ],
)
def test_bad_msgpack_contents_are_refused(tmp_path: pathlib.Path, content: dict[str, Any], message: str) -> None:
    step = write_msgpack(tmp_path / "checkpoint_1", content)
    write_array(step)
    with pytest.raises(CheckpointError, match=message):
        t5x.open_t5x(step)


def test_directories_that_are_something_else_are_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(CheckpointError, match="is not a directory"):
        t5x.open_t5x(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="is no T5X checkpoint"):
        t5x.open_t5x(tmp_path)
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "model.ckpt-1000000"\n')
    with pytest.raises(CheckpointError, match=r"is not msgpack.*TensorFlow"):
        t5x.open_t5x(tmp_path)
    (tmp_path / "other" / "state").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="holds no parameters under 'target'"):
        t5x.open_t5x(tmp_path / "other")


def test_integers_are_no_parameters(tmp_path: pathlib.Path) -> None:
    content = {"version": 3, "optimizer": {"target": {"a": np.zeros((2, 2), np.uint16)}}}
    write_msgpack(tmp_path / "checkpoint_1", content)
    with pytest.raises(CheckpointError, match="a has dtype uint16"):
        load_t5x(tmp_path, describe())


def test_places_in_the_cloud_are_named_as_tensorstore_does() -> None:
    assert t5x.kvstore("gs://bucket/model") == {"driver": "gcs", "bucket": "bucket", "path": "model/"}


def test_a_description_goes_with_the_parameters(tmp_path: pathlib.Path) -> None:
    network, params = load("scalable_apart")
    assert isinstance(network, EncoderDecoder)
    step = save_t5x(tmp_path, network, params, step=2)
    assert t5x_config.config_from_t5x(step / DESCRIPTION) == network.config
    (step / DESCRIPTION).unlink()
    with pytest.raises(PitError, match="keeps no configuration"):
        load_t5x(tmp_path)
