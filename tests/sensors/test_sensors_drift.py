"""Which endpoints the drift sensor looks at."""

import pytest
from maintenance_world import make_release, make_spec

from ml_assets.decisions.records import Note
from ml_assets.traffic.store import Head
from sensors.drift import find_due

SPEC = make_spec(drift={"every": 100}, maintenance={"min_new_rows": 20})


@pytest.mark.parametrize(
    ("requests", "labelled", "wanted", "due"),
    [
        (199, 10, False, False),
        (200, 10, False, True),
        (150, 29, True, False),
        (150, 30, True, True),  # a quiet endpoint uses the labels that it asked for
        (150, 90, False, False),  # those that come with the traffic wait for the next look
    ],
)
def test_a_look_is_due_after_enough_requests_or_with_the_labels_it_asked_for(
    requests: int, labelled: int, wanted: bool, due: bool
) -> None:
    heads = {SPEC.name: Head(SPEC.name, requests=requests, labelled=labelled)}
    look = {"looked": 100, "labelled": 10, "wants_labels": wanted}
    notes = {SPEC.name: {"look": Note(look, "2026-01-01T00:00:00+00:00")}}
    serving = {SPEC.name: make_release(SPEC.name)}
    assert (find_due({SPEC.name: SPEC}, heads, notes, serving) == [SPEC.name]) == due
