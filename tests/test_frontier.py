"The frontier: fronts are what brute force finds, every point has its command, and a stage that has not run is named."
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from IPython.core.interactiveshell import InteractiveShell

from neural.evaluate import HEADLINE
from neural.pipeline import code_cells
from neural.results import MACRO, as_card, lead_shown, mean_points, pareto, shared_bytes, write_card
from neural.study import NeuralError

ROOT = Path(__file__).resolve().parents[1]
STAGE = ROOT / "nbs/paper/90_frontier.ipynb"
FINDINGS = ("Cardiomegaly", "Pneumonia")
HERE = {  # stage -> (system, track, selection, patches, codec, budget, bytes a study, multiply-accumulates)
    "53_controls": [
        ("pooled embedding, 1 x 1 cells", "image-only", "", None, "", None, 260, None),
        ("both graphs", "image-only", "described", 4, "", None, 1290, None),
        ("both graphs", "image+report", "described", 4, "", None, 1290, None),
        ("knowledge graph alone", "image+report", "", None, "", None, None, None),
        ("label head", "image-only", "all patches", 144, "", None, None, None)],
    "57_rate": [
        ("thumbnail", "image-only", "", None, "webp", 250, 240, None),
        ("thumbnail, read by the label head", "image-only", "", None, "webp", 250, 240, None),
        ("thumbnail, read by the label head", "image-only", "", None, "webp", 1000, 945, None),
        ("asset", "image-only", "described", 10, "", None, 2912, None),
        ("asset", "image+report", "described", 10, "", None, 2910, None)],
    "70_mxa": [("EfficientViT, plain", "image-only", "", None, "", None, None, 60_000_000),
               ("raw-film network, one seed", "image-only", "", None, "", None, None, 400_000_000)],
}


def planted(stage, rng, positives=30):
    "A card of some systems with values and intervals that mean nothing."
    rows = []
    for system, track, selection, k, codec, budget, size, macs in HERE[stage]:
        same = dict(system=system, stage=stage, track=track, selection=selection, k=k, codec=codec, budget=budget,
                    condition="", split="test", seeds="0", joined="mean over seeds", against="", studies=90,
                    bytes_study=size, macs=macs, bytes_model=None if macs is None else macs // 20,
                    latency_ms=None if macs is None else macs / 1e7, command=f"neural run {stage[:2]} --preset planted")
        values = rng.uniform(0.6, 0.9, len(FINDINGS)).round(2)
        rows += [same | dict(target=t, metric=HEADLINE, value=v, low=v - 0.04, high=v + 0.03, positives=positives)
                 for t, v in zip(FINDINGS, values)]
        v = values.mean()
        rows.append(same | dict(target="all targets", metric=MACRO, value=v, low=v - 0.02, high=v + 0.02))
    return as_card(pd.DataFrame(rows))


SHARES = {1: 0.55, 10: 0.65, 100: 0.75}  # per cent of labelled patients -> AUC of random weights


def by_labels(positives=30):
    "A card of stage 60: two starts under two protocols, one a tenth better, and a rung that nobody tuned."
    rows = []
    for system, more in (("random weights", 0), ("two sections", 0.1), ("whole report", 0.2)):
        for protocol in ("linear probe", "whole fine-tuning")[: 1 if system == "whole report" else 2]:
            for share, value in SHARES.items():
                same = dict(system=system, stage="60_imitate", track="image-only", split="test", seeds="0", against="",
                            condition=f"{protocol}, {share} % of patients labelled", joined="mean over seeds",
                            studies=90, positives=positives, metric=HEADLINE, command="neural run 60 --preset planted")
                rows += [same | dict(target=t, value=value + more, low=value + more - 0.1, high=value + more + 0.1)
                         for t in FINDINGS]
    return as_card(pd.DataFrame(rows))


def folder(path, stages, positives=None, seed=0):
    "A run folder with cards and what the stage reads besides."
    rng = np.random.default_rng(seed)
    (path / "tables").mkdir(parents=True)
    for stage in stages:
        write_card(path / f"tables/{stage}_card.csv", planted(stage, rng, (positives or {}).get(stage, 30)))
    record = {"stage": "10_finetune", "metrics": {}, "parameters": {}, "settings": {}, "inputs": {},
              "outputs": {"vlm/model.safetensors": {"bytes": 9000}, "vlm/config.json": {"bytes": 100}}}
    (path / "10_finetune.json").write_text(json.dumps(record))
    sizes = pd.Series({"film at 192 px, PNG": 16000}, name="bytes per study")
    sizes.to_csv(path / "tables/bytes.csv")
    return path


