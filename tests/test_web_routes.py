"""The routes over a fake page with real processes to kill."""

from __future__ import annotations

import re
import signal
import subprocess
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any, cast

import psutil
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient

from ghostserve.arena.control import ControlPage
from ghostserve.arena.memory_group import MemoryGroup
from ghostserve.arena.names import Fault, FaultAction, FaultPoint, Switch
from ghostserve.cli.serve import mount
from ghostserve.clock import monotonic_s, sleep_s
from ghostserve.config import GhostConfig
from ghostserve.errors import BudgetExceeded, UnsupportedError, UsageError
from ghostserve.testing.fake_engine import FakeEngine
from ghostserve.testing.fake_server import build_app
from ghostserve.web.bodies import BODY_BYTES_MAX
from ghostserve.web.failures import FAILED
from ghostserve.web.ui import STATIC

LOCAL = ("127.0.0.1", 50000)
Connect = Callable[..., TestClient]


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    engine = FakeEngine()
    yield engine
    engine.close()


@pytest.fixture
def connect(engine: FakeEngine) -> Connect:
    def connect(
        *, client: tuple[str, int] = LOCAL, url: str = "http://127.0.0.1:8000", **app: Any
    ) -> TestClient:
        return TestClient(build_app(engine, **app), base_url=url, client=client)

    return connect


def sentence(answer: Any) -> str:
    return str(answer.json()["detail"])


def test_status_is_the_document_with_counters(connect: Connect, engine: FakeEngine) -> None:
    answer = connect().get("/ghostserve/status")
    assert answer.status_code == 200
    assert answer.headers["cache-control"] == "no-store"
    status = answer.json()
    state = engine.read_state()
    assert state is not None
    assert state.items() <= status.items()
    assert status["counters"] == engine.counters()
    assert status["fault_injection"] is True
    assert status["switches"] == {switch.name.lower(): False for switch in Switch}


def test_status_without_fault_injection_says_nothing_of_switches(connect: Connect) -> None:
    status = connect(fault_injection=False).get("/ghostserve/status").json()
    assert status["fault_injection"] is False
    assert "switches" not in status


def test_status_before_the_first_document(connect: Connect, engine: FakeEngine) -> None:
    engine.read_state = lambda: None  # type: ignore[method-assign]
    assert connect().get("/ghostserve/status").status_code == 503
    assert connect().post("/ghostserve/kill", json={"rank": 0}).status_code == 503


def test_kill_kills_that_worker_and_no_other(connect: Connect, engine: FakeEngine) -> None:
    answer = connect().post("/ghostserve/kill", json={"rank": 1})
    assert answer.status_code == 200
    assert answer.json() == {
        "how": "crash",
        "rank": 1,
        "pid": engine.workers[1].pid,
        "epoch": 0,
        "killed": True,
        "strikes": "now",
    }
    assert engine.workers[1].wait(timeout=10) == -9
    assert engine.workers[0].poll() is None


def test_a_hang_stops_exactly_that_worker(connect: Connect, engine: FakeEngine) -> None:
    answer = connect().post("/ghostserve/kill", json={"rank": 1, "how": "hang"}).json()
    assert (answer["killed"], answer["pid"]) == (False, engine.workers[1].pid)
    pids = [worker.pid for worker in engine.workers]
    deadline_s = monotonic_s() + 10
    while psutil.Process(pids[1]).status() != psutil.STATUS_STOPPED:
        assert monotonic_s() < deadline_s
        sleep_s(0.01)
    assert psutil.Process(pids[0]).status() != psutil.STATUS_STOPPED


def test_what_has_no_signal_strikes_in_the_next_step(connect: Connect, engine: FakeEngine) -> None:
    client = connect()
    answer = client.post("/ghostserve/kill", json={"rank": 1, "how": "slow", "factor": 7, "steps": 9})
    assert answer.json()["strikes"] == "in the next step"
    assert client.post("/ghostserve/kill", json={"rank": 0, "how": "corrupt"}).json()["how"] == "corrupt_kv"
    assert client.post("/ghostserve/kill", json={"how": "memory_exhausted"}).json()["pid"] is None
    assert engine.faults == [
        Fault(point=FaultPoint.AFTER_MODEL, rank=1, action=FaultAction.SLOW, argument=7, count=9),
        Fault(point=FaultPoint.STAGED, rank=0, action=FaultAction.CORRUPT_KV),
        Fault(point=FaultPoint.PLANNING, rank=0, action=FaultAction.TAKE_FRAMES, count=20),
    ]


