"""The CLI's views against the API's: what one reads, the other sends."""

from __future__ import annotations

import pytest
from msgspec import Struct

from controlplane.api import stream
from controlplane.cli import views as read
from controlplane.services import views as sent
from shared import errors, model


@pytest.mark.parametrize(
    ("reader", "sender"),
    [
        (read.ProblemView, model.Problem),
        (read.FieldErrorView, errors.FieldError),
        (read.VmView, sent.VmView),
        (read.VmStatusView, sent.VmStatusView),
        (read.VmSpecView, model.VmSpec),
        (read.BootView, model.BootSpec),
        (read.DiskView, model.DiskSpec),
        (read.NicView, model.NicSpec),
        (read.PlacementView, model.PlacementSpec),
        (read.GroupRuleView, model.GroupRule),
        (read.ConditionView, model.Condition),
        (read.NodeView, sent.NodeView),
        (read.InventoryView, model.Inventory),
        (read.PoolView, model.PoolFacts),
        (read.CpuView, model.CpuFacts),
        (read.AllocatedView, sent.Allocated),
        (read.OperationView, sent.OperationView),
        (read.StepView, model.OperationStep),
        (read.ProgressView, sent.Progress),
        (read.EventView, sent.EventView),
        (read.PlaceView, stream.Place),
        (read.PlanView, sent.PlacementView),
        (read.DryRunView, sent.PlanView),
        (read.PlannedVmView, sent.PlannedVm),
        (read.CandidateView, sent.CandidateView),
        (read.ReasonView, sent.ReasonView),
        (read.ClusterView, sent.ClusterView),
        (read.LeaderView, sent.LeaderView),
        (read.ReplicaView, sent.ReplicaView),
        (read.MemberView, sent.MemberView),
        (read.StoreView, sent.StoreView),
        (read.UsageView, sent.UsageView),
        (read.FiguresView, sent.Figures),
        (read.Page, sent.VmList),
    ],
)
def test_the_api_sends_every_field_that_is_read(reader: type[Struct], sender: type[Struct]) -> None:
    assert set(reader.__struct_fields__) <= set(sender.__struct_fields__)