TENTH = "linear probe, 10 % of patients labelled"
COMPANIONS = {  # stage -> what its record says of the claims of its paper; the numbers mean nothing
    "60_imitate": {"best on validate": "two sections", "paired differences of mean AUC": {
        f"two sections - random weights | {TENTH}": [0.12, 0.10, 0.14],
        "two sections - random weights | linear probe, 1 % of patients labelled": [0.05, 0.03, 0.07],
        f"two sections, CICL - two sections, uniform smoothing | {TENTH}": [0.01, -0.01, 0.03],
        f"many levels, CICL - two sections, CICL | {TENTH}": [-0.02, -0.03, -0.01]}},
    "70_mxa": {
        "differences of macro AUC": {"MXA, learnt - plain, no teacher": [0.02, 0.01, 0.03],
                                     "teacher - no teacher, plain": [None, None, None]},
        "macro AUC on test": {"plain, no teacher": [0.70, 0.68, 0.72], "MXA, learnt, teacher": [0.75, 0.73, 0.77]},
        "claimed by the released protocol": {"as judged here": {"claimed for MXA": 0.02},
                                             "all of it: and more": {"claimed for MXA": 0.3}}},
    "80_slim": {
        "chosen on validate": {"a net": "gamma", "a graph": "ig"}, "films explained": 8,
        "paired differences of macro AUC": {
            "a net": {"taylor": {"0.3": [0.1, 0.05, 0.15], "0.5": [0.1, 0.05, 0.15]},
                      "random": {"0.5": [0.1, 0.05, 0.15]}},
            "a graph": {"taylor": {"0.5": [-0.1, -0.15, -0.05]}, "random": {"0.5": [0.2, 0.1, 0.3]}}},
        "after recovery": {"a net, gamma, 50%": {"macro AUC, slim minus dense": [0.0, -0.009, 0.009]},
                           "a graph, ig, 50%": {"macro AUC, slim minus dense": [0.0, -0.02, 0.02]}}},
}
EXPLAINED = "network,removed,after,criterion,correlation,changed\na net,0.5,recovery,gamma,0.6,0.75\n"
JUDGED = {  # claim, by its first words -> the verdict on it
    "pre-training": "holds", "two sections": "not measured", "CICL": "not shown", "many levels": "does not hold",
    "the gain": "not measured", "the block adds AUC (its": "holds", "the block adds AUC (as": "not measured",
    "a teacher": "not measured", "block and teacher": "does not hold", "attribution beats first": "does not hold",
    "attribution beats small": "not measured", "attribution beats units": "holds", "half of": "not shown",
    "the explanation": "not shown"}


def say(run, records):
    "Puts the records of the companion stages into a run folder."
    for stage, metrics in records.items():
        (run / f"{stage}.json").write_text(json.dumps({"stage": stage, "metrics": metrics}))
    (run / "tables/80_slim_explains.csv").write_text(EXPLAINED)


def page(run, monkeypatch, **parameters):
    "What the stage computes of a run folder: its names after all cells but the record; pictures are drawn too."
    monkeypatch.chdir(run.parent)
    shell = InteractiveShell.instance()
    shell.reset(new_session=True)
    shell.run_cell("import matplotlib; matplotlib.use('agg')")
    for n, source in enumerate(code_cells(STAGE)):
        if n == 0: source += f"\nrun = {str(run)!r}\n" + "\n".join(f"{k} = {v!r}" for k, v in parameters.items())
        source = re.sub(r'(?m)^record\("90_frontier".*', "", source)
        done = shell.run_cell(source, store_history=True, silent=False)
        if not done.success: raise done.error_in_exec or done.error_before_exec
    return dict(shell.user_ns)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "The page of planted cards, made once."
    run = folder(tmp_path_factory.mktemp("run") / "planted", ("53_controls", "57_rate", "70_mxa"))
    write_card(run / "tables/60_imitate_card.csv", by_labels())
    say(run, COMPANIONS)
    with pytest.MonkeyPatch.context() as patch: return run, page(run, patch)


