"""Likelihood of held-out cells under a model."""

import numpy as np
import pandas as pd
import torch

from pyromosaic.accepted import Count, Seed, checked
from pyromosaic.checks.cells import blocks, explain, infer, log_weight
from pyromosaic.data import Mosaic
from pyromosaic.measurement import encoded_once
from pyromosaic.models.mosaic_model import Cells, MosaicModel
from pyromosaic.tasks import inference_mode
from pyromosaic.train.drawn import without_penalties


@checked
def held_out_log_likelihood(
    model: MosaicModel, cells: Cells = None, *, n_samples: Count = 100, data: Mosaic | None = None, seed: Seed = 0
) -> pd.DataFrame:
    r"""Log-likelihood of each cell's measurements, all modalities together, by importance sampling.

    .. math:: \log p(x) \approx \log \frac{1}{K} \sum_k \frac{p(x, z_k)}{q(z_k \mid x)}, \qquad z_k \sim q

    where z contains all latent variables of the cell (also private ones, sizes and backgrounds).

    Parameters
    ----------
    model
        The model.
    cells
        Names, positions or a mask, e.g. ``model.split.test``; None for all.
    n_samples
        Number K of posterior draws.
    data
        Cells other than the training data.
    seed
        Seed of the draws.

    Returns
    -------
    pandas.DataFrame
        Cells × ``log_likelihood`` in nats; ``elbo``, the mean of the logarithms instead of the logarithm of the mean;
        and ``n_effective``, the effective number of draws, from 1 to K. If it is small, the estimate is too low: on
        average, it rises to the true value as K grows.

    Raises
    ------
    ValueError
        If the posterior is a point estimate, which has no density.

    Notes
    -----
    The estimate uses only the joint density of the model: no penalties, and no weights of divergences or modalities.
    Values of two models are comparable if the models explain the same measurements on the same scale, including sizes:
    with observed sizes, counts are explained given the sizes. Latent variables shared by all cells, such as embeddings
    of features, are drawn from their posterior and treated as known: the density is that of a new cell.

    References
    ----------
    Burda, Grosse and Salakhutdinov, Importance weighted autoencoders, ICLR 2016.

    Examples
    --------
    >>> from pyromosaic import Mosaic, MultiVI, checks, simulate
    >>> model = MultiVI(Mosaic.from_mudata(simulate(200, {"rna": 50, "adt": 5})[0]), n_latent=3)
    >>> table = checks.held_out_log_likelihood(model, n_samples=10)
    >>> bool((table["log_likelihood"] >= table["elbo"]).all())
    True
    """
    mosaic = model._data(data)
    index = mosaic.find(cells)
    parts = []
    with inference_mode(model.model, model.guide, seed=seed), without_penalties(model.guide):
        for minibatch in blocks(model, mosaic, index):
            draws = []
            with encoded_once(model.guide):
                for _ in range(n_samples):
                    inferred = infer(model.guide, minibatch)
                    draws.append(log_weight(explain(model.model, minibatch, inferred), inferred, minibatch))
            weights = torch.stack(draws)
            share = weights.softmax(0)
            columns = [weights.logsumexp(0) - np.log(n_samples), weights.mean(0), 1 / share.square().sum(0)]
            parts.append(torch.stack(columns, dim=1).cpu().numpy())
    names = ["log_likelihood", "elbo", "n_effective"]
    return pd.DataFrame(np.concatenate(parts), mosaic.obs_names[index], names)
