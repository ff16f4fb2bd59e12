"""Converted CLIP, DINO and reward models against Hugging Face's own classes, on random weights."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hub import random_state, save_tokenizer
from test_convert_clip import CLIP_CONFIG, DINO_CONFIG
from test_convert_clip import run as convert_scores
from test_reward_model import LLAMA, LLAMA_TEMPLATE, QWEN, QWEN_TEMPLATE, SPECIALS
from test_reward_model import run as convert_reward

from aps_jax import pretrained
from aps_jax.scores import clip as clip_scores
from aps_jax.scores import dino as dino_scores
from convert import clip, dino

torch = pytest.importorskip("torch", reason="needs pip install 'aps_jax[torch]'")
transformers = pytest.importorskip("transformers", reason="needs pip install transformers")

TOLERANCE = 2e-5


def save(model, folder, seed):
    """Random weights, norms and biases included, as the library itself writes them."""
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    state = random_state(shapes, seed=seed)
    model.load_state_dict({name: torch.tensor(value) for name, value in state.items()})
    model.eval().save_pretrained(folder)
    return folder


def check_clip(config, tmp_path, rng, length):
    model = transformers.CLIPModel(transformers.CLIPConfig(**config))
    source = save(model, tmp_path / "hub", seed=5)
    assert convert_scores(clip, source, tmp_path / "model", "--verify") == 0
    ours = pretrained.load_clip(tmp_path / "model")
    size = ours.config.image.image_size
    x = rng.uniform(-1, 1, size=(2, size, size, 3)).astype(np.float32)
    end = ours.config.end_id
    ids = rng.integers(0, end, size=(2, length))
    ids[0, length // 2 :] = ids[1, -1] = end  # one is padded, one is full
    pixels = ((x + 1) / 2 - np.float32(clip_scores.MEAN)) / np.float32(clip_scores.STD)
    with torch.no_grad():
        out = model(input_ids=torch.tensor(ids), pixel_values=torch.tensor(pixels).movedim(-1, 1))
    got = jax.jit(lambda m, x, ids: (m.embed_image(x), m.embed_text(ids)))(ours, x, ids)
    assert np.ptp(out.text_embeds.numpy(), axis=0).max() > 1e-2
    for mine, theirs in zip(got, (out.image_embeds, out.text_embeds), strict=True):
        assert np.abs(mine - theirs.numpy()).max() < TOLERANCE
    scale = np.exp(ours.params["logit_scale"])
    logits = out.logits_per_image.numpy()
    assert np.abs(scale * got[0] @ got[1].T - logits).max() < TOLERANCE * scale


def test_clip(tmp_path, rng):
    text = CLIP_CONFIG["text_config"] | {"max_position_embeddings": 9}
    check_clip(CLIP_CONFIG | {"text_config": text}, tmp_path, rng, length=9)


@pytest.mark.slow
def test_clip_of_the_true_size(tmp_path, rng):
    """ViT-B/32 as published, 151 million weights, all random."""
    check_clip({}, tmp_path, rng, length=77)


@pytest.mark.slow
def test_large_clip_of_the_true_size(tmp_path, rng):
    """ViT-L/14 as published, 428 million weights, all random."""
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    image = {
        "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
        "num_hidden_layers": 24, "patch_size": 14,
    }  # fmt: skip
    config = {"text_config": text, "vision_config": image, "projection_dim": 768}
    check_clip(config, tmp_path, rng, length=77)


def check_dino(config, tmp_path, rng):
    model = transformers.ViTModel(transformers.ViTConfig(**config))
    source = save(model, tmp_path / "hub", seed=6)
    assert convert_scores(dino, source, tmp_path / "model", "--verify") == 0
    ours = pretrained.load_dino(tmp_path / "model")
    size = ours.config.image_size
    x = rng.uniform(-1, 1, size=(2, size, size, 3)).astype(np.float32)
    pixels = ((x + 1) / 2 - np.float32(dino_scores.MEAN)) / np.float32(dino_scores.STD)
    with torch.no_grad():
        out = model(torch.tensor(pixels).movedim(-1, 1)).last_hidden_state[:, 0].numpy()
    got = jax.jit(lambda m, x: m.embed_image(x))(ours, x)
    assert np.abs(got - out).max() < TOLERANCE and np.abs(out[0] - out[1]).max() > 1e-2


def test_dino(tmp_path, rng):
    check_dino(DINO_CONFIG, tmp_path, rng)


@pytest.mark.slow
def test_dino_of_the_true_size(tmp_path, rng):
    """ViT-S/16, 22 million weights, all random."""
    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6}
    check_dino(sizes, tmp_path, rng)


@pytest.mark.parametrize("family", ["Qwen3", "Qwen2", "Llama"])
def test_reward(tmp_path, rng, family):
    """The same conversation by the library's own template and tokenizer, ids and soft answers."""
    config = (LLAMA if family == "Llama" else QWEN) | {"num_labels": 1}
    config = {k: v for k, v in config.items() if k not in ("model_type", "architectures")}
    if family == "Qwen2":
        config |= {"head_dim": 4, "use_sliding_window": False}
    if family == "Llama":
        config = {k: v for k, v in config.items() if "sliding" not in k}
    kind = getattr(transformers, f"{family}Config")
    model = getattr(transformers, f"{family}ForSequenceClassification")(kind(**config))
    source = save(model, tmp_path / "hub", seed=7)
    save_tokenizer(source, SPECIALS)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(source / "tokenizer.json"), bos_token="<|begin|>", pad_token="<|pad|>"
    )
    tokenizer.chat_template = LLAMA_TEMPLATE if family == "Llama" else QWEN_TEMPLATE
    settings = {"bos_token": "<|begin|>", "chat_template": tokenizer.chat_template}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    assert convert_reward(source, tmp_path / "model", "--dtype", "float32", "--verify") == 0

    prompt, answer = " What is warm? ", "The sun, mostly."
    chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    rows = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        expected = model(input_ids=rows).logits[:, 0].numpy()
    ours = pretrained.load_reward(tmp_path / "model", prompt)
    letters = tokenizer(answer, add_special_tokens=False)["input_ids"]
    run = jax.jit(lambda model, embeddings: model(embeddings))
    assert np.abs(run(ours, ours.table[np.array([letters])]) - expected).max() < TOLERANCE

    shares = rng.dirichlet(np.ones(len(ours.table)), size=(1, len(letters)))
    soft = jnp.asarray(shares @ np.asarray(ours.table), jnp.float32)
    start = ours.params["before"].shape[1]
    assert start + len(letters) + len(ours.params["after"]) == rows.shape[1]
    with torch.no_grad():
        x = model.get_input_embeddings()(rows).clone()
        x[:, start : start + len(letters)] = torch.tensor(np.array(soft))
        model.config.pad_token_id = None  # Or it would look for pads in ids that are not given.
        expected_soft = model(inputs_embeds=x).logits[:, 0].numpy()
    assert np.abs(run(ours, soft) - expected_soft).max() < TOLERANCE
    assert np.abs(expected - expected_soft).max() > 1e-3
