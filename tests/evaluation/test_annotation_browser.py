"""The annotation page in a real browser: from disk, without a network, by keyboard and by mouse."""

import numpy as np
import pytest

from pit_jax.evaluation.annotation import Pack, write_pack
from pit_jax.evaluation.annotation_votes import read_votes
from pit_jax.evaluation.pairwise import Question

pytestmark = pytest.mark.browser

EVIL = '</script><script>window.hacked = 1</script><img src="x" onerror="window.hacked = 1"><!-- \u2028'
QUESTIONS = [
    Question(f"Prompt {i} <b>bold</b> & {EVIL}", f"=good {i}\r\nsecond line {EVIL}", f"bad {i} 'quoted' \"twice\"")
    for i in range(6)
]


@pytest.fixture
def opened(browser, tmp_path):
    """Return a page on the pack of ann, the pack's place, and a list of everything the page may not do."""
    pack = Pack(annotators=("ann", "bob"), seed=3, title="Which <one>?")
    path, _ = write_pack(QUESTIONS, pack, tmp_path / "out", key=tmp_path / "key.json")
    context = browser.new_context(offline=True, accept_downloads=True, viewport={"width": 1200, "height": 800})
    page, faults = context.new_page(), []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text))
    page.on(
        "request", lambda request: None if request.url.startswith(("file:", "blob:")) else faults.append(request.url)
    )
    page.on("dialog", lambda dialog: faults.append(dialog.message))
    page.goto(f"file://{path}")
    yield page, tmp_path, faults
    context.close()


def _press_better(page):
    """Vote for the good response by its key, as somebody who reads would."""
    page.keyboard.press("1" if page.text_content("#left-text").startswith("=good") else "3")


def _save(page, button, path):
    with page.expect_download() as download:
        page.click(button)
    download.value.save_as(path)
    return path


def test_votes_by_keyboard_come_back_through_both_downloads(opened):
    page, place, faults = opened
    for _ in QUESTIONS:
        _press_better(page)
    assert page.text_content("#count") == "6 of 6 done"
    assert page.is_visible("#done")
    assert not page.is_visible("#question")
    page.keyboard.press("1")
    files = [_save(page, "#json", place / "votes_ann.json"), _save(page, "#csv", place / "votes_ann.csv")]
    for chosen in ([files[0]], [files[1]]):
        people = read_votes(place / "key.json", chosen)
        assert [verdict.outcome for verdict in people.verdicts(QUESTIONS)] == [1.0] * 6
    assert read_votes(place / "key.json", files).repeated == 6
    assert faults == []


def test_texts_are_shown_as_they_are_and_never_run(opened):
    page, _, faults = opened
    shown = {page.evaluate(f"document.getElementById('{side}-text').textContent") for side in ("left", "right")}
    assert any(shown == {question.first, question.second} for question in QUESTIONS)
    assert page.evaluate("window.hacked") is None
    assert page.title() == "Which <one>?"
    assert page.locator("img").count() == 0
    # Nor can a script that got into the page by other ways.
    page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.hacked = 2'}))"
    )
    assert page.evaluate("window.hacked") is None
    assert len(faults) == 1
    assert "Content Security Policy" in faults[0]


def test_undo_brings_the_question_back_and_votes_survive_a_reload(opened):
    page, _, faults = opened
    first = page.text_content("#prompt-text")
    page.keyboard.press("2")
    second = page.text_content("#prompt-text")
    page.keyboard.press("ArrowLeft")
    assert page.text_content("#count") == "2 of 6 done"
    page.keyboard.press("u")
    assert page.text_content("#prompt-text") == second
    page.keyboard.press("Backspace")
    assert page.text_content("#prompt-text") == first
    assert page.is_disabled("#undo")
    page.keyboard.press("Control+1")
    assert page.text_content("#count") == "0 of 6 done"
    page.click("button[data-vote=right]")
    page.click("button[data-vote=tie]")
    third = page.text_content("#prompt-text")
    page.reload()
    assert page.text_content("#count") == "2 of 6 done"
    assert page.text_content("#prompt-text") == third
    page.click("#undo")
    assert page.text_content("#prompt-text") == second
    assert faults == []


def test_a_browser_that_keeps_nothing_says_so(browser, tmp_path):
    path, *_ = write_pack(QUESTIONS, Pack(annotators=("ann",), seed=3), tmp_path / "out", key=tmp_path / "key.json")
    page = browser.new_page()
    page.add_init_script("Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); };")
    page.goto(f"file://{path}")
    assert page.is_visible("#warning")
    _press_better(page)
    votes = _save(page, "#json", tmp_path / "votes.json")
    outcomes = read_votes(tmp_path / "key.json", [votes]).outcomes
    assert outcomes[~np.isnan(outcomes)].tolist() == [1.0]
    page.close()


def test_it_fits_a_telephone(opened):
    page, _, _ = opened
    page.set_viewport_size({"width": 360, "height": 640})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    left, right = (page.locator(f"#{side}-text").bounding_box() for side in ("left", "right"))
    assert right["y"] > left["y"] + left["height"]
