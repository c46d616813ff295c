#!/usr/bin/env bash
# pyro-ppl 1.9.1 with torch 2.13.0: a latent variable under MixtureSameFamily of normals, which lives on all real vectors,
# is trained by SVI, but NUTS and the automatic guides end in "NotImplementedError: Cannot transform
# MixtureSameFamilyConstraint constraints". The support of a mixture is a constraint of its own, for which no transform is
# registered, even if every component has real support. A subclass whose support is real_vector is sampled.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for candidate in python3.11 "$HOME"/.pyenv/versions/3.11.*/bin/python; do
    if "$candidate" -c "" 2>/dev/null; then python=$candidate; break; fi
done
"${python:?needs Python 3.11}" -m venv "$folder/env" && "$folder/env/bin/pip" install -q torch==2.13.0 pyro-ppl==1.9.1

cat > "$folder/mixture.py" <<'PYTHON'
import pyro, torch
from pyro import distributions as dist, optim
from pyro.distributions import constraints
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal


class Real(dist.MixtureSameFamily):
    support = constraints.real_vector


def model_of(kind):
    def model(x):
        weights = dist.Categorical(torch.tensor([0.5, 0.5]))
        z = pyro.sample("z", kind(weights, dist.Normal(torch.tensor([[-1.0], [1.0]]), 0.5).to_event(1)))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    return model


def guide(x):
    loc = pyro.param("loc", torch.zeros(1))
    pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))


x = torch.ones(1)
SVI(model_of(dist.MixtureSameFamily), guide, optim.Adam({}), Trace_ELBO()).step(x)
print("SVI with a guide by hand: runs")
for kind in (dist.MixtureSameFamily, Real):
    for what in ("NUTS", "AutoNormal"):
        pyro.clear_param_store()
        try:
            if what == "NUTS":
                MCMC(NUTS(model_of(kind)), num_samples=3, warmup_steps=3, disable_progbar=True).run(x)
            else:
                AutoNormal(model_of(kind))(x)
            print(what, kind.__name__, "runs")
        except NotImplementedError as error:
            print(what, kind.__name__, str(error).splitlines()[0])
PYTHON
found=$("$folder/env/bin/python" -W ignore "$folder/mixture.py")
echo "$found"
test "$found" = "SVI with a guide by hand: runs
NUTS MixtureSameFamily Cannot transform MixtureSameFamilyConstraint constraints
AutoNormal MixtureSameFamily Cannot transform MixtureSameFamilyConstraint constraints
NUTS Real runs
AutoNormal Real runs"
