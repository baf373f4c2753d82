"""The page in Chromium, as a person uses it.

Screenshots go to the folder DISCOVLA_SCREENSHOTS, or to a temporary one.
"""

import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from discovla.search.records import IndexProgress
from discovla.search.serve import Server, listen
from tests.search.serve.fake import COLOURS, jpeg

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TOKEN = "correct horse battery"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)"),
]


@pytest.fixture(scope="module")
def chromium():
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install playwright)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def serve_in_thread(index, token=None):
    """Yield the address of a server that runs in a thread."""
    server = Server(index, "127.0.0.1", token=token)
    with listen("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def address(index):
    yield from serve_in_thread(index)


@pytest.fixture(scope="module")
def guarded_address(index):
    yield from serve_in_thread(index, TOKEN)


@pytest.fixture
def page(chromium):
    """A tab of a desktop. The test fails if a script fails or if anything is loaded from elsewhere."""
    yield from tab(chromium, width=1280, height=800)


def tab(chromium, **options):
    width, height = options.pop("width"), options.pop("height")
    context = chromium.new_context(viewport={"width": width, "height": height}, **options)
    page = context.new_page()
    page.set_default_timeout(90_000)  # a busy machine
    faults, foreign = [], []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on(
        "console",
        lambda message: faults.append(message.text) if "Content Security Policy" in message.text else None,
    )
    page.on("request", lambda r: foreign.append(r.url) if "//127.0.0.1:" not in r.url else None)
    yield page
    context.close()
    assert not faults
    assert not [url for url in foreign if not url.startswith(("blob:http://127.0.0.1", "data:image/"))]


def search(page, address, text="a red disc"):
    page.goto(address)
    page.fill("#query", text)
    page.press("#query", "Enter")
    page.wait_for_selector(".hit")


def names(page):
    """Return the colours of the hits, best first."""
    return [name.split()[0] for name in page.locator(".hit .name").all_text_contents()]


def wait_for_names(page, expected):
    page.wait_for_function(
        "expected => [...document.querySelectorAll('.hit .name')].map(n => n.textContent.split(' ')[0])"
        ".slice(0, expected.length).join() === expected.join()",
        arg=expected,
    )


def open_hit(page, place):
    """Open a hit and wait until its first frame is shown.

    It plays slowly until its first time is read, which a busy machine does late.
    """
    page.evaluate("""() => {
        const video = document.querySelector('#video');
        video.defaultPlaybackRate = 0.0625;
        video.addEventListener('seeked', () => { window.firstTime = video.currentTime; }, {once: true});
    }""")
    page.click(f".hit >> nth={place}")
    page.wait_for_function(
        "() => window.firstTime !== undefined && !document.querySelector('#video').seeking"
    )
    page.evaluate("""() => {
        const video = document.querySelector('#video');
        video.defaultPlaybackRate = video.playbackRate = 1;
    }""")


def test_typing_shows_hits_with_score_probability_time_and_file(page, address):
    page.goto(address)
    page.locator("#query").press_sequentially("a red disc")
    wait_for_names(page, ["red"] * 3)
    first = page.locator(".hit").first
    assert first.locator(".tag.time").text_content() == "0:00 \N{EN DASH} 0:04"
    assert first.locator(".tag.probability").text_content() == "90 %"
    assert "score 0.900 · 2020" in first.text_content()
    page.wait_for_function("() => document.querySelector('.hit img').naturalWidth === 320")
    assert "12 hits" in page.text_content("#summary")
    assert not page.is_visible("#note")
    assert page.url.endswith("q=a+red+disc")


def test_a_click_plays_at_the_moment(page, address):
    search(page, address)
    open_hit(page, 1)
    assert page.evaluate("window.firstTime") == pytest.approx(4.0, abs=0.1)
    page.wait_for_function("() => document.querySelector('#video').currentTime > 4.3")
    page.wait_for_selector("#strip rect.best")
    assert page.locator("#strip rect").count() == 12
    assert "best 0.900 at 0:06.0" in page.text_content("#why-best")
    page.evaluate("document.querySelector('#video').pause()")
    box = page.locator("#strip").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.5, box["y"] + 10)
    page.wait_for_function("() => Math.abs(document.querySelector('#video').currentTime - 6) < 0.1")
    assert red_centre(page) == pytest.approx(320 * (0.15 + 0.7 * 6 / 12), abs=8)


def red_centre(page):
    """Return the column of the disc in the frame that is shown: 0..320."""
    page.wait_for_function("() => !document.querySelector('#video').seeking")
    return page.evaluate("""() => {
        const canvas = Object.assign(document.createElement('canvas'), {width: 320, height: 180});
        const context = canvas.getContext('2d');
        context.drawImage(document.querySelector('#video'), 0, 0, 320, 180);
        const row = context.getImageData(0, 90, 320, 1).data;
        const columns = [...Array(320).keys()].filter(x => row[4 * x] > 170);
        return columns.reduce((a, b) => a + b, 0) / columns.length;
    }""")


