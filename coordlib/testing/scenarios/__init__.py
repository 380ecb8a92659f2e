"""Scenarios: small texts that drive whole clusters of production kernels message by message.

`script` reads them, `play` has the commands, `claims` what can be asserted, `stage` the processes, `wires` the network.
The language is described in docs/scenarios.md.
"""

from __future__ import annotations

from coordlib.testing.scenarios.play import Play, run_scenario
from coordlib.testing.scenarios.script import Command, Scenario, ScenarioError, parse, parse_file

__all__ = ["Command", "Play", "Scenario", "ScenarioError", "parse", "parse_file", "run_scenario"]
