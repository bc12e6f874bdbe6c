import dataclasses
import gzip
import json
import lzma
import pathlib
import shutil

import pytest

from pit_jax.core.errors import ConfigError, DataError
from pit_jax.data.folds import Folds
from pit_jax.data.open import DataSpec, open_examples, open_records, write_view_cache
from pit_jax.data.readers import ReadConfig, ReadReport, find_files, read_documents, read_jsonl
from pit_jax.text.chat_template import TemplateChat, chat_templates
from pit_jax.text.codec import Codec, Lengths
from pit_jax.text.tokenizer import load_tokenizer

SKIP = ReadConfig(on_bad_record="skip", max_line_bytes=300)
FAIL = ReadConfig(max_line_bytes=300)


def line(n, chosen="a", rejected="b"):
    return json.dumps({"prompt": f"question {n}", "chosen": chosen, "rejected": rejected}).encode() + b"\n"


def write(path, *lines):
    opened = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opened(path, "wb") as file:
        file.writelines(lines)
    return path


def prompts(paths, config=FAIL, report=None):
    return [record.prompt for record in read_jsonl(paths, config, report or ReadReport())]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.xz"])
def test_plain_and_compressed_files_read_alike(tmp_path, name):
    path = write(tmp_path / name, line(1), line(2).rstrip(b"\n"))
    report = ReadReport()
    assert prompts(path, report=report) == ["question 1", "question 2"]
    assert (report.files, report.lines, report.records, report.bad_count) == (1, 2, 2, 0)


def test_globs_are_sorted_and_lists_keep_their_order(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.jsonl.gz"):
        write(tmp_path / name, line(name))
    assert prompts(f"{tmp_path}/*.jsonl*") == [f"question {n}" for n in ("a.jsonl", "b.jsonl", "c.jsonl.gz")]
    assert prompts([tmp_path / "b.jsonl", str(tmp_path / "a.*")]) == ["question b.jsonl", "question a.jsonl"]


def test_reading_is_lazy(tmp_path):
    path = write(tmp_path / "a.jsonl", line(1), b"broken\n")
    records = read_jsonl(path, FAIL, ReadReport())
    assert next(records).prompt == "question 1"
    with pytest.raises(DataError, match="a.jsonl:2: is not JSON"):
        next(records)


BAD = {
    b"{broken\n": "is not JSON",
    b"\xff\xfe{}\n": "is not UTF-8 .byte 1 of the line is 0xff",
    b"[1, 2]\n": "must be a JSON object, not list",
    b'{"prompt": "p", "chosen": "a"}\n': "field 'rejected' is missing",
    b'{"prompt": "p", "chosen": 3, "rejected": "b"}\n': "field 'chosen' must be a text",
    b'{"prompt": "p", "chosen": "", "rejected": "b"}\n': "field 'chosen' is empty",
    b"\n": "the line is empty",
    b" \r\n": "the line is empty",
    b'{"prompt": "' + b"x" * 400 + b'"}\n': "has more than 300 bytes",
    b"[" * 290 + b"\n": "is not JSON",
}


@pytest.mark.parametrize(("bad", "message"), BAD.items(), ids=[text[:20] for text in BAD.values()])
def test_bad_lines_are_named_by_file_and_line_and_fail_or_are_skipped(tmp_path, bad, message):
    path = write(tmp_path / "a.jsonl", line(1), bad, line(3))
    with pytest.raises(DataError, match=f"a.jsonl:2: .*{message}.*--on-bad-record=skip"):
        prompts(path)
    report = ReadReport()
    assert prompts(path, SKIP, report) == ["question 1", "question 3"]
    assert (report.lines, report.records, report.bad_count) == (3, 2, 1)
    assert report.bad[0].startswith(f"{path}:2: ")


def test_a_line_may_be_as_long_as_the_limit(tmp_path):
    text = line(1, chosen="x" * 200)
    path = write(tmp_path / "a.jsonl", text, line(2))
    for limit, expected in ((len(text) - 1, 2), (len(text) - 2, 1)):
        config = ReadConfig(on_bad_record="skip", max_line_bytes=limit)
        assert len(prompts(path, config)) == expected


def test_many_bad_lines_are_all_counted_but_not_all_kept(tmp_path):
    report = ReadReport()
    assert prompts(write(tmp_path / "a.jsonl", *[b"x\n"] * 100), SKIP, report) == []
    assert (report.bad_count, len(report.bad)) == (100, ReadReport.MOST_SHOWN)


def test_byte_order_mark_and_windows_line_ends_are_accepted(tmp_path):
    path = write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + line(1).replace(b"\n", b"\r\n"), line(2))
    assert prompts(path) == ["question 1", "question 2"]


