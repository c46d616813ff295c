"""An encoder with attention between groups of features."""

from torch import Tensor, nn

from pyromosaic.accepted import Rate, Whole, Width, checked
from pyromosaic.data import ModalitySchema
from pyromosaic.nn import Covariance, Encoder


class AttentionEncoder(Encoder):
    """Map measurements to a normal posterior, with attention between learnt combinations of features.

    Scaled measurements are projected to a few tokens, each a learnt combination of all features. Layers of
    self-attention update the tokens; their mean goes through two linear heads.

    Parameters
    ----------
    schema
        The modality.
    n_latent
        Dimension of the latent space.
    n_hidden
        Width of a token; a multiple of 4, which is the number of heads.
    n_layers, dropout, covariates
        As in `pyromosaic.nn.Encoder`.
    n_tokens
        Number of tokens.
    covariance
        As in `pyromosaic.nn.Encoder`.
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
        n_tokens: Width = 8,
        covariance: Covariance = "diagonal",
    ) -> None:
        super().__init__(schema, n_latent, n_hidden, 0, dropout, covariates, covariance=covariance)
        n_inputs = schema.n_features + covariates * schema.n_covariates
        self.hidden = nn.Sequential(
            nn.Linear(n_inputs, n_tokens * n_hidden),
            nn.Unflatten(-1, (n_tokens, n_hidden)),
            *(nn.TransformerEncoderLayer(n_hidden, 4, n_hidden, dropout, batch_first=True) for _ in range(n_layers)),
            MeanToken(),
        )


class MeanToken(nn.Module):
    """Mean over tokens."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Shape (b, width) from (b, tokens, width)."""
        return tokens.mean(-2)
