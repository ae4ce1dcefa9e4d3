"""What goes in: the embedded world, readers of real data, tokenizer, chat template, batches.

A sample is a picture, a conversation and, for preferences, a second answer to its last question. It
becomes one row of tokens in which every token has a `segment`: 0 = prompt, 1 = chosen response,
2 = rejected response (model.visible says who sees whom). The prompt, with its several hundred image
tokens, stands there once, not once per response.
"""
import contextlib
import functools
import hashlib
import io
import json
import math
import os
import random
import re
import tempfile
from array import array
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from PIL import Image, ImageChops, ImageDraw, ImageOps
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

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
    separate: bool = False              # the turns are conversations of their own
    system: str = ""                    # instead of the template's system prompt
    answers: tuple = ()                 # every answer that counts as right, for evaluation
    metric: str = ""                    # exact | relaxed | anls | vqa | choice


# -------------------------------------------------------------------------- tokenizer and templates

@dataclass
class Template:
    """What is put around what people say. Only here do special tokens count."""
    first: str = ""             # before everything
    system: str = ""            # around the system prompt
    prompt: str = ""            # the system prompt
    before: str = ""            # before a question
    between: str = ""           # between question and answer
    end: str = ""               # ends a turn; where empty, the tokenizer's own token does
    after: str = ""             # between two turns
    image: str = "<image>\n"    # goes first where no question says <image>
    asks: bool = True           # False: the question is left out, the picture alone is the prompt


TEMPLATES = {                   # the system prompts are LLaVA's
    "plain": Template(image="<image>"),
    "caption": Template(image="<image>", asks=False),
    "chatml": Template(
        system="<|im_start|>system\n{}<|im_end|>\n", prompt="You are a helpful assistant.",
        before="<|im_start|>user\n", between="<|im_end|>\n<|im_start|>assistant\n",
        end="<|im_end|>", after="\n"),
    "llama3": Template(
        first="<|begin_of_text|>",
        system="<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
        prompt="You are a helpful language and vision assistant. You are able to understand the "
               "visual content that the user provides, and assist the user with a variety of tasks "
               "using natural language.",
        before="<|start_header_id|>user<|end_header_id|>\n\n",
        between="<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", end="<|eot_id|>"),
    "vicuna": Template(
        first="<s>", system="{} ",
        prompt="A chat between a curious user and an artificial intelligence assistant. The "
               "assistant gives helpful, detailed, and polite answers to the user's questions.",
        before="USER: ", between=" ASSISTANT: ", end="</s>")}
SPECIAL = re.compile(r"(<\|\w+\|>|</?s>)")
ENDS = ["<|im_end|>", "<|eot_id|>", "</s>", "<|end_of_text|>", "<|endoftext|>"]


