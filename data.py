"""What goes in: the embedded world, readers of real data, tokenizer, chat template, batches.

A sample is a picture, a conversation and, for preferences, a second answer to its last question. It
becomes one row of tokens in which every token has a `segment`: 0 = prompt, 1 = chosen response,
2 = rejected response (model.visible says who sees whom). The prompt, with its several hundred image
tokens, stands there once, not once per response.
"""
import functools
import hashlib
import io
import json
import math
import random
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from PIL import Image, ImageChops, ImageDraw
from torch.nn.utils.rnn import pad_sequence

CHOSEN, REJECTED = 0, 1     # columns of logps: (samples, responses)
IMAGE = -1                  # token id of an image position: no text can spell it


class BadInput(Exception):
    """Something the user gave is wrong. The message is one line: what, where, what to do."""


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


# ---------------------------------------------------------------------------------------- tokenizer

SPECIAL = ["<|im_start|>", "<|im_end|>"]
# before the question, between question and answer, after the answer (its first token ends the turn)
TEMPLATES = {"plain": ("", "", "<|im_end|>"),
             "chatml": ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n",
                        "<|im_end|>\n")}


class Tokenizer:
    """A sentencepiece model. Special tokens are control symbols: text never makes them."""

    def __init__(self, folder):
        self.file = Path(folder) / "tokenizer.model"
        if not self.file.exists():
            raise BadInput(f"{self.file}: not found; an LLM folder needs its tokenizer")
        self.sp = sentencepiece.SentencePieceProcessor(model_file=str(self.file))
        self.special = {self.sp.id_to_piece(i): i for i in range(len(self))
                        if self.sp.is_control(i)}
        self.end = self.special["<|im_end|>"]

    def __len__(self):
        return self.sp.get_piece_size()

    def encode(self, text):
        return self.sp.encode(text)

    def decode(self, ids):
        return self.sp.decode([int(i) for i in ids])

    def template(self, text):
        """Token ids of a piece of a template, the only text in which special tokens count."""
        return [i for part in re.split(r"(<\|\w+\|>)", text)
                for i in ([self.special[part]] if part in self.special else self.encode(part))]

    @staticmethod
    def train(lines, folder, size):
        """Train on `lines`; deterministic. What the lines never had is spelled in bytes."""
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, vocab_size=size, model_type="bpe",
            byte_fallback=True, control_symbols=SPECIAL, normalization_rule_name="identity",
            remove_extra_whitespaces=False, character_coverage=1.0, num_threads=1, minloglevel=2,
            bos_id=-1, eos_id=-1, pad_id=-1, unk_id=0)
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "tokenizer.model").write_bytes(model.getvalue())
        return Tokenizer(folder)


# --------------------------------------------------------------------------------- rows and batches

@dataclass
class Row:
    """One sample as tokens. Positions of a response start where the prompt ends."""
    tokens: list
    segment: list
    target: list        # bool: does this token count in the loss?
    position: list
    source: list        # column that predicts the token: the one before, or the prompt's last


def encode(sample, tokenizer, template, image_tokens, max_length):
    """Sample -> Row. Image tokens are never cut: a long response loses its end (and so its end of
    turn); a prompt that leaves no room for a response is an error. Answer None: only the prompt."""
    before, between, after = (tokenizer.template(part) for part in TEMPLATES[template])
    image = [IMAGE] * image_tokens if sample.image is not None else []

    def ask(question, image):
        parts = question.split("<image>") if image else [question]
        if len(parts) > 2:
            raise BadInput(f"sample {sample.id}: more than one <image>; leave it out")
        if len(parts) < 2:
            parts = ["", question]                          # no placeholder: the image goes first
        head, tail = (tokenizer.encode(p.strip()) if p.strip() else [] for p in parts)
        return before + head + image + tail + between

    def say(answer):
        return tokenizer.encode(answer) + after[:1] if answer is not None else []

    pieces = [(image, 0, False)] if sample.separate else []     # (ids, segment, target)
    for number, (question, answer) in enumerate(sample.turns):
        if sample.separate:
            pieces += [(ask(question, []), number + 1, False), (say(answer), number + 1, True)]
            continue
        last = number == len(sample.turns) - 1
        context = sample.rejected is not None and not last      # earlier turns are its prompt
        segment = 0 if context else 1
        pieces += [(ask(question, [] if number else image), segment if number else 0, False),
                   (say(answer), segment, not context)]
        if not last:
            pieces += [(after[1:], segment, False)]
    if sample.rejected is not None:
        pieces += [(say(sample.rejected), 2, True)]

    prompt = sum(len(ids) for ids, segment, _ in pieces if segment == 0)
    if prompt >= max_length:
        raise BadInput(f"sample {sample.id}: its prompt has {prompt} tokens ({len(image)} of the "
                       f"image), the limit is {max_length}; raise --max-length or leave it out")
    row, following = Row([], [], [], [], []), Counter()         # the next position of each segment
    for ids, segment, target in pieces:
        for i in ids:
            n = following[segment] + (prompt if segment else 0)
            following[segment] += 1
            if n < max_length:
                fresh = segment and n == prompt                 # a response's first token
                row.source.append((prompt if fresh else len(row.tokens)) - 1)
                row.tokens.append(i)
                row.segment.append(segment)
                row.target.append(target)
                row.position.append(n)
    if prompt == 0 and row.target[:1] == [True]:
        raise BadInput(f"sample {sample.id}: nothing stands before its answer; give it a question")
    return row


