"""Checkpoints: what transformers wrote we compute alike, and what we write transformers opens."""
import json
import shutil

import pytest
import torch
import transformers as t
from PIL import Image
from safetensors.torch import load_file, save_file

import model as m
from data import BadInput, Tokenizer

VISION = dict(hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2,
              image_size=32, patch_size=8)
DINO = {k: v for k, v in VISION.items() if k != "intermediate_size"}
MAE = t.ViTMAEConfig(**VISION, decoder_hidden_size=16, decoder_intermediate_size=24,
                     decoder_num_hidden_layers=1, decoder_num_attention_heads=2)
TEXT = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
WHOLE = dict(vision_config=VISION, text_config=dict(
    vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
    num_attention_heads=2))
ENCODERS = {
    "siglip": lambda: t.SiglipVisionModel(t.SiglipVisionConfig(**VISION)),
    "clip": lambda: t.CLIPVisionModel(t.CLIPVisionConfig(**VISION)),
    "dinov2": lambda: t.Dinov2Model(t.Dinov2Config(**DINO)),
    "dinov2 giant": lambda: t.Dinov2Model(t.Dinov2Config(**DINO, use_swiglu_ffn=True)),
    "dinov2 narrow": lambda: t.Dinov2Model(t.Dinov2Config(**DINO, mlp_ratio=2)),
    "dinov2 registers": lambda: t.Dinov2WithRegistersModel(t.Dinov2WithRegistersConfig(**DINO)),
    "dinov2 giant registers": lambda: t.Dinov2WithRegistersModel(
        t.Dinov2WithRegistersConfig(**DINO, use_swiglu_ffn=True, num_register_tokens=3)),
    "mae": lambda: t.ViTMAEModel(MAE), "mae with decoder": lambda: t.ViTMAEForPreTraining(MAE),
    "vit": lambda: t.ViTModel(t.ViTConfig(**VISION)),
    "vit without bias": lambda: t.ViTModel(t.ViTConfig(**VISION, qkv_bias=False)),
    "vit classifier": lambda: t.ViTForImageClassification(t.ViTConfig(**VISION)),
    "dinov2 classifier": lambda: t.Dinov2ForImageClassification(t.Dinov2Config(**DINO)),
    "whole siglip": lambda: t.SiglipModel(t.SiglipConfig(**WHOLE)),
    "whole clip": lambda: t.CLIPModel(t.CLIPConfig(**WHOLE))}
SAVED_AS = {"whole siglip": t.SiglipVisionModel, "whole clip": t.CLIPVisionModel}
LLAMA3 = dict(rope_type="llama3", rope_theta=500., factor=8., low_freq_factor=1.,
              high_freq_factor=4., original_max_position_embeddings=32)
LLMS = {
    "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**TEXT, tie_word_embeddings=True)),
    "qwen2 untied": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(
        **TEXT, rope_parameters=dict(rope_type="default", rope_theta=1e6))),
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**TEXT | {"num_key_value_heads": 4})),
    "llama3": lambda: t.LlamaForCausalLM(t.LlamaConfig(
        **TEXT, rope_parameters=LLAMA3, tie_word_embeddings=True, eos_token_id=[2, 3])),
    "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(
        **TEXT, sliding_window=None, head_dim=12))}
TOKENS = torch.randint(0, 96, (2, 50), generator=torch.Generator().manual_seed(0))


def close(a, b, relative=1e-5):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= relative * b.abs().max(), (a - b).abs().max() / b.abs().max()


