"""The probes of encoders against scikit-learn, brute force, definitions in numpy and finite differences."""
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny import main, options, write_rows, write_tiny

import data
import model as m
import probe
from dpo import dpo_loss
from sft import sft_loss


@pytest.fixture
def saved(net, tokenizer, tmp_path):
    m.save_model(tmp_path, net.state_dict(), net, tokenizer)
    return tmp_path


def test_logistic_is_scikit_learns():
    """Same optimum, several columns and strengths at once, rows in chunks."""
    from sklearn.linear_model import LogisticRegression
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 12, generator=generator, dtype=torch.float64) @ torch.randn(
        12, 12, generator=generator, dtype=torch.float64)
    y = torch.stack([(x[:, :k] + torch.randn(300, k, generator=generator)).argmax(1) for k in (3, 5)], 1)
    found = probe.logistic(lambda: zip(x.split(70), y.split(70)), 300, [3, 5], (.1, .001), 1e-8)
    for l2, (w, b) in zip((.1, .001), found):
        for i, (w, b) in enumerate(zip(w.split([3, 5], 1), b.split([3, 5], 1))):
            theirs = LogisticRegression(C=1 / (l2 * 300), tol=1e-10, max_iter=10000).fit(x, y[:, i])
            assert np.allclose(w.T, theirs.coef_, atol=1e-5)
            assert np.allclose(b - b.mean(), theirs.intercept_ - theirs.intercept_.mean(), atol=1e-5)
            assert (((x @ w + b).argmax(1).numpy()) == theirs.predict(x)).all()


def test_linear_probe_chooses_on_validation_and_finds_chance():
    """Labels that are a column's sign are found, labels that are noise are at chance; the strength is
    validation's best, never test's."""
    x = torch.randn(3000, 20, generator=torch.Generator().manual_seed(0)) * 3 + 7
    noise = torch.randint(0, 4, (3000,), generator=torch.Generator().manual_seed(1))
    labels = torch.stack([(x[:, 3] > 7).long(), noise], 1)
    sign, chance = probe.linear_probe(x, labels, [2, 4], (1500, 2000))
    assert sign["n"] == chance["n"] == 1000 and sign["right"] > 970
    assert probe.wilson(chance["right"], 1000)[0] < .25 < probe.wilson(chance["right"], 1000)[1]
    changed = labels.clone()
    changed[2000:] = 0
    assert [r["l2"] for r in probe.linear_probe(x, changed, [2, 4], (1500, 2000))] == [sign["l2"], chance["l2"]]


def test_moments_and_wilson():
    x = torch.randn(20000, 3, generator=torch.Generator().manual_seed(0)) * 5 + 100
    x[:, 2] = 4
    mean, std = probe.moments(x)
    assert torch.allclose(mean, x.mean(0), atol=1e-3) and torch.allclose(std[:2], x[:, :2].std(0), rtol=1e-3)
    assert std[2] == 1
    assert probe.wilson(81, 263) == pytest.approx((.2553, .3662), abs=1e-4)      # Newcombe 1998, table I


def test_patch_labels_against_a_loop():
    ids = np.random.default_rng(0).integers(0, 5, (50, 50)) * (np.random.default_rng(1).random((50, 50)) < .05)
    labels = probe.patch_labels(ids, 6, 4)
    for r in range(6):
        for c in range(6):
            for k in range(1, 5):
                assert labels[6 * r + c, k - 1] == (ids[8 * r:8 * r + 8, 8 * c:8 * c + 8] == k).any()


def test_object_maps_hold_every_detail():
    scene = data.Scene("probe", 3)
    for (name, values), ids in zip(data.DETAILS.items(), probe.object_maps(scene, m.EncoderConfig())):
        for thing in scene.things:
            assert (ids[scene.mask([thing])] == 1 + list(values).index(getattr(thing, name))).all()
        assert not ids[~scene.mask(scene.things)].any()


