"""Other people's tokenizers, templates, files and pictures: as their own tools read them."""
import json
import os
import pickle
import sys

import numpy as np
import pytest
import sentencepiece
import torch
from PIL import Image

import data
import model as m
from data import IMAGE, TEMPLATES, BadInput, Sample, Tokenizer

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

TEXT = ["What is in the picture?", "A small red square, left of two circles.\nAnd  a cat.", "USER: hi",
        "How many?  Three, I think; système 図 ok", "user assistant system ASSISTANT: yes no"] * 40
TALK = [("What is in the picture?", "A small red square."), ("How many?\n\nSay it.", "Three,  I think"),
        (" 図 ok? <|im_end|> </s> <|eot_id|> <tool>", "yes </s><|im_end|><|eot_id|><tool>no")]
SYSTEM = "{% if messages[0].role == 'system' %}{% set prompt = messages[0].content %}{% else %}" \
         "{% set prompt = default %}{% endif %}"
JINJA = {
    "chatml": "{{'<|im_start|>system\n' + prompt + '<|im_end|>\n'}}{% for m in messages %}"
              "{% if m.role != 'system' %}{{'<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>'}}"
              "{{'\n' if not loop.last}}{% endif %}{% endfor %}",
    "llama3": "{{'<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n' + prompt + "
              "'<|eot_id|>'}}{% for m in messages %}{% if m.role != 'system' %}{{'<|start_header_id|>' "
              "+ m.role + '<|end_header_id|>\n\n' + m.content + '<|eot_id|>'}}{% endif %}{% endfor %}",
    "vicuna": "{{prompt}} {% for m in messages %}{% if m.role == 'user' %}{{'USER: ' + m.content}}"
              "{% elif m.role == 'assistant' %}{{' ASSISTANT: ' + m.content + '</s>'}}{% endif %}"
              "{% endfor %}"}
NAMES = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>",
         "<|end_header_id|>", "<|eot_id|>", "<s>", "</s>"]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A folder with a tokenizer.json as Qwen's and Llama 3's: bytes, a splitting pattern, added tokens."""
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
    fast = tokenizers.Tokenizer(models.BPE())
    pattern = Regex(r"\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+| ?\p{L}+")
    fast.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)])
    fast.decoder = decoders.ByteLevel()
    fast.train_from_iterator(TEXT, trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    fast.add_special_tokens(NAMES)
    fast.add_tokens([AddedToken("<tool>", normalized=False)])
    folder = tmp_path_factory.mktemp("qwen")
    fast.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module", params=[False, True])
def llama(request, tmp_path_factory):
    """A folder with a tokenizer.model as Llama's, new (False) and legacy, and an added token."""
    folder = tmp_path_factory.mktemp("llama")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_prefix=str(folder / "tokenizer"), vocab_size=380,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity", minloglevel=2,
        remove_extra_whitespaces=False, split_digits=True, character_coverage=.9995)
    (folder / "tokenizer.vocab").unlink()
    added = {str(380 + i): {"content": name} for i, name in enumerate(NAMES[1:3])}
    (folder / "tokenizer_config.json").write_text(json.dumps({"legacy": request.param, "added_tokens_decoder": added}))
    return folder


def messages(talk, system=None):
    return [{"role": "system", "content": system}] * bool(system) + [
        {"role": role, "content": text} for turn in talk for role, text in zip(("user", "assistant"), turn)]


@pytest.mark.parametrize("name", list(JINJA))
@pytest.mark.parametrize("system", ["", "Be brief."])
def test_token_ids_are_those_of_apply_chat_template(qwen, name, system):
    ours, theirs = Tokenizer(qwen), transformers.PreTrainedTokenizerFast(tokenizer_file=str(qwen / "tokenizer.json"))
    talk = [(q.strip(), a) for q, a in TALK[:2]]    # transformers takes special tokens from what users say
    row = data.encode(Sample("x", None, talk, system=system), ours, name, 4, 10 ** 6)
    ids = theirs.apply_chat_template(messages(talk, system), chat_template=SYSTEM + JINJA[name], tokenize=True,
                                     default=TEMPLATES[name].prompt, return_dict=False)
    assert row.tokens == ([ours.special["<s>"]] if name == "vicuna" else []) + ids
    answers = [data.Tokenizer.decode(ours, [t for t, on in zip(row.tokens, row.target) if on])]
    assert answers[0].replace(" ", "") == "".join(a for _, a in talk).replace(" ", "")