def write(model, folder, seed=0, **options):
    """Random weights that all count: also biases, norms, layer scales and positions."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * .2 + (p.ndim == 1) * .5)
    model.eval().save_pretrained(folder, **options)
    return model


def edit(folder, name="config.json", **values):
    file = folder / name
    values = (json.loads(file.read_text()) if file.exists() else {}) | values
    file.write_text(json.dumps({k: v for k, v in values.items() if v != "gone"}))


def save(encoder, folder, **options):
    state = {"encoder." + k: v for k, v in encoder.state_dict().items()}
    m.save_model(folder, state, m.MLLM(encoder, None, None), None, **options)


def opened(kind, folder):
    model, info = kind.from_pretrained(folder, output_loading_info=True,
                                       attn_implementation="eager")
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert all(p.dtype == torch.float32 for p in model.parameters())
    return model.eval()


def pictures(n=2, size=32):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(size))


@torch.no_grad()
def theirs(model, pixels, layer):
    """transformers' hidden state of a layer, patches only."""
    model = next((getattr(model, k) for k in ("vision_model", "vit", "dinov2") if
                  hasattr(model, k)), model)
    options, name = {}, model.config.model_type
    if not name.startswith("dinov2"):           # which always interpolates
        options["interpolate_pos_encoding"] = True
    if name == "vit_mae":                       # keeps all patches, and in their order
        model.config.mask_ratio = 0.
        options["noise"] = torch.arange((pixels.shape[-1] // 8) ** 2.).expand(len(pixels), -1)
    x = model(pixels, output_hidden_states=True, **options).hidden_states[layer]
    return x[:, getattr(model.config, "num_register_tokens", 0) + ("siglip" not in name):]


@torch.no_grad()
def logits(llm, tokens):
    n = tokens.shape[1]
    mask = torch.ones(1, 1, n, n, dtype=torch.bool).tril()
    hidden = llm(llm.model.embed_tokens(tokens), mask, torch.arange(n).expand(len(tokens), n))
    return hidden @ llm.head().T


# ---------------------------------------------------------------------------------------- encoders

@torch.no_grad()
@pytest.mark.parametrize("family", ENCODERS)
def test_features_equal_transformers(family, tmp_path):
    model = write(ENCODERS[family](), tmp_path)
    for layer in (-1, -2, -3):
        encoder = m.load_encoder(tmp_path, layer)
        assert encoder.config == m.read_encoder_config(tmp_path) and encoder.config.tokens == 16
        close(encoder(pictures()), theirs(model, pictures(), layer))
        close(encoder(pictures(1)), theirs(model, pictures(1), layer))
    # 5 and 3 patches a side where it was trained with 4: transformers interpolates as we do, with
    # antialiasing where DINOv2 has registers (as its authors do) and nowhere else
    for size in (40, 24, 35):
        encoder = m.load_encoder(tmp_path, -2, image_size=size)
        assert encoder.config.tokens == (size // 8) ** 2
        close(encoder(pictures(2, size)), theirs(model, pictures(2, size), -2))
    if family in ("siglip", "vit", "dinov2"):           # layer 0: everything, and the final norm
        expected = model(pictures()).last_hidden_state[:, family != "siglip":]
        close(m.load_encoder(tmp_path, 0)(pictures()), expected)


@pytest.mark.parametrize("size", [None, 40])
@pytest.mark.parametrize("family", ENCODERS)
def test_round_trip(family, size, tmp_path):
    """Opened, trained a step, saved: transformers finds all it wants and computes the same; what
    did not train is the original's, bit for bit."""
    write(ENCODERS[family](), tmp_path / "old")
    encoder = m.load_encoder(tmp_path / "old", -2, size)
    for module in encoder.unused():
        module.requires_grad_(False)
    x = pictures(2, size or 32)
    encoder(x).square().mean().backward()
    torch.optim.SGD([p for p in encoder.parameters() if p.requires_grad], 1e-2).step()
    save(encoder, tmp_path)

    kind = SAVED_AS.get(family, type(ENCODERS[family]()))
    if (family, size) == ("mae with decoder", 40):      # its decoder's fixed table is left out
        kind = t.ViTMAEModel
        close(encoder(x).detach(), theirs(kind.from_pretrained(tmp_path / "encoder").eval(), x, -2))
    else:
        close(encoder(x).detach(), theirs(opened(kind, tmp_path / "encoder"), x, -2))
    back = m.load_encoder(tmp_path / "encoder", -2)
    assert back.config == encoder.config and torch.equal(back(x), encoder(x))

    old, new = (load_file(tmp_path / f / "model.safetensors") for f in ("old", "encoder"))
    old = {k: v for k, v in old.items() if not k.startswith(("text_", "logit", "visual_proj"))}
    if "siglip" in family or "clip" in family:              # the hub's names
        old = {"vision_model." + k.removeprefix("vision_model."): v for k, v in old.items()}
    still = [k for k in old if any(s in k for s in ("layers.2.", "layer.2.", "head.", "pooler",
             "classifier", "mask_token", "decoder_pred")) or k.startswith((
                 "layernorm", "vit.layernorm", "dinov2.layernorm", "vision_model.post_layer"))]
    assert size or set(old) == set(new)
    assert len(still) > 10 and all(torch.equal(old[k], new[k]) for k in still)
    moved = [k for k in old if ("layers.0." in k or "layer.0." in k) and "decoder" not in k]
    assert not any(torch.equal(old[k], new[k]) for k in moved if "k_proj.b" not in k and
                   "key.b" not in k)                        # whose gradient is zero
    config, original = (json.loads((tmp_path / f / "config.json").read_text())
                        for f in ("encoder", "old"))
    original = original.get("vision_config", original)
    assert {k for k in original if config[k] != original[k]} <= {"architectures", "image_size"}


@torch.no_grad()
@pytest.mark.parametrize("family", ["siglip", "clip"])
def test_names_and_shards_of_the_hub(family, tmp_path):
    """Hub checkpoints have a prefix, and old CLIPs a table of position_ids; large ones shards."""
    model = write(ENCODERS[family](), tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    tensors = load_file(tmp_path / "a/model.safetensors")
    tensors = {"vision_model." + k: v for k, v in tensors.items()}
    tensors["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(tensors, tmp_path / "b/model.safetensors", {"format": "pt"})
    model.save_pretrained(tmp_path / "c", max_shard_size="20KB")
    assert len(m.hash_weights(tmp_path / "c")) > 2
    for name in "abc":
        close(m.load_encoder(tmp_path / name)(pictures()), theirs(model, pictures(), -2))
    save(m.load_encoder(tmp_path / "b"), tmp_path)
    saved = load_file(tmp_path / "encoder/model.safetensors")
    assert len(saved) == len(tensors) and all(torch.equal(saved[k], tensors[k]) for k in saved)


@torch.no_grad()
def test_bf16_in_fp32_out_and_back(tmp_path):
    """A bf16 checkpoint is computed and saved in fp32; saved as bf16, transformers opens bf16."""
    model = write(ENCODERS["siglip"](), tmp_path / "old").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "old")
    encoder = m.load_encoder(tmp_path / "old")
    close(encoder(pictures()), theirs(model.float(), pictures(), -2))
    save(encoder, tmp_path)
    opened(t.SiglipVisionModel, tmp_path / "encoder")
    save(encoder, tmp_path, dtype=torch.bfloat16)
    assert t.AutoModel.from_pretrained(tmp_path / "encoder").dtype == torch.bfloat16


@pytest.mark.parametrize("family, pixels, expected", [
    ("siglip", None, (.5, 3, 32, 0)), ("clip", None, (.48145466, 3, 32, 32)),
    ("dinov2", None, (.485, 3, 32, 36)), ("vit", None, (.5, 2, 32, 0)),
    ("siglip", {"size": {"height": 48, "width": 48}, "resample": 2, "image_mean": [.1, .2, .3]},
     (.1, 2, 48, 0)),
    ("clip", {"size": {"shortest_edge": 36}, "crop_size": {"height": 24, "width": 24}},
     (.48145466, 3, 24, 36)),
    ("clip", {"size": 24, "crop_size": 24, "resample": 3}, (.48145466, 3, 24, 24)),
    ("dinov2", {"size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 56},
                "image_mean": [.485, .456, .406]}, (.485, 3, 56, 64)),
    ("mae", {"size": {"height": 40, "width": 40}, "image_mean": [.485, .456, .406]},
     (.485, 2, 40, 0))])
def test_preprocessing(family, pixels, expected, tmp_path):
    """What we read, and what transformers' processor makes of what we write."""
    write(ENCODERS[family](), tmp_path / "old")
    picture = Image.effect_noise((70, 50), 90).convert("RGB")
    if pixels:
        edit(tmp_path / "old", "preprocessor_config.json", **pixels)
    c = m.load_encoder(tmp_path / "old").config
    assert (c.image_mean[0], c.resample, c.image_size, c.shortest_edge) == expected
    for size in (None, 2 * c.image_size):
        encoder = m.load_encoder(tmp_path / "old", image_size=size)
        save(encoder, tmp_path)
        assert m.load_encoder(tmp_path / "encoder").config == encoder.config
        processor = t.AutoImageProcessor.from_pretrained(tmp_path / "encoder")
        shape = processor(picture, return_tensors="pt").pixel_values.shape
        assert shape[2:] == (encoder.config.image_size,) * 2
        if pixels and not size:
            original = type(processor)(**pixels | {"image_std": c.image_std})
            close(*(p(picture, return_tensors="pt").pixel_values for p in (processor, original)))


def test_a_sparse_vision_config_means_the_base_size(tmp_path):
    """SigLIP's and CLIP's own files leave out what transformers' defaults say."""
    t.SiglipVisionModel(t.SiglipVisionConfig(num_hidden_layers=1, image_size=32)).save_pretrained(
        tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip", "vision_config": {
        "model_type": "siglip_vision_model", "image_size": 32, "num_hidden_layers": 1}}))
    assert m.load_encoder(tmp_path, -1).config.hidden_size == 768


# -------------------------------------------------------------------------------------------- LLMs

@pytest.mark.parametrize("family", LLMS)
def test_logits_equal_transformers_and_round_trip(family, tmp_path, tokenizer):
    model = write(LLMS[family](), tmp_path / "old", max_shard_size="20KB")
    llm = m.load_llm(tmp_path / "old")
    assert llm.config == m.read_llm_config(tmp_path / "old")
    assert llm.config.tie_word_embeddings == model.config.tie_word_embeddings
    with torch.no_grad():
        close(logits(llm, TOKENS), model(TOKENS).logits)
        for p in llm.parameters():
            p += .01 * torch.randn(p.shape)
    state = {"llm." + k: v for k, v in llm.state_dict().items()}
    m.save_model(tmp_path, state, m.MLLM(None, None, llm), tokenizer)
    again = opened(t.AutoModelForCausalLM, tmp_path / "llm")
    assert type(again) is type(model)
    with torch.no_grad():
        close(logits(llm, TOKENS), again(TOKENS).logits)
    back = m.load_llm(tmp_path / "llm")
    assert back.config == llm.config
    assert all(torch.equal(v, state["llm." + k]) for k, v in back.state_dict().items())
    kept, old = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("llm", "old"))
    assert kept == old | {"torch_dtype": "float32"}
    assert Tokenizer(tmp_path / "llm").encode("a red circle")


