"The published numbers, computed again: three from the predictions, and every one of the page from a record."
import json
from pathlib import Path

import nbclient
import nbformat
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

FIGURES = Path(__file__).resolve().parents[1] / "figures"
predictions = pq.read_table(FIGURES / "tables/predictions.parquet").to_pandas()
named = predictions.system.where(predictions.selection != "all patches", predictions.system + ", all patches")


def pairs_won(y: np.ndarray, p: np.ndarray) -> float:
    "AUC from its meaning: the share of pairs, one ill and one well, that the score puts in order; a tie is half."
    ill, well = p[y == 1], p[y == 0]
    return float((ill[:, None] > well).mean() + 0.5 * (ill[:, None] == well).mean())


@pytest.mark.parametrize(
    "track, variant",
    [("image+report", "gcn both"), ("image-only", "typed both"), ("image-only", "label head, all patches")])
def test_an_auc_is_that_of_the_published_predictions(track, variant):
    part = predictions[(predictions.target == "Pneumonia") & (predictions.track == track)
                       & (named == variant) & predictions.y.notna()]
    assert set(part.split) == {"test"} and part.study_id.nunique() > 500
    found = float(np.mean([pairs_won(one.y.to_numpy(), one.p.to_numpy()) for _, one in part.groupby("seed")]))
    mean = part.groupby("study_id").agg(y=("y", "first"), p=("p", "mean"))
    record = json.loads((FIGURES / "records/40_classify.json").read_text())
    together = record["metrics"]["AUC, ensemble of seeds, on test"]["Pneumonia"][f"{track}, {variant}"][0]
    assert pairs_won(mean.y.to_numpy(), mean.p.to_numpy()) == pytest.approx(together, abs=2e-4)
    assert found == pytest.approx(record["metrics"]["AUC on test"]["Pneumonia"][f"{track}, {variant}"][0], abs=2e-4)
    results = pd.read_csv(FIGURES / "tables/results.csv").set_index(["target", "track", "variant"])
    assert float(results.AUC["Pneumonia", track, variant].split()[0]) == pytest.approx(found, abs=7e-4)
    page = pd.read_csv(FIGURES / "tables/59_verdict.csv")
    said = page[(page.data == "phantoms") & page.question.str.startswith("AUC on test")
                & page.question.str.endswith(f"({track}, {variant})")].measured
    assert len(said) == 1 and float(said.iloc[0].split()[0]) == pytest.approx(found, abs=7e-4)


def numbers(tree) -> set[str]:
    "Every number of a record, as the page would print it."
    if isinstance(tree, dict): return set().union(*map(numbers, tree.values())) if tree else set()
    if isinstance(tree, list): return set().union(*map(numbers, tree)) if tree else set()
    return ({f"{sign * tree:.3f}" for sign in (1, -1)} if isinstance(tree, (int, float)) and not isinstance(tree, bool)
            else set())


def test_every_number_of_the_page_is_in_a_record():
    page = pd.read_csv(FIGURES / "tables/59_verdict.csv")
    known = {
        path.stem[:2]: numbers(json.loads(path.read_text())["metrics"]) for path in (FIGURES / "records").glob("*.json")
    }
    mine = page[page.data == "phantoms"]
    assert len(mine) > 40
    lost = [
        (q, n)
        for q, m, c in zip(mine.question, mine.measured, mine.command)
        for n in m.replace("[", "").replace("]", "").replace(",", "").split()
        # "neural run 10-52": the last stage measured it
        if n.lstrip("-").replace(".", "").isdigit()
        and len(n.lstrip("-")) == 5
        and n not in known[c.split()[2].rpartition("-")[2]]
    ]
    assert lost == []


@pytest.mark.parametrize("page", ["paper/open-i", "paper/large", "paper/draws", "paper/described", "mimic"])
def test_a_page_is_what_the_published_numbers_give(page):
    path = FIGURES.parent / f"nbs/{page}.ipynb"
    nb = nbformat.read(path, 4)
    told = lambda data: "".join(data.get("text/html", data.get("text/markdown", "")))
    tables = lambda: [told(o["data"]) for c in nb.cells for o in c.get("outputs", []) if "data" in o]
    committed = tables()
    nbclient.NotebookClient(
        nb, kernel_name="python3", timeout=120, resources={"metadata": {"path": path.parent}}).execute()
    needed = {"paper/draws": "bench/draws.json", "paper/described": "described/records"}
    measured = page not in needed or (FIGURES / needed[page]).exists()
    assert sum(map(len, committed)) > 3000 * measured - 1 and tables() == committed


def test_no_published_number_of_open_i_carries_a_word_of_a_report_or_a_study():
    held = "\n".join(p.read_text() for p in (FIGURES / "open-i").rglob("*") if p.suffix in (".json", ".csv", ".md"))
    assert len(held) > 100_000
    for word in ("CXR", "IM-", "XXXX", "openi_uid", "silhouette", "cardiomediastinal", "pneumothorax is", "There is"):
        assert word not in held, word
