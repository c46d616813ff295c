"""Side by side in threads, tasks and processes, the numbers are those of a model alone."""

import asyncio
import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyro
import pytest

from pyromosaic import Mosaic, MultiVI, simulate

QUIET = {"progress_bar": False, "batch_size": 16}


def trained(seed: int) -> MultiVI:
    """A small model, the same for the same seed in any process."""
    mosaic = Mosaic.from_mudata(simulate(40, {"rna": 20, "adt": 5}, seed=0)[0])
    model = MultiVI(mosaic, n_latent=2, n_hidden=4, seed=seed)
    model.train(3, seed=seed, **QUIET)
    return model


def answer(model: MultiVI, seed: int = 0) -> np.ndarray:
    return model.get_imputed_values("adt", n_samples=3, seed=seed).mean.to_numpy()


def latent(seed: int) -> np.ndarray:
    return trained(seed).get_latent_representation().to_numpy()


def in_a_child(seed: int, queue: "multiprocessing.Queue[np.ndarray]") -> None:
    import torch

    torch.set_num_threads(1)
    queue.put(latent(seed))


@pytest.fixture(scope="module")
def alone():
    return [latent(seed) for seed in range(3)]


def test_trainings_in_threads(alone):
    with ThreadPoolExecutor(3) as threads:
        for found, expected in zip(threads.map(latent, range(3)), alone, strict=True):
            np.testing.assert_array_equal(found, expected)
    assert not pyro.settings.get("module_local_params")
    np.testing.assert_array_equal(latent(0), alone[0])


def test_questions_in_threads():
    model = trained(0)
    expected = [answer(model, seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as threads:
        for found, seed in zip(threads.map(lambda i: answer(model, i % 4), range(16)), range(16), strict=True):
            np.testing.assert_array_equal(found, expected[seed % 4])
    assert not model.model.training


def test_a_training_that_fails_in_a_thread_leaves_the_process_clean(alone):
    def fails() -> None:
        trained(0).train(2, learning_rate=1e6, **QUIET)

    with ThreadPoolExecutor(2) as threads:
        failed, whole = threads.submit(fails), threads.submit(latent, 1)
        assert failed.exception() is not None
        np.testing.assert_array_equal(whole.result(), alone[1])
    assert not pyro.settings.get("module_local_params")


def test_asyncio(alone):
    async def both() -> list[np.ndarray]:
        return await asyncio.gather(asyncio.to_thread(latent, 0), asyncio.to_thread(latent, 1))

    for found, expected in zip(asyncio.run(both()), alone, strict=False):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_processes(alone, method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system has no {method}")
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=in_a_child, args=(2, queue))
    child.start()
    np.testing.assert_array_equal(queue.get(timeout=120), alone[2])
    child.join()
