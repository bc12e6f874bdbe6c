"""Every program that a stage compiles, as shapes: what is needed to compile it without data, weights or devices."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from pit_jax.core.errors import ConfigError, invalid
from pit_jax.core.types import Conditional, Experience, Params, Prompts
from pit_jax.data.views import Example
from pit_jax.decode.batches import Sampler, Scorer
from pit_jax.decode.loop import generate
from pit_jax.decode.sampling import Sampling
from pit_jax.models import lora
from pit_jax.models.heads import ValueModel
from pit_jax.models.trained import Network, divide, has_head, whole
from pit_jax.rl.experience import Measured, build, token_scores, token_values
from pit_jax.rl.experience import split as micro_batches
from pit_jax.sharding import rules
from pit_jax.sharding.place import batch_shardings, row_parts
from pit_jax.srt.text import SrtCodec, SrtText
from pit_jax.srt.writing import Writer
from pit_jax.stages import answering, srt_answers
from pit_jax.stages.artifact import split_reference
from pit_jax.stages.dpo import REFERENCE, Dpo, log_ratios
from pit_jax.stages.evaluate import Evaluate
from pit_jax.stages.gap_study import GapStudy
from pit_jax.stages.lm import LanguageModel
from pit_jax.stages.pipeline import Recipe, Stage
from pit_jax.stages.planned import PlannedRun
from pit_jax.stages.reference_study import ReferenceStudy
from pit_jax.stages.reward import Reward, pass_scores
from pit_jax.stages.rl import Answerers, Rl
from pit_jax.stages.rl_program import Frozen
from pit_jax.stages.run import Run
from pit_jax.stages.sft import Sft
from pit_jax.stages.srt_data import SrtData
from pit_jax.stages.srt_pairs import SrtPairs
from pit_jax.stages.srt_tune import SrtTune
from pit_jax.stages.supervised import everywhere, state_shardings, with_more
from pit_jax.text.tokenizer import Tokenizer
from pit_jax.train import optim
from pit_jax.train import state as train_state
from pit_jax.train.optim import Optimizer
from pit_jax.train.state import TrainState


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Program:
    """One compiled program of a stage.

    name: unique in its stage.
    function: jitted; `function.lower(*arguments)` compiles it. arguments: trees of shapes with their places.
    trips: of a loop whose length shows only when it runs (sampling ends with the longest answer): the most there are.
    residents: further arrays that are on the devices while it runs. What is also among the arguments, the very same
      leaf, counts once.
    """

    name: str
    function: Any
    arguments: tuple[Any, ...]
    trips: int = 1
    residents: tuple[Any, ...] = ()

    def lower(self, mesh: Mesh, table: rules.Rules) -> Any:
        """Return the program lowered for a mesh, whose devices need not be there, by rules of sharding."""
        with _on_paper(mesh, table):
            return self.function.lower(*self.arguments)

    @property
    def others(self) -> list[Any]:
        """The arrays on the devices that are not the program's own, each once."""
        own = {id(leaf) for leaf in jax.tree.leaves(self.arguments)}
        return [leaf for key, leaf in _distinct(self.residents).items() if key not in own]

    @property
    def argument_bytes(self) -> int:
        """Bytes of a device that are taken by the arguments, without padding."""
        return sum(_device_bytes(leaf) for leaf in _distinct(self.arguments).values())


def stage_programs(recipe: Recipe, stage: Stage, mesh: Mesh) -> tuple[list[Program], list[str]]:
    """Return the programs of one stage of a recipe on a mesh, and remarks on what had to be assumed.

    Raises:
      ConfigError: a batch cannot be shared out over the mesh, or the stage is of a kind that is not known here.
    """
    run = PlannedRun(recipe, mesh)
    with _on_paper(mesh, recipe.experiment.mesh.rules):
        if isinstance(stage, LanguageModel | Sft | Reward | Dpo | SrtTune):
            programs = _supervised(run, stage)
        elif isinstance(stage, Rl):
            programs = _reinforced(run, stage)
        elif isinstance(stage, Evaluate):
            programs = _evaluated(run, stage)
        elif isinstance(stage, GapStudy):
            programs = _gaps_compared(run, stage)
        elif isinstance(stage, ReferenceStudy):
            programs = _references_judged(run, stage)
        elif isinstance(stage, SrtData):
            programs = _drafted(run, stage)
        elif isinstance(stage, SrtPairs):
            programs = _refined(run, stage, _srt_text(recipe, stage))
        else:
            raise ConfigError(
                f"The stage {stage.name!r} is a {type(stage).__name__}, whose programs are not known. "
                "Plan the others by name (--stage)."
            )
    return programs, run.remarks


