"""Losses, advantages and optimiser against the same written with torch in float64, gradients by its autograd."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from pit_jax.core.types import Conditional, Experience
from pit_jax.losses.advantage import gae, group_normalised, penalise, rloo
from pit_jax.losses.cross_entropy import cross_entropy
from pit_jax.losses.policy import PolicyLoss, policy_gradient
from pit_jax.losses.preference import bradley_terry, dpo, gap
from pit_jax.losses.value import clipped_value_loss
from pit_jax.ops.logprob import token_scores
from pit_jax.train import optim

pytestmark = pytest.mark.parity

B, T, D, V = 5, 7, 6, 11
LENGTHS = np.array([7, 1, 4, 6, 3])
MASK = np.arange(T)[None, :] < LENGTHS[:, None]
WEIGHT = np.array([1.0, 0.5, 2.0, 0.0, 1.0])
TARGETS = np.random.default_rng(9).integers(0, V, (B, T), dtype=np.int32)
log_sigmoid = torch.nn.functional.logsigmoid


def _normal(seed: int, *shape: int) -> np.ndarray:
    """Return float64 numbers that float32 holds exactly."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32).astype(np.float64)


def _jax(array: np.ndarray) -> jax.Array:
    return jnp.asarray(array, jnp.float32 if array.dtype == np.float64 else array.dtype)


def _compare(ours: Callable, theirs: Callable, arrays: list[np.ndarray]) -> None:
    """Check value and gradients of a function of arrays: ours of jax arrays, theirs of float64 tensors."""
    value, grads = jax.jit(jax.value_and_grad(ours, tuple(range(len(arrays)))))(*map(_jax, arrays))
    leaves = [torch.tensor(array, requires_grad=True) for array in arrays]
    expected = theirs(*leaves)
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=2e-6)
    for grad, leaf in zip(grads, leaves, strict=True):
        assert leaf.grad.abs().max() > 1e-3
        np.testing.assert_allclose(grad, leaf.grad, atol=2e-6, rtol=2e-5)


