"""What goes in: the embedded world, readers of real data, tokenizer, chat template, batches.

A sample is a picture, a conversation and, for preferences, a second answer to its last question. It becomes one row
of tokens in which every token has a `segment`: 0 = prompt, 1 = chosen response, 2 = rejected response (model.visible
says who sees whom). The prompt, with its several hundred image tokens, stands there once, not once per response.
"""
import functools
import hashlib
import io
import json
import math
import random
import re
from collections import Counter
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from PIL import Image, ImageChops, ImageDraw

CHOSEN, REJECTED = 0, 1     # columns of logps: (samples, responses)
IMAGE = -1                  # token id of an image position: no text can spell it


class BadInput(Exception):
    """Something the user gave is wrong. The message is one line: what, where, what to do."""


@dataclass
class Sample:
    """One example. `turns` are (question, answer) pairs; `rejected` is another answer to the last question."""
    id: str
    image: Image.Image | Path | None
    turns: list
    rejected: str | None = None
    kind: str = ""                      # question type, for tables
    category: str = ""                  # general | knowledge | ocr | vision
    region: np.ndarray | None = None    # (H, W) bool: what the question, or the differing detail, is about
    separate: bool = False              # the turns are conversations of their own, and none sees another


# ---------------------------------------------------------------------------------------------------------- tokenizer

SPECIAL = ["<|im_start|>", "<|im_end|>"]
# a template: before the question, between question and answer, after the answer (its first token ends the turn)
TEMPLATES = {"plain": ("", "", "<|im_end|>"),
             "chatml": ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n")}


class Tokenizer:
    """A sentencepiece model. Special tokens are control symbols: `encode` never makes them from text."""

    def __init__(self, folder):
        self.file = Path(folder) / "tokenizer.model"
        if not self.file.exists():
            raise BadInput(f"{self.file}: not found; an LLM folder needs its tokenizer beside the weights")
        self.sp = sentencepiece.SentencePieceProcessor(model_file=str(self.file))
        self.special = {self.sp.id_to_piece(i): i for i in range(len(self)) if self.sp.is_control(i)}
        self.end = self.special["<|im_end|>"]

    def __len__(self):
        return self.sp.get_piece_size()

    def encode(self, text):
        return self.sp.encode(text)

    def decode(self, ids):
        return self.sp.decode([int(i) for i in ids])

    def template(self, text):
        """Token ids of a piece of a template, the only text in which special tokens count."""
        parts = re.split("(" + "|".join(map(re.escape, SPECIAL)) + ")", text)
        return [i for part in parts if part
                for i in ([self.special[part]] if part in self.special else self.sp.encode(part))]

    @staticmethod
    def train(lines, folder, size):
        """Train on `lines`; deterministic. Byte fallback: whatever the lines never had is spelled in bytes."""
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, vocab_size=size, model_type="bpe", byte_fallback=True,
            control_symbols=SPECIAL, normalization_rule_name="identity", remove_extra_whitespaces=False,
            character_coverage=1.0, num_threads=1, minloglevel=2, bos_id=-1, eos_id=-1, pad_id=-1, unk_id=0)
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "tokenizer.model").write_bytes(model.getvalue())
        return Tokenizer(folder)


# ------------------------------------------------------------------------------------------------------ rows and batches

@dataclass
class Row:
    """One sample as tokens. Positions of every segment but the prompt start again where the prompt ends."""
    tokens: list
    segment: list
    target: list        # bool: does this token count in the loss?
    position: list
    source: list        # column that predicts the token: the one before, or the prompt's last