def test_keeper_and_standby_are_those_of_the_state(
    connect: Connect, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper, standby = (subprocess.Popen(["sleep", "60"]) for _ in range(2))
    try:
        state = engine.read_state() or {}
        state |= {"keeper": {"pid": keeper.pid}, "standbys": [{"pid": standby.pid, "state": "ready"}]}
        monkeypatch.setattr(engine, "read_state", lambda: state)
        client = connect()
        for how, process in (("keeper_crash", keeper), ("standby_dead", standby)):
            assert client.post("/ghostserve/kill", json={"how": how}).json()["pid"] == process.pid
            assert process.wait(timeout=10) == -signal.SIGKILL
            again = client.post("/ghostserve/kill", json={"how": how})
            assert again.status_code == 409, again.text
    finally:
        for process in (keeper, standby):
            process.kill()
            process.wait()


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"rank": 0, "how": "tickle"}, 422, "crash, segfault"),
        ({"rank": 0, "how": ["crash"]}, 422, "does not exist"),
        ({"how": "hang"}, 422, "'rank'"),
        ({"rank": 0, "how": "keeper_crash"}, 422, "leave 'rank' out"),
        ({"rank": 0, "how": "crash", "factor": 3}, 422, "leave it out"),
        ({"rank": 0, "how": "slow", "factor": 1}, 422, "from 2"),
        ({"rank": 0, "how": "slow", "steps": -1}, 422, "from 0"),
        ({"how": "client_gone"}, 422, "a client's to do"),
        ({"how": "standby_dead"}, 409, "--standbys 1"),
        ({"how": "keeper_hang"}, 409, "try again"),
    ],
)
def test_a_fault_that_cannot_be_inflicted(
    connect: Connect,
    engine: FakeEngine,
    monkeypatch: pytest.MonkeyPatch,
    body: dict[str, Any],
    status: int,
    said: str,
) -> None:
    state = (engine.read_state() or {}) | {"keeper": {"pid": None, "restarts": 0}}
    monkeypatch.setattr(engine, "read_state", lambda: state)
    answer = connect().post("/ghostserve/kill", json=body)
    assert (answer.status_code, said in sentence(answer)) == (status, True), answer.text
    assert not engine.faults
    assert all(worker.poll() is None for worker in engine.workers)


def test_without_a_cgroup_there_is_no_oom(
    connect: Connect, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> None:
        raise UnsupportedError("no memory cgroup can be made here")

    monkeypatch.setattr(MemoryGroup, "demand", none)
    answer = connect().post("/ghostserve/kill", json={"rank": 0, "how": "oom"})
    assert (answer.status_code, sentence(answer)) == (422, "no memory cgroup can be made here")
    assert not engine.faults


def test_killing_twice_is_a_conflict(connect: Connect, engine: FakeEngine) -> None:
    client = connect()
    client.post("/ghostserve/kill", json={"rank": 1})
    engine.workers[1].wait(timeout=10)
    answer = client.post("/ghostserve/kill", json={"rank": 1})
    assert answer.status_code == 409
    assert "not alive" in sentence(answer)


def test_a_reused_pid_is_not_killed(connect: Connect, engine: FakeEngine) -> None:
    state = engine.read_state()
    assert state is not None
    state["ranks"][0]["start_time"] -= 1
    engine.read_state = lambda: state  # type: ignore[method-assign]
    assert connect().post("/ghostserve/kill", json={"rank": 0}).status_code == 409
    assert engine.workers[0].poll() is None


@pytest.mark.parametrize("rank", [-1, 2, 1 << 70, True, "0", 0.0, None])
def test_a_bad_rank_is_unprocessable(connect: Connect, rank: object) -> None:
    answer = connect().post("/ghostserve/kill", json={"rank": rank})
    assert answer.status_code == 422
    if isinstance(rank, int) and rank is not True:
        assert "ranks are 0 to 1" in sentence(answer)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 3000, b"{}", b'{"rank":0,"signal":9}']
)
def test_a_bad_body_is_unprocessable(connect: Connect, engine: FakeEngine, body: bytes) -> None:
    assert connect().post("/ghostserve/kill", content=body).status_code == 422
    assert all(worker.poll() is None for worker in engine.workers)


def test_a_long_body_is_too_long(connect: Connect) -> None:
    answer = connect().post("/ghostserve/kill", content=b" " * (BODY_BYTES_MAX + 1))
    assert answer.status_code == 413
    assert "bytes" in sentence(answer)


