"""Moves an endpoint to another version, so that a wrong one never answers and a crash leaves a working one.

The order is: the artifact is whole (hashed) → the gateway loads it beside what serves → it answers with its
own fingerprint → inside the fence: the alias moves and the ledger records → the gateway follows the ledger →
the public route and the fingerprint of what serves prove it. A failure before the ledger's commit leaves all
as it was; one after it goes back to the previous version, on the record.
"""

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

from ml_assets.adapters.fingerprint import matches, tolerances
from ml_assets.artifacts import ArtifactRef, ArtifactStore
from ml_assets.endpoints.gateway.client import GatewayClient, GatewayError, Probed
from ml_assets.endpoints.ledger import Fenced, Ledger, Release

MoveAlias = Callable[[str | None], None]
"""Points the registry's alias of the serving version at this version, or removes it with None."""

log = logging.getLogger(__name__)


class ReleaseFailed(Exception):
    """A version was not released; the message says why and what serves now."""


def release(
    candidate: Release,
    *,
    expected: Release | None = None,
    ledger: Ledger,
    store: ArtifactStore,
    gateway: GatewayClient,
    move_alias: MoveAlias,
    still_wanted: Callable[[], None] = lambda: None,
) -> Release:
    """Serve `candidate` (`at` and `id` are set by the ledger) and return its row.

    `expected` is the ledger's row that the decision for it was based on, None where nothing served: it is
    refused when another one serves by now.
    `still_wanted` is called inside the fence, before anything moves, and raises to refuse.
    Raises Fenced when the run may not release any more, ReleaseFailed for everything else that goes wrong;
    the previous version then serves, unless the message says that another release came in between.
    """
    customization = candidate.customization
    fingerprint = read_fingerprint(store, candidate.adapter_digest)
    try:
        staged = gateway.stage(candidate)
        _verify(candidate, fingerprint, staged)
        previous, recorded = _record(candidate, expected, ledger, move_alias, still_wanted)
    except Exception as error:
        _discard(gateway, customization)
        if isinstance(error, Fenced):
            raise
        raise ReleaseFailed(f"{_name(candidate)} was not released, nothing changed: {error}") from error
    try:
        gateway.activate(customization, candidate.adapter_digest)
        verify_served(recorded, fingerprint, gateway)
    except Exception as error:
        _go_back(recorded, previous, error, ledger=ledger, gateway=gateway, move_alias=move_alias)
        raise AssertionError("going back raises") from error
    return recorded


def withdraw(current: Release, *, ledger: Ledger, gateway: GatewayClient, move_alias: MoveAlias) -> Release:
    """Let nothing serve from now on; `current` is what serves, with the run, actor and reason of the
    withdrawal. Returns its row.

    Raises Fenced when the run may not release any more, ReleaseFailed when another release came in between,
    or when the gateway could not be told (it reads the ledger when it starts).
    """
    name = current.customization
    with ledger.release_transaction(name, current.run_id) as tx:
        now = tx.current()
        if now is None or now.id != current.id:
            raise ReleaseFailed(f"another release of {name} came in between; nothing was withdrawn")
        move_alias(None)
        gone = tx.record(dataclasses.replace(current, action="withdraw"))
    try:
        gateway.discard(name)
        gateway.activate(name, None)
    except GatewayError as error:
        raise ReleaseFailed(
            f"nothing is to serve {name}, but the gateway could not be told: {error}"
        ) from error
    return gone


def follow_ledger(
    customization: str, alias: str | None, run_id: str, ledger: Ledger, move_alias: MoveAlias
) -> Release | None:
    """What the ledger says now; the registry's alias, now at version `alias`, is put there if it is not.

    They differ when a release was killed between the move of the alias and the commit. Raises Fenced.
    """
    current = ledger.current(customization)
    if alias == (current.mlflow_version if current else None):
        return current
    with ledger.release_transaction(customization, run_id) as tx:
        current = tx.current()
        log.warning("%s: the alias is at version %s, the ledger says %s", customization, alias, current)
        move_alias(current.mlflow_version if current else None)
        return current


def why_away(served: Mapping[str, Any] | None, current: Release) -> str | None:
    """Why what the gateway says it serves is not `current`, the ledger's row; None when it is."""
    if served is None:
        return "not served"
    if served["adapter_digest"] != current.adapter_digest:
        other, wanted = served["adapter_digest"][:12], current.adapter_digest[:12]
        return f"answered by adapter {other}, the ledger says {wanted}"
    # the same adapter may have got another engine, other limits or another traffic policy; a gateway of an
    # earlier version does not tell, and what was never recorded has no row
    row = served.get("release", current.id)
    if current.id and row != current.id:
        return f"served with the settings of release {row}, the ledger is at {current.id}"
    return None


