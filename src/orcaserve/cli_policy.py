"""`PolicyName`: a policy with its options on the command line."""

from __future__ import annotations

from typing import Any

import click

from orcaserve.core.order import OrderError
from orcaserve.core.orders import ORDERS
from orcaserve.core.policy import POLICIES, parse_policy

POLICY_HELP = f"NAME[,option=value…]: {', '.join([*POLICIES, *(name for name in ORDERS if name != 'fcfs')])}."


class PolicyName(click.ParamType):
    """A text that `parse_policy` understands."""

    name = "name"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            parse_policy(str(value))
        except OrderError as error:
            self.fail(str(error), param, ctx)
        return str(value)
