"""Hostile input: every case ends with exit status 1 and one line that names file and place, or is handled; no traceback, no
file changed, no code run. And the readers under random input."""
import hashlib
import json
import os
import pickle
import re
import shutil
import struct
import time

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import main, options, write_rows, write_tiny

import data
import model as m
import pivot
from data import BadInput

PAIR = {"image": "0.png", "question": "what color", "chosen": "red", "rejected": "blue"}
GOOD = json.dumps(PAIR).encode()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, tokenizer):
    return write_tiny(tmp_path_factory.mktemp("tiny"), tokenizer, samples=4)


def tree(folder):
    """{path: hash} of all files, and of directories' names."""
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "folder"
            for p in sorted(folder.rglob("*"))}


# ------------------------------------------------------------------------------------- what a case does to its folder

def lines(*content):
    """The data file: bytes as they are, dicts as JSON, one a line."""
    return lambda f: (f / "pairs.jsonl").write_bytes(b"\n".join(
        c if isinstance(c, bytes) else json.dumps(c).encode() for c in content))


def row(**fields):
    return lines(PAIR, {k: v for k, v in {**PAIR, **fields}.items() if v != "gone"})


def picture(name, make):
    """A second sample whose picture is what `make` leaves at its path."""
    def change(folder):
        make(folder / name)
        row(image=name)(folder)
    return change


def saved(image, **more):
    return lambda path: image.save(path, **more)


def content(raw):
    return lambda path: path.write_bytes(raw)


def cut(image, share=.5):
    def make(path):
        image.save(path)
        path.write_bytes(path.read_bytes()[:int(path.stat().st_size * share)])
    return make


def file(name, raw):
    return lambda folder: (folder / name).write_bytes(raw)


def gone(name):
    return lambda folder: (shutil.rmtree if (folder / name).is_dir() else os.remove)(folder / name)


def edit(name, **values):
    def change(folder):
        known = json.loads((folder / name).read_text()) | values
        (folder / name).write_text(json.dumps({k: v for k, v in known.items() if v != "gone"}))
    return change


def tensors(part, change):
    def rewrite(folder):
        at = folder / "base" / part / "model.safetensors"
        state = load_file(at)
        change(state)
        save_file(state, at)
    return rewrite


def header(text, body=b"\0" * 64):
    return struct.pack("<Q", len(text)) + text + body


class Evil:
    def __reduce__(self):
        return os.mkdir, ("pickle-was-opened",)


def pickles(folder):
    (folder / "base/llm/model.safetensors").unlink()
    (folder / "base/llm/pytorch_model.bin").write_bytes(pickle.dumps(Evil()))


