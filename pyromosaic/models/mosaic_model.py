"""What all models share: a Pyro program with its data, trained, asked, saved and loaded."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import pandas as pd
import pyro
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sklearn.neighbors import NearestNeighbors
from torch import Tensor
from torch.utils.data import DataLoader

from pyromosaic.data import Minibatch, ModalitySpec, Mosaic, Schema, Split, Traits, loader, measured, split, to_predict
from pyromosaic.fusion import Fusion
from pyromosaic.laplace import learn_weights
from pyromosaic.likelihoods import Likelihood
from pyromosaic.measurement import part_of
from pyromosaic.models.formats import FORMAT, READ, upgraded
from pyromosaic.models.query import carry_over, only
from pyromosaic.program import Program, check, check_names
from pyromosaic.tasks import AtMean, Estimate, compare_groups, contrasts, draws, estimate, inference_mode
from pyromosaic.tasks.differential import Delta, Mode
from pyromosaic.train import Optimisation, Schedule, fit

CHUNK_ENTRIES = 20_000_000  # draws × cells × features in memory at once

Cells = Sequence[str] | np.ndarray | pd.Index | None


class Preset(NamedTuple):
    """Named choices: options of a model's constructor, and of its `train`."""

    options: Mapping[str, Any]
    training: Mapping[str, Any]