def theirs_of(folder, legacy):
    """transformers' Llama tokenizer with the pieces of a tokenizer.model: merges in the order of ranks."""
    sp = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    vocab = {sp.id_to_piece(i): i for i in range(sp.get_piece_size())}
    merges = [(vocab[piece], vocab[piece[:k]], vocab[piece[k:]], piece[:k], piece[k:])
              for piece in vocab for k in range(1, len(piece)) if piece[:k] in vocab and piece[k:] in vocab
              and not sp.is_byte(vocab[piece]) and not sp.is_control(vocab[piece])]
    theirs = transformers.LlamaTokenizer(vocab, [pair[3:] for pair in sorted(merges)], legacy=legacy)
    theirs.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return theirs


@pytest.mark.parametrize("name", ["vicuna", "chatml"])
def test_sentencepiece_ids_are_llamas(llama, name):
    ours, legacy = Tokenizer(llama), json.loads((llama / "tokenizer_config.json").read_text())["legacy"]
    theirs = theirs_of(llama, legacy)
    for text in TEXT[:5]:
        assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids
    row = data.encode(Sample("x", None, TALK[:2]), ours, name, 4, 10 ** 6)
    rendered = theirs.apply_chat_template(messages(TALK[:2]), chat_template=SYSTEM + JINJA[name],
                                          tokenize=False, default=TEMPLATES[name].prompt)
    ids = theirs(rendered, add_special_tokens=False).input_ids
    assert row.tokens == ([ours.special["<s>"]] if name == "vicuna" else []) + ids


def test_special_tokens_come_from_the_template_only(qwen, llama):
    for folder in (qwen, llama):
        ours = Tokenizer(folder)
        hostile = " ".join(ours.special) + " <tool> <image> <unk>"
        assert not set(ours.encode(hostile)) & set(ours.special.values())
        plain = data.encode(Sample("x", None, [(hostile, hostile)], rejected=hostile), ours, "plain", 4, 10 ** 6)
        assert sum(t in ours.special.values() for t in plain.tokens) == 2       # the ends of two turns
        assert ours.decode(ours.encode(hostile) + [ours.end]) == hostile
        assert len(ours) == 1 + max(ours.special.values())
    assert [f.name for f in ours.files] == ["tokenizer.model", "tokenizer_config.json"]


def test_a_caption_starts_as_its_tokenizer_starts_texts(llama, tmp_path):
    """As in LLaVA, a Llama's has its first token; not where the folder says that none is added, as Qwen's do."""
    sample, theirs = Sample("x", Image.new("RGB", (4, 4)), [("what", "a cat")]), theirs_of(llama, False)
    for config, start in (({}, [theirs.bos_token_id]), ({"add_bos_token": False}, [])):
        for file in llama.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        row = data.encode(sample, Tokenizer(tmp_path), "caption", 2, 100)
        assert row.tokens[:len(start) + 2] == start + [IMAGE] * 2 and not any(row.target[:len(start) + 2])


def test_the_prompt_does_not_depend_on_the_answer(qwen):
    """An answer that begins with a line break would melt into the template's; chosen and rejected share it."""
    ours = Tokenizer(qwen)
    rows = [data.encode(Sample("x", None, [("q", answer)], "\n\nno"), ours, "chatml", 4, 10 ** 6)
            for answer in ("yes", "\n\nyes", "")]
    prompts = [[t for t, k in zip(row.tokens, row.segment) if k == 0] for row in rows]
    assert prompts[0] == prompts[1] == prompts[2]
    said = [t for t, k in zip(rows[1].tokens, rows[1].segment) if k == 1]
    assert ours.decode(said) == "\n\nyes"


