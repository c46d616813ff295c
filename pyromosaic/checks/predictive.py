"""Predictive checks: whether data drawn from a model resemble the observed data."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch
from pyro import poutine
from torch import Tensor

from pyromosaic.accepted import Count, Seed, checked
from pyromosaic.checks.cells import BLOCK, blocks
from pyromosaic.data import Minibatch, Mosaic
from pyromosaic.measurement import encoded_once, part_of
from pyromosaic.models.mosaic_model import Cells, MosaicModel
from pyromosaic.nn import log_scale
from pyromosaic.tasks import inference_mode
from pyromosaic.tasks.prediction import run
from pyromosaic.train.drawn import draw_prior, shared_variables, without_penalties

N_LEADING = 10  # features per modality whose correlations are compared if no links are given
SIZE_LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)

Key = tuple[str, str]  # modality (or two, joined by " ~ ") and statistic


@dataclass(frozen=True)
class PredictiveCheck:
    """Statistics of the data, compared with the same statistics of data drawn from the model.

    Parameters
    ----------
    table
        By ``modality``, ``statistic`` and ``name`` (of a feature, of a pair of features, or a quantile): ``observed``;
        ``mean``, ``lower`` and ``upper``, the mean and the 5 % and 95 % quantiles over the draws; and ``p_value``,
        two-sided.
    overall
        By ``modality`` and ``statistic``: ``p_value``, for the distance of all values of the statistic together from
        those of the draws; ``outside``, the share of values outside their 90 % intervals; and ``n``, their number.
    prior
        Whether the draws are from the prior.
    n_samples
        Number of draws. The smallest possible p-value is 1 / (n_samples + 1).
    """

    table: pd.DataFrame
    overall: pd.DataFrame
    prior: bool
    n_samples: int


@checked
def predictive_check(
    model: MosaicModel,
    cells: Cells = None,
    *,
    prior: bool = False,
    links: pd.DataFrame | None = None,
    n_samples: Count = 99,
    data: Mosaic | None = None,
    seed: Seed = 0,
) -> PredictiveCheck:
    """Compare the data with data drawn from the model, by statistics of every modality.

    The statistics are the ``mean``, the ``variance`` and the share of ``zeros`` of each feature; the quantiles of the
    cells' ``size`` (their counts, or open regions); for antibodies the ``background``, the share of cells with no more
    counts than the mean background learnt for their batch and size; and between modalities the ``correlation`` of pairs
    of features, and of sizes, over cells that have both. Real values have no zeros and sizes. Correlations use log(1 +
    count), open regions as 0 and 1, and real values as they are.

    Parameters
    ----------
    model
        The model.
    cells
        Names, positions or a mask; None for all.
    prior
        Draw the latent variables of the cells from their prior instead of their posterior. In both cases, parameters
        and latent variables that all cells share are as learnt.
    links
        Pairs of features whose correlations to compare, with a column for each modality; features that the model does
        not have are skipped. By default, all pairs of the 10 most variable features of each modality.
    n_samples
        Number of draws.
    data
        Cells other than the training data.
    seed
        Seed of the draws.

    Returns
    -------
    PredictiveCheck
        For figures, see `pyromosaic.plot.predictive_checks`.

    Raises
    ------
    ValueError
        If a modality is measured in only one of the cells, or `links` have no pair of features of the model.

    Notes
    -----
    The draws have the same modalities, covariates and sizes as the cells. The size of a cell is treated as known
    wherever the model treats it as known, and in all draws from the posterior; sums of drawn counts vary around it.

    Data that come from the model have uniform p-values against the prior, apart from the effect of parameters learnt
    from the same data. The posterior has seen the data; against it, p-values of a correct model are closer to 0.5 than
    uniform ones. Therefore small ones are stronger evidence (Meng 1994). They test model and guide together: a guide
    that is far from the posterior fails the check even if the model is correct; see `simulation_based_calibration`.
    Values of one statistic depend on each other. To judge them together, see `PredictiveCheck.overall`, whose distance
    is the mean square of standardised values.

    References
    ----------
    Gelman, Meng and Stern, Posterior predictive assessment of model fitness via realized discrepancies, 1996; Meng,
    Posterior predictive p-values, 1994.

    Examples
    --------
    >>> from pyromosaic import Mosaic, MultiVI, checks, simulate
    >>> model = MultiVI(Mosaic.from_mudata(simulate(200, {"rna": 50, "adt": 5})[0]), n_latent=3)
    >>> check = checks.predictive_check(model, n_samples=9)
    >>> check.overall.loc["adt"].index.tolist()
    ['background', 'mean', 'size', 'variance', 'zeros']
    """
    mosaic = model._data(data)
    index = mosaic.find(cells)
    pairs = _pairs(model, mosaic, index, links)
    totals: list[dict[Key, Any]] = [{} for _ in range(n_samples + 1)]  # the data first
    with inference_mode(model.model, model.guide, seed=seed), without_penalties(model.guide):
        for minibatch in blocks(model, mosaic, index, 4 * BLOCK):
            views = minibatch.decoded
            asked = Minibatch(
                minibatch.index,
                minibatch.n_cells,
                minibatch.observed,
                {name: replace(view, counts=None) for name, view in views.items()},
                minibatch.groups,
            )
            shared = shared_variables(model.guide, asked) if prior else None
            with encoded_once(model.guide):
                for i, total in enumerate(totals):
                    if i == 0:
                        drawn = {name: view.dense_counts() for name, view in views.items()}
                    else:
                        if shared is None:
                            found = run(model.model, model.guide, asked, latent_at_mean=False, drawn=True)
                        else:
                            found = draw_prior(model.model, minibatch, shared)
                        drawn = {name: found.nodes[name]["value"] for name in views}
                    _add(total, model, minibatch, drawn, pairs)
    found_by_draw = [_statistics(total) for total in totals]
    keys = sorted(found_by_draw[0])  # a sorted index is fast in pandas
    values = {key: np.stack([found[key] for found in found_by_draw]) for key in keys}
    tables, overall = {}, {}
    for key, of_key in values.items():
        names = pairs[key[0]][2] if key[1] == "correlation" else _names(key, model)
        tables[key] = _compare(of_key, names)
        outside = (of_key[0] < tables[key]["lower"]) | (of_key[0] > tables[key]["upper"])
        overall[key] = (_overall(of_key), outside.mean(), len(names))
    levels = ["modality", "statistic"]
    index_ = pd.MultiIndex.from_tuples(list(overall), names=levels)
    summary = pd.DataFrame(list(overall.values()), index_, ["p_value", "outside", "n"]).sort_index()
    return PredictiveCheck(pd.concat(tables, names=[*levels, "name"]), summary, prior, n_samples)


Pairs = dict[str, tuple[Tensor, Tensor, list[str]]]  # by two modalities: feature numbers, names of the pairs


def _pairs(model: MosaicModel, mosaic: Mosaic, index: np.ndarray, links: pd.DataFrame | None) -> Pairs:
    """Pairs of features by pair of modalities that share cells."""
    pairs: Pairs = {}
    for a, b in combinations(model.schema.modalities, 2):
        if (mosaic.modalities[a].present[index] & mosaic.modalities[b].present[index]).sum() < 2:
            continue
        if links is None:
            first, second = np.meshgrid(*(_leading(mosaic, name) for name in (a, b)), indexing="ij")
        elif a in links and b in links:
            first, second = (
                pd.Index(model.schema[name].features).get_indexer(pd.Index(links[name]).astype(str)) for name in (a, b)
            )
            first, second = first[(first >= 0) & (second >= 0)], second[(first >= 0) & (second >= 0)]
        else:
            continue
        i, j = np.ravel(first), np.ravel(second)
        features = (np.asarray(model.schema[name].features, dtype=object) for name in (a, b))
        names = [f"{x} ~ {y}" for x, y in zip(*(f[k] for f, k in zip(features, (i, j), strict=True)), strict=True)]
        if names:
            device = model._device
            pairs[f"{a} ~ {b}"] = (
                torch.as_tensor(i, device=device),
                torch.as_tensor(j, device=device),
                [*names, "size"],
            )
    if links is not None and not pairs:
        raise ValueError(
            "no pair in links has both features in the model, in modalities measured in the same cells; accepted: a "
            f"table with a column for each modality ({', '.join(model.schema.modalities)})"
        )
    return pairs


def _leading(mosaic: Mosaic, name: str) -> np.ndarray:
    """Positions of the most variable features."""
    modality = mosaic.modalities[name]
    values = log_scale(modality.tensor(modality.sample()).to_dense(), modality.spec.data_kind)
    variances = values.var(0).numpy()
    if modality.panels is not None:
        variances = np.nanvar(np.where(modality.measured(modality.sample()), values, np.nan), axis=0)
    return np.sort(np.argsort(-variances)[:N_LEADING])


@contextmanager
def _at_mean(model: MosaicModel, minibatch: Minibatch) -> Iterator[None]:
    """Context in which the global latent variables of the model's parts are at their posterior means."""
    with poutine.replay(trace=shared_variables(model.guide, minibatch)), model.model._pyro_context:
        yield


