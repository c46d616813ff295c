"""`check_model` finds the package's models and the one of the documentation without fault, and each kind of fault."""

import re

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from test_docs import ROOT, blocks
from torch import nn

from pyromosaic import ContrastiveVI, DiagVI, ModalitySpec, Mosaic, MultiVI, ScModal, simulate
from pyromosaic.likelihoods import Likelihood
from pyromosaic.measurement import Measurement, MeasurementGuide, Plates, cells
from pyromosaic.models import MosaicModel
from pyromosaic.nn import Encoder
from pyromosaic.priors import StudentT
from pyromosaic.program import Program
from pyromosaic.testing import QUESTIONS, ModelError, check_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:the guidance graph has few links"),
    pytest.mark.filterwarnings("ignore:the shared latent space carries only"),  # after two epochs
]
LINKS = pd.DataFrame({"rna": [f"rna_{i}" for i in range(6)], "adt": [f"adt_{i}" for i in range(6)]})
SMALL = {"n_latent": 3, "n_hidden": 16}


@pytest.fixture(scope="module")
def data():
    return simulate(90, {"rna": 20, "adt": 6}, treated=0.5, seed=3)[0]


@pytest.fixture(scope="module")
def page():
    """What the page of a model of your own defines before it is checked."""
    namespace = {"__name__": "own_model"}
    exec(blocks(ROOT / "docs" / "own_model.md")[0], namespace)
    return namespace


@pytest.fixture
def mosaic(data, page):
    spec = ModalitySpec(page["Poisson"], batch_key="batch")
    counts = simulate(90, {"rna": 40, "adt": 12}, likelihoods={"rna": "nb", "adt": "nb"}, seed=3)[0]
    return Mosaic.from_mudata(counts, {"rna": spec, "adt": spec})


# Models without fault


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (MultiVI, {}),
        (MultiVI, {"prior": StudentT(3), "n_private": 2, "library": "latent", "fusion": "global"}),
        (ContrastiveVI, {"n_salient": 2}),
        (DiagVI, {"graph": LINKS, "linkage": None}),
        (ScModal, {"graph": LINKS, "linkage": None}),
        (ScModal, {"graph": LINKS, "linkage": None, "deterministic": True, "n_private": 0}),
    ],
)
def test_models_of_the_package_answer_everything(kind, options, data):
    mosaic = Mosaic.from_mudata(data, batch_key="batch", label_key="celltype")
    if kind is ContrastiveVI:
        mosaic = mosaic.with_cohorts("condition", background="control")
    report = check_model(kind, mosaic, **SMALL, **options)
    assert (report["outcome"] == "right").all()
    assert len(report) == sum(2 if question.each else 1 for question in QUESTIONS)


def test_accessibility_real_values_layers_and_no_batch():
    mdata, _ = simulate(90, {"atac": 40, "cytof": 6}, likelihoods={"cytof": "normal"}, seed=1)
    mdata["atac"].layers["raw"] = mdata["atac"].X.copy()
    specs = {"atac": ModalitySpec("bernoulli", layer="raw"), "cytof": ModalitySpec("normal")}
    report = check_model(MultiVI, Mosaic.from_mudata(mdata, specs), **SMALL)
    assert report.loc["denoised values of atac", "finding"] == "accessibility"
    assert report["outcome"].value_counts().to_dict() == {"right": len(report) - 1, "not asked": 1}
    assert report.loc["adapting to a new batch", "finding"] == "no modality of the mosaic has a batch_key"


def test_the_model_of_the_page_answers_everything_in_about_60_lines(page, mosaic):
    assert (check_model(page["PoissonFactors"], mosaic, n_latent=3)["outcome"] == "right").all()
    lines = [line for line in blocks(ROOT / "docs" / "own_model.md")[0].splitlines() if line.strip()]
    assert len(lines) <= 60


# Models without fault that have less than those of the package


class Unsized(Likelihood):
    """Counts that do not depend on the cell's size."""

    data_kind = "count"
    predictors = ("log_mean",)

    def distribution(self, predictors, view):
        return dist.Poisson(predictors["log_mean"].exp())


class Linear(nn.Module):
    def __init__(self, schema, n_latent):
        super().__init__()
        self.linear = nn.Linear(n_latent, schema.n_features)

    def forward(self, z, view):
        return {"log_mean": self.linear(z), "log_rate": self.linear(z)}


