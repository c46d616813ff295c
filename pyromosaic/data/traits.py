"""What kind of measurement a likelihood describes; no other file asks for the name of a likelihood."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

DataKind = Literal["count", "nonnegative", "real"]
EffectScale = Literal["log2", "difference"]


@dataclass(frozen=True)
class Traits:
    """What the likelihood of a modality means for checks of the data, encoders, comparisons of cells and linkage.

    Parameters
    ----------
    kind
        Which numbers registration accepts: ``"count"``, ``"nonnegative"`` or ``"real"``.
    sized
        Whether the expected measurement is proportional to the size of the cell.
    shares
        Whether denoised values are shares of the total of a cell, as they are for RNA.
    dispersed
        Whether counts have an inverse dispersion, whose shape `ModalitySpec.dispersion` sets; requires `sized`.
    latent_size
        Whether the model option ``library="latent"`` infers the size of the cell.
    binary
        Whether only the presence of a count matters: above 0 or not.
    background
        Whether a count may be background, as it may for antibodies.
    effect
        Scale on which two groups of cells are compared, ``"log2"`` (fold change) or ``"difference"``. If None, real
        and binary values are compared by differences, and others by fold changes.
    pseudocount
        Number that is added to both sides of a fold change, in units of the measurements of a cell of median size.
    transform
        Transformation in linkage before standardising: ``"log"`` (of size-normalised counts), ``"centred_log_ratio"``,
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
            raise ValueError(f'the kind of data must be "count", "nonnegative" or "real"; found {self.kind!r}')

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
    "poisson": replace(_SHARES, dispersed=False, latent_size=True),
    "bernoulli": Traits("count", binary=True, transform="open"),
    "normal": Traits("real"),
    "log1p_normal": _POSITIVE,
    "ziln": _POSITIVE,
    "zig": _POSITIVE,
}
