"""MOFA+ (Argelaguet et al. 2020; mofapy2): 15 factors on log-normalised values, batch means removed.

Cells without a view have missing values. Removing known technical factors first is what its authors recommend. The
latents of hidden measurements are posterior means of the factors given the weights and the noise that were learnt.
"""

import numpy as np
from exchange import Answer, Given, answer, logged, unlogged
from mofapy2.run.entry_point import entry_point


def fit(given: Given) -> Answer:
    """Fit the factors, with defaults except for their number, and predict."""
    row = {cell: i for i, cell in enumerate(given.cells)}
    names = list(given.shown)
    values, means = {}, {}
    for name, table in given.shown.items():
        own, batch = logged(name, table), np.array(table.batch)
        means[name] = {b: own[batch == b].mean(axis=0) for b in np.unique(batch)}
        whole = np.full((len(given.cells), own.shape[1]), np.nan)
        whole[[row[cell] for cell in table.cells]] = own - np.array([means[name][b] for b in batch])
        values[name] = whole
    model = entry_point()
    model.set_data_options(scale_views=False)
    model.set_data_matrix([[values[name]] for name in names], views_names=names, samples_names=[given.cells])
    model.set_model_options(factors=15)
    model.set_train_options(iter=given.epochs or 1000, seed=given.seed, verbose=False, quiet=True)
    model.build()
    model.run()
    expected = model.model.getExpectations()
    factors = np.asarray(expected["Z"]["E"])
    weights = {name: np.asarray(w["E"]) for name, w in zip(names, expected["W"], strict=True)}
    noise = {name: np.asarray(t["E"]).mean(axis=0) for name, t in zip(names, expected["Tau"], strict=True)}
    result: Answer = {"latent": factors}
    for name, table in given.hidden.items():
        overall = np.mean(list(means[name].values()), axis=0)
        mean = np.array([means[name].get(b, overall) for b in table.batch])
        w, tau = weights[name], noise[name][:, None]
        precision = (w * tau).T @ w + np.eye(w.shape[1])
        result[f"hidden_{name}"] = np.linalg.solve(precision, ((logged(name, table) - mean) @ (w * tau)).T).T
        rows = [row[cell] for cell in table.cells]
        result[f"imputed_{name}"] = unlogged(name, factors[rows] @ w.T + mean)
    return result


answer(fit)
