"""Methods of a trained model about measurements: denoise, impute, draw, and compare groups of cells."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import pandas as pd
from pyro import poutine
from pyro.distributions import TorchDistribution
from scipy import sparse
from torch import Tensor

from pyromosaic.accepted import Column, Count, Level, Positive, Seed, Share, checked
from pyromosaic.data import Mosaic, measured
from pyromosaic.models.base import TrainedModel
from pyromosaic.tasks import AtMean, Estimate, answers, blocks, compare_groups, contrasts, estimate, inference_mode
from pyromosaic.tasks.differential import Delta, Mode
from pyromosaic.tasks.prediction import check_levels, fill
from pyromosaic.tasks.question import Cells, Question, check_size, first_of, portions, unit_size
from pyromosaic.tasks.stored import check_stored, stored


class Asking(TrainedModel):
    """Methods about measurements; see `pyromosaic.models.MosaicModel`."""

    @checked
    def get_normalized_expression(
        self,
        modality: str | None = None,
        cells: Cells = None,
        *,
        features: Cells = None,
        batch: object = None,
        library: Positive | None = None,
        n_samples: Count | None = None,
        data: Mosaic | None = None,
        seed: Seed = 0,
    ) -> pd.DataFrame:
        """Denoised expression, measured or not: proportions of genes, or the expected foreground of proteins.

        Parameters
        ----------
        modality
            The modality; by default the first of the model that is not accessibility.
        cells, features
            Names (for cells also positions or a mask); None for all.
        batch
            Predict as if the cells had been measured in this batch, or average over these batches; by default, each
            cell is predicted for its own batch.
        library
            Size of the cells in the prediction, in counts; by default 1 for RNA, which gives proportions, and the
            median for protein. Modalities without sizes take none.
        n_samples
            Average over this many posterior draws; None decodes the posterior mean.
        data
            Cells other than the training data.
        seed
            Seed of the draws.

        Returns
        -------
        pandas.DataFrame
            Cells × features.

        Examples
        --------
        >>> from pyromosaic import Mosaic, MultiVI, simulate
        >>> mosaic = Mosaic.from_mudata(simulate(60, {"rna": 50, "adt": 5})[0], batch_key="batch")
        >>> model = MultiVI(mosaic, n_latent=3)
        >>> shares = model.get_normalized_expression("rna", batch=["batch0", "batch1"])
        >>> shares.shape, np.allclose(shares.sum(axis=1), 1)
        ((60, 50), True)
        """
        if modality is None:
            modality = first_of(self.schema, "of expression", lambda traits: not traits.binary)
        check_size(modality, self.schema[modality], library)
        size = unit_size(self.schema[modality]) if library is None else library
        value = self._likelihood(modality).normalized
        question = Question(modality, value, cells, features, None, None, size, n_samples, None, data, seed)
        return self._expected(question, batch)

    @checked
    def get_protein_foreground_probability(
        self,
        modality: str | None = None,
        cells: Cells = None,
        *,
        features: Cells = None,
        batch: object = None,
        n_samples: Count | None = None,
        data: Mosaic | None = None,
        seed: Seed = 0,
    ) -> pd.DataFrame:
        """Probability that a cell has a protein, rather than only background, measured or not.

        Parameters
        ----------
        modality
            The modality; by default the first one with a likelihood ``"nb_mixture"``.
        cells, features, batch, n_samples, data, seed
            As in `get_normalized_expression`.

        Returns
        -------
        pandas.DataFrame
            Cells × proteins, between 0 and 1.

        Examples
        --------
        >>> from pyromosaic import Mosaic, MultiVI, simulate
        >>> mosaic = Mosaic.from_mudata(simulate(60, {"rna": 50, "adt": 5})[0], batch_key="batch")
        >>> model = MultiVI(mosaic, n_latent=3)
        >>> model.get_protein_foreground_probability(cells=["cell0", "cell1"]).shape
        (2, 5)
        """
        modality = (
            first_of(self.schema, "'nb_mixture'", lambda traits: traits.background) if modality is None else modality
        )
        if not self.schema[modality].spec.traits.background:
            raise ValueError(f"modality {modality!r} has no foreground; only the likelihood 'nb_mixture' has one")
        if "mixing" not in self._likelihood(modality).predictors:
            raise ValueError(f"modality {modality!r} has no foreground here: the program does not use its likelihood")
        size = self.schema[modality].library

        def foreground(distribution: TorchDistribution) -> Tensor:
            probability: Tensor = 1 - distribution.mixing_probability
            return probability

        question = Question(modality, foreground, cells, features, None, None, size, n_samples, None, data, seed)
        return self._expected(question, batch)

    @checked
    def get_accessibility_estimates(
        self,
        modality: str | None = None,
        cells: Cells = None,
        *,
        features: Cells = None,
        batch: object = None,
        factors: bool = False,
        threshold: Share | None = None,
        n_samples: Count | None = None,
        data: Mosaic | None = None,
        seed: Seed = 0,
    ) -> pd.DataFrame:
        """Denoised accessibility, measured or not.

        Parameters
        ----------
        modality
            The modality; by default the first one with a Bernoulli likelihood.
        cells, features, batch, n_samples, data, seed
            As in `get_normalized_expression`.
        factors
            Multiply by the cell factor and the region factor; this gives the probability of observing a fragment.
        threshold
            Replace values below it by 0, and return sparse columns, of which ``.sparse.to_coo()`` makes a matrix. Only
            some cells at a time are dense in memory.

        Returns
        -------
        pandas.DataFrame
            Cells × regions, between 0 and 1.

        Examples
        --------
        >>> from pyromosaic import Mosaic, MultiVI, simulate
        >>> mosaic = Mosaic.from_mudata(simulate(60, {"rna": 50, "atac": 40, "adt": 5})[0], batch_key="batch")
        >>> model = MultiVI(mosaic, n_latent=3)
        >>> open_ = model.get_accessibility_estimates()
        >>> seen = model.get_accessibility_estimates(factors=True)
        >>> bool((seen <= open_).all(axis=None))
        True
        """
        modality = first_of(self.schema, "'bernoulli'", lambda traits: traits.binary) if modality is None else modality
        value = (lambda d: d.mean) if factors else self._likelihood(modality).normalized
        question = Question(modality, value, cells, features, None, None, None, n_samples, None, data, seed)
        if threshold is None:
            return self._expected(question, batch)
        mosaic, parts = self._data(data), []
        index = mosaic.find(cells)
        for i, start in enumerate(range(0, len(index), 1024)):
            some = index[start : start + 1024]
            part = self._expected(replace(question, cells=some, seed=(seed + i) % 2**32), batch)
            parts.append(sparse.csr_matrix(part.where(part >= threshold, 0.0).to_numpy()))
        values = sparse.vstack(parts, format="csc")
        return pd.DataFrame.sparse.from_spmatrix(values, mosaic.obs_names[index], part.columns)  # type: ignore[attr-defined]

    @checked
    def get_cell_factors(self, cells: Cells = None, *, data: Mosaic | None = None) -> pd.DataFrame:
        """Factor by which the signal of each cell is multiplied.

        For RNA it is the size in counts; for protein, the size divided by that of the median cell; for accessibility,
        the probability that an open region is observed.

        Parameters
        ----------
        cells
            Names, positions or a mask; None for all.
        data
            Cells other than the training data.

        Returns
        -------
        pandas.DataFrame
            Cells × modalities, NaN where a modality was not measured.

        Examples
        --------
        >>> from pyromosaic import Mosaic, MultiVI, simulate
        >>> mosaic = Mosaic.from_mudata(simulate(60, {"rna": 50, "atac": 40, "adt": 5})[0], batch_key="batch")
        >>> model = MultiVI(mosaic, n_latent=3)
        >>> factors = model.get_cell_factors()
        >>> factors.columns.tolist(), np.array_equal(factors["rna"].isna(), ~mosaic.modalities["rna"].present)
        (['rna', 'atac', 'adt'], True)
        """
        mosaic = self._data(data)
        index = mosaic.find(cells)
        factors = {name: np.full(len(index), np.nan) for name in self.schema.modalities}
        with inference_mode(self.model, self.guide):
            for i, part in enumerate(portions(index)):
                minibatch = measured(mosaic, part).to(self._device)
                with AtMean():
                    latent = poutine.trace(self.guide).get_trace(minibatch).nodes
                for name, view in minibatch.observed.items():
                    if f"{name}_library" in latent:
                        view = replace(view, library=latent[f"{name}_library"]["value"].exp())
                    factor = self._likelihood(name).cell_factor(view)[:, 0]
                    factors[name][1024 * i + view.rows.cpu().numpy()] = factor.cpu().numpy()
        return pd.DataFrame(factors, mosaic.obs_names[index])

    @checked
    def get_region_factors(self, modality: str | None = None) -> pd.Series:
        """Factor of each region, between 0 and 1: it describes width and bias, and is the same for all cells.

        Parameters
        ----------
        modality
            The modality; by default the first one with a Bernoulli likelihood.

        Examples
        --------
        >>> from pyromosaic import Mosaic, MultiVI, simulate
        >>> mosaic = Mosaic.from_mudata(simulate(60, {"rna": 50, "atac": 40, "adt": 5})[0], batch_key="batch")
        >>> model = MultiVI(mosaic, n_latent=3)
        >>> model.get_region_factors().shape
        (40,)
        """
        modality = first_of(self.schema, "'bernoulli'", lambda traits: traits.binary) if modality is None else modality
        if not self.schema[modality].spec.traits.binary:
            raise ValueError(f"modality {modality!r} has no region factors; only the likelihood 'bernoulli' has them")
        if not hasattr(self._likelihood(modality), "region_factor"):
            raise ValueError(
                f"modality {modality!r} has no region factors here: the program does not use its likelihood"
            )
        factors = self._likelihood(modality).region_factor().detach().cpu().numpy()
        return pd.Series(factors, pd.Index(self.schema[modality].features))

    @overload
    def get_imputed_values(
        self, modality: str, cells: Cells = None, *, out: None = None, **options: Any
    ) -> Estimate: ...
    @overload
    def get_imputed_values(
        self, modality: str, cells: Cells = None, *, out: str | os.PathLike[str], **options: Any
    ) -> Path: ...
    @overload
    def get_imputed_values(self, modality: str, cells: Cells = None, *, out: Any, **options: Any) -> Any: ...
    @checked  # type: ignore[misc]  # the options are spelled out only here
    def get_imputed_values(
        self,
        modality: str,
        cells: Cells = None,
        *,
        features: Cells = None,
        encode: str | Sequence[str] | None = None,
        batch: object = None,
        library: Positive | None = None,
        n_samples: Count | None = 25,
        quantiles: Sequence[Share] = (0.05, 0.95),
        out: Any = None,
        data: Mosaic | None = None,
        seed: Seed = 0,
    ) -> Any:
        """Expected measurements of a modality with their uncertainty, inferred from all modalities of each cell.

        Parameters
        ----------
        modality
            The modality to impute.
        cells, features, data, seed
            As in `get_normalized_expression`.
        encode
            Modalities to infer from; by default all modalities of a cell.
        batch
            Predict as if measured in this batch; by default the cell's own batch, or an average over batches if the
            modality was never measured in the cell's batch.
        library
            Size of the cells in counts; by default the cell's own size, or where the modality is missing, the size that
            the model expects given the latent variable.
        n_samples
            Number of independent posterior draws; None evaluates at the posterior mean, without uncertainty.
        quantiles
            Levels at which to report quantiles over the draws.
        out
            A new file, ``.h5ad``, ``.h5mu`` or ``.zarr``, to which the result is written block by block, so that it
            needs little memory: the mean as ``X``, standard deviation and quantiles as layers ``sd``, ``q0.05``, ….
            Or the group of an AnnData in an open file (h5py, zarr), which has the tables of these cells and features.

        Returns
        -------
        Estimate
            Mean, standard deviation and quantiles, each cells × features. With `out`, the path or group of the file.

        Raises
        ------
        ValueError
            If `out` exists or has another suffix, or another argument is out of range.

        Examples
        --------
        >>> from pyromosaic import Mosaic, MultiVI, simulate
        >>> mosaic = Mosaic.from_mudata(simulate(60, {"rna": 50, "adt": 5})[0], batch_key="batch")
        >>> model = MultiVI(mosaic, n_latent=3)
        >>> found = model.get_imputed_values("adt", encode=["rna"], cells=mosaic.modalities["rna"].present, n_samples=5)
        >>> found.mean.shape, sorted(found.quantiles)
        ((40, 5), [0.05, 0.95])
        """
        check_size(modality, self.schema[modality], library)
        question = Question(
            modality, lambda d: d.mean, cells, features, encode, batch, library, n_samples, seed, data, seed
        )
        return self._estimate(question, quantiles) if out is None else self._store(out, question, quantiles)

    @checked
    def differential(
        self,
        groupby: Column | None = None,
        group1: object = None,
        group2: object = None,
        *,
        cells1: Cells = None,
        cells2: Cells = None,
        modality: str | None = None,
        mode: Mode = "change",
        delta: Delta = "default",
        fdr: Level = 0.05,
        batch_correction: bool = False,
        protein_foreground: bool = False,
        n_samples: Count = 5000,
        features: Cells = None,
        data: Mosaic | None = None,
        seed: Seed = 0,
    ) -> pd.DataFrame:
        """Differential expression, accessibility or protein between groups of cells, measured or not.

        The test compares pairs of cells, one from each group, by posterior draws of their denoised values; see
        `pyromosaic.tasks.compare`. The effect is the log2 fold change of proportions (RNA) or of expected counts
        (protein), or the difference of probabilities (accessibility).

        Parameters
        ----------
        groupby
            Column of `obs` with the groups; cells without a value are ignored.
        group1, group2
            Values in that column. Without `group1`, each group is compared with all other cells in turn; without
            `group2`, the second group is all other cells.
        cells1, cells2
            The groups as names, positions or masks of cells; without `cells2`, the second group is all other cells.
        modality
            The modality; by default the model's first.
        mode
            ``"change"``: is the effect at least `delta` in size? ``"vanilla"``: which of the two is larger?
        delta
            Smallest relevant effect: by default a log2 fold change of 0.25 or a difference of 0.05; None estimates it
            for each pair of groups.
        fdr
            Accepted false discovery rate among the features that are called significant.
        batch_correction
            Decode both cells of a pair for the same batch, and average over batches. By default, each cell is decoded
            for its own batch.
        protein_foreground
            Compare the expected foreground of a protein instead of its whole expected count. This is less stable: where
            background and foreground are hard to distinguish, the model may assign the same count to either, and only
            the foreground changes. It is refused for modalities without a background.
        n_samples
            Number of pairs.
        features
            Names of the features to compare; None for all.
        data
            Cells other than the training data.
        seed
            Seed of pairs and draws; it is the same for every pair of groups.

        Returns
        -------
        pandas.DataFrame
            A block for each pair of groups (``comparison``, ``group1``, ``group2``) with one row per feature, the most
            probable first. It has the columns of `pyromosaic.tasks.compare`, then ``raw_mean``, ``nonzero_share`` and
            ``normalized_mean`` (cells scaled to the size of the median cell) of the cells of each group in which the
            modality was measured, NaN if there are none.

        Raises
        ------
        ValueError
            If groups are empty, overlap or do not exist, or another argument is out of range.
        KeyError
            If the model has no such modality.

        Notes
        -----
        The probabilities are about cells like these. They include the uncertainty of the decoder's weights, which both
        cells of a pair share, and take the other networks as known. Small effects between
        small groups may be chance; use a larger `delta` (or None). Cells of one donor are not replicates: statements
        about donors need several donors in each group.

        Examples
        --------
        >>> from pyromosaic import Mosaic, MultiVI, pbmc_mosaic
        >>> mosaic = Mosaic.from_mudata(pbmc_mosaic(), batch_key="batch")
        >>> model = MultiVI(mosaic, n_latent=10)
        >>> model.train(n_epochs=1, progress_bar=False)
        >>> table = model.differential("celltype", "B", modality="adt", features=["cd19", "cd3.1"], n_samples=100)
        >>> sorted(table.index)
        ['cd19', 'cd3.1']
        """
        mosaic = self._data(data)
        name = next(iter(self.schema.modalities)) if modality is None else modality
        value = self._compared(name, protein_foreground)
        columns = pd.unique(self._features(name, features))
        wanted = None if features is None else [self.schema[name].features[column] for column in columns]
        question = Question(name, value, None, wanted, library=unit_size(self.schema[name]), n_samples=1, data=mosaic)

        def draw(cells: np.ndarray, batch: str | None, seed: int, shared: int) -> np.ndarray:
            chunks = self._answers(replace(question, cells=cells, batch=batch, seed=seed, weights=shared))
            return np.concatenate([chunk[0].cpu().numpy() for chunk in chunks])

        tables = [
            compare_groups(
                contrast,
                draw,
                draw,
                mosaic.modalities[name],
                columns,
                mode=mode,
                delta=delta,
                fdr=fdr,
                batch_correction=batch_correction,
                n_samples=n_samples,
                seed=seed,
            )
            for contrast in contrasts(mosaic, groupby, group1, group2, cells1, cells2)
        ]
        return pd.concat(tables)

    def _compared(self, modality: str, protein_foreground: bool = False) -> Callable[[TorchDistribution], Tensor]:
        """The quantity in which cells are compared."""
        if protein_foreground and not self.schema[modality].spec.traits.background:
            raise ValueError(
                f"protein_foreground has no effect on modality {modality!r}, whose likelihood has no background; leave "
                "it out"
            )
        if self.schema[modality].spec.traits.background and not protein_foreground:
            return lambda distribution: distribution.mean
        return self._likelihood(modality).normalized

    def _expected(self, question: Question, batch: object) -> pd.DataFrame:
        """Mean of a quantity over posterior draws and over batches, each batch with the same draws."""
        batches: list[object] = (
            list(batch) if isinstance(batch, Iterable) and not isinstance(batch, str | bytes) else [batch]
        )
        if not batches:
            raise ValueError("the list of batches to average over is empty; name one, or give None for each cell's own")
        means = [self._estimate(replace(question, batch=b)).mean for b in batches]
        return sum(means[1:], means[0]) / len(means)

    def _estimate(self, question: Question, quantiles: Sequence[float] = ()) -> Estimate:
        mosaic, modality = self._data(question.data), question.modality
        names = mosaic.obs_names[mosaic.find(question.cells)]
        columns = pd.Index(self.schema[modality].features)[self._features(modality, question.features)]
        found = blocks(self.model, self.guide, mosaic, question, self._device)
        return estimate(found, names, columns, quantiles)

    def _store(self, out: Any, question: Question, quantiles: Sequence[float] = ()) -> Any:
        """Write an estimate to a file, block by block."""
        place, mosaic, modality = check_stored(out), self._data(question.data), question.modality
        levels = check_levels(quantiles)
        obs = pd.DataFrame(index=mosaic.obs_names[mosaic.find(question.cells)])
        columns = pd.Index(self.schema[modality].features)[self._features(modality, question.features)]
        names = ["mean", "sd", *(f"q{level}" for level in levels)]
        with stored(place, modality, obs, pd.DataFrame(index=columns), names) as arrays:
            fill(arrays, blocks(self.model, self.guide, mosaic, question, self._device), levels)
        return place

    def _answers(self, question: Question) -> Iterator[Tensor]:
        """Draws of the requested quantity, chunk by chunk of cells, each of shape (draws, cells, features)."""
        return answers(self.model, self.guide, self._data(question.data), question, self._device)
