"Figures: colours that stay apart, dots where the numbers are, colour bars of the data, files that say what they show."
import base64
import io
import linecache
import math
import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import matplotlib
import nbclient
import nbformat
import numpy as np
import pandas as pd
import pytest
from matplotlib import font_manager
from matplotlib.colors import to_rgb
from PIL import Image

matplotlib.use("agg")
import matplotlib.pyplot as plt

from neural.plot import (FIXED, PALETTE, THEMES, cell_words, colours, draw_forest, draw_radiograph, draw_rates,
                         draw_reliability, draw_roc, figure_words, panels, save_figure, theme)
from neural.publish import slim_output
from neural.record import describe_figures
from neural.study import NeuralError

WORDS = dict(caption="AUC of 0.83 – on «test».", alt="One dot with its interval.", source="53_controls")


@pytest.fixture(autouse=True)
def light():
    "Every test begins and ends with the light theme alone."
    with plt.rc_context(theme()):
        yield
    plt.close("all")


# colours

APART = 15  # CIE 1976 L*a*b*; about 2.3 is just noticeable
SIGHT = {  # Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB
    "three kinds of cones": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]}


def linear(colour):
    "Linear RGB of a hex colour."
    return [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]


def lab(colour, sight):
    "L*a*b* of a colour as an eye sees it."
    r, g, b = np.clip(np.asarray(SIGHT[sight]) @ linear(colour), 0, 1)
    x, y, z = ((0.4124564 * r + 0.3575761 * g + 0.1804375 * b) / 0.95047, 0.2126729 * r + 0.7151522 * g + 0.0721750 * b,
               (0.0193339 * r + 0.1191920 * g + 0.9503041 * b) / 1.08883)
    fx, fy, fz = (t ** (1 / 3) if t > 216 / 24389 else (24389 / 27 * t + 16) / 116 for t in (x, y, z))
    return 116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)


def contrast(a, b):
    "Ratio of luminances, as the guidelines for readable pages define it."
    low, high = sorted(np.dot((0.2126, 0.7152, 0.0722), linear(c)) + 0.05 for c in (a, b))
    return high / low


@pytest.mark.parametrize("variant", THEMES)
@pytest.mark.parametrize("sight", SIGHT)
def test_all_colours_ink_and_page_stay_apart_for_every_eye(sight, variant):
    page, ink, *_ = THEMES[variant]
    names = {**PALETTE, "ink": ink, "page": page}
    close = {(a, b): round(math.dist(lab(names[a], sight), lab(names[b], sight)), 1) for a, b in combinations(names, 2)}
    assert {pair: d for pair, d in close.items() if d < APART} == {}


def test_the_measure_itself_finds_what_protanopes_and_deuteranopes_confuse():
    assert math.dist(lab("#D55E00", "protanopia"), lab("#6B6B00", "protanopia")) < 7
    assert math.dist(lab("#D55E00", "three kinds of cones"), lab("#6B6B00", "three kinds of cones")) > 40
    assert math.dist(lab("#2E5A2E", "deuteranopia"), lab("#8E1B3A", "deuteranopia")) < 7


def test_every_colour_shows_on_a_light_and_on_a_dark_page():
    pages = {THEMES[v][0] for v in THEMES}
    assert min(contrast(c, page) for c in PALETTE.values() for page in pages) > 1.9
    assert all(contrast(ink, page) > 14 for page, ink, *_ in THEMES.values())


def test_fixed_colours_are_fixed():
    assert colours(FIXED) == {
        "image+report": "#0072B2", "image-only": "#E69F00", "phantoms": "#009E73", "Open-i": "#CC79A7",
        "described": "#56B4E9", "released": "#D55E00", "composed": "#4B3FC4", "prior": "#CDB86A", "random": "#636363",
        "all patches": "#8E1B3A", "raw film": "#1A1A1A"}
    crowd = [f"system {i}" for i in range(40)]
    assert {n: c for n, c in colours([*crowd, *FIXED]).items() if n in FIXED} == colours(FIXED)
    with plt.rc_context(theme("dark")):
        assert colours("raw film") == {"raw film": "#F2F2F2"} and colours("random") == {"random": "#636363"}