def test_a_picture_stands_where_it_is_asked_for(qwen):
    ours, picture = Tokenizer(qwen), Image.new("RGB", (4, 4))

    def text(turns, template="chatml", **more):
        tokens = data.encode(Sample("x", picture, turns, **more), ours, template, 2, 10 ** 6).tokens
        at = tokens.index(IMAGE)
        assert tokens[at:at + 2] == [IMAGE] * 2 and tokens.count(IMAGE) == 2
        names = {i: name for name, i in ours.special.items()}
        return "".join(names.get(t) or ("*" if t == IMAGE else ours.decode([t])) for t in tokens)

    start = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    between = "<|im_end|>\n<|im_start|>assistant\n"
    assert text([("hi", "yes")]) == start + "**\nhi" + between + "yes<|im_end|>"
    assert text([("hi\n<image>", "yes")]) == start + "hi\n**" + between + "yes<|im_end|>"
    assert text([("a", "b"), ("see <image> there", "c")]) == (
        start + "a" + between + "b<|im_end|>\n<|im_start|>user\nsee**there" + between + "c<|im_end|>")
    assert text([("hi <image>", "yes")], "plain") == "hi**yes<|im_end|>"
    assert text([("Describe it.\n<image>", "a cat")], "caption") == "<s>**a cat<|im_end|>"
    assert text([("hi", "yes")], "vicuna").endswith("USER: **\nhi ASSISTANT: yes</s>")
    with pytest.raises(BadInput, match="more than one <image>"):
        text([("<image>", "yes"), ("<image>", "yes")])


def test_template_is_chosen_from_the_folder(qwen, llama, tokenizer, tmp_path):
    assert data.choose_template(qwen) == data.choose_template(tokenizer.file.parent) == "chatml"
    assert data.choose_template(llama) == "chatml"              # it has the tokens
    (tmp_path / "tokenizer.model").write_bytes((llama / "tokenizer.model").read_bytes())
    assert data.choose_template(tmp_path) == "vicuna"           # <s> and </s> are all it has
    (tmp_path / "tokenizer.model").unlink()
    (tmp_path / "tokenizer.json").write_bytes((qwen / "tokenizer.json").read_bytes())
    for template, name in [("{% for m in messages %}<|start_header_id|>...", "llama3"), ("USER: ", "vicuna")]:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
        assert data.choose_template(tmp_path) == name
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "chat_template.jinja").write_text("<|start_header_id|>")
    assert data.choose_template(tmp_path) == "llama3"
    with pytest.raises(BadInput, match="has no <|eot_id|>".replace("|", r"\|")):
        tokenizer.template(TEMPLATES["llama3"].end)


def test_a_tokenizer_that_is_missing_or_broken_is_one_line(qwen, tmp_path, monkeypatch):
    with pytest.raises(BadInput, match="no tokenizer.model or tokenizer.json"):
        Tokenizer(tmp_path)
    for name in ("tokenizer.json", "tokenizer.model"):
        (tmp_path / name).write_text("{}")
        with pytest.raises(BadInput, match=f"{name}: cannot be read") as error:
            Tokenizer(tmp_path)
        assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(BadInput, match="pip install tokenizers"):
        Tokenizer(qwen)


# ------------------------------------------------------------------------------------------------------------- formats

