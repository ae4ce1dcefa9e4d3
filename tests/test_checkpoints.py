"""Checkpoints: what transformers wrote we compute alike, and what we write transformers opens."""
import json
import shutil

import pytest
import torch
import transformers as t
from safetensors.torch import load_file, save_file

import model as m
from data import BadInput, Tokenizer

VISION = dict(hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2,
              image_size=32, patch_size=8)
DINO = {k: v for k, v in VISION.items() if k != "intermediate_size"}
DECODER = dict(decoder_hidden_size=16, decoder_intermediate_size=24, decoder_num_hidden_layers=1,
               decoder_num_attention_heads=2)
TEXT = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
TOWER_TEXT = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                  num_attention_heads=2, vocab_size=50)

ENCODERS = {
    "siglip": lambda: t.SiglipVisionModel(t.SiglipVisionConfig(**VISION)),
    "clip": lambda: t.CLIPVisionModel(t.CLIPVisionConfig(**VISION)),
    "dinov2": lambda: t.Dinov2Model(t.Dinov2Config(**DINO)),
    "dinov2 giant": lambda: t.Dinov2Model(t.Dinov2Config(**DINO, use_swiglu_ffn=True)),
    "dinov2 registers": lambda: t.Dinov2WithRegistersModel(t.Dinov2WithRegistersConfig(**DINO)),
    "dinov2 giant registers": lambda: t.Dinov2WithRegistersModel(
        t.Dinov2WithRegistersConfig(**DINO, use_swiglu_ffn=True, num_register_tokens=3)),
    "mae": lambda: t.ViTMAEModel(t.ViTMAEConfig(**VISION, **DECODER)),
    "mae with decoder": lambda: t.ViTMAEForPreTraining(t.ViTMAEConfig(**VISION, **DECODER)),
    "vit": lambda: t.ViTModel(t.ViTConfig(**VISION)),
    "vit without bias": lambda: t.ViTModel(t.ViTConfig(**VISION, qkv_bias=False)),
    "vit classifier": lambda: t.ViTForImageClassification(t.ViTConfig(**VISION)),
    "dinov2 classifier": lambda: t.Dinov2ForImageClassification(t.Dinov2Config(**DINO)),
    "whole siglip": lambda: t.SiglipModel(t.SiglipConfig(
        text_config=TOWER_TEXT, vision_config=VISION)),
    "whole clip": lambda: t.CLIPModel(t.CLIPConfig(text_config=TOWER_TEXT, vision_config=VISION))}
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
    "llama linear": lambda: t.LlamaForCausalLM(t.LlamaConfig(
        **TEXT, rope_parameters=dict(rope_type="linear", factor=2., rope_theta=1e4))),
    "llama bias head_dim": lambda: t.LlamaForCausalLM(t.LlamaConfig(
        **TEXT, attention_bias=True, head_dim=12)),
    "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**TEXT, sliding_window=None))}


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
    extra = getattr(model.config, "num_register_tokens", 0) + ("siglip" not in name)
    return x[:, extra:]


def stored(folder):
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


# ---------------------------------------------------------------------------------------- encoders

