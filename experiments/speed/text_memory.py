"""What a text prior and a reward model need together, at their full sizes, without any weights.

    python -m experiments.speed.text_memory --out experiments/results/text_memory

Both are compiled for shapes alone: the prior on one sequence, and the reward of a soft answer with
its gradient with respect to the logits, through the table of embeddings.

- *weights* are exact: bytes of all parameters in bfloat16.
- *temporaries* are what XLA's CPU backend reserves for either call. Both are compiled in float32,
  because this backend keeps converted copies of bfloat16 weights, so activations count twice what
  they take in bfloat16; the logits over all ids are float32 on every device.
- A sampler makes the calls one after the other: what it needs is the weights and the larger of the
  temporaries.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from aps_jax.io.files import write_atomically
from aps_jax.prior.bundle import make_prompted_prior
from aps_jax.prior.prompts import PromptConfig, frame_prompt
from aps_jax.prior.transformer import TransformerConfig, init_transformer_params, num_params
from aps_jax.text.reward_model import make_reward

#: Dream-org/Dream-v0-Instruct-7B.
DREAM = TransformerConfig(
    vocab_size=152064, width=3584, num_layers=28, num_heads=28, num_kv_heads=4, mlp_width=18944,
    qkv_bias=True, norm_eps=1e-6, rope_theta=1e6, rope_in_float32=False, shift_logits=True,
)  # fmt: skip
#: Skywork/Skywork-Reward-V2-Qwen3-1.7B, by the sizes of Qwen3-1.7B.
REWARD = TransformerConfig(
    vocab_size=151936, num_outputs=1, width=2048, num_layers=28, num_heads=16, num_kv_heads=8,
    head_dim=128, mlp_width=6144, qk_norm=True, norm_eps=1e-6, rope_theta=1e6,
    rope_in_float32=False,
)  # fmt: skip
_SMALL = {"vocab_size": 40, "width": 32, "num_layers": 2, "head_dim": 8, "num_heads": 4,
          "num_kv_heads": 2, "mlp_width": 24}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Command line.

    Attributes:
      out: folder for `plan.json`.
      length: tokens of the answer.
      prompt: ids of the prompt, frame included.
      smoke: tiny models, for a test of this script.
    """

    out: Path = Path("runs/text_memory")
    length: int = 128
    prompt: int = 64
    smoke: bool = False


def plan(
    prior: TransformerConfig, reward: TransformerConfig, arguments: Arguments
) -> dict[str, Any]:
    """Bytes of weights and temporaries of both models."""
    length, ids = arguments.length, [1] * arguments.prompt
    frame = PromptConfig(num_codes=prior.vocab_size, mask_token_id=0, mask_uncond=True)
    of_prior, of_reward = (
        jax.eval_shape(lambda key, c=c: init_transformer_params(key, c), jax.random.key(0))
        for c in (prior, reward)
    )
    tokens = jax.ShapeDtypeStruct((1, 1, length), "int32")
    logits = jax.ShapeDtypeStruct((1, length, reward.vocab_size), "float32")

    def denoise(params: Any, tokens: Any) -> Any:
        bundle = make_prompted_prior(
            prior, params, prompt=frame, prompt_ids=frame_prompt(frame, ids)[0]
        )
        return bundle.apply(bundle.params, tokens)

    def slope(params: Any, logits: Any) -> Any:
        model = make_reward(reward, params, before_ids=ids, after_ids=[1, 2])
        return jax.value_and_grad(
            lambda logits: jnp.sum(model(jax.nn.softmax(logits, axis=-1) @ model.table))
        )(logits)

    result = {"length": length, "prompt": arguments.prompt}
    for name, call, params, data in (
        ("prior", denoise, of_prior, tokens), ("reward", slope, of_reward, logits)
    ):  # fmt: skip
        memory = jax.jit(call).lower(params, data).compile().memory_analysis()
        result[f"{name}_weights"] = 2 * num_params(params)
        result[f"{name}_temporaries"] = memory.temp_size_in_bytes + memory.output_size_in_bytes
    weights = result["prior_weights"] + result["reward_weights"]
    temporaries = max(result["prior_temporaries"], result["reward_temporaries"])
    return result | {"total": weights + temporaries}


def main(arguments: Arguments) -> int:
    """Writes and prints the plan."""
    configs = (DREAM, REWARD)
    if arguments.smoke:
        configs = tuple(dataclasses.replace(config, **_SMALL) for config in configs)
    result = plan(*configs, arguments)
    arguments.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=2) + "\n"
    write_atomically(arguments.out / "plan.json", text.encode())
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments)))
