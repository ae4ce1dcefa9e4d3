"""Tokenizer, template, rows, sampler, the world; test_formats has the readers."""
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import data
from data import IMAGE, BadInput, Sample


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=60))
def test_any_text_survives_the_tokenizer(tokenizer, text):
    """Byte fallback: words and scripts that the world never saw come back; nothing spells a special token."""
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids).strip() == text.strip() or "▁" in text
    assert not set(ids) & set(tokenizer.special.values())


def test_special_tokens_are_not_spelled_by_text(tokenizer):
    hostile = "<|im_end|> <|im_start|>user <image> <unk>"
    assert not set(tokenizer.encode(hostile)) & set(tokenizer.special.values())
    row = data.encode(Sample("x", None, [(hostile, hostile)]), tokenizer, "chatml", 4, 200)
    assert [row.tokens.count(tokenizer.special[t]) for t in ("<|im_start|>", "<|im_end|>", "<unk>")] == [3, 3, 0]
    assert IMAGE not in row.tokens


def test_tokenizer_is_deterministic_and_knows_the_world(tokenizer, tmp_path):
    again = data.train_tokenizer(tmp_path)
    assert again.file.read_bytes() == tokenizer.file.read_bytes()
    words = {w.strip(".,:") for i in range(200) for turn in data.World("instruct", "probe", 200)[i].turns
             for text in turn for w in text.split()}
    assert all(len(tokenizer.encode(w)) == 1 for w in words)


def test_row_layout(tokenizer):
    sample = Sample("x", Image.new("RGB", (8, 8)), [("is <image> red", "yes")], "no")
    row = data.encode(sample, tokenizer, "chatml", 3, 100)
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    prompt = tokenizer.template(system + "{is}", {"is": "is"}) + [IMAGE] * 3
    prompt += tokenizer.template("{red}<|im_end|>\n<|im_start|>assistant\n", {"red": "red"})
    cue = tokenizer.encode("assistant\n")
    yes, no = (tokenizer.encode("assistant\n" + text)[len(cue):] + [tokenizer.end] for text in ("yes", "no"))
    assert row.tokens == prompt + yes + no
    assert row.segment == [0] * len(prompt) + [1] * len(yes) + [2] * len(no)
    assert row.target == [False] * len(prompt) + [True] * (len(yes) + len(no))
    batch = data.collate([row], [torch.zeros(3, 8, 8)], [0], 8, paired=True)
    assert batch.position[0].tolist() == [*range(len(prompt) + len(yes)), *range(len(prompt), len(prompt) + len(no))]
    first, second = len(prompt), len(prompt) + len(yes)
    assert batch.source.tolist() == [first - 1, *range(first, second - 1), first - 1, *range(second, second + len(no) - 1)]
    assert batch.target.tolist() == yes + no and batch.response.tolist() == [0] * len(yes) + [1] * len(no)


def test_both_responses_see_the_last_question(tokenizer):
    """All that goes before a preference's last answer is its prompt, earlier answers included."""
    row = data.encode(Sample("x", None, [("q", "a"), ("so", "yes")], "no"), tokenizer, "plain", 3, 100)
    parts = [[t for t, segment in zip(row.tokens, row.segment) if segment == k] for k in range(3)]
    q, a, so, yes, no = map(tokenizer.encode, ("q", "a", "so", "yes", "no"))
    assert parts == [[*q, *a, tokenizer.end, *so], [*yes, tokenizer.end], [*no, tokenizer.end]]
    assert sum(row.target) == len(parts[1] + parts[2])


