"""The machine itself: torch sees the GPU, bitsandbytes quantises on it, and the doctor agrees."""

import json

from gpu_machine import HERE, ON_CPU, SCRIPTS, run, setting


def test_torch_and_bitsandbytes_work_on_the_gpu(out, figure) -> None:
    text = run(out / "logs" / "probe.log", 300, HERE / "probe.py")
    found = json.loads(text.strip().splitlines()[-1])
    figure("setting", {**setting(), **found})
    figure("NF4 round trip, largest relative error", found["nf4_error"])
    assert ON_CPU or found["cuda"], "torch sees no GPU although nvidia-smi lists one"
    assert 0 < found["nf4_error"] < 0.25


def test_the_doctor_says_that_it_can_train(out) -> None:
    assert "can train" in run(out / "logs" / "doctor.log", 400, SCRIPTS / "doctor.py")