def _add(
    total: dict[Key, Any], model: MosaicModel, minibatch: Minibatch, drawn: Mapping[str, Tensor], pairs: Pairs
) -> None:
    """Add the sums over the cells of a minibatch from which the statistics are computed."""
    sums: dict[Key, Any] = {}
    whole = {}
    for name, view in minibatch.decoded.items():
        spec = model.schema[name].spec
        x = (drawn[name] > 0).double() if spec.traits.binary else drawn[name].double()
        has = torch.ones_like(x, dtype=torch.bool) if view.measured is None else view.measured
        x = x.where(has, 0.0)
        sums |= {(name, "n"): has.sum(0), (name, "sum"): x.sum(0), (name, "squares"): x.square().sum(0)}
        if spec.data_kind != "real":
            sums |= {(name, "zeros"): ((x == 0) & has).sum(0), (name, "size"): [x.sum(1)]}
        likelihood: Any = getattr(part_of(model.model, name), "likelihood", None)
        if spec.traits.background and hasattr(likelihood, "background"):
            with nullcontext() if spec.empty_droplets is None else _at_mean(model, minibatch):
                background = likelihood.cell_factor(view) * likelihood.background(view)[0].exp()
            sums[name, "background"] = ((x <= background) & has).sum(0)
        values = log_scale(torch.cat([x, x.sum(1, keepdim=True)], dim=1), spec.data_kind)
        values[:, :-1] = values[:, :-1].where(has, torch.nan)
        # Cells without the modality are NaN, and so are their products.
        whole[name] = values.new_full((len(minibatch), values.shape[1]), torch.nan).index_copy(0, view.rows, values)
    for key, (first, second, _) in pairs.items():
        a, b = key.split(" ~ ")
        if a in whole and b in whole:
            both = ~(whole[a][:, -1] + whole[b][:, -1]).isnan()
            x, y = whole[a][both][:, [*first, -1]], whole[b][both][:, [*second, -1]]
            has = ~(x + y).isnan()
            x, y = x.where(has, 0.0), y.where(has, 0.0)
            sums[key, "pairs"] = torch.stack([has.to(x), x, y, x.square(), y.square(), x * y]).sum(1)
    for k, value in sums.items():
        total[k] = total[k] + value if k in total else value


