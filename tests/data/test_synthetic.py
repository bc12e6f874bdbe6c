"""Properties of the synthetic preference set: its judge is exact, its faults count, its records are stable."""

import dataclasses
import json

import pytest

from pit_jax.core.errors import ConfigError
from pit_jax.data import instructions, synthetic
from pit_jax.data.synthetic import SyntheticConfig

ALL_PRESETS = sorted(synthetic.PRESETS)
CLEAN = {"label_noise": 0.0, "headline_fault_rate": 0.0, "slip_rate": 0.0}


def _dice(config, index, seed=0):
    return instructions.Dice(seed, index, instructions.COLORS[: synthetic.PRESETS[config.difficulty].colors])


def _records(n=400, **fields):
    return list(synthetic.generate(SyntheticConfig(num_records=n, **fields)))


@pytest.mark.parametrize("difficulty", ALL_PRESETS)
@pytest.mark.parametrize("seed", range(3))
def test_uncorrupted_chosen_replies_are_perfect_and_rejected_ones_are_not(difficulty, seed):
    for record in _records(difficulty=difficulty, seed=seed, **CLEAN):
        assert synthetic.quality(record["prompt"], record["chosen"]) == 1.0, record
        assert synthetic.faults(record["prompt"], record["chosen"]) == []
        assert synthetic.quality(record["prompt"], record["rejected"]) < 1.0, record
        assert synthetic.faults(record["prompt"], record["rejected"])


@pytest.mark.parametrize("difficulty", ALL_PRESETS)
def test_every_kind_of_fault_lowers_the_quality_and_is_named(difficulty):
    seen = set()
    config = SyntheticConfig(difficulty=difficulty)
    for index in range(600):
        dice = _dice(config, index, seed=1)
        task = synthetic._draw_task(config, dice)
        perfect = instructions.solve(task, dice)
        prompt = instructions.write_prompt(task)
        for kind in synthetic._breakable(config, task):
            broken = synthetic._BREAKERS[kind](task, perfect, dice)
            text = instructions.write_reply(task, broken)
            if kind != "form":  # A slip of the pen breaks another constraint or, rarely, none.
                assert synthetic.quality(prompt, text) < 1.0, (kind, prompt, text)
                assert any(fault.startswith(kind) for fault in synthetic.faults(prompt, text)), (kind, prompt, text)
            seen.add(kind)
    assert seen >= {"headline", "legs", "order", "count", "include", "avoid", "end"}


@pytest.mark.parametrize("difficulty", ALL_PRESETS)
def test_prompts_round_trip_and_all_words_are_in_the_vocabulary(difficulty):
    config = SyntheticConfig(difficulty=difficulty, num_records=1000)
    words = set(synthetic.vocabulary(config))
    assert len(words) <= 100
    for index, record in enumerate(synthetic.generate(config)):
        task = synthetic._draw_task(config, _dice(config, index))
        assert synthetic.parse_prompt(record["prompt"]) == task
        assert synthetic.quality(record["prompt"], synthetic.perfect_reply(record["prompt"])) == 1.0
        for key in ("prompt", "chosen", "rejected"):
            assert record[key] == " ".join(record[key].split())
            assert set(record[key].split()) <= words
        assert set(record) == {"id", "group", "prompt", "chosen", "rejected"}


def test_a_record_depends_on_configuration_and_index_alone():
    assert _records(50) == _records(200)[:50]
    assert _records(50) != _records(50, seed=1)
    assert synthetic.make_record(SyntheticConfig(), 17) == _records(18)[17]


def test_fingerprint_changes_with_content_only():
    config = SyntheticConfig()
    assert config.fingerprint() == SyntheticConfig(num_records=5).fingerprint()
    changed = [{"seed": 1}, {"difficulty": "hard"}, {"slip_rate": 0.5}, {"kinds": instructions.KINDS[1:]}]
    assert (
        len({dataclasses.replace(config, **fields).fingerprint() for fields in changed} | {config.fingerprint()}) == 5
    )


