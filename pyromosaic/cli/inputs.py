"""Data for the command line: read and checked before anything is trained."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from pyromosaic.cli.outputs import WRITING, reason

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData


def read(path: Path) -> "MuData":
    """The data to integrate."""
    import mudata

    if path.suffix != ".h5mu":
        raise ValueError(f"the data must be a MuData file that ends in .h5mu; found {path}")
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        mdata = mudata.read_h5mu(path)
    except (TypeError, AttributeError):  # so mudata 0.3 answers to an HDF5 file of another kind
        mdata = mudata.MuData({})
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} cannot be read as MuData: {reason(error)}") from error
    if not mdata.mod:
        raise ValueError(f"{path} cannot be read as MuData: it has no modality. Is it a single AnnData (.h5ad)?")
    for name in mdata.mod:
        if f"{name}_imputed" in mdata.mod:
            raise ValueError(f"{path} already has a modality '{name}_imputed'; integrate the data without it")
    return mdata


def check_tables(path: Path, mdata: "MuData") -> None:
    """Refuse tables that can be read but not written again, before training."""
    from anndata import AnnData

    for name, part in {"the whole": mdata, **mdata.mod}.items():
        with TemporaryDirectory() as folder:
            try:
                AnnData(obs=part.obs, var=part.var, uns=dict(part.uns)).write_h5ad(Path(folder) / "tables.h5ad")
            except WRITING as error:
                raise ValueError(f"{path}, {name}: obs, var or uns cannot be written again: {reason(error)}") from error


def likelihoods(mdata: "MuData", given: list[str]) -> dict[str, str]:
    """The likelihood of each modality, as given or by its name."""
    from pyromosaic.data.spec import LIKELIHOOD_BY_NAME

    likelihoods = {name: LIKELIHOOD_BY_NAME.get(name.lower(), "") for name in mdata.mod}
    for entry in given:
        name, sign, likelihood = entry.partition("=")
        if not (name and sign and likelihood):
            raise ValueError(f"--likelihood needs MODALITY=NAME, e.g. rna=nb; found {entry!r}")
        if name not in likelihoods:
            raise ValueError(f"--likelihood {entry}: there is no modality {name!r}; found {', '.join(mdata.mod)}")
        likelihoods[name] = likelihood
    for name, likelihood in likelihoods.items():
        if not likelihood:
            raise ValueError(
                f"the name of modality {name!r} does not say which likelihood it needs; pass one, e.g. "
                f"--likelihood {name}=nb"
            )
    return likelihoods


def hide(mdata: "MuData", n_cells: int, seed: int) -> "tuple[MuData, dict[str, AnnData]]":
    """The data to train on, and the measurements hidden from training."""
    from pyromosaic import data

    if n_cells == 0:
        return mdata, {}
    if len(mdata.mod) < 2:
        raise ValueError("--hide needs at least two modalities, because a hidden modality is imputed from the others")
    return data.hide(mdata, dict.fromkeys(mdata.mod, n_cells), seed)
