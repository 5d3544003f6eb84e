"Stage 60 keeps its trainings until it ends: a stage that was stopped goes on, and never with what something else made."
import functools
import inspect
from pathlib import Path

import nbformat
import pytest
import torch

from neural.image_model import ImageModel, load_image_model, network_config, save_image_model
from neural.record import PACKAGE, sha256_of, short_hash, versions

STAGE = Path(__file__).resolve().parents[1] / "nbs/paper/60_imitate.ipynb"


def network(seed, size):
    "A stand-in for the stage's own."
    torch.manual_seed(seed)
    return ImageModel(["Edema"], size, widths=((4,), (4,)))


def data():
    "Another one."


def kept_in(run, made=None, **settings):
    "The stage's own words for a training that is made once, for a run folder and its settings; what was made is told."
    cell = next(c.source for c in nbformat.read(STAGE, 4).cells if "def once(" in c.source)
    names = dict(run=run, STAGE="60_imitate", Path=Path, begun={"read": {"a": {"sha256": "0"}}}, shape={}, data=data,
                 network=network, functools=functools, inspect=inspect, PACKAGE=PACKAGE, sha256_of=sha256_of,
                 short_hash=short_hash, versions=versions, network_config=network_config)
    own = "seed policy side pair_epochs pair_batch views word_epochs tune_epochs head_epochs"
    names |= dict.fromkeys(own.split(), 1) | settings
    exec(cell, names)
    made = [] if made is None else made

    @names["once"](load_image_model, save_image_model)
    def trained(seed, *started):
        made.append(seed)
        return network(seed, 32), [dict(loss=0.5)]

    return trained, names, made


def test_a_training_that_is_there_is_not_made_again(tmp_path):
    trained, _, made = kept_in(tmp_path)
    (first, history), (other, _) = trained(0), trained(1)
    again, same = kept_in(tmp_path, made)[0](0)
    assert made == [0, 1] and history == same == [dict(loss=0.5)]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters()))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters()))


@pytest.mark.parametrize("other", [dict(pair_epochs=2), dict(shape={"net": "levels"}), dict(data=network),
                                   dict(begun={"read": {"a": {"sha256": "1"}}})])
def test_what_was_made_with_something_else_is_made_again(tmp_path, other):
    "Other settings, another network, other code, other films."
    made = kept_in(tmp_path)[2]
    for settings in ({}, other, other): kept_in(tmp_path, made, **settings)[0](0)
    assert made == [0, 0]


def test_what_begins_with_another_encoder_is_made_again(tmp_path):
    save_image_model(network(0, 32), tmp_path / "start")
    trained, _, made = kept_in(tmp_path)
    trained(0, tmp_path / "start"), trained(0, tmp_path / "start")
    save_image_model(network(1, 32), tmp_path / "start")
    trained(0, tmp_path / "start")
    assert made == [0, 0]


def test_a_training_whose_writing_was_stopped_is_made_again(tmp_path):
    "The JSON is written last: weights without it are none."
    trained, names, made = kept_in(tmp_path)
    trained(0)
    (names["place_of"]("trained", 0) / "config.json").unlink()
    trained(0)
    assert made == [0, 0]


def test_it_lies_hidden_in_the_run_and_is_gone_in_the_end(tmp_path):
    trained, names, _ = kept_in(tmp_path)
    trained(0)
    assert [p.name for p in tmp_path.iterdir()] == [".60_imitate"]
    text = "".join(c.source for c in nbformat.read(STAGE, 4).cells if c.cell_type == "code")
    assert text.count("shutil.rmtree(desk)") == 1 and text.index("rmtree") < text.index('record("60_imitate"')
