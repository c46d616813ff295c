"""Whether a model of your own answers what users ask of any model."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import shorten
from typing import Any, NamedTuple

import anndata
import numpy as np
import pandas as pd
import torch
from pyro import poutine

from pyromosaic import checks
from pyromosaic.data import Mosaic, to_predict
from pyromosaic.data.tables import look_up, readings
from pyromosaic.models import MosaicModel
from pyromosaic.program import one_line
from pyromosaic.tasks import Estimate, inference_mode

__all__ = ["ModelError", "check_model"]

NEW_BATCH = "a batch that is new"
FAILURES = (ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)


class _Wrong(Exception):
    """An answer that came, and is wrong."""


class _NotAsked(Exception):
    """A question that these data do not ask."""


class _Question(NamedTuple):
    """What users ask: how, what a model has to define for it, if of each modality, if other questions depend on it."""

    words: str
    ask: Callable[..., str]
    need: str
    each: bool
    first: bool


QUESTIONS: list[_Question] = []  # in the order of their definition below


def _question(
    words: str, need: str, *, each: bool = False, first: bool = False
) -> Callable[[Callable[..., str]], Callable[..., str]]:
    def register(ask: Callable[..., str]) -> Callable[..., str]:
        QUESTIONS.append(_Question(words, ask, need, each, first))
        return ask

    return register


class ModelError(AssertionError):
    """A model does not answer all that users ask.

    Parameters
    ----------
    kind
        The class of the model.
    report
        The table that `check_model` returns for a model without fault.

    Examples
    --------
    >>> finding = {"outcome": "wrong", "finding": "2 of 90 values are NaN or infinite"}
    >>> error = ModelError(MosaicModel, pd.DataFrame(finding, index=["latent variables"]))
    >>> print(str(error).partition(" Needed")[0])
    MosaicModel does not answer 1 of 1 questions:
    - latent variables: 2 of 90 values are NaN or infinite.
    """

    def __init__(self, kind: type, report: pd.DataFrame) -> None:
        self.report = report
        wrong = report.loc[report["outcome"] == "wrong", "finding"]
        n_left = (report["outcome"] == "not asked").sum()
        left = f", and {n_left} were not asked" if n_left else ""
        lines = [f"{kind.__name__} does not answer {len(wrong)} of {len(report)} questions{left}:"]
        for asked, finding in wrong.items():
            fitting = [q for q in QUESTIONS if asked == q.words or q.each and str(asked).startswith(f"{q.words} ")]
            lines.append(f"- {asked}: {finding.rstrip('.')}. Needed: {fitting[0].need}")
        super().__init__("\n".join(lines))


def check_model(cls: type[MosaicModel], mosaic: Mosaic, **options: Any) -> pd.DataFrame:
    """Check that a class of models answers all that users ask of any model.

    The class is constructed from the mosaic and from its schema, trained for two epochs, and asked for latent
    variables, imputed and denoised values, predictive samples, differential tests and predictive checks. The model is
    saved, loaded, and adapted to a new batch.

    Parameters
    ----------
    cls
        A subclass of `pyromosaic.models.MosaicModel`.
    mosaic
        A small mosaic; 100 to 300 cells are enough. All questions can be asked if some cells lack a modality, and
        modalities have a batch.
    **options
        Options of the constructor.

    Returns
    -------
    pandas.DataFrame
        One row per ``question``: its ``outcome``, ``"right"`` or ``"not asked"``, and a sentence, the ``finding``.

    Raises
    ------
    ModelError
        If anything is missing or wrong. The message lists every fault, where in your code it arose, and what a model
        has to define for the question. ``report`` is the whole table, in which such outcomes are ``"wrong"``.

    Notes
    -----
    If a model cannot be constructed or trained, no further questions are asked. The check says whether a model
    answers, not whether its answers are good; for that see `pyromosaic.checks`.

    Examples
    --------
    >>> from pyromosaic import Mosaic, MultiVI, simulate
    >>> mosaic = Mosaic.from_mudata(simulate(90, {"rna": 50, "adt": 5})[0], batch_key="batch")
    >>> report = check_model(MultiVI, mosaic, n_latent=3)
    >>> report.loc["imputed values of adt", "finding"]
    'finite, with standard deviations and quantiles, in 60 measured and 30 other cells'
    """
    if not (isinstance(cls, type) and issubclass(cls, MosaicModel)):
        raise TypeError(f"cls must be a subclass of pyromosaic.models.MosaicModel; found {cls!r}")
    rows = list(_asked(_Candidate(cls, mosaic, options)))
    report = pd.DataFrame(rows, columns=["question", "outcome", "finding"]).set_index("question")
    if (report["outcome"] == "wrong").any():
        raise ModelError(cls, report)
    return report


class _Candidate:
    """A class of models, the data to try it on, and the model once it is made."""

    model: MosaicModel

    def __init__(self, kind: type[MosaicModel], mosaic: Mosaic, options: dict[str, Any]) -> None:
        self.kind, self.mosaic, self.options = kind, mosaic, options

    @property
    def cells(self) -> Mosaic:
        """The cells as the model takes them."""
        return self.model._data(None)


def _asked(candidate: _Candidate) -> Iterator[tuple[str, str, str]]:
    """Questions with outcome and finding, one after the other."""
    stopped = ""
    for question in QUESTIONS:
        for names in [(name,) for name in candidate.mosaic.modalities] if question.each else [()]:
            outcome, finding = "not asked", f"the model fails at: {stopped}"
            if not stopped:
                outcome, finding = _outcome(question.ask, candidate, *names)
            yield " ".join((question.words, *names)), outcome, finding
            if question.first and outcome == "wrong":
                stopped = question.words


def _outcome(ask: Callable[..., str], candidate: _Candidate, *names: str) -> tuple[str, str]:
    try:
        return "right", ask(candidate, *names)
    except _NotAsked as why:
        return "not asked", str(why)
    except _Wrong as why:
        return "wrong", str(why)
    except FAILURES as error:
        return "wrong", one_line(error).removeprefix("ValueError: ").removeprefix("SiteError: ")


def _finite(what: str, values: Any) -> None:
    """Refuse values of which some are not finite."""
    bad = ~np.isfinite(np.asarray(values, dtype=float))
    if bad.any():
        raise _Wrong(f"{bad.sum()} of {bad.size} {what} are NaN or infinite")


def _shaped(what: str, values: Any, *shape: int) -> None:
    if np.shape(values) != shape:
        raise _Wrong(f"{what} have shape {np.shape(values)}; expected {shape}")


@_question(
    "construction from a mosaic",
    "the constructor takes the data first, and builds self.model and self.guide, each a pyromosaic.program.Program, "
    "inside `with self.construction(data, seed) as schema`.",
    first=True,
)
def _construct(candidate: _Candidate) -> str:
    candidate.model = candidate.kind(candidate.mosaic, **candidate.options)
    if not hasattr(candidate.model, "schema"):
        raise _Wrong("the constructor does not call `self.construction`")
    n = sum(p.numel() for part in _programs(candidate.model) for p in part.parameters())
    return f"a model with {n} parameters"


@_question(
    "construction from a schema",
    "`load` and `adapt` build a model before it has data: take all shapes from the schema that `construction` gives; "
    "set what depends on data in a method `start` of the likelihood, decoder or encoder.",
)
def _construct_from_schema(candidate: _Candidate) -> str:
    again = candidate.kind(candidate.mosaic.schema, **candidate.options)
    for one, other in zip(_programs(candidate.model), _programs(again), strict=True):
        shapes, others = ({k: tuple(v.shape) for k, v in part.state_dict().items()} for part in (one, other))
        differing = [k for k in shapes | others if shapes.get(k) != others.get(k)]
        if differing:
            key = differing[0]
            raise _Wrong(f"{key!r} has shape {shapes.get(key)} with data and {others.get(key)} without")
    return "the same parameters as with data"


@_question(
    "training",
    "both programs define forward(self, minibatch, kl_weight=1.0); the model samples 'z' and its other latent "
    "variables, and for each modality of minibatch.decoded a site of its name with obs=view.counts; the guide samples "
    "the same latent variables, in the same plates.",
    first=True,
)
def _train(candidate: _Candidate) -> str:
    model = candidate.model
    model.train(2, progress_bar=False)
    if len(model.history) != 2:
        raise _Wrong(f"the history of two epochs has {len(model.history)} rows")
    _finite("values in the history of training", model.history.filter(regex="^train_"))
    return f"two epochs; ELBO {model.history['train_elbo'].iloc[-1]:.1f}"


@_question(
    "latent variables", "the guide samples 'z', shape (cells, 1, latent), in `with cells(minibatch, kl_weight)`."
)
def _latent(candidate: _Candidate) -> str:
    model = candidate.model
    mean, drawn = model.get_latent_representation(), model.get_latent_representation(sample=True)
    _shaped("latent variables", mean, candidate.cells.n_cells, mean.shape[1])
    _finite("latent variables", mean)
    _finite("draws of latent variables", drawn)
    return f"{mean.shape[1]} dimensions of {len(mean)} cells"


@_question(
    "latent variables given",
    "the guide infers 'z' from each modality of minibatch.observed, in the cells view.rows that have it, and needs no "
    "other.",
    each=True,
)
def _encoded(candidate: _Candidate, name: str) -> str:
    model, mosaic = candidate.model, candidate.cells
    cells = np.flatnonzero(mosaic.modalities[name].present)[:256]
    if len(cells) < 2:
        raise _NotAsked(f"too few cells have {name!r}: {len(cells)}")
    minibatch = to_predict(mosaic, cells, (), (name,)).to(model._device)
    view = minibatch.observed[name]
    others = replace(minibatch, observed={name: replace(view, counts=view.dense_counts().flip(0))})
    with inference_mode(*_programs(model), seed=0):
        one, other = (poutine.trace(model.guide).get_trace(m).nodes["z"]["fn"].mean for m in (minibatch, others))
    _finite("latent variables", one.cpu())
    if torch.allclose(one, other, rtol=1e-5, atol=1e-7):
        raise _Wrong(f"the guide ignores {name!r}: other measurements of it give the same latent variables")
    return f"follow the measurements of {len(cells)} cells"


@_question(
    "imputed values of",
    "the model makes the site of a modality for any cell: view.counts is then None, and view.library NaN where the "
    "modality was not measured, unless its Measurement has a `pyromosaic.sizes.Size`; the distribution of a "
    "likelihood has a finite mean.",
    each=True,
)
def _imputed(candidate: _Candidate, name: str) -> str:
    found = candidate.model.get_imputed_values(name, n_samples=3, quantiles=(0.05, 0.95))
    present = candidate.cells.modalities[name].present
    tables = {"imputed values": found.mean, "standard deviations": found.sd}
    tables |= {f"quantiles of level {level}": table for level, table in found.quantiles.items()}
    for what, table in tables.items():
        _shaped(what, table, len(present), candidate.mosaic.schema[name].n_features)
        for where, cells in (("measured", present), ("not measured", ~present)):
            _finite(f"{what} in cells in which {name!r} was {where}", table[cells])
    _within_support(candidate, name, "imputed values", found.mean)
    counted = f"{present.sum()} measured and {(~present).sum()} other cells"
    return f"finite, with standard deviations and quantiles, in {counted}"


def _within_support(candidate: _Candidate, name: str, what: str, values: Any) -> None:
    kind, least = candidate.mosaic.schema[name].spec.data_kind, np.min(np.asarray(values))
    if kind != "real" and least < 0:
        raise _Wrong(f"among {what} is {least:.4g}; the likelihood's kind of data is {kind!r}")


@_question(
    "denoised values of",
    "`self.modalities` of the model is a pyromosaic.program.Slots of pyromosaic.measurement.Measurement; `normalized` "
    "of a likelihood returns the denoised values, by default the mean.",
    each=True,
)
def _denoised(candidate: _Candidate, name: str) -> str:
    model, traits = candidate.model, candidate.mosaic.schema[name].spec.traits
    if traits.binary:
        answers = {"accessibility": model.get_accessibility_estimates(name)}
    else:
        answers = {"normalized expression": model.get_normalized_expression(name)}
    if traits.background and "mixing" in model._likelihood(name).predictors:
        answers["foreground probability"] = model.get_protein_foreground_probability(name)
    for what, values in answers.items():
        _shaped(what, values, candidate.cells.n_cells, candidate.mosaic.schema[name].n_features)
        _finite(f"values of {what}", values)
    return " and ".join(answers)


@_question("cell factors", "`cell_factor` of a likelihood returns the factor of each cell's signal, shape (cells, 1).")
def _factors(candidate: _Candidate) -> str:
    factors, present = candidate.model.get_cell_factors(), candidate.cells.presence
    for name in candidate.mosaic.modalities:
        _finite(f"cell factors of {name!r}", factors[name][present[name]])
    return f"of {', '.join(candidate.mosaic.modalities)}"


@_question(
    "predictive samples of",
    "the model draws the site of a modality where view.counts is None, from the distribution that explains its "
    "measurements.",
    each=True,
)
def _samples(candidate: _Candidate, name: str) -> str:
    drawn = candidate.model.posterior_predictive_sample(name, n_samples=2)
    _shaped("draws", drawn, 2, candidate.cells.n_cells, candidate.mosaic.schema[name].n_features)
    _finite("drawn measurements", drawn)
    _within_support(candidate, name, "drawn measurements", drawn)
    return f"{drawn.shape[1]} cells × {drawn.shape[2]} features, twice"


@_question(
    "differential tests of",
    "`normalized` of a likelihood returns the values to compare, and its `traits` name the scale.",
    each=True,
)
def _differential(candidate: _Candidate, name: str) -> str:
    first = np.arange(candidate.cells.n_cells) < candidate.cells.n_cells // 2
    table = candidate.model.differential(cells1=first, modality=name, n_samples=50)
    _shaped("tests", table, candidate.mosaic.schema[name].n_features, table.shape[1])
    _finite("tests", table.filter(regex="^(probability|bayes_factor|lfc_|difference_)"))
    return f"{len(table)} features between halves of the cells"


@_question(
    "predictive checks",
    "latent variables of cells stand in the plate 'cells' or '<modality>_cells', so that they can be drawn from the "
    "prior; measurements are drawn as for predictive samples.",
)
def _checked(candidate: _Candidate) -> str:
    for prior in (False, True):
        found = checks.predictive_check(candidate.model, prior=prior, n_samples=3)
        _finite(f"statistics of draws from the {'prior' if prior else 'posterior'}", found.table)
    return f"{len(found.table)} statistics, of draws from posterior and prior"


@_question(
    "saving and loading",
    "options are named arguments of the constructor that JSON can hold, or objects, which are given to load() again; "
    "everything else that a model learns is a parameter or a registered buffer of self.model or self.guide.",
)
def _saved(candidate: _Candidate) -> str:
    model = candidate.model
    lost = [name for name in candidate.options if name not in model.options]
    if lost:
        raise _Wrong(f"option {lost[0]!r} is not among model.options, which are saved")
    with TemporaryDirectory() as folder:
        model.save(folder)
        objects = dict.fromkeys(json.loads((Path(folder) / "model.json").read_text())["objects"])
        likelihoods = {m.spec.likelihood_name: m.spec.likelihood for m in candidate.mosaic.schema.modalities.values()}
        again = candidate.kind.load(
            folder, candidate.mosaic, **{k: model.options.get(k, likelihoods.get(k)) for k in objects}
        )
    before, after = _plain(model), _plain(again)
    differing = [key for key in before if key in after and before[key] != after[key]]
    if differing:
        key = differing[0]
        raise _Wrong(f"{key} is {shorten(before[key], 60)}, and {shorten(after[key], 60)} in the loaded model")
    _same("latent variables", model.get_latent_representation(), again.get_latent_representation())
    for name in model.schema.modalities:
        _same(f"imputed values of {name!r}", _means(model, name).mean, _means(again, name).mean)
    return "the loaded model gives the same latent variables and imputed values"


def _means(model: MosaicModel, name: str, data: Mosaic | None = None) -> Estimate:
    return model.get_imputed_values(name, n_samples=None, quantiles=(), data=data)


def _same(what: str, before: pd.DataFrame, after: pd.DataFrame) -> None:
    one, other = before.to_numpy(), after.to_numpy()
    if not np.allclose(one, other, rtol=1e-3, atol=1e-5, equal_nan=True):
        raise _Wrong(f"{what} differ, by up to {np.nanmax(np.abs(one - other)):.3g}")


def _programs(model: MosaicModel) -> tuple[Any, Any]:
    return model.model, model.guide


def _plain(model: MosaicModel) -> dict[str, str]:
    """Numbers, words and unregistered tensors that a model and its modules have as attributes, and its options."""
    owners: dict[str, Any] = {"self": model}
    for part, program in zip(("model", "guide"), _programs(model), strict=True):
        owners |= {f"self.{part}.{name}".rstrip("."): module for name, module in program.named_modules()}
    plain = {
        f"{owner}.{key}": repr(value.tolist() if isinstance(value, torch.Tensor | np.ndarray) else value)
        for owner, thing in owners.items()
        for key, value in vars(thing).items()
        if isinstance(value, bool | int | float | str | torch.Tensor | np.ndarray) and not key.startswith("_")
    }
    return plain | {
        f"option {key!r}": repr(value) for key, value in model.options.items() if isinstance(value, int | float | str)
    }


@_question(
    "adapting to a new batch",
    "networks see the batch by view.one_hot() or view.design(), behind their other inputs; a parameter with one entry "
    "per batch has batches along one dimension; both belong to the part of their modality.",
)
def _adapted(candidate: _Candidate) -> str:
    model, mosaic = candidate.model, candidate.mosaic
    if not any(m.spec.batch_key for m in mosaic.schema.modalities.values()):
        raise _NotAsked("no modality of the mosaic has a batch_key")
    adapted = model.adapt(_tables(mosaic, NEW_BATCH), n_epochs=1, progress_bar=False)
    _finite("latent variables of cells of the new batch", adapted.get_latent_representation())
    known = adapted.register(_tables(mosaic))
    for name in model.schema.modalities:
        _finite(f"imputed values of {name!r} in the new batch", _means(adapted, name).mean)
        before, after = _means(model, name).mean, _means(adapted, name, known).mean
        _same(
            f"imputed values of {name!r} in known batches, which adapting leaves alone,",
            before,
            after.loc[before.index],
        )
    return "a new batch is learnt, and known ones stay as they are"


def _tables(mosaic: Mosaic, batch: str | None = None) -> dict[str, anndata.AnnData]:
    """The data of a mosaic by modality, as if measured in another batch if one is given."""
    found = {}
    for name, modality in mosaic.modalities.items():
        cells = np.flatnonzero(modality.present)
        if len(cells) == 0:
            continue
        names, spec = mosaic.obs_names[cells], modality.spec
        keys = dict.fromkeys(str(k) for table in mosaic.tables for k in table.obs if ":" not in str(k))
        obs = pd.DataFrame({key: look_up(readings(mosaic.tables, key, names), name) for key in keys}, index=names)
        if batch is not None and spec.batch_key is not None:
            obs[spec.batch_key] = batch
        values = modality.read(cells)
        adata = anndata.AnnData(values, obs, pd.DataFrame(index=list(modality.schema.features)))
        if spec.layer is not None:
            adata.layers[spec.layer] = values
        if modality.exposures is not None and spec.exposure_layer is not None:
            adata.layers[spec.exposure_layer] = modality.exposures[modality.rows[cells]]
        found[name] = adata
    return found
