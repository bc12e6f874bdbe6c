"""Comparison losses against float64 NumPy and finite differences."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pit_jax.core.errors import ConfigError
from pit_jax.losses.preference import COMPARISONS, bradley_terry, dpo, gap

B = 6
WEIGHT = np.array([1.0, 1.0, 0.5, 2.0, 1.0, 0.0])


def _scores(count: int, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).normal(size=(count, B)).astype(np.float32).astype(np.float64))


def _jax(arrays: list[np.ndarray]) -> list[jax.Array]:
    return [jnp.asarray(array, jnp.float32) for array in arrays]


def _log_sigmoid(x: np.ndarray) -> np.ndarray:
    return -np.log1p(np.exp(-x))


def _gap_reference(wl, ww, ll, lw) -> float:
    terms = _log_sigmoid(wl - ww) + _log_sigmoid(wl - ll) + _log_sigmoid(wl - lw)
    terms += _log_sigmoid(ww - lw) + _log_sigmoid(ll - lw)
    return -(WEIGHT * terms).sum() / WEIGHT.sum()


def _finite_differences(function, arrays: list[np.ndarray], step: float = 1e-6) -> list[np.ndarray]:
    grads = [np.zeros_like(array) for array in arrays]
    for i, b in np.ndindex(len(arrays), B):
        ends = []
        for sign in (1, -1):
            moved = [array.copy() for array in arrays]
            moved[i][b] += sign * step
            ends.append(function(*moved))
        grads[i][b] = (ends[0] - ends[1]) / (2 * step)
    return grads


def test_gap_loss_and_gradient_equal_finite_differences():
    scores, weight = _scores(4), jnp.asarray(WEIGHT, jnp.float32)

    def loss(*scores):
        return gap(*scores, weight)[0].value()

    value, grads = jax.value_and_grad(loss, (0, 1, 2, 3))(*_jax(scores))
    np.testing.assert_allclose(value, _gap_reference(*scores), rtol=1e-6)
    for got, want in zip(grads, _finite_differences(_gap_reference, scores), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)


def test_gap_never_compares_the_two_self_gaps():
    """At wl = +inf and lw = -inf nothing is left that could push ww and ll anywhere."""
    far = jnp.full(B, 1e4)
    ww, ll = _jax(_scores(2))
    grads = jax.grad(lambda ww, ll: gap(far, ww, ll, -far, jnp.ones(B))[0].total, (0, 1))(ww, ll)
    assert not any(jnp.any(grad) for grad in grads)


def test_gap_metrics():
    scores = _scores(4)
    scores[2][:3] = scores[0][:3]
    weight = jnp.asarray(WEIGHT, jnp.float32)
    _, metrics = gap(*_jax(scores), weight)
    table = dict(zip(("wl", "ww", "ll", "lw"), scores, strict=True))
    for name in COMPARISONS:
        high, low = (table[part] for part in name.split("_"))
        want = np.average((high > low) + 0.5 * (high == low), weights=WEIGHT)
        np.testing.assert_allclose(metrics[f"accuracy/{name}"].value(), want, rtol=1e-6)
    for name, values in table.items():
        mean, square = (metrics[f"gap/{name}/{part}"].value() for part in ("mean", "square"))
        want = np.average(values, weights=WEIGHT)
        np.testing.assert_allclose(mean, want, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(square - mean**2, np.average((values - want) ** 2, weights=WEIGHT), rtol=1e-4)
    assert len(metrics) == 13


def test_constant_gap_model_has_accuracy_one_half():
    _, metrics = gap(*[jnp.zeros(B)] * 4, jnp.ones(B))
    assert all(metrics[f"accuracy/{name}"].value() == 0.5 for name in COMPARISONS)


@pytest.mark.parametrize("terms", [("wl_lw",), frozenset({"wl_ww", "ll_lw"}), ["ww_lw", "wl_ll"]])
def test_selected_terms(terms):
    scores, weight = _jax(_scores(4)), jnp.asarray(WEIGHT, jnp.float32)
    got, metrics = gap(*scores, weight, terms=terms)
    single = [gap(*scores, weight, terms=(name,))[0].total for name in terms]
    np.testing.assert_allclose(got.total, sum(single), rtol=1e-6)
    assert {f"accuracy/{name}" for name in COMPARISONS} <= metrics.keys()


def test_single_terms_add_up_to_the_whole():
    scores, weight = _jax(_scores(4)), jnp.asarray(WEIGHT, jnp.float32)
    whole = gap(*scores, weight)[0].total
    np.testing.assert_allclose(
        sum(gap(*scores, weight, terms=(name,))[0].total for name in COMPARISONS), whole, rtol=1e-6
    )


@pytest.mark.parametrize("terms", [(), ("wl_w",), "wl_lw", ("ww_ll",)])
def test_wrong_terms_are_refused(terms):
    with pytest.raises(ConfigError, match="gap.terms"):
        gap(*_jax(_scores(4)), jnp.ones(B), terms=terms)


def test_misspelt_term_names_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'wl_ww'"):
        gap(*_jax(_scores(4)), jnp.ones(B), terms=("wl_w",))


def test_bradley_terry_and_gradient():
    scores, weight = _scores(2), jnp.asarray(WEIGHT, jnp.float32)

    def reference(chosen, rejected):
        return -(WEIGHT * _log_sigmoid(chosen - rejected)).sum() / WEIGHT.sum()

    value, grads = jax.value_and_grad(lambda *s: bradley_terry(*s, weight)[0].value(), (0, 1))(*_jax(scores))
    np.testing.assert_allclose(value, reference(*scores), rtol=1e-6)
    for got, want in zip(grads, _finite_differences(reference, scores), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)


def test_bradley_terry_metrics():
    chosen, rejected = _scores(2)
    rejected[0] = chosen[0]
    metrics = bradley_terry(*_jax([chosen, rejected]), jnp.asarray(WEIGHT, jnp.float32))[1]
    margin, both = chosen - rejected, np.concatenate([chosen, rejected])
    want = {
        "accuracy": np.average((margin > 0) + 0.5 * (margin == 0), weights=WEIGHT),
        "margin/mean": np.average(margin, weights=WEIGHT),
        "margin/square": np.average(margin**2, weights=WEIGHT),
        "reward/mean": np.average(both, weights=np.tile(WEIGHT, 2)),
        "reward/square": np.average(both**2, weights=np.tile(WEIGHT, 2)),
    }
    assert metrics.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(metrics[name].value(), value, rtol=1e-5, err_msg=name)


def test_dpo():
    arrays = _scores(4)
    policy, anchor = _jax(arrays[:2]), _jax(arrays[2:])
    weight = jnp.asarray(WEIGHT, jnp.float32)

    def reference(chosen, rejected):
        margin = 0.3 * ((chosen - arrays[2]) - (rejected - arrays[3]))
        return -(WEIGHT * _log_sigmoid(margin)).sum() / WEIGHT.sum()

    def loss(policy, anchor):
        return dpo(policy, anchor, weight, 0.3)[0].value()

    value, (grads, anchor_grads) = jax.value_and_grad(loss, (0, 1))(tuple(policy), tuple(anchor))
    np.testing.assert_allclose(value, reference(*arrays[:2]), rtol=1e-6)
    for got, want in zip(grads, _finite_differences(reference, arrays[:2]), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)
    assert not any(jnp.any(grad) for grad in anchor_grads)


@pytest.mark.parametrize(
    ("loss", "count"), [(bradley_terry, 2), (gap, 4), (lambda *a: dpo(a[:2], a[2:4], a[4], 0.1), 4)]
)
def test_filler_records_may_hold_nan(loss, count: int):
    weight = jnp.asarray(WEIGHT, jnp.float32)
    scores = _jax(_scores(count))
    broken = [jnp.where(weight > 0, score, jnp.nan) for score in scores]

    def total(*scores):
        found, metrics = loss(*scores, weight)
        return found.total, metrics

    gradient = jax.value_and_grad(total, tuple(range(count)), has_aux=True)
    jax.tree.map(np.testing.assert_array_equal, gradient(*broken), gradient(*scores))


def test_parts_add_up_to_the_whole():
    scores, weight = _jax(_scores(4)), jnp.asarray(WEIGHT, jnp.float32)
    first, second = (gap(*(score[part] for score in scores), weight[part])[0] for part in (slice(2), slice(2, B)))
    np.testing.assert_allclose(first.merge(second).value(), gap(*scores, weight)[0].value(), rtol=1e-6)