def test_an_improbable_answer_shows_a_note(page, address):
    search(page, address, "a horse")
    assert "probably not" in page.text_content("#note")


def test_a_filter_by_column_leaves_videos_out_and_is_removed_by_its_cross(page, address):
    search(page, address)
    page.click("#filter")
    row = page.locator("#conditions .row").first
    row.locator("select").nth(0).select_option("year")
    row.locator("select").nth(1).select_option(">")
    row.locator("input").fill("2021")
    assert page.input_value("#where") == "year > 2021"
    page.click("#filters button.strong")
    wait_for_names(page, ["blue", "amber"])
    assert set(names(page)) == {"blue", "amber"}
    page.click("#queries .chip .tool")
    wait_for_names(page, ["red"] * 3)
    page.fill("#where", "secret = 1")
    page.press("#where", "Enter")
    page.wait_for_selector("#note:not([hidden])")
    assert "where: expected" in page.text_content("#note")


def test_more_like_this_and_back(page, address):
    search(page, address)
    page.click(".hit >> nth=0")
    name = page.text_content("#player-title")
    page.click("#like")
    page.wait_for_selector("#queries .chip")
    assert page.url.endswith("like=0")
    wait_for_names(page, [name.split()[0]] * 2)
    page.go_back()
    wait_for_names(page, ["red"] * 3)
    assert page.input_value("#query") == "a red disc"


def test_a_clip_of_a_hit_is_a_query(page, address):
    search(page, address, "blue")
    open_hit(page, 0)
    page.evaluate("() => { const v = document.querySelector('#video'); v.pause(); v.currentTime = 1.5; }")
    page.wait_for_function("() => !document.querySelector('#video').seeking")
    page.click("#from")
    assert "0:01.5" in page.text_content("#from")
    page.click("#clip")
    page.wait_for_selector("#queries .chip")
    assert "clip 0:01.5 \N{EN DASH} 0:04.0" in page.text_content("#queries")
    assert "start=1.5" in page.url
    wait_for_names(page, ["blue"] * 3)


def test_an_uploaded_image_is_a_query(page, address, tmp_path):
    file = tmp_path / "leaf.jpg"
    file.write_bytes(jpeg(np.full((60, 80, 3), COLOURS["green"], np.uint8)))
    page.goto(address)
    page.set_input_files("#image", file)
    wait_for_names(page, ["green"] * 3)
    assert "leaf.jpg" in page.text_content("#queries")
    page.click(".hit >> nth=0")
    page.wait_for_selector("#strip rect.best")
    page.keyboard.press("Escape")
    page.set_input_files("#image", {"name": "no.png", "mimeType": "image/png", "buffer": b"no picture"})
    page.wait_for_selector("#note:not([hidden])")
    assert "image: expected a picture" in page.text_content("#note")
    large = tmp_path / "large.png"
    large.write_bytes(bytes(11 << 20))
    page.set_input_files("#image", large)
    page.wait_for_function("() => document.querySelector('#note').textContent.includes('11.5 MB')")


def test_the_library_lists_videos_refused_ones_and_progress(page, address, index, monkeypatch):
    page.goto(address)
    page.click("#library-link")
    page.wait_for_selector("#refused tbody tr")
    assert page.locator("#videos tbody tr").count() == 4
    assert "red disc.mp4" in page.locator("#videos tbody tr").first.text_content()
    assert "expected a video, found a file of 0 bytes" in page.text_content("#refused")
    assert "4 videos, 12 moments, 48 s, 1 refused" in page.text_content("#library-summary")
    assert not page.is_visible("#indexing")
    progress = IndexProgress(done=3, total=12, moments=30, seconds=20.0, remaining=240.0)
    monkeypatch.setattr(index, "progress", progress)
    page.wait_for_selector("#indexing:not([hidden])")
    assert "3 of 12 videos, 4 min left" in page.text_content("#indexing")
    assert page.evaluate("document.querySelector('#indexing progress').value") == 0.25
    monkeypatch.setattr(index, "progress", None)
    page.wait_for_selector("#indexing", state="hidden")
    page.reload()
    page.wait_for_selector("#refused tbody tr")


def test_a_file_that_the_browser_cannot_play_has_a_note(page, address, index, monkeypatch, tmp_path):
    other = tmp_path / "old.avi"
    other.write_bytes(b"RIFF" + bytes(2000))
    search(page, address)
    monkeypatch.setattr(index, "files", [other, *index.files[1:]])
    page.click(".hit >> nth=0")
    page.wait_for_selector("#video-error:not([hidden])")


