"Fine-tuning with more than the two losses: what the chapter's small example cannot show."
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from neural.cohort import toy_study
from neural.finetune import (Collator, ReportTrainer, StudyDataset, augment, draw_weights, finetune, focus_loss,
                             freeze_stages, last_checkpoint, moved, poses, read_labels, report_ids, warm_start)
from neural.radiograph import patch_coverage
from neural.report import train_tokenizer
from neural.study import LABELS, NeuralError
from neural.vlm import ReportVLM, small_config


class Films(dict):
    "Films in memory, with the one method a dataset asks for."
    asked = None
    def batch(self, ids):
        if self.asked is not None: self.asked += list(ids)
        return np.stack([self[i] for i in ids])


@pytest.fixture(scope="module")
def cohort():
    "Eight phantom studies with their marks, a tokenizer, and the tokens that should look at the marks."
    toys = {f"s{i}": toy_study("Pneumonia" if i % 4 == 0 else "Lung Lesion", size=96, seed=i) for i in range(8)}
    texts = ["right pneumonia." if i % 4 == 0 else "nodule in the left lung." for i in range(8)]
    tokenizer = train_tokenizer(texts * 5, vocab_size=80)
    targets = np.array([[t.labels[l] for l in LABELS] for t in toys.values()], np.float32)
    cover = [patch_coverage(np.max([np.asarray(m, np.float32) for m in t.masks.values()], 0)) for t in toys.values()]
    speaks = [[True] * (len(report_ids(tokenizer, t, 96)[0]) - 1) + [False] for t in texts]
    return (Films({k: np.asarray(v.image, np.float32) for k, v in toys.items()}), texts, targets, tokenizer,
            list(zip(cover, speaks)))


def small(tokenizer):
    torch.manual_seed(0)
    return ReportVLM(small_config(len(tokenizer), 96, width=64, d_model=64, layers=2))


def test_every_parameter_receives_a_gradient(cohort):
    films, texts, targets, tokenizer, focus = cohort
    model = small(tokenizer)
    batch = Collator(tokenizer)([StudyDataset(films, list(films), texts, targets, focus=focus)[i] for i in range(4)])
    marks, speaks = batch.pop("marks"), batch.pop("speaks")
    # an undecided head passes nothing back to the film on its first step
    torch.nn.init.normal_(model.head.weight, std=0.02)
    out = model(**batch, output_attentions=True)
    (out.loss + focus_loss(out.cross_attentions[-1], speaks, marks)).backward()
    silent = [
        n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.abs().sum() > 0)]
    # a shift of all keys leaves a softmax as it is
    assert [n for n in silent if "shared" not in n and "relative_attention_bias" not in n and "key.bias" not in n] == []


def test_the_focus_loss_reaches_the_words_own_looks(cohort):
    films, texts, targets, tokenizer, focus = cohort
    model = small(tokenizer)
    batch = Collator(tokenizer)([StudyDataset(films, list(films), texts, targets, focus=focus)[i] for i in range(4)])
    out = model(**{k: v for k, v in batch.items() if k not in ("marks", "speaks")}, output_attentions=True)
    focus_loss(out.cross_attentions[-1], batch["speaks"], batch["marks"]).backward()
    last = model.decoder.decoder.block[-1].layer[1].EncDecAttention
    assert last.q.weight.grad.abs().sum() > 0 and last.k.weight.grad.abs().sum() > 0
    # the findings are none of its business
    assert model.head.weight.grad is None or not model.head.weight.grad.abs().sum() > 0


def test_defaults_are_the_plain_run_to_the_last_bit(cohort, tmp_path):
    films, texts, targets, tokenizer, focus = cohort
    runs = []
    for name, data, extra in (
        ("plain", StudyDataset(films, list(films), texts, targets), {}),
        (
            "spelled out", StudyDataset(films, list(films), texts, targets, focus=None),
            dict(draw=None, focus_weight=0.0)),
    ):
        model = small(tokenizer)
        finetune(model, tokenizer, data, data, tmp_path / name, epochs=1, batch_size=4, seed=3, **extra)
        runs.append(model.state_dict())
    assert all(torch.equal(runs[0][k], runs[1][k]) for k in runs[0])


