import numpy as np
import pandas as pd
import pytest
import torch

from pyromosaic import ContrastiveVI, DiagVI, Mosaic, MultiVI, ScModal, metrics, simulate
from pyromosaic.guidance import GuidanceGraph
from pyromosaic.models.query import carry_over


def mosaics(**options):
    """Cells of three batches to train on, and of a fourth one, with a strong effect of its own."""
    mdata, truth = simulate(
        1000, {"rna": 120, "adt": 30}, types=4, n_batches=4, batch_effect=0.6, patterns=["rna+adt"], seed=1, **options
    )
    batch = mdata.obs["batch"].astype(str)
    last = sorted(batch.unique())[-1]
    return mdata[(batch != last).to_numpy()].copy(), mdata[(batch == last).to_numpy()].copy(), last


@pytest.fixture(scope="module")
def trained():
    reference, query, last = mosaics()
    mosaic = Mosaic.from_mudata(reference, batch_key="batch", label_key="celltype")
    model = MultiVI(mosaic, n_latent=8, n_hidden=64)
    model.train(30, progress_bar=False)
    return model, reference, query, last


def test_unknown_batches_are_refused_or_averaged(trained):
    model, _, query, last = trained
    with pytest.raises(ValueError, match=f"has batch '{last}', which the model has not seen"):
        model.register(query)
    with pytest.raises(ValueError, match="new_batches must be 'refuse', 'average' or 'add'; found 'yes'"):
        model.register(query, new_batches="yes")
    mosaic = model.register(query, new_batches="average")
    assert mosaic.schema == model.schema
    for given in ("average", "add"):
        with pytest.raises(ValueError, match=f"new_batches='{given}' does not apply to a Mosaic"):
            model.register(mosaic, new_batches=given)
    with pytest.raises(ValueError, match="new_batches must be 'refuse', 'average' or 'add'; found 'yes'"):
        model.register(mosaic, new_batches="yes")
    assert (mosaic.modalities["rna"].codes[:, 0] == -1).all()
    assert np.isfinite(model.get_latent_representation(data=mosaic)).all(axis=None)
    assert np.isfinite(model.get_imputed_values("adt", data=mosaic, n_samples=2).mean).all(axis=None)


def test_data_registered_otherwise_say_what_differs(trained):
    model, reference, _, _ = trained
    others = {
        "label_key of modality 'rna' is None instead of 'celltype'": Mosaic.from_mudata(reference, batch_key="batch"),
        "likelihood of modality 'rna' is 'zinb' instead of 'nb'": Mosaic.from_mudata(
            reference, {"rna": "zinb", "adt": "nb_mixture"}, batch_key="batch", label_key="celltype"
        ),
        "features of modality 'rna': other values": Mosaic.from_anndata(
            {"rna": reference["rna"][:, :100].copy(), "adt": reference["adt"].copy()},
            match_cells=True,
            batch_key="batch",
            label_key="celltype",
        ),
        "the modalities are rna instead of rna, adt": Mosaic.from_anndata({"rna": reference["rna"].copy()}),
    }
    for what, mosaic in others.items():
        with pytest.raises(ValueError, match=f"call model.register\\(mdata\\) first: {what}"):
            model.get_latent_representation(data=mosaic)


def test_adapting_moves_only_what_belongs_to_the_new_batch(trained):
    model, reference, query, last = trained
    adapted = model.adapt(query, 15, progress_bar=False)
    assert adapted.schema["rna"].categories["batch"] == (*model.schema["rna"].categories["batch"], last)
    before = model.get_latent_representation()
    after = adapted.get_latent_representation(data=adapted.register(reference))
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        adapted.get_normalized_expression("rna", data=adapted.register(reference)),
        model.get_normalized_expression("rna"),
        rtol=1e-4,
    )
    for part in ("model", "guide"):
        fresh = type(model)(adapted.schema, **model.options)
        masks = carry_over(getattr(model, part), getattr(fresh, part), model.schema, adapted.schema)
        assert masks
        moved = dict(getattr(adapted, part).named_parameters())
        for name, start in getattr(fresh, part).named_parameters():
            changed = moved[name].detach() != start.detach()
            if name in masks:
                assert not changed[~masks[name]].any()
                assert changed[masks[name]].float().mean() > 0.9
            else:
                assert not changed.any()


