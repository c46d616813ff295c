"""Priors of the latent variable: functions from a minibatch to a distribution.

You can use any `torch.nn.Module` whose call returns a distribution with batch shape (B, 1) or () and event shape
(latent,). It may call `pyro.sample` (inside the plate of cells) and have global latent variables, see
`pyromosaic.program.Program`.
"""

from typing import Any

import torch
from pyro import distributions as dist
from pyro.distributions import constraints
from torch import Tensor, nn

from pyromosaic.accepted import Count, Positive, Width, checked
from pyromosaic.data import Minibatch, View
from pyromosaic.described import Described
from pyromosaic.labels import Labels


class StandardNormal(Described):
    """Independent standard normal in every latent dimension.

    Parameters
    ----------
    n_latent
        Width of the latent space; leave it out in an option of a model.

    Examples
    --------
    >>> from pyromosaic import Mosaic, MultiVI, simulate
    >>> from pyromosaic.data import measured
    >>> mosaic = Mosaic.from_mudata(simulate(40, {"rna": 50})[0])
    >>> prior = StandardNormal(10)(measured(mosaic, mosaic.find(None)))
    >>> prior.batch_shape, prior.event_shape
    (torch.Size([40, 1]), torch.Size([10]))
    >>> model = MultiVI(mosaic, n_latent=10, prior=StandardNormal(10))  # the same as prior="normal"
    """

    needed = ("n_latent",)
    zero: Tensor

    @checked
    def __init__(self, n_latent: Width | None = None) -> None:
        super().__init__()
        self.complete = n_latent is not None
        self.register_buffer("zero", torch.zeros(n_latent or 0), persistent=False)

    def forward(self, minibatch: Minibatch) -> dist.TorchDistribution:
        """The prior of every cell of the minibatch."""
        return dist.Normal(self.zero, 1.0).expand([len(minibatch), 1, len(self.zero)]).to_event(1)


class StudentT(Described):
    """Independent Student's t in every latent dimension: outlying cells cost less than under a normal.

    Parameters
    ----------
    n_latent
        Width of the latent space; leave it out in an option of a model.
    df
        Degrees of freedom; smaller values give heavier tails.

    Examples
    --------
    >>> from pyromosaic import Mosaic, MultiVI, simulate
    >>> from pyromosaic.data import measured
    >>> mosaic = Mosaic.from_mudata(simulate(40, {"rna": 50})[0])
    >>> minibatch, far = measured(mosaic, mosaic.find(None)), torch.full((10,), 4.0)
    >>> tails, normal = StudentT(10, df=3)(minibatch), StandardNormal(10)(minibatch)
    >>> bool((tails.log_prob(far) > normal.log_prob(far)).all())
    True
    >>> model = MultiVI(mosaic, n_latent=10, prior=StudentT(10))
    """

    needed = ("n_latent",)
    zero: Tensor

    @checked
    def __init__(self, n_latent: Width | None = None, df: Positive = 5.0) -> None:
        super().__init__()
        self.df, self.complete = df, n_latent is not None
        self.register_buffer("zero", torch.zeros(n_latent or 0), persistent=False)

    def forward(self, minibatch: Minibatch) -> dist.TorchDistribution:
        """The prior of every cell of the minibatch."""
        return dist.StudentT(self.df, self.zero, 1.0).expand([len(minibatch), 1, len(self.zero)]).to_event(1)


class ARD(Described):
    """Automatic relevance determination: ``Normal(0, scale_k)`` in latent dimension k, with learnt scales.

    A dimension that the data do not need ends with a scale near 0, provided that the decoder cannot compensate for a
    small scale by large weights (`pyromosaic.nn.unit_columns`).

    Parameters
    ----------
    n_latent
        Width of the latent space, an upper bound of the dimensions needed; leave it out in an option of a model.

    References
    ----------
    MacKay, Bayesian methods for backpropagation networks, 1994; Bishop, Bayesian PCA, 1999.

    Examples
    --------
    >>> from pyromosaic import Mosaic, MultiVI, simulate
    >>> mosaic = Mosaic.from_mudata(simulate(40, {"rna": 50})[0])
    >>> model = MultiVI(mosaic, n_latent=10, prior=ARD(10))
    >>> model.model.prior.log_scale.exp().tolist()[:3]  # all 1 before training
    [1.0, 1.0, 1.0]
    """

    needed = ("n_latent",)

    @checked
    def __init__(self, n_latent: Width | None = None) -> None:
        super().__init__()
        self.complete = n_latent is not None
        self.log_scale = nn.Parameter(torch.zeros(n_latent or 0))

    def forward(self, minibatch: Minibatch) -> dist.TorchDistribution:
        """The prior of every cell of the minibatch."""
        return dist.Normal(0.0, self.log_scale.exp()).expand([len(minibatch), 1, len(self.log_scale)]).to_event(1)