def test_marks_without_weight_change_no_weight(cohort, tmp_path):
    films, texts, targets, tokenizer, focus = cohort
    runs = []
    for name, marks in (("without", None), ("with", focus)):
        model, data = small(tokenizer), StudyDataset(films, list(films), texts, targets, focus=marks)
        finetune(model, tokenizer, data, StudyDataset(films, list(films), texts, targets), tmp_path / name, epochs=1,
                 batch_size=4, seed=3, focus_weight=0.0)
        runs.append(model.state_dict())
    assert all(torch.allclose(runs[0][k].float(), runs[1][k].float(), atol=1e-6) for k in runs[0])


def test_an_oversampled_study_is_drawn_more_often(cohort, tmp_path):
    films, texts, targets, tokenizer, _ = cohort
    weights = draw_weights(targets[:, [LABELS.index("Pneumonia")]], ["Pneumonia"], 50.0)
    assert weights.tolist() == [50.0, 1, 1, 1, 50.0, 1, 1, 1]
    seen = Films(films)
    seen.asked = []
    model = small(tokenizer)
    finetune(model, tokenizer, StudyDataset(seen, list(films), texts, targets),
             StudyDataset(films, list(films), texts, targets), tmp_path / "run", epochs=3, batch_size=4, draw=weights)
    ill = sum(i in ("s0", "s4") for i in seen.asked)
    assert len(seen.asked) == 24 and ill >= 18  # 96 % expected, 25 % without the draw


def test_film_and_mark_make_the_same_move(cohort):
    films, texts, targets, tokenizer, _ = cohort
    spot = np.zeros((1, 96, 96), np.float32)
    spot[0, 56:72, 24:40] = 1
    mark = torch.nn.functional.avg_pool2d(torch.as_tensor(spot)[None], 8).flatten().numpy()
    item = dict(film=spot, text="nodule.", targets=targets[0], weights=None, focus=(mark, [True] * 9))
    for seed in range(10):
        batch = Collator(tokenizer, generator=torch.Generator().manual_seed(seed))([item])
        film = torch.nn.functional.avg_pool2d(batch["pixel_values"], 8).flatten()
        assert film[batch["marks"][0] > 0.5].mean() > 0.5 and film[batch["marks"][0] == 0].mean() < 0.05


def test_a_chosen_move_spends_no_randomness_on_another():
    x = torch.rand(3, 1, 96, 96, generator=torch.Generator().manual_seed(1))
    one, two = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    # the same draws in the same order as ever
    assert torch.equal(augment(x, one), augment(x, two, theta=poses(3, two)))
    assert torch.allclose(moved(x, torch.eye(2, 3).repeat(3, 1, 1)), x, atol=1e-4)  # a move that stands still


def test_refusals(cohort):
    *_, targets, _, _ = cohort
    with pytest.raises(NeuralError, match="oversample must be above 0"): draw_weights(targets, list(LABELS), -1)
    with pytest.raises(NeuralError, match="do not belong together"):
        focus_loss(torch.rand(2, 2, 3, 4), torch.ones(2, 4).bool(), torch.ones(2, 4))


def losses(folder):
    "Validate losses that a run printed for the test."
    return json.loads((folder / "losses.json").read_text())


