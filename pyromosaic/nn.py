"""Neural networks in plain torch, without probability."""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import CorrCholeskyTransform

from pyromosaic.accepted import Dimensions, Rate, Whole, Width, checked
from pyromosaic.data import DataKind, ModalitySchema, View
from pyromosaic.laplace import UncertainLinear, Weights


class Dropout(nn.Dropout):
    """`torch.nn.Dropout` that uses 16 random bits per unit on the CPU, from a fast generator with a seed by torch.

    The dropout rate is exact to 1 in 100,000.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Input x of any shape after dropout, scaled so that its expectation is x."""
        if not self.training or self.p in (0, 1) or x.device.type != "cpu":
            return super().forward(x)
        words = np.random.SFC64(int(torch.randint(2**62, ()))).random_raw(-(-x.numel() // 4))
        kept = words.view(np.uint16)[: x.numel()] >= round(2**16 * self.p)
        return x * torch.from_numpy(kept).to(x.dtype).mul_(1 / (1 - self.p)).reshape(x.shape)


def layers(
    n_in: int, n_hidden: int, n_layers: int, dropout: float, linear: type[nn.Linear] = nn.Linear
) -> nn.Sequential:
    """Fully connected layers, each followed by LayerNorm without affine part, LeakyReLU and dropout.

    Parameters
    ----------
    n_in, n_hidden, n_layers
        Width of the input, width of every layer, and number of layers; 0 layers return the input unchanged.
    dropout
        Dropout rate in training.
    linear
        Class of the linear layers.

    Returns
    -------
    torch.nn.Sequential
        From shape (..., n_in) to (..., n_hidden).
    """
    modules: list[nn.Module] = []
    for i in range(n_layers):
        modules += [linear(n_in if i == 0 else n_hidden, n_hidden)]
        modules += [nn.LayerNorm(n_hidden, elementwise_affine=False), nn.LeakyReLU(), Dropout(dropout)]
    return nn.Sequential(*modules)


def log_scale(x: Tensor, data_kind: DataKind) -> Tensor:
    """``log1p`` of counts and other values from 0; real values as they are.

    Examples
    --------
    >>> log_scale(torch.tensor([0.0, 1.0]), "count")
    tensor([0.0000, 0.6931])
    """
    return x if data_kind == "real" else torch.log1p(x)


class InputScaling(nn.Module):
    """Measurements as encoder input: size-normalised, on a log scale, standardised per feature.

    Counts are divided by the cell's size, multiplied by the median size, and transformed by ``log1p``. Accessibility is
    binarised first. Real values are only standardised. Measurements with an exposure are converted to rates. The mean
    and standard deviation are those of the training cells and are saved with the weights.

    Parameters
    ----------
    schema
        The modality.
    """

    mean: Tensor
    sd: Tensor

    def __init__(self, schema: ModalitySchema) -> None:
        super().__init__()
        self.schema = schema
        self.register_buffer("mean", torch.zeros(schema.n_features))
        self.register_buffer("sd", torch.ones(schema.n_features))

    def transform(self, view: View) -> Tensor:
        """The scale on which features are standardised, shape (b, features)."""
        x = view.dense_counts()
        if self.schema.spec.data_kind == "real":
            return x
        if view.exposure is not None:
            return view.rates(x)
        if self.schema.spec.traits.binary:
            x = (x > 0).to(x.dtype)
        factor = self.schema.library / view.library.clamp_min(1e-8)
        return torch.addcmul(x.new_ones(()), x, factor).log_()

    def start(self, view: View) -> None:
        """Set mean and standard deviation from the cells of a view."""
        x = self.transform(view)
        self.mean.copy_(view.over_cells(x))
        sd = view.spread(x)
        self.sd.copy_(sd.clamp_min(0.1 * sd.mean().clamp_min(1e-6)))

    def forward(self, view: View) -> Tensor:
        """Scaled measurements, shape (b, features); 0, the mean, where a feature was not measured."""
        scaled = (self.transform(view) - self.mean).div_(self.sd)
        return scaled if view.measured is None else torch.where(view.measured, scaled, 0.0)

    def expected(self, mean: Tensor, view: View) -> Tensor:
        """Scaled values of expected measurements for cells of median size, shape (b, features)."""
        rate = view.exposure is not None and self.schema.spec.data_kind != "real"
        x = view.rates(mean) if rate else log_scale(mean, self.schema.spec.data_kind)
        return (x - self.mean) / self.sd

    def measured(self, scaled: Tensor, view: View) -> Tensor:
        """Measurements with these scaled values, in cells of the view's sizes, shape (b, features)."""
        x = scaled * self.sd + self.mean
        if self.schema.spec.data_kind == "real":
            return x
        return x.expm1().clamp_min(0.0) * (view.library / self.schema.library)


#: Covariance of a posterior: its dimensions are independent, or not.
Covariance = Literal["diagonal", "full"]

#: From the real line to the Cholesky factor of a correlation matrix.
_to_factor = CorrCholeskyTransform()


class Encoder(nn.Module):
    """Map measurements of one modality to a normal posterior of the latent variable.

    Parameters
    ----------
    schema
        The modality.
    n_latent, n_hidden, n_layers, dropout
        Dimension of the latent space and shape of the network.
    covariates
        Whether the encoder also sees the covariates.
    embedding
        Dimension of a learnt embedding that replaces the covariates; 0 uses the covariates as they are.
    input_dropout
        Dropout rate on the inputs in training, scaled by ``1 - 250 / n_features``.
    covariance
        ``"diagonal"`` for independent latent dimensions, or ``"full"``: then a further layer gives their correlations,
        which start at 0.
    """

    @checked
    def __init__(
        self,
        schema: ModalitySchema,
        n_latent: Width,
        n_hidden: Width = 128,
        n_layers: Whole = 2,
        dropout: Rate = 0.1,
        covariates: bool = True,
        embedding: Dimensions = 0,
        input_dropout: Rate = 0.0,
        covariance: Covariance = "diagonal",
    ) -> None:
        super().__init__()
        self.scaling = InputScaling(schema)
        # what stands for a feature that was not measured, on the scale of the inputs
        self.missing = None if schema.panels is None else nn.Parameter(torch.zeros(schema.n_features))
        self.unseen = Dropout(input_dropout * max(0.0, 1 - 250 / schema.n_features))
        self.embed, width = embed(schema, embedding if covariates else 0)
        self.covariates = covariates and width > 0
        self.hidden = layers(schema.n_features + covariates * width, n_hidden, n_layers, dropout)
        self.loc = nn.Linear(n_hidden, n_latent)
        self.log_variance = nn.Linear(n_hidden, n_latent)
        self.correlation = None
        if covariance == "full" and n_latent > 1:
            self.correlation = nn.Linear(n_hidden, n_latent * (n_latent - 1) // 2)
            nn.init.zeros_(self.correlation.weight)
            nn.init.zeros_(self.correlation.bias)

    def start(self, view: View) -> None:
        """Learn the input scaling from the cells of a view."""
        self.scaling.start(view)

    def forward(self, view: View) -> tuple[Tensor, ...]:
        """Mean and standard deviation of the posterior, each of shape (b, latent).

        With full covariance also the lower Cholesky factor of the correlation matrix, shape (b, latent, latent).
        """
        return self.posterior(self.seen(view), view)

    def seen(self, view: View) -> Tensor:
        """Scaled measurements, shape (b, features), with dropout in training.

        If the training data have panels, a value for each feature is learnt, which replaces it where it was not
        measured; otherwise its mean does.
        """
        x: Tensor = self.scaling(view)
        if view.measured is not None and self.missing is not None:
            x = torch.where(view.measured, x, self.missing)
        seen: Tensor = self.unseen(x)
        return seen

    def posterior(self, x: Tensor, view: View) -> tuple[Tensor, ...]:
        """The same, given the input after scaling and dropout."""
        if self.covariates:
            x = torch.cat([x, self.embed(view.design())], dim=-1)
        hidden = self.hidden(x)
        moments = self.loc(hidden), torch.exp(0.5 * self.log_variance(hidden).clamp(-20.0, 20.0))
        return moments if self.correlation is None else (*moments, _to_factor(self.correlation(hidden)))


def encoder_of(
    encoder: Callable[..., nn.Module] | None, covariance: Covariance, default: type[Encoder] = Encoder, **options: Any
) -> Callable[..., nn.Module]:
    """The class or function that makes a model's encoders: the given one, or the default with these options.

    Parameters
    ----------
    encoder
        A user's encoder, or None.
    covariance
        Of posteriors, as in `Encoder`.
    default
        The encoder to use if none is given.
    **options
        Arguments of the default that come after the shape of the network.

    Raises
    ------
    ValueError
        If a full covariance is asked of a given encoder.
    """
    if encoder is None:
        return partial(default, covariance=covariance, **options)
    if covariance == "full":
        raise ValueError(
            "covariance='full' is for the encoders of this package; let your encoder return the Cholesky factor of the "
            "correlation matrix after mean and standard deviation, and leave covariance out"
        )
    return encoder


def embed(schema: ModalitySchema, width: int) -> tuple[nn.Module, int]:
    """Network input for the covariates and its width: an embedding with one row per category, or the covariates."""
    if width == 0 or schema.n_covariates == 0:
        return nn.Identity(), schema.n_covariates
    return nn.Linear(schema.n_covariates, width, bias=False), width


class Decoder(nn.Module):
    """Map latent variable and covariates to the predictors of a likelihood, with one linear head each.

    After training, its weights can have a posterior; see `pyromosaic.laplace.UncertainLinear`.

    Parameters
    ----------
    schema
        The modality.
    predictors
        Names of the heads; each has one output per feature.
    n_latent, n_hidden, n_layers, dropout
        Dimension of the latent space and shape of the network.
    embedding
        As in `Encoder`.
    """

    @checked
    def __init__(
        self,
        schema: ModalitySchema,
        predictors: tuple[str, ...],
        n_latent: Width,
        n_hidden: Width = 128,
        n_layers: Whole = 1,
        dropout: Rate = 0.0,
        embedding: Dimensions = 0,
    ) -> None:
        super().__init__()
        self.embed, width = embed(schema, embedding)
        self.hidden = layers(n_latent + width, n_hidden, n_layers, dropout, UncertainLinear)
        heads = {name: UncertainLinear(n_hidden + width, schema.n_features, last=True) for name in predictors}
        self.heads: Any = nn.ModuleDict(heads)

    def start(self, biases: Mapping[str, Tensor]) -> None:
        """Start training at these biases, e.g. from the mean profile of the data, instead of random ones."""
        with torch.no_grad():
            for name in biases.keys() & self.heads.keys():
                self.heads[name].bias.copy_(biases[name])

    def forward(self, z: Tensor, view: View) -> dict[str, Tensor]:
        """Predictors by name, each of shape (..., b, features), for z of shape (..., b, latent)."""
        inputs = self.inputs(z, view)
        return {name: head(inputs) for name, head in self.heads.items()}

    def outputs(
        self, inputs: Tensor, slope: Tensor | None, drawn: Weights | None, columns: slice | Tensor
    ) -> dict[str, Tensor]:
        """Predictors of some features, from the inputs of the heads; see `pyromosaic.laplace.UncertainLinear.moved`."""
        of_heads = [None] * len(self.heads) if drawn is None else drawn[len(drawn) - len(self.heads) :]
        heads = zip(self.heads.items(), of_heads, strict=True)
        return {name: head.moved(inputs, slope, deviation, columns) for (name, head), deviation in heads}

    def inputs(self, z: Tensor, view: View) -> Tensor:
        """What the heads see, the last hidden layer and the covariates, shape (..., b, n_hidden + covariates)."""
        design = self.embed(view.design()).expand(*z.shape[:-1], -1)
        hidden = self.hidden(torch.cat([z, design], dim=-1))
        return torch.cat([hidden, design], dim=-1)


class _UnitColumns(nn.Module):
    """Weights of a linear layer in which some columns have norm 1, from unconstrained weights."""

    def __init__(self, start: int, stop: int) -> None:
        super().__init__()
        self.columns = slice(start, stop)

    def forward(self, weight: Tensor) -> Tensor:
        before, own, behind = weight.tensor_split((self.columns.start, self.columns.stop), dim=1)
        return torch.cat([before, nn.functional.normalize(own, dim=0), behind], dim=1)


def unit_columns(layer: nn.Module, start: int, stop: int) -> None:
    """Constrain the weights of inputs `start` to `stop` of a linear layer to norm 1 for each input.

    Parameters
    ----------
    layer
        A linear layer, changed in place: its ``weight`` becomes parametrised.
    start, stop
        The first input, and the one after the last.

    Examples
    --------
    >>> layer = nn.Linear(5, 8)
    >>> unit_columns(layer, 0, 3)
    >>> torch.allclose(layer.weight[:, :3].norm(dim=0), torch.ones(3))
    True
    """
    nn.utils.parametrize.register_parametrization(layer, "weight", _UnitColumns(start, stop))


class GraphEncoder(nn.Module):
    """Map a guidance graph to a diagonal normal posterior of each feature's embedding.

    Each feature has a row in a table. Its representation is the weighted mean of its neighbours' rows (including its
    row), with the weights and signs of the edges. Two linear heads map it to location and scale. Therefore features
    with similar links start with similar embeddings.

    Parameters
    ----------
    n_features
        Number of nodes.
    edges
        Source and target nodes, shape (2, E): both directions, and a self loop at every node.
    strength
        Sign times weight of each edge, shape (E,).
    n_latent
        Dimension of an embedding.

    References
    ----------
    After the graph encoder of GLUE (Cao and Gao, Nature Biotechnology 2022), which ignores weights and signs.
    """

    edges: Tensor
    strength: Tensor

    def __init__(self, n_features: int, edges: Tensor, strength: Tensor, n_latent: int) -> None:
        super().__init__()
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # raised when it compiles on import
            from torch_geometric.nn import SimpleConv  # imports slowly

        degree = torch.zeros(n_features).index_add(0, edges[1], strength.abs())
        self.register_buffer("edges", edges, persistent=False)
        self.register_buffer("strength", strength / degree[edges[1]], persistent=False)
        self.table = nn.Parameter(0.1 * torch.randn(n_features, n_latent))
        self.propagate = SimpleConv(aggr="sum")
        self.loc = nn.Linear(n_latent, n_latent)
        self.scale = nn.Linear(n_latent, n_latent)
        with torch.no_grad():  # start at the mean of the neighbours, with little noise
            self.loc.weight.copy_(torch.eye(n_latent))
            self.loc.bias.zero_()
            self.scale.weight.zero_()
            self.scale.bias.fill_(-2.0)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Location and scale of every feature's embedding, each of shape (features, latent)."""
        neighbours = self.propagate(self.table, self.edges, self.strength)
        return self.loc(neighbours), nn.functional.softplus(self.scale(neighbours)) + 1e-8


#: Direction of a likelihood's predictor as the feature's signal increases: up (the default), down (for antibodies,
#: background becomes less likely), or none.
DIRECTION: Mapping[str, float] = {"mixing": -1.0, "gate": 0.0}


class InnerProductDecoder(nn.Module):
    """Map cell and feature embeddings to the predictors of a likelihood: ``eta = softplus(a) * signal + b``.

    The signal of a feature in a cell is the inner product ``<z, v>``, plus the inner product of the cell's private
    latent variable with private loadings of the modality. Scale a and bias b are per batch and feature, for each
    predictor; further covariates shift eta linearly (DiagVI).

    Parameters
    ----------
    schema
        The modality.
    predictors
        Names of the predictors, each as wide as the modality has features.
    n_private
        Dimension of the private latent variable.
    """

    @checked
    def __init__(self, schema: ModalitySchema, predictors: tuple[str, ...], n_private: Dimensions = 0) -> None:
        super().__init__()
        self.n_batches = len(schema.categories[schema.spec.batch_key]) if schema.spec.batch_key else 0
        n_effects = schema.n_covariates - self.n_batches
        shape = (max(1, self.n_batches), schema.n_features)
        self.scale: Any = nn.ParameterDict({name: torch.zeros(shape) for name in predictors if _direction(name)})
        self.bias: Any = nn.ParameterDict({name: torch.zeros(shape) for name in predictors})
        self.effects: Any = nn.ParameterDict({name: torch.zeros(n_effects, shape[1]) for name in predictors})
        self.loadings = nn.Parameter(0.1 * torch.randn(schema.n_features, n_private))

    def start(self, biases: Mapping[str, Tensor]) -> None:
        """Start training at these biases, e.g. from the mean profile of the data."""
        with torch.no_grad():
            for name in biases.keys() & self.bias.keys():
                self.bias[name].copy_(biases[name].expand_as(self.bias[name]))

    def forward(self, z: Tensor, v: Tensor, private: Tensor | None, view: View) -> dict[str, Tensor]:
        """Predictors by name, each of shape (..., b, features).

        Parameters
        ----------
        z
            Shared latent variable, shape (..., b, latent).
        v
            Embeddings of the modality's features, shape (..., features, latent).
        private
            Private latent variable, shape (..., b, n_private), if there is one.
        view
            The cells.
        """
        signal = z @ v.mT if private is None else z @ v.mT + private @ self.loadings.T
        design = view.design()
        batch = design[:, : self.n_batches] if self.n_batches else torch.ones_like(view.library)
        effects = design[:, self.n_batches :]
        predictors = {}
        for name, bias in self.bias.items():
            shift = batch @ bias
            if effects.shape[1]:
                shift = shift + effects @ self.effects[name]
            direction = _direction(name)
            if direction:
                scale = batch @ (direction * nn.functional.softplus(self.scale[name]))
                predictors[name] = torch.addcmul(shift, scale, signal)
            else:
                predictors[name] = shift.expand_as(signal)
        return predictors


def _direction(predictor: str) -> float:
    return DIRECTION.get(predictor, 1.0)
