"""What guides the pruning must be able to find what was hidden: labels say whether, the head must learn where."""
import contextlib
import copy
import errno
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer
from transformers.utils import logging as hub
from typer.testing import CliRunner

from neural.asset import TRACKS, AssetStore, keyed_id, vocabulary_hash
from neural.build import (Packing, ahead, build_store, certainties, close_calls, concept_findings, habit,
                          hash_of, load_network, load_readings, open_store, read_batch, save_readings, settle,
                          shard_of, write_reports)
from neural.cli import app
from neural.codec import book_bytes, read_book
from neural.finetune import stem_logits
from neural.layouts import index_dataset
from neural.prune import top_k
from neural.race import step_network
from neural.radiograph import load_radiograph
from neural.report import ReportReader, evidence, split_sections, train_tokenizer
from neural.scores import (Aggregation, Baseline, Batch, Network, Scoring, as_scoring, finding_places, gather, guided,
                           load_aggregation, load_scoring, named_findings, region, save_aggregation, score, scorers)
from neural.study import Manifest, NeuralError, report_text
from neural.vlm import Packed, ReportVLM, label_loss, load_vlm, pack, small_config

# the command says so before transformers is imported; here it is already
hub.disable_progress_bar()
hub.set_verbosity_error()
NAMES = ("Lung Lesion", "Edema")


def planted(n, seed):
    """Noisy films: half hide a bright square in one patch of the 12x12 grid, half are hazy all over; labels, and where
    the square is."""
    rng = np.random.default_rng(seed)
    films, labels, where = rng.normal(0.4, 0.05, (n, 1, 96, 96)), np.zeros((n, 2)), rng.integers(13, 131, n)
    for i in range(n):
        if i % 2:
            labels[i, 0] = 1
            r, c = divmod(where[i], 12)
            films[i, :, r * 8 : r * 8 + 8, c * 8 : c * 8 + 8] += 0.45
        if i % 4 > 1:
            labels[i, 1] = 1
            films[i] += 0.15
    return torch.as_tensor(films.clip(0, 1), dtype=torch.float32), torch.as_tensor(labels, dtype=torch.float32), where


