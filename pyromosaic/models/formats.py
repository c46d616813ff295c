"""Versions of the format of saved models, and how to read earlier versions."""

from collections.abc import Collection, Mapping
from copy import deepcopy
from typing import Any

from torch import Tensor

from pyromosaic.data import TRAITS, Schema
from pyromosaic.models.base import RENAMED
from pyromosaic.program import Slots

FORMAT = 8
READ = (4, 5, 6, 7, FORMAT)

#: Up to format 5 arguments of a part were options: the part by its option now, its arguments by those options, and the
#: weight that was the default.
ARGUMENTS = (
    (
        "alignment",
        "Sinkhorn",
        {
            "lam_sinkhorn": "weight",
            "align_draws": "sampled",
            "blur": "blur",
            "reach": "reach",
            "reference": "reference",
        },
        3.0,
    ),
    ("anchors", "Anchors", {"lam_anchors": "weight", "n_neighbors": "n_neighbors"}, 2.0),
    ("geometry", "Geometry", {"lam_geometry": "weight", "geometry": "likeness"}, 1.0),
    ("adversary", "Discriminator", {"lam_adversary": "weight", "n_adversary_steps": "n_steps"}, 1.0),
    ("adversary", "Adversary", {"adversary": "weight", "adversary_target": "target"}, 0.0),
)

#: Format 4 had a dictionary of modalities for each kind of part; format 5 has the parts of each modality.
PARTS = {
    "sizes": "size",
    "decoders": "decoder",
    "likelihoods": "likelihood",
    "encoders": "encoder",
    "size_encoders": "size_encoder",
}


#: Ends of the names of weights by the format with which they came; in earlier files they have their start values.
ADDED = {7: ("fusion.width.tenth_of_log", "width_of_s.tenth_of_log"), 8: (".size.of_depths",)}


def upgraded_schema(content: Mapping[str, Any], likelihoods: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a saved model in the present format, from what ``model.json`` holds.

    Up to format 5 a multinomial could have been given a dispersion by batch or label, which it ignored. Up to format 6
    the background was latent by default, also in likelihoods without one.
    """
    schema = deepcopy(content["schema"])
    for modality in schema["modalities"].values():
        spec = modality["spec"]
        if content["format"] < 6 and spec["likelihood"] == "multinomial":
            spec["dispersion"] = "gene"
        if content["format"] < 7:
            own = likelihoods.get(spec["likelihood"])
            traits = TRAITS.get(spec["likelihood"]) if own is None else own.traits
            spec.setdefault("background", "latent")
            if traits is not None and not traits.background:
                spec["background"] = "marginal"
    return schema


def upgraded(
    content: Mapping[str, Any], weights: Mapping[str, Tensor], schema: Schema, accepted: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Options and weights of a saved model in the current format.

    Parameters
    ----------
    content
        Content of ``model.json``.
    weights
        Weights by name.
    schema
        Of the model.
    accepted
        Options of its class, with their defaults.

    Examples
    --------
    >>> import torch
    >>> from pyromosaic import Mosaic, simulate
    >>> schema = Mosaic.from_mudata(simulate(40, {"rna": 50})[0]).schema
    >>> content = {"format": 4, "class": "MultiVI", "options": {"n_latent": 3}}
    >>> weights = {"model.likelihoods.rna.log_theta": torch.zeros(50)}
    >>> upgraded(content, weights, schema, {"n_latent": 15})[1].keys()
    dict_keys(['model.modalities.rna.likelihood.log_theta'])
    """
    options = dict(content["options"])
    if content["format"] < 6:
        _rename(options, accepted)
    if content["format"] < 7 and options.get("prior", "") is None and accepted["prior"] == "mixture":
        options["prior"] = "normal"  # what was the default
    if content["format"] > 4:
        return options, dict(weights)
    if options.get("library") == "latent":  # in ContrastiveVI of antibodies too
        options["library"] = {key.split(".")[2]: "latent" for key in weights if key.startswith("guide.size_encoders.")}
    names = Slots.names(schema.modalities)
    return options, {_renamed(key, names): value for key, value in weights.items()}


def _rename(options: dict[str, Any], accepted: Collection[str]) -> None:
    """Give options of format 5 their present names, unless the class still has an option of the old name."""
    for option, part, moved, weight in ARGUMENTS:
        old = [name for name in moved if name in options and (name == option or name not in accepted)]
        if option in accepted and set(old) - {option}:
            arguments = {"weight": weight} | {moved[name]: options.pop(name) for name in old}
            more = arguments.keys() - {"weight"}
            whole = {"part": part, "arguments": arguments}
            options[option] = whole if more and arguments["weight"] else arguments["weight"]
    if "prior" in accepted and "n_components" in options and "n_components" not in accepted:
        arguments = {"n_components": options.pop("n_components")}
        if options.get("prior") == "mixture":
            options["prior"] = {"part": "GaussianMixture", "arguments": arguments}
    for name, new in RENAMED.items():
        if name in options and name not in accepted and new in accepted:
            options[new] = options.pop(name)


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
