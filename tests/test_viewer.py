"The page of an asset: what a hostile asset may not do to it, and what a person does with it in a real browser."
import base64
import fcntl
import hashlib
import json
import os
import re
import select
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser

import numpy as np
import pytest

from neural.asset import StudyAsset
from neural.picture import encode_tiles, thumbnail
from neural.viewer import SCRIPT, STYLE, asset_page, asset_sizes, relation_svg

HOSTILE = "<img src=x onerror=alert(1)>"
NAMES = ["lung opacity", "right lower lobe", "pleural effusion", "pneumonia"]


def film(size: int = 96) -> np.ndarray:
    "A soft film with a bright spot."
    y, x = np.mgrid[:size, :size] / size
    return (np.exp(-20 * ((x - 0.6) ** 2 + (y - 0.6) ** 2)) * 0.8 + 0.1 * y)[None].astype(np.float32)


def asset(**changed) -> StudyAsset:
    """Four patches, four concepts: concept 0 is tied to patches 9 and 10, concept 1 to 10, concept 3 to 14, concept 2
    to none."""
    fields = dict(study_id="s-1", track="image+report", grid=(4, 4), patches=[5, 9, 10, 14],
                  relevance=[0.1, 0.2, 0.4, 0.3], features=np.ones((4, 8)), concepts=[0, 1, 2, 3],
                  assertions=[0, 0, 2, 1], relations=[(0, 1, 0), (0, 3, 2)],
                  grounding=[(0, 1), (0, 2), (1, 2), (3, 3)], weights=[0.25, 0.75, 1, 1],
                  provenance=dict(selection="described", keep_ratio=0.25))
    return StudyAsset(**fields | changed)


def pictured() -> StudyAsset:
    return asset(thumbnail=thumbnail(film(), 300), pixels=encode_tiles(film(), [5, 9, 10, 14], (4, 4)))


def crowded(n: int = 25) -> tuple[StudyAsset, list[str]]:
    "Twenty-five concepts with long names, relations across all of them, a full grid of ties."
    rng = np.random.default_rng(0)
    relations = [(a, b, t % 3) for t, (a, b) in enumerate(rng.integers(0, n, (30, 2)).tolist()) if a != b]
    return (
        asset(concepts=range(n), assertions=rng.integers(0, 3, n), relations=relations,
              grounding=[(c, p) for c in range(n) for p in rng.choice(4, 2, replace=False)], weights=rng.random(2 * n)),
        [f"a rather long name of a finding, number {i}" for i in range(n)],
    )


class Tags(HTMLParser):
    "Every tag with its attributes, and whether all of them are closed again."
    EMPTY = {"meta", "link", "path", "rect", "image", "use", "br", "img"}

    def __init__(self, page):
        super().__init__()
        self.seen, self.open, self.text = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.EMPTY: self.open.append(tag)

    def handle_startendtag(self, tag, attrs): self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag): assert self.open.pop() == tag

    def handle_data(self, data): self.text += data


# strings

