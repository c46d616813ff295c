"""Versions of the format of saved models, and how to read earlier versions."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pyromosaic.data import Schema
from pyromosaic.models.base import RENAMED
from pyromosaic.program import Slots

FORMAT = 5
READ = (4, FORMAT)

#: Format 4 had a dictionary of modalities for each kind of part; format 5 has the parts of each modality.
PARTS = {
    "sizes": "size",
    "decoders": "decoder",
    "likelihoods": "likelihood",
    "encoders": "encoder",
    "size_encoders": "size_encoder",
}


def upgraded(
    content: Mapping[str, Any], weights: Mapping[str, Tensor], schema: Schema
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Options and weights of a saved model in the current format.

    Parameters
    ----------
    content
        Content of ``model.json``.
    weights
        Weights by name.
    schema
        Schema of the model.

    Examples
    --------
    >>> import torch
    >>> from pyromosaic import Mosaic, simulate
    >>> schema = Mosaic.from_mudata(simulate(40, {"rna": 50})[0]).schema
    >>> content = {"format": 4, "class": "MultiVI", "options": {"n_latent": 3}}
    >>> upgraded(content, {"model.likelihoods.rna.log_theta": torch.zeros(50)}, schema)[1].keys()
    dict_keys(['model.modalities.rna.likelihood.log_theta'])
    """
    options = dict(content["options"])
    if content["format"] == FORMAT:
        return options, dict(weights)
    for old, new in RENAMED.items():
        if old in options and new not in options:
            options[new] = options.pop(old)
    if options.get("library") == "latent":  # in ContrastiveVI of antibodies too
        options["library"] = {key.split(".")[2]: "latent" for key in weights if key.startswith("guide.size_encoders.")}
    names = Slots.names(schema.modalities)
    return options, {_renamed(key, names): value for key, value in weights.items()}


def _renamed(key: str, names: Mapping[str, str]) -> str:
    """The name in format 5 of a parameter in format 4."""
    words = key.split(".")
    at = 3 if words[1] == "global_posterior" else 1  # behind "locs" or "scales"
    if at + 1 >= len(words) or words[at] not in PARTS:
        return key
    part, modality, rest = PARTS[words[at]], words[at + 1], words[at + 2 :]
    if modality not in names:  # encoders of z and s, each by modality
        modality, rest = rest[0], [modality, *rest[1:]]
    return ".".join([*words[:at], "modalities", names[modality], part, *rest])