def test_what_is_typed_before_the_server_answers_stays(page, address):
    held = []
    page.route("**/api/status", lambda route: held.append(route))
    page.goto(address)
    page.fill("#query", "a red disc")
    page.wait_for_timeout(100)
    for route in held:
        route.continue_()
    page.unroute("**/api/status")
    page.wait_for_timeout(300)
    assert page.input_value("#query") == "a red disc"
    page.press("#query", "Enter")
    page.wait_for_selector(".hit")
    page.evaluate("history.pushState(null, '', '/'); dispatchEvent(new PopStateEvent('popstate'))")
    assert page.input_value("#query") == ""


def test_the_token_is_asked_for_once(page, guarded_address):
    page.goto(guarded_address)
    page.wait_for_selector("#login[open]")
    assert not page.is_visible(".hit")
    page.keyboard.press("Escape")
    assert page.is_visible("#login")
    page.fill("#token", "not the right token")
    page.keyboard.press("Enter")
    page.wait_for_selector("#login-error:not([hidden])")
    page.fill("#token", TOKEN)
    page.keyboard.press("Enter")
    page.wait_for_selector("#login", state="hidden")
    search(page, guarded_address)
    page.wait_for_function("() => document.querySelector('.hit img').naturalWidth === 320")
    open_hit(page, 0)
    assert not page.is_visible("#login")
    cookie = page.context.cookies()[0]
    assert cookie["httpOnly"] and cookie["sameSite"] == "Strict"


def test_the_keyboard_alone_finds_plays_and_closes(page, address):
    page.goto(address)
    page.wait_for_selector("#welcome:not([hidden])")
    page.keyboard.press("/")
    page.keyboard.type("a red disc/")
    page.keyboard.press("Enter")
    wait_for_names(page, ["red"] * 3)
    page.keyboard.press("ArrowDown")
    assert focused(page) == 0
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    columns = page.evaluate("getComputedStyle(document.querySelector('#hits')).gridTemplateColumns").split()
    assert focused(page) == 1 + len(columns)
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Enter")
    page.wait_for_selector("#player[open]")
    page.wait_for_function("() => document.querySelector('#video').currentTime > 4")
    page.keyboard.press("Space")
    page.wait_for_function("() => document.querySelector('#video').paused")
    page.keyboard.press("Space")
    page.wait_for_function("() => !document.querySelector('#video').paused")
    page.keyboard.press("ArrowRight")
    assert "0:08.0" in page.text_content("#player-time")
    page.keyboard.press("Escape")
    page.wait_for_selector("#player", state="hidden")
    assert focused(page) == 2
    page.keyboard.press("ArrowUp")
    assert page.evaluate("document.activeElement.id") == "query"


def focused(page):
    """Return the place of the hit that has the focus, -1 if none has."""
    return page.evaluate("[...document.querySelectorAll('.hit')].indexOf(document.activeElement)")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    chosen = os.environ.get("DISCOVLA_SCREENSHOTS")
    folder = Path(chosen) if chosen else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_every_view_fits_the_width_in_light_and_dark(chromium, address, pictures, width, scheme):
    for page in tab(chromium, width=width, height=800, color_scheme=scheme):

        def shoot(name, page=page):
            assert page.evaluate("document.documentElement.scrollWidth") <= width, name
            file = pictures / f"{name}_{width}_{scheme}.png"
            page.screenshot(path=file)
            corner = np.asarray(Image.open(file).convert("L"))[-3:, :3].mean()
            assert (corner < 60) == (scheme == "dark"), name

        page.goto(address)
        page.wait_for_selector("#welcome:not([hidden])")
        shoot("welcome")
        search(page, address)
        page.wait_for_function("() => [...document.images].every(image => image.complete)")
        columns = page.evaluate("getComputedStyle(document.querySelector('#hits')).gridTemplateColumns")
        assert len(columns.split()) == (5 if width == 1280 else 2)
        shoot("hits")
        page.click("#filter")
        row = page.locator("#conditions .row").first.bounding_box()
        assert row["height"] < 60, "one line"
        shoot("filters")
        page.click("#filter")
        open_hit(page, 1)
        page.wait_for_selector("#strip rect.best")
        player = page.locator("#player").bounding_box()
        assert player["x"] >= 0 and player["x"] + player["width"] <= width
        assert page.evaluate("(p => p.scrollWidth <= p.clientWidth)(document.querySelector('#player'))")
        page.screenshot(path=pictures / f"player_{width}_{scheme}.png")
        page.click("#close")
        page.click("#library-link")
        page.wait_for_selector("#refused tbody tr")
        for cell in page.locator("#videos tbody tr").first.locator("td").all()[1:]:
            assert cell.bounding_box()["height"] == pytest.approx(38, abs=4), "one line"
        shoot("library")
        page.goto(f"{address}/docs")
        shoot("docs")
