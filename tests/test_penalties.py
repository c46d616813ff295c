import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, TraceMeanField_ELBO
from torch.distributions import Normal, kl_divergence

from pyromosaic import Mosaic, MultiVI
from pyromosaic.data import measured
from pyromosaic.fusion import Posterior
from pyromosaic.measurement import encoded
from pyromosaic.penalties import Adversary, Jeffreys, MeanDistance
from pyromosaic.train import MosaicELBO, NonFiniteLossError, Optimisation, Plan
from pyromosaic.train.checkpoints import read

QUIET = {"progress_bar": False, "accelerator": "cpu"}


@pytest.fixture
def mosaic(mdata):
    """16 cells have both modalities, 8 RNA alone, 8 antibodies alone; batches a and b, b and c."""
    return Mosaic.from_mudata(mdata, batch_key="batch")


@pytest.fixture
def minibatch(mosaic):
    return measured(mosaic, np.arange(2, 32, 3))


def small(mosaic, **options) -> MultiVI:
    return MultiVI(mosaic, **{"n_latent": 3, "n_hidden": 8, "mmd": 0.0, **options})


def test_pairwise_penalties_equal_their_formulas(mosaic, minibatch):
    posteriors, _ = encoded(small(mosaic).guide.modalities, minibatch)
    jeffreys, distance = 0.0, 0.0
    both = set(posteriors["rna"].rows.tolist()) & set(posteriors["adt"].rows.tolist())
    assert 0 < len(both) < len(minibatch)
    for cell in both:
        p, q = (Normal(q.loc[q.rows == cell][0], q.scale[q.rows == cell][0]) for q in posteriors.values())
        jeffreys += (kl_divergence(p, q) + kl_divergence(q, p)).sum()
        distance += (p.loc - q.loc).square().sum().sqrt()
    torch.testing.assert_close(Jeffreys()(posteriors, minibatch), jeffreys / len(minibatch))
    torch.testing.assert_close(MeanDistance()(posteriors, minibatch), distance / len(minibatch))


def test_equal_means_are_at_distance_0_and_have_finite_gradients(minibatch):
    loc = torch.ones(4, 3, requires_grad=True)
    q = Posterior(torch.arange(4), loc, torch.ones(4, 3))
    distance = MeanDistance()({"a": q, "b": q}, minibatch)
    distance.backward()
    assert distance == 0 and torch.isfinite(loc.grad).all()


# Adversary


def joint(n: int) -> dict[str, Posterior]:
    generator = torch.Generator().manual_seed(1)
    loc, scale = torch.randn(n, 3, generator=generator), torch.rand(n, 3, generator=generator)
    return {"z": Posterior(torch.arange(n), loc.requires_grad_(), scale.requires_grad_())}


def test_classes_are_patterns_or_batches(mosaic, mdata):
    everything = measured(mosaic, np.arange(32))
    pattern = Adversary(mosaic.schema, 3, "pattern").classes(everything)
    names = {"rna": 1, "adt": 2, "rna+adt": 3}
    assert pattern.tolist() == [names[p] for p in mosaic.patterns]
    batch = Adversary(mosaic.schema, 3, "batch").classes(everything)
    for name, modality in mosaic.modalities.items():
        only = (mosaic.patterns == name).to_numpy()
        categories = np.array(modality.schema.categories["batch"])
        assert (np.array(["a", "b", "c"])[batch.numpy()[only]] == categories[modality.codes[only, 0]]).all()
    without = Mosaic.from_mudata(mdata)
    assert (Adversary(without.schema, 3, "batch").classes(measured(without, np.arange(10))) == 0).all()
    with pytest.raises(ValueError, match="target must be 'pattern' or 'batch'; found 'donor'"):
        Adversary(mosaic.schema, 3, "donor")


