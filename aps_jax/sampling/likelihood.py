"""The measurement objective and its inner loop: logits in, refined logits out.

Section numbers and symbols follow arXiv:2510.02291; phi are the test-time logits.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from aps_jax.codec import lfq
from aps_jax.config import APSConfig
from aps_jax.sampling.optimizers import lenient
from aps_jax.types import Array, Codec, ImageShape, Operator, Params, PyTree

#: Inner steps in a row with next to no change before early stop freezes an image. One is not
#: enough: the loss of a quantized expectation is constant between two codes.
QUIET_STEPS = 4


def expected_code(codec: Codec, logits: Array) -> Array:
    """Mean code sum_k softmax(phi)_k C_k [B, L, d] of logits [B, L, K]."""
    if codec.mean_code is not None:
        return codec.mean_code(logits)
    return lfq.exact_matmul(jax.nn.softmax(logits, axis=-1), codec.codebook)


def quantized_expectation(codec: Codec, logits: Array) -> tuple[Array, Array]:
    """The nearest code to the mean code, with the gradient of the mean code (ours: no noise).

    Args:
      codec: gives the codebook and its quantiser.
      logits: phi [B, L, K].

    Returns:
      Codes [B, L, d], whose value is a row of the codebook, and their tokens int32 [B, L].
    """
    mean = expected_code(codec, logits)
    codes, tokens = codec.quantize(codec.codebook, jax.lax.stop_gradient(mean))
    return lfq.straight_through(mean, codes), tokens


def decode_image(codec: Codec, codes: Array, image_shape: ImageShape, decode_scale: int) -> Array:
    """Decodes a token field and brings it to `image_shape`.

    Args:
      codec: the tokenizer.
      codes: [B, h, w, d]; the field may reach past the image at the right and at the bottom.
      image_shape: (H, W) of the result.
      decode_scale: 1, or n to decode n times larger and average n x n pixels ("aps-l" uses 2).

    Returns:
      Images [B, H, W, 3], not clipped.
    """
    height, width = (side * decode_scale for side in image_shape)
    x = codec.decode(codec.params, codes)[:, :height, :width]
    if decode_scale == 1:
        return x
    batch, _, _, channels = x.shape
    x = x.reshape(batch, image_shape[0], decode_scale, image_shape[1], decode_scale, channels)
    return x.mean(axis=(2, 4))


def _per_image(values: Array) -> Array:
    return values.reshape(values.shape[0], -1)


def residuals(operator: Operator, prediction: PyTree, y: PyTree) -> list[tuple[Array, Array]]:
    """Pairs (residual, weight), both [B, n], one per array of the measurement.

    The weight is 1 for measured entries and 0 for the others (missing pixels).
    """
    if operator.observed is None:
        masks = jax.tree.map(jnp.ones_like, y)
    else:
        observed = operator.observed(operator.params, jax.tree.map(lambda leaf: leaf.shape, y))
        masks = jax.tree.map(_mask_like, observed, y)
    difference = jax.tree.map(jnp.subtract, prediction, y)
    leaves = (jax.tree.leaves(tree) for tree in (difference, masks))
    return [(_per_image(r), _per_image(m)) for r, m in zip(*leaves, strict=True)]


def _mask_like(mask: Array, y: Array) -> Array:
    # One mask per image serves all samples of that image, which are sample-major in y.
    if mask.ndim == y.ndim and mask.shape[0] not in (1, y.shape[0]):
        mask = jnp.concatenate([mask] * (y.shape[0] // mask.shape[0]))
    return jnp.broadcast_to(mask, y.shape)


def absolute_error(operator: Operator, prediction: PyTree, y: PyTree) -> Array:
    """Mean |A(x) - y| over the measured entries, per image [B]; stacked measurements add up."""
    return sum(
        jnp.sum(jnp.abs(r) * w, axis=1) / jnp.maximum(jnp.sum(w, axis=1), 1)
        for r, w in residuals(operator, prediction, y)
    )


def gaussian_energy(operator: Operator, prediction: PyTree, y: PyTree, sigma: float) -> Array:
    """-log p(y | x) = ||A(x) - y||^2 / (2 sigma^2) up to a constant, per image [B]."""
    squares = sum(jnp.sum(r**2 * w, axis=1) for r, w in residuals(operator, prediction, y))
    return squares / (2 * sigma**2)


def _as_rgb(image: Array) -> Array:
    return jnp.broadcast_to(image, (*image.shape[:3], 3))


def perceptual_targets(params: Params, y: PyTree, config: APSConfig) -> list[PyTree] | None:
    """What the perceptual term needs of y, which is constant in the inner loop; None without it."""
    is_used = config.measurement_term == "l1" and config.perceptual_weight > 0
    if not (is_used and params.operator.is_image):
        return None
    with jax.named_scope("perceptual"):
        return [params.perceptual.reference(_as_rgb(leaf)) for leaf in jax.tree.leaves(y)]


def measurement_loss(
    params: Params,
    prediction: PyTree,
    y: PyTree,
    config: APSConfig,
    targets: list[PyTree] | None = None,
) -> Array:
    """The measurement term N(y, A(x)) per image [B].

    "l1" is mean absolute error plus `perceptual_weight` times LPIPS(y, A(x)), the latter only where
    y is an image; "gaussian" is the likelihood of the derivation. `targets` are those of
    `perceptual_targets`, computed here if they are not given.
    """
    if config.measurement_term == "gaussian":
        return gaussian_energy(params.operator, prediction, y, config.sigma)
    loss = absolute_error(params.operator, prediction, y)
    if targets is None:
        targets = perceptual_targets(params, y, config)
    if targets is not None:
        with jax.named_scope("perceptual"):
            for a, target in zip(jax.tree.leaves(prediction), targets, strict=True):
                distance = params.perceptual.distance_to(_as_rgb(a), target)
                loss = loss + config.perceptual_weight * distance
    return loss


def prior_energy(
    logits: Array, log_prior: Array, is_masked: Array, *, term: str = "overlap"
) -> Array:
    """The prior term per image [B], a sum over its masked tokens.

    "overlap" is -log <softmax(phi_l), x_theta_l> (Theorem 3.3), least where phi_l is sure of the
    prior's mode; "kl" is KL(softmax(phi_l) || x_theta_l) (ours), least at the prior itself.
    """
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    if term == "kl":
        values = jnp.sum(jnp.exp(log_probs) * (log_probs - log_prior), axis=-1)
    else:
        values = -jax.nn.logsumexp(log_probs + log_prior, axis=-1)
    return jnp.sum(jnp.where(is_masked, values, 0.0), axis=-1)


class InnerState(NamedTuple):
    """Carry of the inner loop."""

    logits: Array
    opt_state: PyTree
    smoothed: Array  # [B], moving average of the loss
    num_quiet: Array  # int32 [B], steps in a row with next to no change; QUIET_STEPS freezes
    num_steps: Array  # int32 [B]
    best: tuple[Array, Array] | None  # logits [B, L, K] of the least loss so far, and that loss [B]


class InnerResult(NamedTuple):
    """What the inner loop returns.

    Attributes:
      logits: refined phi [B, L, K].
      opt_state: optimiser state.
      loss: objective at the last inner step [B], before its update (its moving average where early
        stop is on, the least one with `keep_best`, NaN without inner steps).
      num_steps: inner steps taken int32 [B].
      losses: objective at every inner step [M, B] if traced, else None.
    """

    logits: Array
    opt_state: PyTree
    loss: Array
    num_steps: Array
    losses: Array | None


def make_optimizer(config: APSConfig) -> optax.GradientTransformation:
    """Adam on the logits."""
    return lenient(optax.adam(config.learning_rate, eps=config.adam_eps))


def objective(
    params: Params,
    y: PyTree,
    logits: Array,
    log_prior: Array,
    tokens: Array,
    step_weight: Array,
    *,
    grid: tuple[int, int],
    image_shape: ImageShape,
    config: APSConfig,
    targets: list[PyTree] | None = None,
) -> Array:
    """Loss of the test-time logits, per image [B].

    Args:
      params: models and operator.
      y: measurement.
      logits: phi [B, L, K].
      log_prior: log x_theta [B, L, K].
      tokens: z int [B, L]; clean positions (not the mask) feed their own code.
      step_weight: w_t, scalar.
      grid: (h, w) with h * w = L.
      image_shape: (H, W).
      config: options.
      targets: as for `measurement_loss`.

    Returns:
      For "l1", L times (measurement term + prior_weight * mean of the prior term over tokens); for
      "gaussian", measurement term + prior_weight * sum of the prior term. The factor L keeps the
      gradient of a token, and what `prior_weight` means, independent of the image's size.
    """
    codec = params.codec
    num_tokens = tokens.shape[-1]
    is_masked = tokens == codec.num_codes
    with jax.named_scope("expectation"):
        codes, _ = quantized_expectation(codec, logits)
        known = codec.codebook[jnp.where(is_masked, 0, tokens)]
        codes = jnp.where(is_masked[..., None], codes, known)
    prediction = predict(
        params,
        codes,
        grid=grid,
        image_shape=image_shape,
        decode_scale=config.decode_scale,
        num_samples=config.num_samples,
    )
    with jax.named_scope("operator"), jax.default_matmul_precision("float32"):
        loss = measurement_loss(params, prediction, y, config, targets)
    if config.measurement_term == "l1":
        loss = num_tokens * loss
    if config.prior_weight > 0:
        weight = step_weight if config.prior_weighting == "elbo" else 1.0
        energy = prior_energy(logits, log_prior, is_masked, term=config.prior_term)
        loss = loss + config.prior_weight * weight * energy
    return loss


def predict(
    params: Params,
    codes: Array,
    *,
    grid: tuple[int, int],
    image_shape: ImageShape,
    decode_scale: int,
    num_samples: int,
) -> PyTree:
    """A(D(codes)), the measurement that codes [S * B, L, d] explain, differentiable in the codes.

    Args:
      params: codec and operator.
      codes: any vectors, sample-major over the samples of a measurement.
      grid: (h, w) with h * w = L.
      image_shape: (H, W).
      decode_scale: as for `decode_image`.
      num_samples: S.
    """
    with jax.named_scope("decoder"):
        field = codes.reshape(codes.shape[0], *grid, codes.shape[-1])
        x = decode_image(params.codec, field, image_shape, decode_scale)
    with jax.named_scope("operator"), jax.default_matmul_precision("float32"):
        return apply_operator(params.operator, x, num_samples)


def apply_operator(operator: Operator, x: Array, num_samples: int) -> PyTree:
    """A(x) for images [S * B, H, W, 3], sample-major, of operators whose state may be per image."""
    if num_samples == 1:
        return operator(x)
    grouped = x.reshape(num_samples, -1, *x.shape[1:])
    y = jax.vmap(operator)(grouped)
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), y)


def refine(
    params: Params,
    y: PyTree,
    logits: Array,
    opt_state: PyTree,
    log_prior: Array,
    tokens: Array,
    step_weight: Array,
    *,
    grid: tuple[int, int],
    image_shape: ImageShape,
    config: APSConfig,
    evidence: Array | None = None,
    rates: Array | None = None,
) -> InnerResult:
    """Runs the inner loop: `num_inner_steps` of Adam on phi, gradients through decoder and A only.

    With `config.early_stop > 0` an image's logits freeze once its smoothed loss has changed by less
    than that share in each of `QUIET_STEPS` steps in a row, and the loop ends when all images have;
    images never influence each other. Arguments are those of `objective`, plus the starting
    `opt_state`, `evidence` [B, L], what the updates of each token are scaled by, and `rates` [M],
    what those of each inner step are.
    """
    optimizer = make_optimizer(config)
    # Outside the loop, whether or not a compiler would move it there.
    targets = perceptual_targets(params, y, config)

    def total(phi: Array) -> tuple[Array, Array]:
        losses = objective(
            params, y, phi, log_prior, tokens, step_weight,
            grid=grid, image_shape=image_shape, config=config, targets=targets,
        )  # fmt: skip
        return jnp.sum(losses), losses

    def step(state: InnerState, j: Array) -> tuple[InnerState, Array]:
        is_active = state.num_quiet < QUIET_STEPS
        grads, losses = jax.grad(total, has_aux=True)(state.logits)
        if state.best is not None:
            # Adam's first steps may lead uphill, and the start would stay the best for ever.
            is_better = (losses < state.best[1]) & (j >= config.num_inner_steps // 2)
            best = jnp.where(is_better[:, None, None], state.logits, state.best[0])
            least = jnp.where(is_better, losses, state.best[1])
            # NaN stays, since nothing is less: a failed step shows in the result's loss.
            least = jnp.where(jnp.isfinite(losses), least, jnp.nan)
            state = state._replace(best=(best, least))
        with jax.named_scope("adam"):
            updates, opt_state = optimizer.update(grads, state.opt_state)
            if evidence is not None:
                updates = updates * evidence[..., None]
            if rates is not None:
                updates = updates * rates[j]
            if config.early_stop == 0:
                phi = state.logits + updates
                return state._replace(
                    logits=phi, opt_state=opt_state, smoothed=losses, num_steps=state.num_steps + 1
                ), losses
            phi = state.logits + jnp.where(is_active[:, None, None], updates, 0.0)
        smoothed = jnp.where(state.num_steps == 0, losses, 0.7 * state.smoothed + 0.3 * losses)
        change = jnp.abs(smoothed - state.smoothed)
        is_quiet = (change < config.early_stop * smoothed) & (state.num_steps > 0)
        num_quiet = jnp.where(is_quiet, state.num_quiet + 1, 0)
        return state._replace(
            logits=phi,
            opt_state=opt_state,
            smoothed=jnp.where(is_active, smoothed, state.smoothed),
            num_quiet=jnp.where(is_active, num_quiet, state.num_quiet),
            num_steps=state.num_steps + is_active.astype(jnp.int32),
        ), losses

    batch = logits.shape[0]
    has_choice = config.keep_best and config.num_inner_steps > 1
    state = InnerState(
        logits=logits,
        opt_state=opt_state,
        smoothed=jnp.zeros(batch, jnp.float32),
        num_quiet=jnp.zeros(batch, jnp.int32),
        num_steps=jnp.zeros(batch, jnp.int32),
        best=(logits, jnp.full(batch, jnp.inf, jnp.float32)) if has_choice else None,
    )
    num_rows = config.num_inner_steps if config.trace else 1
    history = jnp.full((num_rows, batch), jnp.nan, jnp.float32)
    if config.num_inner_steps == 0:
        nothing = jnp.full(batch, jnp.nan, jnp.float32)
        losses = history if config.trace else None
        return InnerResult(logits, opt_state, nothing, state.num_steps, losses)

    def advance(j: Array, carry: tuple[InnerState, Array]) -> tuple[InnerState, Array]:
        state, history = carry
        state, losses = step(state, j)
        return state, history.at[j if config.trace else 0].set(losses)

    if config.early_stop == 0:
        state, history = jax.lax.fori_loop(0, config.num_inner_steps, advance, (state, history))
    else:

        def is_running(carry: tuple[Array, InnerState, Array]) -> Array:
            j, state, _ = carry
            return (j < config.num_inner_steps) & jnp.any(state.num_quiet < QUIET_STEPS)

        _, state, history = jax.lax.while_loop(
            is_running,
            lambda carry: (carry[0] + 1, *advance(carry[0], carry[1:])),
            (jnp.zeros((), jnp.int32), state, history),
        )
    phi, loss = state.logits, state.smoothed
    if state.best is not None:
        # Images may have stopped before the second half.
        phi = jnp.where(jnp.isposinf(state.best[1])[:, None, None], phi, state.best[0])
        loss = loss if config.early_stop > 0 else state.best[1]
    return InnerResult(
        logits=phi,
        opt_state=state.opt_state,
        loss=loss,
        num_steps=state.num_steps,
        losses=history if config.trace else None,
    )
