"""`pit-jax improve` in use: rows as they come, going on after an interruption, pipes and a terminal."""

from __future__ import annotations

import fcntl
import json
import os
import pathlib
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pit_jax.core.errors import ConfigError, DataError
from pit_jax.sharding import processes
from pit_jax.stages import improve as module
from pit_jax.stages import improve_typed
from pit_jax.stages.improve import Draft, Request, Session, improve_file
from pit_jax.stages.improve_output import AtTheEnd, PartFile
from pit_jax.stages.improve_typed import Lines, printable, shown, word_diff

ROOT = pathlib.Path(__file__).parents[2]
PROMPTS = [
    "goal from oak by red blue end thanks",
    "goal from mill by blue red",
    "from barn by red red end cheers",
    "from farm by blue blue",
    "goal from oak by red blue end thanks",
]


@pytest.fixture
def drafts(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "drafts.jsonl"
    rows = [{"prompt": prompt} | ({"response": "inn via inn"} if n == 1 else {}) for n, prompt in enumerate(PROMPTS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines_of(path: pathlib.Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def improved(whole: pathlib.Path, drafts: pathlib.Path, **changes: Any) -> list[dict[str, Any]]:
    output = drafts.with_name("out.jsonl")
    improve_file(Request(checkpoint=str(whole), input=str(drafts), output=str(output), **changes))
    return lines_of(output)


def stopping(after: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Make sessions stop by Ctrl-C when so many portions are done; return the sizes of the portions, as they come."""
    sizes: list[int] = []
    rows = Session.rows

    def counted(session: Session, portion: list[Draft]) -> list[dict[str, Any]]:
        if len(sizes) == after:
            raise KeyboardInterrupt
        sizes.append(len(portion))
        return rows(session, portion)

    monkeypatch.setattr(Session, "rows", counted)
    return sizes


# --- Files -----------------------------------------------------------------------------------------------------------


def test_an_interrupted_command_goes_on_and_gives_the_same_rows(
    whole: pathlib.Path, drafts: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BATCH", 2)
    wanted = improved(whole, drafts)
    output, part = drafts.with_name("out.jsonl"), drafts.with_name("out.jsonl.part")
    output.write_text("before")
    with monkeypatch.context() as patch:
        assert stopping(2, patch) == []
        with pytest.raises(KeyboardInterrupt):
            improved(whole, drafts)
    assert output.read_text() == "before"
    assert lines_of(part)[1:] == wanted[:4], "rows are on the disk as soon as they are there"
    with part.open("a") as file:
        file.write('{"prompt": "half a li')
    with monkeypatch.context() as patch:
        sizes = stopping(9, patch)
        assert improved(whole, drafts) == wanted
        assert sizes == [1], "only what was missing is computed"
    assert not part.exists()


@pytest.mark.slow
def test_portions_change_nothing(whole: pathlib.Path, drafts: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = improved(whole, drafts, iterations=2, accept="always", candidates=1)
    monkeypatch.setattr(module, "_BATCH", 2)
    monkeypatch.setattr(module, "_PORTIONS", 1)
    many = improved(whole, drafts, iterations=2, accept="always", candidates=1)
    assert [row["improved"] for row in many] == [row["improved"] for row in one]
    assert [row["response"] for row in many] == [row["response"] for row in one]
    assert one[0]["response"] != one[4]["response"] or one[0]["improved"] != one[4]["improved"], "numbers count"


def test_rows_left_by_another_command_are_refused(
    whole: pathlib.Path, drafts: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BATCH", 2)
    with monkeypatch.context() as patch:
        stopping(1, patch)
        with pytest.raises(KeyboardInterrupt):
            improved(whole, drafts)
    part = drafts.with_name("out.jsonl.part")
    kept = part.read_bytes()
    with pytest.raises(DataError, match=r"out.jsonl.part was begun by another command: seed = 0 there, 5 here"):
        improved(whole, drafts, seed=5)
    given = drafts.read_text()
    drafts.write_text(given.replace("inn via inn", "inn via mill"))
    with pytest.raises(DataError, match="row 2 is of another prompt or response than the input's"):
        improved(whole, drafts)
    drafts.write_text("".join(reversed(given.splitlines(keepends=True))))
    with pytest.raises(DataError, match=r"row \d is of another prompt or response than the input's"):
        improved(whole, drafts)
    drafts.write_text(json.dumps({"prompt": PROMPTS[0]}) + "\n")
    with pytest.raises(DataError, match="row 2 is of another prompt"):
        improved(whole, drafts)
    assert part.read_bytes() == kept
    foreign = (b"rows", b"rows\n", b'{"prompt": 1}\n')
    for content, named in ((kept + b"rows\n", "not JSON"), *((other, "no settings") for other in foreign)):
        part.write_bytes(content)
        with pytest.raises(DataError, match=named):
            improved(whole, drafts)
        assert part.read_bytes() == content


def test_two_commands_cannot_write_one_file(tmp_path: pathlib.Path) -> None:
    output = PartFile(str(tmp_path / "out"), {"seed": 1})
    with open(tmp_path / "out.part", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="is being written by another process"):
            output.begin()
        output.close()
    assert PartFile(str(tmp_path / "out"), {"seed": 1}).begin() == []


def test_where_nothing_can_be_appended_the_file_comes_at_the_end(tmp_path: pathlib.Path) -> None:
    output = AtTheEnd(str(tmp_path / "out"))
    assert output.begin() == []
    output.add([{"a": 1}])
    assert not list(tmp_path.iterdir())
    output.add([{"a": "é"}])
    output.finish()
    assert (tmp_path / "out").read_text() == '{"a": 1}\n{"a": "é"}\n'


def test_rows_are_printed_as_they_come(
    whole: pathlib.Path, drafts: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "_BATCH", 2)
    stopping(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        improve_file(Request(checkpoint=str(whole), input=str(drafts)))
    assert [json.loads(line)["prompt"] for line in capsys.readouterr().out.splitlines()] == PROMPTS[:4]


def test_margin_and_chat_reach_the_improver(whole: pathlib.Path, drafts: pathlib.Path) -> None:
    rows = improved(whole, drafts, margin=1e6)
    assert not any(row["changed"] for row in rows)
    with pytest.raises(ConfigError, match="Improve.margin = -1"):
        improved(whole, drafts, margin=-1.0)
    session = Session(Request(checkpoint=str(whole), chat=True))
    said, plain = (
        session.draft({"prompt": "from oak"}),
        session.draft({"prompt": [{"role": "user", "content": "from oak"}]}),
    )
    assert said.text == plain.text == "\n\nHuman: from oak\n\nAssistant:" and said.given == "from oak"
    for field in ("prompt", "response"):
        with pytest.raises(DataError, match=f"'{field}' holds half of a surrogate pair"):
            session.draft({"prompt": "from oak", field: "\ud800"})


# --- Pipes -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bytes], None]]:
    """Standard input as a pipe; the function writes to it and closes it."""
    reading, writing = os.pipe()
    with os.fdopen(reading) as stream:
        monkeypatch.setattr(sys, "stdin", stream)

        def write(data: bytes) -> None:
            os.write(writing, data)
            os.close(writing)

        yield write


def test_piped_lines_are_those_of_a_file(
    whole: pathlib.Path, tmp_path: pathlib.Path, pipe: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "drafts.jsonl"
    source.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    wanted = improved(whole, source)
    pipe(b"\xef\xbb\xbf" + "\r\n\n".join(PROMPTS).encode())
    improve_typed.improve_typed(Request(checkpoint=str(whole)))
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == wanted


@pytest.mark.parametrize("left", [0, 2, 5])
def test_a_pipe_goes_on_after_an_interruption(
    whole: pathlib.Path, tmp_path: pathlib.Path, pipe: Any, monkeypatch: pytest.MonkeyPatch, left: int
) -> None:
    request = Request(checkpoint=str(whole), output=str(tmp_path / "out.jsonl"))
    session = Session(request)
    wanted = session.rows([session.draft({"prompt": prompt}) for prompt in PROMPTS])
    output = PartFile(str(tmp_path / "out.jsonl"), session.settings())
    output.begin()
    output.add(wanted[:left])
    output.close()
    pipe("\n".join(PROMPTS).encode())
    sizes = stopping(9, monkeypatch)
    improve_typed.improve_typed(request)
    assert lines_of(tmp_path / "out.jsonl") == wanted and sum(sizes) == 5 - left


def test_pipes_that_hold_something_else_are_refused(
    whole: pathlib.Path, tmp_path: pathlib.Path, pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = Request(checkpoint=str(whole), output=str(tmp_path / "out.jsonl"))
    output = PartFile(str(tmp_path / "out.jsonl"), Session(request).settings())
    output.begin()
    output.add([{"prompt": "another", "response": "r"}])
    output.close()
    pipe("\n".join(PROMPTS).encode())
    with pytest.raises(DataError, match="row 1 is of another prompt"):
        improve_typed.improve_typed(request)
    monkeypatch.setattr(processes, "count", lambda: 2)
    with pytest.raises(ConfigError, match="Give all of them --input=FILE"):
        improve_typed.improve_typed(request)


def test_a_bad_line_of_a_pipe_is_named_after_the_rows_before_it(
    whole: pathlib.Path, pipe: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe(b"from oak by red\n\xff\nfrom oak by blue\n")
    with pytest.raises(DataError, match="standard input:2: is not UTF-8.*--on-bad-record=skip"):
        improve_typed.improve_typed(Request(checkpoint=str(whole)))
    assert [json.loads(line)["prompt"] for line in capsys.readouterr().out.splitlines()] == ["from oak by red"]


def test_an_empty_pipe_is_an_error(whole: pathlib.Path, pipe: Any) -> None:
    pipe(b"\n  \n")
    with pytest.raises(DataError, match="no line to improve"):
        improve_typed.improve_typed(Request(checkpoint=str(whole)))


def test_bad_lines_of_a_pipe_can_be_left_out(
    whole: pathlib.Path, pipe: Any, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    pipe(b"from oak by red\n\xff\nfrom oak by blue\n")
    improve_typed.improve_typed(Request(checkpoint=str(whole), on_bad_record="skip"))
    assert [json.loads(line)["prompt"][-4:] for line in capsys.readouterr().out.splitlines()] == [" red", "blue"]
    assert "standard input:2" in caplog.text


def test_lines_come_as_soon_as_they_are_whole() -> None:
    reading, writing = os.pipe()
    try:
        lines = Lines(reading)
        os.write(writing, b"one\ntwo\n\nthr")
        assert [line.text for line in lines.take(5)] == ["one", "two"]
        os.write(writing, b"ee\nfour\nfive\n")
        assert [line.text for line in lines.take(2)] == ["three", "four"]
        assert [(line.text, line.place) for line in lines.take(2)] == [("five", "standard input:6")]
        os.write(writing, b"six")
        os.close(writing)
        assert [line.text for line in lines.take(5)] == ["six"] and lines.take(5) == []
    finally:
        os.close(reading)


def test_what_is_no_line_is_an_error() -> None:
    reading, writing = os.pipe()
    try:
        os.write(writing, b"short\n" + b"x" * 100)
        os.close(writing)
        with pytest.raises(DataError, match=r"standard input:2: the line has more than 50 bytes"):
            Lines(reading, most_bytes=50).take(1)
    finally:
        os.close(reading)


# --- What people see -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "marked"),
    [
        ("a b c", "a b c", "a b c"),
        ("a b c", "a x c", "a [-b-] {+x+} c"),
        ("a b", "a b c d", "a b {+c d+}"),
        ("a b c", "c", "[-a b-] c"),
        ("", "a b", "{+a b+}"),
        ("a b", "", "[-a b-]"),
        ("a\nb", "a\n\nc", "a\n\n[-b-] {+c+}"),
        (" a", " a b", " a {+b+}"),
    ],
)
def test_differences_are_marked_word_by_word(old: str, new: str, marked: str) -> None:
    assert word_diff(old, new, colour=False) == marked


def test_marks_lead_back_to_both_texts() -> None:
    old, new = "the cat sat on the mat today", "a cat sat upon the red mat"
    marked = word_diff(old, new, colour=False)
    without = re.sub(r"\{\+(.*?)\+\} ?", "", marked)
    assert re.sub(r"\[-(.*?)-\]", r"\1", without).split() == old.split()
    without = re.sub(r"\[-(.*?)-\] ?", "", marked)
    assert re.sub(r"\{\+(.*?)\+\}", r"\1", without).split() == new.split()
    coloured = word_diff(old, new, colour=True)
    assert "\x1b[32ma\x1b[0m" in coloured and re.sub(r"\x1b\[[0-9;]*m", "", coloured).split()[:3] == ["the", "a", "cat"]


def test_models_cannot_write_to_the_terminal() -> None:
    assert (
        printable("a\x1b[2Jb\x07\r\x9bc\n\té")
        == "a\N{REPLACEMENT CHARACTER}[2Jb" + "\N{REPLACEMENT CHARACTER}" * 3 + "c\n\té"
    )
    step = {"proposal": "\x1b[2J", "accepted": True, "gap": 1.5, "zero": 0.25}
    row = {"prompt": "p", "response": "\x1bx", "improved": "\x1b[2J", "changed": True, "steps": [step]}
    text = shown(row, colour=False)
    assert "\x1b" not in text and "1 of 1 steps taken, r_gap +1.25" in text
    kept = row | {"changed": False, "steps": [step | {"accepted": False, "gap": None, "zero": None}]}
    assert "(kept)" in shown(kept, colour=True) and "0 of 1 steps taken\n" in shown(kept, colour=True)


OWN_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C reaches the process as a signal
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


class Terminal:
    """A real command at a pseudo-terminal."""

    def __init__(self, *flags: str) -> None:
        self._ours, theirs = pty.openpty()
        settings = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "NO_COLOR": "1", "TERM": "xterm"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWN_TERMINAL, "-m", "pit_jax", "improve", *flags],
            stdin=theirs, stdout=theirs, stderr=theirs, env=os.environ | settings, start_new_session=True,
        )  # fmt: skip
        os.close(theirs)
        self.seen = ""

    def wait_for(self, text: str, seconds: float = 300.0) -> str:
        """Return what is shown up to a text, from where the last wait ended."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            ready, _, _ = select.select([self._ours], [], [], max(end - time.monotonic(), 0.0))
            assert ready, f"{text!r} did not come: {self.seen}"
            try:
                data = os.read(self._ours, 4096)
            except OSError:  # Linux: the other side is closed.
                data = b""
            assert data, f"ended without {text!r}: {self.seen}"
            self.seen += data.decode()
        before, _, self.seen = self.seen.partition(text)
        return before

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._ours)


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def start(*flags: str) -> Terminal:
        opened.append(Terminal(*flags))
        return opened[-1]

    yield start
    for each in opened:
        each.close()


def test_a_conversation_at_a_terminal(
    whole: pathlib.Path, tmp_path: pathlib.Path, terminal: Callable[..., Terminal]
) -> None:
    output = tmp_path / "kept.jsonl"
    flags = (f"--checkpoint={whole}", "--accept=always", f"--output={output}")
    talk = terminal(*flags)
    talk.wait_for("Ctrl-D ends.")
    talk.wait_for("prompt> ")
    talk.type(f"{PROMPTS[0]}\n")
    talk.wait_for("draft > ")
    talk.type("\n")
    said = talk.wait_for("prompt> ")
    talk.type(f"{PROMPTS[1]}\n")
    talk.wait_for("draft > ")
    talk.type("inn " * 20 + "\n")
    assert "Lengths.targets = 14" in talk.wait_for("prompt> ")
    talk.type(f"{PROMPTS[1]}\n")
    talk.wait_for("draft > ")
    talk.type("inn via inn\n")
    assert "original: inn via inn" in talk.wait_for("prompt> ")
    [settings, *rows] = lines_of(tmp_path / "kept.jsonl.part")
    assert "pit-jax improve" in settings and [row["prompt"] for row in rows] == PROMPTS[:2]
    assert f"original: {rows[0]['response']}" in said and "1 of 1 steps taken" in said
    assert word_diff(rows[0]["response"], rows[0]["improved"], colour=False) in said.replace("\r", "")
    time.sleep(1.0)  # Python notices a signal between the prompt and its wait for keys only at the next key.
    talk.type("\x03")
    talk.wait_for("pit-jax improve: stopped.")
    assert talk.process.wait(60) == 130
    assert not output.exists(), "Ctrl-C keeps the part"
    again = terminal(*flags)
    again.wait_for("prompt> ")
    again.type("\x04")
    assert again.process.wait(60) == 0
    assert lines_of(output) == rows


@pytest.mark.slow
def test_the_command_reads_a_pipe(whole: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """The first row comes while the pipe is open; a reader that goes away is no error."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pit_jax", "improve", f"--checkpoint={whole}", "--temperature=0"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    try:
        for prompt in PROMPTS[:2]:
            process.stdin.write(prompt + "\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["prompt"] == prompt
        process.stdout.close()
        process.stdin.write(PROMPTS[2] + "\n")
        process.stdin.close()
        assert process.wait(120) == 0
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.mark.slow
def test_a_killed_command_goes_on(whole: pathlib.Path, tmp_path: pathlib.Path) -> None:
    source, output, part = (tmp_path / name for name in ("drafts.jsonl", "out.jsonl", "out.jsonl.part"))
    source.write_text("".join(json.dumps({"prompt": PROMPTS[n % 5]}) + "\n" for n in range(1000)))
    settings = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "pit_jax", "improve", f"--checkpoint={whole}", f"--input={source}"]
    subprocess.run([*line, f"--output={tmp_path / 'wanted'}"], env=settings, check=True)
    for rows in (1, 200):
        process = subprocess.Popen([*line, f"--output={output}"], env=settings)
        while not part.exists() or part.read_bytes().count(b"\n") <= rows:
            assert process.poll() is None, "it was to be killed"
            time.sleep(0.01)
        process.kill()
        process.wait()
        assert not output.exists()
    done = subprocess.run([*line, f"--output={output}"], env=settings, check=True, capture_output=True, text=True)
    assert "rows that are there" in done.stderr
    assert output.read_bytes() == (tmp_path / "wanted").read_bytes() and not part.exists()