def unbeaten(rows, price="bytes"):
    "The front by brute force: each point held against every other, in plain Python."
    points = [(r[price], r["value"], r["name"]) for r in rows.to_dict("records") if r[price] == r[price]]
    return sorted({p for p in points if not any(q[0] <= p[0] and q[1] >= p[1] and (q[0] < p[0] or q[1] > p[1])
                                                for q in points)})


# the three functions

def test_planted_points():
    assert pareto([1, 2, 3, 3], [.5, .7, .7, .9]).tolist() == [True, True, False, True]
    assert lead_shown([1, 2, 3], [.4, .55, .5], [.5, .6, .7]).tolist() == [True, True, False]
    assert shared_bytes(10, 1000, 10) == 110 and shared_bytes([10, 20], [0, 5], 5).tolist() == [10, 21]


def test_a_front_does_not_depend_on_order_or_scale():
    rng = np.random.default_rng(1)
    cost, gain = rng.integers(1, 9, 50), rng.integers(0, 9, 50) / 10
    held, order = pareto(cost, gain), rng.permutation(50)
    assert (pareto(cost[order], gain[order]) == held[order]).all()
    assert (pareto(np.log(cost), gain * 3 - 1) == held).all()
    assert held[gain == gain.max()].any() and held[cost == cost.min()].any()


def test_a_mean_is_of_all_its_findings_or_not_there():
    card = planted("53_controls", np.random.default_rng(2))
    part = card[(card.target != "Pneumonia") | (card.system != "label head")]
    found = mean_points(part, FINDINGS, "mean")
    assert "label head" not in set(found.system) and len(found) == 4 and set(found.interval) == {"patients"}
    one = mean_points(card, FINDINGS[:1], "mean").set_index(["system", "track"]).loc[("both graphs", "image-only")]
    own = card[(card.metric == HEADLINE) & (card.target == FINDINGS[0])].set_index(["system", "track"])
    assert one.interval == "ends" and one.value == own.value["both graphs", "image-only"]


# the page

def test_fronts_are_what_brute_force_finds(made):
    run, names = made
    points = pd.read_csv(run / "tables/90_frontier_points.csv")
    fronts = pd.read_csv(run / "tables/90_frontier_fronts.csv")
    for track, target in (("image-only", "mean"), ("image-only", "Pneumonia"), ("image+report", "Cardiomegaly")):
        wanted = unbeaten(points[(points.track == track) & (points.target == target)])
        kept = fronts[(fronts.track == track) & (fronts.target == target)]
        assert sorted(zip(kept.bytes, kept.value, kept["name"])) == wanted and wanted
        held = names["fronts"][track, target]
        assert sorted(zip(held.bytes, held.value, held["name"])) == wanted


def test_published_fronts_are_those_of_the_published_table():
    table = ROOT / "figures/tables/90_frontier_points.csv"
    if not table.is_file(): pytest.skip("the stage has not been published yet")
    points, fronts = pd.read_csv(table), pd.read_csv(table.with_name("90_frontier_fronts.csv"))
    assert (points.command.str.len() > 0).all()
    for (track, target), kept in fronts.groupby(["track", "target"]):
        wanted = {p[:2] for p in unbeaten(points[(points.track == track) & (points.target == target)])}
        assert set(zip(kept.bytes, kept.value)) == wanted


def test_what_was_done_to_a_network_is_said_in_its_name():
    points = pd.read_csv(ROOT / "figures/tables/90_frontier_points.csv", keep_default_na=False)
    nets = points[points.stage.isin(["70_mxa", "80_slim"])]
    said = {"recovery": "taught again", "teacher": "taught by a teacher", "random, ": "pruned at random",
            "one threshold by mean": "one threshold by mean for all layers",
            "int8 weights in onnxruntime": "int8 weights in onnxruntime"}
    for condition, name in said.items():
        asked = nets.condition.str.contains(condition)
        assert asked.any() and (nets["name"].str.contains(name) == asked).all(), condition
    assert not nets["name"].str.contains("recovery|statistics|MACs removed").any()