@pytest.fixture
def plain(page):
    class Plain(MosaicModel):
        """The least that a model can be: no size, no start values, no batch, a linear decoder."""

        def __init__(self, data, n_latent=3):
            with self.construction(data, 0) as schema:
                explains, infers = {}, {}
                for name, m in schema.modalities.items():
                    plates = Plates(name, m.n_features)
                    explains[name] = Measurement(plates, None, Linear(m, n_latent), m.spec.likelihood(m))
                    infers[name] = MeasurementGuide(plates, Encoder(m, n_latent, 8, covariates=False), n_latent)
                self.model, self.guide = page["FactorModel"](explains, n_latent), page["FactorGuide"](infers)

    return Plain


def test_a_model_needs_neither_sizes_nor_parameters_of_batches(plain, data):
    spec = ModalitySpec(Unsized, batch_key="batch")
    mosaic = Mosaic.from_mudata(data, {"rna": spec, "adt": spec})
    assert (check_model(plain, mosaic)["outcome"] == "right").all()
    model = plain(mosaic)
    model.train(1, progress_bar=False)
    new = data.copy()
    for part in (new, *new.mod.values()):
        part.obs["batch"] = "new"
    adapted = model.adapt(new)
    assert adapted.schema["rna"].categories["batch"] == ("batch0", "batch1", "new") and len(adapted.history) == 1
    before, after = model.model.state_dict(), adapted.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


# Faults


def faults(kind, mosaic, **options):
    """What is wrong, by question, with the message of the error."""
    with pytest.raises(ModelError) as found:
        check_model(kind, mosaic, **options)
    report = found.value.report
    wrong = report.loc[report["outcome"] == "wrong", "finding"]
    for question, finding in wrong.items():
        (need,) = (q.need for q in QUESTIONS if question in (q.words, *(f"{q.words} {m}" for m in ("rna", "adt"))))
        assert f"- {question}: {finding.rstrip('.')}. Needed: {need}" in str(found.value)
    return wrong, str(found.value)


def variant(page, **changes):
    """The page's model with another guide, likelihood or class in its place."""
    namespace = dict(page)
    exec(blocks(ROOT / "docs" / "own_model.md")[0], namespace)
    namespace |= {name: make(namespace[name]) for name, make in changes.items()}
    return namespace["PoissonFactors"]


def test_a_guide_without_the_latent_site(page, mosaic):
    class Empty(page["FactorGuide"]):
        def forward(self, minibatch, kl_weight=1.0):
            pass

    wrong, message = faults(variant(page, FactorGuide=lambda _: Empty), mosaic)
    assert list(wrong.index) == ["training"]
    assert "site 'z' of the model" in message and "is latent and missing from the guide" in message


def test_a_guide_that_ignores_a_modality(page, mosaic):
    class Deaf(page["FactorGuide"]):
        def forward(self, minibatch, kl_weight=1.0):
            seen = {name: view for name, view in minibatch.observed.items() if name == "rna"}
            if seen:
                minibatch = type(minibatch)(minibatch.index, minibatch.n_cells, seen, minibatch.decoded)
                return super().forward(minibatch, kl_weight)
            with cells(minibatch, kl_weight):
                pyro.sample("z", dist.Normal(torch.zeros(len(minibatch), 1, 10), 1.0).to_event(1))

    wrong, _ = faults(variant(page, FactorGuide=lambda _: Deaf), mosaic)
    assert wrong.to_dict() == {
        "latent variables given adt": "the guide ignores 'adt': other measurements of it give the same latent variables"
    }


def test_a_guide_that_needs_every_modality(page, mosaic):
    class Greedy(page["FactorGuide"]):
        def forward(self, minibatch, kl_weight=1.0):
            assert {"rna", "adt"} <= minibatch.observed.keys()
            super().forward(minibatch, kl_weight)

    wrong, _ = faults(variant(page, FactorGuide=lambda _: Greedy), mosaic)
    assert {"latent variables given rna", "latent variables given adt"} <= set(wrong.index)


@pytest.mark.filterwarnings("ignore:no sleep phase. the model has no site 'adt'")
def test_a_model_that_explains_one_modality_only(page, mosaic):
    class Half(page["FactorModel"]):
        def forward(self, minibatch, kl_weight=1.0):
            rna = {name: view for name, view in minibatch.decoded.items() if name == "rna"}
            super().forward(type(minibatch)(minibatch.index, minibatch.n_cells, minibatch.observed, rna), kl_weight)

    wrong, message = faults(variant(page, FactorModel=lambda _: Half), mosaic)
    of_adt = {f"{words} adt" for words in ("imputed values of", "predictive samples of", "differential tests of")}
    assert of_adt <= set(wrong.index) and not any(question.endswith("rna") for question in wrong.index)
    assert "the model has no site 'adt': it does not explain that modality" in wrong["imputed values of adt"]


