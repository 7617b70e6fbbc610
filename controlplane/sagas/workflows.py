"""All workflows there are, by the kind of their operation."""

from __future__ import annotations

from controlplane.sagas.context import Saga
from controlplane.sagas.drain import DRAINING
from controlplane.sagas.migrate import MIGRATION

SAGAS: dict[str, Saga] = {saga.kind: saga for saga in (MIGRATION, DRAINING)}
