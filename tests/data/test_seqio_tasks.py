"""SeqIO tasks of preference data: the same examples as without TensorFlow, usable by SeqIO and T5X as they are."""

import copy
import dataclasses
import json

import numpy as np
import pytest

from pit_jax.core.errors import ConfigError, DataError
from pit_jax.core.types import Conditional
from pit_jax.data import seqio_live
from pit_jax.data.collate import collator_for, take_batch
from pit_jax.data.folds import Folds
from pit_jax.data.open import DataSpec, open_examples, open_records, open_source, write_view_cache
from pit_jax.data.readers import ReadConfig
from pit_jax.data.schema import parse
from pit_jax.data.seqio_preprocessors import assign_fold, narrowed, parse_preferences, select_fold, tokenize_view
from pit_jax.data.seqio_runtime import seqio, tf
from pit_jax.data.seqio_tasks import BYTES, register_preference_tasks
from pit_jax.data.seqio_vocabulary import TokenizerVocabulary
from pit_jax.data.source import ListBlocks, ShuffledSource
from pit_jax.data.stream import StreamBlocks
from pit_jax.data.views import VIEWS, DropReport, make_examples
from pit_jax.text.codec import Codec, Lengths
from pit_jax.text.template import Templates
from pit_jax.text.tokenizer import ByteTokenizer, SentencePieceTokenizer, SentencePieceTraining, train_sentencepiece

CODEC = Codec(ByteTokenizer(), Templates(), Lengths(inputs=48, targets=24))
FOLDS = Folds(validation_fraction=0.2)
READ = ReadConfig()
SHAPES = {
    "explicit": {"prompt": "What?\n", "chosen": " this ", "rejected": "that", "id": "7", "group": "g"},
    "implicit": {
        "chosen": "\n\nHuman: What?\n\nAssistant: this",
        "rejected": "\n\nHuman: What?\n\nAssistant: that",
    },
    "messages": {
        "prompt": [{"role": "user", "content": "What?"}],
        "chosen": [{"role": "assistant", "content": "this"}],
        "rejected": [{"role": "assistant", "content": "that"}],
    },
    "messages_implicit": {
        "chosen": [{"role": "user", "content": "Whát?"}, {"role": "assistant", "content": "this"}],
        "rejected": [{"role": "user", "content": "Whát?"}, {"role": "assistant", "content": "that"}],
    },
}