@contextlib.contextmanager
def _on_paper(mesh: Mesh, table: rules.Rules) -> Iterator[None]:
    """Trace for a mesh, which nothing can be computed on: constants are made where this process runs."""
    with rules.use(mesh, table), jax.set_mesh(None), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield


def _supervised(run: PlannedRun, stage: LanguageModel | Sft | Reward | Dpo | SrtTune) -> list[Program]:
    """Return the programs of a stage that learns from a data set."""
    learning = stage.learning(run)
    network, training = learning.network, learning.training
    params = run.shapes(network) if run.experiment.is_whole(stage) else _on_base(run, network)
    frozen, trained = divide(network, params)
    if isinstance(stage, Dpo):
        frozen = with_more(frozen, {REFERENCE: stage.reference(run)})
    state, shardings = _state(run, network, training.optimizer, training.loop.steps)
    probe = _probe(run.tokenizer)
    batch = _placed(learning.collator.leading([probe])[0], run.mesh, row_axis=1)
    held_out = _placed(learning.held_out.leading([probe])[0], run.mesh, row_axis=0)
    after = whole(frozen, state.params)
    programs = [
        _start(run, trained, training.optimizer, training.loop.steps, shardings, (frozen,)),
        Program(name="step", function=learning.step(shardings), arguments=(state, batch, _key(), frozen)),
        Program(
            name="held-out loss",
            function=everywhere(learning.measured, run.mesh),
            arguments=(after, held_out),
            residents=(state,),
        ),
    ]
    if isinstance(stage, Reward):
        report = everywhere(pass_scores(stage.model(run)), run.mesh)
        programs.append(Program(name="report scores", function=report, arguments=(after, held_out)))
    if isinstance(stage, Dpo):
        report = everywhere(log_ratios(run.lm_of(stage), 1), run.mesh)
        programs.append(Program(name="report log-ratios", function=report, arguments=(after, held_out)))
    return programs


def _on_base(run: PlannedRun, network: Network) -> Params:
    """Return the shapes of a network whose adapters stand on the run's base."""
    assert run.experiment.base is not None
    shared, _ = lora.split(run.language_model(run.experiment.base))
    base, trained = divide(network, run.shapes(network))
    assert base is not None
    return whole({"trunk": shared} if has_head(network) else shared, trained)


def _reinforced(run: PlannedRun, stage: Rl) -> list[Program]:
    """Return the programs of reinforcement learning: answering, scoring, weighing, updating, and held-out answers."""
    network, training = stage.network(run), stage.training
    frozen, trained = stage.frozen(run, run.language_model(stage.init_from, stage.role))
    state, shardings = _state(run, network, training.optimizer, stage.updates)
    everything = whole(frozen.base, state.params)
    params = everything["trunk"] if isinstance(network, ValueModel) else everything
    beside = (state, frozen.base, frozen.anchor, frozen.reward, frozen.policy)
    rows, references = stage.rollout_rows, training.contexts
    answerers = stage.answerers(run, rows=rows, references=references)
    answerers = dataclasses.replace(answerers, scorer=stage.step_scorer(run))
    programs = [
        _start(run, trained, training.optimizer, stage.updates, shardings, beside[1:]),
        *_answering(run, "", answerers, params, frozen, beside, stage.rl.samples_per_prompt),
        *_measuring(run, stage, everything, beside),
        _update(run, stage, state, shardings, frozen, beside),
    ]
    held_out = training.rollout_batch
    repeat = stage.rl.samples_per_prompt
    if (rows, references, repeat) != (held_out, held_out, 1) or answerers.scorer.samples > 1:
        answerers = stage.answerers(run, rows=held_out, references=held_out)
        programs += _answering(run, "held-out ", answerers, params, frozen, beside, 1)
    return programs


def _answering(
    run: PlannedRun,
    prefix: str,
    answerers: Answerers,
    params: Params,
    frozen: Frozen,
    beside: tuple[Any, ...],
    samples: int,
) -> list[Program]:
    """Return the programs that draw `samples` answers a prompt, score them, and write references."""
    programs = [
        sampling(run.mesh, f"{prefix}rollout", answerers.sampler, params, beside, samples),
        scoring(run.mesh, f"{prefix}rewards", answerers.scorer, frozen.reward, beside),
    ]
    if frozen.policy is not None:
        name = f"{prefix}policy references"
        programs.append(sampling(run.mesh, name, answerers.policy_sampler, frozen.policy, beside))
    return programs


