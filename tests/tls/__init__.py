"""Machines that trust certificates, and somebody who listens: `make tls-test`."""