@pytest.fixture(scope="module")
def taught():
    "A small network whose stem was told which films have a lesion, and never where."
    torch.manual_seed(0)
    model = ReportVLM(small_config(40, 96, NAMES, width=64, d_model=64, layers=1, sharpness=4.0)).train()
    films, labels, _ = planted(256, 0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(60):
        part = slice(16 * (step % 16), 16 * (step % 16) + 16)
        loss = label_loss(stem_logits(model, films[part]), labels[part])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval()


def test_a_planted_lesion_is_kept_though_only_its_name_was_taught(taught):
    films, labels, where = planted(64, 1)
    reader = ReportReader()
    usual = habit(
        taught, None, reader, [([str(i) for i in range(32)], films[:32], [""] * 32)], Aggregation("activation"))
    ill = [i for i in range(32, 64) if labels[i, 0]]
    network = Network(
        taught, train_tokenizer(TEXTS, 64), reader, Scoring(Aggregation("activation"), baseline=Baseline(seen=usual)))
    batch = Batch([str(i) for i in ill], films[ill], ["There is a lung nodule."] * len(ill))
    seen = score(network, batch).values
    assert not gather(network, batch).fell_back["named"].any() and torch.allclose(
        seen.sum(1), torch.ones(len(ill)), atol=1e-4)
    near = [max(abs(j // 12 - where[i] // 12), abs(j % 12 - where[i] % 12)) <= 1
            for i, kept in zip(ill, top_k(seen, 4).tolist()) for j in kept]
    assert np.mean(near) >= 0.5  # within one patch, as far as a convolution reaches; 4 of 144 at random: 0.06


def test_the_report_decides_which_finding_is_followed():
    seen = torch.zeros(1, 144, 2)
    seen[0, 20, 0], seen[0, 90, 1] = 2.0, 2.0
    for named, place in (([1.0, 0.0], 20), ([0.0, 1.0], 90), ([0.5, 1.0], 90)):
        assert guided(seen, torch.zeros(144, 2), torch.tensor([named]), 4.0).argmax().item() == place


def test_a_head_that_takes_the_mean_can_still_point():
    seen = torch.zeros(1, 6, 1)
    seen[0, 2] = 3.0
    assert guided(seen, torch.zeros(6, 1), torch.ones(1, 1), 0.0).argmax().item() == 2


@pytest.mark.parametrize(
    "words,place",
    [("Opacity in the right upper lobe.", "right upper lobe"),
     ("Left lower lobe consolidation, likely pneumonia.", "left lower lobe"),
     ("There is a patchy opacity at the left lung base.", ("lung base", "left")),
     ("Possible right middle lobe pneumonia.", "right middle lobe")],
)
def test_a_finding_of_one_side_is_never_answered_from_the_other(words, place):
    torch.manual_seed(0)
    reader, names = ReportReader(), ["Lung Opacity", "Consolidation", "Pneumonia"]
    note = reader(words)
    where = finding_places([note], names)
    spot = region(*(place if isinstance(place, tuple) else (place,)))
    assert 4 < spot.sum() < 100
    for _ in range(20):
        kept = top_k(
            guided(torch.randn(1, 144, 3) * 3, torch.zeros(144, 3), named_findings([note], names), 4.0, where), 4)[0]
        assert spot[kept].all()


TEXTS = ["There is a nodule in the right lower lobe.", "Mild pulmonary edema.",
         "No focal opacity. The heart is normal in size and there is no effusion.",
         "Nodule in the left lung. Edema is seen."]


@pytest.fixture(scope="module")
def read_plainly(taught):
    "Studies, how they are read, and their readings by the plain float32 path, the reading guide being the taught head."
    tokenizer, reader = train_tokenizer(TEXTS, 64), ReportReader()
    films = planted(128, 2)[0]
    studies = [(str(i), films[i].numpy(), TEXTS[i % 4]) for i in range(128)]
    usual = habit(taught, None, reader, [([str(i) for i in range(128)], films, [""] * 128)], Aggregation("activation"))
    settings = as_scoring((Aggregation("activation"), usual, 4, 32))
    network = ReportVLM(small_config(64, 96, NAMES, width=64, d_model=64, layers=2, sharpness=4.0)).eval()
    network.encoder.load_state_dict(taught.encoder.state_dict())
    network.head.load_state_dict(taught.head.state_dict())
    plain = read_batch(network, tokenizer, reader, [i for i, *_ in studies], films, TEXTS * 32, "image+report", 4,
                       settings.how, usual, 32)
    return network, tokenizer, reader, studies, settings, plain


@pytest.mark.parametrize("layer", [0, 1, -1, -2])
def test_one_layer_read_alone_equals_the_eager_one(read_plainly, layer):
    network, (films, labels) = read_plainly[0], (
        planted(3, 5)[0], torch.tensor([[5, 9, 7, 1], [4, 1, -100, -100], [1, -100, -100, -100]]))
    with torch.no_grad():
        tokens = network.encode(films)
        whole = network.read_report(tokens, labels)[1]
    assert torch.allclose(network.attend(tokens, labels, layer), whole[layer], atol=1e-6)
    assert not torch.allclose(whole[0], whole[1], atol=1e-4)  # the layers do differ


def test_packed_float32_is_the_plain_path(read_plainly):
    network, tokenizer, reader, studies, settings, plain = read_plainly
    packed = pack(copy.deepcopy(network))
    fast = shard_of(Network(packed, tokenizer, reader, settings), studies, "image+report")
    for a, b in zip(fast, plain):
        assert a.study_id == b.study_id and a.tokens_used == b.tokens_used and (a.patches == b.patches).all()
        assert (np.abs(a.relevance - b.relevance).max() < 1e-4 * b.relevance.max()
                and np.abs(a.features - b.features).max() < 1e-3 and np.abs(a.looks - b.looks).max() < 1e-4)
    again = shard_of(Network(packed, tokenizer, reader, settings), studies, "image+report")
    # twice the same numbers
    assert all((a.relevance == b.relevance).all() and (a.features == b.features).all() for a, b in zip(fast, again))


@pytest.mark.parametrize("guide", ["activation", "attention"])
def test_bfloat16_keeps_the_same_patches(read_plainly, guide):
    network, tokenizer, reader, studies, settings, _ = read_plainly
    settings = settings if guide == "activation" else Scoring(Aggregation(lift=False), max_tokens=32)
    packed = Network(pack(copy.deepcopy(network), half=True), tokenizer, reader, settings)
    plain = shard_of(Network(network, tokenizer, reader, settings), studies, "image+report")
    lower = shard_of(packed, studies, "image+report", precision="bfloat16")
    assert np.mean([(a.patches == b.patches).all() for a, b in zip(lower, plain)]) >= 0.99
    # it did compute in bfloat16
    assert max(np.abs(a.relevance - b.relevance).max() / b.relevance.max() for a, b in zip(lower, plain)) > 1e-5
    twice = shard_of(packed, studies, "image+report", precision="bfloat16")
    assert all((a.relevance == b.relevance).all() for a, b in zip(lower, twice))


@pytest.mark.parametrize("gelu", [False, True])
def test_a_processor_without_bfloat16_reads_in_it_all_the_same(monkeypatch, gelu):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    linear, x = torch.nn.Linear(32, 16), torch.randn(5, 32)
    after = torch.nn.functional.gelu if gelu else torch.nn.Identity()
    packed, lower = Packed(linear, half=True, gelu=gelu), copy.deepcopy(linear).to(torch.bfloat16)
    with torch.inference_mode():
        assert torch.allclose(packed(x), after(linear(x)), atol=1e-6)
        with torch.autocast("cpu", torch.bfloat16): found = packed(x)
        assert found.dtype == torch.bfloat16 and torch.equal(found, after(lower(x.to(torch.bfloat16))))


def test_without_a_second_look_at_close_calls_patches_would_differ(read_plainly):
    plain = read_plainly[-1]
    near = [b for b in plain if close_calls([b], 0.02)]
    assert 0 < len(near) < len(plain) / 2  # some calls are close, most are not
    assert len(close_calls(plain, 1.0)) >= len(near) >= len(close_calls(plain, 0.0)) == 0


def test_what_the_blocks_of_swin_add_up_stays_in_float32():
    network, films, errors = step_network().eval(), planted(8, 3)[0], {}  # a plain Swin of two stages, as from the hub
    with torch.no_grad(): plain = network.encode(films)
    for kept in (True, False):
        packed, kinds = pack(copy.deepcopy(network), half=True), []
        if not kept:
            for part in packed.encoder.modules(): part._forward_hooks.clear()
        for stage in packed.encoder.encoder.layers:
            for block in stage.blocks:
                block.register_forward_hook(
                    lambda _, __, out: kinds.append((out if torch.is_tensor(out) else out[0]).dtype))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            errors[kept] = (packed.encode(films).float() - plain).square().mean().sqrt()
        assert len(kinds) == 4 and set(kinds) == {torch.float32 if kept else torch.bfloat16}
    assert 0 < errors[True] < errors[False]


@pytest.mark.parametrize("error", [0.003, 0.03, 0.3])
def test_calls_are_read_again_until_a_lead_is_beyond_what_the_precision_moves(read_plainly, error):
    rng, plain, asked = np.random.default_rng(0), read_plainly[-1], []
    shaken = [r.relevance * np.exp(error * rng.standard_normal(144)) for r in plain]
    rough = [replace(r, relevance=x, patches=np.sort(np.argsort(-x)[:4])) for r, x in zip(plain, shaken)]
    done = settle(rough, lambda places: (asked.extend(places), [plain[n] for n in places])[1])
    wrong = lambda some: np.mean([(np.sort(a.patches) != np.sort(b.patches)).any() for a, b in zip(some, plain)])
    # where all is noise, all are read again
    assert wrong(done) <= 0.01 and len(asked) == len(set(asked)) and (error > 0.003 or len(asked) < len(plain))
    assert error == 0.003 or wrong(rough) > wrong(done)  # there was something to mend
    assert all(done[n] is plain[n] for n in asked) and all(
        d is r for n, (d, r) in enumerate(zip(done, rough)) if n not in asked)


def test_a_film_is_looked_at_once_even_when_its_report_is_written(read_plainly, monkeypatch):
    network, tokenizer, reader, studies, settings, _ = read_plainly
    seen, encode = [], ReportVLM.encode
    monkeypatch.setattr(ReportVLM, "encode", lambda self, films: (seen.append(len(films)), encode(self, films))[1])
    shard_of(Network(network, tokenizer, reader, settings), studies[:5], "image-only")
    assert sum(seen) == 5


def test_films_are_asked_for_before_the_network_is_busy_with_the_last():
    events = []
    for part, found in ahead([[0], [1], [2]], lambda p: (events.append(("begun", p[0])), iter(p))[1]):
        events.append(("read", part[0]))
    assert events == [("begun", 0), ("begun", 1), ("read", 0), ("begun", 2), ("read", 1), ("read", 2)]


# `neural build`, from the command and from Python

@pytest.fixture(scope="module")
def small(tmp_path_factory):
    "Six films with reports in a folder, their manifest, and a network that has seen nothing."
    home = tmp_path_factory.mktemp("build")
    films = home / "films"
    films.mkdir()
    rows = []
    for i in range(6):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (96, 80), dtype=np.uint8)).save(films / f"f{i}.png")
        rows.append(
            dict(image=f"f{i}.png",
                 report_text=f"FINDINGS: The heart is {'enlarged' if i % 2 else 'normal'}. No effusion.",
                 patient_id=f"p{i}", study_id=f"study{i}")
        )
    pd.DataFrame(rows).to_csv(films / "manifest.csv", index=False)
    tokenizer = train_tokenizer([r["report_text"] for r in rows] * 5, vocab_size=90)
    for name, seed in (("vlm", 0), ("other", 1)):
        torch.manual_seed(seed)
        ReportVLM(small_config(len(tokenizer), 96, width=64, d_model=64, layers=1)).save_pretrained(home / name)
        tokenizer.save_pretrained(home / name)
        save_aggregation(home / name, Aggregation(lift=False), None, 4, 40)
    index_dataset("folder", films)[0].save(home / "m.csv")
    return home


@pytest.fixture
def place(small, tmp_path, monkeypatch):
    "A working folder of one test, with the films, the manifest and the networks in it."
    for name in ("films", "vlm", "other"): shutil.copytree(small / name, tmp_path / name)
    index_dataset("folder", tmp_path / "films")[0].save(tmp_path / "m.csv")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def neural(*words):
    "A command, in this process: exit status and everything it said."
    said = CliRunner().invoke(app, [str(w) for w in words])
    return said.exit_code, said.output


def build(*more, store="st", manifest="m.csv", vlm="vlm"):
    return neural("build", manifest, store, "--vlm", vlm, "--workers", "0", *more)


def held(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*"))
            if p.is_file() and p.name != ".lock"}


@pytest.mark.parametrize(
    "wrong, said",
    [(("--keep", "0"), "keep ratio"), (("--keep", "5"), "keep ratio"), (("--keep", "nan"), "keep ratio"),
     (("--keep", "-0.1"), "keep ratio"), (("--limit", "nan"), "--limit"), (("--limit", "2"), "--limit"),
     (("--thumbnail", "-1"), "--thumbnail"), (("--workers", "-1"), "--workers"),
     (("--engine", "ray", "--workers", "0"), "at least one process"), (("--key-file", "empty"), "at least 16 bytes"),
     (("--key-file", "short"), "at least 16 bytes"), (("--codec", "pq"), "needs a codebook"),
     (("--codebook", "m.csv"), "no codebook")],
)
def test_zero_empty_and_impossible_are_not_taken_for_left_out(place, wrong, said):
    (place / "empty").touch()
    (place / "short").write_bytes(b"0123456789")
    before = held(place)
    status, output = build(*wrong)
    assert status in (1, 2) and said in output and len(output.strip().splitlines()) == 1 and held(place) == before


def test_limit_zero_and_workers_zero_are_what_they_say(place):
    (place / "films" / "f2.png").write_bytes(b"\x89PNG")
    status, output = build("--limit", "0")
    assert (status == 1 and "1 of 6 studies left out" in output and "study2: f2.png" in output
            and len(AssetStore("st")) == 5)
    assert build("--limit", "0.5")[0] == 0 and build("--limit", "1", "--thumbnail", "0")[0] == 0


KEYS = {"k1": b"1" * 32, "k2": b"2" * 32}


@pytest.mark.parametrize(
    "first, then, said",
    [(("--key-file", "k1"), (), "key [0-9a-f]{16}, now none"),
     (("--key-file", "k1"), ("--key-file", "k2"), "key [0-9a-f]{16}, now [0-9a-f]{16}"),
     ((), ("--key-file", "k1"), "key none, now [0-9a-f]{16}"),
     (("--hide-corners", "--thumbnail", "450"), (), "thumbnail 450, now 0; hidden 0, 11, 132, 143, now none"),
     ((), ("--pixels",), "pixels no, now yes"), ((), ("--keep", "0.1"), "keep 4, now 15"),
     ((), ("--track", "image-only"), "track image.report, now image-only"),
     ((), ("--codec", "f16"), "codec int8, now f16"),
     ((), ("--precision", "bfloat16"), "precision float32, now bfloat16")],
)
def test_a_store_is_gone_on_with_as_it_was_begun_or_not_at_all(place, first, then, said):
    for name, key in KEYS.items(): (place / name).write_bytes(key)
    whole = (place / "m.csv").read_text().splitlines(True)
    (place / "part.csv").write_text("".join(whole[:4]))
    shutil.copy("m.json", "part.json")
    assert build(*first, manifest="part.csv")[0] == 0
    before = held(place / "st")
    status, output = build(*then)
    assert (status == 1 and re.search(said, output) and len(output.strip().splitlines()) == 1
            and held(place / "st") == before)
    assert build(*first)[0] == 0 and len(AssetStore("st")) == 6 and AssetStore("st").verify() == []
    status, told = neural("verify", "st")
    assert status == 0 and "assets: 6, all whole" in told and re.search(rf"\n  {said.split()[0]} +\S", told)


def test_another_network_or_guide_is_refused_by_name(place):
    assert build()[0] == 0
    status, output = build(vlm="other")
    assert status == 1 and f"network {hash_of('vlm')}, now {hash_of('other')}" in output
    save_aggregation(place / "vlm", Aggregation("activation", tokens="all"), torch.ones(144, 14), 4, 40)
    status, output = build()
    assert (status == 1 and "guide attention, now activation" in output and "tokens finding, now all" in output
            and "habit none, now" in output)


def test_another_vocabulary_is_refused(place, small):
    reader, model = ReportReader(), load_vlm(place / "vlm")
    AssetStore.create(place / "st", ["lung", "heart"], {}, model.encoder.num_features, model.grid)
    with pytest.raises(
        NeuralError, match=f"vocabulary {vocabulary_hash(['lung', 'heart'])}, now {vocabulary_hash(reader.vocabulary)}"
    ):
        open_store(place / "st", reader, model, "image+report", {})


def test_a_manifest_of_another_data_set_asks_first(place):
    assert build()[0] == 0
    shutil.copytree("films", "more")
    table = pd.read_csv("more/manifest.csv").assign(
        study_id=[f"new{i}" for i in range(6)], patient_id=[f"q{i}" for i in range(6)])
    table.to_csv("more/manifest.csv", index=False)
    index_dataset("folder", place / "more")[0].save(place / "n.csv")
    before = held(place / "st")
    status, output = build(manifest="n.csv")
    assert (status == 1 and len(set(re.findall("folder [0-9a-f]{8}", output))) == 2 and "--force" in output
            and held(place / "st") == before)
    assert build("--force", manifest="n.csv")[0] == 0 and len(AssetStore("st").settings["datasets"]) == 2
    assert build(manifest="n.csv")[0] == build()[0] == 0 and len(AssetStore("st")) == 12


@pytest.mark.parametrize("key", [None, b"0123456789abcdef"])
def test_a_bad_film_and_a_bad_report_are_left_out_by_name(place, key):
    texts = place / "films" / "reports"
    texts.mkdir()
    m = Manifest.load("m.csv")
    studies = list(m)
    for i, s in enumerate(studies):
        (texts / f"r{i}.txt").write_text("FINDINGS: No effusion.")
        studies[i] = replace(s, report=f"reports/r{i}.txt")
    (texts / "r1.txt").unlink()
    (texts / "r2.txt").write_bytes(b"x" * (2**20 + 1))
    (place / "films" / "f3.png").unlink()
    (place / "films" / "f4.png").write_bytes(b"not a film")
    studies[5] = replace(studies[5], views=(replace(studies[5].views[0], view="lateral"),))
    manifest = Manifest(studies, m.root, m.layout)
    store, left = build_store(manifest, "st", "vlm", packing=Packing(secret=key), workers=0, progress=False)
    name = lambda i: keyed_id(f"study{i}", key) if key else f"study{i}"
    assert store.ids == [name(0)] and {(i, why) for i, why, _ in left} == {
        (name(1), "report not readable"), (name(2), "report not readable"), (name(3), "film not readable"),
        (name(4), "film not readable"), (name(5), "film not readable")}
    details = " ".join(d for *_, d in left)
    assert all((w in details) != bool(key) for w in ("r1.txt", "f3.png", "f4.png")) and "study" not in (
        details if key else "")


def test_what_was_left_out_is_listed_beside_the_store(place):
    (place / "films" / "f2.png").write_bytes(b"")
    status, output = build("--limit", "1")
    assert (status == 0 and "left out: 1 film not readable\n  study2: f2.png" in output
            and pd.read_csv("st-exclusions.csv")["study_id"].tolist() == ["study2"])
    shutil.copy("films/f3.png", "films/f2.png")
    assert build()[0] == 0 and len(pd.read_csv("st-exclusions.csv")) == 0 and len(AssetStore("st")) == 6
    (place / "su-exclusions.csv").write_text("my own notes\n")
    status, output = build(store="su")
    assert (status == 1 and "not made by this" in output
            and (place / "su-exclusions.csv").read_text() == "my own notes\n" and not (place / "su").exists())


def test_places_that_are_no_store_are_left_as_they_are(place):
    (place / "notes").mkdir()
    (place / "notes" / "mine.txt").write_text("mine")
    before = held(place)
    for where in ("m.csv", "notes", "vlm", "films", "films/f1.png"):
        status, output = build(store=where)
        assert status == 1 and "not empty" in output and len(output.strip().splitlines()) == 1 and held(place) == before
    for command in ("verify", "compact"):
        for where in ("notes", "vlm", "m.csv", "nowhere"):
            assert neural(command, where)[0] in (1, 2) and held(place) == before


def test_an_asset_that_cannot_be_packed_stops_no_other(place):
    m = Manifest.load("m.csv")
    studies = [replace(s, study_id="1.2.840.113619.2.55.3") if i == 2 else s for i, s in enumerate(m)]
    store, left = build_store(Manifest(studies, m.root, m.layout), "st", "vlm", workers=0, progress=False)
    assert len(store) == 5 and left.counts() == {"cannot be packed": 1}


def test_a_build_that_is_killed_goes_on(place, monkeypatch):
    """After the store was begun, after the first shard, while a shard is written: the next start ends with what one
    start gives."""
    assert build()[0] == 0
    for stop in range(4):
        calls, real = [], os.replace
        def replace_or_die(*paths):
            calls.append(paths)
            if len(calls) > stop: raise KeyboardInterrupt
            return real(*paths)
        with monkeypatch.context() as m:
            m.setattr(os, "replace", replace_or_die)
            with contextlib.suppress(KeyboardInterrupt):
                build_store(Manifest.load("m.csv"), f"s{stop}", "vlm", batch_size=2, workers=0, progress=False)
        store, _ = build_store(Manifest.load("m.csv"), f"s{stop}", "vlm", batch_size=2, workers=0, progress=False)
        assert list(store) == list(AssetStore("st")) and store.verify() == []


def test_the_command_is_quiet_in_a_pipe(place):
    done = subprocess.run(
        [sys.executable, "-c", "from neural.cli import main; main()", "build", "m.csv", "st", "--vlm", "vlm",
         "--workers", "0"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode == 0 and done.stderr == "" and len(done.stdout.splitlines()) == 1
            and done.stdout.startswith("store: st, 6 assets"))


# stores by any scorer

def by_hand(vlm, manifest, name, track, share=None):
    "What a scorer retains of each study, from its film and its report, in four lines."
    network = load_network(vlm, scoring=load_scoring(vlm, name, share))
    films = torch.stack([torch.as_tensor(load_radiograph(manifest.image_path(s.frontal), 96)) for s in manifest])
    sections = [split_sections(report_text(manifest, s)) for s in manifest]
    texts = ([evidence(s) for s in sections] if track == "image+report"
             else write_reports(network.model, network.tokenizer, films, 40))
    ids = [s.study_id for s in manifest]
    return dict(
        zip(
            ids,
            top_k(
                score(network, Batch(ids, films, texts, sections if track == "image+report" else None)).values, 4
            ).tolist(),
        )
    )


@pytest.mark.parametrize("track", TRACKS)
@pytest.mark.parametrize(
    "name", ["all words", "impression", "rollout", "times gradient", "keenest head", "anatomy of findings", "random"])
def test_a_store_by_a_named_scorer_is_what_the_scorer_says(place, name, track):
    status, output = build("--score", name, "--track", track)
    assert status == 0, output
    store, wanted = AssetStore("st"), by_hand("vlm", Manifest.load("m.csv"), name, track)
    assert {a.study_id: a.patches.tolist() for a in store} == wanted
    assert store.settings["score"] == name and store.provenance["selection"] == name.replace(" ", "-")
    status, told = neural("verify", "st")
    assert status == 0 and f"\n  score      {name}\n" in told and "unknown" not in told
    assert build("--score", name, "--track", track)[0] == 0 and len(AssetStore("st")) == 6


def test_two_scorers_keep_different_patches_and_no_store_mixes_them(place):
    assert build()[0] == build("--score", "random", store="su")[0] == 0
    assert [a.patches.tolist() for a in AssetStore("st")] != [a.patches.tolist() for a in AssetStore("su")]
    before = {s: held(place / s) for s in ("st", "su")}
    for store, more, said in (("st", ("--score", "rollout"), "guide attention, now named"),
                              ("su", (), "guide named, now attention"),
                              ("su", ("--score", "rollout"), "score random, now rollout")):
        status, output = build(*more, store=store)
        assert status == 1 and said in output and len(output.strip().splitlines()) == 1
    assert {s: held(place / s) for s in ("st", "su")} == before


def test_the_default_by_its_name_makes_the_default_store(place):
    assert build()[0] == build("--score", "finding words", store="su")[0] == 0
    st, su = AssetStore("st"), AssetStore("su")
    assert [replace(a, provenance={}) for a in st] == [replace(a, provenance={}) for a in su]
    assert st.settings["score"] is None and su.settings["score"] == "finding words"
    assert {n: v for n, v in st.settings.items() if v != su.settings[n]} == dict(score=None, selection=None)


@pytest.mark.parametrize(
    "more, said",
    [(("--score", "rolout"), "is it 'rollout'"), (("--score", "activation"), "neural baseline"),
     (("--score", "random", "--share", "0.5"), "is no mixture"), (("--share", "0.5"), "name the scorer")],
)
def test_a_scorer_that_cannot_be_read_is_one_line(place, more, said):
    before = held(place)
    status, output = build(*more)
    assert status == 1 and said in output and len(output.strip().splitlines()) == 1 and held(place) == before


def test_what_scorers_compare_with_is_measured_once_and_kept_beside_the_network(place):
    m = Manifest.load("m.csv")
    Manifest([replace(s, split="train" if i < 4 else "test") for i, s in enumerate(m)], m.root, m.layout).save(
        "split.csv")
    status, output = neural("baseline", "split.csv", "--vlm", "vlm", "--workers", "0")
    assert status == 0 and "of 4 training studies" in output and len(output.splitlines()) == 1
    kept = held(place / "vlm")
    assert neural("baseline", "split.csv", "--vlm", "vlm")[0] == 1 and held(place / "vlm") == kept
    for name, share in (("brighter than usual", None), ("words + anatomy", 0.25)):
        more = () if share is None else ("--share", share)
        assert build("--score", name, *more, store=name)[0] == 0
        store = AssetStore(name)
        assert {a.study_id: a.patches.tolist() for a in store} == by_hand("vlm", m, name, "image+report", share)
        assert store.settings["share"] == (None if share is None else "0.25") and store.settings["habit"] != "none"
    assert build()[0] == 0 and AssetStore("st").settings["habit"] == "none"  # the run's own choice is what it was
    Manifest([replace(s, split="test") for s in m], m.root, m.layout).save("unseen.csv")
    status, output = neural("baseline", "unseen.csv", "--vlm", "other")
    assert status == 1 and "train" in output and len(output.strip().splitlines()) == 1


def test_scorers_are_listed(place):
    status, output = neural("scorers")
    assert status == 0 and all(f"\n  {name} " in "\n" + output for name in scorers())


# codebooks

@pytest.fixture
def run_folder(place):
    "What stage 20 leaves behind, as far as a codebook needs it."
    run = place / "run"
    run.mkdir()
    shutil.copytree("vlm", run / "vlm")
    m = Manifest.load("m.csv")
    studies = [replace(s, split="train" if i < 4 else "validate") for i, s in enumerate(m)]
    manifest = Manifest(studies, m.root, m.layout)
    manifest.save(run / "manifest.csv")
    network = Network(load_vlm("vlm"), AutoTokenizer.from_pretrained("vlm"), ReportReader(), load_scoring("vlm"))
    films = [(s.study_id, load_radiograph(manifest.image_path(s.frontal), 96), "The heart is normal.") for s in studies]
    save_readings([r for t in TRACKS for r in shard_of(network, films, t)], run)
    return run


def test_a_codebook_knows_its_network(run_folder, place):
    assert neural("codebook", "run", "-o", "b", "--bytes", "8")[0] == 0
    assert read_book("b").network == hash_of("vlm")
    assert build("--codec", "pq", "--codebook", "b")[0] == 0 and AssetStore("st").book.network == hash_of("vlm")
    status, output = build("--codec", "pq", "--codebook", "b", store="su", vlm="other")
    assert (status == 1 and hash_of("vlm") in output and hash_of("other") in output and "--force" in output
            and not (place / "su").exists())
    assert build("--codec", "pq", "--codebook", "b", "--force", store="su", vlm="other")[0] == 0
    # of before: nothing is known, nothing is refused
    unknown = replace(read_book("b"), network="")
    Path("c").write_bytes(book_bytes(unknown))
    assert build("--codec", "pq", "--codebook", "c", store="sv", vlm="other")[0] == 0


def test_a_codebook_is_written_over_nothing_but_a_codebook(run_folder, place):
    before = held(place)
    for out in ("run/manifest.csv", "run/relevance.parquet", "run/vlm/model.safetensors", "vlm/config.json",
                "films/f1.png", "run"):
        status, output = neural("codebook", "run", "-o", out, "--bytes", "8")
        assert status in (1, 2) and len(output.strip().splitlines()) == 1 and held(place) == before, out
    assert neural("codebook", "run", "-o", "b", "--bytes", "8")[0] == 0
    first = Path("b").read_bytes()
    status, output = neural("codebook", "run", "-o", "b", "--bytes", "4")
    assert status == 1 and "--force" in output and Path("b").read_bytes() == first
    assert neural("codebook", "run", "-o", "b", "--bytes", "4", "--force")[0] == 0 and read_book("b").width == 4
    status, output = neural("codebook", "run", "-o", "nowhere/b", "--bytes", "4")
    assert status == 1 and os.strerror(errno.ENOENT) in output


def test_readings_that_are_damaged_or_cannot_be_written_are_one_line(run_folder, place, monkeypatch):
    readings = load_readings("run", TRACKS[0])
    path = Path("run/mentions.parquet")
    whole = path.read_bytes()
    before = held(place / "run")
    def full(*_, **__): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as m:
        m.setattr(pq, "write_table", full)
        with pytest.raises(NeuralError, match="relevance.parquet cannot be written, No space left"):
            save_readings(readings, "run")
    assert held(place / "run") == before
    for damage in (whole[:-9], b"", b"PAR1"):
        path.write_bytes(damage)
        with pytest.raises(NeuralError, match="mentions.parquet") as e: load_readings("run", TRACKS[0])
        assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"mean": null, "k": "x", "max_tokens": 4}',
     '{"mean": null, "k": 4, "max_tokens": 40, "colour": 1}',
     '{"mean": null, "k": 4, "max_tokens": 40, "guide": "none"}'],
)
def test_a_damaged_relevance_file_is_one_line(tmp_path, text):
    (tmp_path / "relevance.json").write_text(text)
    with pytest.raises(NeuralError) as e: load_aggregation(tmp_path)
    assert "\n" not in str(e.value)


