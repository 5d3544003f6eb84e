"The yardstick: a budget that is kept, a clock that waits for the device, a card that is named."
from types import SimpleNamespace

import pytest
import torch

from neural import yardstick
from neural.study import NeuralError
from neural.yardstick import (TimeBudget, card, check_device, machine, matrix_peak, peak_memory, rounds_within,
                              seconds_of)


class Hand:
    "A clock that is moved by hand."
    now = 0.0
    def __call__(self): return self.now
    def work(self, seconds): self.now += seconds


@pytest.fixture
def hand(monkeypatch):
    clock = Hand()
    monkeypatch.setattr(yardstick.time, "perf_counter", clock)
    return clock


def test_parts_share_what_is_left(hand):
    budget = TimeBudget(120, 3, hand)
    assert budget.part() == 40
    hand.work(20)
    assert budget.part() == 70                      # 100 left, two parts
    hand.work(80)
    assert budget.part() == 120 and budget.spent == 100


def test_a_part_takes_as_many_rounds_as_its_share_holds(hand):
    budget = TimeBudget(100, 2, hand)
    took = rounds_within({"a": lambda: hand.work(2), "b": lambda: hand.work(4)}, budget, budget.part(), "sums")
    assert took.values.tolist() == [[2, 4]] * 7 and hand.now == 48        # one more would not end before 50


def test_a_part_without_a_share_takes_three_rounds_and_no_more(hand):
    budget = TimeBudget(100, 1, hand)
    assert len(rounds_within({"a": lambda: hand.work(5)}, budget, 0, "sums")) == 3


def test_enough_rounds_are_enough(hand):
    budget = TimeBudget(10**6, 1, hand)
    assert len(rounds_within({"a": lambda: hand.work(1)}, budget, budget.part(), "sums", most=6)) == 6


def test_what_does_not_fit_is_refused_in_one_line_before_it_is_measured(hand):
    with pytest.raises(
        NeuralError,
        match="^sums: 3 rounds of 40.0 s do not fit into the 80 s that are left; allow more minutes, or measure less$"):
        rounds_within({"a": lambda: hand.work(40)}, TimeBudget(120, 1, hand), 120, "sums")
    assert hand.now == 40


def test_rounds_that_become_slower_end_the_part(hand):
    pace = iter([1, 1, 1, 1, 30, 30, 30, 30])
    took = rounds_within({"a": lambda: hand.work(next(pace))}, TimeBudget(60, 1, hand), 60, "sums")
    assert took["a"].tolist() == [1, 1, 1, 30]      # after 34 s, thirty more would be too many


@pytest.mark.parametrize("device, waits", [("cpu", 0), ("cuda", 2)])
def test_the_clock_waits_for_the_device(monkeypatch, hand, device, waits):
    asked = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: (asked.append(1), hand.work(7)))
    assert seconds_of(lambda: hand.work(1), device) == (1 if device == "cpu" else 8) and len(asked) == waits


def test_memory_of_a_card_is_counted_from_where_it_stood(monkeypatch):
    counts = dict(memory_allocated=lambda: 5e6, max_memory_allocated=lambda: 25e6,
                  reset_peak_memory_stats=lambda: None, synchronize=lambda: None)
    for name, count in counts.items(): monkeypatch.setattr(torch.cuda, name, count)
    with peak_memory({}, "cuda") as seen: assert seen == {}
    assert seen == {"MB": 20}


@pytest.mark.parametrize(
    "said, driver",
    [("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5\nGCC version:  12.2.0\n", "550.54.15"),
     ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.124.06  Release Build\n", "570.124.06"),
     ("", "unknown"), (None, "unknown")],
)
def test_the_machine_names_card_driver_and_torch(monkeypatch, tmp_path, said, driver):
    if said is not None: (tmp_path / "version").write_text(said)
    monkeypatch.setattr(yardstick, "DRIVER", tmp_path / "version")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda n: SimpleNamespace(name="Some Card", total_memory=24e9))
    assert card() == f"Some Card, 24 GB, driver {driver}, CUDA {torch.version.cuda}"
    assert card() in machine() and f"torch {torch.__version__}" in machine()


def test_a_machine_without_a_card_names_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert card() == "" and ", ," not in machine()
    with pytest.raises(NeuralError, match="no GPU that PyTorch can use"): check_device("cuda")
    with pytest.raises(NeuralError, match="must be 'cpu' or 'cuda', got 'tpu'"): check_device("tpu")
    assert check_device("cpu") == "cpu"


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_the_peak_is_the_best_of_its_rounds(monkeypatch, hand, kind):
    "Whatever the clock says, the quickest of all rounds counts, and no round is left out of the clock."
    took = iter([4, 2, 8, 4, 2, 8])
    monkeypatch.setattr(yardstick, "seconds_of", lambda work, device: (work(), next(took))[1])
    assert matrix_peak(kind, 32, 2) == 2 * 32**3 / 2 / 1e9