@dataclass
class Batch:
    """Rows of equal length; what the model sees. Padding has sample -1. Targets are listed flat."""
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


def collate(rows, pictures, index, image_size, paired, dummy=False):
    """Rows, their pictures (a (3, H, W) tensor or None each) and data set indices -> Batch.
    paired: with the rejected responses."""
    def pad(lists, value=0):
        return pad_sequence([torch.tensor(x, dtype=torch.long) for x in lists], True, value)

    tokens, segment, position = (pad([getattr(row, name) for row in rows])
                                 for name in ("tokens", "segment", "position"))
    owner, responses = pad([[i] * len(row.tokens) for i, row in enumerate(rows)], -1), 1 + paired
    targets = [(row.tokens[t], i * tokens.shape[1] + row.source[t],
                i * responses + (paired and row.segment[t] == 2))
               for i, row in enumerate(rows) for t in range(len(row.tokens)) if row.target[t]]
    target, source, response = torch.tensor(targets, dtype=torch.long).view(-1, 3).T.contiguous()
    pixels = [p for p in pictures if p is not None]
    return Batch(tokens, owner, segment, position, target, source, response,
                 torch.stack(pixels) if pixels else torch.zeros(1, 3, image_size, image_size),
                 torch.tensor(index), responses, len(pixels), dummy)


