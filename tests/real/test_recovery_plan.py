"""`--recovery-plan fastest`: what is slower to rebuild than to compute is computed again. TP=2, float32, eager.

With the default nothing is computed again by choice: every other test that asserts the path `rebuild` shows it.
"""

from __future__ import annotations

import pytest

from real import kit
from real.kit import Ask, Served, assert_rebuilt, assert_same

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(300)]

RESTORE_SLOWER = 200  # times: as if parity came over a slow network


@pytest.fixture(scope="module", params=["fastest", "exact"])
def served(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest):
    served = kit.serve(
        tmp_path_factory.mktemp("plan"),
        f"plan-{request.param}",
        *("--dtype", "float32", "--enforce-eager", "--recovery-plan", request.param),
    )
    yield served
    served.server.stop()


def test_by_measured_costs(served: Served, request: pytest.FixtureRequest) -> None:
    """The first loss finds nothing measured and rebuilds, slowly; the second knows. The stream is the same each time."""
    ask = Ask(max_tokens=150)
    reference = served.reference(ask)
    served.arm(point="adopt", rank=1, action="slow", argument=RESTORE_SLOWER, count=1000)
    reports = []
    for _ in range(2):
        served.settle()
        before = served.recoveries()
        served.kill_after(70, 1)
        assert_same(reference, served.run(ask))
        reports.append(served.recovery(after=before))
    served.server.admin.disarm_faults()
    first, second = reports
    assert_rebuilt(first, sealed=True)
    assert first["phases_ms"]["kv"] > 300
    if request.node.callspec.params["served"] == "fastest":
        assert (second["path"], second["requests_recomputed_by_choice"]) == ("recompute", 1), second
        assert second["tokens_recomputed"] > 60
    else:
        assert_rebuilt(second, sealed=True)
        assert second["requests_recomputed_by_choice"] == 0
