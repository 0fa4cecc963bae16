"""
Peers: what somebody has today without this project. Each is left out, with the reason, where it is not installed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.gpu.peers.deepgemm import DeepGemm
from benchmarks.gpu.peers.dense import Bfloat16, ScaledProduct, TinyGemm
from benchmarks.gpu.peers.grouped import Bfloat16Grouped, ScaledGrouped
from benchmarks.gpu.peers.humming import Humming
from benchmarks.gpu.peers.hummingexperts import HummingExperts

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.gpu.contenders import Contender

PEERS: tuple[Callable[[], Contender], ...] = (
    Bfloat16,
    TinyGemm,
    lambda: ScaledProduct(given=False),
    lambda: ScaledProduct(given=True),
    DeepGemm,
    Humming,
    Bfloat16Grouped,
    ScaledGrouped,
    HummingExperts,
)
"""How each peer is made."""