def encode(sample, tokenizer, template, image_tokens, max_length):
    """Sample -> Row. Image tokens are never cut: a long response loses its end (and so its end-of-turn target);
    a prompt that leaves no room for a response is an error. Without an answer (None) only the prompt is built."""
    before, between, after = (tokenizer.template(part) for part in TEMPLATES[template])
    image = [IMAGE] * image_tokens if sample.image is not None else []

    def ask(question, image):
        parts = question.split("<image>") if image else [question]
        if len(parts) > 2:
            raise BadInput(f"sample {sample.id}: more than one <image> for one picture; leave the sample out")
        if len(parts) < 2:
            parts = ["", question]                                      # no placeholder: the image goes first
        head, tail = (tokenizer.encode(p.strip()) if p.strip() else [] for p in parts)
        return before + head + image + tail + between

    def say(answer):
        return tokenizer.encode(answer) + after[:1] if answer is not None else []

    pieces = [(image, 0, False)] if sample.separate else []             # (ids, segment, target)
    for number, (question, answer) in enumerate(sample.turns):
        if sample.separate:
            pieces += [(ask(question, []), number + 1, False), (say(answer), number + 1, True)]
            continue
        context = sample.rejected is not None and number < len(sample.turns) - 1    # earlier turns are its prompt
        pieces += [(ask(question, image if number == 0 else []), 0 if context or not pieces else pieces[-1][1], False),
                   (say(answer), 0 if context else 1, not context)]
        if number < len(sample.turns) - 1:
            pieces += [(after[1:], 0 if context else 1, False)]
    if sample.rejected is not None:
        pieces += [(say(sample.rejected), 2, True)]

    prompt, row = sum(len(ids) for ids, segment, _ in pieces if segment == 0), Row([], [], [], [], [])
    if prompt >= max_length:
        raise BadInput(f"sample {sample.id}: its prompt has {prompt} tokens ({len(image)} of the image), the limit is "
                       f"{max_length}; raise --max-length or leave the sample out")
    following = Counter()                                               # the next position of each segment
    for ids, segment, target in pieces:
        for i in ids:
            n = following[segment] + (prompt if segment else 0)
            following[segment] += 1
            if n < max_length:
                fresh = segment and n == prompt                         # a response's first token
                row.source.append((prompt if fresh else len(row.tokens)) - 1)
                row.tokens.append(i)
                row.segment.append(segment)
                row.target.append(target)
                row.position.append(n)
    if prompt == 0 and row.target[:1] == [True]:
        raise BadInput(f"sample {sample.id}: nothing stands before its answer; give it a question or a picture")
    return row


@dataclass
class Batch:
    """Rows of equal length; the unit that the model sees. Padding has sample -1. Targets are listed flat."""
    tokens: torch.Tensor        # (rows, length) token ids, IMAGE where image features go
    sample: torch.Tensor        # (rows, length) which sample of the batch a token belongs to
    segment: torch.Tensor       # (rows, length) 0 prompt, 1 chosen, 2 rejected
    position: torch.Tensor      # (rows, length) position within prompt + response
    target: torch.Tensor        # (targets,) the token to predict
    source: torch.Tensor        # (targets,) flat position row * length + column that predicts it
    response: torch.Tensor      # (targets,) sample * responses + response: where its log-probability is added
    pixels: torch.Tensor        # (images, 3, height, width); one black picture if the batch has none
    index: torch.Tensor         # (samples,) index in the data set
    responses: int              # 1 or 2
    images: int                 # real images; 0 when `pixels` only keeps the encoder running
    dummy: bool = False         # weight zero: keeps ranks in step when one has nothing left
    ref: torch.Tensor | None = None     # (samples, responses) log-probabilities under the frozen reference

    def __len__(self):
        return len(self.index)

    def to(self, device):
        move = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(**{k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in move.items()})


def collate(rows, pictures, index, image_size, paired, dummy=False):
    """Rows, their pictures (a (3, H, W) tensor or None each) and data set indices -> Batch. paired: with rejected."""
    length, responses = max(len(r.tokens) for r in rows), 2 if paired else 1
    tokens, segment, position = (torch.zeros(len(rows), length, dtype=torch.long) for _ in range(3))
    owner = torch.full((len(rows), length), -1)
    target, source, response = [], [], []
    for i, row in enumerate(rows):
        n = len(row.tokens)
        tokens[i, :n], segment[i, :n], position[i, :n] = (torch.tensor(x) for x in (row.tokens, row.segment, row.position))
        owner[i, :n] = i
        counted = [t for t in range(n) if row.target[t]]
        target += [row.tokens[t] for t in counted]
        source += [i * length + row.source[t] for t in counted]
        response += [i * responses + (paired and row.segment[t] == 2) for t in counted]
    pixels = [p for p in pictures if p is not None]
    return Batch(tokens, owner, segment, position, torch.tensor(target, dtype=torch.long),
                 torch.tensor(source, dtype=torch.long), torch.tensor(response, dtype=torch.long),
                 torch.stack(pixels) if pixels else torch.zeros(1, 3, image_size, image_size),
                 torch.tensor(index), responses, len(pixels), dummy)


