"""Forward passes of published networks in NumPy, float64, on tensors by their published names.

Written for the tests from the papers and the names alone: loops over heads and rows of text, no
code of the library.
"""

import numpy as np


def norm(x, weight, bias, eps):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * weight + bias


def rms(x, weight, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gelu(x):
    from scipy.special import erf

    return x * (1 + erf(x / np.sqrt(2))) / 2


def quick_gelu(x):
    return x * sigmoid(1.702 * x)


def attention(query, key, value, num_heads, is_causal):
    """One text or image: query [L, heads * D], key and value [L, shared * D]."""
    size = query.shape[-1] // num_heads
    each = num_heads * size // key.shape[-1]  # query heads per key head
    out = np.zeros_like(query)
    for head in range(num_heads):
        own = slice(head * size, (head + 1) * size)
        shared = slice(head // each * size, (head // each + 1) * size)
        scores = query[:, own] @ key[:, shared].T / np.sqrt(size)
        if is_causal:
            scores[np.triu_indices(len(scores), 1)] = -np.inf
        out[:, own] = softmax(scores) @ value[:, shared]
    return out


CLIP_NAMES = (
    "layer_norm1", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj",
    "layer_norm2", "mlp.fc1", "mlp.fc2",
)  # fmt: skip
VIT_NAMES = (
    "layernorm_before", "attention.attention.query", "attention.attention.key",
    "attention.attention.value", "attention.output.dense", "layernorm_after",
    "intermediate.dense", "output.dense",
)  # fmt: skip


def plain_blocks(state, prefix, names, x, *, num_heads, activation, eps, is_causal=False):
    """Pre-normed blocks with biases over one sequence [L, width]."""
    layer = 0
    while f"{prefix}.{layer}.{names[0]}.weight" in state:

        def get(index, at=layer):
            name = f"{prefix}.{at}.{names[index]}"
            return state[f"{name}.weight"], state[f"{name}.bias"]

        def linear(index, y):
            weight, bias = get(index)
            return y @ weight.T + bias

        normed = norm(x, *get(0), eps)
        mixed = attention(*(linear(i, normed) for i in (1, 2, 3)), num_heads, is_causal)
        x = x + linear(4, mixed)
        x = x + linear(7, activation(linear(6, norm(x, *get(5), eps))))
        layer += 1
    return x


def patches(image, size):
    """Channels first inside a patch, as the weights of a convolution: [N, 3 * size * size]."""
    rows, columns = (side // size for side in image.shape[:2])
    return np.stack(
        [
            image[r * size : (r + 1) * size, c * size : (c + 1) * size].transpose(2, 0, 1).ravel()
            for r in range(rows)
            for c in range(columns)
        ]
    )


def clip_image(state, pixels, config):
    """Unit vector of one normalised image [S, S, 3]."""
    vision = config["vision_config"]
    weight = state["vision_model.embeddings.patch_embedding.weight"]
    x = patches(pixels, weight.shape[-1]) @ weight.reshape(len(weight), -1).T
    x = np.vstack([state["vision_model.embeddings.class_embedding"], x])
    x = x + state["vision_model.embeddings.position_embedding.weight"]
    eps = vision["layer_norm_eps"]
    name = "vision_model.pre_layrnorm"
    x = norm(x, state[f"{name}.weight"], state[f"{name}.bias"], eps)
    x = plain_blocks(
        state, "vision_model.encoder.layers", CLIP_NAMES, x,
        num_heads=vision["num_attention_heads"], activation=quick_gelu, eps=eps,
    )  # fmt: skip
    name = "vision_model.post_layernorm"
    x = norm(x[0], state[f"{name}.weight"], state[f"{name}.bias"], eps)
    x = state["visual_projection.weight"] @ x
    return x / np.linalg.norm(x)


def clip_text(state, ids, config):
    """Unit vector of one text, up to its first end."""
    text = config["text_config"]
    ids = ids[: list(ids).index(text["eos_token_id"]) + 1]
    x = state["text_model.embeddings.token_embedding.weight"][ids]
    x = x + state["text_model.embeddings.position_embedding.weight"][: len(ids)]
    eps = text["layer_norm_eps"]
    x = plain_blocks(
        state, "text_model.encoder.layers", CLIP_NAMES, x, num_heads=text["num_attention_heads"],
        activation=quick_gelu, eps=eps, is_causal=True,
    )  # fmt: skip
    name = "text_model.final_layer_norm"
    x = norm(x[-1], state[f"{name}.weight"], state[f"{name}.bias"], eps)
    x = state["text_projection.weight"] @ x
    return x / np.linalg.norm(x)


def dino(state, pixels, config):
    """Class token of one normalised image [S, S, 3]."""
    name = "embeddings.patch_embeddings.projection"
    weight = state[f"{name}.weight"]
    x = (
        patches(pixels, weight.shape[-1]) @ weight.reshape(len(weight), -1).T
        + state[f"{name}.bias"]
    )
    x = (
        np.vstack([state["embeddings.cls_token"][0], x])
        + state["embeddings.position_embeddings"][0]
    )
    eps = config["layer_norm_eps"]
    x = plain_blocks(
        state, "encoder.layer", VIT_NAMES, x, num_heads=config["num_attention_heads"],
        activation=gelu, eps=eps,
    )  # fmt: skip
    return norm(x[0], state["layernorm.weight"], state["layernorm.bias"], eps)


def turn_rates(size, theta, stretch):
    """Radians per position of each rotated pair, with the stretch of Llama 3.1."""
    rates = []
    for pair in range(size // 2):
        rate = theta ** (-2 * pair / size)
        if stretch is not None:
            wavelength = 2 * np.pi / rate
            length = stretch["original_max_position_embeddings"]
            if wavelength > length / stretch["low_freq_factor"]:
                rate /= stretch["factor"]
            elif wavelength > length / stretch["high_freq_factor"]:
                low, high = stretch["low_freq_factor"], stretch["high_freq_factor"]
                share = (length / wavelength - low) / (high - low)
                rate = share * rate + (1 - share) * rate / stretch["factor"]
        rates.append(rate)
    return np.array(rates)


def rotate(x, size, rates):
    """Turns every head of [L, heads * size], number i together with i + size / 2."""
    angles = np.arange(len(x))[:, None] * rates
    heads = x.reshape(len(x), -1, 2, size // 2)
    first, second = heads[:, :, 0], heads[:, :, 1]
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    turned = np.stack([first * cos - second * sin, second * cos + first * sin], axis=2)
    return turned.reshape(x.shape)


def reward(state, x, config):
    """Score at the last of the embeddings [L, width] of one text."""
    heads, eps = config["num_attention_heads"], config["rms_norm_eps"]
    rates = None
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"

        def get(part, at=name):
            return state[f"{at}.{part}.weight"]

        normed = rms(x, get("input_layernorm"), eps)
        query, key, value = (normed @ get(f"self_attn.{part}_proj").T for part in "qkv")
        size = query.shape[-1] // heads
        if f"{name}.self_attn.q_norm.weight" in state:
            query, key = (
                rms(y.reshape(len(x), -1, size), get(f"self_attn.{part}_norm"), eps).reshape(
                    y.shape
                )
                for y, part in ((query, "q"), (key, "k"))
            )
        rates = turn_rates(size, config["rope_theta"], config.get("rope_scaling"))
        query, key = rotate(query, size, rates), rotate(key, size, rates)
        mixed = attention(query, key, value, heads, is_causal=True)
        x = x + mixed @ get("self_attn.o_proj").T
        normed = rms(x, get("post_attention_layernorm"), eps)
        gate = normed @ get("mlp.gate_proj").T
        x = x + (gate * sigmoid(gate) * (normed @ get("mlp.up_proj").T)) @ get("mlp.down_proj").T
    return float(state["score.weight"][0] @ rms(x[-1], state["model.norm.weight"], eps))