@torch.no_grad()
def test_old_spellings_of_rope(tmp_path):
    model = write(LLMS["llama3"](), tmp_path)
    old = {k: v for k, v in LLAMA3.items() if k not in ("rope_theta", "rope_type")}
    for scaling in (old | {"rope_type": "llama3"}, old | {"type": "llama3"}):
        edit(tmp_path, rope_parameters="gone", rope_scaling=scaling, rope_theta=500.)
        close(logits(m.load_llm(tmp_path), TOKENS), model(TOKENS).logits)
    model = write(LLMS["qwen2 untied"](), tmp_path)
    edit(tmp_path, rope_parameters="gone", rope_scaling=None, rope_theta=1e6, head_dim=None,
         sliding_window=128, torch_dtype="bfloat16", dtype="gone")
    close(logits(m.load_llm(tmp_path), TOKENS), model(TOKENS).logits)


# ----------------------------------------------------------------------------------- bad folders

def without(*names, **others):
    def change(folder):
        tensors = load_file(folder / "model.safetensors")
        tensors = {k: others.get(k.replace(".", "_"), v) for k, v in tensors.items()
                   if k not in names}
        save_file(tensors, folder / "model.safetensors")
    return change


def rewritten(name, content):
    return lambda folder: (folder / name).write_bytes(content)


