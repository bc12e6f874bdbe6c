"""The programs of stages that train, as shapes; of a run that exists on paper only, or is about to begin."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pit_jax.core.types import Experience, Params
from pit_jax.data.views import Example
from pit_jax.models import lora
from pit_jax.models.heads import ValueModel
from pit_jax.models.trained import Network, divide, has_head, whole
from pit_jax.rl.experience import Measured, build, token_scores, token_values
from pit_jax.rl.experience import split as micro_batches
from pit_jax.stages.dpo import REFERENCE, Dpo, log_ratios
from pit_jax.stages.lm import LanguageModel
from pit_jax.stages.planned import RunAhead, RunOnPaper
from pit_jax.stages.program import Program, conditional, key, placed, sampling, scoring, with_places
from pit_jax.stages.reward import Reward, pass_scores
from pit_jax.stages.rl import Answerers, Rl
from pit_jax.stages.rl_program import Frozen
from pit_jax.stages.run import Run
from pit_jax.stages.sft import Sft
from pit_jax.stages.srt_tune import SrtTune
from pit_jax.stages.supervised import everywhere, state_shardings, with_more
from pit_jax.text.tokenizer import Tokenizer
from pit_jax.train import optim
from pit_jax.train import state as train_state
from pit_jax.train.compiling import Listed, When
from pit_jax.train.optim import Optimizer
from pit_jax.train.state import TrainState

Supervised = LanguageModel | Sft | Reward | Dpo | SrtTune
"""Stages that learn from a data set."""


def ahead(run: Run, stage: Any) -> Iterator[Listed]:
    """List what an open run is about to call in a stage; nothing of stages that do not train.

    The update comes first, for it takes longest to compile.
    """
    planned = RunAhead(run)
    if isinstance(stage, Rl):
        programs = reinforced(planned, stage)
    elif isinstance(stage, Supervised):
        programs = supervised(planned, stage)
    else:
        return
    for program in sorted(programs, key=lambda program: program.name != "step"):
        if program.ahead is not None:
            yield program.ahead, functools.partial(program.function.lower, *program.arguments)


def supervised(run: RunOnPaper, stage: Supervised) -> list[Program]:
    """Return the programs of a stage that learns from a data set."""
    learning = stage.learning(run)
    network, training = learning.network, learning.training
    params = run.shapes(network) if run.experiment.is_whole(stage) else _on_base(run, network)
    frozen, trained = divide(network, params)
    if isinstance(stage, Dpo):
        frozen = with_more(frozen, {REFERENCE: stage.reference(run)})
    state, shardings = _state(run, network, training.optimizer, training.loop.steps)
    probe = _probe(run.tokenizer)
    batch = placed(learning.collator.leading([probe])[0], run.mesh, row_axis=1)
    held_out = placed(learning.held_out.leading([probe])[0], run.mesh, row_axis=0)
    after = whole(frozen, state.params)
    programs = [
        _start(run, trained, training.optimizer, training.loop.steps, shardings, (frozen,)),
        Program(
            name="step",
            function=learning.step(run, shardings),
            arguments=(state, batch, key(run.mesh), frozen),
            ahead="first",
        ),
        Program(
            name="held-out loss",
            function=learning.measurer(run),
            arguments=(after, held_out),
            residents=(state,),
            ahead="later",
        ),
    ]
    if isinstance(stage, Reward):
        report = everywhere(pass_scores(stage.model(run)), run.mesh)
        programs.append(Program(name="report scores", function=report, arguments=(after, held_out)))
    if isinstance(stage, Dpo):
        report = everywhere(log_ratios(run.lm_of(stage), 1), run.mesh)
        programs.append(Program(name="report log-ratios", function=report, arguments=(after, held_out)))
    return programs


def _on_base(run: RunOnPaper, network: Network) -> Params:
    """Return the shapes of a network whose adapters stand on the run's base."""
    assert run.experiment.base is not None
    shared, _ = lora.split(run.language_model(run.experiment.base))
    base, trained = divide(network, run.shapes(network))
    assert base is not None
    return whole({"trunk": shared} if has_head(network) else shared, trained)


def reinforced(run: RunOnPaper, stage: Rl) -> list[Program]:
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
    asked = _Asked(ahead="first", prompts=training.contexts, samples=stage.rl.samples_per_prompt)
    programs = [
        _start(run, trained, training.optimizer, stage.updates, shardings, beside[1:]),
        *_answering("", answerers, params, frozen, beside, asked),
        *_measuring(run, stage, everything, beside),
        _update(run, stage, state, shardings, frozen, beside),
    ]
    held_out, prompts = training.rollout_batch, training.evaluation_prompts
    several = answerers.scorer.samples > 1 or answerers.sampler.portions > 0
    if (rows, references, asked.samples) != (held_out, held_out, 1) or several:
        answerers = stage.answerers(run, rows=held_out, references=held_out)
        asked = _Asked(ahead="later", prompts=prompts, samples=1)
        programs += _answering("held-out ", answerers, params, frozen, beside, asked)
    return programs


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Asked:
    """How many prompts are answered at a time, how often each, and from when on."""

    ahead: When
    prompts: int
    samples: int


