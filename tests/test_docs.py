"""The pages, built once: no broken link, no request to elsewhere, every figure numbered and described, nothing wider
than a phone."""
import copy
import functools
import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
import yaml
from bs4 import BeautifulSoup

from neural.docs import MARK, cell_options, empty_pages, listed_notebooks, main, page_name, soup_faults, with_unlisted

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(p.relative_to(ROOT / "nbs").as_posix() for p in (ROOT / "nbs").rglob("*.ipynb")
                   if ".ipynb_checkpoints" not in p.parts)


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    "The pages, built by the command from a copy of what is committed."
    root = tmp_path_factory.mktemp("docs")
    shutil.copytree(ROOT / "nbs", root / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    for folder in ("figures", "data_manifests"): shutil.copytree(ROOT / folder, root / folder)
    shutil.copy(ROOT / "settings.ini", root)
    done = subprocess.run([sys.executable, "-m", "neural.docs"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.fullmatch(r"\d+ pages with \d+ figures in _docs\n", done.stdout), done.stdout
    return root / "_docs"


def names_in(site) -> list:
    "Names of the pages; files of figures/ that open in a browser are no pages, and have tests of their own."
    names = (p.relative_to(site).as_posix() for p in site.rglob("*.html"))
    return sorted(name for name in names if not name.startswith("figures/"))


@pytest.fixture(scope="session")
def pages(site) -> dict[str, BeautifulSoup]:
    "Page name -> the page; its code without the colours, seven tags of ten that no test looks at."
    plain = lambda text: re.sub(r'<span class="\w+">([^<]*)</span>', r"\1", text)
    read = lambda name: re.sub(r"(?s)<pre\b.*?</pre>", lambda m: plain(m[0]), (site / name).read_text(encoding="utf-8"))
    return {name: BeautifulSoup(read(name), "html.parser") for name in names_in(site)}


@pytest.fixture
def checkout(tmp_path) -> Path:
    "As little of a checkout as can be told apart from a folder of pages."
    for name in ("nbs/index.ipynb", "figures/roc.png", "neural/study.py"):
        (tmp_path / "here" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "here" / name).write_text("ours")
    shutil.copy(ROOT / "settings.ini", tmp_path / "here")
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Home\n\n> One page.")]),
                   tmp_path / "here/nbs/index.ipynb")
    return tmp_path / "here"


@pytest.mark.parametrize(
    "out, why",
    [(".", "made from"), ("..", "made from"), ("nbs", "made from"), ("figures/pages", "made from"),
     ("neural", "made from"), ("settings.ini", "is a file"), ("../photos", "no pages of ours"),
     ("../link", "no pages of ours")],
)
def test_pages_are_never_written_over_what_is_no_page(checkout, monkeypatch, out, why):
    (checkout.parent / "photos").mkdir()
    (checkout.parent / "photos/film.png").write_text("mine")
    (checkout.parent / "link").symlink_to("photos")
    monkeypatch.chdir(checkout)
    before = {p: p.read_bytes() for p in checkout.parent.rglob("*") if p.is_file()}
    with pytest.raises(SystemExit, match=f"docs: .*{why}"): main(["--out", out])
    assert {p: p.read_bytes() for p in checkout.parent.rglob("*") if p.is_file() and "build" not in p.parts} == before


def test_pages_of_an_earlier_build_are_replaced(checkout, site):
    for folder in (checkout / "_docs", checkout.parent / "pages"):
        folder.mkdir()
        (folder / "old.html").write_text("old")
        (folder / MARK).write_text("")
        assert list(empty_pages(folder, checkout).iterdir()) == []
    assert (site / MARK).is_file()


def test_a_readme_of_something_else_is_left_alone(checkout, monkeypatch):
    monkeypatch.chdir(checkout)
    (checkout / "README.md").write_text("# Notes of the ward\n")
    with pytest.raises(SystemExit, match="README.md: is there already and was not made by this command"):
        main(["--readme"])
    assert (checkout / "README.md").read_text() == "# Notes of the ward\n"
    (checkout / "README.md").write_text("# Home\n\nas it was before\n")
    main(["--readme"])
    assert "One page" in (checkout / "README.md").read_text()


def test_every_notebook_has_its_page(pages):
    assert {page_name(n) for n in NOTEBOOKS} <= set(pages)
    sidebar = yaml.safe_load((ROOT / "nbs/_quarto.yml").read_text())["website"]["sidebar"]["contents"]
    # numbered ones need no entry of their own
    listed = listed_notebooks(with_unlisted(sidebar, NOTEBOOKS))
    assert sorted(listed) == NOTEBOOKS


def test_every_link_leads_somewhere(site, pages):
    broken, places = [], {name: {tag["id"] for tag in soup.select("[id]")} for name, soup in pages.items()}
    for name, soup in pages.items():
        for tag in soup.select("a[href], img[src], script[src], link[href]"):
            url = urlsplit(tag.get("href") or tag.get("src"))
            if url.scheme or url.netloc: continue
            target = (site / name).parent / unquote(url.path) if url.path else site / name
            if target.is_dir(): target = target / "index.html"
            if not target.is_file(): broken.append(f"{name}: {url.geturl()}")
            elif url.fragment and target.suffix == ".html":
                there = places[target.resolve().relative_to(site.resolve()).as_posix()]
                if unquote(url.fragment) not in there: broken.append(f"{name}: {url.geturl()} (no such place)")
    assert broken == []


def test_a_defect_that_is_named_leads_to_its_place(pages):
    there = {tag["id"] for tag in pages["defects.html"].select("main [id]")}
    links, loose = 0, []
    for name, soup in pages.items():
        if name == "defects.html": continue
        soup = copy.copy(soup.select_one("main") or soup)
        for link in soup.select('a[href*="defects.html#"]'):
            links += 1
            assert link["href"].split("#")[1] == link.get_text().lower() and link.get_text().lower() in there, name
        for tag in soup.select("a, pre, code, figure, h1, h2, h3, h4, .cell"): tag.decompose()
        found = re.findall(r"[Dd]efects? [A-D]\d+[bc]?|\([A-D]\d+[bc]?\)", soup.get_text())
        loose += [f"{name}: {mention}" for mention in found]
    assert links > 100 and loose == []


def test_nothing_is_fetched_from_elsewhere(site, pages):
    assert {n: f for n, s in pages.items() if (f := soup_faults(copy.copy(s)))} == {}
    for sheet in site.rglob("*.css"):
        assert (
            re.findall(r"(?:url\(|@import)\s*['\"]?\s*(?:https?:)?//[^)'\"]+", sheet.read_text(errors="replace")) == []
        ), sheet.name
    inline = [s.get_text() for soup in pages.values() for s in soup.select("script:not([src]), style")]
    assert not [t for t in inline if re.search(r"(?:fetch|import|url)\(['\"]https?://|src=['\"]https?://", t)]


def figures_not_asked_for():
    "Stage 80 draws a figure for each network it is asked about; those of the others have no picture in this run."
    asked = json.loads((ROOT / "figures/records/80_slim.json").read_text())["parameters"]["networks"]
    drawn = {"raw-film network": ["fig-slim-raw-film"], "EfficientViT": ["fig-slim-efficientvit"],
             "report network": ["fig-slim-report", "fig-slim-words"], "graph classifier": ["fig-slim-graph"]}
    return {figure for network, figures in drawn.items() if network not in asked for figure in figures}


def test_every_figure_has_number_caption_and_words(pages):
    missing = figures_not_asked_for()
    for name in NOTEBOOKS:
        soup, number = pages[page_name(name)], 0
        for cell in nbformat.read(ROOT / "nbs" / name, 4).cells:
            label = cell_options(cell.source).get("label", "") if cell.cell_type == "code" else ""
            if not label.startswith("fig-"): continue
            number += 1
            if label in missing: continue
            place = soup.find(id=label)
            assert place is not None, f"{name}: {label} is not on the page"
            assert (
                place.select_one("figcaption") is not None
            ), f"{name}: {label} has no picture: run the notebook and keep its outputs"
            assert (
                place.select_one("figcaption").get_text(strip=True).startswith(f"Figure {number}.")), f"{name}: {label}"
            assert all((img.get("alt") or "").strip() for img in place.select("img"))
    assert not [n for n, s in pages.items() for i in s.select("main img") if not (i.get("alt") or "").strip()]


def test_formulas_are_set(pages):
    written = sum(len(re.findall(r"\$\$.+?\$\$", c.source, re.S)) for n in NOTEBOOKS
                  for c in nbformat.read(ROOT / "nbs" / n, 4).cells if c.cell_type == "markdown")
    assert sum(len(s.select('math[display="block"]')) for s in pages.values()) >= written > 0
    assert not [n for n, s in pages.items() if s.select("span.math")]
    assert not [n for n, s in pages.items() for m in s.select("math") if re.search(r"\\[a-zA-Z]", m.get_text())]


def test_search_knows_the_pages(site):
    text = (site / "search.json").read_text()
    assert json.loads(text) and "api/pipeline.html" in text


# with a browser, where there is one

PROBE = """<script>window.addEventListener('load', async () => {
  const all = (selector) => [...document.querySelectorAll(selector)], asked = location.search;
  const wait = (ms) => new Promise((done) => setTimeout(done, ms)), rolls = ['auto', 'scroll', 'hidden'];
  const texts = (root) => {
    const walk = document.createTreeWalker(root, NodeFilter.SHOW_TEXT), found = [];
    while (walk.nextNode()) {
      const box = walk.currentNode.parentElement, words = walk.currentNode.data.replace(/\\s+/g, ' ').trim();
      if (words && box.checkVisibility({checkVisibilityCSS: true}) && !box.closest('script, style, math, svg'))
        found.push([box, words]) }
    return found };
  const rgb = (colour) => {
    const [r, g, b, a = 1] = colour.match(/[\\d.]+/g).map(Number), unit = colour.startsWith('color(') ? 255 : 1;
    return [r * unit, g * unit, b * unit, a] };
  const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
  const ground = (box) => {
    if (!box) return [255, 255, 255, 1];
    const own = rgb(getComputedStyle(box).backgroundColor);
    return own[3] === 1 ? own : over(own, ground(box.parentElement)) };
  const light = (c) => [0.2126, 0.7152, 0.0722].reduce((sum, w, i) => {
    const v = c[i] / 255; return sum + w * (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4) }, 0);
  const faint = () => {
    const found = {};
    for (const [box, words] of texts(document.body)) {
      const style = getComputedStyle(box), below = ground(box), colour = rgb(style.color);
      for (let b = box; b; b = b.parentElement) colour[3] *= Number(getComputedStyle(b).opacity);
      const [x, y] = [light(over(colour, below)), light(below)].sort((p, q) => q - p);
      const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
      const ratio = (x + 0.05) / (y + 0.05), place = box.localName + '.' + box.className;
      if (ratio < (large ? 3 : 4.5)) found[place] = [ratio.toFixed(2), style.color, `on ${below}`, words.slice(0, 30)] }
    return found };
  const wide = all('main *').filter((e) => {
    if (e.getBoundingClientRect().right <= innerWidth + 1) return false;
    for (let p = e.parentElement; p; p = p.parentElement)
      if (rolls.includes(getComputedStyle(p).overflowX)) return false;
    return true }).map((e) => e.tagName + '.' + e.className + '#' + e.id);
  const read = texts(document.querySelector('main') || document.body);
  const size = (list) => list.map((t) => t[1]).join(' ').length;
  const seen = {inner: innerWidth, page: document.documentElement.scrollWidth, wide: wide.slice(0, 3),
    code: size(read.filter((t) => t[0].closest('pre.sourceCode'))) / Math.max(1, size(read)),
    flat: all('math').filter((m) => m.getBoundingClientRect().height < 3 && m.offsetParent !== null).length,
    fetched: performance.getEntriesByType('resource').map((r) => r.name)
      .filter((n) => !n.startsWith(location.origin) && !n.startsWith('data:'))};
  if (asked === '?full') {
    seen.unreached = all('main pre, main .sd-table').filter((b) => b.checkVisibility()
      && b.scrollWidth > b.clientWidth + 1 && b.tabIndex !== 0).length;
    const bar = document.getElementById('quarto-sidebar'), here = bar && bar.querySelector('a.active');
    const [a, b] = [here, bar].map((e) => e && e.getBoundingClientRect());
    seen.here = !!here && a.top >= b.top - 1 && a.bottom <= Math.min(b.bottom, innerHeight) + 1;
    const mode = () => document.documentElement.classList.contains('quarto-dark') ? 'dark' : 'light';
    seen.faint = {};
    for (const turn of [0, 1]) {
      if (turn) { window.smalldocsToggleScheme(); await wait(900) }
      seen.faint[mode()] = faint() }
    const button = document.querySelector('button.show-code'), folds = all('main details.code-fold');
    const open = () => folds.filter((f) => f.open).length;
    seen.folds = [folds.length, open()];
    if (button) { button.focus(); button.click(); seen.folds.push(open(), button.getAttribute('aria-pressed')) } }
  if (asked === '?find') {
    const input = document.querySelector('.smalldocs-search input');
    const first = () => document.querySelector('.search-result');
    await (await fetch('search.json')).json();
    seen.found = {};
    for (const words of ['A7', 'AUC', 'MIMIC', 'hit rate']) {
      if (first()) document.querySelector('.smalldocs-search-results').replaceChildren();
      input.focus(); input.value = words; input.dispatchEvent(new Event('input'));
      for (let turn = 0; turn < 20 && !first(); turn++) { await fetch('search.json'); await wait(200) }
      seen.found[words] = (first() || {href: ''}).href } }
  parent.postMessage(JSON.stringify(seen), '*') })</script>"""
# a desktop window cannot be as narrow as a phone, a frame can
FRAME = """<!doctype html><script>const seen = {}; addEventListener('message', e => {
  for (const f of document.querySelectorAll('iframe'))
    if (f.contentWindow === e.source) seen[f.dataset.page] = JSON.parse(e.data);
  document.getElementById('probe').textContent = JSON.stringify(seen) })</script><pre id="probe">{}</pre>"""
REPRESENTATIVE = ("index.html", "glossary.html", "paper/prune.html", "api/prune.html")


def seen_in_browser(site, folder, frames) -> dict[str, dict]:
    "Pages opened in Chromium: name of a frame -> what was measured there; frames are name, address, width."
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None: pytest.skip("no Chromium on this machine: apt-get install chromium")
    probed = shutil.copytree(site, folder / "site")
    for page in probed.rglob("*.html"):
        page.write_text(page.read_text(encoding="utf-8").replace("</head>", PROBE + "</head>", 1), encoding="utf-8")
    (probed / "probe.html").write_text(FRAME + "".join(
        f'<iframe data-page="{name}" src="{address}" style="width:{width}px;height:800px;border:0"></iframe>'
        for name, address, width in frames))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *words): pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(probed))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                 "--disable-background-networking", "--disable-component-update", "--disable-sync"]
        done = subprocess.run(
            [program, *flags, f"--user-data-dir={folder / 'profile'}", "--window-size=1400,900",
             "--virtual-time-budget=25000", "--dump-dom", f"http://127.0.0.1:{server.server_port}/probe.html"],
            capture_output=True,
            text=True,
            timeout=600,
        )
        server.shutdown()
    return json.loads(BeautifulSoup(done.stdout, "html.parser").find(id="probe").get_text())


