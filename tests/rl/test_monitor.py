"""The KL budget and the alarms."""

from __future__ import annotations

import json

import pytest

from pit_jax.core.errors import ConfigError, TrainingError
from pit_jax.rl.monitor import MonitorConfig, MonitorState, alarms, control, observe, observe_judge

CONFIG = MonitorConfig(kl_budget=3.0, length_drift=0.5, judge_drop=0.05, smoothing=0.5, patience=2)
CALM = {"reward/mean": 1.0, "kl/mean": 1.0, "length/mean": 8.0, "length/reference": 8.0}


def _after(*steps: dict[str, float], state: MonitorState | None = None) -> MonitorState:
    state = state or MonitorState(beta=0.2)
    for change in steps:
        state = observe(state, CONFIG, CALM | change)
    return state


@pytest.mark.parametrize(
    ("change", "kind"),
    [({"kl/mean": 3.1}, "kl"), ({"length/mean": 8.6}, "length"), ({"length/mean": 7.4}, "length")],
)
def test_a_passed_limit_is_named_and_patience_is_kept(change: dict[str, float], kind: str) -> None:
    assert alarms(_after({}, {}, {}), CONFIG) == {}
    assert alarms(_after(change), CONFIG) == {}
    assert list(alarms(_after(change, change), CONFIG)) == [kind]


def test_means_are_smoothed_from_the_first_value_on() -> None:
    state = _after({"kl/mean": 4.0}, {"kl/mean": 2.0}, {"kl/mean": 1.0})
    assert state.kl == 0.5 * (0.5 * 4.0 + 0.5 * 2.0) + 0.5 * 1.0
    assert alarms(state, CONFIG) == {}


def test_reward_up_while_the_judge_falls_is_hacking() -> None:
    start = observe_judge(_after({}, {}), 0.8)
    risen = _after({"reward/mean": 2.0}, state=start)
    fallen = _after({"reward/mean": 0.5}, state=start)
    assert list(alarms(observe_judge(risen, 0.7), CONFIG)) == ["judge"]
    assert alarms(observe_judge(risen, 0.76), CONFIG) == {}
    assert alarms(observe_judge(fallen, 0.7), CONFIG) == {}
    recovered = observe_judge(observe_judge(risen, 0.7), 0.9)
    assert (recovered.best_judge, recovered.best_reward) == (0.9, 1.5)
    assert alarms(recovered, CONFIG) == {}


def test_warn_says_it_once_until_it_is_over() -> None:
    over = {"kl": "KL is high"}
    state, said = control(MonitorState(beta=0.2), CONFIG, 0.2, over)
    assert said == ["Reward-hacking alarm: KL is high."]
    state, again = control(state, CONFIG, 0.2, over)
    assert (again, state.beta) == ([], 0.2)
    state, _ = control(state, CONFIG, 0.2, {})
    assert control(state, CONFIG, 0.2, over)[1] == said


def test_adapt_raises_beta_up_to_its_bound_and_lets_it_return() -> None:
    config = MonitorConfig(action="adapt", raise_beta=2.0, max_beta=5.0)
    state, betas = MonitorState(beta=0.2), []
    for found in [{"kl": "high"}] * 4 + [{}] * 4:
        state, _ = control(state, config, 0.2, found)
        betas.append(state.beta)
    assert betas == [0.4, 0.8, 1.0, 1.0, 0.5, 0.25, 0.2, 0.2]


def test_stop_ends_the_run_and_names_the_fix() -> None:
    config = MonitorConfig(action="stop")
    assert control(MonitorState(beta=0.2), config, 0.2, {})[1] == []
    with pytest.raises(TrainingError, match=r"KL is high.*larger beta \(now 0.2\)"):
        control(MonitorState(beta=0.2), config, 0.2, {"kl": "KL is high"})


def test_the_state_goes_through_json_exactly() -> None:
    state = observe_judge(_after({"kl/mean": 1.0 / 3.0}, {}), 0.1)
    state, _ = control(state, CONFIG, 0.2, {"kl": "high"})
    assert MonitorState.from_json(json.loads(json.dumps(state.to_json()))) == state
    assert MonitorState.from_json(json.loads(json.dumps(MonitorState(beta=0.1).to_json()))) == MonitorState(beta=0.1)


@pytest.mark.parametrize(
    "bad",
    [
        {"kl_budget": 0.0},
        {"length_drift": -1.0},
        {"judge_drop": -0.1},
        {"action": "panic"},
        {"raise_beta": 1.0},
        {"max_beta": 0.5},
        {"smoothing": 1.0},
        {"patience": 0},
    ],
)
def test_bad_settings_are_named(bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"MonitorConfig.{next(iter(bad))}"):
        MonitorConfig(**bad)