def test_every_point_has_a_command_and_what_is_not_measured_is_blank(made):
    run, _ = made
    points = pd.read_csv(run / "tables/90_frontier_points.csv")
    assert points.command.str.startswith("neural run").all()
    assert not points[["value", "low", "high"]].isna().any(axis=None)
    thumbnail = points[points.system == "thumbnail"]
    assert len(thumbnail) and thumbnail[["model", "macs", "latency_ms"]].isna().all(axis=None)
    head = points[points.system == "label head"]
    assert set(head.bytes) == {16000} and set(head.model) == {9100}


def test_a_stage_that_has_not_run_is_named_and_left_out(made, tmp_path, monkeypatch, capsys):
    assert made[1]["left_out"] == ["40_classify", "58_codecs", "72_graph_student", "80_slim"]
    names = page(folder(tmp_path / "few", ("53_controls", "57_rate")), monkeypatch)
    assert names["left_out"] == ["40_classify", "58_codecs", "70_mxa", "72_graph_student", "80_slim", "60_imitate"]
    assert names["nets"].empty and names["labelled"].empty
    assert "70_mxa" in capsys.readouterr().out and len(names["answers"]) == 3
    bare = folder(tmp_path / "bare", ("53_controls",))
    with pytest.raises(NeuralError, match="has no tables/57_rate_card.csv"): page(bare, monkeypatch)


def test_labels_are_an_axis_where_stage_60_has_run(made):
    run, names = made
    assert set(names["table_60"]) == {f"{s}, {p}" for s in ("random weights", "two sections")
                                      for p in ("linear probe", "whole fine-tuning")}
    assert names["table_60"]["two sections, linear probe"]["10 % of patients"] == "0.750 [0.650, 0.850]"
    assert (run / "figures/90_frontier_labels.png").is_file()
    assert "two sections" not in set(pd.read_csv(run / "tables/90_frontier_points.csv").system), "no bytes, no front"


def test_labels_of_other_patients_are_refused(tmp_path, monkeypatch):
    run = folder(tmp_path / "torn", ("53_controls", "57_rate"))
    write_card(run / "tables/60_imitate_card.csv", by_labels(positives=31))
    with pytest.raises(NeuralError, match="60_imitate has other patients than 53_controls"): page(run, monkeypatch)


def lies(low, high, line): return "holds" if low > line else "does not hold" if high < line else "not shown"


def together(verdicts):
    "The rule for a claim about several networks, said once more."
    return ("holds" if set(verdicts) == {"holds"} else "does not hold" if "does not hold" in verdicts else "not shown")


def test_the_claims_of_the_companions_are_judged_by_their_records(made):
    run, names = made
    claims = {c["claim"]: c for c in names["claims"]}
    assert len(claims) == len(names["claims"]) == len(JUDGED)
    for start, verdict in JUDGED.items():
        assert [c["verdict"] for words, c in claims.items() if words.startswith(start)] == [verdict], start
    step = next(c for words, c in claims.items() if words.startswith("block and teacher"))
    assert np.allclose([*step["measured"].values()], [[0.05, 0.01, 0.09]]) and step["line"] == 0.19
    assert "+0.300" in step["beside"] and "all shares removed: 2 holds, 1 does not hold" in str(claims)
    assert "a net 75%, of 8" in str(claims) and "1 % of labels +0.0500 [+0.0300, +0.0700]" in str(claims)
    table = pd.read_csv(run / "tables/90_frontier_claims.csv")
    assert [*table.verdict] == [lies(*r) for r in table[["low", "high", "line"]].itertuples(index=False)]
    for _, part in table.groupby("claim"): assert {*part["verdict on the claim"]} == {together([*part.verdict])}


def test_companions_that_have_not_run_are_named(tmp_path, monkeypatch, capsys):
    run = folder(tmp_path / "alone", ("53_controls", "57_rate"))
    say(run, {"70_mxa": {}})
    names = page(run, monkeypatch)
    assert names["claims"] == [] and pd.read_csv(run / "tables/90_frontier_claims.csv").empty
    assert "since their stages have not run here: 60_imitate, 70_mxa, 80_slim" in capsys.readouterr().out