POSTS = [
    ("/ghostserve/kill", {"rank": 0}),
    ("/ghostserve/faults", {"point": "staged", "rank": 0, "action": "kill"}),
    ("/ghostserve/switches", {"skip_restore": True}),
]


@pytest.mark.parametrize(("path", "body"), POSTS)
def test_off_unless_fault_injection_is_enabled(connect: Connect, path: str, body: dict[str, Any]) -> None:
    answer = connect(fault_injection=False).post(path, json=body)
    assert answer.status_code == 403
    assert "--enable-fault-injection" in sentence(answer)


@pytest.mark.parametrize(("path", "body"), POSTS)
@pytest.mark.parametrize(
    "headers",
    [{"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}, {"Host": "evil.example:8000"}],
)
def test_a_web_page_cannot_post(
    connect: Connect, engine: FakeEngine, path: str, body: dict[str, Any], headers: dict[str, str]
) -> None:
    assert connect().post(path, json=body, headers=headers).status_code == 403
    assert all(worker.poll() is None for worker in engine.workers)
    assert not engine.faults
    assert not any(engine.switches.values())


@pytest.mark.parametrize(("path", "body"), POSTS)
def test_the_network_cannot_post_without_a_key(connect: Connect, path: str, body: dict[str, Any]) -> None:
    assert connect(client=("10.0.0.7", 1)).post(path, json=body).status_code == 403


@pytest.mark.parametrize("header", ["Forwarded", "X-Forwarded-For", "X-Forwarded-Proto", "X-Real-IP", "Via"])
def test_a_proxy_on_this_machine_is_not_the_operator(
    connect: Connect, engine: FakeEngine, header: str
) -> None:
    """uvicorn takes the client from X-Forwarded-For, which anybody can write, so that it proves nothing."""
    headers = {header: "127.0.0.1"}
    for path, body in POSTS:
        assert connect().post(path, json=body, headers=headers).status_code == 403
    assert connect().get("/ghostserve/status", headers=headers).status_code == 403
    assert all(worker.poll() is None for worker in engine.workers)
    keyed = headers | {"Authorization": "Bearer secret"}
    assert connect(api_keys=("secret",)).get("/ghostserve/status", headers=keyed).status_code == 200


def mounted(engine: FakeEngine, api_key: object) -> TestClient:
    app = FastAPI()
    arguments = Namespace(api_key=api_key, host="127.0.0.1")
    mount(app, cast(ControlPage, engine), arguments, GhostConfig())
    return TestClient(app, base_url="http://127.0.0.1:8000", client=LOCAL)


@pytest.mark.parametrize("api_key", [None, [], [""], [None], ""])
def test_an_empty_key_counts_as_none(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, api_key: object
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "")
    assert mounted(engine, api_key).get("/ghostserve/status").status_code == 200


@pytest.mark.parametrize(("api_key", "accepted"), [(["flag", ""], "flag"), ("flag", "flag"), (None, "env")])
def test_the_flag_wins_over_the_environment(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, api_key: object, accepted: str
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "env")
    client = mounted(engine, api_key)
    for key, status in {"flag": 401, "env": 401, "": 401, accepted: 200}.items():
        headers = {"Authorization": f"Bearer {key}"}
        assert client.get("/ghostserve/status", headers=headers).status_code == status


def test_a_key_that_no_client_can_send_is_refused(engine: FakeEngine) -> None:
    with pytest.raises(UsageError, match="ASCII"):
        mounted(engine, ["schlüssel"])


def test_without_protection_there_are_no_routes() -> None:
    app = FastAPI()
    before = len(app.routes)
    mount(app, None, Namespace(api_key=None, host=None), GhostConfig())
    assert len(app.routes) == before


@pytest.mark.parametrize("header", ["Origin", "Host", "Sec-Fetch-Site"])
def test_a_doubled_header_is_refused(connect: Connect, header: str) -> None:
    good = {"Origin": "http://127.0.0.1:8000", "Host": "127.0.0.1:8000", "Sec-Fetch-Site": "same-origin"}[
        header
    ]
    headers = [(header, good), (header, "evil.example")]
    assert connect().post("/ghostserve/kill", json={"rank": 0}, headers=headers).status_code == 403


def test_with_a_key_every_route_of_data_needs_it(connect: Connect) -> None:
    client = connect(api_keys=("secret", "other"))
    assert client.get("/ghostserve/status").status_code == 401
    for path, body in POSTS:
        assert client.post(path, json=body).status_code == 401
    assert client.delete("/ghostserve/faults").status_code == 401
    for key in ("secret", "other"):
        headers = {"Authorization": f"Bearer {key}"}
        assert client.get("/ghostserve/status", headers=headers).status_code == 200
        assert client.post(*POSTS[2][:1], json=POSTS[2][1], headers=headers).status_code == 200


def test_the_admin_key_is_for_faults_and_opens_our_other_routes(connect: Connect, engine: FakeEngine) -> None:
    client = connect(api_keys=("secret",), admin_key="root", client=("10.0.0.7", 1))
    for key, injected in (("secret", 401), ("root", 200), ("other", 401)):
        headers = {"Authorization": f"Bearer {key}"}
        answer = client.post("/ghostserve/switches", json={"skip_restore": True}, headers=headers)
        assert answer.status_code == injected, key
        assert injected == 200 or "admin key" in sentence(answer)
        seen = client.get("/ghostserve/status", headers=headers).status_code
        assert seen == (401 if key == "other" else 200)
        assert client.get("/v1/models", headers=headers).status_code == (200 if key == "secret" else 401)
    assert engine.get_switch(Switch.SKIP_RESTORE)


def test_an_admin_key_alone_leaves_the_rest_to_loopback(connect: Connect) -> None:
    client = connect(admin_key="root")
    assert client.get("/ghostserve/status").status_code == 200
    assert client.delete("/ghostserve/faults").status_code == 401
    assert client.delete("/ghostserve/faults", headers={"Authorization": "Bearer root"}).status_code == 200
    far = connect(admin_key="root", client=("10.0.0.7", 1))
    assert far.get("/ghostserve/status").status_code == 403
    page = {"Authorization": "Bearer root", "Origin": "http://evil.example"}
    assert client.delete("/ghostserve/faults", headers=page).status_code == 403


OPEN_ROUTES = {"/ui", "/ui/static/{name}"}


def test_no_route_of_ours_is_open_by_oversight(connect: Connect) -> None:
    """Whatever is added to the router: with a key, and for strangers without one, it answers 401 and 403."""
    keyed, far = connect(api_keys=("secret",)), connect(client=("10.0.0.7", 1))
    routes = [route for route in keyed.app.routes if isinstance(route, APIRoute)]  # type: ignore[attr-defined]
    ours = [route for route in routes if route.path.startswith(("/ui", "/ghostserve"))]
    assert len(ours) >= 7
    for route in ours:
        for method in route.methods:
            statuses = {client.request(method, route.path).status_code for client in (keyed, far)}
            if route.path in OPEN_ROUTES:
                assert statuses <= {200, 404}, route.path
            else:
                assert statuses == {401, 403}, route.path


def test_a_mistake_of_ours_is_one_sentence(
    connect: Connect, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> None:
        raise KeyError("/etc/secret of somebody else")

    monkeypatch.setattr(engine, "read_state", broken)
    answer = connect().get("/ghostserve/status")
    assert (answer.status_code, sentence(answer)) == (500, FAILED)
    assert "somebody else" not in answer.text
    assert "Traceback" in caplog.text, "the log has all of it"
    assert "somebody else" in caplog.text


def test_a_stranger_is_not_told_whether_faults_could_be_injected(connect: Connect) -> None:
    client = connect(api_keys=("secret",), fault_injection=False)
    assert client.post("/ghostserve/kill", json={"rank": 0}).status_code == 401


def test_a_key_holder_comes_from_anywhere(connect: Connect) -> None:
    client = connect(api_keys=("secret",), client=("10.0.0.7", 1), url="https://public.example")
    headers = {"Authorization": "Bearer secret", "Origin": "https://public.example"}
    assert client.get("/ghostserve/status", headers=headers).status_code == 200


def test_faults_are_armed_and_disarmed(connect: Connect, engine: FakeEngine) -> None:
    client = connect()
    fault = {"point": "staged", "rank": 1, "action": "slow", "skip": 3, "argument": 5, "count": 20}
    assert client.post("/ghostserve/faults", json=fault).json() == {"armed": fault}
    assert (engine.faults[0].point, engine.faults[0].action) == (FaultPoint.STAGED, FaultAction.SLOW)
    assert client.get("/ghostserve/status").json()["armed_faults"] == [fault]
    client.delete("/ghostserve/faults")
    assert client.get("/ghostserve/status").json()["armed_faults"] == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"point": "nowhere"}, "before_model"),
        ({"point": None}, "before_model"),
        ({"action": "tickle"}, "hang"),
        ({"rank": 2}, "ranks are 0 to 1"),
        ({"skip": -1}, "from 0"),
        ({"skip": 1 << 64}, "from 0"),
        ({"skip": True}, "whole number"),
        ({"argument": "2"}, "'argument' must be a whole number"),
        ({"count": -1}, "'count' must be a whole number from 0"),
        ({"unknown": 1}, "'unknown'"),
    ],
)
def test_a_bad_fault_is_unprocessable(
    connect: Connect, engine: FakeEngine, change: dict[str, Any], said: str
) -> None:
    body = {"point": "staged", "rank": 1, "action": "kill", "skip": 0} | change
    answer = connect().post("/ghostserve/faults", json=body)
    assert answer.status_code == 422
    assert said in sentence(answer)
    assert not engine.faults


