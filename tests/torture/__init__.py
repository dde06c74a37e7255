"""The reliability scorecard as programs: each row drives a real server and ends in one line with its figure.

`make torture` runs them at full size, `make test` a shorter cut of each. A row is a module of this package:

    ROWS = (Row("R1", "10 000 requests …", "2 s later nothing is left"),)

    def torture(setup: Setup) -> Iterator[Outcome]: ...

Rows that can be asked of any OpenAI-compatible server by its URL say `HAS_NEIGHBOURS = True`.
"""