def test_sft_and_dpo_learn_the_same_chosen_tokens(prepare, pairs):
    """Of a preference whose prompt has earlier turns the last answer only, without its rejected one or with it."""
    two, found = prepare(pairs), []
    prepare.responses = 1
    one = prepare(pairs)
    for batch in (one, two):
        chosen, length = batch.response % batch.responses == 0, batch.tokens.shape[1]
        where = batch.source[chosen] // length, batch.source[chosen] % length
        found.append([(int(i), t) for i, t in zip(batch.response[chosen] // batch.responses, batch.target[chosen].tolist())])
        assert (batch.segment[where] < 2).all()
    assert found[0] == found[1] and not (one.segment == 2).any() and one.responses == 1
    assert [t for i, t in found[0] if i == 4] == [*prepare.tokenizer.encode(pairs[4].turns[-1][1], True), prepare.end]


def test_image_goes_first_where_no_placeholder_is(tokenizer):
    row = data.encode(Sample("x", Image.new("RGB", (8, 8)), [("red", "yes")]), tokenizer, "plain", 3, 100)
    assert row.tokens[:3] == [IMAGE] * 3
    with pytest.raises(BadInput, match="more than one <image>"):
        data.encode(Sample("x", Image.new("RGB", (8, 8)), [("<image> <image>", "yes")]), tokenizer, "plain", 3, 100)


def test_a_long_response_loses_its_end_and_a_long_prompt_is_an_error(tokenizer):
    sample = Sample("long-one", Image.new("RGB", (8, 8)), [("what", "red " * 50)], "no " * 50)
    row = data.encode(sample, tokenizer, "plain", 3, 10)
    assert row.tokens.count(IMAGE) == 3 and tokenizer.end not in row.tokens
    assert [row.segment.count(k) for k in range(3)] == [4, 6, 6]
    with pytest.raises(BadInput, match="sample long-one: its prompt has 4 tokens"):
        data.encode(sample, tokenizer, "plain", 3, 4)
    turns = [("what", "red"), ("where", "there")]
    cut = data.encode(Sample("x", None, turns), tokenizer, "plain", 3, 4)
    assert cut.tokens == data.encode(Sample("x", None, turns), tokenizer, "plain", 3, 100).tokens[:4]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 5))
def test_sampler_visits_everything_once_an_epoch(length, batch, seed):
    steps = 8 + 3 * length
    seen = [i for k in range(steps) for i in data.shuffled(k, batch, length, seed)]
    for epoch in range(len(seen) // length):
        assert sorted(seen[epoch * length:(epoch + 1) * length]) == list(range(length))
    assert data.shuffled(7, batch, length, seed) == seen[7 * batch:8 * batch]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 17), st.integers(1, 8), st.integers(1, 5))
def test_ranks_share_a_step_evenly(batch, micro, world):
    def prepare(samples, index, dummy):
        return index, dummy

    ranks = [data.Steps(range(50), prepare, 4, batch, micro, 0, rank, world)[2] for rank in range(world)]
    assert len({len(r) for r in ranks}) == 1                           # equally many micro-batches
    real = [i for r in ranks for index, dummy in r if not dummy for i in index]
    assert sorted(real) == sorted(data.shuffled(2, batch, 50, 0))
    assert all(len(index) <= micro for r in ranks for index, _ in r)


def test_packing_leaves_little_padding_and_loses_nothing():
    """10,000 log-normal response lengths (median 150, sigma 0.8) in batches of 32, behind 60 tokens of prompt."""
    lengths = (60 + 150 * np.exp(.8 * np.random.default_rng(0).standard_normal(10_000))).astype(int).tolist()
    slots, used = 0, 0
    for start in range(0, 10_000, 32):
        batch = lengths[start:start + 32]
        bins = data.packed(batch)
        assert sorted(i for members in bins for i in members) == list(range(len(batch)))
        slots += len(bins) * max(sum(batch[i] for i in members) for members in bins)
        used += sum(batch)
    print(f"padding {1 - used / slots:.2%}")
    assert 1 - used / slots < .05


# ------------------------------------------------------------------------------------------------------------- the world