def test_duplicates_and_contradictions_are_counted_and_kept(tmp_path):
    path = write(
        tmp_path / "a.jsonl", line(1), line(1), line(1, "b", "a"), line(2), line(3, "a", "a"), line(3, "b", "a")
    )
    report = ReadReport()
    assert len(prompts(path, report=report)) == 6
    assert (report.duplicates, report.contradictions) == (1, 1)
    assert "1 duplicates" in report.summary()


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.xz"])
def test_damaged_compressed_files_are_named(tmp_path, name):
    path = write(tmp_path / name, *[line(n) for n in range(2000)])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=f"{name}: the compressed file breaks off or is damaged after line"):
        prompts(path, SKIP)
    path.write_bytes(b"no archive")
    with pytest.raises(DataError, match="damaged after line 0"):
        prompts(path, SKIP)


def test_missing_files_are_named_with_the_nearest(tmp_path):
    write(tmp_path / "train.jsonl", line(1))
    with pytest.raises(DataError, match="no such file. Did you mean 'train.jsonl'"):
        find_files(tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match="no file matches"):
        find_files(f"{tmp_path}/*.csv")
    with pytest.raises(DataError, match="is a directory"):
        find_files(tmp_path)
    with pytest.raises(DataError, match="No data file is given"):
        find_files([])


def test_settings_are_checked():
    with pytest.raises(ConfigError, match="on_bad_record"):
        ReadConfig(on_bad_record="ignore")
    with pytest.raises(ConfigError, match="max_line_bytes"):
        ReadConfig(max_line_bytes=0)


def texts(path, unit="line", config=FAIL):
    return [document.text for document in read_documents(path, config, ReadReport(), unit=unit)]


def test_documents_from_json_lines_and_from_text(tmp_path):
    rows = (json.dumps({"text": "one\n\ntwo", "id": "x"}).encode() + b"\n", b'{"text": "three"}\n')
    assert texts(write(tmp_path / "a.jsonl.gz", *rows)) == ["one\n\ntwo", "three"]
    plain = write(tmp_path / "a.txt", b"one\n", b"\n", b"  two \n")
    assert texts(plain) == ["one", "  two "]
    assert texts(plain, unit="file") == ["one\n\n  two "]
    first = next(read_documents(tmp_path / "a.jsonl.gz", FAIL, ReadReport()))
    assert (first.id, first.group) == ("x", "x")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b'{"txt": "x"}\n', "field 'text' is missing"),
        (b'{"text": 3}\n', "must be a text, not int"),
        (b"x\n", "not JSON"),
    ],
)
def test_bad_documents_are_named(tmp_path, row, message):
    path = write(tmp_path / "a.jsonl", b'{"text": "good"}\n', row)
    with pytest.raises(DataError, match=f"a.jsonl:2: .*{message}"):
        texts(path)
    assert texts(path, config=SKIP) == ["good"]


def test_text_that_is_not_utf8_is_named(tmp_path):
    path = write(tmp_path / "a.txt", b"good\n", b"b\xe4d\n")
    with pytest.raises(DataError, match="a.txt:2: is not UTF-8 .byte 2"):
        texts(path)
    assert texts(path, config=SKIP) == ["good"]
    with pytest.raises(DataError, match="a.txt: is not UTF-8"):
        texts(path, unit="file")


def test_a_chat_template_writes_the_prompts_of_files_and_caches(tmp_path):
    folder = tmp_path / "gemma"
    shutil.copytree(pathlib.Path(__file__).parent / "hf_tokenizers" / "gemma", folder)
    path = write(tmp_path / "a.jsonl", line(1))
    codec = Codec(load_tokenizer(folder), chat_templates(folder), Lengths(inputs=60, targets=10))

    def opened(**source):
        read = ReadConfig(chat=TemplateChat(path=str(folder)))
        return DataSpec(read=read, folds=Folds(validation_fraction=0), **source)

    def texts(spec):
        return [record.prompt for record in open_records(spec, "train")]

    spec = opened(path=str(path))
    assert texts(spec) == ["<start_of_turn>user\nquestion 1"]
    (example,) = open_examples(spec, view="evaluate", split="train", codec=codec)
    row = codec.policy_prompt(example["prompt"].tolist())
    whole = "<bos><start_of_turn>user\nquestion 1<end_of_turn>\n<start_of_turn>model\n"
    assert list(row.ids) == codec.tokenizer.encode(whole)
    for view in ("evaluate", "records"):
        write_view_cache(spec, tmp_path / "cache", view=view, split="train", codec=codec)
    cached = opened(cache=str(tmp_path / "cache"))
    assert texts(cached) == texts(spec)
    assert len(open_examples(cached, view="evaluate", split="train", codec=codec)) == 1
    # Another template is other data, in memory as on disk, although no setting has changed.
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = config["chat_template"].replace("start_of_turn", "turn")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert texts(opened(path=str(path))) == ["<turn>user\nquestion 1"]
    for stale in (opened(cache=cached.cache), dataclasses.replace(cached, read=ReadConfig())):
        with pytest.raises(DataError, match="cache"):
            texts(stale)
        with pytest.raises(DataError, match="cache"):
            open_examples(stale, view="evaluate", split="train", codec=codec)
