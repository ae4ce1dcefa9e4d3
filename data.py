"""What goes in: the embedded world, readers of real data, tokenizer, chat template, batches.

A sample is a picture, a conversation and, for preferences, a second answer to its last question. It
becomes one row of tokens in which every token has a `segment`: 0 = prompt, 1 = chosen response,
2 = rejected response (model.visible says who sees whom). The prompt, with its several hundred image
tokens, stands there once, not once per response.
"""
import functools
import hashlib
import json
import math
import os
import random
import re
import warnings
from array import array
from collections import Counter, namedtuple
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from PIL import Image, ImageChops, ImageDraw, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

CHOSEN, REJECTED = 0, 1     # columns of logps: (samples, responses)
IMAGE = -1                  # token id of an image position: no text can spell it


class BadInput(Exception):
    """Something the user gave is wrong. The message is one line: what, where, what to do."""

    def __init__(self, text):   # one line, also when a DataLoader's worker wraps a traceback around
        super().__init__(" ".join(text.rpartition("BadInput: ")[2].split())[:1000])


@dataclass
class Sample:
    """One example: `turns` are (question, answer); `rejected` also answers the last question."""
    id: str
    image: Image.Image | Path | None
    turns: list
    rejected: str | None = None
    kind: str = ""                      # question type, for tables
    category: str = ""                  # general | knowledge | ocr | vision
    region: np.ndarray | None = None    # (H, W) bool: what the question is about
    detail: str = ""                    # what it is about: color, shape, ...
    separate: bool = False              # the turns are conversations of their own
    system: str = ""                    # instead of the template's system prompt
    answers: tuple = ()                 # all that count as right, for evaluation by a
    metric: str = "exact"               # exact | relaxed | anls | vqa | choice
    file: str = ""                      # where it was read, for messages

    def wrong(self, what):
        return BadInput(f"{self.file}: sample {self.id}: {what}".lstrip(": "))


# -------------------------------------------------------------------------- templates and tokenizer

@dataclass
class Template:
    """The text around what people say. Only here do special tokens count."""
    turn: str           # a question and what follows; <image> goes here if the question has none
    end: str = ""       # ends an answer; where empty, the tokenizer's own token does
    after: str = ""     # between two turns
    system: str = ""    # before the first turn
    prompt: str = ""    # the system prompt of samples that have none


