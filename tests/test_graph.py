"Graphs that are the same everywhere, run both ways, and refuse what is not a graph."
import os
import subprocess
import sys
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch

matplotlib.use("agg")

# noqa: E402
from neural.graph import (certainty_bytes, certainty_share, ADJACENT, ASSERTIONS, EDGE_TYPES, REVERSE, SHOWS,
                          both_ways, central_node, centrality, check_edges, concept_looks, concept_nodes, fuse,
                          grid_edges, grounding_links, knowledge_from, knowledge_graph, show_graph, to_networkx,
                          visual_graph)
from neural.report import Annotation, ReportReader  # noqa: E402
from neural.study import NeuralError  # noqa: E402

VOCABULARY = tuple(f"concept {i:02d}" for i in range(40))
MODES = ("betweenness", "grounding", "none")


def note(concepts, relations=(), assertions=None):
    "An annotation, without the language pipeline."
    assertions = assertions or ["present"] * len(concepts)
    mentions = tuple(SimpleNamespace(start=0, end=1, concept=VOCABULARY[c], kind="Observation", assertion=a)
                     for c, a in zip(concepts, assertions))
    return SimpleNamespace(
        mentions=mentions, relations=tuple(SimpleNamespace(head=h, tail=t, type=r) for h, t, r in relations))


def draw(seed, k=None, m=None):
    "A random visual graph, knowledge graph and grounding."
    rng = np.random.default_rng(seed)
    k, m = k or int(rng.integers(1, 40)), int(rng.integers(0, 15)) if m is None else m
    patches = np.sort(rng.choice(144, k, replace=False))
    visual = visual_graph(patches, rng.normal(size=(k, 5)), rng.random(k))
    relations = [(*rng.integers(0, m, 2), rng.integers(0, 3)) for _ in range(2 * m)]
    return (visual, knowledge_from(rng.integers(0, 40, m), rng.integers(0, 3, m), relations),
            rng.random((m, k)).astype(np.float32))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(12))
def test_every_fused_edge_has_its_way_back(seed, mode):
    visual, knowledge, weights = draw(seed)
    g = fuse(visual, knowledge, mode, weights)
    there = {(a, b, EDGE_TYPES[t], round(w, 6))
             for a, b, t, w in zip(*g.edges.tolist(), g.types.tolist(), g.weights.tolist())}
    back = {(b, a, EDGE_TYPES[REVERSE[EDGE_TYPES.index(t)]], w) for a, b, t, w in there}
    assert there == back and len(there) == g.edges.shape[1]
    assert g.edges.size == 0 or (0 <= g.edges.min() and g.edges.max() < len(g))
    dense = np.zeros((len(g), len(g)), int)
    dense[g.edges[0], g.edges[1]] = 1
    assert (dense == dense.T).all()


def test_one_way_edges_are_refused():
    visual, knowledge, _ = draw(0, k=20, m=6)
    g = fuse(visual, knowledge)
    up = g.edges[0] < g.edges[1]
    with pytest.raises(NeuralError, match="no way back"): check_edges(g.edges[:, up], g.types[up], len(g))


def test_a_word_changes_a_patch_in_a_graph_convolution():
    "Defect A5: with the released, one-way edges no patch could ever notice."
    from torch_geometric.nn import GCNConv
    torch.manual_seed(0)
    visual, knowledge, _ = draw(3, k=9, m=5)
    g = fuse(visual, knowledge)
    concept, patch, _ = g.ties[0]
    conv, x = GCNConv(4, 4), torch.randn(len(g), 4)
    y = x.clone()
    y[len(visual) + concept] += 1
    moved = lambda edges: (conv(x, edges) - conv(y, edges)).abs().amax(1)[:len(visual)] > 1e-6
    both = torch.as_tensor(g.edges)
    assert moved(both).nonzero().flatten().tolist() == [patch]
    assert not moved(both[:, both[0] < both[1]]).any()


