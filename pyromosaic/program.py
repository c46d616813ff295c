"""Base of Pyro models and guides over a mosaic: local parameters, and checks of sites and plates."""

import sysconfig
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from copy import deepcopy
from functools import partial
from pathlib import Path
from traceback import walk_tb
from typing import Any
from weakref import WeakSet

import pyro
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.infer.autoguide import AutoNormal, init_to_median
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from torch import Tensor, nn

from pyromosaic.data import Minibatch, Schema
from pyromosaic.threads import one_thread


class weighted(Messenger):
    """Effect handler: multiplies the log densities of sites by a weight.

    Unlike `pyro.poutine.scale`, it remembers the weight, so that `pyromosaic.train.MosaicELBO` can compute the bound
    without it. As with `scale`, a latent site needs the same weight in model and guide.

    Parameters
    ----------
    weight
        The weight.
    """

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def _pyro_sample(self, msg: Message) -> None:
        msg["scale"] = msg["scale"] * self.weight
        msg["infer"]["weight"] = msg["infer"].get("weight", 1.0) * self.weight


class AtMean(Messenger):
    """Effect handler: unobserved sites take the mean of their distribution instead of a draw.

    Parameters
    ----------
    which
        Function from the name of a site to whether it takes its mean; by default all do.
    """

    def __init__(self, which: Callable[[str], bool] = lambda name: True) -> None:
        super().__init__()
        self.which = which

    def _pyro_sample(self, msg: Message) -> None:
        if not msg["is_observed"] and isinstance(msg["fn"], TorchDistributionMixin) and self.which(msg["name"] or ""):
            try:
                msg["value"] = msg["fn"].mean
            except NotImplementedError:
                raise ValueError(f"the {type(msg['fn']).__name__} of site {msg['name']!r} has no mean") from None
            msg["done"] = True


class _Dense(Messenger):
    """Effect handler: sparse measurements become strided tensors, which all tools of Pyro take."""

    def _pyro_sample(self, msg: Message) -> None:
        if msg["is_observed"] and isinstance(msg["value"], Tensor) and msg["value"].is_sparse:
            msg["value"] = msg["value"].to_dense()


_announced: ContextVar[bool] = ContextVar("announced", default=True)


@contextmanager
def unannounced() -> Iterator[None]:
    """Context of training by Lightning: no ``pyro.module`` statements, and sparse measurements stay sparse.

    `pyro.infer.SVI` finds the parameters by these statements. Lightning gets them from ``module.parameters()``, and
    then the statements only take time: 7 % of a training step. Tools of Pyro need strided measurements.
    """
    before = _announced.set(False)
    try:
        yield
    finally:
        _announced.reset(before)


class Part(PyroModule):
    """A part of a program: its parameters stay local to it.

    Parameters
    ----------
    name
        Prefix of the names of parameters.
    """

    def __init__(self, name: str = "") -> None:
        with one_thread, pyro.settings.context(module_local_params=True):
            super().__init__(name)

    def __getattr__(self, name: str) -> Any:
        """Find a parameter, a part or a global latent variable."""
        part = None if _announced.get() else self.__dict__["_modules"].get(name)
        return super().__getattr__(name) if part is None or isinstance(part, PyroModule) else part