def test_a_guide_that_has_nothing_to_follow_is_refused(taught):
    films, _, _ = planted(1, 3)
    model = copy.deepcopy(taught)
    model.config.label_names = []
    with pytest.raises(NeuralError, match="label head"):
        read_batch(model, None, ReportReader(), ["a"], films, ["No effusion."], "image+report", 4,
                   Aggregation("activation"), torch.zeros(144, 0))
    with pytest.raises(NeuralError, match="indices 0..143"):
        read_batch(taught, None, ReportReader(), ["a"], films, ["No effusion."], "image+report", 4,
                   Aggregation(lift=False), never=(144,))


# how sure the writer was

@pytest.fixture(scope="module")
def written(read_plainly):
    "A few readings of each track, by the same network."
    network, tokenizer, reader, studies, settings, _ = read_plainly
    films = torch.stack([torch.as_tensor(f) for _, f, _ in studies[:6]])
    read = lambda track: read_batch(network, tokenizer, reader, [i for i, *_ in studies[:6]], films,
                                    [t for *_, t in studies[:6]], track, 4, settings.how, settings.mean, 32)
    return network, reader, films, read("image-only"), read("image+report")


def test_a_concept_has_the_probability_of_its_finding_on_the_image_only_track_alone(written):
    network, reader, films, own, told = written
    with torch.no_grad(): p = torch.sigmoid(network.name_findings(network.encode(films))).numpy()
    assert all(r.certainty == {} and r.asset(reader.vocabulary).to_bytes()[4] == 2 for r in told)
    for r, (lesion, edema) in zip(own, p):
        wanted = {"lung nodule": lesion, "pulmonary edema": edema}
        named = {m.concept for m in r.annotation.mentions}
        assert set(r.certainty) == named & set(wanted) and all(
            abs(r.certainty[c] / 254 - wanted[c]) < 0.01 for c in r.certainty)
        a = r.asset(reader.vocabulary)
        assert ([b for b in a.certainty] == [r.certainty.get(reader.vocabulary[c], 255) for c in a.concepts]
                if r.certainty else not len(a.certainty))