@pytest.mark.parametrize("shape", [(200, 100), (61, 97), (48, 48)])
@pytest.mark.parametrize("edge", [0, 24, 30])
def test_truth_lies_where_the_encoder_sees_it(tmp_path, shape, edge):
    """Annotations, objects and regions are squeezed or cut as the picture is, for SigLIP (edge 0), CLIP and DINOv2."""
    c = m.EncoderConfig(image_size=24, shortest_edge=edge, resample=Image.Resampling.NEAREST)
    ids = np.random.default_rng(0).integers(0, 5, shape[::-1]).astype(np.uint8)
    Image.fromarray(ids).save(tmp_path / "ids.png")
    Image.fromarray(ids[..., None] * np.uint8([40, 0, 9])).save(tmp_path / "picture.png")
    seen = probe.annotation(tmp_path / "ids.png", c)
    assert seen.shape == (24, 24) and (np.array(data.read_picture(tmp_path / "picture.png", c))[..., 0] == 40 * seen).all()
    wide, high = 24 * shape[0] // min(shape), 24 * shape[1] // min(shape)
    if edge == 24:          # the middle of the longer side
        whole = np.array(Image.fromarray(ids).resize((wide, high), Image.Resampling.NEAREST))
        assert (seen == whole[(high - 24) // 2:, (wide - 24) // 2:][:24, :24]).all()
    if edge == 0:
        assert (seen == np.array(Image.fromarray(ids).resize((24, 24), Image.Resampling.NEAREST))).all()
    scene, picture = data.Scene("probe", 3), Image.new("RGB", (48, 48), "white")
    picture.paste("black", mask=Image.fromarray(scene.mask(scene.things)))
    seen = np.array(data.read_picture(picture, c))[..., 0]
    assert all(((ids > 0) == (seen == 0)).all() for ids in probe.object_maps(scene, c))


def test_segmentation_probe_learns_what_is_there_and_only_that():
    """Labels that features tell are found; shuffled ones are not; heads differ; a seed repeats. Recall and F1 are by
    definition, over the classes that are somewhere: the fourth is nowhere."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(800, 9, 16, generator=generator)
    labels = torch.cat((x[..., :3] > .5, torch.zeros(800, 9, 1, dtype=torch.bool)), 2)
    found, seen = probe.segmentation_probe(x, labels, 750, 1, epochs=20)
    assert min(found["recall"]) > .8 and len(set(found["recall"])) > 1 and seen.shape == (50, 9, 4)
    truth, said = (a[..., :3].flatten(0, 1).numpy() for a in (labels[750:], seen))
    expected = [((t & f).sum() / t.sum(), 2 * (t & f).sum() / (2 * (t & f).sum() + (t ^ f).sum()))
                for t, f in zip(truth.T, said.T)]
    assert np.allclose((found["recall"][0], found["f1"][0]), np.mean(expected, 0))
    assert np.isnan(found["classes"][3]) and not np.isnan(found["classes"][:3]).any()
    again, same = probe.segmentation_probe(x, labels, 750, 1, epochs=20)
    assert str(again) == str(found) and (same == seen).all()
    lost, _ = probe.segmentation_probe(x, labels[torch.randperm(800, generator=generator)], 750, 1)
    assert max(lost["recall"]) < .1


def test_mutual_knn_by_definition():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(40, 5)), rng.normal(size=(40, 7))
    b[:, :3] += 2 * a[:, :3]
    score = 0
    for i in range(40):
        near = []
        for x in (a, b):
            cosine = [x[i] @ x[j] / np.linalg.norm(x[i]) / np.linalg.norm(x[j]) for j in range(40)]
            near.append(set([j for j in np.argsort(cosine)[::-1] if j != i][:6]))
        score += len(near[0] & near[1]) / 6 / 40
    found = probe.mutual_knn(torch.tensor(a), torch.tensor(b), (3, 6))
    assert found[6] == pytest.approx(score) and probe.mutual_knn(torch.tensor(a), torch.tensor(a), (4,))[4] == 1
    noise = torch.randn(2, 800, 6, generator=torch.Generator().manual_seed(0))
    assert probe.mutual_knn(*noise, (20,))[20] == pytest.approx(20 / 799, rel=.1)


def test_cells_are_the_patches_of_a_cell():
    x = torch.arange(36.).view(1, 36, 1)
    assert probe.cells(x)[0, 1].flatten().tolist() == [3, 4, 5, 9, 10, 11, 15, 16, 17]
    assert probe.cells(x)[0, 2].flatten().tolist() == [18, 19, 20, 24, 25, 26, 30, 31, 32]


def test_differing():
    assert probe.differing([1, 2, 3, 9], [1, 5, 3, 9]) == [1]
    assert probe.differing([1, 3, 9], [1, 2, 3, 9]) == [1]          # only lacks one: where it is missing
    assert probe.differing([1, 2, 3, 9], [1, 3, 9]) == [1]


def test_gradient_maps_are_finite_differences(net, prepare, monkeypatch):
    """Each token's norm, against central differences of the objectives themselves in its features. In float64,
    also where the model computes in float32."""
    monkeypatch.setattr(m, "token_logps", lambda h, head, y: -F.cross_entropy(h @ head.mT, y, reduction="none"))
    samples = [s for s in (data.World("preferences", "probe", 9)[i] for i in range(9)) if s.region.any()][:3]
    zeros, make = torch.zeros, prepare
    monkeypatch.setattr(torch, "zeros", lambda *shape, **kw: zeros(*shape, **{"dtype": torch.float64, **kw}))

    def prepare(samples):
        return replace(make(samples), pixels=make(samples).pixels.double())

    maps, rows = probe.gradient_maps(net.double(), samples, prepare, batch=2)
    sample, batch = samples[2], prepare([samples[2]])
    features, ref = net.encoder(batch.pixels).detach(), net(batch).detach()
    step = 1e-4
    for token in (0, 17):
        slope = np.zeros((2, 32))
        for d in range(32):
            for sign in (step, -step):
                moved = features.clone()
                moved[0, token, d] += sign
                net.encoder.forward = lambda pixels, moved=moved: moved
                logps = net(batch).detach().double()
                slope[:, d] += [f.item() / sign / 2 for f in (sft_loss(logps), dpo_loss(logps, ref, .1))]
        del net.encoder.forward
        assert np.allclose(np.linalg.norm(slope, axis=1), maps[2, :2, token], rtol=1e-5)
    cover = np.array([[sample.region[8 * r:8 * r + 8, 8 * c:8 * c + 8].mean() for c in range(6)]
                      for r in range(6)]).ravel()
    strength = maps[2, 1].numpy()
    assert rows[2]["dpo"][0] == pytest.approx((strength * cover).sum() / strength.sum() / cover.mean(), rel=1e-4)
    assert rows[2]["dpo"][1] == bool(cover[strength.argmax()] > 0)
    assert not net.encoder._forward_hooks


def test_the_world_side_by_side(saved, tmp_path, capsys):
    """Encoder, projector and text LLM in the world; twice the same; all tables."""
    sizes = (24, 6, 60)
    found = [probe.probes({"net": (saved / "encoder", saved / "projector")}, llm=saved / "llm", scenes=sizes)
             for _ in range(2)]
    assert json.dumps(found[0]) == json.dumps(found[1])
    row = found[0]["net"]
    assert set(row["linear"]) == {f"{v}, {p}" for v in probe.VIEWS for p in ("mean", "cell")}
    assert set(row["linear"]["encoder, cell"]) == set(probe.DRAWN) and len(row["segmentation"]["recall"]) == 6
    assert set(row["alignment"]) == {*probe.VIEWS, "chance"}
    assert len(probe.probe_tables(found[0])) == 6


@pytest.fixture
def classes(tmp_path):
    """Dark and bright pictures in ImageNet's layout."""
    rng = np.random.default_rng(0)
    for split, n in (("train", 20), ("val", 8)):
        for name, tone in (("bright", 190), ("dark", 60)):
            at = tmp_path / "data" / split / name
            at.mkdir(parents=True)
            for i in range(n):
                Image.fromarray(rng.integers(tone - 20, tone + 20, (30, 40, 3)).astype(np.uint8)).save(at / f"{i}.png")
    return tmp_path / "data"


def test_class_folders(saved, classes, capsys):
    probe.main([str(saved), "--data", str(classes), "--out", str(saved / "out")])
    assert "| random" in capsys.readouterr().out
    row = json.loads((saved / "out" / "results.json").read_text())[str(saved)]["linear"]
    assert row["encoder"]["class"]["right"] >= 15 and row["encoder"]["class"]["n"] == 16
    assert [p.name for p in (saved / "out").iterdir()] == ["results.json"]      # no memory maps left
    (classes / "val").rename(classes / "elsewhere")
    found = probe.read_folder(classes, 0)
    assert found == probe.read_folder(classes, 0) and (len(found[0]), found[1]) == (40, (29, 32))
    (classes / "val" / "grey").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(classes / "val" / "grey" / "0.png")
    with pytest.raises(SystemExit) as stop:
        probe.main([str(saved), "--data", str(classes)])
    assert stop.value.code == 1 and "grey" in capsys.readouterr().err


def test_annotations(saved, tmp_path, capsys):
    """ADE20K's layout: the left or right half is bright and is class 2."""
    rng, root = np.random.default_rng(0), tmp_path / "ade"
    for split, n in (("training", 40), ("validation", 10)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for i in range(n):
            bright = np.zeros((30, 40), bool)
            bright[:, :20] = True
            bright = bright if i % 2 else ~bright
            Image.fromarray((bright[..., None] * 120 + rng.integers(0, 60, (30, 40, 3))).astype(np.uint8)).save(
                root / "images" / split / f"{i}.png")
            Image.fromarray((2 * bright).astype(np.uint8)).save(root / "annotations" / split / f"{i}.png")
    probe.main([str(saved), "--data", str(root), "--out", str(saved / "out")])
    assert "F1" in capsys.readouterr().out and (saved / "out" / "segmentation-class.png").exists()
    found = json.loads((saved / "out" / "results.json").read_text())[str(saved)]["segmentation"]
    assert min(found["recall"]) > .8
    (root / "annotations" / "training" / "3.png").unlink()
    with pytest.raises(SystemExit):
        probe.main([str(saved), "--data", str(root)])
    assert "3.png" in (error := capsys.readouterr().err) and error.count("\n") == 1


def test_gradient_maps_of_a_users_model_and_pairs(tmp_path, tokenizer, capsys):
    """--stage gradients: whoever has a model and pairs gets the picture, of those that have one; done once; without
    "rejected" one line."""
    folder = write_tiny(tmp_path, tokenizer)
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    del rows[1]["image"]
    write_rows(folder / "pairs.jsonl", rows)
    argv = options(folder, stage="gradients")
    made = folder / "runs/paper/gradients"
    assert main(*argv) == 0
    with Image.open(made / "gradients.png") as page:
        assert page.width == 3 * 190 and page.height > 12 * 190          # image, SFT, DPO; the first twelve pairs
    before = (made / "gradients.png").stat().st_mtime_ns
    assert main(*argv) == 0 and (made / "gradients.png").stat().st_mtime_ns == before
    assert main(*argv, "--beta", ".3") == 1 and "was made with beta = 0.1, now 0.3" in capsys.readouterr().err
    write_rows(folder / "one.jsonl", [{k: row[k] for k in ("question", "chosen")} for row in rows])
    assert main(*options(folder, "--name", "one", stage="gradients", data="one.jsonl")) == 1
    error = capsys.readouterr().err
    assert "one.jsonl: " in error and "rejected" in error and error.count("\n") == 1


def test_gradient_tables_show_means_and_paired_intervals():
    row = {"answer": "object", "detail": "size", "wording": "terse"}
    lifts = np.random.default_rng(0).gamma(2, 1, (50, len(probe.MAPS)))
    rows = [row | {m: [v, v > 2] for m, v in zip(probe.MAPS, some)} for some in lifts]
    table = probe.gradient_tables(rows)[0].splitlines()[-1]
    gaps = lifts[:, 1] - lifts[:, 0]
    for number in (f"{gaps.mean():+.3f} +- {1.96 * gaps.std() / 50 ** .5:.3f}", "terse, object", "| 50 "):
        assert number in table
    cells = [cell.strip() for cell in table.split("|")][3:11]
    assert np.allclose([float(c) for c in cells], [*lifts.mean(0), *(lifts > 2).mean(0)], atol=1e-3)
