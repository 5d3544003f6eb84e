"""The contenders of chapter 26: nothing leaks between choices, and a control learns what it is shown and no more."""
import numpy as np
import pytest
import torch

from neural.baseline import (FilmArray, centre_prior, film_logits, film_network, linear_reader, only_patches,
                             patch_tokens, pool_cells, pooled_bytes, random_map, read_films, read_graphs,
                             train_film_cnn, train_graphs, visual_data)
from neural.cohort import toy_study
from neural.evaluate import auc
from neural.finetune import StudyDataset
from neural.prune import top_k
from neural.study import NeuralError
from neural.vlm import ReportVLM, ReportVLMConfig, small_config


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return ReportVLM(small_config(64, 96, width=32, d_model=32, layers=1)).eval()


def test_film_network_sees_pixels_as_the_report_generator_does():
    config, network = ReportVLMConfig(), film_network(2, width=16)
    assert (network.config["pixel_mean"], network.config["pixel_std"]) == (config.pixel_mean[0], config.pixel_std[0])


def test_probabilities_are_the_sigmoid_of_the_scores():
    torch.manual_seed(1)
    network, films = film_network(3, 32, 16), FilmArray(["a", "b"], np.random.default_rng(0).random((2, 32, 32)))
    torch.nn.init.normal_(network.head.weight)
    data = StudyDataset(films, ["a", "b"], [""] * 2, np.zeros((2, 3)))
    assert np.allclose(read_films(network, data), 1 / (1 + np.exp(-film_logits(network, data).numpy())), atol=1e-6)


def test_films_in_memory_keep_their_order_and_their_scale():
    planes = np.arange(3, dtype=np.uint8)[:, None, None] * np.full((1, 8, 8), 100, np.uint8)
    films = FilmArray(["a", "b", "c"], planes)
    assert np.allclose(films.batch(["c", "a", "c"])[:, 0, 0, 0], [200 / 255, 0, 200 / 255])
    with pytest.raises(KeyError): films.batch(["z"])
    with pytest.raises(NeuralError): FilmArray(["a", "a"], planes[:2])


def test_random_maps_depend_on_the_study_and_on_nothing_around_it():
    alone, among = random_map(["s7"], seed=3), random_map([f"s{i}" for i in range(20)], seed=3)
    assert np.array_equal(alone[0], among[7]) and len({m.tobytes() for m in among}) == 20
    assert not np.array_equal(alone, random_map(["s7"], seed=4))


@pytest.mark.parametrize("k", [1, 4, 10, 143])
def test_random_budgets_nest(k):
    m = random_map(["a", "b", "c"])
    for small, large in zip(top_k(m, k).tolist(), top_k(m, k + 1).tolist()): assert set(small) < set(large)


def test_a_patch_hears_the_whole_film_only_after_mixing(model):
    shown = np.asarray(toy_study("Pneumonia", size=96, seed=1).image, np.float32)[None]
    other = shown.copy()
    other[..., :24, :24] = 1 - other[..., :24, :24]
    seen = lambda x, depth: patch_tokens(model, FilmArray(["a"], x), ["a"], depth)[0, 143].astype(np.float32)
    assert np.array_equal(seen(shown, "stem"), seen(other, "stem"))
    assert not np.array_equal(seen(shown, "mixed"), seen(other, "mixed"))


def test_nothing_outside_the_patches_reaches_a_film_of_patches():
    rng = np.random.default_rng(0)
    a = rng.random((2, 1, 96, 96)).astype(np.float32)
    b = a.copy()
    b[:, :, 40:48, 40:48] = 0
    kept = np.array([[0, 1, 2], [100, 101, 143]])
    assert np.array_equal(only_patches(a, kept), only_patches(b, kept))
    assert not np.array_equal(only_patches(a, np.array([[65], [65]])), only_patches(b, np.array([[65], [65]])))
    assert (only_patches(a, kept)[0, 0, :8, :24] == a[0, 0, :8, :24]).all()


def test_graph_reader_learns_what_is_retained_and_ignores_unknown_targets():
    rng = np.random.default_rng(1)
    y = rng.integers(0, 2, (240, 2)).astype(float)
    x = rng.normal(size=(240, 16, 6))
    x[:, 3, 0] += 4 * y[:, 0]
    x[:, 9, 1] += 4 * y[:, 1]
    graphs, unknown = [visual_data(t, [3, 5], (4, 4)) for t in x], y.copy()
    unknown[::3, 0] = np.nan
    fit = lambda seed: read_graphs(
        train_graphs(
            graphs[:120], unknown[:120], graphs[120:160], y[120:160], batch_size=16, epochs=20, hidden=16, seed=seed),
        graphs[160:],
    )
    scores = fit(0)
    assert auc(y[160:, 0], scores[:, 0]) > 0.9 and auc(y[160:, 1], scores[:, 1]) < 0.75
    assert np.array_equal(scores, fit(0)) and not np.array_equal(scores, fit(1))


def test_pooled_cells_are_means_in_eight_bits():
    tokens = np.random.default_rng(0).normal(size=(3, 144, 8)).astype(np.float16)
    quarter = tokens.reshape(3, 12, 12, 8)[:, :6, 6:].reshape(3, 36, 8).astype(np.float32).mean(1)
    assert np.abs(pool_cells(tokens)[:, 1] - quarter).max() <= np.abs(quarter).max() / 250
    assert pooled_bytes((2, 2), 192) == 4 * (192 + 4)


def test_linear_reader_refuses_what_it_cannot_learn():
    x = np.eye(4)
    with pytest.raises(NeuralError, match="1 positive, 0 negative"):
        linear_reader(x, [1, np.nan, np.nan, np.nan], x, [0, 1, 0, 1], x)
    with pytest.raises(NeuralError, match="0 known in validate"): linear_reader(x, [1, 0, 1, 0], x, [np.nan] * 4, x)


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda data: train_film_cnn(data, data, epochs=0), "epochs must be 1 or more, got 0"),
        (lambda data: train_film_cnn(data, data, batch_size=0), "batch_size"),
        (lambda data: train_film_cnn(data, data, lr=0), "lr must be above 0"),
        (lambda data: train_film_cnn(data, data, width=0), "width"),
        (lambda data: read_films(film_network(2, 96, 32), data, batch_size=0), "batch_size"),
        (lambda data: random_map(["a"], patches=0), "patches"),
        (lambda data: centre_prior([], 3), "at least one"),
        (lambda data: pool_cells(np.zeros((1, 144, 4)), (0, 2)), "rows of cells"),
        (lambda data: linear_reader(np.eye(4), [0, 1, 0, 1], np.eye(4), [0, 1, 0, 1], np.eye(4), strengths=()),
         "strengths"),
        (lambda data: train_graphs([], np.zeros((0, 1)), [], np.zeros((0, 1))), "train and validate, got 0 and 0"),
    ],
)
def test_zero_and_nothing_are_refused_by_name(call, said):
    data = StudyDataset(
        FilmArray(["a", "b"], np.zeros((2, 96, 96))), ["a", "b"], ["", ""], np.array([[0.0, 1.0], [1.0, 0.0]]))
    with pytest.raises(NeuralError, match=said): call(data)


def test_no_studies_give_no_scores():
    none = StudyDataset(FilmArray([], np.zeros((0, 96, 96))), [], [], np.zeros((0, 2)))
    assert read_films(film_network(2, 96, 32), none).shape == (0, 2) and random_map([], 9).shape == (0, 9)