TWO = '''
"One short fine-tuning run; started alone or by accelerate, with the same studies in each step."
import json, os, sys
from pathlib import Path
import numpy as np, torch
from neural.finetune import StudyDataset, finetune
from neural.report import train_tokenizer
from neural.study import LABELS
from neural.vlm import ReportVLM, small_config

folder, batch, interrupt = Path(sys.argv[1]), int(sys.argv[2]), "slow" in sys.argv
torch.set_num_threads(1)
torch.manual_seed(0)
rng = np.random.default_rng(0)
class Films(dict):
    def batch(self, ids):
        if interrupt and ids[0] == "s9" and not (folder / "seen").exists():
            (folder / "seen").write_text("")
            os.kill(os.getpid(), 2)
        return np.stack([self[i] for i in ids])
# plain grey: augmentation has little to change
films = Films({f"s{i}": np.full((1, 96, 96), 0.2 + 0.05 * i, np.float32) for i in range(16)})
texts = ["nodule in the left lung." if i % 2 else "effusion on the right side." for i in range(16)]
tokenizer = train_tokenizer(texts * 5, vocab_size=80)
targets = np.zeros((16, len(LABELS)), np.float32); targets[::2, 10] = 1
data = StudyDataset(films, list(films), texts, targets)
config = small_config(len(tokenizer), 96, width=32, d_model=64, layers=1, stem="patch", dropout=0.0)
config.decoder["dropout_rate"] = 0.0
folder.mkdir(parents=True, exist_ok=True)
history = finetune(ReportVLM(config), tokenizer, data, data, folder / "run", lr=8e-3, epochs=3, batch_size=batch)
losses = [[h["epoch"], h["eval_text_loss"]] for h in history if "eval_loss" in h]
if int(os.environ.get("RANK", 0)) == 0: (folder / "losses.json").write_text(json.dumps(losses))
'''


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("script") / "two.py"
    path.write_text(TWO)
    return path


@pytest.fixture
def here(script, monkeypatch):
    "The script in this process, which has imported all that it needs."
    def run(*words):
        monkeypatch.setattr("sys.argv", [str(script), *map(str, words)])
        runpy.run_path(str(script), run_name="__main__")
    return run


def test_two_processes_learn_what_one_learns(script, here, tmp_path):
    "accelerate, two CPU processes by gloo: batches of four each are the batches of eight of one process."
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    here(tmp_path / "one", 8)
    subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines",
         "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", script,
         tmp_path / "two", "4"],
        check=True,
        env=env,
        capture_output=True,
    )
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert [e for e, _ in one] == [e for e, _ in two] == [1, 2, 3]
    assert one[-1][1] < 0.8 * one[0][1]  # it learns
    assert np.allclose([l for _, l in one], [l for _, l in two], rtol=0.02), (one, two)
    assert (
        json.loads(next((tmp_path / "two").glob("run/checkpoint-*/trainer_state.json")).read_text())["max_steps"] == 6)


def test_an_interrupt_leaves_a_checkpoint_of_the_step(script, here, tmp_path):
    "Ctrl-C in the middle of an epoch: the step ends, the state is written, and the same call goes on from there."
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    stopped = subprocess.run([sys.executable, script, tmp_path, "2", "slow"], env=env, capture_output=True, text=True)
    assert stopped.returncode and "KeyboardInterrupt" in stopped.stderr
    step = int(last_checkpoint(tmp_path / "run").rpartition("-")[2])
    assert step % 8 and not (tmp_path / "losses.json").exists()  # eight steps an epoch
    here(tmp_path, 2, "slow")
    assert [e for e, _ in losses(tmp_path)] == [1, 2, 3]
    assert json.loads((Path(last_checkpoint(tmp_path / "run")) / "trainer_state.json").read_text())["global_step"] == 24


def test_a_half_written_checkpoint_is_passed_over(cohort, tmp_path):
    films, texts, targets, tokenizer, _ = cohort
    data = StudyDataset(films, list(films), texts, targets)
    finetune(small(tokenizer), tokenizer, data, data, tmp_path, epochs=1, batch_size=4)
    (tmp_path / "checkpoint-99").mkdir()
    (tmp_path / "checkpoint-99" / "config.json").write_text("{")
    with pytest.raises(NeuralError, match="made with epochs 1, now 2: go on with"):
        finetune(small(tokenizer), tokenizer, data, data, tmp_path, epochs=2, batch_size=4)
    history = finetune(small(tokenizer), tokenizer, data, data, tmp_path, epochs=2, batch_size=4, anyway=True)
    assert [h["epoch"] for h in history if "eval_loss" in h] == [1, 2]


