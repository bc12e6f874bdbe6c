"""Tunix: PeftTrainer on all parameters, its sampler, and GRPOLearner with a reward model.

    python -m benchmarks.peers.tunix_peer --work sft --variant remat --shape nano --output DIR

Variants: sft: remat, plain (no rematerialisation); rollout: sampler; rl: grpo. On a GPU weights, gradients and moments
are bfloat16, its own way: its Llama has no other dtype to compute in.
Install, in an environment of its own with Python 3.12: pip install google-tunix==0.1.7 jax==0.11.2 flax==0.12.10 qwix
  google-metrax grain clu tensorboardx perfetto pylatexenc kagglehub ml-collections array-record importlib-resources
  (on a GPU jax[cuda13]==0.11.2)
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import functools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.generate import sampler as samplers
from tunix.models.llama3 import model as llama
from tunix.rl import rl_cluster
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout
from tunix.sft import peft_trainer, utils

from benchmarks.peers import program
from benchmarks.peers.program import Phases
from benchmarks.speed.clock import Laps
from benchmarks.speed.record import Record, of_laps, versions
from benchmarks.speed.shapes import Shape
from benchmarks.speed.work import Work

_FIRST = 4
_NEVER = 10**9
_NO_EOS = -1
MESH = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
RANDOM = np.random.default_rng(0)


class Words:
    """A tokenizer with a word for every id; of the form that Tunix asks for."""

    def encode(self, text: str, **_: Any) -> list[int]:
        """Return the ids of words."""
        return [int(word[1:]) for word in text.split()]

    def decode(self, ids: Any, **_: Any) -> str:
        """Return the words of ids."""
        return " ".join(f"t{number}" for number in ids)

    def bos_id(self) -> int:
        """Return the id that begins a text."""
        return 1

    def eos_id(self) -> int:
        """Return the id that ends a text."""
        return 2

    def pad_id(self) -> int:
        """Return the id that fills arrays."""
        return 0


def _build(shape: Shape, remat: str, *, scalar: bool) -> Any:
    config = llama.ModelConfig(
        num_layers=shape.layers, vocab_size=shape.vocabulary, embed_dim=shape.width, hidden_dim=shape.mlp,
        num_heads=shape.heads, num_kv_heads=shape.kv_heads, head_dim=shape.head_dim, norm_eps=shape.norm_eps,
        rope_theta=int(shape.rope_base), weight_tying=not scalar, remat_config=llama.RematConfig[remat],
    )  # fmt: skip
    made = llama.Llama3(config, rngs=nnx.Rngs(0))
    if scalar:
        made.lm_head = llama.Einsum("BTD,DV->BTV", (shape.width, 1), rngs=nnx.Rngs(1), sharding=(None, None))
    return made


def model(shape: Shape, *, remat: str = "NONE", scalar: bool = False, seed: int = 0) -> Any:
    """Return a model with weights of N(0, 0.02); `scalar`: with an output of one number, as a reward model.

    Tunix begins with feed-forward layers of zeros, and products with zeros are faster.
    """
    graph, state = nnx.split(nnx.eval_shape(lambda: _build(shape, remat, scalar=scalar)))
    leaves, tree = jax.tree.flatten(state)
    shapes, dtype = [leaf.shape for leaf in leaves], jnp.dtype(shape.compute)

    @jax.jit
    def drawn(key: jax.Array) -> list[jax.Array]:
        keys = jax.random.split(key, len(shapes))
        return [
            jnp.ones(one, dtype) if len(one) == 1 else (0.02 * jax.random.normal(key, one)).astype(dtype)
            for key, one in zip(keys, shapes, strict=True)
        ]

    everywhere = jax.sharding.NamedSharding(MESH, jax.sharding.PartitionSpec())
    values = [jax.device_put(value, everywhere) for value in drawn(jax.random.key(seed))]
    return nnx.merge(graph, jax.tree.unflatten(tree, values))


def wait(module: Any) -> None:
    """Wait until the parameters of a model are there."""
    jax.block_until_ready(jax.tree.leaves(nnx.state(module)))


def texts(shape: Shape, rows: int, length: int) -> list[str]:
    """Return prompts of so many ids; the sampler adds one that begins the text."""
    return [Words().decode(row) for row in RANDOM.integers(_FIRST, shape.vocabulary, (rows, length - 1))]


def _optimizer(rate: float) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.95, weight_decay=0.1))


def _timed_batches(laps: Laps, steps: int, module: Any, phases: Phases, batch: Callable[[], Any]) -> Iterator[Any]:
    """Yield batches to a trainer; the time from one to the next, with the update done, is that of a step."""
    wait(module)
    laps.begin()
    for _ in range(laps.warmup + steps):
        yield batch()
        wait(module)
        phases.end_step()
        laps.lap()


def fine_tuning(shape: Shape, work: Work, variant: str, laps: Laps, steps: int) -> Record:
    """Time PeftTrainer, whose model has no adapters, on rows whose every token but the first is a target."""
    trained = model(shape, remat="DECODER" if variant == "remat" else "NONE")

    def inputs(batch: Any) -> dict[str, Any]:
        real = batch.input_tokens != 0
        return dict(
            input_tokens=batch.input_tokens, input_mask=batch.input_mask,
            positions=utils.build_positions_from_mask(real), attention_mask=utils.make_causal_attn_mask(real),
        )  # fmt: skip

    def batch() -> Any:
        tokens = RANDOM.integers(_FIRST, shape.vocabulary, (work.rows, work.length)).astype(np.int32)
        return peft_trainer.TrainingInput(input_tokens=tokens, input_mask=np.ones_like(tokens))

    with MESH:
        settings = peft_trainer.TrainingConfig(
            eval_every_n_steps=_NEVER, max_steps=laps.warmup + steps + 1, max_inflight_computations=2
        )
        trainer = peft_trainer.PeftTrainer(trained, _optimizer(1e-5), settings).with_gen_model_input_fn(inputs)
        trainer.train(_timed_batches(laps, steps, trained, Phases(), batch))
    return _record(laps, work, shape, variant, {})


def rollout(shape: Shape, work: Work, variant: str, laps: Laps, steps: int) -> Record:
    """Time the sampler, a batch at a time."""
    ends, made = work.ends(shape.vocabulary) or (_NO_EOS,), []
    with MESH:
        sampler = samplers.Sampler(
            model(shape), Words(),
            samplers.CacheConfig(
                cache_size=work.length, num_layers=shape.layers, num_kv_heads=shape.kv_heads, head_dim=shape.head_dim
            ),
        )  # fmt: skip

        def answer(prompts: list[str], seed: int) -> int:
            found = sampler(
                prompts, max_generation_steps=work.response, max_prompt_length=work.prompt, temperature=1.0, top_p=1.0,
                eos_tokens=list(ends), seed=seed,
            )  # fmt: skip
            # The end itself is not among the tokens.
            return sum(min(len(tokens) + 1, work.response) for tokens in found.tokens)

        def step() -> None:
            prompts = texts(shape, work.rows // work.samples, work.prompt)
            rows = [prompt for prompt in prompts for _ in range(work.samples)]
            starts = range(0, work.rows, work.batch)
            first = len(made) * len(starts)
            made.append(sum(answer(rows[at : at + work.batch], first + part) for part, at in enumerate(starts)))
            if not work.mean_length and made[-1] != work.tokens:
                raise SystemExit(f"the sampler must give {work.response} tokens to each of {work.rows} rows")

        laps.repeat(step, steps)
    return _record(laps, work, shape, variant, {}, tokens=statistics.mean(made[laps.warmup :]))


def _reward(shape: Shape, work: Work) -> Callable[..., list[float]]:
    """Return the reward function: a causal model of the same size, read at the last token."""
    graph, state = nnx.split(model(shape, scalar=True, seed=2))

    @jax.jit
    def scores(state: Any, ids: jax.Array) -> jax.Array:
        rows, length = ids.shape
        positions = jnp.broadcast_to(jnp.arange(length), ids.shape)
        mask = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (rows, length, length))
        return nnx.merge(graph, state)(ids, positions, None, mask)[0][:, -1, 0]

    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        words = Words()
        rows = [
            ([words.bos_id(), *words.encode(prompt), *words.encode(answer)])[: work.length]
            for prompt, answer in zip(prompts, completions, strict=True)
        ]
        return np.asarray(scores(state, jnp.asarray(np.array(rows, np.int32))), np.float32).tolist()

    return reward


def _cluster(shape: Shape, work: Work, total: int) -> Any:
    groups = work.rows // work.samples
    training = rl_cluster.RLTrainingConfig(
        actor_optimizer=_optimizer(1e-6), eval_every_n_steps=_NEVER, max_steps=total + 1, mini_batch_size=groups,
        train_micro_batch_size=groups, rollout_micro_batch_size=groups, compute_logps_micro_batch_size=groups,
    )  # fmt: skip
    sampling = base_rollout.RolloutConfig(
        max_tokens_to_generate=work.response, max_prompt_length=work.prompt, kv_cache_size=work.length,
        temperature=1.0, top_p=1.0, top_k=None, eos_tokens=[_NO_EOS],
    )  # fmt: skip
    roles = (rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT)
    settings = rl_cluster.ClusterConfig(
        role_to_mesh=dict.fromkeys(roles, MESH), rollout_engine="vanilla", offload_to_cpu=False,
        training_config=training, rollout_config=sampling,
    )  # fmt: skip
    actor, anchor = model(shape), model(shape, seed=1)
    return rl_cluster.RLCluster(actor=actor, reference=anchor, tokenizer=Words(), cluster_config=settings)


def reinforcement(shape: Shape, work: Work, variant: str, laps: Laps, steps: int) -> Record:
    """Time GRPOLearner with a reward model and an anchor of the same size; no sample ends early."""
    phases, groups = Phases(), work.rows // work.samples

    def timed(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def inside(*arguments: Any, **named: Any) -> Any:
            with phases.of(name, lambda: None):
                return jax.block_until_ready(function(*arguments, **named))

        return inside

    with MESH:
        cluster = _cluster(shape, work, laps.warmup + steps)
        settings = grpo_learner.GRPOConfig(num_generations=work.samples, num_iterations=1, beta=0.05)
        judge = timed(_reward(shape, work), "score")
        learner = grpo_learner.GRPOLearner(rl_cluster=cluster, algo_config=settings, reward_fns=judge)
    cluster.generate = timed(cluster.generate, "generate")
    cluster.get_ref_per_token_logps = timed(cluster.get_ref_per_token_logps, "score")
    cluster.update_actor = timed(cluster.update_actor, "update")

    def batch() -> dict[str, np.ndarray]:
        return {"prompts": np.array(texts(shape, groups, work.prompt))}

    learner.train(_timed_batches(laps, steps, cluster.actor_trainer.model, phases, batch))
    return _record(laps, work, shape, variant, phases.medians(laps.warmup))


def _record(laps: Laps, work: Work, shape: Shape, variant: str, phases: dict[str, float], **extra: float) -> Record:
    statistics = jax.local_devices()[0].memory_stats()
    return of_laps(
        laps, work=work, shape=shape, by="tunix", variant=variant, phases=phases, device=jax.devices()[0].device_kind,
        device_memory=None if statistics is None else statistics["peak_bytes_in_use"],
        versions=versions("google-tunix", "jax", "flax"), extra=extra,
    )  # fmt: skip


if __name__ == "__main__":
    program.main(__doc__, "tunix", {"sft": fine_tuning, "rollout": rollout, "ending": rollout, "rl": reinforcement})
