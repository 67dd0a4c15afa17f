"""Which store a policy needs."""

from __future__ import annotations

from ..plan import HeadPolicy
from .offload import OffloadedStore
from .recent import RecentStore
from .store import Store


def store_for(policy: HeadPolicy) -> Store | OffloadedStore:
    """An empty store where the policy places it."""
    return device_store(policy) if policy.placement is None else OffloadedStore(policy)


def device_store(policy: HeadPolicy) -> Store:
    """An empty store on the device, wherever the policy places it."""
    return RecentStore(policy) if policy.kv is not None and policy.kv.recent else Store(policy)