HUGE_HEADER = (2 ** 60).to_bytes(8, "little") + b"{}"


@pytest.mark.parametrize("family, change, message", [
    ("qwen2", {"use_sliding_window": True}, '"use_sliding_window" is true'),
    ("mistral", {"sliding_window": 32}, '"sliding_window" is 32'),
    ("mistral", {"sliding_window": "gone"}, '"sliding_window" is 4096'),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.}}, '"rope_type" is "yarn"'),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.}}, '"rope_type" is "dynamic"'),
    ("llama", {"rope_scaling": {"type": "llama3"}}, '"factor" is missing'),
    ("llama3", {"rope_parameters": LLAMA3 | {"factor": "2"}}, '"factor" is "2"'),
    ("llama", {"rope_scaling": [2]}, '"rope_type"'),
    ("llama", {"model_type": "qwen3"}, '"model_type" is "qwen3"'),
    ("llama", {"model_type": "gone"}, '"model_type"'),
    ("llama", {"hidden_act": "gelu"}, '"hidden_act" is "gelu"'),
    ("llama", {"hidden_size": "gone"}, '"hidden_size" is missing'),
    ("llama", {"hidden_size": "32"}, '"hidden_size" is "32"'),
    ("llama", {"num_hidden_layers": -1}, '"num_hidden_layers" is -1'),
    ("llama", {"num_hidden_layers": 3}, "Missing.+model.layers.2."),
    ("llama", {"num_hidden_layers": 1}, "Unexpected.+model.layers.1."),
    ("llama", {"num_hidden_layers": 2.0}, '"num_hidden_layers" is 2.0'),
    ("llama", {"num_attention_heads": 0}, '"num_attention_heads" is 0'),
    ("llama", {"num_key_value_heads": 3}, '"num_attention_heads" is 4'),
    ("llama", {"head_dim": 7}, '"num_attention_heads" is 4'),
    ("llama", {"rms_norm_eps": True}, '"rms_norm_eps" is true'),
    ("llama", {"tie_word_embeddings": "yes"}, '"tie_word_embeddings" is "yes"'),
    ("llama", {"rope_parameters": {"rope_theta": -5}}, '"rope_theta" is -5'),
    ("llama", {"vocab_size": 97}, "size mismatch"), ("llama", {"attention_bias": True}, "bias"),
    ("qwen2", {"attention_bias": False}, "Unexpected.+bias"),
    ("siglip", {"model_type": "siglip2"}, '"model_type" is "siglip2"'),
    ("siglip", {"model_type": ["clip"]}, '"model_type"'),
    ("siglip", {"hidden_act": "relu"}, '"hidden_act" is "relu"'),
    ("siglip", {"hidden_size": "gone"}, "size mismatch"),
    ("siglip", {"image_size": [32, 32]}, '"image_size"'),
    ("siglip", {"image_size": -32}, '"image_size" is -32'),
    ("siglip", {"patch_size": 0}, '"patch_size" is 0'),
    ("siglip", {"patch_size": 64}, '"patch_size" 64 make 0'),
    ("siglip", {"layer_norm_eps": float("nan")}, '"layer_norm_eps"'),
    ("siglip", {"num_attention_heads": 3}, '"num_attention_heads" is 3'),
    ("siglip", {"num_hidden_layers": 10 ** 9}, '"num_hidden_layers" is 1000000000'),
    ("siglip", {"num_hidden_layers": 2}, "Unexpected.+encoder.layers.2"),
    ("siglip", {"intermediate_size": 41}, "size mismatch"),
    ("siglip", {"model_type": "siglip", "vision_config": []}, "hidden_size"),
    ("dinov2", {"mlp_ratio": "4"}, '"mlp_ratio" is "4"'),
    ("pixels", {"size": {"height": 32, "width": 48}}, '"image_size" is .+48'),
    ("pixels", {"size": -1}, '"image_size" is -1'), ("pixels", {"size": "32"}, '"image_size"'),
    ("pixels", {"size": {"shortest_edge": {}}}, '"image_size"'),
    ("pixels", {"image_mean": [.5, .5]}, '"image_mean"'),
    ("pixels", {"image_std": [0, 1, 1]}, '"image_std"'),
    ("pixels", {"image_mean": ["a"] * 3}, '"image_mean"'),
    ("pixels", {"resample": "best"}, '"resample"'), ("pixels", {"resample": 9}, '"resample"'),
    ("siglip", shutil.rmtree, "config.json: cannot be read"),
    ("siglip", rewritten("config.json", b"[1]"), "config.json: cannot be read"),
    ("siglip", rewritten("config.json", b"\xff\xfe{"), "config.json: cannot be read"),
    ("siglip", lambda f: (f / "model.safetensors").unlink(), "no safetensors"),
    ("siglip", rewritten("model.safetensors", b"x" * 999), "model.safetensors: cannot be read"),
    ("siglip", rewritten("model.safetensors", b""), "model.safetensors: cannot be read"),
    ("siglip", rewritten("model.safetensors", HUGE_HEADER), "model.safetensors: cannot be read"),
    ("siglip", without("post_layernorm.bias"), "Missing.+post_layernorm.bias"),
    ("siglip", without(post_layernorm_bias=torch.ones(31)), "size mismatch.+post_layernorm.bias"),
    ("siglip", without(post_layernorm_bias=torch.ones(32).long()), "post_layernorm.bias.+I64"),
    ("siglip", without(post_layernorm_bias=torch.ones(32) / 0), "post_layernorm.bias.+finite")])