KINDS = {
    "plain": lambda: (asset(), NAMES),
    "pictured": lambda: (pictured(), NAMES),
    "without a vocabulary": lambda: (asset(), None),
    "crowded": crowded,
    "no concepts": lambda: (asset(concepts=(), assertions=(), relations=(), grounding=(), weights=()), NAMES),
    "repeated patches": lambda: (
        asset(patches=[5, 9, 9, 9], weights=[0.75, 0.25, 1, 1], provenance=dict(selection="released")), NAMES),
    "hostile": lambda: (asset(study_id=HOSTILE),
                        [HOSTILE, '" onload="alert(1)', "</style><script>alert(1)</script>", "a\u202eb\ud800"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_is_whole_and_refers_to_nothing(kind):
    it, names = KINDS[kind]()
    page = asset_page(it, names)
    page.encode()
    tags = Tags(page)
    assert (tags.open == [] and "http" not in page.replace("http-equiv", "")
            and "//" not in re.sub(r'"data:[^"]*"|sha256-[^\']*', "", page))
    assert (sum(tag == "script" for tag, _ in tags.seen) == 1
            and {tag for tag, _ in tags.seen} & {"img", "iframe", "object", "embed", "base", "form", "a"} == set())
    for tag, attrs in tags.seen:
        assert not [name for name in attrs if name.startswith("on") or name in ("src", "style", "srcset", "action")], (
            tag, attrs)
        if "href" in attrs:
            assert re.match(r"data:(image/(webp|png|jpeg|avif);base64,|$)|#strip$|data:,$", attrs["href"])
    ids = [attrs["id"] for _, attrs in tags.seen if "id" in attrs]
    assert len(ids) == len(set(ids))
    tied = {part.split(":")[0] for _, attrs in tags.seen for part in attrs.get("data-ties", "").split()} | {
        part for _, attrs in tags.seen for part in attrs.get("data-ends", "").split()}
    assert tied <= set(ids), "a tie or a relation to nothing on the page"
    assert f"{len(it.to_bytes()):,}" in tags.text and sum(asset_sizes(it).values()) == len(it.to_bytes())
    assert "Research software, not a diagnostic device." in tags.text


def test_the_policy_names_the_very_style_and_script():
    tags = Tags(asset_page(asset(), NAMES)).seen
    rule = next(attrs["content"] for _, attrs in tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert rule.startswith("default-src 'none'; img-src data:;") and "unsafe" not in rule and "*" not in rule
    for kind, text in (("style", STYLE), ("script", SCRIPT)):
        assert f"{kind}-src 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" in rule


def test_foreign_words_stay_words():
    it, names = KINDS["hostile"]()
    page = asset_page(it, names, title=HOSTILE)
    text = Tags(page).text
    assert HOSTILE not in page and HOSTILE in text and names[1] in text and names[2] in text


def test_repeated_patches_are_one_square_that_says_so():
    it, names = KINDS["repeated patches"]()
    page = asset_page(it, names)
    assert page.count('class="patch"') == 2 and "kept 3 times" in page and "2 of 16 patches" in page
    assert 'id="p9" data-ties="c1:1.000 c3:1.000 c0:0.750"' in page


def test_brackets_never_lie_upon_one_another():
    drawn = re.findall(
        r'<path d="M1 ([\d.]+)H[\d.]+Q([\d.]+) [\d.]+ [\d.]+ [\d.]+V([\d.]+)', relation_svg(crowded()[0]))
    stems = [float(y) for y, _, _ in drawn] + [
        float(y) for y in re.findall(r'class="tip" d="M0 ([\d.]+)', relation_svg(crowded()[0]))]
    assert len(stems) > 50 and len(set(stems)) == len(stems), "every end has a height of its own"
    lines = [(float(x), *sorted((float(a), float(b)))) for a, x, b in drawn]
    assert not [1 for i, (x, a, b) in enumerate(lines) for u, c, d in lines[:i] if x == u and min(b, d) - max(a, c) > 0]


# a browser

class Browser:
    "Chromium, spoken to in its DevTools protocol through a pair of pipes: no server, no port, no further package."
    FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", "--remote-debugging-pipe",
             "--force-prefers-reduced-motion"]
    LAUNCH = (
        "import os, sys; a, b, *command = sys.argv[1:]; os.dup2(int(a), 3); os.dup2(int(b), 4); os.execv(command[0],"
        " command)")

    def __init__(self, program: str, profile):
        # above 3 and 4, the two that Chromium reads and writes
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for pair in (os.pipe(), os.pipe()) for end in pair]
        theirs_in, self.out, self.inp, theirs_out = ends
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.LAUNCH, str(theirs_in), str(theirs_out), program, *self.FLAGS,
             f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self.buffer, self.count, self.session, self.tab, self.events = b"", 0, None, None, []

    def message(self, until: float):
        while b"\0" not in self.buffer:
            left = until - time.monotonic()
            if left < 0 or not select.select([self.inp], [], [], left)[0]:
                raise TimeoutError("Chromium does not answer")
            if not (more := os.read(self.inp, 1 << 16)): raise ConnectionError("Chromium has gone")
            self.buffer += more
        first, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(first)

    def __call__(self, method: str, **params):
        self.count += 1
        call = dict(id=self.count, method=method, params=params) | (
            dict(sessionId=self.session) if self.session else {})
        os.write(self.out, json.dumps(call).encode() + b"\0")
        until = time.monotonic() + 120
        while (reply := self.message(until)).get("id") != self.count: self.events.append(reply)
        assert "error" not in reply, reply
        return reply["result"]

    def show(self, page: str, width: int = 1200, height: int = 900, scripts: bool = True, dark: bool = False):
        "Puts a page into a fresh tab, and closes the one before."
        self.session, before = None, self.tab
        self.tab = self("Target.createTarget", url="about:blank")["targetId"]
        if before: self("Target.closeTarget", targetId=before)
        self.session = self("Target.attachToTarget", targetId=self.tab, flatten=True)["sessionId"]
        self.events = []
        for domain in ("Page", "Runtime", "Log", "Network"): self(f"{domain}.enable")
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self("Emulation.setEmulatedMedia",
             features=[dict(name="prefers-color-scheme", value="dark" if dark else "light")])
        self("Emulation.setScriptExecutionDisabled", value=not scripts)
        self("Page.setDocumentContent", frameId=self("Page.getFrameTree")["frameTree"]["frame"]["id"], html=page)
        (self.ask("new Promise(done => requestAnimationFrame(() => setTimeout(done, 50)))") if scripts
         else time.sleep(0.3))

    def ask(self, expression: str):
        result = self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def point(self, what: str, press: bool = False):
        "Moves the mouse upon an element, and presses."
        x, y = self.ask("(e => { e.scrollIntoView({block: 'center'}); const r = (e.querySelector('.ring') ||"
                        " e).getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]"
                        f" }})(document.querySelector('{what}'))")
        self("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        if press:
            for kind in ("mousePressed", "mouseReleased"):
                self("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def key(self, name: str):
        text = {"Enter": "\r", " ": " "}.get(name)
        code = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32}[name]
        for kind in ("keyDown", "keyUp"):
            self("Input.dispatchKeyEvent", type=kind, key=name, windowsVirtualKeyCode=code,
                 **(dict(text=text) if text and kind == "keyDown" else {}))

    def lit(self, what: str = ".patch") -> list[str]:
        return self.ask(f"[...document.querySelectorAll('{what}.lit')].map(e => e.id).sort()")

    def picture(self, path):
        data = self("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def close(self):
        self.session = None
        try: self("Browser.close")
        except (OSError, AssertionError): self.process.kill()
        try: self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.inp)
        os.close(self.out)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None: pytest.skip("no Chromium on this machine: apt-get install chromium")
    chromium = Browser(program, tmp_path_factory.mktemp("profile"))
    yield chromium
    chromium.close()


def test_a_click_keeps_a_concept_and_escape_lets_go(browser):
    browser.show(asset_page(pictured(), NAMES))
    assert browser.lit() == [] and browser.ask("document.querySelectorAll('.patch').length") == 4
    browser.point("#c0", press=True)
    assert (browser.lit() == ["p10", "p9"]
            and browser.ask("document.getElementById('c0').getAttribute('aria-pressed')") == "true")
    browser.point("h1")
    browser.point("#c3")
    assert browser.lit() == ["p10", "p9"], "what is kept stays, wherever the mouse goes"
    assert "patch 10 (0.75); patch 9 (0.25)" in browser.ask("document.querySelector('.say').textContent")
    browser.key("Escape")
    assert (
        browser.lit() == [] and browser.lit(".chip") == []
        and browser.ask("document.querySelectorAll('[aria-pressed=true], .on, .choosing, .wires path').length") == 0)
    browser.point("#c0", press=True)
    browser.point("#c3", press=True)
    assert browser.lit() == ["p14"], "another press takes another"
    browser.point("#c3", press=True)
    assert browser.lit() == [], "a second press lets go"


def test_pointing_lights_both_ways_with_the_weight(browser):
    browser.show(asset_page(asset(), NAMES))
    browser.point("#c0")
    assert browser.lit() == ["p10", "p9"] and browser.ask("document.querySelectorAll('.wires path[d]').length") == 2
    opacity = {p: float(browser.ask(f"getComputedStyle(document.querySelector('#{p} .shade')).fillOpacity"))
               for p in ("p9", "p10")}
    assert 0 < opacity["p9"] < opacity["p10"] <= 1
    assert (browser.ask("document.querySelectorAll('.rel.lit').length") == 2
            == browser.ask("document.querySelectorAll('.said li.lit').length"))
    browser.point("#p10")
    assert browser.lit() == [] and browser.lit(".chip") == ["c0", "c1"]
    browser.point("#p5")
    assert browser.lit(".chip") == [] and "tied to no concept" in browser.ask(
        "document.querySelector('.say').textContent")
    browser.point("h1")
    assert browser.lit(".chip") == [] and browser.ask("document.documentElement.className") == ""


def test_the_keyboard_does_all_of_it(browser):
    browser.show(asset_page(asset(), NAMES))
    reached = []
    for _ in range(8):
        browser.key("Tab")
        reached.append(browser.ask("document.activeElement.id"))
    assert reached == [
        "p5", "p9", "p10", "p14", "c0", "c1", "c3", "c2"], "patches, then concepts in the order of the page"
    browser.ask("document.getElementById('c1').focus()")
    assert browser.lit() == ["p10"]
    browser.key("Enter")
    browser.key("Tab")
    assert browser.lit() == ["p10"], "kept while the focus moves on"
    browser.key("Escape")
    assert browser.lit() == []
    browser.ask("document.getElementById('p14').focus()")
    browser.key(" ")
    assert (browser.lit(".chip") == ["c3"]
            and browser.ask("document.getElementById('p14').getAttribute('aria-pressed')") == "true")


def test_a_repeated_patch_lights_once(browser):
    it, names = KINDS["repeated patches"]()
    browser.show(asset_page(it, names))
    browser.point("#p9", press=True)
    assert browser.lit(".chip") == ["c0", "c1", "c3"]
    browser.point("#c0", press=True)
    assert browser.lit() == ["p9"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [360, 1200])
def test_every_page_fits_and_asks_the_network_nothing(browser, kind, width):
    browser.show(asset_page(*KINDS[kind]()), width=width, dark=width == 360)
    assert browser.ask("document.documentElement.scrollWidth") <= width
    overlaps = browser.ask(
        """(() => { const r = [...document.querySelectorAll('.chip, .graph h3')].map(e => e.getBoundingClientRect());
        return r.filter((a, i) => r.slice(0, i).some(b => a.top < b.bottom - 1 && b.top < a.bottom - 1)).length })()"""
    )
    assert overlaps == 0
    rows = browser.ask(
        """[...document.querySelectorAll('.graph')].map(g => [g.querySelector('.rels'), g.firstChild]).map(([r, c]) =>
        r ? r.getBoundingClientRect().height - c.getBoundingClientRect().height : 0)[0]"""
    )
    assert abs(rows) < 1, "brackets and rows keep the same measure"
    sent = [e["params"]["request"]["url"] for e in browser.events if e.get("method") == "Network.requestWillBeSent"]
    assert [url for url in sent if not url.startswith(("data:", "about:"))] == []
    assert [
        e["params"] for e in browser.events if e.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown")
    ] == [], "neither an error nor anything against the policy"


def test_pictures_are_shown(browser):
    browser.show(asset_page(pictured(), NAMES))
    sizes = browser.ask("Promise.all([...document.querySelectorAll('image')].map(e => { const i = new Image(); i.src ="
                        " e.getAttribute('href'); return i.decode().then(() => [i.naturalWidth, i.naturalHeight]) }))")
    assert sizes[0] == [24, 96] and sizes[1][0] == sizes[1][1]


def test_without_scripts_it_is_still_a_page(browser):
    page = asset_page(asset(), NAMES)
    browser.show(page, scripts=False)
    found = browser("Accessibility.getFullAXTree")["nodes"]
    said = " ".join(node["name"]["value"] for node in found if "value" in node.get("name", {}))
    for words in ("lung opacity", "Absent", "located at", "patch 10 (row 2, column 2)",
                  "Research software, not a diagnostic device."):
        assert words in said


def test_the_policy_stops_what_escaping_might_miss(browser):
    page = asset_page(asset(), NAMES).replace(
        "</main>", '<img src=x onerror="document.title=1"><script>document.title = 2</script><b'
        ' style="position:fixed">!</b></main>',)
    browser.show(page)
    assert (browser.ask("document.title") == "Study s-1"
            and browser.ask("getComputedStyle(document.querySelector('b')).position") == "static")


# what a page is written over

@pytest.fixture
def shelf(tmp_path):
    from neural.asset import AssetStore, key_check, keyed_id
    plain = AssetStore.create(tmp_path / "plain", ["pneumonia", "a\x1b[31mb"], dim=3, grid=(4, 4))
    plain.append(
        [StudyAsset("s1", "image+report", (4, 4), [5], [0.6], [[1.0, 2, 3]], concepts=[0, 1], assertions=[2, 0])])
    keyed = AssetStore.create(
        tmp_path / "keyed", ["pneumonia"], dim=3, grid=(4, 4), settings=dict(key=key_check(b"k" * 32)))
    keyed.append([StudyAsset(keyed_id("s1", b"k" * 32), "image+report", (4, 4), [5], [.6], [[1., 2, 3]])])
    (tmp_path / "key").write_bytes(b"k" * 32)
    (tmp_path / "other").write_bytes(b"o" * 32)
    return tmp_path


def inspect(home, *words):
    from typer.testing import CliRunner
    from neural.cli import app
    said = CliRunner().invoke(
        app, ["inspect", *(str(home / w) if w in ("plain", "keyed", "key", "other") or "." in w else w for w in words)])
    assert said.exit_code != 1 or said.stderr.count("\n") == 1, said.output
    return said


def test_a_page_is_written_over_nothing_but_a_page_of_ours(shelf):
    (shelf / "notes.html").write_text("<!doctype html><p>mine")
    (shelf / "link.html").symlink_to(shelf / "notes.html")
    shard = next((shelf / "plain").glob("shard*"))
    for goal in ("notes.html", "link.html", f"plain/{shard.name}", "plain/new.html"):
        before = {p: p.read_bytes() for p in shelf.rglob("*") if p.is_file()}
        for flag in ([], ["--force"]): assert inspect(shelf, "plain", "s1", "--html", goal, *flag).exit_code == 1
        assert {p: p.read_bytes() for p in shelf.rglob("*") if p.is_file()} == before
    assert inspect(shelf, "plain", "s1", "--html", "deep/page.html").exit_code == 0
    assert "replace it with --force" in inspect(shelf, "plain", "s1", "--html", "deep/page.html").output
    assert inspect(shelf, "plain", "s1", "--html", "deep/page.html", "--force").exit_code == 0
    key = (shelf / "key").read_bytes()
    (shelf / "key.html").write_bytes(key)
    assert (inspect(shelf, "keyed", "s1", "--key-file", "key", "--html", "key.html", "--force").exit_code == 1
            and (shelf / "key.html").read_bytes() == key)


def test_a_study_of_a_keyed_store_is_found_by_its_own_id(shelf):
    found = inspect(shelf, "keyed", "s1", "--key-file", "key")
    # the hospital's id stays outside
    assert found.exit_code == 0 and found.output.startswith("k") and "s1 " not in found.output
    assert "give the key with --key-file" in inspect(shelf, "keyed", "s1").output
    assert "keyed with another key" in inspect(shelf, "keyed", "s1", "--key-file", "other").output
    assert "not by this key either" in inspect(shelf, "keyed", "s2", "--key-file", "key").output
    assert "no study s9 in plain; it holds 1, such as s1" in inspect(shelf, "plain", "s9").output


def test_a_terminal_is_told_nothing_that_it_would_obey(shelf):
    assert "\x1b" not in inspect(shelf, "plain", "s1").output


# how sure the writer was

def test_a_concept_shows_how_sure_the_writer_was_where_that_is_known():
    sure = asset(track="image-only", certainty=[210, 255, 0, 254])
    page = asset_page(sure, NAMES)
    assert page.count("present with probability") == 3 and all(f"<small>{p} %</small>" in page for p in (83, 0, 100))
    assert "probability" not in asset_page(asset(), NAMES).split("<main>")[1].split("<script")[0]


def test_the_bytes_of_certainties_are_counted():
    sure = asset(track="image-only", certainty=[1, 2, 3, 4])
    assert (sum(asset_sizes(sure).values()) == len(sure.to_bytes())
            and asset_sizes(sure)["graph"] == asset_sizes(asset())["graph"] + 4)
    assert asset_sizes(sure)["provenance"] == asset_sizes(asset())["provenance"]


@pytest.mark.parametrize("certainty", [(), None, [255] * 4])
def test_a_page_of_the_unknown_is_the_page_it_was(certainty):
    assert asset_page(asset(track="image-only", certainty=certainty), NAMES) == asset_page(
        asset(track="image-only"), NAMES)
