"""Methods of a trained model about latent variables: of each cell, of its neighbours, and global ones."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from pyro import poutine
from torch import Tensor

from pyromosaic.accepted import Column, Count, Seed, Share, checked
from pyromosaic.data import Mosaic
from pyromosaic.models.base import TrainedModel
from pyromosaic.neighbors import nearest, vote
from pyromosaic.tasks import inference_mode
from pyromosaic.tasks.question import Cells


class Locating(TrainedModel):
    """Methods about latent variables; see `pyromosaic.models.MosaicModel`."""

    @checked
    def get_latent_representation(
        self,
        cells: Cells = None,
        *,
        modality: str | None = None,
        sample: bool = False,
        data: Mosaic | None = None,
        seed: Seed = 0,
    ) -> pd.DataFrame:
        """Latent variable of each cell.

        Parameters
        ----------
        cells
            Names, positions or a mask; None for all.
        modality
            Infer from this modality alone, in the cells that have it; None uses all modalities of a cell.
        sample
            Return a draw from the posterior instead of its mean.
        data
            Cells other than the training data.
        seed
            Seed of the draw.

        Returns
        -------
        pandas.DataFrame
            Cells × latent dimensions ``z_0``, ``z_1``, …

        Examples
        --------
        >>> from pyromosaic import Mosaic, MultiVI, simulate
        >>> mosaic = Mosaic.from_mudata(simulate(60, {"rna": 50, "adt": 5})[0], batch_key="batch")
        >>> model = MultiVI(mosaic, n_latent=3)
        >>> model.get_latent_representation().columns.tolist()
        ['z_0', 'z_1', 'z_2']
        >>> len(model.get_latent_representation(modality="adt"))  # cells that have antibodies, seen by these alone
        40
        """
        mosaic = self._data(data)
        index = self._having(mosaic, mosaic.find(cells), modality)
        z = self._latent(mosaic, index, "z", modality, sample, seed)
        return pd.DataFrame(z, mosaic.obs_names[index], [f"z_{i}" for i in range(z.shape[1])])

    def _having(self, mosaic: Mosaic, index: np.ndarray, modality: str | None) -> np.ndarray:
        """The cells that have a modality; all if None."""
        if modality is None:
            return index
        self.schema[modality]
        having = index[mosaic.modalities[modality].present[index]]
        if len(having) == 0:
            raise ValueError(f"none of the given cells has modality {modality!r}")
        return having

    @checked
    def get_global_posterior(
        self, n_samples: Count = 1000, *, quantiles: Sequence[Share] = (0.05, 0.95), seed: Seed = 0
    ) -> pd.DataFrame:
        """Posterior of global latent variables, which a prior, decoder or likelihood draws once for all cells.

        Parameters
        ----------
        n_samples
            Number of posterior draws.
        quantiles
            Levels at which to report quantiles over the draws.
        seed
            Seed of the draws.

        Returns
        -------
        pandas.DataFrame
            One row per element, indexed by ``site`` and ``element`` (its number); columns ``mean``, ``sd`` and the
            levels.

        Raises
        ------
        ValueError
            If the model has no global latent variable.

        Examples
        --------
        >>> from pyro import distributions as dist
        >>> from pyro.nn import PyroSample
        >>> from pyromosaic import ModalitySpec, Mosaic, MultiVI, simulate
        >>> from pyromosaic.likelihoods import NB
        >>> class Uncertain(NB):  # dispersions with a prior, and so with a posterior
        ...     def __init__(self, schema):
        ...         super().__init__(schema)
        ...         self.log_theta = PyroSample(dist.Normal(torch.zeros(50), 1.5).to_event(1))
        >>> mosaic = Mosaic.from_mudata(simulate(60, {"rna": 50})[0], {"rna": ModalitySpec(Uncertain)})
        >>> model = MultiVI(mosaic, n_latent=3)
        >>> model.get_global_posterior(n_samples=20).loc["modalities.rna.likelihood.log_theta"].shape
        (50, 4)
        """
        values: dict[str, list[Tensor]] = {}
        with inference_mode(self.guide, seed=seed):
            for _ in range(n_samples):
                guide = poutine.trace(self.guide.globals).get_trace()
                trace = poutine.trace(poutine.replay(self.model.globals, trace=guide)).get_trace()
                for name in trace.stochastic_nodes:
                    values.setdefault(name, []).append(trace.nodes[name]["value"].reshape(-1).cpu())
        if not values:
            raise ValueError("the model has no global latent variable: none of its modules has a PyroSample")
        tables = {}
        for name, drawn in values.items():
            x = pd.DataFrame(torch.stack(drawn).numpy())
            columns: dict[Any, pd.Series] = {"mean": x.mean(), "sd": x.std()}
            tables[name] = pd.DataFrame(columns | {q: x.quantile(q) for q in quantiles})
        return pd.concat(tables, names=["site", "element"])

    @checked
    def nearest_cells(self, modality: str, to: str, cells: Cells = None, *, n_neighbors: Count = 15) -> pd.DataFrame:
        """Nearest cells in another modality, and whether a cell has a counterpart there at all.

        Parameters
        ----------
        modality, to
            Modality of the cells, and modality in which to search.
        cells
            Names, positions or a mask; None for all cells of the modality.
        n_neighbors
            Number of nearest cells to consider.

        Returns
        -------
        pandas.DataFrame
            For each cell: ``nearest``, the nearest cell of the other modality; ``distance``, the mean distance to its
            nearest cells there, divided by the 95 % quantile of the same distance among the cells there; and ``alone``,
            whether this ratio is above 1, for example because the other modality has no cells of this type.

        Examples
        --------
        >>> from pyromosaic import Mosaic, MultiVI, simulate
        >>> mosaic = Mosaic.from_mudata(simulate(60, {"rna": 50, "adt": 5})[0], batch_key="batch")
        >>> model = MultiVI(mosaic, n_latent=3)
        >>> model.nearest_cells("adt", to="rna", n_neighbors=5).columns.tolist()
        ['nearest', 'distance', 'alone']
        """
        query = self.get_latent_representation(cells, modality=modality)
        distance, rows, reference = self._neighbours(query, to, n_neighbors)
        among, _ = nearest(reference.to_numpy(), n_neighbors)
        usual = np.quantile(among.mean(axis=1), 0.95)
        relative = distance.mean(axis=1) / usual
        columns = {"nearest": reference.index.to_numpy()[rows[:, 0]], "distance": relative, "alone": relative > 1}
        return pd.DataFrame(columns, index=query.index)

    @checked
    def transfer_labels(
        self, key: Column, modality: str, to: str, cells: Cells = None, *, n_neighbors: Count = 15
    ) -> pd.DataFrame:
        """Transfer labels from cells of one modality to cells of another, by a vote of the nearest neighbours.

        Parameters
        ----------
        key
            Column of `obs` with the labels; it may have been added after registration.
        modality, to
            Modality with known labels, and modality whose cells get them.
        cells
            Cells of `to`: names, positions or a mask; None for all.
        n_neighbors
            Number of cells that vote; those without a label, or with the word for "not known", do not.

        Returns
        -------
        pandas.DataFrame
            Cells × ``prediction`` and ``confidence``, the share of the votes. If labels have equal votes, the label of
            the nearest cell wins.

        Examples
        --------
        >>> from pyromosaic import Mosaic, MultiVI, simulate
        >>> mosaic = Mosaic.from_mudata(simulate(60, {"rna": 50, "adt": 5})[0], batch_key="batch")
        >>> model = MultiVI(mosaic, n_latent=3)
        >>> model.transfer_labels("celltype", "rna", to="adt", n_neighbors=5).columns.tolist()
        ['prediction', 'confidence']
        """
        self.schema[modality]
        labels = self._data(None).words(key)
        known = labels.notna().to_numpy() & self._data(None).modalities[modality].present
        if not known.any():
            raise ValueError(f"no cell of modality {modality!r} has a value in column {key!r}")
        query = self.get_latent_representation(cells, modality=to)
        _, rows, reference = self._neighbours(query, modality, n_neighbors, np.flatnonzero(known))
        codes, names = pd.factorize(labels[reference.index])
        best, confidence = vote(codes[rows])
        return pd.DataFrame({"prediction": np.asarray(names)[best], "confidence": confidence}, index=query.index)

    def _neighbours(
        self, query: pd.DataFrame, modality: str, n_neighbors: int, cells: Cells = None
    ) -> tuple[np.ndarray, np.ndarray, pd.DataFrame]:
        """Distances and rows of the nearest cells of a modality, and these cells' latent variables."""
        reference = self.get_latent_representation(cells, modality=modality)
        distance, rows = nearest(reference.to_numpy(), n_neighbors, query.to_numpy())
        return distance, rows, reference