def test_a_bad_folder_is_refused_by_name(family, change, message, tmp_path):
    folder, pixels = tmp_path / "model", family == "pixels"
    write(ENCODERS["siglip"]() if pixels else (ENCODERS | LLMS)[family](), folder)
    if callable(change):
        change(folder)
    else:
        edit(folder, "preprocessor_config.json" if pixels else "config.json", **change)
    with pytest.raises(BadInput, match=message) as error:
        m.load_llm(folder) if family in LLMS else m.load_encoder(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)
    assert not pixels or "preprocessor_config.json" in str(error.value)


def test_sizes_and_layers_that_are_not_there(tmp_path):
    write(ENCODERS["siglip"](), tmp_path)
    with pytest.raises(BadInput, match="patch_size"):
        m.load_encoder(tmp_path, image_size=7)
    for layer in (1, -5, -99):
        with pytest.raises(BadInput, match=f"select_layer {layer} "):
            m.load_encoder(tmp_path, layer)


# -------------------------------------------------------------------- whole models in one folder

@torch.no_grad()
@pytest.mark.parametrize("family", ["siglip", "clip"])
def test_official_layout(family, tmp_path, tokenizer):
    """LLaVA's own layout: one sharded folder; the tower without its last layer and head."""
    vision = write(ENCODERS[family](), tmp_path / "began", 1)
    llm = write(LLMS["qwen2 untied"](), tmp_path / "llm", 2)
    projector, folder = m.Projector(32, 32), tmp_path / "official"
    tensors = {"model.vision_tower.vision_tower.vision_model." + k: v
               for k, v in vision.state_dict().items()
               if "layers.2." not in k and not k.startswith("head.")}
    tensors |= {"model.mm_projector." + k: v for k, v in projector.state_dict().items()}
    tensors |= {"model.image_newline": torch.ones(32), **llm.state_dict()}
    folder.mkdir()
    for i in range(3):
        save_file({k: tensors[k].contiguous() for k in sorted(tensors)[i::3]},
                  folder / f"model-0000{i + 1}-of-00003.safetensors")
    shutil.copy(tmp_path / "llm" / "config.json", folder)
    edit(folder, model_type="llava_qwen", architectures=["LlavaQwenForCausalLM"],
         mm_vision_tower="google/siglip2-so400m-patch16-384", mm_vision_select_layer=-2)

    net = m.load_model(folder, folder, folder, encoder_config=tmp_path / "began")
    expected = theirs(vision, pictures(), -2)
    close(net.encoder(pictures()), expected)
    close(net.projector(net.encoder(pictures())), projector(expected))
    close(logits(net.llm, TOKENS), llm(TOKENS).logits)
    close(m.load_encoder(folder, -3, config=tmp_path / "began")(pictures()),
          theirs(vision, pictures(), -3))
    for layer in (0, -1):
        with pytest.raises(BadInput, match="cut off"):
            m.load_encoder(folder, layer, config=tmp_path / "began")
    with pytest.raises(BadInput, match='"model_type" is "llava_qwen"'):
        m.load_encoder(folder)

    m.save_model(tmp_path / "ours", net.state_dict(), net, tokenizer)
    close(theirs(opened(type(vision), tmp_path / "ours/encoder"), pictures(), -2), expected)
    close(opened(t.AutoModelForCausalLM, tmp_path / "ours/llm")(TOKENS).logits, llm(TOKENS).logits)
    back = m.load_model(*(tmp_path / "ours" / p for p in ("encoder", "projector", "llm")))
    assert back.encoder.config == net.encoder.config
    close(back.encoder(pictures()), expected)               # -2 still means the same features