class RealMixture(dist.MixtureSameFamily):
    """A mixture over real vectors that says so, as samplers such as NUTS and automatic guides need."""

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def support(self) -> constraints.Constraint:
        """All real vectors."""
        return constraints.real_vector


class GaussianMixture(Described):
    """Mixture of diagonal normals with learnt parameters, ``sum_l pi_l Normal(m_l, diag(s_l^2))`` (DiagVI).

    With labels, there is one component per label. A cell with a known label belongs almost certainly to the component
    of that label; a cell without a label may belong to any component. Therefore some cells may be unlabelled.

    Parameters
    ----------
    n_latent
        Width of the latent space; leave it out in an option of a model.
    n_components
        Number of components, if there are no labels.
    labels
        The labels to which components are tied.

    Examples
    --------
    >>> from pyromosaic import Mosaic, MultiVI, simulate
    >>> from pyromosaic.data import measured
    >>> mosaic = Mosaic.from_mudata(simulate(40, {"rna": 50}, types=3)[0], label_key="celltype")
    >>> prior = GaussianMixture(10, labels=Labels(mosaic.schema))
    >>> probabilities = prior(measured(mosaic, mosaic.find(None))).mixture_distribution.probs
    >>> probabilities.shape, bool((probabilities.max(-1).values > 0.99).all())  # all labels are known
    (torch.Size([40, 1, 3]), True)
    >>> model = MultiVI(mosaic, n_latent=10, prior=prior)
    """

    needed = ("n_latent",)

    @checked
    def __init__(self, n_latent: Width | None = None, n_components: Count = 10, labels: Labels | None = None) -> None:
        super().__init__()
        self.complete = n_latent is not None
        if n_latent is None:
            return
        self.labels = labels if labels is not None and len(labels) else None
        n = n_components if self.labels is None else len(self.labels)
        self.logits = nn.Parameter(torch.zeros(n))
        self.loc = nn.Parameter(torch.randn(n, n_latent))
        self.log_scale = nn.Parameter(torch.zeros(n, n_latent))

    def forward(self, minibatch: Minibatch) -> dist.TorchDistribution:
        """The prior of every cell of the minibatch."""
        logits = self.logits.expand(len(minibatch), 1, -1)
        if self.labels is not None:
            known = self.labels(minibatch)
            one_hot = torch.nn.functional.one_hot(known.clamp_min(0), len(self.labels)) * (known >= 0).unsqueeze(-1)
            logits = logits + 100.0 * one_hot.unsqueeze(1)
        components = dist.Normal(self.loc, self.log_scale.exp() + 1e-4).to_event(1)
        return RealMixture(dist.Categorical(logits=logits), components.expand([len(minibatch), 1, len(self.logits)]))


class VampPrior(nn.Module):
    """Mixture of the posteriors of pseudo-cells with learnt measurements.

    ``p(z) = sum_k pi_k q(z | u_k)``, with the encoder that infers z from one modality. The prior therefore covers the
    region of the posteriors. Make it from the encoder of an existing model, and use it to replace the prior of that
    model.

    Parameters
    ----------
    encoder
        Encoder of a modality, e.g. ``model.guide.modalities["rna"].encoder``.
    n_latent
        Dimension of the latent space.
    n_components
        Number of pseudo-cells.

    References
    ----------
    Tomczak and Welling, VAE with a VampPrior, 2018.

    Examples
    --------
    >>> from pyromosaic import Mosaic, MultiVI, simulate
    >>> model = MultiVI(Mosaic.from_mudata(simulate(40, {"rna": 50})[0]), n_latent=10)
    >>> model.model.prior = VampPrior(model.guide.modalities["rna"].encoder, n_latent=10, n_components=20)
    >>> model.train(n_epochs=1, progress_bar=False)
    """

    @checked
    def __init__(self, encoder: Any, n_latent: Width, n_components: Count = 50) -> None:
        super().__init__()
        self.encoder, self.n_latent = (encoder,), n_latent  # the guide owns the encoder's parameters
        self.inputs = nn.Parameter(torch.randn(n_components, encoder.scaling.schema.n_features))  # scaled for it
        self.logits = nn.Parameter(torch.zeros(n_components))

    def forward(self, minibatch: Minibatch) -> dist.TorchDistribution:
        """The prior of every cell of the minibatch."""
        (encoder,) = self.encoder
        loc, scale = encoder.posterior(self.inputs, View.typical(encoder.scaling.schema, self.inputs))
        components = dist.Normal(loc[:, : self.n_latent], scale[:, : self.n_latent]).to_event(1)
        shape = [len(minibatch), 1, len(self.logits)]
        return RealMixture(dist.Categorical(logits=self.logits.expand(shape)), components.expand(shape))