def narrow_llm(vocab, width=16):
    """An LLM whose embedding ends before the tokenizer does; or a width that the projector does not have."""
    def change(folder):
        llm = m.initialise(m.Decoder(m.LLMConfig(vocab, width, 32, 2, 2, 1)), 0)
        at = folder / "base/llm"
        save_file(llm.state_dict(), at / "model.safetensors")
        edit("base/llm/config.json", vocab_size=vocab, hidden_size=width, head_dim=width // 2)(folder)
    return change


def json_tokenizer(**values):
    """A tokenizer.json as Qwen's, with something in it changed."""
    def change(folder):
        tokenizers = pytest.importorskip("tokenizers")
        fast = tokenizers.Tokenizer(tokenizers.models.BPE())
        fast.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        fast.train_from_iterator(["what color"], tokenizers.trainers.BpeTrainer(
            vocab_size=300, show_progress=False, special_tokens=["<|im_end|>"],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
        (folder / "base/llm/tokenizer.model").unlink()
        (folder / "base/llm/tokenizer.json").write_text(json.dumps(json.loads(fast.to_str()) | values))
    return change


def finished_run(name, raw):
    """A run that is under way under this name, one of whose own files is damaged."""
    def change(folder):
        assert main(*options(folder, "--steps", 2, "--save-every", 1, stage="sft")) == 0
        settings = folder / "runs/paper/sft/settings.json"
        m.write_json(settings, {k: v for k, v in json.loads(settings.read_text()).items() if k not in ("finished", "measured")})
        for at in (folder / "runs/paper/sft").glob(name):
            at.write_bytes(raw)
    return change


RED = Image.new("RGB", (20, 16), "red")
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
RAMP = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
EXIF = Image.Exif()
EXIF[0x0112] = 6
CLIP = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}, "do_center_crop": True}
ENCODER, LLM, WEIGHTS = "base/encoder/config.json", "base/llm/config.json", "base/llm/model.safetensors"
PIXELS, WORDS = "base/encoder/preprocessor_config.json", "base/llm/tokenizer.model"
HANDLED = None


def strip(folder):
    edit(PIXELS, **CLIP)(folder)
    picture("strip.png", saved(Image.new("1", (400_000, 1))))(folder)


CASES = {   # what it is: (what it does to the folder, what the line says; None: handled, i.e. it trains; options)
    # ---- JSONL
    "BOM": (lines(b"\xef\xbb\xbf" + GOOD, PAIR), HANDLED), "CRLF": (lines(GOOD + b"\r", GOOD + b"\r", b""), HANDLED),
    "no final newline": (lines(PAIR, PAIR), HANDLED), "blank lines": (lines(b"", PAIR, b" ", PAIR, b""), HANDLED),
    "line of 10 MB": (row(note="long " * 2_000_000), HANDLED),
    "question of 300 KB": (row(question="long " * 60_000), r"pairs.jsonl: sample 2: its prompt has \d+ tokens"),
    "NUL byte": (lines(PAIR, GOOD[:-3] + b'\0"}'), "pairs.jsonl: sample 2: Invalid control"),
    "escaped NUL": (row(question="a\0b"), HANDLED), "NULs only": (lines(PAIR, b"\0" * 99), "pairs.jsonl: sample 2"),
    "invalid UTF-8": (lines(PAIR, GOOD[:-3] + b'\xff"}'), "pairs.jsonl: sample 2: 'utf-8'"),
    "UTF-16": (file("pairs.jsonl", GOOD.decode().encode("utf-16")), "pairs.jsonl: sample 1"),
    "lone surrogate": (row(chosen="\ud800"), "pairs.jsonl: sample 2: 'utf-8'"),
    "empty file": (lines(b""), "pairs.jsonl: no samples"), "no file": (gone("pairs.jsonl"), "pairs.jsonl: cannot be read"),
    "half a line": (lines(PAIR, GOOD[:-9]), "pairs.jsonl: sample 2: Expecting"),
    "two on a line": (lines(PAIR, GOOD * 2), "pairs.jsonl: sample 2: Extra data"),
    "blank lines count": (lines(PAIR, b"", b"{"), "pairs.jsonl: sample 3: Expecting"),
    "a pickle": (lines(PAIR, pickle.dumps(Evil(), 0)), "pairs.jsonl: sample 2"),
    "deep nesting": (lines(PAIR, b"[" * 100_000), "pairs.jsonl: sample 2: .*recursion"),
    "deep nesting of objects": (lines(PAIR, b'{"a":' * 100_000), "pairs.jsonl: sample 2: .*recursion"),
    "huge number": (lines(PAIR, b'{"id": ' + b"9" * 9999 + b"}"), "pairs.jsonl: sample 2"),
    "not an object": (lines(PAIR, b"[1]"), "pairs.jsonl: sample 2: not a JSON object"),
    "null": (lines(PAIR, b"null"), "pairs.jsonl: sample 2: not a JSON object"),
    "half an array": (lines(b"[" + GOOD + b"," + GOOD[:-4]), "pairs.jsonl: sample 2"),
    "data is a directory": (lambda f: (os.remove(f / "pairs.jsonl"), os.mkdir(f / "pairs.jsonl")), "pairs.jsonl: cannot"),
    "meta.json that names nothing": (lines({"a": {"annotation": "x", "root": "y"}}), "pairs.jsonl: [xy] is not in .*--image-root"),
    "pairs and others": (lines(PAIR, {"question": "q", "answer": "a"}), "pairs.jsonl: 2 samples, 1 of them"),
    # ---- wrong types
    "image is a number": (row(image=3), "pairs.jsonl: sample 2"), "image is a dict": (row(image={"path": "x"}), "sample 2"),
    "image is true": (row(image=True), "pairs.jsonl: sample 2"), "image is null": (row(image=None), HANDLED),
    "two images": (row(image=["0.png", "1.png"]), HANDLED), "question is a number": (row(question=3), "jsonl: sample 2"),
    "question is null": (row(question=None), "jsonl: sample 2"), "chosen is a list": (row(chosen=[3]), "jsonl: sample 2"),
    "chosen is empty": (row(chosen=[]), "jsonl: sample 2"), "chosen is no message": (row(chosen=[{"a": 1}]), "jsonl: sample 2"),
    "rejected is a dict": (row(rejected={}), "jsonl: sample 2"), "rejected is true": (row(rejected=True), "jsonl: sample 2"),
    "no chosen": (row(chosen="gone"), "pairs.jsonl: sample 2.*keys"), "id is a dict": (row(id={"a": [1]}), HANDLED),
    "metric unknown": (row(metric="eval"), "sample 2: metric"), "metric is a list": (row(metric=[]), "sample 2: metric"),
    "roles are unknown": (lines({"conversations": [{"from": "bot", "value": "x"}]}), "sample 1: 'bot'"),
    "roles repeat": (lines({"messages": [{"role": "user", "content": "x"}] * 2}), "sample 1.*take turns"),
    "content without type": (row(question=[{"role": "user", "content": [{"text": "x"}]}]), "sample 2: 'type'"),
    # ---- where pictures are
    "picture above": (row(image="../x.png"), "pairs.jsonl: sample 2: .*outside"),
    "picture above, hidden": (row(image="a/../../x.png"), "sample 2: .*outside"),
    "picture absolute": (row(image="/etc/passwd"), "sample 2: .*outside"), "picture is the root": (row(image="."), "outside"),
    "picture missing": (row(image="no.png"), "sample 2: cannot read picture .*no.png"),
    "picture name with NUL": (row(image="a\0.png"), "sample 2: cannot read picture"),
    "picture name with line breaks": (row(image="a\n\r\u2028b.png"), "sample 2: cannot read picture"),
    "picture name too long": (row(image="a" * 5000), "sample 2: cannot read picture"),
    "picture is a directory": (picture("d.png", os.mkdir), "sample 2: cannot read picture .*d.png"),
    # ---- what pictures are
    "zero bytes": (picture("z.png", content(b"")), "sample 2: cannot read picture .*z.png"),
    "text": (picture("t.png", content(b"no picture")), "cannot read picture .*t.png"),
    "SVG": (picture("s.png", content(b"<svg/>")), "cannot read picture .*s.png"),
    "truncated PNG": (picture("c.png", cut(NOISE)), "cannot read picture .*c.png"),
    "truncated JPEG": (picture("c.jpg", cut(NOISE)), "cannot read picture .*c.jpg"),
    "truncated GIF": (picture("c.gif", cut(NOISE, .9)), "cannot read picture .*c.gif"),
    "truncated WebP": (picture("c.webp", cut(NOISE)), "cannot read picture .*c.webp"),
    "EPS, a program": (picture("p.eps", saved(RED)), "cannot read picture .*p.eps"),
    "bomb": (picture("b.png", saved(Image.new("1", (20_000, 10_000)))), "cannot read picture .*b.png.*bomb"),
    "bomb of which Pillow only warns": (picture("w.png", saved(Image.new("1", (10_000, 10_000)))), "w.png.*bomb"),
    "strip that grows when resized": (strip, "sample 2: cannot read picture .*strip.png"),
    "animated GIF": (picture("a.gif", saved(RED, save_all=True, append_images=[NOISE])), HANDLED),
    "animated WebP": (picture("a.webp", saved(RED, save_all=True, append_images=[NOISE.resize((20, 16))])), HANDLED),
    "16 bits": (picture("i.png", saved(Image.fromarray(np.asarray(RAMP, np.uint16) * 257))), HANDLED),
    "float TIFF": (picture("f.tif", saved(RAMP.convert("F"))), HANDLED), "CMYK": (picture("k.jpg", saved(RED.convert("CMYK"))), HANDLED),
    "palette": (picture("p.png", saved(NOISE.convert("P"))), HANDLED), "alpha": (picture("l.png", saved(RAMP.convert("LA"))), HANDLED),
    "1 bit": (picture("1.png", saved(RAMP.convert("1"))), HANDLED), "EXIF": (picture("e.jpg", saved(NOISE, exif=EXIF)), HANDLED),
    "broken EXIF": (picture("x.jpg", saved(NOISE, exif=b"Exif\0\0MM\0*\0\0")), HANDLED),
    "one pixel": (picture("o.png", saved(Image.new("RGB", (1, 1)))), HANDLED),
    # ---- config.json
    "no config": (gone(ENCODER), "encoder/config.json: cannot be read"),
    "empty config": (file(LLM, b""), "llm/config.json: cannot be read"), "config is a list": (file(LLM, b"[1]"), "llm/config.json"),
    "config not UTF-8": (file(ENCODER, b"\xff\xfe{"), "encoder/config.json: cannot"),
    "config nested": (file(LLM, b"[" * 100_000), "llm/config.json: cannot be read"),
    "no model_type": (edit(LLM, model_type="gone"), 'llm/config.json: "model_type"'),
    "model_type is a dict": (edit(ENCODER, model_type={}), 'encoder/config.json: "model_type"'),
    "code in config": (edit(LLM, model_type="custom", auto_map={"AutoModel": "evil.py"}), 'llm/config.json: "model_type"'),
    "negative layers": (edit(LLM, num_hidden_layers=-1), 'llm/config.json: "num_hidden_layers" is -1'),
    "a billion layers": (edit(ENCODER, num_hidden_layers=10 ** 9), 'encoder/config.json: "num_hidden_layers"'),
    "width is text": (edit(LLM, hidden_size="16"), 'llm/config.json: "hidden_size" is "16"'),
    "width is missing": (edit(LLM, hidden_size="gone"), 'llm/config.json: "hidden_size" is missing'),
    "width is huge": (edit(LLM, hidden_size=2 ** 40), 'llm/config.json: "hidden_size"'),
    "width fits nothing": (edit(LLM, hidden_size=2 ** 22), "base/llm: .*size mismatch"),
    "a vocabulary of 10 million": (edit(LLM, vocab_size=10 ** 7), "base/llm: .*size mismatch"),
    "heads do not divide": (edit(ENCODER, num_attention_heads=3), 'encoder/config.json: "num_attention_heads" is 3'),
    "eps is NaN": (edit(LLM, rms_norm_eps=float("nan")), 'llm/config.json: "rms_norm_eps" is NaN'),
    "theta is negative": (edit(LLM, rope_theta=-1), 'llm/config.json: "rope_theta" is -1'),
    "image_size is a list": (edit(ENCODER, image_size=[16]), 'encoder/config.json: "image_size"'),
    "image_size is huge": (edit(ENCODER, image_size=10 ** 7), HANDLED), "patch_size 0": (edit(ENCODER, patch_size=0), "patch_size"),
    "size of pictures is huge": (edit(PIXELS, size={"height": 10 ** 7, "width": 10 ** 7}), "encoder/.*image tokens"),
    "image_mean is text": (edit(PIXELS, image_mean="x"), 'preprocessor_config.json: "image_mean"'),
    "image_std is zero": (edit(PIXELS, image_std=[0, 0, 0]), 'preprocessor_config.json: "image_std"'),
    "resample unknown": (edit(PIXELS, resample=99), 'preprocessor_config.json: "resample" is 99'),
    "pixels left as they are": (edit(PIXELS, do_rescale=False), 'preprocessor_config.json: "do_rescale" is false'),
    # ---- weights
    "only pickles": (pickles, "base/llm: no safetensors"), "weights empty": (file(WEIGHTS, b""), "llm/model.safetensors: cannot"),
    "weights cut": (lambda f: os.truncate(f / WEIGHTS, 20_000), "llm/model.safetensors: cannot be read"),
    "header huge": (file(WEIGHTS, struct.pack("<Q", 2 ** 60) + b"{}"), "llm/model.safetensors: cannot be read"),
    "header no JSON": (file(WEIGHTS, header(b"nonsense")), "llm/model.safetensors: cannot be read"),
    "header nested": (file(WEIGHTS, header(b'{"a":' * 50_000)), "llm/model.safetensors: cannot be read"),
    "offsets outside": (file(WEIGHTS, header(b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36000]}}')), "cannot be read"),
    "offsets negative": (file(WEIGHTS, header(b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[-36,0]}}')), "cannot be read"),
    "shape too large": (file(WEIGHTS, header(b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,64]}}')), "cannot"),
    "weights are a directory": (lambda f: (os.remove(f / WEIGHTS), os.mkdir(f / WEIGHTS)), "base/llm: no safetensors"),
    "tensor missing": (tensors("llm", lambda s: s.pop("model.norm.weight")), "base/llm: .*Missing.*model.norm.weight"),
    "tensor extra": (tensors("llm", lambda s: s.update({"model.layers.0.evil": torch.ones(1)})), "base/llm: .*layers.0.evil"),
    "tensor of other shape": (tensors("encoder", lambda s: s.update({"vision_model.post_layernorm.bias": torch.ones(15)})),
                              "base/encoder: .*post_layernorm.bias"),
    "tensor of integers": (tensors("projector", lambda s: s.update({"0.bias": torch.ones(16).long()})), "projector: .*0.bias"),
    "NaN weights": (tensors("projector", lambda s: s["2.weight"].fill_(float("nan"))), "base/projector: 2.weight .*finite"),
    "infinite weights": (tensors("encoder", lambda s: s["vision_model.post_layernorm.bias"].fill_(float("inf"))), "finite"),
    "widths differ": (narrow_llm(600, 32), "base/projector: .*size mismatch"),
    # ---- tokenizers
    "no tokenizer": (gone(WORDS), "base/llm: no tokenizer.model"), "tokenizer empty": (file(WORDS, b""), "tokenizer.model: cannot"),
    "tokenizer is a pickle": (file(WORDS, pickle.dumps(Evil())), "tokenizer.model: cannot be read"),
    "tokenizer of a larger LLM": (narrow_llm(300), "tokenizer.model: has ids up to 599, the LLM 300"),
    "tokenizer.json is another's": (json_tokenizer(), HANDLED), "tokenizer.json of numbers": (json_tokenizer(added_tokens=[3]), "json: cannot"),
    "a token of id -1": (json_tokenizer(added_tokens=[{"id": -1, "content": "<|im_end|>"}]), "tokenizer.json: "),
    "a token of id 10 ** 9": (json_tokenizer(added_tokens=[{"id": 10 ** 9, "content": "<|im_end|>"}]), "tokenizer.json: has ids up"),
    "a token of id '5'": (json_tokenizer(added_tokens=[{"id": "5", "content": "<|im_end|>"}]), "tokenizer.json: cannot be read"),
    "template of another LLM": (lambda f: None, r"tokenizer.model: has no <\|eot_id", "--template", "llama3"),
    # ---- a run's own files, damaged
    "settings damaged": (finished_run("settings.json", b'{"seed":'), "sft/settings.json: cannot be read"),
    "settings are a list": (finished_run("settings.json", b"[3]"), "sft/settings.json: cannot be read"),
    "a save without its data": (finished_run("train/step-2/*.distcp", b""), "train/step-2: is damaged"),
    "a save of nonsense": (finished_run("train/step-2/.metadata", b"nonsense"), "train/step-2: is damaged"),
    "questions damaged": (file("q.jsonl", b"{"), "q.jsonl: sample 1", "--questions", "{}/q.jsonl"),
    "held-out data damaged": (file("e.jsonl", b"{"), "e.jsonl: sample 1", "--eval-data", "{}/e.jsonl")}


def said(text):
    """Lines on standard error that are not progress bars."""
    return [line for line in re.split(r"[\r\n]+", text) if line.strip() and "%|" not in line]


def test_hostile_input(tiny, tmp_path, monkeypatch, capsys):
    """All CASES in one process. New files are the run's own and the data's index; none that was there is touched."""
    monkeypatch.chdir(tmp_path)
    wrong, handled, start = [], 0, time.time()
    for k, (name, (change, message, *more)) in enumerate(CASES.items()):
        folder = tmp_path / f"case {k}"
        shutil.copytree(tiny, folder)
        change(folder)
        before, _ = tree(folder), capsys.readouterr()
        with monkeypatch.context() as patch:                # saves wait for the disk; none of them is read here
            patch.setattr(pivot, "save_resume", lambda *_: None)
            try:
                status = main(*options(folder, "--steps", 2, *(x.format(folder) for x in more), stage="sft"))
            except BaseException as error:                  # what a user would see as a traceback
                status = error
        lines, after, own = said(capsys.readouterr().err), tree(folder), "runs/paper/sft/"
        changed = {p for p in before if after.get(p) != before[p] and p != own + "log.jsonl"}
        new = {p for p in after.keys() - before if not p.startswith("runs") and not p.endswith(".index")}
        ok = not new and (status == 0 if message is HANDLED else not changed and status == 1 and len(lines) == 1
                          and re.search(message, lines[0]) and lines[0].startswith("pivot: "))
        if not ok:
            wrong.append((name, status, lines[-2:], changed, new))
        handled += message is HANDLED
        assert not [p for p in tmp_path.rglob("*") if p.name == "pickle-was-opened" or p.suffix in (".tmp", ".part")], name
        shutil.rmtree(folder)
    with capsys.disabled():
        print(f"\n{len(CASES)} hostile cases, {handled} handled, the others named, {time.time() - start:.0f} s")
    assert not wrong and len(CASES) - handled >= 60, "\n".join(map(str, wrong))


def test_on_bad_sample_skip(tiny, tmp_path, capsys):
    """Bad lines, pictures and lengths: the run goes on, says which ones and why, and is the same with workers, twice, and as
    two halves; stop is the default, and one may change over to skip."""
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "cut.png")
    os.truncate(tmp_path / "cut.png", 40)
    good = [{"id": f"s{i}", **PAIR, "image": f"{i % 4}.png"} for i in range(12)]
    good[3]["image"], good[7]["question"], good[9]["image"] = "cut.png", "long " * 5000, "../out.png"
    write_rows(tmp_path / "bad.jsonl", [*good, {**PAIR, "image": 3}])
    base = options(tmp_path, "--steps", 5, "--lr", 1e-3, "--encoder-lr", 1e-3, data="bad.jsonl")
    assert main(*base) == 1 and "bad.jsonl: sample 13: 'int'" in capsys.readouterr().err
    skip, weights = [*base, "--on-bad-sample", "skip"], []
    for name, more in (("a", ()), ("b", ("--workers", 2, "--micro-batch", 3)), ("c", ("--save-every", 2))):
        assert main(*skip, "--name", name, *more) == 0
        out = capsys.readouterr().out
        assert "4 bad samples skipped:" in out and "sample 13" in out
        assert all(f"bad.jsonl: sample {s}: {why}" in out for s, why in (("s3", "cannot read"), ("s7", "its prompt"), ("s9", "image")))
        weights.append(load_file(tmp_path / f"runs/{name}/dpo/llm/model.safetensors"))
    assert all(torch.equal(weights[0][k], weights[2][k]) for k in weights[0])
    assert all(torch.allclose(weights[0][k], weights[1][k], atol=1e-4) for k in weights[0])
    assert main(*base) == 1                                     # an index made for skip does not hide what is bad
    write_rows(tmp_path / "bad.jsonl", good)
    assert main(*base, "--name", "d") == 1 and "bad.jsonl: sample s" in capsys.readouterr().err
    assert main(*skip, "--name", "d") == 0 and "3 bad samples skipped:" in capsys.readouterr().out
    write_rows(tmp_path / "bad.jsonl", [{**PAIR, "image": "cut.png"}] * 3)
    assert main(*skip, "--name", "e") == 1 and "all of them" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------- random input

JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(
    ["user", "gpt", "<image>", "0.png", "..", 2 ** 70, -1, 0, 1e308]), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["from", "value", "role", "content", "type", "text", "height", "shortest_edge"]), inner, max_size=3),
    max_leaves=6)