def test_networks_may_see_an_embedding_of_the_batch(tmp_path):
    reference, query, last = mosaics()
    mosaic = Mosaic.from_mudata(reference[:300].copy(), batch_key="batch")
    with pytest.raises(ValueError, match="covariate_embedding must be a whole number from 0 to 100,000; found -1"):
        MultiVI(mosaic, covariate_embedding=-1)
    plain = MultiVI(mosaic, n_latent=4, n_hidden=16, dropout=0.0)
    model = MultiVI(mosaic, n_latent=4, n_hidden=16, dropout=0.0, covariate_embedding=3)
    for part in ("model", "guide"):  # an embedding that is the indicators themselves
        embedded = getattr(model, part)
        embedded.load_state_dict(getattr(plain, part).state_dict(), strict=False)
        weights = [p for name, p in embedded.named_parameters() if name.endswith("embed.weight")]
        assert len(weights) == 2
        for weight in weights:
            torch.nn.init.eye_(weight)
    np.testing.assert_allclose(model.get_latent_representation(), plain.get_latent_representation(), atol=1e-6)

    model = MultiVI(mosaic, n_latent=4, n_hidden=16, covariate_embedding=2)
    model.train(3, progress_bar=False)
    expected = model.get_normalized_expression("rna")
    model.save(tmp_path / "model")
    pd.testing.assert_frame_equal(MultiVI.load(tmp_path / "model", mosaic).get_normalized_expression("rna"), expected)
    adapted = model.adapt(query[:100].copy(), 3, progress_bar=False)
    old, new = (m.model.modalities["rna"].decoder.embed.weight.detach() for m in (model, adapted))
    assert new.shape == (2, 4) and torch.equal(new[:, :3], old)
    assert not torch.equal(new[:, 3], old.mean(1))


def test_adapted_model_explains_new_cells_better_and_mixes_them(trained):
    model, reference, query, _ = trained
    average = model.register(query, new_batches="average")
    adapted = model.adapt(query, 30, progress_bar=False)

    def error(m, mosaic):
        counts = query["rna"].X
        counts = np.asarray(counts.todense() if hasattr(counts, "todense") else counts)
        share = m.get_normalized_expression("rna", data=mosaic).to_numpy()
        return -(counts * np.log(share)).sum() / counts.sum()

    assert error(adapted, adapted.mosaic) < error(model, average) - 0.01

    def enrichment(m, mosaic):
        z = np.concatenate([model.get_latent_representation(), m.get_latent_representation(data=mosaic)])
        return metrics.modality_enrichment(z, np.repeat(["reference", "query"], [reference.n_obs, query.n_obs]))

    assert enrichment(adapted, adapted.mosaic) < 1.05


def test_query_without_a_modality(trained):
    model, _, query, last = trained
    adapted = model.adapt({"rna": query["rna"]}, 2, progress_bar=False)
    assert last not in adapted.schema["adt"].categories["batch"]
    imputed = adapted.get_imputed_values("adt", n_samples=2).mean
    assert imputed.shape == (query.n_obs, 30)
    assert np.isfinite(imputed).all(axis=None)


def test_nothing_new_is_refused(trained):
    model, reference, *_ = trained
    with pytest.raises(ValueError, match="no batch that is new"):
        model.adapt(reference)


def test_adapted_model_can_be_saved(trained, tmp_path):
    model, _, query, _ = trained
    adapted = model.adapt(query, 1, progress_bar=False)
    adapted.save(tmp_path)
    loaded = MultiVI.load(tmp_path, data=query)
    assert loaded.get_latent_representation().equals(adapted.get_latent_representation())
    assert all(p.requires_grad for p in adapted.model.parameters())


def graph(mosaic) -> GuidanceGraph:
    pairs = zip(mosaic.schema["rna"].features, mosaic.schema["adt"].features, strict=False)
    return GuidanceGraph.from_edges(mosaic, [(("rna", gene), ("adt", protein)) for gene, protein in pairs])


MODELS = {
    "MultiVI": lambda m: MultiVI(m, library="latent", n_private=2),
    "paper": lambda m: MultiVI(m, **MultiVI.presets["paper"].options),
    "ContrastiveVI": lambda m: ContrastiveVI(m.with_cohorts("condition", background="control"), salient_prior="ard"),
    "DiagVI": lambda m: DiagVI(m, graph(m)),
    "ScModal": lambda m: ScModal(m, graph(m)),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_parameter_is_carried_over(name):
    reference, query, _ = mosaics(treated=0.5)
    for mdata in (reference, query):
        mdata.obs["depth"] = np.random.default_rng(0).normal(size=mdata.n_obs)
    mosaic = Mosaic.from_mudata(reference, batch_key="batch", continuous_covariates=("depth",))
    model = MODELS[name](mosaic)
    adapted = model.adapt(query, 1, progress_bar=False)
    known = adapted.register(reference)
    for ask in (lambda m, data: m.get_latent_representation(data=data), expression):
        np.testing.assert_allclose(ask(adapted, known), ask(model, None), rtol=1e-3, atol=1e-5)


def expression(model, data):
    return pd.concat([model.get_normalized_expression(name, data=data) for name in ("rna", "adt")], axis=1)