def numbers_of(tree):
    "Every list of three numbers in a record."
    if isinstance(tree, dict): return [v for part in tree.values() for v in numbers_of(part)]
    return [tree] if isinstance(tree, list) and len(tree) == 3 and all(isinstance(v, float) for v in tree) else []


def test_published_claims_are_those_of_the_published_records():
    table = pd.read_csv(ROOT / "figures/tables/90_frontier_claims.csv")
    known = {p.stem: json.loads(p.read_text())["metrics"] for p in (ROOT / "figures/records").glob("*.json")}
    assert {*table.stage} == {"60_imitate", "70_mxa", "80_slim"}
    for r in table.itertuples():
        mine, intervals = [r.value, r.low, r.high], numbers_of(known[r.stage])
        if r.claim.startswith("block and teacher"):
            a, b = (known[r.stage]["macro AUC on test"][n] for n in ("MXA, learnt, teacher", "plain, no teacher"))
            intervals = [[a[0] - b[0], a[1] - b[2], a[2] - b[1]]]
        assert any(np.allclose(mine, v) for v in intervals), r.claim
        assert r.verdict == lies(r.low, r.high, r.line)


def test_cards_of_two_cohorts_are_refused(tmp_path, monkeypatch):
    run = folder(tmp_path / "torn", ("53_controls", "57_rate"), positives={"57_rate": 31})
    with pytest.raises(NeuralError, match="Cardiomegaly has other patients in 53_controls and 57_rate"):
        page(run, monkeypatch)


def test_a_clinic_gets_the_best_that_keeps_its_limits(made):
    run, names = made
    points = pd.read_csv(run / "tables/90_frontier_points.csv")
    rows = points[(points.track == "image-only") & (points.target == "mean") & (points.kind != "words alone")]
    sent = rows[(rows.bytes <= 300) & (rows.sender == "nothing")]
    read = rows[(rows.bytes <= 50_000) & (rows.sender == "nothing") & (rows.macs <= 2e8)]
    kept = rows[rows.bytes + rows.model.fillna(0) / 1e7 <= 500]
    for answer, allowed in zip(names["answered"].values(), (sent, read, kept)):
        assert answer.kept == len(allowed) > 0 and answer.best["value"] == allowed.value.max()
        assert answer.least["high"] >= answer.best["low"] and answer.best["command"]
    assert all(a["command"] in "".join(names["told"]) for a in (x.best for x in names["answered"].values()))


def test_a_budget_that_nothing_keeps_says_so(tmp_path, monkeypatch):
    run = folder(tmp_path / "poor", ("53_controls", "57_rate"))
    names = page(run, monkeypatch, line_bytes=10, archive_gigabytes=0.001)
    assert [a.best for a in names["answered"].values()] == [None] * 3
    assert sum("Nothing that was measured keeps it" in t for t in names["told"]) == 3


def test_the_page_to_play_with_is_small_and_asks_for_nothing(made):
    text = (made[0] / "figures/90_frontier.html").read_text()
    assert len(text) < 300_000 and not re.search(r"https?:|src=|@import|fetch\(|XMLHttp", text)
    assert "default-src 'none'" in text
    rows = json.loads(re.search(r"<script type=application/json id=rows>(.*?)</script>", text)[1])
    points = pd.read_csv(made[0] / "tables/90_frontier_points.csv")
    assert len(rows) == points.bytes.notna().sum()


def test_sharing_brings_the_cost_down_to_the_study(made):
    names = made[1]
    for n, rows in names["shares"].items():
        assert np.allclose(rows.shared, rows.bytes + rows.model / n)
    a, b = (pd.Series(dict(model=m, bytes=s)) for m, s in ((1e6, 100), (1e4, 1100)))
    assert names["change_over"](a, b) == names["change_over"](b, a) == 990
    assert names["change_over"](a, pd.Series(dict(model=1e4, bytes=50))) is None


def test_the_stage_leaves_the_run_as_it_was(made, tmp_path, monkeypatch):
    run = tmp_path / "kept"
    shutil.copytree(made[0], run)
    before = {p.name: p.read_bytes() for p in run.rglob("*_card.csv")}
    names = page(run, monkeypatch)
    assert {p.name: p.read_bytes() for p in run.rglob("*_card.csv")} == before and len(before) == 4
    assert names["answers"] == made[1]["answers"]
