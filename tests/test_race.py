"The race of two ways of building: the same patches, and a racer that dies is heard."
import io
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from neural import race

from neural.build import shard_of
from neural.race import (BUILDING, STEPPING, StepStudies, as_many_as_fit, bench_cohort, bench_gpu, bench_network,
                         fast_step, held_twice, measured_part, opened, plain_reading, racers, reference_step,
                         small_networks, step_network)
from neural.report import ReportReader, evidence, split_sections
from neural.scores import Network, load_scoring
from neural.study import NeuralError, report_text
from neural.vlm import load_vlm, small_config
from neural.yardstick import TimeBudget, read_tables, write_tables

TINY = small_config(200, 96, width=64, d_model=64)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    home = tmp_path_factory.mktemp("race")
    manifest = bench_cohort(home / "cohort", 6, side=384)
    return manifest, bench_network(home / "vlm", TINY, manifest)


def test_both_ways_keep_the_same_patches(cohort):
    "The reference does the work that is compared: on films decoded alike it retains what the library retains."
    manifest, vlm = cohort
    network = Network(
        load_vlm(vlm), AutoTokenizer.from_pretrained(vlm, local_files_only=True), ReportReader(), load_scoring(vlm))
    texts = [evidence(split_sections(report_text(manifest, s))) for s in manifest]
    films = [held_twice(manifest.image_path(s.frontal)) for s in manifest]
    plain = [plain_reading(network, opened(f, 96), t)[0] for f, t in zip(films, texts)]
    same = [np.asarray(Image.open(io.BytesIO(f)).resize((96, 96), Image.BILINEAR).convert("L"), np.float32)[None] / 255
            for f in films]
    ours = shard_of(network, [(s.study_id, x, t) for s, x, t in zip(manifest, same, texts)], "image+report")
    assert [list(p.patches) for p in plain] == [list(r.patches) for r in ours]
    for p, r in zip(plain, ours): assert np.allclose(p.features, r.features, atol=1e-4)


def test_a_racer_that_dies_is_heard(cohort):
    with pytest.raises(NeuralError, match="the float32 way has ended"), racers("racer", ("float32",), *cohort) as go:
        go("float32", "many", False)


def test_both_steps_learn_the_same():
    few = StepStudies(96, film=256)
    steps = [make(few, step_network().train()) for make in (reference_step, fast_step)]
    losses = np.array([[step([0, 1, 2, 3]) for _ in range(6)] for step in steps])
    assert np.allclose(*losses, rtol=0.01) and (losses[:, -1] < losses[:, 0]).all()


# on one card

NO_CARD = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")


@pytest.fixture(scope="module")
def tried():
    "The bench of a card, on a CPU and tiny networks."
    return bench_gpu("cpu", tiny=True)


def test_every_part_and_way_has_its_row(tried):
    steps = ["fine-tuning step", *small_networks(True)]
    assert list(tried["gpu"].index) == [("building", way) for way in BUILDING] + [
        (part, way) for part in steps for way in STEPPING]
    assert len(small_networks()) == 4 and {c.stem for c in small_networks().values()} == {"conv", "levels"}
    assert not tried["gpu"].isna().any(axis=None) and (tried["gpu"]["rounds"] == 3).all()


def test_shares_ratios_and_memory_are_such(tried):
    table = tried["gpu"]
    assert (table["share of the bf16 matrix peak"].between(0, 1.2, inclusive="neither").all()
            and (table["peak memory, GB"] >= 0).all())
    assert (table["studies a second"] > 0).all() and (table["times the reference"] > 0).all()
    assert (table.xs("plain, float32", level="way")["times the reference"] == 1).all()
    work = table["10⁹ operations a study"]
    assert work["building", "float32"] < work["building", "plain, float32"] < work["fine-tuning step", "bfloat16"]


def test_the_record_says_how_it_was_measured_and_within_what_time(tried):
    about = tried["settings"].iloc[0]
    assert (about["device"] == "cpu" and about["sizes"] == "tiny"
            and 0 < about["minutes taken"] <= about["minutes allowed"] == 8)
    assert ("bfloat16" in about["half precision"] and "TF32" in about["float32 products"]
            and about["bfloat16 matrix peak, 10⁹ operations a second"] > 0)


@NO_CARD
def test_without_a_card_one_line_says_so(monkeypatch):
    monkeypatch.setattr(race, "matrix_peak", lambda *a, **k: pytest.fail("measured before it was refused"))
    with pytest.raises(NeuralError, match="^this machine has no GPU that PyTorch can use; [^\n]*$"): bench_gpu()
    with pytest.raises(NeuralError, match="must be 'cpu' or 'cuda'"): bench_gpu("gpu")


def test_time_that_is_too_short_gives_no_table(monkeypatch):
    monkeypatch.setattr(race, "ready_studies", lambda home, config, n: (home, [("s1", None, "clear")]))
    monkeypatch.setattr(
        race, "load_tokenizer", lambda vlm: lambda text, **k: dict(input_ids=[5], offset_mapping=[(0, 5)]))
    monkeypatch.setattr(race, "report_ids", lambda *a: ([5, 1], []))
    monkeypatch.setattr(race, "building", lambda how, *a: lambda: None)
    monkeypatch.setattr(race, "stepping", lambda *a: pytest.fail("went on after there was no time"))
    with pytest.raises(NeuralError, match="^building: 3 rounds of .* do not fit into the 0 s that are left; [^\n]*$"):
        bench_gpu("cpu", 1e-6, tiny=True)


def test_a_smaller_card_sees_fewer_films_at_once():
    seen = []
    def make(films):
        def way():
            seen.append(films)
            if films > 3: raise torch.OutOfMemoryError("CUDA out of memory")
            return lambda: None
        return way
    table = as_many_as_fit(lambda n: measured_part({"a": make(n)}, {"a": 1.0}, n, TimeBudget(60, 1), 0, "sums"), 16)
    assert seen == [16, 8, 4, 2] and table["films a round"]["a"] == 2


def page_with(figures: Path) -> tuple:
    "What the page of large numbers shows, where these tables are published, and the lines of its bill."
    shown, path = [], Path(__file__).resolve().parents[1] / "nbs/paper/large.ipynb"
    space = {"display": lambda *tables: shown.extend(map(str, tables)),
             "print": lambda *words: shown.append(" ".join(map(str, words)))}
    sources = [c.source for c in nbformat.read(path, 4).cells
               if c.cell_type == "code" and "plt.subplots" not in c.source and "line.iloc[0]" not in c.source]
    for source in sources:
        exec(source + (f"\nfigures = {str(figures)!r}" if source.startswith("figures: str") else ""), space)
    return "\n".join(shown), list(space["bills"].index)


@pytest.mark.parametrize(
    "device, sizes, measured", [("cuda", "paper", True), ("cpu", "tiny", False), (None, None, False)])
def test_the_page_shows_the_table_or_that_there_is_none(tried, tmp_path, device, sizes, measured):
    for path in (Path(__file__).resolve().parents[1] / "figures/bench").glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    (tmp_path / "gpu.json").unlink(missing_ok=True)
    if device:
        write_tables(tmp_path / "gpu.json", "neural bench gpu",
                     tried | {"settings": tried["settings"].assign(device=device, sizes=sizes)})
        assert read_tables(tmp_path / "gpu.json")[1]["gpu"].columns[:2].tolist() == ["part", "way"]
    shown, bill = page_with(tmp_path)
    assert ("not measured" in shown, "the network alone" in shown) == (not measured, measured)
    assert ("GPU-hours (measured)" in bill, "GPU-hours (assumed share)" in bill) == (measured, not measured)