def test_no_sizes_where_the_likelihood_needs_them(page, plain, data, mosaic):
    wrong, _ = faults(plain, mosaic)
    assert list(wrong.index) == ["construction from a mosaic"]
    assert "give the Measurement a pyromosaic.sizes.Size" in wrong.iloc[0]

    class Silent(Unsized):  # its traits do not say so
        def distribution(self, predictors, view):
            return dist.Poisson(view.library * predictors["log_mean"].exp(), validate_args=False)

    wrong, message = faults(plain, Mosaic.from_mudata(data, {"rna": ModalitySpec(Silent), "adt": ModalitySpec(Silent)}))
    assert {"imputed values of rna", "imputed values of adt", "predictive samples of rna"} <= set(wrong.index)
    assert "imputed values in cells in which 'rna' was not measured are NaN or infinite" in message
    assert "unless its Measurement has a `pyromosaic.sizes.Size`" in message


def test_what_is_lost_by_saving(page, mosaic):
    Factors = page["PoissonFactors"]

    class Positional(Factors):
        def __init__(self, data, *widths):
            super().__init__(data, n_latent=3)

    class Sticky(Factors):
        def __init__(self, data, *, n_latent=3, rate=1.0):
            super().__init__(data, n_latent=n_latent)
            self.rate = rate
            del self.options["rate"]

    class Copied(Factors):  # a tensor that is no buffer
        def start(self, mosaic):
            super().start(mosaic)
            self.model.modalities["rna"].likelihood.shade = torch.full((2,), 0.5)

        def __init__(self, data):
            super().__init__(data, n_latent=3)
            likelihood = self.model.modalities["rna"].likelihood
            likelihood.shade = getattr(likelihood, "shade", torch.zeros(2))

    class Remembers(Factors):
        def finish(self, mosaic):
            super().finish(mosaic)
            self.model.modalities["rna"].decoder.n_seen = mosaic.n_cells

        def __init__(self, data):
            super().__init__(data, n_latent=3)
            self.model.modalities["rna"].decoder.n_seen = 0

    class Unregistered(Factors):
        def __init__(self, data):
            super().__init__(data, n_latent=3)
            decoder = self.model.modalities["rna"].decoder
            decoder.register_forward_hook(lambda module, inputs, said: {"log_rate": said["log_rate"] + self.shift})

        def start(self, mosaic):
            super().start(mosaic)
            self.shift = torch.full((1,), 0.5)

        shift = torch.zeros(1)

    for kind, options, message in (
        (Positional, {}, "unexpected keyword argument 'widths'"),
        (Sticky, {"rate": 2.0}, "option 'rate' is not among model.options, which are saved"),
        (Remembers, {}, r"self.model.modalities.rna.decoder.n_seen is 90, and 0 in the loaded model"),
        (Copied, {}, r"self.model.modalities.rna.likelihood.shade is [0.5, 0.5], and [0.0, 0.0] in the loaded model"),
        (Unregistered, {}, "imputed values of 'rna' differ, by up to"),
    ):
        wrong, _ = faults(kind, mosaic, **options)
        assert message in wrong["saving and loading"]


def test_a_site_that_counts_otherwise_in_model_and_guide(page, mosaic):
    class Unscaled(page["FactorModel"]):
        def forward(self, minibatch, kl_weight=1.0):
            with pyro.plate("cells", len(minibatch), dim=-2):
                z = pyro.sample("z", dist.Normal(torch.zeros(len(minibatch), 1, self.n_latent), 1.0).to_event(1))
            for name, view in minibatch.decoded.items():
                self.modalities[name](z, view, minibatch, kl_weight)

    class Unweighted(page["FactorGuide"]):
        def forward(self, minibatch, kl_weight=1.0):
            super().forward(minibatch)

    for changes, weights in (
        ({"FactorModel": lambda _: Unscaled}, "1 in the model and 0.5556 in the guide"),
        ({"FactorGuide": lambda _: Unweighted}, "0.5556 in the model and 1.111 in the guide"),
    ):
        wrong, message = faults(variant(page, **changes), mosaic)
        assert list(wrong.index) == ["training"] and f"site 'z' has weight {weights}" in wrong["training"]
        assert "with the same kl_weight, e.g. in `with cells(minibatch, kl_weight)`" in message
        assert message.splitlines()[0].endswith(" questions, and 15 were not asked:")