def test_buckets_hold_reports_of_like_length(cohort, tmp_path):
    films, texts, targets, tokenizer, _ = cohort
    seen = []
    class Watch(ReportTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            if model.training: seen.append(inputs["labels"].shape[1])
            return super().compute_loss(model, inputs, *args, **kwargs)
    long = [t if i % 2 else t * 4 for i, t in enumerate(texts * 8)]
    data = StudyDataset(films, list(films) * 8, long, np.tile(targets, (8, 1)))
    finetune(small(tokenizer), tokenizer, data, data, tmp_path, epochs=1, batch_size=4, bucket=True, trainer=Watch)
    # short reports are by themselves in most of the batches they could be; by chance they never are
    assert len(seen) == 16 and sum(t < 20 for t in seen) >= 6


def test_accumulation_steps_on_the_last_batch(cohort, tmp_path):
    films, texts, targets, tokenizer, _ = cohort
    data = StudyDataset(films, list(films), texts, targets)
    history = finetune(small(tokenizer), tokenizer, data, data, tmp_path, epochs=1, batch_size=2, accumulate=3)
    assert history[-1]["step"] == 2  # four batches: three, and the one that is left (A14)


def test_accumulated_gradients_are_a_mean(cohort, tmp_path):
    films, texts, targets, tokenizer, _ = cohort
    data, norms = StudyDataset(films, list(films), [texts[0]] * 8, targets), []
    for batch, accumulate in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        config = small_config(len(tokenizer), 96, width=64, d_model=64, layers=1, stem="patch", dropout=0.0)
        config.decoder["dropout_rate"] = 0.0
        history = finetune(ReportVLM(config), tokenizer, data, data, tmp_path / str(batch), epochs=1, batch_size=batch,
                           accumulate=accumulate)
        norms.append(next(h["grad_norm"] for h in history if "grad_norm" in h))
    assert abs(norms[1] / norms[0] - 1) < 0.1, norms  # a sum of four would be four times as long


def test_checkpointing_changes_memory_and_not_the_weights(cohort, tmp_path):
    films, texts, targets, tokenizer, _ = cohort
    data, runs = StudyDataset(films, list(films), texts, targets), []
    for how in (0, 1):
        model = small(tokenizer)
        finetune(model, tokenizer, data, data, tmp_path / str(how), epochs=1, batch_size=4, seed=3, checkpointing=how)
        runs.append(model.state_dict())
    assert all(torch.allclose(runs[0][k].float(), runs[1][k].float(), atol=1e-4) for k in runs[0] if "running" not in k)


def test_frozen_stages_stand_still(cohort, tmp_path):
    films, texts, targets, tokenizer, _ = cohort
    model, data = small(tokenizer), StudyDataset(films, list(films), texts, targets)
    freeze_stages(model, 1)
    before = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    finetune(model, tokenizer, data, data, tmp_path, epochs=1, batch_size=4)
    assert before and all(torch.equal(p, model.get_parameter(n)) for n, p in before.items())


# what was set is kept, and what was saved belongs together

def data_of(cohort, **changes):
    films, texts, targets, tokenizer, _ = cohort
    given = dict(films=films, ids=list(films), texts=texts, targets=targets) | changes
    return StudyDataset(given.pop("films"), given.pop("ids"), given.pop("texts"), given.pop("targets"), **given)


@pytest.fixture(scope="module")
def begun(cohort, tmp_path_factory):
    "A run of one epoch, its checkpoints left."
    folder = tmp_path_factory.mktemp("begun")
    finetune(small(cohort[3]), cohort[3], data_of(cohort), data_of(cohort), folder, epochs=1, batch_size=4)
    return folder


@pytest.mark.parametrize(
    "change, said",
    [(dict(lr=2e-3), "lr 0.001, now 0.002"), (dict(seed=7), "seed 0, now 7"),
     (dict(batch_size=2), "batch_size 4, now 2"), (dict(max_tokens=40), "max_tokens 96, now 40"),
     (dict(focus_weight=0.5), "focus_weight 0.0, now 0.5"), (dict(texts="other"), "train 8 studies"),
     (dict(targets="other"), "train 8 studies"), (dict(ids="fewer"), "train 8 studies .*, now 7 studies")],
)
def test_checkpoints_of_other_settings_or_data_are_refused_with_both_values(cohort, begun, change, said):
    films, texts, targets, tokenizer, _ = cohort
    other = {"texts": dict(texts=[*texts[1:], texts[0]]),
             "targets": dict(targets=np.where(np.isnan(targets), targets, 1 - targets)),
             "ids": dict(ids=list(films)[:-1], texts=texts[:-1], targets=targets[:-1])}
    changed = next((other[k] for k in change if k in other), {})
    before = sorted(p.name for p in begun.iterdir()), (begun / "settings.json").read_text()
    with pytest.raises(NeuralError, match=f"were made with .*{said}.*anyway=True") as e:
        finetune(small(tokenizer), tokenizer, data_of(cohort, **changed), data_of(cohort), begun,
                 **(dict(epochs=1, batch_size=4) | {k: v for k, v in change.items() if k not in other}))
    assert ("\n" not in str(e.value)
            and (sorted(p.name for p in begun.iterdir()), (begun / "settings.json").read_text()) == before)


def test_another_network_or_tokenizer_does_not_go_on(cohort, begun):
    from neural.report import train_tokenizer
    tokenizer, data = cohort[3], data_of(cohort)
    wider = ReportVLM(small_config(len(tokenizer), 96, width=96, d_model=64, layers=1))
    with pytest.raises(NeuralError, match="network [0-9a-f]{16}, now [0-9a-f]{16}"):
        finetune(wider, tokenizer, data, data, begun, epochs=1, batch_size=4)
    other = train_tokenizer(["The heart is large. No pneumothorax."] * 9, 64)
    with pytest.raises(NeuralError, match="tokenizer [0-9a-f]{16}, now"):
        finetune(ReportVLM(small_config(max(len(other), len(tokenizer)), 96, width=64, d_model=64, layers=1)), other,
                 data, data, begun, epochs=1, batch_size=4)
    with pytest.raises(NeuralError, match="targets of 3 findings for a network that names 14"):
        finetune(
            small(tokenizer), tokenizer, data_of(cohort, targets=cohort[2][:, :3]), data, begun, epochs=1, batch_size=4)


@pytest.mark.parametrize(
    "wrong, said",
    [(dict(epochs=0), "epochs must be above 0"), (dict(batch_size=0), "batch_size must be 1"),
     (dict(lr=0), "lr must be above 0"), (dict(lr_words=-1), "lr_words"), (dict(lr_pretrained=-1), "lr_pretrained"),
     (dict(accumulate=0), "accumulate"), (dict(max_tokens=0), "max_tokens must be 2"), (dict(seed=-1), "seed"),
     (dict(focus_weight=-1), "focus_weight"), (dict(draw=np.zeros(8)), "not all 0"),
     (dict(draw=np.full(8, np.nan)), "finite"), (dict(draw=[]), "0 draw weights for 8"), (dict(workers=-1), "workers")],
)
def test_zero_in_fine_tuning_is_refused_by_name(cohort, tmp_path, wrong, said):
    data = data_of(cohort)
    with pytest.raises(NeuralError, match=said):
        finetune(small(cohort[3]), cohort[3], data, data, tmp_path, **(dict(epochs=1, batch_size=4) | wrong))


def test_a_rate_of_zero_for_words_is_a_rate_of_zero(cohort):
    from neural.finetune import parameter_groups
    model = small(cohort[3])
    rates = {g["lr"] for g in parameter_groups(model, 1e-3, lr_words=0)}
    assert rates == {1e-3, 0}
    for name in ("weights", "focus"):
        with pytest.raises(NeuralError, match=f"0 {name} for 8 studies"): data_of(cohort, **{name: []})
    for call in (lambda: warm_start(model, data_of(cohort), epochs=0),
                 lambda: read_labels(model, data_of(cohort), batch_size=0)):
        with pytest.raises(NeuralError, match="must be 1 or more, got 0"): call()


def another(cohort):
    "A network of the same form with other weights."
    model = small(cohort[3])
    with torch.no_grad(): model.head.bias += 1
    return model


def saved(cohort, folder):
    from neural.vlm import save_vlm
    save_vlm(small(cohort[3]), folder, cohort[3])


@pytest.mark.parametrize("lost", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_network_and_its_files_belong_together(cohort, tmp_path, lost):
    from neural.report import train_tokenizer
    from neural.vlm import load_tokenizer, load_vlm, save_vlm
    saved(cohort, tmp_path / "a")
    save_vlm(another(cohort), tmp_path / "b", train_tokenizer(["The heart is large. No pneumothorax."] * 9, 64))
    (tmp_path / "a" / lost).write_bytes((tmp_path / "b" / lost).read_bytes())
    with pytest.raises(NeuralError, match="config.json was written with|its network was saved with") as e:
        load_tokenizer(tmp_path / "a", load_vlm(tmp_path / "a"))
    assert "\n" not in str(e.value)
    (tmp_path / "a" / lost).unlink()
    with pytest.raises(NeuralError, match="is missing"): load_tokenizer(tmp_path / "a", load_vlm(tmp_path / "a"))


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "swin"}', '{"format": "neural-graph-classifier"}', "\x00"])
def test_a_folder_of_something_else_is_no_network_and_is_left_alone(cohort, tmp_path, text):
    from neural.vlm import load_vlm
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "model.safetensors").write_bytes(b"mine")
    with pytest.raises(NeuralError): load_vlm(tmp_path)
    with pytest.raises(NeuralError): small(cohort[3]).save_pretrained(tmp_path)
    assert ((tmp_path / "config.json").read_text() == text and (tmp_path / "model.safetensors").read_bytes() == b"mine"
            and len(list(tmp_path.iterdir())) == 2)