TEMPLATES = {           # as in LLaVA, whose "plain", without the question, is our "caption"
    "plain": Template("<image>{question}"), "caption": Template("<image>"),
    "chatml": Template(
        "<|im_start|>user\n<image>\n{question}<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>",
        "\n", "<|im_start|>system\n{system}<|im_end|>\n", "You are a helpful assistant."),
    "llama3": Template(
        "<|start_header_id|>user<|end_header_id|>\n\n<image>\n{question}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>", "",
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>",
        "You are a helpful language and vision assistant. You are able to understand the visual "
        "content that the user provides, and assist the user with a variety of tasks using natural "
        "language."),
    "vicuna": Template(
        "USER: <image>\n{question} ASSISTANT: ", "</s>", "", "<s>{system} ",
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions.")}
ENDS = ["<|im_end|>", "<|eot_id|>", "</s>", "<|end_of_text|>", "<|endoftext|>"]
STARTS = ["<s>", "<|begin_of_text|>"]           # of Llamas; a Qwen has none
SPECIAL = r"<\|\w+\|>|</?s>"
PIECES = re.compile(f"({SPECIAL}|<image>)")     # what in a template is not text


class Tokenizer:
    """sentencepiece's tokenizer.model or, where there is none, tokenizer.json. `special`: ids of
    special and added tokens, which `encode` never makes of a text and `decode` leaves out; `words`
    and `size`: how many ids there are without and with them."""
    FILES = ["tokenizer.model", "tokenizer.json", "tokenizer_config.json", "added_tokens.json",
             "special_tokens_map.json", "vocab.json", "merges.txt", "chat_template.jinja"]

    def __init__(self, folder):
        self.files = [file for file in map(Path(folder).joinpath, self.FILES) if file.exists()]
        self.file = self.files[0] if self.files else Path(folder)
        if self.file.name not in self.FILES[:2]:
            raise BadInput(f"{folder}: no tokenizer.model or tokenizer.json; an LLM needs one")
        try:
            spec, config = (json.loads(file.read_text("utf-8")) if file.exists() else {}
                            for file in map(self.file.with_name, self.FILES[1:3]))
            ids = {t["content"]: int(i) for i, t in config.get("added_tokens_decoder", {}).items()}
            ids |= {token["content"]: token["id"] for token in spec.get("added_tokens", [])}
            if self.file.suffix == ".model":
                self.model = sp = sentencepiece.SentencePieceProcessor(model_file=str(self.file))
                ids |= {sp.id_to_piece(i): i for i in range(len(sp))
                        if sp.is_control(i) or sp.is_unknown(i)}
                self.bare, self.words = config.get("legacy") is False, len(sp)
            else:
                import tokenizers
                spec |= {"added_tokens": [], "post_processor": None, "truncation": None}
                self.model = tokenizers.Tokenizer.from_str(json.dumps(spec))
                self.bare = "'first'" in str(spec["pre_tokenizer"])
                self.words = 1 + max(self.model.get_vocab().values())
            self.special, self.size = ids, max([self.words, *(i + 1 for i in ids.values())])
            self.end = ids[next((name for name in ENDS if name in ids), " or ".join(ENDS))]
            starts = STARTS * config.get("add_bos_token", True)
            self.start = [ids[name] for name in starts if name in ids][:1]
        except Exception as error:              # the two packages raise whatever they like
            hint = "; pip install tokenizers" if isinstance(error, ImportError) else ""
            raise BadInput(f"{self.file}: cannot be read ({error!r}){hint}") from None

    def __len__(self):
        return self.size

    def encode(self, text, inside=False):
        """inside: other text goes before, so that Llama's tokenizers put no space in front."""
        ids = self.model.encode(text)
        ids = getattr(ids, "ids", ids)
        if inside:
            before, both = self.encode("\n"), self.encode("\n" + text)
            ids = both[len(before):] if both[:len(before)] == before else ids
        return ids

    def decode(self, ids):
        special = self.special.values()
        return self.model.decode([int(i) for i in ids if 0 <= i < self.size and i not in special])

    def check(self, vocab_size, template):
        """Every id that a sample may get must have a row in the LLM's embedding."""
        names = {*re.findall(SPECIAL, repr(TEMPLATES[template]))} & self.special.keys()
        used = [self.words - 1, self.end, *(self.special[name] for name in names)]
        if max(used) >= vocab_size or min(used) < 0:
            raise BadInput(f"{self.file}: has ids up to {self.size - 1}, the LLM {vocab_size} of "
                           "them: it is not this LLM's tokenizer")

    def template(self, text, said={}, image=(), inside=False):
        """Token ids of a template's text. said: what people say, for its {names}; image: ids for
        its <image>, if any; inside: a special token goes before."""
        ids, inside, text = [], inside and self.bare, text if image else text.replace("<image>", "")
        for piece in PIECES.split(text):
            if not PIECES.fullmatch(piece):
                ids += self.encode(piece.format(**said), inside)
            elif piece == "<image>" or piece in self.special:
                ids += image if piece == "<image>" else [self.special[piece]]
                inside = self.bare and piece != "<s>"
            else:
                raise BadInput(f"{self.file}: has no {piece}; choose another --template")
        return ids


def choose_template(folder):
    """The template that an LLM folder's own spells, or the first whose special tokens it has."""
    tokenizer, own = Tokenizer(folder), ("tokenizer_config.json", "chat_template.jinja")
    own = " ".join(f.read_text("utf-8", "replace") for f in tokenizer.files if f.name in own)
    able = [name for name, t in TEMPLATES.items() if t.end and
            tokenizer.special.keys() >= {*re.findall(SPECIAL, repr(t))}]
    spelled = [n for n in able if re.split("user|<image>", TEMPLATES[n].turn)[0] in own]
    return [*spelled, *able, "plain"][0]


# --------------------------------------------------------------------------------- rows and batches

# One sample, a list each: token ids; segments; does a token count in the loss?; positions (those of
# a response start where the prompt ends); the column before, or the prompt's last: it predicts it
Row = namedtuple("Row", "tokens segment target position source")


def encode(sample, tokenizer, template, image_tokens, max_length, responses=2):
    """Sample -> Row. Image tokens are never cut: a long response loses its end (and so its end of
    turn); a prompt that leaves no room for a response is an error. Answer None: only the prompt.
    responses 1: without the rejected one; the targets are the same, of a pair the last answer."""
    t, first = TEMPLATES[template], len(sample.turns) - 1 if sample.rejected is not None else 0
    image = [IMAGE] * image_tokens if sample.image is not None else []
    marked = [n for n, turn in enumerate(sample.turns) for _ in re.findall("<image>", turn[0])]
    if image and len(marked) > 1:
        raise sample.wrong("more than one <image> for one picture; leave it out")
    end, space = tokenizer.template(t.end) or [tokenizer.end], " " * t.turn.endswith(" ")

    def say(answer):            # a space before it belongs to its first token: " yes" is one
        return tokenizer.encode(space + answer, t.end != "") + end if answer is not None else []

    pieces = [(tokenizer.start if template == "caption" else [], 0, False)]
    lead, said = t.system, {"system": sample.system or t.prompt}
    if sample.separate:
        pieces, lead = [(tokenizer.template(lead + "<image>", said, image), 0, False)], ""
    for n, (question, answer) in enumerate(sample.turns):
        here = image if n == sum(marked) and not sample.separate else []    # unmarked: turn 0
        head, *tail = re.split(" *<image> *", question.strip()) if here else [question.strip()]
        text, said = lead + t.turn.rstrip(" "), said | {"question": head, "tail": "".join(tail)}
        if tail or not here:                    # the picture does not stand before the question
            text = re.sub("<image>\n?{question}", "{question}<image>{tail}", text)
        ask, reply = (n + 1, n + 1) if sample.separate else (int(n > first), int(n >= first))
        pieces += [(tokenizer.template(text, said, here, inside=n > 0), ask, False),
                   (say(answer), reply, reply > 0)]     # (token ids, segment, are they targets?)
        lead = "" if sample.separate else t.after
    pieces.append((say(sample.rejected if responses == 2 else None), 2, True))

    prompt = sum(len(ids) for ids, segment, _ in pieces if segment == 0)
    columns, following = [], {0: 0}             # the next position of each segment
    for token, segment, target in ((i, *rest) for ids, *rest in pieces for i in ids):
        n = following.setdefault(segment, prompt)
        if n < max_length:
            before = prompt if segment and n == prompt else len(columns)
            columns.append((token, segment, target, n, before - 1))
            following[segment] = n + 1
    if not 0 < prompt < max_length or sum(c[0] == IMAGE for c in columns) < len(image):
        raise sample.wrong(f"its prompt has {prompt} tokens, its picture {len(image)}: not 1 to "
                           f"{max_length - 1} in all; raise --max-length or leave it out")
    return Row(*map(list, zip(*columns)))


@dataclass
class Batch:
    """Rows of equal length, of a sample or several; what the model sees. Padding has sample -1.
    Targets are listed flat."""
    tokens: torch.Tensor        # (rows, length) token ids, IMAGE where image features go
    sample: torch.Tensor        # (rows, length) which sample of the batch a token belongs to
    segment: torch.Tensor       # (rows, length) 0 prompt, 1 chosen, 2 rejected
    position: torch.Tensor      # (rows, length) position within prompt + response
    target: torch.Tensor        # (targets,) the token to predict
    source: torch.Tensor        # (targets,) flat position row * length + column that predicts it
    response: torch.Tensor      # (targets,) sample * responses + response: where its logp is added
    pixels: torch.Tensor        # (images, 3, height, width); one grey picture if the batch has none
    index: torch.Tensor         # (samples,) index in the data set
    responses: int              # 1 or 2
    images: int                 # real images; 0 when `pixels` only keeps the encoder running
    dummy: bool = False         # weight zero: keeps ranks in step when one has nothing left
    ref: torch.Tensor | None = None     # (samples, responses) logps under the frozen reference

    def __len__(self):
        return len(self.index)

    def to(self, device):
        return replace(self, **{k: v.to(device, non_blocking=True) for k, v in vars(self).items()
                                if torch.is_tensor(v)})

    def pin_memory(self):       # the DataLoader asks for it
        return replace(self, **{k: v.pin_memory() for k, v in vars(self).items()
                                if torch.is_tensor(v)})


def packed(lengths):
    """Which samples go into which row: [[index]]. Rows a little longer than the longest sample,
    each next longest one into the emptiest: their lengths come out nearly equal."""
    bins = [[0, []] for _ in range(sum(lengths) // max(lengths))]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        emptiest = min(bins)
        emptiest[0] += lengths[i]
        emptiest[1].append(i)
    return [members for _, members in bins]


def collate(rows, pictures, index, image_size, paired, dummy=False, pack=False):
    """Rows, their pictures (a (3, H, W) tensor or None each) and data set indices -> Batch.
    paired: with the rejected responses. pack: several samples to a row, instead of padding."""
    lengths, responses, targets, pixels = [len(row.tokens) for row in rows], 1 + paired, [], []
    bins = packed(lengths) if pack else [[i] for i in range(len(rows))]
    width = max(sum(lengths[i] for i in members) for members in bins)
    columns = torch.zeros(4, len(bins), width, dtype=torch.long)
    columns[1] = -1
    for line, members in enumerate(bins):
        at = 0
        for i in members:
            row, n, start = rows[i], lengths[i], line * width + at
            own = row.tokens, [i] * n, row.segment, row.position
            columns[:, line, at:at + n], at = torch.tensor(own), at + n
            targets += [(token, start + source, i * responses + (paired and segment == 2))
                        for token, segment, target, _, source in zip(*row) if target]
            pixels += [pictures[i]] if pictures[i] is not None else []
    target, source, response = torch.tensor(targets, dtype=torch.long).view(-1, 3).T.contiguous()
    return Batch(*columns, target, source, response,
                 torch.stack(pixels) if pixels else torch.zeros(1, 3, image_size, image_size),
                 torch.tensor(index), responses, len(pixels), dummy)


def framed(image, c, resample):
    """What an encoder sees of an image, image_size a side, as the image processors of SigLIP
    (squeezed into a square) or CLIP (shortest edge resized, centre cut out). c: its EncoderConfig.
    """
    edge, size = c.shortest_edge, c.image_size
    width, height = (edge * n // min(image.size) if edge else size for n in image.size)
    if width * height > (Image.MAX_IMAGE_PIXELS or math.inf):
        raise ValueError(f"a strip of {image.size}, {(width, height)} when resized")
    left, top = (width - size) // 2, (height - size) // 2
    return image.resize((width, height), resample).crop((left, top, left + size, top + size))


def read_picture(image, c):
    """A file or an image -> as the encoder sees it, RGB; first frame, upright, without alpha."""
    with warnings.catch_warnings():             # up to twice its limit Pillow only warns
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        if not isinstance(image, Image.Image):
            image = Image.open(image, formats=PICTURES)
        image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":               # 16 bits: Pillow would clip, not scale
            image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
        return framed(image.convert("RGB"), c, c.resample)


class Prepare:
    """Samples -> Batch: the picture as the encoder wants it, the text as the LLM wants it.
    responses 1: a rejected response is left out. pack: see collate; prompts alone never are.
    end: the token id that ends a turn."""

    def __init__(self, tokenizer, template, encoder, max_length, responses, pack=False):
        self.tokenizer, self.template, self.encoder = tokenizer, template, encoder
        self.max_length, self.responses, self.pack = max_length, responses, pack
        if tokenizer:                           # None: for pictures alone
            self.end, = tokenizer.template(TEMPLATES[template].end) or [tokenizer.end]

    def row(self, sample, answers=True):
        return encode(sample, self.tokenizer, self.template, self.encoder.tokens, self.max_length,
                      self.responses if answers else 1)

    def picture(self, sample):
        """(3, H, W) float32, or None."""
        if sample.image is None:
            return None
        c = self.encoder
        try:
            image = np.array(read_picture(sample.image, c))
        except Exception as error:              # Pillow raises whatever it likes
            raise sample.wrong(f"cannot read picture {sample.image} ({error}); mend it") from None
        pixels = torch.from_numpy(image).permute(2, 0, 1).float() / 255
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (c.image_mean, c.image_std))
        return (pixels - mean) / std

    def __call__(self, samples, index=None, dummy=False, answers=True):
        """answers False: prompts only, for generation."""
        if not answers:
            samples = [replace(s, turns=[*s.turns[:-1], (s.turns[-1][0], None)]) for s in samples]
        rows, pictures = [self.row(s, answers) for s in samples], [self.picture(s) for s in samples]
        paired = self.responses == 2 and answers and any(s.rejected is not None for s in samples)
        return collate(rows, pictures, list(index or range(len(rows))), self.encoder.image_size,
                       paired, dummy, self.pack and answers)


@functools.lru_cache(2)
def permutation(length, seed):
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed))


def shuffled(step, batch, length, seed):
    """The sampler: data set indices of a step. A pure function of the step, so that resuming needs
    no state; every epoch is a new permutation, and batches run across its end."""
    return [int(permutation(length, seed * 1000003 + at // length)[at % length])
            for at in range(step * batch, (step + 1) * batch)]


class Steps(torch.utils.data.Dataset):
    """steps[k] = the micro-batches of this rank for step k. All ranks get equally many; one that
    runs short gets a dummy of weight zero, because collectives must be called by everyone.
    skipped: a file for what is wrong with bad samples; the next good one of the data set stands in
    for each, which depends on the data alone. None: the first bad sample stops the run."""

    def __init__(self, data, prepare, steps, batch, micro, seed, rank=0, world=1, skipped=None):
        self.data, self.prepare, self.steps, self.batch = data, prepare, steps, batch
        self.micro, self.seed, self.rank, self.world = micro, seed, rank, world
        self.skipped = skipped

    def __len__(self):
        return self.steps

    def good(self, i):
        """i, or the next sample that can be prepared."""
        for i in (k % len(self.data) for k in range(i, i + min(1000, len(self.data)))):
            try:
                return self.prepare([self.data[i]]) and i
            except BadInput as error:
                with open(self.skipped, "a") as f:      # one short write: ranks may share the file
                    f.write(f"{error}\n")
        raise BadInput(f"{self.skipped}: a thousand bad samples in a row, or all of them")

    def __getitem__(self, step):
        everyone, batches = shuffled(step, self.batch, len(self.data), self.seed), []
        for start in range(0, math.ceil(self.batch / self.world), self.micro):
            mine = everyone[self.rank::self.world][start:start + self.micro]
            index = mine or everyone[:1]
            try:
                batch = self.prepare([self.data[i] for i in index], index, dummy=not mine)
            except BadInput:
                if not self.skipped:
                    raise
                index = [self.good(i) for i in index]
                batch = self.prepare([self.data[i] for i in index], index, dummy=not mine)
            batches.append(batch)
        return batches


# ------------------------------------------------------------------------------- the embedded world

SHAPES = {"circle": "zero", "triangle": "three", "square": "four", "ell": "six", "arrow": "seven",
          "cross": "twelve"}                            # and their corners
COLORS = {"red": (215, 40, 40), "green": (40, 160, 60), "blue": (40, 80, 220),
          "orange": (245, 140, 20), "yellow": (235, 220, 60), "purple": (140, 50, 170)}
OPPOSITE = {"red": "green", "green": "red", "blue": "orange", "orange": "blue", "yellow": "purple",
            "purple": "yellow"}
SIZES = {"small": 9.0, "large": 11.5}                   # half the side, pixels
TEXTURES = ["plain", "striped", "dotted", "hollow"]
LETTERS = {"none": "", "a": "01110 10001 10001 11111 10001 10001 10001",
           "e": "11111 10000 10000 11110 10000 10000 11111",
           "o": "01110 10001 10001 10001 10001 10001 01110",
           "t": "11111 00100 00100 00100 00100 00100 00100",
           "x": "10001 10001 01010 00100 01010 10001 10001"}
DETAILS = {"color": COLORS, "shape": SHAPES, "size": SIZES, "texture": TEXTURES, "letter": LETTERS}
PLACES = ["top left", "top right", "bottom left", "bottom right"]
NUMBERS = ["zero", "one", "two", "three", "four"]
TILTS, GROUNDS = (-20, 0, 20), 4                        # drawn, never mentioned: for probes
SIDE, CELL, TILE = 48, 24, 28                           # pixels: picture, cell, an object's tile
OUTLINES = {"triangle": [(0, -1), (1, .8), (-1, .8)],
            "square": [(-.85, -.85), (.85, -.85), (.85, .85), (-.85, .85)],
            "ell": [(-.8, -1), (-.1, -1), (-.1, .3), (.8, .3), (.8, 1), (-.8, 1)],
            "arrow": [(0, -1), (.9, 0), (.35, 0), (.35, 1), (-.35, 1), (-.35, 0), (-.9, 0)],
            "cross": [(-.35, -1), (.35, -1), (.35, -.35), (1, -.35), (1, .35), (.35, .35),
                      (.35, 1), (-.35, 1), (-.35, .35), (-1, .35), (-1, -.35), (-.35, -.35)]}
SPLITS = ["validation", "test", "probe", "encoder", "llm", "align", "lookup", "instruct",
          "preferences", "pivot-align", "pivot"]            # no two share a scene

CATEGORY = {kind: category for category, kinds in {     # of all kinds of question
    "general": ["exist", "color", "shape"], "knowledge": ["complement", "corners"],
    "ocr": ["letter", "spot"], "vision": ["size", "texture", "where", "beside", "count"],
    }.items() for kind in kinds}
# questions about one detail of one object: wording, the detail, how its values are said
ATTRIBUTES = {name: (f"what {name} is {{}}", name, {}) for name in DETAILS} | {
              "letter": ("what letter is on {}", "letter", {}),
              "corners": ("how many corners has {}", "shape", SHAPES),
              "complement": ("which color complements {}", "color", OPPOSITE)}
LOOKUP = ["where"] * 6 + ["spot", "exist", "exist", "color", "letter", "size"]
TEXT_ONLY = "fact"                                      # a kind of question without a picture
FACTS = [("how many corners has a {}", SHAPES), ("which color complements {}", OPPOSITE)]
# free wording: which words are used says nothing about the picture
PHRASES = ["a {0.size} {0.color} {0.texture} {0.shape} with {1}",
           "a {0.texture} {0.shape}, {0.size} and {0.color}, with {1}",
           "a {0.shape} with {1}, {0.color}, {0.texture} and {0.size}",
           "a {0.color} {0.shape} that is {0.size} and {0.texture}, with {1}"]
OPENINGS = ["", "i see", "well,", "sure, this is", "as far as i can tell,", "in this picture:",
            "let me look closely:", "here is what i see:"]
JOINTS = ["{0} is {1}.", "{0}: {1}.", "then, {0} is {1}.", "at {0} there is {1}."]
CLOSINGS = ["", "that is all.", "i am quite sure.", "so it seems.", "nothing else stands out.",
            "i hope this helps."]


class Thing(namedtuple("Thing", "place shape color size texture letter tilt x y")):
    """One object of a scene; (x, y): its centre, pixels. Everything but tilt is talked about."""

    def text(self, phrase=PHRASES[0]):
        letter = "no letter" if self.letter == "none" else f"letter {self.letter}"
        return phrase.format(self, letter)


@functools.cache
def stencil(shape, size, texture, tilt):
    """An object's silhouette, and what of it the texture darkens: two (TILE, TILE) opacities."""
    ink, dark = (Image.new("L", (2 * TILE, 2 * TILE)) for _ in range(2))    # drawn twice as fine
    pen, r, angle = ImageDraw.Draw(ink), 2 * SIZES[size], math.radians(tilt)
    for r, fill in [(r, 255)] + [(.6 * r, 0)] * (texture == "hollow"):
        if shape == "circle":
            pen.ellipse([TILE - .95 * r] * 2 + [TILE + .95 * r] * 2, fill=fill)
        else:
            cos, sin = .9 * r * math.cos(angle), .9 * r * math.sin(angle)
            pen.polygon([(TILE + x * cos - y * sin, TILE + x * sin + y * cos)
                         for x, y in OUTLINES[shape]], fill=fill)
    pen = ImageDraw.Draw(dark)
    for i in range(0, 2 * TILE, 10):
        if texture == "striped":
            pen.rectangle([0, i, 2 * TILE, i + 4], fill=255)
        for j in range(0, 2 * TILE, 10) if texture == "dotted" else ():
            pen.ellipse([i, j, i + 6, j + 6], fill=255)
    return ink.reduce(2), ImageChops.multiply(ink, dark).reduce(2)


@functools.cache
def ground(kind):
    """(SIDE, SIDE, 1) float32 around zero: plain, slope, waves or checks."""
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    kinds = 0 * x, x + y - 1, np.sin(20 * (x - y)), np.sign(np.sin(25 * x) * np.sin(25 * y))
    return 28 * kinds[kind][..., None].astype(np.float32)


class Scene:
    """Two to four objects in a 2 x 2 grid, colours distinct; all follows from (split, number)."""

    def __init__(self, split, number):
        rng = self.rng = random.Random(f"{SPLITS.index(split)} {number}")
        colors, self.things = rng.sample(list(COLORS), 4), []
        for place, color in zip(sorted(rng.sample(range(4), rng.choice([2, 3, 4]))), colors):
            size = rng.choice(list(SIZES))
            slack = round(CELL / 2 - SIZES[size])
            x, y = (CELL * k + CELL // 2 + rng.randint(-slack, slack)
                    for k in (place % 2, place // 2))
            shape, texture, letter, tilt = (rng.choice(list(values))
                                            for values in (SHAPES, TEXTURES, LETTERS, TILTS))
            self.things.append(Thing(place, shape, color, size, texture, letter, tilt, x, y))
        self.ground, self.pixel_seed = rng.randrange(GROUNDS), rng.getrandbits(32)

    def image(self):
        noise = np.random.default_rng(self.pixel_seed)
        tone = 8 * noise.standard_normal((SIDE, SIDE, 3), dtype=np.float32) + ground(self.ground)
        tone += noise.uniform(110, 200) + noise.uniform(-15, 15, 3)
        picture = Image.fromarray(tone.clip(0, 255).astype(np.uint8))
        draw = ImageDraw.Draw(picture)
        for _ in range(6):                              # clutter: short strokes under the objects
            a, b = noise.integers(0, SIDE, 2).tolist()
            c, d = noise.integers(-6, 7, 2).tolist()
            draw.line([a, b, a + c, b + d], fill=tuple(noise.integers(60, 240, 3).tolist()))
        for t in self.things:
            corner, color = (t.x - TILE // 2, t.y - TILE // 2), COLORS[t.color]
            ink, dark = stencil(t.shape, t.size, t.texture, t.tilt)
            picture.paste(color, corner, ink)
            picture.paste(tuple(c // 3 for c in color), corner, dark)
            if t.letter != "none":                      # black on a white label
                draw.rectangle([t.x - 3, t.y - 4, t.x + 3, t.y + 4], fill=(250, 250, 250))
                draw.point([(t.x + i - 2, t.y + j - 3)
                            for j, bits in enumerate(LETTERS[t.letter].split())
                            for i in range(5) if bits[i] == "1"], fill=(10, 10, 10))
        return picture

    def mask(self, things):
        """(SIDE, SIDE) bool: the pixels that the things cover."""
        covered = Image.new("L", (SIDE, SIDE))
        for t in things:
            covered.paste(255, (t.x - TILE // 2, t.y - TILE // 2),
                          stencil(t.shape, t.size, "plain", t.tilt)[0])
        return np.array(covered) > 127

    def describe(self, things, words=None):
        """A text about one or all of the things; words draws its wording (None: terse)."""
        def draw(options):
            return words.choice(options) if words else options[0]

        if len(things) == 1:
            said = [things[0].text(draw(PHRASES)) + "." * bool(words)]
        else:
            said = [draw(JOINTS).format(PLACES[t.place], t.text(draw(PHRASES))) for t in things]
        return " ".join(filter(None, [draw(OPENINGS), *said, draw(CLOSINGS)]))

    def misread(self, thing, detail, rng, absent=False):
        """The thing with a detail wrong; absent, as colours are always: nothing here has it so."""
        others = self.things if absent or detail == "color" else [thing]
        wrong = [v for v in DETAILS[detail] if all(v != getattr(t, detail) for t in others)]
        return thing._replace(**{detail: rng.choice(wrong)})

    def one(self, detail, value):
        return [getattr(t, detail) for t in self.things].count(value) == 1

    def ask(self, kind, rng, words=None, errors=0., apart=False):
        """A question of a kind: (question, answer, wrong answer, things it is about, detail), or
        None if the scene does not allow it; the wrong answer is None where count finds none.
        Of descriptions: words: see describe; errors: share of imperfect answers; apart: the wrong
        answer is worded on its own, not as the right one.

        The wrong answer is drawn so that the two could be exchanged: given the question,
        (answer, wrong) and (wrong, answer) are equally likely over scenes, so that a model that
        does not look cannot prefer either."""
        thing = rng.choice(self.things)
        if kind in ATTRIBUTES:
            wording, detail, say = ATTRIBUTES[kind]
            key = PLACES[thing.place] if detail == "color" or rng.random() < .6 else thing.color
            if kind == "color" and rng.random() < .4 and self.one("shape", thing.shape):
                key = "the " + thing.shape
            pair = (getattr(t, detail) for t in (thing, self.misread(thing, detail, rng)))
            return wording.format(key), *(say.get(a, a) for a in pair), [thing], detail
        if kind == TEXT_ONLY:
            wording, say = rng.choice(FACTS)
            right, wrong = rng.sample(list(say), 2)
            return wording.format(right), say[right], say[wrong], [], kind
        if kind == "exist":
            yes, asked = rng.random() < .5, thing
            form = rng.choice([["color"], ["shape"], ["color", "shape"]])
            if not yes:         # of two words one is wrong, and may be there with other company
                wrong = form[0] if len(form) == 1 else "shape" if rng.random() < .5 else "color"
                asked = self.misread(thing, wrong, rng, absent=len(form) == 1)
            answers = ("yes", "no") if yes else ("no", "yes")
            what = " ".join(getattr(asked, detail) for detail in form)
            return f"is there any {what}", *answers, [thing] if yes else [], kind
        if kind in ("where", "spot"):
            what = thing.color if kind == "where" else f"letter {thing.letter}"
            if kind == "spot" and (thing.letter == "none" or not self.one("letter", thing.letter)):
                return None
            wrong = rng.choice([p for p in PLACES if p != PLACES[thing.place]])
            return f"where is {what}", PLACES[thing.place], wrong, [thing], "place"
        if kind == "beside":
            at = thing.place
            word, there = rng.choice([("beside", at ^ 1), ("above", at - 2), ("below", at + 2)])
            for other in self.things:
                if other.place == there:
                    return (f"what color is {word} {thing.color}", other.color,
                            self.misread(thing, "color", rng).color, [thing, other], "place")
            return None
        if kind == "count":     # wrong: another scene's answer to the same question, if it differs
            name = rng.choice(["size", "texture"])
            value = rng.choice(list(DETAILS[name]))
            here, there = ([t for t in scene.things if getattr(t, name) == value]
                           for scene in (self, Scene("probe", rng.getrandbits(40))))
            wrong = NUMBERS[len(there)] if len(there) != len(here) else None
            return f"how many are {value}", NUMBERS[len(here)], wrong, here, kind
        what, things = PLACES[thing.place], [thing]
        if kind == "scene":
            what, things = "the picture", self.things
        detail, seen = rng.choice(list(DETAILS)), thing
        if words and words.random() < errors:           # good, but not perfect: both are wrong here
            seen = self.misread(thing, words.choice([d for d in DETAILS if d != detail]), words)
        pair, seed = [seen, self.misread(seen, detail, rng)], words and words.random()
        said = [self.describe([one if t is thing else t for t in things],
                              words if apart or not words else random.Random(seed)) for one in pair]
        return f"describe {what}", *said, [thing], detail

    def mistakes(self, kind, things, said):
        """How many details a description has wrong: of one object or of the scene's four places."""
        parts = re.split(f"({'|'.join(PLACES)})", said)
        heard = dict(zip(parts[1::2], parts[2::2])) if kind == "scene" else {"": said}
        truth = {PLACES[t.place] if kind == "scene" else "": t for t in things}
        wrong = 0
        for place in {**heard, **truth}:
            text = heard.get(place, "")
            letters = re.findall(r"(?<!no )letter (\w)\b", text) + ["none"] * ("no letter" in text)
            for detail, values in DETAILS.items():
                found = [w for w in re.findall(r"\w+", text) if w in values]
                found = letters if detail == "letter" else found
                wrong += found != ([getattr(truth[place], detail)] if place in truth else [])
        return wrong


@dataclass
class World:
    """A data set drawn on demand: world[i] is the same Sample on every machine. Its content:

    captions     a picture and its description
    lookup       up to 12 questions about a picture, half of them "where is ..."
    instruct     every kind of question once, and a terse description
    text         a description in words, then questions about it: no picture
    preferences  one question, right and wrong answer: one word, one object or the scene
    questions    one question of each kind for each picture, and one without, for evaluation"""
    content: str
    split: str
    length: int
    wording: str = "free"   # of text and preferences; free: many ways, which say nothing about the
                            # picture, one way for both of a pair; apart: another for each; terse
    errors: float = .2      # share of described pairs whose chosen answer has a detail wrong, too
    kinds: list = field(default_factory=list)       # of preferences; none: all, one word (any of
                                                    # CATEGORY), "object" and "scene" equally often
    first: int = 0          # number of the first scene: runs of different seeds see different ones
    sampled: dict = field(default_factory=dict)     # {i: (chosen, rejected)} that a model gave
    asked = [*CATEGORY, TEXT_ONLY]          # kinds of content "questions", in turn
    longest = 8                             # tokens of an answer to these

    def __len__(self):
        return self.length

    def draw(self, i):
        """(scene, its random numbers for wording, kind, what Scene.ask says) of sample i."""
        each = len(self.asked) if self.content == "questions" else 1
        scene = Scene(self.split, self.first + i // each)
        words = random.Random(f"words {self.split} {self.first + i}")
        words, rng, asked, attempt = None if self.wording == "terse" else words, scene.rng, None, 0
        while self.content in ("questions", "preferences") and (not asked or asked[2] is None):
            if self.content == "preferences":           # no neighbours, no letter of its own: again
                kind = rng.choice(self.kinds or [rng.choice(list(CATEGORY)), "object", "scene"])
            else:
                kind, attempt = self.asked[i % each], attempt + 1
                scene = scene if attempt < 9 else Scene(self.split, f"{i} {attempt}")
            asked = scene.ask(kind, rng, words, self.errors, self.wording == "apart")
        return scene, words, asked and kind, asked

    def mistakes(self, i, said):
        """How wrong a response to preference i is: in details of a description, else 0 or 1."""
        scene, _, kind, (_, answer, _, things, _) = self.draw(i)
        if kind in CATEGORY:
            return int(said != answer)
        return scene.mistakes(kind, things if kind == "object" else scene.things, said)

    def __getitem__(self, i):
        scene, words, kind, asked = self.draw(i)
        kinds, rng, name = list(CATEGORY), scene.rng, f"{self.split}-{self.first + i}"
        if asked:
            question, answer, wrong, things, detail = asked
            answer, wrong = self.sampled.get(i, (answer, wrong))
            image = scene.image() if kind != TEXT_ONLY else None
            return Sample(name, image, [(question, answer)], wrong, kind, CATEGORY.get(kind, kind),
                          scene.mask(things), detail)
        caption = "describe the picture", scene.describe(scene.things)
        if self.content == "captions":
            return Sample(name, scene.image(), [caption])
        if self.content == "lookup":
            kinds = rng.choices(LOOKUP, k=12)
        else:
            rng.shuffle(kinds)
            kinds = kinds[:6] + ["scene"] if rng.random() < .25 else [*kinds, TEXT_ONLY, "object"]
        words = words if self.content == "text" else None      # the MLLM's instructions are terse
        turns = dict.fromkeys(a[:2] for a in (scene.ask(kind, rng, words) for kind in kinds) if a)
        if self.content != "text":
            return Sample(name, scene.image(), list(turns), separate=True)
        facts = [(say.format(what), answers[what]) for say, answers in FACTS
                 for what in [rng.choice(list(answers))]]
        return Sample(name, None, [caption, *turns, *facts])

    def fingerprint(self):
        """Changes when the world changes: a hash of what its first samples say and show."""
        digest = hashlib.sha256(repr(list(vars(self).values())).encode())
        for sample in map(self.__getitem__, range(24)):
            digest.update(repr((sample.turns, sample.rejected)).encode())
            digest.update(sample.image.tobytes() if sample.image else b"")
        return digest.hexdigest()


def train_tokenizer(folder, size=600):
    """The world's tokenizer, trained on its own captions and questions; deterministic. What they
    never have is spelled in bytes."""
    file, world = Path(folder) / "tokenizer.model", World("text", "llm", 1500)
    lines = [text for i in range(len(world)) for turn in world[i].turns for text in turn]
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file.with_suffix(".tmp"), "wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([*lines, *map(chr, range(32, 127))]), model_writer=model,
            vocab_size=size, model_type="bpe", byte_fallback=True, character_coverage=1.0,
            normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
            control_symbols=["<|im_start|>", "<|im_end|>"], num_threads=1,
            bos_id=-1, eos_id=-1, pad_id=-1, unk_id=0)
    os.replace(file.with_suffix(".tmp"), file)
    return Tokenizer(folder)


# ---------------------------------------------------------------------------------------- real data

FORMATS = [     # told by their keys: what is asked or said; the answer; a worse answer
    ["conversations"], ["messages"],                                        # LLaVA; its chat form
    ["question", "chosen", "rejected"], ["prompt", "chosen", "rejected"],   # MMPR; the paper, chat
    ["question", "answers"], ["question", "answer"]]                        # evaluation
ROLES = {"human": "user", "gpt": "assistant"} | {k: k for k in ("user", "assistant", "system")}
METRICS = ["exact", "relaxed", "anls", "vqa", "choice"]
PICTURES = ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"]    # others of Pillow's start programs
SUFFIXES = [".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp"]
WRONG = AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError


def spoken(said, role=None):
    """[(role, text)] of a text, a message {from, value} or {role, content}, or a list of these;
    content may be a list of {type: text | image, text}."""
    if isinstance(said, list):
        return [pair for message in said for pair in spoken(message, role)]
    if isinstance(said, dict):
        role = ROLES[said.get("from", said.get("role"))]
        said = said.get("value", said.get("content"))
        if isinstance(said, list):
            said = "\n".join("<image>" if p["type"] == "image" else p["text"] for p in said)
    said.encode()               # only a text can, and only one without lone surrogates
    return [(role, said)]


def parse(text, number, kind, file):
    """JSON of one record (bytes) -> Sample, whose image is a name; None if it has several, which
    are left out as in the paper."""
    try:
        record = json.loads(text.decode("utf-8-sig"))
        known = [keys for keys in FORMATS if isinstance(record, dict) and {*keys} <= {*record}]
        if not known:
            raise ValueError("not a JSON object with one of these sets of keys")
        keys, names = known[0], spoken(record.get("image") or record.get("images") or [])
        said, *right = (spoken(record[k], "assistant" if k != keys[0] else "user") for k in keys)
        said += right[0][:1] if right else []
        system = said.pop(0)[1] if said[0][0] == "system" else ""
        said = said[said[0][0] == "assistant":]             # as LLaVA: from the first question
        said = said[:len(said) - (said[-1][0] == "user")]   # ... to the last answer
        roles, texts = zip(*said)
        if roles != ("user", "assistant") * (len(said) // 2):
            raise ValueError("user and assistant do not take turns")
        if (metric := record.get("metric", "exact")) not in METRICS:
            raise ValueError("metric is none of " + ", ".join(METRICS))
    except WRONG as error:
        raise BadInput(f"{file}: sample {number}: {error}; a sample has the keys "
                       + " | ".join(map(", ".join, FORMATS)) + ", and perhaps image") from None
    if len(names) > 1 or names and sum(text.count("<image>") for text in texts[::2]) > 1:
        return None
    return Sample(
        str(record.get("id", number)), names[0][1] if names else None,
        list(zip(texts[::2], texts[1::2])), right[1][-1][1] if len(right) > 1 else None, kind,
        str(record.get("category", "all")), system=system, file=str(file), metric=metric,
        answers=tuple(a for _, a in right[0]) if len(right) == 1 else ())


def scan(file):
    """(number, first byte, text) of every line of a JSONL, or of every record of a JSON array."""
    with open(file, "rb") as f:
        is_array, at = f.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["), 0
        f.seek(0)
        for number, line in enumerate(() if is_array else f, 1):
            if line.strip():
                yield number, at, line
            at += len(line)
        text = f.read().decode("latin-1")           # a character is a byte: good enough to scan
    decode, gap, at = json.JSONDecoder().raw_decode, re.compile(r"[\s,]*"), text.find("[") + 1
    number, more = 0, is_array
    while more and not text.startswith("]", at := gap.match(text, at).end()):
        try:
            end = decode(text, at)[1]
        except (RecursionError, ValueError):        # `parse` will say what is wrong with the rest
            end, more = len(text), False
        yield (number := number + 1), at, text[at:end].encode("latin-1")
        at = end


class Records:
    """Samples of a file in any of the FORMATS, or of all files that MMPR's meta.json names. They
    are found once, then read one at a time through an index beside the file, mapped into memory:
    every sample's file, number, first byte and length.
    preferences: have the samples a rejected answer? left_out, suspect: {reason: how many}
    skip: records that cannot be read stay in, and are an error only when they are asked for"""

    def __init__(self, file, image_root=None, skip=False):
        self.file, folder, self.skip = Path(file), Path(file).absolute().parent, skip
        bases = [Path(base).absolute() for base in (image_root, folder, folder.parent) if base]
        meta = {self.file.stem: {"annotation": self.file.absolute(), "root": bases[0]}}

        def found(path):
            there = [base / path for base in bases if (base / path).exists()]
            if not there:
                raise BadInput(f"{file}: {path} is not in {' or '.join(map(str, bases))}; unzip it "
                               "there (MMPR into a folder of its name), or give --image-root")
            return os.path.normpath(there[0])

        try:
            with open(file, "rb") as f:
                if b'"annotation"' in f.read(4096):
                    meta = json.loads(self.file.read_text("utf-8"))
            self.parts = [[kind, found(part["annotation"]), found(part["root"])]
                          for kind, part in meta.items()]
            stats = [os.stat(path) for _, path, _ in self.parts]
            stamp = repr([skip, *((s.st_size, s.st_mtime_ns) for s in stats)])
            if not (folder.stat().st_mode & 0o222 and os.access(folder, os.W_OK)):  # root may
                folder = Path.home() / ".cache/pivot" / folder.relative_to("/")
                folder.mkdir(parents=True, exist_ok=True)
            index = folder / f"{self.file.name}.index"
            try:
                with safe_open(index, "pt") as f:
                    known, rows = f.metadata() or {}, f.get_tensor("rows")
            except (OSError, SafetensorError):      # there is none, or it is damaged
                known = {}
            if known.get("stamp") != stamp:
                rows, numbers = self.build()
                known = {"stamp": stamp, "numbers": json.dumps(numbers)}
                part = folder / f"{index.name}.{os.urandom(4).hex()}.part"
                save_file({"rows": rows}, part, known)
                os.replace(part, index)
        except (OSError, SafetensorError, *WRONG) as error:
            raise BadInput(f"{file}: cannot be read ({error!r})") from None
        self.rows = rows.numpy()
        self.size = len(self.rows)              # of the file, whatever is selected from it
        self.digest, self.preferences, self.left_out, self.suspect = json.loads(known["numbers"])

    def build(self):
        """Find all samples; each is parsed, so that training does not stop at a bad one.
        Returns (samples, 4) int64 and [digest, preferences, left_out, suspect]."""
        rows, contents, digest = array("q"), array("q"), hashlib.sha256()
        several, pairs, suspect = 0, 0, Counter()
        for part, (kind, file, _) in enumerate(self.parts):
            bar = tqdm(scan(file), f"{file}: index, only once", unit="", leave=False, disable=None)
            for number, start, text in bar:
                digest.update(text)
                try:
                    sample = parse(text, number, kind, file)
                    if sample is None:
                        several += 1
                        continue
                    chosen, rejected = sample.turns[-1][1], sample.rejected
                    pairs += rejected is not None
                    suspect["have the same chosen and rejected response"] += chosen == rejected
                    suspect["have an empty response"] += not (chosen.strip() and (
                        rejected is None or rejected.strip()))
                    contents.append(hash((kind, sample.image, *sample.turns, rejected)))
                except BadInput:
                    if not self.skip:
                        raise
                rows.extend((part, number, start, len(text)))
        found, good = len(rows) // 4, len(contents)
        if not good or pairs not in (0, good):
            raise BadInput(f"{self.file}: {found or 'no'} samples, {pairs} of them with "
                           f"\"rejected\", {several} left out: give some, with it in all or none")
        suspect["are there before"] = good - len(np.unique(contents))
        return (torch.frombuffer(rows, dtype=torch.int64).view(found, 4),
                [digest.hexdigest(), pairs > 0, {"several pictures": several}, suspect])

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        part, number, start, size = self.rows[i].tolist()
        kind, file, root = self.parts[part]
        with open(file, "rb") as f:
            f.seek(start)
            sample = parse(f.read(size), number, kind, file)
        if sample.image:
            image = Path(os.path.normpath(os.path.join(root, sample.image)))
            if Path(root) not in image.parents:
                raise sample.wrong(f"image {image} is outside {root}; give its --image-root")
            others = [image, *map(image.with_suffix, SUFFIXES)]     # MMPR says .jpg of some .gif
            sample.image = next(filter(os.path.isfile, others), image)
        return sample

    def select(self, prepare, take=None, seed=0, max_prompt_chosen=None):
        """The paper's selection: the first `take` (None: all) after a seeded shuffle, without those
        whose prompt and chosen answer have more than `max_prompt_chosen` tokens. Returns itself."""
        kept, self.left_out["too long"], order = [], 0, permutation(len(self), seed).tolist()
        for i in tqdm(order, "selecting", leave=False, disable=None):
            if take and len(kept) == take:
                break
            try:
                fits = not max_prompt_chosen or max_prompt_chosen >= len(encode(
                    self[i], prepare.tokenizer, prepare.template, prepare.encoder.tokens,
                    max_length=1 << 30, responses=1).tokens)
            except BadInput:                        # not for its length: Steps will find it
                fits = True
            self.left_out["too long"] += not fits
            kept += [i] if fits else []
        if not kept:
            raise BadInput(f"{self.file}: no sample has at most {max_prompt_chosen} tokens")
        self.rows = self.rows[kept]
        self.digest = hashlib.sha256(self.digest.encode() + self.rows.tobytes()).hexdigest()
        return self

    def fingerprint(self):
        """Of all lines, kept in the index, and of what is selected from them."""
        return self.digest