def full_frames() -> list:
    "A few pages, wide and narrow, with all that is measured; and one that is searched."
    frames = [(f"{n} at {w}", f"{n}?full", w) for n in REPRESENTATIVE for w in (1300, 390)]
    return [*frames, ("search", "index.html?find", 1300)]


@pytest.fixture(scope="session")
def measured(site, tmp_path_factory) -> dict[str, dict]:
    "Every page opened once, 390 pixels wide, and a few of them for all that is measured."
    frames = [(n, n, 390) for n in names_in(site)] + full_frames()
    return seen_in_browser(site, tmp_path_factory.mktemp("probed"), frames)


@pytest.mark.parametrize("name", [page_name(n) for n in NOTEBOOKS])
def test_a_page_fits_a_phone_and_fetches_nothing(measured, name):
    seen = measured[name]
    assert seen["inner"] == 390 and seen["page"] <= 391 and seen["wide"] == [], seen
    assert seen["fetched"] == [] and seen["flat"] == 0, seen


@pytest.mark.parametrize("name", [page_name(n) for n in NOTEBOOKS if n.startswith("paper/")])
def test_a_stage_is_read_for_its_results(measured, name):
    assert measured[name]["code"] <= 0.35, f"{measured[name]['code']:.0%} of what is in sight is code"