@pytest.mark.parametrize("code", [28, 122, 13, 30, 5])
def test_a_disk_that_fails_leaves_the_network_as_it_was(cohort, tmp_path, monkeypatch, code):
    from safetensors import SafetensorError
    import transformers.modeling_utils as made
    from neural.vlm import load_vlm
    saved(cohort, tmp_path / "a")
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    def fail(*_, **__): raise SafetensorError(f"Error while serializing: I/O error: no (os error {code})")
    monkeypatch.setattr(made, "safe_save_file", fail)
    with pytest.raises(NeuralError, match=os.strerror(code)) as e: small(cohort[3]).save_pretrained(tmp_path / "a")
    monkeypatch.undo()
    assert "\n" not in str(e.value) and {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == before
    load_vlm(tmp_path / "a")


def test_a_kill_while_a_network_is_saved_is_noticed(cohort, tmp_path, monkeypatch):
    from neural.vlm import load_vlm
    saved(cohort, tmp_path / "a")
    true, seen = os.replace, []
    def replace(a, b):
        seen.append(b)
        if str(b).endswith("config.json"): raise KeyboardInterrupt
        true(a, b)
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt): another(cohort).save_pretrained(tmp_path / "a")
    monkeypatch.undo()
    with pytest.raises(NeuralError, match="a save was cut short"): load_vlm(tmp_path / "a")
    small(cohort[3]).save_pretrained(tmp_path / "a")
    load_vlm(tmp_path / "a")               # saved again, whole again
    assert not list((tmp_path / "a").glob(".part-*"))


def test_loading_and_saving_say_nothing(cohort, tmp_path, capfd):
    from transformers.utils import logging
    from neural.vlm import load_tokenizer, load_vlm
    bars = logging.is_progress_bar_enabled()
    saved(cohort, tmp_path)
    load_tokenizer(tmp_path, load_vlm(tmp_path))
    assert capfd.readouterr() == ("", "") and logging.is_progress_bar_enabled() == bars


def test_how_a_network_is_read_belongs_to_the_network(cohort, tmp_path):
    from neural.build import Aggregation, load_aggregation, save_aggregation
    saved(cohort, tmp_path)
    save_aggregation(tmp_path, Aggregation(lift=False), None, 4, 40)
    assert load_aggregation(tmp_path)[2] == 4
    another(cohort).save_pretrained(tmp_path)
    with pytest.raises(NeuralError, match="was chosen for network [0-9a-f]{16}, and .* holds network [0-9a-f]{16}"):
        load_aggregation(tmp_path)
