"""What every training shares: settings, optimiser, resumable loop, log, curves and pictures."""

from experiments.figures import plot_curves, save_grid
from experiments.train.config import (
    RunConfig,
    claim,
    device_name,
    facts,
    initial_sizes,
    origin,
    run,
)
from experiments.train.loop import fit, read_rows
from experiments.train.optimizer import (
    TrainState,
    apply_gradients,
    init_state,
    make_optimizer,
    make_update,
)

__all__ = [
    "RunConfig", "TrainState", "apply_gradients", "claim", "device_name", "facts", "fit",
    "init_state", "initial_sizes", "make_optimizer", "make_update", "origin", "plot_curves",
    "read_rows", "run", "save_grid",
]  # fmt: skip
