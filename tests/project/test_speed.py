"""scripts/test.sh --fast runs something of every room."""

import pytest


def test_every_room_has_fast_tests(request):
    if [*request.config.args] != request.config.getini("testpaths"):
        pytest.skip("only when all rooms are collected")
    rooms = {path.parent.name for path in request.config.rootpath.glob("tests/*/test_*.py")}
    fast = {
        item.path.parent.name for item in request.session.items if not {m.name for m in item.iter_markers()} & {"slow", "emulated", "fuzz"}
    }
    assert fast == rooms and len(rooms) > 7