SCRIPT = """
import numpy as np
from types import SimpleNamespace as S
from neural.graph import knowledge_graph, visual_graph, fuse, to_networkx
words = ("opacity", "lung", "effusion", "heart", "oedema")
said = zip(words * 2, ("present", "absent", "uncertain") * 4)
ms = tuple(S(start=0, end=1, concept=w, kind="Observation", assertion=a) for w, a in said)
note = S(mentions=ms, relations=tuple(S(head=h, tail=(h * 3 + 1) % 10, type="modify") for h in range(10)))
k = knowledge_graph(note, words)
v = visual_graph([0, 1, 2, 12, 77], np.arange(10.).reshape(5, 2), [.1, .1, .1, .1, .1])
g = fuse(v, k)
arrays = k.concepts, k.assertions, k.edges, g.edges, g.types
print(*(a.tolist() for a in arrays), g.ties, list(to_networkx(g, words).edges(data=True)))
"""


def test_the_hash_seed_changes_nothing():
    "Defect A6: the released text graph takes its node order from a set."
    said = [
        subprocess.run([sys.executable, "-c", SCRIPT], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True,
                       text=True, check=True).stdout
        for seed in ("0", "1")
    ]
    assert said[0] == said[1] and len(said[0]) > 500


@pytest.mark.parametrize("mode", MODES)
def test_fusion_is_deterministic(mode):
    visual, knowledge, weights = draw(5, k=12, m=8)
    first, second = fuse(visual, knowledge, mode, weights), fuse(visual, knowledge, mode, weights)
    assert (np.array_equal(first.edges, second.edges) and np.array_equal(first.types, second.types)
            and np.array_equal(first.weights, second.weights))


def test_ties_of_centrality_go_to_relevance_then_index():
    # no two touch: every centrality is zero
    apart = [0, 30, 70, 110]
    hub = lambda r: fuse(visual_graph(apart, np.zeros((4, 1)), r), knowledge_from([1], [0])).ties
    assert hub([.1, .2, .6, .1]) == [(0, 2, 1.0)]
    assert hub([.25, .25, .25, .25]) == [(0, 0, 1.0)]


def test_ties_among_concepts_go_to_degree_then_order():
    visual = visual_graph([5], [[0.]], [1.])
    two_pairs = knowledge_from(range(6), [0] * 6, [(1, 2, 0), (4, 5, 0), (4, 5, 1)])     # nothing lies between anything
    assert fuse(visual, two_pairs).ties == [(4, 0, 1.0)]
    assert fuse(visual, knowledge_from(range(3), [0] * 3)).ties == [(0, 0, 1.0)]


def test_the_middle_of_a_row_of_patches_is_its_centre():
    visual = visual_graph(range(36, 41), np.zeros((5, 1)), [.9, .1, 0, .1, .9])
    assert centrality(visual.edges, 5).tolist() == pytest.approx([0, .5, 2 / 3, .5, 0])
    # centrality outranks relevance
    assert central_node(visual.edges, visual.relevance) == 2