class Prepare:
    """Samples -> Batch: the picture as the encoder wants it, the text as the LLM wants it."""

    def __init__(self, tokenizer, template, encoder, max_length, responses):
        self.tokenizer, self.template, self.max_length = tokenizer, template, max_length
        self.responses = responses          # 1: the rejected response, if there is one, is left out
        self.image_size, self.image_tokens = encoder.image_size, encoder.tokens
        self.mean, self.std = (torch.tensor(v).view(3, 1, 1) for v in (encoder.image_mean, encoder.image_std))

    def row(self, sample):
        return encode(sample, self.tokenizer, self.template, self.image_tokens, self.max_length)

    def picture(self, sample):
        """(3, H, W) float32, or None. Squared by resizing, as SigLIP does; alpha is dropped."""
        image = sample.image
        if image is None:
            return None
        if not isinstance(image, Image.Image):
            try:
                image = Image.open(image)
                image.load()
            except Exception as error:
                raise BadInput(f"{sample.image}: sample {sample.id}: cannot read the picture ({error})") from None
        image = image.convert("RGB")
        if image.size != (self.image_size,) * 2:
            image = image.resize((self.image_size,) * 2, Image.Resampling.BICUBIC)
        return (torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 - self.mean) / self.std

    def __call__(self, samples, index=None, dummy=False, blank=False, answers=True):
        """blank: grey pictures, for the control. answers False: prompts only, for generation."""
        if self.responses == 1:
            samples = [replace(s, rejected=None) for s in samples]
        if not answers:
            samples = [replace(s, rejected=None, turns=[*s.turns[:-1], (s.turns[-1][0], None)]) for s in samples]
        rows = [self.row(s) for s in samples]
        pictures = [self.picture(s) for s in samples]
        if blank:
            pictures = [None if p is None else torch.zeros_like(p) for p in pictures]
        paired = any(s.rejected is not None for s in samples)
        return collate(rows, pictures, list(index or range(len(rows))), self.image_size, paired, dummy)


def shuffled(step, batch, length, seed):
    """The sampler: data set indices of a step. A pure function of the step, so that resuming needs no state; every
    epoch is a new permutation, and batches run across its end."""
    picked, orders = [], {}
    for at in range(step * batch, (step + 1) * batch):
        epoch = at // length
        if epoch not in orders:
            orders[epoch] = torch.randperm(length, generator=torch.Generator().manual_seed(seed * 1000003 + epoch))
        picked.append(int(orders[epoch][at % length]))
    return picked


class Steps(torch.utils.data.Dataset):
    """steps[k] = the micro-batches of this rank for step k. All ranks get equally many; one that runs short gets a
    dummy of weight zero, because collectives must be called by everyone."""

    def __init__(self, data, prepare, steps, batch, micro, seed, rank=0, world=1):
        self.data, self.prepare, self.steps, self.batch, self.seed = data, prepare, steps, batch, seed
        self.rank, self.world, self.micro = rank, world, min(micro, math.ceil(batch / world))

    def __len__(self):
        return self.steps

    def __getitem__(self, step):
        everyone = shuffled(step, self.batch, len(self.data), self.seed)
        mine, batches = everyone[self.rank::self.world], []
        for start in range(0, math.ceil(self.batch / self.world), self.micro):
            index = mine[start:start + self.micro]
            dummy = not index
            index = index or everyone[:1]
            batches.append(self.prepare([self.data[i] for i in index], index, dummy))
        return batches


# ---------------------------------------------------------------------------------------------------- the embedded world

SHAPES = {"circle": "zero", "triangle": "three", "square": "four", "ell": "six", "arrow": "seven", "cross": "twelve"}
COLORS = {"red": (215, 40, 40), "green": (40, 160, 60), "blue": (40, 80, 220), "orange": (245, 140, 20),
          "yellow": (235, 220, 60), "purple": (140, 50, 170)}
OPPOSITE = {"red": "green", "green": "red", "blue": "orange", "orange": "blue", "yellow": "purple",
            "purple": "yellow"}
SIZES = {"small": 9.0, "large": 11.5}                   # half the side, in pixels
TEXTURES = ["plain", "striped", "dotted", "hollow"]
LETTERS = {"A": "01110 10001 10001 11111 10001 10001 10001", "E": "11111 10000 10000 11110 10000 10000 11111",
           "O": "01110 10001 10001 10001 10001 10001 01110", "T": "11111 00100 00100 00100 00100 00100 00100",
           "X": "10001 10001 01010 00100 01010 10001 10001"}
