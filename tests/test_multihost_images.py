"""Several real processes that draw and restore images."""

import json
import shutil

import jax
import numpy as np
import pytest
from runs import make_run
from test_multihost import Job


@pytest.mark.slow
def test_images_are_drawn_and_restored_alike_on_one_and_on_two_processes(tmp_path):
    found, run = [], make_run(tmp_path / "run")
    for processes in (1, 2):
        workdir = tmp_path / str(processes)
        shutil.copytree(run, workdir)
        for verb in (["sample"], ["restore", "--task", "inpaint", "--restore.images", 2, "--restore.samples", 2]):
            words = ("colour", *verb, "--workdir", workdir)
            job = Job(*words, processes=processes, devices=4 // processes, logs=tmp_path / "logs")
            assert job.wait() == [0] * processes, job.said()
        restored = json.loads((workdir / "restored-inpaint.json").read_text())["mean"]
        found.append((np.load(workdir / "samples.npz")["samples"].astype(float), restored))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1), *found)
