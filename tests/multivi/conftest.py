import pytest
from mosaics import QUIET, simulate, small

from pyromosaic import Mosaic, MultiVI


@pytest.fixture(scope="session")
def data():
    return simulate()


@pytest.fixture(scope="session")
def mosaic(data) -> Mosaic:
    return Mosaic.from_mudata(data, batch_key="batch", label_key="type")


@pytest.fixture(scope="module")
def trained(mosaic, trained_once) -> MultiVI:
    def train(model: MultiVI) -> None:
        model.train(60, batch_size=64, kl_warmup_epochs=20, learning_rate=5e-3, **QUIET)

    return trained_once(small(mosaic), train)