PLACES = ["top left", "top right", "bottom left", "bottom right"]
NUMBERS = ["zero", "one", "two", "three", "four"]
TILTS, GROUNDS = (-20, 0, 20), 4                        # drawn, never mentioned in any text: for probes
SIDE, CELL, TILE = 48, 24, 28                           # pixels: picture, grid cell, tile that an object is drawn on
OUTLINES = {"triangle": [(0, -1), (1, .8), (-1, .8)], "square": [(-.85, -.85), (.85, -.85), (.85, .85), (-.85, .85)],
            "ell": [(-.8, -1), (-.1, -1), (-.1, .3), (.8, .3), (.8, 1), (-.8, 1)],
            "arrow": [(0, -1), (.9, 0), (.35, 0), (.35, 1), (-.35, 1), (-.35, 0), (-.9, 0)],
            "cross": [(x * a, y * b) for x, y, a, b in [(-1, -1, .35, 1), (1, -1, .35, 1), (1, -1, .35, .35),
                      (1, -1, 1, .35), (1, 1, 1, .35), (1, 1, .35, .35), (1, 1, .35, 1), (-1, 1, .35, 1),
                      (-1, 1, .35, .35), (-1, 1, 1, .35), (-1, -1, 1, .35), (-1, -1, .35, .35)]]}
SPLITS = ["validation", "test", "probe", "encoder", "llm", "align", "lookup", "instruct", "preferences"]


@dataclass
class Thing:
    """One object of a scene. Everything but tilt is talked about."""
    place: int
    shape: str
    color: str
    size: str
    texture: str
    letter: str     # "" = none
    tilt: int
    x: int          # centre, pixels
    y: int

    def text(self):
        letter = f"letter {self.letter.lower()}" if self.letter else "no letter"
        return f"a {self.size} {self.color} {self.texture} {self.shape} with {letter}"


@functools.cache
def stencil(shape, size, texture, tilt):
    """An object's silhouette and the part of it that its texture darkens: two (TILE, TILE) opacities, "L"."""
    ink, dark = (Image.new("L", (2 * TILE, 2 * TILE)) for _ in range(2))        # drawn twice as fine and reduced
    r, angle = 2 * SIZES[size], math.radians(tilt)

    def paint(r, fill):
        if shape == "circle":
            ImageDraw.Draw(ink).ellipse([TILE - .95 * r, TILE - .95 * r, TILE + .95 * r, TILE + .95 * r], fill=fill)
        else:
            cos, sin = .9 * r * math.cos(angle), .9 * r * math.sin(angle)
            ImageDraw.Draw(ink).polygon([(TILE + x * cos - y * sin, TILE + x * sin + y * cos)
                                         for x, y in OUTLINES[shape]], fill=fill)

    paint(r, 255)
    if texture == "hollow":
        paint(.6 * r, 0)
    pen = ImageDraw.Draw(dark)
    for i in range(0, 2 * TILE, 10):
        if texture == "striped":
            pen.rectangle([0, i, 2 * TILE, i + 4], fill=255)
        for j in range(0, 2 * TILE, 10) if texture == "dotted" else ():
            pen.ellipse([i, j, i + 6, j + 6], fill=255)
    return ink.reduce(2), ImageChops.multiply(ink, dark).reduce(2)


@functools.cache
def ground(kind):
    """(SIDE, SIDE, 1) float32: plain, slope, waves or checks, around zero."""
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    kinds = 0 * x, x + y - 1, np.sin(20 * (x - y)), np.sign(np.sin(25 * x) * np.sin(25 * y))
    return 28 * kinds[kind][..., None].astype(np.float32)