def _measuring(run: PlannedRun, stage: Rl, params: Params, beside: tuple[Any, ...]) -> list[Program]:
    """Return the programs that weigh a step's samples under the policy, the anchor and the value head."""
    measured, config, parts = _measured(run, stage), stage.rl, stage.training.micro_batches
    lm, network = run.lm_of(stage), stage.network(run)
    trunk = params["trunk"] if isinstance(network, ValueModel) else params
    scores = jax.jit(lambda params, inputs: token_scores(lm, params, inputs, parts))
    programs = [Program(name="token scores", function=scores, arguments=(trunk, measured.inputs), residents=beside)]
    if isinstance(network, ValueModel):
        values = jax.jit(lambda params, inputs: token_values(network, params, inputs, parts))
        programs.append(Program(name="values", function=values, arguments=(params, measured.inputs), residents=beside))
    baseline = 0.0 if config.estimator == "reinforce" else None
    weigh = jax.jit(lambda measured: build(config, measured, config.beta, baseline))
    return [*programs, Program(name="experience", function=weigh, arguments=(measured,), residents=beside)]


def _measured(run: PlannedRun, stage: Rl) -> Measured:
    """Return the shapes of a step's samples and of what is known of them."""
    prompts, each = stage.training.contexts, stage.rl.samples_per_prompt
    samples = prompts * each
    length = run.codec.lengths.targets
    width = run.codec.width("improver" if stage.role == "improver" else "policy")
    table, column = jnp.zeros((samples, length), jnp.float32), jnp.zeros(samples, jnp.float32)
    measured = Measured(
        inputs=_conditional(prompts if stage.shares_prompts(run.mesh) else samples, width, samples, length),
        logp_sampler=table,
        logp_old=table,
        logp_anchor=table,
        values=table,
        entropy=table if stage.rl.rescore else None,
        reward=column,
        reference_reward=column,
        reference_length=column,
        finished=jnp.zeros(samples, bool),
    )
    return _placed(measured, run.mesh, row_axis=0)


def _update(
    run: PlannedRun, stage: Rl, state: TrainState, shardings: TrainState, frozen: Frozen, beside: tuple[Any, ...]
) -> Program:
    measured, parts = _measured(run, stage), stage.training.micro_batches * stage.rl.minibatches
    table = measured.logp_old
    experience = Experience(
        inputs=measured.inputs,
        logp_sampler=table,
        logp_old=table,
        logp_anchor=table,
        advantage=table,
        returns=table,
        values_old=table,
    )
    cut = jax.eval_shape(lambda tree: micro_batches(tree, parts), experience)
    one = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((stage.training.micro_batches, *leaf.shape[1:]), leaf.dtype), cut
    )
    batch = _placed(one, run.mesh, row_axis=1)
    arguments = (state, batch, _key(), frozen.base)
    return Program(name="step", function=stage.step(run, shardings), arguments=arguments, residents=beside)


def _evaluated(run: PlannedRun, stage: Evaluate) -> list[Program]:
    """Return the programs that answer and judge held-out prompts; parameters are read for each system in turn."""
    size, mesh = stage.batch_size, run.mesh
    kinds: tuple[tuple[Literal["policy", "improver"], str, Literal["policy", "gap"], str], ...] = (
        ("policy", stage.original, "policy", stage.reward),
        ("improver", stage.improver, "gap", stage.gap),
    )
    jury = run.params(stage.reward)
    programs = []
    for kind, system, judge, reward in kinds:
        params, judges = run.language_model(system, kind), run.params(reward)
        beside = (params, judges, jury)
        answerer = answering.sampler(run, kind, Sampling(temperature=stage.temperatures[0]), size)
        programs.append(sampling(mesh, f"{kind} answers", answerer, params, beside))
        scorer = answering.scorer(run, reward, judge, size)
        programs.append(scoring(mesh, f"{'reward' if judge == 'policy' else 'gap'} scores", scorer, judges, beside))
    return programs


