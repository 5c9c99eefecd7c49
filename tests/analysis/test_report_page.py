"""The report in a real headless Chromium: what each control does, against the recorded responses themselves.

Skipped by name where there is no Chromium, or no playwright to drive it.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recorded_runs import HOSTILE, WORDS, response, write_run

from megatron_rlvr.analysis.command.analyses import Scored, tokens
from megatron_rlvr.analysis.command.sources import Response, Source
from megatron_rlvr.analysis.report import write_report
from megatron_rlvr.analysis.results import write_result
from megatron_rlvr.recording.files import RecordedResponse

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LONG = 29_696

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium: tools/install_cluster_packages.sh installs it on Debian"
)

STEP_1 = [response(1, group, index) for group in (0, 3) for index in range(4)]
STEP_4 = [response(4, 7, index, texts=HOSTILE, tokens=80) for index in range(3)]
STEP_9 = [response(9, 2, 0, tokens=LONG), response(9, 2, 1)]


@dataclass
class Report:
    """An open report, and everything that the browser has complained of."""

    page: Any
    complaints: list[str] = field(default_factory=list)

    def texts(self, selector: str) -> list[str]:
        return self.page.locator(selector).all_inner_texts()

    def marked(self, number: int) -> list[int]:
        """Positions of the marked tokens of a response on the page."""
        return self.page.evaluate(
            """number => [...document.querySelectorAll('.response')[number].querySelectorAll('.mark')]
                .map(span => Number(span.dataset.i))""",
            number,
        )

    def go(self, step: int, group: int) -> None:
        self.page.select_option("#step", str(step))
        self.page.select_option("#group", str(group))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("report")
    one = write_run(place / "one <b>&amp;", recorded={1: STEP_1, 4: STEP_4, 9: STEP_9})
    responses = [Response(r.prompt_ids, r.token_ids, r.step, r.entropy) for r in STEP_1]
    scored = Scored(["<b>model"], [None], [np.concatenate([r.entropy for r in STEP_1])])
    for result in tokens(Source(responses, 1.0, lambda token: WORDS[token]), scored, least=1):
        write_result(one / "analysis", result)
    write_report([one, write_run(place / "two")], place / "report.html", least=1)
    return place / "report.html"


@pytest.fixture
def report(browser: Any, file: Path) -> Iterator[Report]:
    page = browser.new_page(viewport={"width": 1300, "height": 900}, color_scheme="light")
    page.set_default_timeout(60_000)
    opened = Report(page)
    page.on("console", lambda message: opened.complaints.append(message.text))
    page.on("pageerror", lambda error: opened.complaints.append(str(error)))
    page.on("request", lambda request: opened.complaints.append(request.url) if request.url != file.as_uri() else None)
    page.goto(file.as_uri())
    page.click("#tab-rollouts")
    yield opened
    assert not opened.complaints
    assert page.evaluate("window.hacked") is None
    page.close()


def test_each_tab_shows_its_part_and_arrow_keys_change_it(report: Report):
    for name, selector, least in (
        ("curves", "canvas", 12),
        ("rollouts", ".response", 4),
        ("tokens", "tbody tr", len(WORDS)),
        ("analyses", "canvas", 1),
        ("runs", "th", 8),
    ):
        report.page.click(f"#tab-{name}")
        assert report.page.locator(f"#{name} {selector}").count() >= least
        assert report.page.locator("[role=tabpanel]:visible").count() == 1
    report.page.keyboard.press("ArrowRight")
    assert report.page.locator("#curves").is_visible()
    report.page.keyboard.press("ArrowLeft")
    report.page.keyboard.press("ArrowLeft")
    assert report.page.locator("#analyses").is_visible()
    assert "<b>model" in report.texts("#analyses")[0]


def test_analyses_are_in_the_order_of_the_paper_with_marks_clouds_and_tables(report: Report):
    report.page.click("#tab-analyses")
    titles = ["Token entropies", "Tokens of highest mean entropy", "Tokens of lowest mean entropy"]
    assert report.texts("#analyses h3") == titles
    entropy = np.percentile(np.concatenate([r.entropy for r in STEP_1]).astype(np.float64), 80)
    marks = f"Dashed line: 80th percentile, {entropy:.5g}. Dotted line: 80th percentile in the paper, 0.672."
    assert report.texts("#analyses .note")[0] == marks
    clouds = report.page.locator("#analyses .cloud").all_inner_texts()
    assert len(clouds) == 2
    for word in WORDS:
        assert all(word.strip() in cloud for cloud in clouds)
    report.page.locator("#analyses summary").nth(1).click()
    table = report.page.locator("#analyses .result").nth(1).locator("details table")
    assert table.locator("th.number").all_inner_texts() == ["id", "occurrences", "mean entropy"]
    assert table.locator("tbody tr").count() == len(WORDS)


def test_a_curve_shows_the_values_of_metrics_jsonl(report: Report):
    report.page.click("#tab-curves")
    data = report.page.evaluate("JSON.parse(document.getElementById('data').textContent).curves")
    assert [panel["title"] for panel in data["panels"]][:2] == ["Evaluations", "Accuracy of sampled responses"]
    values = data["runs"][0]["values"]
    assert values["eval/held_out/accuracy"][:6] == [0.2, None, None, None, None, 0.3]
    assert values["reward/accuracy_standard_error"][3] == 0.023
    assert report.page.locator(".u-legend .end").first.is_hidden()


def test_the_mask_of_training_is_marked_until_the_slider_moves_and_then_the_fraction_of_the_step(report: Report):
    report.go(1, 3)
    here = STEP_1[4:]
    for number, recorded in enumerate(here):
        assert report.marked(number) == np.flatnonzero(recorded.selected).tolist()
    entropies = np.concatenate([np.rint(r.entropy.astype(np.float64) * 1000) for r in STEP_1])
    for percent in (0, 5, 50, 100):
        report.page.fill("#fraction", str(percent))
        count = int(np.ceil(percent / 100 * len(entropies)))
        threshold = np.sort(entropies)[-count] if count else np.inf
        for number, recorded in enumerate(here):
            expected = np.flatnonzero(np.rint(recorded.entropy.astype(np.float64) * 1000) >= threshold)
            assert report.marked(number) == expected.tolist(), percent
        assert report.texts("#percent") == [f"{percent} %"]
    report.page.click("#trained")
    assert report.marked(0) == np.flatnonzero(here[0].selected).tolist()


def test_pointing_at_a_token_shows_its_values_and_at_a_selected_one_the_alternatives(report: Report):
    report.go(1, 0)
    recorded = STEP_1[0]
    chosen = int(np.flatnonzero(recorded.selected)[2])
    other = int(np.flatnonzero(~recorded.selected)[5])
    for i in (chosen, other):
        report.page.hover(f".response >> nth=0 >> [data-i='{i}']")
        text = " ".join(report.texts("#token"))
        assert f"{recorded.entropy[i]:.3f} nats" in text
        for logp in (recorded.rollout_logp, recorded.old_logp, recorded.new_logp):
            assert f"{logp[i]:.3f} nats" in text
        assert f"{100 * np.exp(np.round(recorded.old_logp[i].astype(float), 3)):.1f} %" in text
        assert ("likeliest" in text) == (i == chosen)
    report.page.hover(f".response >> nth=0 >> [data-i='{chosen}']")
    shares = report.page.locator("#token .alternatives").inner_text()
    for logp in recorded.alternative_logp[2]:
        assert f"{100 * np.round(np.exp(logp), 3):.1f} %" in shares
    assert report.page.locator("#token .alternatives code").count() == 5


def test_filters_leave_the_matching_responses(report: Report):
    for kind, wanted in (
        ("correct", lambda r: r.correct),
        ("incorrect", lambda r: not r.correct),
        ("truncated", lambda r: r.finish_reason == "length"),
    ):
        report.page.select_option("#kind", kind)
        matching = [r for r in STEP_1 + STEP_4 + STEP_9 if wanted(r)]
        assert f"{len(matching)} responses match" in report.texts("#shown")[0]
        verdicts = report.texts(".verdict")
        assert verdicts
        if kind != "truncated":
            assert all(kind in verdict.split() for verdict in verdicts)
    report.page.select_option("#kind", "all")
    report.page.fill("#search", HOSTILE[7])
    matching = [r for r in STEP_4 if HOSTILE[7] in "".join(r.texts)]
    assert f"{len(matching)} responses match" in report.texts("#shown")[0]
    assert report.page.input_value("#step") == "4"
    report.page.fill("#search", "no response has this")
    assert report.page.locator(".response").count() == 0


def test_keys_go_through_groups_and_tokens(report: Report):
    report.go(1, 0)
    places = [(report.page.input_value("#step"), report.page.input_value("#group"))]
    report.page.locator("h1").click()
    for key in "nnnpp":
        report.page.keyboard.press(key)
        places.append((report.page.input_value("#step"), report.page.input_value("#group")))
    assert places == [("1", "0"), ("1", "3"), ("4", "7"), ("9", "2"), ("4", "7"), ("1", "3")]
    report.page.keyboard.press("/")
    report.page.keyboard.type("n")
    assert report.page.input_value("#search") == "n"
    report.page.fill("#search", "")
    report.go(1, 3)
    report.page.locator(".response .text").first.focus()
    report.page.keyboard.press("ArrowRight")
    report.page.keyboard.press("ArrowRight")
    assert report.page.get_attribute(".here", "data-i") == "1"
    report.page.keyboard.press("Shift+ArrowRight")
    after = np.flatnonzero(STEP_1[4].selected)
    assert report.page.get_attribute(".here", "data-i") == str(after[after > 1][0])


def test_text_is_never_executed_and_hidden_characters_are_visible(report: Report):
    report.go(4, 7)
    used = {text for r in STEP_4 for text in r.texts}
    assert used >= set(HOSTILE)
    shown = "".join(report.texts(".response .text"))
    for text in ("<script>window.hacked=1</script>", "</script><script>", "&amp;", "{data}", "'\"><b>"):
        assert text in shown
    for sign in (
        "\u2039U+2028\u203a",
        "\u2039U+202E\u203a reversed",
        "\u2039U+200B\u203a",
        "\u2039U+0000\u203a",
        "\u21e5",
    ):
        assert sign in shown
    assert "\u202e" not in shown
    assert "\u05e9\u05dc\u05d5\u05dd" in shown
    assert "\U0001f469\u200d\U0001f52c" in shown
    assert report.page.locator("main img, main b, .response script").count() == 0
    report.page.evaluate("document.body.append(Object.assign(document.createElement('script'), {text: 'hacked = 9'}))")
    refused = [complaint for complaint in report.complaints if "Content Security Policy" in complaint]
    assert refused
    report.complaints.clear()


def test_a_long_response_is_shown_to_its_end(report: Report):
    report.go(9, 2)
    assert f"{LONG} tokens" in " ".join(report.texts(".response header"))
    assert report.page.locator(".response").first.locator("[data-i]").count() < 5000
    while report.page.locator(f"[data-i='{LONG - 1}']").count() == 0:
        report.page.evaluate("e => { e.scrollTop = e.scrollHeight }", report.page.query_selector(".response .text"))
        report.page.wait_for_timeout(30)
    report.page.fill("#fraction", "100")
    assert len(report.marked(0)) == LONG


def test_marks_and_verdicts_are_readable_without_colour_and_the_page_has_a_dark_form(report: Report):
    report.go(1, 0)
    style = "e => { const s = getComputedStyle(e); return [s.fontWeight, s.textDecorationLine] }"
    assert report.page.eval_on_selector(".mark", style) == ["700", "underline"]
    assert {verdict[0] for verdict in report.texts(".verdict")} == {"\u2713", "\u2717"}
    background = "getComputedStyle(document.body).backgroundColor"
    light = report.page.evaluate(background)
    report.page.emulate_media(color_scheme="dark")
    assert report.page.evaluate(background) != light


def test_a_page_of_a_thousand_steps_is_small_and_opens_at_once(browser: Any, tmp_path: Path):
    recorded: dict[int, list[RecordedResponse]] = {
        step: [response(step, 0, index, tokens=1500) for index in range(4)] for step in range(1, 1000, 20)
    }
    write_report([write_run(tmp_path / "run", 1000, recorded=recorded)], tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 10 * 2**20
    page = browser.new_page()
    page.goto((tmp_path / "report.html").as_uri())
    timing = page.evaluate("performance.getEntriesByType('navigation')[0].domComplete")
    assert timing < 2000, "milliseconds"
    assert "of the 50 recorded steps" in page.evaluate(
        "(document.getElementById('tab-rollouts').click(), document.getElementById('shown').textContent)"
    )
    page.close()
