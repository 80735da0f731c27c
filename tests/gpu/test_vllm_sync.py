"""On a 4-bit base vLLM with the synced adapter is PEFT's policy, and stays it.

Tolerances: both sides round to 16 bits on paths of their own, so single tokens may be some tenths
of a nat apart; a wrong adapter is apart by what the adapter moves, which is measured beside it.
"""

import pytest
from gpu_machine import HERE, SMALL, model_folder, run

from lora_grpo.machine.files import read_json

MEAN, P99 = 0.03, 0.25  # nats
SHARE_OF_ADAPTER = 0.2  # of what the adapter itself moves
SECONDS = 800
pytestmark = pytest.mark.needs("vllm")


@pytest.fixture(scope="module", params=["default", "float16"])
def found(request: pytest.FixtureRequest, out) -> dict:
    """What `sync_worker.py` saw; by default in bfloat16 where the GPU has it."""
    output = out / f"sync-{request.param}.json"
    dtype = () if request.param == "default" else (request.param,)
    log, model = out / "logs" / f"sync-{request.param}.log", model_folder(SMALL) or "tiny"
    run(log, SECONDS, HERE / "sync_worker.py", model, output, *dtype)
    return read_json(output)


def close(distance: dict[str, float]) -> bool:
    return distance["mean"] < MEAN and distance["p99"] < P99


def test_logprobs_after_a_sync_are_those_of_peft(found, figure) -> None:
    moves, off = found["adapter_moves"]["mean"], found["after_a_sync"]
    figure(f"sync, {found['dtype']}: vLLM from PEFT, mean", off["mean"], "nats")
    figure(f"sync, {found['dtype']}: vLLM from PEFT, largest", off["max"], "nats")
    figure(f"sync, {found['dtype']}: what the adapter moves, mean", moves, "nats")
    assert close(off) and off["mean"] < SHARE_OF_ADAPTER * moves


def test_the_base_alone_is_the_same_on_both_sides(found, figure) -> None:
    figure(f"sync, {found['dtype']}: bare base, mean", found["bare_base"]["mean"], "nats")
    assert close(found["bare_base"]), "the two 4-bit bases are not the same weights"
    assert close(found["bare_base_afterwards"])


def test_sleeping_and_waking_keep_the_adapter_right(found, figure) -> None:
    figure(f"sync, {found['dtype']}: same draw after naps", found["same_draw_after_naps"])
    assert close(found["after_naps"])
    assert found["after_naps"]["mean"] < SHARE_OF_ADAPTER * found["adapter_moves"]["mean"]


def test_ten_syncs_all_arrive_and_leave_every_base_weight_bit_for_bit_as_it_was(found) -> None:
    assert len(found["after_syncs"]) == 10
    assert all(close(distance) for distance in found["after_syncs"]), found["after_syncs"]
    assert found["before"] == found["after"], "vLLM's base, PEFT's base"
