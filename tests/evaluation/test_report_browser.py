"""The report in a real browser: from disk, without a network, with scripts and without, by mouse and by keyboard."""

import pytest
from etils import epath

from pit_jax.evaluation import report_writer

from . import reports

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return report_writer.write(reports.whole(), epath.Path(tmp_path_factory.mktemp("report")))


def _open(browser, path, **settings):
    """Return a page, and a list of everything it may not do: requests, errors, words on the console, dialogs."""
    context = browser.new_context(viewport={"width": 1200, "height": 800}, **settings)
    page, faults = context.new_page(), []

    def intercept(route):
        if route.request.url == f"file://{path}":
            route.continue_()
        else:
            faults.append(route.request.url)
            route.abort()

    context.route(lambda url: not url.startswith("data:"), intercept)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text))
    page.on("dialog", lambda dialog: faults.append(dialog.message))
    page.goto(f"file://{path}")
    return page, faults


@pytest.fixture
def opened(browser, written):
    page, faults = _open(browser, written, permissions=["clipboard-read", "clipboard-write"])
    yield page, faults
    page.context.close()


def _shown(page):
    """Return (prompt number, system) of the cards that are shown."""
    found = page.evaluate(
        """() => Array.from(document.querySelectorAll(".card"))
        .filter((card) => card.getClientRects().length > 0)
        .map((card) => [Number(card.querySelector("h3").textContent.match(/number (\\d+)/)[1]),
                        card.querySelectorAll("h4")[1].textContent])"""
    )
    return [tuple(entry) for entry in found]


def _expected(judge="exact", outcomes=("win", "lose", "tie", "none"), keep=lambda example: True):
    """Return the same from the examples."""
    found = []
    for example in reports.examples():
        said = {opinion.judge: opinion.outcome for opinion in example.said}
        if said.get(judge, "none") in outcomes and keep(example):
            found.append((int(example.prompt.split()[2].rstrip(":")), example.system))
    return found


def test_it_opens_from_disk_and_asks_for_nothing(opened):
    page, faults = opened
    assert page.title() == "A <run>: does it improve?"
    assert page.locator("figure img").count() == 14
    assert page.evaluate("Array.from(document.images).every((image) => image.naturalWidth > 300)")
    assert (
        page.evaluate("performance.getEntriesByType('resource').filter((e) => !e.name.startsWith('data:')).length") == 0
    )
    assert page.evaluate("window.hacked") is None
    page.click("nav a[href='#side-by-side']")
    assert page.locator("#side-by-side").bounding_box()["y"] < 100
    assert faults == []


def test_nothing_but_the_pages_own_script_can_run(opened):
    page, faults = opened
    page.evaluate("document.body.append(Object.assign(document.createElement('script'), {textContent: 'hacked = 1'}))")
    page.evaluate("document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.1:9/spy.png'}))")
    page.wait_for_function("document.images[document.images.length - 1].complete")
    assert page.evaluate("window.hacked") is None
    assert len(faults) == 2 and all("Content Security Policy" in fault for fault in faults)


@pytest.mark.parametrize("scripts", [True, False])
def test_boxes_show_and_hide_by_who_won(browser, written, scripts):
    page, faults = _open(browser, written, java_script_enabled=scripts)

    def visible():
        cards = page.locator(".card")
        return [i for i in range(cards.count()) if cards.nth(i).is_visible()]

    numbers = {
        name: [i for i, e in enumerate(reports.examples()) if e.outcome == name] for name in ("win", "lose", "tie")
    }
    assert page.locator("#tools").is_visible() == scripts
    assert len(visible()) == 18
    page.uncheck("#show-win")
    assert visible() == sorted(numbers["lose"] + numbers["tie"])
    page.uncheck("#show-tie")
    assert visible() == numbers["lose"]
    page.check("#show-win")
    page.uncheck("#show-lose")
    assert visible() == numbers["win"]
    assert faults == []
    page.context.close()


def test_another_judge_decides_who_won(opened):
    page, faults = opened
    page.uncheck("#show-lose")
    page.uncheck("#show-tie")
    page.uncheck("#show-none")
    for judge in ("r_p", "exact", "gpt <4>"):
        page.select_option("#judge", label=judge)
        assert _shown(page) == _expected(judge, ("win",))
    assert page.text_content("#count") == "0 of 18 shown"
    page.check("#show-none")
    assert _shown(page) == _expected("gpt <4>", ("none",))
    assert page.text_content("#count") == "18 of 18 shown"
    assert faults == []