FUZZ = settings(max_examples=700, deadline=2000, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])


def named(folder, read):
    """What `read` returns, or None after an error of one line that names something in the folder."""
    try:
        return read()
    except BadInput as error:
        assert str(folder) in str(error) and "\n" not in str(error) and len(str(error)) <= 1000


@FUZZ
@given(parts=st.lists(st.one_of(st.binary(max_size=30), st.dictionaries(st.sampled_from(
    "id image images conversations messages question prompt chosen rejected answers answer metric".split()), JSON).map(
        lambda d: json.dumps(d).encode()), st.just(GOOD), st.just(b"["), st.just(b",")), max_size=5),
       sep=st.sampled_from([b"\n", b"\r\n", b"", b",", b"\0"]), skip=st.booleans())
def test_any_file_of_records(tmp_path, tokenizer, parts, sep, skip):
    (tmp_path / "x.jsonl").write_bytes(sep.join(parts))
    records = named(tmp_path, lambda: data.Records(tmp_path / "x.jsonl", skip=skip))
    for i in range(len(records or ())):
        sample = named(tmp_path, lambda: records[i])
        assert skip or not sample or data.encode(sample, tokenizer, "chatml", 4, 10 ** 6).tokens


@FUZZ
@given(part=st.sampled_from([ENCODER, PIXELS, LLM]), raw=st.none() | st.binary(max_size=20), values=st.dictionaries(st.sampled_from(
    "model_type hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads image_size patch_size size "
    "crop_size do_center_crop image_mean image_std resample rope_theta rope_scaling vocab_size head_dim hidden_act vision_config "
    "tie_word_embeddings rms_norm_eps layer_norm_eps qkv_bias mlp_ratio attention_bias".split()), JSON, min_size=1, max_size=3))