def test_both_sides_of_the_adversary_equal_their_formulas(mosaic, minibatch):
    adversary, q = Adversary(mosaic.schema, 3, "pattern"), joint(len(minibatch))
    torch.manual_seed(2)
    trace = poutine.trace(adversary).get_trace(q, minibatch)
    misled = trace.nodes["_RETURN"]["value"]
    told = trace.nodes["penalty/adversary_classifier"]["fn"].log_factor / minibatch.n_cells
    torch.manual_seed(2)
    z = q["z"].loc + q["z"].scale * torch.randn(len(minibatch), 3)
    classes, kinds = adversary.classes(minibatch).tolist(), [1, 2, 3]
    assert set(classes) == set(kinds)
    log_p = adversary.classifier(z)[:, kinds].log_softmax(-1)  # class 0, no modality at all, does not exist
    expected_misled = expected_told = 0.0
    for row, kind in zip(log_p, classes, strict=True):
        others = [i for i, k in enumerate(kinds) if k != kind]
        expected_misled -= row[others].sum() / 2 / len(minibatch)
        expected_told -= row[kinds.index(kind)] / len(minibatch)
    torch.testing.assert_close(misled, expected_misled)
    torch.testing.assert_close(told, expected_told)


def test_each_side_has_gradients_of_its_own_loss_alone(mosaic, minibatch):
    adversary, q = Adversary(mosaic.schema, 3, "pattern"), joint(len(minibatch))
    trace = poutine.trace(adversary).get_trace(q, minibatch)
    trace.nodes["_RETURN"]["value"].backward()
    assert all(p.grad is None for p in adversary.parameters())
    assert q["z"].loc.grad.abs().sum() > 0 and q["z"].scale.grad.abs().sum() > 0
    before = q["z"].loc.grad.clone()
    trace.nodes["penalty/adversary_classifier"]["fn"].log_factor.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in adversary.parameters())
    assert torch.equal(q["z"].loc.grad, before)


def test_one_class_has_nothing_to_tell(mosaic):
    adversary = Adversary(mosaic.schema, 3, "pattern")
    cells = measured(mosaic, np.flatnonzero(mosaic.patterns == "rna"))
    assert poutine.trace(adversary).get_trace(joint(len(cells)), cells).nodes["_RETURN"]["value"] == 0


def test_the_adversary_is_in_the_objective_and_not_in_the_bound(mosaic, minibatch):
    """And its classifier's loss rises no other parameter's gradient."""
    model, plain = (small(mosaic, adversary=a, jeffreys=0.0) for a in (2.0, 0.0))
    plain.model.load_state_dict(model.model.state_dict())
    plain.guide.load_state_dict({k: v for k, v in model.guide.state_dict().items() if "adversaries" not in k})
    elbo = MosaicELBO()
    loss = elbo.differentiable_loss(model.model, model.guide, minibatch, 1.0)
    assert set(elbo.terms) >= {"penalty/adversary", "penalty/adversary_classifier"}
    torch.testing.assert_close(loss.detach(), sum(elbo.terms.values()))
    twice = elbo.terms["penalty/adversary"]
    model.guide.adversaries[0].weight = 1.0
    torch.manual_seed(0)
    elbo.loss(model.model, model.guide, minibatch)
    torch.manual_seed(0)
    once = elbo.terms["penalty/adversary"]
    model.guide.adversaries[0].weight = 2.0
    elbo.loss(model.model, model.guide, minibatch)
    torch.testing.assert_close(elbo.terms["penalty/adversary"], 2 * once)
    assert torch.isfinite(twice)
    z = [m.get_latent_representation() for m in (model, plain)]
    pd.testing.assert_frame_equal(*z)


def test_each_optimiser_moves_its_own_parameters(mosaic):
    model = small(mosaic, adversary=1.0)
    plan = Plan(model.model, model.guide, Optimisation(), 3)
    main = plan.configure_optimizers()[0][0]
    (own,) = plan.own_optimisers
    sides = [{p for group in o.param_groups for p in group["params"]} for o in (main, own)]
    assert not sides[0] & sides[1]
    assert sides[0] | sides[1] == set(plan.objective.parameters())
    assert sides[1] == set(model.guide.adversaries[0].classifier.parameters())
    assert own.param_groups[0]["lr"] == 1e-3 and own.param_groups[0]["eps"] == 0.01
    assert plan.own_optimisers and not Plan(small(mosaic).model, small(mosaic).guide, Optimisation(), 3).own_optimisers

    def moved(**training) -> tuple[bool, bool]:
        model = small(mosaic, adversary=1.0, jeffreys=0.0)
        before = {k: v.clone() for k, v in model.guide.named_parameters()}
        model.train(1, batch_size=16, **training, **QUIET)
        changed = {k for k, v in model.guide.named_parameters() if not torch.allclose(v, before[k], atol=1e-20)}
        return any("adversaries" in k for k in changed), any("adversaries" not in k for k in changed)

    assert moved() == (True, True)
    assert moved(learning_rate=1e-30, sleep_steps=0) == (True, False)