def _token_logp(logits: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities of the targets."""
    return torch.log_softmax(logits, -1).gather(-1, torch.tensor(TARGETS).long()[..., None])[..., 0]


def _our_logp(logits: jax.Array) -> jax.Array:
    """Return the log-probabilities of the targets; the head is the identity, so that the logits are what varies."""
    return token_scores(logits, jnp.eye(V), _jax(TARGETS), chunk=4).logp


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("chunk", [4, V])
def test_token_cross_entropy(chunk: int, softcap: float | None) -> None:
    z_loss, scale = 0.01, 0.7

    def ours(hidden: jax.Array, head: jax.Array) -> jax.Array:
        scores = token_scores(hidden, head, _jax(TARGETS), chunk=chunk, softcap=softcap, scale=scale)
        return cross_entropy(scores, _jax(MASK), z_loss)[0].value()

    def theirs(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        logits = scale * hidden @ head
        logits = (logits if softcap is None else softcap * torch.tanh(logits / softcap))[torch.tensor(MASK)]
        nll = torch.nn.functional.cross_entropy(logits, torch.tensor(TARGETS[MASK]).long())
        return nll + z_loss * torch.logsumexp(logits, -1).square().mean()

    _compare(ours, theirs, [_normal(0, B, T, D), _normal(1, D, V)])


def test_bradley_terry() -> None:
    weight = torch.tensor(WEIGHT)
    _compare(
        lambda chosen, rejected: bradley_terry(chosen, rejected, _jax(WEIGHT))[0].value(),
        lambda chosen, rejected: -(weight * log_sigmoid(chosen - rejected)).sum() / weight.sum(),
        [_normal(2, B), _normal(3, B)],
    )


def test_gap() -> None:
    weight = torch.tensor(WEIGHT)

    def theirs(wl: torch.Tensor, ww: torch.Tensor, ll: torch.Tensor, lw: torch.Tensor) -> torch.Tensor:
        higher, lower = torch.stack([wl, wl, wl, ww, ll]), torch.stack([ww, ll, lw, lw, lw])
        return -(weight * log_sigmoid(higher - lower).sum(0)).sum() / weight.sum()

    _compare(lambda *gaps: gap(*gaps, _jax(WEIGHT))[0].value(), theirs, [_normal(4 + n, B) for n in range(4)])


def test_dpo_from_logits() -> None:
    beta, weight, mask = 0.3, torch.tensor(WEIGHT), torch.tensor(MASK)
    anchor = [_normal(10 + n, B, T, V) for n in range(2)]

    def ours(*policy: jax.Array) -> jax.Array:
        sums = [jnp.sum(jnp.where(_jax(MASK), _our_logp(x), 0), 1) for x in (*policy, *map(_jax, anchor))]
        return dpo((sums[0], sums[1]), (sums[2], sums[3]), _jax(WEIGHT), beta)[0].value()

    def theirs(*policy: torch.Tensor) -> torch.Tensor:
        chosen, rejected, *still = ((_token_logp(x) * mask).sum(1) for x in (*policy, *map(torch.tensor, anchor)))
        margin = beta * ((chosen - still[0]) - (rejected - still[1]))
        return -(weight * log_sigmoid(margin)).sum() / weight.sum()

    _compare(ours, theirs, [_normal(12, B, T, V), _normal(13, B, T, V)])


@pytest.mark.parametrize("normalisation", ["sequence", "token"])
@pytest.mark.parametrize("kind", ["reinforce", "ppo_clip"])
def test_policy_gradient_from_logits(kind: str, normalisation: str) -> None:
    logits, advantage, clip = _normal(14, B, T, V), _normal(15, B, T), 0.2
    old = _token_logp(torch.tensor(logits)).numpy() + 0.3 * _normal(16, B, T)
    segments, nothing = _jax(MASK.astype(np.int32)), jnp.zeros((B, T))
    empty = jnp.zeros((B, 0), jnp.int32)
    experience = Experience(
        inputs=Conditional(
            prompt=empty,
            prompt_segments=empty,
            prompt_reference=empty > 0,
            response=_jax(TARGETS),
            response_segments=segments,
        ),
        logp_sampler=_jax(old),
        logp_old=_jax(old),
        logp_anchor=nothing,
        advantage=_jax(advantage),
        returns=nothing,
        values_old=nothing,
    )
    config = PolicyLoss(kind=kind, clip_range=clip, normalisation=normalisation)

    def theirs(logits: torch.Tensor) -> torch.Tensor:
        logp, gain = _token_logp(logits), torch.tensor(advantage)
        loss = -gain * logp
        if kind == "ppo_clip":
            ratio = torch.exp(logp - torch.tensor(old))
            loss = -torch.minimum(ratio * gain, ratio.clamp(1 - clip, 1 + clip) * gain)
        return (loss * torch.tensor(MASK)).sum() / (MASK.sum() if normalisation == "token" else B)

    _compare(lambda logits: policy_gradient(_our_logp(logits), experience, config)[0].value(), theirs, [logits])


def test_clipped_value_loss() -> None:
    old, returns, clip = _normal(17, B, T), _normal(18, B, T), 0.4

    def theirs(values: torch.Tensor) -> torch.Tensor:
        limited = torch.tensor(old) + (values - torch.tensor(old)).clamp(-clip, clip)
        errors = [(x - torch.tensor(returns)).square() for x in (values, limited)]
        return 0.5 * torch.maximum(*errors)[torch.tensor(MASK)].mean()

    _compare(
        lambda values: clipped_value_loss(values, _jax(old), _jax(returns), _jax(MASK), clip)[0].value(),
        theirs,
        [_normal(19, B, T)],
    )


def test_advantages_equal_loops() -> None:
    rewards, eps = _normal(20, 3, 4), 1e-4
    one_out, normalised = np.zeros_like(rewards), np.zeros_like(rewards)
    for x, i in np.ndindex(*rewards.shape):
        others = [rewards[x, j] for j in range(4) if j != i]
        one_out[x, i] = rewards[x, i] - sum(others) / len(others)
        normalised[x, i] = (rewards[x, i] - rewards[x].mean()) / (rewards[x].std() + eps)
    np.testing.assert_allclose(rloo(_jax(rewards)), one_out, atol=1e-6)
    np.testing.assert_allclose(group_normalised(_jax(rewards), eps), normalised, atol=1e-6)


def test_gae_of_penalised_rewards_equals_a_loop() -> None:
    gamma, lam, beta = 0.97, 0.9, 0.2
    reward, logp, anchor, values = _normal(21, B), _normal(22, B, T), _normal(23, B, T), _normal(24, B, T)
    token = penalise(_jax(reward), _jax(logp), _jax(anchor), _jax(MASK), beta).token
    advantages, returns = gae(token, _jax(values), _jax(MASK), gamma, lam)
    expected = np.zeros((B, T))
    for b, length in enumerate(LENGTHS):
        later = 0.0
        for t in reversed(range(length)):
            end = t == length - 1
            gained = reward[b] * end - beta * (logp[b, t] - anchor[b, t])
            delta = gained + (0.0 if end else gamma * values[b, t + 1]) - values[b, t]
            later = expected[b, t] = delta + gamma * lam * later
    np.testing.assert_allclose(advantages, expected, atol=2e-6)
    np.testing.assert_allclose(returns, expected + np.where(MASK, values, 0), atol=2e-6)


def test_adamw_steps_equal_torch() -> None:
    """With clipping, warm-up, cosine decay, and weight decay on matrices only."""
    steps, warmup, rate, decay = 12, 4, 0.05, 0.3
    shapes = {"kernel": (4, 3), "bias": (3,)}
    start = {name: _normal(25 + n, *shape) for n, (name, shape) in enumerate(shapes.items())}
    config = optim.Optimizer(
        learning_rate=rate, schedule="cosine", warmup_steps=warmup, end_fraction=0.1, weight_decay=decay, b2=0.95
    )
    optimizer = optim.build(config, steps)
    params = {name: _jax(value) for name, value in start.items()}
    state = optimizer.init(params)

    tensors = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start.items()}
    groups = [{"params": [tensors["kernel"]], "weight_decay": decay}, {"params": [tensors["bias"]], "weight_decay": 0}]
    reference = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), eps=1e-8)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.1 + 0.45 * (1 + np.cos(np.pi * (step - warmup) / (steps - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(reference, factor)
    update = jax.jit(optimizer.update)
    for step in range(steps):
        # Norms on both sides of the bound of 1.
        size = 4.0 ** (step % 3 - 1) / 4
        grads = {name: size * _normal(30 + 2 * step + n, *shape) for n, (name, shape) in enumerate(shapes.items())}
        updates, state = update({name: _jax(grad) for name, grad in grads.items()}, state, params)
        params = {name: params[name] + updates[name] for name in params}
        for name, grad in grads.items():
            tensors[name].grad = torch.tensor(grad)
        torch.nn.utils.clip_grad_norm_(tensors.values(), 1.0)
        reference.step()
        schedule.step()
        for name, value in params.items():
            np.testing.assert_allclose(value, tensors[name].detach(), atol=2e-6)
