"""Words of scvi-tools get a sentence with the word to use here; the page that translates them runs, call by call."""

import ast
import re
from inspect import signature

import pytest
from test_docs import ROOT, run, workshop  # noqa: F401

from pyromosaic import ContrastiveVI, DiagVI, ModalitySpec, Mosaic, MultiVI, ScModal, simulate
from pyromosaic.foreign import ARGUMENTS, METHODS
from pyromosaic.train import fitting

PAGE = ROOT / "docs" / "how_to" / "scvi_tools.md"
ROW = re.compile(r"^\|(?P<theirs>.*)\|(?P<ours>[^|]*)\|$", re.MULTILINE)
CODE = re.compile(r"`([^`]+)`")


def codes():
    """Codes in the right columns, but for single words and entries of a dictionary, which are no calls."""
    for row in ROW.finditer(PAGE.read_text()):
        for code in CODE.findall(row["ours"]):
            if re.search(r"\w[.(]", code):
                yield code


# Few cells, and models that were hardly trained.
@pytest.mark.filterwarnings("ignore")
def test_every_call_on_the_page_runs(workshop):  # noqa: F811
    namespace, found = run(PAGE), list(codes())
    assert len(found) > 70
    for code in found:
        ast.parse(code, mode="eval")
        try:
            eval(code, namespace)
        except Exception as error:
            raise AssertionError(f"{code}: {error}") from error


@pytest.fixture(scope="module")
def mosaic():
    return Mosaic.from_mudata(simulate(60, {"rna": 30, "adt": 5}, treated=0.5)[0], batch_key="batch")


@pytest.fixture(scope="module")
def model(mosaic):
    return MultiVI(mosaic, n_latent=3)


QUESTIONS = [
    MultiVI.get_latent_representation,
    ContrastiveVI.get_latent_representation,
    MultiVI.get_normalized_expression,
    MultiVI.get_accessibility_estimates,
    MultiVI.get_imputed_values,
    MultiVI.posterior_predictive_sample,
    MultiVI.differential,
    MultiVI.differential_abundance,
    MultiVI.get_feature_correlation_matrix,
    MultiVI.save,
]
MODELS = [MultiVI, ContrastiveVI, DiagVI, ScModal]


@pytest.mark.parametrize("word", ARGUMENTS)
def test_a_foreign_argument_is_answered(word, mosaic, model):
    here, advice = ARGUMENTS[word]
    sentence = re.escape(f"takes no {word!r}; {advice}")
    takers = [
        f for f in QUESTIONS if (not here or here in signature(f).parameters) and word not in signature(f).parameters
    ]
    answered = 0
    for function in takers:
        with pytest.raises(TypeError, match=sentence):
            function(model, **{word: 1})
        answered += 1
    for cls in MODELS:
        if here in signature(cls).parameters and word not in signature(cls).parameters:
            with pytest.raises(TypeError, match=f"{cls.__name__} {sentence}"):
                cls(mosaic, **{word: 1})
            answered += 1
    if here in signature(ModalitySpec).parameters:
        with pytest.raises(TypeError, match=sentence):
            ModalitySpec("nb", **{word: 1})
        with pytest.raises(TypeError, match=f"registration {sentence}"):
            Mosaic.from_anndata({"rna": simulate(30, {"rna": 20})[0]["rna"]}, **{word: 1})
        answered += 1
    if not here or here in signature(MultiVI.train).parameters:
        lightnings = signature(fitting.lightning.Trainer.__init__).parameters
        if word not in signature(MultiVI.train).parameters and word not in lightnings:
            with pytest.raises(TypeError, match=f"train {sentence}"):
                model.train(**{word: 1})
            answered += 1
    assert answered, f"no function answers {word}"


def test_words_of_train_load_and_old_options(mosaic, model, tmp_path):
    with pytest.raises(ValueError, match="max_epochs is set by n_epochs here; leave it out"):
        model.train(max_epochs=3)
    with pytest.raises(TypeError, match="train takes no 'lr'; use learning_rate"):
        model.train(lr=1e-3)
    with pytest.raises(TypeError, match="train takes no option 'nonsense'"):
        model.train(nonsense=1)
    with pytest.raises(TypeError, match="load takes no 'adata'; use data"):
        MultiVI.load(tmp_path, adata=mosaic)
    with pytest.raises(TypeError, match="MultiVI takes no 'n_layers_encoder'; use n_encoder_layers"):
        MultiVI(mosaic, n_layers_encoder=2)
    assert len(model.history) == 0


def test_a_users_own_option_of_that_name_is_theirs(mosaic):
    class Mine(MultiVI):
        def __init__(self, data, *, gene_list=(), **options):
            super().__init__(data, **options)

    assert Mine(mosaic, gene_list=("a",), n_latent=3).options["gene_list"] == ("a",)


@pytest.mark.parametrize("name", METHODS)
def test_a_foreign_method_is_answered(name, model):
    sentence = re.escape(f"MultiVI has no {name!r}; {METHODS[name]}")
    for owner in (MultiVI, model):
        with pytest.raises(AttributeError, match=sentence):
            getattr(owner, name)
        assert not hasattr(owner, name) and name not in dir(owner)


def test_other_missing_attributes_are_python_s(model):
    with pytest.raises(AttributeError, match="'MultiVI' object has no attribute 'nonsense'"):
        _ = model.nonsense
    with pytest.raises(AttributeError, match="type object 'MultiVI' has no attribute 'nonsense'"):
        _ = MultiVI.nonsense

    class Broken(MultiVI):
        @property
        def inside(self):
            return self.model.nothing_here

    with pytest.raises(AttributeError, match="nothing_here"):
        _ = Broken(model.mosaic, n_latent=3).inside


def test_the_page_has_the_words():
    text = PAGE.read_text()
    missing = [word for word in ("max_epochs", *ARGUMENTS) if word not in text and word not in UNSAID]
    assert not missing


#: Seldom used; the error says enough.
UNSAID = {
    "adatas", "mc_samples", "dataloader", "scale_protein", "pseudocounts", "shuffle_set_split", "n_steps_kl_warmup",
    "use_gpu", "eps", "plan_config", "trainer_config", "load_sparse_tensor", "adversarial_classifier", "n_proteins",
    "gene_dispersion", "protein_dispersion", "region_factors", "use_batch_norm", "use_layer_norm",
    "deeply_inject_covariates", "atac_layer", "protein_layer", "protein_names_uns_key", "backup_url",
    "n_samples_overall",
}  # fmt: skip
