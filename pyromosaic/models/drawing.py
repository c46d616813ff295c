"""Methods of a trained model that give posterior draws and posteriors themselves."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from pyro import poutine
from scipy import sparse

from pyromosaic.accepted import Count, Positive, Seed, checked
from pyromosaic.data import Mosaic, to_predict
from pyromosaic.data.matrix import as_tensor
from pyromosaic.models.base import TrainedModel
from pyromosaic.tasks import Estimate, answers, inference_mode
from pyromosaic.tasks.joint import LOG_LIKELIHOOD, Kind, joint_draws, latent_sites, of_cells
from pyromosaic.tasks.question import Cells, Question, check_size, portions

if TYPE_CHECKING:
    import xarray


class Drawing(TrainedModel):
    """Methods for draws; see `pyromosaic.models.MosaicModel`."""

    @checked
    def get_draws(
        self,
        modalities: str | Sequence[str] = (),
        cells: Cells = None,
        *,
        kind: Kind = "expected",
        features: Mapping[str, Cells] | None = None,
        encode: str | Sequence[str] | None = None,
        batch: object = None,
        n_samples: Count = 25,
        data: Mosaic | None = None,
        seed: Seed = 0,
    ) -> "xarray.Dataset":
        """Independent posterior draws of the latent variables, and of any modalities, measured or not.

        Draw k of all variables belongs together: the modalities are decoded from z of the same draw. Therefore
        quantities that combine features or modalities can be computed draw by draw.

        Parameters
        ----------
        modalities
            Modalities to decode; none for latent variables alone.
        cells
            Names, positions or a mask; None for all.
        kind
            ``"expected"``: expected measurements, as in `get_imputed_values`; ``"predicted"``: measurements drawn from
            the likelihood, as in `posterior_predictive_sample`; ``"denoised"``: values without depth and background,
            as in `get_normalized_expression`.
        features
            Names of features to keep, by modality; all of the modalities that are left out.
        encode, batch, data, seed
            As in `get_imputed_values`.
        n_samples
            Number of draws.

        Returns
        -------
        xarray.Dataset
            Each modality with dimensions ``draw``, ``cell`` and ``<modality>_feature``, each latent variable with
            ``draw``, ``cell`` and ``<name>_dim``; cells and features have their names as coordinates. Salient
            variables are 0 in cells that do not have them. Latent variables that all cells share (embeddings of
            features, or those of a `PyroSample`) have ``draw``, ``<name>_dim_0``, …

        Raises
        ------
        ModuleNotFoundError
            If xarray is not installed.

        Examples
        --------
        >>> from pyromosaic import Mosaic, MultiVI, simulate
        >>> mosaic = Mosaic.from_mudata(simulate(60, {"rna": 50, "adt": 5})[0], batch_key="batch")
        >>> model = MultiVI(mosaic, n_latent=3)
        >>> drawn = model.get_draws(["rna", "adt"], features={"rna": ["rna_0", "rna_1"]}, n_samples=4)
        >>> dict(drawn["rna"].sizes)
        {'draw': 4, 'cell': 60, 'rna_feature': 2}
        >>> drawn["z"].mean("draw").shape
        (60, 3)
        """
        return self._drawn(modalities, cells, (kind,), features, encode, batch, n_samples, data, seed)[kind]

    @checked
    def to_inference_data(
        self,
        modalities: str | Sequence[str] | None = None,
        cells: Cells = None,
        *,
        features: Mapping[str, Cells] | None = None,
        encode: str | Sequence[str] | None = None,
        batch: object = None,
        n_samples: Count = 100,
        data: Mosaic | None = None,
        seed: Seed = 0,
    ) -> Any:
        """Posterior, posterior predictive draws and measurements, for ArviZ.

        Parameters
        ----------
        modalities
            Modalities to draw; None for all.
        cells, features, encode, batch, n_samples, data, seed
            As in `get_draws`. Name cells and features if there are many, because all draws are in memory.

        Returns
        -------
        arviz.InferenceData or xarray.DataTree
            A tree of groups, which ArviZ 1 reads as it is; an ``InferenceData`` if an ArviZ below 1 is installed.
            ``posterior`` has the latent variables, of cells and those that all cells share, and expected measurements
            as ``<modality>_mean``; ``posterior_predictive`` has predicted measurements, ``observed_data`` the
            measurements, and ``log_likelihood`` the log-probability of each given the latent variables of the same
            draw, both NaN where there are none. Dimensions are those of `get_draws`, with a ``chain`` of length 1
            before them: variational draws are independent.

        Notes
        -----
        The log-likelihood is given the latent variables of each cell, which have seen its measurements. Therefore LOO
        and WAIC from it do not compare models fairly; `pyromosaic.checks.held_out_log_likelihood` integrates over the
        latent variables.

        Raises
        ------
        ModuleNotFoundError
            If xarray is not installed.

        Examples
        --------
        >>> from pyromosaic import Mosaic, MultiVI, simulate
        >>> mosaic = Mosaic.from_mudata(simulate(60, {"rna": 50, "adt": 5})[0], batch_key="batch")
        >>> model = MultiVI(mosaic, n_latent=3)
        >>> tree = model.to_inference_data(["adt"], mosaic.modalities["adt"].present, n_samples=4)
        >>> dict(tree["posterior_predictive"]["adt"].sizes)
        {'chain': 1, 'draw': 4, 'cell': 40, 'adt_feature': 5}
        """
        names = list(self.schema.modalities) if modalities is None else modalities
        kinds: tuple[Any, ...] = ("expected", "predicted", LOG_LIKELIHOOD)
        drawn = self._drawn(names, cells, kinds, features, encode, batch, n_samples, data, seed)
        names = [names] if isinstance(names, str) else names
        predicted = drawn["predicted"][list(names)]
        measured = self._measured(predicted, self._data(data), cells)
        for name in names:  # whole numbers are whole for ArviZ, which plots them otherwise
            if self.schema[name].spec.data_kind == "count":
                predicted[name] = predicted[name].astype(np.int64)
                measured[name] = measured[name] if measured[name].isnull().any() else measured[name].astype(np.int64)
        latent = drawn["expected"].rename({name: f"{name}_mean" for name in names})
        groups = {
            "posterior": latent.expand_dims(chain=[0]),
            "posterior_predictive": predicted.expand_dims(chain=[0]),
            "log_likelihood": drawn[LOG_LIKELIHOOD][list(names)].expand_dims(chain=[0]),
            "observed_data": measured,
        }
        return _tree(groups)

    @checked
    def get_latent_posterior(
        self,
        cells: Cells = None,
        *,
        site: str = "z",
        modality: str | None = None,
        data: Mosaic | None = None,
    ) -> Estimate:
        """Mean and standard deviation of the posterior of a latent variable, without draws.

        Parameters
        ----------
        cells
            Names, positions or a mask; None for all.
        site
            Name of the variable: ``"z"``, or another that the guide samples for each cell.
        modality
            Infer from this modality alone, in the cells that have it; None uses all modalities of a cell.
        data
            Cells other than the training data.

        Returns
        -------
        Estimate
            ``mean`` and ``sd``, each cells × dimensions. The posteriors of MultiVI, ContrastiveVI and DiagVI are normal
            (a mixture of normals with ``fusion="mixture"``), with independent dimensions.

        Raises
        ------
        ValueError
            If the guide has no such variable.

        Examples
        --------
        >>> from pyromosaic import Mosaic, MultiVI, simulate
        >>> mosaic = Mosaic.from_mudata(simulate(60, {"rna": 50, "adt": 5})[0], batch_key="batch")
        >>> q = MultiVI(mosaic, n_latent=3).get_latent_posterior()
        >>> q.mean.shape, bool((q.sd > 0).all(axis=None))
        ((60, 3), True)
        """
        mosaic = self._data(data)
        index = mosaic.find(cells)
        if modality is not None:
            self.schema[modality]
            index = index[mosaic.modalities[modality].present[index]]
        parts = []
        with inference_mode(self.model, self.guide):
            for some in portions(index):
                encode = None if modality is None else (modality,)
                minibatch = to_predict(mosaic, some, (), encode).to(self._device)
                found = latent_sites(poutine.trace(self.guide).get_trace(minibatch), len(some))
                if site not in found:
                    raise ValueError(f"the guide has no variable {site!r} of cells; it has {', '.join(found)}")
                q = found[site]["fn"]
                moments = (of_cells(found[site], value).cpu().numpy() for value in (q.mean, q.variance.sqrt()))
                parts.append(np.stack(list(moments)))
        if not parts:
            raise ValueError(f"none of the given cells has modality {modality!r}")
        columns = [f"{site}_{i}" for i in range(parts[0].shape[-1])]
        mean, sd = (pd.DataFrame(v, mosaic.obs_names[index], columns) for v in np.concatenate(parts, axis=1))
        return Estimate(mean, sd)

    @checked
    def posterior_predictive_sample(
        self,
        modality: str,
        cells: Cells = None,
        *,
        features: Cells = None,
        encode: str | Sequence[str] | None = None,
        batch: object = None,
        library: Positive | None = None,
        n_samples: Count = 1,
        form: Literal["array", "sparse"] = "array",
        data: Mosaic | None = None,
        seed: Seed = 0,
    ) -> Any:
        """Measurements drawn from the posterior predictive distribution, measured or not.

        Parameters
        ----------
        modality, cells, features, encode, batch, library, data, seed
            As in `get_imputed_values`.
        n_samples
            Number of independent draws.
        form
            ``"array"``, or ``"sparse"`` for a list with a sparse matrix for each draw. Only some cells at a time are
            dense in memory.

        Returns
        -------
        numpy.ndarray or list of scipy.sparse.csr_matrix
            Draws × cells × features, in the order of `cells` and `features`.

        Notes
        -----
        A cell in which the modality was measured keeps its size. For other cells the size is drawn too (see
        `pyromosaic.sizes.Size`), so that the draws have the noise of depth.

        Examples
        --------
        >>> from pyromosaic import Mosaic, MultiVI, simulate
        >>> mosaic = Mosaic.from_mudata(simulate(60, {"rna": 50, "adt": 5})[0], batch_key="batch")
        >>> model = MultiVI(mosaic, n_latent=3)
        >>> model.posterior_predictive_sample("adt", cells=["cell0"], n_samples=4).shape
        (4, 1, 5)
        >>> model.posterior_predictive_sample("rna", form="sparse")[0].shape
        (60, 50)
        """
        check_size(modality, self.schema[modality], library)
        question = Question(modality, None, cells, features, encode, batch, library, n_samples, seed, data, seed)
        chunks = answers(self.model, self.guide, self._data(data), question, self._device)
        if form == "array":
            return np.concatenate([chunk.cpu().numpy() for chunk in chunks], axis=1)
        rows = [[sparse.csr_matrix(draw) for draw in chunk.cpu().numpy()] for chunk in chunks]
        return [sparse.vstack(parts, format="csr") for parts in zip(*rows, strict=True)]

    def _drawn(
        self,
        modalities: str | Sequence[str],
        cells: Cells,
        kinds: Sequence[Kind | Literal["log_likelihood"]],
        features: Mapping[str, Cells] | None,
        encode: str | Sequence[str] | None,
        batch: object,
        n_samples: int,
        data: Mosaic | None,
        seed: int,
    ) -> dict[str, "xarray.Dataset"]:
        """Joint draws, a dataset for each kind."""
        xarray = _xarray()
        names = [modalities] if isinstance(modalities, str) else list(modalities)
        mosaic = self._data(data)
        index = mosaic.find(cells)
        if features is not None and not isinstance(features, Mapping):
            raise ValueError(
                "features must be a dictionary from modality to the names of its features; found a "
                f"{type(features).__name__}"
            )
        for name in [*names, *(features or {})]:
            self.schema[name]
            if "denoised" in kinds:
                self._likelihood(name)
            if name in ("chain", "draw", "cell"):
                raise ValueError(f"modality {name!r} has the name of a dimension of draws; give it another name")
        for name in features or {}:
            if name not in names:
                raise ValueError(f"features of modality {name!r} have no effect: it is not among those to draw")
        columns = {name: self._features(name, (features or {}).get(name)) for name in names}
        question = Question("", None, encode=encode, n_samples=n_samples)
        question.check(mosaic, index)
        chunks = joint_draws(
            self.model,
            self.guide,
            mosaic,
            index,
            names,
            kinds,
            n_samples,
            self._device,
            question.encode,
            batch,
            seed,
        )
        kept: dict[tuple[str, str], list[np.ndarray]] = {}
        for chunk in chunks:
            for (kind, name), value in chunk.items():
                of_features = name in columns and value.shape[2:] == (self.schema[name].n_features,)
                value = value[..., columns[name]] if of_features else value
                kept.setdefault((kind, name), []).append(value.cpu().numpy())
        labels: dict[str, Any] = {"cell": mosaic.obs_names[index].to_numpy(), "draw": np.arange(n_samples)}
        datasets: dict[str, dict[str, Any]] = {kind: {} for kind in kinds}
        for (kind, name), parts in kept.items():
            array = np.concatenate(parts, axis=1) if kind != "shared" else parts[0]
            dims: tuple[str, ...] = ("draw", "cell", f"{name}_dim" if kind == "latent" else f"{name}_feature")
            dims = dims[: array.ndim]
            if kind == "shared":
                while array.ndim > 1 and array.shape[1] == 1:  # a plate that these variables are not in
                    array = array[:, 0]
                dims = ("draw", *(f"{name}_dim_{i}" for i in range(array.ndim - 1)))
            elif kind == "latent":
                labels[dims[-1]] = [f"{name}_{i}" for i in range(array.shape[-1])]
            elif len(dims) == 3:
                labels[dims[-1]] = np.array(self.schema[name].features, dtype=object)[columns[name]].astype(str)
            for of, variables in datasets.items():
                if kind in ("latent", "shared", of):
                    variables[name] = (dims, array)
        return {kind: xarray.Dataset(variables, coords=labels) for kind, variables in datasets.items()}

    def _measured(self, like: "xarray.Dataset", mosaic: Mosaic, cells: Cells) -> "xarray.Dataset":
        """The measurements of the same cells and features, NaN where there are none."""
        index, found = mosaic.find(cells), {}
        for name, drawn in like.data_vars.items():
            modality = mosaic.modalities[str(name)]
            columns = self._features(str(name), list(drawn[f"{name}_feature"].to_numpy()))
            values = np.full((len(index), len(columns)), np.nan, dtype=np.float32)
            has = modality.present[index]
            if has.any():
                some = as_tensor(modality.read(index[has])[:, columns], dense=True).numpy()
                values[has] = np.where(modality.measured(index[has])[:, columns], some, np.nan)
            found[name] = (("cell", f"{name}_feature"), values)
        coords = {name: value for name, value in like.coords.items() if name != "draw"}
        return _xarray().Dataset(found, coords=coords)


def _xarray() -> Any:
    try:
        import xarray
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "draws with named dimensions need xarray, which is not installed; run pip install 'pyromosaic[draws]'"
        ) from error
    return xarray


def _tree(groups: Mapping[str, "xarray.Dataset"]) -> Any:
    """The groups as the ArviZ that is installed takes them."""
    try:
        import arviz
    except ImportError:
        arviz = None
    if arviz is not None and arviz.__version__.startswith("0."):
        return arviz.InferenceData(**groups)
    return _xarray().DataTree.from_dict(dict(groups))