def write(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def user(text, role="role", content="content", who="user"):
    return {role: who, content: text}


ANSWER = user("c", who="assistant")
PAIR = {"question": "q", "chosen": "c", "rejected": "r"}
TURNS = [("<image>\nq", "c")]


@pytest.mark.parametrize("record, expected", [
    ({"image": "a.png", "conversations": [
        {"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "c"}]}, {"turns": TURNS}),
    ({"images": ["a.png"], "messages": [user("<image>\nq"), ANSWER]}, {"turns": TURNS}),
    ({"conversations": [user("s", who="system"), ANSWER, user("q"), ANSWER, user("q")][0:1] + [user("q"), ANSWER]},
     {"turns": [("q", "c")], "system": "s"}),
    ({"conversations": [ANSWER, user("q"), ANSWER, user("so")]}, {"turns": [("q", "c")]}),
    ({"image": "a.png", **PAIR}, {"turns": [("q", "c")], "rejected": "r"}),
    ({"image": "a.png", "prompt": "q", "chosen": "c", "rejected": "r"}, {"turns": [("q", "c")], "rejected": "r"}),
    ({"images": ["a.png"], "prompt": [user([{"type": "image"}, {"type": "text", "text": "q"}])],
      "chosen": [ANSWER], "rejected": [user([{"type": "text", "text": "r"}], who="assistant")]},
     {"turns": TURNS, "rejected": "r"}),
    ({"prompt": [user("s", who="system"), user("q"), ANSWER, user("so")], "chosen": "yes", "rejected": "no"},
     {"turns": [("q", "c"), ("so", "yes")], "rejected": "no", "system": "s"}),
    ({"image": "a.png", "question": "q", "answers": ["c", "d"], "category": "ocr", "metric": "anls"},
     {"turns": [("q", "c")], "answers": ("c", "d"), "category": "ocr", "metric": "anls"}),
    ({"question": "q", "answers": ["c"] * 7 + ["d"] * 3}, {"answers": ("c",) * 7 + ("d",) * 3}),
    ({"question": "q", "answer": "3"}, {"turns": [("q", "3")], "answers": ("3",), "metric": "exact"})])
def test_formats_are_told_by_their_keys(tmp_path, record, expected):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "one.json").write_text(json.dumps([{"id": 5, **record}]))
    for file in (tmp_path / "one.json", write(tmp_path / "one.jsonl", [{"id": 5, **record}])):
        records = data.Records(file)
        sample = records[0]
        assert {k: getattr(sample, k) for k in expected} == expected
        assert sample.id == "5" and records.preferences == ("rejected" in record)
        assert sample.image == (tmp_path / "a.png" if {"image", "images"} & set(record) else None)


@pytest.mark.parametrize("record, message", [
    ({}, "prompt"), ({"question": "q"}, "answers"), ({"question": "q", "chosen": "c"}, "rejected"),
    ({"question": "q", "answer": "a", "metric": "f1"}, "metric"), ({"question": "\ud800", "answer": "a"}, "question"),
    ({"conversations": [user("q"), user("q"), ANSWER]}, "take turns"), ({"conversations": [user("q", who="bot")]}, "bot"),
    ({"conversations": [3]}, "conversations"), ({"image": {"bytes": 1}, **PAIR}, "image"), ([], "not a JSON object"),
    ({"question": "q", "answers": []}, "answers"), ({"prompt": [ANSWER], "chosen": "c", "rejected": "r"}, "take turns")])
def test_what_is_wrong_is_said_when_the_file_is_opened(tmp_path, record, message):
    file = write(tmp_path / "bad.jsonl", [PAIR, record])
    with pytest.raises(BadInput, match=f"bad.jsonl: sample 2: .*{message}") as error:
        data.Records(file)
    assert "\n" not in str(error.value) and os.listdir(tmp_path) == ["bad.jsonl"]


def test_samples_with_several_pictures_are_left_out_and_counted(tmp_path):
    several = [{"image": ["a.png", "b.png"], **PAIR}, {"image": "a.png", **PAIR, "question": "<image> <image>"}]
    records = data.Records(write(tmp_path / "x.jsonl", [PAIR, *several, {"image": ["a.png"], **PAIR, "id": "last"}]))
    assert len(records) == 2 and records[1].id == "last" and records.left_out == {"several pictures": 2}
    with pytest.raises(BadInput, match="2 samples, 1 of them with .rejected."):
        data.Records(write(tmp_path / "x.jsonl", [PAIR, {"question": "q", "answer": "a"}]))


def test_mmpr_is_one_data_set(tmp_path):
    base = tmp_path / "MMPR"
    for name, suffix in [("ai2d", "png"), ("m3cot", "gif")]:
        (base / "images" / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(base / "images" / name / f"0.{suffix}")
        write(base / f"{name}.jsonl", [{"image": "0.jpg" if suffix == "gif" else "0.png", **PAIR}] * 3)
    (base / "meta.json").write_text(json.dumps({name: {
        "root": f"MMPR/images/{name}", "annotation": f"MMPR/{name}.jsonl", "repeat_time": 1} for name in ("ai2d", "m3cot")}))
    records = data.Records(base / "meta.json")
    assert len(records) == 6 and records.preferences
    assert [records[i].kind for i in range(6)] == ["ai2d"] * 3 + ["m3cot"] * 3
    assert records[0].image == base / "images/ai2d/0.png" and records[5].image == base / "images/m3cot/0.gif"
    with pytest.raises(IndexError):
        records[6]
    (tmp_path / "meta.json").write_text((base / "meta.json").read_text().replace("MMPR/", ""))
    with pytest.raises(BadInput, match="ai2d.jsonl is not in .*--image-root"):
        data.Records(tmp_path / "meta.json")
    assert len(data.Records(tmp_path / "meta.json", base)) == 6


HOSTILE = {     # content of a file -> what the error says; more of it in test_hostile
    "": "no samples", "[]": "no samples", "{": "sample 1: Expecting", "[{]": "sample 1: Expecting", "3\n": "not a JSON object",
    '[{"annotation"': "cannot be read", '{"annotation"': "cannot be read", '{"a": {"annotation": 1}}': "cannot be read"}


@pytest.mark.parametrize("content", list(HOSTILE))
def test_hostile_files(tmp_path, content):
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(BadInput, match=f"x.jsonl.*{HOSTILE[content]}"):
        data.Records(tmp_path / "x.jsonl")


# --------------------------------------------------------------------------------------------------------------- index

def test_the_index_follows_the_file(tmp_path):
    file = write(tmp_path / "x.jsonl", [{**PAIR, "id": str(i)} for i in range(5)])
    first = data.Records(file)
    index, made = tmp_path / "x.jsonl.index", (tmp_path / "x.jsonl.index").stat().st_mtime_ns
    assert data.Records(file).fingerprint() == first.fingerprint() and index.stat().st_mtime_ns == made
    write(file, [{**PAIR, "id": "x" * i} for i in range(9)])
    second = data.Records(file)
    assert [second[i].id for i in range(9)] == ["x" * i for i in range(9)] and second.fingerprint() != first.fingerprint()
    for broken in (b"not an index", b""):
        index.write_bytes(broken)
        assert len(data.Records(file)) == 9
    assert sorted(os.listdir(tmp_path)) == ["x.jsonl", "x.jsonl.index"]


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    file = write(tmp_path / "data" / "x.jsonl", [PAIR])
    (tmp_path / "data").chmod(0o555)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert len(data.Records(file)) == 1 and os.listdir(tmp_path / "data") == ["x.jsonl"]
    assert [p.name for p in (tmp_path / "home").rglob("*") if p.is_file()] == ["x.jsonl.index"]


def test_an_array_is_read_like_lines(tmp_path):
    """Without a copy, through the byte offsets of its records, whatever they contain."""
    records = [{**PAIR, "id": str(i), "question": "ü図[{\"\\ ," * (i % 50)} for i in range(3000)]
    lines = data.Records(write(tmp_path / "lines.jsonl", records))
    for name, text in [("a.json", json.dumps(records, indent=1, ensure_ascii=False)), ("b.json", json.dumps(records)),
                       ("c.jsonl", "\ufeff" + "\r\n\r\n".join(map(json.dumps, records)))]:
        (tmp_path / name).write_text(text)
        large = data.Records(tmp_path / name)
        assert len(large) == 3000
        for i in range(3000):
            assert (large[i].id, large[i].turns) == (lines[i].id, lines[i].turns)
    for broken in (json.dumps(records)[:-9], json.dumps(records)[:-1] + ", nonsense" + " " * 50000):
        (tmp_path / "x.json").write_text(broken)
        with pytest.raises(BadInput, match="x.json: sample 300[01]: Expecting"):
            data.Records(tmp_path / "x.json")
    assert not list(tmp_path.glob("*.part")) and not list(tmp_path.glob("x.json.*"))


def test_workers_and_pickles_read_on_their_own(tmp_path):
    records = data.Records(write(tmp_path / "x.jsonl", [{**PAIR, "id": str(i)} for i in range(300)]))
    assert records[0].id == "0"
    for copy in (records, pickle.loads(pickle.dumps(records))):
        loader = torch.utils.data.DataLoader(copy, batch_size=None, num_workers=2, collate_fn=lambda s: s.id)
        assert list(loader) == [str(i) for i in range(300)]


def test_the_papers_selection(tmp_path, tokenizer, net):
    file = write(tmp_path / "x.jsonl", [{**PAIR, "id": str(i), "chosen": "red " * i} for i in range(60)])
    prepare = data.Prepare(tokenizer, "plain", net.encoder.config, 512, 2)
    all_of_it = data.Records(file)
    some = data.Records(file).select(prepare, take=20, seed=3)
    ids = [some[i].id for i in range(20)]
    assert len(some) == 20 == len(set(ids)) and ids != [str(i) for i in range(20)]
    again = data.Records(file).select(prepare, take=20, seed=3)
    assert [again[i].id for i in range(20)] == ids and again.fingerprint() == some.fingerprint()
    assert len({data.Records(file).select(prepare, 20, k).fingerprint() for k in range(3)} | {all_of_it.fingerprint()}) == 4
    short = data.Records(file).select(prepare, max_prompt_chosen=30)
    counts = [len(tokenizer.encode(text)) + len(tokenizer.encode("q")) + 1 for text in ["red " * i for i in range(60)]]
    assert len(short) == sum(n <= 30 for n in counts) == 60 - short.left_out["too long"]
    assert {int(short[i].id) for i in range(len(short))} == {i for i, n in enumerate(counts) if n <= 30}
    few = data.Records(file).select(prepare, 5, 0, 30)
    assert len(few) == 5 and all(counts[int(few[i].id)] <= 30 for i in range(5))
    with pytest.raises(BadInput, match="at most 1 tokens"):
        data.Records(file).select(prepare, max_prompt_chosen=1)


# ------------------------------------------------------------------------------------------------------------ pictures

def prepared(image, size=24, resample=3, edge=0):
    """The values 0 .. 255 that the encoder sees, (H, W, 3)."""
    config = m.EncoderConfig(image_size=size, patch_size=12, image_mean=(0., 0., 0.), image_std=(1., 1., 1.),
                             resample=resample, shortest_edge=edge)
    tokenizer = type("T", (), {"end": 0, "template": lambda self, text: []})()
    pixels = data.Prepare(tokenizer, "plain", config, 9, 1).picture(Sample("x", image, []))
    return pixels.permute(1, 2, 0).numpy() * 255


@pytest.mark.parametrize("size", [(31, 57), (57, 31), (24, 24), (7, 5), (200, 60), (25, 24), (24, 25)])
@pytest.mark.parametrize("resample", [2, 3])
@pytest.mark.parametrize("edge", [0, 24, 28])
def test_pixels_are_those_of_the_image_processors(size, resample, edge):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    image = Image.fromarray(noise).resize((4 * size[0], 4 * size[1])).resize(size)
    more = {"resample": resample, "do_normalize": False, "do_rescale": False}
    theirs = (CLIPImageProcessorPil(size={"shortest_edge": edge}, crop_size={"height": 24, "width": 24}, **more) if edge
              else SiglipImageProcessorPil(size={"height": 24, "width": 24}, **more))
    expected = np.asarray(theirs(image, return_tensors="np").pixel_values[0], float).transpose(1, 2, 0)
    assert np.abs(prepared(image, resample=resample, edge=edge) - expected).max() <= 1


def test_pictures_of_every_kind(tmp_path, monkeypatch):
    ramp = np.tile(np.linspace(0, 255, 24).astype(np.uint8), (24, 1))
    grey = Image.fromarray(ramp)
    rgb = Image.merge("RGB", [grey, grey.rotate(90), grey.rotate(180)])
    turned = Image.Exif()
    turned[0x0112] = 6                                          # the camera was held upright
    cases = {"grey.png": (grey, {}, np.stack([ramp] * 3, -1), 0), "alpha.png": (rgb.convert("RGBA"), {}, rgb, 0),
             "palette.gif": (grey, {}, np.stack([ramp] * 3, -1), 1), "cmyk.jpg": (rgb.convert("CMYK"), {"quality": 100}, rgb, 6),
             "deep.png": (Image.fromarray(ramp.astype(np.uint16) * 257), {}, np.stack([ramp] * 3, -1), 1),
             "deep.tif": (Image.fromarray(ramp.astype(np.int32) * 257), {}, np.stack([ramp] * 3, -1), 1),
             "moving.gif": (grey, {"save_all": True, "append_images": [grey.rotate(90)]}, np.stack([ramp] * 3, -1), 1),
             "turned.jpg": (rgb, {"exif": turned, "quality": 100, "subsampling": 0}, rgb.rotate(-90), 6),
             "bits.png": (grey.convert("1"), {}, grey.convert("1").convert("RGB"), 0)}
    for name, (image, options, expected, tolerance) in cases.items():
        image.save(tmp_path / name, **options)
        seen = prepared(tmp_path / name)
        assert np.abs(seen - np.asarray(expected, float)).max() <= tolerance + 1e-3, name
    (tmp_path / "cut.png").write_bytes((tmp_path / "alpha.png").read_bytes()[:-60])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    Image.new("L", (90, 90)).save(tmp_path / "bomb.png")
    Image.new("L", (60, 60)).save(tmp_path / "large.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "program.eps")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    for name in ("cut.png", "text.png", "missing.png", "empty.png", "folder.png", "bomb.png", "program.eps", "a\0b.png"):
        with pytest.raises(BadInput, match=f"sample x: cannot read picture .*{name}") as error:
            prepared(tmp_path / name)
        assert "\n" not in str(error.value)
    assert prepared(tmp_path / "large.png").shape == (24, 24, 3)
