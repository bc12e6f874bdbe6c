import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pit_jax.core.errors import DataError
from pit_jax.data import views
from pit_jax.data.schema import Document, Record
from pit_jax.text.codec import Codec, Lengths
from pit_jax.text.template import Templates
from pit_jax.text.tokenizer import ByteTokenizer

CODEC = Codec(
    ByteTokenizer(),
    Templates(improver="{prompt}|{reference}>", gap="{prompt}{reference}"),
    Lengths(inputs=8, targets=6),
)
DECODE = CODEC.tokenizer.decode


def record(prompt="prompt", chosen="good", rejected="bad"):
    return Record(id="", group="", prompt=prompt, chosen=chosen, rejected=rejected)


def test_every_view_has_its_features_as_int32():
    for view in views.VIEWS.values():
        example = view.make(record(), CODEC)
        assert tuple(example) == view.features
        assert {(ids.dtype.name, ids.ndim) for ids in example.values()} == {("int32", 1)}


def test_contents():
    policy = views.sft_policy(record("a long prompt"), CODEC)
    assert (DECODE(policy["inputs"]), policy["targets"].tolist()) == ("g prompt", list(CODEC.response_ids("good")))
    improver = views.sft_improver(record("a long prompt"), CODEC)
    assert DECODE(improver["inputs"]) == "g prompt|bad>"
    assert DECODE(improver["inputs"][slice(*improver["reference"])]) == "bad"
    assert improver["targets"].tolist() == policy["targets"].tolist()
    pair = views.comparison(record("a long prompt"), CODEC)
    assert [DECODE(pair[name]) for name in ("prompt", "chosen", "rejected")] == ["g prompt", "good", "bad"]
    assert pair["chosen"][-1] == pair["rejected"][-1] == 1


@pytest.mark.parametrize(
    ("bad", "reason", "policy_keeps"),
    [
        (record(prompt=""), "empty_prompt", False),
        (record(chosen=""), "empty_chosen", False),
        (record(rejected=""), "empty_rejected", True),
        (record(chosen="123456"), "too_long_chosen", False),
        (record(rejected="123456"), "too_long_rejected", True),
        (record(chosen="same", rejected="same"), "identical_replies", True),
    ],
)
def test_drops_are_named_and_counted(bad, reason, policy_keeps):
    for name in views.VIEWS:
        report = views.DropReport()
        kept = list(views.make_examples(name, [record(), bad, record()], CODEC, report))
        drops = not (name == "sft_policy" and policy_keeps)
        assert len(kept) == report.kept == 3 - drops
        assert report.dropped == ({reason: 1} if drops else {})
        assert ("dropped 1" in report.summary()) == drops


def test_longest_reply_that_fits_is_kept():
    assert len(views.sft_policy(record(chosen="12345"), CODEC)["targets"]) == CODEC.lengths.targets


def test_folds_of_views():
    assert {name: views.fold_for(name) for name in [*views.VIEWS, "lm"]} == {
        "sft_policy": "sft",
        "sft_improver": "sft",
        "reward_bt": "rm",
        "reward_gap": "rm",
        "rl": "rl",
        "evaluate": None,
        "lm": None,
    }
    with pytest.raises(DataError, match="Did you mean 'reward_bt'"):
        views.fold_for("reward_b")


@settings(deadline=None)
@given(st.text("abc ", max_size=40), st.integers(1, 5), st.integers(2, 7))
def test_lm_examples_train_on_every_token_once_with_its_context(text, inputs, targets):
    codec = Codec(ByteTokenizer(), Templates(), Lengths(inputs=inputs, targets=targets))
    examples = list(views.lm_examples(Document(id="", group="", text=text), codec))
    whole = [1, *ByteTokenizer().encode(text), 1]
    assert [token for example in examples for token in example["targets"].tolist()] == whole[1:]
    at = 1
    for example in examples:
        assert 1 <= len(example["targets"]) <= targets
        assert example["inputs"].tolist() == whole[max(0, at - inputs) : at]
        at += len(example["targets"])