def test_another_name_has_one_colour_in_every_figure_and_every_process():
    assert colours("mosaic") == {"mosaic": "#8E1B3A"}
    assert colours(["image+report", "mosaic", "random"])["mosaic"] == "#8E1B3A"
    code = "from neural.plot import colours; print(colours(['pooled vector', 'mosaic', 'rollout']))"
    place = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parents[1])}
    said = subprocess.run([sys.executable, "-c", code], env=place, capture_output=True, text=True, check=True).stdout
    assert said == f"{colours(['pooled vector', 'mosaic', 'rollout'])}\n"


@pytest.mark.parametrize("draw", range(20))
def test_no_two_names_of_a_figure_share_a_colour_while_there_are_enough(draw):
    rng = np.random.default_rng(draw)
    names = [f"system {i}" for i in rng.integers(0, 9999, 13 - draw % 5)] + list(FIXED)[:draw % 5]
    given = colours(names)
    assert list(given) == list(dict.fromkeys(names)) and len(set(given.values())) == len(given)
    assert colours(rng.permutation(names).tolist()) == given


def test_colours_of_tracks_and_data_sets_are_given_away_last():
    kept = {colours(n)[n] for n in ("image+report", "image-only", "phantoms", "Open-i")}
    assert not kept & set(colours([f"system {i}" for i in range(9)]).values())
    assert kept < set(colours([f"system {i}" for i in range(13)]).values())


# theme

@pytest.mark.parametrize("variant", THEMES)
def test_a_theme_is_whole_and_leaves_nothing_behind(variant):
    before = dict(plt.rcParams)
    with plt.rc_context(theme(variant)):
        fig, ax = plt.subplots()
        assert fig.get_facecolor() == ax.get_facecolor() == (*to_rgb(THEMES[variant][0]), 1)
        assert {to_rgb(t.label1.get_color()) for t in ax.xaxis.get_major_ticks()} == {to_rgb(THEMES[variant][1])}
        assert not ax.spines["top"].get_visible() and fig.get_layout_engine() is not None
    assert dict(plt.rcParams) == before


def test_every_cell_of_a_notebook_shows_what_it_drew_within_the_theme():
    drawn = "with plt.rc_context(theme()): plt.subplots()[1].plot([1, 2])"
    sources = ["import matplotlib.pyplot as plt\nfrom neural.plot import theme", drawn, drawn]
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    nbclient.NotebookClient(nb, kernel_name="python3", timeout=120).execute()
    assert [sum("image/png" in o.get("data", {}) for o in c.outputs) for c in nb.cells] == [0, 1, 1]


def test_letters_are_those_that_come_with_matplotlib():
    assert plt.rcParams["font.family"] == ["DejaVu Sans"]
    assert Path(font_manager.findfont("DejaVu Sans")).name == "DejaVuSans.ttf"


# forest

FOREST = pd.DataFrame(
    dict(finding=["Edema", "Edema", "Pneumonia", "Edema"], data=["phantoms", "Open-i", "Open-i", "phantoms"],
         track=["image-only", "image-only", "image+report", "image+report"], value=[0.1, -0.2, 0.3, 0.0],
         low=[0.05, -0.3, 0.2, -0.1], high=[0.15, -0.1, 0.4, 0.1])
)


def parts(ax):
    "Ends of the intervals, places of the dots."
    lines, dots = ax.collections
    return np.array(lines.get_segments()), np.asarray(dots.get_offsets())


def test_forest_puts_the_points_where_the_numbers_are():
    segments, dots = parts(draw_forest(FOREST, group="data", mark="track", reference=0, label="difference"))
    assert np.allclose(dots[:, 0], FOREST.value) and np.allclose(segments[:, :, 0], FOREST[["low", "high"]])
    assert np.allclose(segments[:, :, 1], dots[:, 1:]) and np.array_equal(np.round(dots[:, 1]), [0, 0, 1, 0])
    order = np.argsort(dots[[0, 3, 1], 1])
    # phantoms before Open-i, image-only before image+report
    assert np.array_equal(order, [0, 1, 2])
    assert np.diff(np.sort(dots[[0, 1, 3], 1])) == pytest.approx([0.7 / 3] * 2)