class MosaicModel:
    """A Pyro program (`model`, `guide`) over a mosaic.

    A subclass builds `model` and `guide` in its constructor inside ``with self._construction(data, seed)``.

    Attributes
    ----------
    model, guide
        The Pyro program; both are called with a `Minibatch`. A model's class names theirs as ``Model`` and ``Guide``,
        which a subclass may replace.
    schema
        What is remembered of the data.
    mosaic
        The training data, if there are any.
    history
        A row an epoch, once trained; see `pyromosaic.train.Plan`.
    split
        Training, validation and test cells, once trained.

    Examples
    --------
    >>> from pyromosaic import Mosaic, MultiVI, simulate
    >>> mosaic = Mosaic.from_mudata(simulate(60, {"rna": 50, "adt": 5})[0], batch_key="batch")
    >>> model = MultiVI(mosaic, n_latent=3)
    >>> model  # what it was not trained for it answers by its start values
    MultiVI, not trained, on Mosaic of 60 cells
      rna: 40 cells × 50 features, nb, batch 'batch' (2)
      adt: 40 cells × 5 features, nb_mixture, batch 'batch' (2)
    >>> model.get_latent_representation().shape
    (60, 3)
    >>> model.get_normalized_expression("rna", features=["rna_0", "rna_1"]).shape  # also where RNA was not measured
    (60, 2)
    """

    model: Program
    guide: Program

    options: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Note the options of the outermost constructor, a subclass's for example, to rebuild the model from."""
        model = super().__new__(cls)
        model.options = _options(cls, args, kwargs)
        return model

    @contextmanager
    def _construction(self, data: Mosaic | Schema, seed: int) -> Iterator[Schema]:
        """Seeded and with local parameters; afterwards start values are taken from the data, if there are any."""
        self.mosaic = self.arranged(data) if isinstance(data, Mosaic) else None
        self.schema = data.schema if isinstance(data, Mosaic) else data
        check_names(self.schema)
        self.history = pd.DataFrame()
        self.split: Split | None = None
        with torch.random.fork_rng(), pyro.settings.context(module_local_params=True):
            torch.manual_seed(seed)
            yield self.schema
            self.guide.match(self.model)
        if self.mosaic is not None:
            with torch.no_grad():
                self.start(self.mosaic)
        self.model.eval()
        self.guide.eval()

    def _keep(self, **options: Any) -> None:
        """Save these values in place of what options were given as."""
        self.options |= {name: value for name, value in options.items() if name in self.options}

    def arranged(self, mosaic: Mosaic) -> Mosaic:
        """The cells as the model takes them."""
        return mosaic

    def check_data(self, mosaic: Mosaic) -> None:
        """Refuse data that the model cannot learn from."""

    def start(self, mosaic: Mosaic) -> None:
        """Set input scaling, feature-level parameters and the decoders' biases from the data."""
        self.check_data(mosaic)
        if self._fusion is not None:
            self._fusion.start(mosaic)
        for name, modality in mosaic.modalities.items():
            part, of_guide = part_of(self.model, name), part_of(self.guide, name)
            if part is not None and modality.present.any():
                view = measured(mosaic, modality.sample()).observed[name]
                biases = part.start(view)
                if of_guide is not None:
                    of_guide.start(view, biases)

    @property
    def _fusion(self) -> Fusion | None:
        return getattr(self.guide, "fusion", None)

    def loader(
        self, mosaic: Mosaic, cells: np.ndarray, batch_size: int, seed: int | None = None, n_workers: int = 0
    ) -> DataLoader[Minibatch]:
        """Minibatches to train on and to validate with."""
        return loader(mosaic, cells, batch_size, seed, n_workers)

    def finish(self, mosaic: Mosaic) -> None:
        """Learn how sure decoders are, and how a cell's size depends on z, for cells in which it was not measured."""
        for name, modality in mosaic.modalities.items():
            part = part_of(self.model, name)
            if part is not None and modality.present.any():
                cells, latent = self.explaining_size(mosaic, modality.sample())
                view = measured(mosaic, cells).observed[name].to(self._device)
                part.size.fit(torch.from_numpy(latent).to(self._device), view)
                parts = np.array_split(cells, -(-len(cells) // 256))
                minibatches = (measured(mosaic, part).to(self._device) for part in parts)
                with inference_mode(self.model, self.guide, seed=0):
                    learn_weights(self.model, self.guide, name, minibatches, int(modality.present.sum()))

    def explaining_size(self, mosaic: Mosaic, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of these cells those to learn sizes from, and draws of what explains them (as predicting does)."""
        return cells, self._latent(mosaic, cells, "z", sample=True)

    def __repr__(self) -> str:
        trained = f"trained for {len(self.history)} epochs" if len(self.history) else "not trained"
        return f"{type(self).__name__}, {trained}, on {self.mosaic if self.mosaic is not None else 'no data'}"

    # Training

    def train(
        self,
        n_epochs: int = 150,
        *,
        batch_size: int = 256,
        learning_rate: float = 3e-3,
        weight_decay: float = 1e-3,
        kl_warmup_epochs: int = 50,
        schedule: Schedule = "cosine",
        gradient_clip: float = 10.0,
        validation: float = 0.1,
        test: float = 0.0,
        early_stopping: int | None = None,
        seed: int = 0,
        n_workers: int = 0,
        **trainer: Any,
    ) -> None:
        """Fit the parameters by stochastic variational inference.

        Parameters
        ----------
        n_epochs
            Passes over the training cells.
        batch_size
            Largest number of cells in a minibatch.
        learning_rate, weight_decay, kl_warmup_epochs, schedule, gradient_clip
            See `pyromosaic.train.Optimisation`.
        validation, test
            Shares of the cells kept out of training, drawn within each pattern of modalities. Validation cells are
            looked at some 20 times in the run and at its end, in every epoch if training may stop early.
        early_stopping
            Stop after this many epochs without a better validation ELBO (or, with ``monitor="reconstruction"``, a
            better likelihood), and return to the best.
        seed
            Seed of split, order of minibatches and noise.
        n_workers
            Processes that read minibatches ahead; 0 reads in the process itself.
        **trainer
            ``monitor``, ``progress_bar``, ``logger``, ``callbacks``, ``checkpoint_dir``, ``resume_from``, and what
            `lightning.pytorch.Trainer` takes (``accelerator``, ``devices``, ``strategy``, …).

        Raises
        ------
        ValueError
            If the model has no data, an argument is out of range, or model and guide do not fit each other or the data
            (`pyromosaic.program.SiteError`).
        NonFiniteLossError
            If the loss is not finite; the parameters are then those at the start of the epoch.

        Examples
        --------
        >>> from pyromosaic import Mosaic, MultiVI, simulate
        >>> mosaic = Mosaic.from_mudata(simulate(60, {"rna": 50, "adt": 5})[0], batch_key="batch")
        >>> model = MultiVI(mosaic, n_latent=3)
        >>> model.train(n_epochs=2, validation=0.2, progress_bar=False)
        >>> len(model.history), "validation_elbo" in model.history
        (2, True)
        """
        mosaic = self._data(None)
        if n_epochs < 1 or batch_size < 1:
            raise ValueError(f"n_epochs and batch_size are at least 1; found {n_epochs} and {batch_size}")
        self.split = split(mosaic, validation, test, seed)
        train = self.loader(mosaic, self.split.train, batch_size, seed, n_workers)
        # In no order, so that each minibatch holds all populations.
        shuffled = np.random.default_rng(seed).permutation(self.split.validation)
        held_out = self.loader(mosaic, shuffled, batch_size) if len(shuffled) else None
        optimisation = Optimisation(learning_rate, weight_decay, kl_warmup_epochs, schedule, gradient_clip)
        some = measured(mosaic, self.split.train[:: 1 + len(self.split.train) // 128]).to(self._device)
        unchecked = [name for name, m in self.schema.modalities.items() if m.spec.allow_non_integer]
        check(self.model, self.guide, some, unchecked)
        self.model.train()
        self.guide.train()
        with torch.random.fork_rng(), pyro.validation_enabled(False):
            torch.manual_seed(seed)
            self.history = fit(
                self.model,
                self.guide,
                train,
                held_out,
                n_epochs,
                optimisation,
                early_stopping=early_stopping,
                **trainer,
            )
        self.model.eval()
        self.guide.eval()
        with torch.no_grad():
            self.finish(mosaic)

    # Asking

    def get_latent_representation(
        self,
        cells: Cells = None,
        *,
        modality: str | None = None,
        sample: bool = False,
        data: Mosaic | None = None,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Latent variable of each cell.

        Parameters
        ----------
        cells
            Names, numbers or a mask; None for all.
        modality
            Look at this modality alone, in the cells that have it; None for all that a cell has.
        sample
            Draw from the posterior instead of giving its mean.
        data
            Other cells than the training data.
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
            raise ValueError(f"none of the cells asked for has modality {modality!r}")
        return having

    def _latent(
        self,
        mosaic: Mosaic,
        index: np.ndarray,
        site: str,
        modality: str | None = None,
        sample: bool = False,
        seed: int = 0,
    ) -> np.ndarray:
        """Posterior mean of a latent variable of cells, or a draw, shape (cells, width)."""
        values = []
        with inference_mode(self.model, self.guide, seed=seed):
            for minibatch in self._minibatches(mosaic, index, (), None if modality is None else (modality,)):
                found = poutine.trace(self.guide).get_trace(minibatch).nodes[site]
                values.append((found["value"] if sample else found["fn"].mean)[..., 0, :].cpu().numpy())
        return np.concatenate(values)

    def get_global_posterior(
        self, n_samples: int = 1000, *, quantiles: Sequence[float] = (0.05, 0.95), seed: int = 0
    ) -> pd.DataFrame:
        """Global latent variables, those that a prior, decoder or likelihood draws once for all cells.

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
            A row an element, indexed by ``site`` and ``element`` (its number); columns ``mean``, ``sd`` and the levels.

        Raises
        ------
        ValueError
            If the model has no global latent variable.

        Examples
        --------
        >>> from pyro.nn import PyroSample
        >>> from pyromosaic import ModalitySpec, Mosaic, MultiVI, simulate
        >>> from pyromosaic.likelihoods import NB
        >>> class Uncertain(NB):  # dispersions with a prior, and so with a posterior
        ...     def __init__(self, schema):
        ...         super().__init__(schema)
        ...         self.log_theta = PyroSample(pyro.distributions.Normal(torch.zeros(50), 1.5).to_event(1))
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

    def get_normalized_expression(
        self,
        modality: str | None = None,
        cells: Cells = None,
        *,
        features: Sequence[str] | None = None,
        batch: str | Sequence[str] | None = None,
        library: float = 1.0,
        n_samples: int | None = None,
        data: Mosaic | None = None,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Denoised expression, measured or not: the share of each gene, or a protein's expected foreground.

        Parameters
        ----------
        modality
            The modality; by default the first of the model that is not accessibility.
        cells, features
            Names (cells also by number or mask); None for all.
        batch
            Predict as if cells had been measured in this batch, or on average over these; by default in each cell's
            own.
        library
            Size of the cells to predict at; 1 gives shares of RNA.
        n_samples
            Average over this many posterior draws; None decodes the posterior mean.
        data
            Other cells than the training data.
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
            modality = self._first("of expression", lambda traits: not traits.binary)
        size = library if self._unit_size(modality) == 1 else self.schema[modality].library
        value = self._likelihood(modality).normalized
        return self._expected(modality, cells, features, batch, size, n_samples, data, seed, value)

    def get_protein_foreground_probability(
        self,
        modality: str | None = None,
        cells: Cells = None,
        *,
        features: Sequence[str] | None = None,
        batch: str | Sequence[str] | None = None,
        n_samples: int | None = None,
        data: Mosaic | None = None,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Probability that a cell has a protein, rather than only its background, measured or not.

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
        modality = self._first("'nb_mixture'", lambda traits: traits.background) if modality is None else modality
        if not self.schema[modality].spec.traits.background:
            raise ValueError(f"modality {modality!r} has no foreground; that is of the likelihood 'nb_mixture'")
        if "mixing" not in self._likelihood(modality).predictors:
            raise ValueError(f"modality {modality!r} has no foreground here: the program does not use its likelihood")
        size = self.schema[modality].library

        def foreground(distribution: TorchDistribution) -> Tensor:
            probability: Tensor = 1 - distribution.mixing_probability
            return probability

        return self._expected(modality, cells, features, batch, size, n_samples, data, seed, foreground)

    def get_accessibility_estimates(
        self,
        modality: str | None = None,
        cells: Cells = None,
        *,
        features: Sequence[str] | None = None,
        batch: str | Sequence[str] | None = None,
        factors: bool = False,
        n_samples: int | None = None,
        data: Mosaic | None = None,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Denoised accessibility, measured or not.

        Parameters
        ----------
        modality
            The modality; by default the first one with a Bernoulli likelihood.
        cells, features, batch, n_samples, data, seed
            As in `get_normalized_expression`.
        factors
            Multiply by cell and region factor, which gives the probability of observing a fragment.

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
        modality = self._first("'bernoulli'", lambda traits: traits.binary) if modality is None else modality
        value = (lambda d: d.mean) if factors else self._likelihood(modality).normalized
        return self._expected(modality, cells, features, batch, None, n_samples, data, seed, value)

    def get_cell_factors(self, cells: Cells = None, *, data: Mosaic | None = None) -> pd.DataFrame:
        """What the signal of each cell is multiplied by.

        For RNA its size in counts, for protein its size over the median cell's, for accessibility the probability that
        an open region is seen.

        Parameters
        ----------
        cells
            Names, numbers or a mask; None for all.
        data
            Other cells than the training data.

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
            for start in range(0, len(index), 1024):
                minibatch = measured(mosaic, index[start : start + 1024]).to(self._device)
                with AtMean():
                    latent = poutine.trace(self.guide).get_trace(minibatch).nodes
                for name, view in minibatch.observed.items():
                    if f"{name}_library" in latent:
                        view = replace(view, library=latent[f"{name}_library"]["value"].exp())
                    factor = self._likelihood(name).cell_factor(view)[:, 0]
                    factors[name][start + view.rows.cpu().numpy()] = factor.cpu().numpy()
        return pd.DataFrame(factors, mosaic.obs_names[index])

    def get_region_factors(self, modality: str | None = None) -> pd.Series:
        """Factor of each region, between 0 and 1: its width and its bias, whatever the cell.

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
        modality = self._first("'bernoulli'", lambda traits: traits.binary) if modality is None else modality
        if not self.schema[modality].spec.traits.binary:
            raise ValueError(f"modality {modality!r} has no region factors; they are of the likelihood 'bernoulli'")
        if not hasattr(self._likelihood(modality), "region_factor"):
            raise ValueError(
                f"modality {modality!r} has no region factors here: the program does not use its likelihood"
            )
        factors = self._likelihood(modality).region_factor().detach().cpu().numpy()
        return pd.Series(factors, pd.Index(self.schema[modality].features))

    def get_imputed_values(
        self,
        modality: str,
        cells: Cells = None,
        *,
        features: Sequence[str] | None = None,
        encode: Sequence[str] | None = None,
        batch: str | None = None,
        library: float | None = None,
        n_samples: int | None = 25,
        quantiles: Sequence[float] = (0.05, 0.95),
        data: Mosaic | None = None,
        seed: int = 0,
    ) -> Estimate:
        """Expected measurements of a modality with their uncertainty, from whatever the cells were measured by.

        Parameters
        ----------
        modality
            The modality to impute.
        cells, features, data, seed
            As in `get_normalized_expression`.
        encode
            Modalities to infer from; by default all that a cell has.
        batch
            Predict as if measured in this batch; by default the cell's own, or an average over batches where the
            modality was never measured in the cell's batch.
        library
            Size of the cells in counts; by default the cell's own, or where the modality is missing what the model
            expects of a cell with such a latent variable.
        n_samples
            Number of independent posterior draws; None evaluates at the mean of the posterior, without uncertainty.
        quantiles
            Levels at which to report quantiles over the draws.

        Returns
        -------
        Estimate
            Mean, standard deviation and quantiles, each cells × features.

        Examples
        --------
        >>> from pyromosaic import Mosaic, MultiVI, simulate
        >>> mosaic = Mosaic.from_mudata(simulate(60, {"rna": 50, "adt": 5})[0], batch_key="batch")
        >>> model = MultiVI(mosaic, n_latent=3)
        >>> found = model.get_imputed_values("adt", encode=["rna"], cells=mosaic.modalities["rna"].present, n_samples=5)
        >>> found.mean.shape, sorted(found.quantiles)
        ((40, 5), [0.05, 0.95])
        """
        return self._estimate(
            modality, cells, features, batch, library, n_samples, quantiles, data, encode, seed, lambda d: d.mean, True
        )

    def posterior_predictive_sample(
        self,
        modality: str,
        cells: Cells = None,
        *,
        features: Sequence[str] | None = None,
        encode: Sequence[str] | None = None,
        batch: str | None = None,
        library: float | None = None,
        n_samples: int = 1,
        data: Mosaic | None = None,
        seed: int = 0,
    ) -> np.ndarray:
        """Measurements drawn from the posterior predictive distribution, measured or not.

        Parameters
        ----------
        modality, cells, features, encode, batch, library, data, seed
            As in `get_imputed_values`.
        n_samples
            Number of independent draws.

        Returns
        -------
        numpy.ndarray
            Draws × cells × features, in the order of `cells` and `features`.

        Notes
        -----
        A cell in which the modality was measured keeps its size. Elsewhere the size is drawn as well, see
        `pyromosaic.sizes.Size`, so the draws have the noise of depth.

        Examples
        --------
        >>> from pyromosaic import Mosaic, MultiVI, simulate
        >>> mosaic = Mosaic.from_mudata(simulate(60, {"rna": 50, "adt": 5})[0], batch_key="batch")
        >>> model = MultiVI(mosaic, n_latent=3)
        >>> model.posterior_predictive_sample("adt", cells=["cell0"], n_samples=4).shape
        (4, 1, 5)
        """
        chunks = self._draws(modality, cells, features, batch, library, n_samples, data, encode, seed, None, True)
        return np.concatenate([chunk.cpu().numpy() for chunk in chunks], axis=1)

    def differential(
        self,
        groupby: str | None = None,
        group1: object = None,
        group2: object = None,
        *,
        cells1: Cells = None,
        cells2: Cells = None,
        modality: str | None = None,
        mode: Mode = "change",
        delta: Delta = "default",
        fdr: float = 0.05,
        batch_correction: bool = False,
        protein_foreground: bool = False,
        n_samples: int = 5000,
        features: Sequence[str] | None = None,
        data: Mosaic | None = None,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Differential expression, accessibility or protein between groups of cells, measured or not.

        Pairs of cells, one of each group, are compared by posterior draws of their denoised values; see
        `pyromosaic.tasks.compare`. The effect is the log2 fold change of shares (RNA) or of expected counts
        (protein), or the difference of probabilities (accessibility).

        Parameters
        ----------
        groupby
            Column of `obs` with the groups; cells without a value take no part.
        group1, group2
            Values in that column. Without `group1` every group is compared with the rest in turn; without `group2` the
            second group is the rest.
        cells1, cells2
            Groups given by names, numbers or masks instead; without `cells2` the second group is the rest.
        modality
            The modality; by default the model's first.
        mode
            ``"change"``: is the effect at least `delta` in size? ``"vanilla"``: which of the two is larger?
        delta
            Smallest effect that counts: by default a log2 fold change of 0.25 or a difference of 0.05; None estimates
            it for each pair of groups.
        fdr
            Share of false discoveries accepted among the features called.
        batch_correction
            Compare within batches, and average over them: both cells of a pair are decoded for the same batch. By
            default each is decoded for its own.
        protein_foreground
            Compare a protein's expected foreground instead of its whole expected count. Less steady: where background
            and foreground are hard to tell apart, the model may call the same count either, and the foreground changes
            alone.
        n_samples
            Number of pairs.
        features
            Names of the features to compare; None for all.
        data
            Other cells than the training data.
        seed
            Seed of pairs and draws; the same for every pair of groups.

        Returns
        -------
        pandas.DataFrame
            A block for each pair of groups (``comparison``, ``group1``, ``group2``) with a row a feature, the surest
            first: the columns of `pyromosaic.tasks.compare`, then ``raw_mean``, ``nonzero_share`` and
            ``normalized_mean`` (cells scaled to the size of the median cell) of either group's cells in which the
            modality was measured, NaN if there are none.

        Raises
        ------
        ValueError
            If groups are empty, overlap or do not exist, or another argument is out of range.
        KeyError
            If the model has no such modality.

        Notes
        -----
        The probabilities are about cells like these, and take the trained networks for known: small effects between
        groups of few cells may be chance, against which a larger `delta` (or None) helps. Cells of one donor are no
        replicates: what holds for donors needs several of them in either group.

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
        wanted = None if features is None else list(dict.fromkeys(features))
        size = self._unit_size(name)

        def draw(cells: np.ndarray, batch: str | None, seed: int) -> np.ndarray:
            chunks = self._draws(name, cells, wanted, batch, size, 1, mosaic, None, seed, value)
            return np.concatenate([chunk[0].cpu().numpy() for chunk in chunks])

        tables = [
            compare_groups(
                contrast,
                draw,
                draw,
                mosaic.modalities[name],
                self._features(name, wanted),
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
        if self.schema[modality].spec.traits.background and not protein_foreground:
            return lambda distribution: distribution.mean
        return self._likelihood(modality).normalized

    def _unit_size(self, modality: str) -> float:
        """Size of a cell whose expected measurements are the denoised values: shares of RNA, else a median cell's."""
        schema = self.schema[modality]
        return 1.0 if schema.spec.traits.shares else schema.library

    def _first(self, what: str, fits: Callable[[Traits], bool]) -> str:
        """The first modality whose likelihood describes such measurements."""
        for name, modality in self.schema.modalities.items():
            if fits(modality.spec.traits):
                return name
        raise ValueError(f"the model has no modality to answer that from: none has a likelihood {what}")

    def _expected(
        self,
        modality: str,
        cells: Cells,
        features: Sequence[str] | None,
        batch: str | Sequence[str] | None,
        library: float | None,
        n_samples: int | None,
        data: Mosaic | None,
        seed: int,
        value: Callable[[TorchDistribution], Tensor],
    ) -> pd.DataFrame:
        """Mean of a quantity over posterior draws and over batches, each batch with the same draws."""
        batches = [batch] if batch is None or isinstance(batch, str) else list(batch)
        if not batches:
            raise ValueError(
                "the list of batches to average over is empty; give at least one, or None for a cell's own"
            )
        means = [
            self._estimate(modality, cells, features, b, library, n_samples, (), data, None, seed, value).mean
            for b in batches
        ]
        return sum(means[1:], means[0]) / len(means)

    def _estimate(
        self,
        modality: str,
        cells: Cells,
        features: Sequence[str] | None,
        batch: str | None,
        library: float | None,
        n_samples: int | None,
        quantiles: Sequence[float],
        data: Mosaic | None,
        encode: Sequence[str] | None,
        seed: int,
        value: Callable[[TorchDistribution], Tensor],
        weights: bool = False,
    ) -> Estimate:
        mosaic = self._data(data)
        names = mosaic.obs_names[mosaic.find(cells)]
        columns = pd.Index(self.schema[modality].features)[self._features(modality, features)]
        chunks = self._draws(modality, cells, features, batch, library, n_samples, data, encode, seed, value, weights)
        return estimate(chunks, names, columns, quantiles)

    def _draws(
        self,
        modality: str,
        cells: Cells,
        features: Sequence[str] | None,
        batch: str | None,
        library: float | None,
        n_samples: int | None,
        data: Mosaic | None,
        encode: Sequence[str] | None,
        seed: int,
        value: Callable[[TorchDistribution], Tensor] | None,
        weights: bool = False,
    ) -> Iterator[Tensor]:
        """Draws of a quantity, or of the measurements, chunk by chunk of cells; with `weights`, draws of those too."""
        mosaic = self._data(data)
        index, columns = mosaic.find(cells), self._features(modality, features)
        if n_samples is not None and n_samples < 1:
            raise ValueError(f"n_samples is at least 1; found {n_samples}")
        if encode is not None:
            for name in encode:
                self.schema[name]
            present = np.any([mosaic.modalities[name].present[index] for name in encode], axis=0)
            if not present.all():
                cell = mosaic.obs_names[index[~present][0]]
                raise ValueError(f"cell {cell!r} has none of the modalities to infer from: {', '.join(encode)}")
        wanted = torch.from_numpy(columns).to(self._device)
        with inference_mode(self.model, self.guide, seed=seed):
            size = max(1, CHUNK_ENTRIES // (self.schema[modality].n_features * (n_samples or 1)))
            for minibatch in self._minibatches(mosaic, index, (modality,), encode, batch, library, min(size, 1024)):
                yield draws(
                    self.model, self.guide, minibatch, modality, value, n_samples, wanted, seed if weights else None
                )

    def _minibatches(
        self,
        mosaic: Mosaic,
        index: np.ndarray,
        decode: tuple[str, ...],
        encode: Sequence[str] | None = None,
        batch: str | None = None,
        library: float | None = None,
        size: int = 1024,
    ) -> Iterator[Minibatch]:
        for start in range(0, len(index), size):
            part = index[start : start + size]
            yield to_predict(mosaic, part, decode, encode, batch, library).to(self._device)

    @property
    def _device(self) -> torch.device:
        return next(self.guide.parameters()).device

    def _likelihood(self, modality: str) -> Any:
        self.schema[modality]
        part = part_of(self.model, modality)
        if part is None:
            raise ValueError(
                f"the program has no likelihood of modality {modality!r} to ask: none of its `modalities` is a "
                "pyromosaic.measurement.Measurement of that name"
            )
        return part.likelihood

    def _features(self, modality: str, features: Sequence[str] | None) -> np.ndarray:
        known = pd.Index(self.schema[modality].features)
        if features is None:
            return np.arange(len(known))
        columns = known.get_indexer(pd.Index(features))
        if (columns < 0).any():
            raise ValueError(f"modality {modality!r} has no feature {str(np.asarray(features)[columns < 0][0])!r}")
        return columns.astype(np.int64)

    def _data(self, data: Mosaic | None) -> Mosaic:
        mosaic = self.mosaic if data is None else data
        if mosaic is None:
            raise ValueError("the model has no data: give some, data=model.register(mdata) say")
        if mosaic.schema != self.schema:
            raise ValueError("the data were not registered for this model: model.register(mdata) does that")
        mosaic = self.arranged(mosaic)
        if self._fusion is not None:
            self._fusion.meet(mosaic)
        return mosaic

    def nearest_cells(self, modality: str, to: str, cells: Cells = None, *, n_neighbors: int = 15) -> pd.DataFrame:
        """Counterparts of cells among those of another modality, and whether there are any.

        Parameters
        ----------
        modality, to
            Where the cells are from, and where to look.
        cells
            Names, numbers or a mask; None for all of the modality.
        n_neighbors
            Number of nearest cells to look at.

        Returns
        -------
        pandas.DataFrame
            For each cell the ``nearest`` cell of the other modality; the mean ``distance`` to its nearest cells there,
            over what 95 % of the cells there stay within among themselves; and ``alone``, whether that is above 1: a
            cell of a type, say, that the other modality has not seen.

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
        among = NearestNeighbors(n_neighbors=min(n_neighbors, len(reference) - 1)).fit(reference.to_numpy())
        usual = np.quantile(among.kneighbors()[0].mean(axis=1), 0.95)
        relative = distance.mean(axis=1) / usual
        columns = {"nearest": reference.index.to_numpy()[rows[:, 0]], "distance": relative, "alone": relative > 1}
        return pd.DataFrame(columns, index=query.index)

    def transfer_labels(
        self, key: str, modality: str, to: str, cells: Cells = None, *, n_neighbors: int = 15
    ) -> pd.DataFrame:
        """Labels of one modality's cells, given to another's by a vote of the nearest.

        Parameters
        ----------
        key
            Column of `obs` with the labels, which may have been added after registration.
        modality, to
            Whose labels are known, and whose cells get them.
        cells
            Cells of `to`: names, numbers or a mask; None for all.
        n_neighbors
            Number of cells that vote; those without a label do not.

        Returns
        -------
        pandas.DataFrame
            Cells × ``prediction`` and ``confidence``, the share of the votes; of labels with equal votes the nearest
            cell's wins.

        Examples
        --------
        >>> from pyromosaic import Mosaic, MultiVI, simulate
        >>> mosaic = Mosaic.from_mudata(simulate(60, {"rna": 50, "adt": 5})[0], batch_key="batch")
        >>> model = MultiVI(mosaic, n_latent=3)
        >>> model.transfer_labels("celltype", "rna", to="adt", n_neighbors=5).columns.tolist()
        ['prediction', 'confidence']
        """
        labels = self._data(None).column(key)
        known = labels.notna().to_numpy() & self._data(None).modalities[modality].present
        if not known.any():
            raise ValueError(f"no cell of modality {modality!r} has a value in column {key!r}")
        query = self.get_latent_representation(cells, modality=to)
        _, rows, reference = self._neighbours(query, modality, n_neighbors, np.flatnonzero(known))
        codes, names = pd.factorize(labels[reference.index].astype(str))
        votes = np.zeros((len(query), len(names)))
        np.add.at(votes, (np.arange(len(query))[:, None], codes[rows]), 1 + 1e-6 * np.linspace(1, 0, rows.shape[1]))
        best = votes.argmax(axis=1)
        confidence = np.round(votes.max(axis=1)) / rows.shape[1]
        return pd.DataFrame({"prediction": np.asarray(names)[best], "confidence": confidence}, index=query.index)

    def _neighbours(
        self, query: pd.DataFrame, modality: str, n_neighbors: int, cells: Cells = None
    ) -> tuple[np.ndarray, np.ndarray, pd.DataFrame]:
        """Distances and rows of the nearest cells of a modality, and these cells' latent variables."""
        reference = self.get_latent_representation(cells, modality=modality)
        search = NearestNeighbors(n_neighbors=min(n_neighbors, len(reference))).fit(reference.to_numpy())
        distance, rows = search.kneighbors(query.to_numpy())
        return distance, rows, reference

    # Keeping

    def save(self, directory: str | Path, overwrite: bool = False) -> None:
        """Write the model: weights in safetensors, everything else in JSON.

        Parameters
        ----------
        directory
            Where to; made if it does not exist.
        overwrite
            Replace a model that is there.

        Raises
        ------
        FileExistsError
            If a model is there and `overwrite` is False.

        Examples
        --------
        >>> from pyromosaic import Mosaic, MultiVI, simulate
        >>> mosaic = Mosaic.from_mudata(simulate(60, {"rna": 50, "adt": 5})[0], batch_key="batch")
        >>> model = MultiVI(mosaic, n_latent=3)
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as directory:
        ...     model.save(directory)
        ...     sorted(path.name for path in Path(directory).iterdir())
        ['model.json', 'weights.safetensors']
        """
        directory = Path(directory)
        if (directory / "model.json").exists() and not overwrite:
            raise FileExistsError(f"{directory} holds a model already; overwrite=True replaces it")
        directory.mkdir(parents=True, exist_ok=True)
        weights = {
            f"{k}.{n}": t.contiguous() for k in ("model", "guide") for n, t in getattr(self, k).state_dict().items()
        }
        save_file(weights, directory / "weights.safetensors")
        options, objects = {}, [m.spec.likelihood_name for m in self.schema.modalities.values() if _is_own(m.spec)]
        for key, value in self.options.items():
            try:
                json.dumps(value)
            except TypeError:
                objects.append(key)  # code is not saved; it is given again at load
            else:
                options[key] = value
        content = {
            "format": FORMAT,
            "class": type(self).__name__,
            "options": options,
            "objects": objects,
            "schema": self.schema.to_json(),
            "history": json.loads(self.history.reset_index().to_json(orient="split")),
        }
        (directory / "model.json").write_text(json.dumps(content))

    @classmethod
    def load(cls, directory: str | Path, data: Any = None, **objects: Any) -> Self:
        """Read a saved model; no code in the files is run.

        Parameters
        ----------
        directory
            What `save` wrote.
        data
            A MuData or a dictionary of AnnData, registered and checked against the model's schema (features are put in
            its order), or a `Mosaic` that was registered with it; None for no data.
        **objects
            The objects, such as priors, that the model was constructed with; and the classes of likelihoods of your
            own, by their names.

        Raises
        ------
        ValueError
            If the files are missing, damaged, or not those of such a model, or the data do not fit.

        Examples
        --------
        >>> from pyromosaic import Mosaic, MultiVI, simulate
        >>> mosaic = Mosaic.from_mudata(simulate(60, {"rna": 50, "adt": 5})[0], batch_key="batch")
        >>> model = MultiVI(mosaic, n_latent=3)
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as directory:
        ...     model.save(directory)
        ...     again = MultiVI.load(directory, data=mosaic)
        >>> model.get_latent_representation().equals(again.get_latent_representation())
        True
        """
        directory = Path(directory)
        try:
            content = json.loads((directory / "model.json").read_text())
            version, name = content["format"], content["class"]
            weights = load_file(directory / "weights.safetensors")
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ValueError(f"{directory} does not hold a whole saved model: {error}") from error
        if version not in READ:
            raise ValueError(
                f"{directory} was saved in format {version}; this version of pyromosaic reads formats "
                f"{' and '.join(map(str, READ))}"
            )
        if name != cls.__name__:
            raise ValueError(f"{directory} holds a model of class {name}, not {cls.__name__}; use {name}.load")
        missing = [key for key in content["objects"] if key not in objects]
        if missing:
            raise ValueError(
                f"the saved model was constructed with objects of the user's: give {', '.join(missing)} again"
            )
        try:
            likelihoods = {k: v for k, v in objects.items() if isinstance(v, type) and issubclass(v, Likelihood)}
            schema = Schema.from_json(content["schema"], likelihoods)
            others = {k: v for k, v in objects.items() if k not in likelihoods}
            options, weights = upgraded(content, weights, schema)
            model = cls(schema, **options, **others)
            for part in ("model", "guide"):
                state = {k.removeprefix(f"{part}."): v for k, v in weights.items() if k.startswith(f"{part}.")}
                getattr(model, part).load_state_dict(state)
        except (KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"the description and the weights in {directory} do not fit together: {error}") from error
        history = content["history"]
        model.history = pd.DataFrame(history["data"], columns=history["columns"])
        if "epoch" in model.history:
            model.history = model.history.set_index("epoch")
        if data is not None:
            model.mosaic = model.register(data)
        return model

    def register(self, data: Any, new_batches: str = "refuse") -> Mosaic:
        """Register data for this model: a MuData, a dictionary of AnnData (cells matched by name), or a Mosaic.

        Parameters
        ----------
        data
            The data.
        new_batches
            ``"average"``: cells of batches that the model has not seen are treated as an average of those it has. See
            also `adapt`.

        Raises
        ------
        ValueError
            If features, batches or labels are not those of the model.

        Examples
        --------
        >>> from pyromosaic import Mosaic, MultiVI, simulate
        >>> mdata, _ = simulate(60, {"rna": 50, "adt": 5}, patterns=["rna+adt"])
        >>> model = MultiVI(Mosaic.from_mudata(mdata[:40].copy()), n_latent=3)
        >>> model.get_latent_representation(data=model.register(mdata[40:].copy())).shape
        (20, 3)
        """
        if isinstance(data, Mosaic):
            return self._data(data)
        if isinstance(data, Mapping):
            return Mosaic.from_anndata(data, match_cells=True, schema=self.schema, new_batches=new_batches)
        return Mosaic.from_mudata(data, schema=self.schema, new_batches=new_batches)

    def adapt(self, data: Any, n_epochs: int = 50, **training: Any) -> Self:
        """A copy of the model that knows the batches of new cells too; only what belongs to these is fitted.

        All other parameters stay as they are, so nothing that the model says of cells of known batches changes. The
        new cells need not have all modalities.

        Parameters
        ----------
        data
            A MuData, or a dictionary of AnnData (cells matched by name); the data of the new model.
        n_epochs
            Passes over the new cells.
        **training
            Further arguments of `train`; the learning rate is 0.01 by default.

        Raises
        ------
        ValueError
            If no batch is new, or features or labels are not those of the model.

        References
        ----------
        Lotfollahi et al., Mapping single-cell data to reference atlases by transfer learning, Nature Biotechnology
        2022.

        Examples
        --------
        >>> from pyromosaic import Mosaic, MultiVI, simulate
        >>> mdata, _ = simulate(90, {"rna": 50, "adt": 5}, n_batches=3)
        >>> new = (mdata.obs["batch"] == "batch2").to_numpy()
        >>> model = MultiVI(Mosaic.from_mudata(mdata[~new].copy(), batch_key="batch"), n_latent=3)
        >>> adapted = model.adapt(mdata[new].copy(), n_epochs=1, progress_bar=False)
        >>> adapted.schema["rna"].categories["batch"]
        ('batch0', 'batch1', 'batch2')
        """
        if isinstance(data, Mapping):
            mosaic = Mosaic.from_anndata(data, match_cells=True, schema=self.schema, new_batches="add")
        else:
            mosaic = Mosaic.from_mudata(data, schema=self.schema, new_batches="add")
        adapted = type(self)(mosaic.schema, **deepcopy(self.options))
        adapted.model.to(self._device)
        adapted.guide.to(self._device)
        with torch.no_grad():
            of_model, of_guide = (
                carry_over(getattr(self, part), getattr(adapted, part), self.schema, mosaic.schema)
                for part in ("model", "guide")
            )
        if not of_model:
            raise ValueError("the data have no batch that is new to the model: register(data) is all they need")
        adapted.mosaic = mosaic
        with only(adapted.model, of_model), only(adapted.guide, of_guide):
            adapted.train(n_epochs, **{"learning_rate": 1e-2, "weight_decay": 0.0, "kl_warmup_epochs": 0} | training)
        return adapted


def _options(cls: type, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Options by name, given or by default, of the constructor of a class."""
    bound = signature(cls).bind_partial(*args, **kwargs)
    bound.apply_defaults()
    options: dict[str, Any] = {}
    for name, value in list(bound.arguments.items())[1:]:  # the first is the data
        kind = bound.signature.parameters[name].kind
        options |= value if kind is Parameter.VAR_KEYWORD else {name: value}
    return options


def _is_own(spec: ModalitySpec) -> bool:
    return not isinstance(spec.likelihood, str)