@torch.no_grad()
@pytest.mark.parametrize("family", ENCODERS)
def test_features_equal_transformers(family, tmp_path):
    model = write(ENCODERS[family](), tmp_path)
    for layer in (-1, -2, -3):
        encoder = m.load_encoder(tmp_path, layer)
        assert encoder.config.tokens == 16
        close(encoder(pictures()), theirs(model, pictures(), layer))
        close(encoder(pictures(1)), theirs(model, pictures(1), layer))
    # 5 and 3 patches a side where it was trained with 4: transformers interpolates as we do, with
    # antialiasing where DINOv2 has registers (as its authors do) and nowhere else
    for size in (40, 24, 35):
        encoder = m.load_encoder(tmp_path, -2, image_size=size)
        assert encoder.config.tokens == (size // 8) ** 2
        close(encoder(pictures(2, size)), theirs(model, pictures(2, size), -2))


@torch.no_grad()
@pytest.mark.parametrize("family", ["vit", "dinov2", "siglip"])
def test_layer_zero_runs_everything_and_the_norm(family, tmp_path):
    model, extra = write(ENCODERS[family](), tmp_path), family != "siglip"
    close(m.load_encoder(tmp_path, 0)(pictures()),
          model(pictures()).last_hidden_state[:, extra:])


@pytest.mark.parametrize("size", [None, 40])
@pytest.mark.parametrize("family", ENCODERS)
def test_round_trip(family, size, tmp_path, tokenizer):
    """Opened, trained a step, saved: transformers finds all it wants and computes the same; what
    did not train is the original's, bit for bit."""
    write(ENCODERS[family](), tmp_path / "old")
    encoder = m.load_encoder(tmp_path / "old", -2, size)
    for module in encoder.unused():
        module.requires_grad_(False)
    x = pictures(2, size or 32)
    encoder(x).square().mean().backward()
    torch.optim.SGD([p for p in encoder.parameters() if p.requires_grad], 1e-2).step()
    state = {"encoder." + k: v for k, v in encoder.state_dict().items()}
    m.save_model(tmp_path, state, encoder.config, False, False, tokenizer)

    kind = SAVED_AS.get(family, type(ENCODERS[family]()))
    close(encoder(x).detach(), theirs(opened(kind, tmp_path / "encoder"), x, -2))
    back = m.load_encoder(tmp_path / "encoder", -2)
    assert back.config == encoder.config and torch.equal(back(x), encoder(x))

    old, new = stored(tmp_path / "old"), stored(tmp_path / "encoder")
    old = {k: v for k, v in old.items() if not k.startswith(("text_", "logit", "visual_proj"))}
    if "siglip" in family or "clip" in family:              # the hub's names
        old = {"vision_model." + k.removeprefix("vision_model."): v for k, v in old.items()}
    still = [k for k in old if any(s in k for s in ("layers.2.", "layer.2.", "head.", "pooler",
             "classifier", "mask_token", "decoder_pred")) or k.startswith((
                 "layernorm", "vit.layernorm", "dinov2.layernorm", "vision_model.post_layer"))]
    if size is None:
        assert set(old) == set(new)
    assert len(still) > 10 and all(torch.equal(old[k], new[k]) for k in still)
    moved = [k for k in old if ("layers.0." in k or "layer.0." in k) and "decoder" not in k]
    assert not any(torch.equal(old[k], new[k]) for k in moved if "k_proj.b" not in k and
                   "key.b" not in k)                        # whose gradient is zero
    config = json.loads((tmp_path / "encoder" / "config.json").read_text())
    original = json.loads((tmp_path / "old" / "config.json").read_text())
    original = original.get("vision_config", original)
    changed = {k for k in original if config[k] != original[k]}
    assert changed <= {"architectures", "image_size"} and config["dtype"] == "float32"


@torch.no_grad()
@pytest.mark.parametrize("family", ["siglip", "clip"])
def test_names_and_shards_of_the_hub(family, tmp_path):
    """Hub checkpoints have a prefix, and old CLIPs a table of position_ids; large ones shards."""
    model = write(ENCODERS[family](), tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    tensors = {"vision_model." + k: v for k, v in stored(tmp_path / "a").items()}
    tensors["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(tensors, tmp_path / "b/model.safetensors", {"format": "pt"})
    model.save_pretrained(tmp_path / "c", max_shard_size="20KB")
    assert len(list((tmp_path / "c").glob("*.safetensors"))) > 2
    expected = theirs(model, pictures(), -2)
    for name in "abc":
        close(m.load_encoder(tmp_path / name)(pictures()), expected)
    encoder = m.load_encoder(tmp_path / "b")
    state = {"encoder." + k: v for k, v in encoder.state_dict().items()}
    m.save_model(tmp_path, state, encoder.config, False, False, None)
    assert all(torch.equal(v, tensors[k]) for k, v in stored(tmp_path / "encoder").items())
    assert len(stored(tmp_path / "encoder")) == len(tensors)


@torch.no_grad()
def test_bf16_in_fp32_out_and_back(tmp_path):
    """A bf16 checkpoint is computed and saved in fp32; saved as bf16, transformers opens bf16."""
    model = write(ENCODERS["siglip"](), tmp_path / "old").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "old")
    encoder = m.load_encoder(tmp_path / "old")
    close(encoder(pictures()), theirs(model.float(), pictures(), -2))
    state = {"encoder." + k: v for k, v in encoder.state_dict().items()}
    m.save_model(tmp_path, state, encoder.config, False, False, None)
    opened(t.SiglipVisionModel, tmp_path / "encoder")
    m.save_model(tmp_path, state, encoder.config, False, False, None, dtype=torch.bfloat16)
    assert t.AutoModel.from_pretrained(tmp_path / "encoder").dtype == torch.bfloat16


@pytest.mark.parametrize("family, pixels, expected", [
    ("siglip", None, ((.5,) * 3, 3, 32, 0)),
    ("siglip", {"size": {"height": 48, "width": 48}, "resample": 2, "image_mean": [.1, .2, .3]},
     ((.1, .2, .3), 2, 48, 0)),
    ("clip", None, (m.CLIP["image_mean"], 3, 32, 32)),
    ("clip", {"size": {"shortest_edge": 36}, "crop_size": {"height": 24, "width": 24},
              "do_center_crop": True}, (m.CLIP["image_mean"], 3, 24, 36)),
    ("clip", {"size": 24, "crop_size": 24, "resample": 3}, (m.CLIP["image_mean"], 3, 24, 24)),
    ("dinov2", {"size": {"shortest_edge": 64}, "crop_size": 56}, (m.IMAGENET["image_mean"], 3, 56,
                                                                64)),
    ("mae", {"size": 40}, (m.IMAGENET["image_mean"], 2, 40, 0)),
    ("vit", None, ((.5,) * 3, 2, 32, 0))])
def test_preprocessing(family, pixels, expected, tmp_path):
    write(ENCODERS[family](), tmp_path / "old")
    if pixels:
        (tmp_path / "old" / "preprocessor_config.json").write_text(json.dumps(pixels))
    c = m.load_encoder(tmp_path / "old").config
    assert (c.image_mean, c.resample, c.image_size, c.shortest_edge) == expected
    for size in (None, 2 * c.image_size):
        encoder = m.load_encoder(tmp_path / "old", image_size=size)
        state = {"encoder." + k: v for k, v in encoder.state_dict().items()}
        m.save_model(tmp_path, state, encoder.config, False, False, None)
        saved = json.loads((tmp_path / "encoder" / "preprocessor_config.json").read_text())
        assert saved == pixels or not pixels or size
        assert m.load_encoder(tmp_path / "encoder").config == encoder.config
        processor = t.AutoImageProcessor.from_pretrained(tmp_path / "encoder") if (
            "image_processor_type" in saved) else None
        if processor:
            from PIL import Image
            shape = processor(Image.new("RGB", (70, 50)), return_tensors="pt").pixel_values.shape
            assert shape[2:] == (encoder.config.image_size,) * 2


def test_a_sparse_vision_config_means_the_base_size(tmp_path):
    """SigLIP's and CLIP's own files leave out what transformers' defaults say."""
    t.SiglipVisionModel(t.SiglipVisionConfig(num_hidden_layers=1, image_size=32)).save_pretrained(
        tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip", "vision_config": {
        "model_type": "siglip_vision_model", "image_size": 32, "num_hidden_layers": 1}}))
    assert m.load_encoder(tmp_path, -1).config.hidden_size == 768


