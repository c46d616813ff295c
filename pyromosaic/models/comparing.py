"""Methods of a trained model about features and groups: backgrounds, correlations, and densities of groups."""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import pandas as pd
from pyro.distributions import TorchDistribution
from scipy.special import logsumexp
from scipy.stats import rankdata
from torch import Tensor

from pyromosaic.accepted import Column, Count, Seed, checked
from pyromosaic.data import Mosaic
from pyromosaic.models.drawing import Drawing
from pyromosaic.tasks import blocks, estimate
from pyromosaic.tasks.question import Cells, Question, first_of, portions


class Comparing(Drawing):
    """Methods about features and groups; see `pyromosaic.models.MosaicModel`."""

    @checked
    def get_protein_background_mean(
        self,
        modality: str | None = None,
        cells: Cells = None,
        *,
        features: Cells = None,
        batch: object = None,
        n_samples: Count | None = 25,
        data: Mosaic | None = None,
        seed: Seed = 0,
    ) -> pd.DataFrame:
        """Expected count that background alone would give, in a cell of median size, measured or not.

        Parameters
        ----------
        modality, cells, features, data, seed
            As in `get_protein_foreground_probability`.
        batch
            Predict as if measured in this batch; by default the cell's own batch.
        n_samples
            Average over this many posterior draws. With None, a latent background is at its posterior median.

        Returns
        -------
        pandas.DataFrame
            Cells × proteins, in counts.

        Examples
        --------
        >>> from pyromosaic import Mosaic, MultiVI, simulate
        >>> mosaic = Mosaic.from_mudata(simulate(60, {"rna": 50, "adt": 5})[0], batch_key="batch")
        >>> model = MultiVI(mosaic, n_latent=3)
        >>> model.get_protein_background_mean(cells=["cell0", "cell1"]).shape
        (2, 5)
        """
        if modality is None:
            modality = first_of(self.schema, "'nb_mixture'", lambda traits: traits.background)
        if not self.schema[modality].spec.traits.background:
            raise ValueError(f"modality {modality!r} has no background; only the likelihood 'nb_mixture' has one")
        if "mixing" not in self._likelihood(modality).predictors:
            raise ValueError(f"modality {modality!r} has no background here: the program does not use its likelihood")

        def background(distribution: TorchDistribution) -> Tensor:
            mean: Tensor = distribution.mu_background
            return mean

        mosaic, size = self._data(data), self.schema[modality].library
        question = Question(modality, background, cells, features, None, batch, size, n_samples, None, data, seed)
        columns = pd.Index(self.schema[modality].features)[self._features(modality, features)]
        found = blocks(self.model, self.guide, mosaic, question, self._device)
        return estimate(found, mosaic.obs_names[mosaic.find(cells)], columns).mean

    @checked
    def get_feature_correlation_matrix(
        self,
        modalities: str | Sequence[str],
        cells: Cells = None,
        *,
        features: Mapping[str, Cells] | None = None,
        batch: object = None,
        method: Literal["spearman", "pearson"] = "spearman",
        n_samples: Count = 10,
        data: Mosaic | None = None,
        seed: Seed = 0,
    ) -> pd.DataFrame:
        """Correlations over cells of denoised features, within and between modalities, measured or not.

        The correlations are those of posterior draws of the denoised values (`get_draws` with ``kind="denoised"``),
        averaged over draws. Means of the posterior would vary together more than the cells do.

        Parameters
        ----------
        modalities
            Modalities whose features are correlated.
        cells
            Names, positions or a mask of at least 3 cells; None for all. Over cells of several types, correlations are
            mostly differences between the types.
        features
            Names of features to keep, by modality; all of the modalities that are left out.
        batch
            Predict as if measured in this batch; by default the cell's own batch, whose differences then count too.
        method
            ``"spearman"``: of ranks; ``"pearson"``: of ``log1p`` of RNA in counts per 10,000 and of protein, and of
            other values as they are.
        n_samples
            Number of draws.
        data
            Cells other than the training data.
        seed
            Seed of the draws.

        Returns
        -------
        pandas.DataFrame
            Features × features, both indexed by ``modality`` and ``feature``; NaN for a feature without variation.

        Examples
        --------
        >>> from pyromosaic import Mosaic, MultiVI, simulate
        >>> mosaic = Mosaic.from_mudata(simulate(60, {"rna": 50, "adt": 5})[0], batch_key="batch")
        >>> model = MultiVI(mosaic, n_latent=3)
        >>> found = model.get_feature_correlation_matrix(["rna", "adt"], features={"rna": ["rna_0"]}, n_samples=2)
        >>> found.loc[("rna", "rna_0"), "adt"].shape
        (5,)
        """
        if len(self._data(data).find(cells)) < 3:
            raise ValueError("correlations need at least 3 cells")
        names = [modalities] if isinstance(modalities, str) else list(modalities)
        if not names:
            raise ValueError("modalities must name at least one modality; found none")
        total: np.ndarray | float = 0.0
        for i in range(n_samples):  # one draw at a time is in memory
            drawn = self._drawn(names, cells, ("denoised",), features, None, batch, 1, data, seed + i)["denoised"]
            x = np.concatenate([self._comparable(name, drawn[name].to_numpy()[0], method) for name in names], axis=1)
            x = x - x.mean(0)
            length = np.sqrt((x**2).sum(0))
            with np.errstate(invalid="ignore", divide="ignore"):
                total = total + (x.T @ x) / np.where(length > 1e-9, length, np.nan) / length[:, None]
        labels = [(name, feature) for name in names for feature in drawn[f"{name}_feature"].to_numpy()]
        index = pd.MultiIndex.from_tuples(labels, names=["modality", "feature"])
        return pd.DataFrame(total / n_samples, index, index)

    def _comparable(self, name: str, values: np.ndarray, method: str) -> np.ndarray:
        """Denoised values as they are correlated."""
        values = values.astype(np.float64)
        if method == "spearman":
            return np.asarray(rankdata(values, axis=0))
        traits = self.schema[name].spec.traits
        if traits.scale == "difference":
            return values
        return np.log1p(1e4 * values if traits.shares else values)

    @checked
    def differential_abundance(self, key: Column, cells: Cells = None, *, data: Mosaic | None = None) -> pd.DataFrame:
        """Log density of each group of cells at each cell's place in the latent space.

        The density of a group is the mean of the posteriors of z of its cells (its aggregated posterior), evaluated at
        the posterior mean of a cell, without the posterior of the cell itself. The difference between two columns is
        the log ratio of their densities: where it is above 0, the first group is over-represented. Sizes of groups do
        not matter.

        Parameters
        ----------
        key
            Column of `obs` with the groups, e.g. donors or conditions; cells without a value are in none.
        cells
            Names, positions or a mask of the cells at which to evaluate; None for all.
        data
            Cells other than the training data.

        Returns
        -------
        pandas.DataFrame
            Cells × groups, in nats.

        Raises
        ------
        ValueError
            If a group has fewer than 2 cells, or the posterior is a point.

        Notes
        -----
        Posteriors are taken as normal with independent dimensions. Where donors are the groups, compare the densities
        of several donors of each condition; cells of one donor are not replicates.

        References
        ----------
        Boyeau et al., Deep generative modeling of sample-level heterogeneity in single-cell genomics, Nature Methods
        2025.

        Examples
        --------
        >>> from pyromosaic import Mosaic, MultiVI, simulate
        >>> mosaic = Mosaic.from_mudata(simulate(60, {"rna": 50}, treated=0.5)[0])
        >>> density = MultiVI(mosaic, n_latent=3).differential_abundance("condition")
        >>> (density["treated"] - density["control"]).shape
        (60,)
        """
        mosaic = self._data(data)
        words, q = mosaic.words(key), self.get_latent_posterior(data=mosaic)
        mean, precision = q.mean.to_numpy(dtype=np.float64), 1 / q.sd.to_numpy(dtype=np.float64).clip(1e-30) ** 2
        if (q.sd.to_numpy() <= 0).any():
            raise ValueError("the posterior of this model is a point, which has no density")
        groups = {group: np.flatnonzero((words == group).to_numpy()) for group in sorted(words.dropna().unique())}
        if not groups:
            raise ValueError(f"no cell has a value in column {key!r}")
        small = next((group for group, members in groups.items() if len(members) < 2), None)
        if small is not None:
            raise ValueError(f"group {small!r} of column {key!r} must have at least 2 cells; found 1")
        constant = (np.log(precision).sum(1) - (mean**2 * precision).sum(1) - mean.shape[1] * np.log(2 * np.pi)) / 2
        index = mosaic.find(cells)
        blocks = []
        for some in portions(index, 256):
            x = mean[some]
            logs = x @ (mean * precision).T - x**2 @ precision.T / 2 + constant  # cells × components
            logs[np.arange(len(some)), some] = -np.inf
            columns = [
                logsumexp(logs[:, members], axis=1) - np.log(len(members) - np.isin(some, members))
                for members in groups.values()
            ]
            blocks.append(np.column_stack(columns))
        return pd.DataFrame(np.concatenate(blocks), mosaic.obs_names[index], list(groups))