def test_system_search_and_disagreement_go_together(opened):
    page, faults = opened
    page.select_option("#system", label="self_refine")
    assert _shown(page) == _expected(keep=lambda e: e.system == "self_refine")
    assert page.text_content("#count") == "9 of 18 shown"
    page.check("#split")
    differ = _expected(keep=lambda e: e.system == "self_refine" and len({o.outcome for o in e.said} - {"none"}) > 1)
    assert 0 < len(differ) < 9 and _shown(page) == differ
    page.uncheck("#split")
    page.select_option("#system", label="all")
    page.fill("#search", "BOLD second")
    found = _expected(keep=lambda e: "bold" in f"{e.prompt} {e.original} {e.improved}")
    assert 0 < len(found) < 18 and _shown(page) == found
    page.fill("#search", "no such word")
    assert _shown(page) == [] and page.text_content("#count") == "0 of 18 shown"
    page.fill("#search", "<img ONERROR=")
    assert len(_shown(page)) > 0
    page.fill("#search", "")
    assert len(_shown(page)) == 18
    assert faults == []


def test_everything_is_within_reach_of_the_keyboard(opened):
    page, faults = opened
    page.focus("#show-win")
    page.keyboard.press("Space")
    assert _shown(page) == _expected(outcomes=("lose", "tie"))
    reached = []
    for _ in range(7):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id"))
    assert reached == ["show-lose", "show-tie", "show-none", "judge", "system", "split", "search"]
    page.keyboard.type("number 2")
    assert _shown(page) == [(2, "pit"), (2, "self_refine")]
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "scroll"  # a table, to be scrolled by arrows
    assert page.evaluate("Array.from(document.querySelectorAll('.scroll')).every((e) => e.tabIndex === 0)")
    assert faults == []


def test_what_is_needed_to_rerun_is_copied_whole(opened):
    page, faults = opened
    rerun = reports.whole().rerun
    page.click("#run-it-again summary:has-text('configuration')")
    for title, text in rerun.parts().items():
        part = page.locator("#run-it-again details", has=page.locator(f"summary:text-is('{title}')"))
        part.evaluate("(element) => { element.open = true; }")
        part.locator("button").click()
        part.locator("button", has_text="Copied").wait_for()
        assert page.evaluate("navigator.clipboard.readText()") == text
    assert faults == []


def test_a_browser_that_copies_nothing_selects(browser, written):
    page, faults = _open(browser, written)
    page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(new Error('no')); }")
    page.locator("#run-it-again button").first.click()
    page.locator("button", has_text="Selected").wait_for()
    assert page.evaluate("getSelection().toString()") == reports.whole().rerun.command
    assert faults == []
    page.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 420])
def test_it_fits_the_screen_in_both_colours(browser, written, scheme, width):
    page, faults = _open(browser, written, color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 800})
    page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true;")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    left, right = (page.locator(".pair").nth(1).locator("> div").nth(i).bounding_box() for i in (0, 1))
    assert (right["x"] > left["x"] + 100) == (width == 1200)
    assert (right["y"] >= left["y"] + left["height"]) == (width < 1200)
    # Text stands out from what is behind it (WCAG asks for 4.5 to 1).
    canvas, text = page.evaluate(
        """() => { const probe = document.body.appendChild(document.createElement("i"));
        probe.style.color = "Canvas";
        const found = [probe, document.body].map((element) => getComputedStyle(element).color);
        probe.remove(); return found.map((color) => color.match(/\\d+/g).slice(0, 3).map(Number)); }"""
    )
    assert (sum(canvas) < sum(text)) == (scheme == "dark")
    assert _contrast(canvas, text) > 7
    assert faults == []
    page.context.close()


def _contrast(one, other):
    """Return the contrast of two colours (WCAG 2.2, relative luminance)."""
    light = []
    for colour in (one, other):
        parts = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        light.append(0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2])
    return (max(light) + 0.05) / (min(light) + 0.05)
