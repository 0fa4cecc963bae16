"""
Llama 4: one expert for each row, weighed by the router before it runs.

Dense files hold `experts.gate_up_proj` `[E, H, 2I]`, inputs first, the columns of gate before those of up.
"""

from __future__ import annotations

from quantplug.expertrules import PER_EXPERT, Ending, ExpertRules, stacked
from quantplug.names import Architecture

DENSE = stacked(Ending("", "weight", transposed=True))

LLAMA4 = Architecture(
    "llama4",
    ("llama4", "llama4_text"),
    routers=("feed_forward.router",),
    experts=ExpertRules(
        ("feed_forward.experts",),
        (PER_EXPERT, DENSE),
        count=("num_local_experts",),
        router_weight_on_input=True,
        shared="shared_expert",
    ),
)
