"""Metrics against their published definitions, by worked examples and brute force; tables."""
import functools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import probe


@pytest.mark.parametrize("metric, said, answers, value", [
    ("exact", "Red ", ["red"], 1), ("exact", "red", ["blue", "RED"], 1), ("exact", "reddish", ["red"], 0),
    # ChartQA: 5% of the target, percent signs, text exactly
    ("relaxed", "95", ["100"], 1), ("relaxed", "94.9", ["100"], 0), ("relaxed", "105", ["100"], 1),
    ("relaxed", "41%", ["0.4"], 1), ("relaxed", "1,000", ["1000"], 1), ("relaxed", "Yes", ["yes"], 1),
    ("relaxed", "0", ["0"], 1), ("relaxed", "0.1", ["0"], 0), ("relaxed", "2019", ["year"], 0),
    # DocVQA: "hello" / "hallo" differ in one of five; below one half nothing counts
    ("anls", "hallo", ["hello"], .8), ("anls", "hello", ["hello", "x"], 1), ("anls", "abc", ["xyz"], 0),
    ("anls", "ab", ["abcd"], 0), ("anls", "abc", ["abcd"], .75), ("anls", "", [""], 1),
    # VQA v2: of ten annotators 0, 1, 2, 3, 4, 10 agree
    ("vqa", "cat", ["dog"] * 10, 0), ("vqa", "cat", ["cat"] + ["dog"] * 9, .3),
    ("vqa", "cat", ["cat"] * 2 + ["dog"] * 8, .6), ("vqa", "cat", ["cat"] * 3 + ["dog"] * 7, .9),
    ("vqa", "cat", ["cat"] * 4 + ["dog"] * 6, 1), ("vqa", "the Cats!", ["cats"] * 10, 1),
    ("vqa", "two", ["2"] * 10, 1), ("vqa", "dont", ["don't"] * 10, 1), ("vqa", "1.5", ["1.5"] * 10, 1),
    ("choice", "B", ["b"], 1), ("choice", "(B) a cat", ["B"], 1), ("choice", "C. the B side", ["B"], 0),
    ("choice", "The answer is D.", ["D"], 1), ("choice", "Dogs", ["D"], 0), ("choice", "a dog", ["A"], 0)])
def test_metrics_by_example(metric, said, answers, value):
    assert probe.score(metric, said, answers) == pytest.approx(value)


@given(st.text("abc", max_size=7), st.text("abc", max_size=7))
def test_anls_against_the_recursive_definition(a, b):
    @functools.cache
    def distance(i, j):
        if not i or not j:
            return i + j
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, distance(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    share = distance(len(a), len(b)) / max(len(a), len(b), 1)
    assert math.isclose(probe.anls(a, b), 1 - share if share < .5 else 0)


def test_moved_table():
    before = {"encoder.a": torch.tensor([3., 4.]), "llm.b": torch.ones(4), "llm.c": torch.zeros(2)}
    text = probe.moved(before, before | {"encoder.a": torch.tensor([3., 4.5])})
    assert "1.00e-01" in text.splitlines()[2] and "0.00e+00" in text.splitlines()[3]
    assert [cell.strip() for cell in text.splitlines()[3].split("|")[1:4]] == ["llm", "6", "0"]


def test_tables_add_up():
    questions = {"a": [10, 5, 1, 3, "general", "color"], "b": [10, 8, 2, 4, "knowledge", "corners"],
                 "c": [20, 6, 6, 6, "vision", "count"]}
    pairs = [["color", "red", 2., 1.], ["color", "red", -1., -1.], ["size", "large", 3., 1.], ["size", "small", 1., -1.]]
    old = [[kind, text, margin, grey] for (kind, text, *_), margin, grey in
           zip(pairs, (1., 1., -1., 0.), (9., 9., 9., 9.))]
    before = {"questions": {k: [n, 0, *rest] for k, (n, _, *rest) in questions.items()}, "pairs": old}
    first, second = probe.tables({"before": before, "after": {"questions": questions, "pairs": pairs}}, beta=.1)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (first + "\n" + second).splitlines()]
    assert ["visual", "", "30", "0.300", "0.233", "0.000", "0.367"] in rows
    assert ["all", "", "40", "0.325", "0.225", "0.000", "0.475"] in rows
    assert ["color", "2", "1.000", "0.500", "1.000", "0.500", "0.500", "-0.050"] in rows
    assert ["size", "2", "0.500", "0.500", "0.000", "1.000", "1.000", "0.250"] in rows
    assert ["all", "4", "0.500", "0.500", "0.500", "0.750", "0.750", "0.100"] in rows
    assert "before" not in probe.tables({"after": {"pairs": pairs}}, beta=.1)[0]


@pytest.mark.parametrize("trains", [("encoder", "projector", "llm"), ("projector",), ("projector", "llm"), ()])
def test_flops_against_torchs_counter(net, prepare, pairs, trains, monkeypatch):
    """Every matrix product of a real step, counted by torch; the recomputation of logits taken out."""
    import model
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    monkeypatch.setattr(model, "checkpoint", lambda f, *a, **_: f(*a))
    sample, = [p for p in pairs if p.kind == "scene"][:1] or pairs[:1]
    batch = prepare([sample])
    for name, part in net.named_children():
        part.requires_grad_(name in trains)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # which sees no other attention on a CPU
        logps = net(batch)
        if trains:
            logps.sum().backward()
    counted = counter.get_total_flops()
    expected = probe.flops(net, [batch.tokens.shape[1]], len(batch.target), trains, images=1)
    assert expected == pytest.approx(counted, rel=1e-3)
