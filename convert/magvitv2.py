"""Converts the public MagVIT-v2 tokenizer (showlab/magvitv2) to the codec of aps_jax.

`python -m convert.magvitv2 SRC DST` takes the folder of the repository. The file has no
hyper-parameters, so all sizes come from its tensors.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

import numpy as np

from aps_jax.codec import lfq
from aps_jax.codec.magvit2 import CodecConfig, init_codec_params

from .command import main
from .engine import Built, Family
from .rules import Rule, hwio
from .sources import ConversionError, Source


def _conv(source: str, target: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{source}.weight", f"{target}/kernel", hwio),
        Rule(f"{source}.bias", f"{target}/bias"),
    )


def _norm(source: str, target: str) -> tuple[Rule, ...]:
    return Rule(f"{source}.weight", f"{target}/scale"), Rule(f"{source}.bias", f"{target}/bias")


def _block(source: str, target: str) -> tuple[Rule, ...]:
    return (
        *_norm(f"{source}.norm1", f"{target}/norm1"),
        *_norm(f"{source}.norm2", f"{target}/norm2"),
        *_conv(f"{source}.conv1", f"{target}/conv1"),
        *_conv(f"{source}.conv2", f"{target}/conv2"),
        *_conv(f"{source}.nin_shortcut", f"{target}/nin_shortcut"),
    )


RULES = (
    *_conv("encoder.conv_in", "encoder/conv_in"),
    *_conv("encoder.conv_out", "encoder/conv_out"),
    *_conv("encoder.quant_conv", "encoder/quant_conv"),
    *_conv("decoder.post_quant_conv", "decoder/post_quant_conv"),
    *_conv("decoder.conv_in", "decoder/conv_in"),
    *_conv("decoder.conv_out", "decoder/conv_out"),
    *_norm("{half}.norm_out", "{half}/norm_out"),
    *_block("{half}.mid.block_{block}", "{half}/mid/block_{block}"),
    *_norm("{half}.mid.attn_1.norm", "{half}/mid/attn_1/norm"),
    *_conv("{half}.mid.attn_1.{part}", "{half}/mid/attn_1/{part}"),
    *_block("encoder.down.{level}.block.{block}", "encoder/down_{level}/block_{block}"),
    *_conv("encoder.down.{level}.downsample.conv", "encoder/down_{level}/downsample/conv"),
    *_block("decoder.up.{level}.block.{block}", "decoder/up_{level}/block_{block}"),
    *_conv("decoder.up.{level}.upsample.conv", "decoder/up_{level}/upsample/conv"),
)


def build(source: Source, dtype: str) -> Built:
    """Reads the channels and blocks of every level off the tensors.

    The number of groups of the norms leaves no trace in them: it is the published model's, 32.
    Activations stay float32 whatever the dtype of the weights.
    """
    del dtype
    halves = {}
    for half, kind in (("encoder", "down"), ("decoder", "up")):
        # At least one, so that a checkpoint of another kind is an error that names what it lacks.
        levels = range(max(1, source.count(f"{half}.{kind}.")))
        halves[half] = {
            "channels": tuple(
                source.size(f"{half}.{kind}.{level}.block.0.conv1.weight") for level in levels
            ),
            "blocks": tuple(source.count(f"{half}.{kind}.{level}.block.") for level in levels),
        }
    try:
        config = CodecConfig(
            num_bits=source.size("encoder.quant_conv.weight"),
            encoder_channels=halves["encoder"]["channels"],
            encoder_blocks=halves["encoder"]["blocks"],
            decoder_channels=halves["decoder"]["channels"],
            decoder_blocks=halves["decoder"]["blocks"],
        )
    except ValueError as error:
        raise ConversionError(f"{source.folder} is not a MagVIT-v2 tokenizer: {error}") from None
    return Built(config=config, init=init_codec_params)


def checked(config: CodecConfig) -> Mapping[str, np.ndarray]:
    """The quantiser's buffers, which follow from the number of bits."""
    return {
        "quantize.embedding": np.asarray(lfq.codebook(config.num_bits)),
        "quantize.power_vals": 2 ** np.arange(config.num_bits - 1, -1, -1),
    }


FAMILY = Family(
    name="magvitv2",
    section="codec",
    rules=RULES,
    build=build,
    default_dtype="float32",
    checked=checked,
)

if __name__ == "__main__":
    sys.exit(main(FAMILY, __doc__))