def test_mirror_twins_tie_exactly():
    "Symmetry must not be decided by the last bit of a sum."
    for seed in range(5):
        patches = np.random.default_rng(seed).choice(72, 50, replace=False)
        rows, cols = patches // 6, patches % 6
        once = np.sort(np.concatenate([rows * 12 + cols, rows * 12 + 11 - cols]))
        visual = visual_graph(once, np.zeros((100, 1)), np.ones(100))
        b = dict(zip(once.tolist(), centrality(visual.edges, 100)))
        assert all(b[p] == b[p // 12 * 12 + 11 - p % 12] for p in once.tolist())


def test_four_random_patches_hardly_ever_have_a_centre():
    rng, zero = np.random.default_rng(1), 0
    for _ in range(500):
        once = grid_edges(np.sort(rng.choice(144, 4, replace=False)), (12, 12))
        zero += not centrality(both_ways(once, np.full(once.shape[1], ADJACENT))[0], 4).any()
    assert zero / 500 > 0.97


def test_neighbours_do_not_wrap_around_the_film():
    for grid in ((12, 12), (3, 7), (1, 5), (5, 1)):
        n = grid[0] * grid[1]
        edges = grid_edges(range(n), grid)
        assert edges.shape[1] == grid[0] * (grid[1] - 1) + grid[1] * (grid[0] - 1)
        distance = np.abs(edges[0] // grid[1] - edges[1] // grid[1]) + np.abs(edges[0] % grid[1] - edges[1] % grid[1])
        assert (distance == 1).all()


def test_negation_makes_another_node_and_repetition_does_not():
    k = knowledge_graph(note([3, 3, 3, 3], assertions=["present", "absent", "uncertain", "absent"]), VOCABULARY)
    assert list(zip(k.concepts.tolist(), [ASSERTIONS[a] for a in k.assertions])) == [
        (3, "present"), (3, "absent"), (3, "uncertain")]


def test_relations_join_the_nodes_their_mentions_became():
    k = knowledge_graph(
        note([7, 8, 7, 9], [(0, 1, "located_at"), (2, 1, "located_at"), (2, 3, "suggestive_of"), (0, 2, "modify")]),
        VOCABULARY)
    assert k.relations == [(0, 1, 0), (0, 2, 2)]          # said twice is once; (0, 2) fell together in one node


@pytest.mark.parametrize("mode", MODES)
def test_a_report_without_mentions_keeps_its_patches(mode):
    visual, _, _ = draw(2, k=6)
    empty = knowledge_graph(note([]), VOCABULARY)
    g = fuse(visual, empty, mode, np.empty((0, 6)))
    assert len(g) == 6 and g.ties == [] and np.array_equal(g.edges, visual.edges)
    assert to_networkx(g, VOCABULARY).number_of_nodes() == 6
    show_graph(g, VOCABULARY).figure.clear()


@pytest.mark.parametrize("relations", [[("x", 1, "modify")], [(0, 5, "modify")], [(-1, 0, "modify")], [(0, 1, "near")]])
def test_relations_that_lead_nowhere_are_refused(relations):
    with pytest.raises((NeuralError, IndexError, TypeError)) as caught:
        knowledge_graph(note([1, 2], relations), VOCABULARY)
    assert caught.type is NeuralError


def test_grounding_is_stable_and_shares_sum_to_one():
    rng = np.random.default_rng(0)
    for k in (1, 2, 4, 10, 40):
        g = rng.random((9, k)).astype(np.float32) ** 4
        g[3] = 0
        g[4] = 1
        ties = grounding_links(g)
        assert np.allclose(ties.sum(1), [0 if i == 3 else 1 for i in range(9)], atol=1e-5)
        assert np.allclose(grounding_links(ties), ties, atol=1e-6)
        assert (np.count_nonzero(ties[4]) == 1
                and (ties[np.arange(9) != 3].argmax(1) == g[np.arange(9) != 3].argmax(1)).all())


def test_a_concept_averages_its_mentions_on_the_retained_patches():
    looks = np.eye(4, 144, k=10, dtype=np.float32)        # mention i looks at patch 10 + i
    nodes = concept_nodes(note([5, 6, 5, 5]), VOCABULARY)[1]
    assert concept_looks(looks, nodes, [10, 11, 12]) == pytest.approx(np.array([[1 / 3, 0, 1 / 3], [0, 1, 0]]))


def test_released_repeats_make_one_node_each_and_only_the_last_copy_has_edges():
    visual = visual_graph([0, 0, 0, 1, 1, 5], np.zeros((6, 2)), np.ones(6), repeats=True)
    assert len(visual) == 6 and sorted(map(tuple, visual.edges.T.tolist())) == [(2, 4), (4, 2)]


@pytest.mark.parametrize("patches", [[], [-1], [144], [5, 4], [4, 4]])
def test_patches_that_are_not_a_selection_are_refused(patches):
    with pytest.raises(NeuralError): visual_graph(patches, np.zeros((len(patches), 2)), np.ones(len(patches)))


def test_a_gpu_like_tensor_with_gradient_becomes_plain_numpy():
    x = torch.ones(2, 3, requires_grad=True)
    visual = visual_graph(torch.tensor([1, 2]), x, torch.tensor([.5, .5], dtype=torch.float16))
    assert type(visual.features) is np.ndarray and visual.relevance.dtype == np.float32


def test_networkx_agrees_with_the_arrays():
    visual, knowledge, weights = draw(8, k=7, m=5)
    g = fuse(visual, knowledge, "grounding", weights)
    n = to_networkx(g, VOCABULARY)
    assert sorted((a, b, EDGE_TYPES.index(d["type"])) for a, b, d in n.edges(data=True)) == sorted(
        zip(*g.edges.tolist(), g.types.tolist()))
    assert sum(d["type"] == EDGE_TYPES[SHOWS] for _, _, d in n.edges(data=True)) == len(g.ties)


@pytest.mark.parametrize("m", [1, 12, 30])
def test_no_two_labels_overlap(m):
    import matplotlib.pyplot as plt
    visual, _, weights = draw(1, k=10, m=m)
    knowledge = knowledge_from(range(m), [i % 3 for i in range(m)], [(i, (i * 7 + 1) % m, i % 3) for i in range(m)])
    # its own figure, and one that is too small
    for ax in (None, plt.subplots(figsize=(5, 2.5))[1]):
        ax = show_graph(fuse(visual, knowledge, "grounding", weights), VOCABULARY, np.zeros((1, 48, 48)), ax=ax)
        ax.figure.canvas.draw()
        boxes = [t.get_window_extent() for t in ax.texts if t.get_gid() == "concept"]
        assert len(boxes) == m
        assert not [1 for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
        plt.close(ax.figure)


# RadGraph's files, as they are shipped

READER = ReportReader()


def shipped(words="No effusion .", label="OBS-DA"):
    return {
        "text": words,
        "entities": {"1": {"tokens": words.split()[1], "label": label, "start_ix": 1, "end_ix": 1, "relations": []}}}


@pytest.mark.parametrize("key", ["0", "1", "report"])
@pytest.mark.parametrize("more", [{}, {"data_source": None, "data_split": "inference"}])
def test_a_report_wrapped_under_a_number_is_the_report(key, more):
    bare = {**shipped(), **more}
    graph = knowledge_graph(Annotation.from_radgraph({key: bare}), READER.vocabulary)
    assert (graph.concepts.tolist()
            == knowledge_graph(Annotation.from_radgraph(bare), READER.vocabulary).concepts.tolist()
            == [READER.vocabulary.index("pleural effusion")])
    # negation is not lost on the way
    assert graph.assertions.tolist() == [ASSERTIONS.index("absent")]


@pytest.mark.parametrize(
    "data",
    [{}, {"0": {}}, {"0": None}, {"0": [1]}, {"0": shipped(), "1": shipped()}, {"0": {"0": shipped()}},
     {"entities": {}}, {"text": "x"}],
)
def test_a_wrapper_of_none_or_of_several_reports_is_refused(data):
    with pytest.raises(NeuralError, match="an object with a 'text'") as e: Annotation.from_radgraph(data)
    assert "\n" not in str(e.value)


# how sure the writer was

def test_a_certainty_is_one_byte_and_comes_back_to_within_its_half():
    p = np.random.default_rng(0).random(500)
    p[::7] = np.nan
    kept = certainty_bytes(p)
    assert kept.dtype == np.uint8 and (kept[::7] == 255).all() and (kept[~np.isnan(p)] < 255).all()
    back = certainty_share(kept, 500)
    assert np.array_equal(np.isnan(back), np.isnan(p)) and np.nanmax(abs(back - p)) <= .5 / 254 + 1e-6
    assert np.array_equal(certainty_bytes(back), kept)


@pytest.mark.parametrize("bad", [[1.01], [-.001], [np.inf], [.5, np.nan, 2]])
def test_what_is_no_probability_is_refused(bad):
    with pytest.raises(NeuralError, match="probability in 0..1"): certainty_bytes(bad)


@pytest.mark.parametrize("values", [[1], [1, 2, 3], [[1, 2]], [0, 256], [-1, 0], ["1", "2"], [None, 1]])
def test_certainties_that_do_not_fit_the_concepts_are_refused(values):
    with pytest.raises(NeuralError, match="2 concepts need"): knowledge_from([4, 5], [0, 2], certainty=values)


def test_a_graph_knows_its_certainties_or_says_that_it_knows_none():
    assert (knowledge_from([4, 5], [0, 2]).certainty is None
            and knowledge_from([4, 5], [0, 2], certainty=[255, 255]).certainty is None
            and knowledge_from([], [], certainty=[]).certainty is None)
    assert knowledge_from([4, 5], [0, 2], certainty=[.5, np.nan]).certainty.tolist() == [127, 255]
    visual = visual_graph([3], np.zeros((1, 2)), [1.], (2, 2))
    net = to_networkx(fuse(visual, knowledge_from([0, 1], [0, 2], certainty=[.25, np.nan])), ("a", "b"))
    assert [d.get("certainty") for _, d in net.nodes(data=True)] == [None, round(64 / 254, 3), None]
