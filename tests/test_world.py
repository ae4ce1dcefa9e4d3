"""The world's wording, imperfect answers, sampled pairs, and the judge of descriptions."""
import re
from collections import Counter

import data


def test_free_wording_says_the_same_details():
    """The same scenes and questions, described tersely and freely: the same details in the same places, other words."""
    free, terse = (data.World("preferences", "probe", 600, wording=w, errors=0) for w in ("free", "terse"))
    wordings = Counter()
    for i in range(600):
        a, b = free[i], terse[i]
        assert a.turns[0][0] == b.turns[0][0] and a.kind == b.kind and a.detail == b.detail
        if a.kind in data.CATEGORY:
            assert (a.turns, a.rejected) == (b.turns, b.rejected)
            continue
        for said, plain in ((a.turns[0][1], b.turns[0][1]), (a.rejected, b.rejected)):
            words = [Counter(w for w in re.findall(r"\w+", text) if w != "a" and any(w in v for v in data.DETAILS.values()))
                     for text in (said, plain)]         # "a" is also an article
            assert words[0] == words[1]
            wordings[said] += 1
    assert len(wordings) > .9 * sum(wordings.values())


def test_a_pair_is_worded_alike_unless_apart():
    """Worded alike, a described pair differs in the words of one detail; apart, in other words, too."""
    differ = {}
    for wording in ("free", "apart"):
        world = data.World("preferences", "probe", 200, wording=wording, errors=0, kinds=["object"])
        pairs = [(world[i].turns[0][1], world[i].rejected) for i in range(200)]
        differ[wording] = [len(set(a.split()) ^ set(b.split())) for a, b in pairs]
    assert max(differ["free"]) <= 4 and sum(d > 4 for d in differ["apart"]) > 100


def test_the_judge_counts_wrong_details():
    """Chosen: none wrong; rejected: one. With errors: one and two. Made-up responses: counted by hand."""
    for errors in (0, 1):
        world = data.World("preferences", "probe", 300, errors=errors)
        for i in range(300):
            sample = world[i]
            flawed = errors and sample.kind not in data.CATEGORY
            assert world.mistakes(i, sample.turns[0][1]) == flawed
            assert world.mistakes(i, sample.rejected) == flawed + 1
    thing = data.Thing(0, "circle", "red", "small", "plain", "x", 0, 12, 12)
    other = data.Thing(3, "ell", "blue", "large", "dotted", "none", 0, 36, 36)
    scene = data.Scene("probe", 0)
    cases = [("object", [thing], "a small red plain circle with letter x.", 0),
             ("object", [thing], "a small red plain circle with no letter. that is all.", 1),
             ("object", [thing], "a small blue plain with letter x", 2), ("object", [thing], "", 5),
             ("scene", [thing, other], "top left is a small red plain circle with letter x.", 5),
             ("scene", [thing, other], "bottom right: a ell with no letter, blue, dotted and large. top left is a "
              "circle with letter x, red, plain and small. top right is a square.", 1)]
    for kind, things, said, wrong in cases:
        assert scene.mistakes(kind, things, said) == wrong, said


def test_pairs_that_differ_in_seed_share_no_scene_and_sampled_ones_replace_the_drawn():
    a, b = (data.World("preferences", "preferences", 50, first=first) for first in (0, 1_000_000))
    assert not {a[i].image.tobytes() for i in range(50)} & {b[i].image.tobytes() for i in range(50)}
    before, region = a.fingerprint(), a[7].region
    a.sampled = {7: ("this one", "that one")}
    assert (a[7].turns[0][1], a[7].rejected) == ("this one", "that one") and a.fingerprint() != before
    assert (a[7].region == region).all()