@pytest.mark.parametrize("width", (1300, 390))
@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_a_page_is_legible_and_can_be_reached(measured, name, width):
    seen = measured[f"{name} at {width}"]
    assert seen["inner"] == width and seen["page"] <= width + 1 and seen["wide"] == []
    assert sorted(seen["faint"]) == ["dark", "light"] and seen["faint"] == {"dark": {}, "light": {}}
    assert seen["unreached"] == 0
    if width == 1300: assert seen["here"], "the page is out of sight in the sidebar"


@pytest.mark.parametrize("name", ["paper/prune.html", "api/prune.html"])
def test_one_button_opens_all_code(measured, name):
    folds, before, after, pressed = measured[f"{name} at 1300"]["folds"]
    assert folds > 5 and before == 0 and after == folds and pressed == "true"


def test_search_leads_to_where_a_word_is_explained(measured):
    found = {words: urlsplit(address).path[1:] + "#" + urlsplit(address).fragment
             for words, address in measured["search"]["found"].items()}
    assert found["A7"].startswith("defects.html#a7") and found["AUC"] == "glossary.html#auc"
    assert found["MIMIC"].startswith("data/mimic-cxr.html") and found["hit rate"] == "glossary.html#hit-rate"


def test_a_page_can_be_read_without_a_script(pages):
    for name, soup in pages.items():
        if name == "404.html": continue
        assert soup.body.select_one("a")["href"] == "#quarto-document-content", name
        assert not soup.select("main .show-code") and not soup.select("main details details"), name
        assert all(fold.select_one("summary").get_text(strip=True) for fold in soup.select("main details")), name