def _statistics(total: Mapping[Key, Any]) -> dict[Key, np.ndarray]:
    """Statistics by modality, each an array with one value per name."""
    found = {}
    for (name, what), value in total.items():
        if what == "n":
            if value.max() < 2:
                raise ValueError(
                    f"modality {name!r} is measured in {int(value.max())} of the cells; the check needs at least 2"
                )
            mean = total[name, "sum"] / value.clamp_min(1)
            found[name, "mean"] = mean
            found[name, "variance"] = (total[name, "squares"] - value * mean.square()) / (value - 1).clamp_min(1)
        elif what in ("zeros", "background"):
            found[name, what] = value / total[name, "n"].clamp_min(1)
        elif what == "size":
            found[name, what] = torch.quantile(torch.cat(value), torch.tensor(SIZE_LEVELS).to(value[0]))
        elif what == "pairs":
            n, x, y, xx, yy, xy = value
            n = n.clamp_min(1)  # no cell may have both
            spread = ((xx - x.square() / n).clamp_min(0) * (yy - y.square() / n).clamp_min(0)).sqrt()
            found[name, "correlation"] = torch.where(spread > 1e-9, (xy - x * y / n) / spread, 0.0)
    return {key: value.cpu().numpy() for key, value in found.items()}


def _names(key: Key, model: MosaicModel) -> list[str]:
    if key[1] == "size":
        return [f"{level:.0%}" for level in SIZE_LEVELS]
    return list(model.schema[key[0]].features)


def _compare(values: np.ndarray, names: list[str]) -> pd.DataFrame:
    """Compare each observed value, the first row, with those of the draws."""
    observed, draws = values[0], values[1:]
    place = ((draws < observed).sum(0) + 0.5 * (draws == observed).sum(0) + 0.5) / len(values)
    lower, upper = np.quantile(draws, [0.05, 0.95], axis=0)
    columns = {"observed": observed, "mean": draws.mean(0), "lower": lower, "upper": upper}
    return pd.DataFrame({**columns, "p_value": 2 * np.minimum(place, 1 - place)}, names)


def _overall(values: np.ndarray) -> float:
    """Exact p-value of the data's distance from all rows, among the distances of the draws."""
    spread = values.std(0)
    standard = (values - values.mean(0)) / np.where(spread > 0, spread, 1.0)
    distance = np.square(standard).mean(1)
    return float((distance >= distance[0]).mean())
