"""The length of a training run and the size of its minibatches, if the user does not set them."""

from pyromosaic.accepted import Count, checked

STEPS = 6000  # those of 150 epochs of about 10,000 cells
MOST_EPOCHS = 150
FEWEST_EPOCHS = 10  # so that every cell is seen several times, however many there are
SMALLEST = 256  # cells in a minibatch
MINIBATCHES = 36  # in an epoch, before they grow beyond that
RATE = 3e-3  # learning rate with the smallest minibatches


@checked
def minibatch_for(n_cells: Count, largest: Count) -> int:
    """Number of cells in a minibatch that ``batch_size=None`` stands for.

    It is 256, and with more than about 10,000 cells a thirty-sixth of them. A step on more cells takes less time for
    each of them.

    Parameters
    ----------
    n_cells
        Number of training cells of a process.
    largest
        The most cells that a minibatch of the model may have.

    Examples
    --------
    >>> [minibatch_for(n_cells, largest=1024) for n_cells in (2_000, 10_000, 18_000, 1_000_000)]
    [256, 278, 500, 1024]
    """
    return max(min(SMALLEST, largest), min(largest, -(-n_cells // MINIBATCHES)))


def settings_for(n_cells: int, largest: int, batch_size: int | None, learning_rate: float | None) -> tuple[int, float]:
    """Size of minibatches and learning rate, chosen where they are None.

    The rate grows with the square root of the size, if both are chosen.

    Examples
    --------
    >>> settings_for(100_000, 1024, None, None)
    (1024, 0.006)
    >>> settings_for(100_000, 1024, 512, None)
    (512, 0.003)
    """
    size = minibatch_for(n_cells, largest) if batch_size is None else batch_size
    growth = size / SMALLEST if batch_size is None else 1.0
    return size, RATE * growth**0.5 if learning_rate is None else learning_rate


@checked
def epochs_for(steps_per_epoch: Count) -> int:
    """Number of epochs that ``n_epochs=None`` stands for.

    Small data are seen 150 times. With more cells, the number of steps is about 6,000 instead, in at least 10 epochs.

    Parameters
    ----------
    steps_per_epoch
        Number of minibatches of training cells. If ``batch_size`` is chosen too, that of minibatches of 256 cells, so
        that larger ones make a run shorter.

    Examples
    --------
    >>> [epochs_for(-(-n_cells // 256)) for n_cells in (2_000, 10_000, 40_000, 1_000_000)]
    [150, 150, 39, 10]
    """
    return min(MOST_EPOCHS, max(FEWEST_EPOCHS, -(-STEPS // steps_per_epoch)))


def said(n_epochs: int, steps_per_epoch: int) -> str:
    """What the user is told about it."""
    why = {MOST_EPOCHS: "the most", FEWEST_EPOCHS: "the fewest"}.get(n_epochs, "fewer for more cells")
    length = f"Training for {n_epochs} epochs of {steps_per_epoch:,} steps ({why} by default)"
    return f"{length}; set n_epochs (--epochs on the command line) to change it"