class Scene:
    """Two to four objects in a 2 x 2 grid, colours distinct; everything follows from (split, number)."""

    def __init__(self, split, number):
        rng = self.rng = random.Random(f"{SPLITS.index(split)} {number}")
        self.split, self.number = split, number
        colors = rng.sample(list(COLORS), 4)
        self.things = []
        for place, color in zip(sorted(rng.sample(range(4), rng.choice([2, 3, 4]))), colors):
            size = rng.choice(list(SIZES))
            slack = round(CELL / 2 - SIZES[size])
            self.things.append(Thing(
                place, rng.choice(list(SHAPES)), color, size, rng.choice(TEXTURES), rng.choice(["", *LETTERS]),
                rng.choice(TILTS), place % 2 * CELL + CELL // 2 + rng.randint(-slack, slack),
                place // 2 * CELL + CELL // 2 + rng.randint(-slack, slack)))
        self.ground, self.pixel_seed = rng.randrange(GROUNDS), rng.getrandbits(32)

    def mask(self, things):
        """(SIDE, SIDE) bool: the pixels that the things cover."""
        covered = Image.new("L", (SIDE, SIDE))
        for t in things:
            covered.paste(255, (t.x - TILE // 2, t.y - TILE // 2), stencil(t.shape, t.size, "plain", t.tilt)[0])
        return np.array(covered) > 127

    def image(self):
        noise = np.random.default_rng(self.pixel_seed)
        tone = 8 * noise.standard_normal((SIDE, SIDE, 3), dtype=np.float32) + ground(self.ground)
        tone += noise.uniform(110, 200) + noise.uniform(-15, 15, 3)
        picture = Image.fromarray(tone.clip(0, 255).astype(np.uint8))
        draw = ImageDraw.Draw(picture)
        for _ in range(6):                              # clutter: short strokes of any colour under the objects
            a, b, c, d = noise.integers(0, SIDE, 2).tolist() + noise.integers(-6, 7, 2).tolist()
            draw.line([a, b, a + c, b + d], fill=tuple(noise.integers(60, 240, 3).tolist()))
        for t in self.things:
            corner, color = (t.x - TILE // 2, t.y - TILE // 2), COLORS[t.color]
            ink, dark = stencil(t.shape, t.size, t.texture, t.tilt)
            picture.paste(color, corner, ink)
            picture.paste(tuple(c // 3 for c in color), corner, dark)
            if t.letter:                                # black on a white label
                draw.rectangle([t.x - 3, t.y - 4, t.x + 3, t.y + 4], fill=(250, 250, 250))
                rows = LETTERS[t.letter].split()
                draw.point([(t.x + i - 2, t.y + j - 3) for j in range(7) for i in range(5) if rows[j][i] == "1"],
                           fill=(10, 10, 10))
        return picture

    # ---- the text

    def caption(self, things=None):
        return " ".join(f"{PLACES[t.place]} is {t.text()}." for t in things or self.things)

    def ask(self, kind, rng):
        """A question of a kind: (question, answer, wrong answer, things it is about), or None if the scene has none.

        The wrong answer is drawn so that the two could be exchanged: given the question, (answer, wrong) and
        (wrong, answer) are equally likely over scenes, so a model that does not look cannot prefer either."""
        thing = rng.choice(self.things)
        absent = [c for c in COLORS if c not in {t.color for t in self.things}]
        key = PLACES[thing.place] if kind in ("color", "complement") or rng.random() < .6 else thing.color

        def other(values, value):
            return rng.choice([v for v in values if v != value])

        if kind == "exist":
            yes, form = rng.random() < .5, rng.choice(["{0}", "{1}", "{0} {1}"])
            color, shape = thing.color, thing.shape
            if not yes and form == "{1}":
                shape = rng.choice([s for s in SHAPES if s not in {t.shape for t in self.things}])
            elif not yes and form == "{0} {1}" and rng.random() < .5:
                shape = other(SHAPES, shape)        # the colour is there, in another shape
            elif not yes:
                color = rng.choice(absent)
            question = "is there any " + form.format(color, shape)
            return question, "yes" if yes else "no", "no" if yes else "yes", [thing] if yes else []
        if kind == "color":
            if rng.random() < .4 and sum(t.shape == thing.shape for t in self.things) == 1:
                key = "the " + thing.shape
            return f"what color is {key}", thing.color, rng.choice(absent), [thing]
        if kind == "complement":
            return f"which color complements {key}", OPPOSITE[thing.color], OPPOSITE[rng.choice(absent)], [thing]
        if kind == "shape":
            return f"what shape is {key}", thing.shape, other(SHAPES, thing.shape), [thing]
        if kind == "corners":
            return f"how many corners has {key}", SHAPES[thing.shape], SHAPES[other(SHAPES, thing.shape)], [thing]
        if kind == "texture":
            return f"what texture is {key}", thing.texture, other(TEXTURES, thing.texture), [thing]
        if kind == "size":
            return f"what size is {key}", thing.size, other(SIZES, thing.size), [thing]
        if kind == "letter":
            names = {"": "none", **{c: c.lower() for c in LETTERS}}
            return f"what letter is on {key}", names[thing.letter], names[other(names, thing.letter)], [thing]
        if kind in ("where", "spot"):
            if kind == "spot" and (not thing.letter or sum(t.letter == thing.letter for t in self.things) > 1):
                return None
            what = thing.color if kind == "where" else f"letter {thing.letter.lower()}"
            return f"where is {what}", PLACES[thing.place], other(PLACES, PLACES[thing.place]), [thing]
        if kind == "beside":
            step, word = rng.choice([(1, "beside"), (2, "above"), (2, "below")])
            there = [t for t in self.things if t.place == thing.place ^ step]
            if not there or word == "above" and thing.place < 2 or word == "below" and thing.place > 1:
                return None
            return f"what color is {word} {thing.color}", there[0].color, rng.choice(absent), [thing, there[0]]
        if kind == "count":
            name, value = rng.choice([("size", s) for s in SIZES] + [("texture", t) for t in TEXTURES])
            counted = [t for t in self.things if getattr(t, name) == value]
            # another scene's answer to the same question; None where it is the same one
            wrong = sum(getattr(t, name) == value for t in Scene("probe", rng.getrandbits(40)).things)
            wrong = NUMBERS[wrong] if wrong != len(counted) else None
            return f"how many are {value}", NUMBERS[len(counted)], wrong, counted
        if kind == "object":
            wrong, _ = self.misread(thing, rng)
            return f"describe {PLACES[thing.place]}", thing.text(), wrong.text(), [thing]
        if kind == "scene":
            wrong, detail = self.misread(thing, rng)
            text = self.caption([wrong if t is thing else t for t in self.things])
            return "describe the picture", self.caption(), text, [thing]
        raise KeyError(kind)

    def misread(self, thing, rng):
        """The thing with one detail wrong, and which. A wrong colour is one that the scene does not have."""
        detail = rng.choice(["color", "shape", "size", "texture", "letter"])
        taken = {t.color for t in self.things} if detail == "color" else {getattr(thing, detail)}
        values = {"color": COLORS, "shape": SHAPES, "size": SIZES, "texture": TEXTURES, "letter": ["", *LETTERS]}
        return replace(thing, **{detail: rng.choice([v for v in values[detail] if v not in taken])}), detail


CATEGORY = {"exist": "general", "color": "general", "shape": "general", "complement": "knowledge",
            "corners": "knowledge", "letter": "ocr", "spot": "ocr", "size": "vision", "texture": "vision",
            "where": "vision", "beside": "vision", "count": "vision"}
LOOKUP = ["where"] * 6 + ["spot", "exist", "exist", "color", "letter", "size"]      # the curriculum's questions


class World:
    """A data set drawn on demand: world[i] is the same Sample on every machine.

    content   captions     a picture and its description
              lookup       12 questions about a picture, half of them "where is ..."
              instruct     every kind of question once, and a description
              text         a description in words, then questions about it: no picture
              preferences  one question, right and wrong answer: a third one word, one object, the whole scene
              questions    one question of each kind for each picture, for evaluation"""

    def __init__(self, content, split, length):
        self.content, self.split, self.length = content, split, length

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        kinds, name = list(CATEGORY), f"{self.split}-{i}"
        if self.content == "questions":
            number, kind = divmod(i, len(kinds))
            scene, asked, attempt = None, None, 0
            while not asked:                        # not every scene has a letter of its own, or neighbours
                scene, attempt = Scene(self.split, f"{number}/{attempt}" if attempt else number), attempt + 1
                asked = scene.ask(kinds[kind], random.Random(f"{name} {attempt}"))
            return self.question(scene, name, kinds[kind], asked)
        scene = Scene(self.split, i)
        rng = scene.rng
        if self.content == "captions":
            return Sample(name, scene.image(), [("describe the picture", scene.caption())])
        if self.content == "preferences":
            while True:
                kind = rng.choice([rng.choice(kinds), "object", "scene"])
                asked = scene.ask(kind, rng)
                if asked and asked[2]:
                    return replace(self.question(scene, name, kind, asked), rejected=asked[2])
        if self.content == "lookup":
            kinds = rng.choices(LOOKUP, k=12)
        elif rng.random() < .75:
            kinds = rng.sample(kinds, len(kinds)) + ["object"]
        else:
            kinds = rng.sample(kinds, 6) + ["scene"]
        turns = [asked[:2] for asked in (scene.ask(kind, rng) for kind in kinds) if asked]
        if self.content == "text":                  # the words alone, and what they cannot say of the world at large
            shape, color = rng.choice(list(SHAPES)), rng.choice(list(COLORS))
            turns = [("describe the picture", scene.caption()), *turns,
                     (f"how many corners has a {shape}", SHAPES[shape]),
                     (f"which color complements {color}", OPPOSITE[color])]
        return Sample(name, None if self.content == "text" else scene.image(), list(dict.fromkeys(turns)),
                      separate=self.content != "text")

    @staticmethod
    def question(scene, name, kind, asked):
        question, answer, _, things = asked
        return Sample(name, scene.image(), [(question, answer)], None, kind, CATEGORY.get(kind, kind),
                      scene.mask(things) if things else None)

    def fingerprint(self):
        """Changes when the world changes: a hash of what its first samples say and show."""
        digest = hashlib.sha256(f"{self.content} {self.split} {self.length}".encode())
        for i in range(24):
            sample = self[i]
            digest.update(repr((sample.turns, sample.rejected)).encode())
            digest.update(sample.image.tobytes() if sample.image else b"")
        return digest.hexdigest()


def train_tokenizer(folder, size=600):
    """The world's tokenizer: trained on its own captions and questions, and on how it is spoken to."""
    lines = [text for i in range(1500) for turn in World("text", "llm", 1500)[i].turns for text in turn]
    return Tokenizer.train([*lines, *map(chr, range(32, 127))], folder, size)


# -------------------------------------------------------------------------------------------------------------- real data

class Records:
    """A JSON or JSONL file of conversations (LLaVA: image, conversations) or preferences (MMPR: image, question,
    chosen, rejected; the paper's: image, prompt, chosen, rejected). JSONL is read one line at a time."""

    def __init__(self, file, image_root=None):
        self.file = Path(file)
        self.root = Path(image_root or self.file.parent).resolve()
        self.records, self.offsets, at = None, [], 0
        try:
            with open(self.file, "rb") as f:
                if f.read(64).lstrip()[:1] == b"[":
                    self.records = json.loads(self.file.read_text("utf-8"))
                f.seek(0)
                for line in f if self.records is None else ():
                    self.offsets += [at] if line.strip() else []
                    at += len(line)
        except (OSError, ValueError) as error:
            raise BadInput(f"{self.file}: cannot be read as JSON ({error})") from None
        if not len(self):
            raise BadInput(f"{self.file}: no samples in it")
        self.preferences = "rejected" in self.record(0)

    def __len__(self):
        return len(self.offsets if self.records is None else self.records)

    def record(self, i):
        record = self.records[i] if self.records else None
        if record is None:
            with open(self.file, "rb") as f:
                f.seek(self.offsets[i])
                try:
                    record = json.loads(f.readline())
                except ValueError as error:
                    raise BadInput(f"{self.file}: sample {i + 1}: not a JSON line ({error})") from None
        if not isinstance(record, dict):
            raise BadInput(f"{self.file}: sample {i + 1}: not a JSON object")
        return record

    def __getitem__(self, i):
        record = self.record(i)

        def text(key, source=record):
            if not isinstance(source, dict) or not isinstance(source.get(key), str):
                raise BadInput(f"{self.file}: sample {i + 1}: \"{key}\" is missing or not a text")
            return source[key]

        image = None
        if record.get("image"):
            image = (self.root / text("image")).resolve()
            if not image.is_relative_to(self.root):
                raise BadInput(f"{self.file}: sample {i + 1}: image {record['image']} is outside {self.root}")
        rejected = None
        if self.preferences:
            key = "question" if "question" in record else "prompt"
            turns, rejected = [(text(key), text("chosen"))], text("rejected")
        else:
            talk = record.get("conversations")
            if not isinstance(talk, list) or not talk or len(talk) % 2:
                raise BadInput(f"{self.file}: sample {i + 1}: \"conversations\" is not a list of question and answer")
            said = [text("value", turn) for turn in talk]
            turns = list(zip(said[::2], said[1::2]))
        return Sample(str(record.get("id", i)), image, turns, rejected, self.file.stem, "all")

    def fingerprint(self):
        return hashlib.sha256(self.file.read_bytes()).hexdigest()
