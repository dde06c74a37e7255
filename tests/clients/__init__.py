"""Other people's clients and suites, unmodified, against a running server. `make clients`; not part of `make test`."""