class Prepare:
    """Samples -> Batch: the picture as the encoder wants it, the text as the LLM wants it."""

    def __init__(self, tokenizer, template, encoder, max_length, responses):
        self.tokenizer, self.template, self.max_length = tokenizer, template, max_length
        self.responses = responses          # 1: the rejected response, if there is one, is left out
        self.image_size, self.image_tokens = encoder.image_size, encoder.tokens
        self.mean, self.std = (torch.tensor(v).view(3, 1, 1)
                               for v in (encoder.image_mean, encoder.image_std))

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
                raise BadInput(f"{sample.image}: sample {sample.id}: cannot read the picture "
                               f"({error})") from None
        image = image.convert("RGB")
        if image.size != (self.image_size,) * 2:
            image = image.resize((self.image_size,) * 2, Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        return (pixels - self.mean) / self.std

    def __call__(self, samples, index=None, dummy=False, blank=False, answers=True):
        """blank: grey pictures, for the control. answers False: prompts only, for generation."""
        if self.responses == 1:
            samples = [replace(s, rejected=None) for s in samples]
        if not answers:
            samples = [replace(s, rejected=None, turns=[*s.turns[:-1], (s.turns[-1][0], None)])
                       for s in samples]
        rows = [self.row(s) for s in samples]
        pictures = [self.picture(s) for s in samples]
        if blank:
            pictures = [None if p is None else torch.zeros_like(p) for p in pictures]
        paired = any(s.rejected is not None for s in samples)
        index = list(index or range(len(rows)))
        return collate(rows, pictures, index, self.image_size, paired, dummy)


def shuffled(step, batch, length, seed):
    """The sampler: data set indices of a step. A pure function of the step, so that resuming needs
    no state; every epoch is a new permutation, and batches run across its end."""
    picked, orders = [], {}
    for at in range(step * batch, (step + 1) * batch):
        epoch = at // length
        if epoch not in orders:
            generator = torch.Generator().manual_seed(seed * 1000003 + epoch)
            orders[epoch] = torch.randperm(length, generator=generator)
        picked.append(int(orders[epoch][at % length]))
    return picked


class Steps(torch.utils.data.Dataset):
    """steps[k] = the micro-batches of this rank for step k. All ranks get equally many; one that
    runs short gets a dummy of weight zero, because collectives must be called by everyone."""

    def __init__(self, data, prepare, steps, batch, micro, seed, rank=0, world=1):
        self.data, self.prepare, self.steps, self.batch = data, prepare, steps, batch
        self.seed, self.rank, self.world = seed, rank, world
        self.micro = min(micro, math.ceil(batch / world))

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

CATEGORY = {"exist": "general", "color": "general", "shape": "general",
            "complement": "knowledge", "corners": "knowledge", "letter": "ocr", "spot": "ocr",
            "size": "vision", "texture": "vision", "where": "vision", "beside": "vision",
            "count": "vision"}
# questions about one detail of one object: wording, the detail, how its values are said
ATTRIBUTES = {"color": ("what color is {}", "color", {}),
              "shape": ("what shape is {}", "shape", {}),
              "texture": ("what texture is {}", "texture", {}),
              "size": ("what size is {}", "size", {}),
              "letter": ("what letter is on {}", "letter", {}),
              "corners": ("how many corners has {}", "shape", SHAPES),
              "complement": ("which color complements {}", "color", OPPOSITE)}
LOOKUP = ["where"] * 6 + ["spot", "exist", "exist", "color", "letter", "size"]
TEXT_ONLY = "fact"                                      # a kind of question without a picture
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


@dataclass
class Thing:
    """One object of a scene. Everything but tilt is talked about."""
    place: int
    shape: str
    color: str
    size: str
    texture: str
    letter: str
    tilt: int
    x: int          # centre, pixels
    y: int

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

    def caption(self):
        """Every object in reading order, tersely."""
        return " ".join(JOINTS[0].format(PLACES[t.place], t.text()) for t in self.things)

    def describe(self, kind, things, words):
        """An answer about one object or the whole scene; words draws its wording (None: terse)."""
        def draw(options):
            return words.choice(options) if words else options[0]

        if kind == "object":
            said = [things[0].text(draw(PHRASES)) + "." * bool(words)]
        else:
            said = [draw(JOINTS).format(PLACES[t.place], t.text(draw(PHRASES))) for t in things]
        return " ".join(filter(None, [draw(OPENINGS), *said, draw(CLOSINGS)]))

    def misread(self, thing, detail, rng):
        """The thing with a detail wrong. A wrong colour is one that the scene does not have."""
        taken = {t.color for t in self.things} if detail == "color" else {getattr(thing, detail)}
        others = [value for value in DETAILS[detail] if value not in taken]
        return replace(thing, **{detail: rng.choice(others)})

    def ask(self, kind, rng, words=None, errors=0.):
        """A question of a kind: (question, answer, wrong answer, things it is about, detail), or
        None if the scene does not allow it; the wrong answer is None where count finds none.
        words, errors: wording and share of imperfect answers of descriptions.

        The wrong answer is drawn so that the two could be exchanged: given the question,
        (answer, wrong) and (wrong, answer) are equally likely over scenes, so that a model that
        does not look cannot prefer either."""
        thing = rng.choice(self.things)
        if kind in ATTRIBUTES:
            wording, detail, say = ATTRIBUTES[kind]
            key = PLACES[thing.place] if detail == "color" or rng.random() < .6 else thing.color
            if kind == "color" and rng.random() < .4 and self.one("shape", thing.shape):
                key = "the " + thing.shape
            right, wrong = (getattr(t, detail) for t in (thing, self.misread(thing, detail, rng)))
            return (wording.format(key), say.get(right, right), say.get(wrong, wrong), [thing],
                    detail)
        if kind == TEXT_ONLY:
            wording, say = rng.choice(FACTS)
            right, wrong = rng.sample(list(say), 2)
            return wording.format(right), say[right], say[wrong], [], kind
        if kind == "exist":
            yes, asked = rng.random() < .5, thing
            form = rng.choice(["{0.color}", "{0.shape}", "{0.color} {0.shape}"])
            if not yes and form == "{0.shape}":
                asked = replace(thing, shape=rng.choice(
                    [s for s in SHAPES if s not in {t.shape for t in self.things}]))
            elif not yes:       # another colour; or the colour is there, but in another shape
                both = form == "{0.color} {0.shape}" and rng.random() < .5
                asked = self.misread(thing, "shape" if both else "color", rng)
            answers = ("yes", "no") if yes else ("no", "yes")
            return "is there any " + form.format(asked), *answers, [thing] if yes else [], kind
        if kind in ("where", "spot"):
            what = thing.color if kind == "where" else f"letter {thing.letter}"
            if kind == "spot" and (thing.letter == "none" or not self.one("letter", thing.letter)):
                return None
            wrong = rng.choice([p for p in PLACES if p != PLACES[thing.place]])
            return f"where is {what}", PLACES[thing.place], wrong, [thing], "place"
        if kind == "beside":
            across = 1 - 2 * (thing.place % 2)
            word, step = rng.choice([("beside", across), ("above", -2), ("below", 2)])
            for other in self.things:
                if other.place == thing.place + step:
                    wrong = self.misread(thing, "color", rng).color
                    return (f"what color is {word} {thing.color}", other.color, wrong,
                            [thing, other], "place")
            return None
        if kind == "count":     # wrong: another scene's answer to the same question, if it differs
            name = rng.choice(["size", "texture"])
            value = rng.choice(list(DETAILS[name]))
            here, there = ([t for t in scene.things if getattr(t, name) == value]
                           for scene in (self, Scene("probe", rng.getrandbits(40))))
            wrong = NUMBERS[len(there)] if len(there) != len(here) else None
            return f"how many are {value}", NUMBERS[len(here)], wrong, here, kind
        question = "describe the picture" if kind == "scene" else f"describe {PLACES[thing.place]}"
        right = self.things if kind == "scene" else [thing]
        detail = rng.choice(list(DETAILS))
        if words and words.random() < errors:           # good, but not perfect: both are wrong here
            flaw = words.choice([d for d in DETAILS if d != detail])
            right = [self.misread(t, flaw, words) if t is thing else t for t in right]
        at = [t.place for t in right].index(thing.place)
        wrong = [*right[:at], self.misread(right[at], detail, rng), *right[at + 1:]]
        return question, *(self.describe(kind, t, words) for t in (right, wrong)), [thing], detail

    def mistakes(self, kind, things, said):
        """How many details a description has wrong: of one object, or of the scene's four places."""
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

    def one(self, name, value):
        return sum(getattr(t, name) == value for t in self.things) == 1


FACTS = [("how many corners has a {}", SHAPES), ("which color complements {}", OPPOSITE)]


class World:
    """A data set drawn on demand: world[i] is the same Sample on every machine.

    content   captions     a picture and its description
              lookup       up to 12 questions about a picture, half of them "where is ..."
              instruct     every kind of question once, and a description
              text         a description in words, then questions about it: no picture
              preferences  one question, right and wrong answer: one word, one object or the scene
              questions    one question of each kind for each picture, and one without, for
                           evaluation
    wording   free: descriptions in many words that say nothing about the picture; terse: in one
    errors    share of the preferences' descriptions whose chosen answer has a detail wrong, too
    kinds     of preferences: a question's kind, "object" or "scene"; default: all, a third each
    first     number of the first scene: runs of different seeds see different scenes
    sampled   {i: (chosen, rejected)} of preferences whose two responses a model gave"""
    asked = [*CATEGORY, TEXT_ONLY]          # kinds of content "questions", in turn

    def __init__(self, content, split, length, wording="free", errors=.2, kinds=(), first=0):
        self.content, self.split, self.length, self.wording = content, split, length, wording
        self.errors, self.kinds, self.first, self.sampled = errors, list(kinds), first, {}

    def __len__(self):
        return self.length

    def draw(self, i):
        """(scene, its random numbers for wording, kind, what Scene.ask says) of sample i."""
        scene = Scene(self.split, self.first + (i // len(self.asked) if self.content == "questions"
                                                else i))
        words = random.Random(f"words {self.split} {self.first + i}")
        words, rng, asked, attempt = words if self.wording == "free" else None, scene.rng, None, 0
        while self.content in ("questions", "preferences") and (not asked or asked[2] is None):
            if self.content == "preferences":           # no neighbours, no letter of its own: again
                kind = rng.choice(self.kinds or [rng.choice(list(CATEGORY)), "object", "scene"])
            else:
                kind, attempt = self.asked[i % len(self.asked)], attempt + 1
                scene = scene if attempt < 9 else Scene(self.split, f"{i} {attempt}")
            asked = scene.ask(kind, rng, words, self.errors)
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
        if self.content == "captions":
            return Sample(name, scene.image(), [("describe the picture", scene.caption())])
        if asked:
            question, answer, wrong, things, detail = asked
            answer, wrong = self.sampled.get(i, (answer, wrong))
            image = scene.image() if kind != TEXT_ONLY else None
            return Sample(name, image, [(question, answer)], wrong, kind, CATEGORY.get(kind, kind),
                          scene.mask(things), detail)
        if self.content == "lookup":
            kinds = rng.choices(LOOKUP, k=12)
        else:
            rng.shuffle(kinds)
            described = rng.choices(["", "object", "scene"], [.5, .4, .1])[0]
            kinds = [*kinds, TEXT_ONLY, *([described] if described else [])]
        turns = dict.fromkeys(a[:2] for a in (scene.ask(kind, rng, words) for kind in kinds) if a)
        if self.content != "text":
            return Sample(name, scene.image(), list(turns), separate=True)
        facts = [(say.format(what), answers[what]) for say, answers in FACTS
                 for what in [rng.choice(list(answers))]]
        return Sample(name, None, [("describe the picture", scene.caption()), *turns, *facts])

    def fingerprint(self):
        """Changes when the world changes: a hash of what its first samples say and show."""
        digest = hashlib.sha256(repr(list(vars(self).values())).encode())
        for sample in map(self.__getitem__, range(24)):
            digest.update(repr((sample.turns, sample.rejected)).encode())
            digest.update(sample.image.tobytes() if sample.image else b"")
        return digest.hexdigest()


def train_tokenizer(folder, size=600):
    """The world's tokenizer, trained on its own captions and questions."""
    world = World("text", "llm", 1500)
    lines = [text for i in range(len(world)) for turn in world[i].turns for text in turn]
    return Tokenizer.train([*lines, *map(chr, range(32, 127))], folder, size)


# ---------------------------------------------------------------------------------------- real data

class Records:
    """A JSON or JSONL file of conversations (LLaVA: image, conversations) or preferences (MMPR:
    image, question, chosen, rejected; the paper's: image, prompt, chosen, rejected)."""

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

    def wrong(self, i, what):
        return BadInput(f"{self.file}: sample {i + 1}: {what}")

    def record(self, i):
        record = self.records[i] if self.records else None
        if record is None:
            with open(self.file, "rb") as f:
                f.seek(self.offsets[i])
                try:
                    record = json.loads(f.readline())
                except ValueError as error:
                    raise self.wrong(i, f"not a JSON line ({error})") from None
        if not isinstance(record, dict):
            raise self.wrong(i, "not a JSON object")
        return record

    def __getitem__(self, i):
        record = self.record(i)

        def text(key, source=record):
            if not isinstance(source, dict) or not isinstance(source.get(key), str):
                raise self.wrong(i, f"\"{key}\" is missing or not a text")
            return source[key]

        image = None
        if record.get("image"):
            image = (self.root / text("image")).resolve()
            if not image.is_relative_to(self.root):
                raise self.wrong(i, f"image {record['image']} is outside {self.root}")
        rejected = None
        if self.preferences:
            key = "question" if "question" in record else "prompt"
            turns, rejected = [(text(key), text("chosen"))], text("rejected")
        else:
            talk = record.get("conversations")
            if not isinstance(talk, list) or not talk or len(talk) % 2:
                raise self.wrong(i, "\"conversations\" is not a list of question and answer")
            said = [text("value", turn) for turn in talk]
            turns = list(zip(said[::2], said[1::2]))
        return Sample(str(record.get("id", i)), image, turns, rejected, self.file.stem, "all")

    def fingerprint(self):
        return hashlib.sha256(self.file.read_bytes()).hexdigest()
