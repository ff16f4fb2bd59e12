"""Writes folders laid out like those of a model hub, for the converters' tests."""

import json

import numpy as np
from safetensors.numpy import save_file


def random_state(shapes, seed=0):
    """Random tensors that keep activations of order one; norms and biases are not trivial."""
    rng = np.random.default_rng(seed)
    state = {}
    for name, shape in shapes.items():
        noise = rng.normal(size=shape)
        if len(shape) > 1:
            noise = noise / np.sqrt(np.prod(shape[1:]))
        else:
            noise = 0.3 * noise + ("norm" in name and name.endswith("weight"))
        state[name] = np.asarray(noise, np.float32)
    return state


def split(state, num_shards):
    names = list(state)
    return [{name: state[name] for name in names[i::num_shards]} for i in range(num_shards)]


def save_index(folder, parts, stem, ending):
    files = [f"{stem}-{i + 1:05}-of-{len(parts):05}{ending}" for i in range(len(parts))]
    index = {
        "metadata": {"total_size": sum(v.nbytes for part in parts for v in part.values())},
        "weight_map": {
            name: file for file, part in zip(files, parts, strict=True) for name in part
        },
    }
    (folder / f"{stem}{ending}.index.json").write_text(json.dumps(index))
    return [folder / file for file in files]


def save_single(folder, state, config=None, stem="model"):
    """`folder` with one safetensors file and, if given, config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / f"{stem}.safetensors", metadata={"format": "pt"})
    save_config(folder, config)
    return folder


def save_sharded(folder, state, config=None, stem="model", num_shards=3):
    """`folder` with safetensors shards and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = split(state, num_shards)
    for path, part in zip(save_index(folder, parts, stem, ".safetensors"), parts, strict=True):
        save_file(part, path, metadata={"format": "pt"})
    save_config(folder, config)
    return folder


def save_config(folder, config):
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))


def file_size(shapes, dtype, metadata=True):
    """Size of the safetensors file that torch writes, from names, shapes and dtypes alone."""
    sizes = {"F32": 4, "BF16": 2, "I64": 8}
    header = {"__metadata__": {"format": "pt"}} if metadata else {}
    end = 0
    for name in sorted(shapes, key=lambda name: (-sizes[dtype(name)], name)):
        start, end = end, end + int(np.prod(shapes[name])) * sizes[dtype(name)]
        shape = list(shapes[name])
        header[name] = {"dtype": dtype(name), "shape": shape, "data_offsets": [start, end]}
    text = len(json.dumps(header, separators=(",", ":")))
    return 8 + text + -text % 8 + end


def save_tokenizer(folder, specials=(), name="tokenizer.json"):
    """`folder` with a tokenizer of one id per byte, 0..255, and of special tokens after those."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in specials])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / name))
    return folder