def test_a_full_table_is_a_conflict(connect: Connect, engine: FakeEngine) -> None:
    def full(fault: Fault) -> int:
        raise BudgetExceeded("8 faults are armed already")

    engine.arm_fault = full  # type: ignore[method-assign]
    body = {"point": "staged", "rank": 1, "action": "kill"}
    assert connect().post("/ghostserve/faults", json=body).status_code == 409


def test_switches_are_set(connect: Connect, engine: FakeEngine) -> None:
    answer = connect().post("/ghostserve/switches", json={"skip_restore": True, "debug_copy": False})
    assert answer.json() == {"switches": {"skip_restore": True, "debug_copy": False}}
    assert engine.switches[Switch.SKIP_RESTORE] is True


@pytest.mark.parametrize("body", [{}, {"skip_restore": 1}, {"skip_restore": True, "nothing": True}])
def test_a_bad_switch_sets_none(connect: Connect, engine: FakeEngine, body: dict[str, Any]) -> None:
    assert connect().post("/ghostserve/switches", json=body).status_code == 422
    assert not any(engine.switches.values())


def test_the_page_is_open_and_holds_no_data(connect: Connect) -> None:
    client = connect(api_keys=("secret",), client=("10.0.0.7", 1))
    assert client.get("/ui").status_code == 200
    assert client.get("/ui/prompts.json").status_code == 401
    headers = {"Authorization": "Bearer secret"}
    prompts = client.get("/ui/prompts.json", headers=headers).json()
    assert prompts
    assert all(prompt["prompt"] for prompt in prompts)


