"""Simulated mosaics with their ground truth: the generative story that the package's models invert.

Each cell has a type, a batch, and a latent variable z around the centre of its type. A treated cell also has a salient
latent variable s around the centre of its response. The signal of a feature is ``w'z + v's``, and the likelihood of the
modality draws measurements from signals. The pattern of a cell says by which modalities it is measured.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.special import expit

from pyromosaic.accepted import Count, Positive, Seed, Share, Weight, Width, checked
from pyromosaic.data.spec import LIKELIHOOD_BY_NAME, ModalitySpec
from pyromosaic.data.tables import kept_apart

if TYPE_CHECKING:
    from mudata import MuData

ENTRIES = 4_000_000  # number of entries of a matrix that are drawn at once
DENSE = ("nb_mixture", "normal")  # likelihoods whose matrices have few zeros
WITHIN_RESPONSE = 0.4  # standard deviation of s around the centre of its response; 1 over all treated cells


@dataclass(frozen=True)
class Truth:
    """The parameters and variables that `simulate` drew, for every cell and modality, whether or not it was measured.

    Cells are in the order of the MuData.

    Parameters
    ----------
    z
        Latent variable, shape (cells, latent dimensions), of expected variance 1.
    s
        Salient latent variable, shape (cells, salient dimensions); 0 in controls.
    centers
        Mean of z in each type, shape (types, latent dimensions).
    type, batch, condition, response
        Groups of the cells; their ``codes`` are row numbers of `centers` and of parameters by type or batch.
    loadings, salient_loadings
        For each modality, w and v of its features, shapes (features, latent dimensions) and (features, salient
        dimensions).
    parameters
        For each modality, the arrays named in its function (`genes`, `regions`, `proteins`, `values`). ``base`` and
        ``background_loc`` have shape (batches, features), ``background_probability`` has shape (types, features).
    mean
        For each modality, the expected measurements, shape (cells, features); empty unless `keep_means`.
    links
        Features that have the signal of a gene: columns ``gene``, ``modality``, ``feature`` and ``sign`` (1 or -1).

    Examples
    --------
    >>> from pyromosaic import simulate
    >>> mdata, truth = simulate(60, {"rna": 50, "adt": 5}, types=3)
    >>> truth.z.shape, truth.centers.shape, truth.loadings["adt"].shape
    ((60, 5), (3, 5), (5, 5))
    """

    z: np.ndarray
    s: np.ndarray
    centers: np.ndarray
    type: pd.Categorical
    batch: pd.Categorical
    condition: pd.Categorical
    response: pd.Categorical
    loadings: dict[str, np.ndarray]
    salient_loadings: dict[str, np.ndarray]
    links: pd.DataFrame
    parameters: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    mean: dict[str, np.ndarray] = field(default_factory=dict)


# A story draws the parameters of a modality. It returns them and a function that takes the numbers of cells and the
# signals of their features, and returns their expected and their drawn measurements, each of shape (cells, features).
Story = tuple[dict[str, np.ndarray], Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]]


def genes(
    rng: np.random.Generator, truth: Truth, w: np.ndarray, batch: np.ndarray, depth: float, inflated: bool = False
) -> Story:
    """RNA, ``NB(mean = size * softmax(base + signal), theta)``; a count becomes 0 with probability ``gate`` (zinb)."""
    n = len(w)
    if depth * n < 10:
        raise ValueError(f"the median cell must have at least 10 counts; found {n} genes of depth {depth}")
    p = _float32(
        base=rng.normal(size=n) + batch,
        theta=rng.lognormal(1.0, 0.5, n),
        size=depth * n * rng.lognormal(0.0, 0.4, len(truth.z)),
        gate=rng.uniform(0.05, 0.3, n) if inflated else np.zeros(n),
    )

    def draw(cells: np.ndarray, signal: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rate = np.exp(p["base"][truth.batch.codes[cells]] + signal)
        mu = p["size"][cells, None] * rate / rate.sum(1, keepdims=True)
        counts = _negative_binomial(rng, mu, p["theta"])
        if inflated:
            counts[rng.random(mu.shape, np.float32) < p["gate"]] = 0
        return (1 - p["gate"]) * mu, counts

    return p, draw


def regions(rng: np.random.Generator, truth: Truth, w: np.ndarray, batch: np.ndarray, depth: float) -> Story:
    """Chromatin, open (1, or else 0) with probability ``cell_factor * region_factor * sigmoid(base + signal)``."""
    n = len(w)
    p = _float32(
        base=rng.normal(-0.5, 1.0, n) + batch,
        region_factor=rng.uniform(0.3, 1.0, n),
        cell_factor=rng.beta(8.0, 4.0, len(truth.z)),
    )

    def draw(cells: np.ndarray, signal: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        accessibility = expit(p["base"][truth.batch.codes[cells]] + signal)
        probability = p["cell_factor"][cells, None] * p["region_factor"] * accessibility
        return probability, rng.random(signal.shape, np.float32) < probability

    return p, draw


def proteins(rng: np.random.Generator, truth: Truth, w: np.ndarray, batch: np.ndarray, depth: float) -> Story:
    """Antibodies, a mixture of background and foreground.

    The log background of a cell is ``b ~ Normal(background_loc of its batch, background_scale)``. With probability
    ``background_probability`` of its type, the count is ``NB(mean = size * exp(b), theta)``, or else
    ``NB(mean = size * exp(b) * (1 + exp(foreground + signal)), theta)``. The expected count averages over b.
    """
    n = len(w)
    p = _float32(
        background_loc=rng.normal(1.5, 0.5, n) + batch,
        background_scale=rng.uniform(0.2, 0.5, n),
        background_probability=expit(rng.normal(0.5, 0.5, n) - 3 * truth.centers @ w.T),
        foreground=rng.normal(1.5, 0.5, n),
        theta=rng.lognormal(1.5, 0.3, n),
        size=rng.lognormal(0.0, 0.3, len(truth.z)),
    )

    def draw(cells: np.ndarray, signal: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        loc, size = p["background_loc"][truth.batch.codes[cells]], p["size"][cells, None]
        share = p["background_probability"][truth.type.codes[cells]]
        factor = 1 + np.exp(p["foreground"] + signal)
        mean = size * np.exp(loc + p["background_scale"] ** 2 / 2) * (share + (1 - share) * factor)
        background = size * np.exp(rng.normal(loc, p["background_scale"]))
        mu = background * np.where(rng.random(loc.shape) < share, 1, factor)
        return mean, _negative_binomial(rng, mu, p["theta"])

    return p, draw


def values(rng: np.random.Generator, truth: Truth, w: np.ndarray, batch: np.ndarray, depth: float) -> Story:
    """Real values, ``Normal(base + signal, sigma)``."""
    p = _float32(base=rng.normal(size=len(w)) + batch, sigma=rng.uniform(0.3, 1.0, len(w)))

    def draw(cells: np.ndarray, signal: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mean = p["base"][truth.batch.codes[cells]] + signal
        return mean, rng.normal(mean, p["sigma"])

    return p, draw


STORIES: Mapping[str, Callable[..., Story]] = {
    "nb": genes,
    "zinb": partial(genes, inflated=True),
    "bernoulli": regions,
    "nb_mixture": proteins,
    "normal": values,
}


@checked
def simulate(
    n_cells: Count = 1000,
    modalities: Mapping[str, Width] | None = None,
    *,
    likelihoods: Mapping[str, str] | None = None,
    patterns: Mapping[str, float] | Sequence[str] | None = None,
    types: Width | Sequence[float] | Mapping[str, Sequence[float]] = 5,
    private: Mapping[str, Sequence[str]] | None = None,
    n_latent: Width = 5,
    separation: Weight = 2.0,
    n_batches: Width = 2,
    batch_effect: float = 0.3,
    depth: Positive = 1.0,
    links: Mapping[str, Share] | None = None,
    negative_links: Share = 0.0,
    treated: Share | Mapping[str, Share] = 0.0,
    treated_types: Sequence[float] | None = None,
    n_responses: Width = 2,
    n_salient: Width = 2,
    affected: Share = 0.2,
    effect: float = 1.0,
    keep_means: bool = True,
    seed: Seed = 0,
) -> "tuple[MuData, Truth]":
    """Draw a mosaic from known parameters.

    Groups (patterns, types, batches, conditions, responses) have exactly the given shares, to the nearest cell. If all
    counts of a cell in a modality are 0, they are drawn again, because such a cell would not be detected.

    Parameters
    ----------
    n_cells
        Number of cells.
    modalities
        Number of features of each modality; by default ``{"rna": 300, "atac": 500, "adt": 30}``.
    likelihoods
        ``"nb"``, ``"zinb"``, ``"bernoulli"``, ``"nb_mixture"`` or ``"normal"``, for each modality whose likelihood does
        not follow from its name, or should be another.
    patterns
        Share of the cells in each pattern of modalities, e.g. ``{"rna+adt": 0.5, "atac": 0.5}``, or a list of patterns
        with equal shares; by default all possible patterns.
    types
        Number of types, with equal shares; or their shares; or a dictionary with their shares in each pattern.
    private
        Types that occur in the given patterns only, e.g. ``{"type4": ["rna"]}``; elsewhere, the shares of the other
        types are larger.
    n_latent
        Dimensions of z.
    separation
        Standard deviation of the centres of types, divided by the standard deviation within a type.
    n_batches, batch_effect
        Number of batches, and standard deviation of their effect on a feature (on the log rate, the log odds, the log
        background or the value).
    depth
        Counts per gene in the median cell; data with fewer are sparser.
    links
        For each modality, the share of its features that have the signal of a gene of the first RNA modality.
    negative_links
        Share of the links for which the sign of this signal is reversed.
    treated
        Share of treated cells, or a dictionary with the share of each condition; other cells are controls.
    treated_types
        Shares of the types in treated cells; by default those of the controls.
    n_responses
        Number of response groups of each condition, ``"treated:0"``, ``"treated:1"``, …
    n_salient
        Dimensions of s; at least half the number of response groups, because each group has a separate direction.
    affected
        Share of the features of each modality on which s acts.
    effect
        Standard deviation of the signal of s over treated cells and affected features.
    keep_means
        Whether to return the expected value of every cell and feature in the truth.
    seed
        The same seed draws the same data.

    Returns
    -------
    MuData
        Cells ``cell0``, … with the modalities of their pattern. `obs`, of the MuData and of each modality, has
        ``celltype``, ``batch`` and, if cells are treated, ``condition`` and ``response``.
    Truth
        Parameters, latent variables and groups.

    Raises
    ------
    ValueError
        If an argument is out of range, or two arguments do not fit together.

    Examples
    --------
    >>> from pyromosaic import Mosaic, simulate
    >>> mdata, truth = simulate(600, {"rna": 100, "adt": 10}, patterns={"rna": 0.5, "adt": 0.25, "rna+adt": 0.25})
    >>> Mosaic.from_mudata(mdata, batch_key="batch")
    Mosaic of 600 cells
      rna: 450 cells × 100 features, nb, batch 'batch' (2)
      adt: 300 cells × 10 features, nb_mixture, batch 'batch' (2)
    >>> truth.mean["adt"].shape
    (600, 10)
    """
    import anndata
    import mudata

    modalities = dict({"rna": 300, "atac": 500, "adt": 30} if modalities is None else modalities)
    conditions = dict(treated) if isinstance(treated, Mapping) else {"treated": treated}
    _check("from 0 to 3", 3, batch_effect=batch_effect, effect=effect)  # logarithms: a factor of e^3
    all_treated = round(sum(conditions.values()), 9)
    _check("from 0 to 1", 1, treated=all_treated)
    if "control" in conditions:
        raise ValueError("'control' is the name of the cells that are not treated; give the condition another name")
    chosen = _likelihoods(modalities, likelihoods or {})
    words, present, pattern_shares = _patterns(list(modalities), patterns)
    type_shares = _type_shares(types, treated_types, private or {}, list(modalities), words)
    cohort_shares = _shares("treated", [1 - all_treated, *conditions.values()])
    responses = [f"{name}:{i}" for name in conditions for i in range(n_responses)]
    if all_treated and len(responses) > 2 * n_salient:
        raise ValueError(
            f"n_salient must be at least half the number of response groups, {len(responses)}; found {n_salient}"
        )
    rng = np.random.default_rng(seed)

    # Cells, in the order of MuData: by the first modality that they have
    pattern = _assign(rng, pattern_shares, n_cells)
    pattern = pattern[np.argsort(present[pattern].argmax(1), kind="stable")]
    measured = present[pattern]
    if not measured.any(0).all():
        raise ValueError(
            f"modality {list(modalities)[measured.any(0).argmin()]!r} has no cell; raise its share, or n_cells"
        )
    condition = _assign(rng, cohort_shares, n_cells)
    kind, response = np.zeros((2, n_cells), int)
    for k in range(len(cohort_shares)):
        for i, shares in enumerate(type_shares[:, min(k, 1)]):
            group = (pattern == i) & (condition == k)
            kind[group] = _assign(rng, shares, group.sum())
        if k > 0:  # response 0 is "none"
            group = condition == k
            response[group] = 1 + (k - 1) * n_responses + _assign(rng, np.ones(n_responses), group.sum())
    batch = _assign(rng, np.ones(n_batches), n_cells)

    # Latent variables
    spread = np.sqrt(1 + separation**2)
    centers = rng.normal(size=(type_shares.shape[2], n_latent)) * separation / spread
    z = centers[kind] + rng.normal(size=(n_cells, n_latent)) / spread
    axes = np.linalg.qr(rng.normal(size=(n_salient, n_salient)))[0] * np.sqrt((1 - WITHIN_RESPONSE**2) * n_salient)
    s = np.concatenate([axes, -axes])[(response - 1) % (2 * n_salient)]
    s = (s + WITHIN_RESPONSE * rng.normal(size=s.shape)) * (condition > 0)[:, None]

    # Features
    w = {name: rng.normal(size=(n, n_latent)) / np.sqrt(n_latent) for name, n in modalities.items()}
    v = {name: rng.normal(size=(n, n_salient)) * effect / np.sqrt(n_salient) for name, n in modalities.items()}
    for weights in v.values():
        weights[_assign(rng, [affected, 1 - affected], len(weights)) == 1] = 0
    table = _link(rng, w, v, chosen, links or {}, negative_links)

    truth = Truth(
        z=z.astype(np.float32),
        s=s.astype(np.float32),
        centers=centers.astype(np.float32),
        type=_groups(kind, [f"type{i}" for i in range(len(centers))]),
        batch=_groups(batch, [f"batch{i}" for i in range(n_batches)]),
        condition=_groups(condition, ["control", *conditions]),
        response=_groups(response, ["none", *responses]),
        loadings=_float32(**w),
        salient_loadings=_float32(**v),
        links=table,
    )
    obs = pd.DataFrame({"celltype": truth.type, "batch": truth.batch}, index=[f"cell{i}" for i in range(n_cells)])
    if condition.any():
        obs = obs.assign(condition=truth.condition, response=truth.response)
    adatas = {}
    for (name, likelihood), has in zip(chosen.items(), measured.T, strict=True):
        batch_shift = rng.normal(scale=batch_effect, size=(n_batches, modalities[name]))
        truth.parameters[name], draw = STORIES[likelihood](rng, truth, truth.loadings[name], batch_shift, depth)
        if keep_means:
            truth.mean[name] = np.empty((n_cells, modalities[name]), np.float32)
        blocks = []
        for cells in np.array_split(np.arange(n_cells), 1 + n_cells * modalities[name] // ENTRIES):
            signal = truth.z[cells] @ truth.loadings[name].T + truth.s[cells] @ truth.salient_loadings[name].T
            mean, x = draw(cells, signal)
            if keep_means:
                truth.mean[name][cells] = mean
            if ModalitySpec(likelihood).data_kind != "real":  # registration refuses cells whose values are all 0
                while (empty := has[cells] & ~x.any(1)).any():
                    x[empty] = draw(cells[empty], signal[empty])[1]
            blocks.append(sparse.csr_matrix(x[has[cells]], dtype=np.float32))
        matrix = sparse.vstack(blocks, format="csr")
        adatas[name] = anndata.AnnData(
            matrix.toarray() if likelihood in DENSE else matrix,
            obs=obs[has],
            var=pd.DataFrame(index=[f"{name}_{i}" for i in range(modalities[name])]),
        )
    with kept_apart():
        mdata = mudata.MuData(adatas)
    for column in obs:
        mdata.obs[column] = obs[column]
    return mdata, truth


def _negative_binomial(rng: np.random.Generator, mu: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """Poisson counts with gamma-distributed rates: mean ``mu``, variance ``mu + mu**2 / theta``."""
    return rng.poisson(mu / theta * rng.standard_gamma(theta, mu.shape, np.float32))


def _assign(rng: np.random.Generator, shares: Any, n: int) -> np.ndarray:
    """Group numbers of n cells or features in random order; sizes of groups are their shares, rounded."""
    ends = np.cumsum(shares)
    return rng.permutation(np.searchsorted(np.round(ends / ends[-1] * n), np.arange(n), side="right"))


def _groups(codes: np.ndarray, names: Any) -> Any:
    return pd.Categorical.from_codes(codes, categories=names)


def _float32(**arrays: np.ndarray) -> dict[str, np.ndarray]:
    return {name: np.asarray(array, np.float32) for name, array in arrays.items()}


def _check(accepted: str, top: float, **numbers: float) -> None:
    for what, number in numbers.items():
        if not (0 <= number <= top and np.isfinite(number)):
            raise ValueError(f"{what} must be a number {accepted}; found {number!r}")


def _shares(what: str, shares: Any) -> np.ndarray:
    array = np.asarray(list(shares), dtype=float)
    if array.ndim != 1 or not (np.isfinite(array).all() and (array >= 0).all() and array.sum() > 0):
        raise ValueError(f"{what} must be shares of at least 0, one of them above 0; found {list(shares)}")
    return array / array.sum()


def _likelihoods(modalities: Mapping[str, int], given: Mapping[str, str]) -> dict[str, str]:
    """The likelihood of each modality."""
    if not modalities:
        raise ValueError("there is no modality to draw; give at least one with its number of features")
    for name in [*given, *modalities]:
        if name not in modalities or "+" in name:
            raise ValueError(f"there is no modality {name!r} in modalities; accepted: names without '+'")
    chosen = {name: given.get(name) or LIKELIHOOD_BY_NAME.get(name.lower(), "none") for name in modalities}
    for name, likelihood in chosen.items():
        if likelihood not in STORIES:
            raise ValueError(
                f"the likelihood of modality {name!r} must be one of {', '.join(STORIES)}; found {likelihood!r}"
            )
    return chosen


def _pattern(word: str, names: list[str]) -> str:
    """The pattern with its modalities in the order of `names`."""
    parts = word.split("+")
    if not set(parts) <= set(names) or len(set(parts)) < len(parts):
        raise ValueError(f"a pattern must be some of {', '.join(map(repr, names))}, joined by '+'; found {word!r}")
    return "+".join(name for name in names if name in parts)


def _patterns(names: list[str], given: Any) -> tuple[list[str], np.ndarray, np.ndarray]:
    """The patterns, the modalities of each (patterns × modalities), and their shares."""
    if given is None:
        given = ["+".join(c) for k in range(len(names), 0, -1) for c in combinations(names, k)]
    shares = dict(given) if isinstance(given, Mapping) else dict.fromkeys(given, 1.0)
    words = [_pattern(word, names) for word in shares]
    if len(set(words)) < len(given):
        raise ValueError(f"patterns must be different; found {', '.join(map(repr, given))}")
    present = np.array([[name in word.split("+") for name in names] for word in words])
    return words, present, _shares("patterns", shares.values())


def _type_shares(
    types: Any, treated: Any, private: Mapping[str, Sequence[str]], names: list[str], words: list[str]
) -> np.ndarray:
    """Shares of the types in each pattern among controls and treated cells, shape (patterns, 2, types)."""
    if isinstance(types, int | np.integer):
        types = [1.0] * max(0, int(types))
    if isinstance(types, Mapping):
        by_pattern = {_pattern(word, names): _shares(f"types of {word!r}", own) for word, own in types.items()}
        if by_pattern.keys() != set(words):
            raise ValueError(
                f"types must have shares for the patterns {', '.join(words)}; found {', '.join(by_pattern)}"
            )
    else:
        by_pattern = dict.fromkeys(words, _shares("types", types))
    n_types = len(by_pattern[words[0]])
    second = by_pattern if treated is None else dict.fromkeys(words, _shares("treated_types", treated))
    if any(len(own) != n_types for own in [*by_pattern.values(), *second.values()]):
        raise ValueError("types and treated_types have different numbers of types; give each the same number of shares")
    shares = np.stack([[by_pattern[word], second[word]] for word in words])
    for kind, where in private.items():
        if kind not in (known := [f"type{i}" for i in range(n_types)]):
            raise ValueError(f"private must name some of the types {', '.join(known)}; found {kind!r}")
        shares[~np.isin(words, [_pattern(word, names) for word in where]), :, known.index(kind)] = 0
    if (lacking := shares.sum(2).min(1) == 0).any():
        raise ValueError(
            f"no type occurs in the pattern {words[lacking.argmax()]!r}; add the pattern to a type in private"
        )
    return shares


def _link(
    rng: np.random.Generator,
    w: dict[str, np.ndarray],
    v: dict[str, np.ndarray],
    likelihoods: Mapping[str, str],
    shares: Mapping[str, float],
    negative: float,
) -> pd.DataFrame:
    """Copy the loadings of genes to linked features, some with reversed sign, and return the table of links."""
    rna = next((name for name, likelihood in likelihoods.items() if likelihood in ("nb", "zinb")), "none")
    tables = [pd.DataFrame({"gene": [], "modality": [], "feature": [], "sign": []}, dtype=object)]
    for name, share in shares.items():
        if rna not in w or name not in w or name == rna:
            raise ValueError(f"links must be between RNA (nb or zinb) and another modality; found {rna!r} and {name!r}")
        _check("from 0 to 1", 1, **{f"the linked share of {name!r}": share})
        n, n_genes = round(share * len(w[name])), len(w[rna])
        features = np.sort(rng.choice(len(w[name]), n, replace=False))
        genes_ = rng.choice(n_genes, n, replace=n > n_genes)
        sign = 1 - 2 * _assign(rng, [1 - negative, negative], n)
        for weights in (w, v):
            weights[name][features] = sign[:, None] * weights[rna][genes_]
        table = {"gene": [f"{rna}_{i}" for i in genes_], "modality": name}
        tables.append(pd.DataFrame(table | {"feature": [f"{name}_{i}" for i in features], "sign": sign}))
    return pd.concat(tables, ignore_index=True).astype({"sign": int})
