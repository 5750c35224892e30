"""The interface of a coordinator. It belongs to the layer that needs it: see kvrep/runtime/coordinator.py."""

from __future__ import annotations

from kvrep.runtime.coordinator import Coordinator, CoordinatorStatus, NodeView

__all__ = ["Coordinator", "CoordinatorStatus", "NodeView"]