class Tokenizer:
    """sentencepiece's tokenizer.model or, only if there is none, tokenizer.json. `special` has the
    ids of special and added tokens; `encode` never makes them from text, `template` does."""
    FILES = ["tokenizer.model", "tokenizer.json", "tokenizer_config.json", "added_tokens.json",
             "special_tokens_map.json", "vocab.json", "merges.txt"]

    def __init__(self, folder):
        self.files = [path for name in self.FILES if (path := Path(folder) / name).exists()]
        self.file = next((path for path in self.files if path.name in self.FILES[:2]), None)
        if self.file is None:
            raise BadInput(f"{folder}: no tokenizer.model or tokenizer.json; an LLM needs one")
        try:
            config, ids = (json.loads(path.read_text("utf-8")) if path in self.files else {}
                           for path in map(self.file.with_name, self.FILES[2:4]))
            ids |= {token["content"]: int(i)
                    for i, token in config.get("added_tokens_decoder", {}).items()}
            self.sp = self.fast = None
            if self.file.suffix == ".model":
                self.sp = sentencepiece.SentencePieceProcessor(model_file=str(self.file))
                size, self.bare = len(self.sp), not config.get("legacy", True)
                ids |= {self.sp.id_to_piece(i): i for i in range(size) if self.sp.is_control(i)}
                hidden = ids.values()
            else:
                import tokenizers
                spec = json.loads(self.file.read_text("utf-8"))
                spec |= {"truncation": None, "padding": None}
                hidden = [token["id"] for token in spec["added_tokens"] if token["special"]]
                for token in spec["added_tokens"]:
                    ids[token["content"]], token["special"] = token["id"], True
                self.fast = tokenizers.Tokenizer.from_str(json.dumps(spec))
                size = self.fast.get_vocab_size()
                self.bare = "'first'" in str(spec["pre_tokenizer"])
        except ImportError:
            raise BadInput(f"{self.file}: needs a package: pip install tokenizers") from None
        except Exception as error:              # the two packages raise whatever they like
            raise BadInput(f"{self.file}: cannot be read ({error})") from None
        self.special, self.hidden, self.chat = ids, set(hidden), str(config.get("chat_template"))
        self.size = max([size, *(i + 1 for i in ids.values())])
        self.end = next((ids[name] for name in ENDS if name in ids), None)
        if self.end is None:
            raise BadInput(f"{self.file}: none of its tokens ends a turn: {' '.join(ENDS)}")

    def __len__(self):
        return self.size

    def encode(self, text, inside=False):
        """inside: not at the beginning, where Llama's tokenizers put a space in front."""
        if inside and self.bare:
            return self.encode("\n" + text)[len(self.encode("\n")):]
        if self.sp:
            return self.sp.encode(text)
        self.fast.encode_special_tokens = True  # as the text that they are; a pickle forgets it
        return self.fast.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        ids = [int(i) for i in ids if 0 <= i < self.size and int(i) not in self.hidden]
        return self.sp.decode(ids) if self.sp else self.fast.decode(ids, skip_special_tokens=False)

    def template(self, *parts, inside=False):
        """Token ids of, in turns, text of a template and what somebody said. Text that no special
        token interrupts is encoded in one piece."""
        ids, run = [], ""
        for n, part in enumerate(parts):
            for piece in [part] if n % 2 else SPECIAL.split(part):
                if n % 2 or not SPECIAL.fullmatch(piece):
                    run += piece
                elif piece in self.special:
                    ids += [*self.encode(run, inside), self.special[piece]]
                    run, inside = "", True
                else:
                    raise BadInput(f"{self.file}: has no {piece}, which the chat template needs; "
                                   "choose another --template")
        return ids + self.encode(run, inside)

    @staticmethod
    def train(lines, folder, size):
        """Train on `lines`; deterministic. What the lines never had is spelled in bytes."""
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, vocab_size=size, model_type="bpe",
            byte_fallback=True, control_symbols=["<|im_start|>", "<|im_end|>"], num_threads=1,
            normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
            character_coverage=1.0, bos_id=-1, eos_id=-1, pad_id=-1, unk_id=0)
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "tokenizer.model").write_bytes(model.getvalue())
        return Tokenizer(folder)