def serve_again(current: Release, *, store: ArtifactStore, gateway: GatewayClient) -> bool:
    """Make the gateway serve `current`, the ledger's row, if it does not; returns whether it did not.

    Raises ReleaseFailed when it can't load it or the fingerprint is another's.
    """
    if why_away(gateway.health()["served"].get(current.customization), current) is None:
        return False
    fingerprint = read_fingerprint(store, current.adapter_digest)
    try:
        _verify(current, fingerprint, gateway.stage(current))
        gateway.activate(current.customization, current.adapter_digest)
    except GatewayError as error:
        raise ReleaseFailed(f"{_name(current)} should be serving, but: {error}") from error
    return True


def verify_served(expected: Release, fingerprint: Mapping[str, Any], gateway: GatewayClient) -> Probed:
    """Ask the public route who answers, then the adapter that serves for its fingerprint.

    Raises ReleaseFailed when either is not `expected`'s, GatewayError when it can't be asked.
    """
    probe = fingerprint["probes"][0]
    answered = gateway.answer(expected.customization, probe["messages"], max_tokens=1)
    if (answered.adapter_digest, answered.base_revision) != (expected.adapter_digest, expected.base_revision):
        raise ReleaseFailed(
            f"the public route is answered by adapter {answered.adapter_digest[:12]} on "
            f"{answered.base_revision}, expected {_name(expected)}"
        )
    probed = gateway.probe(expected.customization)
    _verify(expected, fingerprint, probed)
    return probed


def read_fingerprint(store: ArtifactStore, adapter_digest: str) -> dict[str, Any]:
    """The fingerprint in an adapter's manifest. Raises ArtifactError when a file is not what it was."""
    directory = store.open(ArtifactRef("adapter", adapter_digest))
    return json.loads((directory / "manifest.json").read_bytes())["fingerprint"]


# -- steps ---------------------------------------------------------------------------------------------


def _verify(expected: Release, fingerprint: Mapping[str, Any], probed: Probed) -> None:
    """The gateway verifies as well; what decides here does not trust it to."""
    if (probed.adapter_digest, probed.base_revision) != (expected.adapter_digest, expected.base_revision):
        raise ReleaseFailed(
            f"the gateway answers with adapter {probed.adapter_digest[:12]} on {probed.base_revision}, "
            f"expected {_name(expected)}"
        )
    if not matches(fingerprint, probed.with_adapter):
        wanted = [probe["with"] for probe in fingerprint["probes"]]
        measured = [round(value, 4) for value in probed.with_adapter]
        raise ReleaseFailed(
            f"{_name(expected)} does not answer with its fingerprint: expected {wanted}, measured {measured} "
            f"(tolerance {[round(one, 4) for one in tolerances(fingerprint)]} nats per token)"
        )


def _record(
    candidate: Release,
    expected: Release | None,
    ledger: Ledger,
    move_alias: MoveAlias,
    still_wanted: Callable[[], None],
) -> tuple[Release | None, Release]:
    """(what served before, the new row). The alias is back where it was if the row can't be committed."""
    previous: Release | None = None
    moved = False
    try:
        with ledger.release_transaction(candidate.customization, candidate.run_id) as tx:
            still_wanted()
            previous = tx.current()
            if (previous and previous.id) != (expected and expected.id):
                other = _name(previous) if previous else "a withdrawal"
                raise ReleaseFailed(f"{other} was released meanwhile: materialize again")
            moved = True
            move_alias(candidate.mlflow_version)
            recorded = tx.record(candidate)
    except BaseException:
        if moved:
            move_alias(previous.mlflow_version if previous else None)
        raise
    return previous, recorded


def _go_back(
    failed: Release,
    previous: Release | None,
    error: Exception,
    *,
    ledger: Ledger,
    gateway: GatewayClient,
    move_alias: MoveAlias,
) -> None:
    """Return to `previous` after `failed` was recorded but does not serve; always raises ReleaseFailed."""
    reason = f"{_name(failed)} failed after its release: {error}"
    back = dataclasses.replace(
        previous or failed,
        action="rollback" if previous else "withdraw",
        run_id=failed.run_id,
        actor=failed.actor,
        reason=reason,
    )
    with ledger.release_transaction(failed.customization, failed.run_id) as tx:
        if tx.current() != failed:
            raise ReleaseFailed(f"{reason}; another release came in between and stays") from error
        move_alias(previous.mlflow_version if previous else None)
        tx.record(back)
    now = f"{_name(previous)} serves again" if previous else "nothing serves"
    try:
        gateway.discard(failed.customization)
        if previous:
            gateway.stage(previous)
        gateway.activate(failed.customization, previous.adapter_digest if previous else None)
    except GatewayError as second:
        # the ledger says what to serve, and the gateway reads it when it starts
        now = f"{_name(previous) if previous else 'nothing'} is to serve, but: {second}"
    raise ReleaseFailed(f"{reason}; {now}") from error


def _discard(gateway: GatewayClient, customization: str) -> None:
    try:
        gateway.discard(customization)
    except GatewayError as error:
        log.warning("the staged version of %s could not be discarded: %s", customization, error)


def _name(release: Release) -> str:
    return f"adapter {release.adapter_digest[:12]} on {release.base_revision}"
