"""report.html in a headless Chromium: it runs nothing of a run's text, and its controls work."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import Page, find_chromium, open_chromium
from report_runs import RIGHT, WRONG, write_run

from lora_grpo.report.page import write_report

pytestmark = pytest.mark.skipif(
    find_chromium() is None, reason="no chromium on PATH (Debian: apt-get install chromium)"
)
HOSTILE = (
    '</script><script>window.hacked = 1</script><img src="x" onerror="window.hacked = 1">'
    "<!-- \x1b[31mred\x1b[0m \u202egnp\u202c \u2028 مرحبا"
)
TEXT = "document.body.innerText"


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    with open_chromium() as page:
        yield page


@pytest.fixture(autouse=True)
def nothing_goes_wrong(browser: Page) -> Iterator[None]:
    """No message on the console, and no address asked for but that of the file."""
    browser.problems.clear()
    browser.requests.clear()
    yield
    assert browser.problems == []
    assert all(address.startswith("file:") for address in browser.requests)
    assert len(set(browser.requests)) == 1


@pytest.fixture
def page(browser: Page, tmp_path: Path) -> Page:
    """The page of one made-up run of 6 steps and 8 test problems, 7 of them gained."""
    write_report([write_run(tmp_path / "run")], tmp_path / "report.html", ["First.", "Second."])
    browser.open(tmp_path / "report.html")
    return browser


def choose(page: Page, label: str, value: str) -> str:
    """Put a value into the visible filter of that name and return what the pager says then."""
    return page.evaluate(
        f"""(() => {{
        const labels = [...document.querySelectorAll(".filters label")];
        const found = labels.find((one) => one.offsetParent && one.firstChild.data === "{label}");
        found.lastChild.value = "{value}";
        found.lastChild.dispatchEvent(new Event("input"));
        const said = [...document.querySelectorAll("[role=status]")];
        return said.find((one) => one.offsetParent).textContent;
        }})()"""
    )


def open_training(page: Page) -> None:
    page.evaluate("document.querySelectorAll('.tabs button')[1].click()")


def test_the_first_screen_says_what_came_out(page: Page) -> None:
    text = page.evaluate(TEXT)
    assert "It learnt: strict accuracy went from 12.5 % (" in text
    assert text.index("It learnt") < text.index("First.") < text.index("Second.")
    assert "100.0 %" in text and "of step 6" in text and "0.6 min" in text
    assert "1.00 GB" in text and "2.00 GB" in text
    bottom = "document.querySelector('#verdict .side').getBoundingClientRect().bottom"
    assert page.evaluate(bottom) < 900


def test_the_charts_name_their_lines_and_what_was_not_recorded(page: Page) -> None:
    text = page.evaluate(TEXT)
    for name in ("sampled in training", "greedy, validation problems", "base, greedy"):
        assert name in text
    assert "correctness" in text and "the step whose adapter was kept (6)" in text
    assert "Not recorded: Entropy; KL from the base; Importance ratio" in text
    drawn = page.evaluate(
        """[...document.querySelectorAll("canvas")].map((canvas) => canvas.getContext("2d")
        .getImageData(0, 0, canvas.width, canvas.height).data.some((value) => value))"""
    )
    assert len(drawn) == 10 and all(drawn)


def test_hovering_and_the_arrow_keys_give_the_values_of_a_step(page: Page) -> None:
    page.evaluate("document.querySelector('figure > div').focus()")
    page.press("ArrowRight")
    legend = "document.querySelector('.u-legend').textContent"
    assert "step1all rewards0.01c" in page.evaluate(legend)
    page.press("ArrowRight")
    assert "step2all rewards0.02c" in page.evaluate(legend)
    box = page.evaluate(
        "(() => { const b = document.querySelector('.u-over').getBoundingClientRect();"
        " return [b.right - 1, b.top + 20]; })()"
    )
    page.call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])
    assert "step6all rewards0.06c" in page.evaluate(legend)


def test_the_filters_of_the_training_completions(page: Page) -> None:
    open_training(page)
    assert choose(page, "step", "4") == "group 1 of 1"
    assert "step 4" in page.evaluate(TEXT)
    assert choose(page, "step", "") == "group 1 of 3"
    some = "group 1 of 3 ({} of its 4 completions pass)".format
    assert choose(page, "answer", "yes") == some(2)
    assert choose(page, "format", "yes") == some(1)
    assert page.evaluate("document.querySelectorAll('.card:not([hidden] *) pre')[0].innerText") == (
        RIGHT
    )
    assert choose(page, "answer", "no") == "no group passes the filters"
    choose(page, "answer", ""), choose(page, "format", "")
    assert choose(page, "length", "yes") == some(1)
    choose(page, "length", "")
    choose(page, "reward from", "0.5")
    assert choose(page, "to", "1.1") == some(1)
    choose(page, "reward from", ""), choose(page, "to", "")
    assert choose(page, "text", "IT IS 3") == some(2)
    assert choose(page, "text", "no such text") == "no group passes the filters"


def test_base_and_adapter_stand_side_by_side_and_keys_go_through_them(page: Page) -> None:
    shown = "document.querySelector('#completions').innerText"
    first = page.evaluate(shown)
    assert "problem 1 of 8" in first and "test problem 1: gained" in first
    assert first.index("base") < first.index(WRONG) < first.index("1+1=2")
    page.press("j")
    page.press("j")
    page.press("k")
    assert "problem 2 of 8" in page.evaluate(shown)
    assert choose(page, "strict answer", "both right") == "problem 1 of 1"
    assert "test problem 8: both right" in page.evaluate(shown)
    page.evaluate("document.querySelector('input[type=search]').focus()")
    choose(page, "strict answer", "")
    page.press("j")  # typed into the filter
    assert page.evaluate("document.querySelector('input[type=search]').value") == "j"


def test_text_of_a_run_is_shown_as_text_and_runs_nothing(browser: Page, tmp_path: Path) -> None:
    name = "<img src=x onerror=window.hacked=1>"
    run_dir = write_run(
        tmp_path / name,
        texts=(HOSTILE + RIGHT, HOSTILE, WRONG, HOSTILE),
        question=HOSTILE,
        dataset=HOSTILE,
        system_prompt=HOSTILE,
    )
    metrics = run_dir / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace("correctness", "<b onclick=1>"))
    write_report([run_dir, run_dir], tmp_path / "two.html", [HOSTILE])
    write_report([run_dir], tmp_path / "one.html", [HOSTILE])
    browser.open(tmp_path / "one.html")
    open_training(browser)
    text = browser.evaluate(TEXT)
    assert text.count('<img src="x" onerror') >= 4 and f"\n{name}" in f"\n{text}"
    assert "␛[31mred␛[0m ⟨U+202E⟩gnp⟨U+202C⟩" in text and "<b onclick=1>" in text
    assert browser.evaluate(
        "getComputedStyle(document.querySelector('.card pre')).unicodeBidi"
    ) in (
        "plaintext",
        "isolate",
    )
    inside = "document.querySelectorAll('main img, main script, main b').length"
    assert browser.evaluate(inside) == 0
    assert browser.evaluate("typeof window.hacked") == "undefined"
    browser.requests.clear()
    browser.open(tmp_path / "two.html")
    assert f"{name} (1), {name} (2)" in browser.evaluate(TEXT)
    assert browser.evaluate("typeof window.hacked") == "undefined"


def test_a_script_that_got_into_the_page_would_be_refused(page: Page) -> None:
    page.evaluate(
        """(() => { const script = document.createElement("script");
        script.textContent = "window.hacked = 1"; document.body.append(script); })()"""
    )
    assert page.evaluate("typeof window.hacked") == "undefined"
    assert len(page.problems) == 1 and "Content Security Policy" in page.problems.pop()


def test_a_megabyte_is_shown_on_request(browser: Page, tmp_path: Path) -> None:
    texts = (RIGHT + "x" * 1_000_000, *[WRONG] * 3)
    run_dir = write_run(tmp_path / "run", steps=2, texts=texts, evaluated=False)
    write_report([run_dir], tmp_path / "report.html")
    browser.open(tmp_path / "report.html")
    length = "document.querySelector('.card pre').textContent.length"
    assert browser.evaluate(length) == 4000
    browser.evaluate("document.querySelector('.card button').click()")
    assert browser.evaluate(length) == len(texts[0])


@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("runs", [1, 3])
def test_nothing_is_wider_than_the_screen(
    browser: Page, tmp_path: Path, width: int, runs: int
) -> None:
    folders = [write_run(tmp_path / f"run-{at}", learning_rate=10.0**-at) for at in range(runs)]
    write_report(folders, tmp_path / "report.html")
    browser.open(tmp_path / "report.html", width=width)
    open_training(browser)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(
        "[...document.querySelectorAll('canvas')].every(c => c.clientWidth > 200)"
    )


def test_runs_lie_side_by_side(browser: Page, tmp_path: Path) -> None:
    folders = [write_run(tmp_path / f"run-{at}", learning_rate=10.0**-at) for at in (3, 4)]
    write_report(folders, tmp_path / "report.html")
    browser.open(tmp_path / "report.html")
    text = browser.evaluate("document.querySelector('#verdict').innerText")
    assert "learning_rate\t0.001\t0.0001" in text and "It learnt\tIt learnt" in text
    legends = browser.evaluate("document.querySelector('.u-legend').innerText")
    assert "run-3: all rewards" in legends and "run-4: all rewards" in legends
    open_training(browser)
    assert choose(browser, "run", "run-4") == "group 1 of 3"


def test_colours_follow_the_scheme_and_print_is_light(page: Page, tmp_path: Path) -> None:
    page.open(tmp_path / "report.html", scheme="dark")
    paper = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(paper)
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    light = page.evaluate(paper)
    assert light == "rgb(255, 255, 255)" != dark
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate(paper) == dark
    assert page.evaluate("document.querySelectorAll('canvas').length") == 10