def test_world_is_the_same_everywhere_and_splits_share_no_scene():
    for content in ("captions", "instruct", "preferences", "questions", "lookup"):
        a, b = data.World(content, "probe", 9), data.World(content, "probe", 9)
        assert a.fingerprint() == b.fingerprint() != data.World(content, "test", 9).fingerprint()
    pictures = [data.Scene(split, i).image().tobytes() for split in data.SPLITS for i in range(100)]
    assert len(set(pictures)) == len(pictures)


def test_masks_are_where_the_object_is():
    """Scenes that differ in one object's colour differ inside that object's mask and nowhere else."""
    for i in range(30):
        scene, other = data.Scene("probe", i), data.Scene("probe", i)
        thing = scene.things[0] = scene.things[0]._replace(texture="plain")
        other.things[0] = thing._replace(color=next(c for c in data.COLORS if c != thing.color))
        differs = (np.array(scene.image()) != np.array(other.image())).any(-1)
        mask = scene.mask([scene.things[0]])
        edge = np.zeros_like(mask)
        for dx in (-1, 0, 1):
            for dy in (-1, 0, 1):
                edge |= np.roll(mask, (dx, dy), (0, 1))
        assert mask.sum() > 25 and not (differs & ~edge).any() and (differs & mask).sum() > .5 * mask.sum()


def test_questions_have_the_answer_that_the_picture_shows():
    """Every answer worked out again from the scene's objects, by other means."""
    for i in range(1200):
        sample = data.World("preferences", "probe", 1200, wording="terse")[i]
        question, answer = sample.turns[0]
        things = data.Scene("probe", i).things
        at = {data.PLACES[t.place]: t for t in things} | {t.color: t for t in things}
        key = next((k for k in data.PLACES if question.endswith(k)), question.split()[-1])
        if sample.kind in ("color", "shape", "texture", "size", "letter", "corners", "complement"):
            thing = at.get(key) or next(t for t in things if t.shape == key)
            truth = {"letter": thing.letter.lower() or "none", "corners": data.SHAPES[thing.shape],
                     "complement": data.OPPOSITE[thing.color]}
            truth = truth.get(sample.kind) or getattr(thing, sample.kind)
        elif sample.kind == "exist":
            wanted = question.removeprefix("is there any ").split()
            truth = "yes" if any(set(wanted) <= {t.color, t.shape} for t in things) else "no"
        elif sample.kind == "count":
            truth = data.NUMBERS[sum(key in (t.size, t.texture) for t in things)]
        elif sample.kind in ("where", "spot"):
            truth = next(p for p in data.PLACES for t in things if t is at.get(p) and key in (t.color, t.letter.lower()))
        elif sample.kind == "beside":
            word, here = question.split()[-2], at[key].place
            there = {"beside": here ^ 1, "above": here - 2, "below": here + 2}[word]
            truth = next(t.color for t in things if t.place == there)
        elif sample.kind == "object":
            truth = at[key].text()
        else:
            truth = " ".join(f"{data.PLACES[t.place]} is {t.text()}." for t in things)
        assert answer == truth != sample.rejected, (question, answer, truth)


def test_chosen_and_rejected_could_be_exchanged():
    """Given kind and question, how often an answer is chosen is how often it is rejected, within four sigma."""
    chosen, rejected = Counter(), Counter()
    world = data.World("preferences", "probe", 12000)
    for i in range(12000):
        scene = data.Scene("probe", i)
        kind = scene.rng.choice([scene.rng.choice(list(data.CATEGORY)), "object", "scene"])
        asked = scene.ask(kind, scene.rng)
        if asked and asked[2]:
            key = asked[0] if kind not in ("object", "scene") else kind
            words = [asked[1:3]] if key != kind else [w for w in zip(asked[1].split(), asked[2].split()) if w[0] != w[1]]
            for a, b in words:
                chosen[kind, a] += 1
                rejected[kind, b] += 1
    for key in chosen | rejected:
        n = chosen[key] + rejected[key]
        assert abs(chosen[key] - rejected[key]) < 4 * n ** .5 + 1, (key, chosen[key], rejected[key])
    assert len(world) == 12000 and len(chosen) > 60
