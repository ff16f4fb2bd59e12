"""What `experiments.speed` runs in PyTorch, too: the same weights, the same computation."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import aps_jax
from aps_jax.cli.doctor import num_cpus
from aps_jax.codec.magvit2 import CodecConfig, make_codec
from aps_jax.flops import count_flops
from aps_jax.pretrained import DTYPES, Model
from aps_jax.types import Array, Params
from experiments.speed import timing
from experiments.speed.decoder_at_full_size import random_params
from experiments.speed.step import Step, images, sample

#: A variant whose gradient takes so many times as long as ours is not timed as a whole: bfloat16 on
#: a CPU without instructions for it takes minutes per run, and no one's best choice is lost.
TOO_SLOW = 10

_ABSENT = {"skipped": "PyTorch is not installed: pip install '.[torch]'"}


def is_installed() -> bool:
    """Whether there is a PyTorch to compare with."""
    return importlib.util.find_spec("torch") is not None


def sampler_section(model: Model, arguments: Any) -> dict[str, Any]:
    """The whole sampler against PyTorch with the same weights, or why not."""
    if not is_installed():
        return _ABSENT
    from experiments.speed.torch_sampler import TorchSampler

    device = _device()
    y = images(arguments.batch_size, arguments.image_size)
    counts = {"num_steps": arguments.num_steps, "num_inner_steps": arguments.inner_steps}
    config = aps_jax.APSConfig(**counts)
    runs: dict[str, Callable[[], Any]] = {}
    problems = {}
    for dtype in DTYPES:
        own = aps_jax.load_pretrained(arguments.model, dtype=dtype)
        problems[dtype] = Params(own.prior, own.codec, aps_jax.operators.denoising())
        runs[f"jax {dtype}"] = lambda own=problems[dtype]: sample(
            own, y, jax.random.key(0), config=config
        )
    facts = _facts()
    step = Step(problems["float32"], len(y), arguments.image_size, config)
    ours = step.gradient()
    with jax.default_matmul_precision("float32"):
        exact = np.asarray(step.gradient()(*step.arguments()))
    limit = TOO_SLOW * _seconds(lambda: ours(*step.arguments()))
    for name, dtype, compiled in _variants():
        sampler = TorchSampler(model, dtype=dtype, compiled=compiled, device=device)
        gradient = _gradient(sampler, step)
        if not _is_usable(name, gradient, exact, facts):
            continue
        if name == "torch float32 eager":
            facts["share of equal pixels"] = _equal_pixels(sampler, problems["float32"], y)
        threads = None
        if device == "cpu":
            threads, seconds = _best_threads(gradient)
            facts[f"{name} threads"] = threads
            if seconds > limit:
                facts[f"{name} skipped"] = f"a gradient takes over {TOO_SLOW} times as long as ours"
                continue
        runs[name] = lambda sampler=sampler, n=threads: _sample(sampler, y, counts, n)
    return facts | {"seconds": _over(timing.interleave(runs, arguments.repeats), "jax float32")}


def _sample(sampler: Any, y: Array, counts: dict[str, int], threads: int | None = None) -> Any:
    """Images of a `TorchSampler` on the CPU, on so many threads."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    return sampler.sample(y, **counts).cpu()


def _equal_pixels(sampler: Any, params: Params, y: Array) -> float:
    """Share of the pixels in which a short run of both samplers agrees.

    Not all need to: where two codes are level, rounding decides.
    """
    counts = {"num_steps": 2, "num_inner_steps": 2}
    config = aps_jax.APSConfig(**counts)
    ours = np.asarray(sample(params, y, jax.random.key(0), config=config).images)
    theirs = _sample(sampler, y, counts).permute(0, 2, 3, 1).numpy()
    return float(np.mean(np.abs(ours - theirs) < 1e-3))


def _gradient(sampler: Any, step: Step) -> Callable[[], np.ndarray]:
    """The gradient [B, L, K] of a first inner step by a `TorchSampler`."""
    import torch

    phi, tokens, y = (
        torch.tensor(np.asarray(array), device=sampler.device)
        for array in (step.log_prior, step.tokens, step.y)
    )
    tokens, y = tokens.long(), y.permute(0, 3, 1, 2)
    return lambda: sampler.gradient(phi, tokens, y, step.grid[0]).cpu().numpy()