def _gaps_compared(run: PlannedRun, stage: GapStudy) -> list[Program]:
    """Return the programs that score records, one for each kind of head; models are read one after the other."""
    kinds = {answering.scorer(run, name, "gap", stage.batch_size): name for name in stage.gaps.values()}
    programs = [
        scoring(run.mesh, f"scores of {reference}", scorer, run.params(reference), ())
        for scorer, reference in kinds.items()
    ]
    judge = answering.scorer(run, stage.reward, "policy", stage.batch_size)
    return [*programs, scoring(run.mesh, "reward scores", judge, run.params(stage.reward), ())]


def _drafted(run: PlannedRun, stage: SrtData) -> list[Program]:
    """Return the program that writes drafts; the critic is none of ours."""
    sampler = answering.sampler(run, "policy", Sampling(temperature=stage.temperature), stage.batch_size)
    return [sampling(run.mesh, "drafts", sampler, run.language_model(stage.model, "policy"), ())]


def _srt_text(recipe: Recipe, stage: SrtPairs) -> SrtText:
    """Return the format that the model of a stage is tuned on."""
    for other in recipe.stages:
        if isinstance(other, SrtTune) and other.name == split_reference(stage.model)[0]:
            return other.text
    raise ConfigError(
        f"The stage {stage.name!r} reads {stage.model!r}, which no stage `srt` of the recipe makes: its format is not "
        "known. Plan the others by name (--stage)."
    )


def _refined(run: PlannedRun, stage: SrtPairs, text: SrtText) -> list[Program]:
    """Return the programs that write y, f and r, and fresh feedback."""
    codec, params = SrtCodec(text, run.codec), run.language_model(stage.model, "policy")
    programs = [_writing(run.mesh, "texts", srt_answers.writer(run, codec, stage.batch_size), params)]
    if "score" in text.parts:
        author = srt_answers.writer(run, codec, stage.batch_size, stop=codec.markers[-1])
        programs.append(_writing(run.mesh, "fresh feedback", author, params))
    return programs


def _writing(mesh: Mesh, name: str, author: Writer, params: Params) -> Program:
    """Return the program that writes one batch of SRT's texts."""
    rows = author.batch_size
    prompts = Prompts(
        tokens=jnp.zeros((rows, author.width), jnp.int32),
        mask=jnp.zeros((rows, author.width), bool),
        reference=jnp.zeros((rows, author.width), bool),
    )
    given, count = jnp.zeros((rows, author.max_new), jnp.int32), jnp.zeros(rows, jnp.int32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    heat = jax.ShapeDtypeStruct((2,), jnp.float32)
    arguments = (params, *_placed((prompts, given, count, keys), mesh, row_axis=0), heat)
    # The first token comes with the prompt's pass; the loop takes or draws the others.
    return Program(name=name, function=jax.jit(author.draw), arguments=arguments, trips=max(author.max_new - 1, 1))


def _references_judged(run: PlannedRun, stage: ReferenceStudy) -> list[Program]:
    """Return the programs that answer, improve and score held-out prompts."""
    mesh, size, sampled = run.mesh, stage.batch_size, Sampling(temperature=stage.temperature)
    policy, improver = run.language_model(stage.original, "policy"), run.language_model(stage.improver, "improver")
    gap, reward = run.params(stage.gap), run.params(stage.reward)
    programs = [
        sampling(mesh, "policy answers", answering.sampler(run, "policy", sampled, size), policy, ()),
        sampling(mesh, "improver answers", answering.sampler(run, "improver", sampled, size), improver, (gap,)),
        scoring(mesh, "gap scores", answering.scorer(run, stage.gap, "gap", size), gap, ()),
    ]
    if run.experiment.judge is None:
        judge = answering.scorer(run, stage.reward, "policy", size)
        programs.append(scoring(mesh, "reward scores", judge, reward, (gap,)))
    return programs


def sampling(
    mesh: Mesh, name: str, sampler: Sampler, params: Params, residents: tuple[Any, ...], samples: int = 1
) -> Program:
    """Return the program that answers one batch of prompts, each `samples` times.

    With `Sampler.portions` a run reads prompts and draws tokens in two programs of the same shapes, which together do
    what this one does.
    """
    shared = sampler.prompts_at_once(samples)
    rows, each = (shared, shared * samples) if shared else (sampler.batch_size, sampler.batch_size)
    prompts = Prompts(
        tokens=jnp.zeros((rows, sampler.width), jnp.int32),
        mask=jnp.zeros((rows, sampler.width), bool),
        reference=jnp.zeros((rows, sampler.width), bool),
    )
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), each))

    def answer(params: Params, prompts: Prompts, keys: jax.Array) -> Any:
        return generate(
            sampler.lm, params, prompts, keys, sampler.sampling,
            max_new=sampler.max_new, eos_ids=sampler.eos_ids, pad_id=sampler.pad_id,
        )  # fmt: skip

    arguments = (params, *_placed((prompts, keys), mesh, row_axis=0))
    # The first token comes with the prompt's pass; the loop draws the others.
    return Program(
        name=name, function=jax.jit(answer), arguments=arguments, trips=max(sampler.max_new - 1, 1), residents=residents
    )


