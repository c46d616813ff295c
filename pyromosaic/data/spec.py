"""How the user describes a modality (`ModalitySpec`), and what a model remembers of its data (`Schema`)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch

from pyromosaic.accepted import Column, Word, checked
from pyromosaic.data.cohorts import Cohorts
from pyromosaic.data.droplets import droplet_profile
from pyromosaic.data.panels import BatchPanels, Panels
from pyromosaic.data.traits import TRAITS, DataKind, Traits

#: The kind of number that each named likelihood describes; registration checks the data against it.
DATA_KINDS: Mapping[str, str] = {name: traits.kind for name, traits in TRAITS.items()}

#: The default likelihood of a modality, by the name of the modality.
LIKELIHOOD_BY_NAME: Mapping[str, str] = {
    **dict.fromkeys(("rna", "gex", "gene_expression", "expression"), "nb"),
    **dict.fromkeys(("atac", "chromatin", "accessibility", "peaks", "regions"), "bernoulli"),
    **dict.fromkeys(("adt", "protein", "proteins", "prot", "antibody"), "nb_mixture"),
}


@checked
@dataclass(frozen=True)
class ModalitySpec:
    """How one modality is measured and modelled.

    Parameters
    ----------
    likelihood
        Name of the likelihood: ``"nb"``, ``"zinb"``, ``"nb_mixture"``, ``"multinomial"``, ``"poisson"``,
        ``"bernoulli"`` (all for raw counts; ``"bernoulli"`` reads a count above 0 as open), ``"normal"``,
        ``"log1p_normal"``, ``"ziln"`` or ``"zig"``; or a subclass of `pyromosaic.likelihoods.Likelihood`.
    layer
        Layer that holds the values; None for `X`.
    batch_key
        Column of `obs` with the batch of each cell.
    categorical_covariates, continuous_covariates
        Further columns of `obs` that decoders (and encoders) use. Continuous covariates are standardised.
    label_key
        Column of `obs` with the labels of cells, e.g. cell types; None if there are no labels.
    unlabelled
        The value of the labels that means "not known". Missing values mean the same.
    size_factor_key
        Column of `obs` with the size of each cell, in counts; by default its total count.
    allow_non_integer
        Whether a likelihood for counts accepts values that are not whole numbers, e.g. corrected counts.
    dispersion
        Whether the inverse dispersion of a negative binomial likelihood is one number per feature, ``"gene"``, per
        feature and batch, ``"gene-batch"``, or per feature and label, ``"gene-label"``.
    exposure_layer
        Layer with the exposure of each value (e.g. the number of trials, or the coverage), for likelihoods that need
        it; 0 where nothing was measured.
    empty_cells
        What to do with a cell whose values are all 0: ``"refuse"`` raises an error; ``"holes"`` treats it as not
        measured, for data in which missing modalities were filled with zeros; ``"keep"`` treats the zeros as
        measurements, for likelihoods that need no size.
    background
        How the likelihood ``"nb_mixture"`` treats the unknown background level of each cell and protein:
        ``"marginal"`` sums it out; ``"latent"`` infers it, as totalVI does (see `pyromosaic.likelihoods.NBMixture`).
    cut_sites
        Whether the counts are cut sites of chromatin, two for each fragment, as in matrices of 10x Genomics. The model
        then sees fragments, ``ceil(x / 2)``, and all its answers are fragments; your data are not changed.
    empty_droplets
        Antibody counts of droplets without a cell, an AnnData or a table droplets × antibodies, for the likelihood
        ``"nb_mixture"``: the shares of antibodies among these counts inform the prior of the background. The
        specification keeps only `droplet_profile` of the counts.

    Examples
    --------
    >>> from pyromosaic import ModalitySpec
    >>> spec = ModalitySpec("nb", batch_key="batch", categorical_covariates=["sex"])
    >>> spec.data_kind, spec.needs_library, spec.categorical
    ('count', True, ('batch', 'sex'))
    """

    likelihood: str | type
    layer: str | None = None
    batch_key: Column | None = None
    categorical_covariates: Sequence[Column] = ()
    continuous_covariates: Sequence[Column] = ()
    label_key: Column | None = None
    unlabelled: Word = "unknown"
    size_factor_key: Column | None = None
    allow_non_integer: bool = False
    dispersion: Literal["gene", "gene-batch", "gene-label"] = "gene"
    exposure_layer: str | None = None
    empty_cells: Literal["refuse", "holes", "keep"] = "refuse"
    background: Literal["marginal", "latent"] = "marginal"
    cut_sites: bool = False
    empty_droplets: Any = None

    def __post_init__(self) -> None:
        own = isinstance(getattr(self.likelihood, "traits", None), Traits)
        if not own and self.likelihood not in TRAITS:
            names = ", ".join(TRAITS)
            raise ValueError(
                f"there is no likelihood {self.likelihood!r}; accepted: {names}, or a subclass of "
                "pyromosaic.likelihoods.Likelihood"
            )
        covariates = [*self.categorical, *self.continuous_covariates]
        for column in covariates:
            if covariates.count(column) > 1:
                raise ValueError(f"the column {column!r} is given more than once among batch and covariates")

        if self.dispersion != "gene" and not (self.traits.sized and self.traits.dispersed):
            raise ValueError(
                f"likelihood {self.likelihood_name!r} has no inverse dispersion that could be {self.dispersion!r}"
            )
        if self.background == "latent" and not self.traits.background:
            raise ValueError(f"likelihood {self.likelihood_name!r} has no background that could be 'latent'")
        if self.cut_sites and self.data_kind != "count":
            raise ValueError(
                f"cut_sites=True is for raw counts; likelihood {self.likelihood_name!r} "
                f"{'with allow_non_integer=True ' * self.allow_non_integer}takes other values"
            )
        if self.empty_droplets is not None:
            if not self.traits.background:
                raise ValueError(f"likelihood {self.likelihood_name!r} has no background for empty_droplets to inform")
            object.__setattr__(self, "empty_droplets", droplet_profile(self.empty_droplets))
        if self.dispersion == "gene-batch" and self.batch_key is None:
            raise ValueError("dispersion 'gene-batch' needs a batch_key; found none")
        if self.dispersion == "gene-label" and self.label_key is None:
            raise ValueError("dispersion 'gene-label' needs a label_key; found none")

    @property
    def likelihood_name(self) -> str:
        """Name of the likelihood, or of its class."""
        return self.likelihood if isinstance(self.likelihood, str) else self.likelihood.__name__

    @property
    def family(self) -> str:
        """The named likelihood that this is, or that its class derives from; empty if there is none."""
        return self.likelihood if isinstance(self.likelihood, str) else self.likelihood.family  # type: ignore[attr-defined]

    @property
    def traits(self) -> Traits:
        """What kind of measurement the likelihood describes."""
        return TRAITS[self.likelihood] if isinstance(self.likelihood, str) else self.likelihood.traits  # type: ignore[attr-defined]

    @property
    def data_kind(self) -> DataKind:
        """Which numbers registration accepts: ``"count"``, ``"nonnegative"`` or ``"real"``."""
        return "nonnegative" if self.traits.kind == "count" and self.allow_non_integer else self.traits.kind

    @property
    def needs_library(self) -> bool:
        """Whether the mean of the likelihood is proportional to the size of the cell."""
        return self.traits.sized

    @property
    def categorical(self) -> tuple[str, ...]:
        """All categorical columns, the batch first."""
        return ((self.batch_key,) if self.batch_key else ()) + tuple(self.categorical_covariates)


@dataclass(frozen=True)
class ModalitySchema:
    """What a model remembers of a modality, to be rebuilt and to check new data.

    Parameters
    ----------
    spec
        How the user described the modality.
    features
        Names of the features, in the model's order.
    categories
        For each categorical column, the categories of the cells that have the modality. A cell of another category is
        treated as an average over these.
    continuous
        Mean and standard deviation of each continuous covariate.
    labels
        Names of the labels.
    library
        Median size of a cell, in counts.
    exposure
        Median exposure of the measured values; other values are predicted at this exposure.
    detected
        For each feature, the share of the cells in which it is not 0; empty if this is not known.
    profile
        For each feature, its expected share of a cell's counts; empty if this is not known.
    panels
        Which features were measured in which cells; None if all were measured in all.

    Examples
    --------
    >>> schema = ModalitySchema(ModalitySpec("nb", batch_key="batch"), ("CD4", "CD8A"), {"batch": ("a", "b", "c")})
    >>> schema.n_features, schema.n_covariates, schema.dispersion_shape
    (2, 3, (2,))
    """

    spec: ModalitySpec
    features: tuple[str, ...]
    categories: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    continuous: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    library: float = 1.0
    exposure: float = 1.0
    detected: tuple[float, ...] = ()
    profile: tuple[float, ...] = ()
    panels: Panels | None = None

    @property
    def n_features(self) -> int:
        """Number of features."""
        return len(self.features)

    @property
    def n_covariates(self) -> int:
        """Number of columns of the covariates: one for each category and each continuous covariate."""
        return sum(len(c) for c in self.categories.values()) + len(self.continuous)

    @property
    def shares(self) -> np.ndarray:
        """Expected share of each feature in the counts of a cell; equal shares if they are not known."""
        known = np.array(self.profile or [1.0] * self.n_features)
        return known / known.sum()

    @cached_property
    def by_batch(self) -> BatchPanels | None:
        """Which features were measured in which batch; None if all were measured in all."""
        if self.panels is None or self.spec.batch_key is None:
            return None
        table = torch.from_numpy(self.panels.by_batch(self.n_features))
        return None if table.all() else BatchPanels(table, torch.from_numpy(self.shares).float())

    @property
    def dispersion_shape(self) -> tuple[int, ...]:
        """Shape of the inverse dispersion: (features,), (batches, features) or (labels, features)."""
        if self.spec.dispersion == "gene":
            return (self.n_features,)
        groups = self.labels if self.spec.dispersion == "gene-label" else self.categories[self.spec.categorical[0]]
        return len(groups), self.n_features


@dataclass(frozen=True)
class Schema:
    """The modalities of a model, in its order, and its cohorts, if it contrasts cohorts.

    Parameters
    ----------
    modalities
        What is remembered of each modality, by name.
    cohorts
        Background and target groups, see `Mosaic.with_cohorts`; None without cohorts.

    Examples
    --------
    >>> schema = Schema({"rna": ModalitySchema(ModalitySpec("nb"), ("CD4", "CD8A"))})
    >>> schema["rna"].n_features
    2
    >>> Schema.from_json(schema.to_json()) == schema
    True
    """

    modalities: Mapping[str, ModalitySchema]
    cohorts: Cohorts | None = None

    def __getitem__(self, name: str) -> ModalitySchema:
        if name not in self.modalities:
            raise KeyError(f"there is no modality {name!r}; the model knows {', '.join(map(repr, self.modalities))}")
        return self.modalities[name]

    def of_features(self, names: Iterable[str]) -> str:
        """The modality that has the most of these features.

        Raises
        ------
        ValueError
            If none has any of them, or two have equally many.
        """
        given = set(map(str, names))
        n = {name: len(given.intersection(modality.features)) for name, modality in self.modalities.items()}
        best = [name for name in n if n[name] == max(n.values())]
        if n[best[0]] == 0:
            raise ValueError("the data have none of the features of any modality of the model")
        if len(best) > 1:
            raise ValueError(
                f"the data have equally many features of modalities {' and '.join(map(repr, best))}; say which one it "
                f'is, e.g. {{"{best[0]}": adata}}'
            )
        return best[0]

    def difference(self, other: "Schema") -> str:
        """What first differs in another schema, in words.

        Examples
        --------
        >>> schema, other = (Schema({"rna": ModalitySchema(ModalitySpec(word), ("CD4",))}) for word in ("nb", "zinb"))
        >>> schema.difference(other)
        "likelihood of modality 'rna' is 'zinb' instead of 'nb'"
        """
        if list(self.modalities) != list(other.modalities):
            return f"the modalities are {', '.join(other.modalities)} instead of {', '.join(self.modalities)}"
        for name, known in self.modalities.items():
            found = other.modalities[name]
            for mine, others in ((known.spec, found.spec), (known, found)):
                for entry in fields(mine):
                    values = getattr(others, entry.name), getattr(mine, entry.name)
                    if entry.name != "spec" and values[0] != values[1]:
                        words = all(isinstance(value, str | float | None) for value in values)
                        how = " is {!r} instead of {!r}".format(*values) if words else ": other values"
                        return f"{entry.name} of modality {name!r}{how}"
        return "the cohorts differ"

    def to_json(self) -> dict[str, Any]:
        """The schema as lists, numbers and strings; a class of likelihood is given by its name."""
        modalities = {name: asdict(modality) for name, modality in self.modalities.items()}
        for name, modality in self.modalities.items():
            modalities[name]["spec"]["likelihood"] = modality.spec.likelihood_name
        return {"modalities": modalities, "cohorts": None if self.cohorts is None else asdict(self.cohorts)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], likelihoods: Mapping[str, type] = MappingProxyType({})) -> "Schema":
        """The inverse of `to_json`, given the classes of likelihoods that are not the package's by their names."""
        modalities = {}
        for name, entry in data["modalities"].items():
            known = {f.name for f in fields(ModalitySpec)}
            given = {k: v for k, v in entry["spec"].items() if k in known}
            given["likelihood"] = likelihoods.get(given["likelihood"], given["likelihood"])
            modalities[name] = ModalitySchema(
                spec=ModalitySpec(**given),
                features=tuple(entry["features"]),
                categories={k: tuple(v) for k, v in entry["categories"].items()},
                continuous={k: (float(v[0]), float(v[1])) for k, v in entry["continuous"].items()},
                labels=tuple(entry["labels"]),
                library=float(entry["library"]),
                exposure=float(entry.get("exposure", 1.0)),
                detected=tuple(map(float, entry.get("detected", ()))),
                profile=tuple(map(float, entry.get("profile", ()))),
                panels=Panels.from_json(entry.get("panels")),
            )
        cohorts = data["cohorts"]
        if cohorts is None:
            return cls(modalities)
        return cls(modalities, Cohorts(cohorts["key"], tuple(cohorts["names"]), tuple(map(tuple, cohorts["values"]))))