def _answering(
    prefix: str, answerers: Answerers, params: Params, frozen: Frozen, beside: tuple[Any, ...], asked: _Asked
) -> list[Program]:
    """Return the programs that draw answers, score them, and write references."""
    sampler, scorer, ahead = answerers.sampler, answerers.scorer, asked.ahead
    programs = [
        *sampling(
            f"{prefix}rollout", sampler, params, asked.prompts, samples=asked.samples, residents=beside, ahead=ahead
        ),
        scoring(f"{prefix}rewards", scorer, frozen.reward, beside, ahead=ahead),
    ]
    if frozen.policy is not None:
        name, writer = f"{prefix}policy references", answerers.policy_sampler
        programs += sampling(name, writer, frozen.policy, asked.prompts, residents=beside, ahead=ahead)
    return programs


def _measuring(run: RunOnPaper, stage: Rl, params: Params, beside: tuple[Any, ...]) -> list[Program]:
    """Return the programs that weigh a step's samples under the policy, the anchor and the value head."""
    measured, config, parts = _measured(run, stage), stage.rl, stage.training.micro_batches
    network = stage.network(run)
    trunk = params["trunk"] if isinstance(network, ValueModel) else params
    programs = [
        Program(
            name="token scores",
            function=token_scores,
            arguments=(run.lm, trunk, measured.inputs, parts),
            residents=beside,
            ahead="first",
        )
    ]
    if isinstance(network, ValueModel):
        arguments = (network, params, measured.inputs, parts)
        values = Program(name="values", function=token_values, arguments=arguments, residents=beside, ahead="first")
        programs.append(values)
    baseline = 0.0 if config.estimator == "reinforce" else None
    arguments = (config, measured, config.beta, baseline)
    return [*programs, Program(name="experience", function=build, arguments=arguments, residents=beside)]


def _measured(run: Run, stage: Rl) -> Measured:
    """Return the shapes of a step's samples and of what is known of them."""
    prompts, each = stage.training.contexts, stage.rl.samples_per_prompt
    samples = prompts * each
    length = run.codec.lengths.targets
    width = run.codec.width("improver" if stage.role == "improver" else "policy")
    table: Any = jax.ShapeDtypeStruct((samples, length), jnp.float32)
    column: Any = jax.ShapeDtypeStruct((samples,), jnp.float32)
    finished: Any = jax.ShapeDtypeStruct((samples,), bool)
    measured = Measured(
        inputs=conditional(prompts if stage.shares_prompts(run.mesh) else samples, width, samples, length),
        logp_sampler=table,
        logp_old=table,
        logp_anchor=table,
        values=table,
        entropy=table if stage.rl.rescore else None,
        reward=column,
        reference_reward=column,
        reference_length=column,
        finished=finished,
    )
    return placed(measured, run.mesh, row_axis=0)


def _update(
    run: Run, stage: Rl, state: TrainState, shardings: TrainState, frozen: Frozen, beside: tuple[Any, ...]
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
    batch = placed(one, run.mesh, row_axis=1)
    arguments, function = (state, batch, key(run.mesh), frozen.base), stage.step(run, shardings)
    return Program(name="step", function=function, arguments=arguments, residents=beside, ahead="first")


def _state(run: Run, network: Network, optimizer: Optimizer, steps: int) -> tuple[TrainState, TrainState]:
    """Return the shapes of a training state, with their places, and the places alone."""
    shardings = state_shardings(run, network, optimizer, steps)
    _, shapes = divide(network, run.shapes(network))
    return with_places(train_state.abstract(shapes, optim.build(optimizer, steps)), shardings), shardings


def _start(
    run: Run, trained: Params, optimizer: Optimizer, steps: int, shardings: TrainState, residents: tuple[Any, ...]
) -> Program:
    """Return the program that makes the first state from the parameters that are trained."""
    transform = optim.build(optimizer, steps)
    function = jax.jit(lambda params: train_state.create(params, transform, shardings), out_shardings=shardings)
    arguments = (with_places(trained, shardings.params),)
    return Program(name="start", function=function, arguments=arguments, residents=residents)


def _probe(tokenizer: Tokenizer) -> Example:
    """Return an example that suits every view: batches have the same shape whatever is in them."""
    special = {tokenizer.bos_id, tokenizer.pad_id, *tokenizer.eos_ids}
    ids = np.array([next(token for token in range(tokenizer.vocab_size) if token not in special)], np.int32)
    nothing = np.zeros(2, np.int32)
    return {"inputs": ids, "targets": ids, "reference": nothing, "prompt": ids, "chosen": ids, "rejected": ids}