def rows(count=100):
    return [{"prompt": f"question {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(count)]


@pytest.fixture
def registry():
    """Forget the tasks that a test registers."""
    before = dict(seqio.TaskRegistry._REGISTRY), dict(seqio.MixtureRegistry._REGISTRY)
    yield
    seqio.TaskRegistry._REGISTRY, seqio.MixtureRegistry._REGISTRY = before


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return str(file)


def elements(task, split="train", lengths=None, **options):
    dataset = seqio.get_mixture_or_task(task).get_dataset(lengths, split=split, shuffle=False, **options)
    return list(dataset.as_numpy_iterator())


def same(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


# ---- vocabulary


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    directory = tmp_path_factory.mktemp("spm")
    texts = [f"{row['prompt']} {row['chosen']} {row['rejected']} naïve" for row in rows(40)]
    train_sentencepiece(texts, SentencePieceTraining(vocab_size=330), directory)
    return directory / "tokenizer.model"


def test_vocabulary_has_the_tokenizers_ids(sentencepiece):
    tokenizer = SentencePieceTokenizer(sentencepiece)
    vocabulary = TokenizerVocabulary(tokenizer)
    text = "question 7\n naïve — good"
    ids = tokenizer.encode(text)
    assert list(vocabulary.encode(text)) == ids
    assert vocabulary.encode_tf(tf.constant(text)).numpy().tolist() == ids
    assert (vocabulary.vocab_size, vocabulary.eos_id, vocabulary.pad_id) == (tokenizer.vocab_size, 1, 0)
    ended = [*ids, 1, 9, 9]
    assert vocabulary.decode(ended) == text
    decoded = vocabulary.decode_tf(tf.constant([ended, ended])).numpy()
    assert [line.decode() for line in decoded] == [text, text]


def test_vocabularies_are_equal_by_content_not_by_path(sentencepiece, tmp_path):
    (tmp_path / "copy.model").write_bytes(sentencepiece.read_bytes())
    first, second = (TokenizerVocabulary(SentencePieceTokenizer(p)) for p in (sentencepiece, tmp_path / "copy.model"))
    assert first == second and hash(first) == hash(second) and first == copy.deepcopy(first)
    assert first != TokenizerVocabulary(ByteTokenizer()) and first != seqio.ByteVocabulary()
    assert seqio.SentencePieceVocabulary(str(sentencepiece)) != seqio.SentencePieceVocabulary(
        str(tmp_path / "copy.model")
    )


def test_bytes_are_those_of_byt5():
    ours, theirs = TokenizerVocabulary(ByteTokenizer()), seqio.ByteVocabulary()
    assert list(ours.encode("naïve")) == list(theirs.encode("naïve"))
    assert (ours.vocab_size, ours.eos_id) == (theirs.vocab_size, theirs.eos_id)


# ---- preprocessors one by one


def tensors(row):
    """A raw record as TFDS gives it: messages are {"role": [n], "content": [n]}."""

    def convert(value):
        if isinstance(value, list):
            return {key: tf.constant([message[key] for message in value]) for key in ("role", "content")}
        return tf.constant(value)

    return tf.data.Dataset.from_tensors({name: convert(value) for name, value in row.items()})


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", ["tensors", "json", "json_field"])
def test_all_shapes_are_parsed_as_without_tensorflow(shape, form):
    row = SHAPES[shape]
    text = json.dumps(row)
    dataset = {
        "tensors": lambda: tensors(row),
        "json": lambda: tf.data.Dataset.from_tensors(tf.constant(text)),
        "json_field": lambda: tf.data.Dataset.from_tensors({"json": tf.constant(text), "split": tf.constant("train")}),
    }[form]()
    (found,) = parse_preferences(dataset, read=READ).as_numpy_iterator()
    split = found.pop("split", b"")
    assert split == (b"train" if form == "json_field" else b"")
    assert {name: value.decode() for name, value in found.items()} == parse(row).__dict__


def test_convert_reads_other_fields():
    dataset = tensors({"question": "q", "answers": "worse|better"})

    def convert(raw):
        worse, better = raw["answers"].split("|")
        return {"prompt": raw["question"], "chosen": better, "rejected": worse}

    (found,) = parse_preferences(dataset, read=READ, convert=convert).as_numpy_iterator()
    assert (found["chosen"], found["rejected"]) == (b"better", b"worse")


def test_bad_records_stop_the_reading_or_are_left_out(caplog):
    lines = ['{"prompt": "p", "chosen": "c", "rejected": "r"}', "not json", '{"prompt": "p", "chosen": "c"}', "[1]"]
    dataset = tf.data.Dataset.from_tensor_slices(lines)
    with pytest.raises(tf.errors.OpError, match="not JSON"):
        list(parse_preferences(dataset, read=READ))
    with caplog.at_level("WARNING"):
        assert len(list(parse_preferences(dataset, read=ReadConfig(on_bad_record="skip")))) == 1
    assert "1 records that cannot be read" in caplog.text


def test_folds_and_tokens_are_those_of_the_python_functions():
    records = [parse(row) for row in [*rows(60), {"prompt": "p", "chosen": "x" * 99, "rejected": "r"}]]
    fields = {name: [getattr(record, name) for record in records] for name in records[0].__dict__}
    dataset = tf.data.Dataset.from_tensor_slices(fields | {"split": ["train"] * len(records)})
    dealt = assign_fold(dataset, folds=FOLDS, cut_validation=True)
    chosen = select_fold(dealt, fold="rm")
    report, expected_report = DropReport(), DropReport()
    found = list(tokenize_view(chosen, view="reward_gap", codec=CODEC, report=report).as_numpy_iterator())
    mine = [record for record in records if FOLDS.holds(record.group, "train", "rm")]
    same(found, list(make_examples("reward_gap", mine, CODEC, expected_report)))
    assert report == expected_report and 0 < len(mine) < len(records) / 2
    everything = select_fold(dealt, fold=None)
    assert len(list(everything)) == sum(FOLDS.split(record.group) == "train" for record in records)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("limit", [1000, 40])
def test_narrowed_codec_keeps_every_example_within_the_lengths(view, limit):
    codec = Codec(ByteTokenizer(), Templates(improver="{prompt}#{reference}="), Lengths(inputs=60, targets=30))
    lengths = {"inputs": limit, "prompt": limit, "targets": 16, "chosen": 16, "rejected": 20}
    small = narrowed(codec, view, lengths)
    record = parse({"prompt": "p" * 200, "chosen": "c" * 15, "rejected": "r" * 15})
    (example,) = make_examples(view, [record], small, DropReport())
    width = max(len(example[name]) for name in ("inputs", "prompt") if name in example)
    assert width <= limit and (width == limit or limit == 1000)
    replies = [example[name] for name in ("targets", "chosen", "rejected") if name in example]
    assert all(reply[-1] == 1 and len(reply) == 16 for reply in replies)
    assert narrowed(codec, view, {"inputs": None}) == codec


def test_lengths_without_room_for_a_prompt_are_refused():
    with pytest.raises(ConfigError, match=r"TASK_FEATURE_LENGTHS\['inputs'\]"):
        narrowed(CODEC, "sft_improver", {"inputs": 20, "targets": 16})


# ---- registered tasks


def test_one_call_registers_every_view(registry, path):
    names = register_preference_tasks("mine", path, codec=CODEC, folds=FOLDS)
    assert names == ("mine_records", *(f"mine_{view}" for view in VIEWS))
    spec = DataSpec(path=path, folds=FOLDS)
    for view in VIEWS:
        task = seqio.get_mixture_or_task(f"mine_{view}")
        assert set(task.splits) == {"train", "validation"}
        assert {feature.vocabulary for feature in task.output_features.values()} == {
            TokenizerVocabulary(CODEC.tokenizer)
        }
        for split in task.splits:
            expected = open_examples(spec, view=view, split=split, codec=CODEC)
            same(elements(task.name, split, trim_output_features=False), expected)


def test_a_new_data_set_needs_five_lines(registry, tmp_path):
    mine = tmp_path / "mine.jsonl"
    mine.write_text("\n".join(json.dumps(SHAPES["implicit"] | {"group": str(n)}) for n in range(40)))

    from pit_jax.data.seqio_tasks import register_preference_tasks

    register_preference_tasks("mine", str(mine))

    assert all(elements(f"mine_{view}", "train") for view in VIEWS)
    source = open_source(DataSpec(task="mine"), view="reward_gap", split="train", codec=CODEC, seed=0)
    assert len(source.take(3)) == 3


def test_sources_of_every_kind_hold_the_same_records(registry, path):
    lines = seqio.TextLineDataSource({"train": path})
    sources = {"paths": [path], "list": rows(), "function": rows, "lines": lines, "splits": {"train": path}}
    for name, source in sources.items():
        register_preference_tasks(name, source, folds=FOLDS)
    expected = elements("paths_records")
    assert 0 < len(expected) < 100
    for name in sources:
        same(elements(f"{name}_records"), expected)


def test_own_validation_split_is_not_cut(registry, path, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps(SHAPES["explicit"]) + "\n")
    register_preference_tasks("mine", {"train": path, "validation": str(other)}, codec=CODEC, folds=FOLDS)
    assert len(elements("mine_records", "train")) == 100
    (held_out,) = elements("mine_records", "validation")
    assert (held_out["id"], held_out["fold"]) == (b"7", b"")
    assert len(elements("mine_rl", "validation")) == 1
    same(
        list(seqio_live.examples_of_task("mine_rl", "train", "rl")),
        open_examples(
            DataSpec(path=path, validation_path=str(other), folds=FOLDS), view="rl", split="train", codec=CODEC
        ),
    )


def test_names_and_sources_that_cannot_work_are_refused(registry):
    with pytest.raises(ConfigError, match="'my_data'"):
        register_preference_tasks("my-data", rows())
    with pytest.raises(DataError, match="only once"):
        register_preference_tasks("mine", iter(rows()))
    with pytest.raises(DataError, match="is a int"):
        register_preference_tasks("mine", 3)
    with pytest.raises(DataError, match="'train'"):
        register_preference_tasks("mine", seqio.TextLineDataSource({"test": "x"}))
    with pytest.raises(DataError, match="convert"):
        register_preference_tasks("mine", rows(), convert=lambda row: row)
    register_preference_tasks("mine", rows(3))
    with pytest.raises(DataError, match="registered already"):
        register_preference_tasks("mine", rows(4))
    register_preference_tasks("mine", rows(4), folds=Folds(validation_fraction=0), overwrite=True)
    assert len(elements("mine_records")) == 4


def test_errors_keep_their_words_through_tensorflow(registry, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "p", "chosen": "c", "rejected": "r"}\n{"prompt": "p", "chosen": "c"}\n')
    register_preference_tasks("bad", str(bad))
    register_preference_tasks("missing", str(tmp_path / "nothing.jsonl"))
    register_preference_tasks("listed", [{"prompt": "p", "chosen": "c"}])
    for task, message in (
        ("bad", r"bad.jsonl:2: field 'rejected' is missing"),
        ("missing", "no such file"),
        ("listed", "record 0: field 'rejected'"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            list(open_records(DataSpec(task=task), "train"))
        assert "Traceback" not in str(caught.value) and "pit_jax>" not in str(caught.value)


# ---- T5X: features inputs and targets, SeqIO's trimming and converters


@pytest.mark.parametrize(("view", "pack"), [("sft_policy", False), ("sft_improver", True)])
def test_sft_tasks_train_as_they_are_under_t5x(registry, view, pack):
    register_preference_tasks("mine", [*rows(), {"prompt": "p" * 500, "chosen": "c", "rejected": "r"}], codec=BYTES)
    lengths = {"inputs": 90, "targets": 16}
    dataset = seqio.get_dataset(
        mixture_or_task_name=f"mine_{view}",
        task_feature_lengths=lengths,
        dataset_split="train",
        shuffle=True,
        feature_converter=seqio.EncDecFeatureConverter(pack=pack),
        num_epochs=1,
        seed=1,
    )
    batches = list(dataset.as_numpy_iterator())
    targets = np.concatenate([batch["decoder_target_tokens"][None] for batch in batches])
    weights = np.concatenate([batch["decoder_loss_weights"][None] for batch in batches])
    assert {batch["encoder_input_tokens"].shape for batch in batches} == {(90,)}
    assert ((targets != 0) == (weights > 0)).all()
    examples = elements(f"mine_{view}", lengths=lengths)
    # Every example ends once, whatever was trimmed or packed.
    assert (targets == 1).sum() == len(examples)
    assert all(example["targets"][-1] == 1 and len(example["inputs"]) <= 90 for example in examples)


def test_mixtures_of_tokens_and_of_records(registry):
    for name, count in (("a", 60), ("b", 40)):
        register_preference_tasks(name, rows(count), codec=CODEC, folds=FOLDS)
    seqio.MixtureRegistry.add("ab_records", ["a_records", "b_records"], default_rate=1.0)
    seqio.MixtureRegistry.add("both_sft_improver", ["a_sft_improver", "b_sft_improver"], default_rate=1.0)
    seqio.MixtureRegistry.add("sft", ["a_sft_policy", "b_sft_improver"], default_rate=1.0)
    for task, view in (("ab", "rl"), ("both", "sft_improver"), ("sft", "sft_policy")):
        first, second = (
            open_source(DataSpec(task=task), view=view, split="train", codec=CODEC, seed=5).take(30) for _ in range(2)
        )
        same(first, second)
        assert set(first[0]) == set(VIEWS[view].features)


def test_tokens_of_another_vocabulary_or_view_are_refused(registry, sentencepiece):
    register_preference_tasks("mine", rows(), codec=CODEC)
    other = Codec(SentencePieceTokenizer(sentencepiece), Templates(), CODEC.lengths)
    with pytest.raises(DataError, match="bytes-v1, but the run's tokenizer is sentencepiece"):
        open_source(DataSpec(task="mine_rl"), view="rl", split="train", codec=other, seed=0)
    with pytest.raises(DataError, match="needs .*'inputs'"):
        open_source(DataSpec(task="mine_rl"), view="sft_policy", split="train", codec=CODEC, seed=0)
    with pytest.raises(DataError, match="Did you mean 'mine'"):
        open_source(DataSpec(task="nine"), view="rl", split="train", codec=CODEC, seed=0)
    with pytest.raises(DataError, match="no split 'test'"):
        open_source(DataSpec(task="mine"), view="rl", split="test", codec=CODEC, seed=0)
    with pytest.raises(DataError, match="holds tokens"):
        list(open_records(DataSpec(task="mine_rl"), "train"))
    with pytest.raises(DataError, match="cannot be imported"):
        open_source(DataSpec(task="mine", module="tasks.nothing"), view="rl", split="train", codec=CODEC, seed=0)
    # The family's records are tokenised by whoever reads them.
    assert open_source(DataSpec(task="mine"), view="rl", split="train", codec=other, seed=0).take(1)


def test_texts_of_a_task(registry):
    source = seqio.FunctionDataSource(
        lambda split, shuffle_files: tf.data.Dataset.from_tensor_slices({"text": ["one text", "two"]}), ["train"]
    )
    text = seqio.Feature(seqio.PassThroughVocabulary(0), add_eos=False, dtype=tf.string, rank=0)
    seqio.TaskRegistry.add("texts", source, {"text": text}, preprocessors=[])
    examples = open_examples(DataSpec(task="texts"), view="lm", split="train", codec=CODEC)
    assert [CODEC.text(example["targets"].tolist()) for example in examples] == ["one text", "two"]


# ---- one stream, three homes


@pytest.mark.parametrize("view", ["sft_improver", "reward_gap"])
def test_live_task_cache_and_list_give_the_same_batches(registry, path, tmp_path, view):
    register_preference_tasks("mine", path, codec=CODEC, folds=FOLDS)
    spec = DataSpec(task="mine", window=8)
    write_view_cache(spec, tmp_path / "cache", view=view, split="train", codec=CODEC)
    sources = {
        "records": open_source(spec, view=view, split="train", codec=CODEC, seed=11),
        "tokens": open_source(DataSpec(task=f"mine_{view}", window=8), view=view, split="train", codec=CODEC, seed=11),
        "streamed": ShuffledSource(
            StreamBlocks(lambda: seqio_live.examples_of_task(f"mine_{view}", "train", view), keep=0),
            window=8,
            seed=11,
        ),
        "cache": open_source(
            DataSpec(cache=str(tmp_path / "cache"), window=8), view=view, split="train", codec=CODEC, seed=11
        ),
        "list": ShuffledSource(
            ListBlocks(open_examples(DataSpec(path=path, folds=FOLDS), view=view, split="train", codec=CODEC)),
            window=8,
            seed=11,
        ),
    }  # fmt: skip
    assert len({source.fingerprint for source in sources.values()}) == 1
    ahead = sources["list"].take(21)
    state = json.loads(json.dumps(sources["list"].state()))
    after = sources["list"].take(60)
    assert not all(np.array_equal(a[k], b[k]) for a, b in zip(ahead, after, strict=False) for k in a)
    for name, source in sources.items():
        if name != "list":
            same(source.take(21), ahead)
            assert source.state() == state
            same(source.take(60), after)
        # Back to the middle, as after a restart.
        source.restore(state)
        same(source.take(60), after)


def test_batches_are_equal_too(registry, path):
    register_preference_tasks("mine", path, codec=CODEC, folds=FOLDS)
    collator = collator_for("sft_policy", CODEC, batch_size=8, micro_batches=2, packing=None)
    live, listed = (
        open_source(spec, view="sft_policy", split="train", codec=CODEC, seed=2)
        for spec in (DataSpec(task="mine"), DataSpec(path=path, folds=FOLDS))
    )
    names = [field.name for field in dataclasses.fields(Conditional)]
    for _ in range(12):
        one, other = take_batch(live, collator), take_batch(listed, collator)
        assert all(np.array_equal(getattr(one, name), getattr(other, name)) for name in names)


def test_long_stream_is_read_from_where_it_is():
    opened = []

    def numbers():
        opened.append(0)
        for number in range(size[0]):
            opened[-1] += 1
            yield {"prompt": np.full(1, number, np.int32)}

    size = [40]
    blocks, kept = StreamBlocks(numbers, keep=39), StreamBlocks(numbers, keep=40)
    assert opened == [40, 40] and blocks.fingerprint == kept.fingerprint and len(blocks) == 40
    for start, stop in ((10, 20), (20, 40), (5, 6)):
        same(blocks.read(start, stop), kept.read(start, stop))
    assert opened == [40, 40, 40, 6]
    size[0] = 30
    with pytest.raises(DataError, match="have changed"):
        blocks.read(0, 40)