def decoder_section(config: CodecConfig, arguments: Any) -> dict[str, Any]:
    """The gradient by the codes through a decoder with random weights.

    In both dtypes; FLOP/s are compared with a matrix product of the same dtype, in turns.
    """
    side = arguments.decoder_size
    params = random_params(config)
    target = images(arguments.decoder_batch, side)
    grid = (side // config.stride,) * 2
    codes = jnp.sign(
        jax.random.normal(jax.random.key(1), (arguments.decoder_batch, *grid, config.num_bits))
    )
    runs: dict[str, Callable[[], Any]] = {}
    gradients = {}
    for dtype in DTYPES:
        codec = make_codec(dataclasses.replace(config, dtype=dtype), params)

        def loss(codes: Array, params: Any, codec: Any = codec) -> Array:
            return jnp.mean((codec.decode(params, codes) - target) ** 2)

        gradients[dtype] = jax.jit(jax.grad(loss))
        runs[f"jax {dtype}"] = lambda run=gradients[dtype], codec=codec: run(codes, codec.params)
        runs[f"matmul {dtype}"] = timing.matmuls(arguments.matmul_side, dtype)
    flop = count_flops(gradients["float32"], codes, params)
    facts: dict[str, Any] = {"size": side, "batch": arguments.decoder_batch, "FLOP": flop}
    if is_installed():
        facts |= _facts()
        with jax.default_matmul_precision("float32"):
            exact = np.asarray(gradients["float32"](codes, params))
        for name, run in _torch_decoders(params["decoder"], config, codes, target):
            if _is_usable(name, run, exact, facts):
                runs[name] = run
    else:
        facts["PyTorch"] = _ABSENT["skipped"]
    seconds = timing.interleave(runs, arguments.repeats)
    rows = _over({k: v for k, v in seconds.items() if "matmul" not in k}, "jax bfloat16")
    for name in rows:
        products = seconds[f"matmul {name.split()[1]}"]
        rows[name]["FLOP/s over matmul"] = timing.over_matmul(
            flop, seconds[name], products, arguments.matmul_side
        )
    for dtype in DTYPES:
        products = seconds[f"matmul {dtype}"]
        facts[f"matmul FLOP/s, {dtype}"] = timing.matmul_rate(products, arguments.matmul_side)
    return facts | {"seconds": rows}


def _torch_decoders(
    weights: Any, config: CodecConfig, codes: Array, target: Array
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Name and gradient [B, h, w, d] on the CPU of every PyTorch variant."""
    import torch

    from experiments.speed import torch_sampler

    device, levels = _device(), len(config.decoder_channels)

    def tensor(array: Array) -> Any:
        return torch.tensor(np.asarray(array)).permute(0, 3, 1, 2).to(device)

    codes, target = tensor(codes), tensor(target)
    for name, dtype, compiled in _variants():
        own = torch_sampler.to_torch(weights, dtype, device)

        def loss(codes: Any, own: Any = own, dtype: Any = dtype) -> Any:
            x = torch_sampler.decode(own, codes.to(dtype), levels, config.num_groups)
            return ((x.float() - target) ** 2).mean()

        forward = torch.compile(loss) if compiled else loss

        def gradient(forward: Any = forward) -> np.ndarray:
            leaf = codes.detach().requires_grad_()
            return torch.autograd.grad(forward(leaf), leaf)[0].permute(0, 2, 3, 1).cpu().numpy()

        yield name, gradient


def _device() -> str:
    """Where PyTorch runs: on the GPU if JAX does, too."""
    import torch

    if jax.default_backend() != "gpu":
        return "cpu"
    if not torch.cuda.is_available():
        raise ValueError("JAX runs on a GPU that PyTorch cannot use; install PyTorch for its CUDA")
    # As JAX does by default, and as anyone who wants speed would.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    return "cuda"


def _facts() -> dict[str, Any]:
    import torch

    facts: dict[str, Any] = {"torch": torch.__version__}
    if _device() == "cuda":
        return facts | {"torch device": torch.cuda.get_device_name()}
    return facts


def _variants() -> Iterator[tuple[str, Any, bool]]:
    """Name, dtype and whether it is compiled."""
    import torch

    for dtype in DTYPES:
        for compiled in (False, True):
            kind = "compiled" if compiled else "eager"
            yield f"torch {dtype} {kind}", getattr(torch, dtype), compiled


def _is_usable(
    name: str, gradient: Callable[[], np.ndarray], exact: np.ndarray, facts: dict[str, Any]
) -> bool:
    """Whether a variant runs; notes how far its gradient is from ours, or why it does not."""
    try:
        found = gradient()
    except Exception as failure:  # torch.compile needs a C++ compiler that it can use.
        facts[f"{name} skipped"] = str(failure).splitlines()[0]
        return False
    error = float(np.abs(found - exact).max() / np.abs(exact).max())
    facts[f"{name} gradient error"] = error
    # TF32 products of a GPU have 10 bits.
    limit = 1e-3 if _device() == "cpu" else 0.05
    if "float32" in name and "bfloat16" not in name and not error < limit:
        raise ArithmeticError("PyTorch and JAX disagree about a gradient; their times mean nothing")
    return True


def _best_threads(work: Callable[[], Any]) -> tuple[int, float]:
    """The number of threads that PyTorch is fastest with, which is then set, and its seconds."""
    import torch

    seconds = {}
    for count in range(1, num_cpus() + 1):
        torch.set_num_threads(count)
        seconds[count] = _seconds(work)
    best = min(seconds, key=seconds.get)
    torch.set_num_threads(best)
    return best, seconds[best]


def _seconds(work: Callable[[], Any]) -> float:
    """Seconds of a second call."""
    return timing.interleave({"work": work}, 1)["work"][0, 0]


def _over(seconds: dict[str, np.ndarray], reference: str) -> dict[str, Any]:
    """Seconds of every run, and over those of one of them."""
    base = seconds[reference]
    return {
        name: timing.spread(values) | {f"over {reference}": timing.ratio(values, base)}
        for name, values in seconds.items()
    }
