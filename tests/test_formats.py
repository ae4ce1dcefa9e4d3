"""Other people's tokenizers, templates, files and pictures: as their own tools read them."""
import json
import os
import sys

import numpy as np
import pytest
import sentencepiece
import torch
from PIL import Image

import data
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
    (folder / "tokenizer_config.json").write_text(json.dumps({"legacy": request.param}))
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_start|>": 380, "<|im_end|>": 381}))
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