def test_latent_variables_of_another_name(page, mosaic):
    class Named(page["FactorModel"]):
        def forward(self, minibatch, kl_weight=1.0):
            with cells(minibatch, kl_weight):
                h = pyro.sample("h", dist.Normal(torch.zeros(len(minibatch), 1, self.n_latent), 1.0).to_event(1))
            for name, view in minibatch.decoded.items():
                self.modalities[name](h, view, minibatch, kl_weight)

    class Inferred(page["FactorGuide"]):
        def forward(self, minibatch, kl_weight=1.0):
            with cells(minibatch, kl_weight):
                pyro.sample("h", dist.Normal(torch.zeros(len(minibatch), 1, 10), 1.0).to_event(1))

    wrong, _ = faults(variant(page, FactorModel=lambda _: Named, FactorGuide=lambda _: Inferred), mosaic)
    assert "the guide has no site 'z'; model and guide sample it for every cell" in wrong["training"]


def test_an_error_in_code_of_ones_own_is_said_with_its_place(page, mosaic):
    class Misspelt(page["Loadings"]):
        def forward(self, z, view):
            return super().forward(z, view.covariates)

    wrong, _ = faults(variant(page, Loadings=lambda _: Misspelt), mosaic)
    assert "AttributeError: 'View' object has no attribute 'covariates' (in " in wrong["training"]
    assert re.search(r"Misspelt\.forward, test_testing\.py line \d+\)", wrong["training"])


def test_parts_that_do_not_fit_a_modality(page, mosaic):
    class Other(page["Loadings"]):
        def forward(self, z, view):
            return {"log_mean": super().forward(z, view)["log_rate"]}

    wrong, _ = faults(variant(page, Loadings=lambda _: Other), mosaic)
    said = "the decoder of modality 'rna' returns 'log_mean'; its likelihood Poisson needs 'log_rate'"
    assert said in wrong["training"]

    wrong, _ = faults(variant(page, Encoder=lambda _: lambda m, n, width: Encoder(m, n - 1, width)), mosaic)
    assert (
        "the encoder of modality 'rna' returns 9 dimensions; accepted: n_latent + n_private = 10" in wrong["training"]
    )

    wrong, _ = faults(variant(page, Slots=lambda _: dict), mosaic)
    said = "self.model.modalities is a dictionary of modules, whose parameters are not found"
    assert said in wrong["construction from a mosaic"]


def test_a_private_variable_whose_posterior_is_not_passed(page, mosaic):
    class Private(page["FactorGuide"]):
        def forward(self, minibatch, kl_weight=1.0):
            super().forward(minibatch, kl_weight)
            for name, view in minibatch.decoded.items():
                z = torch.zeros(len(minibatch), 1, 2)
                self.modalities[name](z, view, minibatch, kl_weight)

    parts = {
        "Measurement": lambda _: lambda *given: Measurement(*given, n_private=1),
        "Loadings": lambda Loadings: lambda m, n: Loadings(m, n + 1),
        "MeasurementGuide": lambda _: lambda *given: MeasurementGuide(*given, n_private=1),
        "Encoder": lambda _: lambda m, n, width: Encoder(m, n + 1, width),
    }
    wrong, _ = faults(variant(page, FactorGuide=lambda _: Private, **parts), mosaic)
    assert "modality 'rna' has a private variable; pass its posterior after kl_weight" in wrong["training"]


def test_start_values(page, data):
    class Unstarted(page["Poisson"]):
        start = Likelihood.start

    class Infinite(page["Poisson"]):
        def start(self, view):
            return {"log_rate": torch.log(0 * view.library.sum(0))}

    def counts(likelihood):
        spec = ModalitySpec(likelihood, batch_key="batch")
        return Mosaic.from_mudata(data, {"rna": spec, "adt": spec})

    assert (check_model(page["PoissonFactors"], counts(Unstarted), n_latent=3)["outcome"] == "right").all()
    wrong, _ = faults(page["PoissonFactors"], counts(Infinite))
    said = "modality 'rna': start() of likelihood Infinite returns NaN or infinite values for 'log_rate'"
    assert said in wrong["construction from a mosaic"]


def test_a_distribution_without_a_mean(plain, data):
    class Meanless(dist.Poisson):
        @property
        def mean(self):
            raise NotImplementedError

    class Unsummarised(Unsized):
        def distribution(self, predictors, view):
            return Meanless(predictors["log_mean"].exp())

    mosaic = Mosaic.from_mudata(data, {"rna": ModalitySpec(Unsummarised), "adt": ModalitySpec(Unsized)})
    wrong, message = faults(plain, mosaic)
    assert "the Meanless of site 'rna' has no mean" in wrong["imputed values of rna"]
    assert "the distribution of a likelihood has a finite mean" in message and "imputed values of adt" not in wrong