def scoring(mesh: Mesh, name: str, scorer: Scorer, params: Params, residents: tuple[Any, ...]) -> Program:
    """Return the program that scores one batch of answers."""
    prompts = scorer.batch_size
    batch = _placed(_conditional(prompts, scorer.width, prompts * scorer.samples, scorer.length), mesh, row_axis=0)
    score = jax.jit(lambda params, batch: scorer.model.scores(params, batch, 1)[:, 0])
    return Program(name=name, function=score, arguments=(params, batch), residents=residents)


def _state(run: Run, network: Network, optimizer: Optimizer, steps: int) -> tuple[TrainState, TrainState]:
    """Return the shapes of a training state, with their places, and the places alone."""
    shardings = state_shardings(run, network, optimizer, steps)
    _, shapes = divide(network, run.shapes(network))
    return _with_places(train_state.abstract(shapes, optim.build(optimizer, steps)), shardings), shardings


def _start(
    run: Run, trained: Params, optimizer: Optimizer, steps: int, shardings: TrainState, residents: tuple[Any, ...]
) -> Program:
    """Return the program that makes the first state from the parameters that are trained."""
    transform = optim.build(optimizer, steps)
    function = jax.jit(lambda params: train_state.create(params, transform, shardings), out_shardings=shardings)
    placed = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), trained, shardings.params
    )
    return Program(name="start", function=function, arguments=(placed,), residents=residents)


def _with_places(tree: Any, places: Any) -> Any:
    return jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree, places)


def _placed(batch: Any, mesh: Mesh, *, row_axis: int) -> Any:
    """Return the shapes of a batch with their places, as `sharding.place.put_batch` puts it.

    Raises:
      ConfigError: its rows cannot be shared out evenly.
    """

    def place(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        if sharding.spec and leaf.shape[row_axis] % row_parts(mesh):
            rule = f"be divisible by data x fsdp = {row_parts(mesh)} of the mesh"
            fix = "Change the batch size, the packing, or the mesh."
            raise invalid("batch size", leaf.shape[row_axis], rule, fix)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, batch, batch_shardings(batch, mesh, row_axis=row_axis))


def _conditional(prompts: int, width: int, responses: int, length: int) -> Conditional:
    prompt, response = np.zeros((prompts, width), np.int32), np.zeros((responses, length), np.int32)
    return Conditional(
        prompt=prompt,  # pyright: ignore[reportArgumentType]
        prompt_segments=prompt,  # pyright: ignore[reportArgumentType]
        prompt_reference=prompt.astype(bool),  # pyright: ignore[reportArgumentType]
        response=response,  # pyright: ignore[reportArgumentType]
        response_segments=response,  # pyright: ignore[reportArgumentType]
    )


def _probe(tokenizer: Tokenizer) -> Example:
    """Return an example that suits every view: batches have the same shape whatever is in them."""
    special = {tokenizer.bos_id, tokenizer.pad_id, *tokenizer.eos_ids}
    ids = np.array([next(token for token in range(tokenizer.vocab_size) if token not in special)], np.int32)
    nothing = np.zeros(2, np.int32)
    return {"inputs": ids, "targets": ids, "reference": nothing, "prompt": ids, "chosen": ids, "rejected": ids}


def _key() -> jax.ShapeDtypeStruct:
    return jax.eval_shape(lambda: jax.random.key(0))


def _distinct(trees: Any) -> dict[int, Any]:
    """Return every leaf once, by identity: trees that stand on one base share its leaves."""
    return {id(leaf): leaf for leaf in jax.tree.leaves(trees)}


def _device_bytes(leaf: Any) -> int:
    """Return the bytes of an array on one device."""
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    size = np.dtype("uint32").itemsize * 2 if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize
    return math.prod(shape) * size