# -------------------------------------------------------------------------------------------- LLMs

@torch.no_grad()
def logits(llm, tokens):
    n = tokens.shape[1]
    mask = torch.ones(1, 1, n, n, dtype=torch.bool).tril()
    hidden = llm(llm.model.embed_tokens(tokens), mask, torch.arange(n).expand(len(tokens), n))
    return hidden @ llm.head().T


TOKENS = torch.randint(0, 96, (2, 50), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", LLMS)
def test_logits_equal_transformers_and_round_trip(family, tmp_path, tokenizer, monkeypatch):
    model = write(LLMS[family](), tmp_path / "old")
    edit(tmp_path / "old", "generation_config.json", temperature=.7, do_sample=True)
    llm = m.load_llm(tmp_path / "old")
    assert llm.config.tie_word_embeddings == model.config.tie_word_embeddings
    with torch.no_grad():
        close(logits(llm, TOKENS), model(TOKENS).logits)
        for p in llm.parameters():
            p += .01 * torch.randn(p.shape)
    state = {"llm." + k: v for k, v in llm.state_dict().items()}
    for limit in (m.MAX_SHARD, 20000):
        monkeypatch.setattr(m, "MAX_SHARD", limit)
        m.save_model(tmp_path, state, False, False, llm.config, tokenizer)
        sharded = (tmp_path / "llm" / "model.safetensors.index.json").exists()
        assert sharded == (limit == 20000)
        again = opened(t.AutoModelForCausalLM, tmp_path / "llm")
        assert type(again) is type(model)
        with torch.no_grad():
            close(logits(llm, TOKENS), again(TOKENS).logits)
        back = m.load_llm(tmp_path / "llm")
        assert back.config == llm.config
        assert all(torch.equal(v, state["llm." + k]) for k, v in back.state_dict().items())
        for name in ("config.json", "generation_config.json"):
            kept, old = (json.loads((tmp_path / f / name).read_text()) for f in ("llm", "old"))
            assert kept == old
    assert Tokenizer(tmp_path / "llm").encode("a red circle")
    if len(files := list((tmp_path / "llm").glob("*.safetensors"))) > 1:
        assert max(f.stat().st_size for f in files) < 25000
        before = m.hash_weights(tmp_path / "llm")
        files[0].write_bytes(files[0].read_bytes()[:-1] + b"x")
        assert m.hash_weights(tmp_path / "llm") != before


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


@pytest.mark.parametrize("family, change, message", [
    ("qwen2", {"use_sliding_window": True}, '"use_sliding_window" is true'),
    ("mistral", {"sliding_window": 32}, '"sliding_window" is 32'),
    ("mistral", {"sliding_window": "gone"}, '"sliding_window" is 4096'),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.}}, '"rope_type" is "yarn"'),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.}}, '"rope_type" is "dynamic"'),
    ("llama", {"rope_scaling": {"type": "linear"}}, '"factor" is missing'),
    ("llama", {"rope_scaling": {"type": "linear", "factor": "2"}}, '"factor" is "2"'),
    ("llama", {"rope_scaling": [2]}, '"rope_scaling"'),
    ("llama", {"model_type": "qwen3"}, '"model_type" is "qwen3"'),
    ("llama", {"model_type": "gone"}, '"model_type"'),
    ("llama", {"hidden_act": "gelu"}, '"hidden_act" is "gelu"'),
    ("llama", {"mlp_bias": True}, '"mlp_bias" is true'),
    ("llama", {"quantization_config": {"bits": 4}}, '"quantization_config"'),
    ("llama", {"hidden_size": "gone"}, '"hidden_size" is missing'),
    ("llama", {"hidden_size": "32"}, '"hidden_size" is "32"'),
    ("llama", {"num_hidden_layers": -1}, '"num_hidden_layers" is -1'),
    ("llama", {"num_hidden_layers": 3}, "model.layers.2.+ is missing"),
    ("llama", {"num_hidden_layers": 1}, "has model.layers.1."),
    ("llama", {"num_hidden_layers": 2.0}, '"num_hidden_layers" is 2.0'),
    ("llama", {"num_attention_heads": 0}, '"num_attention_heads" is 0'),
    ("llama", {"num_attention_heads": 5, "head_dim": None}, "does not divide"),
    ("llama", {"num_key_value_heads": 3}, "does not divide"),
    ("llama", {"rms_norm_eps": True}, '"rms_norm_eps" is true'),
    ("llama", {"tie_word_embeddings": "yes"}, '"tie_word_embeddings" is "yes"'),
    ("llama", {"rope_parameters": {"rope_theta": -5}}, '"rope_theta" is -5'),
    ("llama", {"vocab_size": 97}, "expected"),
    ("llama", {"attention_bias": True}, "bias is missing"),
    ("llama bias head_dim", {"attention_bias": False}, "has model.layers.0.self_attn")])