@pytest.mark.parametrize(("asked", "missing"), [(True, "imputed values of rna"), (False, "training")])
def test_nan(asked, missing, page):
    class Poisson(page["Poisson"]):
        def distribution(self, predictors, view):
            rate = super().distribution(predictors, view).rate
            rate = rate * torch.nan if (view.counts is None) == asked else rate
            return dist.Poisson(rate, validate_args=False)

    data = simulate(90, {"rna": 40}, likelihoods={"rna": "nb"}, seed=3)[0]
    wrong, _ = faults(page["PoissonFactors"], Mosaic.from_mudata(data, {"rna": ModalitySpec(Poisson)}))
    assert missing in wrong and (asked or len(wrong) == 1)
    assert "NaN or infinite" in wrong[missing] if asked else "the loss is not finite" in wrong[missing]


def test_a_constructor_that_needs_data(page, mosaic):
    class Eager(page["PoissonFactors"]):
        def __init__(self, data, *, n_latent=3):
            super().__init__(data, n_latent=min(n_latent, data.n_cells))

    wrong, message = faults(Eager, mosaic)
    assert "AttributeError" in wrong["construction from a schema"] and "take all shapes from the schema" in message
    assert {"saving and loading", "adapting to a new batch"} <= set(wrong.index)


def test_a_batch_before_other_inputs(page, mosaic):
    class Reversed(page["Loadings"]):
        def forward(self, z, view):
            design = view.design().expand(*z.shape[:-1], -1)
            return {"log_rate": self.linear(torch.cat([design, z], dim=-1))}

    wrong, message = faults(variant(page, Loadings=lambda _: Reversed), mosaic, n_latent=3)
    assert list(wrong.index) == ["adapting to a new batch"]
    assert "in known batches, which adapting leaves alone, differ" in message and "behind their other inputs" in message


def test_a_program_without_parts_is_told_what_it_cannot_answer(data):
    from test_measurement import BareModel

    mosaic = Mosaic.from_mudata(data[data["rna"].obs_names].copy(), {"rna": ModalitySpec("nb", batch_key="batch")})
    wrong, message = faults(BareModel, mosaic)
    asked = ["latent variables given rna", "denoised values of rna", "cell factors", "differential tests of rna"]
    assert list(wrong.index) == asked
    assert message.count("none of its `modalities` is a pyromosaic.measurement.Measurement") == 3


class Sites(Program):
    """A model and guide of one's own parts, with attributes that the base class knows under the same names."""

    def __init__(self, schema, name=""):
        super().__init__(name)
        self.modalities, self.fusion = list(schema.modalities), "none"

    def forward(self, minibatch, kl_weight=1.0):
        with cells(minibatch, kl_weight):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(minibatch), 1, 2), 1.0).to_event(1))
        for name, view in minibatch.decoded.items() if self._pyro_name == "" else ():
            with poutine.scale(scale=minibatch.scale), pyro.plate(f"{name}_cells", len(view.rows), dim=-2):
                mean = z[view.rows, 0].sum(-1, keepdim=True).expand(-1, 20).exp()
                with pyro.plate(f"{name}_features", 20, dim=-1):
                    pyro.sample(name, dist.Poisson(mean), obs=view.counts)


class Parameterless(MosaicModel):
    def __init__(self, data):
        with self.construction(data, 0) as schema:
            self.model, self.guide = Sites(schema), Sites(schema, "guide")
            self.model.offset = nn.Parameter(torch.zeros(1))


def test_attributes_of_ones_own_and_a_guide_without_parameters(data):
    model = Parameterless(Mosaic.from_mudata(data[data["rna"].obs_names].copy(), {"rna": "nb"}))
    assert np.isfinite(model.get_imputed_values("rna", n_samples=2).mean.to_numpy()).all()


def test_what_is_no_model_is_refused(mosaic):
    class Guideless(MosaicModel):
        def __init__(self, data):
            with self.construction(data, 0):
                self.model = Program()

    wrong, _ = faults(Guideless, mosaic)
    assert "Guideless builds self.guide, a pyromosaic.program.Program, inside" in wrong["construction from a mosaic"]
    assert (faults(Guideless, mosaic)[0].index == ["construction from a mosaic"]).all()
    with pytest.raises(TypeError, match="cls must be a subclass of pyromosaic.models.MosaicModel; found 3"):
        check_model(3, mosaic)
