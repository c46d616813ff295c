import tracemalloc

import anndata
import mudata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse, stats
from sklearn.metrics import roc_auc_score

from pyromosaic import Mosaic, MultiVI
from pyromosaic.data import ModalitySchema, ModalitySpec
from pyromosaic.data.modality import Modality
from pyromosaic.tasks import Question, compare, compare_groups, contrasts, estimate_delta
from pyromosaic.tasks.differential import Contrast, observed

N_CELLS, N_CHANGED = 280, 24
EFFECTS = {"rna": np.zeros(120), "atac": np.zeros(60), "adt": np.zeros(20)}
for _effect in EFFECTS.values():
    _n = min(N_CHANGED, len(_effect) // 2)
    _effect[:_n] = np.resize([1, -1], _n)


def simulate(seed: int = 0) -> mudata.MuData:
    """Two types in two batches; features with an effect of 1 or -1 change between the types, in either direction."""
    rng = np.random.default_rng(seed)
    kind, batch = np.arange(N_CELLS) % 2, rng.integers(2, size=N_CELLS)
    sign = np.where(kind == 1, 0.5, -0.5)[:, None]

    def counts(name, mean, fold):
        return rng.poisson(mean * np.exp2(fold * sign * EFFECTS[name]) * rng.gamma(6, 1 / 6, (N_CELLS, 1)))

    rna = counts("rna", rng.gamma(2, 1, 120) + 0.5, 2.5)
    atac = rng.random((N_CELLS, 60)) < rng.uniform(0.3, 0.6, 60) + 0.5 * sign * EFFECTS["atac"]
    adt = counts("adt", rng.gamma(4, 5, 20) + 5, 3.0) + 1
    obs = pd.DataFrame(
        {"batch": np.array(["a", "b"])[batch], "type": np.array(["T", "B"])[kind], "number": kind + 1},
        [f"c{i}" for i in range(N_CELLS)],
    )
    obs["known"] = obs["type"].where(np.arange(N_CELLS) % 5 > 0)
    pattern = rng.choice([1, 2, 4, 7, 5, 3], N_CELLS)
    pattern[atac.sum(1) == 0] = 1
    return mudata.MuData(
        {
            name: anndata.AnnData(
                sparse.csr_matrix(x[pattern >> i & 1 == 1].astype(np.float32)),
                obs=obs[pattern >> i & 1 == 1],
                var=pd.DataFrame(index=[f"{name}{j}" for j in range(x.shape[1])]),
            )
            for i, (name, x) in enumerate({"rna": rna, "atac": atac, "adt": adt}.items())
        }
    )


@pytest.fixture(scope="module")
def data():
    return simulate()


@pytest.fixture(scope="module")
def mosaic(data):
    return Mosaic.from_mudata(data, batch_key="batch")


@pytest.fixture(scope="module")
def trained(mosaic):
    model = MultiVI(mosaic, n_latent=4, n_hidden=32, mmd=5.0)
    # So few features say little of a cell; with posteriors as wide as they should be, `delta=None` finds nothing sure.
    options = {"batch_size": 64, "kl_warmup_epochs": 20, "learning_rate": 5e-3, "sleep_steps": 0}
    model.train(60, **options, progress_bar=False, accelerator="cpu")
    return model


def changed(table: pd.DataFrame, modality: str) -> np.ndarray:
    return EFFECTS[modality][[int(name.removeprefix(modality)) for name in table.index]]


# Pairs of draws


@pytest.fixture
def pairs():
    rng = np.random.default_rng(0)
    level = np.exp2(np.linspace(-3, 3, 25))
    return rng.gamma(4, 0.25, (400, 25)) * level, rng.gamma(4, 0.25, (400, 25))


@pytest.mark.parametrize("scale, prefix, delta", [("log2", "lfc", 0.25), ("difference", "difference", 0.05)])
def test_change_equals_the_formulas(pairs, scale, prefix, delta):
    first, second = pairs
    c = 0.01
    table = compare(first, second, pseudocount=c, scale=scale)
    x = np.log2(first + c) - np.log2(second + c) if scale == "log2" else first - second
    n_up, n_down = (np.count_nonzero(y >= delta, axis=0) for y in (x, -x))
    p = np.maximum(n_up, n_down) / 400
    expected = pd.DataFrame(
        {
            "probability": p,
            "bayes_factor": np.log((p + 1e-8) / (1 - p + 1e-8)),
            f"{prefix}_mean": x.mean(0),
            f"{prefix}_median": np.median(x, axis=0),
            f"{prefix}_sd": x.std(0),
            f"{prefix}_low": np.quantile(x, 0.05, axis=0),
            f"{prefix}_high": np.quantile(x, 0.95, axis=0),
            "delta": delta,
        }
    )
    pd.testing.assert_frame_equal(table.sort_index().drop(columns="is_significant"), expected, check_names=False)
    assert (np.diff(table["probability"]) <= 0).all()
    stricter = compare(first, second, pseudocount=c, scale=scale, delta=2.0)
    assert (stricter["probability"] <= table["probability"].reindex(stricter.index)).all()
    assert stricter["delta"].eq(2.0).all() and stricter["probability"].min() < table["probability"].min() - 0.1


def test_vanilla_is_the_probability_of_being_larger(pairs):
    first, second = pairs
    first[:, 3] = second[:, 3]
    table = compare(first, second, mode="vanilla").sort_index()
    p = (first > second).mean(0)
    p[3] = 0.5  # neither is larger
    np.testing.assert_allclose(table["probability"], p)
    np.testing.assert_allclose(table["bayes_factor"], np.log((p + 1e-8) / (1 - p + 1e-8)))
    swapped = compare(second, first, mode="vanilla").sort_index()
    np.testing.assert_allclose(swapped["probability"], 1 - p)
    np.testing.assert_array_equal(swapped["is_significant"], table["is_significant"])
    assert table["is_significant"].any() and not table["is_significant"].all()


@pytest.mark.parametrize("mode", ["change", "vanilla"])
@pytest.mark.parametrize("fdr", [0.001, 0.05, 0.2, 0.4])
def test_calls_are_the_longest_list_with_few_expected_mistakes(mode, fdr):
    rng = np.random.default_rng(1)
    centre = rng.normal(0, 1, 60)
    table = compare(rng.normal(centre, 1, (200, 60)), np.zeros((200, 60)), mode=mode, scale="difference", fdr=fdr)
    sure = table["probability"].to_numpy()
    if mode == "vanilla":
        sure = np.maximum(sure, 1 - sure)
    assert (np.diff(sure) <= 0).all()
    lengths = [n for n in range(61) if n == 0 or (1 - np.sort(sure)[::-1][:n]).mean() <= fdr + 1e-12]
    assert table["is_significant"].to_numpy().tolist() == [i < max(lengths) for i in range(60)]


def test_features_that_are_equally_sure_are_sorted_by_their_effect():
    first = np.exp2(np.tile([1.0, 3.0, -5.0, 2.0], (10, 1)))
    table = compare(first, np.ones((10, 4)), features=["a", "b", "c", "d"])
    assert list(table.index) == ["c", "b", "d", "a"] and table["probability"].eq(1).all()


@pytest.mark.parametrize("fdr", [0.05, 0.1, 0.2])
def test_calls_from_a_correct_posterior_hold_their_level(fdr):
    """Normal effects seen with normal noise: the exact posterior is known, and small or opposite effects are null."""
    rng = np.random.default_rng(2)
    tau, noise, delta, shares, n_calls = 0.5, 0.25, 0.25, [], 0
    for _ in range(12):
        effect = rng.normal(0, tau, 1000)
        seen = effect + rng.normal(0, noise, 1000)
        shrink = tau**2 / (tau**2 + noise**2)
        posterior = rng.normal(shrink * seen, np.sqrt(shrink) * noise, (600, 1000))
        base = rng.normal(-3, 1, 1000)
        table = compare(np.exp2(base + posterior), np.exp2(base) * np.ones((600, 1)), pseudocount=0.0, fdr=fdr)
        called = table[table["is_significant"]]
        false = effect[called.index] * np.sign(called["lfc_mean"]) < delta
        shares.append(false.mean())
        n_calls += len(called)
    error = np.std(shares) / np.sqrt(len(shares))
    assert np.mean(shares) <= fdr + 3 * error and n_calls > 12 * 100
    assert np.mean(shares) >= 0.7 * fdr, "and the level is made use of"


def test_no_calls_where_nothing_changes_however_much_cells_differ():
    rng = np.random.default_rng(3)
    first, second = (np.exp2(rng.normal(0, 3, (2000, 300))) for _ in range(2))
    table = compare(first, second)
    assert not table["is_significant"].any() and table["probability"].max() < 0.55


def test_estimated_delta_is_six_tenths_of_the_outer_means():
    rng = np.random.default_rng(4)
    effects = np.concatenate([rng.normal(0, 0.1, 800), rng.normal(2, 0.2, 100), rng.normal(-3, 0.2, 100)])
    assert estimate_delta(effects) == pytest.approx(0.6 * 2.5, rel=0.03)
    assert estimate_delta(effects / 1000) == 0.1 and estimate_delta(effects / 1000, "difference") == 0.02
    assert estimate_delta(np.zeros(10)) == 0.1
    first = np.exp2(effects + rng.normal(0, 0.1, (50, 1000)))
    table = compare(first, np.ones_like(first), delta=None)
    assert table["delta"].unique() == pytest.approx([1.5], rel=0.03)
    with pytest.raises(ValueError, match="at least 3 features; found 2"):
        compare(first[:, :2], first[:, :2], delta=None)


def test_wrong_pairs_get_a_sentence():
    x = np.ones((4, 3))
    for call, message in [
        (lambda: compare(x, x[:3]), r"found \(4, 3\) and \(3, 3\)"),
        (lambda: compare(x[0], x[0]), "pairs × features"),
        (lambda: compare(x[:0], x[:0]), "at least one of each"),
        (lambda: compare(x, x, features=["a"]), "1 feature names for 3 features"),
        (lambda: compare(x, x * np.nan), "finite numbers"),
        (lambda: compare(x, -x), "values above 0"),
        (lambda: compare(x, 0 * x, pseudocount=0.0), "values above 0"),
        (lambda: compare(x, x, pseudocount=-0.5), "pseudocount must be a number from 0"),
        (lambda: compare(x, x, scale="ratio"), "'log2' or 'difference'; found 'ratio'"),
        (lambda: compare(x, x, mode="vanilla", delta=0.5), "delta has no effect in mode 'vanilla'; found 0.5"),
        (lambda: compare(x, x, mode="both"), "'change' or 'vanilla'; found 'both'"),
        (lambda: compare(x, x, delta=0.0), "a number above 0"),
        (lambda: compare(x, x, delta=np.nan), "a number above 0"),
        (lambda: compare(x, x, delta="auto"), "found 'auto'"),
        (lambda: compare(x, x, fdr=0.0), "fdr must be a number between 0 and 1"),
        (lambda: compare(x, x, fdr=1.0), "fdr must be a number between 0 and 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


# Cells drawn from groups


def modality(n_features, likelihood="nb", batches=()):
    spec = ModalitySpec(likelihood, batch_key="batch" if batches else None)
    features = tuple(f"g{i}" for i in range(n_features))
    schema = ModalitySchema(spec, features, {"batch": tuple(batches)} if batches else {}, library=1000.0)
    return Modality("rna", schema, None, np.full(100, -1), *np.zeros((4, 100)), False)


@pytest.mark.parametrize("batch_correction", [False, True])
def test_cells_are_drawn_with_replacement_and_batches_are_paired(batch_correction, monkeypatch):
    monkeypatch.setattr("pyromosaic.tasks.differential.PORTION", 30)  # without it, 50 portions a batch
    calls = {1: [], 2: []}

    def draw(side):
        def one_side(cells, batch, seed, shared):
            calls[side].append((cells, batch, seed, shared))
            return np.ones((len(cells), 4))

        return one_side

    contrast = Contrast("x", "y", np.arange(7), np.arange(50, 90))
    table = compare_groups(
        contrast, draw(1), draw(2), modality(4, batches="abc"), batch_correction=batch_correction, n_samples=2000
    )
    assert len(table) == 4
    for side, cells in ((1, contrast.cells1), (2, contrast.cells2)):
        drawn = np.concatenate([c for c, *_ in calls[side]])
        assert len(drawn) == (2001 if batch_correction else 2000), "as many pairs in each batch"
        numbers = pd.Series(drawn).value_counts()
        assert set(numbers.index) == set(cells)
        assert stats.chisquare(numbers).pvalue > 1e-3
    assert [b for _, b, *_ in calls[1]] == [b for _, b, *_ in calls[2]]
    expected = [None] * 67 if not batch_correction else ["a"] * 48 + ["b"] * 48 + ["c"] * 48  # of 30, and of 14 pairs
    assert [b for _, b, *_ in calls[1]] == expected
    seeds = [seed for side in calls.values() for *_, seed, _ in side]
    assert len(set(seeds)) == len(seeds), "no two portions share their noise"
    shared = [[call[-1] for call in side] for side in calls.values()]
    assert shared[0] == shared[1] and len(set(shared[0])) == len(shared[0]), "both cells of a pair share the weights"


def test_averages_over_batches():
    """An effect in one of two batches is a change in half of the pairs; in both, in all of them."""

    def draw(level):
        return lambda cells, batch, seed, shared: np.tile([level if batch == "a" else 0.001, level], (len(cells), 1))

    contrast = Contrast("x", "y", np.arange(5), np.arange(5, 10))
    table = compare_groups(
        contrast, draw(0.01), draw(0.001), modality(2, batches="ab"), batch_correction=True, n_samples=100
    )
    assert table["probability"].to_dict() == {"g1": 1.0, "g0": 0.5}


def test_only_the_effects_are_held(monkeypatch):
    monkeypatch.setattr("pyromosaic.tasks.differential.PORTION", 50)
    monkeypatch.setattr("pyromosaic.tasks.differential.BLOCK", 500_000)

    def draw(cells, batch, seed, shared):
        return np.random.default_rng(seed).random((len(cells), 4000), dtype=np.float32)

    contrast = Contrast("x", "y", np.arange(50), np.arange(50, 100))
    tracemalloc.start()
    compare_groups(contrast, draw, draw, modality(4000), n_samples=2000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.7 * 4 * 2000 * 4000, "4 bytes a pair and feature, and not twice that"


# A trained model


@pytest.mark.parametrize("name, prefix", [("rna", "lfc"), ("atac", "difference"), ("adt", "lfc")])
def test_planted_changes_are_found(trained, name, prefix):
    table = trained.differential("type", "B", "T", modality=name, n_samples=1000)
    effect = changed(table, name)
    assert len(table) == len(effect) and table.index.is_unique
    assert roc_auc_score(effect != 0, table["probability"]) > 0.9
    called = table["is_significant"].to_numpy()
    real = called & (effect != 0)
    assert real.sum() > 0.3 * (effect != 0).sum()
    assert (np.sign(table[f"{prefix}_mean"]) == effect)[real].mean() > 0.95
    clear = trained.differential("type", "B", "T", modality=name, n_samples=1000, delta=None)
    called = clear["is_significant"].to_numpy()
    assert called.sum() > 0.3 * (effect != 0).sum() and (changed(clear, name) == 0)[called].mean() <= 0.1
    swapped = trained.differential("type", "T", "B", modality=name, n_samples=1000)
    np.testing.assert_allclose(
        swapped[f"{prefix}_mean"].reindex(table.index), -table[f"{prefix}_mean"], atol=0.2 if prefix == "lfc" else 0.03
    )


def test_whole_protein_counts_change_where_foreground_and_background_trade_places(trained):
    foreground, whole = (
        trained.differential("type", "B", "T", modality="adt", n_samples=1000, protein_foreground=not b)
        for b in (False, True)
    )
    effect = changed(whole, "adt")
    assert whole["is_significant"][effect != 0].all() and not whole["is_significant"][effect == 0].any()
    fold = np.log2((whole["normalized_mean1"] + 1) / (whole["normalized_mean2"] + 1))
    np.testing.assert_allclose(whole["lfc_mean"], fold, atol=0.35)
    assert (foreground["lfc_mean"].reindex(whole.index) - fold).abs().max() > 0.5
    with pytest.raises(ValueError, match="protein_foreground has no effect on modality 'rna'"):
        trained.differential("type", "B", protein_foreground=True)


@pytest.mark.parametrize("name", ["rna", "atac", "adt"])
def test_groups_at_random_give_no_calls(trained, mosaic, name):
    for seed in range(3):
        cells = np.random.default_rng(seed).permutation(mosaic.n_cells)[: mosaic.n_cells // 2]
        table = trained.differential(cells1=cells, modality=name, n_samples=1000, seed=seed)
        assert table["is_significant"].sum() <= 0.02 * len(table)


def test_cells_in_which_the_modality_was_never_measured(trained, mosaic):
    lacking = mosaic.obs_names[~mosaic.presence["adt"]]
    kind = mosaic.column("type")[lacking]
    groups = {"cells1": lacking[kind == "B"], "cells2": lacking[kind == "T"]}
    table = trained.differential(**groups, modality="adt", n_samples=1000)
    seen = [f"{word}{side}" for side in (1, 2) for word in ("raw_mean", "nonzero_share", "normalized_mean")]
    assert table[seen].isna().all().all() and np.isfinite(table["probability"]).all()
    assert roc_auc_score(changed(table, "adt") != 0, table["probability"]) > 0.9
    elsewhere = trained.differential("type", "B", "T", modality="adt", n_samples=1000).reindex(table.index)
    assert stats.spearmanr(table["lfc_mean"], elsewhere["lfc_mean"]).statistic > 0.9


def test_observed_data_stand_beside(trained, mosaic, data):
    table = trained.differential("type", "B", "T", modality="rna", n_samples=10)
    counts, types = data["rna"].to_df(), data["rna"].obs["type"]
    sizes = counts.sum(axis=1)
    for side, kind in ((1, "B"), (2, "T")):
        own = counts[types == kind]
        scaled = own.div(sizes[own.index], axis=0) * sizes.median()
        for column, expected in [
            ("raw_mean", own.mean()),
            ("nonzero_share", (own > 0).mean()),
            ("normalized_mean", scaled.mean()),
        ]:
            np.testing.assert_allclose(table[f"{column}{side}"], expected[table.index], rtol=1e-5)
    some = observed(mosaic.modalities["rna"], mosaic.find(None), np.array([3, 1]))
    assert list(some.index) == ["rna3", "rna1"]
    np.testing.assert_allclose(some["raw_mean"], counts[["rna3", "rna1"]].mean(), rtol=1e-5)


def test_observed_data_do_not_depend_on_how_they_are_stored(mosaic, data, monkeypatch):
    monkeypatch.setattr("pyromosaic.tasks.differential.CHUNK", 17)
    dense = {name: anndata.AnnData(a.X.toarray(), a.obs, a.var) for name, a in data.mod.items()}
    stored = Mosaic.from_anndata(dense, match_cells=True, batch_key="batch")
    cells = mosaic.obs_names[::3]
    for name in dense:
        tables = [
            observed(m.modalities[name], m.find(cells), np.arange(m.schema[name].n_features)) for m in (mosaic, stored)
        ]
        pd.testing.assert_frame_equal(*tables)


def test_every_group_against_the_rest(trained):
    table = trained.differential("type", n_samples=50, delta=None)
    assert list(dict.fromkeys(table["comparison"])) == ["B vs rest", "T vs rest"] and len(table) == 240
    assert table.groupby("comparison")["delta"].nunique().eq(1).all()
    for group in ("B", "T"):
        block = table[table["group1"] == group]
        pd.testing.assert_frame_equal(block, trained.differential("type", group, n_samples=50, delta=None))
    against = trained.differential("type", "B", "T", n_samples=50, delta=None)
    assert against["group2"].eq("T").all()
    columns = ["probability", "lfc_mean", "raw_mean2"]
    pd.testing.assert_frame_equal(against[columns], table[table["group1"] == "B"][columns])


def test_groups_may_be_given_in_any_way(mosaic):
    by_name = contrasts(mosaic, "type", "B")[0]
    mask = (mosaic.column("type") == "B").to_numpy()
    for cells in (mask, np.flatnonzero(mask), mosaic.obs_names[mask], np.repeat(np.flatnonzero(mask), 2)):
        contrast = contrasts(mosaic, cells1=cells)[0]
        np.testing.assert_array_equal(contrast.cells1, by_name.cells1)
        np.testing.assert_array_equal(contrast.cells2, by_name.cells2)
    by_number = contrasts(mosaic, "number", 2, 1)[0]
    np.testing.assert_array_equal(by_number.cells1, by_name.cells1)
    known = contrasts(mosaic, "known", "B")[0]
    assert len(known.cells1) + len(known.cells2) == mosaic.column("known").notna().sum() < mosaic.n_cells


def test_features_are_a_part_of_the_whole(trained):
    whole = trained.differential("type", "B", n_samples=1500)
    part = trained.differential("type", "B", n_samples=1500, features=["rna7", "rna50", "rna7"])
    assert sorted(part.index) == ["rna50", "rna7"]
    assert (part["nonzero_share1"] == whole.loc[part.index, "nonzero_share1"]).all()
    drop = ["is_significant"]  # which depends on the other features
    pd.testing.assert_frame_equal(part.drop(columns=drop), whole.loc[part.index].drop(columns=drop))


def test_the_answer_depends_on_the_seed_alone(trained):
    tables = []
    for state in (1, 2):
        np.random.seed(state)  # noqa: NPY002
        tables.append(trained.differential("type", "B", n_samples=200, batch_correction=True, seed=3))
    pd.testing.assert_frame_equal(*tables)
    other = trained.differential("type", "B", n_samples=200, batch_correction=True, seed=4).reindex(tables[0].index)
    assert not np.allclose(other["lfc_mean"], tables[0]["lfc_mean"], atol=1e-4)


def test_repeated_cells_have_draws_of_their_own(trained, mosaic):
    """From one cell a side, the spread over pairs is that of the two posteriors and of the weights they share."""
    cells = mosaic.obs_names[mosaic.patterns == "rna"]
    table = trained.differential(cells1=cells[:1], cells2=cells[1:2], n_samples=1500).sort_index()

    def effects(**options):
        question = Question("rna", lambda d: d.mean, cells[:2], library=1.0, n_samples=400, seed=9, **options)
        draws = np.concatenate([chunk.numpy() for chunk in trained._answers(question)], axis=1)
        return np.log2(draws + 0.01 / mosaic.schema["rna"].library)

    names = np.array(mosaic.schema["rna"].features)
    apart = pd.Series(np.sqrt(effects().var(0).sum(0)), names).sort_index()  # of the trained weights
    assert (apart < table["lfc_sd"]).mean() > 0.9
    first, second = effects(weights=7).transpose(1, 0, 2)  # draws of weights that the two cells share
    expected = pd.Series((first - second).std(0), names).sort_index()
    assert (expected > 1e-3).all()
    np.testing.assert_allclose(table["lfc_sd"], expected, rtol=0.35)  # from fifty draws of weights
    np.testing.assert_allclose(table["lfc_sd"].mean(), expected.mean(), rtol=0.05)


def test_batches_are_corrected(data):
    """A gene that follows the batch is no marker of a group that lies mostly in one batch, once batches are paired."""
    rna = data["rna"].copy()
    is_a = (rna.obs["batch"] == "a").to_numpy()
    x = rna.X.toarray()
    x[:, 100] = np.random.default_rng(0).poisson(np.where(is_a, 40.0, 4.0))
    rna.X = sparse.csr_matrix(x)
    rng = np.random.default_rng(1)
    rna.obs["group"] = np.where(is_a == (rng.random(len(is_a)) < 0.9), "x", "y")
    mosaic = Mosaic.from_anndata({"rna": rna}, batch_key="batch")
    model = MultiVI(mosaic, n_latent=4, n_hidden=32)
    model.train(60, batch_size=64, kl_warmup_epochs=20, learning_rate=5e-3, progress_bar=False, accelerator="cpu")
    own, corrected = (
        model.differential("group", "x", "y", n_samples=1000, batch_correction=b).loc["rna100"] for b in (False, True)
    )
    assert own["probability"] > 0.7 and own["lfc_mean"] > 1.5
    assert abs(corrected["lfc_mean"]) < 0.5 * own["lfc_mean"] and not corrected["is_significant"]


def test_wrong_questions_get_a_sentence(trained, mosaic, data):
    one_type = np.flatnonzero(mosaic.column("type") == "B")
    unbatched = Mosaic.from_mudata(data)
    alone = data["rna"].copy()
    alone.obs["same"] = "x"
    single = Mosaic.from_anndata({"rna": alone}, batch_key="batch")
    everything = np.ones(mosaic.n_cells, dtype=bool)
    for arguments, message in [
        ({}, "either by groupby .* or by cells1"),
        ({"groupby": "type", "cells1": one_type}, "either by groupby .* or by cells1"),
        ({"cells1": one_type, "group2": "T"}, "either by groupby .* or by cells1"),
        ({"cells2": one_type}, "either by groupby .* or by cells1"),
        ({"groupby": "type", "group2": "T"}, "a second group needs a first one"),
        ({"groupby": "type", "group1": "B", "cells2": one_type}, "a second group needs a first one"),
        ({"groupby": "tissue"}, "no obs has a column 'tissue'"),
        ({"groupby": "type", "group1": "NK"}, "column 'type' has no value 'NK'; it has 'B', 'T'"),
        ({"groupby": "type", "group1": "B", "group2": "NK"}, "no value 'NK'"),
        ({"groupby": "batch", "group1": "z"}, "column 'batch' has no value 'z'; it has 'a', 'b'"),
        ({"groupby": "type", "group1": "B", "group2": "B"}, "groups overlap: cell 'c"),
        ({"cells1": one_type, "cells2": one_type[-1:]}, "groups overlap: cell 'c"),
        ({"cells1": one_type, "cells2": []}, "cells must be .*; found none"),
        ({"cells1": ~everything}, "cells must be .*; found none"),
        ({"cells1": everything}, "group 'rest' has no cell"),
        ({"cells1": ["nobody"]}, "'nobody' is not in the mosaic"),
        ({"groupby": "type", "features": ["CD4"]}, "feature 'CD4' is not in modality 'rna'"),
        ({"groupby": "type", "features": []}, "features must be names or a mask with at least one feature; found none"),
        ({"groupby": "type", "n_samples": 0}, "n_samples must be a whole number from 1 to 1e9; found 0"),
        ({"groupby": "type", "fdr": 1.5}, "fdr must be a number between 0 and 1; found 1.5"),
        ({"groupby": "type", "delta": -1.0}, "delta must be a number above 0"),
        ({"groupby": "type", "mode": "t-test"}, "'change' or 'vanilla'; found 't-test'"),
    ]:
        with pytest.raises(ValueError, match=message):
            trained.differential(**arguments)
    with pytest.raises(KeyError, match="no modality 'protein'"):
        trained.differential("type", modality="protein")
    with pytest.raises(ValueError, match="group 'rest' has no cell to compare 'x' with"):
        contrasts(single, "same")
    with pytest.raises(ValueError, match="has no batch_key"):
        MultiVI(unbatched).differential("type", batch_correction=True)