def test_forest_gives_each_group_its_colour_and_each_row_its_name():
    ax = draw_forest(FOREST, group="data", mark="track", band=(-0.05, 0.05), label="difference")
    lines, dots = ax.collections
    wanted = [to_rgb(colours(d)[d]) for d in FOREST.data]
    assert np.allclose(lines.get_colors()[:, :3], wanted) and np.allclose(dots.get_facecolors()[:, :3], wanted)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["Edema", "Pneumonia"] and ax.yaxis_inverted()
    assert {t.get_text() for t in ax.get_legend().get_texts()} >= {*FOREST.data, *FOREST.track}
    assert ax.get_xlabel() == "difference" and draw_forest(FOREST).get_legend() is None


def test_forest_takes_records_numbers_as_names_and_missing_ends():
    records = [dict(k=4, value=0.7, low=0.6, high=0.8), dict(k=10, value=0.8, low=None, high=None),
               dict(k=40, value=None, low=None, high=None)]
    ax = draw_forest(records, row="k", group="k", mark="k")
    assert [t.get_text() for t in ax.get_yticklabels()] == ["4", "10", "40"]
    assert sorted(np.asarray(ax.collections[1].get_offsets())[:, 0]) == [0.7, 0.8]


def test_long_names_leave_the_intervals_their_room():
    table = FOREST.assign(finding=FOREST.finding.map(lambda f: f"{f}, two sections, CICL less uniform smoothing"),
                          data=FOREST.data.map(lambda d: f"{d}, 100 % of patients labelled"))
    fig = draw_forest(table, group="data").figure
    fig.canvas.draw()
    assert fig.axes[0].get_window_extent().width > 0.3 * fig.bbox.width
    assert fig.axes[0].get_window_extent().width / fig.dpi > 3


def test_forest_draws_into_given_axes():
    fig, axes = plt.subplots(1, 2)
    assert draw_forest(FOREST, ax=axes[1]) is axes[1] and not axes[0].collections and len(plt.get_fignums()) == 1


@pytest.mark.parametrize(
    "change,said",
    [(dict(low=None), "no value"), (dict(value="0.1 or so"), "must be numbers"),
     (dict(low=9.0), "line 0 of the table has its low end"), (dict(value=np.nan), "no value to draw"),
     (dict(finding=None), "lacks its finding")],
)
def test_forest_refuses_a_table_that_is_not_one(change, said):
    table = FOREST.drop(columns="value") if change == dict(low=None) else FOREST.assign(**change)
    with pytest.raises(NeuralError, match="need the column 'value'" if change == dict(low=None) else said):
        draw_forest(table)


# curves

def test_roc_draws_the_curve_and_its_band():
    x, y = np.linspace(0, 1, 11), np.linspace(0, 1, 11) ** 0.5
    ax = draw_roc(x, y, y * 0.9, np.minimum(1, y * 1.1), "described", "#123456")
    assert np.allclose(ax.lines[0].get_xydata(), np.stack([x, y], 1)) and ax.lines[0].get_color() == "#123456"
    edge = ax.collections[0].get_paths()[0].vertices
    assert edge[:, 1].max() == 1 and np.isclose(edge[edge[:, 0] == x[5], 1].min(), 0.9 * y[5])
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["described"]


def test_two_curves_without_a_colour_get_two():
    ax = draw_reliability([0.1, 0.9], [0.2, 0.8])
    draw_reliability([0.1, 0.9], [0.1, 0.9], ax=ax)
    assert (ax.lines[0].get_color() == PALETTE["blue"] and ax.lines[2].get_color() == PALETTE["orange"]
            and ax.get_legend() is None)


def test_reliability_draws_dots_by_their_studies():
    ax = draw_reliability(pd.Series([0.1, 0.5]), [0.2, 0.4], [10, 40], [0.1, 0.3], [0.3, 0.5])
    dots, band = ax.collections
    assert np.allclose(dots.get_offsets(), [[0.1, 0.2], [0.5, 0.4]]) and dots.get_sizes().tolist() == [19, 64]
    assert {tuple(v) for v in band.get_paths()[0].vertices.round(6)} == {(0.1, 0.1), (0.1, 0.3), (0.5, 0.3), (0.5, 0.5)}


