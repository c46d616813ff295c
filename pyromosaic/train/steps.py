"""A number of steps without Lightning, for small programs that are fitted on the way to something else."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn


def minimise(
    losses: Iterable[Tensor],
    parameters: Iterable[nn.Parameter],
    learning_rate: float,
    n_steps: int,
    gradient_clip: float = 0.0,
) -> np.ndarray:
    """Fit parameters by Adam, with a learning rate that falls to 0 along a cosine.

    Parameters
    ----------
    losses
        The loss at each step, a scalar with gradient that is evaluated when it is asked for.
    parameters
        What is fitted.
    learning_rate
        At the first step.
    n_steps
        Number of steps; fewer if there are fewer losses.
    gradient_clip
        Largest norm of the gradient; 0 for no limit.

    Returns
    -------
    numpy.ndarray
        The losses.

    Examples
    --------
    >>> x = nn.Parameter(torch.tensor(3.0))
    >>> losses = minimise(((x - 1) ** 2 for _ in range(200)), [x], learning_rate=0.1, n_steps=200)
    >>> len(losses), round(x.item(), 2)
    (200, 1.0)
    """
    parameters = list(parameters)
    optimiser = torch.optim.Adam(parameters, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, n_steps)
    found = []
    for _, loss in zip(range(n_steps), losses, strict=False):
        optimiser.zero_grad()
        loss.backward()
        if gradient_clip:
            torch.nn.utils.clip_grad_norm_(parameters, gradient_clip)
        optimiser.step()
        schedule.step()
        found.append(loss.detach())
    return np.array([float(loss) for loss in found])
