"""What kind of measurement a likelihood describes, said once for all that look at it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

DataKind = Literal["count", "nonnegative", "real"]
EffectScale = Literal["log2", "difference"]


@dataclass(frozen=True)
class Traits:
    """What follows from a likelihood for checks of the data, encoders, comparisons of cells and linkage.

    Parameters
    ----------
    kind
        The numbers that the data are checked to be: ``"count"``, ``"nonnegative"`` or ``"real"``.
    sized
        Whether what is expected is proportional to the cell's size.
    shares
        Whether the denoised values are shares of a cell's total, as of RNA.
    dispersed
        Whether counts have an inverse dispersion, as `ModalitySpec.dispersion` shapes it; only those that are `sized`.
    latent_size
        Whether ``library="latent"`` of a model infers the cell's size.
    binary
        Whether a count is only asked whether it is above 0.
    background
        Whether a count may be background, as of antibodies.
    effect
        Scale on which two groups of cells are compared, ``"log2"`` (fold change) or ``"difference"``; None for
        differences of real and binary values and fold changes of others.
    pseudocount
        Added to both sides of a fold change, in measured units of a cell of median size.
    transform
        What linkage does before it standardises: ``"log"`` (of size-normalised counts), ``"centred_log_ratio"``,
        ``"open"`` (above 0 or not), ``"log1p"`` or ``"as_is"``.

    Examples
    --------
    >>> Traits("real").scale, Traits("nonnegative").scale, TRAITS["bernoulli"].scale
    ('difference', 'log2', 'difference')
    """

    kind: DataKind = "real"
    sized: bool = False
    shares: bool = False
    dispersed: bool = True
    latent_size: bool = False
    binary: bool = False
    background: bool = False
    effect: EffectScale | None = None
    pseudocount: float = 1.0
    transform: str = "as_is"

    def __post_init__(self) -> None:
        if self.kind not in ("count", "nonnegative", "real"):
            raise ValueError(f'the kind of data is "count", "nonnegative" or "real"; found {self.kind!r}')

    @property
    def scale(self) -> EffectScale:
        """Scale on which two groups of cells are compared."""
        return self.effect or ("difference" if self.kind == "real" or self.binary else "log2")


_SHARES = Traits("count", sized=True, shares=True, pseudocount=0.01, transform="log")
_RNA = replace(_SHARES, latent_size=True)
_POSITIVE = Traits("nonnegative", transform="log1p")

#: The traits of the likelihoods that have a name.
TRAITS: Mapping[str, Traits] = {
    "nb": _RNA,
    "zinb": _RNA,
    "nb_mixture": Traits("count", sized=True, background=True, transform="centred_log_ratio"),
    "multinomial": replace(_SHARES, dispersed=False),
    "bernoulli": Traits("count", binary=True, transform="open"),
    "normal": Traits("real"),
    "log1p_normal": _POSITIVE,
    "ziln": _POSITIVE,
    "zig": _POSITIVE,
}