def test_any_config(tiny, part, raw, values):
    at, folder = tiny / part, tiny / part.rpartition("/")[0]
    kept = at.read_bytes()
    try:
        at.write_bytes(raw if raw is not None else json.dumps(json.loads(kept) | values).encode())
        named(folder, lambda: (m.load_llm if part == LLM else m.load_encoder)(folder))
    finally:
        at.write_bytes(kept)


@FUZZ
@given(at=st.integers(0, 2500), raw=st.binary(min_size=1, max_size=9))
def test_any_damage_to_a_header(tiny, at, raw):
    """Bytes of the weights' file changed, mostly in its header."""
    folder = tiny / "base/projector"
    file = folder / "model.safetensors"
    kept = file.read_bytes()
    try:
        file.write_bytes(kept[:at] + raw + kept[at + len(raw):])
        named(folder, lambda: m.fill(lambda: m.Projector(16, 16), folder, m.open_tensors(folder)))
    finally:
        file.write_bytes(kept)


@FUZZ
@given(question=st.text(max_size=40), answer=st.text(max_size=40), rejected=st.none() | st.text(max_size=40), turns=st.integers(1, 3),
       limit=st.integers(1, 60), template=st.sampled_from(["plain", "caption", "chatml"]), seen=st.booleans())
def test_any_text_in_any_template(tokenizer, question, answer, rejected, turns, limit, template, seen):
    """All image tokens or an error; targets in answers only; positions and sources that exist."""
    sample = data.Sample("x", RED if seen else None, [(question, answer)] * turns, rejected)
    try:
        row = data.encode(sample, tokenizer, template, 3, limit)
    except BadInput as error:
        assert str(error).startswith("sample x: ")
    else:
        assert row.tokens.count(data.IMAGE) == 3 * seen and any(row.target) and max(row.position) < limit
        assert all(s >= -1 and s < k for k, s in enumerate(row.source)) and not any(
            on and (segment == 0 or token == data.IMAGE) for on, segment, token in zip(row.target, row.segment, row.tokens))