def test_a_denied_concept_keeps_how_probable_it_is_present(written):
    network, reader, films, *_ = written
    notes = list(
        reader.pipe(["No pulmonary edema.", "Pulmonary edema.", "Possible pulmonary edema.", "Scoliosis.", "",
                     "Lungs are clear."])
    )
    with torch.no_grad(): tokens = network.encode(films[:1]).repeat(6, 1, 1)
    found = certainties(network, tokens, notes)
    assert found[0] == found[1] == found[2] and set(found[0]) == {"pulmonary edema"} and found[3:] == [{}, {}, {}]


@pytest.mark.parametrize(
    "concept,names,at",
    [("hydropneumothorax", ("Pneumothorax", "Edema", "Pleural Effusion"), (0, 2)), ("pneumonia", ("Edema",), ()),
     ("pneumonia", ("No Finding", "Pneumonia"), (1,)), ("no such concept", ("Edema",), ())],
)
def test_a_concept_belongs_to_the_findings_it_counts_for(concept, names, at):
    assert concept_findings(concept, "Observation", names) == at and concept_findings(concept, "Anatomy", names) == ()


def test_tables_and_a_direct_build_give_the_same_certainties(written, tmp_path):
    _, reader, _, own, told = written
    save_readings(own + told, tmp_path)
    back, plain = load_readings(tmp_path, "image-only"), load_readings(tmp_path, "image+report")
    assert (any(r.certainty for r in own) and [r.certainty for r in back] == [r.certainty for r in own]
            and not any(r.certainty for r in plain))
    for a, b in zip(own, back):
        assert np.array_equal(a.asset(reader.vocabulary).certainty, b.asset(reader.vocabulary).certainty)
    # as an earlier version wrote it
    pq.write_table(
        pq.read_table(tmp_path / "mentions.parquet").drop_columns(["certainty"]), tmp_path / "mentions.parquet")
    assert [r.certainty for r in load_readings(tmp_path, "image-only")] == [{}] * 6


def test_a_store_that_was_begun_without_certainties_is_gone_on_with_as_it_was(place):
    vlm, manifest = place / "vlm", Manifest.load(place / "m.csv")
    made, _ = build_store(manifest, place / "sure", vlm, "image-only", workers=0, progress=False)
    network, reader = load_vlm(vlm), ReportReader()
    assert made.certain and made.version == 3 and made.verify() == []
    old = AssetStore.create(place / "old", made.vocabulary, made.kinds, made.dim, made.grid, "image-only", made.codec,
                            made.provenance, settings=made.meta["settings"])
    more, _ = build_store(manifest, place / "old", vlm, "image-only", workers=0, progress=False)
    assert more.version == 2 and more.ids == made.ids and not any(len(a.certainty) for a in more) and old.verify() == []
    assert [replace(a, certainty=()) for a in made] == list(more)
    report, _ = build_store(manifest, place / "told", vlm, "image+report", workers=0, progress=False)
    assert not report.certain and report.version == 2