@pytest.mark.parametrize(
    "draw",
    [lambda: draw_roc([0, 1], [0, 1, 1]), lambda: draw_reliability([[0.1]], [[0.1]]),
     lambda: draw_roc([0, 1], [0, 1], [0], [1])],
)
def test_curves_of_different_lengths_are_refused(draw):
    with pytest.raises(NeuralError, match="arrays of one length"):
        draw()


# rates

RATES = pd.DataFrame(
    dict(system=["mosaic", "random", "mosaic", "random", "both"], bytes=[800, 400, 200, 100, 900],
         value=[0.8, 0.7, 0.75, 0.65, 0.9])
)
RATES = RATES.assign(low=RATES.value - 0.05, high=RATES.value + 0.05)


def test_rates_join_each_system_in_the_order_of_its_bytes():
    ax = draw_rates(RATES, loose=["both"], reference={"raw film": 0.95}, label="AUC")
    drawn = {line.get_label(): line for line in ax.lines}
    assert (
        drawn["mosaic"].get_xydata().tolist() == [[200, 0.75], [800, 0.8]] and drawn["both"].get_linestyle() == "None")
    assert np.allclose(ax.collections[0].get_segments(), [[[200, 0.7], [200, 0.8]], [[800, 0.75], [800, 0.85]]])
    assert drawn["raw film"].get_ydata() == [0.95, 0.95] and drawn["random"].get_color() == PALETTE["grey"]
    assert len({line.get_marker() for line in ax.lines[:3]}) == 3 and ax.get_xscale() == "log"


@pytest.mark.parametrize(
    "budgets,ticks",
    [((120, 16000), ["100", "200", "500", "1,000", "2,000", "5,000", "10,000", "20,000"]),
     ((1, 40), ["1", "2", "5", "10", "20"]), ((0.007, 1), ["0.01", "0.02", "0.05", "0.1", "0.2", "0.5", "1"])],
)
def test_ticks_of_a_budget_are_written_out(budgets, ticks):
    ax = draw_rates([dict(system="a", k=k, value=0.5, low=0.4, high=0.6) for k in budgets], x="k")
    ax.figure.canvas.draw()
    low, high = ax.get_xlim()
    assert [t.get_text() for t in ax.get_xticklabels() if low <= t.get_position()[0] <= high] == ticks


@pytest.mark.parametrize("wrong", [0, -3, "400 bytes"])
def test_a_budget_off_the_logarithmic_axis_is_refused(wrong):
    with pytest.raises(NeuralError, match="bytes must be numbers above 0"):
        draw_rates(RATES.assign(bytes=wrong))


# radiographs

FILM = np.linspace(0, 1, 96 * 96).reshape(96, 96)


@pytest.mark.parametrize("scale,shift", [(1, 0), (1e-3, 7e-3), (50, -20)])
def test_the_colour_bar_spans_the_data(scale, shift):
    heat = np.random.default_rng(0).random(144) * scale + shift
    ax = draw_radiograph(FILM[None], heat)
    film, drawn = ax.images
    assert np.array_equal(film.get_array(), FILM) and np.allclose(drawn.get_array(), heat.reshape(12, 12))
    assert (drawn.colorbar.vmin, drawn.colorbar.vmax) == pytest.approx((heat.min(), heat.max()))
    ax.figure.canvas.draw()
    ends = [float(t.get_text().replace("−", "-")) for t in drawn.colorbar.ax.get_xticklabels()]
    assert ends == pytest.approx([heat.min(), heat.max()], abs=0.06 * (heat.max() - heat.min())) and ends[0] < ends[1]


def test_a_given_span_is_shared_and_the_film_shows_where_the_heat_is_low():
    drawn = draw_radiograph(FILM, np.linspace(0.2, 0.4, 12), grid=(3, 4), span=(0, 0.4)).images[1]
    assert (drawn.colorbar.vmin, drawn.colorbar.vmax) == (0, 0.4)
    assert np.allclose(drawn.get_alpha(), 0.65 * np.linspace(0.5, 1, 12).reshape(3, 4))