def test_clipping_and_decay_are_for_the_main_optimiser(mosaic):
    """The classifier learns the same however hard the others are clipped and decayed."""
    states = []
    for options in ({"gradient_clip": 0.0, "weight_decay": 0.0}, {"gradient_clip": 1e-9, "weight_decay": 0.5}):
        model = small(mosaic, adversary=1.0)
        model.train(2, batch_size=16, learning_rate=1e-30, sleep_steps=0, **options, **QUIET)
        states.append(model.guide.adversaries[0].state_dict())
    for a, b in zip(states[0].values(), states[1].values(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_classifier_learns_what_can_be_told(mosaic):
    """With a still encoder its cross-entropy falls below the entropy of the classes."""
    model = small(mosaic, adversary=1.0)
    model.train(150, batch_size=32, learning_rate=1e-30, validation=0.0, **QUIET)
    told = model.history["train_penalty/adversary_classifier"]
    shares = mosaic.patterns.value_counts(normalize=True)
    entropy = -(shares * np.log(shares)).sum()
    assert told.iloc[-1] < told.iloc[0] and told.iloc[-1] < entropy


def test_resuming_goes_on_as_if_never_stopped(mosaic, tmp_path):
    options = {"batch_size": 16, "validation": 0.0, "schedule": "constant", "kl_warmup_epochs": 0, **QUIET}
    whole, first, second = (small(mosaic, adversary=1.0) for _ in range(3))
    whole.train(3, **options)
    first.train(2, checkpoint_dir=tmp_path, **options)
    (state,) = read(tmp_path / "last.ckpt")["run"]["own_optimisers"]
    assert state["state"][0]["step"] == 4
    second.train(3, resume_from=tmp_path, checkpoint_dir=tmp_path / "second", **options)
    assert read(tmp_path / "second" / "last.ckpt")["run"]["own_optimisers"][0]["state"][0]["step"] == 6
    pd.testing.assert_frame_equal(second.history, whole.history, check_exact=True)


def test_early_stopping_schedules_and_plain_svi_work_with_an_adversary(mosaic):
    model = small(mosaic, adversary=1.0)
    model.train(60, batch_size=16, learning_rate=0.1, validation=0.3, early_stopping=2, kl_warmup_epochs=0, **QUIET)
    assert len(model.history) < 60
    assert {"train_penalty/adversary", "validation_penalty/adversary"} <= set(model.history)
    assert np.isfinite(model.history.drop(columns=["sleep_before", "sleep_after"])).all().all()

    model = small(mosaic, adversary=1.0)
    svi = SVI(model.model, model.guide, pyro.optim.Adam({"lr": 1e-3}), TraceMeanField_ELBO())
    before = [p.clone() for p in model.guide.adversaries[0].parameters()]
    assert np.isfinite(svi.step(measured(mosaic, np.arange(32))))
    assert all(not torch.equal(a, b) for a, b in zip(before, model.guide.adversaries[0].parameters(), strict=True))


def test_a_loss_that_is_not_finite_stops_with_an_adversary_too(mosaic):
    model = small(mosaic, adversary=1.0)
    model.train(1, **QUIET)
    good = {k: v.clone() for k, v in model.guide.state_dict().items()}
    model.guide.adversaries[0].register_forward_hook(lambda module, inputs, output: output * float("nan"))
    with pytest.raises(NonFiniteLossError, match="'penalty/adversary'"):
        model.train(1, **QUIET)
    assert all(torch.equal(v, good[k]) for k, v in model.guide.state_dict().items())


def test_models_with_an_adversary_are_kept(mosaic, mdata, tmp_path):
    model = small(mosaic, adversary=Adversary(target="batch"))
    model.train(2, **QUIET)
    model.save(tmp_path / "model")
    loaded = MultiVI.load(tmp_path / "model", mdata)
    for k, v in model.guide.state_dict().items():
        assert torch.equal(loaded.guide.state_dict()[k], v), k
    assert loaded.guide.adversaries[0].seen.all()