def test_the_demo_set_has_many_prompts_and_the_promised_share_of_wrong_headlines():
    records = _records(30_000, label_noise=0.0)
    assert len({r["group"] for r in records}) > 20_000
    asked = [r for r in records if r["prompt"].startswith(("goal", "middle"))]
    wrong = [any(f.startswith("headline") for f in synthetic.faults(r["prompt"], r["chosen"])) for r in asked]
    assert sum(wrong) / len(wrong) == pytest.approx(SyntheticConfig().headline_fault_rate, abs=0.02)


def test_label_noise_flips_close_pairs_most():
    assert all(
        synthetic.quality(r["prompt"], r["chosen"]) > synthetic.quality(r["prompt"], r["rejected"])
        for r in _records(2000, label_noise=0.0)
    )

    def flipped(temperature):
        records = _records(4000, label_noise=temperature)
        return sum(
            synthetic.quality(r["prompt"], r["chosen"]) < synthetic.quality(r["prompt"], r["rejected"]) for r in records
        ) / len(records)

    assert 0.01 < flipped(0.05) < 0.12
    assert 0.4 < flipped(50.0) < 0.6


@pytest.mark.parametrize("text", ["", "via", "thanks thanks", "zzz", "oak " * 50, "with with via sorted"])
def test_any_text_gets_a_quality(text):
    for record in _records(60, difficulty="hard"):
        assert 0.0 <= synthetic.quality(record["prompt"], text) < 1.0


def test_a_worked_example():
    prompt = "goal from oak by red blue bring lamp end thanks"
    assert synthetic.perfect_reply(prompt) == "mill via farm mill with lamp thanks"
    assert synthetic.quality(prompt, "mill via farm mill with lamp thanks") == 1.0
    # Parts: headline 1, legs 2, count 1, include 1, end 1, form 1; a wrong headline costs one of seven.
    assert synthetic.quality(prompt, "oak via farm mill with lamp thanks") == pytest.approx(6 / 7)
    assert synthetic.faults(prompt, "oak via farm mill with lamp thanks") == ["headline: opens with oak, not mill"]
    # Bending the last stop to a wrong headline costs more than the wrong headline alone.
    assert synthetic.quality(prompt, "oak via farm oak with lamp thanks") == pytest.approx(5 / 7)


@pytest.mark.parametrize(
    "prompt", ["", "hello", "goal from oak by red stop", "three colors with sky", "from red by red"]
)
def test_foreign_prompts_are_refused(prompt):
    with pytest.raises(ValueError, match="prompt"):
        synthetic.quality(prompt, "oak")


@pytest.mark.parametrize(
    "fields",
    [
        {"difficulty": "mild"},
        {"kinds": ("headline",)},
        {"num_records": -1},
        {"seed": -1},
        {"label_noise": -0.1},
        {"slip_rate": 1.5},
        {"extra_faults": (0, 2)},
        {"fault_weights": {"form": 0.0}},
    ],
)
def test_errors_name_the_field(fields):
    with pytest.raises(ConfigError, match=next(iter(fields))):
        SyntheticConfig(**fields)


def test_write_jsonl(tmp_path):
    config = SyntheticConfig(num_records=20)
    path = tmp_path / "set.jsonl"
    synthetic.write_jsonl(config, path)
    assert [json.loads(line) for line in path.read_text().splitlines()] == list(synthetic.generate(config))
    assert [p.name for p in tmp_path.iterdir()] == ["set.jsonl"]


def test_the_example_of_the_documentation_is_true():
    lines = [line.split(maxsplit=1) for line in synthetic.__doc__.splitlines()]
    example = {words[0]: words[1] for words in lines if words and words[0] in ("prompt", "chosen", "rejected")}
    assert synthetic.quality(example["prompt"], example["chosen"]) == 1.0
    named = [fault.split(":")[0] for fault in synthetic.faults(example["prompt"], example["rejected"])]
    assert named == ["headline", "include"]