def test_heat_without_a_range_or_a_bar_has_none():
    assert draw_radiograph(FILM, np.zeros(144)).images[1].colorbar is None
    assert draw_radiograph(FILM, np.arange(144), bar=False).images[1].colorbar is None


def test_radiographs_of_a_row_are_of_one_size_with_and_without_heat():
    fig, axes = panels(["film", "lesion", "flat", "heat"])
    for ax, given in zip(axes, ({}, dict(lesion=np.eye(96)), dict(heat=np.ones(144)), dict(heat=np.arange(144)))):
        draw_radiograph(FILM, **given, ax=ax)
    fig.canvas.draw()
    corners = np.array([ax.transData.transform([(0, 0), (12, 12)]) for ax in axes])
    assert np.allclose(corners[:, :, 1], corners[0, :, 1]) and np.allclose(
        np.ptp(corners[:, :, 0], 1), np.ptp(corners[0, :, 0]))


def test_patches_and_lesion_stand_where_they_are():
    mask = np.zeros((48, 48))
    mask[8:16, 24:36] = 1                                         # rows 2 and 3, columns 6 to 8 of a 12 x 12 grid
    ax = draw_radiograph(FILM, patches=np.array([30, 31]), lesion=mask)
    assert [r.get_xy() for r in ax.patches] == [(6, 2), (7, 2)]
    places = np.concatenate([p.vertices for c in ax.collections for p in c.get_paths()])
    assert places.min(0) == pytest.approx([6, 2], abs=0.13) and places.max(0) == pytest.approx([9, 4], abs=0.13)
    assert not draw_radiograph(FILM, lesion=np.zeros((48, 48))).collections


def test_panels_stand_in_rows_and_hide_their_frames():
    fig, axes = panels(["a", "b", "c"], columns=2)
    assert [ax.get_title() for ax in axes] == ["a", "b", "c"] == [ax.get_title() for ax in fig.axes]
    assert [ax.get_subplotspec().get_geometry() for ax in axes] == [(2, 2, i, i) for i in range(3)] and not any(
        ax.axison for ax in axes)


@pytest.mark.parametrize(
    "given,said",
    [(dict(image=np.zeros((3, 9, 9))), "a radiograph must be"), (dict(heat=np.ones(100)), "one number per patch"),
     (dict(heat=np.ones((12, 12))), "one number per patch"), (dict(lesion=np.ones(9)), "the mask of a lesion must be")],
)
def test_what_is_no_radiograph_heat_or_mask_is_refused(given, said):
    with pytest.raises(NeuralError, match=said):
        draw_radiograph(**{"image": FILM, **given})
    assert plt.get_fignums() == []                                # refused before anything is drawn


# files

def figure():
    "One of each kind of mark."
    fig, axes = panels(["radiograph", "forest"])
    draw_radiograph(FILM, np.arange(144.0), [3], np.eye(96), ax=axes[0])
    draw_forest(FOREST, group="data", ax=axes[1])
    return fig


def test_the_same_figure_twice_is_the_same_bytes(tmp_path, monkeypatch):
    first = save_figure(figure(), tmp_path / "a.png", **WORDS)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    fig = figure()
    again = save_figure(fig, "b.png", **WORDS)
    shown = save_figure(fig, tmp_path / "c/d/e.png", **WORDS)   # a second drawing, as a notebook makes to show it
    assert first.read_bytes() == again.read_bytes() == shown.read_bytes()
    other = save_figure(fig, tmp_path / "f.png", **{**WORDS, "alt": "Two panels."})
    assert other.read_bytes() != first.read_bytes()


def test_a_file_says_what_it_shows_and_nothing_of_the_day_or_the_machine(tmp_path):
    path = save_figure(figure(), tmp_path / "a.png", "  AUC of 0.83\n  – on «test». ", WORDS["alt"], WORDS["source"])
    assert figure_words(path) == WORDS
    with Image.open(path) as im:
        assert set(im.info) <= {"Description", "Alternative", "Source", "dpi"} and im.info["dpi"] == pytest.approx(
            (110, 110), abs=0.1)
    assert b"tIME" not in path.read_bytes() and str(tmp_path).encode() not in path.read_bytes()


