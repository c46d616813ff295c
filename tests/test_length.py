"""How long a model is trained if the user does not say."""

import pytest

from pyromosaic import ContrastiveVI, DiagVI, Mosaic, MultiVI, simulate
from pyromosaic.models import ScModal
from pyromosaic.train import epochs_for, length, minibatch_for, settings_for

SMALL = {"n_latent": 2, "n_hidden": 4, "n_encoder_layers": 1}
QUICK = {"validation": 0.0, "sleep_steps": 0, "progress_bar": False}


def test_small_data_are_seen_150_times_and_large_data_in_about_as_many_steps():
    steps = [1, 6, 40, 41, 100, 600, 601, 4000, 10**6]
    epochs = [epochs_for(n) for n in steps]
    assert epochs == [150, 150, 150, 147, 60, 10, 10, 10, 10]
    assert all(length.STEPS <= n * e < length.STEPS + n for n, e in zip(steps, epochs, strict=True) if 10 < e < 150)


def test_minibatches_grow_with_the_cells_between_two_bounds():
    assert [minibatch_for(n, 1024) for n in (1, 9216, 9217, 36_000, 10**7)] == [256, 256, 257, 1000, 1024]
    assert {minibatch_for(n, 256) for n in (1, 9217, 10**7)} == {256}
    assert settings_for(5000, 1024, None, None) == (256, 0.003)
    assert settings_for(10**6, 1024, None, None) == (1024, 0.006)
    assert settings_for(10**6, 1024, 512, None) == (512, 0.003)
    assert settings_for(10**6, 1024, None, 0.01) == (1024, 0.01)


@pytest.mark.parametrize(("kind", "size"), [(MultiVI, 5), (ScModal, 2)])
def test_minibatches_by_default_leave_the_number_of_epochs_as_it_is(kind, size, monkeypatch):
    monkeypatch.setattr(length, "MINIBATCHES", 10)
    monkeypatch.setattr(length, "SMALLEST", 2)
    monkeypatch.setattr("pyromosaic.models.base.SMALLEST", 2)
    monkeypatch.setattr(length, "STEPS", 40)
    monkeypatch.setattr(length, "FEWEST_EPOCHS", 1)
    monkeypatch.setattr("pyromosaic.models.base.TrainedModel.largest_minibatch", 2)
    monkeypatch.setattr(MultiVI, "largest_minibatch", 20)
    mdata, truth = simulate(48, {"rna": 10, "adt": 10}, links={"adt": 1.0})
    links = truth.links.rename(columns={"gene": "rna", "feature": "adt"}).drop(columns="modality")
    model = kind(Mosaic.from_mudata(mdata), **SMALL | ({} if kind is MultiVI else {"graph": links, "linkage": None}))
    sizes = []
    loader = type(model).loader
    monkeypatch.setattr(
        type(model), "loader", lambda self, m, c, n, *more: sizes.append(n) or loader(self, m, c, n, *more)
    )
    model.train(**QUICK)
    assert set(sizes) == {size} and len(model.history) == epochs_for(24) == 2


@pytest.mark.parametrize("kind", [MultiVI, ContrastiveVI, DiagVI, ScModal])
def test_every_model_chooses_by_its_own_minibatches_and_says_so(kind, monkeypatch, capsys):
    monkeypatch.setattr(length, "STEPS", 30)
    monkeypatch.setattr(length, "FEWEST_EPOCHS", 2)
    mdata, truth = simulate(48, {"rna": 10, "adt": 10}, treated=0.5, links={"adt": 1.0})
    mosaic, options = Mosaic.from_mudata(mdata), SMALL
    if kind is ContrastiveVI:
        mosaic = mosaic.with_cohorts("condition", background="control")
    if kind in (DiagVI, ScModal):
        links = truth.links.rename(columns={"gene": "rna", "feature": "adt"}).drop(columns="modality")
        options = SMALL | {"graph": links, "linkage": None}
    model = kind(mosaic, **options)
    model.train(batch_size=8, **QUICK | {"progress_bar": True})
    steps = len(model.loader(model.mosaic, model.split.train, 8))
    assert len(model.history) == epochs_for(steps) == -(-30 // steps) < 30
    assert f"{len(model.history)} epochs of {steps} steps" in capsys.readouterr().err
    model.train(1, batch_size=8, **QUICK)
    assert len(model.history) == 1 and not capsys.readouterr().err