def test_no_place_is_there_twice_and_every_table_and_picture_is_told(pages):
    for name, soup in pages.items():
        ids = [tag["id"] for tag in soup.select("[id]")]
        assert len(ids) == len(set(ids)), name
        assert all(re.match(r"Table \d+\. \S", table.caption.get_text()) for table in soup.select("main table")), name


def test_a_chapter_begins_with_what_it_offers(pages):
    for name in ("study", "prune", "asset", "graph"):
        main = pages[f"api/{name}.html"].select_one("main")
        offered = [a["href"][1:] for a in main.select(".api-view a[href^='#']")]
        assert len(offered) > 3 and all(main.find(id=place) for place in offered), name
        assert main.select_one("#api-view").find_previous("pre") is None, "before any code"
        source = [d for d in main.select("details > summary") if d.get_text().startswith("Source")]
        assert len(source) >= 3, name


def test_files_to_play_with_stand_beside_the_pages_as_they_are(site, pages):
    found = {entry["objectID"] for entry in json.loads((site / "search.json").read_text())}
    assert len(found) > 100 and not [i for i in found if i.startswith("figures/")], "nothing to search"
    for name, page in (("explore", "index.html"), ("90_frontier", "paper/frontier.html")):
        assert (site / f"figures/{name}.html").read_bytes() == (ROOT / f"figures/{name}.html").read_bytes(), name
        assert [a for a in pages[page].select("a[href]") if a["href"].endswith(f"figures/{name}.html")], page


def test_pages_beside_the_notebooks(site, pages):
    listed = (site / "llms.txt").read_text()
    assert [n for n in NOTEBOOKS if f"]({page_name(n)})" not in listed] == []
    cards = sorted(p.stem for p in (ROOT / "data_manifests").glob("*.md"))
    assert [c for c in cards if f"data/{c}.html" not in pages or f"(data/{c}.html)" not in listed] == []
    assert "No such page" in pages["404.html"].get_text() and len(pages["404.html"].select("a")) >= 3
    led = {a["href"] for a in pages["index.html"].select("nav a[href]")}
    assert {f"data/{c}.html" for c in cards} <= led
    held = (site / "search.js").read_text()
    assert json.loads(held[held.index("["):held.rindex(";")]) == json.loads((site / "search.json").read_text())