@torch.no_grad()
@pytest.mark.parametrize("family", ["siglip", "clip"])
@pytest.mark.parametrize("words", ["qwen2", "llama3", "llama"])
def test_llava_export(family, words, tmp_path, tokenizer):
    write(ENCODERS[family](), tmp_path / "encoder", 1)
    write(LLMS[words](), tmp_path / "llm", 2)
    for layer, size in ((-2, None), (-3, 40)):
        net = m.load_model(tmp_path / "encoder", None, tmp_path / "llm", layer, image_size=size)
        m.export_llava(tmp_path / "llava", net, [tokenizer.file], 95)
        n, x = net.encoder.config.tokens, pictures(2, size or 32)
        tokens = torch.randint(0, 95, (2, 12 + n), generator=torch.Generator().manual_seed(3))
        tokens[:, 4:4 + n] = 95
        embedded = net.llm.model.embed_tokens(tokens)
        embedded[:, 4:4 + n] = net.projector(net.encoder(x))
        mask = torch.ones(1, 1, 12 + n, 12 + n, dtype=torch.bool).tril()
        hidden = net.llm(embedded, mask, torch.arange(12 + n).expand(2, -1))
        llava = opened(t.LlavaForConditionalGeneration, tmp_path / "llava")
        close(hidden @ net.llm.head().T, llava(input_ids=tokens, pixel_values=x).logits)
        assert (tmp_path / "llava" / tokenizer.file.name).exists()
    for token in (96, -1):
        with pytest.raises(BadInput, match=f"image token {token} "):
            m.export_llava(tmp_path / "llava", net, [], token)
    write(ENCODERS["vit"](), tmp_path / "vit")
    net.encoder = m.load_encoder(tmp_path / "vit")
    with pytest.raises(BadInput, match="SigLIP or CLIP"):
        m.export_llava(tmp_path / "llava", net, [], 5)
