"""Relay's own methods under ZeRO on two ranks, from a base that is sharded while it loads: as one process would train them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.support import tiny
from tests.support.session import Ranks

Get = Callable[[int], Ranks]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("bases")
    found = {}
    for shape in ("llama", "opt"):
        tiny.build(shape).save_pretrained(folder / shape)
        found[shape] = str(folder / shape)
    return found


@pytest.mark.launch
@pytest.mark.parametrize(
    ("method", "shape"),
    [
        ("houlsby", "llama"),
        ("parallel", "opt"),
        ("prefix", "llama"),
        ("unipelt", "llama"),
        ("bitfit", "llama"),
        ("loreft", "llama"),
        ("prompt", "opt"),
        ("p_tuning", "llama"),
    ],
)
def test_zero3(ranks: Get, bases: dict[str, str], method: str, shape: str) -> None:
    asked = {"base": bases[shape], "method": method, "shape": shape}
    wanted = ranks(1).call("tests.distributed.tuner_cases:train", **asked, stage=0)[0]
    first = ranks(2).call("tests.distributed.tuner_cases:train", **asked, stage=3)[0]
    assert first.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(first[name], value, atol=2e-5, err_msg=name)