def choose_template(folder):
    """The name of the template that an LLM folder's chat_template spells, or else of the first one
    whose special tokens its tokenizer has."""
    tokenizer, file = Tokenizer(folder), Path(folder) / "chat_template.jinja"
    own = file.read_text("utf-8") if file.exists() else tokenizer.chat
    able = [name for name, t in TEMPLATES.items() if t.before and
            set(SPECIAL.findall(t.first + t.before + t.end)) <= set(tokenizer.special)]
    spelled = [name for name in able if TEMPLATES[name].before.split("user")[0] in own]
    return (spelled + able + ["plain"])[0]


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
    t, last = TEMPLATES[template], len(sample.turns) - 1
    image = [IMAGE] * image_tokens if sample.image is not None else []
    marks = [n for n, (question, _) in enumerate(sample.turns)
             for _ in range(question.count("<image>"))]
    if image and len(marks) > 1:
        raise BadInput(f"sample {sample.id}: more than one <image> for one picture; leave it out")
    end = tokenizer.template(t.end) or [tokenizer.end]
    cue = SPECIAL.split(t.between)[-1]          # what stands before an answer in the same text
    inside = cue != t.between                   # ... which a special token begins
    start = tokenizer.encode(cue.rstrip(" "), inside)

    def ask(lead, question, image, inside):
        """lead: what the template puts in front, see Tokenizer.template."""
        lead, question = [*lead[:-1], lead[-1] + t.before], question.strip() if t.asks else ""
        between = t.between.rstrip(" ")         # the space is the answer's: " yes" is one token
        if not image:
            return tokenizer.template(*lead, question, between, inside=inside)
        question = question if "<image>" in question else t.image + question
        head, tail = (part.strip(" ") for part in question.split("<image>"))
        return (tokenizer.template(*lead, head, inside=inside) + image
                + tokenizer.template("", tail, between))

    def say(answer):
        if answer is None:
            return []
        ids = tokenizer.encode(cue + answer, inside)
        if ids[:len(start)] == start:
            return ids[len(start):] + end
        return tokenizer.encode(answer, True) + end     # its first letters would melt into the cue

    system, _, rest = t.system.partition("{}")
    lead = [system, sample.system or t.prompt, rest] if t.system else [""]
    pieces = [(tokenizer.template(t.first), 0, False)]          # (ids, segment, target)
    if sample.separate:
        pieces += [(tokenizer.template(*lead) + image, 0, False)]
    for n, (question, answer) in enumerate(sample.turns):
        if sample.separate:
            pieces += [(ask([""], question, [], False), n + 1, False), (say(answer), n + 1, True)]
            continue
        here = image if n == sum(marks[:1]) else []             # without a mark: the first turn
        context = sample.rejected is not None and n < last      # earlier turns are the prompt's
        segment = 0 if context else 1
        pieces += [(ask(lead, question, here, n > 0 and t.end != ""), segment if n else 0, False),
                   (say(answer), segment, not context)]
        lead = [t.after]
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
        self.end = (tokenizer.template(TEMPLATES[template].end) or [tokenizer.end])[0]
        self.responses = responses          # 1: the rejected response, if there is one, is left out
        self.image_size, self.image_tokens = encoder.image_size, encoder.tokens
        self.resample = getattr(encoder, "resample", Image.Resampling.BICUBIC)
        self.crop = getattr(encoder, "crop", False)
        self.mean, self.std = (torch.tensor(v).view(3, 1, 1)
                               for v in (encoder.image_mean, encoder.image_std))

    def row(self, sample, max_length=None):
        return encode(sample, self.tokenizer, self.template, self.image_tokens,
                      max_length or self.max_length)

    def count(self, sample):
        """Tokens of prompt and chosen response, however long."""
        return len(self.row(replace(sample, rejected=None), math.inf).tokens)

    def picture(self, sample):
        """(3, H, W) float32, or None. Squared by resizing, as SigLIP does, or (crop) shortest edge
        resized and the centre cut out, as CLIP does. The first frame; upright; alpha is dropped."""
        image = sample.image
        if image is None:
            return None
        try:
            if not isinstance(image, Image.Image):
                image = Image.open(image)
            image = ImageOps.exif_transpose(image)
            if image.mode[0] in "IF":       # 16 bits a pixel or more: Pillow would clip them
                values = np.asarray(image, np.float32)
                values = values / (257 if "16" in image.mode or values.max() > 255 else 1)
                image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
            image = image.convert("RGB")
        except Exception as error:          # Pillow raises whatever it likes
            raise BadInput(f"{sample.image}: sample {sample.id}: cannot read the picture "
                           f"({error}); mend it or leave the sample out") from None
        size, (width, height) = self.image_size, image.size
        if self.crop:
            edge = min(width, height)
            image = image.resize((size * width // edge, size * height // edge), self.resample)
            left, top = (image.width - size) // 2, (image.height - size) // 2
            image = image.crop((left, top, left + size, top + size))
        elif image.size != (size, size):
            image = image.resize((size, size), self.resample)
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
          "preferences"]                                # no two share a scene

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

    def text(self):
        letter = "no letter" if self.letter == "none" else f"letter {self.letter}"
        return f"a {self.size} {self.color} {self.texture} {self.shape} with {letter}"


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

    def caption(self, swap=(None, None)):
        """Every object in reading order; swap = (thing, what to say instead of it)."""
        things = [swap[1] if t is swap[0] else t for t in self.things]
        return " ".join(f"{PLACES[t.place]} is {t.text()}." for t in things)

    def misread(self, thing, detail, rng):
        """The thing with a detail wrong. A wrong colour is one that the scene does not have."""
        taken = {t.color for t in self.things} if detail == "color" else {getattr(thing, detail)}
        others = [value for value in DETAILS[detail] if value not in taken]
        return replace(thing, **{detail: rng.choice(others)})

    def ask(self, kind, rng):
        """A question of a kind: (question, answer, wrong answer, things it is about), or None if
        the scene does not allow it; the wrong answer is None where count finds none.

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
            return wording.format(key), say.get(right, right), say.get(wrong, wrong), [thing]
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
            return "is there any " + form.format(asked), *answers, [thing] if yes else []
        if kind in ("where", "spot"):
            what = thing.color if kind == "where" else f"letter {thing.letter}"
            if kind == "spot" and (thing.letter == "none" or not self.one("letter", thing.letter)):
                return None
            wrong = rng.choice([p for p in PLACES if p != PLACES[thing.place]])
            return f"where is {what}", PLACES[thing.place], wrong, [thing]
        if kind == "beside":
            across = 1 - 2 * (thing.place % 2)
            word, step = rng.choice([("beside", across), ("above", -2), ("below", 2)])
            for other in self.things:
                if other.place == thing.place + step:
                    wrong = self.misread(thing, "color", rng).color
                    return f"what color is {word} {thing.color}", other.color, wrong, [thing, other]
            return None
        if kind == "count":     # wrong: another scene's answer to the same question, if it differs
            name = rng.choice(["size", "texture"])
            value = rng.choice(list(DETAILS[name]))
            here, there = ([t for t in scene.things if getattr(t, name) == value]
                           for scene in (self, Scene("probe", rng.getrandbits(40))))
            wrong = NUMBERS[len(there)] if len(there) != len(here) else None
            return f"how many are {value}", NUMBERS[len(here)], wrong, here
        wrong = self.misread(thing, rng.choice(list(DETAILS)), rng)
        if kind == "object":
            return f"describe {PLACES[thing.place]}", thing.text(), wrong.text(), [thing]
        return "describe the picture", self.caption(), self.caption((thing, wrong)), [thing]

    def one(self, name, value):
        return sum(getattr(t, name) == value for t in self.things) == 1


class World:
    """A data set drawn on demand: world[i] is the same Sample on every machine.

    content   captions     a picture and its description
              lookup       up to 12 questions about a picture, half of them "where is ..."
              instruct     every kind of question once, and a description
              text         a description in words, then questions about it: no picture
              preferences  one question, right and wrong answer: one word, one object or the scene
              questions    one question of each kind for each picture, for evaluation"""

    def __init__(self, content, split, length):
        self.content, self.split, self.length = content, split, length

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        kinds, name = list(CATEGORY), f"{self.split}-{i}"
        scene = Scene(self.split, i // len(kinds) if self.content == "questions" else i)
        rng, asked, attempt = scene.rng, None, 0
        if self.content == "captions":
            return Sample(name, scene.image(), [("describe the picture", scene.caption())])
        if self.content in ("questions", "preferences"):
            while not asked or asked[2] is None:        # no neighbours, no letter of its own: again
                if self.content == "preferences":
                    kind = rng.choice([rng.choice(kinds), "object", "scene"])
                else:
                    kind, attempt = kinds[i % len(kinds)], attempt + 1
                    scene = scene if attempt < 9 else Scene(self.split, f"{i} {attempt}")
                asked = scene.ask(kind, rng)
            question, answer, wrong, things = asked
            return Sample(name, scene.image(), [(question, answer)], wrong, kind,
                          CATEGORY.get(kind, kind), scene.mask(things))
        if self.content == "lookup":
            kinds = rng.choices(LOOKUP, k=12)
        else:
            rng.shuffle(kinds)
            kinds = kinds + ["object"] if rng.random() < .75 else kinds[:6] + ["scene"]
        turns = dict.fromkeys(a[:2] for a in (scene.ask(kind, rng) for kind in kinds) if a)
        if self.content != "text":
            return Sample(name, scene.image(), list(turns), separate=True)
        shape, color = rng.choice(list(SHAPES)), rng.choice(list(COLORS))
        return Sample(name, None, [("describe the picture", scene.caption()), *turns,
                                   (f"how many corners has a {shape}", SHAPES[shape]),
                                   (f"which color complements {color}", OPPOSITE[color])])

    def fingerprint(self):
        """Changes when the world changes: a hash of what its first samples say and show."""
        digest = hashlib.sha256(f"{self.content} {self.split} {self.length}".encode())
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

SMALL = 1 << 24                 # bytes: a JSON array up to this size is read into memory
SUFFIXES = [".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp"]
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
         "system": "system"}


def spoken(record, key, role=None):
    """[(role, text)] of what stands under a key: a text (if it has a role), or messages {from,
    value} or {role, content}; content is a text or a list of {type: text | image, text}."""
    said = record.get(key)
    if isinstance(said, str) and role:
        return [(role, said)]
    result = []
    for message in said if isinstance(said, list) else [said]:
        message = message if isinstance(message, dict) else {}
        role = ROLES.get(str(message.get("from", message.get("role"))))
        text = message.get("value", message.get("content"))
        if isinstance(text, list) and all(isinstance(part, dict) for part in text):
            text = "\n".join("<image>" if part.get("type") == "image" else str(part.get("text"))
                             for part in text)
        if role is None or not isinstance(text, str):
            raise ValueError(f"\"{key}\" is missing or neither a text nor messages with roles")
        result.append((role, text))
    return result


def parse(record):
    """A record of any format, told by its keys -> (names of pictures, the other fields of Sample).

    conversations | messages                        LLaVA's, and the chat form of it
    question | prompt, chosen, rejected             MMPR's, the paper's, and the chat form
    question | prompt, answers | answer [, choices, category, metric]           for evaluation
    each with image | images or without. Raises ValueError."""
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    names = record.get("image") or record.get("images") or []
    names = names if isinstance(names, list) else [names]
    if not all(isinstance(name, str) for name in names):
        raise ValueError("\"image\" is not the name of a file")
    fields = {"category": str(record.get("category", "all"))}
    key = next((k for k in ("conversations", "messages", "question") if k in record), "prompt")
    said = spoken(record, key, "user" if key in ("question", "prompt") else None)
    if said and said[0][0] == "system":
        fields["system"] = said.pop(0)[1]
    if key in ("conversations", "messages"):    # as LLaVA: from a question to an answer
        said = said[1:] if said and said[0][0] == "assistant" else said
        said = said[:-1] if said and said[-1][0] == "user" else said
    elif "chosen" in record or "rejected" in record:
        said += spoken(record, "chosen", "assistant")
        fields["rejected"] = spoken(record, "rejected", "assistant")[-1][1]
    else:
        answers = record.get("answers", record.get("answer"))
        answers = [str(a) for a in (answers if isinstance(answers, list) else [answers])]
        if answers in ([], ["None"]):
            raise ValueError("has neither \"answers\" nor \"chosen\" and \"rejected\"")
        choices = list(zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", map(str, record.get("choices") or [])))
        lines = [said[-1][1], *(f"{letter}. {text}" for letter, text in choices)]
        said[-1:] = [("user", "\n".join(lines)), ("assistant", answers[0])]
        also = [other for pair in choices if set(pair) & set(answers) for other in pair]
        fields["answers"] = (*answers, *(a for a in also if a not in answers))  # letter and text
        fields["metric"] = str(record.get("metric", "choice" if choices else "exact"))
    if not said or [role for role, _ in said] != ["user", "assistant"] * (len(said) // 2):
        raise ValueError(f"\"{key}\" is not a list of question and answer in turns")
    texts = [text for _, text in said]
    return names, fields | {"turns": list(zip(texts[::2], texts[1::2]))}


def lines_of(file, is_array):
    """The lines of JSONL, or the records of a JSON array as such lines (bytes). No more than some
    megabytes are in memory. Raises ValueError."""
    if not is_array:
        with open(file, "rb") as f:
            yield from f
        return
    decode, gap = json.JSONDecoder().raw_decode, re.compile(r"[\s,]*")
    with open(file, encoding="utf-8") as f:
        text, at = f.read(SMALL // 4).lstrip(), 1
        while not text.startswith("]", at := gap.match(text, at).end()):
            try:
                record, at = decode(text, at)
                yield json.dumps(record).encode() + b"\n"
            except ValueError:                          # cut off, or wrong
                more = f.read(SMALL // 4) if len(text) - at < 4 * SMALL else ""
                if not more:
                    raise
                text, at = text[at:] + more, 0


class Lines:
    """The records of one JSON or JSONL file, read one at a time. Where each begins is found once,
    kept beside the file (if that is not allowed, among temporary files) and mapped into memory:

        version, size and time of the file; records left out, records with a rejected answer;
        sha256 of the lines (4 uint64); the offset of every record that is not left out

    A large array is first turned into lines, a small one stays in memory."""

    def __init__(self, file):
        self.file, self.memory, self.path = file, None, file
        try:
            stat = file.stat()
            self.stamp = [1, stat.st_size, stat.st_mtime_ns]
            with open(file, "rb") as f:
                is_array = f.read(64).lstrip()[:1] == b"["
            if is_array and stat.st_size <= SMALL:
                self.memory, out = io.BytesIO(), io.BytesIO()
                self.build(lines_of(file, True), out, self.memory)
                index = np.frombuffer(out.getvalue(), np.uint64)
            else:
                index = self.mapped(is_array)
        except (OSError, ValueError) as error:
            raise BadInput(f"{file}: cannot be read as JSON ({error})") from None
        self.several, self.pairs = index[3:5].tolist()
        self.digest, self.offsets = index[5:9].tobytes(), index[9:]

    def mapped(self, is_array):
        folder, name = self.file.parent.absolute(), self.file.name
        if not os.access(folder, os.W_OK):
            name = hashlib.sha256(str(folder).encode()).hexdigest()[:16] + "-" + name
            folder = Path(tempfile.gettempdir())
        index = folder / f"{name}.index"
        self.path = folder / f"{name}.jsonl" if is_array else self.file
        if not (index.exists() and self.path.exists() and
                np.fromfile(index, np.uint64, 3).tolist() == self.stamp):
            copy = written(self.path) if is_array else contextlib.nullcontext()
            with written(index) as out, copy as copy:
                self.build(lines_of(self.file, is_array), out, copy)
        return np.memmap(index, np.uint64, "r")

    def build(self, lines, out, copy=None):
        """Write the index of `lines`, and the lines to `copy`. Every record is parsed here, so that
        training does not stop at what is wrong with one."""
        digest, offsets, several, pairs, at = hashlib.sha256(), array("Q"), 0, 0, 0
        with tqdm(desc=f"{self.file.name}: index, only once", total=self.stamp[1], unit="B",
                  unit_scale=True, leave=False, disable=self.stamp[1] <= SMALL or None) as bar:
            for number, line in enumerate(lines, 1):
                digest.update(line)
                if copy:
                    copy.write(line)
                try:
                    names, fields = parse(json.loads(line)) if line.strip() else ([], None)
                except ValueError as error:
                    what = "not a JSON line: " if isinstance(error, json.JSONDecodeError) else ""
                    raise BadInput(f"{self.file}: sample {number}: {what}{error}") from None
                if fields:
                    marks = sum(question.count("<image>") for question, _ in fields["turns"])
                    if len(names) > 1 or names and marks > 1:
                        several += 1
                    else:
                        offsets.append(at)
                        pairs += "rejected" in fields
                at += len(line)
                bar.update(len(line))
        out.write(np.array([*self.stamp, several, pairs], np.uint64).tobytes() + digest.digest())
        out.write(offsets.tobytes())

    def __getitem__(self, i):
        f = self.memory or opened(self.path, *self.stamp, os.getpid())
        f.seek(int(self.offsets[i]))
        return json.loads(f.readline())


@contextlib.contextmanager
def written(path):
    """A file that is there as a whole or not at all."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as out:
            yield out
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@functools.cache
def opened(path, version, size, time, process):
    """One handle for each file and process: a fork would share its position."""
    return open(path, "rb")


class Records:
    """Samples of a JSON or JSONL file in any format that `parse` knows, or of all the files that an
    MMPR meta.json names. Samples with several pictures are left out, as in the paper.

    preferences   have the samples a rejected answer?
    left_out      {reason: how many samples}"""

    def __init__(self, file, image_root=None):
        self.file, self.order = Path(file), None
        folder = self.file.parent.absolute()
        bases = [Path(base).absolute() for base in (image_root, folder, folder.parent) if base]

        def find(name):
            for base in bases:
                if (base / name).exists():
                    return base / name
            raise BadInput(f"{file}: {name} is nowhere below {bases[0]}; give its --image-root")

        parts = [(name, find(entry["annotation"]), find(entry["root"]))
                 for name, entry in self.meta().items()] or [(self.file.stem, self.file, bases[0])]
        self.parts = [(name, Lines(path), Path(os.path.normpath(root)))
                      for name, path, root in parts]
        self.starts = np.cumsum([0, *(len(lines.offsets) for _, lines, _ in self.parts)])
        self.left_out = {"several images": sum(lines.several for _, lines, _ in self.parts)}
        pairs = sum(lines.pairs for _, lines, _ in self.parts)
        if not len(self):
            raise BadInput(f"{file}: no samples in it")
        if pairs not in (0, len(self)):
            raise BadInput(f"{file}: {pairs} of {len(self)} samples have \"rejected\"; split it")
        self.preferences = pairs > 0

    def meta(self):
        """MMPR's {name: {annotation, root, ...}}, or {}."""
        with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
            if self.file.suffix == ".json" and self.file.stat().st_size <= SMALL:
                entries = json.loads(self.file.read_text("utf-8"))
                if all({"annotation", "root"} <= set(entry) for entry in entries.values()):
                    return entries
        return {}

    def __len__(self):
        return int(self.starts[-1]) if self.order is None else len(self.order)

    def __getitem__(self, i):
        at = int(i if self.order is None else self.order[i])
        part = int(np.searchsorted(self.starts, at, "right")) - 1
        (kind, lines, root), image = self.parts[part], None
        try:
            record = lines[at - self.starts[part]]
            names, fields = parse(record)
        except (OSError, ValueError) as error:
            raise BadInput(f"{lines.file}: changed while in use ({error}); start again") from None
        name = str(record.get("id", at))
        if names:
            image = Path(os.path.normpath(root / names[0]))
            if not image.is_relative_to(root):
                raise BadInput(f"{lines.file}: sample {name}: image {names[0]} is outside {root}; "
                               "mend the path or give --image-root")
            if not image.exists():                      # MMPR says .jpg of some .gif files
                others = map(image.with_suffix, SUFFIXES)
                image = next((path for path in others if path.exists()), image)
        return Sample(name, image, kind=kind, **fields)

    def select(self, prepare, take=None, seed=0, max_prompt_chosen=None):
        """The paper's selection: the first `take` (None: all) after a seeded shuffle, without those
        whose prompt and chosen answer have more than `max_prompt_chosen` tokens. Returns itself."""
        self.order, kept, long = None, [], 0
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        for i in tqdm(order[:None if max_prompt_chosen else take], f"{self.file.name}: selecting",
                      leave=False, disable=None):
            if len(kept) == take:
                break
            if max_prompt_chosen and prepare.count(self[i]) > max_prompt_chosen:
                long += 1
            else:
                kept.append(i)
        if not kept:
            raise BadInput(f"{self.file}: no sample has at most {max_prompt_chosen} tokens")
        self.order, self.left_out["too long"] = np.array(kept), long
        return self

    def fingerprint(self):
        """A hash of the files and of what is selected from them."""
        digest = hashlib.sha256(b"".join(lines.digest for _, lines, _ in self.parts))
        digest.update(b"" if self.order is None else self.order.tobytes())
        return digest.hexdigest()
