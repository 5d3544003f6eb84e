"The race of two ways of building: the same patches, and a racer that dies is heard."
import io

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer

from neural.build import load_aggregation, shard_of
from neural.race import StepStudies, bench_cohort, bench_network, fast_step, held_twice, plain_reading, racers, reference_step, step_network
from neural.report import ReportReader, evidence, split_sections
from neural.study import NeuralError, report_text
from neural.vlm import load_vlm, small_config

TINY = small_config(200, 96, width=64, d_model=64)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    home = tmp_path_factory.mktemp("race")
    manifest = bench_cohort(home / "cohort", 6, side=384)
    return manifest, bench_network(home / "vlm", TINY, manifest)


def test_both_ways_keep_the_same_patches(cohort):
    "The reference does the work that is compared: on films decoded alike it retains what the library retains."
    manifest, vlm = cohort
    model, tokenizer, reader, settings = load_vlm(vlm), AutoTokenizer.from_pretrained(vlm, local_files_only=True), ReportReader(), load_aggregation(vlm)
    texts = [evidence(split_sections(report_text(manifest, s))) for s in manifest]
    films = [held_twice(manifest.image_path(s.frontal)) for s in manifest]
    plain = [plain_reading((model, tokenizer, reader, settings), f, t)[0] for f, t in zip(films, texts)]
    same = [np.asarray(Image.open(io.BytesIO(f)).resize((96, 96), Image.BILINEAR).convert("L"), np.float32)[None] / 255 for f in films]
    ours = shard_of(model, tokenizer, reader, [(s.study_id, x, t) for s, x, t in zip(manifest, same, texts)], "image+report", settings)
    assert [list(p.patches) for p in plain] == [list(r.patches) for r in ours]
    for p, r in zip(plain, ours): assert np.allclose(p.features, r.features, atol=1e-4)


def test_a_racer_that_dies_is_heard(cohort):
    with pytest.raises(NeuralError, match="the float32 way has ended"), racers("racer", ("float32",), *cohort) as go: go("float32", "many", False)


def test_both_steps_learn_the_same():
    few = StepStudies(96, film=256)
    steps = [make(few, step_network().train()) for make in (reference_step, fast_step)]
    losses = np.array([[step([0, 1, 2, 3]) for _ in range(6)] for step in steps])
    assert np.allclose(*losses, rtol=0.01) and (losses[:, -1] < losses[:, 0]).all()