class Slots(Part):
    """Modules by modality, in which Pyro finds parameters and global latent variables.

    Parameters
    ----------
    modules
        Modules by modality. If torch does not accept a name for a module (``"rna.v2"``, ``"type"``), the names of
        parameters have ``modality_<number>`` instead.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.keys_by_name = self.names(modules)
        for name, module in modules.items():
            self[name] = module

    @classmethod
    def names(cls, modalities: Iterable[str]) -> dict[str, str]:
        """For each modality, its name in the names of parameters."""
        return {name: f"modality_{i}" if _unfit(name, cls) else name for i, name in enumerate(modalities)}

    def __getitem__(self, name: str) -> Any:
        return getattr(self, self.keys_by_name[name])  # with this, Pyro registers the parameters of plain modules

    def __setitem__(self, name: str, module: nn.Module) -> None:
        setattr(self, self.keys_by_name[name], module)

    def __contains__(self, name: object) -> bool:
        return name in self.keys_by_name

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys_by_name)

    def __len__(self) -> int:
        return len(self.keys_by_name)

    def items(self) -> Iterator[tuple[str, Any]]:
        """Names and modules."""
        return ((name, self[name]) for name in self)


def _unfit(name: str, kind: type[nn.Module]) -> bool:
    """Whether torch refuses the name for a module in a module of this kind, or the name may be taken."""
    taken = name in ("", "training", "keys_by_name") or name.startswith(("_", "modality_")) or hasattr(kind, name)
    return taken or "." in name


def _itself(parameter: Tensor) -> Tensor:
    return parameter


def _globals_first(program: "Program", inputs: Any) -> None:
    program.globals()


class Program(Part):
    """A model or a guide: a `pyro.nn.PyroModule` called with a minibatch and a KL weight.

    A subclass defines ``forward(self, minibatch, kl_weight=1.0)``; see `pyromosaic.models.MosaicModel` for its sites.
    The KL weight grows from 0 to 1 while training warms up; pass it to `pyromosaic.measurement.cells`.

    Parameters stay local to the module, regardless of Pyro's ``module_local_params`` setting elsewhere in the process.
    Therefore several models, and other Pyro programs, never share parameters by accident.

    A prior, decoder or likelihood may have global latent variables, as `pyro.nn.PyroSample` attributes. They are drawn
    first, outside every plate, and have one value for all cells. Their posterior is ``global_posterior`` in the guide,
    any of Pyro's automatic guides of ``model.globals``; by default independent normals.

    Parameters
    ----------
    name
        Prefix of the names of parameters: ``"guide"`` for a guide, to distinguish its parameters from those of the
        model.
    """

    def __init__(self, name: str = "") -> None:
        super().__init__(name)
        self.register_forward_pre_hook(_globals_first)

    def globals(self) -> None:
        """Draw the global latent variables."""
        with self._pyro_context:
            if "global_posterior" in self._modules:
                self.global_posterior()
            for module in self.modules():
                for name in getattr(module, "_pyro_samples", ()):
                    getattr(module, name)

    def match(self, model: "Program") -> None:
        """Give this guide a posterior for the global latent variables of a model, if it has any."""
        if list(poutine.trace(model.globals).get_trace().stochastic_nodes):
            self.global_posterior = AutoNormal(model.globals, init_loc_fn=init_to_median(num_samples=50))
            self.globals()  # makes its parameters

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program."""
        for parameter in self.parameters() if _announced.get() else ():
            # pyro.infer.SVI asks each parameter for the tensor to optimise, and plain ones do not answer in local mode.
            if not hasattr(parameter, "unconstrained"):
                parameter.unconstrained = partial(_itself, parameter)
        with (
            one_thread,
            pyro.settings.context(module_local_params=True),
            _Dense() if _announced.get() else nullcontext(),
        ):
            return super().__call__(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """What pickle keeps; `unconstrained`, which refers to its own parameter, is made again by the next call."""
        for parameter in self.parameters():
            vars(parameter).pop("unconstrained", None)
        return dict(vars(self))


_TAKEN: "WeakSet[nn.Module]" = WeakSet()  # objects that are part of a model


def own(module: Any) -> Any:
    """Make an object from the user, e.g. a prior, part of a single model.

    Parameters
    ----------
    module
        The object. If it is already part of another model, a copy is used.

    Returns
    -------
    nn.Module
        The object, or the copy.
    """
    if not isinstance(module, nn.Module):
        return module
    module = deepcopy(module) if module in _TAKEN else module
    _TAKEN.add(module)
    for part in module.modules():  # one made under Pyro's default setting would use the global store of parameters
        if isinstance(part, PyroModule) and not hasattr(part._pyro_context, "param_state"):
            part._pyro_context.param_state = {"params": {}, "constraints": {}}
    return module


def check_names(schema: Schema) -> None:
    """Refuse a modality with the name of a site or plate of a program.

    Raises
    ------
    ValueError
        With the name.

    Examples
    --------
    >>> from pyromosaic import Mosaic, simulate
    >>> check_names(Mosaic.from_mudata(simulate(40, {"rna": 50})[0]).schema)
    """
    taken = {"z", "s", "v", "edges", "cells", "features", "pairs"}
    for name in schema.modalities:
        taken |= {f"z_{name}", *(f"{name}_{of}" for of in ("cells", "features", "size", "library", "background"))}
    if schema.cohorts is not None:
        taken |= {f"s_{group}" for group in schema.cohorts.names}
    for name in schema.modalities:
        if name in taken:
            raise ValueError(
                f"modality {name!r} has the name of a variable or plate of the models; give it another name"
            )


#: Folders of code that is not the user's: this package, those installed beside torch and Pyro, and Python's own.
LIBRARIES = [Path(__file__).parent, *(Path(str(m.__file__)).parents[1] for m in (torch, pyro, sysconfig))]


class SiteError(ValueError):
    """A model and a guide do not fit each other or the data; the message names the site."""


class Inspection(Messenger):
    """Effect handler: remembers the sites of a program, and refuses one that does not fit its plates or its value.

    Parameters
    ----------
    part
        ``"model"`` or ``"guide"``, for the message.
    unchecked
        Names of sites whose values may lie outside the support.
    """

    def __init__(self, part: str, unchecked: Collection[str] = ()) -> None:
        super().__init__()
        self.part, self.unchecked = part, unchecked
        self.sites: dict[str, Message] = {}
        self.names: set[str | None] = set()

    def _pyro_post_sample(self, msg: Message) -> None:
        fn, name = msg["fn"], msg["name"]
        if not isinstance(fn, TorchDistributionMixin):
            return
        here = f"site {name!r} of the {self.part}"
        if name in self.names:
            raise SiteError(f"{here} occurs twice; every site (for example a penalty) needs a different name")
        self.names.add(name)
        if isinstance(fn, dist.Unit):
            if fn.log_factor.dim():
                raise SiteError(f"{here} must be a scalar; found shape {tuple(fn.log_factor.shape)}")
            return
        plates = {frame.dim: frame for frame in msg["cond_indep_stack"] if frame.vectorized}
        for dim, size in enumerate(reversed(fn.batch_shape), start=1):
            if size != 1 and -dim not in plates:
                known = ", ".join(f"{f.name!r} ({f.size} at dim {f.dim})" for f in plates.values()) or "none"
                raise SiteError(
                    f"{here} has batch shape {tuple(fn.batch_shape)} and event shape {tuple(fn.event_shape)} in plates "
                    f"{known}; make the site in its plate, or use .to_event() for a dimension that has none"
                )
        if msg["is_observed"]:
            _fits(here, fn, msg["value"], "measurements", name not in self.unchecked)
        self.sites[name] = msg


def _fits(here: str, fn: Any, value: Tensor, kind: str, supported: bool = True) -> None:
    """Refuse values of another shape than the distribution's, or outside its support."""
    shape = tuple(fn.shape())
    if tuple(value.shape) != shape:
        raise SiteError(f"{here} has shape {shape}; the {kind} have shape {tuple(value.shape)}")
    support, value = fn.support, value.to_dense() if value.is_sparse else value
    while isinstance(support, dist.constraints.independent):
        support = support.base_constraint
    inside = support.check(value)
    if supported and not inside.all():
        family = fn
        while isinstance(family, dist.Independent | dist.MaskedDistribution):
            family = family.base_dist
        first = value[~inside].reshape(-1)[0].item()
        accepted = str(support) if len(str(support)) < 60 else type(support).__name__
        raise SiteError(
            f"{here}, {type(family).__name__} of shape {shape}, accepts {accepted}; among the {kind} is {first:.4g}"
        )


def one_line(error: BaseException) -> str:
    """Type and first line of an error, and where it arose in code of the user.

    Parameters
    ----------
    error
        The error, as caught.

    Examples
    --------
    >>> one_line(KeyError("loc"))
    "KeyError: 'loc'"
    """
    message = f"{type(error).__name__}: {str(error).splitlines()[0]}" if str(error) else type(error).__name__
    own = [(f.f_code, n) for f, n in walk_tb(error.__traceback__) if not _library(f.f_code.co_filename)]
    if not own:
        return message
    code, line = own[-1]
    return f"{message} (in {code.co_qualname}, {Path(code.co_filename).name} line {line})"


def _library(file: str) -> bool:
    return any(Path(file).is_relative_to(folder) for folder in LIBRARIES)


def _inspected(look: Inspection, program: Program, minibatch: Minibatch) -> SiteError | None:
    try:
        with one_thread, torch.random.fork_rng(), torch.no_grad(), pyro.validation_enabled(False), look:
            program(minibatch, 0.5)  # unlike 1, a site that leaves out the weight is seen
    except SiteError as error:
        return error
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        last = next((f"site {name!r}" for name in reversed(look.sites)), "its beginning")
        return SiteError(f"the {look.part} fails after {last}: {one_line(error)}")
    return None


def _spelled(weight: Tensor) -> str:
    return f"{weight.item():.4g}" if weight.numel() == 1 else "that differs between cells"


def check(model: Program, guide: Program, minibatch: Minibatch, unchecked: Collection[str] = ()) -> None:
    """Run model and guide once, and refuse them if they do not fit.

    Parameters
    ----------
    model, guide
        The Pyro program.
    minibatch
        A few cells to run it with.
    unchecked
        Names of sites whose values may lie outside the support.

    Raises
    ------
    SiteError
        If a latent site is in only one of the two programs or has another weight in each, if a shape does not fit the
        plates, the other program or the measurements, or if values lie outside a support. The message names the site.

    Examples
    --------
    >>> from pyromosaic import Mosaic, MultiVI, simulate
    >>> from pyromosaic.data import measured
    >>> mosaic = Mosaic.from_mudata(simulate(40, {"rna": 50})[0])
    >>> model = MultiVI(mosaic)
    >>> check(model.model, model.guide, measured(mosaic, mosaic.find(None)))  # they fit
    """
    story, inference = Inspection("model", unchecked), Inspection("guide")
    failures = [_inspected(look, program, minibatch) for look, program in ((story, model), (inference, guide))]
    for name, site in inference.sites.items():
        if name in story.sites:
            _fits(f"site {name!r} of the model", story.sites[name]["fn"], site["value"], "draws of the guide")
            one, other = (torch.as_tensor(msg["scale"]) for msg in (story.sites[name], site))
            if one.shape != other.shape or not torch.allclose(one, other):
                raise SiteError(
                    f"site {name!r} has weight {_spelled(one)} in the model and {_spelled(other)} in the guide; make "
                    "it in the same plates in both, with the same kl_weight, e.g. in `with cells(minibatch, kl_weight)`"
                )
    for failure in failures:
        if failure is not None:
            raise failure
    for name, site in story.sites.items():
        if not site["is_observed"] and name not in inference.sites:
            shape = tuple(site["value"].shape)
            raise SiteError(f"site {name!r} of the model, of shape {shape}, is latent and missing from the guide")
    for name, site in inference.sites.items():
        if name not in story.sites and not site["infer"].get("is_auxiliary"):
            shape = tuple(site["value"].shape)
            raise SiteError(f"site {name!r} of the guide, of shape {shape}, is not in the model")