def test_the_page_is_off_unless_asked_for(connect: Connect) -> None:
    client = connect(ui=False)
    answer = client.get("/ui")
    assert (answer.status_code, sentence(answer)) == (404, "the page is off; start the server with --ui")
    for path in ("/ui/static/main.js", "/ui/prompts.json"):
        assert client.get(path).status_code == 404


def test_serve_has_the_page_with_ui(engine: FakeEngine) -> None:
    for config, status in ((GhostConfig(), 404), (GhostConfig(ui=True), 200)):
        app = FastAPI()
        mount(app, cast(ControlPage, engine), Namespace(api_key=None, host="127.0.0.1"), config)
        client = TestClient(app, base_url="http://127.0.0.1:8000", client=LOCAL)
        assert client.get("/ui").status_code == status


def test_every_file_of_the_page_is_served_under_its_policy(connect: Connect) -> None:
    client = connect()
    paths = ["/ui", *(f"/ui/static/{path.name}" for path in STATIC.iterdir())]
    assert len(paths) > 10
    for path in paths:
        answer = client.get(path)
        assert answer.status_code == 200
        assert answer.headers["x-content-type-options"] == "nosniff"
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy


@pytest.mark.parametrize(
    "name", ["nothing.js", "..%2f..%2fui.py", "%2e%2e/ui.py", "..%5cui.py", "main.js%00", ""]
)
def test_no_other_file_is_served(connect: Connect, name: str) -> None:
    assert connect().get(f"/ui/static/{name}").status_code == 404


def test_the_page_loads_nothing_from_elsewhere() -> None:
    for path in STATIC.iterdir():
        text = path.read_text(encoding="utf-8").replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert "http://" not in text
        assert "https://" not in text
        assert "innerHTML" not in text
        if path.suffix == ".html":
            assert re.findall(r'(?:src|href)="(?!ui/static/)', text) == []
            assert not re.findall(r"\son[a-z]+=|\sstyle=|<style|<script>", text)


def test_every_module_that_is_named_exists() -> None:
    for path in STATIC.glob("*.js"):
        for name in re.findall(r'from "\./([^"]+)"', path.read_text(encoding="utf-8")):
            assert (STATIC / name).is_file(), f"{path.name} names {name}"