@pytest.mark.parametrize("name", WORDS)
@pytest.mark.parametrize("empty", ["", "  \n", None])
def test_a_figure_without_words_is_refused(tmp_path, name, empty):
    with pytest.raises(NeuralError, match=f"a.png: a figure needs its {name}"):
        save_figure(figure(), tmp_path / "a.png", **{**WORDS, name: empty})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("source", ["/home/a/53_controls", "runs\\x", "nbs/paper/53_controls.ipynb"])
def test_a_source_is_a_name_and_no_path(tmp_path, source):
    with pytest.raises(NeuralError, match="source must be a name"):
        save_figure(figure(), tmp_path / "a.png", **{**WORDS, "source": source})


def test_only_a_picture_is_replaced(tmp_path):
    notes, folder, old = tmp_path / "notes.png", tmp_path / "folder.png", tmp_path / "old.png"
    notes.write_text("a protocol")
    folder.mkdir()
    figure().savefig(old)
    for path in (notes, folder, tmp_path / "a.svg"):
        with pytest.raises(NeuralError):
            save_figure(figure(), path, **WORDS)
    assert notes.read_text() == "a protocol" and sorted(p.name for p in tmp_path.iterdir()) == [
        "folder.png", "notes.png", "old.png"]
    assert figure_words(save_figure(figure(), old, **WORDS)) == WORDS


def test_words_are_asked_of_saved_figures_only(tmp_path):
    figure().savefig(tmp_path / "bare.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    for name, said in (("bare", "says nothing of itself"), ("broken", "cannot be read"), ("none", "cannot be read")):
        with pytest.raises(NeuralError, match=said):
            figure_words(tmp_path / f"{name}.png")


def test_a_run_record_takes_what_save_figure_returns(tmp_path, monkeypatch):
    path = save_figure(figure(), tmp_path / "run/figures/53_controls_patches.png", **WORDS)
    assert list(describe_figures(tmp_path / "run", [path])) == ["figures/53_controls_patches.png"]
    monkeypatch.chdir(tmp_path)
    relative = save_figure(figure(), "run/figures/53_controls_patches.png", **WORDS)
    assert describe_figures("run", [relative]) == describe_figures(tmp_path / "run", [path])


@pytest.mark.parametrize("variant", THEMES)
def test_a_figure_cut_to_256_colours_keeps_its_page_and_its_fixed_colours(variant):
    with plt.rc_context(theme(variant)):
        fig, ax = plt.subplots()
        ax.imshow([[to_rgb(c) for c in colours(FIXED).values()]])
        ax.set_axis_off()
        draft = io.BytesIO()
        fig.savefig(draft)
        wanted = {THEMES[variant][0], *colours(FIXED).values()}
    out = {"output_type": "display_data", "data": {"image/png": base64.b64encode(draft.getvalue()).decode()}}
    slim = Image.open(io.BytesIO(base64.b64decode(slim_output(out)["data"]["image/png"])))
    seen = {"#%02X%02X%02X" % c for _, c in slim.convert("RGB").getcolors()}
    assert slim.mode == "P" and seen >= wanted


CELL = '#| label: fig-a\n#| fig-cap: "AUC: 0.83, \\"described\\"."\n#| fig-alt: "One dot."\nfound = words()\n'


def run_cell(source, name):
    "What a notebook cell would get that calls `cell_words`."
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    space = dict(words=cell_words)
    exec(compile(source, name, "exec"), space)
    return space["found"]


def test_a_cell_hands_on_the_words_above_it():
    assert run_cell(CELL, "<cell 1>") == dict(caption='AUC: 0.83, "described".', alt="One dot.")
    inside = CELL.replace("found = words()", "def inner():\n    return words()\nfound = inner()")
    assert run_cell(inside, "<cell 2>")["alt"] == "One dot."


@pytest.mark.parametrize(
    "source,said",
    [("found = words()\n", "no caption"), (CELL.replace("fig-alt", "fig-pop"), "no alt"),
     (CELL.replace('"One dot."', '"One dot'), "cannot be read")],
)
def test_a_cell_without_words_is_refused(source, said):
    with pytest.raises(NeuralError, match=said):
        run_cell(source, f"<cell {said}>")