def test_what_would_be_computed_wrongly_is_refused(family, change, message, tmp_path):
    write(LLMS[family](), tmp_path)
    edit(tmp_path, **change)
    with pytest.raises(BadInput, match=message) as error:
        m.load_llm(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("change, message", [
    ({"model_type": "siglip2"}, '"model_type" is "siglip2"'),
    ({"model_type": ["clip"]}, '"model_type"'),
    ({"hidden_act": "relu"}, '"hidden_act" is "relu"'),
    ({"num_channels": 1}, '"num_channels" is 1'),
    ({"hidden_size": "gone"}, '"hidden_size" is missing'),
    ({"image_size": "gone"}, '"image_size" is missing'),
    ({"image_size": [32, 32]}, '"image_size"'),
    ({"image_size": -32}, '"image_size" is -32'),
    ({"patch_size": 0}, '"patch_size" is 0'),
    ({"patch_size": 64}, '"patch_size"'),
    ({"layer_norm_eps": "small"}, '"layer_norm_eps" is "small"'),
    ({"layer_norm_eps": float("nan")}, '"layer_norm_eps"'),
    ({"num_attention_heads": 3}, "does not divide"),
    ({"num_hidden_layers": 10 ** 9}, "missing"),
    ({"num_hidden_layers": 2}, "has vision_model.encoder.layers.2|has encoder.layers.2"),
    ({"intermediate_size": 41}, "expected"),
    ({"image_size": 64}, "position_embedding.+expected"),
    ({"source": {"files": {}}}, None),
    ({"model_type": "siglip"}, '"vision_config" is missing'),
    ({"model_type": "siglip", "vision_config": []}, '"vision_config"')])
def test_an_encoder_config_that_makes_no_sense(change, message, tmp_path):
    write(ENCODERS["siglip"](), tmp_path)
    edit(tmp_path, **change)
    if message is None:
        assert m.load_encoder(tmp_path).config.source.names
        return
    with pytest.raises(BadInput, match=message) as error:
        m.load_encoder(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("pixels, message", [
    ({"size": {"height": 32, "width": 48}}, '"size"'), ({"size": -1}, '"size"'),
    ({"size": {}}, None), ({"size": "32"}, '"size"'), ({"size": {"shortest_edge": {}}}, '"size"'),
    ({"image_mean": [.5, .5]}, '"image_mean"'), ({"image_std": [0, 1, 1]}, '"image_std"'),
    ({"image_mean": ["a"] * 3}, '"image_mean"'), ({"resample": "best"}, '"resample"')])
def test_a_preprocessor_config_that_makes_no_sense(pixels, message, tmp_path):
    write(ENCODERS["siglip"](), tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(pixels))
    if message is None:
        m.load_encoder(tmp_path)
        return
    with pytest.raises(BadInput, match=message) as error:
        m.load_encoder(tmp_path)
    assert "preprocessor_config.json" in str(error.value) and "\n" not in str(error.value)


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def without(*names, **others):
    def change(folder):
        tensors = {k: others.get(k.replace(".", "_"), v) for k, v in
                   load_file(folder / "model.safetensors").items() if k not in names}
        save_file(tensors, folder / "model.safetensors")
    return change


def index(**table):
    def change(folder):
        (folder / "model.safetensors").rename(folder / "other.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps(table))
    return change


@pytest.mark.parametrize("damage, message", [
    (lambda f: shutil.rmtree(f), "config.json: cannot be read"),
    (lambda f: (f / "config.json").write_text("[1]"), "not a JSON object"),
    (lambda f: (f / "config.json").write_bytes(b"\xff\xfe{"), "config.json: cannot be read"),
    (lambda f: (f / "model.safetensors").unlink(), "model.safetensors: cannot be read"),
    (lambda f: (f / "model.safetensors").write_bytes(b"x" * 999), "cannot be read"),
    (lambda f: (f / "model.safetensors").write_bytes(b""), "cannot be read"),
    (lambda f: (f / "model.safetensors").write_bytes((2 ** 60).to_bytes(8, "little") + b"{}"),
     "cannot be read"),
    (cut, "cannot be read"),
    (without("post_layernorm.bias"), "post_layernorm.bias is missing"),
    (without(post_layernorm_bias=torch.ones(31)), "post_layernorm.bias is .31,."),
    (without(post_layernorm_bias=torch.ones(32, dtype=torch.long)), "post_layernorm.bias.+I64"),
    (index(), "weight_map"), (index(weight_map={}), "weight_map"),
    (index(weight_map={"a": "../model.safetensors"}), "weight_map"),
    (index(weight_map={"a": "absent.safetensors"}), "absent.safetensors: cannot be read"),
    (index(weight_map={"a": 5}), "cannot be read|weight_map")])
def test_a_damaged_encoder_folder(damage, message, tmp_path):
    folder = tmp_path / "encoder"
    write(ENCODERS["siglip"](), folder)
    damage(folder)
    with pytest.raises(BadInput, match=message) as error:
        m.load_encoder(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_pictures_smaller_than_a_patch(tmp_path):
    write(ENCODERS["siglip"](), tmp_path)
    with pytest.raises(BadInput, match="patch_size"):
        m.load_encoder(tmp_path, image_size=7)


@pytest.mark.parametrize("layer", [1, -5, -99])
def test_a_layer_that_is_not_there(layer, tmp_path):
    write(ENCODERS["siglip"](), tmp_path)
    with pytest.raises(BadInput, match=f"select_layer {layer} "):
        m.load_encoder(tmp_path, layer)


# -------------------------------------------------------------------- whole models in one folder

@pytest.fixture(params=["siglip", "clip"])
def official(request, tmp_path):
    """LLaVA's own layout: one sharded folder; the tower without its last layer and head."""
    vision = write(ENCODERS[request.param](), tmp_path / "began", 1)
    llm = write(LLMS["qwen2 untied"](), tmp_path / "llm", 2)
    projector = m.Projector(32, 32)
    tensors = {"model.vision_tower.vision_tower.vision_model." + k: v
               for k, v in vision.state_dict().items()
               if "layers.2." not in k and not k.startswith("head.")}
    tensors |= {"model.mm_projector." + k: v for k, v in projector.state_dict().items()}
    tensors |= {"model.image_newline": torch.ones(32), **llm.state_dict()}
    names, folder = sorted(tensors), tmp_path / "official"
    folder.mkdir()
    for i in range(3):
        save_file({k: tensors[k].contiguous() for k in names[i::3]}, folder / f"s{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(
        {"weight_map": {k: f"s{i % 3}.safetensors" for i, k in enumerate(names)}}))
    config = json.loads((tmp_path / "llm" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {
        "model_type": "llava_qwen", "architectures": ["LlavaQwenForCausalLM"],
        "mm_vision_tower": "google/siglip2-so400m-patch16-384", "mm_vision_select_layer": -2}))
    return folder, vision, projector, llm


@torch.no_grad()
def test_official_layout(official, tmp_path, tokenizer):
    folder, vision, projector, llm = official
    net = m.load_model(folder, folder, folder, encoder_config=tmp_path / "began")
    c = net.encoder.config
    assert (c.num_hidden_layers, c.dropped_layers, net.encoder.select_layer) == (2, 1, -1)
    expected = theirs(vision, pictures(), -2)
    close(net.encoder(pictures()), expected)
    close(net.projector(net.encoder(pictures())), projector(expected))
    close(logits(net.llm, TOKENS), llm(TOKENS).logits)
    close(m.load_encoder(folder, -3, config=tmp_path / "began")(pictures()),
          theirs(vision, pictures(), -3))

    m.save_model(tmp_path / "ours", net.state_dict(), c, True, net.llm.config, tokenizer)
    again = opened(type(vision), tmp_path / "ours" / "encoder")
    close(theirs(again, pictures(), -1), expected)
    close(opened(t.AutoModelForCausalLM, tmp_path / "ours" / "llm")(TOKENS).logits,
          llm(TOKENS).logits)
    back = m.load_model(*(tmp_path / "ours" / p for p in ("encoder", "projector", "llm")))
    assert back.encoder.select_layer == -1 and back.encoder.config == c
    close(back.encoder(pictures()), expected)               # -2 still means the same features
    for layer in (0, -1):
        with pytest.raises(BadInput, match="cut off"):
            m.load_encoder(tmp_path / "ours" / "encoder", layer)
    with pytest.raises(BadInput, match='"model_type" is "llava_qwen"'):
        m.load_encoder(folder)


@pytest.mark.parametrize("family", ["siglip", "clip"])
@pytest.mark.parametrize("words", ["qwen2", "llama3", "llama"])
@torch.no_grad()
def test_llava_export(family, words, tmp_path, tokenizer):
    write(ENCODERS[family](), tmp_path / "encoder", 1)
    write(LLMS[words](), tmp_path / "llm", 2)
    for layer, size in ((-2, None), (-3, 40)):
        net = m.load_model(tmp_path / "encoder", None, tmp_path / "llm", layer, image_size=size)
        m.export_llava(tmp_path / "llava", net, [tokenizer.file], 95)
        llava = opened(t.LlavaForConditionalGeneration, tmp_path / "llava")
        n = net.encoder.config.tokens
        x = pictures(2, size or 32)
        tokens = torch.randint(0, 95, (2, 12 + n), generator=torch.Generator().manual_seed(3))
        tokens[:, 4:4 + n] = 95
        got = llava(input_ids=tokens, pixel_values=x).logits
        embedded = net.llm.model.embed_tokens(tokens)
        embedded[:, 4:4 + n] = net.projector(net.encoder(x))
        mask = torch.ones(1, 1, 12 + n, 12 + n, dtype=torch.bool).tril()
        hidden = net.llm(embedded, mask, torch.arange(12 + n).expand(2, -1))
        close(hidden @ net.llm.head().T, got)
        assert (tmp_path / "llava" / tokenizer.file.name).exists()
    for token in (96, -1):
        with pytest.raises(BadInput, match=f"image token {token} "):
            m.export_llava(tmp_path / "llava", net, [], token)
    write(ENCODERS["vit"](), tmp_path / "vit")
    net.encoder = m.load_encoder(tmp_path / "vit")
    with pytest.raises(BadInput, match="SigLIP or CLIP"):
        m.export_llava(tmp_path / "llava", net, [], 5)
