import pathlib

import pytest

from pit_jax.core.errors import DataError
from pit_jax.data.seqio_preprocessors import tokenize_view
from pit_jax.data.seqio_runtime import tf
from pit_jax.data.seqio_vocabulary import TokenizerVocabulary, check_padding
from pit_jax.text.codec import Codec, Lengths
from pit_jax.text.template import Templates
from pit_jax.text.tokenizer import ByteTokenizer, load_tokenizer

HERE = pathlib.Path(__file__).parent / "hf_tokenizers"


@pytest.mark.parametrize("name", ["llama3", "qwen", "gemma", "mistral", "t5"])
def test_seqio_gives_the_ids_of_a_hugging_face_tokenizer(name):
    tokenizer = load_tokenizer(HERE / name)
    vocabulary = TokenizerVocabulary(tokenizer)
    for text in ("the quick brown fox", "a<|eot_id|>b </s>\n\n<end_of_turn>x", ""):
        ids = tokenizer.encode(text)
        assert vocabulary.encode(text) == ids
        assert vocabulary.encode_tf(tf.constant(text)).numpy().tolist() == ids
    ids = tokenizer.encode("the fox")
    assert vocabulary.decode([*ids, tokenizer.eos_ids[0], 5]) == tokenizer.decode(ids)
    assert vocabulary.eos_id == tokenizer.eos_ids[0]
    assert vocabulary.bos_id == tokenizer.bos_id
    assert vocabulary.vocab_size == tokenizer.vocab_size
    assert vocabulary == TokenizerVocabulary(load_tokenizer(HERE / name))


def test_seqio_makes_no_batches_of_a_tokenizer_whose_0_is_text():
    for tokenizer in (ByteTokenizer(), *(load_tokenizer(HERE / name) for name in ("gemma", "mistral", "t5"))):
        check_padding(tokenizer)
    codec = Codec(load_tokenizer(HERE / "qwen"), Templates(), Lengths(inputs=20, targets=10))
    row = {"prompt": "the fox", "chosen": "jumps!", "rejected": "dog"}
    records = tf.data.Dataset.from_tensors(row)
    # pit_jax reads without lengths, and pads by itself.
    (example,) = tokenize_view(records, view="sft_policy", codec=codec).as_numpy_iterator()
    assert 0 in example["targets"]
    with pytest.raises(DataError, match="pad with 0 .* but in this tokenizer it is '!' and padding is"):
        tokenize_view(records, {"inputs": 20, "targets": 10}, view="sft_policy", codec=codec)
