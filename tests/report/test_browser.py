"""The page in headless Chromium: drawn, operable, quiet, and inert to hostile names."""

import shutil

import pytest

from spectralbasis.report import write_report
from tests.report import results

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

expect = sync_api.expect
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
PLOTS = 11
PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True}

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH"),
]


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    results.write_results(folder, results.comparison(layers=3, k=8), results.summary(), results.tuning())
    return write_report(folder)


@pytest.fixture
def opened(browser):
    """Opens a page and, at the end, requires that it logged nothing and asked for nothing but itself."""
    contexts, said, requests = [], [], []

    def open_page(path, **options):
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: (said.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        requests.remove(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []
    assert requests == []


def names(page, table="#matrix-table"):
    return page.locator(f"{table} tbody tr:not([hidden]) th").all_inner_texts()


def numbers(page, column):
    return [
        float(text) for text in page.locator(f"#matrix-table tbody tr td:nth-child({column + 1})").all_inner_texts()
    ]


def plotted(page, key):
    """The y values of the last trace of a plot, as Plotly holds them."""
    return page.evaluate("key => Array.from(document.getElementById(key).data.at(-1).y)", key)


def test_every_plot_is_drawn_and_described(opened, report):
    page = opened(report)
    drawn = page.locator(".plot:has(svg.main-svg)")
    assert drawn.count() == page.locator(".plot").count() == PLOTS
    for plot in drawn.all():
        assert len(plot.get_attribute("aria-label")) > 20
    assert page.locator("#heatmap .heatmaplayer image").count() == 1
    assert page.locator("#overlap-left .scatterlayer path.js-line").count() >= 3


@pytest.mark.slow
def test_the_table_sorts_by_click_and_by_keyboard(opened, report):
    page = opened(report)
    heading = page.locator("#matrix-table th[data-column='4']")
    heading.get_by_role("button").click()
    assert heading.get_attribute("aria-sort") == "descending"
    assert numbers(page, 4) == sorted(numbers(page, 4), reverse=True)
    page.keyboard.press("Enter")
    assert heading.get_attribute("aria-sort") == "ascending"
    assert numbers(page, 4) == sorted(numbers(page, 4))
    name = page.locator("#matrix-table th[data-column='0']")
    name.get_by_role("button").focus()
    page.keyboard.press("Space")
    assert names(page) == sorted(names(page))
    assert page.locator("#matrix-table [aria-sort]").count() == 1


@pytest.mark.slow
def test_every_column_sorts_by_its_own_numbers_and_absent_ones_come_last(opened, report):
    page = opened(report)
    page.locator("#matrix-table th", has_text="Relative step").get_by_role("button").click()
    last = page.locator("#matrix-table tbody tr").first.locator("th, td").count() - 1
    assert numbers(page, last) == sorted(numbers(page, last), reverse=True)
    cell = "document.querySelector('#matrix-table tbody td')"
    page.evaluate(f"delete {cell}.dataset.value; {cell}.textContent = '–'")
    for _ in range(2):
        page.locator("#matrix-table th[data-column='1'] button").click()
        assert page.locator("#matrix-table tbody td:nth-child(2)").all_inner_texts()[-1] == "–"


@pytest.mark.slow
def test_the_filter_hides_other_rows_and_counts(opened, report):
    page = opened(report)
    page.fill("#filter", "QUERY")
    assert names(page) == [f"encoder.layer.{layer}.attention.self.query" for layer in range(3)]
    assert page.locator("#count").inner_text() == "3 of 19 matrices"


@pytest.mark.slow
def test_choosing_a_checkpoint_changes_figures_and_table(opened, report):
    page = opened(report)
    curve, table, spectrum = plotted(page, "overlap-left"), numbers(page, 4), plotted(page, "spectrum-change")
    page.select_option("#selection", label="sst2")
    assert plotted(page, "overlap-left") != curve
    assert numbers(page, 4) != table
    assert plotted(page, "spectrum-change") != spectrum
    assert "sst2" in page.locator("#heatmap").get_attribute("aria-label")
    assert page.locator("#table-scope").inner_text() == "sst2"
    page.select_option("#selection", index=0)
    assert numbers(page, 4) == table


@pytest.mark.slow
def test_measure_matrix_and_scale_redraw_what_they_name(opened, report):
    page = opened(report)
    page.select_option("#measure", label="Coverage, core: excess")
    assert "Coverage, core, excess over the null" in page.locator("#heatmap").get_attribute("aria-label")
    excess = page.evaluate("document.getElementById('heatmap').data[0].z[0]")
    assert excess[0] is None
    assert all(value > 0 for value in excess[1:])
    page.select_option("#matrix", label="pooler.dense")
    assert "pooler.dense" in page.locator("#spectrum-values").get_attribute("aria-label")
    scale = "document.getElementById('overlap-left').layout.yaxis.range"
    assert page.evaluate(scale)[0] > 0.5
    page.check("#full-scale")
    assert page.evaluate(scale) == [0, 1.02]


@pytest.mark.slow
def test_a_cell_of_the_heat_map_shows_its_numbers_and_selects_its_matrix(opened, report):
    page = opened(report)
    page.locator("#heatmap").scroll_into_view_if_needed()
    area = page.locator("#heatmap .nsewdrag").bounding_box()
    spot = area["x"] + area["width"] * 0.95, area["y"] + 5
    page.mouse.move(*spot)
    hover = page.locator("#heatmap .hoverlayer")
    expect(hover).to_contain_text("encoder.layer.2.attention.self.query")
    expect(hover).to_contain_text("null mean")
    page.mouse.click(*spot)
    chosen = page.locator("#matrix option:checked")
    expect(chosen).to_have_text("encoder.layer.2.attention.self.query")


def test_a_phone_never_scrolls_sideways(opened, report):
    page = opened(report, **PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.evaluate(
        "[...document.querySelectorAll('.plot')].every(plot => plot.getBoundingClientRect().right <= 360)"
    )


@pytest.mark.slow
def test_plots_follow_the_width_of_the_window(opened, report):
    page = opened(report)
    page.set_viewport_size({"width": 500, "height": 740})
    width = page.evaluate("document.getElementById('heatmap').clientWidth")
    for plot in ("heatmap", "overlap-left"):
        expect(page.locator(f"#{plot} svg.main-svg").first).to_have_attribute("width", str(width))
    assert page.evaluate("document.documentElement.scrollWidth") == 500


@pytest.mark.slow
def test_the_colours_follow_the_scheme_also_while_open(opened, report):
    page = opened(report, color_scheme="dark")
    body, line = page.locator("body"), page.locator("#overlap-left path.js-line").last
    expect(body).to_have_css("background-color", "rgb(17, 20, 24)")
    expect(line).to_have_css("stroke", "rgb(107, 179, 238)")
    page.emulate_media(color_scheme="light")
    expect(body).to_have_css("background-color", "rgb(255, 255, 255)")
    expect(line).to_have_css("stroke", "rgb(11, 98, 168)")


@pytest.mark.slow
def test_paper_is_white_and_has_no_controls(opened, report):
    page = opened(report, color_scheme="dark")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("document.getElementById('overlap-left').data.at(-1).line.color") == "#0b62a8"
    assert page.evaluate("[...document.querySelectorAll('.main-svg')].every(svg => svg.clientWidth <= 640)")
    assert not page.locator("nav").is_visible()
    assert not page.locator(".controls").first.is_visible()


@pytest.mark.slow
def test_without_javascript_verdict_and_table_are_there(opened, report):
    page = opened(report, java_script_enabled=False)
    assert page.locator(".badge.supported").first.is_visible()
    assert page.get_by_text("So the leading directions turned").is_visible()
    assert len(names(page)) == 19
    assert page.get_by_text("The figures need JavaScript").is_visible()
    assert not page.locator("#filter").is_visible()
    assert not page.locator("#overlap-left").is_visible()


def test_hostile_names_are_shown_and_do_not_run(opened, tmp_path):
    evil = [results.HOSTILE, "</script><img src=x onerror=alert(1)>", "<b>bold</b> &amp; %{x} $a$", "'\"\u2028"]
    matrices = results.matrices(2, dict.fromkeys(evil, (64, 48)))
    tuning = results.tuning()
    for row in tuning["rows"]:
        row["method"] = row["metric"] = row["task"] = evil[0]
    content = results.summary(evil[:2], base=evil[1], skipped={name: name for name in evil})
    results.write_results(tmp_path, results.comparison(evil[:2], names=matrices, k=4), content, tuning)
    page = opened(write_report(tmp_path))
    assert f"encoder.layer.0.{evil[0]}" in names(page)
    ticks = page.locator("#heatmap .ytick text").all_text_contents()
    assert ticks[:3] == evil[:3]
    assert page.locator("img, b script, svg a").count() == 0
    page.select_option("#selection", index=1)
    page.select_option("#matrix", index=1)
    assert evil[1] in page.locator("#spectrum-values").get_attribute("aria-label")


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    tuned = ("rte-0", "sst2-0", "rte-1", "sst2-1")
    content = results.summary(
        tuned,
        sharing=results.sharing(tuned, ("RTE", "SST-2", "RTE", "SST-2")),
        trajectory=results.trajectory(("rte", "sst2")),
    )
    results.write_results(folder, results.comparison(tuned, layers=1, k=2), content)
    return write_report(folder)


@pytest.mark.slow
def test_what_checkpoints_share_is_clustered_and_has_its_numbers(opened, several):
    page = opened(several)
    ticks = page.locator("#sharing-map .ytick text").all_text_contents()
    assert {frozenset(ticks[:2]), frozenset(ticks[2:])} == {
        frozenset({"rte-0", "rte-1"}),
        frozenset({"sst2-0", "sst2-1"}),
    }
    page.locator("#sharing-map").scroll_into_view_if_needed()
    area = page.locator("#sharing-map .nsewdrag").bounding_box()
    page.mouse.move(area["x"] + 0.9 * area["width"], area["y"] + 5)
    expect(page.locator("#sharing-map .hoverlayer")).to_contain_text("excess")
    heading = page.locator("#sharing-table th", has_text="Excess")
    heading.get_by_role("button").click()
    assert page.locator("#sharing-table tbody tr td:nth-child(3)").all_inner_texts()[:2] == ["same", "same"]


@pytest.mark.slow
def test_runs_are_drawn_against_step_and_size_with_their_null(opened, several):
    page = opened(several)
    for panel in ("stability-step", "stability-size", "coverage-step", "coverage-size"):
        assert page.locator(f"#trajectory-{panel} .scatterlayer path.js-line").count() == 4
    assert page.locator("#trajectory-table tbody tr").count() == 10
    assert page.evaluate("document.getElementById('trajectory-stability-step').data[1].x") == [200, 400, 600, 800, 1000]


@pytest.mark.slow
def test_sharing_and_runs_fit_a_phone_and_do_without_javascript(opened, several):
    assert opened(several, **PHONE).evaluate("document.documentElement.scrollWidth") == 360
    page = opened(several, java_script_enabled=False)
    assert page.locator("#sharing-table tbody tr").count() == 6
    assert page.get_by_text("permutation test over all 90 arrangements").is_visible()
    assert page.locator("#trajectory-table").is_visible()
    assert not page.locator("#sharing-map").is_visible()


@pytest.mark.slow
def test_hostile_names_of_shared_checkpoints_and_runs_stay_text(opened, tmp_path):
    evil = ("<script>alert(1)</script>", "</script><img src=x onerror=alert(1)>", "<b>x</b> $a$ %{y}")
    content = results.summary(evil, sharing=results.sharing(evil, evil), trajectory=results.trajectory(evil))
    content["sharing"]["note"] = evil[1]
    results.write_results(tmp_path, results.comparison(evil, layers=1, k=2), content)
    page = opened(write_report(tmp_path))
    assert page.locator("img, svg a, svg b").count() == 0
    assert set(page.locator("#sharing-table tbody th").all_inner_texts()) <= {name.split("/")[-1] for name in evil}
    page.locator("#trajectory-stability-step").scroll_into_view_if_needed()
    area = page.locator("#trajectory-stability-step .nsewdrag").bounding_box()
    page.mouse.move(area["x"] + 0.2 * area["width"], area["y"] + 0.2 * area["height"])
    page.locator("#sharing-map").scroll_into_view_if_needed()
    area = page.locator("#sharing-map .nsewdrag").bounding_box()
    page.mouse.move(area["x"] + 0.9 * area["width"], area["y"] + 5)
    expect(page.locator("#sharing-map .hoverlayer")).to_contain_text("excess")


@pytest.mark.slow
def test_a_comparison_without_null_or_spectra_is_quiet(opened, tmp_path):
    table = results.comparison(("a",), layers=1, k=4, null=False)
    table = table[~table["metric"].str.startswith("singular_value")]
    results.write_results(tmp_path, table, results.summary(("a",), null=False))
    page = opened(write_report(tmp_path))
    assert page.locator("#matrix").count() == 0
    assert page.locator("#measure optgroup").count() == 1
    assert page.locator(".plot svg.main-svg").count() > 0
